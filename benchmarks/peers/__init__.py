"""The tables of what is timed, one a target: a row is a system, its configuration, and where that is documented."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qbert.timing import Unavailable

from .base import Job, Peer

__all__ = [
    "BASELINES", "ISAS", "ROWS", "TARGETS", "Job", "Peer", "RowSpec", "isa_environment", "rows_of",
]  # fmt: skip

# What every speed-up is relative to: what a user has before thinking about it. Nobody runs float32 on a GPU's CUDA cores.
BASELINES = {"cpu": "torch-fp32", "cuda": "torch-bf16"}
TARGETS = tuple(BASELINES)


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
        target: "cpu" or "cuda".
        environment: variables of its process.
    """

    name: str
    library: str
    where: str
    configuration: str
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    texts_only: bool = False
    target: str = "cpu"
    environment: Mapping[str, str] = field(default_factory=dict)

    def peer_class(self) -> type[Peer]:
        """The class; importing it needs no optional library."""
        module, _, name = self.where.partition(":")
        found: type[Peer] = getattr(importlib.import_module(f".{module}", __name__), name)
        return found


_TORCH, _AO, _ORT, _OV, _BNB, _GEM = "torch", "torchao", "onnxruntime", "openvino", "bitsandbytes", "gemlite"
_COMPILE = "docs.pytorch.org: torch.compile; TORCHINDUCTOR_FREEZING for inference on CPUs"
_REDUCE = "docs.pytorch.org: torch.compile, mode reduce-overhead"
_AO_DOCS = "docs.pytorch.org/ao: quantize_"
_ORT_DOCS = "onnxruntime.ai/docs: Transformers Model Optimization Tool; Quantize ONNX Models, Transformer-based models"
_OV_DOCS = "docs.openvino.ai: CPU Device; Precision Control; Performance Hints"
_BNB_DOCS = "huggingface.co/docs/bitsandbytes"
_FROZEN, _GRAPHS = "inductor, frozen weights, dynamic shapes", "inductor with CUDA graphs, static shapes"


def _row(name: str, library: str, where: str, configuration: str, source: str = "", **options: Any) -> RowSpec:
    return RowSpec(name, library, where, configuration, source, options)


def _cuda(name: str, library: str, where: str, configuration: str, source: str = "", **options: Any) -> RowSpec:
    return RowSpec(name, library, where, configuration, source, options, target="cuda")


def _qbert(name: str, configuration: str, *, unfused: bool = False, target: str = "cpu", **options: Any) -> RowSpec:
    where = "qbert_peer:QBert" if unfused else "qbert_peer:QBertFused"
    if target == "cuda":  # what is not int8 there is what its peers have
        options, configuration = {"dtype": "bfloat16", **options}, f"{configuration}; bfloat16 for the rest"
    return RowSpec(
        f"qbert-{name}", "qbert", where, configuration, "README", {**options, "fuse": not unfused}, target=target
    )


# Beside the row where the tables choose the kernels: suffix, what is different, the variables that make it so (docs/cuda.md).
_KERNELS = (
    ("triton", "Triton's kernels alone", {"QBERT_KERNEL": "triton"}),
    ("cuda", "compiled kernels wherever there is one", {"QBERT_KERNEL": "cuda"}),
    ("cuda-serial", "compiled kernels, none begun before the last has ended", {"QBERT_KERNEL": "cuda", "QBERT_PDL": "0"}),
)  # fmt: skip


def _with_kernels(row: RowSpec) -> list[RowSpec]:
    """The row, and rows that differ in the kernels alone."""
    variants = [
        replace(row, name=f"{row.name}-{suffix}", configuration=f"{row.configuration}; {what}", environment=environment)
        for suffix, what, environment in _KERNELS
    ]
    return [row, *variants]


_UNFUSED, _TOKEN = "quantize_: every linear by itself", "fused encoder, scales per token"
_STATIC = "fused encoder, calibrated on real sentences"
_GRAPH = f"{_STATIC}, qbert.compile"

