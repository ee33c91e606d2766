"""CPU kernels by what torch itself offers: they run in every layout and on every CPU.

Integer sums are exact, so all of them give the reference's bits up to the float epilogue.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.formats import INT8, Scheme
from qbert.ops import checks, reference
from qbert.ops.kernel import Kernel, Problem
from qbert.ops.operations import AddNorm, Attention, Embedding, EmbedNorm, Linear, QuantizeRows, Table
from qbert.target import Target
from qbert.weight import Layout, codec
from qbert.weight.tensor import Outliers

INT_MM = "torch._int_mm"
FLOAT32_CHUNKS = "torch float32 in exact chunks"
EXPAND_LINEAR = "torch expand + linear"
TORCH = "torch"
# int8 products are at most 2**14, so this many of them stay below 2**24, where float32 is still exact.
EXACT_FLOAT32_TERMS = 1024
# The same for products of 8-bit probabilities (0 ... 255) with int8 values.
EXACT_PROBABILITY_TERMS = 512


def quantize_rows(a: QuantizeRows) -> tuple[Tensor, Tensor]:
    x = a.x.to(torch.float32)
    absmax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    if not bool(absmax.isfinite().all()):  # rare: the reference's order of operations, which costs three more passes
        return reference.codes_and_scales(x)
    absmax.clamp_(min=codec.MIN_ABSMAX)
    qmax = torch.full_like(absmax, INT8.qmax)
    codes = (x * (qmax / absmax)[:, None]).round_().clamp_(-INT8.qmax, INT8.qmax)
    return codes.to(torch.int8), absmax / qmax


# ---- linears --------------------------------------------------------------------------------------------------------


def _int_mm(q: Tensor, operand: Tensor) -> Tensor:
    return torch._int_mm(q, operand.t()).to(torch.float32)


def _exact_chunks(q: Tensor, operand: Tensor) -> Tensor:
    return _float32_product(q, operand.t(), EXACT_FLOAT32_TERMS)


def _float32_product(a: Tensor, b: Tensor, exact_terms: int) -> Tensor:
    """(..., m, k) times (..., k, n), integers of any type, as float32, from sums that are exact in chunks of k."""
    k = a.shape[-1]
    if k <= exact_terms:
        return a.to(torch.float32) @ b.to(torch.float32)
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.int32)
    for start in range(0, k, exact_terms):
        chunk = slice(start, start + exact_terms)
        total += (a[..., chunk].to(torch.float32) @ b[..., chunk, :].to(torch.float32)).to(torch.int32)
    return total.to(torch.float32)


def integer_linear(a: Linear, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A linear of int8 tokens, from `product` (t, k) times (n, k) transposed: exact sums as float32."""
    assert a.s is not None
    y = product(a.x, codec.operand(a.weight)).mul_(codec.row_scales(a.weight))
    if a.weight.sparse is not None:
        y = _add_outliers(y, a.x, a.weight.sparse)
    return reference.finish(y.mul_(a.s[:, None]), a)


def _add_outliers(y: Tensor, q: Tensor, sparse: Outliers) -> Tensor:
    """y (t, n) float32 plus (t, k) int8 times sparse rows (n, k) transposed.

    In float64 a float32 times an int8 is exact, and so is the sum of a row's few of them: the order in which MKL adds,
    which depends on the batch and on the threads, does not matter. In float32 it would show in the last bit.
    """
    if sparse.delta.numel() == 0 or q.shape[0] == 0:
        return y
    size = (y.shape[1], q.shape[1])
    wide = q.to(torch.float64)
    if not torch.backends.mkl.is_available():
        dense = codec.dense_outliers(sparse, *size)
        return y.add_((wide @ dense.to(torch.float64).t()).to(torch.float32))
    codec.check_outliers(sparse, q.shape[1])
    _silence_sparse_csr_warning()
    rowptr, col, delta = sparse
    rows = torch.sparse_csr_tensor(rowptr, col.to(torch.int32), delta.to(torch.float64), size, check_invariants=False)
    correction = torch.addmm(torch.zeros(y.shape, dtype=torch.float64), wide, rows.t())
    return y.add_(correction.to(torch.float32))


