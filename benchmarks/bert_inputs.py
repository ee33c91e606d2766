"""What the models are fed: real sentences as token ids, in padded batches of a fixed or of a realistic, ragged length."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

from qbert.errors import MissingDependency, QBertError
from qbert.evaluate import TASKS, load_tokenizer
from qbert.zoo import resolve_model

DEFAULT_CASES = {
    "cpu": ("8x128", "1x128", "1x16", "2x16", "32x128", "ragged8", "ragged32"),
    "cuda": ("32x128", "32x384", "squad64", "8x128", "1x128", "ragged32"),
}
QUICK_CASES = {"cpu": ("8x128", "1x16"), "cuda": ("32x128", "squad64", "1x128")}
MAX_TOKENS = 128
PADDING_SHARE = 0.5
_LONGEST = 8192  # ModernBERT's positions
_DRAWS = 2000  # of which the one with the share of padding that was asked for is taken
_DENSE = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_RAGGED = re.compile(r"ragged([1-9]\d*)")
_SQUAD = re.compile(r"squad([1-9]\d*)")
# Lengths of SQuAD v1.1's questions with their paragraphs, cut at 384 tokens, have a mean of 177 (MLPerf Inference, BERT). A
# log-normal with these parameters, cut at the same length, has that mean.
SQUAD_WIDTH = 384
_SQUAD_MEDIAN, _SQUAD_DEVIATION, _SQUAD_LEAST = 163.0, 0.42, 24
_VOCABULARY = (1000, 30_000)  # of made-up tokens: whole words, no special ones
_CLS, _SEP = 101, 102

Sentence = list[int]  # token ids with [CLS] in front and [SEP] at the end


@dataclass(frozen=True)
class Case:
    """A batch to time. `length` is None where the sentences keep their own lengths and the shorter ones are padded.

    `squad`: lengths as of SQuAD's paragraphs.
    """

    name: str
    batch: int
    length: int | None
    squad: bool = False


@dataclass(frozen=True)
class Batch:
    """(batch, width) int64 each; the mask is 1 where a token is and 0 at padding, which stands on the right."""

    ids: Tensor
    mask: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens are not padding."""
        return int(self.mask.sum())

    @property
    def padding_share(self) -> float:
        """Padding of all positions, 0 to 1."""
        return 1.0 - self.tokens / self.mask.numel()


def parse_case(name: str) -> Case:
    """`8x128`: 8 sequences of 128 tokens; `ragged8`: 8 sentences of their own lengths, about half of the batch padding;
    `squad64`: 64 sequences with lengths like SQuAD's, 177 tokens of 384 in the mean.

    Raises:
        QBertError: none of the three, or longer than any model's positions (`find_model` says what one takes).
    """
    if dense := _DENSE.fullmatch(name):
        batch, length = int(dense[1]), int(dense[2])
        if 2 <= length <= _LONGEST:
            return Case(name, batch, length)
    if (ragged := _RAGGED.fullmatch(name)) and int(ragged[1]) > 1:
        return Case(name, int(ragged[1]), None)
    if (squad := _SQUAD.fullmatch(name)) and int(squad[1]) > 1:
        return Case(name, int(squad[1]), None, squad=True)
    raise QBertError(
        f"case {name!r}: allowed are BATCHxLENGTH (length 2 to {_LONGEST}), raggedBATCH and squadBATCH (2 or more)"
    )


def make_batch(case: Case, sentences: Sequence[Sentence], padding: int = 0) -> Batch:
    """The batch of a case, the same one every time.

    Args:
        sentences: a dense case takes their tokens end to end, a ragged one takes whole sentences.
        padding: token id that padding has.
    """
    if case.squad:
        return _of_lengths(squad_lengths(case.batch), sentences, padding)
    if case.length is None:
        chosen = pick_ragged([len(each) for each in sentences], case.batch)
        return pad([sentences[i] for i in chosen], padding)
    return Batch(*_dense(case.batch, case.length, sentences))


def pad(sentences: Sequence[Sentence], padding: int = 0) -> Batch:
    """Sentences side by side, padded on the right with the id of padding."""
    width = max(len(each) for each in sentences)
    ids = torch.tensor([each + [padding] * (width - len(each)) for each in sentences])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in sentences])
    return Batch(ids, mask)


