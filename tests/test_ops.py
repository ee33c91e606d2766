"""Every operator, the same tests: reference, opcheck, compile, export, batch invariance, errors. CPU here."""

from __future__ import annotations

import functools
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qbert import dispatch, ops, reference, testing
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.layout import PANEL_LAYOUTS, Layout, from_plain, layouts_of, panels
from qbert.ops import cpu_torch
from qbert.target import Target
from qbert.testing import assert_matches_reference, random_arguments, schemes_of

OPERATIONS = pytest.mark.parametrize("operation", list(ops.SCHEMAS))
DTYPES = pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES, ids=str)
INTEGER_LINEARS = ["w8a8_linear", "w4a8_linear", "gobo_linear"]
REQUANT_LINEARS = [f"{name}_requant" for name in INTEGER_LINEARS]
FLOAT_LINEARS = ["w8a16_linear", "w4a16_linear", "gobo_a16_linear"]
LINEARS = INTEGER_LINEARS + REQUANT_LINEARS + FLOAT_LINEARS
TOKEN_OPERATIONS = ["quantize_per_token", "add_layer_norm_quantize"]
EMBEDDINGS = ["w8_embedding", "w4_embedding", "gobo_embedding"]
ATTENTIONS = ["attention_int8", "attention_int8_requant"]
# (t, n, k): no token, one of everything, odd ones, more than one tile. Int4 takes the next k that its groups divide.
SIZES = [(0, 3, 17), (1, 1, 1), (3, 17, 1023), (17, 3, 64), (33, 20, 100)]


# What the dispatcher runs, and torch's implementation, which runs where there is no extension.
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["operator", "torch"])


def _operator(operation: str) -> Any:
    return getattr(torch.ops.qbert, operation)


def _implementation(name: str, operation: str) -> Callable[..., Any]:
    return _operator(operation) if name == "operator" else cpu_torch.CPU_TORCH[operation]


