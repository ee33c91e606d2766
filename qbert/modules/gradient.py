"""The product that quantized linears compute, and its way back: gradients reach adapters, inputs, norms and biases.

The weight is not trained. Rounding activations counts as the identity, the straight-through estimator (Bengio et al., 2013), so
the gradients are those of x @ W.T + bias with W what its codes stand for; nothing of x is kept for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbert import ops
from qbert.formats import SCHEMES, Role, get_scheme
from qbert.ops.checks import parse_weight
from qbert.ops.operations import Linear, QuantizeRows
from qbert.weight import Weight
from qbert.weight.codec import decode
from qbert.weight.tensor import tensor_names


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x (t, k) @ weight.T + bias, (t, n) of x's type; differentiable in x and bias.

    Raises:
        QBertError: a type, shape or device that the operators do not take.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _StraightThrough.apply(x, bias, weight)
        return y
    return _compute(x, bias, weight)


def _compute(x: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    tokens, scales = (x, None) if weight.scheme.activation is None else ops.call(QuantizeRows(x))
    y: Tensor = ops.call(Linear(tokens, scales, weight, bias, ops.Activation.NONE, False, x.dtype))
    return y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
        return _compute(x, bias, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Weight], output: Tensor) -> None:
        _, bias, ctx.weight = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        to_x = grad @ _matrix(ctx.weight).to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


def _matrix(weight: Weight) -> Tensor:
    """What a weight's codes stand for, (n, k) float32: an operator, because compilers cannot trace what looks at values."""
    tensors = [weight.tensors[name] for name in tensor_names(weight.scheme)]
    found: Tensor = _decoded(tensors, weight.scheme.name, weight.layout.value, *weight.shape)
    return found


@torch.library.custom_op("qbert::decode", mutates_args=())
def _decoded(tensors: list[Tensor], scheme: str, layout: str, n: int, k: int) -> Tensor:
    known = SCHEMES.get(scheme) or get_scheme(scheme, Role.LINEAR)
    return decode(parse_weight(tensors, known, layout, k))


@_decoded.register_fake
def _(tensors: list[Tensor], scheme: str, layout: str, n: int, k: int) -> Tensor:
    return torch.empty(n, k, dtype=torch.float32, device=tensors[0].device)
