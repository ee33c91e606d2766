"""Each reference operation against its definition, written again here in numpy float64 and plain Python."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.metrics import sqnr_db
from qbert.ops import reference
from qbert.ops.abi import Activation, Keeps
from qbert.ops.operations import (
    FLOAT_TABLE,
    AddNorm,
    Attention,
    Embedding,
    EmbedNorm,
    Linear,
    LinearAddNorm,
    Norm,
    Out,
    QuantizeRows,
)
from qbert.quantizers import quantize
from qbert.testing import random_activations, random_weight, schemes_of
from qbert.weight import Layout, Outliers, Weight, codec
from qbert.weight.layout import layouts_of

Float64 = NDArray[np.float64]
ACTIVATIONS = pytest.mark.parametrize("activation", list(Activation), ids=lambda activation: activation.text)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FLOAT32 = np.float32
ULP = 2.0**-24  # largest relative error of one float32 rounding


# ---- the definitions, once more -------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Float64:
    return tensor.to(torch.float64).numpy()


def _codes(qdata: Tensor, bits: int, k: int, signed: bool) -> NDArray[np.int64]:
    """(n, k) codes of a PLAIN bit stream, by big integers."""
    top = 1 << bits
    rows = []
    for row in qdata.tolist():
        number = int.from_bytes(bytes(row), "little")
        codes = [number >> (i * bits) & (top - 1) for i in range(k)]
        rows.append([code - top if signed and code >= top // 2 else code for code in codes])
    return np.array(rows, dtype=np.int64).reshape(-1, k)


def _outliers(tensors: dict[str, Tensor], n: int, k: int) -> Float64:
    dense = np.zeros((n, k))
    rowptr = tensors["outlier_rowptr"].tolist()
    for row in range(n):
        for at in range(rowptr[row], rowptr[row + 1]):
            dense[row, int(tensors["outlier_col"][at])] = float(tensors["outlier_delta"][at])
    return dense


def _dequantized(name: str, tensors: dict[str, Tensor], n: int, k: int) -> Float64:
    """Exact (n, k) that the PLAIN tensors of a scheme stand for."""
    scheme = SCHEMES[name]
    if scheme.has_dictionary:
        codes = _codes(tensors["qdata"], scheme.weight_bits, k, signed=False)
        scale = float(tensors["scale"]) if "scale" in tensors else 1.0
        return _wide(tensors["codebook"])[codes] * scale + _outliers(tensors, n, k)
    if scheme.weight_bits == 8:
        return _wide(tensors["qdata"]) * _wide(tensors["scale"])[:, None]
    codes = _codes(tensors["qdata"], 4, k, signed=True).astype(np.float64)
    size = scheme.group_size
    assert size is not None
    if "group_scale" in tensors:
        operand = codes * np.repeat(_wide(tensors["group_scale"]), size, axis=1)
        return operand * _wide(tensors["scale"])[:, None]
    return codes * np.repeat(_wide(tensors["scale"]), size, axis=1)


def _gelu(y: Float64) -> Float64:
    return np.vectorize(lambda value: value * 0.5 * math.erfc(-value / math.sqrt(2)), otypes=[np.float64])(y)


def _logistic(y: Float64) -> Float64:
    return np.vectorize(lambda value: 1 / (1 + math.exp(-value)) if value > 0 else math.exp(value) / (1 + math.exp(value)),
                        otypes=[np.float64])(y)  # fmt: skip


# Their definitions in float64; GELU by tanh is x times a logistic function (Hendrycks and Gimpel, 2016).
_ACTIVATED: dict[Activation, Callable[[Float64], Float64]] = {
    Activation.NONE: lambda y: y,
    Activation.GELU: _gelu,
    Activation.GELU_TANH: lambda y: y * _logistic(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)),
    Activation.RELU: lambda y: np.maximum(y, 0),
    Activation.SILU: lambda y: y * _logistic(y),
}


def _finish(y: Float64, bias: Tensor | None, activation: Activation) -> Float64:
    return _ACTIVATED[activation](y if bias is None else y + _wide(bias))


@functools.cache
def _random_weight(name: str, n: int, k: int) -> tuple[Weight, Float64]:
    """A random weight and exactly what it stands for; nobody edits it."""
    weight = quantize(random_weight(n, k, seed=n + k), SCHEMES[name])
    return weight, _dequantized(name, weight.tensors, n, k)


def _bias(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, n).to(dtype)


def _rounding(exact: Float64, dtype: torch.dtype) -> Float64:
    """Largest error of rounding `exact`, or what lies within a few float32 roundings of it, to `dtype`."""
    info = torch.finfo(dtype)
    return (np.abs(exact) * 1.001 + info.tiny) * info.eps / 2


# ---- quantize_rows --------------------------------------------------------------------------------------------------


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(QuantizeRows(x))


def _numpy_quantize(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Single float32 IEEE operations, in the documented order."""
    absmax = np.maximum(np.abs(x).max(axis=1), FLOAT32(2.0**-100))
    codes = np.clip(np.rint(x * (FLOAT32(127) / absmax)[:, None]), -127, 127)
    return codes, absmax / FLOAT32(127)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (3, 1023), (17, 64)], ids=str)
