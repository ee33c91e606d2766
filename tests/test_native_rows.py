"""Native row operations and attention: every instruction set of this CPU against the reference, and against each other.

The C++ tests (tests/native) look for reads and writes out of bounds with sanitizers; here results are compared with
`qbert.testing`, the one judge of all kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qbert import ops, testing
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.ops import reference, table
from qbert.ops.abi import FLOAT_TYPES, Keeps
from qbert.ops.kernel import problem_of
from qbert.ops.operations import FLOAT_TABLE, AddNorm, Attention, Norm, QuantizeRows, operation_of
from qbert.target import Target, native_cpu
from qbert.testing import assert_matches_reference, random_problem, schemes_of
from qbert.weight import Layout, Weight

_cpu: Any = native_cpu()
if _cpu is None:
    pytest.skip("the extension qbert._cpu is not built here", allow_module_level=True)

ISAS = _cpu.supported_isas()
OPERATIONS = ("quantize_rows", "embedding", "attention", "add_norm", "embed_norm")
DTYPES = pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES, ids=str)
PER_TOKEN = pytest.mark.parametrize("per_token", [False, True], ids=["static", "per-token"])
INT8_OUT = pytest.mark.parametrize("int8_out", [False, True], ids=["float", "int8"])
LOOK_UPS = pytest.mark.parametrize("scheme", schemes_of("embedding"))
# (t, n, k) as in random_problem: nothing, one of everything, whole vectors, tails of every kind, more than one task.
SIZES = [(0, 3, 17), (1, 1, 1), (2, 2, 16), (3, 5, 15), (17, 3, 33), (33, 2, 64), (70, 2, 63), (5, 3, 1023)]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


EVERY_ISA = pytest.mark.parametrize("isa", ISAS, indirect=True)


def _cases() -> Iterator[Any]:
    """Every operation with every scheme, kind of scales and kind of results that it has; options of `_draw`."""
    for operation in OPERATIONS:
        for scheme in [*schemes_of(operation), *([FLOAT_TABLE] if operation == "embed_norm" else [])]:
            yield pytest.param(operation, {"scheme": scheme}, id=f"{operation}-{scheme}")
        if operation == "attention":
            for per_token in (False, True):
                for int8_out in (False, True):
                    kind = ("per-token" if per_token else "static") + ("-int8" if int8_out else "")
                    yield pytest.param(
                        operation, {"per_token": per_token, "int8_out": int8_out}, id=f"attention-{kind}"
                    )
        elif not schemes_of(operation):
            yield pytest.param(operation, {}, id=operation)


CASES = pytest.mark.parametrize(("operation", "options"), list(_cases()))


def _draw(operation: str, t: int, n: int, k: int, **options: Any) -> Any:
    """A random problem; k is rounded up to whole groups."""
    scheme = SCHEMES.get(options.get("scheme") or "")
    size = (scheme.group_size if scheme else None) or 1
    return random_problem(operation, t, n, -(-k // size) * size, **options)


def _row(operation: str) -> table.Kernel:
    """The native kernel of the instruction set in use."""
    return next(row for row in table.KERNELS[operation] if row.name == f"native {_cpu.isa()}")


def _obstacle(problem: Any) -> str | None:
    target = Target("cpu", _cpu.isa(), native=True)
    return _row(operation_of(problem).name).obstacle(problem_of(problem), target)


def run(problem: Any) -> Any:
    """The native kernel itself: torch's would give the same result, but not be tested here."""
    problem.check()
    assert _obstacle(problem) is None
    return _row(operation_of(problem).name).call(problem)


