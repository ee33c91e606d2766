"""Static scales for the fused encoder: look at the activations of real texts, twice, and choose where to clip.

The first pass finds ranges, the second histograms of magnitudes within them; each scale is the one whose rounding and clipping
error is smallest in the mean square (OMSE: Choukroun et al., 2019; Nagel et al., 2021, section 3.1). The few neurons of a
feed-forward network that outgrow all others are left out of that choice and kept by a product of their own (see `Overflow`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qbert.encoder import Calibration, LayerScales, Overflow, encoders, layer_names, unfused
from qbert.encoder.calibration import MAX_OVERFLOW_NEURONS
from qbert.encoder.fingerprint import fingerprint_of
from qbert.encoder.parts import Slot, parts_of
from qbert.errors import QBertError
from qbert.families import EncoderFamily
from qbert.formats import INT8
from qbert.modes import evaluation_mode

DEFAULT_BATCH_SIZE = 16
DEFAULT_TEXTS = 128
Progress = Callable[[int, int], None]  # (done, total)
log = logging.getLogger(__name__)

_BINS = 1 << 14  # at a clip of a hundredth of the largest magnitude a step is still more than one bin wide
_CLIPS = 2.0 ** -(
    torch.arange(0, 64, dtype=torch.float64) / 8
)  # of the largest magnitude, down to 1/256, in steps of 9%
_LEAST = 2.0**-20  # magnitude that an activation which is always zero is taken to have
# A product of its own takes 2% of a layer, more for a single short text; less gain in the squared error is not worth it.
_OVERFLOW_GAIN = 3.0
# Of MiniLM's codes, on halves of 4 ... 128 texts of prose or of questions: 0.004 ... 0.012%; of two texts: 0.017 ... 0.033%.
_USUAL_SATURATED = 1.5e-4
_FEW_TEXTS = 4
_PROSE = (40, 600)  # letters: shorter are headings, longer are tables
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def calibrate(
    model: nn.Module,
    texts: Sequence[str] | Iterable[Mapping[str, Tensor]] | None = None,
    *,
    tokenizer: Any = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    overflow_neurons: int = MAX_OVERFLOW_NEURONS,
    progress: Progress | None = None,
) -> Calibration:
    """Runs an encoder on texts and chooses a static scale for each quantized slot of every layer.

    Args:
        model: with one encoder of a known family in it: float, quantized or fused. It is left as it was.
        texts: a hundred or so, of the kind the model is used on; or encoded batches, as dicts of tensors; by default English
            prose (see `default_texts`). Too few are said in the log, with the share of codes that their scales cut off.
        tokenizer: for texts; by default the one beside the model's files.
        batch_size: texts of a batch.
        overflow_neurons: of a layer's feed-forward network, at most so many are kept apart; 0 for none.
        progress: called with (batches done, batches in all); each batch counts twice.

    Returns:
        For `quantize_(model, recipe, fuse=True, calibration=...)` and `fuse_`.

    Raises:
        QBertError: no text, one text alone or again and again, a batch without a token, no tokenizer, no encoder or more
            than one, or an activation that is NaN or infinite.
    """
    if not 0 <= overflow_neurons <= MAX_OVERFLOW_NEURONS:
        raise QBertError(f"overflow_neurons is {overflow_neurons}; allowed: 0 ... {MAX_OVERFLOW_NEURONS}")
    base, family = _only_encoder(model)
    batches = _batches(base, default_texts(DEFAULT_TEXTS) if texts is None else texts, tokenizer, batch_size)
    halves, distinct = _halves(batches)
    layers = layer_names(base, family)
    ranges = {name: _Ranges() for name in layers}
    with unfused(model), evaluation_mode(base), torch.no_grad():
        _observe(base, family, batches, halves, ranges, progress, 0)
        activated = [slot for slot, seen in parts_of(family).slots.items() if seen.activated]
        spectra = {name: _Spectra(name, ranges[name], activated, overflow_neurons) for name in layers}
        _observe(base, family, batches, halves, spectra, progress, len(batches))
    _warn_of_too_little(distinct, sum((each.saturated() for each in spectra.values()), start=_Saturated()))
    scales = {name: spectrum.scales() for name, spectrum in spectra.items()}
    return Calibration(layers=scales, fingerprint=fingerprint_of(base, family))


def default_texts(count: int = DEFAULT_TEXTS) -> list[str]:
    """Paragraphs of English prose that every Python has with it: its own language reference.

    For models whose own texts are not at hand; with texts of the kind that a model is used on calibration is a little better.

    Raises:
        QBertError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise QBertError("this Python has no pydoc_data; calibrate with texts of your own") from None
    paragraphs = [" ".join(each.split()) for text in topics.values() for each in text.split("\n\n")]
    prose = [each for each in paragraphs if _PROSE[0] <= len(each) <= _PROSE[1] and each[0].isupper()]
    return prose[:: max(1, len(prose) // count)][:count]


# ---- what is looked at ----------------------------------------------------------------------------------------------


class _Observer(Protocol):
    def see(self, slot: str, x: Tensor, held_out: Tensor) -> None:
        """
        Args:
            slot: of the family's program.
            x: (tokens, k) float32 without padding.
            held_out: (tokens,) those of the half of the texts that scales of the other half are tried on.
        """


class _Ranges:
    """Largest magnitude of each channel of each of a layer's slots."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def see(self, slot: str, x: Tensor, held_out: Tensor) -> None:
        largest = x.abs().amax(0)
        before = self.largest.get(slot)
        self.largest[slot] = largest if before is None else torch.maximum(before, largest)


class _Choice(NamedTuple):
    """A slot's scale and its code of 0, and the sum of squared errors that they leave."""

    scale: float
    zero: int
    error: float


@dataclass
class _Spectrum:
    """A histogram of magnitudes from 0 to `top`, of all channels or of those in `channels`."""

    top: float
    channels: Tensor | None
    counts: Tensor
    held_out: Tensor  # the part of `counts` that is of the half of the texts that is held out
    below: Tensor  # the part of `counts` that is below 0

    @classmethod
    def empty(cls, largest: Tensor, channels: Tensor | None = None) -> _Spectrum:
        seen = largest if channels is None else largest[channels]
        nothing = torch.zeros(_BINS, dtype=torch.float64)
        return cls(max(float(seen.amax()), _LEAST), channels, nothing, nothing.clone(), nothing.clone())

    def add(self, x: Tensor, held_out: Tensor) -> None:
        seen = (x if self.channels is None else x[:, self.channels]).float()
        self.counts += self._counted(seen.abs())
        self.held_out += self._counted(seen[held_out.to(seen.device)].abs())
        self.below += self._counted(-seen[seen < 0])

    def _counted(self, magnitudes: Tensor) -> Tensor:
        return torch.histc(magnitudes, _BINS, 0.0, self.top).cpu().double()

    def best(self, shifted: bool = False) -> _Choice:
        """That with the smallest sum of squared errors.

        Args:
            shifted: 0 may have another code than 0.
        """
        around_zero = self._best(self.counts)
        return min(around_zero, self._best_shifted(), key=lambda each: each.error) if shifted else around_zero

    def _best_shifted(self) -> _Choice:
        """Of those whose codes reach down to the least value."""
        values, above = self._values(), self.counts - self.below
        bins = self.below.nonzero()
        down = 0.0 if not len(bins) else float(values[bins[-1]])
        found = []
        for top in (self.top * _CLIPS).tolist():
            scale = (top + down) / (2 * INT8.qmax)
            zero = round(down / scale) - INT8.qmax
            error = sum(
                float((counts * ((values / scale).round().clamp(max=largest) * scale - values) ** 2).sum())
                for counts, largest in ((above, INT8.qmax - zero), (self.below, INT8.qmax + zero))
            )
            found.append(_Choice(scale, zero, error))
        return min(found, key=lambda each: each.error)

    def saturated(self) -> _Saturated:
        """What becomes of the held-out half with the scale that is best for the other."""
        scale = self._best(self.counts - self.held_out).scale
        cut, own = self._values() > (INT8.qmax + 0.5) * scale, self.counts - self.held_out
        held_out = self.held_out
        return _Saturated(*(float(each.sum()) for each in (held_out[cut], held_out, own[cut], own)))

    def _values(self) -> Tensor:
        return (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self.top / _BINS)

    def _best(self, counts: Tensor) -> _Choice:
        values = self._values()
        scales = (self.top * _CLIPS / INT8.qmax).tolist()
        errors = []
        for scale in scales:
            rounded = (values / scale).round().clamp(max=INT8.qmax) * scale
            errors.append(float((counts * (rounded - values) ** 2).sum()))
        least = min(range(len(errors)), key=errors.__getitem__)
        return _Choice(scales[least], 0, errors[least])


class _Spectra:
    """Histograms of a layer's slots; those that come out of an activation also without their largest neurons.

    Args:
        activated: the slots that do.
    """

    def __init__(self, layer: str, ranges: _Ranges, activated: Collection[str], overflow_neurons: int) -> None:
        for slot, largest in ranges.largest.items():
            if not bool(largest.isfinite().all()):
                raise QBertError(f"{layer}: {slot} is NaN or infinite on these texts; it cannot be calibrated")
        self._activated = activated
        self._spectra = {slot: _Spectrum.empty(largest) for slot, largest in ranges.largest.items()}
        self._rest = {
            slot: _Rest(ranges.largest[slot].cpu(), overflow_neurons)
            for slot in activated
            if 0 < overflow_neurons < ranges.largest[slot].numel()
        }

    def see(self, slot: str, x: Tensor, held_out: Tensor) -> None:
        self._spectra[slot].add(x, held_out)
        if slot in self._rest:
            self._rest[slot].spectrum.add(x.cpu(), held_out)

    def saturated(self) -> _Saturated:
        """Of all slots together."""
        spectra = {**self._spectra, **{slot: rest.spectrum for slot, rest in self._rest.items()}}
        return sum((each.saturated() for each in spectra.values()), start=_Saturated())

    def scales(self) -> LayerScales:
        """The choice."""
        best = {slot: spectrum.best(slot in self._activated) for slot, spectrum in self._spectra.items()}
        overflow = {}
        for slot, rest in self._rest.items():
            choice = rest.spectrum.best(shifted=True)
            if best[slot].error > _OVERFLOW_GAIN * choice.error:
                best[slot] = choice
                overflow[slot] = rest.overflow(choice)
        return LayerScales(
            scales={slot: choice.scale for slot, choice in best.items()},
            zeros={slot: choice.zero for slot, choice in best.items() if choice.zero},
            overflow={slot: each for slot, each in overflow.items() if each is not None},
        )


class _Rest:
    """All neurons of a slot but its largest, and those.

    Args:
        largest: magnitude of each neuron.
        kept: how many are apart at most.
    """

    def __init__(self, largest: Tensor, kept: int) -> None:
        self._neurons, self._kept = largest, kept
        self._order = largest.sort(descending=True, stable=True).indices
        self.spectrum = _Spectrum.empty(largest, self._order[kept:])

    def overflow(self, rest: _Choice) -> Overflow | None:
        """What the scale of the rest cuts off."""
        top = (INT8.qmax - rest.zero) * rest.scale
        neurons = [index for index in self._order[: self._kept].tolist() if self._neurons[index] > top]
        if not neurons:
            return None
        return Overflow(neurons=tuple(sorted(neurons)), scale=(float(self._neurons.max()) - top) / INT8.qmax)


def _observe(
    base: nn.Module,
    family: EncoderFamily,
    batches: list[dict[str, Tensor]],
    halves: list[Tensor],
    observers: Mapping[str, _Observer],
    progress: Progress | None,
    done: int,
) -> None:
    """Runs the batches and shows each layer's observer what is not padding."""
    calls: dict[str, list[str]] = {}  # a layer's path -> names of its calls, in order
    for name, path in family.calls(base, family.layers).items():
        calls.setdefault(path, []).append(name)
    with contextlib.ExitStack() as hooks:
        kept = _Kept()
        for path, names in calls.items():
            for slot, seen in parts_of(family).slots.items():
                turns = itertools.cycle([observers[name] for name in names])
                show = _Show(slot, seen, turns, kept, _table_of(base, path, seen))
                module = base.get_submodule(f"{path}.{seen.path}")
                if seen.side == "output":
                    after = lambda _m, _i, out, show=show: show(out)
                    hooks.callback(module.register_forward_hook(after).remove)
                else:
                    before = lambda _m, inputs, show=show: show(inputs[0])
                    hooks.callback(module.register_forward_pre_hook(before).remove)
        for index, batch in enumerate(batches, done + 1):
            kept.of(batch, halves[index - done - 1])
            base(**batch)
            if progress:
                progress(index, 2 * len(batches))


class _Kept:
    """Of the batch that runs: which of its tokens are not padding, where they stand in their sequences, which are held out."""

    tokens: Tensor
    positions: Tensor
    held_out: Tensor

    def of(self, batch: Mapping[str, Tensor], half: Tensor) -> None:
        mask = batch["attention_mask"].bool()
        self.tokens = mask.flatten().nonzero().flatten()
        self.positions = (mask.cumsum(1) - 1).flatten()[self.tokens]
        self.held_out = half[:, None].expand(mask.shape).flatten()[self.tokens.cpu()]


@dataclass
class _Show:
    """Shows what passes at a slot to the observer whose turn it is: a layer that is called again has another one then.

    Attributes:
        rotations: by which queries and keys are rotated before they are rounded.
    """

    slot: str
    seen: Slot
    turns: Iterator[_Observer]
    kept: _Kept
    rotations: Tensor | None

    def __call__(self, x: Tensor) -> None:
        index, parts = self.seen.part
        rows = x.reshape(-1, x.shape[-1])[self.kept.tokens].chunk(parts, dim=1)[index]
        if self.rotations is not None:
            rows = rotated(rows, self.rotations[self.kept.positions])
        next(self.turns).see(self.slot, rows, self.kept.held_out)


def _table_of(base: nn.Module, path: str, seen: Slot) -> Tensor | None:
    return None if seen.rotary is None else seen.rotary(base, base.get_submodule(path))


def rotated(x: Tensor, rotations: Tensor) -> Tensor:
    """Rows (t, heads * head_dim), each head of them rotated by its token's angles.

    Args:
        rotations: (t, head_dim) cosines, then sines (see `qbert.ops.operations.Attention`).
    """
    cosines, sines = rotations[:, None].chunk(2, dim=2)
    first, second = x.to(torch.float32).unflatten(1, (-1, rotations.shape[1])).chunk(2, dim=2)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=2).flatten(1)


# ---- whether it was enough ------------------------------------------------------------------------------------------


class _Saturated(NamedTuple):
    """How many codes of how many are cut off by their scale: of the texts that it was not chosen on, and of those it was."""

    held_out: float = 0.0
    held_out_of: float = 0.0
    own: float = 0.0
    own_of: float = 0.0

    def __add__(self, other: Any) -> _Saturated:
        return _Saturated(*map(sum, zip(self, other, strict=True)))


def _halves(batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], int]:
    """For each batch which of its rows (rows,) are held out, every second text, repeated ones alike; and how many texts differ.

    Raises:
        QBertError: all are the same.
    """
    seen: dict[bytes, int] = {}
    halves = []
    for batch in batches:
        inputs = batch.get("input_ids", batch.get("inputs_embeds"))
        assert inputs is not None
        rows = zip(inputs.cpu(), batch["attention_mask"].cpu().bool(), strict=True)
        numbers = [seen.setdefault(row[mask].numpy().tobytes(), len(seen)) for row, mask in rows]
        halves.append(torch.tensor(numbers) % 2 == 1)
    if len(seen) < 2:
        count = sum(len(half) for half in halves)
        raise QBertError(
            f"{count} texts to calibrate with, and all are the same; allowed: two or more that differ, a hundred or so are good"
        )
    return halves, len(seen)


