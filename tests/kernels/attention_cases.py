"""What `test_attention_kernel` runs, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from launchers import launch

from qbert.ops.operations import Attention
from qbert.ops.triton.arguments import AttentionMeta, Heads
from qbert.testing import assert_matches_reference, random_problem, to_device


def matches_reference(heads: int, head_dim: int, lengths: list[int], *, device: str = "cpu", **options: Any) -> None:
    """Random codes in sequences of these lengths."""
    a = problem(heads, head_dim, lengths, **options)
    assert_matches_reference(a, launch(to_device(a, device)))


def problem(heads: int, head_dim: int, lengths: list[int], *, dtype: str = "float32", **options: Any) -> Attention:
    """`random_problem` of sequences of these lengths."""
    a = random_problem("attention", sum(lengths), heads, head_dim, dtype=getattr(torch, dtype), **options)
    return a._replace(cu_seqlens=bounds(lengths))


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def sums_are_exact(half: int, head_dim: int = 32, device: str = "cpu") -> None:
    """Values of 127 for `half` keys and -127 for as many, but the last -126: float32 sums would not find their way back to 255.

    All queries are 0, so that every probability has the code 255 and the sum of codes times values is 255 * 1.
    """
    qkv = torch.zeros(2 * half, 3, head_dim, dtype=torch.int8)
    qkv[:half, 2], qkv[half:, 2], qkv[-1, 2] = 127, -127, -126
    a = Attention(qkv.view(2 * half, -1), torch.ones(3), bounds([2 * half]), 1, 1.0, None, None, None, torch.float32)
    out = launch(to_device(a, device)).cpu()
    torch.testing.assert_close(out, torch.full_like(out, 1 / (2 * half)), rtol=1e-6, atol=0)


def the_batch_does_not_show(
    length: int, others: list[int], per_token: bool, heads: int = 1, head_dim: int = 32, device: str = "cpu"
) -> None:
    """A sequence has the same bits alone, and among others that change the average length and so the tile."""
    a = to_device(problem(heads, head_dim, [*others, length], per_token=per_token), device)
    scales = a.scales[-length:].clone() if per_token else a.scales
    alone = a._replace(qkv=a.qkv[-length:].clone(), scales=scales, cu_seqlens=bounds([length]).to(device))
    assert torch.equal(launch(alone), launch(a)[-length:])


def nan_stays_in_its_sequence(lengths: list[int], which: int, column: int, value: str, device: str = "cpu") -> None:
    """A scale of one token that is NaN or infinite, in the middle of sequence `which`; `column`: query, key or value."""
    for int8_out in (False, True):
        a = problem(1, 32, lengths, per_token=True, int8_out=int8_out)
        start, stop = list(pairwise(a.cu_seqlens.tolist()))[which]
        a.scales[(start + stop) // 2, column] = float(value)
        assert_matches_reference(a, launch(to_device(a, device)))


def static_nan_is_everywhere(column: int, value: str, device: str = "cpu") -> None:
    a = problem(1, 32, [3, 70])
    a.scales[column] = float(value)
    assert bool(launch(to_device(a, device)).isnan().all())


def wrong_bounds_touch_nothing_else(wrong: list[int], device: str = "cpu") -> None:
    """What is around the tokens in memory stays as it was, and what a row becomes comes from the tokens alone."""
    from qbert.kernels.attention import attention_int8_kernel

    t, width, around = 100, 32, 4096
    tokens = torch.zeros(t + 2 * around, 3 * width, dtype=torch.int8, device=device)
    tokens[:around, 2 * width :] = tokens[-around:, 2 * width :] = 100  # as values these would be seen
    out = torch.full((t + 2 * around, width), 7.0, device=device)
    cu_seqlens = torch.tensor(wrong, dtype=torch.int32, device=device)
    for block_q in (64, 128):
        attention_int8_kernel[(1, t // block_q + len(wrong) - 1, 1)](
            (tokens[around:-around], torch.ones(3, device=device)), cu_seqlens, out[around:-around], t, len(wrong) - 1,
            Heads(1, 1.0, 1.0), META=AttentionMeta(width, 32, block_q, False),
        )  # fmt: skip
        assert bool((out[:around] == 7).all() and (out[-around:] == 7).all())
        assert set(out[around:-around].unique().tolist()) <= {0.0, 7.0}


def nothing_to_do() -> None:
    empty = torch.zeros(0, 3 * 64, dtype=torch.int8)
    for cu_seqlens in (torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        assert launch(Attention(empty, torch.ones(3), cu_seqlens, 1, 0.125, None, None, None, torch.float16)).shape == (
            0,
            64,
        )