def _results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _bits(value: Any) -> list[Tensor]:
    """Results as integers: NaN is equal to itself, and 0 is not -0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    return [each.view(integers[each.element_size()]) for each in _results(value)]


def _assert_same_bits(actual: Any, expected: Any) -> None:
    for got, want in zip(_bits(actual), _bits(expected), strict=True):
        assert torch.equal(got, want)


def _attention(lengths: list[int], heads: int, head_dim: int, **options: Any) -> Attention:
    problem = random_problem("attention", sum(lengths), heads, head_dim, **options)
    return problem._replace(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))


# ---- against the reference ------------------------------------------------------------------------------------------


@EVERY_ISA
@DTYPES
@CASES
def test_matches_reference(operation: str, options: dict[str, Any], dtype: torch.dtype, isa: str) -> None:
    for t, n, k in SIZES:
        problem = _draw(operation, t, n, k, seed=t, dtype=dtype, **options)
        assert_matches_reference(problem, run(problem))


@EVERY_ISA
@PER_TOKEN
@pytest.mark.parametrize("head_dim", [4, 32, 60, 64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [[1, 16, 15], [0, 17, 0], [64, 65], [130]], ids=str)
def test_attention_of_many_shapes(lengths: list[int], head_dim: int, per_token: bool, isa: str) -> None:
    problem = _attention(lengths, 2, head_dim, per_token=per_token, seed=head_dim)
    assert_matches_reference(problem, run(problem))


@EVERY_ISA
@pytest.mark.parametrize("value", [-128, -127, 127])
def test_attention_sums_do_not_overflow(value: int, isa: str) -> None:
    """All products at their largest: any saturation on the way would show."""
    problem = _attention([70], 1, 256)
    problem = problem._replace(qkv=torch.full_like(problem.qkv, value))
    assert_matches_reference(problem, run(problem))


@EVERY_ISA
def test_attention_where_one_key_takes_all(isa: str) -> None:
    """Scores thousands apart: the powers of all but one are below the smallest float."""
    problem = _attention([40], 2, 64)._replace(scales=torch.tensor([2.0, 3.0, 0.01]))
    assert_matches_reference(problem, run(problem))


@EVERY_ISA
@DTYPES
def test_quantization_of_every_kind_of_token(dtype: torch.dtype, isa: str) -> None:
    x = testing.random_activations(12, 67, dtype=dtype)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for row, value in enumerate((math.nan, math.inf, -math.inf, largest, -largest, smallest, smallest / 8)):
        x[row, 66 - row] = value
    x[6:10] *= torch.tensor([[1e-38], [0.0], [-0.0], [1e-44]], dtype=dtype)
    assert_matches_reference(QuantizeRows(x), run(QuantizeRows(x)))


@EVERY_ISA
def test_ties_are_rounded_to_even(isa: str) -> None:
    x = torch.arange(-127, 128).float()[None] / 2
    x = torch.cat([x, torch.tensor([[127.0]])], dim=1)
    codes, scale = run(QuantizeRows(x))
    assert scale.tolist() == [1.0]
    assert torch.equal(codes[0].float(), x[0].round())


# ---- norms ----------------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("k", [1, 7, 64, 768, 1000])
def test_norm_of_rows_far_from_zero(k: int, isa: str) -> None:
    """The deviation is a millionth of the mean, or nothing: there the mean's own rounding would show."""
    generator = torch.Generator().manual_seed(k)
    y = torch.randn(6, k, generator=generator) * torch.tensor([[1.0], [1e-3], [1e-4], [0.0], [0.0], [1e3]])
    residual = torch.tensor([[1.0], [1e2], [1e2], [0.3], [-1e5], [1e4]]).expand(6, k).contiguous()
    norm = Norm(torch.randn(k, generator=generator), torch.randn(k, generator=generator), 1e-12)
    problem = AddNorm(y, residual, norm, Keeps.NORM)
    assert_matches_reference(problem, run(problem))


