"""QLinear, and a linear whose weight is tied to another module's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qbert import ops
from qbert.errors import QBertError
from qbert.formats import Role, tied_linear_scheme
from qbert.modules.base import DecodedWeight, QuantizedModule, kernel_of, weight_of
from qbert.modules.gradient import product
from qbert.ops.table import KernelChoice
from qbert.weight import Weight


class QLinear(QuantizedModule):
    """`nn.Linear` with a quantized weight: y = x @ W.T + bias for x (..., k) float32, bfloat16 or float16. The result is of the
    same type; in autocast, of its type. Gradients pass to x and bias; the weight is not trained.

    Args:
        weight: (n, k), of a linear scheme.
        bias: (n,) float parameter or None; kept as it is.
        dtype: of the float weight that this stands for; follows casts of the model.
    """

    role = Role.LINEAR
    operation = "linear"
    bias: nn.Parameter | None

    def __init__(self, weight: Weight, bias: nn.Parameter | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight, dtype)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, scheme={self.scheme.name}, layout={self.layout.value}"


class QTiedLinear(nn.Module):
    """A linear that computes with another module's quantized weight: y = x @ W.T + bias. Holds no weight itself.

    Args:
        owner: the embedding or linear. Not a submodule: it is saved, moved and counted once, where it stands.
        owner_name: its qualified name in the model, for `explain` and the checkpoint.
        bias: (rows,) float parameter or None.

    Attributes:
        weight: the owner's (see `DecodedWeight`).
    """

    role = Role.LINEAR
    operation = "linear"
    weight = DecodedWeight()
    bias: nn.Parameter | None

    def __init__(self, owner: QuantizedModule, owner_name: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, nn.Module does not register it; deepcopy still follows it
        self.owner_name = owner_name
        self.scheme = tied_linear_scheme(owner.scheme) if owner.role is Role.EMBEDDING else owner.scheme
        self.shape = owner.shape
        self.out_features, self.in_features = owner.shape
        self.register_parameter("bias", bias)

    @property
    def owner(self) -> QuantizedModule:
        """The module that holds the weight."""
        return self._owner[0]

    @property
    def quantized(self) -> Weight:
        """The owner's matrix as it lies in memory now."""
        return weight_of(self, self.scheme, self.owner)

    @property
    def output_like(self) -> Tensor:
        """The owner's."""
        return self.owner.output_like

    @property
    def kernel(self) -> KernelChoice:
        """What runs the operator on the owner's device, and why."""
        return kernel_of("linear", self.owner, self.scheme, self.output_like.dtype)

    def weight_nbytes(self) -> int:
        """0: the owner counts the bytes."""
        return 0

    def refuse_weight(self, value: object) -> None:
        """
        Raises:
            QBertError: the weight is its owner's, which is quantized.
        """
        self.owner.refuse_weight(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.refuse_weight(value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            self.refuse_weight(param)
        else:
            super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme.name}, tied to {self.owner_name}"


def _linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    return product(as_linear_input(x, k).reshape(-1, k), weight, bias).view(*x.shape[:-1], n)


def as_linear_input(x: Tensor, k: int) -> Tensor:
    """`x` (..., k) as a linear takes it.

    Raises:
        QBertError: another shape, or no float.
    """
    x = _autocast(x)
    if x.dtype not in ops.FLOAT_DTYPES or x.shape[-1:] != (k,):
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in ops.FLOAT_DTYPES)
        raise QBertError(f"input is {x.dtype} of shape {tuple(x.shape)}; allowed: {allowed} of shape (..., {k})")
    return x


def _autocast(x: Tensor) -> Tensor:
    """`x` as `nn.Linear` takes it: of autocast's type where that is on, and so is what comes out."""
    device = x.device.type
    if device == "meta" or x.dtype not in ops.FLOAT_DTYPES or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
