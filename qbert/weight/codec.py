"""What a stored matrix stands for: codes back to numbers, in any layout of any scheme. Plain torch, on any device.

Three readings of one weight: `decode` gives the float matrix, `operand` the int8 matrix of an integer product, and
`row_scales` what its sums are multiplied with. A new kind of format is a case in `_CODES_TO_FLOAT`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import EmulatedScheme, Kind
from qbert.numerics import dequantize
from qbert.weight.emulated import unpack_blocks
from qbert.weight.layout import Layout, look_up, read_codes, read_rows
from qbert.weight.tensor import Outliers, Weight

# A row whose largest magnitude is below this gets this row's scale: its codes are 0 and its scale stays a normal float32.
MIN_ABSMAX = 2.0**-100


def decode(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (n, k) matrix that a weight of any scheme stands for; outliers come back bit for bit.

    Args:
        dtype: of the result; float64 keeps the product of an int8 code and a float32 scale exact.
    """
    if isinstance(weight.scheme, EmulatedScheme):
        fmt = weight.scheme.weights
        return dequantize(unpack_blocks(weight.tensors, fmt, weight.shape), fmt).to(dtype)
    if weight.scheme.activation is not None:
        return _with_outliers(operand(weight).to(dtype) * row_scales(weight).to(dtype)[:, None], weight.sparse)
    codes = read_codes(weight.qdata, weight.scheme.weight, *weight.shape, weight.layout)
    inner = dtype if weight.sparse is None else torch.float32  # where centroid + difference is the weight, bit for bit
    return _with_outliers(_scaled(codes, weight, None, inner), weight.sparse).to(dtype)


def _with_outliers(values: Tensor, sparse: Outliers | None) -> Tensor:
    if sparse is not None:
        check_outliers(sparse, values.shape[1])
        values[outlier_positions(sparse)] += sparse.delta
    return values


def decode_rows(weight: Weight, chosen: Tensor) -> Tensor:
    """Float32 rows (m, k) of a table without int8 activations, `chosen` (m,) integers: unpacks and patches no others."""
    flat = chosen.to(torch.int64)
    rows = _scaled(
        read_rows(weight.qdata, flat, weight.scheme.weight, weight.k, weight.layout), weight, flat, torch.float32
    )
    return rows if weight.sparse is None else _patched(rows, weight.sparse, flat)


def operand(weight: Weight) -> Tensor:
    """The int8 (n, k) that an integer product multiplies with: codes, code * group_scale, or codebook[code]."""
    if weight.layout is Layout.INT8_EXPANDED:
        return weight.qdata
    codes = read_codes(weight.qdata, weight.scheme.weight, *weight.shape, weight.layout)
    if weight.codebook is not None:
        return look_up(weight.codebook, codes)
    if weight.group_scale is None:
        return codes
    return codes * weight.group_scale.to(torch.int8).repeat_interleave(_group_size(weight.k, weight.group_scale), dim=1)


def row_scales(weight: Weight) -> Tensor:
    """(n,) float32 that a row's int32 sums are multiplied with."""
    scale = weight.tensors["scale"]
    if weight.codebook is None:
        return scale
    return scale.expand(weight.n) if scale.numel() == 1 else scale.repeat_interleave(weight.n // scale.numel())


def check_outliers(sparse: Outliers, k: int) -> None:
    """Looks at the values, on a CPU: torch's sparse product and its indexing would read or write elsewhere.

    Raises:
        QBertError: row pointers that do not ascend from 0 to the number of outliers, or a column outside of the row.
    """
    rowptr, col, _ = sparse
    if rowptr.device.type != "cpu":
        return
    inside = col.numel() == 0 or (int(col.min()) >= 0 and int(col.max()) < k)
    if int(rowptr[0]) != 0 or int(rowptr[-1]) != col.numel() or bool((rowptr.diff() < 0).any()) or not inside:
        raise QBertError(
            f"outliers are damaged: outlier_rowptr must ascend from 0 to {col.numel()}, and outlier_col lie in 0 ... {k - 1}"
        )


def outlier_positions(sparse: Outliers) -> tuple[Tensor, Tensor]:
    """Row and column (outliers,) int64 of each outlier."""
    counts = sparse.rowptr.diff().to(torch.int64)
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts, output_size=sparse.col.numel())
    return rows, sparse.col.to(torch.int64)


def dense_outliers(sparse: Outliers, n: int, k: int) -> Tensor:
    """Float32 (n, k) of the outliers' differences, zero elsewhere."""
    check_outliers(sparse, k)
    dense = torch.zeros(n, k, device=sparse.delta.device)
    dense[outlier_positions(sparse)] = sparse.delta
    return dense


def _scaled(codes: Tensor, weight: Weight, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes (m, k) of all rows, or of those chosen, as floats, without outliers."""
    return _CODES_TO_FLOAT[weight.scheme.weight.kind](codes, weight, chosen, dtype)


def _integers(codes: Tensor, weight: Weight, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    scale = weight.tensors["scale"] if chosen is None else weight.tensors["scale"][chosen]
    if scale.dim() == 1:
        return codes.to(dtype) * scale.to(dtype)[:, None]
    groups = codes.to(dtype).view(codes.shape[0], scale.shape[1], _group_size(weight.k, scale))
    return (groups * scale.to(dtype).unsqueeze(2)).view(codes.shape)


def _dictionary(codes: Tensor, weight: Weight, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    codebook = weight.tensors["codebook"]
    if chosen is not None and weight.matrices > 1:
        raise QBertError(f"a table has one dictionary; this one has {weight.matrices}")
    return look_up(codebook, codes).to(dtype)


# Kind of format -> codes (m, k) of rows `chosen` (all where None) as floats of a type.
_CODES_TO_FLOAT: dict[Kind, Callable[[Tensor, Weight, Tensor | None, torch.dtype], Tensor]] = {
    Kind.INTEGER: _integers,
    Kind.DICTIONARY: _dictionary,
}


def _patched(rows: Tensor, sparse: Outliers, chosen: Tensor) -> Tensor:
    """Looked-up rows (m, k) with their outliers' differences added."""
    check_outliers(sparse, rows.shape[1])
    starts = sparse.rowptr[chosen].to(torch.int64)
    counts = sparse.rowptr[chosen + 1].to(torch.int64) - starts
    token = torch.arange(chosen.numel(), device=rows.device).repeat_interleave(counts)
    within = torch.arange(token.numel(), device=rows.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    source = starts.repeat_interleave(counts) + within
    rows[token, sparse.col[source].to(torch.int64)] += sparse.delta[source]
    return rows


def _group_size(k: int, scale: Tensor) -> int:
    """Codes that share one of the scales (n, groups): an even number, for packed rows of k and k + 1 codes look alike."""
    size = k // max(1, scale.shape[1])
    if size * scale.shape[1] != k or size % 2:
        raise QBertError(f"k is {k}, which {scale.shape[1]} groups of an even size do not make")
    return size
