"""What Python and the compiled extensions (csrc/) say to each other: enums with the same numbers, addresses, dense tensors.

An extension exports the enums it was compiled with; `require_same_enums` refuses one that counts otherwise, as a build of
another version would.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from qbert.errors import QBertError


class Activation(enum.IntEnum):
    """What is applied to a linear's result."""

    NONE = 0
    GELU = 1  # the exact one, by the error function
    GELU_TANH = 2  # x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))): Hendrycks and Gimpel, 2016
    RELU = 3
    SILU = 4  # x * sigmoid(x)

    @classmethod
    def named(cls, name: str) -> Activation:
        """The activation of that name in an operator's arguments, or in a transformers config.

        Raises:
            QBertError: there is none.
        """
        found = _ACTIVATIONS.get(name)
        if found is None:
            raise QBertError(f"unknown activation {name!r}; allowed: {', '.join(_ACTIVATIONS)}")
        return found

    @property
    def text(self) -> str:
        """Its name in an operator's arguments."""
        return self.name.lower()


class Keeps(enum.IntEnum):
    """What the float result of an addition and its norm is: the norm, or the sum that it is of."""

    NORM = 0
    SUM = 1

    @classmethod
    def named(cls, name: str) -> Keeps:
        """The member of that name in an operator's arguments.

        Raises:
            QBertError: there is none.
        """
        found = _KEEPS.get(name)
        if found is None:
            raise QBertError(f"keeps is {name!r}; allowed: {', '.join(_KEEPS)}")
        return found

    @property
    def text(self) -> str:
        """Its name in an operator's arguments."""
        return self.name.lower()


class FloatType(enum.IntEnum):
    """A float type in memory."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


class WeightFormat(enum.IntEnum):
    """How a weight lies in memory, as the kernels of csrc/cpu tell them apart (panels: `qbert.weight.layout.panels`)."""

    INT8_PANELS = 0
    INT8_ROWS = 1
    INT4_PANELS = 2
    DICT4_PANELS = 3
    DICT3_PANELS = 4
    FLOAT_ROWS = 5
    INT4_ROWS = 6
    DICT4_ROWS = 7
    DICT3_ROWS = 8


_ACTIVATIONS = {each.text: each for each in Activation} | {
    # transformers' other names of the same functions
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "swish": Activation.SILU,
}
_KEEPS = {each.text: each for each in Keeps}
ENUMS = (Activation, Keeps, FloatType, WeightFormat)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_TYPES: dict[torch.dtype, FloatType] = dict(zip(FLOAT_DTYPES, FloatType, strict=True))
INT8_OUT = -1  # in place of a `FloatType`: an int8 result with a static scale


def require_same_enums(extension: Any) -> None:
    """
    Raises:
        ImportError: the extension was compiled with other numbers.
    """
    exported = getattr(extension, "ENUMS", None)
    if exported is None:
        raise ImportError(f"{extension.__name__} was compiled by another version: build it again")
    for each in ENUMS:
        known = {member.name: member.value for member in each}
        compiled = exported.get(each.__name__)
        if compiled != known:
            raise ImportError(
                f"{extension.__name__} was compiled with {each.__name__} {compiled}, this version has {known}: build it again"
            )


def out_type(out: torch.dtype | float) -> int:
    """Number of a result's type, `INT8_OUT` where `out` is a static scale."""
    return FLOAT_TYPES[out] if isinstance(out, torch.dtype) else INT8_OUT


def inverse_scale(out: torch.dtype | float) -> float:
    """One over the static scale of an int8 result; 1 where the result is float."""
    return 1.0 if isinstance(out, torch.dtype) else 1.0 / out


def pointer(tensor: Tensor | None) -> int:
    """The tensor's address; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor itself where it is contiguous and of that type, as it nearly always is."""
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()
