"""A vocabulary trimmed to the words that a model's own texts have: a text whose pieces all survive keeps its bits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.compress.pieces import Pieces, chosen
from qbert.compress.report import Report, Size, report_of
from qbert.compress.texts import (
    Texts,
    agreement,
    float_encoder,
    outputs_of,
    plain,
    require,
    require_pooling,
    tokenizer_inside,
    undone_on_error,
)  # fmt: skip
from qbert.convert import note_reshaped
from qbert.errors import QBertError
from qbert.evaluate.stats import wilson
from qbert.shapes import Shaped, keep_words_

_LEAST_TEXTS = 10
_HELD_OUT = 5  # one text in five is not counted, and says how many texts will be untouched
_JUDGED = 256  # touched texts whose embeddings are compared
# Names of special tokens' ids in configurations.
_SPECIAL = (
    "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id",
    "decoder_start_token_id",
)  # fmt: skip


class VocabularyReport(Report):
    """Attributes, beside `Report`'s, whose agreement is that of held-out texts which lost a piece:

    untouched: share of held-out texts that have the same pieces, hence the same bits, as before.
    untouched_interval: 95% (Wilson).
    held_out: how many those texts were.
    unknown: held-out texts with more unknown pieces than before.
    """

    untouched: float
    untouched_interval: tuple[float, float]
    held_out: int
    unknown: int

    def __str__(self) -> str:
        low, high = (100 * each for each in self.untouched_interval)
        kept = (
            f"{100 * self.untouched:.1f}% [{low:.1f}, {high:.1f}] of {self.held_out} held-out texts have the same bits"
        )
        return super().__str__() + f"\n  {kept}; {self.unknown} with new unknown pieces"


@torch.inference_mode(False)
def trim_vocabulary_(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    size: int,
    pooling: str = "mean",
) -> VocabularyReport:
    """Leaves the pieces that texts have most often in a model's word table and in its tokenizer, both in place.

    Special and added tokens stay, and so do all single characters, so that nothing new becomes unknown; of BPE also the pieces
    on the way to those that stay. A text whose pieces all stay is cut as before and has the same bits; that is checked on the
    texts before anything is changed. What is left is renumbered in the old order: save the tokenizer beside the model.

    Args:
        model: float, with a word table that no head shares.
        tokenizer: of the model, WordPiece, Unigram or BPE of the tokenizers library; changed like the model. Of a pipeline that
            cuts texts itself (sentence-transformers) it is the pipeline's own, `model.tokenizer`.
        texts: of the kind the model will be used on, the more the better; one in five is held out for the report.
        size: pieces that stay.
        pooling: of embeddings, for the report.

    Raises:
        QBertError: a size out of range, another kind of tokenizer, one that is not of this model, too few texts, a quantized
            model or one with a head over its vocabulary. Model and tokenizer are left as they were.
    """
    start = time.perf_counter()
    require_pooling(pooling)
    size = plain(size)
    if isinstance(size, bool) or not isinstance(size, int):
        raise QBertError(f"size is {size!r}; allowed: an int, how many pieces stay")
    encoder = float_encoder(model, "trimming the vocabulary", factored=True)
    _check_head(model)
    _check_inside(model, tokenizer)
    pieces = Pieces.of(tokenizer)
    _check_ids(encoder, pieces)
    given = Texts.of(model, texts, tokenizer)
    require(given, _LEAST_TEXTS, "trimming a vocabulary")
    counted = [row for place, row in enumerate(given.rows) if place % _HELD_OUT]
    held_out = [place for place in range(len(given)) if place % _HELD_OUT == 0]
    rows = encoder.words().num_embeddings
    keep = chosen(pieces, _counts(counted, rows), size, _needed(encoder))
    renumbered = {old: new for new, old in enumerate(keep)}
    trimmed = _tokenizer(pieces, renumbered)
    after = Texts.of(model, texts, _Cutter(tokenizer, trimmed))
    touched = _touched(given, after, renumbered, held_out)
    sample = touched[:_JUDGED]
    before, size_before = _some(model, given, sample, pooling), Size.of(model)
    among = _some(model, given, held_out[:_JUDGED], pooling) if sample else None
    with undone_on_error(model):
        keep_words_(model, keep)
        _renumber(encoder, renumbered)
        now = _some(model, after, sample, pooling)
        found = None if before is None or now is None else agreement(model, before, now, among)
    tokenizer._tokenizer = trimmed
    note_reshaped(model)
    return _report(
        model, size_before, start, found, touched, held_out, _unknown(given, after, held_out, tokenizer, pieces)
    )


def _check_head(model: Any) -> None:
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if outputs is not None:
        raise QBertError(f"{type(model).__name__} has a head over its vocabulary; trim the bare encoder instead")


def _check_inside(model: nn.Module, tokenizer: Any) -> None:
    """A pipeline that went on with its own tokenizer would look up other words' rows."""
    inside = tokenizer_inside(model)
    if inside is not None and inside is not tokenizer:
        raise QBertError(
            f"{type(model).__name__} has a tokenizer of its own, which is to be trimmed with it: pass its model.tokenizer"
        )


