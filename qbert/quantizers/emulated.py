"""Any block format: `qbert.numerics` rounds, and dictionaries are learned as GOBO does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import BlockFormat, EmulatedScheme, Keep, Scheme
from qbert.numerics import Blocks, quantize_blocks
from qbert.numerics.blocks import outlier_mask
from qbert.quantizers.gobo import is_outlier, learn_dictionary, nearest_centroids, without_duplicates
from qbert.weight.emulated import pack_blocks


def quantize_emulated(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """(n, k) float32 to the tensors of `qbert.weight.emulated.block_specs`.

    Raises:
        QBertError: scales that their type cannot hold.
    """
    assert isinstance(scheme, EmulatedScheme)
    fmt = scheme.weights
    blocks = _learned(weight, fmt) if fmt.is_learned else quantize_blocks(weight, fmt)
    tensors = pack_blocks(blocks, fmt)
    for name in ("scale", "outer_scale"):
        if name in tensors and tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all()):
            largest = float(weight.abs().max())
            raise QBertError(f"format {fmt.name}: weights to {largest:.4g} need scales that {fmt.scale} does not have")
    return tensors


def _learned(weight: Tensor, fmt: BlockFormat) -> Blocks:
    """Codes, centroids and outliers; the dictionary is learned from what is no outlier."""
    values = weight.cpu().contiguous()
    if fmt.outlier_policy[0] is Keep.GOBO:
        learned = learn_dictionary(values.numpy(), fmt.element.bits)
        mask = is_outlier(values, learned)
    else:
        mask = (
            outlier_mask(values, fmt, per_row=False)
            if fmt.keeps_outliers
            else torch.zeros_like(values, dtype=torch.bool)
        )
        learned = learn_dictionary(values[~mask].numpy(), fmt.element.bits, threshold=-math.inf)
    centroids = without_duplicates(torch.from_numpy(learned.centroids).to(torch.float32))
    codes = nearest_centroids(values, centroids).to(torch.uint8)
    outliers, kept = (mask.to(weight.device), values[mask].to(weight.device)) if fmt.keeps_outliers else (None, None)
    return Blocks(codes.to(weight.device), None, None, outliers, kept, centroids.to(weight.device))
