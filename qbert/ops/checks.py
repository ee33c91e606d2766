"""L5. What the arguments of an operation must be, said once for fakes, torch and native implementations.

Torch would broadcast a single value or take a packed row for a shorter one, and a kernel would read past the end of memory:
after these checks neither can happen. Functions named after an operation return the number of output channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8, Format, Role, get_scheme
from qbert.layout import PADDED_ROWS, Layout, layouts_for, qdata_shape, qdata_type
from qbert.reference import FLOAT_TABLE

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Longer rows could overflow the int32 sum of products of magnitude 127 * 127.
MAX_K = (2**31 - 1) // (INT8.qmax * INT8.qmax)

_LAYOUTS = {
    (fmt, a8): {each.value: each for each in layouts_for(fmt, a8)}
    for fmt in (INT8, INT4, DICT3, DICT4)
    for a8 in (False, True)
}


def _require(condition: bool, message: Callable[[], str]) -> None:
    """`torch._check`, which also takes symbolic conditions while tracing, without its price where there is nothing to say."""
    if condition is not True:
        torch._check(condition, message)


# ---- one tensor -----------------------------------------------------------------------------------------------------


def quantized(q: Tensor, s: Tensor) -> None:
    """Codes (t, k) and one scale a token."""
    _require(q.dtype == torch.int8 and q.dim() == 2, lambda: f"q must be (t, k) int8, got {q.dtype} {tuple(q.shape)}")
    _require(
        s.dtype == torch.float32 and s.dim() == 1 and s.shape[0] == q.shape[0],
        lambda: f"s must be ({q.shape[0]},) float32, one scale a token, got {s.dtype} {tuple(s.shape)}",
    )
    _require(q.shape[1] <= MAX_K, lambda: f"k is {q.shape[1]}; above {MAX_K} an int32 sum could overflow")


def activations(x: Tensor) -> None:
    """Floats (t, k)."""
    float_dtype("activations are", x.dtype)
    _require(x.dim() == 2, lambda: f"activations must be (t, k), got {tuple(x.shape)}")


def float_dtype(what: str, dtype: torch.dtype) -> None:
    """One of `FLOAT_DTYPES`."""

    def message() -> str:
        return f"{what} {dtype}; allowed: {', '.join(str(each).removeprefix('torch.') for each in FLOAT_DTYPES)}"

    _require(dtype in FLOAT_DTYPES, message)


def out_type(out: torch.dtype | float) -> torch.dtype:
    """Type of a linear's or attention's result: what `out_dtype` says, or int8 where there is an `out_scale` instead."""
    if not isinstance(out, torch.dtype):
        return torch.int8
    float_dtype("out_dtype is", out)
    return out


def channels(name: str, tensor: Tensor | None, n: int) -> None:
    """One value an output channel."""
    if tensor is not None:
        _require(tensor.shape == (n,), lambda: f"{name} must be ({n},), got {tuple(tensor.shape)}")


def same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """As many tokens of the same width."""
    _require(
        tensor.shape == other.shape,
        lambda: f"{name} is {tuple(tensor.shape)}, {other_name} is {tuple(other.shape)}; they must be the same",
    )


def ids_in_range(ids: Tensor, rows: int) -> None:
    """Looks at the values, so it is not for fakes."""
    allowed_dtypes = (torch.int32, torch.int64)  # torch would take uint8 and bool for a mask
    _require(ids.dtype in allowed_dtypes, lambda: f"ids are {ids.dtype}; allowed: torch.int32, torch.int64")
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        bad = low if low < 0 else high
        raise QBertError(f"embedding id {bad} is out of range; the table has {rows} rows (allowed: 0 ... {rows - 1})")


def bounds_cover(bounds: list[int], t: int) -> None:
    """Packed sequences cover all tokens: of a token in none of them nothing would be computed."""
    if bounds[0] != 0 or bounds[-1] != t or any(start > stop for start, stop in itertools.pairwise(bounds)):
        raise QBertError(f"cu_seqlens must ascend from 0 to {t}, got {bounds}")


def _typed(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _require(
        tensor.dtype == dtype and tensor.shape == shape,
        lambda: f"{name} must be {shape} {dtype}, got {tensor.dtype} {tuple(tensor.shape)}",
    )


# ---- a weight -------------------------------------------------------------------------------------------------------


def parse_layout(layout: str, fmt: Format, int8_activations: bool) -> Layout:
    """The layout of that name, if codes of that format can lie so."""
    allowed = _LAYOUTS[fmt, int8_activations]
    if layout not in allowed:
        raise QBertError(f"{fmt.name} codes have no layout {layout!r} here; allowed: {', '.join(allowed)}")
    return allowed[layout]


def _codes(qdata: Tensor, fmt: Format, layout: str, int8_activations: bool, held_rows: int, k: int) -> int:
    """The matrix's rows: those of `qdata`, or where padding hides them as many as another tensor holds."""
    named = parse_layout(layout, fmt, int8_activations)
    n = held_rows if named in PADDED_ROWS or qdata.dim() == 0 else qdata.shape[0]
    dtype, shape = qdata_type(named, fmt), qdata_shape(named, fmt, n, k)
    _require(
        qdata.dtype == dtype and qdata.shape == shape,
        lambda: (
            f"qdata of {n} rows of {k} {fmt.name} codes in layout {layout} must be {shape} {dtype}, "
            f"got {qdata.dtype} {tuple(qdata.shape)}; do the activations have {k} columns as the weight has?"
        ),
    )
    return n


