"""What `test_attention_kernel` runs, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from launchers import launch
from row_cases import same_bits

from qbert.ops import reference
from qbert.ops.operations import Attention
from qbert.ops.triton import attention
from qbert.ops.triton.arguments import AttentionMeta, Distances, Heads
from qbert.ops.triton.attention import PLAIN
from qbert.testing import assert_matches_reference, random_problem, to_device, with_pattern

BLOCK = 64  # keys that are passed together, and queries of a program with a window


def matches_reference(heads: int, head_dim: int, lengths: list[int], *, device: str = "cpu", **options: Any) -> None:
    """Random codes in sequences of these lengths."""
    a = problem(heads, head_dim, lengths, **options)
    assert_matches_reference(a, launch(to_device(a, device)))


def problem(
    heads: int, head_dim: int, lengths: list[int], *, dtype: str = "float32", pattern: dict[str, Any] | None = None,
    **options: Any,
) -> Attention:  # fmt: skip
    """`random_problem` of sequences of these lengths, and `with_pattern`, where `floats` is a type's name."""
    a = random_problem("attention", sum(lengths), heads, head_dim, dtype=getattr(torch, dtype), **options)
    a, more = a._replace(cu_seqlens=bounds(lengths)), dict(pattern or {})
    if "floats" in more:
        more["floats"] = getattr(torch, more["floats"])
    return with_pattern(a, **more)


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def rounds_as_the_reference(
    heads: int, head_dim: int, lengths: list[int], pattern: dict[str, Any], bad: str | None = None, device: str = "cpu"
) -> None:
    """Codes of floats and their scales, bit for bit; `bad`: what stands among a token's queries, and another's values."""
    a = problem(heads, head_dim, lengths, pattern=pattern)
    if bad is not None:
        a.qkv[1, 0], a.qkv[2, -1] = float(bad), float(bad)
    codes, scales = attention.codes_and_scales(to_device(a, device))
    expected, expected_scales = reference.attention_codes(a)
    assert torch.equal(codes.cpu().view(-1, 3, heads, head_dim), expected.permute(2, 0, 1, 3))
    if a.scales is None:
        assert same_bits(scales.cpu(), expected_scales.permute(1, 2, 0))
    else:
        assert torch.equal(scales.cpu(), a.scales)


def a_wide_window_is_none(length: int, per_token: bool, device: str = "cpu") -> None:
    """The same bits as without a window, and not those of one that hides a key."""
    a = to_device(problem(1, 32, [length, 3], per_token=per_token), device)
    plain = launch(a)
    for window in (length - 1, length, 2**40):
        assert torch.equal(launch(a._replace(window=window)), plain), window
    assert not torch.equal(launch(a._replace(window=length - 2)), plain)


def only_what_a_window_shows_is_passed(length: int, window: int) -> None:
    """Counts the products with blocks of keys; in the interpreter alone."""
    from qbert.kernels import attention as kernel

    calls, products = [], kernel._products
    kernel._products = lambda *arguments: calls.append(0) or products(*arguments)
    try:
        launch(problem(1, 32, [length])._replace(window=window))
    finally:
        kernel._products = products
    expected = 0
    for first in range(0, length, BLOCK):
        begin, end = max(first - window, 0), min(first + BLOCK - 1 + window, length - 1)
        expected += 2 * (end // BLOCK - begin // BLOCK + 1)
    assert len(calls) == expected


def without_a_rotation_it_is_nan(dynamic: bool, device: str = "cpu") -> None:
    """Sequences longer than the table of rotations, which nobody looks at before; the others are what they are."""
    a = to_device(problem(1, 32, [4, 9, 6], pattern={"floats": "float32", "rotary": True, "dynamic": dynamic}), device)
    assert a.rotary is not None
    short = a._replace(rotary=a.rotary[:6])  # and after it what would be right
    known, out = [*range(4), *range(13, 19)], launch(short)
    assert torch.equal(out[known], launch(a)[known])
    assert bool(out[4:13].isnan().all())
    if dynamic:  # positions below 0: tokens before the first sequence
        late = a._replace(rotary=a.rotary[4:10], cu_seqlens=bounds([4, 6])[1:].to(device))
        assert bool(attention.codes_and_scales(late)[1][:, :4, :2].isnan().all())


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
    length: int, others: list[int], per_token: bool, heads: int = 1, head_dim: int = 32, device: str = "cpu",
    pattern: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """A sequence has the same bits alone, and among others that change the average length and so the tile."""
    a = to_device(problem(heads, head_dim, [*others, length], per_token=per_token, pattern=pattern), device)
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


def nan_is_seen_in_its_window(column: int, value: str, reach: int | None, device: str = "cpu") -> None:
    """A scale that is NaN or infinite makes rows NaN that see its token, a query's its own row alone."""
    a = problem(1, 32, [4, 75, 2], per_token=True, pattern={"window": 6, "reach": reach})
    assert a.scales is not None
    a.scales[70, column] = float(value)
    out = launch(to_device(a, device)).cpu()
    assert_matches_reference(a, out)
    if value == "nan":
        rows = range(70, 71) if column == 0 else range(64, 77)
        assert out.isnan().all(dim=1).nonzero().flatten().tolist() == list(rows)


def bad_floats_are_seen_in_their_window(value: str, device: str = "cpu") -> None:
    """Where scales are dynamic, by those rows of their head that see their token."""
    pattern = {"window": 6, "floats": "float32", "dynamic": True, "rotary": True}
    a = problem(2, 32, [2, 20], pattern=pattern)
    a.qkv[10, 3 * 64 - 1] = float(value)  # a value of the second head
    out = launch(to_device(a, device)).cpu()
    assert_matches_reference(a, out)
    assert out.isnan().nonzero().tolist() == [[row, column] for row in range(4, 17) for column in range(32, 64)]


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
    biases = torch.zeros(1, 7, device=device)
    for block_q, distances in ((64, PLAIN), (128, PLAIN), (64, Distances(5, biases, 3, None))):
        attention_int8_kernel[(1, t // block_q + len(wrong) - 1, 1)](
            (tokens[around:-around], torch.ones(3, device=device)), cu_seqlens, out[around:-around], t, len(wrong) - 1,
            Heads(1, 1.0, 1.0), distances, META=AttentionMeta(width, 32, block_q, False),
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
