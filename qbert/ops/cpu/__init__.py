"""Kernels for CPUs: the compiled extension's, then what torch offers."""

from qbert.ops.cpu import by_torch, native

KERNELS = (*native.KERNELS, *by_torch.KERNELS)
