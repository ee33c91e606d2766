"""Random problems for every operation, and the one way to compare a result with what it must be.

Shared by tests and benchmarks: whatever computes an operation (CPU, Triton, CUDA) gets its record from `random_problem` and is
judged by `assert_matches_reference`. Values are drawn on the CPU, so a seed means the same problem on every device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from qbert.formats import INT8, SCHEMES, Role, Scheme
from qbert.metrics import sqnr_db
from qbert.ops import reference
from qbert.ops.abi import Activation, Keeps
from qbert.ops.operations import (
    FLOAT_TABLE,
    AddNorm,
    Arguments,
    Attention,
    Embedding,
    EmbedNorm,
    Linear,
    LinearAddNorm,
    Norm,
    QuantizeRows,
    Table,
    operation_of,
)
from qbert.ops.reference import REFERENCES
from qbert.quantizers import quantize
from qbert.weight import Layout, Weight, codec

__all__ = [
    "EXACT_OPERATIONS", "assert_matches_reference", "evaluate", "random_activations", "random_problem", "random_weight",
    "schemes_of", "sqnr_db", "to_device",
]  # fmt: skip

# Every step of these is an integer or a single IEEE operation: no target may differ from the reference in any bit.
EXACT_OPERATIONS = ("quantize_rows", "embedding")
_WEIGHT_DEVIATION = 0.04  # of encoder weights; GOBO's outlier threshold depends on it
_EPS = 1e-12  # of BERT's LayerNorm
# Distance from a half within which float32 may round one of attention's 8-bit probabilities to either side. Scores of
# magnitude m have errors of a few m * 2**-24, which become 255 times as much: enough up to about 16.
_AMBIGUOUS = 1e-3
T = TypeVar("T")


def schemes_of(operation: str) -> list[str]:
    """Names of the schemes whose weights `operation` reads; empty for operations without a quantized weight."""
    takes = _SCHEMES_OF.get(operation)
    return [] if takes is None else [name for name, scheme in SCHEMES.items() if takes(scheme)]


_SCHEMES_OF: dict[str, Callable[[Scheme], bool]] = {
    "linear": lambda scheme: Role.LINEAR in scheme.roles,
    "linear_add_norm": lambda scheme: Role.LINEAR in scheme.roles and scheme.activation is not None,
    "embedding": lambda scheme: Role.EMBEDDING in scheme.roles,
    "embed_norm": lambda scheme: Role.EMBEDDING in scheme.roles,
}


# ---- random problems ------------------------------------------------------------------------------------------------


def random_weight(n: int, k: int, *, seed: int = 0) -> Tensor:
    """(n, k) float32 like an encoder's: normal, with about one weight in 128 far outside, unevenly over the rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * _WEIGHT_DEVIATION
    count = n * k // 128
    rows = (torch.rand(count, generator=generator).square() * n).long()  # early rows hold more: uneven row pointers
    columns = torch.randint(k, (count,), generator=generator)
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    weight[rows, columns] = signs * 12 * _WEIGHT_DEVIATION
    return weight