def _warn_of_too_little(distinct: int, saturated: _Saturated) -> None:
    """
    Args:
        distinct: how many texts differ.
        saturated: of scales of one half of the texts, on both halves.
    """
    share, own = saturated.held_out / max(saturated.held_out_of, 1), saturated.own / max(saturated.own_of, 1)
    if distinct < _FEW_TEXTS or share > max(_USUAL_SATURATED, 2 * own):
        log.warning(
            "calibrated on too little: %d texts that differ, and scales of one half of them cut off %.3f%% of the codes of the "
            "other half (usual: below %.3f%%); a hundred or so of the texts that the model is used on are enough",
            distinct, 100 * share, 100 * _USUAL_SATURATED,
        )  # fmt: skip


# ---- what is run ----------------------------------------------------------------------------------------------------


def _only_encoder(model: nn.Module) -> tuple[nn.Module, EncoderFamily]:
    found = [(base, family) for _, base, family in encoders(model)]
    if len(found) != 1:
        raise QBertError(
            f"{type(model).__name__} has {len(found)} encoders that can be fused; calibrate one at a time, by itself"
        )
    return found[0]


def _batches(base: Any, texts: Any, tokenizer: Any, batch_size: int) -> list[dict[str, Tensor]]:
    if isinstance(texts, str | Mapping):
        raise QBertError(f"texts is a {type(texts).__name__}; allowed: a list of str, or of batches")
    if batch_size < 1:
        raise QBertError(f"batch_size is {batch_size}; allowed: 1 or more")
    given = list(texts)
    if given and all(isinstance(each, str) for each in given):
        given = _tokenized(base, given, tokenizer, batch_size)
    for batch in given:
        if not isinstance(batch, Mapping):
            raise QBertError(f"texts holds a {type(batch).__name__}; allowed: str only, or dicts of tensors only")
    family_takes = _taken(base)
    batches = [_with_mask(batch, family_takes, base.device) for batch in given]
    if not any(bool(batch["attention_mask"].any()) for batch in batches):
        raise QBertError("no text to calibrate with; allowed: at least one token")
    for index, batch in enumerate(batches):
        if not bool(batch["attention_mask"].any()):
            rows, width = batch["attention_mask"].shape
            where = f"batch {index} of {len(batches)}, {rows} x {width}"
            raise QBertError(f"{where}, has no token to calibrate with; leave it out")
    return batches


