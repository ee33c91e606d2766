"""L5. The instruction set as torch operators, ``torch.ops.qbert.*``: schema, fake, CPU and CUDA implementations.

The only caller of kernels and extensions. `define` + `impl` + `register_fake` because `custom_op` costs several times more a
call. Every implementation computes what `reference` defines; the CPU ones use the best that torch itself offers, the CUDA
ones are Triton kernels, or the reference where there is none yet; `dispatch.select_kernel` says which.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert import dispatch, reference
from qbert.errors import QBertError
from qbert.formats import INT8, SCHEMES
from qbert.layout import Layout, unpack_codes
from qbert.target import cpu_target

log = logging.getLogger(__name__)
_library = torch.library.Library("qbert", "DEF")

# int8 products are at most 2**14, so this many of them stay below 2**24, where float32 is still exact.
_EXACT_FLOAT32_TERMS = 1024
# Longer rows could overflow the int32 sum of products of magnitude 127 * 127.
MAX_K = (2**31 - 1) // (INT8.qmax * INT8.qmax)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_TRITON_BLOCK = 32  # one element a thread of a warp

_GOBO = "Tensor qdata, Tensor codebook, Tensor scale, Tensor outlier_rowptr, Tensor outlier_col, Tensor outlier_delta"
_GOBO_FLOAT = "Tensor qdata, Tensor codebook, Tensor outlier_rowptr, Tensor outlier_col, Tensor outlier_delta"
_TOKENS = "Tensor q, Tensor s"
_END = "Tensor? bias, str activation"

SCHEMAS: dict[str, str] = {
    "quantize_per_token": "(Tensor x) -> (Tensor, Tensor)",
    "w8a8_linear": f"({_TOKENS}, Tensor qdata, Tensor scale, {_END}, ScalarType out_dtype) -> Tensor",
    "w8a8_linear_requant": f"({_TOKENS}, Tensor qdata, Tensor scale, {_END}, float out_scale) -> Tensor",
    "w4a8_linear": f"({_TOKENS}, Tensor qdata, Tensor group_scale, Tensor scale, {_END}, ScalarType out_dtype, str layout)"
    " -> Tensor",
    "w4a8_linear_requant": f"({_TOKENS}, Tensor qdata, Tensor group_scale, Tensor scale, {_END}, float out_scale,"
    " str layout) -> Tensor",
    "gobo_linear": f"({_TOKENS}, {_GOBO}, {_END}, ScalarType out_dtype, str layout) -> Tensor",
    "gobo_linear_requant": f"({_TOKENS}, {_GOBO}, {_END}, float out_scale, str layout) -> Tensor",
    "w8a16_linear": f"(Tensor x, Tensor qdata, Tensor scale, {_END}) -> Tensor",
    "w4a16_linear": f"(Tensor x, Tensor qdata, Tensor scale, {_END}, str layout) -> Tensor",
    "gobo_a16_linear": f"(Tensor x, {_GOBO_FLOAT}, {_END}, str layout) -> Tensor",
    "w8_embedding": "(Tensor ids, Tensor qdata, Tensor scale, ScalarType out_dtype) -> Tensor",
    "w4_embedding": "(Tensor ids, Tensor qdata, Tensor scale, ScalarType out_dtype, int k, str layout) -> Tensor",
    "gobo_embedding": f"(Tensor ids, {_GOBO_FLOAT}, ScalarType out_dtype, int k, str layout) -> Tensor",
    "attention_int8": "(Tensor qkv, Tensor scales, Tensor cu_seqlens, int num_heads, float softmax_scale,"
    " ScalarType out_dtype) -> Tensor",
    "add_layer_norm_quantize": "(Tensor y, Tensor residual, Tensor gamma, Tensor beta, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "embed_layer_norm_quantize": "(Tensor ids, Tensor position_ids, Tensor token_type_ids, Tensor[] words, str scheme,"
    " str layout, Tensor positions, Tensor token_types, Tensor gamma, Tensor beta, float eps) -> (Tensor, Tensor, Tensor)",
}


# ---- checks shared by fakes and implementations ---------------------------------------------------------------------


def _check_quantized(q: Tensor, s: Tensor) -> None:
    torch._check(
        q.dtype == torch.int8 and q.dim() == 2, lambda: f"q must be (t, k) int8, got {q.dtype} {tuple(q.shape)}"
    )
    torch._check(
        s.dtype == torch.float32 and s.dim() == 1 and s.shape[0] == q.shape[0],
        lambda: f"s must be ({q.shape[0]},) float32, one scale a token, got {s.dtype} {tuple(s.shape)}",
    )
    torch._check(q.shape[1] <= MAX_K, lambda: f"k is {q.shape[1]}; above {MAX_K} an int32 sum could overflow")


def _check_float(x: Tensor) -> None:
    _check_float_dtype("activations are", x.dtype)
    torch._check(x.dim() == 2, lambda: f"activations must be (t, k), got {tuple(x.shape)}")


def _check_float_dtype(what: str, dtype: torch.dtype) -> None:
    def message() -> str:
        return f"{what} {dtype}; allowed: {', '.join(str(each).removeprefix('torch.') for each in FLOAT_DTYPES)}"

    torch._check(dtype in FLOAT_DTYPES, message)


def _check_channels(name: str, tensor: Tensor | None, n: int) -> None:
    """One value an output channel: torch would broadcast a single value, a kernel would read past it."""
    if tensor is not None:
        torch._check(tensor.shape == (n,), lambda: f"{name} must be ({n},), got {tuple(tensor.shape)}")


def _check_width(name: str, tensor: Tensor, k: int) -> None:
    torch._check(tensor.shape[-1] == k, lambda: f"{name} has {tensor.shape[-1]} columns, the activations have {k}")


def _check_ids(ids: Tensor, rows: int) -> None:
    """Fails for ids outside the table: reading there would be out of bounds."""
    allowed_dtypes = (torch.int32, torch.int64)  # torch would take uint8 and bool for a mask
    torch._check(ids.dtype in allowed_dtypes, lambda: f"ids are {ids.dtype}; allowed: torch.int32, torch.int64")
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        bad = low if low < 0 else high
        raise QBertError(f"embedding id {bad} is out of range; the table has {rows} rows (allowed: 0 ... {rows - 1})")


def _check_qkv(qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int) -> None:
    torch._check(
        qkv.dtype == torch.int8 and qkv.dim() == 2 and qkv.shape[1] % (3 * num_heads) == 0,
        lambda: f"qkv must be (t, 3 * {num_heads} * head_dim) int8, got {qkv.dtype} {tuple(qkv.shape)}",
    )
    torch._check(
        scales.dtype == torch.float32 and scales.shape == (3,),
        lambda: f"scales must be (3,) float32, got {scales.dtype} {tuple(scales.shape)}",
    )
    torch._check(
        cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1,
        lambda: f"cu_seqlens must be (sequences + 1,) int32, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}",
    )


def _check_bounds(bounds: list[int], t: int) -> None:
    """Fails unless packed sequences cover all tokens: of a token in none of them nothing would be computed."""
    if bounds[0] != 0 or bounds[-1] != t or any(start > stop for start, stop in itertools.pairwise(bounds)):
        raise QBertError(f"cu_seqlens must ascend from 0 to {t}, got {bounds}")


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Torch would broadcast; a kernel reads as many tokens from each."""
    torch._check(
        tensor.shape == other.shape,
        lambda: f"{name} is {tuple(tensor.shape)}, {other_name} is {tuple(other.shape)}; they must be the same",
    )


