"""Native attention with windows, biases by distance, rotary positions and floats: every instruction set against the reference,
against each other, and against the parts that it is made of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from qbert.errors import QBertError
from qbert.ops import call, reference
from qbert.ops.cpu import by_torch, native
from qbert.ops.operations import Attention
from qbert.target import native_cpu
from qbert.testing import assert_matches_reference, first_queries_of, random_problem, with_pattern

_cpu: Any = native_cpu()
if _cpu is None:
    pytest.skip("the extension qbert._cpu is not built here", allow_module_level=True)

ISAS = _cpu.supported_isas()
LENGTHS = [[1], [1, 16, 0, 15], [33, 64, 65], [130, 7], [300]]
HEAD_SIZES = [1, 16, 26, 40, 80, 96, 128]
PATTERNS: list[dict[str, Any]] = [
    {"window": 0}, {"window": 3}, {"window": 64}, {"window": 1000}, {"reach": 0}, {"reach": 5}, {"reach": 400},
    {"window": 20, "reach": 9}, {"floats": torch.float32}, {"floats": torch.bfloat16, "dynamic": True},
    {"floats": torch.float16, "window": 17, "dynamic": True},
    {"floats": torch.float32, "reach": 7, "window": 40, "dynamic": True},
]  # fmt: skip
ROTARY: list[dict[str, Any]] = [
    {"floats": torch.float32, "rotary": True}, {"floats": torch.float32, "rotary": True, "dynamic": True},
    {"floats": torch.bfloat16, "rotary": True, "window": 64},
    {"floats": torch.float32, "rotary": True, "window": 5, "reach": 3, "dynamic": True},
]  # fmt: skip


def _problem(lengths: list[int], head_dim: int, pattern: dict[str, Any], **options: Any) -> Attention:
    heads = 16 if head_dim == 1 else 2  # errors are judged relative to a token's largest value: it shall have some
    a = random_problem("attention", sum(lengths), heads, head_dim, **options)
    a = a._replace(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    return with_pattern(a, **pattern)


def _every_isa(a: Attention) -> torch.Tensor:
    """The result, whose bits all instruction sets of this CPU agree on."""
    before, found = _cpu.isa(), []
    try:
        for isa in ISAS:
            _cpu.use_isa(isa)
            found.append(native.attention(a))
    finally:
        _cpu.use_isa(before)
    first = found[0].contiguous().view(torch.uint8)
    for isa, each in zip(ISAS, found, strict=True):
        assert torch.equal(each.contiguous().view(torch.uint8), first), isa
    return found[0]


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_matches_reference(lengths: list[int], head_dim: int) -> None:
    for index, pattern in enumerate([*PATTERNS, *(ROTARY if head_dim % 2 == 0 else [])]):
        per_token = index % 2 == 1 and "floats" not in pattern
        a = _problem(
            lengths, head_dim, pattern, per_token=per_token, int8_out=index % 3 == 2 and "floats" not in pattern
        )
        assert_matches_reference(a, _every_isa(a))


@pytest.mark.parametrize("per_token", [False, True])
def test_a_window_over_the_whole_sequence_is_none(per_token: bool) -> None:
    a = _problem([70, 200], 32, {}, per_token=per_token)
    assert torch.equal(call(a._replace(window=199)), call(a))
    assert not torch.equal(call(a._replace(window=100)), call(a))


@pytest.mark.parametrize("pattern", [{"window": 30}, {"reach": 30}, {"window": 30, "reach": 8}], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_the_batch_and_the_threads_do_not_show(pattern: dict[str, Any], per_token: bool) -> None:
    a = _problem([40, 700, 3], 48, pattern, per_token=per_token)
    assert a.scales is not None
    scales = a.scales[40:740] if per_token else a.scales
    alone = a._replace(qkv=a.qkv[40:740], scales=scales, cu_seqlens=torch.tensor([0, 700], dtype=torch.int32))
    together, before = call(a), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(call(a), together)
            assert torch.equal(call(alone), together[40:740])
    finally:
        torch.set_num_threads(before)


def test_rounding_inside_is_rounding_before() -> None:
    """Dynamic scales of one head are `QuantizeRows` of each token's query, key and value."""
    a = _problem([5, 70], 64, {"floats": torch.float32, "dynamic": True, "window": 9})
    one = a._replace(heads=1, qkv=a.qkv[:, :192].contiguous())
    codes, scales = torch.ops.qbert.quantize_rows(one.qkv.view(-1, 64))
    assert torch.equal(call(one), call(one._replace(qkv=codes.view(-1, 192), scales=scales.view(-1, 3))))