def _tokenized(base: Any, texts: list[str], tokenizer: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of texts of like length, longest first; texts that the model cannot take whole are cut."""
    from qbert.evaluate.encode import checked_max_length, pad, tokenize

    tokenizer = tokenizer_beside(base) if tokenizer is None else tokenizer
    rows, _ = tokenize(tokenizer, texts, checked_max_length(base, tokenizer))
    rows.sort(key=lambda row: -len(row["input_ids"]))
    return [pad(tokenizer, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def tokenizer_beside(base: Any) -> Any:
    """The tokenizer of the files that a model came from; nothing is downloaded.

    Raises:
        QBertError: there is none.
    """
    from transformers import AutoTokenizer

    from qbert.evaluate.loading import has_tokenizer

    path = base.name_or_path
    try:
        if has_tokenizer(path):
            return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError):
        pass
    raise QBertError(f"no tokenizer beside the model ({path!r}); pass tokenizer=")


def _taken(base: nn.Module) -> set[str]:
    return {name for _, _, family in encoders(base) for name in family.arguments if name in _INPUTS}


def _with_mask(batch: Mapping[str, Tensor], taken: set[str], device: torch.device) -> dict[str, Tensor]:
    """What an encoder takes of a batch; labels and the like are left out."""
    found = {name: tensor.to(device) for name, tensor in batch.items() if name in taken and tensor is not None}
    like = found.get("input_ids", found.get("inputs_embeds"))
    if like is None:
        raise QBertError(f"a batch has {', '.join(map(str, batch)) or 'nothing'}; needed: input_ids or inputs_embeds")
    found.setdefault("attention_mask", torch.ones(like.shape[:2], dtype=torch.int64, device=device))
    return found
