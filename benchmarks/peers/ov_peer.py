"""OpenVINO: float32 or bfloat16 by its precision hint, or static int8 by NNCF, calibrated on real sentences.

NNCF as its documentation says for transformers: `model_type=TRANSFORMER` (SmoothQuant, and an asymmetric scheme for
activations) on 300 samples. One stream with all threads (LATENCY). Each batch's shape is set before compiling, as its guide
for speed advises, unless shapes vary from call to call.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbert.folders import new_folder
from qbert.timing import Unavailable

from ..bert_models import fingerprint, load_float32
from ..machine import versions
from .base import Floats, Ids, Peer, library
from .plain_encoders import feed, plain_encoder

_SAMPLES = 300  # NNCF's default


class OpenVino(Peer):
    """Options: `precision` ("f32", "bf16", or "int8": whatever the plugin chooses between the int8 products)."""

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self._core: Any = None
        self._model: Any = None
        self._request: Any = None
        self._precision = ""
        self._feed: dict[str, Ids] = {}

    @property
    def _int8(self) -> bool:
        return bool(self.job.options["precision"] == "int8")

    @property
    def _folder(self) -> Path:
        names = ["torch", "transformers", "openvino", *(["nncf"] if self._int8 else [])]
        key = fingerprint(*(f"{k} {v}" for k, v in versions(names).items()))
        return Path(self.job.work) / f"openvino-{'int8' if self._int8 else 'float32'}-{key}"

    def prepare(self) -> None:
        runtime = library("openvino")
        if self._int8:
            library("nncf")
        if self._folder.is_dir():
            return
        plain, ids = plain_encoder(load_float32(self.job.folder)), torch.ones(2, 16, dtype=torch.int64)
        model = runtime.convert_model(plain, example_input=feed(plain.inputs, ids, ids))
        for given, name in zip(model.inputs, plain.inputs, strict=True):
            given.get_tensor().set_names({name})
        if self._int8:
            model = self._quantized(model)
        with new_folder(self._folder) as folder:
            runtime.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)

    def _quantized(self, model: Any) -> Any:
        nncf = library("nncf")
        logging.getLogger("nncf").setLevel(logging.ERROR)
        samples = [np.array([each], dtype=np.int64) for each in self.job.calibration[:_SAMPLES]]
        feeds = [feed(_inputs(model), ids, np.ones_like(ids)) for ids in samples]
        return nncf.quantize(
            model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=max(1, len(feeds))
        )

    def load(self) -> None:
        self._core = library("openvino").Core()
        wanted = self.job.options["precision"]
        if wanted == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Unavailable("OpenVINO has no bfloat16 on this instruction set")
        self._model = self._core.read_model(str(self._folder / "model.xml"))
        if self.job.varying:
            self._compile(self._model)

    def _compile(self, model: Any) -> None:
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.job.threads}
        if not self._int8:
            config["INFERENCE_PRECISION_HINT"] = self.job.options["precision"]
        compiled = self._core.compile_model(model, "CPU", config)
        self._precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self._request = compiled.create_infer_request()

    def bind(self, ids: Ids, mask: Ids) -> None:
        self._feed = feed(_inputs(self._model), ids, mask)
        if not self.job.varying:
            self._request = None  # what was compiled for the last shape goes first
            model = self._model.clone()
            model.reshape({name: list(ids.shape) for name in self._feed})
            self._compile(model)

    def forward(self) -> Any:
        return self._request.infer(self._feed, share_inputs=True, share_outputs=True)[0]

    def hidden(self, result: Any) -> Floats:
        return np.array(result, dtype=np.float32)  # a view of memory that the next forward overwrites

    def weight_bytes(self) -> int:
        return (self._folder / "model.bin").stat().st_size

    def notes(self) -> list[str]:
        return [f"float parts run in {self._precision}"] if self._precision else []


def _inputs(model: Any) -> list[str]:
    return [each.get_any_name() for each in model.inputs]
