"""The table of what is timed: one row a system, with the configuration it runs in and where that is documented."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.base import Job, Peer, Unavailable, one_line

__all__ = ["BASELINE", "ROWS", "Job", "Peer", "RowSpec", "Unavailable", "isa_environment", "one_line", "rows_of"]

BASELINE = "torch-fp32"  # what every speed-up is relative to


@dataclass(frozen=True)
class RowSpec:
    """One row.

    Attributes:
        name: of the row.
        library: whose it is; what --peers names.
        where: "module:class" below `benchmarks.peers`.
        configuration: how it is run, in a line.
        source: what recommends this configuration.
        options: see `Job`.
        texts_only: takes texts, so it is a row of --sentences only.
    """

    name: str
    library: str
    where: str
    configuration: str
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    texts_only: bool = False

    def peer_class(self) -> type[Peer]:
        """The class; importing it needs no optional library."""
        module, _, name = self.where.partition(":")
        found: type[Peer] = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)
        return found


_TORCH, _AO, _ORT, _OV, _BNB = "torch", "torchao", "onnxruntime", "openvino", "bitsandbytes"
_COMPILE = "docs.pytorch.org: torch.compile; TORCHINDUCTOR_FREEZING for inference on CPUs"
_ORT_DOCS = "onnxruntime.ai/docs: Transformers Model Optimization Tool; Quantize ONNX Models, Transformer-based models"
_OV_DOCS = "docs.openvino.ai: CPU Device; Precision Control; Performance Hints"


def _qbert(name: str, configuration: str, where: str = "qbert_peer:QBertFused", **options: Any) -> RowSpec:
    return RowSpec(f"qbert-{name}", "qbert", where, configuration, "README", options)


_TABLE = (
    RowSpec(BASELINE, _TORCH, "torch_peer:TorchPeer", "eager, sdpa attention", "", {"dtype": "float32"}),
    RowSpec("torch-bf16", _TORCH, "torch_peer:TorchPeer", "eager, sdpa attention", "", {"dtype": "bfloat16"}),
    RowSpec("torch-fp32-compile", _TORCH, "torch_peer:TorchPeer", "inductor, frozen weights, dynamic shapes", _COMPILE,
            {"dtype": "float32", "compile": True}),
    RowSpec("torch-bf16-compile", _TORCH, "torch_peer:TorchPeer", "inductor, frozen weights, dynamic shapes", _COMPILE,
            {"dtype": "bfloat16", "compile": True}),
    RowSpec("torchao-int8-dynamic", _AO, "ao_peer:TorchaoDynamic",
            "Int8DynamicActivationInt8WeightConfig on bfloat16, inductor, frozen weights",
            "docs.pytorch.org/ao: quantize_", {"compile": True}),
    RowSpec("torchao-int8-static", _AO, "ao_peer:TorchaoExport",
            "PT2E, X86InductorQuantizer calibrated on real sentences, bfloat16 autocast, inductor, frozen weights",
            "docs.pytorch.org/ao: PyTorch 2 Export Quantization with X86 Backend through Inductor"),
    RowSpec("onnxruntime-fp32", _ORT, "ort_peer:OnnxRuntime", "fused by its transformers optimizer", _ORT_DOCS),
    RowSpec("onnxruntime-int8", _ORT, "ort_peer:OnnxRuntime",
            "fused, then quantize_dynamic: U8S8, a scale per channel", _ORT_DOCS, {"int8": True}),
    RowSpec("openvino-fp32", _OV, "ov_peer:OpenVino", "LATENCY, INFERENCE_PRECISION_HINT f32", _OV_DOCS,
            {"precision": "f32"}),
    RowSpec("openvino-bf16", _OV, "ov_peer:OpenVino", "LATENCY, INFERENCE_PRECISION_HINT bf16", _OV_DOCS,
            {"precision": "bf16"}),
    RowSpec("openvino-int8", _OV, "ov_peer:OpenVino",
            "NNCF static post-training quantization, model_type transformer, calibrated on real sentences; LATENCY",
            f"{_OV_DOCS}; Basic Quantization Flow", {"precision": "int8"}),
    RowSpec("bitsandbytes-int8", _BNB, "bnb_peer:BitsAndBytes", "LLM.int8(), threshold 6, bfloat16 for the rest",
            "huggingface.co/docs/bitsandbytes: 8-bit quantization"),
    RowSpec("sentence-transformers", "sentence-transformers", "st_peer:SentenceTransformers",
            "SentenceTransformer.encode in float32, its own tokenization included", "sbert.net: Computing Embeddings",
            {}, texts_only=True),
    RowSpec("sentence-transformers-bf16", "sentence-transformers", "st_peer:SentenceTransformers",
            "SentenceTransformer.encode in bfloat16, its own tokenization included",
            "sbert.net: Speeding up Inference", {"dtype": "bfloat16"}, texts_only=True),
    _qbert("w8a8-unfused", "quantize_: every linear by itself", "qbert_peer:QBert", scheme="w8a8"),
    _qbert("w8a8", "fused encoder, scales per token", scheme="w8a8", fuse=True),
    _qbert("w8a8-static", "fused encoder, calibrated on real sentences", scheme="w8a8", fuse=True, static=True),
    _qbert("w4a8", "fused encoder, scales per token", scheme="w4a8", fuse=True),
    _qbert("gobo4a8", "fused encoder, scales per token", scheme="gobo4a8", fuse=True),
    _qbert("gobo3a8", "fused encoder, scales per token", scheme="gobo3a8", fuse=True),
)  # fmt: skip

ROWS: dict[str, RowSpec] = {row.name: row for row in _TABLE}


def rows_of(libraries: frozenset[str], *, texts: bool) -> list[RowSpec]:
    """Rows of these libraries, qbert's and the baseline among them whatever is asked for.

    Args:
        texts: whether rows that take texts only are wanted.
    """
    wanted = libraries | {"qbert"}
    return [row for row in _TABLE if (row.library in wanted or row.name == BASELINE) and (texts or not row.texts_only)]


# qbert's instruction sets -> what oneDNN (in torch and in OpenVINO), ATen and MKL call the same limit.
_ONEDNN = {
    "generic": "SSE41", "avx2": "AVX2", "avx_vnni": "AVX2_VNNI", "avx512_vnni": "AVX512_CORE_VNNI",
    "amx_int8": "AVX512_CORE_AMX",
}  # fmt: skip
_ATEN = {"generic": "default", "avx2": "avx2", "avx_vnni": "avx2", "avx512_vnni": "avx512", "amx_int8": "avx512"}
_MKL = {"generic": "SSE4_2", "avx2": "AVX2", "avx_vnni": "AVX2", "avx512_vnni": "AVX512", "amx_int8": "AVX512"}
ISAS = tuple(_ONEDNN)


def isa_environment(library: str, isa: str) -> dict[str, str]:
    """Environment variables that hold a library to an instruction set.

    Raises:
        Unavailable: the library has no switch for it.
    """
    if library in ("onnxruntime", "bitsandbytes"):
        raise Unavailable(f"{library} has no switch for its instruction set: left out of a comparison at {isa}")
    limits = {
        "ONEDNN_MAX_CPU_ISA": _ONEDNN[isa],
        "ATEN_CPU_CAPABILITY": _ATEN[isa],
        "MKL_ENABLE_INSTRUCTIONS": _MKL[isa],
    }
    return {**limits, "QBERT_CPU_ISA": isa} if library == "qbert" else limits
