"""torch itself: transformers' model with torch's fused attention, eager, compiled by inductor, or without its padding.

On a CPU, compiled rows use what torch documents for inference there: weights frozen into the graph, so that oneDNN packs them
once, and dynamic shapes, so that one graph serves all batches (and a second one batches of one sequence). On a GPU they use
`mode="reduce-overhead"`, which is inductor with CUDA graphs, a graph for each shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbert.timing import Unavailable

from ..bert_models import load_float32, tensor_bytes
from .base import Floats, Ids, Peer, library
from .sdpa_bert import PackedBert, SdpaBert

_WARM_FORWARDS = 3  # before a graph is captured: what is built lazily must be there
_COMPILED_SHAPES = 64  # torch.compile gives up on a function after 8 shapes


class TorchPeer(Peer):
    """Options: `dtype` ("float32", "bfloat16" or "float16"), `compile`."""

    imports: ClassVar[tuple[str, ...]] = ("transformers.modeling_utils",)

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self.model: Any = None
        self._run: Any = None
        self._inputs: dict[str, Tensor] = {}
        self._bytes = 0

    def load(self) -> None:
        self.model = self.converted(load_float32(self.job.folder))
        self._bytes = tensor_bytes(self.model)
        self._run = compiled(self.model, self.job.device) if self.job.options.get("compile") else self.model

    def converted(self, model: Any) -> Any:
        """The model as this row runs it, where it runs."""
        return model.to(self.job.device, getattr(torch, self.job.options.get("dtype", "float32")))

    def bind(self, ids: Ids, mask: Ids) -> None:
        self._inputs = {"input_ids": self.tensor(ids), "attention_mask": self.tensor(mask)}

    def tensor(self, values: Ids) -> Tensor:
        """On the row's device."""
        return torch.from_numpy(values).to(self.job.device)

    def forward(self) -> Any:
        if self.job.device != "cpu":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode():
            return self._run(**self._inputs).last_hidden_state

    def hidden(self, result: Any) -> Floats:
        values: Floats = result.float().cpu().numpy()
        return values

    def weight_bytes(self) -> int:
        return self._bytes


class TorchGraph(TorchPeer):
    """A plain encoder with one product for query, key and value, captured in a CUDA graph of its own for each batch."""

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self._result: Any = None
        self._graph: Any = None

    def load(self) -> None:
        super().load()
        self._run = SdpaBert(checked_bert(self.model))
        self.model = None  # else query, key and value would be there twice

    def bind(self, ids: Ids, mask: Ids) -> None:
        self._graph = self._result = None  # their memory goes before the next ones' is taken
        fixed, there = self.tensor(ids), None if mask.all() else self.tensor(mask)
        self._graph, self._result = captured(lambda: self._run(fixed, there))

    def forward(self) -> Any:
        self._graph.replay()
        return self._result


class TorchUnpadded(TorchPeer):
    """Tokens without padding through a plain encoder; attention by torch's varlen_attn (FlashAttention). Option: `compile`."""

    padding: ClassVar[str] = "not computed"

    def load(self) -> None:
        library("torch.nn.attention.varlen")
        super().load()
        self._run = packed = PackedBert(checked_bert(self.model))
        self.model = None  # else query, key and value would be there twice
        if self.job.options.get("compile"):
            packed.encode = compiled(packed.encode, self.job.device)  # type: ignore[method-assign]

    def forward(self) -> Any:
        if self.job.device != "cpu":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode():
            return self._run(self._inputs["input_ids"], self._inputs["attention_mask"])


def checked_bert(model: Any) -> Any:
    """The model itself.

    Raises:
        Unavailable: it is no BERT, which is all that the plain encoders of `sdpa_bert` compute.
    """
    if model.config.model_type != "bert":
        raise Unavailable(f"this row's plain encoder is written for bert, the model is a {model.config.model_type}")
    return model


def compiled(function: Any, device: str) -> Any:
    """As torch documents it for inference on that device."""
    if device == "cpu":
        torch._inductor.config.freezing = True
        return torch.compile(function, dynamic=True)
    torch._dynamo.config.recompile_limit = _COMPILED_SHAPES
    return torch.compile(function, mode="reduce-overhead", dynamic=False)


def captured(run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """A CUDA graph of `run`, and the tensor that each replay writes its result to."""
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_FORWARDS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
    return graph, result