@EVERY_ISA
@DTYPES
@pytest.mark.parametrize(("t", "k"), [(1, 1), (3, 77), (9, 768), (0, 5)])
def test_a_sum_that_is_kept(t: int, k: int, dtype: torch.dtype, isa: str) -> None:
    """Exactly the sum, rounded once; codes and scales do not know of it."""
    problem = random_problem("add_norm", t, 1, k, dtype=dtype, keeps=Keeps.SUM)
    kept, codes, scale = run(problem)
    assert torch.equal(kept, (problem.y.float() + problem.residual.float()).to(dtype))
    assert_matches_reference(problem, (kept, codes, scale))
    for got, want in zip((codes, scale), run(problem._replace(keeps=Keeps.NORM))[1:], strict=True):
        assert torch.equal(got, want)
    problem.y[t // 2 :, :1] = math.inf
    kept, codes, scale = run(problem)
    assert bool(scale[t // 2 :].isnan().all())
    assert not bool(codes[t // 2 :].any())


@EVERY_ISA
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_spoils_its_own_token(bad: float, isa: str) -> None:
    problem = random_problem("add_norm", 5, 1, 70)
    expected = run(problem)
    problem.y[1, 69], problem.residual[3, 0] = bad, bad
    out, codes, scale = run(problem)
    for row in (1, 3):
        assert bool(out[row].isnan().all())
        assert bool(scale[row].isnan())
        assert not bool(codes[row].any())
    for got, want in zip((out, codes, scale), expected, strict=True):
        assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])


@EVERY_ISA
@pytest.mark.parametrize("y_dtype", ops.FLOAT_DTYPES, ids=str)
@DTYPES
def test_norm_of_two_types(dtype: torch.dtype, y_dtype: torch.dtype, isa: str) -> None:
    y, residual, (gamma, beta, eps), _ = random_problem("add_norm", 9, 1, 83)
    problem = AddNorm(y.to(y_dtype), residual.to(dtype), Norm(gamma.to(y_dtype), beta.to(dtype), eps), Keeps.NORM)
    assert_matches_reference(problem, run(problem))


# ---- the same bits --------------------------------------------------------------------------------------------------


@DTYPES
@CASES
def test_instruction_sets_give_the_same_bits(operation: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    before, found = _cpu.isa(), []
    problem = _draw(operation, 75, 3, 77, dtype=dtype, **options)
    for isa in ISAS:
        _cpu.use_isa(isa)
        found.append(run(problem))
    _cpu.use_isa(before)
    for each in found[1:]:
        _assert_same_bits(each, found[0])


@CASES
def test_thread_counts_give_the_same_bits(
    operation: str, options: dict[str, Any], threads: Callable[[int], None]
) -> None:
    """Large enough for several tasks a thread."""
    size = (420, 4, 32) if operation == "attention" else (700, 50, 250)
    problem, found = _draw(operation, *size, **options), []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(problem))
    for each in found[1:]:
        _assert_same_bits(each, found[0])


@EVERY_ISA
@PER_TOKEN
@INT8_OUT
def test_a_sequence_does_not_see_its_neighbours(int8_out: bool, per_token: bool, isa: str) -> None:
    problem = _attention([5, 70, 1, 16, 33], 3, 32, per_token=per_token, int8_out=int8_out)
    together, bounds = run(problem), problem.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        alone = problem._replace(
            qkv=problem.qkv[start:stop],
            scales=problem.scales[start:stop] if per_token else problem.scales,
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        )
        _assert_same_bits(run(alone), together[start:stop])


# ---- scales that are none -------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@INT8_OUT
def test_a_bad_scale_spoils_its_own_sequence(int8_out: bool, which: int, isa: str) -> None:
    """The row of a query; of a key or a value all rows that see it. Codes have no NaN: there it is 0."""
    problem = _attention([20, 40, 3], 2, 32, per_token=True)._replace(out=0.5 if int8_out else torch.float32)
    expected = run(problem)
    problem.scales[30, which] = math.nan
    result = run(problem)
    spoiled = [30] if which == 0 else list(range(20, 60))
    kept = [row for row in range(63) if row not in spoiled]
    bad = result[spoiled]
    assert not bool(bad.any()) if int8_out else bool(bad.isnan().all())
    _assert_same_bits(result[kept], expected[kept])
    assert_matches_reference(problem, result)


@EVERY_ISA
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_a_bad_static_scale_spoils_everything(which: int, isa: str) -> None:
    problem = _attention([20, 3], 2, 32)
    problem.scales[which] = math.nan
    assert bool(run(problem).isnan().all())


# ---- arguments ------------------------------------------------------------------------------------------------------


@LOOK_UPS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_ids_of_any_shape(scheme: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = _draw("embedding", math.prod(shape), 19, 64, scheme=scheme)
    problem = problem._replace(ids=problem.ids.view(shape).to(dtype))
    rows = run(problem)
    assert rows.shape == (*shape, problem.weight.k)
    assert torch.equal(rows, reference.embedding(problem))


@LOOK_UPS
@pytest.mark.parametrize("bad", [-1, 19, 2**40])
def test_ids_outside_are_named(scheme: str, bad: int) -> None:
    problem = _draw("embedding", 6, 19, 64, scheme=scheme)
    problem.ids[4] = bad
    with pytest.raises(QBertError, match=f"id {bad} is out of range; the table has 19 rows"):
        run(problem)


@pytest.mark.parametrize("scheme", ["gobo3", "w8", FLOAT_TABLE])
@pytest.mark.parametrize("which", ["ids", "position_ids", "token_type_ids"])
def test_every_kind_of_id_is_checked(which: str, scheme: str) -> None:
    problem = random_problem("embed_norm", 6, 19, 64, scheme=scheme)
    getattr(problem, which)[5] = 1000
    with pytest.raises(QBertError, match="id 1000 is out of range"):
        run(problem)


@pytest.mark.parametrize("operation", ["embedding", "embed_norm"])
@pytest.mark.parametrize("damage", ["column", "negative column", "row pointer", "descending"])
def test_damaged_outliers_are_refused(damage: str, operation: str) -> None:
    """Only of rows that are looked up: the others are not read."""
    problem = random_problem(operation, 8, 19, 256, scheme="gobo3")
    held: Weight = problem.weight if operation == "embedding" else problem.words
    assert held.sparse is not None
    rowptr, col, delta = held.sparse
    busiest = int(rowptr.diff().argmax())
    if damage in ("column", "negative column"):
        col[rowptr[busiest]] = 256 if damage == "column" else -1
    else:
        rowptr[busiest + 1] = delta.numel() + 1 if damage == "row pointer" else rowptr[busiest] - 1

    def look_up(ids: list[int]) -> Any:
        positions = {"position_ids": torch.zeros(len(ids)).long(), "token_type_ids": torch.zeros(len(ids)).long()}
        more = positions if operation == "embed_norm" else {}
        return run(problem._replace(ids=torch.tensor(ids), **more))

    others = [row for row in range(19) if row not in (busiest, busiest + 1)]
    assert _results(look_up(others))[0].shape == (len(others), 256)
    with pytest.raises(QBertError, match="outliers are damaged"):
        look_up([0, busiest])


@pytest.mark.parametrize("bounds", [[0, 5], [1, 12], [0, 7, 5, 12], [0, 13], [], [12]], ids=str)
def test_bounds_that_do_not_cover_are_named(bounds: list[int]) -> None:
    problem = _attention([12], 2, 32)._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises((QBertError, RuntimeError), match="cu_seqlens must"):
        run(problem)


@pytest.mark.parametrize("softmax_scale", [0.0, -0.125, math.nan, math.inf])
def test_a_softmax_scale_that_is_none_is_named(softmax_scale: float) -> None:
    with pytest.raises(QBertError, match=f"softmax_scale is {softmax_scale}; allowed"):
        run(_attention([12], 2, 32)._replace(softmax_scale=softmax_scale))


def test_sums_that_could_overflow_are_refused() -> None:
    t = _cpu.MAX_ATTENTION_TERMS + 1
    bounds = torch.tensor([0, t], dtype=torch.int32)
    problem = Attention(
        torch.zeros(t, 3, dtype=torch.int8), torch.ones(3), bounds, 1, 1.0, None, None, None, torch.float32
    )
    with pytest.raises(QBertError, match=f"attention over {t} tokens"):
        run(problem)
    wide = torch.zeros(1, 3 * t, dtype=torch.int8)
    with pytest.raises(QBertError, match=f"attention over 1 tokens with heads of {t}"):
        run(problem._replace(qkv=wide, cu_seqlens=torch.tensor([0, 1], dtype=torch.int32)))
    nothing = torch.tensor([0, 0, 0], dtype=torch.int32)
    assert run(problem._replace(qkv=problem.qkv[:0].expand(0, 3), cu_seqlens=nothing)).shape == (0, 1)


def test_strided_arguments() -> None:
    x = testing.random_activations(9, 160)
    for strided in (x[:, ::2], x[:, 3:70], x[::2], x.t()[:50], x[:1].expand(4, 160)):
        _assert_same_bits(run(QuantizeRows(strided)), run(QuantizeRows(strided.clone())))
    y, residual, (gamma, beta, eps), _ = problem = random_problem("add_norm", 9, 1, 40)
    wide = [each.repeat_interleave(2, -1)[..., ::2] for each in (y, residual, gamma, beta)]
    _assert_same_bits(run(AddNorm(*wide[:2], Norm(*wide[2:], eps), Keeps.NORM)), run(problem))
    attention = _attention([9], 2, 32, per_token=True)
    wide_qkv = torch.cat([attention.qkv, attention.qkv], dim=1)[:, : attention.qkv.shape[1]]
    wide_scales = attention.scales.repeat_interleave(2, -1)[..., ::2]
    _assert_same_bits(run(attention._replace(qkv=wide_qkv, scales=wide_scales)), run(attention))
    look_up = random_problem("embed_norm", 9, 19, 64)
    wide_ids = look_up.ids.repeat_interleave(2)[::2]
    wide_positions = look_up.positions.repeat_interleave(2, -1)[..., ::2]
    _assert_same_bits(run(look_up._replace(ids=wide_ids, positions=wide_positions)), run(look_up))


def test_outputs_are_on_the_cpu_whatever_the_defaults_are() -> None:
    problem = QuantizeRows(testing.random_activations(3, 20))
    expected = run(problem)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            _assert_same_bits(run(problem), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scheme", ["w4", "w4-g128", "gobo3", "gobo4"])
@pytest.mark.parametrize("operation", ["embedding", "embed_norm"])
def test_layouts_of_others_are_left_to_torch(operation: str, scheme: str) -> None:
    problem = _draw(operation, 5, 19, 64, layout=Layout.BYTES, scheme=scheme)
    assert _obstacle(problem) == f"it does not read {scheme} tables in that layout"
    assert_matches_reference(problem, ops.call(problem))


@pytest.mark.parametrize("operation", ["add_norm", "embed_norm"])
def test_rows_without_columns_are_left_to_torch(operation: str) -> None:
    problem = random_problem(operation, 3, 4, 0, scheme=FLOAT_TABLE)
    assert _obstacle(problem) == "rows without columns"
    assert_matches_reference(problem, ops.call(problem))


def test_a_weight_s_struct_is_made_once_and_keeps_its_tensors() -> None:
    """Its addresses would else point to memory that is somebody else's by now."""
    problem = random_problem("embedding", 5, 19, 256, scheme="gobo3")
    strided = {name: tensor.repeat_interleave(2, -1)[..., ::2] for name, tensor in problem.weight.tensors.items()}
    held = problem._replace(weight=Weight(problem.weight.scheme, (19, 256), Layout.PLAIN, strided))
    expected = run(problem)
    _assert_same_bits(run(held), expected)
    made = dict(held.weight._prepared)
    for _ in range(3):
        _assert_same_bits(run(held), expected)
    assert held.weight._prepared.keys() == made.keys()
    assert all(held.weight._prepared[each] is made[each] for each in made)


# ---- memory ---------------------------------------------------------------------------------------------------------


class Guarded:
    """A result between canaries; its address goes to the extension as a kernel gets it."""

    MARGIN = 64

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = math.prod(shape) * dtype.itemsize
        self.memory = torch.full((size + 2 * self.MARGIN,), 0x5A, dtype=torch.uint8)
        self.value = self.memory[self.MARGIN : self.MARGIN + size].view(dtype).view(shape)

    @property
    def address(self) -> int:
        return self.value.data_ptr()

    def check(self, expected: Tensor) -> None:
        _assert_same_bits(self.value, expected)
        margins = torch.cat([self.memory[: self.MARGIN], self.memory[-self.MARGIN :]])
        assert bool((margins == 0x5A).all()), "written beyond the result"


@EVERY_ISA
@DTYPES
@pytest.mark.parametrize("k", [1, 15, 16, 17, 70])
def test_nothing_is_written_beyond_the_results(k: int, dtype: torch.dtype, isa: str) -> None:
    t, float_type = 3, FLOAT_TYPES[dtype]
    problem = random_problem("add_norm", t, 1, k, dtype=dtype)
    y, residual, (gamma, beta, eps), _ = problem
    gamma, beta = gamma.float(), beta.float()
    out, codes, scale = Guarded((t, k), dtype), Guarded((t, k), torch.int8), Guarded((t,), torch.float32)
    _cpu.add_norm_rows(
        y.data_ptr(), float_type, residual.data_ptr(), float_type, gamma.data_ptr(), beta.data_ptr(), eps,
        Keeps.NORM, out.address, codes.address, scale.address, t, k, 1,
    )  # fmt: skip
    for guarded, want in zip((out, codes, scale), run(problem), strict=True):
        guarded.check(want)
    codes, scale = Guarded((t, k), torch.int8), Guarded((t,), torch.float32)
    _cpu.quantize_rows(y.data_ptr(), k, float_type, codes.address, scale.address, t, k, 1)
    for guarded, want in zip((codes, scale), reference.codes_and_scales(y), strict=True):
        guarded.check(want)


@EVERY_ISA
@DTYPES
@pytest.mark.parametrize("head_dim", [1, 15, 17, 64])
def test_attention_writes_nothing_beyond_its_result(head_dim: int, dtype: torch.dtype, isa: str) -> None:
    problem = _attention([7, 20], 2, head_dim, dtype=dtype)
    qkv, scales, bounds, heads, softmax_scale, *_ = problem
    assert scales is not None
    expected, out = run(problem), Guarded((27, 2 * head_dim), dtype)
    float_type = FLOAT_TYPES[dtype]
    addresses = (qkv.data_ptr(), -1, scales.data_ptr(), False, 0, 0, bounds.data_ptr())
    pattern = (-1, 0, 0, 0, 0)
    assert _cpu.attention(*addresses, 2, 27, heads, head_dim, softmax_scale, *pattern, out.address, float_type, 1.0, 1)
    out.check(expected)


def test_a_residual_may_be_written_over() -> None:
    """The fused encoder keeps one residual stream."""
    problem = random_problem("add_norm", 40, 1, 100)
    y, residual, (gamma, beta, eps), _ = problem
    expected = run(problem)
    codes, scale = torch.empty(40, 100, dtype=torch.int8), torch.empty(40)
    _cpu.add_norm_rows(
        y.data_ptr(), 0, residual.data_ptr(), 0, gamma.data_ptr(), beta.data_ptr(), eps, Keeps.NORM, residual.data_ptr(),
        codes.data_ptr(), scale.data_ptr(), 40, 100, 1,
    )  # fmt: skip
    _assert_same_bits((residual, codes, scale), expected)
