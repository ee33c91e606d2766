"""L3. A quantized matrix: codes, scales or dictionary, outliers. Plain tensors in a named layout, no tensor subclass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbert import layout as _layout
from qbert.formats import PerGroup, PerRow, Scheme
from qbert.layout import Layout

_INT16_MAX = torch.iinfo(torch.int16).max
OUTLIER_TENSORS = ("outlier_rowptr", "outlier_col", "outlier_delta")


@dataclass(frozen=True)
class TensorSpec:
    """Data type and shape that a tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def column_dtype(k: int) -> torch.dtype:
    """Type of outlier columns: 16 bits where every column fits."""
    return torch.int16 if k - 1 <= _INT16_MAX else torch.int32


def plain_specs(scheme: Scheme, shape: tuple[int, int], outliers: int = 0) -> dict[str, TensorSpec]:
    """The tensors of a weight of that scheme in the PLAIN layout: the file format, said once.

    Args:
        shape: (n, k) of the weight: rows are output channels, or entries of an embedding table.
        outliers: how many weights are kept exactly (dictionary schemes only).

    Returns:
        name -> type and shape:
        qdata           (n, k) int8, or the bit stream (n, ceil(k * bits / 8)) uint8
        scale           (n,) float32 per row; (n, k / group) bfloat16 per group; (1,) float32 for int8 centroids
        group_scale     (n, k / group) uint8, w4a8 only: weight = scale * group_scale * code
        codebook        (2**bits,) ascending, float32, or int8 times `scale` where activations are int8
        outlier_rowptr  (n + 1,) int32, outlier_col (outliers,) int16 or int32, outlier_delta (outliers,) float32:
                        compressed sparse rows of weight - codebook[code]
    """
    n, k = shape
    fmt = scheme.weight
    qdata = TensorSpec(torch.int8, (n, k))
    if fmt.bits != 8:
        qdata = TensorSpec(torch.uint8, (n, _layout.packed_width(k, fmt.bits)))
    if scheme.has_dictionary:
        int8_centroids = scheme.activation is not None
        centroids = {"codebook": TensorSpec(torch.int8 if int8_centroids else torch.float32, (fmt.codes,))}
        return {
            "qdata": qdata,
            **centroids,
            **({"scale": TensorSpec(torch.float32, (1,))} if int8_centroids else {}),
            "outlier_rowptr": TensorSpec(torch.int32, (n + 1,)),
            "outlier_col": TensorSpec(column_dtype(k), (outliers,)),
            "outlier_delta": TensorSpec(torch.float32, (outliers,)),
        }
    if isinstance(scheme.granularity, PerRow):
        return {"qdata": qdata, "scale": TensorSpec(torch.float32, (n,))}
    assert isinstance(scheme.granularity, PerGroup)
    groups = k // scheme.granularity.size
    if scheme.activation is None:
        return {"qdata": qdata, "scale": TensorSpec(torch.bfloat16, (n, groups))}
    return {
        "qdata": qdata,
        "scale": TensorSpec(torch.float32, (n,)),
        "group_scale": TensorSpec(torch.uint8, (n, groups)),
    }


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized (n, k) matrix.

    Attributes:
        scheme: how it is stored.
        shape: (n, k) of the matrix it stands for.
        layout: where the bits of `tensors["qdata"]` are.
        tensors: by the names of `plain_specs`.
    """

    scheme: Scheme
    shape: tuple[int, int]
    layout: Layout
    tensors: dict[str, Tensor]

    @property
    def outliers(self) -> int:
        """How many weights are kept exactly."""
        return self.tensors["outlier_delta"].numel() if "outlier_delta" in self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in this layout."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the PLAIN layout, which is what a file holds."""
        specs = plain_specs(self.scheme, self.shape, self.outliers)
        return sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, with scales, dictionary and outliers."""
        return 8 * self.stored_bytes / max(1, self.shape[0] * self.shape[1])

    def to_layout(self, layout: Layout) -> QuantizedTensor:
        """The same matrix in another layout; itself where it is in that layout already. On a GPU it is there on return."""
        if layout is self.layout:
            return self
        plain = _layout.to_plain(self.tensors, self.scheme, self.shape, self.layout)
        tensors = _layout.from_plain(plain, self.scheme, self.shape, layout)
        _wait_for(tensors["qdata"].device)
        return QuantizedTensor(self.scheme, self.shape, layout, tensors)


def _wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was told: compiled kernels fetch weights while the launch before theirs still runs."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
