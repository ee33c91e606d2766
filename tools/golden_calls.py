"""How `golden_cases` reaches what it holds fast: the only file of `tools` that knows how operations are called today.

When operations are renamed or merged, or modules move, this file is rewritten and nothing else: a caller says a scheme, the
tokens, a `Weight` and what shall come out. Models need no adapter, they go through the public API.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qbert.dispatch import embedding_operation, linear_operation, select_layout
from qbert.formats import SCHEMES, Role, scheme_names
from qbert.layout import Layout
from qbert.nn.stack import stacked
from qbert.qtensor import QuantizedTensor
from qbert.quantizers import quantize
from qbert.target import Target, cpu_target

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LINEAR_SCHEMES = tuple(scheme_names(Role.LINEAR))
EMBEDDING_SCHEMES = tuple(scheme_names(Role.EMBEDDING))
FLOAT_TABLE = "float"
Weight = QuantizedTensor
Out = torch.dtype | float  # the type of a float result, or the static scale of an int8 one

_H100 = Target("cuda", sm=90, sm_count=132, shared_memory=232_448)
# Operation -> its weight's tensors, where their order is not the file format's.
_ORDER = {"w4a8_linear": ("qdata", "group_scale", "scale")}


# ---- weights --------------------------------------------------------------------------------------------------------


def group_size(scheme: str) -> int:
    """What a width must be a multiple of."""
    return SCHEMES[scheme].group_size or 1


def has_int8_activations(scheme: str) -> bool:
    """Whether a linear of that scheme takes codes and scales instead of floats."""
    return SCHEMES[scheme].activation is not None


def quantized(scheme: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of the file format."""
    return quantize(weight, SCHEMES[scheme]).tensors


def linear_weight(scheme: str, parts: Sequence[Tensor], plain: bool = False) -> Weight:
    """Matrices of one width, quantized each for itself and stacked, in the layout that runs here, or as in a file."""
    stack = [quantize(part, SCHEMES[scheme]) for part in parts]
    weight = stack[0] if len(stack) == 1 else stacked(stack)
    target = _H100 if INTERPRETED else cpu_target()
    return weight.to_layout(Layout.PLAIN if plain else select_layout(SCHEMES[scheme], Role.LINEAR, target))


# ---- operations -----------------------------------------------------------------------------------------------------


def call_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and a scale a row."""
    return _operation("quantize_per_token")(x)


def call_linear(
    scheme: str, tokens: tuple[Tensor, ...], weight: Weight, bias: Tensor | None, activation: str, out: Out
) -> Tensor:
    """`tokens`: (q, s) where activations are int8, else (x,), whose type is `out`."""
    name = linear_operation(SCHEMES[scheme])
    tensors = [weight.tensors[each] for each in _ORDER.get(name, tuple(weight.tensors))]
    end = (bias, activation, out) if has_int8_activations(scheme) else (bias, activation)
    return _operation(_requant(name, out))(*tokens, *tensors, *end, weight.layout.value)


def call_embedding(scheme: str, ids: Tensor, table: dict[str, Tensor], k: int, out: torch.dtype) -> Tensor:
    """Rows of a table as it lies in a file."""
    name = embedding_operation(SCHEMES[scheme])
    end = () if name == "w8_embedding" else (k, Layout.PLAIN.value)
    return _operation(name)(ids, *table.values(), out, *end)


def call_attention(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, heads: int, softmax_scale: float, out: Out
) -> Tensor:
    """Of packed sequences."""
    return _operation(_requant("attention_int8", out))(qkv, scales, cu_seqlens, heads, softmax_scale, out)


def call_add_norm(y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The norm of the sum, its codes and their scales."""
    return _operation("add_layer_norm_quantize")(y, residual, gamma, beta, eps)


def call_embed_norm(
    ids: tuple[Tensor, Tensor, Tensor], scheme: str, table: dict[str, Tensor], positions: Tensor, token_types: Tensor,
    gamma: Tensor, beta: Tensor, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`ids`: of words, positions, token types; `table`: one tensor of any name where `scheme` is `FLOAT_TABLE`."""
    words = list(table.values())
    tables = (words, scheme, Layout.PLAIN.value, positions, token_types)
    return _operation("embed_layer_norm_quantize")(*ids, *tables, gamma, beta, eps)


def call_linear_add_norm(
    tokens: tuple[Tensor, Tensor], weight: Weight, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of a w8a8 weight; in the interpreter there is no kernel for it."""
    tensors = weight.tensors.values()
    end = (bias, residual, gamma, beta, eps, weight.layout.value)
    return _operation("w8a8_linear_add_norm")(*tokens, *tensors, *end)


def _requant(name: str, out: Out) -> str:
    return f"{name}_requant" if isinstance(out, float) else name


def _operation(name: str) -> Callable[..., Any]:
    """What runs an operation on CPU tensors: the registered one, or Triton's launcher in its interpreter."""
    if not INTERPRETED:
        return getattr(torch.ops.qbert, name)
    from qbert.ops.triton import TRITON

    def launched(*arguments: Any) -> Any:
        result = TRITON[name](*arguments)
        if result is NotImplemented:
            raise ValueError(f"no Triton kernel takes this {name}")
        return result

    return launched
