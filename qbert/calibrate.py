"""L10. Static scales for the fused encoder: look at the activations of real texts, twice, and choose where to clip.

The first pass finds ranges, the second histograms of magnitudes within them; each scale is the one whose rounding and clipping
error is smallest in the mean square (OMSE: Choukroun et al., 2019; Nagel et al., 2021, section 3.1). The few neurons of a
feed-forward network that outgrow all others are left out of that choice and kept by a product of their own (see `Overflow`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qbert.bert import EncoderFamily
from qbert.errors import QBertError
from qbert.formats import INT8
from qbert.modes import evaluation_mode
from qbert.nn import Calibration, LayerScales, Overflow, encoders, layer_names, unfused
from qbert.nn.calibration import MAX_OVERFLOW_NEURONS

DEFAULT_BATCH_SIZE = 16
Progress = Callable[[int, int], None]  # (done, total)

_BINS = 1 << 14  # at a clip of a hundredth of the largest magnitude a step is still more than one bin wide
_CLIPS = 2.0 ** -(
    torch.arange(0, 64, dtype=torch.float64) / 8
)  # of the largest magnitude, down to 1/256, in steps of 9%
_LEAST = 2.0**-20  # magnitude that an activation which is always zero is taken to have
# A product of its own takes 2% of a layer, more for a single short text; less gain in the squared error is not worth it.
_OVERFLOW_GAIN = 3.0
_PROSE = (40, 600)  # letters: shorter are headings, longer are tables
_TOKENIZER_FILES = ("tokenizer.json", "vocab*", "*.model")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def calibrate(
    model: nn.Module,
    texts: Sequence[str] | Iterable[Mapping[str, Tensor]],
    *,
    tokenizer: Any = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    overflow_neurons: int = MAX_OVERFLOW_NEURONS,
    progress: Progress | None = None,
) -> Calibration:
    """Runs an encoder on texts and chooses a static scale for five tensors of every layer.

    Args:
        model: with one encoder of a known family in it: float, quantized or fused. It is left as it was.
        texts: a hundred or so, of the kind the model is used on; or encoded batches, as dicts of tensors.
        tokenizer: for texts; by default the one beside the model's files.
        batch_size: texts of a batch.
        overflow_neurons: of a layer's feed-forward network, at most so many are kept apart; 0 for none.
        progress: called with (batches done, batches in all); each batch counts twice.

    Returns:
        For `quantize_(model, recipe, fuse=True, calibration=...)` and `fuse_`.

    Raises:
        QBertError: no text, no tokenizer, no encoder or more than one, or an activation that is NaN or infinite.
    """
    if not 0 <= overflow_neurons <= MAX_OVERFLOW_NEURONS:
        raise QBertError(f"overflow_neurons is {overflow_neurons}; allowed: 0 ... {MAX_OVERFLOW_NEURONS}")
    base, family = _only_encoder(model)
    batches = _batches(base, texts, tokenizer, batch_size)
    layers = [(name, base.get_submodule(name)) for name in layer_names(base, family)]
    ranges = {name: _Ranges() for name, _ in layers}
    with unfused(model), evaluation_mode(base), torch.no_grad():
        _observe(base, family, batches, ranges, progress, 0)
        spectra = {name: _Spectra(name, ranges[name], overflow_neurons) for name, _ in layers}
        _observe(base, family, batches, spectra, progress, len(batches))
    return Calibration(layers={name: spectrum.scales() for name, spectrum in spectra.items()})


def default_texts(count: int = 128) -> list[str]:
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
    def see(self, what: str, x: Tensor) -> None:
        """`x` is (tokens, k) float32 without padding; `what` a field of `LayerScales`."""


class _Ranges:
    """Largest magnitude of each channel of each of a layer's five tensors."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def see(self, what: str, x: Tensor) -> None:
        largest = x.abs().amax(0)
        before = self.largest.get(what)
        self.largest[what] = largest if before is None else torch.maximum(before, largest)


