"""A stored matrix: codes, scales or dictionary, outliers. Plain tensors in a named layout, no tensor subclass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qbert.formats import SCHEMES, EmulatedScheme, PerGroup, PerRow, Scheme
from qbert.weight import layout as _layout
from qbert.weight import zeros
from qbert.weight.emulated import block_specs
from qbert.weight.layout import Layout
from qbert.weight.specs import TensorSpec, column_dtype

OUTLIER_TENSORS = ("outlier_rowptr", "outlier_col", "outlier_delta")
T = TypeVar("T")


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
        Of a block format's: see `qbert.weight.emulated.block_specs`.
    """
    if isinstance(scheme, EmulatedScheme):
        return block_specs(scheme.weights, shape, outliers)
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


def stored_specs(
    scheme: Scheme, shape: tuple[int, int], outliers: int = 0, layout: Layout = Layout.PLAIN, nonzeros: int = 0
) -> dict[str, TensorSpec]:
    """The tensors of a weight as a file holds them: PLAIN, or one of `zeros.FILE_LAYOUTS`.

    Args:
        nonzeros: codes that are none of the zero's.
    """
    return zeros.stored_specs(plain_specs(scheme, shape, outliers), scheme, shape, layout, nonzeros)


def _bytes_of(specs: dict[str, TensorSpec]) -> int:
    return sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs.values())


_TENSOR_NAMES = {name: tuple(plain_specs(scheme, (1, scheme.group_size or 1))) for name, scheme in SCHEMES.items()}


def tensor_names(scheme: Scheme) -> tuple[str, ...]:
    """Names of a weight's tensors, in the order in which operators take them."""
    known = _TENSOR_NAMES.get(scheme.name)  # no cache: torch.compile would not look into it
    return known if known is not None else tuple(plain_specs(scheme, (1, scheme.group_size or 1)))


class Outliers(NamedTuple):
    """Weights kept exactly, as compressed sparse rows of weight - centroid.

    Attributes:
        rowptr, col, delta: (n + 1,) int32, (outliers,) int16 or int32, (outliers,) float32.
    """

    rowptr: Tensor
    col: Tensor
    delta: Tensor


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored (n, k) matrix: what operations multiply with, or look rows up in.

    Attributes:
        scheme: how it is stored.
        shape: (n, k) of the matrix it stands for.
        layout: where the bits of `tensors["qdata"]` are.
        tensors: by the names of `plain_specs`. Matrices that are stacked to one keep a dictionary each: codebook
            (m, 2**bits) and scale (m,), rows r of n having number r * m // n.
    """

    scheme: Scheme
    shape: tuple[int, int]
    layout: Layout
    tensors: dict[str, Tensor]
    _prepared: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)
    _addresses: list[int] = field(default_factory=list, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what was prepared: it has the addresses of these tensors, and those of a copy lie elsewhere.
        return Weight, (self.scheme, self.shape, self.layout, self.tensors)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], scheme: Scheme, layout: Layout, k: int) -> Weight:
        """From tensors in the order of `tensor_names`; n is what the tensors say that have a value or a row for each."""
        named = dict(zip(tensor_names(scheme), tensors, strict=True))
        counted = named["outlier_rowptr" if scheme.has_dictionary else "scale"]
        n = counted.shape[0] - int(scheme.has_dictionary) if counted.dim() else 0
        return cls(scheme, (n, k), layout, named)

    @property
    def n(self) -> int:
        """Output channels, or rows of a table."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """Input channels, or columns of a table."""
        return self.shape[1]

    @property
    def qdata(self) -> Tensor:
        """The codes, in `layout`."""
        return self.tensors["qdata"]

    @property
    def scale(self) -> Tensor | None:
        """Scales, None of float dictionaries."""
        return self.tensors.get("scale")

    @property
    def group_scale(self) -> Tensor | None:
        """(n, groups) uint8 inside the row's scale, None where a scheme has none."""
        return self.tensors.get("group_scale")

    @property
    def codebook(self) -> Tensor | None:
        """The dictionary or dictionaries, None where a scheme has none."""
        return self.tensors.get("codebook")

    @property
    def matrices(self) -> int:
        """How many matrices with a dictionary each are stacked."""
        codebook = self.tensors.get("codebook")
        return 1 if codebook is None or codebook.dim() < 2 else codebook.shape[0]

    @property
    def sparse(self) -> Outliers | None:
        """The outliers, None where a scheme keeps none."""
        if "outlier_delta" not in self.tensors:
            return None
        return Outliers(*(self.tensors[name] for name in OUTLIER_TENSORS))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.qdata.device

    @property
    def outliers(self) -> int:
        """How many weights are kept exactly."""
        return self.tensors["outlier_col"].numel() if "outlier_col" in self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in this layout."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the PLAIN layout, which is what a file holds."""
        return _bytes_of(plain_specs(self.scheme, self.shape, self.outliers))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, with scales, dictionary and outliers."""
        return 8 * self.stored_bytes / max(1, self.shape[0] * self.shape[1])

    def prepared(self, make: Callable[[Weight], T]) -> T:
        """What a backend makes of the weight before its first use, made once: its own struct of addresses, say.

        The memory behind those addresses is kept, even when `tensor.data = ...` puts other under a tensor.
        """
        found = self._prepared.get(make)
        if found is None:
            found = self._prepared[make] = make(self), [tensor.detach() for tensor in self.tensors.values()]
        return cast(T, found[0])

    def remember(self) -> Weight:
        """Itself, which `recall` finds by its tensors for as long as somebody holds it."""
        _remembered[id(self.qdata), self.scheme.name] = self
        self._addresses[:] = [tensor.data_ptr() for tensor in self.tensors.values()]
        return self

    def to_layout(self, layout: Layout) -> Weight:
        """The same matrix in another layout; itself where it is in that layout already. On a GPU it is there on return."""
        if layout is self.layout:
            return self
        packed, packing = (each in zeros.FILE_LAYOUTS for each in (self.layout, layout))
        to_plain = zeros.unpack if packed else _layout.to_plain
        from_plain = zeros.pack if packing else _layout.from_plain
        plain = to_plain(self.tensors, self.scheme, self.shape, self.layout)
        tensors = from_plain(plain, self.scheme, self.shape, layout)
        _wait_for(tensors["qdata"].device)
        return Weight(self.scheme, self.shape, layout, tensors)


_remembered: WeakValueDictionary[tuple[int, str], Weight] = WeakValueDictionary()


def recall(tensors: Sequence[Tensor], scheme: Scheme, layout: str, k: int) -> Weight | None:
    """The remembered weight of exactly these tensors in the memory where they were, with what was prepared of it."""
    found = _remembered.get((id(tensors[0]), scheme.name)) if tensors else None
    if found is None or found.scheme is not scheme or found.shape[1] != k or found.layout.value != layout:
        return None
    same = len(tensors) == len(found.tensors) and all(map(is_, tensors, found.tensors.values()))
    return found if same and list(map(Tensor.data_ptr, tensors)) == found._addresses else None


def _wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was told: compiled kernels fetch weights while the launch before theirs still runs."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
