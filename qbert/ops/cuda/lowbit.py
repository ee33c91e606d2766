"""Integer linears of packed weights in `Layout.FRAGMENTS_S8`: csrc/cuda/sm90/lowbit.h says what the arguments mean."""

from __future__ import annotations

from torch import Tensor

from qbert.ops import checks
from qbert.ops.abi import pointer
from qbert.ops.cuda import launch
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Linear
from qbert.target import Target
from qbert.weight import Layout

_REASON = "codes lie as wgmma's registers take them and become int8 there"


def obstacle(problem: Problem, target: Target) -> str | None:
    """None where the weight lies in fragments, which was chosen once for all its problems."""
    found = launch.fragments_obstacle(Layout.FRAGMENTS_S8, problem, target)
    return found or (None if problem.k else "k is 0; the CUDA kernels take 1 and more")


def linear(a: Linear, *, tile: str = "") -> Tensor:
    """`tile` is one of `extension().lowbit_tiles()`; by default what the extension chooses."""
    s, weight = a.s, a.weight
    assert s is not None
    require_operands("linear", a.x.device, s=s, qdata=weight.qdata, bias=a.bias)
    (t, k), n = a.x.shape, weight.n
    x, pitch = launch.aligned_rows(a.x)
    y = x.new_empty(t, n, dtype=checks.out_type(a.out))
    if y.numel() == 0:
        return y
    extension, multiprocessors = launch.extension(), launch.target_of(x.device).sm_count
    nbytes = extension.lowbit_columns_bytes(t, n, k, weight.outliers, multiprocessors, tile)
    columns = x.new_empty(nbytes) if nbytes else None
    extension.lowbit_linear(
        t=t, n=n, k=k, q=x.data_ptr(), q_pitch=pitch, s=s.data_ptr(), columns=pointer(columns), tile=tile,
        **weight.prepared(launch.packed), **launch.end(a, y), **launch.out_of(a),
    )  # fmt: skip
    return y


FAMILY = launch.Family(
    linear, obstacle, lambda problem, target: launch.asked(target) + _REASON, layout=Layout.FRAGMENTS_S8
)