def _fit(scheme: str | None, k: int) -> int:
    size = SCHEMES[scheme].group_size if scheme else None
    return -(-k // size) * size if size else k


def _schemes_and_layouts() -> Iterator[Any]:
    for operation in ops.SCHEMAS:
        for scheme in schemes_of(operation) or [None]:
            for layout in layouts_of(SCHEMES[scheme]) if scheme else [Layout.PLAIN]:
                yield pytest.param(operation, scheme, layout, id=f"{operation}-{scheme}-{layout.value}")


def _bind(operation: str, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of the tensors alone; `None`, names, types and numbers are constants in it."""
    places = [at for at, value in enumerate(arguments) if isinstance(value, Tensor | list)]

    def call(*tensors: Any) -> Any:
        values = list(arguments)
        for at, value in zip(places, tensors, strict=True):
            values[at] = value
        return _operator(operation)(*values)

    return call, [arguments[at] for at in places]


def _results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _assert_same_bits(actual: Any, expected: Any) -> None:
    for got, want in zip(_results(actual), _results(expected), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def _replace(operation: str, arguments: tuple[Any, ...], **values: Any) -> tuple[Any, ...]:
    names = [argument.name for argument in _operator(operation).default._schema.arguments]
    assert set(values) <= set(names)
    return tuple(values.get(name, value) for name, value in zip(names, arguments, strict=True))


def _argument(operation: str, arguments: tuple[Any, ...], name: str) -> Any:
    names = [argument.name for argument in _operator(operation).default._schema.arguments]
    return arguments[names.index(name)]


# ---- the table itself -----------------------------------------------------------------------------------------------


def test_every_operation_is_registered_and_dispatched() -> None:
    assert set(ops.SCHEMAS) == set(dispatch.OPERATIONS)
    for operation in ops.SCHEMAS:
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qbert::{operation}", key), (operation, key)


def test_every_scheme_has_an_operation() -> None:
    """A problem can be drawn for every scheme, so no scheme goes untested below."""
    assert {scheme for operation in ops.SCHEMAS for scheme in schemes_of(operation)} == set(SCHEMES)


def test_float_sums_of_1024_products_are_exact() -> None:
    """The limits that `cpu_torch` relies on, from the limits of the formats."""
    assert cpu_torch.EXACT_FLOAT32_TERMS * 128 * 128 <= 2**24
    assert cpu_torch.EXACT_PROBABILITY_TERMS * reference.PROBABILITY_MAX * 128 <= 2**24
    assert ops.MAX_K * 127 * 127 < 2**31 <= (ops.MAX_K + 1) * 127 * 127


# ---- against the reference ------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("size", SIZES, ids=str)
@OPERATIONS
@IMPLEMENTATION
def test_matches_reference(implementation: str, operation: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    t, n, k = size
    scheme = next(iter(schemes_of(operation)), None)
    arguments = random_arguments(operation, t, n, _fit(scheme, k), seed=t, dtype=dtype)
    assert_matches_reference(operation, arguments, _implementation(implementation, operation)(*arguments))


@pytest.mark.parametrize(("operation", "scheme", "layout"), list(_schemes_and_layouts()))
@IMPLEMENTATION
def test_matches_reference_in_every_layout(
    implementation: str, operation: str, scheme: str | None, layout: Layout
) -> None:
    arguments = random_arguments(operation, 5, 17, _fit(scheme, 72), scheme=scheme, layout=layout)
    assert_matches_reference(operation, arguments, _implementation(implementation, operation)(*arguments))


@DTYPES
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("operation", LINEARS)
def test_linears_with_bias_and_activation(operation: str, bias: bool, activation: str, dtype: torch.dtype) -> None:
    arguments = random_arguments(operation, 7, 17, 128, dtype=dtype, bias=bias, activation=activation)
    y = _operator(operation)(*arguments)
    assert_matches_reference(operation, arguments, y)
    other = _replace(operation, arguments, activation="none" if activation == "gelu" else "gelu")
    assert not torch.equal(y, _operator(operation)(*other))  # the activation is not a name that is only carried along


@pytest.mark.parametrize("bias_dtype", ops.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("operation", LINEARS)
def test_bias_of_another_type_than_the_result(operation: str, bias_dtype: torch.dtype) -> None:
    arguments = random_arguments(operation, 3, 17, 64, dtype=torch.bfloat16)
    bias = _argument(operation, arguments, "bias").to(bias_dtype)
    arguments = _replace(operation, arguments, bias=bias)
    assert_matches_reference(operation, arguments, _operator(operation)(*arguments))


@DTYPES
def test_quantize_per_token_of_every_kind_of_token(dtype: torch.dtype) -> None:
    """Bad tokens, zeros, denormals and the largest values, beside each other."""
    x = testing.random_activations(12, 67, dtype=dtype)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for row, value in enumerate((math.nan, math.inf, -math.inf, largest, -largest, smallest, smallest / 8)):
        x[row, 5] = value
    x[6:10] *= torch.tensor([[1e-38], [0.0], [-0.0], [1e-44]], dtype=dtype)
    for rows in (x, x[3:], x[:3], x[1:2], x[6:10]):
        assert_matches_reference("quantize_per_token", (rows,), torch.ops.qbert.quantize_per_token(rows))


@pytest.mark.parametrize("operation", [*TOKEN_OPERATIONS, *LINEARS])
def test_strided_activations(operation: str) -> None:
    arguments = random_arguments(operation, 5, 17, 64)
    for at, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.shape == (5, 64):
            wide = value.new_zeros(5, 128)
            wide[:, ::2] = value
            strided = (*arguments[:at], wide[:, ::2], *arguments[at + 1 :])
            _assert_same_bits(_operator(operation)(*strided), _operator(operation)(*arguments))


@pytest.mark.parametrize("operation", [*LINEARS, *TOKEN_OPERATIONS, *ATTENTIONS])
def test_arguments_are_left_as_they_are(operation: str) -> None:
    arguments = random_arguments(operation, 5, 17, 64)
    before = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    _operator(operation)(*arguments)
    for value, old in zip(arguments, before, strict=True):
        assert torch.equal(value, old) if isinstance(value, Tensor) else value == old


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("operation", EMBEDDINGS)
def test_ids_of_any_shape(operation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = random_arguments(operation, math.prod(shape), 19, 64)
    arguments = (arguments[0].view(shape).to(dtype), *arguments[1:])
    rows = _operator(operation)(*arguments)
    assert rows.shape == (*shape, 64)
    assert torch.equal(rows, ops.reference_of(operation)(*arguments))


def test_gobo_embedding_patches_rows_asked_for_twice_once() -> None:
    """Outliers are added to the rows of the result: a repeated id has its own copy of its row."""
    arguments = random_arguments("gobo_embedding", 1, 9, 256)
    rowptr = _argument("gobo_embedding", arguments, "outlier_rowptr")
    busiest = int(rowptr.diff().argmax())
    assert int(rowptr.diff()[busiest]) > 1
    ids = torch.tensor([busiest, 8, busiest, 0, busiest])
    rows = _operator("gobo_embedding")(ids, *arguments[1:])
    assert torch.equal(rows, reference.gobo_embedding(ids, *arguments[1:]))


# ---- integers are exact ---------------------------------------------------------------------------------------------


def _unit_scales(operation: str, q: Tensor, operand: Tensor) -> tuple[Any, ...]:
    """Arguments under which an integer linear returns its int32 sums as float32."""
    t, n = q.shape[0], operand.shape[0]
    s, nothing = torch.ones(t), torch.zeros(0)
    end = (None, "none", torch.float32)
    if operation == "w8a8_linear":
        return (q, s, operand, torch.ones(n), *end, "plain")
    if operation == "w4a8_linear":
        unused = torch.ones(n, 1, dtype=torch.uint8)
        return (q, s, operand, unused, torch.ones(n), *end, "int8_expanded")
    rowptr, columns = torch.zeros(n + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int16)
    codebook = torch.arange(8, dtype=torch.int8)
    return (q, s, operand, codebook, torch.ones(1), rowptr, columns, nothing, *end, "int8_expanded")


def _exact_sums(q: Tensor, operand: Tensor) -> Tensor:
    return torch.from_numpy(q.numpy().astype("int64") @ operand.numpy().astype("int64").T)


@pytest.fixture(params=["int_mm", "float32-chunks"])
def integer_product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways a CPU multiplies int8 matrices; the one for CPUs without VNNI must not touch `_int_mm`."""
    if request.param == "int_mm":
        if not cpu_torch.cpu_target().int_mm_exact:
            pytest.skip("torch._int_mm saturates on this CPU")
        return request.param
    monkeypatch.setattr(cpu_torch, "cpu_target", lambda: Target("cpu", int_mm_exact=False))

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("torch._int_mm was called where it saturates")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    return request.param


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
    product = cpu_torch.integer_product(q, w)
    assert product.dtype == torch.float32
    assert torch.equal(product, _exact_sums(q, w).to(torch.float32))


@pytest.mark.parametrize("k", [17, 1023, 2304])
@pytest.mark.parametrize("operation", INTEGER_LINEARS)
@IMPLEMENTATION
def test_integer_linears_sum_exactly(implementation: str, operation: str, k: int, integer_product: str) -> None:
    """With unit scales a linear is its int32 sums, rounded to float32 once."""
    generator = torch.Generator().manual_seed(k)
    q, operand = ((torch.randint(2, (rows, k), generator=generator) * 254 - 127).to(torch.int8) for rows in (3, 17))
    q[0], operand[0] = 127, 127
    y = _implementation(implementation, operation)(*_unit_scales(operation, q, operand))
    assert torch.equal(y, _exact_sums(q, operand).to(torch.float32))


@pytest.mark.parametrize("operation", INTEGER_LINEARS + REQUANT_LINEARS)
def test_float32_chunks_give_the_bits_of_int_mm(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = random_arguments(operation, 17, 19, 1152, activation="gelu")
    by_torch = cpu_torch.CPU_TORCH[operation]
    monkeypatch.setattr(cpu_torch, "cpu_target", lambda: Target("cpu", int_mm_exact=False))
    chunks = by_torch(*arguments)
    monkeypatch.undo()
    if not cpu_torch.cpu_target().int_mm_exact:
        pytest.skip("torch._int_mm saturates on this CPU")
    _assert_same_bits(chunks, by_torch(*arguments))


@pytest.mark.parametrize(
    ("operation", "scheme", "layout"),
    [each for each in _schemes_and_layouts() if each.values[0] in INTEGER_LINEARS + REQUANT_LINEARS],
)
def test_layout_does_not_change_a_bit(operation: str, scheme: str, layout: Layout) -> None:
    """Of torch's implementation; sizes that leave the last panel and block of columns open, where the groups allow it."""
    k, by_torch = _fit(scheme, 165), cpu_torch.CPU_TORCH[operation]
    plain = random_arguments(operation, 5, 37, k, scheme=scheme)
    moved = random_arguments(operation, 5, 37, k, scheme=scheme, layout=layout)
    _assert_same_bits(by_torch(*moved), by_torch(*plain))


@pytest.mark.parametrize("operation", ["gobo_linear", "gobo_linear_requant"])
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_stacked_dictionaries_give_the_bits_of_separate_products(operation: str, scheme: str, rows: int) -> None:
    """A merged query, key and value: three dictionaries and scales, rows that a panel of 16 shares or not."""
    for layout in layouts_of(SCHEMES[scheme]):
        arguments = random_arguments(operation, 5, 3 * rows, 100, scheme=scheme, layout=layout, matrices=3)
        y = _operator(operation)(*arguments)
        assert_matches_reference(operation, arguments, y)
        plain = random_arguments(operation, 5, 3 * rows, 100, scheme=scheme, matrices=3)
        for part, y_part in enumerate(y.split(rows, dim=1)):
            alone = _one_of_stacked(operation, plain, part, rows)
            held = {name: _argument(operation, alone, name) for name in ("qdata", "codebook")}
            moved = from_plain(held, SCHEMES[scheme], (rows, 100), layout)
            _assert_same_bits(_operator(operation)(*_replace(operation, alone, layout=layout.value, **moved)), y_part)


def _one_of_stacked(operation: str, arguments: tuple[Any, ...], part: int, rows: int) -> tuple[Any, ...]:
    span = slice(part * rows, (part + 1) * rows)
    held = {name: _argument(operation, arguments, name) for name in ("qdata", "bias", "codebook", "scale")}
    rowptr = _argument(operation, arguments, "outlier_rowptr")[part * rows : (part + 1) * rows + 1]
    outliers = {
        name: _argument(operation, arguments, name)[int(rowptr[0]) : int(rowptr[-1])]
        for name in ("outlier_col", "outlier_delta")
    }
    return _replace(
        operation, arguments, qdata=held["qdata"][span], bias=held["bias"][span], codebook=held["codebook"][part],
        scale=held["scale"][part : part + 1], outlier_rowptr=rowptr - rowptr[0], **outliers,
    )  # fmt: skip


def test_native_code_runs_first_and_torch_where_it_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = random_arguments("w8a8_linear", 3, 5, 64)
    monkeypatch.setitem(ops.NATIVE, "w8a8_linear", lambda *_: "native")
    assert ops._cpu("w8a8_linear")(*arguments) == "native"
    monkeypatch.setitem(ops.NATIVE, "w8a8_linear", lambda *_: NotImplemented)
    _assert_same_bits(ops._cpu("w8a8_linear")(*arguments), _operator("w8a8_linear")(*arguments))


# ---- attention and look-ups of their own ----------------------------------------------------------------------------


PER_TOKEN = pytest.mark.parametrize("per_token", [False, True], ids=["static", "per-token"])


@DTYPES
@PER_TOKEN
@pytest.mark.parametrize("operation", ATTENTIONS)
@pytest.mark.parametrize("size", [(0, 2, 8), (1, 1, 1), (65, 3, 33), (200, 2, 64)], ids=str)
@IMPLEMENTATION
def test_attention(
    implementation: str, operation: str, size: tuple[int, int, int], per_token: bool, dtype: torch.dtype
) -> None:
    arguments = random_arguments(operation, *size, per_token=per_token, dtype=dtype)
    assert_matches_reference(operation, arguments, _implementation(implementation, operation)(*arguments))


@pytest.mark.parametrize("operation", ATTENTIONS)
@pytest.mark.parametrize("bounds", [[0, 5], [0, 0, 5, 5], [0, 2, 2, 2, 5], [0, 0, 0, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_attention_with_empty_sequences(operation: str, bounds: list[int]) -> None:
    arguments = random_arguments(operation, 5, 2, 8, per_token=True)
    arguments = _replace(operation, arguments, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert_matches_reference(operation, arguments, _operator(operation)(*arguments))


@pytest.mark.parametrize(("t", "head_dim"), [(600, 8), (1100, 4), (3, 1100)], ids=str)
def test_attention_of_sums_that_float32_does_not_hold(t: int, head_dim: int) -> None:
    """Equal keys: all probabilities are 255, and odd sums of them times 127 pass 2**24."""
    qkv = torch.full((t, 3 * head_dim), 127, dtype=torch.int8)
    qkv[0, 2 * head_dim] = 126
    arguments = (qkv, torch.ones(3), torch.tensor([0, t], dtype=torch.int32), 1, 1e-6, torch.float32)
    out = torch.ops.qbert.attention_int8(*arguments)
    exact = torch.tensor([(127 * t - 1) / t, *[127.0] * (head_dim - 1)], dtype=torch.float64)
    assert float((out - exact).abs().max()) <= 3 * 127 * 2**-24
    assert_matches_reference("attention_int8", arguments, out)


@pytest.mark.parametrize("column", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("operation", ATTENTIONS)
def test_a_bad_token_stays_in_its_sequence(operation: str, column: int) -> None:
    """A query's scale spoils its own row, a key's or a value's every row of the sequence; int8 results are code 0 there."""
    arguments = random_arguments(operation, 12, 2, 8, per_token=True)
    arguments = _replace(operation, arguments, cu_seqlens=torch.tensor([0, 3, 7, 7, 12], dtype=torch.int32))
    clean = _operator(operation)(*arguments)
    scales = arguments[1].clone()
    scales[4, column] = math.nan
    arguments = _replace(operation, arguments, scales=scales)
    out = _operator(operation)(*arguments)
    assert_matches_reference(operation, arguments, out)
    bad = torch.zeros(12, dtype=torch.bool)
    bad[slice(4, 5) if column == 0 else slice(3, 7)] = True
    assert torch.equal(out[~bad], clean[~bad])
    assert not out[bad].any() if operation.endswith("_requant") else bool(out[bad].isnan().all())


def test_attention_requant_is_attention_with_a_static_scale() -> None:
    arguments = random_arguments("attention_int8_requant", 20, 2, 16, per_token=True)
    floats = torch.ops.qbert.attention_int8(*arguments[:-1], torch.float32)
    _assert_same_bits(torch.ops.qbert.attention_int8_requant(*arguments), reference.requantize(floats, arguments[-1]))


@pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES, ids=str)
def test_fused_look_up_of_a_float_table(dtype: torch.dtype) -> None:
    """A word table that was not quantized gives the norm of the plain sum."""
    operation = "embed_layer_norm_quantize"
    arguments = random_arguments(operation, 9, 17, 48, dtype=dtype, scheme="float")
    result = _operator(operation)(*arguments)
    assert_matches_reference(operation, arguments, result)
    ids, position_ids, token_type_ids, (words,), _, _, positions, types, gamma, beta, eps = arguments
    total = words[ids].float() + types[token_type_ids].float() + positions[position_ids].float()
    expected = torch.nn.functional.layer_norm(total, (48,), gamma.float(), beta.float(), eps)
    torch.testing.assert_close(result[1] * result[2][:, None], expected, rtol=0, atol=float(expected.abs().max()) / 250)


# ---- a result does not depend on the batch it came in ---------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("size", [(9, 17, 1023), (33, 100, 192), (5, 768, 64)], ids=str)
@pytest.mark.parametrize("operation", [*TOKEN_OPERATIONS, *INTEGER_LINEARS, *REQUANT_LINEARS])
def test_a_token_alone_is_the_token_in_a_batch(operation: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    t, n, k = size
    k = _fit(next(iter(schemes_of(operation)), None), k)
    arguments = random_arguments(operation, t, n, k, dtype=dtype, activation="gelu")
    whole = _results(_operator(operation)(*arguments))
    tokens = {"x", "q", "s", "y", "residual"}
    names = [argument.name for argument in _operator(operation).default._schema.arguments]
    for first, last in [(0, 1), (t // 2, t // 2 + 1), (t - 1, t), (1, 4)]:
        part = tuple(
            value[first:last] if name in tokens else value for name, value in zip(names, arguments, strict=True)
        )
        _assert_same_bits(_operator(operation)(*part), [each[first:last] for each in whole])


@pytest.mark.parametrize("operation", ["embed_layer_norm_quantize", *EMBEDDINGS])
def test_a_looked_up_row_alone_is_the_row_in_a_batch(operation: str) -> None:
    arguments = random_arguments(operation, 9, 17, 128)
    whole = _results(_operator(operation)(*arguments))
    ids = 3 if operation == "embed_layer_norm_quantize" else 1
    for token in (0, 4, 8):
        part = (*(each[token : token + 1] for each in arguments[:ids]), *arguments[ids:])
        _assert_same_bits(_operator(operation)(*part), [each[token : token + 1] for each in whole])


@DTYPES
@PER_TOKEN
@pytest.mark.parametrize("operation", ATTENTIONS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 32), (3, 64), (1, 5)])
def test_a_sequence_alone_is_the_sequence_in_a_pack(
    operation: str, heads: int, head_dim: int, per_token: bool, dtype: torch.dtype
) -> None:
    lengths = [7, 1, 33, 0, 12]
    arguments = random_arguments(operation, sum(lengths), heads, head_dim, dtype=dtype, per_token=per_token)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    arguments = _replace(operation, arguments, cu_seqlens=bounds)
    packed = _operator(operation)(*arguments)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = _replace(
            operation, arguments, qkv=arguments[0][start:stop].clone(),
            scales=arguments[1][start:stop] if per_token else arguments[1],
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        )  # fmt: skip
        _assert_same_bits(_operator(operation)(*alone), packed[start:stop])


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("operation", INTEGER_LINEARS + REQUANT_LINEARS + FLOAT_LINEARS)
def test_a_bad_token_stays_in_its_row(operation: str, bad: float) -> None:
    arguments = random_arguments(operation, 5, 17, 64, activation="gelu")
    clean = _operator(operation)(*arguments)
    x = testing.random_activations(5, 64)
    x[2, 7] = bad
    tokens = {"x": x} if "a16" in operation else dict(zip("qs", torch.ops.qbert.quantize_per_token(x), strict=True))
    arguments = _replace(operation, arguments, **tokens)
    y = _operator(operation)(*arguments)
    others = [0, 1, 3, 4]
    assert_matches_reference(operation, arguments, y)
    assert torch.equal(y[others], clean[others])
    if operation.endswith("_requant"):
        assert not y[2].any()
    elif math.isnan(bad) or "a16" not in operation:
        assert bool(y[2].isnan().all())


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def _arguments_for_machinery(operation: str) -> tuple[Any, ...]:
    return random_arguments(operation, 3, 5, 64, activation="gelu" if operation in LINEARS else "none")


@OPERATIONS
def test_opcheck(operation: str) -> None:
    torch.library.opcheck(_operator(operation).default, _arguments_for_machinery(operation))


@OPERATIONS
def test_fake_tells_type_shape_and_strides(operation: str) -> None:
    """On meta tensors, for sizes that share nothing: a swapped n and k would show."""
    for t, n in ((0, 5), (1, 1), (7, 11)):
        arguments = random_arguments(operation, t, n, 64, dtype=torch.bfloat16)
        real = _results(_operator(operation)(*arguments))
        fake = _results(_operator(operation)(*testing.to_device(arguments, "meta")))
        for got, want in zip(fake, real, strict=True):
            assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())


@pytest.mark.parametrize("operation", LINEARS)
def test_opcheck_of_panels(operation: str) -> None:
    """Rows are not visible in panels; fakes and traces must find them elsewhere."""
    layout = layouts_of(SCHEMES[schemes_of(operation)[0]])[-1]
    assert layout in PANEL_LAYOUTS
    torch.library.opcheck(_operator(operation).default, random_arguments(operation, 3, 5, 64, layout=layout))


@pytest.mark.parametrize(("operation", "scheme", "layout"), list(_schemes_and_layouts()))
def test_fake_tells_type_and_shape_in_every_layout(operation: str, scheme: str | None, layout: Layout) -> None:
    arguments = random_arguments(operation, 3, 21, _fit(scheme, 72), scheme=scheme, layout=layout)
    real = _results(_operator(operation)(*arguments))
    fake = _results(_operator(operation)(*testing.to_device(arguments, "meta")))
    assert [(each.dtype, each.shape) for each in fake] == [(each.dtype, each.shape) for each in real]


@pytest.mark.parametrize("operation", ATTENTIONS)
def test_opcheck_of_attention_with_a_scale_for_each_token(operation: str) -> None:
    torch.library.opcheck(_operator(operation).default, random_arguments(operation, 6, 2, 8, per_token=True))


def test_opcheck_of_stacked_dictionaries_and_of_a_float_table() -> None:
    torch.library.opcheck(_operator("gobo_linear").default, random_arguments("gobo_linear", 3, 6, 64, matrices=3))
    table = random_arguments("embed_layer_norm_quantize", 3, 6, 64, scheme="float")
    torch.library.opcheck(_operator("embed_layer_norm_quantize").default, table)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@OPERATIONS
def test_compiles_without_a_graph_break(operation: str, fresh_dynamo: None) -> None:
    call, tensors = _bind(operation, _arguments_for_machinery(operation))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    _assert_same_bits(compiled(*tensors), call(*tensors))


@OPERATIONS
def test_exports(operation: str) -> None:
    call, tensors = _bind(operation, _arguments_for_machinery(operation))

    class Module(torch.nn.Module):
        def forward(self, *tensors: Any) -> Any:
            return call(*tensors)

    program = torch.export.export(Module(), tuple(tensors))
    assert any(f"qbert.{operation}" in str(node.target) for node in program.graph.nodes)
    _assert_same_bits(program.module()(*tensors), call(*tensors))


def _layer(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What a W8A8 layer runs, with float operations around it for a compiler to fuse."""
    q, s = torch.ops.qbert.quantize_per_token(x * 2)
    return torch.ops.qbert.w8a8_linear(q, s, qdata, scale, bias, "gelu", x.dtype, "plain") + 1


def _layer_arguments(t: int) -> tuple[Tensor, ...]:
    q, s, qdata, scale, bias, *_ = random_arguments("w8a8_linear", t, 17, 40)
    return (q.to(torch.float32) * s[:, None], qdata, scale, bias)


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


def test_cuda_says_once_that_it_runs_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    """The CUDA implementation, called as the dispatcher would; no GPU is needed for its warning."""
    slow = ops._logged_once("some_operation", lambda value: value + 1)
    with caplog.at_level(logging.WARNING, logger="qbert.ops"):
        assert [slow(1), slow(2)] == [2, 3]
    assert [record.getMessage() for record in caplog.records if "some_operation" in record.getMessage()] == [
        "qbert::some_operation runs as the plain-torch reference on CUDA: exact, but slow"
    ]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [False, True], ids=["cpu", "fake"])
@pytest.mark.parametrize(
    ("operation", "changes", "message"),
    [
        ("quantize_per_token", {"x": torch.zeros(3, 64).double()}, "activations are torch.float64; allowed: float32"),
        ("quantize_per_token", {"x": torch.zeros(3, 64, dtype=torch.int8)}, "activations are torch.int8; allowed"),
        ("quantize_per_token", {"x": torch.zeros(64)}, r"activations must be \(t, k\), got \(64,\)"),
        ("w8a8_linear", {"q": torch.zeros(3, 64)}, r"q must be \(t, k\) int8, got torch.float32 \(3, 64\)"),
        ("w4a8_linear", {"q": torch.zeros(64, dtype=torch.int8)}, r"q must be \(t, k\) int8, got torch.int8 \(64,\)"),
        ("gobo_linear", {"s": torch.ones(2)}, r"s must be \(3,\) float32, one scale a token, got torch.float32 \(2,\)"),
        ("gobo_linear_requant", {"s": torch.ones(3, 1)}, r"s must be \(3,\) float32, .* got torch.float32 \(3, 1\)"),
        ("w8a8_linear", {"s": torch.ones(3, dtype=torch.float64)}, r"s must be \(3,\) float32.* got torch.float64"),
        ("w8a8_linear_requant", {"q": torch.zeros(3, 133145, dtype=torch.int8)}, "above 133144 an int32 sum could"),
        ("w8a16_linear", {"x": torch.zeros(3, 64, dtype=torch.float64)}, "activations are torch.float64; allowed"),
        ("w4a16_linear", {"x": torch.zeros(2, 3, 64)}, r"activations must be \(t, k\), got \(2, 3, 64\)"),
        ("attention_int8", {"qkv": torch.zeros(3, 960)}, r"qkv must be \(t, 3 \* 5 \* head_dim\) int8, got .*960"),
        ("attention_int8", {"num_heads": 7}, r"qkv must be \(t, 3 \* 7 \* head_dim\) int8"),
        ("attention_int8_requant", {"num_heads": 0}, "num_heads is 0; allowed: 1 or more"),
        ("attention_int8_requant", {"scales": torch.ones(2, 3)}, r"scales must be .* got torch.float32 \(2, 3\)"),
        ("attention_int8", {"scales": torch.ones(3, 3).double()}, r"scales must be .* got torch.float64 \(3, 3\)"),
        ("w8a8_linear", {"qdata": torch.zeros(5, 60, dtype=torch.int8)}, r"must be \(5, 64\) torch.int8, got .* \(5, 60\)"),
        ("w4a8_linear", {"qdata": torch.zeros(5, 32, dtype=torch.int8)}, r"must be \(5, 32\) torch.uint8, got torch.int8"),
        ("w4a8_linear", {"group_scale": torch.ones(5, 3, dtype=torch.uint8)}, r"group_scale must be \(5, groups\)"),
        ("w4a16_linear", {"scale": torch.ones(5, 1)}, r"scale must be \(5, groups\) torch.bfloat16 .* got torch.float32"),
        ("gobo_linear", {"codebook": torch.zeros(7, dtype=torch.int8)}, r"codebook must be \(8,\) or \(16,\) torch.int8"),
        ("gobo_linear", {"codebook": torch.zeros(8)}, r"codebook must be .* torch.int8, or several of them, got torch.f"),
        ("gobo_linear", {"scale": torch.ones(5)}, r"scale must be \(1,\) torch.float32, got torch.float32 \(5,\)"),
        ("gobo_linear", {"outlier_rowptr": torch.zeros(5).int()}, r"outlier_rowptr must be \(6,\) torch.int32, got"),
        ("gobo_linear", {"outlier_col": torch.zeros(2).long()}, r"outlier_col must be \(outliers,\) int16 or int32, got"),
        ("gobo_a16_linear", {"outlier_delta": torch.zeros(99)}, r"outlier_delta must be \(\d,\) torch.float32, got"),
        ("gobo_a16_linear", {"codebook": torch.zeros(2, 8)}, r"codebook must be \(8,\) or \(16,\) torch.float32, got"),
        ("attention_int8", {"scales": torch.ones(1)}, r"scales must be \(3,\) or \(3, 3\) float32, got torch.float32 \(1,\)"),
        ("attention_int8", {"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens must be \(sequences \+ 1,\) int32"),
        ("add_layer_norm_quantize", {"y": torch.zeros(1, 64)}, r"y is \(1, 64\), residual is \(3, 64\)"),
        ("embed_layer_norm_quantize", {"position_ids": torch.zeros(1).long()}, r"ids is \(3,\), position_ids is"),
        ("embed_layer_norm_quantize", {"token_type_ids": torch.zeros(5).long()}, r"ids is \(3,\), token_type_ids is"),
        ("embed_layer_norm_quantize", {"token_types": torch.zeros(2, 1)}, r"token_types must be \(types, 64\)"),
        ("embed_layer_norm_quantize", {"gamma": torch.ones(1)}, r"gamma must be \(64,\), got \(1,\)"),
        ("add_layer_norm_quantize", {"beta": torch.ones(1)}, r"beta must be \(64,\), got \(1,\)"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_an_error(operation: str, changes: dict[str, Any], message: str, fake: bool) -> None:
    """The same error eagerly and while tracing."""
    arguments = _replace(operation, random_arguments(operation, 3, 5, 64), **changes)
    with pytest.raises(RuntimeError, match=message):
        _operator(operation)(*(testing.to_device(arguments, "meta") if fake else arguments))


@pytest.mark.parametrize(
    ("operation", "layouts"),
    [
        ("w8a8_linear", ["plain", "int8_panels"]),
        ("w8a16_linear", ["plain", "int8_panels"]),
        ("w4a8_linear", ["plain", "bytes", "int8_expanded", "int4_panels"]),
        ("w4a16_linear", ["plain", "bytes", "int4_panels"]),
        ("gobo_linear", ["plain", "bytes", "int8_expanded", "int3_panels"]),
        ("gobo_a16_linear", ["plain", "bytes", "int3_panels"]),
    ],
)
@pytest.mark.parametrize("k", [32, 120, 136, 256])
def test_activations_of_another_width_are_an_error(operation: str, layouts: list[str], k: int) -> None:
    """Packed codes must not be read as more or fewer columns than they hold; panels hold them in whole blocks of 64."""
    for layout in layouts:
        if layout.endswith("_panels") and panels.padded_k(k) == 128:
            continue
        arguments = random_arguments(operation, 3, 5, 128, layout=Layout(layout))
        tokens = {"x": torch.ones(3, k)} if "a16" in operation else {"q": torch.ones(3, k, dtype=torch.int8)}
        with pytest.raises((RuntimeError, QBertError)):
            _operator(operation)(*_replace(operation, arguments, **tokens))


@pytest.mark.parametrize(
    ("operation", "name"),
    [(each, "bias") for each in LINEARS] + [(each, "scale") for each in LINEARS if each.startswith(("w8", "w4a8"))],
)
def test_one_value_is_not_broadcast_to_all_channels(operation: str, name: str) -> None:
    arguments = random_arguments(operation, 3, 5, 64)
    with pytest.raises(RuntimeError, match=rf"{name} must be \(5,\), got \(1,\)"):
        _operator(operation)(*_replace(operation, arguments, **{name: torch.ones(1)}))


@pytest.mark.parametrize(
    ("operation", "layout", "allowed"),
    [
        ("w8a8_linear", "bytes", "plain, int8_rows, int8_panels"),
        ("w8a8_linear_requant", "int4_panels", "plain, int8_rows, int8_panels"),
        ("w8a16_linear", "PLAIN", "plain, int8_rows, fragments_f16, int8_panels"),
        ("w4a8_linear", "int8_panels", "plain, bytes, int8_expanded, nibble_halves, fragments_s8, int4_panels"),
        ("w4a16_linear", "int8_expanded", "plain, bytes, nibble_halves, fragments_f16, int4_panels"),
        ("gobo_linear", "int4_panels", "plain, bytes, int8_expanded, select_halves, fragments_s8, int3_panels"),
        ("gobo_a16_linear", "", "plain, bytes, select_halves, dict3_words, fragments_f16, int3_panels"),
        ("gobo_embedding", "int8_expanded", "plain, bytes, select_halves, dict3_words, fragments_f16, int3_panels"),
        ("w4_embedding", "int4_panels", "plain, bytes"),
        (
            "embed_layer_norm_quantize",
            "int8_panels",
            "plain, bytes, select_halves, dict3_words, fragments_f16, int3_panels",
        ),
    ],
)
def test_a_layout_that_an_operation_does_not_read_is_an_error(operation: str, layout: str, allowed: str) -> None:
    arguments = _replace(operation, random_arguments(operation, 3, 5, 64), layout=layout)
    for each in (arguments, testing.to_device(arguments, "meta")):
        if operation.endswith("_embedding") and each is not arguments:
            continue  # a look-up's fake knows the shape without looking at the table
        with pytest.raises(QBertError, match=rf"no layout {layout!r}.*; allowed: {allowed}$"):
            _operator(operation)(*each)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "w8a8"}, "scheme is not for embeddings: 'w8a8'; allowed for embeddings: gobo3"),
        ({"scheme": "w2"}, "unknown scheme 'w2'"),
        ({"scheme": "gobo3"}, "an embedding table of scheme gobo3 is 5 tensors, got 2"),
        ({"scheme": "float"}, "an embedding table of scheme float is 1 tensors, got 2"),
    ],
)
def test_a_table_that_is_not_of_its_scheme_is_an_error(changes: dict[str, Any], message: str) -> None:
    arguments = random_arguments("embed_layer_norm_quantize", 3, 5, 64, scheme="w8")
    arguments = _replace("embed_layer_norm_quantize", arguments, **changes)
    with pytest.raises(QBertError, match=message):
        torch.ops.qbert.embed_layer_norm_quantize(*arguments)


@pytest.mark.parametrize("operation", [*INTEGER_LINEARS, "attention_int8"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64], ids=str)
def test_results_of_other_types_are_an_error(operation: str, dtype: torch.dtype) -> None:
    arguments = _replace(operation, random_arguments(operation, 3, 5, 64), out_dtype=dtype)
    with pytest.raises(RuntimeError, match=f"out_dtype is {dtype}; allowed: float32, bfloat16, float16"):
        _operator(operation)(*arguments)


@pytest.mark.parametrize("operation", LINEARS)
def test_unknown_activation_is_an_error(operation: str) -> None:
    arguments = _replace(operation, random_arguments(operation, 3, 5, 64), activation="relu")
    with pytest.raises(QBertError, match="unknown activation 'relu'; allowed: none, gelu"):
        _operator(operation)(*arguments)


@pytest.mark.parametrize("bad", [-1, 19, 2**40], ids=str)
@pytest.mark.parametrize("operation", EMBEDDINGS)
def test_ids_out_of_range_are_an_error(operation: str, bad: int) -> None:
    arguments = random_arguments(operation, 4, 19, 64)
    ids = arguments[0].clone()
    ids[2] = bad
    with pytest.raises(QBertError, match=rf"embedding id {bad} is out of range; the table has 19 rows"):
        _operator(operation)(ids, *arguments[1:])


@pytest.mark.parametrize(("name", "rows"), [("ids", 19), ("position_ids", 4), ("token_type_ids", 2)])
@pytest.mark.parametrize("bad", [-1, 100])
def test_ids_out_of_range_of_the_fused_look_up_are_an_error(name: str, rows: int, bad: int) -> None:
    arguments = random_arguments("embed_layer_norm_quantize", 4, 19, 64)
    ids = torch.tensor([0, 1, bad, 0])
    with pytest.raises(QBertError, match=rf"embedding id {bad} is out of range; the table has {rows} rows"):
        _operator("embed_layer_norm_quantize")(*_replace("embed_layer_norm_quantize", arguments, **{name: ids}))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("operation", EMBEDDINGS)
def test_ids_that_torch_takes_for_a_mask_are_an_error(operation: str, dtype: torch.dtype) -> None:
    arguments = random_arguments(operation, 19, 19, 64)
    with pytest.raises(RuntimeError, match=rf"ids are {dtype}; allowed: torch.int32, torch.int64"):
        _operator(operation)(arguments[0].to(dtype), *arguments[1:])


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 2, 5], [0, 9], [0], [-1, 5]], ids=str)
def test_sequences_that_do_not_cover_the_tokens_are_an_error(bounds: list[int]) -> None:
    """A token in no sequence would be left as whatever lay in memory."""
    arguments = random_arguments("attention_int8", 5, 2, 8)
    arguments = _replace("attention_int8", arguments, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(QBertError, match=r"cu_seqlens must ascend from 0 to 5, got \["):
        _operator("attention_int8")(*arguments)


# ---- the judge itself -----------------------------------------------------------------------------------------------


def _spoiled(result: Any, index: int, change: Callable[[Tensor], None]) -> Any:
    results = [each.clone() for each in _results(result)]
    change(results[index])
    return tuple(results) if isinstance(result, list | tuple) else results[0]


def _add(amount: float) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor[0].view(-1)[0] += amount

    return change


@pytest.mark.parametrize(
    ("operation", "index", "amount", "message"),
    [
        ("quantize_per_token", 0, 1, "1 values are not the reference's"),
        ("quantize_per_token", 1, 1e-5, "1 values are not the reference's"),
        ("w8_embedding", 0, 1e-6, "1 values are not the reference's"),
        ("w8a8_linear", 0, 1e-3, "twice torch's own"),
        ("gobo_a16_linear", 0, 1e-3, "twice torch's own"),
        ("attention_int8", 0, 1e-4, "twice torch's own"),
        ("attention_int8_requant", 0, 2, "codes are not the nearest"),
        ("w4a8_linear_requant", 0, 2, "codes are not the nearest"),
        ("add_layer_norm_quantize", 0, 1e-4, "twice torch's own"),
        ("add_layer_norm_quantize", 1, 2, "codes are not the nearest"),
        ("add_layer_norm_quantize", 2, 1e-4, "scales: error"),
        ("w8a8_linear", 0, math.nan, "NaN or infinity differs from the reference"),
        ("w8a8_linear", 0, math.inf, "NaN or infinity differs from the reference"),
    ],
)  # fmt: skip
def test_the_judge_sees_one_wrong_value(operation: str, index: int, amount: float, message: str) -> None:
    arguments = random_arguments(operation, 3, 5, 64)
    result = _operator(operation)(*arguments)
    assert_matches_reference(operation, arguments, result)
    with pytest.raises(AssertionError, match=message):
        assert_matches_reference(operation, arguments, _spoiled(result, index, _add(amount)))


def _attention_with_an_ambiguous_probability() -> tuple[Any, ...]:
    """Two keys of the same score whose values' scales make the second probability 127.5, so float32 may take 127 or 128."""
    qkv = torch.tensor([[1, 0, 3, 5, 100, 60], [1, 0, 3, 5, -50, 70]], dtype=torch.int8)
    scales = torch.tensor([[0.1, 0.1, 0.5], [0.1, 0.1, 0.25]])
    return (qkv, scales, torch.tensor([0, 2], dtype=torch.int32), 1, 0.5, torch.float32)


@pytest.mark.parametrize("code", [126, 127, 128, 129])
def test_the_judge_takes_either_neighbour_of_an_ambiguous_probability_and_no_other(code: int) -> None:
    arguments = _attention_with_an_ambiguous_probability()
    value = arguments[0][:, 4:].to(torch.float32)
    out = (255 * value[0] + code * value[1]) * (0.5 / 255 / 2)
    actual = out.expand(2, 2)
    if code in (127, 128):
        assert_matches_reference("attention_int8", arguments, actual)
    else:
        with pytest.raises(AssertionError, match="twice torch's own"):
            assert_matches_reference("attention_int8", arguments, actual)


@OPERATIONS
def test_the_judge_sees_a_wrong_type_or_shape(operation: str) -> None:
    arguments = random_arguments(operation, 3, 5, 64)
    results = _results(_operator(operation)(*arguments))
    for wrong in (results[0][:2], results[0].to(torch.float64)):
        with pytest.raises(AssertionError, match="expected"):
            assert_matches_reference(operation, arguments, (wrong, *results[1:]))


def test_problems_are_the_same_for_the_same_seed() -> None:
    draw = functools.partial(random_arguments, "gobo_linear", 3, 5, 64)
    first, again, other = draw(seed=1), draw(seed=1), draw(seed=2)
    tensors = [at for at, value in enumerate(first) if isinstance(value, Tensor)]
    assert all(torch.equal(first[at], again[at]) for at in tensors)
    assert not torch.equal(first[0], other[0])


def test_sqnr_db() -> None:
    signal = torch.full((100,), 10.0)
    assert testing.sqnr_db(signal, signal + 1) == pytest.approx(20.0)
    assert testing.sqnr_db(signal, signal) == math.inf
