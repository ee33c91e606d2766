"""One entry for every quantizer: checks the weight, then calls the scheme's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import EmulatedScheme, Kind, PerGroup, Scheme
from qbert.ops import FLOAT_DTYPES, MAX_K
from qbert.quantizers.absmax import quantize_absmax
from qbert.quantizers.emulated import quantize_emulated
from qbert.quantizers.gobo import quantize_gobo
from qbert.quantizers.portions import in_portions
from qbert.weight.layout import Layout
from qbert.weight.tensor import Weight, plain_specs

# Format kind of a scheme's weight -> its quantizer: (n, k) float32 on any device -> PLAIN tensors by name.
_QUANTIZERS: dict[Kind, Callable[[Tensor, Scheme], dict[str, Tensor]]] = {
    Kind.INTEGER: quantize_absmax,
    Kind.DICTIONARY: quantize_gobo,
}


def quantize(weight: Tensor, scheme: Scheme) -> Weight:
    """Quantizes one matrix.

    Args:
        weight: (n, k) float32, bfloat16 or float16; left as it is.
        scheme: how.

    Returns:
        The quantized matrix in the PLAIN layout, on the weight's device.

    Raises:
        QBertError: a weight that is not a non-empty finite float matrix, or whose k the scheme's groups do not divide.
    """
    check_weight(weight, scheme)
    quantizer = quantize_emulated if isinstance(scheme, EmulatedScheme) else _QUANTIZERS[scheme.weight.kind]
    tensors = quantizer(weight.detach().to(torch.float32), scheme)
    n, k = weight.shape
    quantized = Weight(scheme, (n, k), Layout.PLAIN, tensors)
    specs = plain_specs(scheme, (n, k), quantized.outliers)
    for name, spec in specs.items():  # the file format is said once; a quantizer that strays from it is a bug here
        found = tensors[name]
        assert (found.dtype, tuple(found.shape)) == (spec.dtype, spec.shape), (name, found.dtype, found.shape, spec)
    return Weight(scheme, (n, k), Layout.PLAIN, {name: tensors[name] for name in specs})


def check_weight(weight: Tensor, scheme: Scheme) -> None:
    """Raises QBertError for a weight that `scheme` cannot take."""
    if weight.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise QBertError(f"weight is {str(weight.dtype).removeprefix('torch.')}; allowed: {allowed}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise QBertError(f"weight has shape {tuple(weight.shape)}; allowed: (n, k) with n, k >= 1")
    k = weight.shape[1]
    if isinstance(scheme.granularity, PerGroup) and k % scheme.granularity.size:
        raise QBertError(f"k is {k}, which groups of {scheme.granularity.size} do not divide (scheme {scheme.name})")
    if scheme.activation is not None and k > MAX_K:
        raise QBertError(f"k is {k}; int8 activations allow at most {MAX_K}, or an int32 sum could overflow")
    bad = sum(int((~rows.isfinite()).sum()) for rows in in_portions(weight.detach()))
    if bad:
        raise QBertError(f"weight has {bad} NaN or infinite values; allowed: finite values only")
