"""What a row of the table of kernels is, and what a choice among rows looks at: pure data, so every choice is tested for
machines that are not here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qbert.formats import Scheme
from qbert.ops.abi import Activation, Keeps
from qbert.ops.operations import (
    OPERATIONS,
    AddNorm,
    Attention,
    Embedding,
    EmbedNorm,
    Linear,
    LinearAddNorm,
    QuantizeRows,
)
from qbert.target import Target
from qbert.weight import Layout, Weight


class Pattern(NamedTuple):
    """What attention does besides a softmax over codes.

    Attributes:
        floats: whether queries, keys and values are floats, to be rounded inside.
        window, bias, rotary: whether it has them.
        first: whether there are queries of first tokens alone.
    """

    floats: bool = False
    window: bool = False
    bias: bool = False
    rotary: bool = False
    first: bool = False


PLAIN_ATTENTION = Pattern()


class Problem(NamedTuple):
    """What decides which kernel computes an operation.

    Attributes:
        scheme, layout: of the weight or table; None where there is none, or a float table.
        n, k: rows of a linear's weight and its input channels; rows and columns of a table; heads and head_dim of attention;
            of other operations k columns, n being 0.
        dtype: of the float result, or int8; of what is quantized.
        t: tokens; None where they are not known yet, or make no difference.
        activation, gated: of a linear.
        keeps: of an addition and its norm.
        pattern: of attention.
    """

    scheme: Scheme | None
    layout: Layout | None
    n: int
    k: int
    dtype: torch.dtype
    t: int | None = None
    activation: Activation = Activation.NONE
    gated: bool = False
    keeps: Keeps = Keeps.NORM
    pattern: Pattern = PLAIN_ATTENTION


@dataclass(frozen=True, eq=False)
class Kernel:
    """One way to compute an operation.

    Attributes:
        operation: name of the operation.
        name: as `explain` shows it.
        call: computes it, from the operation's record, whose checks were made.
        obstacle: why not this problem on that target; None where it can.
        reason: why this one, for people.
        layout: which layout it wants a linear's weight of a scheme in on a target; None for no wish.
    """

    operation: str
    name: str
    call: Callable[[Any], Any]
    obstacle: Callable[[Problem, Target], str | None]
    reason: Callable[[Problem, Target], str]
    layout: Callable[[Scheme, Target], Layout | None] = lambda scheme, target: None


def problem_of(a: Any, *, tokens: bool = True) -> Problem:
    """The problem that an operation's record poses; without `tokens` for any number of them."""
    problem = _PROBLEMS[type(a)](a)
    if not tokens:
        return problem
    return problem._replace(t=a[0].numel() if isinstance(a, Embedding) else a[0].shape[0])


def _out_dtype(out: torch.dtype | float) -> torch.dtype:
    return out if isinstance(out, torch.dtype) else torch.int8


def _linear(a: Linear) -> Problem:
    return Problem(
        a.weight.scheme, a.weight.layout, *a.weight.shape, _out_dtype(a.out), activation=a.activation, gated=a.gated
    )  # fmt: skip


def _embed_norm(a: EmbedNorm) -> Problem:
    words, k = a.words, a.positions.shape[1]
    scheme, layout = (words.scheme, words.layout) if isinstance(words, Weight) else (None, None)
    return Problem(scheme, layout, words.shape[0], k, a.positions.dtype)


def _embedding(a: Embedding) -> Problem:
    return Problem(a.weight.scheme, a.weight.layout, *a.weight.shape, a.out)


def _attention(a: Attention) -> Problem:
    there = (each is not None for each in (a.window, a.bias, a.rotary, a.queries))
    pattern = Pattern(a.qkv.dtype != torch.int8, *there)
    return Problem(None, None, a.heads, a.head_dim, _out_dtype(a.out), pattern=pattern)


def _linear_add_norm(a: LinearAddNorm) -> Problem:
    return Problem(a.weight.scheme, a.weight.layout, *a.weight.shape, a.residual.dtype, keeps=a.keeps)


_PROBLEMS: dict[type[Any], Callable[[Any], Problem]] = {
    QuantizeRows: lambda a: Problem(None, None, 0, a.x.shape[1], a.x.dtype),
    Linear: _linear,
    Embedding: _embedding,
    Attention: _attention,
    AddNorm: lambda a: Problem(None, None, 0, a.residual.shape[1], a.residual.dtype, keeps=a.keeps),
    EmbedNorm: _embed_norm,
    LinearAddNorm: _linear_add_norm,
}
assert set(_PROBLEMS) == {operation.arguments for operation in OPERATIONS.values()}  # a new operation poses one, too
