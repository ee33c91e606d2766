"""Native row operations and attention: every instruction set of this CPU against the reference, and against each other.

The C++ tests (tests/native) look for reads and writes out of bounds with sanitizers; here results are compared with
`qbert.testing`, the one judge of all kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qbert import ops, reference, testing
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.layout import Layout
from qbert.target import native_cpu
from qbert.testing import assert_matches_reference, random_arguments, schemes_of

_cpu = native_cpu()
if _cpu is None:
    pytest.skip("the extension qbert._cpu is not built here", allow_module_level=True)

from qbert.ops.cpu_native_rows import NATIVE_ROWS  # noqa: E402  (there is nothing to import without the extension)

ISAS = _cpu.supported_isas()
ATTENTIONS = ["attention_int8", "attention_int8_requant"]
LOOK_UPS = ["w8_embedding", "w4_embedding", "gobo_embedding"]
DTYPES = pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES, ids=str)
# (t, n, k) as in random_arguments: nothing, one of everything, whole vectors, tails of every kind, more than one task.
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
    """Every operation with every scheme and kind of scales that it reads."""
    for operation in NATIVE_ROWS:
        schemes: list[str | None] = [*schemes_of(operation)] or [None]
        schemes += [reference.FLOAT_TABLE] if operation == "embed_layer_norm_quantize" else []
        for scheme in schemes:
            for per_token in (False, True) if operation in ATTENTIONS else (False,):
                kind = scheme or ("per-token" if per_token else "static" if operation in ATTENTIONS else "")
                yield pytest.param(operation, scheme, per_token, id=f"{operation}-{kind}".rstrip("-"))


CASES = pytest.mark.parametrize(("operation", "scheme", "per_token"), list(_cases()))


def _fit(scheme: str | None, k: int) -> int:
    size = SCHEMES[scheme].group_size if scheme in SCHEMES else None
    return -(-k // size) * size if size else k


def _results(value: Any) -> list[Tensor]:
    assert value is not NotImplemented
    return list(value) if isinstance(value, list | tuple) else [value]


def _bits(value: Any) -> list[Tensor]:
    """Results as integers: NaN is equal to itself, and 0 is not -0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    return [each.view(integers[each.element_size()]) for each in _results(value)]


def _assert_same_bits(actual: Any, expected: Any) -> None:
    for got, want in zip(_bits(actual), _bits(expected), strict=True):
        assert torch.equal(got, want)


def _attention_arguments(lengths: list[int], heads: int, head_dim: int, *, per_token: bool, seed: int = 0) -> list[Any]:
    t = sum(lengths)
    arguments = list(random_arguments("attention_int8", t, heads, head_dim, seed=seed, per_token=per_token))
    arguments[2] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return arguments


# ---- against the reference ------------------------------------------------------------------------------------------


@EVERY_ISA
@DTYPES
@CASES
def test_matches_reference(operation: str, scheme: str | None, per_token: bool, dtype: torch.dtype, isa: str) -> None:
    for t, n, k in SIZES:
        arguments = random_arguments(
            operation, t, n, _fit(scheme, k), seed=t, dtype=dtype, scheme=scheme, per_token=per_token
        )
        result = NATIVE_ROWS[operation](*arguments)
        assert result is not NotImplemented
        assert_matches_reference(operation, arguments, result)