def test_quantize_rows_is_these_ieee_operations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random_activations(*shape, seed=3, dtype=dtype)
    codes, scale = _quantize(x)
    expected_codes, expected_scale = _numpy_quantize(x.to(torch.float32).numpy())
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)


@pytest.mark.parametrize("magnitude", [1e-28, 1e-5, 1.0, 1e6, 3e38], ids="{:g}".format)
def test_quantization_error_is_at_most_half_a_step(magnitude: float) -> None:
    x = torch.linspace(-1, 1, 1023).repeat(3, 1) * torch.tensor([[1.0], [0.5], [0.01]]) * magnitude
    codes, scale = _quantize(x)
    assert codes.abs().amax(dim=1).tolist() == [127] * 3  # every token uses the whole range
    error = np.abs(_wide(codes) * _wide(scale)[:, None] - _wide(x))
    # On top of half a step: three float32 roundings (127 / absmax, the product, the scale) of codes up to 127.
    assert (error <= _wide(scale)[:, None] * (0.5 + 3 * 127 * ULP)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_halves_round_to_even(sign: float) -> None:
    x = sign * torch.tensor([[127.0, 0.5, 1.5, 2.5, 125.5, 126.5]])
    codes, scale = _quantize(x)
    assert scale.tolist() == [1.0]
    assert (codes * int(sign)).tolist() == [[127, 0, 2, 2, 126, 126]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("shape", [(3, 17), (1, 1)], ids=str)
def test_a_bad_value_makes_its_token_nan_and_no_other(bad: float, shape: tuple[int, int]) -> None:
    x = random_activations(*shape, seed=1)
    good_codes, good_scale = _quantize(x)
    row, column = shape[0] // 2, shape[1] - 1
    x[row, column] = bad
    codes, scale = _quantize(x)
    assert math.isnan(scale[row])
    assert not codes[row].any()
    others = torch.arange(shape[0]) != row
    assert torch.equal(codes[others], good_codes[others])
    assert torch.equal(scale[others], good_scale[others])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-40, 1e-38, 2.0**-101], ids=str)
def test_tokens_of_zeros_and_denormals_have_a_normal_scale(value: float) -> None:
    codes, scale = _quantize(torch.tensor([[value, 0.0, value]]))
    assert float(scale) == float(FLOAT32(2.0**-100) / FLOAT32(127))
    assert float(scale) >= torch.finfo(torch.float32).tiny
    assert abs(float(codes[0, 0]) * float(scale) - value) <= float(scale) * 0.5001


@pytest.mark.parametrize("shape", [(0, 17), (3, 0), (0, 0)], ids=str)
def test_quantize_nothing(shape: tuple[int, int]) -> None:
    codes, scale = _quantize(torch.zeros(shape))
    assert codes.shape == shape
    assert scale.shape == shape[:1]
    assert bool(scale.isfinite().all())


