"""ONNX Runtime: its own optimizer for transformers, then float32, or `quantize_dynamic` to int8.

As its documentation recommends for transformers: fuse first (attention, embeddings with their norm, bias with GELU, residual
with norm), then quantize dynamically; unsigned activations with signed weights (U8S8), a scale per channel, and no reduced
range on a CPU with VNNI.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from qbert.folders import new_folder

from ..bert_models import fingerprint, load_float32
from ..machine import describe, versions
from .base import Floats, Ids, Peer, library
from .plain_encoders import OUTPUT, feed, plain_encoder

_OPSET = 17
_VNNI_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}


class OnnxRuntime(Peer):
    """Options: `int8`."""

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self._session: Any = None
        self._feed: dict[str, Ids] = {}
        self._fused: list[str] = []

    @property
    def _folder(self) -> Path:
        key = fingerprint(*(f"{k} {v}" for k, v in versions(["torch", "transformers", "onnx", "onnxruntime"]).items()))
        return Path(self.job.work) / f"onnx-{key}"

    @property
    def _file(self) -> Path:
        return self._folder / ("int8.onnx" if self.job.options.get("int8") else "float32.onnx")

    def prepare(self) -> None:
        library("onnxruntime")
        library("onnx")
        if not self._folder.is_dir():
            with new_folder(self._folder) as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._convert(folder)

    def _convert(self, folder: Path) -> None:
        model = load_float32(self.job.folder)
        export(model, folder / "exported.onnx")
        optimizer = library("onnxruntime.transformers.optimizer")
        config = model.config
        optimized = optimizer.optimize_model(
            str(folder / "exported.onnx"), model_type="bert", num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size, opt_level=0, use_gpu=False,
        )  # fmt: skip
        fused = {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}
        (folder / "fused.txt").write_text("\n".join(f"{count} {name}" for name, count in fused.items()))
        optimized.save_model_to_file(str(folder / "float32.onnx"))
        (folder / "exported.onnx").unlink()
        _quantize(folder / "float32.onnx", folder / "int8.onnx")

    def load(self) -> None:
        runtime = library("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.job.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session = runtime.InferenceSession(str(self._file), options, providers=["CPUExecutionProvider"])
        self._fused = (self._folder / "fused.txt").read_text().split("\n")

    def bind(self, ids: Ids, mask: Ids) -> None:
        self._feed = feed([each.name for each in self._session.get_inputs()], ids, mask)

    def forward(self) -> Any:
        return self._session.run(None, self._feed)[0]

    def hidden(self, result: Any) -> Floats:
        values: Floats = result
        return values

    def weight_bytes(self) -> int:
        return self._file.stat().st_size

    def notes(self) -> list[str]:
        return [f"fused by its optimizer: {', '.join(self._fused)}"]


def export(model: Any, path: Path) -> None:
    """An ONNX file with batch and length free; quietly."""
    plain, ids = plain_encoder(model), torch.ones(2, 16, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "length"} for name in (*plain.inputs, OUTPUT)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            plain, tuple(feed(plain.inputs, ids, ids).values()), str(path), dynamo=False, opset_version=_OPSET,
            input_names=list(plain.inputs), output_names=[OUTPUT], dynamic_axes=axes,
        )  # fmt: skip


def _quantize(source: Path, target: Path) -> None:
    quantization = library("onnxruntime.quantization")
    has_vnni = bool(_VNNI_FLAGS & set(describe().flags))
    quantization.quantize_dynamic(
        str(source), str(target), weight_type=quantization.QuantType.QInt8, per_channel=True,
        # Without VNNI pairs of U8S8 products saturate in 16 bits: 7-bit weights are what it recommends there.
        reduce_range=not has_vnni,
        # Shape inference does not know the fused operators, so the type of their results has to be said.
        extra_options={"DefaultTensorType": library("onnx").TensorProto.FLOAT},
    )  # fmt: skip