@pytest.mark.parametrize("reach", [None, 3])
@pytest.mark.parametrize("column", range(3))
def test_nan_is_seen_by_those_who_see_its_token(column: int, reach: int | None) -> None:
    a = _problem([40, 100, 20], 32, {"window": 6, "reach": reach}, per_token=True)
    assert a.scales is not None
    a.scales[90, column] = torch.nan
    out = _every_isa(a)
    assert_matches_reference(a, out)
    rows = range(90, 91) if column == 0 else range(84, 97)
    assert out.isnan().all(dim=1).nonzero().flatten().tolist() == list(rows)
    assert bool(out.isnan().any(dim=1).equal(out.isnan().all(dim=1)))


def test_nan_floats_are_seen_by_those_who_see_their_token() -> None:
    a = _problem([40, 100], 32, {"window": 6, "floats": torch.float32, "dynamic": True, "rotary": True})
    a.qkv[90, 3 * 64 - 1] = torch.inf  # a value of the second head
    out = _every_isa(a)
    assert_matches_reference(a, out)
    assert out.isnan().nonzero().tolist() == list(map(list, itertools.product(range(84, 97), range(32, 64))))


def test_memory_of_a_long_sequence_is_a_windows() -> None:
    a = _problem([8192], 64, {"window": 64})
    out = call(a._replace(heads=2))
    last = a._replace(qkv=a.qkv[-1000:], cu_seqlens=torch.tensor([0, 1000], dtype=torch.int32))
    assert torch.equal(call(last)[-900:], out[-900:])


@pytest.mark.parametrize("head_dim", [26, 64])
@pytest.mark.parametrize("lengths", [*LENGTHS, [0, 40, 0, 9, 0]], ids=str)
def test_queries_of_first_tokens_alone(lengths: list[int], head_dim: int) -> None:
    """The rows of first tokens, bit for bit, and zeros where there is none; the same by torch and by the reference."""
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    there = torch.tensor(lengths) > 0
    for index, pattern in enumerate([*PATTERNS, *ROTARY]):
        codes = "floats" not in pattern
        a = _problem(lengths, head_dim, pattern, per_token=codes and index % 2 == 1, int8_out=codes and index % 3 == 2)
        alone = first_queries_of(a)
        alone.check()
        for found, every in (
            (_every_isa(alone), _every_isa(a)),
            (by_torch.attention(alone), by_torch.attention(a)),
            (reference.attention(alone), reference.attention(a)),
        ):
            assert torch.equal(found[there], every[first[there]])
            assert not found[~there].any()


def test_nan_of_a_first_query_is_its_own() -> None:
    a = first_queries_of(_problem([40, 30, 20], 32, {}, per_token=True))
    assert a.query_scales is not None
    a.query_scales[1] = torch.nan
    assert _every_isa(a).isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(2, 64, dtype=torch.int8)}, r"queries must be \(3, 64\) torch.int8, got \(2, 64\)"),
        ({"queries": torch.zeros(3, 64)}, r"queries must be .*, got \(3, 64\) torch.float32"),
        ({"query_scales": None}, r"query_scales is None; allowed .*: \(3,\)"),
        ({"query_scales": torch.ones(2)}, r"query_scales must be \(3,\) float32, got torch.float32 \(2,\)"),
        ({"scales": torch.ones(3)}, "query_scales without queries that have a scale for each token"),
        ({"queries": None}, r"qkv must be \(t, 3 \* 2 \* head_dim\)"),
    ],
)
def test_queries_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    a = first_queries_of(_problem([40, 30, 20], 32, {}, per_token=True))
    with pytest.raises(RuntimeError, match=message):
        call(a._replace(**change))


def test_positions_beyond_the_rotations_are_an_error() -> None:
    a = _problem([40, 100], 32, {"floats": torch.float32, "rotary": True})
    assert a.rotary is not None
    with pytest.raises(QBertError, match="rotary has 99 positions; the longest sequence has 100 tokens"):
        call(a._replace(rotary=a.rotary[:99]))