def _check_ids(encoder: Shaped, pieces: Pieces) -> None:
    """The tokenizer's ids are 0, 1, 2 ... and all in the table."""
    ids, rows = sorted(pieces.names.values()), encoder.words().num_embeddings
    if ids != list(range(len(ids))):
        raise QBertError("the tokenizer's ids have gaps or duplicates; allowed: 0, 1, 2 ...")
    if len(ids) > rows:
        raise QBertError(f"the tokenizer has {len(ids)} pieces and the word table {rows} rows; it is not this model's")


def _counts(rows: list[dict[str, list[int]]], vocabulary: int) -> list[int]:
    ids = torch.tensor([index for row in rows for index in row["input_ids"]])
    counts: list[int] = torch.bincount(ids, minlength=vocabulary).tolist()
    return counts


def _needed(encoder: Shaped) -> set[int]:
    """Ids that the model itself knows; up to the padding's, which some families count positions from, none moves."""
    config, table = encoder.base.config, encoder.words()
    known = (getattr(config, name, None) for name in _SPECIAL)
    padding = -1 if table.padding_idx is None else int(table.padding_idx)
    return {each for each in known if isinstance(each, int) and 0 <= each < table.num_embeddings} | set(
        range(padding + 1)
    )


def _tokenizer(pieces: Pieces, renumbered: dict[int, int]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(pieces.without(renumbered)))


class _Cutter:
    """A tokenizer of transformers over another tokenizer of the tokenizers library, before it is put in place."""

    def __init__(self, tokenizer: Any, backend: Any) -> None:
        self._former, self._backend = tokenizer, backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._former, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held, self._former._tokenizer = self._former._tokenizer, self._backend
        try:
            return self._former(*args, **kwargs)
        finally:
            self._former._tokenizer = held


def _touched(given: Texts, after: Texts, renumbered: dict[int, int], held_out: list[int]) -> list[int]:
    """Places of held-out texts that lost a piece. Holds all others, counted ones too, to the promise."""
    lost = set()
    for place, (old, new) in enumerate(zip(given.rows, after.rows, strict=True)):
        moved = [renumbered.get(index, -1) for index in old["input_ids"]]
        if -1 in moved:
            lost.add(place)
        elif moved != new["input_ids"]:
            raise QBertError(
                f"text {place} is cut otherwise though its pieces are all kept; this tokenizer is not trimmed"
            )
    return [place for place in held_out if place in lost]


def _some(model: nn.Module, texts: Texts, places: list[int], pooling: str) -> Tensor | None:
    if not places:
        return None
    return outputs_of(model, Texts(texts.tokenizer, [texts.rows[place] for place in places]), pooling)


def _renumber(encoder: Shaped, renumbered: dict[int, int]) -> None:
    config = encoder.base.config
    for name in _SPECIAL:
        old = getattr(config, name, None)
        if isinstance(old, int) and old in renumbered:
            setattr(config, name, renumbered[old])


def _unknown(given: Texts, after: Texts, held_out: list[int], tokenizer: Any, pieces: Pieces) -> int:
    """How many held-out texts have more unknown pieces than before."""
    now, before = tokenizer.unk_token_id, pieces.names.get(str(tokenizer.unk_token))
    if now is None or before is None:  # bytes: nothing is unknown
        return 0
    rows = ((given.rows[place]["input_ids"], after.rows[place]["input_ids"]) for place in held_out)
    return sum(new.count(now) > old.count(before) for old, new in rows)


def _report(
    model: nn.Module,
    before: Size,
    start: float,
    found: Tensor | None,
    touched: list[int],
    held_out: list[int],
    unknown: int,
) -> VocabularyReport:
    same = len(held_out) - len(touched)
    plain = report_of("trim vocabulary", model, before, time.perf_counter() - start, found)
    return VocabularyReport(
        **plain.model_dump(),
        untouched=same / len(held_out),
        untouched_interval=wilson(same, len(held_out)),
        held_out=len(held_out),
        unknown=unknown,
    )
