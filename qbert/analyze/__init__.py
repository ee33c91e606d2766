"""The BERT breakdown: where an encoder's parameters, FLOPs, bytes, run-time memory and latency are."""

from qbert.analyze.components import Component
from qbert.analyze.report import plot, to_table
from qbert.analyze.result import AnalyzeResult
from qbert.analyze.run import analyze
from qbert.analyze.targets import TARGETS, RooflineTarget, measure_here

__all__ = [
    "TARGETS",
    "AnalyzeResult",
    "Component",
    "RooflineTarget",
    "analyze",
    "measure_here",
    "plot",
    "to_table",
]
