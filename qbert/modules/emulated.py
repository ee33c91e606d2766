"""Linears and embeddings in any block format, computed in float: what a study runs where there is no kernel.

The weight is held as a file holds it, packed at its true bits, and decoded once for the products. Activations are rounded token
by token. Gradients pass every rounding as if it were not there (straight-through, Bengio et al., 2013).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbert.errors import QBertError
from qbert.formats import BlockFormat, EmulatedScheme, Kind, native_scheme
from qbert.modules.base import QuantizedModule
from qbert.modules.embedding import QEmbedding
from qbert.modules.linear import QLinear, QTiedLinear, as_linear_input
from qbert.numerics import dequantize, quantize_blocks, round_activations, values_of
from qbert.numerics.blocks import activation_codes
from qbert.numerics.scales import as_float
from qbert.ops.table import KernelChoice
from qbert.weight import Layout, Weight
from qbert.weight.codec import decode
from qbert.weight.emulated import pack_blocks, unpack_blocks

MASTER = "master"
_EXACT = 2**24  # sums of integers below this are exact in float32


class _StraightThrough(torch.autograd.Function):
    """Rounds the last dimension of x (..., k); the gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: BlockFormat) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(torch.float32)
        return round_activations(tokens, fmt).view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rounded(x: Tensor, fmt: BlockFormat | None) -> Tensor:
    """x (..., k) of any float type in a format, its last dimension in blocks; itself where there is none or nothing in it."""
    return x if fmt is None or x.numel() == 0 else cast(Tensor, _StraightThrough.apply(x, fmt))


class EmulatedModule(QuantizedModule):
    """A quantized module whose weight is in a block format.

    Attributes:
        scheme: an `EmulatedScheme`.
        master: (n, k) float parameter while the model is trained, of which the codes follow; None otherwise. Never stored.
    """

    master: nn.Parameter | None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register_parameter(MASTER, None)

    @property
    def formats(self) -> EmulatedScheme:
        """The scheme, as what it is."""
        return cast(EmulatedScheme, self.scheme)

    @property
    def quantized(self) -> Weight:
        """The matrix as it is stored; of a trained module, as its parameter is now."""
        if self.master is not None:
            fmt = self.formats.weights
            blocks = quantize_blocks(self.master.detach().to(torch.float32), fmt)
            self._hold(Weight(self.scheme, self.shape, Layout.PLAIN, pack_blocks(blocks, fmt)))
        return super().quantized

    @property
    def kernel(self) -> KernelChoice:
        """``"emulated"``, and which scheme's kernels compute the same, if any do."""
        return KernelChoice("emulated", _reason(self.formats, self.shape))

    def float_weight(self) -> Tensor:
        """(n, k) float32 that the codes stand for, decoded once; with gradients for `master` where there is one."""
        if self.master is None:
            with torch.inference_mode(False):  # it is kept, and a later call may want a backward
                return self.quantized.prepared(decode)
        weight = self.master.to(torch.float32)
        fmt, current = self.formats.weights, weight.detach()
        return weight + (dequantize(quantize_blocks(current, fmt), fmt) - current)

    def train_from(self, weight: Tensor) -> None:
        """Makes the codes follow a float parameter that starts as `weight` (n, k).

        Raises:
            QBertError: a dictionary, which would be learned anew at every step.
        """
        if self.formats.weights.is_learned:
            raise QBertError(f"format {self.formats.weights.name} learns its values; allowed in training: any other")
        self.master = nn.Parameter(weight.detach().clone())

    def use_best_layout(self) -> None:
        """There is one layout; a skeleton's guard goes when its file has come."""
        if self.get_buffer("qdata").device.type != "meta":
            self._buffers.pop("weight", None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + MASTER, None)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Codes come from a file alone; a parameter in training starts anew from them."""
        trained, self.master = self.master, None
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if trained is not None:
            trained.data.copy_(decode(super().quantized))
            self.master = trained


class EmulatedLinear(EmulatedModule, QLinear):
    """`nn.Linear` in block formats: y = round(x) @ decode(W).T + bias for x (..., k).

    Where weights and activations are integers with a scale a row, sums are those of the integers, exactly (in training, in
    float32).
    """

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self, self.bias)


class EmulatedEmbedding(EmulatedModule, QEmbedding):
    """`nn.Embedding` with a table in a block format: rows (..., k) of integer ids (...)."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise QBertError(f"id {int(ids.min())} ... {int(ids.max())}; allowed: 0 ... {self.num_embeddings - 1}")
        return F.embedding(ids, self.float_weight()).to(self.output_like.dtype)


