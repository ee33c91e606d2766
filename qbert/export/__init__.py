"""Leaving: quantized models as graphs that other runtimes read."""

from qbert.export.onnx import FORMATS, ExportReport, export_onnx

__all__ = ["FORMATS", "ExportReport", "export_onnx"]
