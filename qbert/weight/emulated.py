"""Weights in block formats as files hold them: codes, scales and zero points packed at their true bits, and outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.formats import BlockFormat
from qbert.numerics import Blocks
from qbert.numerics.scales import Scales
from qbert.weight.layout.bits import pack_bits, packed_width, unpack_bits
from qbert.weight.specs import TensorSpec, column_dtype

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def block_specs(fmt: BlockFormat, shape: tuple[int, int], outliers: int = 0) -> dict[str, TensorSpec]:
    """The tensors of an (n, k) matrix in a block format, with (rows, blocks) = `fmt.grid(n, k)`.

    Returns:
        name -> type and shape:
        qdata           the bit stream of the codes, uint8 (n, ceil(k * bits / 8))
        scale           (rows, blocks): float32, bfloat16, float16; codes of E8M0 or E4M3 as uint8; for integers the bit stream
        outer_scale     (rows,) float32, or (1,) of the matrix, over scales that are E4M3 or integers
        zero            the bit stream of the zero points, uint8 (rows, ceil(blocks * bits / 8))
        codebook        (2**bits,) float32 ascending, of dictionaries
        outlier_rowptr  (n + 1,) int32, outlier_col (outliers,) int16 or int32, outlier_value (outliers,) float32:
                        compressed sparse rows of the weights themselves, which take the codes' place
    """
    n, k = shape
    rows, blocks = fmt.grid(n, k)
    scale, bits = fmt.scale_format, fmt.element.bits
    specs = {"qdata": TensorSpec(torch.uint8, (n, packed_width(k, bits)))}
    if scale.name != "none":
        width = packed_width(blocks, scale.bits) if scale.is_integer else blocks
        specs["scale"] = TensorSpec(_FLOATS.get(scale.name, torch.uint8), (rows, width))
    if scale.outer is not None:
        specs["outer_scale"] = TensorSpec(torch.float32, (rows if scale.outer == "row" else 1,))
    if not fmt.symmetric:
        specs["zero"] = TensorSpec(torch.uint8, (rows, packed_width(blocks, bits)))
    if fmt.is_learned:
        specs["codebook"] = TensorSpec(torch.float32, (fmt.element.codes,))
    if fmt.keeps_outliers:
        specs["outlier_rowptr"] = TensorSpec(torch.int32, (n + 1,))
        specs["outlier_col"] = TensorSpec(column_dtype(k), (outliers,))
        specs["outlier_value"] = TensorSpec(torch.float32, (outliers,))
    return specs


def pack_blocks(blocks: Blocks, fmt: BlockFormat) -> dict[str, Tensor]:
    """A quantized matrix as the tensors of `block_specs`."""
    tensors = {"qdata": pack_bits(blocks.codes, fmt.element.bits)}
    if blocks.scales is not None:
        stored, outer = blocks.scales
        if fmt.scale_format.is_integer:
            stored = pack_bits(stored, fmt.scale_format.bits)
        tensors["scale"] = stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored.contiguous()
        if outer is not None:
            tensors["outer_scale"] = outer.flatten()
    if blocks.zero is not None:
        tensors["zero"] = pack_bits(blocks.zero, fmt.element.bits)
    if blocks.codebook is not None:
        tensors["codebook"] = blocks.codebook
    if blocks.outliers is not None and blocks.kept is not None:
        rowptr = torch.zeros(blocks.codes.shape[0] + 1, dtype=torch.int32, device=blocks.codes.device)
        rowptr[1:] = blocks.outliers.sum(dim=1).cumsum(0)
        columns = blocks.outliers.nonzero()[:, 1].to(column_dtype(blocks.codes.shape[1]))
        tensors |= {"outlier_rowptr": rowptr, "outlier_col": columns, "outlier_value": blocks.kept}
    return tensors


def unpack_blocks(tensors: dict[str, Tensor], fmt: BlockFormat, shape: tuple[int, int]) -> Blocks:
    """Inverse of `pack_blocks`."""
    n, k = shape
    across, bits = fmt.grid(n, k)[1], fmt.element.bits
    zero = unpack_bits(tensors["zero"], bits, across) if "zero" in tensors else None
    outliers = None
    if "outlier_rowptr" in tensors:
        counts = tensors["outlier_rowptr"].diff().to(torch.int64)
        rows = torch.arange(n, device=counts.device).repeat_interleave(counts)
        outliers = torch.zeros(n, k, dtype=torch.bool, device=counts.device)
        outliers[rows, tensors["outlier_col"].to(torch.int64)] = True
    codes = unpack_bits(tensors["qdata"], bits, k)
    return Blocks(
        codes, _scales(tensors, fmt, across), zero, outliers, tensors.get("outlier_value"), tensors.get("codebook")
    )


def _scales(tensors: dict[str, Tensor], fmt: BlockFormat, across: int) -> Scales | None:
    if "scale" not in tensors:
        return None
    stored = tensors["scale"]
    if fmt.scale_format.is_integer:
        stored = unpack_bits(stored, fmt.scale_format.bits, across)
    elif fmt.scale == "e4m3":
        stored = stored.view(torch.float8_e4m3fn)
    outer = tensors.get("outer_scale")
    return Scales(stored, None if outer is None else outer[:, None])
