"""When a compiled kernel runs: what the GPU, QBERT_KERNEL and the tables of tiles say. Pure, for machines that are not here."""

from __future__ import annotations

from qbert.ops.abi import Keeps
from qbert.ops.kernel import Problem
from qbert.target import Target
from qbert.tiles import prefers_compiled

# Compute capabilities: code for sm_90a runs on nothing newer either; row kernels need none of it (csrc/cuda/common/device.h).
COMPILED_SM, COMPILED_ROWS_SM = 90, 80
# The tables' name of the norms, which run compiled together or not at all.
NORMS = "add_norm"


def compiled_obstacle(operation: str, target: Target) -> str | None:
    """Why the compiled extension cannot compute an operation of its kernels on a target; None where it can."""
    if target.device != "cuda":
        return "the CUDA kernels are for tensors on a GPU"
    if operation == "add_norm":
        if target.sm < COMPILED_ROWS_SM:
            least = COMPILED_ROWS_SM / 10
            return f"the CUDA row kernels run from compute capability {least:.1f} on, this GPU has {target.sm / 10:.1f}"
    elif target.sm != COMPILED_SM:
        return f"the CUDA kernels are compiled for compute capability {COMPILED_SM / 10:.1f}, this GPU has {target.sm / 10:.1f}"
    return None if target.native else target.native_missing or "the CUDA kernels (qbert._cuda) are missing"


def missing_extension(target: Target) -> str | None:
    """Why a GPU that the compiled extension is for runs without it; None on all others, and where Triton is asked for."""
    if target.device != "cuda" or target.sm != COMPILED_SM or target.prefer == "triton":
        return None
    return compiled_obstacle("linear", target)


def preference_obstacle(key: str, target: Target) -> str | None:
    """Why Triton's kernels come first: QBERT_KERNEL, or the table of tiles, which has no row of road "cuda" for `key`."""
    if target.prefer:
        return None if target.prefer == "cuda" else f"QBERT_KERNEL={target.prefer}"
    return None if prefers_compiled(key, target) else "the table of tiles names Triton's kernels"


def prefers_extension(key: str, target: Target) -> bool:
    """Whether the extension can compute what the tables call `key`, and QBERT_KERNEL or they ask for it."""
    operation = key if key == NORMS else "linear"
    return compiled_obstacle(operation, target) is None and preference_obstacle(key, target) is None


def norms_obstacle(operation: str, problem: Problem, target: Target) -> str | None:
    """Of `add_norm` and `linear_add_norm`, whatever the sizes, or a token's norm would have other bits in another batch."""
    if problem.keeps is not Keeps.NORM:
        return "the CUDA kernels of norms do not keep the sum"
    return compiled_obstacle(operation, target) or preference_obstacle(NORMS, target)


def chosen_reason(target: Target) -> str:
    """Why the compiled kernel runs where Triton's reads the same tensors."""
    if target.prefer == "cuda":
        return "QBERT_KERNEL=cuda; Triton's kernel where the compiled one has no tile"
    return "the table of tiles says which, problem by problem"
