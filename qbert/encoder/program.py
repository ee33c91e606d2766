"""A fused encoder as data: steps, layers of steps, a program. It prints itself and sums its cost; `run` executes it.

A step is one operation with its weight bound. Values lie in named slots between steps; what no later step reads is let go
at once, so that its memory is used again while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qbert.families import EncoderFamily, PositionTable
from qbert.formats import Scheme

# Slot -> the value in it now. Packed: t tokens of all sequences, one after the other.
Slots = dict[str, Tensor]
HIDDEN = "hidden"  # the residual stream (t, h), float
CU_SEQLENS = "cu_seqlens"  # (sequences + 1,) int32
ONES = "ones"  # (t,) float32 ones: token scales of codes whose static scale is in the next weight already


# Operation -> floats and codes that it reads and writes for each column of a row.
_ROW_BYTES = {"quantize_rows": (1, 1), "add": (3, 0), "add_norm": (3, 1), "embed_norm": (3, 1), "first_tokens": (2, 2)}


def codes_of(slot: str) -> str:
    """Where the int8 codes of a quantized slot lie."""
    return f"{slot}.codes"


def scales_of(slot: str) -> str:
    """Where the scales (t,) of those codes lie."""
    return f"{slot}.scales"


@dataclass(frozen=True)
class Cost:
    """What a step takes for some tokens.

    Attributes:
        macs: multiply-adds of matrix products.
        weight_bytes: of the stored matrix.
        activation_bytes: read and written.
    """

    macs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
        )


@dataclass(frozen=True)
class Step:
    """One operation of a program.

    Attributes:
        name: what it is in the encoder: ``"attention output"``.
        part: of the encoder, in the survey's breakdown: ``"embedding"``, ``"attention linear"``, ``"attention"``, ``"ffn"``,
            ``"norm"``, ``"quantize"``.
        operation: of the instruction set, or ``"add"``, or ``"first_tokens"``.
        kernel: what computes it, as `explain` shows it.
        reads, writes: slots.
        run: does it.
        shape: (n, k) of the weight; (heads, head_dim) of attention; (0, k) of rows.
        scheme: of the weight, None where there is none.
        weight_bytes: of the weight in memory.
        float_bytes: of an element of its float result; 1 where that is int8.
        read_bytes: of an element of the queries, keys and values of attention: 1 of codes.
        gated: half of the linear's channels multiply the other half.
        window: of attention, see `qbert.ops.operations.Attention`.
        first: its rows, of attention its queries, are the first token of each sequence.
        frees: slots that no later step reads.
    """

    name: str
    part: str
    operation: str
    kernel: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[[Slots], None] = field(repr=False)
    shape: tuple[int, int] = (0, 0)
    scheme: Scheme | None = None
    weight_bytes: int = 0
    float_bytes: int = 4
    read_bytes: int = 1
    gated: bool = False
    window: int | None = None
    first: bool = False
    frees: tuple[str, ...] = ()

    def cost(self, lengths: Sequence[int]) -> Cost:
        """For sequences of that many tokens."""
        t, (n, k), f = len(lengths) if self.first else sum(lengths), self.shape, self.float_bytes
        if self.operation == "attention":
            pairs = sum(_pairs(length, self.window, self.first) for length in lengths)
            read = (2 * sum(lengths) + t) * self.read_bytes
            return Cost(2 * n * k * pairs, 0, n * k * (read + t * f))
        if self.operation == "linear":
            columns = n // 2 if self.gated else n
            return Cost(t * n * k, self.weight_bytes, t * (k + columns * f))
        if self.operation == "linear_add_norm":  # reads the residual, writes the norm and its codes
            return Cost(t * n * k, self.weight_bytes, t * (k + n * (2 * f + 1)))
        floats, codes = _ROW_BYTES[self.operation]
        return Cost(0, min(self.weight_bytes, t * k * 4), t * k * (floats * f + codes))

    def __str__(self) -> str:
        n, k = self.shape
        size = f"{n} x {k}" if n else str(k)
        scheme = "" if self.scheme is None else f" {self.scheme.name}"
        slots = f"{', '.join(self.reads)} -> {', '.join(self.writes)}"
        return f"{self.name:<24} {self.operation}{scheme} {size}: {slots} ({self.kernel})"


def _pairs(length: int, window: int | None, first: bool) -> int:
    """(query, key) pairs of a sequence, or of its first token."""
    reach = length if window is None else min(window, length)
    if first:
        return min(reach + 1, length)
    return length * (2 * reach + 1) - reach * (reach + 1) if reach < length else length * length


@dataclass(frozen=True)
class Layer:
    """The steps of one layer, and what may differ from layer to layer.

    Attributes:
        name: qualified, from the encoder.
        heads, head_dim, ffn: its own, read from its modules.
        static: the layer has static scales.
    """

    name: str
    steps: tuple[Step, ...]
    heads: int
    head_dim: int
    ffn: int
    static: bool

    def __str__(self) -> str:
        scales = "static" if self.static else "dynamic"
        head = f"{self.name}: {self.heads} heads of {self.head_dim}, feed-forward {self.ffn}, {scales} scales"
        return "\n    ".join((head, *map(str, self.steps)))


@dataclass(frozen=True)
class Program:
    """Everything that a fused encoder computes, in order.

    Attributes:
        embedding: steps from "ids", "position_ids" and "token_type_ids" to "hidden" and its codes and scales.
        embedding_of_rows: the same where the caller looked the word rows up, which lie in "ids".
        layers: in order; each goes from "hidden" to "hidden".
        last_of_first: the last layer where nothing but each sequence's first token is read of it: from "hidden" (t, h) to
            "hidden" (sequences, h). No sequence may be empty.
        hidden_size: h.
        dtype: of the model: what comes out is cast to it.
        residual: type of the residual stream.
        positions: the table that positions are looked up in.
    """

    family: EncoderFamily
    embedding: tuple[Step, ...]
    embedding_of_rows: tuple[Step, ...]
    layers: tuple[Layer, ...]
    last_of_first: Layer
    hidden_size: int
    dtype: torch.dtype
    residual: torch.dtype
    device: torch.device
    positions: PositionTable

    def steps(self) -> Iterator[tuple[str, Step]]:
        """(layer's name, step) of all steps, the embedding's first."""
        yield from (("embeddings", step) for step in self.embedding)
        yield from ((layer.name, step) for layer in self.layers for step in layer.steps)

    def every_step(self) -> Iterator[Step]:
        """Those too that run in place of others: from rows, or of first tokens."""
        yield from (step for _, step in self.steps())
        yield from (*self.embedding_of_rows, *self.last_of_first.steps)

    def cost(self, lengths: Sequence[int]) -> Cost:
        """Of a batch of sequences of that many tokens."""
        return sum((step.cost(lengths) for _, step in self.steps()), Cost())

    def cost_by_part(self, lengths: Sequence[int]) -> dict[str, Cost]:
        """The same by part of the encoder, as the survey breaks BERT down."""
        parts: dict[str, Cost] = {}
        for _, step in self.steps():
            parts[step.part] = parts.get(step.part, Cost()) + step.cost(lengths)
        return parts

    def __str__(self) -> str:
        head = f"{self.family.name} on {self.device}, {len(self.layers)} layers of {self.hidden_size}"
        embedding = "\n    ".join(("embeddings:", *map(str, self.embedding)))
        return "\n".join((head, embedding, *map(str, self.layers), f"only first tokens read: {self.last_of_first}"))


def freeing(steps: Sequence[Step], kept: Sequence[str]) -> tuple[Step, ...]:
    """The steps, each letting go of what is read for the last time in it; what is in `kept` outlives them all."""
    done, later = [], set(kept)
    for step in reversed(steps):
        gone = {slot for slot in (*step.reads, *step.writes) if slot not in later and slot != ONES}
        done.append(replace(step, frees=tuple(sorted(gone))))
        later = (later - set(step.writes)) | set(step.reads)
    return tuple(reversed(done))
