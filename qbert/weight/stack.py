"""Weights side by side: several as one of all their rows, or one scaled, without a second copy of the codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qbert.weight.layout import Layout, rows_together
from qbert.weight.tensor import Weight


def rescaled(weight: Weight, factor: float) -> Weight:
    """weight * factor with the same codes: only scales and outliers change, so nothing is rounded to a code again."""
    scaled = ("scale", "outlier_delta")
    tensors = {name: tensor * factor if name in scaled else tensor for name, tensor in weight.tensors.items()}
    return Weight(weight.scheme, weight.shape, weight.layout, tensors)


def stacked(weights: Sequence[Weight]) -> Weight:
    """Matrices (n, k) of one scheme, layout and k as one of all their rows. Exact: no scale is shared between rows of two.

    Dictionaries stay one for each matrix: codebook (m, 2**bits) and scale (m,). A matrix alone is itself.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if not _stack_as_they_lie(weights):
        return stacked([weight.to_layout(Layout.PLAIN) for weight in weights]).to_layout(first.layout)
    parts = {name: [weight.tensors[name] for weight in weights] for name in first.tensors}
    together = {name: torch.cat(tensors) for name, tensors in parts.items() if name not in _ROW_BY_ROW}
    together["qdata"] = joined(parts["qdata"])
    if "codebook" in parts:
        together["codebook"] = torch.stack(parts["codebook"])
        together["outlier_rowptr"] = _joined_rowptr(parts["outlier_rowptr"])
    shape = (sum(weight.shape[0] for weight in weights), first.shape[1])
    return Weight(first.scheme, shape, first.layout, {name: together[name] for name in first.tensors})


_ROW_BY_ROW = ("qdata", "codebook", "outlier_rowptr")


def _stack_as_they_lie(weights: Sequence[Weight]) -> bool:
    """Whether each matrix but the last fills the pieces of memory that its layout is made of."""
    return all(weight.shape[0] % rows_together(weight.layout) == 0 for weight in weights[:-1])


def split(weight: Weight, parts: int) -> list[Weight]:
    """A matrix (n, k) as that many of equal numbers of rows, whose codes are views where the layout allows. Exact.

    Those of a matrix with a dictionary all have that dictionary.
    """
    rows = weight.shape[0] // parts
    if rows * parts != weight.shape[0]:
        raise ValueError(f"{weight.shape[0]} rows in {parts} parts")
    if rows % rows_together(weight.layout):
        return [each.to_layout(weight.layout) for each in split(weight.to_layout(Layout.PLAIN), parts)]
    return [_rows(weight, part, parts) for part in range(parts)]


def _rows(weight: Weight, part: int, parts: int) -> Weight:
    rows, tensors = weight.shape[0] // parts, dict(weight.tensors)
    for name, tensor in weight.tensors.items():
        if name == "outlier_rowptr":
            tensors[name] = tensor[part * rows : (part + 1) * rows + 1]
        elif name in ("qdata", "group_scale") or (name == "scale" and "codebook" not in weight.tensors):
            tensors[name] = tensor.chunk(parts)[part]
    if "outlier_rowptr" in tensors:
        first, last = (int(tensors["outlier_rowptr"][end]) for end in (0, -1))
        tensors["outlier_rowptr"] = tensors["outlier_rowptr"] - first
        tensors |= {name: tensors[name][first:last] for name in ("outlier_col", "outlier_delta")}
    return Weight(weight.scheme, (rows, weight.shape[1]), weight.layout, tensors)


def share_rows(weights: Sequence[Weight]) -> list[Tensor] | None:
    """The codes of each as neighbouring views of one tensor, so that `stacked` needs no copy of them.

    None where they lie so already, or where the matrices leave padding between them.
    """
    if not _stack_as_they_lie(weights):
        return None
    parts = [weight.qdata for weight in weights]
    whole = joined(parts)
    if whole.data_ptr() == parts[0].data_ptr():
        return None
    return list(whole.split([part.shape[0] for part in parts]))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` along the first dimension; a view where the parts lie one after the other in one storage."""
    first, storage = parts[0], parts[0].untyped_storage().data_ptr()
    end = first.storage_offset()
    for part in parts:
        beside = part.untyped_storage().data_ptr() == storage and part.storage_offset() == end
        if not (beside and part.is_contiguous()):
            return torch.cat(list(parts))
        end += part.numel()
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def _joined_rowptr(parts: Sequence[Tensor]) -> Tensor:
    """Row pointers of compressed sparse rows that follow each other."""
    pieces, start = [parts[0][:1]], 0
    for part in parts:
        pieces.append(part[1:] + start)
        start += int(part[-1])
    return torch.cat(pieces)
