"""The fused encoder: few operators on packed tokens, prepared from a model's quantized modules, which stay where they are.

`families` say what it computes, `build` makes a `program` of a model's modules, `run` executes it, `forward` puts it in place
of a model's own forward, `eligibility` says why not, `watch` whether somebody touched the modules, `graphs` replay it on a GPU.
"""

from qbert.encoder.calibration import Calibration, LayerScales, Overflow
from qbert.encoder.compiled import compile
from qbert.encoder.eligibility import check_calibration, encoders, layer_names, obstacle
from qbert.encoder.forward import FusedForward, fused_forward, remove_fused, set_fused, unfused
from qbert.encoder.graphs import GraphCache, GraphReport
from qbert.encoder.program import Cost, Layer, Program, Step

__all__ = [
    "Calibration", "Cost", "FusedForward", "GraphCache", "GraphReport", "Layer", "LayerScales", "Overflow", "Program", "Step",
    "check_calibration", "compile", "encoders", "fused_forward", "layer_names", "obstacle", "remove_fused", "set_fused",
    "unfused",
]  # fmt: skip
