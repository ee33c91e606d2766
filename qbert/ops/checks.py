"""What the arguments of an operation must be, said once for fakes and all implementations.

Torch would broadcast a single value or take a packed row for a shorter one, and a kernel would read past the end of memory:
after these checks neither can happen.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import INT8, Role, Scheme
from qbert.ops.abi import FLOAT_DTYPES
from qbert.weight import Layout, Weight, plain_specs
from qbert.weight.layout import layouts_of, qdata_shape, qdata_type
from qbert.weight.tensor import recall, tensor_names

# Longer rows could overflow the int32 sum of products of magnitude 127 * 127.
MAX_K = (2**31 - 1) // (INT8.qmax * INT8.qmax)


class Like(NamedTuple):
    """Shape and type of a result."""

    shape: Sequence[int]
    dtype: torch.dtype


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
    if dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(each).removeprefix("torch.") for each in FLOAT_DTYPES)
        torch._check(False, lambda: f"{what} {dtype}; allowed: {allowed}")


def out_type(out: torch.dtype | float) -> torch.dtype:
    """Type of a linear's or attention's result: the float type that `out` is, or int8 where it is a static scale."""
    if not isinstance(out, torch.dtype):
        if not (0 < out < math.inf):
            raise QBertError(f"out_scale is {out}; allowed: finite and above 0")
        return torch.int8
    float_dtype("out_dtype is", out)
    return out


def zero(code: int, out: torch.dtype | float) -> None:
    """The code of 0 in an int8 result with a static scale; 0 of a float result."""
    largest = 0 if isinstance(out, torch.dtype) else INT8.qmax
    if not -largest <= code <= largest:
        raise QBertError(
            f"zero is {code}; allowed: {f'{-largest} ... {largest}' if largest else '0 of a float result'}"
        )


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


# ---- a weight -------------------------------------------------------------------------------------------------------


def parse_weight(tensors: Sequence[Tensor], scheme: Scheme, layout: str, k: int) -> Weight:
    """A weight from an operator's arguments; `weight` checks its tensors.

    Raises:
        QBertError: another number of tensors, or a layout that the scheme's codes cannot be in.
    """
    names = tensor_names(scheme)
    if len(tensors) != len(names):
        raise QBertError(f"a weight of scheme {scheme.name} is {len(names)} tensors, got {len(tensors)}")
    if not torch.compiler.is_compiling():
        known = recall(tensors, scheme, layout, k)
        if known is not None:
            return known
    allowed = _layouts(scheme)
    if layout not in allowed:
        raise QBertError(f"{scheme.name} codes have no layout {layout!r} here; allowed: {', '.join(allowed)}")
    return Weight.of(tensors, scheme, allowed[layout], k)


@functools.cache
def _layouts(scheme: Scheme) -> dict[str, Layout]:
    return {each.value: each for each in layouts_of(scheme)}


def weight(held: Weight) -> None:
    """Every tensor has the type and shape that scheme, shape and layout ask for, all on one device. Looked at once a weight."""
    if torch.compiler.is_compiling():
        _check_weight(held)
    else:
        held.prepared(_check_weight)


def _check_weight(held: Weight) -> bool:
    n, k = held.shape
    columns = held.tensors.get("outlier_col")
    outliers = 0 if columns is None else columns.shape[0] if columns.dim() else -1
    specs = (_specs if all(type(each) is int for each in (n, k, outliers)) else _specs.__wrapped__)(
        held.scheme, n, k, held.layout, held.matrices, outliers
    )
    _require(n >= 0, lambda: f"outlier_rowptr of a {held.scheme.name} weight must be (n + 1,), got (0,)")
    for name, dtypes, shape in specs:
        found = held.tensors[name]
        _require(
            found.dtype in dtypes and found.shape == shape, functools.partial(_is_another, held, name, dtypes, shape)
        )
        if found.device != held.device:
            raise QBertError(
                f"{name} of a {held.scheme.name} weight is on {found.device}, its qdata is on {held.device}"
            )
    return True


def _is_another(held: Weight, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> str:
    found = held.tensors[name]
    return (
        f"{name} of a {held.scheme.name} weight {held.shape} in layout {held.layout.value} must be {shape} "
        f"{' or '.join(map(str, dtypes))}, got {found.dtype} {tuple(found.shape)}; "
        f"do the activations have {held.k} columns as the weight has?"
    )


@functools.lru_cache(maxsize=4096)
def _specs(
    scheme: Scheme, n: int, k: int, layout: Layout, matrices: int, outliers: int
) -> list[tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]]:
    """(name, allowed types, shape) of each tensor that is read in that layout."""
    group = scheme.group_size
    if group is not None and k % group:
        raise QBertError(f"k is {k}, which groups of {group} do not divide (scheme {scheme.name})")
    if matrices > 1 and (scheme.activation is None or n % matrices):
        raise QBertError(f"{n} rows of scheme {scheme.name} do not share {matrices} codebooks evenly")
    found: list[tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]] = []
    for name, spec in plain_specs(scheme, (n, k), max(outliers, 0)).items():
        dtypes: tuple[torch.dtype, ...] = (spec.dtype,)
        shape = spec.shape
        if name == "qdata":
            dtypes, shape = (qdata_type(layout, scheme.weight),), qdata_shape(layout, scheme.weight, n, k)
        elif name == "group_scale" and layout is Layout.INT8_EXPANDED:
            continue  # part of the operand
        elif name == "outlier_col":
            dtypes = (torch.int16, torch.int32)
        elif name == "codebook" and matrices > 1:
            shape = (matrices, *shape)
        elif name == "scale" and scheme.has_dictionary:
            shape = (matrices,)
        found.append((name, dtypes, tuple(shape)))
    return found


def table(held: Weight) -> None:
    """A weight of an embedding scheme."""
    if Role.EMBEDDING not in held.scheme.roles:
        raise QBertError(f"scheme {held.scheme.name} is not for embeddings")
    weight(held)


# ---- operations -----------------------------------------------------------------------------------------------------


def linear(x: Tensor, s: Tensor | None, held: Weight, bias: Tensor | None) -> None:
    """Tokens, a weight that takes such tokens, and a bias for each of its channels."""
    if (s is None) != (held.scheme.activation is None):
        has = "int8 codes with scales" if held.scheme.activation is not None else "floats without scales"
        raise QBertError(f"scheme {held.scheme.name} takes activations as {has}")
    if Role.LINEAR not in held.scheme.roles:
        raise QBertError(f"scheme {held.scheme.name} is not for linears")
    if s is None:
        activations(x)
    else:
        quantized(x, s)
    _require(x.shape[1] == held.k, lambda: f"activations have {x.shape[1]} columns, the weight has {held.k}")
    weight(held)
    channels("bias", bias, held.n)


def gated(held: Weight) -> None:
    """Two rows of a weight for each channel of the result."""
    if held.n % 2:
        raise QBertError(f"the weight of a gated linear has {held.n} rows; allowed: even numbers, two a channel")


def attention(
    qkv: Tensor, scales: Tensor | None, cu_seqlens: Tensor, heads: int, softmax_scale: float, parts: int
) -> None:
    """What `bounds_cover` and `positions_cover` check is not looked at here.

    Args:
        parts: 3, or 2 where the queries lie elsewhere.
    """
    _require(heads >= 1, lambda: f"heads is {heads}; allowed: 1 or more")
    _require(
        (qkv.dtype == torch.int8 or qkv.dtype in FLOAT_DTYPES)
        and qkv.dim() == 2
        and qkv.shape[1] % (parts * heads) == 0,
        lambda: f"qkv must be (t, {parts} * {heads} * head_dim) int8 or float, got {qkv.dtype} {tuple(qkv.shape)}",
    )
    _attention_scales(qkv, scales, parts)
    _require(
        cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1,
        lambda: f"cu_seqlens must be (sequences + 1,) int32, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}",
    )
    if not (0 < softmax_scale < math.inf):
        raise QBertError(f"softmax_scale is {softmax_scale}; allowed: finite and above 0")


def _attention_scales(qkv: Tensor, scales: Tensor | None, parts: int) -> None:
    codes = qkv.dtype == torch.int8
    if scales is None:
        _require(
            not codes, lambda: f"scales is None with int8 qkv; allowed: (3,) or (t, {parts}), or None with float qkv"
        )
        return
    each = f" or ({qkv.shape[0]}, {parts})" if codes else ""
    _require(
        scales.dtype == torch.float32 and (scales.shape == (3,) or (scales.shape == (qkv.shape[0], parts) and codes)),
        lambda: f"scales must be (3,){each} float32, got {scales.dtype} {tuple(scales.shape)}",
    )


def attention_pattern(
    window: int | None, bias: Tensor | None, rotary: Tensor | None, qkv: torch.dtype, heads: int, head_dim: int
) -> None:
    """What else decides which keys a query sees, and what it thinks of them."""
    if window is not None:
        _require(window >= 0, lambda: f"window is {window}; allowed: 0 or more, or None for the whole sequence")
    if bias is not None:
        _require(
            bias.dtype == torch.float32 and bias.dim() == 2 and bias.shape[0] == heads and bias.shape[1] % 2 == 1,
            lambda: f"bias must be ({heads}, 2 * reach + 1) float32, got {bias.dtype} {tuple(bias.shape)}",
        )
    if rotary is not None:
        _require(qkv != torch.int8, lambda: "rotary with int8 qkv; allowed: float qkv, which is rounded afterwards")
        _require(head_dim % 2 == 0, lambda: f"rotary with heads of {head_dim}; allowed: an even size")
        _require(
            rotary.dtype == torch.float32 and rotary.dim() == 2 and rotary.shape[1] == head_dim,
            lambda: f"rotary must be (positions, {head_dim}) float32, got {rotary.dtype} {tuple(rotary.shape)}",
        )


def first_queries(
    queries: Tensor | None, query_scales: Tensor | None, qkv: Tensor, scales: Tensor | None, cu_seqlens: Tensor
) -> None:
    """Queries of first tokens go with the keys and values."""
    sequences = cu_seqlens.shape[0] - 1
    per_token = scales is not None and scales.dim() == 2 and queries is not None
    if queries is not None:
        shape = (sequences, qkv.shape[1] // 2)
        _require(
            queries.dtype == qkv.dtype and queries.shape == shape,
            lambda: f"queries must be {shape} {qkv.dtype}, got {tuple(queries.shape)} {queries.dtype}",
        )
    if query_scales is None:
        _require(not per_token, lambda: f"query_scales is None; allowed with a scale for each token: ({sequences},)")
        return
    _require(per_token, lambda: "query_scales without queries that have a scale for each token; allowed: None")
    _require(
        query_scales.dtype == torch.float32 and query_scales.shape == (sequences,),
        lambda: f"query_scales must be ({sequences},) float32, got {query_scales.dtype} {tuple(query_scales.shape)}",
    )


def positions_cover(rotary: Tensor | None, bounds: list[int]) -> None:
    """A rotation for every position of the longest sequence. Looks at values, so it is not for fakes."""
    longest = max((stop - start for start, stop in itertools.pairwise(bounds)), default=0)
    if rotary is not None and rotary.shape[0] < longest:
        raise QBertError(f"rotary has {rotary.shape[0]} positions; the longest sequence has {longest} tokens")


def add_norm(y: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor, float]) -> None:
    """Two floats (t, k), one gain and one shift a column."""
    _require(y.dim() == 2, lambda: f"y must be (t, k), got {tuple(y.shape)}")
    float_dtype("y is", y.dtype)
    same_shape("y", y, "residual", residual)
    result_like("residual", residual, residual.shape, norm)


def result_like(name: str, residual: Tensor, shape: Sequence[int], norm: tuple[Tensor, Tensor, float]) -> None:
    """A float that is added to a result of that shape, and a norm over its columns."""
    float_dtype(f"{name} is", residual.dtype)
    _require(
        residual.shape == tuple(shape),
        lambda: f"{name} must be {tuple(shape)} as the result, got {tuple(residual.shape)}",
    )
    norm_over(norm, residual.shape[-1])


def norm_over(norm: tuple[Tensor, Tensor, float], k: int) -> None:
    """A float gain and a float shift for each of k columns."""
    for name, tensor in zip(("gamma", "beta"), norm[:2], strict=True):
        float_dtype(f"{name} is", tensor.dtype)
        channels(name, tensor, k)


def normed(shape: Sequence[int], dtype: torch.dtype) -> tuple[Like, ...]:
    """What a norm gives: floats (t, k), their codes and scales."""
    return Like(shape, dtype), Like(shape, torch.int8), Like(shape[:1], torch.float32)


def embed_norm(
    looked_up: Sequence[Tensor], words: Weight | Tensor, positions: Tensor, token_types: Tensor,
    norm: tuple[Tensor, Tensor, float],
) -> None:  # fmt: skip
    """Ids of words, positions and token types, and their tables. What `ids_in_range` checks is not looked at here."""
    ids = looked_up[0]
    for name, each in zip(("position_ids", "token_type_ids"), looked_up[1:], strict=True):
        same_shape("ids", ids, name, each)
    _require(
        ids.dim() == 1 and positions.dim() == 2,
        lambda: f"ids must be (t,) and positions (p, k), got {tuple(ids.shape)} and {tuple(positions.shape)}",
    )
    float_dtype("positions are", positions.dtype)
    k = positions.shape[1]
    _float_table("token_types", token_types, k)
    if isinstance(words, Tensor):
        _float_table("words", words, k)
    else:
        _require(words.k == k, lambda: f"words have {words.k} columns, positions have {k}")
        table(words)
    norm_over(norm, k)


def _float_table(name: str, rows: Tensor, k: int) -> None:
    float_dtype(f"{name} are", rows.dtype)
    _require(
        rows.dim() == 2 and rows.shape[1] == k,
        lambda: f"{name} must be (rows, {k}) as positions are, got {tuple(rows.shape)}",
    )