# ---- linears --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "n", "k"), [(0, 3, 17), (1, 1, 1), (3, 17, 1023), (17, 3, 64)])
@pytest.mark.parametrize("value", [None, 127, -127], ids=["random", "127", "-127"])
def test_integer_product_is_exact(t: int, n: int, k: int, value: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (t, k), generator=generator).to(torch.int8)
    w = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
    if value is not None:
        q, w = q.fill_(127), w.fill_(value)
    product = reference.integer_product(q, w)
    assert product.dtype == torch.int32
    expected = q.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T
    np.testing.assert_array_equal(product.numpy(), expected)


INTEGER_SCHEMES = ["w8a8", "w4a8", "w4a8-g32", "gobo3a8", "gobo4a8"]
FLOAT_SCHEMES = ["w8a16", "w4a16", "w4a16-g128", "gobo3", "gobo4"]


def _linear(
    x: Tensor, s: Tensor | None, weight: Weight, bias: Tensor | None, activation: Activation, out: Out = torch.float32
) -> Tensor:
    return reference.linear(Linear(x, s, weight, bias, activation, False, out))


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_integer_linears(name: str, has_bias: bool, activation: Activation, dtype: torch.dtype) -> None:
    t, n, k = 5, 7, 128
    held, weight = _random_weight(name, n, k)
    x = random_activations(t, k, seed=2)
    x[1] = 0.0
    q, s = _quantize(x)
    bias = _bias(n, dtype) if has_bias else None
    token = _wide(q) * _wide(s)[:, None]
    expected = _finish(token @ weight.T, bias, activation)
    # Sums are exact; at most eight float32 roundings (both scales, outliers, bias, gelu) of terms no larger than these,
    # and one rounding to the result's type.
    room = np.abs(token) @ np.abs(weight).T + (0 if bias is None else np.abs(_wide(bias)))
    allowed = 8 * ULP * room + _rounding(expected, dtype)
    for layout in layouts_of(SCHEMES[name]):
        y = _linear(q, s, held.to_layout(layout), bias, activation, dtype)
        assert y.dtype == dtype
        error = np.abs(_wide(y) - expected)
        assert (error <= allowed).all(), (layout, float((error - allowed).max()))


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("name", FLOAT_SCHEMES)
def test_float_linears(name: str, activation: Activation, dtype: torch.dtype) -> None:
    t, n, k = 5, 7, 128
    held, weight = _random_weight(name, n, k)
    x, bias = random_activations(t, k, seed=2, dtype=dtype), _bias(n, dtype)
    x[1] = 0.0
    expected = _finish(_wide(x) @ weight.T, bias, activation)
    for layout in layouts_of(SCHEMES[name]):
        y = _linear(x, None, held.to_layout(layout), bias, activation, dtype)
        assert y.dtype == dtype
        # Weights are defined as float32 (an outlier is centroid + delta in float32); everything after is float64.
        room = 1.2 * ULP * (np.abs(_wide(x)) @ np.abs(weight).T)  # gelu's slope is below 1.2
        assert (np.abs(_wide(y) - expected) <= room + _rounding(expected, dtype)).all()


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "gobo3a8"])
@ACTIVATIONS
def test_a_nan_token_stays_in_its_row(name: str, activation: Activation) -> None:
    weight = _random_weight(name, 7, 128)[0]
    x = random_activations(3, 128, seed=2)
    q, s = _quantize(x)
    clean = _linear(q, s, weight, _bias(7), activation)
    x[1, 5] = math.inf
    q, s = _quantize(x)
    y = _linear(q, s, weight, _bias(7), activation)
    assert bool(y[1].isnan().all())
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("name", ["gobo3a8", "gobo4a8"])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_stacked_dictionaries_are_separate_products(name: str, rows: int) -> None:
    """Three matrices with a dictionary and a scale each, as a merged query, key and value are: the same bits."""
    k, scheme = 100, SCHEMES[name]
    parts = [quantize(random_weight(rows, k, seed=seed) * (seed + 1), scheme) for seed in range(3)]
    q, s = _quantize(random_activations(5, k))
    counts = [part.outliers for part in parts]
    stacked = {key: torch.cat([part.tensors[key] for part in parts]) for key in parts[0].tensors}
    starts = [0, *itertools.accumulate(counts)]
    rowptrs = [part.tensors["outlier_rowptr"] + start for part, start in zip(parts, starts, strict=False)]
    stacked["outlier_rowptr"] = torch.cat([rowptrs[0], rowptrs[1][1:], rowptrs[2][1:]])
    stacked["codebook"] = stacked["codebook"].view(3, -1)
    bias = _bias(3 * rows)
    expected = [_linear(q, s, part, b, Activation.GELU) for part, b in zip(parts, bias.split(rows), strict=True)]
    together = Weight(scheme, (3 * rows, k), Layout.PLAIN, stacked)
    for layout in layouts_of(scheme):
        y = _linear(q, s, together.to_layout(layout), bias, Activation.GELU)
        assert torch.equal(y, torch.cat(expected, dim=1)), layout


