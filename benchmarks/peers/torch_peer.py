"""torch itself: transformers' BertModel with torch's fused attention, eager or compiled by inductor, in float32 or bfloat16.

Compiled rows use what torch documents for inference on a CPU: `torch.compile` with weights frozen into the graph, so that
oneDNN packs them once, and dynamic shapes, so that one graph serves all batches (and a second one batches of one sequence).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from benchmarks.bert_models import load_float32, tensor_bytes
from benchmarks.peers.base import Floats, Ids, Peer


class TorchPeer(Peer):
    """Options: `dtype` ("float32" or "bfloat16"), `compile`."""

    imports: ClassVar[tuple[str, ...]] = ("transformers.models.bert.modeling_bert",)

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self.model: Any = None
        self._run: Any = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def load(self) -> None:
        self.model = self.converted(load_float32(self.job.folder))
        self._bytes = tensor_bytes(self.model)
        self._run = self.model
        if self.job.options.get("compile"):
            torch._inductor.config.freezing = True
            self._run = torch.compile(self.model, dynamic=True)

    def converted(self, model: Any) -> Any:
        """The model as this row runs it."""
        return model.to(getattr(torch, self.job.options.get("dtype", "float32")))

    def bind(self, ids: Ids, mask: Ids) -> None:
        self._inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    def forward(self) -> Any:
        with torch.inference_mode():
            return self._run(**self._inputs).last_hidden_state

    def hidden(self, result: Any) -> Floats:
        values: Floats = result.to(torch.float32).numpy()
        return values

    def weight_bytes(self) -> int:
        return self._bytes