_CPU_ROWS = (
    _row("torch-fp32", _TORCH, "torch_peer:TorchPeer", "eager, sdpa attention", dtype="float32"),
    _row("torch-bf16", _TORCH, "torch_peer:TorchPeer", "eager, sdpa attention", dtype="bfloat16"),
    _row("torch-fp32-compile", _TORCH, "torch_peer:TorchPeer", _FROZEN, _COMPILE, dtype="float32", compile=True),
    _row("torch-bf16-compile", _TORCH, "torch_peer:TorchPeer", _FROZEN, _COMPILE, dtype="bfloat16", compile=True),
    _row("torchao-int8-dynamic", _AO, "ao_peer:TorchaoDynamic",
         f"Int8DynamicActivationInt8WeightConfig on bfloat16, {_FROZEN}", _AO_DOCS, compile=True),
    _row("torchao-int8-static", _AO, "ao_peer:TorchaoExport",
         "PT2E, X86InductorQuantizer calibrated on real sentences, bfloat16 autocast, inductor, frozen weights",
         "docs.pytorch.org/ao: PyTorch 2 Export Quantization with X86 Backend through Inductor"),
    _row("onnxruntime-fp32", _ORT, "ort_peer:OnnxRuntime", "fused by its transformers optimizer", _ORT_DOCS),
    _row("onnxruntime-int8", _ORT, "ort_peer:OnnxRuntime",
         "fused, then quantize_dynamic: U8S8, a scale per channel", _ORT_DOCS, int8=True),
    _row("openvino-fp32", _OV, "ov_peer:OpenVino", "LATENCY, INFERENCE_PRECISION_HINT f32", _OV_DOCS, precision="f32"),
    _row("openvino-bf16", _OV, "ov_peer:OpenVino", "LATENCY, INFERENCE_PRECISION_HINT bf16", _OV_DOCS, precision="bf16"),
    _row("openvino-int8", _OV, "ov_peer:OpenVino",
         "NNCF static post-training quantization, model_type transformer, calibrated on real sentences; LATENCY",
         f"{_OV_DOCS}; Basic Quantization Flow", precision="int8"),
    _row("bitsandbytes-int8", _BNB, "bnb_peer:BitsAndBytes", "LLM.int8(), threshold 6, bfloat16 for the rest",
         f"{_BNB_DOCS}: 8-bit quantization"),
    RowSpec("sentence-transformers", "sentence-transformers", "st_peer:SentenceTransformers",
            "SentenceTransformer.encode in float32, its own tokenization included", "sbert.net: Computing Embeddings",
            {}, texts_only=True),
    RowSpec("sentence-transformers-bf16", "sentence-transformers", "st_peer:SentenceTransformers",
            "SentenceTransformer.encode in bfloat16, its own tokenization included",
            "sbert.net: Speeding up Inference", {"dtype": "bfloat16"}, texts_only=True),
    RowSpec("qbert-w8a8-encode", "qbert", "st_peer:QBertSentences", f"SentenceTransformer.encode, {_TOKEN}", "README",
            {"scheme": "w8a8", "fuse": True}, texts_only=True),
    RowSpec("qbert-w8a8-static-encode", "qbert", "st_peer:QBertSentences", f"SentenceTransformer.encode, {_STATIC}", "README",
            {"scheme": "w8a8", "fuse": True, "static": True}, texts_only=True),
    _qbert("w8a8-unfused", _UNFUSED, unfused=True, scheme="w8a8"),
    _qbert("w8a8", _TOKEN, scheme="w8a8"),
    _qbert("w8a8-static", _STATIC, scheme="w8a8", static=True),
    _qbert("w4a8", _TOKEN, scheme="w4a8"),
    _qbert("gobo4a8", _TOKEN, scheme="gobo4a8"),
    _qbert("gobo3a8", _TOKEN, scheme="gobo3a8"),
)  # fmt: skip