@EVERY_ISA
@pytest.mark.parametrize("per_token", [False, True], ids=["static", "per-token"])
@pytest.mark.parametrize("head_dim", [4, 32, 60, 64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [[1, 16, 15], [0, 17, 0], [64, 65], [130]], ids=str)
def test_attention_of_many_shapes(lengths: list[int], head_dim: int, per_token: bool, isa: str) -> None:
    arguments = _attention_arguments(lengths, 2, head_dim, per_token=per_token, seed=head_dim)
    assert_matches_reference("attention_int8", arguments, NATIVE_ROWS["attention_int8"](*arguments))


@EVERY_ISA
@pytest.mark.parametrize("value", [-128, -127, 127])
def test_attention_sums_do_not_overflow(value: int, isa: str) -> None:
    """All products at their largest: any saturation on the way would show."""
    arguments = _attention_arguments([70], 1, 256, per_token=False)
    arguments[0] = torch.full_like(arguments[0], value)
    assert_matches_reference("attention_int8", arguments, NATIVE_ROWS["attention_int8"](*arguments))


@EVERY_ISA
def test_attention_where_one_key_takes_all(isa: str) -> None:
    """Scores thousands apart: the powers of all but one are below the smallest float."""
    arguments = _attention_arguments([40], 2, 64, per_token=False)
    arguments[1] = torch.tensor([2.0, 3.0, 0.01])
    assert_matches_reference("attention_int8", arguments, NATIVE_ROWS["attention_int8"](*arguments))


@EVERY_ISA
@DTYPES
def test_quantization_of_every_kind_of_token(dtype: torch.dtype, isa: str) -> None:
    x = testing.random_activations(12, 67, dtype=dtype)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for row, value in enumerate((math.nan, math.inf, -math.inf, largest, -largest, smallest, smallest / 8)):
        x[row, 66 - row] = value
    x[6:10] *= torch.tensor([[1e-38], [0.0], [-0.0], [1e-44]], dtype=dtype)
    assert_matches_reference("quantize_per_token", (x,), NATIVE_ROWS["quantize_per_token"](x))


@EVERY_ISA
def test_ties_are_rounded_to_even(isa: str) -> None:
    x = torch.arange(-127, 128).float()[None] / 2
    x = torch.cat([x, torch.tensor([[127.0]])], dim=1)
    codes, scale = NATIVE_ROWS["quantize_per_token"](x)
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
    gamma, beta = torch.randn(k, generator=generator), torch.randn(k, generator=generator)
    arguments = (y, residual, gamma, beta, 1e-12)
    assert_matches_reference("add_layer_norm_quantize", arguments, NATIVE_ROWS["add_layer_norm_quantize"](*arguments))


@EVERY_ISA
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_spoils_its_own_token(bad: float, isa: str) -> None:
    y, residual, gamma, beta, eps = random_arguments("add_layer_norm_quantize", 5, 1, 70)
    expected = NATIVE_ROWS["add_layer_norm_quantize"](y, residual, gamma, beta, eps)
    y[1, 69], residual[3, 0] = bad, bad
    out, codes, scale = NATIVE_ROWS["add_layer_norm_quantize"](y, residual, gamma, beta, eps)
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
    y, residual, gamma, beta, eps = random_arguments("add_layer_norm_quantize", 9, 1, 83)
    arguments = (y.to(y_dtype), residual.to(dtype), gamma.to(y_dtype), beta.to(dtype), eps)
    assert_matches_reference("add_layer_norm_quantize", arguments, NATIVE_ROWS["add_layer_norm_quantize"](*arguments))


# ---- the same bits --------------------------------------------------------------------------------------------------


@DTYPES
@CASES
def test_instruction_sets_give_the_same_bits(
    operation: str, scheme: str | None, per_token: bool, dtype: torch.dtype
) -> None:
    before, found = _cpu.isa(), []
    t, n, k = 75, 3, _fit(scheme, 77)
    arguments = random_arguments(operation, t, n, k, dtype=dtype, scheme=scheme, per_token=per_token)
    for isa in ISAS:
        _cpu.use_isa(isa)
        found.append(NATIVE_ROWS[operation](*arguments))
    _cpu.use_isa(before)
    for each in found[1:]:
        _assert_same_bits(each, found[0])


@CASES
def test_thread_counts_give_the_same_bits(
    operation: str, scheme: str | None, per_token: bool, threads: Callable[[int], None]
) -> None:
    """Large enough for several tasks a thread."""
    t, n, k = (420, 4, 32) if operation in ATTENTIONS else (700, 50, _fit(scheme, 250))
    arguments = random_arguments(operation, t, n, k, scheme=scheme, per_token=per_token)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(NATIVE_ROWS[operation](*arguments))
    for each in found[1:]:
        _assert_same_bits(each, found[0])


@EVERY_ISA
@pytest.mark.parametrize("per_token", [False, True], ids=["static", "per-token"])
def test_a_sequence_does_not_see_its_neighbours(per_token: bool, isa: str) -> None:
    lengths = [5, 70, 1, 16, 33]
    qkv, scales, bounds, *rest = _attention_arguments(lengths, 3, 32, per_token=per_token)
    together = NATIVE_ROWS["attention_int8"](qkv, scales, bounds, *rest)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = torch.tensor([0, stop - start], dtype=torch.int32)
        own_scales = scales[start:stop] if per_token else scales
        _assert_same_bits(
            NATIVE_ROWS["attention_int8"](qkv[start:stop], own_scales, alone, *rest), together[start:stop]
        )


# ---- scales that are none -------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("operation", ATTENTIONS)
def test_a_bad_scale_spoils_its_own_sequence(operation: str, which: int, isa: str) -> None:
    """The row of a query; of a key or a value all rows that see it. Codes have no NaN: there it is 0."""
    arguments = _attention_arguments([20, 40, 3], 2, 32, per_token=True)
    if operation == "attention_int8_requant":
        arguments[5] = 0.5
    expected = NATIVE_ROWS[operation](*arguments)
    arguments[1] = arguments[1].clone()
    arguments[1][30, which] = math.nan
    result = NATIVE_ROWS[operation](*arguments)
    spoiled = [30] if which == 0 else list(range(20, 60))
    kept = [row for row in range(63) if row not in spoiled]
    bad = result[spoiled]
    assert not bool(bad.any()) if operation == "attention_int8_requant" else bool(bad.isnan().all())
    _assert_same_bits(result[kept], expected[kept])
    assert_matches_reference(operation, arguments, result)


@EVERY_ISA
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_a_bad_static_scale_spoils_everything(which: int, isa: str) -> None:
    arguments = _attention_arguments([20, 3], 2, 32, per_token=False)
    arguments[1][which] = math.nan
    assert bool(NATIVE_ROWS["attention_int8"](*arguments).isnan().all())


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", LOOK_UPS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_ids_of_any_shape(operation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ids, *rest = random_arguments(operation, math.prod(shape), 19, 64)
    ids = ids.view(shape).to(dtype)
    rows = NATIVE_ROWS[operation](ids, *rest)
    assert rows.shape == (*shape, 64)
    assert torch.equal(rows, ops.reference_of(operation)(ids, *rest))


@pytest.mark.parametrize("operation", LOOK_UPS)
@pytest.mark.parametrize("bad", [-1, 19, 2**40])
def test_ids_outside_are_named(operation: str, bad: int) -> None:
    ids, *rest = random_arguments(operation, 6, 19, 64)
    ids[4] = bad
    with pytest.raises(QBertError, match=f"id {bad} is out of range; the table has 19 rows"):
        NATIVE_ROWS[operation](ids, *rest)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["word", "position", "token type"])