def test_rows_that_dictionaries_do_not_share_evenly_are_an_error() -> None:
    tensors = {"qdata": torch.zeros(7, 3, dtype=torch.uint8), "codebook": torch.zeros(3, 8, dtype=torch.int8)}
    with pytest.raises(QBertError, match="7 rows are not 3 matrices of as many rows each"):
        codec.operand(Weight(SCHEMES["gobo3a8"], (7, 3), Layout.BYTES, tensors))


@pytest.mark.parametrize("out_scale", [0.5, 0.1, 3e-4])
def test_int8_results(out_scale: float) -> None:
    y = torch.tensor([[0.25, 0.75, -0.25, 63.5, -64.0, 1e30, -1e30, math.inf, -math.inf, math.nan, 0.0, -0.0]])
    factor = FLOAT32(1.0 / out_scale)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.clip(np.rint(y.numpy() * factor), -127, 127)
    codes = reference.to_out(y, out_scale)
    assert codes.dtype == torch.int8
    assert codes[0, 9] == 0  # NaN: the residual stream carries it
    np.testing.assert_array_equal(codes.numpy(), np.nan_to_num(steps))
    assert codes[0, 5:9].tolist() == [127, -127, 127, -127]


# ---- look-ups -------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", schemes_of("embedding"))
def test_embeddings_are_the_rows_rounded_once(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, k = 9, 128
    ids = torch.tensor([8, 0, 3, 3, 1, 7])[: math.prod(shape)].view(shape)
    held, exact = _random_weight(name, rows, k)
    expected = torch.from_numpy(exact[ids.numpy()].astype(np.float32)).to(dtype)  # to float32, then to the type
    for layout in layouts_of(SCHEMES[name]):
        found = reference.embedding(Embedding(ids, held.to_layout(layout), dtype))
        assert (found.dtype, found.shape) == (dtype, (*shape, k))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_decode_of_every_scheme_and_layout(name: str) -> None:
    n, k = 5, 256
    weight, exact = _random_weight(name, n, k)
    for layout in layouts_of(SCHEMES[name]):
        restored = codec.decode(weight.to_layout(layout))
        assert restored.dtype == torch.float32
        # code * scale is one float32 rounding, centroid * scale + delta is two.
        roundings = 2 if SCHEMES[name].has_dictionary else 1
        np.testing.assert_allclose(_wide(restored), exact, rtol=roundings * ULP * 1.001, atol=0)


@pytest.mark.parametrize("name", ["gobo3", "gobo3a8", "w4a8", "w4a16"])
def test_decode_leaves_the_weight_as_it_is(name: str) -> None:
    for layout in layouts_of(SCHEMES[name]):
        weight = quantize(random_weight(5, 128), SCHEMES[name]).to_layout(layout)
        before = {key: tensor.clone() for key, tensor in weight.tensors.items()}
        first, second = codec.decode(weight), codec.decode(weight)
        assert torch.equal(first, second)
        assert all(torch.equal(tensor, before[key]) for key, tensor in weight.tensors.items())


@pytest.mark.parametrize(("rowptr", "columns"), [([0, 0, 2, 2, 5], [3, 4, 0, 2, 4]), ([0, 0, 0, 0, 0], [])])
def test_dense_outliers(rowptr: list[int], columns: list[int]) -> None:
    """Empty rows at the start, in the middle, everywhere."""
    values = torch.arange(1.0, len(columns) + 1)
    sparse = Outliers(torch.tensor(rowptr, dtype=torch.int32), torch.tensor(columns, dtype=torch.int16), values)
    dense = codec.dense_outliers(sparse, 4, 5)
    expected = torch.zeros(4, 5)
    for row in range(4):
        for at in range(rowptr[row], rowptr[row + 1]):
            expected[row, columns[at]] = at + 1
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("k", [126, 127, 130, 192, 0])
def test_int4_wants_the_k_of_its_groups(k: int) -> None:
    """Packed rows do not say how long they are; a k that cannot be right must not give a plausible result."""
    for name, layout in itertools.product(("w4a8", "w4a16"), (Layout.PLAIN, Layout.BYTES)):
        held = _random_weight(name, 3, 128)[0].to_layout(layout)
        with pytest.raises((QBertError, RuntimeError)):
            codec.decode(Weight(held.scheme, (3, k), layout, held.tensors))


# ---- attention and norms --------------------------------------------------------------------------------------------


def _attention_of_one_head(products: Float64, scales: Float64, value: Float64, softmax_scale: float) -> Float64:
    """(tokens, d) of one sequence and head, row by row as documented; products (tokens, tokens), scales (tokens, 3)."""
    rows = []
    for token, product in enumerate(products):
        scores = product * scales[token, 0] * scales[:, 1] * softmax_scale
        powers = np.exp(scores - scores.max())
        weights = powers * scales[:, 2]
        codes = np.rint(weights * (255 / weights.max()))
        assert codes.max() == 255
        rows.append(codes @ value * (weights.max() / 255 / powers.sum()))
    return np.array(rows).reshape(-1, value.shape[1])


def _attention_problem(lengths: list[int], heads: int, head_dim: int, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    t = sum(lengths)
    generator = torch.Generator().manual_seed(t)
    qkv = torch.randint(-127, 128, (t, 3 * heads * head_dim), generator=generator).to(torch.int8)
    scales = torch.tensor([0.05, 0.04, 0.03])
    if per_token:
        scales = scales * (torch.rand(t, 3, generator=generator) + 0.1)
    return qkv, scales, torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)


def _attention(
    qkv: Tensor, scales: Tensor, bounds: Tensor, heads: int, softmax_scale: float, out: Out = torch.float32
) -> Tensor:
    return reference.attention(Attention(qkv, scales, bounds, heads, softmax_scale, None, None, None, out))


LENGTHS = pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [([5], 2, 8), ([1, 7, 3], 3, 16), ([4, 0, 2, 0], 1, 32), ([1, 1, 1], 2, 3), ([0], 2, 8), ([0, 0, 40], 1, 64)],
    ids=["one", "three", "empty-ones", "single-tokens", "no-token", "long"],
)
PER_TOKEN = pytest.mark.parametrize("per_token", [False, True], ids=["static", "per-token"])