class EmulatedTiedLinear(QTiedLinear):
    """A linear that computes with an emulated module's weight."""

    @property
    def kernel(self) -> KernelChoice:
        """``"emulated"``."""
        return self.owner.kernel

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, cast(EmulatedModule, self.owner), self.bias)


def _linear(x: Tensor, held: EmulatedModule, bias: Tensor | None) -> Tensor:
    x = as_linear_input(x, held.shape[1])
    formats, training = held.formats, torch.is_grad_enabled() and (x.requires_grad or held.master is not None)
    if not training and x.numel() and _is_integer_product(formats):
        y = _integer_product(x.reshape(-1, held.shape[1]).to(torch.float32), held).view(*x.shape[:-1], held.shape[0])
        y = y if bias is None else y + bias.to(torch.float32)
    else:
        y = F.linear(
            rounded(x, formats.activations).to(torch.float32),
            held.float_weight(),
            None if bias is None else bias.to(torch.float32),
        )
    return y.to(x.dtype)


def _is_integer_product(formats: EmulatedScheme) -> bool:
    return all(fmt is not None and _is_integer_row(fmt) for fmt in (formats.weights, formats.activations))


def _is_integer_row(fmt: BlockFormat) -> bool:
    """Whether a row is integers times one float."""
    plain = fmt.element.kind is Kind.INTEGER and fmt.symmetric and not fmt.keeps_outliers
    return plain and fmt.block[1] == 0 and fmt.scale in ("float32", "bfloat16", "float16")


def integer_sums(codes: Tensor, weight: Tensor, largest: int) -> Tensor:
    """codes (t, k) @ weight (n, k).T of integers in float32, exact: in runs of k whose sums float32 holds.

    Args:
        largest: magnitude of a product.
    """
    run = max(1, _EXACT // largest)
    if codes.shape[1] <= run:
        return F.linear(codes, weight)
    parts = (F.linear(codes[:, i : i + run], weight[:, i : i + run]).double() for i in range(0, codes.shape[1], run))
    return cast(Tensor, sum(parts))


def _integer_product(tokens: Tensor, held: EmulatedModule) -> Tensor:
    """(t, n) float32."""
    weights, activations = held.formats.weights, held.formats.activations
    assert activations is not None
    codes, scales = activation_codes(tokens, activations)
    largest = activations.element.qmax * weights.element.qmax
    values, row_scales = held.quantized.prepared(_integers)
    units = 2.0 ** (activations.element.fraction_bits + weights.element.fraction_bits)
    sums = integer_sums(codes * 2.0**activations.element.fraction_bits, values, largest).to(torch.float32)
    return sums * (scales * row_scales / units)


def _integers(weight: Weight) -> tuple[Tensor, Tensor]:
    """Codes (n, k) float32 as integers, and the scales (1, n) or (1, 1)."""
    fmt = cast(EmulatedScheme, weight.scheme).weights
    blocks = unpack_blocks(weight.tensors, fmt, weight.shape)
    assert blocks.scales is not None
    return values_of(blocks.codes, fmt) * 2.0**fmt.element.fraction_bits, as_float(blocks.scales).view(1, -1)


def _reason(formats: EmulatedScheme, shape: tuple[int, int]) -> str:
    fmt, (_, k) = formats.weights, shape
    native = native_scheme(formats)
    said = (
        "computed in float" if native is None else f"computed in float; the kernels of scheme {native} compute the same"
    )
    columns = fmt.sides(*shape)[1]
    if fmt.scale != "none" and k % columns:
        said += f"; the last block of a row has {k % columns} of {columns} columns"
    if formats.activations is not None and formats.activations.scale_format.outer == "tensor":
        said += "; activations' tensor scale is their token's"
    return said
