"""Kernels for CPUs: the compiled extension's, then what torch offers."""

from qbert.ops.cpu import by_torch, native

__all__ = ["by_torch", "native"]