def random_activations(t: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(t, k) of `dtype`; magnitudes differ between tokens by up to a thousand."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** (torch.rand(t, 1, generator=generator) * 3 - 2)
    return (torch.randn(t, k, generator=generator) * magnitude).to(dtype)


def random_problem(
    operation: str, t: int, n: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32,
    layout: Layout = Layout.PLAIN, scheme: str | None = None, bias: bool = True, activation: str | Activation = "none",
    gated: bool = False, int8_out: bool = False, zero: int = 0, per_token: bool = False, keeps: Keeps = Keeps.NORM,
    matrices: int = 1, device: torch.device | str = "cpu",
) -> Any:  # fmt: skip
    """The record of an operation.

    Args:
        operation: a key of `ops.OPERATIONS`.
        t, n, k: tokens, output channels, input channels of a linear; tokens, table rows, width of a look-up; tokens,
            heads, head dimension of attention (packed sequences, uneven, one of them empty); else n is unused.
        dtype: of activations, biases and float results.
        layout, scheme: of the quantized weight; by default PLAIN and the first of `schemes_of(operation)`. The scheme
            ``"float"`` is a float word table of `dtype`.
        bias, activation, gated: of linears; a gated one's weight has 2 n rows.
        keeps: of an addition and its norm.
        int8_out: whether a linear of int8 tokens, or attention, gives int8 codes.
        zero: the code of 0 in those of a linear.
        per_token: whether attention's scales are one for each token, (t, 3), or static, (3,).
        matrices: how many matrices of n / matrices rows, each with its dictionary, an int8 dictionary weight is stacked from.
        device: where the tensors are.
    """
    named = activation if isinstance(activation, Activation) else Activation.named(activation)
    held = scheme or next(iter(schemes_of(operation)), None)
    generator = torch.Generator().manual_seed(seed + 1)
    draw = _Draw(t, n, k, seed, dtype, layout, held, bias, named, gated, per_token, keeps, matrices, generator)
    problem = _DRAWN[operation](draw)
    if int8_out:
        y = evaluate(problem, torch.float64)
        # The largest values lie beyond the largest code, so that clamping is part of the problem.
        problem = problem._replace(out=1.25 * float(y.abs().max()) / INT8.qmax / 2 if y.numel() else 1.0)
        problem = problem._replace(zero=zero) if zero else problem
    return to_device(problem, device)


@dataclass(frozen=True)
class _Draw:
    """What a random problem is made with: `random_problem`'s options, and one generator for all that is drawn in turn."""

    t: int
    n: int
    k: int
    seed: int
    dtype: torch.dtype
    layout: Layout
    scheme: str | None
    bias: bool
    activation: Activation
    gated: bool
    per_token: bool
    keeps: Keeps
    matrices: int
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def ids(self, rows: int) -> Tensor:
        return torch.randint(rows, (self.t,), generator=self.generator)

    def norm(self, k: int) -> Norm:
        return Norm(self.normal(k), self.normal(k), _EPS)

    def activations(self) -> Tensor:
        return random_activations(self.t, self.k, seed=self.seed, dtype=self.dtype)

    def tokens(self, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        """Activations as a linear of that scheme takes them."""
        x = self.activations()
        return (x, None) if scheme.activation is None else reference.codes_and_scales(x)

    def weight(self) -> Weight:
        assert self.scheme is not None
        scheme, rows = SCHEMES[self.scheme], 2 * self.n if self.gated else self.n
        if self.matrices > 1:
            plain = _stacked_dictionaries(self.matrices, rows, self.k, scheme, self.seed + 2)
        else:
            plain = quantize(random_weight(rows, self.k, seed=self.seed + 2), scheme)
        return plain.to_layout(self.layout)

    def words(self) -> Table:
        return self.normal(self.n, self.k) if self.scheme == FLOAT_TABLE else self.weight()


def _draw_linear(draw: _Draw) -> Linear:
    weight = draw.weight()
    x, s = draw.tokens(weight.scheme)
    bias = draw.normal(weight.n) if draw.bias else None
    return Linear(x, s, weight, bias, draw.activation, draw.gated, draw.dtype)


def _draw_embedding(draw: _Draw) -> Embedding:
    return Embedding(draw.ids(draw.n), draw.weight(), draw.dtype)


def _draw_attention(draw: _Draw) -> Attention:
    heads, head_dim = draw.n, draw.k
    shape = (draw.t, 3 * heads * head_dim)
    qkv = torch.randint(-INT8.qmax, INT8.qmax + 1, shape, generator=draw.generator).to(torch.int8)
    scales = torch.tensor([0.02, 0.03, 0.01])
    if draw.per_token:  # up to four times larger in one token than in another
        scales = scales * 4 ** (torch.rand(draw.t, 3, generator=draw.generator) - 0.5)
    bounds = _uneven_cu_seqlens(draw.t, draw.generator)
    return Attention(qkv, scales, bounds, heads, head_dim**-0.5, None, None, None, draw.dtype)


def with_pattern(
    a: Attention, *, window: int | None = None, reach: int | None = None, floats: torch.dtype | None = None,
    dynamic: bool = False, rotary: bool = False, first: bool = False, seed: int = 0,
) -> Attention:  # fmt: skip
    """A random problem of attention with more of the operation's fields in use.

    Args:
        window: see `Attention`.
        reach: of random biases; None for none.
        floats: type of random floats in place of codes; with `dynamic` scales or the problem's static ones, of which
            `rotary` turns queries and keys.
        first: queries of first tokens alone.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    longest = max([0, *a.cu_seqlens.diff().tolist()])
    qkv, scales, turns = a.qkv, a.scales, None
    if floats is not None:
        qkv = torch.randn(a.qkv.shape, generator=generator).to(floats)
        scales = None if dynamic else scales
    if rotary:
        angles = torch.rand(longest + 2, a.head_dim // 2, generator=generator) * 6
        turns = torch.cat((angles.cos(), angles.sin()), dim=1)
    bias = None if reach is None else torch.randn(a.heads, 2 * reach + 1, generator=generator)
    a = a._replace(qkv=qkv, scales=scales, window=window, bias=bias, rotary=turns)
    return first_queries_of(a) if first else a


def first_queries_of(a: Attention) -> Attention:
    """The same problem with the queries of first tokens alone."""
    width = a.qkv.shape[1] // 3
    first = a.cu_seqlens[:-1].long().clamp(max=max(a.qkv.shape[0] - 1, 0))  # an empty sequence's is nobody's
    per_token = a.scales is not None and a.scales.dim() == 2
    scales, of_queries = (
        (a.scales[:, 1:], a.scales[first, 0]) if a.scales is not None and per_token else (a.scales, None)
    )
    queries = a.qkv[first, :width] if len(a.qkv) else a.qkv.new_zeros(len(first), width)
    return a._replace(qkv=a.qkv[:, width:], scales=scales, queries=queries, query_scales=of_queries)


def _draw_add_norm(draw: _Draw) -> AddNorm:
    return AddNorm(draw.activations(), draw.normal(draw.t, draw.k), draw.norm(draw.k), draw.keeps)


def _draw_embed_norm(draw: _Draw) -> EmbedNorm:
    positions, token_types, words = draw.normal(max(draw.t, 1), draw.k), draw.normal(2, draw.k), draw.words()
    ids, position_ids, token_type_ids = draw.ids(draw.n), torch.arange(draw.t), draw.ids(2)
    return EmbedNorm(ids, position_ids, token_type_ids, words, positions, token_types, draw.norm(draw.k))


def _draw_linear_add_norm(draw: _Draw) -> LinearAddNorm:
    x, s, weight, bias, *_ = _draw_linear(draw)
    assert s is not None
    return LinearAddNorm(x, s, weight, bias, draw.normal(draw.t, draw.n), draw.norm(draw.n), draw.keeps)


_DRAWN: dict[str, Callable[[_Draw], Any]] = {
    "quantize_rows": lambda draw: QuantizeRows(draw.activations()),
    "linear": _draw_linear,
    "embedding": _draw_embedding,
    "attention": _draw_attention,
    "add_norm": _draw_add_norm,
    "embed_norm": _draw_embed_norm,
    "linear_add_norm": _draw_linear_add_norm,
}


def _stacked_dictionaries(matrices: int, n: int, k: int, scheme: Scheme, seed: int) -> Weight:
    """Matrices of different magnitudes as one of n rows, as a merged query, key and value are."""
    weights = (random_weight(n // matrices, k, seed=seed + index) * (1 + index) for index in range(matrices))
    parts = [quantize(weight, scheme).tensors for weight in weights]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = torch.cat([part["outlier_rowptr"].diff() for part in parts])
    together["outlier_rowptr"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    together["codebook"] = together["codebook"].view(matrices, -1)
    return Weight(scheme, (n, k), Layout.PLAIN, together)


def _uneven_cu_seqlens(t: int, generator: torch.Generator) -> Tensor:
    """Bounds of up to five packed sequences of t tokens, one of them empty."""
    cuts = torch.randint(t + 1, (3,), generator=generator).sort().values
    return torch.cat((torch.tensor([0]), cuts, cuts[-1:], torch.tensor([t]))).to(torch.int32)


def to_device(value: T, device: torch.device | str) -> T:
    """The same record, weight, or results, with every tensor on `device`."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device)
    elif isinstance(value, Weight):
        tensors = {name: tensor.to(device) for name, tensor in value.tensors.items()}
        moved = Weight(value.scheme, value.shape, value.layout, tensors)
    elif isinstance(value, tuple):
        parts = [to_device(each, device) for each in value]
        moved = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return cast(T, moved)


# ---- what an operation must give ------------------------------------------------------------------------------------


def evaluate(problem: Arguments, dtype: torch.dtype) -> Tensor:
    """The float result of an operation as torch computes it with dequantized tensors of `dtype` throughout.

    Only attention's 8-bit probabilities are integers here, too, and the same ones in every type. With float64 this is the
    truth that errors are measured from; with another type it is "the same arithmetic done by torch in that type", whose own
    error says what can be asked of a kernel. What an operation does to its float result afterwards (int8 codes, scales) is
    left out.

    Raises:
        KeyError: one of `EXACT_OPERATIONS`, which have no error.
    """
    return _EVALUATED[operation_of(problem).name](to_device(problem, "cpu"), dtype)


def _linear(a: Linear, dtype: torch.dtype) -> Tensor:
    x = a.x if a.s is None else a.x.to(torch.float64) * a.s.to(torch.float64)[:, None]
    weight = codec.decode(a.weight, torch.float64)
    y = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if a.bias is None else a.bias.to(dtype))
    return reference.activated(y, a.activation, a.gated)


def _attention(a: Attention, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result (t, width) with softmax and scales in `dtype`, and by how much ambiguous probabilities may move it.

    Which 8-bit code a probability gets is decided in float64, so that the types differ in their own rounding alone. A code
    `_AMBIGUOUS` or less from a half may become either neighbour: it counts as the half, and may move the sum by half of
    its value to both sides.
    """
    if a.queries is not None:
        out, room = _attention(reference.with_all_queries(a), dtype)
        return reference.rows_of_first(a, out), reference.rows_of_first(a, room)
    t, width = a.qkv.shape[0], a.qkv.shape[1] // 3
    integers, scales = reference.attention_codes(a)
    query, key, value = integers.to(torch.float64)
    out, room = torch.empty(query.shape, dtype=dtype), torch.zeros_like(query)
    for start, stop in itertools.pairwise(a.cu_seqlens.tolist()):
        span = slice(start, stop)
        products = query[:, span] @ key[:, span].transpose(1, 2)
        exact, exact_factor = reference.attention_weights(a, products, scales[..., span])
        _, factor = reference.attention_weights(a, products.to(dtype), scales[..., span])
        half = exact.floor() + 0.5
        ambiguous = (exact - half).abs() <= _AMBIGUOUS
        codes = torch.where(ambiguous, half, exact.round())
        out[:, span] = (codes @ value[:, span]).to(dtype) * factor
        room[:, span] = ambiguous.to(torch.float64) @ value[:, span].abs() / 2 * exact_factor
    return out.transpose(0, 1).reshape(t, width), room.transpose(0, 1).reshape(t, width)


def _add_norm(a: AddNorm, dtype: torch.dtype) -> Tensor:
    return _layer_norm(_sum(a, dtype), a.norm)


def _sum(a: Any, dtype: torch.dtype) -> Tensor:
    """What the norm of an `AddNorm` or `LinearAddNorm` is of."""
    y = reference.linear(a.linear) if isinstance(a, LinearAddNorm) else a.y
    return y.to(dtype) + a.residual.to(dtype)


def _embed_norm(a: EmbedNorm, dtype: torch.dtype) -> Tensor:
    rows = reference.table_rows(a.words, a.ids), a.token_types[a.token_type_ids], a.positions[a.position_ids]
    words, token_types, positions = (each.to(dtype) for each in rows)
    return _layer_norm(words + token_types + positions, a.norm)


def _linear_add_norm(a: LinearAddNorm, dtype: torch.dtype) -> Tensor:
    """Rounded where the operation rounds: the norm begins with what was stored."""
    return _add_norm(AddNorm(reference.linear(a.linear), a.residual, a.norm, a.keeps), dtype)


def _layer_norm(total: Tensor, norm: Norm) -> Tensor:
    gamma, beta = norm.gamma.to(total.dtype), norm.beta.to(total.dtype)
    return torch.nn.functional.layer_norm(total, total.shape[-1:], gamma, beta, norm.eps)


_EVALUATED: dict[str, Callable[[Any, torch.dtype], Tensor]] = {
    "linear": _linear,
    "attention": lambda a, dtype: _attention(a, dtype)[0],
    "add_norm": _add_norm,
    "embed_norm": _embed_norm,
    "linear_add_norm": _linear_add_norm,
}


def assert_matches_reference(problem: Arguments, actual: Any) -> None:
    """Fails unless `actual` is what the operation must return for that record.

    `EXACT_OPERATIONS` are compared bit for bit. Floats may be off by twice the error that torch itself makes with the
    same arithmetic in the same type (see `evaluate`), measured from float64 and relative to the largest value of the
    token. A code made from such a float is right if it lies within half a step, and that error, of the exact value.
    Attention may besides round those of its 8-bit probabilities to either side that are closest to a half.
    NaN or infinite is exactly what is so in the reference; an infinity may become NaN (torch's own GELU does that).
    """
    operation, problem = operation_of(problem).name, to_device(problem, "cpu")
    expected = _as_tuple(REFERENCES[operation](problem))
    found = to_device(_as_tuple(actual), "cpu")
    assert len(found) == len(expected), f"{operation}: {len(found)} results, expected {len(expected)}"
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        _assert_same_kind(f"{operation}[{index}]", got, want, exact=operation in EXACT_OPERATIONS)
    if operation in EXACT_OPERATIONS or expected[0].numel() == 0:
        return
    exact = evaluate(problem, torch.float64)
    if len(expected) == 3:
        _assert_norm(operation, problem, found, exact)
    else:
        _assert_product(operation, problem, found[0], exact)


def _assert_same_kind(what: str, got: Tensor, want: Tensor, exact: bool) -> None:
    """The same type and shape, NaN and infinity in the same places, and where it must be exact the same values."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{what}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    )
    if want.is_floating_point():
        wrong = ((got.isfinite() != want.isfinite()) | (want.isnan() & ~got.isnan())).nonzero().tolist()
        assert not wrong, f"{what}: NaN or infinity differs from the reference at {wrong[:4]}"
    if exact:
        wrong = ((got != want) & ~(got.isnan() & want.isnan())).nonzero().tolist()
        assert not wrong, f"{what}: {len(wrong)} values are not the reference's, first at {wrong[:4]}"


def _assert_norm(operation: str, problem: Arguments, found: tuple[Tensor, ...], exact: Tensor) -> None:
    """Floats, of the norm or of the sum that it is of, then the codes and scales of the float32 norm."""
    kept, codes, scales = found
    if getattr(problem, "keeps", Keeps.NORM) is Keeps.SUM:
        _assert_close(f"{operation} sum", kept, _sum(problem, torch.float64), _sum(problem, kept.dtype))
    else:
        _assert_close(operation, kept, exact, evaluate(problem, kept.dtype))
    steps = exact.abs().amax(dim=1) / INT8.qmax
    inner = _error(evaluate(problem, torch.float32), exact)
    _assert_close(f"{operation} scales", scales[:, None], steps[:, None], steps[:, None] * (1 + inner))
    _assert_nearest_codes(operation, codes, exact / steps[:, None], slack=2 * inner)


def _assert_product(operation: str, problem: Any, found: Tensor, exact: Tensor) -> None:
    """A linear's or attention's result: floats, or int8 codes with a static scale."""
    room = _attention(problem, torch.float64)[1] if isinstance(problem, Attention) else 0.0
    if found.dtype == torch.int8:
        inner = _error(evaluate(problem, torch.float32), exact)
        zero = getattr(problem, "zero", 0)
        _assert_nearest_codes(operation, found, exact / problem.out + zero, 2 * inner, room / problem.out, zero)
        return
    integer = isinstance(problem, Attention) or problem.s is not None
    inner_dtype = torch.float32 if integer else found.dtype  # of an integer product only the epilogue is float
    _assert_close(operation, found, exact, evaluate(problem, inner_dtype).to(found.dtype), room=room)


def _assert_close(what: str, actual: Tensor, exact: Tensor, torchs: Tensor, room: Tensor | float = 0.0) -> None:
    """At most twice torch's error; a result's own rounding is always allowed, for torch may by luck be exact."""
    allowed = 2 * max(_error(torchs, exact), torch.finfo(actual.dtype).eps)
    error = _error(actual, exact, room)
    assert error <= allowed, (
        f"{what}: error {error:.3g} of a token's largest value; allowed {allowed:.3g}, twice torch's own"
    )


def _error(actual: Tensor, exact: Tensor, room: Tensor | float = 0.0) -> float:
    """Largest error beyond `room`, relative to the largest magnitude of its row, over the rows that are finite in both."""
    actual = actual.to(torch.float64)
    finite = (actual.isfinite() & exact.isfinite()).all(dim=1)
    size = exact[finite].abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    off = ((actual - exact).abs() - room).clamp(min=0.0)[finite]
    return float((off / size).max()) if bool(finite.any()) else 0.0


def _assert_nearest_codes(
    what: str, codes: Tensor, exact_codes: Tensor, slack: float, room: Tensor | float = 0.0, zero: int = 0
) -> None:
    """`slack` is relative to the largest value of the token, `room` is in steps; a token with NaN in it has codes `zero`."""
    nan = exact_codes.isnan()
    assert bool((codes[nan] == zero).all()), f"{what}: a NaN must become code {zero}"
    size = exact_codes.nan_to_num(0.0).abs().amax(dim=1, keepdim=True)
    distance = (codes.to(torch.float64) - exact_codes.clamp(-INT8.qmax, INT8.qmax)).abs()
    wrong = (distance > 0.5 + slack * size + room + 1e-9) & ~nan
    worst = float(distance[wrong].max()) if bool(wrong.any()) else 0.0
    assert not bool(wrong.any()), f"{what}: {int(wrong.sum())} codes are not the nearest, up to {worst:.3f} steps away"


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