_CUDA_ROWS = (
    _cuda("torch-fp32", _TORCH, "torch_peer:TorchPeer", "eager, sdpa attention, no TF32", dtype="float32"),
    _cuda("torch-bf16", _TORCH, "torch_peer:TorchPeer", "eager, sdpa attention", dtype="bfloat16"),
    _cuda("torch-fp16", _TORCH, "torch_peer:TorchPeer", "eager, sdpa attention", dtype="float16"),
    _cuda("torch-bf16-compile", _TORCH, "torch_peer:TorchPeer", _GRAPHS, _REDUCE, dtype="bfloat16", compile=True),
    _cuda("torch-bf16-graph", _TORCH, "torch_peer:TorchGraph",
          "plain encoder with merged query, key and value, one CUDA graph a batch",
          "docs.pytorch.org: CUDA semantics, CUDA Graphs", dtype="bfloat16"),
    _cuda("torch-bf16-unpadded", _TORCH, "torch_peer:TorchUnpadded",
          "plain encoder without padding, varlen_attn (FlashAttention), eager",
          "docs.pytorch.org: torch.nn.attention.varlen", dtype="bfloat16"),
    _cuda("torch-bf16-unpadded-compile", _TORCH, "torch_peer:TorchUnpadded",
          f"plain encoder without padding, varlen_attn (FlashAttention), {_GRAPHS}",
          "docs.pytorch.org: torch.nn.attention.varlen", dtype="bfloat16", compile=True),
    _cuda("torchao-int8-dynamic", _AO, "ao_peer:TorchaoDynamic",
          f"Int8DynamicActivationInt8WeightConfig on bfloat16, {_GRAPHS}", _AO_DOCS, config="int8", compile=True),
    _cuda("torchao-fp8-dynamic", _AO, "ao_peer:TorchaoDynamic",
          f"Float8DynamicActivationFloat8WeightConfig by rows on bfloat16, {_GRAPHS}; other numbers than int8: other accuracy",
          _AO_DOCS, config="fp8", compile=True),
    _cuda("bitsandbytes-int8", _BNB, "bnb_peer:BitsAndBytes", "LLM.int8(), threshold 6, float16 for the rest",
          f"{_BNB_DOCS}: 8-bit quantization", dtype="float16"),
    _cuda("bitsandbytes-nf4", _BNB, "bnb_peer:BitsAndBytes", "NF4 weights, bfloat16 products",
          f"{_BNB_DOCS}: 4-bit quantization", nf4=True),
    _cuda("gemlite-a8w8", _GEM, "gemlite_peer:Gemlite", "A8W8_INT8_dynamic, float16 for the rest, eager",
          "github.com/mobiusml/gemlite: README", kind="a8w8"),
    _qbert("w8a8-unfused", _UNFUSED, unfused=True, target="cuda", scheme="w8a8"),
    _qbert("w8a8", _TOKEN, target="cuda", scheme="w8a8"),
    _qbert("w8a8-graph", f"{_TOKEN}, qbert.compile", target="cuda", scheme="w8a8", compile=True),
    _qbert("w8a8-static", _STATIC, target="cuda", scheme="w8a8", static=True),
    _qbert("w4a8-static-graph", _GRAPH, target="cuda", scheme="w4a8", static=True, compile=True),
    _qbert("gobo4a8-static-graph", _GRAPH, target="cuda", scheme="gobo4a8", static=True, compile=True),
    *(row for name in ("w8a8", "gobo3a8") for row in _with_kernels(
        _qbert(f"{name}-static-graph", _GRAPH, target="cuda", scheme=name, static=True, compile=True))),
)  # fmt: skip

ROWS: dict[str, dict[str, RowSpec]] = {
    "cpu": {row.name: row for row in _CPU_ROWS},
    "cuda": {row.name: row for row in _CUDA_ROWS},
}


def rows_of(libraries: frozenset[str], *, texts: bool, target: str = "cpu") -> list[RowSpec]:
    """Rows of these libraries, qbert's and the baseline among them whatever is asked for.

    Args:
        texts: whether rows that take texts only are wanted.
        target: a key of `ROWS`.
    """
    wanted, baseline = libraries | {"qbert"}, BASELINES[target]
    rows = ROWS[target].values()
    return [row for row in rows if (row.library in wanted or row.name == baseline) and (texts or not row.texts_only)]


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