@DTYPES
@PER_TOKEN
@LENGTHS
def test_attention_is_its_definition_for_every_row(
    lengths: list[int], heads: int, head_dim: int, per_token: bool, dtype: torch.dtype
) -> None:
    qkv, scales, bounds = _attention_problem(lengths, heads, head_dim, per_token)
    out = _attention(qkv, scales, bounds, heads, 0.3, dtype)
    t, width = sum(lengths), heads * head_dim
    assert (out.dtype, out.shape) == (dtype, (t, width))
    query, key, value = _wide(qkv).reshape(t, 3, heads, head_dim).transpose(1, 2, 0, 3)
    for start, stop in itertools.pairwise(bounds.tolist()):
        for head in range(heads):
            products = query[head, start:stop] @ key[head, start:stop].T
            held = np.broadcast_to(_wide(scales), (t, 3))[start:stop]
            expected = _attention_of_one_head(products, held, value[head, start:stop], 0.3)
            found = _wide(out[start:stop, head * head_dim : (head + 1) * head_dim])
            # Float64 throughout: all that can be seen is the rounding to the result's type.
            assert (np.abs(found - expected) <= _rounding(expected, dtype) + 1e-12).all()


def _float64_attention(parts: Tensor, softmax_scale: float) -> Float64:
    """Torch's own attention of one sequence; parts (tokens, 3, heads, d) float."""
    query, key, value = parts.to(torch.float64).permute(1, 2, 0, 3)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=softmax_scale)
    return _wide(out.transpose(0, 1).flatten(1))


