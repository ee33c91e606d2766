"""Every operator, the same tests: reference, opcheck, compile, export, batch invariance, errors. CPU here."""

from __future__ import annotations

import functools
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qbert import ops, testing
from qbert.errors import QBertError
from qbert.formats import SCHEMES, Role
from qbert.ops import call, checked_run, reference, reference_kernels, table
from qbert.ops.abi import Activation
from qbert.ops.cpu import by_torch
from qbert.ops.kernel import problem_of
from qbert.ops.operations import (
    FLOAT_TABLE,
    OPERATIONS,
    Attention,
    Linear,
    QuantizeRows,
    operation_of,
)
from qbert.target import cpu_target
from qbert.testing import assert_matches_reference, random_problem, schemes_of
from qbert.weight import Layout, Weight
from qbert.weight.layout import PANEL_LAYOUTS, layouts_of, panels

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A kind of problem: an operation, and what `random_problem` is told of it."""

    operation: str
    scheme: str | None = None
    int8_out: bool = False

    def __str__(self) -> str:
        return "-".join([self.operation, *([self.scheme] if self.scheme else []), *["int8"] * self.int8_out])

    def draw(self, t: int, n: int, k: int, **options: Any) -> Any:
        """A random problem; k is rounded up to whole groups."""
        scheme = options.setdefault("scheme", self.scheme)
        return random_problem(self.operation, t, n, _fit(scheme, k), int8_out=self.int8_out, **options)


QUANTIZE, ADD_NORM, LINEAR_ADD_NORM = Case("quantize_rows"), Case("add_norm"), Case("linear_add_norm", "w8a8")
W8A8, W4A8, GOBO_A8 = INTEGER_LINEARS = [Case("linear", scheme) for scheme in ("w8a8", "w4a8", "gobo3a8")]
INT8_LINEARS = [replace(case, int8_out=True) for case in INTEGER_LINEARS]
W8A16, W4A16, GOBO = FLOAT_LINEARS = [Case("linear", scheme) for scheme in ("w8a16", "w4a16", "gobo3")]
LINEARS = [*INTEGER_LINEARS, *INT8_LINEARS, *FLOAT_LINEARS]
W8, W4, GOBO_TABLE = EMBEDDINGS = [Case("embedding", scheme) for scheme in ("w8", "w4", "gobo3")]
ATTENTION, ATTENTION_INT8 = ATTENTIONS = [Case("attention"), Case("attention", int8_out=True)]
EMBED_NORM = Case("embed_norm", "gobo3")
CASES = [QUANTIZE, *LINEARS, *EMBEDDINGS, *ATTENTIONS, ADD_NORM, EMBED_NORM, LINEAR_ADD_NORM]
# (t, n, k): no token, one of everything, odd ones, more than one tile. Int4 takes the next k that its groups divide.
SIZES = [(0, 3, 17), (1, 1, 1), (3, 17, 1023), (17, 3, 64), (33, 20, 100)]
DTYPES = pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES, ids=str)
PER_TOKEN = pytest.mark.parametrize("per_token", [False, True], ids=["static", "per-token"])
# What the dispatcher runs, and torch's implementation, which runs where there is no extension.
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["operator", "torch"], indirect=True)


def of(cases: Sequence[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(field=value)`: what this process takes its CPU for, for as long as the test runs."""

    def change(**fields: Any) -> None:
        target = replace(table.target_of(CPU), **fields)
        monkeypatch.setattr(table, "target_of", lambda device: target)

    return change


@pytest.fixture
def implementation(request: pytest.FixtureRequest, machine: Callable[..., None]) -> str:
    if request.param == "torch":
        machine(native=False)
    return request.param


