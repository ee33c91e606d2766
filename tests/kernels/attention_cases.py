"""What `test_attention_kernel` runs, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from itertools import pairwise

import torch

from qbert.ops.triton import TRITON
from qbert.testing import Arguments, assert_matches_reference, random_arguments, to_device


def matches_reference(
    operation: str, heads: int, head_dim: int, lengths: list[int], per_token: bool = False, dtype: str = "float32",
    seed: int = 0, device: str = "cpu",
) -> None:  # fmt: skip
    """Random codes in sequences of these lengths."""
    arguments = problem(operation, heads, head_dim, lengths, per_token, dtype, seed)
    assert_matches_reference(operation, arguments, TRITON[operation](*to_device(arguments, device)))


def problem(
    operation: str, heads: int, head_dim: int, lengths: list[int], per_token: bool = False, dtype: str = "float32",
    seed: int = 0,
) -> Arguments:  # fmt: skip
    """`random_arguments` of sequences of these lengths."""
    qkv, scales, _, *rest = random_arguments(
        operation, sum(lengths), heads, head_dim, seed=seed, dtype=getattr(torch, dtype), per_token=per_token
    )
    return qkv, scales, bounds(lengths), *rest


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def sums_are_exact(half: int, head_dim: int = 32, device: str = "cpu") -> None:
    """Values of 127 for `half` keys and -127 for as many, but the last -126: float32 sums would not find their way back to 255.

    All queries are 0, so that every probability has the code 255 and the sum of codes times values is 255 * 1.
    """
    qkv = torch.zeros(2 * half, 3, head_dim, dtype=torch.int8)
    qkv[:half, 2], qkv[half:, 2], qkv[-1, 2] = 127, -127, -126
    scales = torch.tensor([1.0, 1.0, 1.0])
    arguments = qkv.view(2 * half, -1), scales, bounds([2 * half]), 1, 1.0, torch.float32
    out = TRITON["attention_int8"](*to_device(arguments, device)).cpu()
    torch.testing.assert_close(out, torch.full_like(out, 1 / (2 * half)), rtol=1e-6, atol=0)


def the_batch_does_not_show(
    length: int, others: list[int], per_token: bool, heads: int = 1, head_dim: int = 32, device: str = "cpu"
) -> None:
    """A sequence has the same bits alone, and among others that change the average length and so the tile."""
    lengths = [*others, length]
    arguments = to_device(problem("attention_int8", heads, head_dim, lengths, per_token), device)
    qkv, scales, _, *rest = arguments
    alone = TRITON["attention_int8"](
        qkv[-length:].clone(), scales[-length:].clone() if per_token else scales, bounds([length]).to(device), *rest
    )
    together = TRITON["attention_int8"](*arguments)
    assert torch.equal(alone, together[-length:])


def nan_stays_in_its_sequence(lengths: list[int], which: int, column: int, value: str, device: str = "cpu") -> None:
    """A scale of one token that is NaN or infinite, in the middle of sequence `which`; `column`: query, key or value."""
    for operation in ("attention_int8", "attention_int8_requant"):
        arguments = problem(operation, 1, 32, lengths, per_token=True)
        start, stop = list(pairwise(arguments[2].tolist()))[which]
        arguments[1][(start + stop) // 2, column] = float(value)
        assert_matches_reference(operation, arguments, TRITON[operation](*to_device(arguments, device)))


def static_nan_is_everywhere(column: int, value: str, device: str = "cpu") -> None:
    arguments = problem("attention_int8", 1, 32, [3, 70])
    arguments[1][column] = float(value)
    out = TRITON["attention_int8"](*to_device(arguments, device))
    assert bool(out.isnan().all())


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
            tokens[around:-around], torch.ones(3, device=device), cu_seqlens, out[around:-around], t, len(wrong) - 1, 1,
            1.0, 1.0, HEAD_DIM=width, BLOCK_D=32, BLOCK_Q=block_q, PER_TOKEN=False,
        )  # fmt: skip
        assert bool((out[:around] == 7).all() and (out[-around:] == 7).all())
        assert set(out[around:-around].unique().tolist()) <= {0.0, 7.0}


def nothing_to_do() -> None:
    attention = TRITON["attention_int8"]
    empty = torch.zeros(0, 3 * 64, dtype=torch.int8)
    for cu_seqlens in (torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        assert attention(empty, torch.ones(3), cu_seqlens, 1, 0.125, torch.float16).shape == (0, 64)