def pick_ragged(lengths: Sequence[int], batch: int, share: float = PADDING_SHARE, seed: int = 0) -> list[int]:
    """Indices of `batch` sentences drawn at random, of which about `share` of the padded batch is padding.

    Real lengths, drawn as they come: of many draws, the one nearest to that share. Batches as a server collects them.

    Raises:
        QBertError: fewer sentences than the batch needs.
    """
    if len(lengths) < batch:
        raise QBertError(f"{len(lengths)} sentences, a ragged batch needs {batch}")
    draw = random.Random(seed)
    draws = [draw.sample(range(len(lengths)), batch) for _ in range(_DRAWS)]
    return min(draws, key=lambda indices: abs(padding_share([lengths[i] for i in indices]) - share))


def padding_share(lengths: Sequence[int]) -> float:
    """Share of padding in a batch of these lengths."""
    return 1.0 - sum(lengths) / (max(lengths) * len(lengths))


def squad_lengths(count: int) -> list[int]:
    """So many lengths as SQuAD has them, in a random order that is always the same; the longest fills the width."""
    quantiles = (NormalDist().inv_cdf((i + 0.5) / count) for i in range(count))
    drawn = (round(_SQUAD_MEDIAN * math.exp(_SQUAD_DEVIATION * each)) for each in quantiles)
    lengths = [min(SQUAD_WIDTH, max(_SQUAD_LEAST, each)) for each in drawn]
    lengths[-1] = SQUAD_WIDTH
    random.Random(0).shuffle(lengths)
    return lengths


def any_sentences(count: int, part: str = "test", model: Path | None = None) -> tuple[list[Sentence], list[str]]:
    """Real sentences as token ids, and their texts; where no evaluation set is installed, made-up ids and no texts.

    What a batch of made-up tokens costs is the same; what a calibration on them is worth is not.

    Args:
        model: whose tokens they are; see `tokenize`.
    """
    try:
        texts = real_sentences(count, part=part)
        return tokenize(texts, model=model), texts
    except QBertError:
        draw = random.Random(part)
        lengths = (min(MAX_TOKENS, 5 + int(draw.lognormvariate(2.9, 0.6))) for _ in range(count))
        return [[_CLS, *draw.choices(range(*_VOCABULARY), k=length - 2), _SEP] for length in lengths], []


def real_sentences(count: int, *, part: str = "test") -> list[str]:
    """Texts of all the evaluation sets that are installed, in turn, so that short questions and news stand side by side.

    Args:
        count: how many; all there are if that is fewer.
        part: "test", or "train" for calibration: no text is in both.

    Raises:
        MissingDependency: no set is installed.
    """
    sets, missing = [], ""
    for task in TASKS.values():
        try:
            sets.append(getattr(task.load(), part).texts)
        except MissingDependency as error:
            missing = str(error)
    sets = [texts for texts in sets if texts]
    if not sets:
        raise MissingDependency(f"no evaluation set is installed: {missing}")
    longest = max(map(len, sets))
    return [texts[i] for i in range(longest) for texts in sets if i < len(texts)][:count]


def tokenize(texts: Sequence[str], max_tokens: int = MAX_TOKENS, model: Path | None = None) -> list[Sentence]:
    """Token ids by the tokenizer of a model's folder, or by MiniLM's: its vocabulary of 30,522 word pieces is BERT's.

    Args:
        model: folder with a tokenizer; None for MiniLM's, which random weights of every shape are fed with (see `within`).
    """
    tokenizer = load_tokenizer(str(model or resolve_model("minilm")))
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
    return [list(each) for each in ids]


def within(sentences: Sequence[Sentence], vocabulary: int) -> list[Sentence]:
    """The same token ids, those beyond a random model's table replaced by its last."""
    return [[min(token, vocabulary - 1) for token in each] for each in sentences]


def _of_lengths(lengths: Sequence[int], sentences: Sequence[Sentence], padding: int) -> Batch:
    """Real tokens end to end, cut to sequences of these lengths."""
    rows = [_dense(1, length, sentences[i % len(sentences) :] or sentences)[0] for i, length in enumerate(lengths)]
    return pad([row[0].tolist() for row in rows], padding)


def _dense(batch: int, length: int, sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
    """Real tokens end to end, cut to [CLS] ... [SEP] of `length`; over and over if there are too few."""
    first, last = sentences[0][0], sentences[0][-1]
    words = [token for each in sentences for token in each[1:-1]]
    need = batch * (length - 2)
    stream = torch.tensor((words * (need // max(len(words), 1) + 1))[:need], dtype=torch.int64).view(batch, length - 2)
    ends = (torch.full((batch, 1), first), stream, torch.full((batch, 1), last))
    return torch.cat(ends, dim=1), torch.ones(batch, length, dtype=torch.int64)