# ---- fakes: shapes and types only -----------------------------------------------------------------------------------


def _fake_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_float(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_integer_linear(q: Tensor, s: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    """All (t, k) int8 products; the output type is the one `torch.dtype` among the arguments, int8 where there is none."""
    _check_quantized(q, s)
    out_dtype = next((each for each in rest if isinstance(each, torch.dtype)), torch.int8)
    return q.new_empty(q.shape[0], qdata.shape[0], dtype=out_dtype)


def _fake_float_linear(x: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    _check_float(x)
    return x.new_empty(x.shape[0], qdata.shape[0])


def _fake_w8_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return qdata.new_empty(*ids.shape, qdata.shape[1], dtype=out_dtype)


def _fake_packed_embedding(ids: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    *_, out_dtype, k, _layout = rest
    return qdata.new_empty(*ids.shape, k, dtype=out_dtype)


def _fake_attention_int8(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_dtype: torch.dtype
) -> Tensor:
    _check_qkv(qkv, scales, cu_seqlens, num_heads)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3, dtype=out_dtype)


def _fake_normed(like: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    k = like.shape[-1]
    return like.new_empty(t, k), like.new_empty(t, k, dtype=torch.int8), like.new_empty(t, dtype=torch.float32)


def _fake_add_layer_norm_quantize(y: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_shape("y", y, "residual", residual)
    return _fake_normed(residual, residual.shape[0])


def _fake_embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_same_shape("ids", ids, "position_ids", position_ids)
    _check_same_shape("ids", ids, "token_type_ids", token_type_ids)
    return _fake_normed(positions, ids.shape[0])


# ---- CPU: the best that torch offers --------------------------------------------------------------------------------


def _cpu_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_float(x)
    x = x.to(torch.float32)
    absmax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = absmax.isfinite()
    if not bool(finite.all()):  # rare: the reference's order of operations, which costs three more passes
        return reference.quantize_per_token(x)
    absmax.clamp_(min=reference.MIN_ABSMAX)
    qmax = torch.full_like(absmax, INT8.qmax)
    codes = (x * (qmax / absmax)[:, None]).round_().clamp_(-INT8.qmax, INT8.qmax)
    return codes.to(torch.int8), absmax / qmax


def _cpu_integer_product(q: Tensor, operand: Tensor) -> Tensor:
    """(t, k) int8 times (n, k) int8 transposed as float32 (t, n), from exact int32 sums."""
    if dispatch.select_kernel("w8a8_linear", cpu_target()).name == dispatch.TORCH_INT_MM:
        return torch._int_mm(q, operand.t()).to(torch.float32)
    total = torch.zeros(q.shape[0], operand.shape[0], dtype=torch.int32)
    for start in range(0, q.shape[1], _EXACT_FLOAT32_TERMS):
        chunk = slice(start, start + _EXACT_FLOAT32_TERMS)
        total += (q[:, chunk].to(torch.float32) @ operand[:, chunk].to(torch.float32).t()).to(torch.int32)
    return total.to(torch.float32)


def _cpu_w8a8(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    _check_quantized(q, s)
    _check_width("qdata", qdata, q.shape[1])
    _check_channels("scale", scale, qdata.shape[0])
    _check_channels("bias", bias, qdata.shape[0])
    _check_float_dtype("out_dtype is", out_dtype)
    y = _cpu_integer_product(q, qdata).mul_(scale).mul_(s[:, None])
    return reference.finish(y, bias, activation, out_dtype)


def _cpu_w4a8(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    _check_quantized(q, s)
    operand = reference.expand_int4(qdata, group_scale, q.shape[1], layout)
    return _cpu_w8a8(q, s, operand, scale, bias, activation, out_dtype)


def _cpu_gobo(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    _check_quantized(q, s)
    operand = reference.expand_dictionary(qdata, codebook, q.shape[1], layout)
    _check_width("qdata", operand, q.shape[1])
    _check_channels("bias", bias, operand.shape[0])
    _check_float_dtype("out_dtype is", out_dtype)
    y = _cpu_integer_product(q, operand).mul_(scale)
    y = _cpu_add_outliers(y, q, outlier_rowptr, outlier_col, outlier_delta)
    return reference.finish(y.mul_(s[:, None]), bias, activation, out_dtype)


def _cpu_add_outliers(y: Tensor, q: Tensor, rowptr: Tensor, col: Tensor, delta: Tensor) -> Tensor:
    """y (t, n) float32 plus (t, k) int8 times sparse rows (n, k) transposed.

    In float64 a float32 times an int8 is exact, and so is the sum of a row's few of them: the order in which MKL adds,
    which depends on the batch and on the threads, does not matter. In float32 it would show in the last bit.
    """
    if delta.numel() == 0 or q.shape[0] == 0:
        return y
    size = (y.shape[1], q.shape[1])
    wide = q.to(torch.float64)
    if not torch.backends.mkl.is_available():
        dense = reference.dense_outliers(rowptr, col, delta, *size)
        return y.add_((wide @ dense.to(torch.float64).t()).to(torch.float32))
    _silence_sparse_csr_warning()
    rows = torch.sparse_csr_tensor(rowptr, col.to(torch.int32), delta.to(torch.float64), size, check_invariants=False)
    correction = torch.addmm(torch.zeros(y.shape, dtype=torch.float64), wide, rows.t())
    return y.add_(correction.to(torch.float32))


@functools.cache
def _silence_sparse_csr_warning() -> None:
    """Torch says once a process that sparse CSR is in beta; users of this package cannot act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _cpu_float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    _check_float(x)
    _check_width("weight", weight, x.shape[1])
    _check_channels("bias", bias, weight.shape[0])
    y = torch.nn.functional.linear(x, weight.to(x.dtype))
    return reference.finish(y.to(torch.float32), bias, activation, x.dtype)


def _cpu_w8a16(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    _check_channels("scale", scale, qdata.shape[0])
    return _cpu_float_linear(x, qdata.to(torch.float32) * scale[:, None], bias, activation)


def _cpu_w4a16(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    _check_float(x)
    return _cpu_float_linear(x, reference.dequantize_int4(qdata, scale, x.shape[1], layout), bias, activation)


def _cpu_gobo_a16(
    x: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    bias: Tensor | None, activation: str, layout: str,
) -> Tensor:  # fmt: skip
    _check_float(x)
    weight = reference.dequantize_dictionary(
        qdata, codebook, outlier_rowptr, outlier_col, outlier_delta, x.shape[1], layout
    )
    return _cpu_float_linear(x, weight, bias, activation)


def _cpu_w8_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check_ids(ids, qdata.shape[0])
    return reference.w8_embedding(ids, qdata, scale, out_dtype)


def _cpu_w4_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype, k: int, layout: str) -> Tensor:
    _check_ids(ids, qdata.shape[0])
    return reference.w4_embedding(ids, qdata, scale, out_dtype, k, layout)


def _cpu_gobo_embedding(
    ids: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    out_dtype: torch.dtype, k: int, layout: str,
) -> Tensor:  # fmt: skip
    """Unpacks and patches the rows that are asked for, not the table."""
    _check_ids(ids, qdata.shape[0])
    flat = ids.reshape(-1).to(torch.int64)
    codes = qdata[flat]
    if Layout(layout) is Layout.PLAIN:
        codes = unpack_codes(codes, SCHEMES["gobo3" if codebook.numel() == 8 else "gobo4"].weight, k)
    rows = codebook[codes.to(torch.int32)]
    starts = outlier_rowptr[flat].to(torch.int64)
    counts = outlier_rowptr[flat + 1].to(torch.int64) - starts
    token = torch.arange(flat.numel()).repeat_interleave(counts)
    within = torch.arange(token.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    source = starts.repeat_interleave(counts) + within
    rows[token, outlier_col[source].to(torch.int64)] += outlier_delta[source]
    return rows.view(*ids.shape, k).to(out_dtype)


def _cpu_attention_int8(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_dtype: torch.dtype
) -> Tensor:
    """One sequence at a time in float32: its result cannot depend on its neighbours."""
    _check_qkv(qkv, scales, cu_seqlens, num_heads)
    _check_float_dtype("out_dtype is", out_dtype)
    t, width = qkv.shape
    bounds = cu_seqlens.tolist()
    _check_bounds(bounds, t)
    query, key, value = qkv.view(t, 3, num_heads, width // (3 * num_heads)).to(torch.float32).permute(1, 2, 0, 3)
    factor = float(scales[0]) * float(scales[1]) * softmax_scale
    out = torch.empty(t, num_heads, query.shape[-1])
    for start, stop in itertools.pairwise(bounds):
        span = slice(start, stop)
        weights = torch.softmax(query[:, span] @ key[:, span].transpose(1, 2) * factor, dim=-1)
        out[span] = (weights @ value[:, span]).transpose(0, 1) * scales[2]
    return out.view(t, width // 3).to(out_dtype)


def _cpu_add_layer_norm_quantize(
    y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_shape("y", y, "residual", residual)
    return reference.add_layer_norm_quantize(y, residual, gamma, beta, eps)


def _cpu_embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, token_types: Tensor, gamma: Tensor, beta: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_same_shape("ids", ids, "position_ids", position_ids)
    _check_same_shape("ids", ids, "token_type_ids", token_type_ids)
    for which, table in ((ids, words[0]), (position_ids, positions), (token_type_ids, token_types)):
        _check_ids(which, table.shape[0])
    k = positions.shape[1]
    if SCHEMES[scheme].has_dictionary:  # the reference would unpack the whole table
        qdata, codebook, rowptr, col, delta = words
        rows = _cpu_gobo_embedding(ids, qdata, codebook, rowptr, col, delta, torch.float32, k, layout)
    else:
        rows = reference.lookup_rows(ids, words, scheme, layout, k)
    return reference.norm_of_rows(rows, position_ids, token_type_ids, positions, token_types, gamma, beta, eps)


# ---- CUDA: Triton kernels -------------------------------------------------------------------------------------------


def triton_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_per_token` by `kernels/quantize_per_token.py`; on CPU tensors only in Triton's interpreter."""
    from qbert.kernels.quantize_per_token import quantize_per_token_kernel

    _check_float(x)
    t, k = x.shape
    codes = x.new_empty(t, k, dtype=torch.int8)
    scale = x.new_empty(t, dtype=torch.float32)
    if t and k:
        x = x if x.stride(1) == 1 else x.contiguous()
        block = max(_MIN_TRITON_BLOCK, 1 << (k - 1).bit_length())
        warps = _row_warps(block)
        # Without fusion: a fused multiply-add rounds once where the reference rounds twice.
        quantize_per_token_kernel[(t,)](
            x, codes, scale, k, x.stride(0), BLOCK_K=block, num_warps=warps, enable_fp_fusion=False
        )
    return codes, scale.fill_(reference.MIN_ABSMAX / INT8.qmax) if k == 0 else scale


def _row_warps(block: int) -> int:
    """Warps for a row kernel: eight to sixteen elements a thread, which are two 16-byte loads of a half type."""
    return min(16, max(1, block // 512))


# ---- registration ---------------------------------------------------------------------------------------------------


def _requantized(linear: Callable[..., Tensor], out_scale_at: int) -> Callable[..., Tensor]:
    """The int8-out variant of an integer linear: float32 out, then one static scale, at argument `out_scale_at`."""

    @functools.wraps(linear)
    def requantized(*args: Any) -> Tensor:
        float_args = (*args[:out_scale_at], torch.float32, *args[out_scale_at + 1 :])
        return reference.requantize(linear(*float_args), args[out_scale_at])

    return requantized


def _logged_once(operation: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as a CUDA implementation: exact, slow, and it says so the first time."""

    @functools.cache
    def warn() -> None:
        log.warning(
            "qbert::%s runs as the plain-torch reference on CUDA in this version: exact, but not fast", operation
        )

    @functools.wraps(implementation)
    def logged(*args: Any) -> Any:
        warn()
        return implementation(*args)

    return logged


# Operation -> (fake, CPU, reference). `*_requant` take `out_scale` where their float twins take `out_dtype`.
_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "quantize_per_token": (_fake_quantize_per_token, _cpu_quantize_per_token, reference.quantize_per_token),
    "w8a8_linear": (_fake_integer_linear, _cpu_w8a8, reference.w8a8_linear),
    "w8a8_linear_requant": (_fake_integer_linear, _requantized(_cpu_w8a8, 6), _requantized(reference.w8a8_linear, 6)),
    "w4a8_linear": (_fake_integer_linear, _cpu_w4a8, reference.w4a8_linear),
    "w4a8_linear_requant": (_fake_integer_linear, _requantized(_cpu_w4a8, 7), _requantized(reference.w4a8_linear, 7)),
    "gobo_linear": (_fake_integer_linear, _cpu_gobo, reference.gobo_linear),
    "gobo_linear_requant": (_fake_integer_linear, _requantized(_cpu_gobo, 10), _requantized(reference.gobo_linear, 10)),
    "w8a16_linear": (_fake_float_linear, _cpu_w8a16, reference.w8a16_linear),
    "w4a16_linear": (_fake_float_linear, _cpu_w4a16, reference.w4a16_linear),
    "gobo_a16_linear": (_fake_float_linear, _cpu_gobo_a16, reference.gobo_a16_linear),
    "w8_embedding": (_fake_w8_embedding, _cpu_w8_embedding, reference.w8_embedding),
    "w4_embedding": (_fake_packed_embedding, _cpu_w4_embedding, reference.w4_embedding),
    "gobo_embedding": (_fake_packed_embedding, _cpu_gobo_embedding, reference.gobo_embedding),
    "attention_int8": (_fake_attention_int8, _cpu_attention_int8, reference.attention_int8),
    "add_layer_norm_quantize": (
        _fake_add_layer_norm_quantize, _cpu_add_layer_norm_quantize, reference.add_layer_norm_quantize,
    ),
    "embed_layer_norm_quantize": (
        _fake_embed_layer_norm_quantize, _cpu_embed_layer_norm_quantize, reference.embed_layer_norm_quantize,
    ),
}  # fmt: skip


def reference_of(operation: str) -> Callable[..., Any]:
    """The reference with exactly the operator's arguments; tests and benchmarks compare with it."""
    return _IMPLEMENTATIONS[operation][2]


_TRITON: dict[str, Callable[..., Any]] = {"quantize_per_token": triton_quantize_per_token}


def _register() -> None:
    for operation, schema in SCHEMAS.items():
        fake, cpu, slow = _IMPLEMENTATIONS[operation]
        _library.define(f"{operation}{schema}")
        _library.impl(operation, cpu, "CPU")
        _library.impl(operation, _TRITON.get(operation) or _logged_once(operation, slow), "CUDA")
        torch.library.register_fake(f"qbert::{operation}", fake, lib=_library)


_register()
