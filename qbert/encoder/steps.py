"""The steps that programs are made of: an operation's record filled from slots, its kernel chosen ahead.

Each function binds what does not change (a weight, a norm, scales) and gives a `Step` whose `run` does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qbert.encoder.program import CU_SEQLENS, HIDDEN, ONES, Slots, Step, codes_of, scales_of
from qbert.errors import QBertError
from qbert.ops import checks
from qbert.ops.abi import Activation, Keeps
from qbert.ops.composed import composes
from qbert.ops.kernel import Pattern, Problem
from qbert.ops.operations import (
    AddNorm,
    Attention,
    EmbedNorm,
    Linear,
    LinearAddNorm,
    Norm,
    Out,
    QuantizeRows,
    Table,
)
from qbert.ops.reference_kernels import REFERENCE
from qbert.ops.table import explain, runner, select
from qbert.target import Target
from qbert.weight import Weight

HIDDEN_STATE = (HIDDEN, codes_of(HIDDEN), scales_of(HIDDEN))


class Label(NamedTuple):
    """What a step is: its name, and its part in the survey's breakdown (see `Step.part`)."""

    name: str
    part: str


class Tokens(NamedTuple):
    """Where a linear's int8 tokens lie: their codes, and the scale of each."""

    codes: str
    scales: str


@dataclass(frozen=True)
class BoundLinear:
    """A linear with everything but its tokens.

    Attributes:
        weight: (n, k) of a scheme with int8 activations.
        bias: (n,) float or None.
        out: type of the float result, or the static scale of an int8 one.
        gated: the second half of the channels multiplies the activated first.
        zero: code of 0 in an int8 result.
    """

    weight: Weight
    bias: Tensor | None
    activation: Activation
    out: Out
    gated: bool = False
    zero: int = 0

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.weight.n // 2 if self.gated else self.weight.n

    def problem(self) -> Problem:
        """For the choice of a kernel."""
        dtype = self.out if isinstance(self.out, torch.dtype) else torch.int8
        return Problem(
            self.weight.scheme, self.weight.layout, *self.weight.shape, dtype, activation=self.activation, gated=self.gated
        )  # fmt: skip


def linear(label: Label, bound: BoundLinear, tokens: Tokens, writes: str, target: Target) -> Step:
    """A linear of int8 tokens into one slot: floats, or codes with a static scale."""
    checks.weight(bound.weight)
    call, problem = runner("linear", bound.problem(), target), bound.problem()
    codes, scales = tokens
    weight, bias, activation, out, gated = bound.weight, bound.bias, bound.activation, bound.out, bound.gated
    zero = bound.zero

    def run(slots: Slots) -> None:
        slots[writes] = call(Linear(slots[codes], slots[scales], weight, bias, activation, gated, out, zero))

    return Step(
        *label, "linear", explain("linear", problem, target).name, tokens, (writes,), run, weight.shape, weight.scheme,
        weight.nbytes, problem.dtype.itemsize, gated=gated,
    )  # fmt: skip


def linear_add_norm(
    label: Label, bound: BoundLinear, tokens: Tokens, norm: Norm, keeps: Keeps, target: Target
) -> list[Step]:
    """LayerNorm(linear + hidden), whose type the linear's result has: one step where a kernel does both.

    Args:
        keeps: what hidden is then; its codes are those of the norm.
    """
    problem = bound.problem()._replace(keeps=keeps)
    if composes(problem, target):
        summed = "sum"
        return [
            linear(label, bound, tokens, summed, target),
            add_norm(label.name, summed, norm, keeps, bound.out, target),
        ]
    checks.weight(bound.weight)
    call, (codes, scales) = runner("linear_add_norm", problem, target), tokens
    weight, bias = bound.weight, bound.bias

    def run(slots: Slots) -> None:
        a = LinearAddNorm(slots[codes], slots[scales], weight, bias, slots[HIDDEN], norm, keeps)
        slots[HIDDEN], slots[codes_of(HIDDEN)], slots[scales_of(HIDDEN)] = call(a)

    return [
        Step(
            *label, "linear_add_norm", explain("linear_add_norm", problem, target).name, (*tokens, HIDDEN), HIDDEN_STATE, run,
            weight.shape, weight.scheme, weight.nbytes, problem.dtype.itemsize,
        )
    ]  # fmt: skip