@dataclass
class _Spectrum:
    """A histogram of magnitudes from 0 to `top`, of all channels or of those in `channels`."""

    top: float
    channels: Tensor | None
    counts: Tensor

    @classmethod
    def empty(cls, largest: Tensor, channels: Tensor | None = None) -> _Spectrum:
        seen = largest if channels is None else largest[channels]
        return cls(max(float(seen.amax()), _LEAST), channels, torch.zeros(_BINS, dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        seen = x if self.channels is None else x[:, self.channels]
        self.counts += torch.histc(seen.abs().float(), _BINS, 0.0, self.top).cpu().double()

    def best(self) -> tuple[float, float]:
        """The scale with the smallest sum of squared errors, and that sum."""
        values = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self.top / _BINS)
        scales = (self.top * _CLIPS / INT8.qmax).tolist()
        errors = []
        for scale in scales:
            rounded = (values / scale).round().clamp(max=INT8.qmax) * scale
            errors.append(float((self.counts * (rounded - values) ** 2).sum()))
        least = min(range(len(errors)), key=errors.__getitem__)
        return scales[least], errors[least]


class _Spectra:
    """Histograms of a layer's five tensors; that of GELU's output also without the largest neurons."""

    def __init__(self, layer: str, ranges: _Ranges, overflow_neurons: int) -> None:
        for what, largest in ranges.largest.items():
            if not bool(largest.isfinite().all()):
                raise QBertError(f"{layer}: {what} is NaN or infinite on these texts; it cannot be calibrated")
        self._neurons = ranges.largest["gelu"].cpu()
        self._spectra = {what: _Spectrum.empty(largest) for what, largest in ranges.largest.items()}
        self._largest = self._neurons.sort(descending=True, stable=True).indices
        self._kept = overflow_neurons
        self._rest: _Spectrum | None = None
        if 0 < overflow_neurons < self._neurons.numel():
            self._rest = _Spectrum.empty(self._neurons, self._largest[overflow_neurons:])

    def see(self, what: str, x: Tensor) -> None:
        self._spectra[what].add(x)
        if what == "gelu" and self._rest is not None:
            self._rest.add(x.cpu())

    def scales(self) -> LayerScales:
        """The choice."""
        best = {what: spectrum.best() for what, spectrum in self._spectra.items()}
        chosen: dict[str, Any] = {what: scale for what, (scale, _) in best.items()}
        if self._rest is not None:
            scale, error = self._rest.best()
            if best["gelu"][1] > _OVERFLOW_GAIN * error:
                return LayerScales(**{**chosen, "gelu": scale}, overflow=self._overflow(scale))
        return LayerScales(**chosen)

    def _overflow(self, scale: float) -> Overflow | None:
        top = INT8.qmax * scale
        neurons = [index for index in self._largest[: self._kept].tolist() if self._neurons[index] > top]
        if not neurons:
            return None
        return Overflow(neurons=tuple(sorted(neurons)), scale=(float(self._neurons.max()) - top) / INT8.qmax)


def _observe(
    base: nn.Module,
    family: EncoderFamily,
    batches: list[dict[str, Tensor]],
    observers: Mapping[str, _Observer],
    progress: Progress | None,
    done: int,
) -> None:
    """Runs the batches and shows each layer's observer what is not padding."""
    paths = family.layer
    kept: list[Tensor] = []

    def show(observer: _Observer, what: str, x: Tensor) -> None:
        observer.see(what, x.reshape(-1, x.shape[-1])[kept[0]])

    with contextlib.ExitStack() as hooks:
        for name, observer in observers.items():
            layer = base.get_submodule(name)
            for what, path in (("query", paths.query), ("key", paths.key), ("value", paths.value)):
                after = lambda _m, _i, out, observer=observer, what=what: show(observer, what, out)
                hooks.callback(layer.get_submodule(path).register_forward_hook(after).remove)
            for what, path in (("attention_output", paths.attention_output), ("gelu", paths.ffn_out)):
                before = lambda _m, inputs, observer=observer, what=what: show(observer, what, inputs[0])
                hooks.callback(layer.get_submodule(path).register_forward_pre_hook(before).remove)
        for index, batch in enumerate(batches, done + 1):
            kept[:] = [batch["attention_mask"].bool().flatten().nonzero().flatten()]
            base(**batch)
            if progress:
                progress(index, 2 * len(batches))


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
    return batches


def _tokenized(base: Any, texts: list[str], tokenizer: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of texts of like length, longest first; texts that the model cannot take whole are cut."""
    from qbert.evaluate.encode import checked_max_length, pad, tokenize

    tokenizer = _beside(base) if tokenizer is None else tokenizer
    rows, _ = tokenize(tokenizer, texts, checked_max_length(base, tokenizer))
    rows.sort(key=lambda row: -len(row["input_ids"]))
    return [pad(tokenizer, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _beside(base: Any) -> Any:
    """The tokenizer of the files that the model came from; nothing is downloaded."""
    from transformers import AutoTokenizer

    path = base.name_or_path
    # Of a folder without the files transformers makes a tokenizer that knows no word.
    there = any(any(Path(path).glob(pattern)) for pattern in _TOKENIZER_FILES) if Path(path).is_dir() else bool(path)
    try:
        if there:
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
