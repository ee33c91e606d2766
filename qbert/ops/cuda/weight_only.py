"""Weight-only linears of `Layout.FRAGMENTS_F16`: csrc/cuda/sm90/weight_only.h says what the arguments mean.

Two roads: few tokens of 16 bits multiply the packed weight itself, which is read once for all of them; what is left multiplies
an expanded copy of it in torch, whose own settings then say how float32 (TF32) and float16 are summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.ops.abi import FLOAT_TYPES
from qbert.ops.cuda import launch
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Linear
from qbert.ops.reference import activated
from qbert.target import Target
from qbert.weight import Layout

FEW_TOKENS = 64  # that share a reading of the weight
_REASON = "codes lie as wgmma's registers take them: decoded there for 64 tokens, expanded for more"


def obstacle(problem: Problem, target: Target) -> str | None:
    """None where the weight lies in fragments, which was chosen once for all its problems."""
    return launch.fragments_obstacle(Layout.FRAGMENTS_F16, problem, target)


def linear(a: Linear, *, tile: str = "") -> Tensor:
    """`tile` is a plan of the extension's for few tokens; by default what it chooses."""
    weight, (t, k) = a.weight, a.x.shape
    require_operands("linear", a.x.device, qdata=weight.qdata, bias=a.bias)
    if not (t <= FEW_TOKENS and k and a.x.dtype != torch.float32):
        return _expanded(a)
    (x, pitch), y = launch.aligned_rows(a.x), a.x.new_empty(t, weight.n)
    if y.numel():
        launch.extension().weight_only_linear(
            t=t, n=weight.n, k=k, x=x.data_ptr(), x_pitch=pitch, x_type=FLOAT_TYPES[x.dtype], tile=tile,
            **weight.prepared(launch.packed), **launch.end(a, y),
        )  # fmt: skip
    return y


def _expanded(a: Linear) -> Tensor:
    """torch's product with the weight in x's type."""
    x, weight, bias = a.x, a.weight, a.bias
    dense = x.new_empty(weight.n, weight.k)
    if x.shape[0] and dense.numel():
        launch.extension().expand_weight(
            n=weight.n, k=weight.k, out=dense.data_ptr(), out_type=FLOAT_TYPES[x.dtype],
            stream=launch.stream_of(x.device), **weight.prepared(launch.packed),
        )  # fmt: skip
    y = torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    return activated(y, a.activation, gated=False)


FAMILY = launch.Family(
    linear, obstacle, lambda problem, target: launch.asked(target) + _REASON, layout=Layout.FRAGMENTS_F16
)