def add_norm(name: str, reads: str, norm: Norm, keeps: Keeps, dtype: Out, target: Target) -> Step:
    """LayerNorm(slot + hidden), or that sum, with the norm's codes and scales, into hidden."""
    assert isinstance(dtype, torch.dtype)
    k = norm.gamma.shape[0]
    problem = Problem(None, None, 0, k, dtype, keeps=keeps)
    call = runner("add_norm", problem, target)

    def run(slots: Slots) -> None:
        slots[HIDDEN], slots[codes_of(HIDDEN)], slots[scales_of(HIDDEN)] = call(
            AddNorm(slots[reads], slots[HIDDEN], norm, keeps)
        )

    kernel = explain("add_norm", problem, target).name
    return Step(
        f"{name} norm",
        "norm",
        "add_norm",
        kernel,
        (reads, HIDDEN),
        HIDDEN_STATE,
        run,
        (0, k),
        float_bytes=dtype.itemsize,
    )


def add(name: str, reads: str, to: str, k: int) -> Step:
    """One slot added to another, in place."""

    def run(slots: Slots) -> None:
        slots[to] += slots[reads]

    return Step(name, "ffn", "add", "torch", (to, reads), (to,), run, (0, k))


def quantize(name: str, slot: str, k: int, dtype: torch.dtype, target: Target, parts: int = 1) -> Step:
    """Codes and scales of a float slot, token by token.

    Args:
        k: columns of each of `parts` that lie side by side in a token, each of which gets a scale of its own.
    """
    problem = Problem(None, None, 0, k, dtype)
    call = runner("quantize_rows", problem, target)
    codes, scales = codes_of(slot), scales_of(slot)

    def run(slots: Slots) -> None:
        x = slots[slot]
        if parts == 1:
            slots[codes], slots[scales] = call(QuantizeRows(x))
            return
        t = x.shape[0]
        q, s = call(QuantizeRows(x.view(parts * t, k)))
        slots[codes], slots[scales] = q.view(t, parts * k), s.view(t, parts)

    kernel = explain("quantize_rows", problem, target).name
    return Step(
        f"{name} codes", "quantize", "quantize_rows", kernel, (slot,), (codes, scales), run, (0, parts * k),
        float_bytes=dtype.itemsize,
    )  # fmt: skip


class Heads(NamedTuple):
    """The heads of a layer's attention.

    Attributes:
        scale: factor on the scores.
        window, bias, rotary: see `Attention`.
    """

    number: int
    size: int
    scale: float
    window: int | None = None
    bias: Tensor | None = None
    rotary: Tensor | None = None


class Projected(NamedTuple):
    """Queries, keys and values of attention.

    Attributes:
        slot: where they lie: codes, or floats that attention rounds itself.
        scales: (3,) static, or the slot of those of each token; None of floats that get scales token by token.
        dtype: theirs.
        first: where the queries of first tokens lie, and their scales if each has one; then `slot` has keys and values. None
            where every token has a query beside its key.
    """

    slot: str
    scales: Tensor | str | None
    dtype: torch.dtype
    first: tuple[str, str | None] | None = None


def pattern_of(heads: Heads, dtype: torch.dtype, first: bool) -> Pattern:
    """What attention over queries, keys and values of that type does besides a softmax over codes."""
    window, bias, rotary = (each is not None for each in (heads.window, heads.bias, heads.rotary))
    return Pattern(dtype != torch.int8, window, bias, rotary, first)


def attends_first(heads: Heads, dtype: torch.dtype, out: Out, target: Target) -> bool:
    """Whether a kernel computes attention for queries of first tokens alone."""
    result = out if isinstance(out, torch.dtype) else torch.int8
    problem = Problem(None, None, heads.number, heads.size, result, pattern=pattern_of(heads, dtype, True))
    return select("attention", problem, target).name != REFERENCE


def first_tokens(slots: Sequence[str], k: int, dtype: torch.dtype, static: bool) -> Step:
    """The rows of each sequence's first token in place of all rows. No sequence may be empty.

    Args:
        static: codes have no NaN, so a sequence that has one in "hidden" gets it in its first row here.
    """

    def run(values: Slots) -> None:
        first, spoiled = values[CU_SEQLENS][:-1], _spoiled(values[HIDDEN], values[CU_SEQLENS]) if static else None
        for slot in slots:
            values[slot] = values[slot].index_select(0, first)
        if spoiled is not None:
            values[HIDDEN].masked_fill_(spoiled[:, None], torch.nan)
        values[ONES] = values[ONES][: len(first)]

    reads = (*slots, ONES, CU_SEQLENS)
    return Step(
        "first tokens", "attention", "first_tokens", "torch", reads, (*slots, ONES), run, (0, k), float_bytes=dtype.itemsize
    )  # fmt: skip