def _int8(qdata: Tensor, scale: Tensor, layout: str, int8_activations: bool, k: int) -> int:
    n = _codes(qdata, INT8, layout, int8_activations, scale.numel(), k)
    channels("scale", scale, n)
    return n


def _groups(name: str, scale: Tensor, dtype: torch.dtype, n: int, k: int) -> None:
    _require(
        scale.dtype == dtype and scale.dim() == 2 and scale.shape[0] == n and k % max(1, scale.shape[1]) == 0,
        lambda: f"{name} must be ({n}, groups) {dtype} where groups divide {k}, got {scale.dtype} {tuple(scale.shape)}",
    )


def _dictionary(
    qdata: Tensor, codebook: Tensor, scale: Tensor | None, rowptr: Tensor, col: Tensor, delta: Tensor, layout: str, k: int
) -> int:  # fmt: skip
    """`scale` where the dictionary is int8; only then may there be several, for matrices that are stacked."""
    dtype = torch.float32 if scale is None else torch.int8
    _require(
        codebook.dtype == dtype
        and codebook.dim() in ((1,) if scale is None else (1, 2))
        and codebook.shape[-1] in (DICT3.codes, DICT4.codes),
        lambda: (
            f"codebook must be ({DICT3.codes},) or ({DICT4.codes},) {dtype}"
            f"{'' if scale is None else ', or several of them'}, got {codebook.dtype} {tuple(codebook.shape)}"
        ),
    )
    fmt = DICT3 if codebook.shape[-1] == DICT3.codes else DICT4
    n = _codes(qdata, fmt, layout, scale is not None, rowptr.numel() - 1, k)
    _typed("outlier_rowptr", rowptr, torch.int32, (n + 1,))
    _require(
        col.dtype in (torch.int16, torch.int32) and col.dim() == 1,
        lambda: f"outlier_col must be (outliers,) int16 or int32, got {col.dtype} {tuple(col.shape)}",
    )
    _typed("outlier_delta", delta, torch.float32, (col.shape[0],))
    if scale is not None:
        matrices = 1 if codebook.dim() == 1 else codebook.shape[0]
        _typed("scale", scale, torch.float32, (matrices,))
        _require(matrices > 0 and n % matrices == 0, lambda: f"{n} rows do not share {matrices} codebooks evenly")
    return n


# ---- operations -----------------------------------------------------------------------------------------------------


def w8a8_linear(q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, layout: str) -> int:
    """Also of `w8a8_linear_requant`."""
    quantized(q, s)
    n = _int8(qdata, scale, layout, True, q.shape[1])
    channels("bias", bias, n)
    return n


def w4a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, layout: str
) -> int:  # fmt: skip
    """Also of `w4a8_linear_requant`."""
    quantized(q, s)
    k = q.shape[1]
    n = _codes(qdata, INT4, layout, True, scale.numel(), k)
    channels("scale", scale, n)
    channels("bias", bias, n)
    if layout != Layout.INT8_EXPANDED.value:  # there they are part of the operand
        _groups("group_scale", group_scale, torch.uint8, n, k)
    return n


def gobo_linear(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, layout: str,
) -> int:  # fmt: skip
    """Also of `gobo_linear_requant`."""
    quantized(q, s)
    n = _dictionary(qdata, codebook, scale, outlier_rowptr, outlier_col, outlier_delta, layout, q.shape[1])
    channels("bias", bias, n)
    return n


def w8a16_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, layout: str) -> int:
    """Float activations, int8 weights."""
    activations(x)
    n = _int8(qdata, scale, layout, False, x.shape[1])
    channels("bias", bias, n)
    return n