@PER_TOKEN
def test_8_bit_probabilities_are_within_half_a_step_of_softmax(per_token: bool) -> None:
    """A row's step is its largest weight / 255, so the result is off by half of that for each value at most."""
    heads, head_dim, t = 2, 16, 33
    qkv, scales, bounds = _attention_problem([t], heads, head_dim, per_token)
    out = _attention(qkv, scales, bounds, heads, 0.02, torch.float64)
    parts = qkv.view(t, 3, heads, head_dim) * scales.expand(t, 3)[:, :, None, None].to(torch.float64)
    difference = np.abs(_wide(out) - _float64_attention(parts, 0.02))
    largest = _wide(parts[:, 2].abs().sum(dim=0).flatten())  # a row's weights, over their sum, are at most 1
    assert (difference <= 0.5 / 255 * largest * _wide(scales[..., 2].max() / scales[..., 2].min())).all()


def test_8_bit_probabilities_cost_less_than_8_bit_queries_keys_and_values() -> None:
    """128 tokens of normal queries, keys and values: 43 dB of signal to the probabilities' noise, 38 dB to the codes'."""
    t, heads, head_dim = 128, 4, 64
    x = torch.randn(t, 3, heads * head_dim, generator=torch.Generator().manual_seed(0))
    codes, scales = _quantize(x.view(3 * t, -1))
    bounds = torch.tensor([0, t], dtype=torch.int32)
    out = _attention(codes.view(t, -1), scales.view(t, 3), bounds, heads, 0.125, torch.float64)
    dequantized = (codes.to(torch.float64) * scales[:, None]).view(t, 3, heads, head_dim)
    by_softmax = torch.from_numpy(_float64_attention(dequantized, 0.125))
    by_floats = torch.from_numpy(_float64_attention(x.view(t, 3, heads, head_dim), 0.125))
    assert sqnr_db(by_softmax, out) > 42 > sqnr_db(by_floats, by_softmax)


def test_attention_with_static_scales_is_attention_with_the_same_ones_for_every_token() -> None:
    qkv, scales, bounds = _attention_problem([5, 9], 2, 8, per_token=False)
    static = _attention(qkv, scales, bounds, 2, 0.3)
    assert torch.equal(static, _attention(qkv, scales.repeat(14, 1), bounds, 2, 0.3))


@pytest.mark.parametrize("column", [0, 1, 2], ids=["query", "key", "value"])
def test_a_nan_scale_stays_in_its_sequence(column: int) -> None:
    """A query's is seen in its own row alone; a key's or a value's in every row that attends to it."""
    qkv, scales, bounds = _attention_problem([3, 4, 0, 2], 2, 8, per_token=True)
    clean = _attention(qkv, scales, bounds, 2, 0.3)
    scales[4, column] = math.nan
    out = _attention(qkv, scales, bounds, 2, 0.3)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[slice(4, 5) if column == 0 else slice(3, 7)] = True
    assert bool(out[bad].isnan().all())
    assert torch.equal(out[~bad], clean[~bad])
    codes = _attention(qkv, scales, bounds, 2, 0.3, 0.01)
    assert codes.dtype == torch.int8
    assert not codes[bad].any()
    assert torch.equal(codes, reference.to_out(out, 0.01))


def _numpy_layer_norm(x: Float64, gamma: Tensor, beta: Tensor, eps: float) -> Float64:
    mean = x.mean(axis=1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=1, keepdims=True) + eps) * _wide(gamma) + _wide(beta)


