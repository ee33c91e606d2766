"""Roofline: the least time that the counted operations can take on a target.

Each operation takes max(matrix FLOPs / peak of its precision, vector FLOPs / vector peak, bytes / bandwidth); operations
follow one another, so times add up. Launches are reported beside it, not inside: CUDA graphs hide most of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qbert.analyze.count import OpCount
from qbert.analyze.targets import DTYPE_BYTES, RooflineTarget
from qbert.errors import QBertError

_MS_PER_S = 1e3

Bound = Literal["compute", "memory", "none"]


@dataclass(frozen=True)
class Prediction:
    """Floor of the time of some operations on one target.

    Attributes:
        ms: predicted milliseconds.
        compute_ms: the part of them in operations that arithmetic bounds; memory bounds the rest.
        flops: matrix and vector FLOPs.
        bytes_moved: bytes at the predicted dtype.
        launch_ms: launches times the target's launch latency; not part of `ms`.
    """

    ms: float = 0.0
    compute_ms: float = 0.0
    flops: int = 0
    bytes_moved: float = 0.0
    launch_ms: float = 0.0

    @property
    def bound(self) -> Bound:
        """What bounds most of the time; ``none`` where nothing runs."""
        if self.ms == 0:
            return "none"
        return "compute" if self.compute_ms * 2 >= self.ms else "memory"

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP per byte; 0 where nothing moves."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0

    def __add__(self, other: Prediction) -> Prediction:
        return Prediction(
            self.ms + other.ms,
            self.compute_ms + other.compute_ms,
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.launch_ms + other.launch_ms,
        )


def predict_op(op: OpCount, target: RooflineTarget, dtype: str, model_dtype: str) -> Prediction:
    """Prediction for one operation.

    Args:
        op: what it does, counted in `model_dtype`.
        target: where it would run.
        dtype: precision of its float arithmetic and tensors there: fp32, tf32, bf16 or fp16.
        model_dtype: precision that the counted model has.

    Raises:
        QBertError: unknown dtype, or the target has no peak for the precision.
    """
    if dtype not in DTYPE_BYTES:
        raise QBertError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
    matmul_s = op.matmul_flops / target.peak(dtype if op.math == "float" else op.math) if op.matmul_flops else 0.0
    compute_s = max(matmul_s, op.vector_flops / target.vector_flops)
    bytes_moved = op.model_dtype_bytes * DTYPE_BYTES[dtype] / DTYPE_BYTES[model_dtype] + op.fixed_bytes
    memory_s = bytes_moved / target.bandwidth
    return Prediction(
        ms=max(compute_s, memory_s) * _MS_PER_S,
        compute_ms=compute_s * _MS_PER_S if compute_s >= memory_s else 0.0,
        flops=op.matmul_flops + op.vector_flops,
        bytes_moved=bytes_moved,
        launch_ms=op.launches * target.launch_s * _MS_PER_S,
    )


def predict(ops: Iterable[OpCount], target: RooflineTarget, dtype: str, model_dtype: str) -> Prediction:
    """Prediction for operations that follow one another. Arguments and errors as in `predict_op`."""
    return sum((predict_op(op, target, dtype, model_dtype) for op in ops), Prediction())