def _spoiled(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which sequences of the stream (t, h) have a token that is NaN: after a norm all its channels are."""
    before = torch.nn.functional.pad(hidden[:, 0].isnan().cumsum(0), (1, 0))
    return before[cu_seqlens].diff() > 0


def attention(heads: Heads, qkv: Projected, out: Out, writes: str, target: Target) -> Step:
    """Attention of a layer's heads.

    Args:
        out: type of the float result, or the static scale of an int8 one.
    """
    dtype = out if isinstance(out, torch.dtype) else torch.int8
    pattern = pattern_of(heads, qkv.dtype, qkv.first is not None)
    problem = Problem(None, None, heads.number, heads.size, dtype, pattern=pattern)
    call = runner("attention", problem, target)
    (slot, scales, given, first), (number, _, factor, window, bias, rotary) = qkv, heads
    queries, query_scales = first or (None, None)
    reads = [each for each in (slot, scales, queries, query_scales) if isinstance(each, str)]

    def run(slots: Slots) -> None:
        of_tokens = slots[scales] if isinstance(scales, str) else scales
        apart = (None if each is None else slots[each] for each in (queries, query_scales))
        slots[writes] = call(
            Attention(slots[slot], of_tokens, slots[CU_SEQLENS], number, factor, window, bias, rotary, out, *apart)
        )

    return Step(
        "attention", "attention", "attention", explain("attention", problem, target).name, (*reads, CU_SEQLENS), (writes,), run,
        (heads.number, heads.size), float_bytes=dtype.itemsize, read_bytes=given.itemsize, window=window, first=pattern.first,
    )  # fmt: skip


# ---- embeddings -----------------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """The tables that a token's first value is the sum of: words, positions (p, k), token types (types, k)."""

    words: Table
    positions: Tensor
    token_types: Tensor


IDS, POSITION_IDS, TOKEN_TYPE_IDS = "ids", "position_ids", "token_type_ids"


def embed_norm(tables: Tables, norm: Norm, target: Target) -> Step:
    """LayerNorm of word + token type + position rows, from ids."""
    words, positions, types = tables
    held = None if isinstance(words, Tensor) else words
    scheme, layout = (None, None) if held is None else (held.scheme, held.layout)
    if held is not None:
        checks.table(held)
    (rows, k), dtype = words.shape, positions.dtype
    problem = Problem(scheme, layout, rows, k, dtype)
    call = runner("embed_norm", problem, target)

    def run(slots: Slots) -> None:
        a = EmbedNorm(slots[IDS], slots[POSITION_IDS], slots[TOKEN_TYPE_IDS], words, positions, types, norm)
        slots[HIDDEN], slots[codes_of(HIDDEN)], slots[scales_of(HIDDEN)] = call(a)

    return Step(
        "words", "embedding", "embed_norm", explain("embed_norm", problem, target).name, (IDS, POSITION_IDS, TOKEN_TYPE_IDS),
        HIDDEN_STATE, run, (0, k), scheme, words.nbytes, dtype.itemsize,
    )  # fmt: skip


def norm_of_rows(tables: Tables, norm: Norm, target: Target) -> Step:
    """The same from word rows of the caller's in "ids", added up in the same order."""
    k, dtype = tables.positions.shape[1], tables.positions.dtype
    problem = Problem(None, None, 0, k, dtype)
    call = runner("add_norm", problem, target)

    def run(slots: Slots) -> None:
        if slots[IDS].shape[1] != k:
            raise QBertError(f"inputs_embeds have {slots[IDS].shape[1]} columns; the model's tables have {k}")
        summed = slots[IDS].to(torch.float32) + _rows(tables.token_types, slots[TOKEN_TYPE_IDS])
        a = AddNorm(summed, _rows(tables.positions, slots[POSITION_IDS]), norm, Keeps.NORM)
        a.check()
        slots[HIDDEN], slots[codes_of(HIDDEN)], slots[scales_of(HIDDEN)] = call(a)

    kernel = explain("add_norm", problem, target).name
    reads = (IDS, POSITION_IDS, TOKEN_TYPE_IDS)
    return Step(
        "word rows", "embedding", "add_norm", kernel, reads, HIDDEN_STATE, run, (0, k), float_bytes=dtype.itemsize
    )


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a small table. On a GPU torch checks the ids there; on a CPU it would count negative ones from the end."""
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= table.shape[0]):
        raise QBertError(
            f"position or token type ids must be 0 ... {table.shape[0] - 1} here, got {ids.tolist()!r:.80}"
        )
    return table.index_select(0, ids)