def w4a16_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, layout: str) -> int:
    """Float activations, int4 weights with a scale a group."""
    activations(x)
    n = _codes(qdata, INT4, layout, False, scale.shape[0], x.shape[1])
    _groups("scale", scale, torch.bfloat16, n, x.shape[1])
    channels("bias", bias, n)
    return n


def gobo_a16_linear(
    x: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    bias: Tensor | None, layout: str,
) -> int:  # fmt: skip
    """Float activations, dictionary weights."""
    activations(x)
    n = _dictionary(qdata, codebook, None, outlier_rowptr, outlier_col, outlier_delta, layout, x.shape[1])
    channels("bias", bias, n)
    return n


def table(tensors: list[Tensor], scheme: str, layout: str, k: int) -> int:
    """Rows of an embedding table of an embedding scheme, or of ``"float"``; its tensors come in the order of `plain_specs`.

    Raises:
        QBertError: an unknown scheme or layout, or another number of tensors.
    """
    fmt = None if scheme == FLOAT_TABLE else get_scheme(scheme, Role.EMBEDDING).weight
    wanted = 1 if fmt is None else 5 if fmt in (DICT3, DICT4) else 2
    if len(tensors) != wanted:
        raise QBertError(f"an embedding table of scheme {scheme} is {wanted} tensors, got {len(tensors)}")
    if fmt is None:
        float_dtype("the float table is", tensors[0].dtype)
        _typed("the float table", tensors[0], tensors[0].dtype, (tensors[0].shape[0], k))
        return tensors[0].shape[0]
    if fmt in (DICT3, DICT4):
        qdata, codebook, rowptr, col, delta = tensors
        return _dictionary(qdata, codebook, None, rowptr, col, delta, layout, k)
    qdata, scale = tensors
    if fmt is INT8:
        if layout != Layout.PLAIN.value:
            raise QBertError(f"an int8 table has no layout {layout!r}; allowed: {Layout.PLAIN.value}")
        return _int8(qdata, scale, layout, False, k)
    if layout not in (Layout.PLAIN.value, Layout.BYTES.value):
        raise QBertError(f"an int4 table has no layout {layout!r}; allowed: {Layout.PLAIN.value}, {Layout.BYTES.value}")
    n = _codes(qdata, fmt, layout, False, scale.shape[0], k)
    _groups("scale", scale, torch.bfloat16, n, k)
    return n


def attention(qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int) -> None:
    """Also of `attention_int8_requant`; what `bounds_cover` checks is not looked at here."""
    _require(num_heads >= 1, lambda: f"num_heads is {num_heads}; allowed: 1 or more")
    _require(
        qkv.dtype == torch.int8 and qkv.dim() == 2 and qkv.shape[1] % (3 * num_heads) == 0,
        lambda: f"qkv must be (t, 3 * {num_heads} * head_dim) int8, got {qkv.dtype} {tuple(qkv.shape)}",
    )
    _require(
        scales.dtype == torch.float32 and (scales.shape == (3,) or scales.shape == (qkv.shape[0], 3)),
        lambda: f"scales must be (3,) or ({qkv.shape[0]}, 3) float32, got {scales.dtype} {tuple(scales.shape)}",
    )
    _require(
        cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1,
        lambda: f"cu_seqlens must be (sequences + 1,) int32, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}",
    )


def add_layer_norm_quantize(y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> None:
    """Two floats (t, k), one gain and one shift a column."""
    same_shape("y", y, "residual", residual)
    channels("gamma", gamma, residual.shape[-1])
    channels("beta", beta, residual.shape[-1])


def w8a8_linear_add_norm(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor,
    beta: Tensor, layout: str,
) -> int:  # fmt: skip
    """A linear whose result has residual's shape and type."""
    n = w8a8_linear(q, s, qdata, scale, bias, layout)
    float_dtype("residual is", residual.dtype)
    _require(
        residual.shape == (q.shape[0], n),
        lambda: f"residual must be ({q.shape[0]}, {n}) as the linear's result, got {tuple(residual.shape)}",
    )
    channels("gamma", gamma, n)
    channels("beta", beta, n)
    return n


def embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, token_types: Tensor, gamma: Tensor, beta: Tensor,
) -> int:  # fmt: skip
    """Returns the word table's rows. What `ids_in_range` checks is not looked at here."""
    same_shape("ids", ids, "position_ids", position_ids)
    same_shape("ids", ids, "token_type_ids", token_type_ids)
    k = positions.shape[1]
    _require(
        token_types.dim() == 2 and token_types.shape[1] == k,
        lambda: f"token_types must be (types, {k}) as positions are, got {tuple(token_types.shape)}",
    )
    channels("gamma", gamma, k)
    channels("beta", beta, k)
    return table(words, scheme, layout, k)
