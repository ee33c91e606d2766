"""The rules that a quantized tensor from outside must keep before any kernel reads it.

safetensors checks that a file is well formed, not what it means: a NaN scale, a row pointer past the end or a column outside
the matrix are legal there, and would be an out-of-bounds read here. Every rule below is one named error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.errors import CheckpointError
from qbert.formats import INT8, W4A8_GROUP_SCALE_MAX, BlockFormat, EmulatedScheme, Kind, Scheme, usable_codes
from qbert.weight import zeros
from qbert.weight.layout import Layout, unpack_bits, unpack_codes
from qbert.weight.specs import TensorSpec
from qbert.weight.tensor import plain_specs, stored_specs


def check_spec(name: str, spec: TensorSpec, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises CheckpointError unless a tensor has the type and shape that it must have."""
    if dtype != spec.dtype:
        raise CheckpointError(name, f"data type must be {_short(spec.dtype)}", _short(dtype))
    if tuple(shape) != tuple(spec.shape):
        raise CheckpointError(name, f"shape must be {list(spec.shape)}", list(shape))


def check_plain_tensors(scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Raises CheckpointError unless `tensors` are a valid PLAIN weight of that scheme and shape.

    Args:
        scheme: of the weight.
        shape: (n, k) of the weight.
        tensors: by the names of `plain_specs`; the number of outliers is that of ``outlier_col``.
        prefix: put before each tensor's name in errors, ``"encoder.layer.0.output.dense."`` for example.
    """
    outliers = tensors["outlier_col"].numel() if "outlier_col" in tensors else 0
    specs = plain_specs(scheme, shape, outliers)
    for name in specs.keys() - tensors.keys():
        raise CheckpointError(prefix + name, "tensor must be there", "nothing")
    for name in tensors.keys() - specs.keys():
        raise CheckpointError(prefix + name, f"scheme {scheme.name} has no such tensor", name)
    for name, spec in specs.items():
        check_spec(prefix + name, spec, tensors[name].dtype, tuple(tensors[name].shape))
    if isinstance(scheme, EmulatedScheme):
        _check_blocks(prefix, tensors, scheme.weights, shape)
        return
    if "scale" in tensors:
        check_positive(prefix + "scale", tensors["scale"])
    if scheme.has_dictionary:
        _check_codebook(prefix, tensors["codebook"])
        _check_dictionary_codes(prefix, tensors, scheme, shape[1])
        _check_outliers(prefix, tensors, shape[1])
    else:
        _check_integer_codes(prefix, tensors, scheme, shape[1])


def check_stored_tensors(
    scheme: Scheme,
    shape: tuple[int, int],
    tensors: dict[str, Tensor],
    layout: Layout,
    nonzeros: int | None,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Raises CheckpointError unless `tensors` are a valid weight as files hold it in that layout. Gives the PLAIN ones.

    Args:
        nonzeros: how many codes are stored, of `Layout.BITMAP`; None where only the bitmap says it.
    """
    if layout is not Layout.PLAIN:
        outliers = tensors["outlier_col"].numel() if "outlier_col" in tensors else 0
        specs = stored_specs(scheme, shape, outliers, layout, nonzeros or 0)
        for name in specs.keys() ^ tensors.keys():
            said = "tensor must be there" if name in specs else f"no such tensor belongs to {layout.value}"
            raise CheckpointError(prefix + name, said, "nothing" if name in specs else name)
        if nonzeros is None and layout is Layout.BITMAP:
            specs["qdata"] = TensorSpec(specs["qdata"].dtype, (tensors["qdata"].numel(),))
        for name, spec in specs.items():
            check_spec(prefix + name, spec, tensors[name].dtype, tuple(tensors[name].shape))
        if scheme.has_dictionary:
            _check_codebook(prefix, tensors["codebook"])
        zeros.check(tensors, scheme, shape, layout, prefix)
        tensors = zeros.unpack(tensors, scheme, shape, layout)
    check_plain_tensors(scheme, shape, tensors, prefix)
    return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for NaN or infinity."""
    _require(name, "every value must be finite", tensor, tensor.isfinite())


def check_positive(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError unless every value is finite and above zero."""
    _require(name, "every value must be finite and positive", tensor, tensor.isfinite() & (tensor > 0))


def _check_integer_codes(prefix: str, tensors: dict[str, Tensor], scheme: Scheme, k: int) -> None:
    fmt, qdata = scheme.weight, tensors["qdata"]
    if fmt.kind is Kind.INTEGER:  # of others every code is a value
        codes = unpack_codes(qdata, fmt, k)
        allowed = f"codes must be {-fmt.qmax} ... {fmt.qmax}"
        _require(prefix + "qdata", allowed, codes, codes >= -fmt.qmax)
    _check_spare_bits(prefix + "qdata", qdata, fmt.bits, k)
    if "group_scale" in tensors:
        scales = tensors["group_scale"]
        rule = f"every value must be 1 ... {W4A8_GROUP_SCALE_MAX} (so that code * scale fits int8)"
        _require(prefix + "group_scale", rule, scales, (scales >= 1) & (scales <= W4A8_GROUP_SCALE_MAX))


def _check_codebook(prefix: str, codebook: Tensor) -> None:
    if codebook.is_floating_point():
        check_finite(prefix + "codebook", codebook)
    else:
        _require(prefix + "codebook", f"values must be {-INT8.qmax} ... {INT8.qmax}", codebook, codebook >= -INT8.qmax)
    ascending = torch.cat((torch.ones(1, dtype=torch.bool), codebook[1:] >= codebook[:-1]))
    _require(prefix + "codebook", "values must ascend", codebook, ascending)


def _check_dictionary_codes(prefix: str, tensors: dict[str, Tensor], scheme: Scheme, k: int) -> None:
    """Codes are in range by their width; equal int8 centroids must be named by the lowest of their codes."""
    _check_spare_bits(prefix + "qdata", tensors["qdata"], scheme.weight_bits, k)
    codebook = tensors["codebook"]
    if scheme.activation is None or bool((codebook[1:] > codebook[:-1]).all()):
        return
    lowest = torch.searchsorted(codebook.to(torch.int32), codebook.to(torch.int32))
    codes = unpack_codes(tensors["qdata"], scheme.weight, k).to(torch.int64)
    _require(prefix + "qdata", "a code must be the lowest of those with its centroid", codes, lowest[codes] == codes)


def _check_blocks(prefix: str, tensors: dict[str, Tensor], fmt: BlockFormat, shape: tuple[int, int]) -> None:
    """Codes that quantizing gives, scales that are finite and positive, zero points and outliers in range."""
    n, k = shape
    blocks, bits = fmt.grid(n, k)[1], fmt.element.bits
    _check_spare_bits(prefix + "qdata", tensors["qdata"], bits, k)
    if fmt.is_learned:
        _check_codebook(prefix, tensors["codebook"])
    else:
        allowed = torch.zeros(256, dtype=torch.bool)
        allowed[usable_codes(fmt)] = True
        codes = unpack_bits(tensors["qdata"], bits, k)
        _require(prefix + "qdata", f"codes must be those of {fmt.element.name}", codes, allowed[codes.to(torch.int64)])
    if "outer_scale" in tensors:
        check_positive(prefix + "outer_scale", tensors["outer_scale"])
    if "scale" in tensors:
        _check_block_scales(prefix + "scale", tensors["scale"], fmt, blocks)
    if "zero" in tensors:  # every value of its bits is one
        _check_spare_bits(prefix + "zero", tensors["zero"], bits, blocks)
    if fmt.keeps_outliers:
        _check_outliers(prefix, tensors, k, "outlier_value")


def _check_block_scales(name: str, scale: Tensor, fmt: BlockFormat, blocks: int) -> None:
    if fmt.scale_format.is_integer:
        _check_spare_bits(name, scale, fmt.scale_format.bits, blocks)
        integers = unpack_bits(scale, fmt.scale_format.bits, blocks)
        _require(name, "every value must be at least 1", integers, integers >= 1)
    elif fmt.scale == "e8m0":
        _require(name, "codes of E8M0 must be 0 ... 254", scale, scale < 255)
    elif fmt.scale == "e4m3":
        _require(name, "codes of E4M3 must be 1 ... 126, positive and finite", scale, (scale >= 1) & (scale <= 126))
    else:
        check_positive(name, scale)


def _check_spare_bits(name: str, packed: Tensor, bits: int, k: int) -> None:
    used = k * bits % 8
    if bits != 8 and used:
        last = packed[:, -1]
        _require(name, f"the {8 - used} spare bits of a row must be 0", last, (last.to(torch.int32) >> used) == 0)


def _check_outliers(prefix: str, tensors: dict[str, Tensor], k: int, values: str = "outlier_delta") -> None:
    rowptr, columns, delta = tensors["outlier_rowptr"], tensors["outlier_col"], tensors[values]
    if delta.numel() != columns.numel():  # check_spec has seen to it; kept beside the indexing that relies on it
        raise CheckpointError(prefix + values, f"must have {columns.numel()} values", delta.numel())
    counts = rowptr.to(torch.int64).diff()
    if int(rowptr[0]) != 0:
        raise CheckpointError(prefix + "outlier_rowptr", "must start at 0", int(rowptr[0]))
    _require(prefix + "outlier_rowptr", "must not decrease", rowptr[1:], counts >= 0)
    if int(rowptr[-1]) != columns.numel():
        raise CheckpointError(prefix + "outlier_rowptr", f"must end at {columns.numel()}", int(rowptr[-1]))
    _require(prefix + "outlier_col", f"columns must be 0 ... {k - 1}", columns, (columns >= 0) & (columns < k))
    rows = torch.arange(counts.numel()).repeat_interleave(counts)
    ascending = (columns[1:] > columns[:-1]) | (rows[1:] != rows[:-1])
    _require(prefix + "outlier_col", "columns must ascend within a row", columns[1:], ascending)
    check_finite(prefix + values, delta)


def _require(name: str, rule: str, values: Tensor, holds: Tensor) -> None:
    """Raises CheckpointError with the first value for which `rule` does not hold."""
    if not bool(holds.all()):
        first = int((~holds).flatten().nonzero()[0])
        raise CheckpointError(name, rule, f"{values.flatten()[first].item()} at position {first}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
