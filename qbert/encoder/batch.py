"""A batch on its way through an encoder: padding is taken off once, before the first layer, and put back once, after the last.

`Batch.of` goes from what a caller gave straight to packed ids, positions and token types; `Batch.unpack` is the way back.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.families import EncoderFamily, PositionTable


class Inputs(NamedTuple):
    """What an encoder's forward takes, in transformers' words; all (batch, width), ids or a mask, or None."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None  # (batch, width, k)


class Tokens(NamedTuple):
    """A batch without padding: t tokens of all its sequences, one after the other.

    Attributes:
        ids, position_ids, token_type_ids: (t,) integers; in place of ids, word rows (t, k) that the caller looked up.
        cu_seqlens: (sequences + 1,) int32, where each sequence starts and the last one ends.
    """

    ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch go when all sequences lie one after the other.

    Attributes:
        batch, width: of the padded batch.
        cu_seqlens: (batch + 1,) int32: sequence i is the packed tokens cu_seqlens[i] ... cu_seqlens[i + 1] - 1.
        kept: (t,) int64 indices into the flattened batch, ascending; None where nothing is padding.
        headless: (rows,) int64, the rows that have tokens and padding before the first of them; None where there are none.
        begun: every row has a token in its first column.
    """

    batch: int
    width: int
    cu_seqlens: Tensor
    kept: Tensor | None
    headless: Tensor | None = None
    begun: bool = True

    @property
    def tokens(self) -> int:
        """How many tokens are not padding."""
        return self.batch * self.width if self.kept is None else self.kept.shape[0]

    def columns(self) -> Tensor:
        """(tokens,) the column of each token in the padded batch."""
        tokens = self.kept
        if tokens is None:
            tokens = torch.arange(self.batch * self.width, device=self.cu_seqlens.device)
        return tokens % self.width

    def pack(self, x: Tensor) -> Tensor:
        """(batch, width, ...) to (tokens, ...), contiguous."""
        flat = x.reshape(self.batch * self.width, *x.shape[2:])
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def unpack(self, x: Tensor, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        """(tokens, k) to (batch, width, k) of `dtype`, zeros at padding; with `copy` never a view of `x`."""
        x = x.to(dtype, copy=copy and self.kept is None)
        if self.kept is not None:
            x = x.new_zeros(self.batch * self.width, x.shape[1]).index_copy_(0, self.kept, x)
        return x.view(self.batch, self.width, x.shape[1])

    def portions(self, tokens_at_once: int | None) -> list[tuple[slice, Tensor]]:
        """Runs of whole sequences of at most so many tokens (a longer sequence is one alone), about equal in size.

        Returns:
            the packed tokens of each, and its own `cu_seqlens`.
        """
        if tokens_at_once is None or self.tokens <= tokens_at_once:
            return [(slice(0, self.tokens), self.cu_seqlens)]
        bounds = self.cu_seqlens.tolist()
        size = self.tokens / -(-self.tokens // tokens_at_once)
        cuts = [0]
        for index in range(1, len(bounds)):
            if bounds[index] - bounds[cuts[-1]] > size and index - 1 > cuts[-1]:
                cuts.append(index - 1)
        cuts.append(len(bounds) - 1)
        return [
            (slice(bounds[first], bounds[last]), self.cu_seqlens[first : last + 1] - bounds[first])
            for first, last in itertools.pairwise(cuts)
        ]


@dataclass(frozen=True)
class Batch:
    """A batch without padding, and where its tokens go back to.

    Attributes:
        tokens: what the encoder computes.
        by_row: the caller looked the word rows up.
    """

    packing: Packing
    tokens: Tokens
    by_row: bool

    @classmethod
    def of(cls, inputs: Inputs, family: EncoderFamily, table: PositionTable, device: torch.device) -> Batch:
        """
        Args:
            table: of the model's positions.
            device: the model's.

        Raises:
            QBertError: inputs of other shapes, both ids and rows or none, more tokens than the model has positions for;
                masks or positions that change distances, where attention goes by them.
        """
        words = _words(inputs)
        for name, given in zip(inputs._fields, inputs, strict=True):
            if given is not None and name != "attention_mask" and given.device != device:
                raise QBertError(f"{name} is on {given.device}, the model on {device}")
        packing = packing_of(
            words.shape[0], words.shape[1], inputs.attention_mask, device, unbroken=family.distances is not None
        )
        positions = _positions(packing, inputs, family, table)
        # Without a table of token types (DistilBERT) transformers takes them and forgets them.
        given = inputs.token_type_ids if family.embeddings.token_types is not None else None
        types = torch.zeros_like(positions) if given is None else packing.pack(_batched(given, packing))
        return cls(packing, Tokens(packing.pack(words), positions, types, packing.cu_seqlens), inputs.input_ids is None)

    @property
    def size(self) -> int:
        """How many tokens are not padding."""
        return self.packing.tokens

    def portions(self, tokens_at_once: int | None) -> list[tuple[slice, Tokens]]:
        """Runs of whole sequences, see `Packing.portions`: which tokens, and these."""
        cut = self.packing.portions(tokens_at_once)
        if len(cut) == 1:
            return [(slice(0, self.size), self.tokens)]
        ids, positions, types, _ = self.tokens
        return [(span, Tokens(ids[span], positions[span], types[span], bounds)) for span, bounds in cut]

    def unpack(self, x: Tensor, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        """Packed rows (tokens, k) to (batch, width, k) of `dtype`, zeros at padding; with `copy` never a view of `x`."""
        return self.packing.unpack(x, dtype, copy=copy)


def _words(inputs: Inputs) -> Tensor:
    ids, rows = inputs.input_ids, inputs.inputs_embeds
    if (ids is None) == (rows is None):
        raise QBertError("a model takes exactly one of input_ids and inputs_embeds")
    words = rows if ids is None else ids
    assert words is not None
    if words.dim() != (3 if ids is None else 2):
        allowed = "inputs_embeds (batch, tokens, k)" if ids is None else "input_ids (batch, tokens)"
        raise QBertError(f"input is {tuple(words.shape)}; allowed: {allowed}")
    return words


def _positions(packing: Packing, inputs: Inputs, family: EncoderFamily, table: PositionTable) -> Tensor:
    """(t,) positions of the packed tokens, as the family counts them; zeros where it has no table of them."""
    table_is_none = family.embeddings.positions is None
    if inputs.position_ids is not None:
        given = packing.pack(_batched(inputs.position_ids, packing))
        if not table_is_none:
            return given
        _require_steps_of_one(given, packing.cu_seqlens)
    if not family.skips_padding or inputs.input_ids is None:
        first = int(table.padding_idx or 0) + 1 if family.skips_padding else 0
        if packing.tokens and packing.width + first > table.rows:
            raise QBertError(f"{packing.width} tokens; the model has positions for {table.rows - first}")
    if table_is_none:
        return torch.zeros(packing.tokens, dtype=torch.int64, device=packing.cu_seqlens.device)
    return family.positions(packing.columns(), inputs.input_ids, packing.pack, table)


def _require_steps_of_one(positions: Tensor, cu_seqlens: Tensor) -> None:
    """Rotations are counted from a sequence's first token, so only differences of positions matter, and those must be columns'.

    Raises:
        QBertError: two neighbours of a sequence whose positions are not neighbours.
    """
    count = torch.arange(positions.shape[0], device=positions.device)
    index = torch.searchsorted(cu_seqlens, count, right=True, out_int32=True) - 1
    first = cu_seqlens[index].to(torch.int64)
    if positions.numel() and not torch.equal(positions - positions[first], count - first):
        raise QBertError(
            "position_ids do not go up by one from token to token; a fused encoder with rotary positions takes no others: "
            "call qbert.unfuse_(model) first if you need them"
        )


def _batched(ids: Tensor, packing: Packing) -> Tensor:
    """Ids of one row, or of each, as (batch, width)."""
    return ids.expand(packing.batch, packing.width)


def packing_of(batch: int, width: int, mask: Tensor | None, device: torch.device, *, unbroken: bool = False) -> Packing:
    """Where the tokens of a batch go.

    The one number that the host must know is how many tokens there are. So a mask on a GPU costs one wait for that GPU; a mask
    on the CPU, or none, costs none.

    Args:
        mask: (batch, width), not 0 where a token is; None where nothing is padding. Padding may stand anywhere.
        device: where the tokens are.
        unbroken: the tokens of a row must stand side by side.

    Raises:
        QBertError: a mask of another shape, or with padding between tokens where there may be none.
    """
    if mask is not None:
        if mask.shape != (batch, width):
            allowed = f"({batch}, {width}); call qbert.unfuse_(model) first if you need a mask of another shape"
            raise QBertError(f"attention_mask is {tuple(mask.shape)}; allowed with a fused encoder: {allowed}")
        there = (mask if mask.device.type == "cpu" else mask.to(device)).to(torch.bool)
        bounds = torch.zeros(batch + 1, dtype=torch.int32, device=there.device)
        torch.cumsum(there.sum(1, dtype=torch.int32), 0, dtype=torch.int32, out=bounds[1:])
        headed = there[:, :1].sum(dtype=torch.int32)
        runs = _most_runs(there) if unbroken else torch.ones_like(headed)
        tokens, heads, most = torch.stack((bounds[-1], headed, runs)).tolist()  # one wait for all
        if most > 1:
            raise QBertError(
                "attention_mask has padding between tokens of a row, which changes how far apart they are; a fused encoder "
                "whose attention goes by distances does not take that: call qbert.unfuse_(model) first if you need it"
            )
        if tokens < batch * width:
            kept, headless = _kept(there.reshape(-1), tokens), None if heads == batch else _headless(there)
            return Packing(batch, width, _sent(bounds, device), _sent(kept, device), headless, heads == batch)
    return Packing(batch, width, torch.arange(batch + 1, dtype=torch.int32, device=device) * width, None)


def _most_runs(there: Tensor) -> Tensor:
    """Of tokens side by side, in the row that has most of them."""
    begins = there & ~torch.nn.functional.pad(there[:, :-1], (1, 0))
    return begins.sum(1, dtype=torch.int32).amax() if there.numel() else there.new_zeros((), dtype=torch.int32)


def _headless(there: Tensor) -> Tensor | None:
    """Rows (rows,) that have tokens, but none in the first column."""
    rows = (there.any(1) & ~there[:, 0]).nonzero().view(-1)
    return rows if len(rows) else None


def _kept(there: Tensor, tokens: int) -> Tensor:
    """Indices (tokens,) of the true values."""
    return there.nonzero().view(-1) if there.device.type == "cpu" else nonzero_of(there, tokens)


def nonzero_of(there: Tensor, count: int) -> Tensor:
    """Indices (count,) of so many true values, from the counts: `nonzero` would make the host wait for their number again."""
    return torch.searchsorted(there.cumsum(0), torch.arange(1, count + 1, device=there.device))


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, without waiting: a copy out of pinned memory is queued like a kernel."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