def test_every_kind_of_id_is_checked(which: int) -> None:
    arguments = list(random_arguments("embed_layer_norm_quantize", 6, 19, 64))
    arguments[which] = arguments[which].clone()
    arguments[which][5] = 1000
    with pytest.raises(QBertError, match="id 1000 is out of range"):
        NATIVE_ROWS["embed_layer_norm_quantize"](*arguments)


@pytest.mark.parametrize("damage", ["column", "negative column", "row pointer", "descending"])
def test_damaged_outliers_are_refused(damage: str) -> None:
    """Only of rows that are looked up: the others are not read."""
    _, qdata, codebook, rowptr, col, delta, *rest = random_arguments("gobo_embedding", 8, 19, 256)
    busiest = int(rowptr.diff().argmax())
    rowptr, col = rowptr.clone(), col.clone()
    if damage in ("column", "negative column"):
        col[rowptr[busiest]] = 256 if damage == "column" else -1
    else:
        rowptr[busiest + 1] = delta.numel() + 1 if damage == "row pointer" else rowptr[busiest] - 1
    others = torch.tensor([row for row in range(19) if row not in (busiest, busiest + 1)])
    assert NATIVE_ROWS["gobo_embedding"](others, qdata, codebook, rowptr, col, delta, *rest).shape == (len(others), 256)
    with pytest.raises(QBertError, match="outliers are damaged"):
        NATIVE_ROWS["gobo_embedding"](torch.tensor([0, busiest]), qdata, codebook, rowptr, col, delta, *rest)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 12], [0, 7, 5, 12], [0, 13], [], [12]], ids=str)
def test_bounds_that_do_not_cover_are_named(bounds: list[int]) -> None:
    arguments = _attention_arguments([12], 2, 32, per_token=False)
    arguments[2] = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises((QBertError, RuntimeError), match="cu_seqlens must"):
        NATIVE_ROWS["attention_int8"](*arguments)


@pytest.mark.parametrize("softmax_scale", [0.0, -0.125, math.nan, math.inf])
def test_a_softmax_scale_that_is_none_is_named(softmax_scale: float) -> None:
    arguments = _attention_arguments([12], 2, 32, per_token=False)
    arguments[4] = softmax_scale
    with pytest.raises(QBertError, match=f"softmax_scale is {softmax_scale}; allowed"):
        NATIVE_ROWS["attention_int8"](*arguments)


