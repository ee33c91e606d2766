"""torchao: int8 by tensor subclass (dynamic), and by torch.export with Intel's X86InductorQuantizer (static); both compiled.

The second is what torch documents for int8 on a CPU ("PyTorch 2 Export Quantization with X86 Backend through Inductor"):
calibrated, lowered to oneDNN's int8 products, the rest in bfloat16 by autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbert.families.positions import longest
from qbert.folders import new_folder
from qbert.formats import DEFAULT_GROUP_SIZE
from qbert.timing import Unavailable

from ..bert_inputs import Batch, pad
from ..bert_models import fingerprint, load_float32
from ..machine import versions
from .base import Ids, Peer, library
from .plain_encoders import feed, plain_encoder
from .torch_peer import TorchPeer

CONFIGS = {
    "int8": "Int8DynamicActivationInt8WeightConfig",
    "fp8": "Float8DynamicActivationFloat8WeightConfig",
    "int8-weight": "Int8WeightOnlyConfig",
    "int4-weight": "IntxWeightOnlyConfig",
}
_CALIBRATION_BATCHES, _CALIBRATION_BATCH = 8, 8  # HistogramObserver, in eager torch, takes most of a second a batch


class TorchaoDynamic(TorchPeer):
    """A bfloat16 model, converted by `quantize_`. Options: `config` (a key of `CONFIGS`), `compile`."""

    def converted(self, model: Any) -> Any:
        quantization = library("torchao.quantization")
        model = model.to(self.job.device, torch.bfloat16)
        quantization.quantize_(model, configuration(self.job.options.get("config", "int8")))
        return model

    def weight_bytes(self) -> int:
        """Tensor subclasses have no storage of their own to count: 8-bit linears with float32 scales, bfloat16 for the rest."""
        linears = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        inside = sum(m.weight.numel() for m in linears)
        scales = sum(m.weight.shape[0] for m in linears)
        rest = sum(p.numel() for p in self.model.parameters()) - inside
        return inside + 4 * scales + 2 * rest


def configuration(name: str) -> Any:
    """An instance of one of `CONFIGS`.

    Raises:
        Unavailable: torchao is not installed, or this version has no such configuration.
    """
    quantization = library("torchao.quantization")
    kind = getattr(quantization, CONFIGS[name], None)
    if kind is None:
        raise Unavailable(f"this version of torchao has no {CONFIGS[name]}")
    if name == "fp8":  # a scale per token and per output channel, like the int8 rows
        return kind(granularity=quantization.PerRow())
    if name == "int4-weight":  # the one that runs everywhere; Int4WeightOnlyConfig wants a GPU library
        return kind(weight_dtype=torch.int4, granularity=quantization.PerGroup(DEFAULT_GROUP_SIZE))  # type: ignore[attr-defined]
    return kind()


class TorchaoExport(Peer):
    """Static int8 by `prepare_pt2e` and `convert_pt2e`; the converted graph is kept as an exported program."""

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self._run: Any = None
        self._inputs: tuple[Tensor, ...] = ()
        self._names: Sequence[Any] = ()
        self._bytes = 0

    @property
    def _folder(self) -> Path:
        key = fingerprint(*(f"{k} {v}" for k, v in versions(["torch", "torchao", "transformers"]).items()))
        return Path(self.job.work) / f"pt2e-{key}"

    def prepare(self) -> None:
        library("torchao.quantization.pt2e.quantize_pt2e")
        if self._folder.is_dir():
            return
        converted, example, shapes = self._quantized()
        with new_folder(self._folder) as folder:
            torch.export.save(torch.export.export(converted, example, dynamic_shapes=shapes), folder / "int8.pt2")

    def _quantized(self) -> tuple[Any, tuple[Tensor, ...], Any]:
        flow = library("torchao.quantization.pt2e.quantize_pt2e")
        x86 = library("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        float_model = load_float32(self.job.folder)
        model = plain_encoder(float_model).requires_grad_(False)
        batches = [_arguments(model.inputs, batch) for batch in self._batches()]
        widest = longest(float_model.config)
        dims = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("width", min=2, max=widest)}
        example, shapes = batches[0], tuple(dims for _ in model.inputs)
        graph = torch.export.export(model, example, dynamic_shapes=shapes).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = flow.prepare_pt2e(graph, quantizer)
        with torch.no_grad():
            for batch in batches:
                prepared(*batch)
        return flow.convert_pt2e(prepared), example, shapes

    def load(self) -> None:
        library("torchao.quantization.pt2e.quantize_pt2e")  # defines the operators in the file
        torch._inductor.config.freezing = True
        program = torch.export.load(self._folder / "int8.pt2")
        self._names = program.graph_signature.user_inputs
        model = program.module()
        self._bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        self._run = torch.compile(model, dynamic=True)

    def bind(self, ids: Ids, mask: Ids) -> None:
        self._inputs = _arguments(self._names, Batch(torch.from_numpy(ids), torch.from_numpy(mask)))

    def forward(self) -> Any:
        with torch.inference_mode(), torch.amp.autocast("cpu", dtype=torch.bfloat16):
            return self._run(*self._inputs)

    hidden = TorchPeer.hidden

    def weight_bytes(self) -> int:
        return self._bytes

    def _batches(self) -> Iterator[Batch]:
        for start in range(0, _CALIBRATION_BATCHES * _CALIBRATION_BATCH, _CALIBRATION_BATCH):
            sentences = self.job.calibration[start : start + _CALIBRATION_BATCH]
            yield pad([list(each) for each in sentences], self.job.padding)


def _arguments(names: Sequence[Any], batch: Batch) -> tuple[Tensor, ...]:
    return tuple(feed(names, batch.ids, batch.mask).values())