@functools.cache
def _silence_sparse_csr_warning() -> None:
    """Torch says once a process that sparse CSR is in beta; users of this package cannot act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def float_linear(a: Linear) -> Tensor:
    """A linear of float tokens: the weight is expanded for each call, which saves memory, not time."""
    y = torch.nn.functional.linear(a.x, codec.decode(a.weight).to(a.x.dtype))
    return reference.finish(y.to(torch.float32), a)


# ---- look-ups -------------------------------------------------------------------------------------------------------


def embedding(a: Embedding) -> Tensor:
    checks.ids_in_range(a.ids, a.weight.n)
    return reference.embedding(a)


def embed_norm(a: EmbedNorm) -> tuple[Tensor, Tensor, Tensor]:
    tables: tuple[tuple[Tensor, Table], ...] = (
        (a.ids, a.words), (a.position_ids, a.positions), (a.token_type_ids, a.token_types),
    )  # fmt: skip
    for ids, table in tables:
        checks.ids_in_range(ids, table.shape[0])
    return reference.embed_norm(a)


# ---- attention ------------------------------------------------------------------------------------------------------


def attention(a: Attention) -> Tensor:
    """One sequence at a time in float32: its result cannot depend on its neighbours."""
    if a.queries is not None:
        return reference.rows_of_first(a, attention(reference.with_all_queries(a)))
    t, width = a.qkv.shape
    bounds = a.cu_seqlens.tolist()
    checks.bounds_cover(bounds, t)
    checks.positions_cover(a.rotary, bounds)
    codes, scales = reference.attention_codes(a)
    query, key, value = codes.to(torch.float32)
    out = torch.empty(t, a.heads, a.head_dim)
    for start, stop in itertools.pairwise(bounds):
        span = slice(start, stop)
        products = _float32_product(query[:, span], key[:, span].transpose(1, 2), EXACT_FLOAT32_TERMS)
        weights, factor = reference.attention_weights(a, products, scales[..., span])
        sums = _float32_product(weights.round_(), value[:, span], EXACT_PROBABILITY_TERMS)
        out[span] = (sums * factor).transpose(0, 1)
    return reference.to_out(out.view(t, width // 3), a.out)


def add_norm(a: AddNorm) -> tuple[Tensor, Tensor, Tensor]:
    return reference.add_norm(a)


# ---- the rows of the table ------------------------------------------------------------------------------------------


def _obstacle(problem: Problem, target: Target) -> str | None:
    return None if target.device == "cpu" else "it is for tensors on a CPU"


def _integer_obstacle(problem: Problem, target: Target, exact: bool) -> str | None:
    if problem.scheme is not None and problem.scheme.activation is None:
        return "the activations are floats"
    if exact and not target.int_mm_exact:
        return "torch's int8 product saturates on this CPU (no VNNI)"
    if exact and problem.k == 1:
        return "torch's int8 product of one input channel is not computed (oneDNN leaves what was in memory)"
    return _obstacle(problem, target)


def _float_obstacle(problem: Problem, target: Target) -> str | None:
    if problem.scheme is not None and problem.scheme.activation is not None:
        return "the activations are int8"
    return _obstacle(problem, target)


def _layout(scheme: Scheme, target: Target) -> Layout | None:
    if target.device != "cpu":
        return None
    if scheme.weight_bits == 8:
        return Layout.PLAIN  # an int8 row is its own operand
    if scheme.activation is not None:
        return Layout.INT8_EXPANDED  # torch multiplies int8 matrices only: expand once, at load
    return Layout.BYTES  # unpacking bits in torch costs more than the product; a byte a code is the compromise


def _says(reason: str) -> Callable[[Problem, Target], str]:
    return lambda problem, target: reason


_PLAIN_TORCH: dict[str, Callable[[Any], Any]] = {
    "quantize_rows": quantize_rows,
    "embedding": embedding,
    "attention": attention,
    "add_norm": add_norm,
    "embed_norm": embed_norm,
}
KERNELS = (
    Kernel(
        "linear",
        INT_MM,
        lambda a: integer_linear(a, _int_mm),
        obstacle=lambda problem, target: _integer_obstacle(problem, target, exact=True),
        reason=_says("torch's int8 product is exact on this CPU"),
        layout=_layout,
    ),
    Kernel(
        "linear",
        FLOAT32_CHUNKS,
        lambda a: integer_linear(a, _exact_chunks),
        obstacle=lambda problem, target: _integer_obstacle(problem, target, exact=False),
        reason=_says("torch's int8 product saturates on this CPU (no VNNI)"),
        layout=_layout,
    ),
    Kernel(
        "linear",
        EXPAND_LINEAR,
        float_linear,
        obstacle=_float_obstacle,
        reason=_says("weight expanded to float for each call: saves memory, not time"),
        layout=_layout,
    ),
    *(
        Kernel(name, TORCH, call, obstacle=_obstacle, reason=_says("plain torch"))
        for name, call in _PLAIN_TORCH.items()
    ),
)
