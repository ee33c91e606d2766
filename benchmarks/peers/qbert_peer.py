"""qbert: `quantize_` on the same model, linear by linear or with the fused encoder, with or without calibration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import qbert
from qbert.encoder import obstacle
from qbert.timing import Unavailable

from ..bert_inputs import pad
from ..bert_models import fingerprint, load_float32
from .torch_peer import TorchPeer

_CALIBRATION_BATCH = 16


class QBert(TorchPeer):
    """Options: `scheme`, `fuse`, `static`, `compile` (by `qbert.compile`), `dtype` (float32 by default)."""

    def load(self) -> None:
        self.model = self.converted(load_float32(self.job.folder))
        self._run = self.model
        if self.job.options.get("compile"):
            self._run = qbert.compile(self.model)

    def prepare(self) -> None:
        if self.job.options.get("static") and not self._calibration_file.is_file():
            calibration = qbert.calibrate(load_float32(self.job.folder).to(self.job.device), self._batches())
            self._calibration_file.parent.mkdir(parents=True, exist_ok=True)
            written = self._calibration_file.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(calibration.to_dict()))
            os.replace(written, self._calibration_file)  # several rows may calibrate at once

    def converted(self, model: Any) -> Any:
        fuse, calibration = bool(self.job.options.get("fuse")), None
        if self.job.options.get("static"):
            calibration = qbert.Calibration.from_dict(json.loads(self._calibration_file.read_text()))
        # On the device already: each device's kernels read another layout of the weights.
        model = model.to(self.job.device, getattr(torch, self.job.options.get("dtype", "float32")))
        model = qbert.quantize_(model, qbert.Recipe(self.job.options["scheme"]), fuse=fuse, calibration=calibration)
        if fuse:
            check_fused(model)
        return model

    @property
    def _calibration_file(self) -> Path:
        """Named by the code that calibrates: a change there makes a new one."""
        key = fingerprint(_calibrating_code(), repr(self.job.calibration))
        return Path(self.job.work) / f"qbert-calibration-{key}.json"

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        sentences = sorted((list(each) for each in self.job.calibration), key=len)
        for start in range(0, len(sentences), _CALIBRATION_BATCH):
            batch = pad(sentences[start : start + _CALIBRATION_BATCH], self.job.padding)
            yield {"input_ids": batch.ids, "attention_mask": batch.mask}

    def weight_bytes(self) -> int:
        """As stored in a file: what is quantized with all its metadata, and the floats that stay."""
        floats = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return sum(row.stored_bytes for row in qbert.explain(self.model).quantized) + floats

    def notes(self) -> list[str]:
        explanation = qbert.explain(self.model)
        kernels = sorted({row.kernel for row in explanation.quantized})
        return [f"kernel: {', '.join(kernels)}", *map(str, explanation.encoders)]


class QBertFused(QBert):
    """The same with the fused encoder, which takes padding off before the first layer."""

    padding: ClassVar[str] = "not computed"


def check_fused(model: Any) -> None:
    """
    Raises:
        Unavailable: an encoder of the model is not fused, or it has none that can be; with the reason.
    """
    found = qbert.explain(model).encoders
    if not found:
        raise Unavailable(f"{type(model).__name__} is not fused: {obstacle(model)}")
    for encoder in found:
        if encoder.fused == "no":
            raise Unavailable(f"{encoder.name} is not fused: {encoder.reason}")


def _calibrating_code() -> str:
    """What decides a calibration: which slots a family has, and how their scales are chosen."""
    root = Path(qbert.__file__).parent
    files = [root / "calibrate.py", *sorted((root / "encoder").glob("*.py")), *sorted((root / "families").glob("*.py"))]
    return "".join(file.read_text() for file in files)