def _check_norm(result: tuple[Tensor, Tensor, Tensor], exact: Float64, dtype: torch.dtype) -> None:
    normed, codes, scale = result
    largest = np.abs(exact).max(axis=1)
    slack = 16 * ULP * largest  # a float32 norm: a few roundings of its largest values
    assert normed.dtype == dtype
    assert (np.abs(_wide(normed) - exact) <= slack[:, None] + _rounding(exact, dtype)).all()
    assert (np.abs(_wide(scale) - largest / 127) <= (slack + ULP * largest) / 127).all()
    # The codes are those of the float32 norm, not of the one rounded to `dtype`.
    step = _wide(scale)[:, None]
    assert (np.abs(_wide(codes) * step - exact) <= step * 0.5001 + slack[:, None]).all()


@DTYPES
@pytest.mark.parametrize(("t", "k"), [(1, 17), (3, 1023), (17, 64)])
def test_add_norm(t: int, k: int, dtype: torch.dtype) -> None:
    y, residual = random_activations(t, k, seed=1, dtype=dtype), random_activations(t, k, seed=2, dtype=dtype)
    gamma, beta = torch.linspace(0.5, 1.5, k).to(dtype), _bias(k, dtype)
    result = reference.add_norm(AddNorm(y, residual, Norm(gamma, beta, 1e-5), Keeps.NORM))
    _check_norm(result, _numpy_layer_norm(_wide(y) + _wide(residual), gamma, beta, 1e-5), dtype)


def test_norm_of_a_nan_row() -> None:
    y, residual = random_activations(3, 17, seed=1), random_activations(3, 17, seed=2)
    norm = Norm(torch.ones(17), torch.zeros(17), 1e-5)
    clean = reference.add_norm(AddNorm(y, residual, norm, Keeps.NORM))
    y[1, 3] = math.nan
    normed, codes, scale = reference.add_norm(AddNorm(y, residual, norm, Keeps.NORM))
    assert bool(normed[1].isnan().all())
    assert math.isnan(scale[1])
    assert not codes[1].any()
    for tensor, before in zip((normed, codes, scale), clean, strict=True):
        assert torch.equal(tensor[[0, 2]], before[[0, 2]])


@DTYPES
@pytest.mark.parametrize("name", [*schemes_of("embedding"), FLOAT_TABLE])
def test_embed_norm(name: str, dtype: torch.dtype) -> None:
    rows, k = 11, 128
    if name == FLOAT_TABLE:
        table: Tensor | Weight = random_activations(rows, k, seed=3, dtype=dtype)
        words = _wide(table)  # type: ignore[arg-type]
    else:
        held, words = _random_weight(name, rows, k)
        table = held.to_layout(layouts_of(SCHEMES[name])[-1])
    ids, position_ids, token_type_ids = (torch.tensor(each) for each in ([10, 0, 10, 4], [0, 1, 2, 0], [0, 1, 1, 0]))
    positions, types = random_activations(5, k, seed=1, dtype=dtype), random_activations(2, k, seed=2, dtype=dtype)
    gamma, beta = torch.linspace(0.5, 1.5, k).to(dtype), _bias(k, dtype)
    norm = Norm(gamma, beta, 1e-5)
    result = reference.embed_norm(EmbedNorm(ids, position_ids, token_type_ids, table, positions, types, norm))
    total = words[ids.numpy()] + _wide(types)[token_type_ids.numpy()] + _wide(positions)[position_ids.numpy()]
    _check_norm(result, _numpy_layer_norm(total, gamma, beta, 1e-5), dtype)


@DTYPES
@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_linear_add_norm_is_the_norm_of_the_stored_linear(name: str, dtype: torch.dtype) -> None:
    """Between the two the sum is rounded to the residual's type."""
    t, n, k = 5, 7, 128
    weight, bias = _random_weight(name, n, k)[0], _bias(n, dtype)
    q, s = _quantize(random_activations(t, k, seed=2))
    residual, norm = random_activations(t, n, seed=1, dtype=dtype), Norm(torch.linspace(0.5, 1.5, n), _bias(n), 1e-5)
    y = _linear(q, s, weight, bias, Activation.NONE, dtype)
    result = reference.linear_add_norm(LinearAddNorm(q, s, weight, bias, residual, norm, Keeps.NORM))
    _check_norm(result, _numpy_layer_norm(_wide(y) + _wide(residual), norm.gamma, norm.beta, 1e-5), dtype)
