"""L7. The modules that `quantize_` puts in place of `nn.Linear` and `nn.Embedding`, and the fused encoder made of them."""

from qbert.nn.calibration import Calibration, LayerScales, Overflow
from qbert.nn.compiled import compile
from qbert.nn.fused import (
    FusedForward,
    check_calibration,
    encoders,
    fused_forward,
    layer_names,
    obstacle,
    remove_fused,
    set_fused,
    unfused,
)
from qbert.nn.graphs import GraphCache, GraphReport
from qbert.nn.modules import GUARD, QEmbedding, QLinear, QTiedLinear, QuantizedModule
from qbert.nn.spec import ModuleSpec, collect_specs

__all__ = [
    "GUARD", "Calibration", "FusedForward", "GraphCache", "GraphReport", "LayerScales", "ModuleSpec", "Overflow", "QEmbedding",
    "QLinear", "QTiedLinear", "QuantizedModule", "check_calibration", "collect_specs", "compile", "encoders",
    "fused_forward", "layer_names", "obstacle", "remove_fused", "set_fused", "unfused",
]  # fmt: skip