def test_sums_that_could_overflow_are_refused() -> None:
    t = _cpu.MAX_ATTENTION_TERMS + 1
    arguments = [
        torch.zeros(t, 3, dtype=torch.int8), torch.ones(3), torch.tensor([0, t], dtype=torch.int32), 1, 1.0, torch.float32,
    ]  # fmt: skip
    with pytest.raises(QBertError, match=f"attention over {t} tokens"):
        NATIVE_ROWS["attention_int8"](*arguments)
    arguments[2] = torch.tensor([0, t // 2, t], dtype=torch.int32)  # not longer than allowed, each of them
    arguments[0] = arguments[0][:0].expand(0, 3)
    arguments[2] = torch.tensor([0, 0, 0], dtype=torch.int32)
    assert NATIVE_ROWS["attention_int8"](*arguments).shape == (0, 1)


def test_strided_arguments() -> None:
    x = testing.random_activations(9, 160)
    for strided in (x[:, ::2], x[:, 3:70], x[::2], x.t()[:50], x[:1].expand(4, 160)):
        _assert_same_bits(
            NATIVE_ROWS["quantize_per_token"](strided), NATIVE_ROWS["quantize_per_token"](strided.clone())
        )
    arguments = random_arguments("add_layer_norm_quantize", 9, 1, 40)
    wide = [each.repeat_interleave(2, -1)[..., ::2] if isinstance(each, Tensor) else each for each in arguments]
    _assert_same_bits(NATIVE_ROWS["add_layer_norm_quantize"](*wide), NATIVE_ROWS["add_layer_norm_quantize"](*arguments))
    qkv, *rest = _attention_arguments([9], 2, 32, per_token=True)
    wide_qkv = torch.cat([qkv, qkv], dim=1)[:, : qkv.shape[1]]
    _assert_same_bits(NATIVE_ROWS["attention_int8"](wide_qkv, *rest), NATIVE_ROWS["attention_int8"](qkv, *rest))


def test_outputs_are_on_the_cpu_whatever_the_defaults_are() -> None:
    x = testing.random_activations(3, 20)
    expected = NATIVE_ROWS["quantize_per_token"](x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            _assert_same_bits(NATIVE_ROWS["quantize_per_token"](x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("operation", ["w4_embedding", "gobo_embedding", "embed_layer_norm_quantize"])
def test_layouts_of_others_are_left_to_torch(operation: str) -> None:
    scheme = schemes_of(operation)[-1]
    arguments = random_arguments(operation, 5, 19, _fit(scheme, 64), layout=Layout.BYTES, scheme=scheme)
    assert NATIVE_ROWS[operation](*arguments) is NotImplemented
    assert_matches_reference(operation, arguments, getattr(torch.ops.qbert, operation)(*arguments))


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
    t, float_type = 3, ops.FLOAT_DTYPES.index(dtype)
    y, residual, gamma, beta, eps = random_arguments("add_layer_norm_quantize", t, 1, k, dtype=dtype)
    gamma, beta = gamma.float(), beta.float()
    out, codes, scale = Guarded((t, k), dtype), Guarded((t, k), torch.int8), Guarded((t,), torch.float32)
    _cpu.add_norm_rows(
        y.data_ptr(), float_type, residual.data_ptr(), float_type, gamma.data_ptr(), beta.data_ptr(), eps,
        out.address, codes.address, scale.address, t, k, 1,
    )  # fmt: skip
    expected = NATIVE_ROWS["add_layer_norm_quantize"](y, residual, gamma, beta, eps)
    for guarded, want in zip((out, codes, scale), expected, strict=True):
        guarded.check(want)
    codes, scale = Guarded((t, k), torch.int8), Guarded((t,), torch.float32)
    _cpu.quantize_rows(y.data_ptr(), k, float_type, codes.address, scale.address, t, k, 1)
    for guarded, want in zip((codes, scale), reference.quantize_per_token(y), strict=True):
        guarded.check(want)


@EVERY_ISA
@DTYPES
@pytest.mark.parametrize("head_dim", [1, 15, 17, 64])
def test_attention_writes_nothing_beyond_its_result(head_dim: int, dtype: torch.dtype, isa: str) -> None:
    qkv, scales, bounds, heads, softmax_scale, _ = _attention_arguments([7, 20], 2, head_dim, per_token=False)
    expected = NATIVE_ROWS["attention_int8"](qkv, scales, bounds, heads, softmax_scale, dtype)
    out = Guarded((27, 2 * head_dim), dtype)
    float_type = ops.FLOAT_DTYPES.index(dtype)
    addresses = (qkv.data_ptr(), scales.data_ptr(), False, bounds.data_ptr())
    assert _cpu.attention(*addresses, 2, 27, heads, head_dim, softmax_scale, out.address, float_type, 1.0, 1)
    out.check(expected)


def test_a_residual_may_be_written_over() -> None:
    """The fused encoder keeps one residual stream."""
    y, residual, gamma, beta, eps = random_arguments("add_layer_norm_quantize", 40, 1, 100)
    expected = NATIVE_ROWS["add_layer_norm_quantize"](y, residual, gamma, beta, eps)
    codes, scale = torch.empty(40, 100, dtype=torch.int8), torch.empty(40)
    _cpu.add_norm_rows(
        y.data_ptr(), 0, residual.data_ptr(), 0, gamma.data_ptr(), beta.data_ptr(), eps, residual.data_ptr(),
        codes.data_ptr(), scale.data_ptr(), 40, 100, 1,
    )  # fmt: skip
    _assert_same_bits((residual, codes, scale), expected)