def _fit(scheme: str | None, k: int) -> int:
    size = SCHEMES[scheme].group_size if scheme in SCHEMES else None
    return -(-k // size) * size if size else k


def _in_every_layout() -> Iterator[Any]:
    """Every operation with every scheme and layout that it reads, and every kind of result."""
    for operation in OPERATIONS:
        for scheme in schemes_of(operation) or [None]:
            integer = operation == "attention" or (operation == "linear" and SCHEMES[scheme].activation is not None)
            for layout in layouts_of(SCHEMES[scheme]) if scheme else [Layout.PLAIN]:
                for int8_out in (False, True) if integer else (False,):
                    case = Case(operation, scheme, int8_out)
                    yield pytest.param(case, layout, id=f"{case}-{layout.value}")


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of results, a record or a weight."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Weight):
        return list(value.tensors.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, list | tuple) else []


def _assert_same_bits(actual: Any, expected: Any) -> None:
    for got, want in zip(_tensors(actual), _tensors(expected), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def _changed(problem: Any, **values: Any) -> Any:
    """The record with other fields; names that are none of them are of its weight's tensors."""
    fields = {name: value for name, value in values.items() if name in problem._fields}
    tensors = {name: value for name, value in values.items() if name not in fields}
    if tensors:
        field = "weight" if "weight" in problem._fields else "words"
        held = getattr(problem, field)
        assert set(tensors) <= set(held.tensors)
        fields[field] = Weight(held.scheme, held.shape, held.layout, {**held.tensors, **tensors})
    return problem._replace(**fields)


def _norm_changed(problem: Any, **values: Any) -> Any:
    return problem._replace(norm=problem.norm._replace(**values))


def _call_flat(problem: Any, **values: Any) -> Any:
    """The operator, with other arguments by the names of its schema."""
    operation = operation_of(problem)
    names = [argument.name for argument in _operator(operation.name).default._schema.arguments]
    assert set(values) <= set(names)
    flat = operation.flatten(problem)
    return _operator(operation.name)(*(values.get(name, value) for name, value in zip(names, flat, strict=True)))


def _operator(operation: str) -> Any:
    return getattr(torch.ops.qbert, operation)


def _bind(problem: Any) -> tuple[Callable[..., Any], list[Any]]:
    """The operator as a function of its tensors alone; `None`, names, types and numbers are constants in it."""
    operation = operation_of(problem)
    flat = operation.flatten(problem)
    places = [at for at, value in enumerate(flat) if isinstance(value, Tensor | list)]

    def function(*tensors: Any) -> Any:
        values = list(flat)
        for at, value in zip(places, tensors, strict=True):
            values[at] = value
        return _operator(operation.name)(*values)

    return function, [flat[at] for at in places]


# ---- the operators themselves ---------------------------------------------------------------------------------------


def test_every_operation_is_registered_and_tested_here() -> None:
    assert {case.operation for case in CASES} == set(OPERATIONS)
    for operation in OPERATIONS:
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qbert::{operation}", key), (operation, key)


def test_every_scheme_has_an_operation() -> None:
    """A problem can be drawn for every scheme, so no scheme goes untested below."""
    assert {scheme for operation in OPERATIONS for scheme in schemes_of(operation)} == set(SCHEMES)


def test_float_sums_of_1024_products_are_exact() -> None:
    """The limits that `by_torch` relies on, from the limits of the formats."""
    assert by_torch.EXACT_FLOAT32_TERMS * 128 * 128 <= 2**24
    assert by_torch.EXACT_PROBABILITY_TERMS * reference.PROBABILITY_MAX * 128 <= 2**24
    assert ops.MAX_K * 127 * 127 < 2**31 <= (ops.MAX_K + 1) * 127 * 127


@of(CASES)
def test_past_the_dispatcher_runs_the_same(case: Case) -> None:
    problem = case.draw(7, 6, 64)
    _assert_same_bits(checked_run(problem), call(problem))


# ---- against the reference ------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("size", SIZES, ids=str)
@of(CASES)
@IMPLEMENTATION
def test_matches_reference(implementation: str, case: Case, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    problem = case.draw(*size, seed=size[0], dtype=dtype)
    assert_matches_reference(problem, call(problem))


@pytest.mark.parametrize(("case", "layout"), list(_in_every_layout()))
@IMPLEMENTATION
def test_matches_reference_in_every_layout(implementation: str, case: Case, layout: Layout) -> None:
    problem = case.draw(5, 17, 72, layout=layout)
    assert_matches_reference(problem, call(problem))


@DTYPES
@pytest.mark.parametrize("activation", list(Activation), ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@of(LINEARS)
def test_linears_with_bias_and_activation(case: Case, bias: bool, activation: Activation, dtype: torch.dtype) -> None:
    problem = case.draw(7, 17, 128, dtype=dtype, bias=bias, activation=activation)
    y = call(problem)
    assert_matches_reference(problem, y)
    same = (
        {activation} if activation not in (gelus := {Activation.GELU, Activation.GELU_TANH}) else gelus
    )  # to a few codes
    for other in set(Activation) - same:  # the activation is not a name that is only carried along
        assert not torch.equal(y, call(problem._replace(activation=other)))


@pytest.mark.parametrize("bias_dtype", ops.FLOAT_DTYPES, ids=str)
@of([*LINEARS, LINEAR_ADD_NORM])
def test_bias_of_another_type_than_the_result(case: Case, bias_dtype: torch.dtype) -> None:
    problem = case.draw(3, 17, 64, dtype=torch.bfloat16)
    problem = problem._replace(bias=problem.bias.to(bias_dtype))
    assert_matches_reference(problem, call(problem))


@DTYPES
def test_quantize_rows_of_every_kind_of_token(dtype: torch.dtype) -> None:
    """Bad tokens, zeros, denormals and the largest values, beside each other."""
    x = testing.random_activations(12, 67, dtype=dtype)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for row, value in enumerate((math.nan, math.inf, -math.inf, largest, -largest, smallest, smallest / 8)):
        x[row, 5] = value
    x[6:10] *= torch.tensor([[1e-38], [0.0], [-0.0], [1e-44]], dtype=dtype)
    for rows in (x, x[3:], x[:3], x[1:2], x[6:10]):
        assert_matches_reference(QuantizeRows(rows), call(QuantizeRows(rows)))


@of([QUANTIZE, ADD_NORM, LINEAR_ADD_NORM, *LINEARS])
def test_strided_activations(case: Case) -> None:
    problem = case.draw(5, 17, 64)
    expected, changed = call(problem), 0
    for name, value in problem._asdict().items():
        if isinstance(value, Tensor) and value.dim() == 2:
            wide = value.new_zeros(5, 2 * value.shape[1])
            wide[:, ::2] = value
            _assert_same_bits(call(problem._replace(**{name: wide[:, ::2]})), expected)
            changed += 1
    assert changed


@of(CASES)
def test_arguments_are_left_as_they_are(case: Case) -> None:
    problem = case.draw(5, 17, 64)
    before = [tensor.clone() for tensor in _tensors(problem)]
    call(problem)
    _assert_same_bits(problem, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
@of(EMBEDDINGS)
def test_ids_of_any_shape(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = case.draw(math.prod(shape), 19, 64)
    problem = problem._replace(ids=problem.ids.view(shape).to(dtype))
    rows = call(problem)
    assert rows.shape == (*shape, 64)
    assert torch.equal(rows, reference.embedding(problem))


def test_an_embedding_patches_rows_asked_for_twice_once() -> None:
    """Outliers are added to the rows of the result: a repeated id has its own copy of its row."""
    problem = GOBO_TABLE.draw(1, 9, 256)
    counts = problem.weight.sparse.rowptr.diff()
    busiest = int(counts.argmax())
    assert int(counts[busiest]) > 1
    problem = problem._replace(ids=torch.tensor([busiest, 8, busiest, 0, busiest]))
    assert torch.equal(call(problem), reference.embedding(problem))


# ---- integers are exact ---------------------------------------------------------------------------------------------


def _unit_scales(case: Case, q: Tensor, operand: Tensor) -> Linear:
    """An integer linear whose result is its int32 sums as float32."""
    (t, k), n = q.shape, operand.shape[0]
    tensors = {
        "w8a8": (operand, torch.ones(n)),
        "w4a8": (operand, torch.ones(n), torch.ones(n, k // 64, dtype=torch.uint8)),
        "gobo3a8": (
            operand, torch.arange(8, dtype=torch.int8), torch.ones(1), torch.zeros(n + 1, dtype=torch.int32),
            torch.zeros(0, dtype=torch.int16), torch.zeros(0),
        ),
    }[case.scheme or ""]  # fmt: skip
    layout = Layout.PLAIN if case == W8A8 else Layout.INT8_EXPANDED
    weight = Weight.of(tensors, SCHEMES[case.scheme or ""], layout, k)
    return Linear(q, torch.ones(t), weight, None, Activation.NONE, False, torch.float32)


def _exact_sums(q: Tensor, operand: Tensor) -> Tensor:
    return torch.from_numpy(q.numpy().astype("int64") @ operand.numpy().astype("int64").T)


@pytest.fixture(params=["int_mm", "float32-chunks"])
def integer_product(
    request: pytest.FixtureRequest, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Both ways a CPU multiplies int8 matrices; the one for CPUs without VNNI must not touch `_int_mm`."""
    if request.param == "int_mm":
        if not cpu_target().int_mm_exact:
            pytest.skip("torch._int_mm saturates on this CPU")
        return by_torch.INT_MM
    machine(int_mm_exact=False)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("torch._int_mm was called where it saturates")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    return by_torch.FLOAT32_CHUNKS


@pytest.mark.parametrize("size", [*SIZES, (2, 5, 1024), (2, 5, 1025), (1, 3, 4099)], ids=str)
@pytest.mark.parametrize("values", ["random", "127", "mixed", "-128"])
def test_int8_product_is_exact(size: tuple[int, int, int], values: str, integer_product: str) -> None:
    """Extreme values over more terms than float32 could add up exactly in one go."""
    t, n, k = size
    generator = torch.Generator().manual_seed(k)
    if values == "random":
        q, w = (torch.randint(-127, 128, (rows, k), generator=generator).to(torch.int8) for rows in (t, n))
    elif values == "mixed":  # +-127 with alternating signs, each the other's opposite in the last row
        q, w = ((torch.randint(2, (rows, k), generator=generator) * 254 - 127).to(torch.int8) for rows in (t, n))
    else:
        q, w = (torch.full((rows, k), int(values), dtype=torch.int8) for rows in (t, n))
        q[1:2], w[1:2] = -127, -127
    row = next(each for each in table.KERNELS["linear"] if each.name == integer_product)
    product = row.call(_unit_scales(W8A8, q, w))
    assert product.dtype == torch.float32
    assert torch.equal(product, _exact_sums(q, w).to(torch.float32))


@pytest.mark.parametrize("k", [17, 1023, 2304])
@of(INTEGER_LINEARS)
@IMPLEMENTATION
def test_integer_linears_sum_exactly(implementation: str, case: Case, k: int, integer_product: str) -> None:
    """With unit scales a linear is its int32 sums, rounded to float32 once."""
    generator, k = torch.Generator().manual_seed(k), _fit(case.scheme, k)
    q, operand = ((torch.randint(2, (rows, k), generator=generator) * 254 - 127).to(torch.int8) for rows in (3, 17))
    q[0], operand[0] = 127, 127
    assert torch.equal(call(_unit_scales(case, q, operand)), _exact_sums(q, operand).to(torch.float32))


@of(INTEGER_LINEARS + INT8_LINEARS)
def test_float32_chunks_give_the_bits_of_int_mm(case: Case, machine: Callable[..., None]) -> None:
    problem, exact = case.draw(17, 19, 1152, activation="gelu"), cpu_target().int_mm_exact
    machine(native=False, int_mm_exact=False)
    chunks = call(problem)
    if not exact:
        pytest.skip("torch._int_mm saturates on this CPU")
    machine(int_mm_exact=True)
    _assert_same_bits(chunks, call(problem))


@pytest.mark.parametrize(
    ("case", "layout"),
    [each for each in _in_every_layout() if each.values[0].operation in ("linear", "linear_add_norm")],
)
def test_layout_does_not_change_a_bit(case: Case, layout: Layout, machine: Callable[..., None]) -> None:
    """Of torch's implementation; sizes that leave the last panel and block of columns open, where the groups allow it."""
    machine(native=False)
    _assert_same_bits(call(case.draw(5, 37, 165, layout=layout)), call(case.draw(5, 37, 165)))


@pytest.mark.parametrize("int8_out", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_stacked_dictionaries_give_the_bits_of_separate_products(int8_out: bool, scheme: str, rows: int) -> None:
    """A merged query, key and value: three dictionaries and scales, rows that a panel of 16 shares or not."""
    case = Case("linear", scheme, int8_out)
    plain = case.draw(5, 3 * rows, 100, matrices=3)
    for layout in layouts_of(SCHEMES[scheme]):
        problem = plain._replace(weight=plain.weight.to_layout(layout))
        _assert_same_bits(problem, case.draw(5, 3 * rows, 100, layout=layout, matrices=3))
        y = call(problem)
        assert_matches_reference(problem, y)
        for part, y_part in enumerate(y.split(rows, dim=1)):
            alone = _one_of_stacked(plain.weight, part, rows).to_layout(layout)
            bias = plain.bias[part * rows : (part + 1) * rows]
            _assert_same_bits(call(plain._replace(weight=alone, bias=bias)), y_part)


def _one_of_stacked(weight: Weight, part: int, rows: int) -> Weight:
    held, first = weight.tensors, part * rows
    rowptr = held["outlier_rowptr"][first : first + rows + 1]
    own = slice(int(rowptr[0]), int(rowptr[-1]))
    tensors = {
        "qdata": held["qdata"][first : first + rows],
        "codebook": held["codebook"][part],
        "scale": held["scale"][part : part + 1],
        "outlier_rowptr": rowptr - rowptr[0],
        "outlier_col": held["outlier_col"][own],
        "outlier_delta": held["outlier_delta"][own],
    }
    return Weight(weight.scheme, (rows, weight.k), Layout.PLAIN, tensors)


# ---- attention and look-ups of their own ----------------------------------------------------------------------------


@DTYPES
@PER_TOKEN
@of(ATTENTIONS)
@pytest.mark.parametrize("size", [(0, 2, 8), (1, 1, 1), (65, 3, 33), (200, 2, 64)], ids=str)
@IMPLEMENTATION
def test_attention(
    implementation: str, case: Case, size: tuple[int, int, int], per_token: bool, dtype: torch.dtype
) -> None:
    problem = case.draw(*size, per_token=per_token, dtype=dtype)
    assert_matches_reference(problem, call(problem))


@of(ATTENTIONS)
@pytest.mark.parametrize("bounds", [[0, 5], [0, 0, 5, 5], [0, 2, 2, 2, 5], [0, 0, 0, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_attention_with_empty_sequences(case: Case, bounds: list[int]) -> None:
    problem = case.draw(5, 2, 8, per_token=True)._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert_matches_reference(problem, call(problem))


@pytest.mark.parametrize(("t", "head_dim"), [(600, 8), (1100, 4), (3, 1100)], ids=str)
def test_attention_of_sums_that_float32_does_not_hold(t: int, head_dim: int) -> None:
    """Equal keys: all probabilities are 255, and odd sums of them times 127 pass 2**24."""
    qkv = torch.full((t, 3 * head_dim), 127, dtype=torch.int8)
    qkv[0, 2 * head_dim] = 126
    problem = Attention(
        qkv, torch.ones(3), torch.tensor([0, t], dtype=torch.int32), 1, 1e-6, None, None, None, torch.float32
    )
    out = call(problem)
    exact = torch.tensor([(127 * t - 1) / t, *[127.0] * (head_dim - 1)], dtype=torch.float64)
    assert float((out - exact).abs().max()) <= 3 * 127 * 2**-24
    assert_matches_reference(problem, out)


@pytest.mark.parametrize("column", [0, 1, 2], ids=["query", "key", "value"])
@of(ATTENTIONS)
def test_a_bad_token_stays_in_its_sequence(case: Case, column: int) -> None:
    """A query's scale spoils its own row, a key's or a value's every row of the sequence; int8 results are code 0 there."""
    problem = case.draw(12, 2, 8, per_token=True)
    problem = problem._replace(cu_seqlens=torch.tensor([0, 3, 7, 7, 12], dtype=torch.int32))
    clean = call(problem)
    scales = problem.scales.clone()
    scales[4, column] = math.nan
    problem = problem._replace(scales=scales)
    out = call(problem)
    assert_matches_reference(problem, out)
    bad = torch.zeros(12, dtype=torch.bool)
    bad[slice(4, 5) if column == 0 else slice(3, 7)] = True
    assert torch.equal(out[~bad], clean[~bad])
    assert not out[bad].any() if case.int8_out else bool(out[bad].isnan().all())


@of([ATTENTION_INT8, *INT8_LINEARS])
def test_an_int8_result_is_the_float_one_with_a_static_scale(case: Case) -> None:
    problem = case.draw(20, 2, 64, per_token=True, activation="none")
    floats = call(problem._replace(out=torch.float32))
    _assert_same_bits(call(problem), reference.to_out(floats, problem.out))


@IMPLEMENTATION
@of(INT8_LINEARS)
@pytest.mark.parametrize("zero", [-127, -115, 3, 127])
def test_an_int8_result_may_have_another_code_of_0(implementation: str, case: Case, zero: int) -> None:
    problem = case.draw(20, 19, 64, activation="gelu")._replace(zero=zero)
    problem.s[3] = math.nan
    codes = call(problem)
    testing.assert_matches_reference(problem, codes)
    assert bool((codes[3] == zero).all())
    floats = call(problem._replace(out=torch.float32, zero=0))
    values = (codes.float() - zero) * problem.out
    inside = (floats > (-127.4 - zero) * problem.out) & (floats < (127.4 - zero) * problem.out)
    assert bool(((values - floats).abs()[inside] <= 0.501 * problem.out).all())
    assert bool(inside.any())
    assert bool((codes[~inside & ~floats.isnan()].abs() == 127).all())


@DTYPES
def test_fused_look_up_of_a_float_table(dtype: torch.dtype) -> None:
    """A word table that was not quantized gives the norm of the plain sum."""
    problem = EMBED_NORM.draw(9, 17, 48, dtype=dtype, scheme=FLOAT_TABLE)
    result = call(problem)
    assert_matches_reference(problem, result)
    ids, position_ids, token_type_ids, words, positions, types, (gamma, beta, eps) = problem
    total = words[ids].float() + types[token_type_ids].float() + positions[position_ids].float()
    expected = torch.nn.functional.layer_norm(total, (48,), gamma.float(), beta.float(), eps)
    torch.testing.assert_close(result[1] * result[2][:, None], expected, rtol=0, atol=float(expected.abs().max()) / 250)


# ---- a result does not depend on the batch it came in ---------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("size", [(9, 17, 1023), (33, 100, 192), (5, 768, 64)], ids=str)
@of([QUANTIZE, ADD_NORM, LINEAR_ADD_NORM, *INTEGER_LINEARS, *INT8_LINEARS])
def test_a_token_alone_is_the_token_in_a_batch(case: Case, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    problem, t = case.draw(*size, dtype=dtype, activation="gelu"), size[0]
    whole = _tensors(call(problem))
    tokens = {name: value for name, value in problem._asdict().items() if name in ("x", "s", "y", "residual")}
    for first, last in [(0, 1), (t // 2, t // 2 + 1), (t - 1, t), (1, 4)]:
        part = problem._replace(**{name: value[first:last] for name, value in tokens.items()})
        _assert_same_bits(call(part), [each[first:last] for each in whole])


@of([EMBED_NORM, *EMBEDDINGS])
def test_a_looked_up_row_alone_is_the_row_in_a_batch(case: Case) -> None:
    problem = case.draw(9, 17, 128)
    whole = _tensors(call(problem))
    ids = {name: value for name, value in problem._asdict().items() if name.endswith("ids")}
    for token in (0, 4, 8):
        part = problem._replace(**{name: value[token : token + 1] for name, value in ids.items()})
        _assert_same_bits(call(part), [each[token : token + 1] for each in whole])


@DTYPES
@PER_TOKEN
@of(ATTENTIONS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 32), (3, 64), (1, 5)])
def test_a_sequence_alone_is_the_sequence_in_a_pack(
    case: Case, heads: int, head_dim: int, per_token: bool, dtype: torch.dtype
) -> None:
    lengths = [7, 1, 33, 0, 12]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    problem = case.draw(sum(lengths), heads, head_dim, dtype=dtype, per_token=per_token)._replace(cu_seqlens=bounds)
    packed = call(problem)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = problem._replace(
            qkv=problem.qkv[start:stop].clone(),
            scales=problem.scales[start:stop] if per_token else problem.scales,
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        )
        _assert_same_bits(call(alone), packed[start:stop])


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@of(LINEARS)
def test_a_bad_token_stays_in_its_row(case: Case, bad: float) -> None:
    problem = case.draw(5, 17, 64, activation="gelu")
    clean = call(problem)
    x = testing.random_activations(5, 64)
    x[2, 7] = bad
    floats = problem.s is None
    tokens = (x, None) if floats else call(QuantizeRows(x))
    problem = problem._replace(x=tokens[0], s=tokens[1])
    y = call(problem)
    others = [0, 1, 3, 4]
    assert_matches_reference(problem, y)
    assert torch.equal(y[others], clean[others])
    if case.int8_out:
        assert not y[2].any()
    elif math.isnan(bad) or not floats:
        assert bool(y[2].isnan().all())


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def _opcheck(problem: Any) -> None:
    operation = operation_of(problem)
    torch.library.opcheck(_operator(operation.name).default, operation.flatten(problem))


def _for_machinery(case: Case) -> Any:
    return case.draw(3, 5, 64, activation="gelu" if case.operation == "linear" else "none")


@of(CASES)
def test_opcheck(case: Case) -> None:
    _opcheck(_for_machinery(case))


@of(CASES)
def test_fake_tells_type_shape_and_strides(case: Case) -> None:
    """On meta tensors, for sizes that share nothing: a swapped n and k would show."""
    for t, n in ((0, 5), (1, 1), (7, 11)):
        problem = case.draw(t, n, 64, dtype=torch.bfloat16)
        real, fake = _tensors(call(problem)), _tensors(call(testing.to_device(problem, "meta")))
        for got, want in zip(fake, real, strict=True):
            assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())


@of(LINEARS)
def test_opcheck_of_panels(case: Case) -> None:
    """Rows are not visible in panels; fakes and traces must find them elsewhere."""
    layout = layouts_of(SCHEMES[case.scheme or ""])[-1]
    assert layout in PANEL_LAYOUTS
    _opcheck(case.draw(3, 5, 64, layout=layout))


@pytest.mark.parametrize(("case", "layout"), list(_in_every_layout()))
def test_fake_tells_type_and_shape_in_every_layout(case: Case, layout: Layout) -> None:
    problem = case.draw(3, 21, 72, layout=layout)
    real, fake = _tensors(call(problem)), _tensors(call(testing.to_device(problem, "meta")))
    assert [(each.dtype, each.shape) for each in fake] == [(each.dtype, each.shape) for each in real]


@of(ATTENTIONS)
def test_opcheck_of_attention_with_a_scale_for_each_token(case: Case) -> None:
    _opcheck(case.draw(6, 2, 8, per_token=True))


def test_opcheck_of_stacked_dictionaries_and_of_a_float_table() -> None:
    _opcheck(GOBO_A8.draw(3, 6, 64, matrices=3))
    _opcheck(EMBED_NORM.draw(3, 6, 64, scheme=FLOAT_TABLE))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@of(CASES)
def test_compiles_without_a_graph_break(case: Case, fresh_dynamo: None) -> None:
    function, tensors = _bind(_for_machinery(case))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _assert_same_bits(compiled(*tensors), function(*tensors))


@of(CASES)
def test_exports(case: Case) -> None:
    function, tensors = _bind(_for_machinery(case))

    class Module(torch.nn.Module):
        def forward(self, *tensors: Any) -> Any:
            return function(*tensors)

    program = torch.export.export(Module(), tuple(tensors))
    assert any(f"qbert.{case.operation}" in str(node.target) for node in program.graph.nodes)
    _assert_same_bits(program.module()(*tensors), function(*tensors))


def _layer(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What a W8A8 layer runs, with float operations around it for a compiler to fuse."""
    q, s = call(QuantizeRows(x * 2))
    weight = Weight.of([qdata, scale], SCHEMES["w8a8"], Layout.PLAIN, 40)
    return call(Linear(q, s, weight, bias, Activation.GELU, False, x.dtype)) + 1


def _layer_arguments(t: int) -> tuple[Tensor, ...]:
    a = W8A8.draw(t, 17, 40)
    return (a.x.to(torch.float32) * a.s[:, None], *a.weight.tensors.values(), a.bias)


def test_one_compiled_graph_serves_every_number_of_tokens(fresh_dynamo: None) -> None:
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(*_layer_arguments(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (3, 17, 33):
            _assert_same_bits(compiled(*_layer_arguments(t)), _layer(*_layer_arguments(t)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's CPU code needs g++")
def test_inductor(fresh_dynamo: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(_layer, fullgraph=True)
    _assert_same_bits(compiled(*_layer_arguments(3)), _layer(*_layer_arguments(3)))


def test_the_reference_says_once_that_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    """As it would on a GPU without a kernel for a layout; no GPU is needed for its warning."""
    slow = reference_kernels._logged("some_operation", lambda a: a[0])
    rows, linear = QUANTIZE.draw(2, 1, 3), W4A8.draw(2, 3, 64, layout=Layout.BYTES)
    with caplog.at_level(logging.WARNING, logger="qbert.ops"):
        assert [slow(a) is a[0] for a in (rows, rows, linear, linear)] == [True] * 4
    assert [record.getMessage() for record in caplog.records if "some_operation" in record.getMessage()] == [
        "qbert::some_operation runs as the plain-torch reference on cpu: exact, but slow",
        "qbert::some_operation runs as the plain-torch reference on cpu in bytes: exact, but slow",
    ]


# ---- errors ---------------------------------------------------------------------------------------------------------

INT8_ROW, WIDE = torch.zeros(64, dtype=torch.int8), torch.zeros(3, 133145, dtype=torch.int8)
WRONG_TENSORS: list[tuple[Case, dict[str, Any], str]] = [
    (QUANTIZE, {"x": torch.zeros(3, 64).double()}, "activations are torch.float64; allowed: float32"),
    (QUANTIZE, {"x": torch.zeros(3, 64, dtype=torch.int8)}, "activations are torch.int8; allowed"),
    (QUANTIZE, {"x": torch.zeros(64)}, r"activations must be \(t, k\), got \(64,\)"),
    (W8A8, {"x": torch.zeros(3, 64)}, r"q must be \(t, k\) int8, got torch.float32 \(3, 64\)"),
    (W4A8, {"x": INT8_ROW}, r"q must be \(t, k\) int8, got torch.int8 \(64,\)"),
    (GOBO_A8, {"s": torch.ones(2)}, r"s must be \(3,\) float32, one scale a token, got torch.float32 \(2,\)"),
    (INT8_LINEARS[2], {"s": torch.ones(3, 1)}, r"s must be \(3,\) float32, .* got torch.float32 \(3, 1\)"),
    (W8A8, {"s": torch.ones(3, dtype=torch.float64)}, r"s must be \(3,\) float32.* got torch.float64"),
    (INT8_LINEARS[0], {"x": WIDE}, "above 133144 an int32 sum could"),
    (LINEAR_ADD_NORM, {"x": WIDE}, "above 133144 an int32 sum could"),
    (W8A8, {"s": None}, "scheme w8a8 takes activations as int8 codes with scales"),
    (W4A16, {"s": torch.ones(3)}, "scheme w4a16 takes activations as floats without scales"),
    (W8A16, {"x": torch.zeros(3, 64, dtype=torch.float64)}, "activations are torch.float64; allowed"),
    (W4A16, {"x": torch.zeros(2, 3, 64)}, r"activations must be \(t, k\), got \(2, 3, 64\)"),
    (
        ATTENTION,
        {"qkv": torch.zeros(3, 960).double()},
        r"qkv must be \(t, 3 \* 5 \* head_dim\) int8 or float, got .*960",
    ),
    (ATTENTION, {"heads": 7}, r"qkv must be \(t, 3 \* 7 \* head_dim\) int8"),
    (ATTENTION_INT8, {"heads": 0}, "heads is 0; allowed: 1 or more"),
    (ATTENTION_INT8, {"scales": torch.ones(2, 3)}, r"scales must be .* got torch.float32 \(2, 3\)"),
    (ATTENTION, {"scales": torch.ones(3, 3).double()}, r"scales must be .* got torch.float64 \(3, 3\)"),
    (ATTENTION, {"scales": torch.ones(1)}, r"scales must be \(3,\) or \(3, 3\) float32, got torch.float32 \(1,\)"),
    (ATTENTION, {"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens must be \(sequences \+ 1,\) int32"),
    (W8A8, {"qdata": torch.zeros(5, 60, dtype=torch.int8)}, r"must be \(5, 64\) torch.int8, got .* \(5, 60\)"),
    (LINEAR_ADD_NORM, {"qdata": torch.zeros(5, 60, dtype=torch.int8)}, r"qdata .*must be \(5, 64\) torch.int8, got"),
    (W4A8, {"qdata": torch.zeros(5, 32, dtype=torch.int8)}, r"must be \(5, 32\) torch.uint8, got torch.int8"),
    (W4A8, {"group_scale": torch.ones(5, 3, dtype=torch.uint8)}, r"group_scale .* must be \(5, 1\) torch.uint8, got"),
    (W4A16, {"scale": torch.ones(5, 1)}, r"scale of a w4a16 .* must be \(5, 1\) torch.bfloat16, got torch.float32"),
    (GOBO_A8, {"codebook": torch.zeros(7, dtype=torch.int8)}, r"codebook .* must be \(8,\) torch.int8, got .*\(7,\)"),
    (GOBO_A8, {"codebook": torch.zeros(8)}, r"codebook .* must be \(8,\) torch.int8, got torch.float32"),
    (GOBO_A8, {"codebook": torch.zeros(5, 1, 8).char()}, r"codebook .* must be \(5, 8\) torch.int8, got .*\(5, 1, 8\)"),
    (GOBO_A8, {"codebook": torch.zeros(3, 8).char()}, "5 rows of scheme gobo3a8 do not share 3 codebooks evenly"),
    (GOBO_A8, {"scale": torch.ones(5)}, r"scale .* must be \(1,\) torch.float32, got torch.float32 \(5,\)"),
    (GOBO_A8, {"outlier_rowptr": torch.zeros(5).int()}, r"a gobo3a8 weight \(4, 64\) in .* must be \(4, 24\)"),
    (
        GOBO_A8,
        {"outlier_rowptr": torch.zeros(6).long()},
        r"outlier_rowptr .* must be \(6,\) torch.int32, got torch.int64",
    ),
    (
        GOBO_A8,
        {"outlier_rowptr": torch.zeros(0).int()},
        r"outlier_rowptr of a gobo3a8 weight must be \(n \+ 1,\), got \(0,\)",
    ),
    (GOBO_A8, {"outlier_rowptr": torch.tensor(0).int()}, r"a gobo3a8 weight \(0, 64\) in .* must be \(0, 24\)"),
    (GOBO_A8, {"codebook": torch.tensor(0).char()}, r"codebook .* must be \(8,\) torch.int8, got torch.int8 \(\)"),
    (GOBO_A8, {"outlier_col": torch.tensor(0).short()}, r"outlier_col .* got torch.int16 \(\)"),
    (W8A8, {"scale": torch.tensor(1.0)}, r"a w8a8 weight \(0, 64\) in layout plain must be \(0, 64\)"),
    (GOBO_A8, {"outlier_col": torch.zeros(2).long()}, r"outlier_col .* torch.int16 or torch.int32, got torch.int64"),
    (GOBO_A8, {"outlier_col": torch.zeros(2, 1).short()}, r"outlier_col .* must be \(2,\) .* got torch.int16 \(2, 1\)"),
    (GOBO, {"outlier_delta": torch.zeros(99)}, r"outlier_delta .* must be \(\d,\) torch.float32, got"),
    (GOBO, {"codebook": torch.zeros(2, 8)}, "5 rows of scheme gobo3 do not share 2 codebooks evenly"),
    (GOBO_TABLE, {"codebook": torch.zeros(5, 8)}, "5 rows of scheme gobo3 do not share 5 codebooks evenly"),
    (W4, {"qdata": torch.zeros(5, 30, dtype=torch.uint8)}, r"qdata .* must be \(5, 32\) torch.uint8, got .*\(5, 30\)"),
    (W8, {"out": torch.int8}, "out_dtype is torch.int8; allowed: float32, bfloat16, float16"),
    (ADD_NORM, {"y": torch.zeros(1, 64)}, r"y is \(1, 64\), residual is \(3, 64\)"),
    (ADD_NORM, {"y": torch.zeros(3, 64).char()}, "y is torch.int8; allowed: float32"),
    (ADD_NORM, {"residual": torch.zeros(3, 64).double()}, "residual is torch.float64; allowed: float32"),
    (LINEAR_ADD_NORM, {"residual": torch.zeros(3, 64)}, r"residual must be \(3, 5\) as the result, got \(3, 64\)"),
    (LINEAR_ADD_NORM, {"residual": torch.zeros(3, 5).char()}, "residual is torch.int8; allowed: float32"),
    (EMBED_NORM, {"position_ids": torch.zeros(1).long()}, r"ids is \(3,\), position_ids is"),
    (EMBED_NORM, {"token_type_ids": torch.zeros(5).long()}, r"ids is \(3,\), token_type_ids is"),
    (EMBED_NORM, {"token_types": torch.zeros(2, 1)}, r"token_types must be \(rows, 64\)"),
    (EMBED_NORM, {"positions": torch.zeros(3, 64).double()}, "positions are torch.float64; allowed: float32"),
    (EMBED_NORM, {"words": torch.zeros(5, 60)}, r"words must be \(rows, 64\) as positions are, got \(5, 60\)"),
    (EMBED_NORM, {"words": torch.zeros(5, 64).char()}, "words are torch.int8; allowed: float32"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["cpu", "fake"])
@pytest.mark.parametrize(
    ("case", "changes", "message"),
    WRONG_TENSORS,
    ids=[f"{case}-{next(iter(changes))}" for case, changes, _ in WRONG_TENSORS],
)
def test_wrong_tensors_are_an_error(case: Case, changes: dict[str, Any], message: str, fake: bool) -> None:
    """The same error eagerly and while tracing."""
    problem = _changed(case.draw(3, 5, 64), **changes)
    with pytest.raises((RuntimeError, QBertError), match=message):
        call(testing.to_device(problem, "meta") if fake else problem)


@pytest.mark.parametrize("name", ["gamma", "beta"])
@of([ADD_NORM, EMBED_NORM, LINEAR_ADD_NORM])
def test_a_norm_over_other_columns_is_an_error(case: Case, name: str) -> None:
    problem, k = case.draw(3, 5, 64), 5 if case == LINEAR_ADD_NORM else 64
    for wrong, message in [
        (torch.ones(1), rf"{name} must be \({k},\), got \(1,\)"),
        (torch.ones(k).double(), f"{name} is torch.float64; allowed: float32"),
    ]:
        for each in (problem, testing.to_device(problem, "meta")):
            with pytest.raises(RuntimeError, match=message):
                call(_norm_changed(each, **{name: wrong.to(each[0].device)}))


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        (W8A8, ["plain", "int8_panels"]),
        (W8A16, ["plain", "int8_panels"]),
        (W4A8, ["plain", "bytes", "int8_expanded", "int4_panels"]),
        (W4A16, ["plain", "bytes", "int4_panels"]),
        (GOBO_A8, ["plain", "bytes", "int8_expanded", "int3_panels"]),
        (GOBO, ["plain", "bytes", "int3_panels"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [32, 120, 136, 256])
def test_activations_of_another_width_are_an_error(case: Case, layouts: list[str], k: int) -> None:
    """Packed codes must not be read as more or fewer columns than they hold; panels hold them in whole blocks of 64."""
    for layout in layouts:
        problem = case.draw(3, 5, 128, layout=Layout(layout))
        wide = problem._replace(x=torch.ones(3, k, dtype=problem.x.dtype))
        with pytest.raises(RuntimeError, match=f"activations have {k} columns, the weight has 128"):
            call(wide)
        if layout.endswith("_panels") and panels.padded_k(k) == 128:
            continue
        with pytest.raises((RuntimeError, QBertError)):
            _call_flat(wide, weight_k=k)


@of([*LINEARS, LINEAR_ADD_NORM])
def test_one_bias_is_not_broadcast_to_all_channels(case: Case) -> None:
    with pytest.raises(RuntimeError, match=r"bias must be \(5,\), got \(1,\)"):
        call(case.draw(3, 5, 64)._replace(bias=torch.ones(1)))


@of([case for case in [*LINEARS, LINEAR_ADD_NORM] if case.scheme in ("w8a8", "w4a8", "w8a16", "w4a16")])
def test_one_scale_is_not_broadcast_to_all_channels(case: Case) -> None:
    """How many channels a weight has is what its scales say: of one, these are too many codes."""
    problem = case.draw(3, 5, 64)
    problem = _changed(problem, scale=problem.weight.scale[:1])
    with pytest.raises(RuntimeError, match=rf"qdata of a {case.scheme} weight \(1, 64\) in layout plain must be \(1, "):
        call(problem)


@pytest.mark.parametrize(
    ("case", "layout", "allowed"),
    [
        (W8A8, "bytes", "plain, int8_rows, int8_panels"),
        (INT8_LINEARS[0], "int4_panels", "plain, int8_rows, int8_panels"),
        (LINEAR_ADD_NORM, "fragments_s8", "plain, int8_rows, int8_panels"),
        (W8A16, "PLAIN", "plain, int8_rows, fragments_f16, int8_panels"),
        (W4A8, "int8_panels", "plain, bytes, int8_expanded, nibble_halves, fragments_s8, int4_panels"),
        (W4A16, "int8_expanded", "plain, bytes, nibble_halves, fragments_f16, int4_panels"),
        (GOBO_A8, "int4_panels", "plain, bytes, int8_expanded, select_halves, fragments_s8, int3_panels"),
        (GOBO, "", "plain, bytes, select_halves, dict3_words, fragments_f16, int3_panels"),
        (GOBO_TABLE, "int8_expanded", "plain, bytes, select_halves, dict3_words, fragments_f16, int3_panels"),
        (W4, "int4_panels", "plain, bytes"),
        (W8, "bytes", "plain"),
        (EMBED_NORM, "int8_panels", "plain, bytes, select_halves, dict3_words, fragments_f16, int3_panels"),
    ],
    ids=str,
)
def test_a_layout_that_a_scheme_does_not_have_is_an_error(case: Case, layout: str, allowed: str) -> None:
    problem = case.draw(3, 5, 64)
    name = "words_layout" if case == EMBED_NORM else "weight_layout"
    for each in (problem, testing.to_device(problem, "meta")):
        with pytest.raises(QBertError, match=rf"no layout {layout!r}.*; allowed: {allowed}$"):
            _call_flat(each, **{name: layout})


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (EMBED_NORM, {"words_scheme": "w8a8"}, "scheme w8a8 is not for embeddings"),
        (
            EMBED_NORM,
            {"words_scheme": "w2"},
            "unknown scheme 'w2'; allowed: float, gobo3, gobo4, w8, w4, w4-g32, w4-g128",
        ),
        (EMBED_NORM, {"words_scheme": "gobo3"}, "a weight of scheme gobo3 is 5 tensors, got 2"),
        (EMBED_NORM, {"words_scheme": "float"}, "a float table is 1 tensor, got 2"),
        (W8, {"weight_scheme": "w8a8"}, "scheme w8a8 is not for embeddings"),
        (W8, {"weight_scheme": "gobo4"}, "a weight of scheme gobo4 is 5 tensors, got 2"),
        (W8, {"weight_scheme": "float"}, "unknown scheme 'float'"),
        (W8A8, {"weight_scheme": "w8a16"}, "scheme w8a16 takes activations as floats without scales"),
        (W8A8, {"weight_scheme": "w4a8"}, "a weight of scheme w4a8 is 3 tensors, got 2"),
        (W8A8, {"weight_scheme": "w2a2"}, "unknown scheme 'w2a2'; allowed for linears: w8a8"),
        (W8A16, {"weight_scheme": "w8"}, "scheme w8 is not for linears"),
        (GOBO_A8, {"weight": []}, "a weight of scheme gobo3a8 is 6 tensors, got 0"),
        (W4A16, {"weight_scheme": "w4a16-g32"}, r"scale of a w4a16-g32 weight \(5, 64\) .* must be \(5, 2\)"),
        (W4A8, {"weight_scheme": "w4a8-g128"}, "k is 64, which groups of 128 do not divide"),
        (LINEAR_ADD_NORM, {"weight_scheme": "w8a16"}, "scheme w8a16 takes activations as floats without scales"),
    ],
    ids=str,
)
def test_a_weight_that_is_not_of_its_scheme_is_an_error(case: Case, changes: dict[str, Any], message: str) -> None:
    problem = case.draw(3, 5, 64, scheme="w8") if case == EMBED_NORM else case.draw(3, 5, 64)
    for each in (problem, testing.to_device(problem, "meta")):
        with pytest.raises((RuntimeError, QBertError), match=message):
            _call_flat(each, **changes)


def test_a_scheme_s_default_group_size_may_be_spelled_out() -> None:
    problem = W4A8.draw(3, 5, 64)
    _assert_same_bits(_call_flat(problem, weight_scheme="w4a8-g64"), call(problem))


@of([*INTEGER_LINEARS, ATTENTION])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64], ids=str)
def test_results_of_other_types_are_an_error(case: Case, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"out_dtype is {dtype}; allowed: float32, bfloat16, float16"):
        call(case.draw(3, 5, 64)._replace(out=dtype))


@of([W8A8, ATTENTION])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.int8, None), (torch.float32, 0.5)], ids=str)
def test_a_scale_is_for_int8_results(case: Case, dtype: torch.dtype, scale: float | None) -> None:
    with pytest.raises(
        QBertError, match=rf"out_dtype is {dtype} and out_scale {scale}; allowed: a float type and None"
    ):
        _call_flat(case.draw(3, 5, 64), out_dtype=dtype, out_scale=scale)


@of([INT8_LINEARS[0], ATTENTION_INT8])
@pytest.mark.parametrize("scale", [0.0, -0.5, math.nan, math.inf])
def test_a_static_scale_that_is_none_is_an_error(case: Case, scale: float) -> None:
    problem = case.draw(3, 5, 64)._replace(out=scale)
    for each in (problem, testing.to_device(problem, "meta")):
        with pytest.raises(QBertError, match=f"out_scale is {scale}; allowed: finite and above 0"):
            call(each)


@of(INT8_LINEARS)
@pytest.mark.parametrize("zero", [-128, 128])
def test_a_code_of_0_that_is_none_is_an_error(case: Case, zero: int) -> None:
    with pytest.raises(QBertError, match=rf"zero is {zero}; allowed: -127 \.\.\. 127"):
        call(case.draw(3, 5, 64)._replace(zero=zero))
    with pytest.raises(QBertError, match="zero is 5; allowed: 0 of a float result"):
        call(case.draw(3, 5, 64)._replace(zero=5, out=torch.float32))


@of(FLOAT_LINEARS)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float64, 0.5], ids=str)
def test_float_activations_give_their_own_type(case: Case, out: Any) -> None:
    with pytest.raises(QBertError, match=f"a linear of float activations gives their type, torch.float32, not {out}"):
        call(case.draw(3, 5, 64)._replace(out=out))


@of(LINEARS)
def test_unknown_activation_is_an_error(case: Case) -> None:
    with pytest.raises(QBertError, match="unknown activation 'tanh'; allowed: none, gelu, gelu_tanh, relu, silu"):
        _call_flat(case.draw(3, 5, 64), activation="tanh")


@pytest.mark.parametrize("softmax_scale", [0.0, -0.125, math.nan, math.inf])
def test_a_softmax_scale_that_is_none_is_an_error(softmax_scale: float) -> None:
    with pytest.raises(QBertError, match=f"softmax_scale is {softmax_scale}; allowed: finite and above 0"):
        call(ATTENTION.draw(3, 5, 64)._replace(softmax_scale=softmax_scale))


@pytest.mark.parametrize("bad", [-1, 19, 2**40], ids=str)
@of(EMBEDDINGS)
@IMPLEMENTATION
def test_ids_out_of_range_are_an_error(implementation: str, case: Case, bad: int) -> None:
    problem = case.draw(4, 19, 64)
    ids = problem.ids.clone()
    ids[2] = bad
    with pytest.raises(QBertError, match=rf"embedding id {bad} is out of range; the table has 19 rows"):
        call(problem._replace(ids=ids))


@pytest.mark.parametrize(("name", "rows"), [("ids", 19), ("position_ids", 4), ("token_type_ids", 2)])
@pytest.mark.parametrize("bad", [-1, 100])
@pytest.mark.parametrize("scheme", ["gobo3", FLOAT_TABLE])
@IMPLEMENTATION
def test_ids_out_of_range_of_the_fused_look_up_are_an_error(
    implementation: str, name: str, rows: int, bad: int, scheme: str
) -> None:
    problem = EMBED_NORM.draw(4, 19, 64, scheme=scheme)
    with pytest.raises(QBertError, match=rf"embedding id {bad} is out of range; the table has {rows} rows"):
        call(problem._replace(**{name: torch.tensor([0, 1, bad, 0])}))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32], ids=str)
@of(EMBEDDINGS)
@IMPLEMENTATION
def test_ids_that_torch_takes_for_a_mask_are_an_error(implementation: str, case: Case, dtype: torch.dtype) -> None:
    problem = case.draw(19, 19, 64)
    with pytest.raises(RuntimeError, match=rf"ids are {dtype}; allowed: torch.int32, torch.int64"):
        call(problem._replace(ids=problem.ids.to(dtype)))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 2, 5], [0, 9], [0], [-1, 5]], ids=str)
@IMPLEMENTATION
def test_sequences_that_do_not_cover_the_tokens_are_an_error(implementation: str, bounds: list[int]) -> None:
    """A token in no sequence would be left as whatever lay in memory."""
    problem = ATTENTION.draw(5, 2, 8)._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(QBertError, match=r"cu_seqlens must ascend from 0 to 5, got \["):
        call(problem)


# ---- the judge itself -----------------------------------------------------------------------------------------------


def _spoiled(result: Any, index: int, amount: float) -> Any:
    results = [each.clone() for each in _tensors(result)]
    results[index][0].view(-1)[0] += amount
    return tuple(results) if isinstance(result, list | tuple) else results[0]


@pytest.mark.parametrize(
    ("case", "index", "amount", "message"),
    [
        (QUANTIZE, 0, 1, "1 values are not the reference's"),
        (QUANTIZE, 1, 1e-5, "1 values are not the reference's"),
        (W8, 0, 1e-6, "1 values are not the reference's"),
        (W8A8, 0, 1e-3, "twice torch's own"),
        (GOBO, 0, 1e-3, "twice torch's own"),
        (ATTENTION, 0, 1e-4, "twice torch's own"),
        (ATTENTION_INT8, 0, 2, "codes are not the nearest"),
        (INT8_LINEARS[1], 0, 2, "codes are not the nearest"),
        (ADD_NORM, 0, 1e-4, "twice torch's own"),
        (ADD_NORM, 1, 2, "codes are not the nearest"),
        (ADD_NORM, 2, 1e-4, "scales: error"),
        (LINEAR_ADD_NORM, 0, 1e-4, "twice torch's own"),
        (LINEAR_ADD_NORM, 1, 2, "codes are not the nearest"),
        (EMBED_NORM, 2, 1e-4, "scales: error"),
        (W8A8, 0, math.nan, "NaN or infinity differs from the reference"),
        (W8A8, 0, math.inf, "NaN or infinity differs from the reference"),
    ],
    ids=str,
)  # fmt: skip
def test_the_judge_sees_one_wrong_value(case: Case, index: int, amount: float, message: str) -> None:
    problem = case.draw(3, 5, 64)
    result = call(problem)
    assert_matches_reference(problem, result)
    with pytest.raises(AssertionError, match=message):
        assert_matches_reference(problem, _spoiled(result, index, amount))


@pytest.mark.parametrize("code", [126, 127, 128, 129])
def test_the_judge_takes_either_neighbour_of_an_ambiguous_probability_and_no_other(code: int) -> None:
    """Two keys of the same score whose values' scales make the second probability 127.5: float32 may take 127 or 128."""
    qkv = torch.tensor([[1, 0, 3, 5, 100, 60], [1, 0, 3, 5, -50, 70]], dtype=torch.int8)
    scales = torch.tensor([[0.1, 0.1, 0.5], [0.1, 0.1, 0.25]])
    problem = Attention(qkv, scales, torch.tensor([0, 2], dtype=torch.int32), 1, 0.5, None, None, None, torch.float32)
    value = qkv[:, 4:].to(torch.float32)
    actual = ((255 * value[0] + code * value[1]) * (0.5 / 255 / 2)).expand(2, 2)
    if code in (127, 128):
        assert_matches_reference(problem, actual)
    else:
        with pytest.raises(AssertionError, match="twice torch's own"):
            assert_matches_reference(problem, actual)


@of(CASES)
def test_the_judge_sees_a_wrong_type_or_shape(case: Case) -> None:
    problem = case.draw(3, 5, 64)
    results = _tensors(call(problem))
    for wrong in (results[0][:2], results[0].to(torch.float64)):
        with pytest.raises(AssertionError, match="expected"):
            assert_matches_reference(problem, (wrong, *results[1:]))
    with pytest.raises(AssertionError, match=f"{len(results) + 1} results, expected {len(results)}"):
        assert_matches_reference(problem, (*results, results[0]))


def test_problems_are_the_same_for_the_same_seed() -> None:
    draw = functools.partial(GOBO_A8.draw, 3, 5, 64)
    first, again, other = draw(seed=1), draw(seed=1), draw(seed=2)
    _assert_same_bits(first, again)
    assert not torch.equal(first.x, other.x)


def test_a_problem_of_every_kind_is_drawn_on_another_device() -> None:
    for case in CASES:
        problem = testing.to_device(case.draw(3, 6, 64), "meta")
        assert operation_of(problem).name == case.operation
        assert {tensor.device.type for tensor in _tensors(problem)} == {"meta"}
        assert problem_of(problem) == problem_of(case.draw(3, 6, 64))


def test_int8_results_are_drawn_so_that_some_are_clamped() -> None:
    for case in (*INT8_LINEARS, ATTENTION_INT8):
        problem = case.draw(9, 5, 64)
        codes = call(problem)
        assert int(codes.abs().max()) == 127
        floats = testing.evaluate(problem, torch.float64)
        assert float(floats.abs().max()) > 1.5 * 127 * problem.out


def test_sqnr_db() -> None:
    signal = torch.full((100,), 10.0)
    assert testing.sqnr_db(signal, signal + 1) == pytest.approx(20.0)
    assert testing.sqnr_db(signal, signal) == math.inf


# ---- tensors where a kernel must not look ----------------------------------------------------------------------------


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_tensors_on_several_devices_are_refused_by_name(operation: str) -> None:
    """A kernel takes addresses: one of another device would be read as one of this."""
    record = random_problem(operation, 3, 2 if operation == "attention" else 8, 32)
    for name, value in zip(record._fields[1:], record[1:], strict=True):
        if isinstance(value, Tensor):
            moved = record._replace(**{name: value.to("meta")})
            for run in (ops.checked_run, ops.call):
                with pytest.raises(QBertError, match=f"{operation}: {name} is on meta, {record._fields[0]} is on cpu"):
                    run(moved)


@pytest.mark.parametrize("scheme", ["gobo3", "gobo4a8"])
@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.BYTES], ids=str)
def test_damaged_outliers_are_refused_by_torchs_kernels_too(scheme: str, layout: Layout) -> None:
    for name, at, wrong in (("outlier_rowptr", 3, 10**6), ("outlier_col", 0, 30_000), ("outlier_col", 0, -30_000)):
        record = random_problem("linear", 3, 16, 64, scheme=scheme, layout=layout)
        record.weight.tensors[name][at] = wrong
        with pytest.raises(QBertError, match="outliers are damaged"):
            ops.checked_run(record)


def test_swapped_memory_is_kept_while_a_kernel_has_its_address() -> None:
    """Neither garbage nor a crash: a weight that was prepared stays what it was."""
    layout = table.select_layout(SCHEMES["w8a8"], Role.LINEAR, cpu_target())
    record = random_problem("linear", 5, 640, 320, scheme="w8a8", layout=layout)
    expected = ops.checked_run(record)
    record.weight.qdata.data = torch.zeros_like(record.weight.qdata)
    filler = [torch.full((640, 320), 77, dtype=torch.int8) for _ in range(8)]
    assert torch.equal(ops.checked_run(record), expected)
    del filler
