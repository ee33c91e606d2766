"""L7. Random problems for every operation, and the one way to compare a result with what it must be.

Shared by tests and benchmarks: whatever computes an operation (CPU, Triton, CUDA) gets its arguments from
`random_arguments` and is judged by `assert_matches_reference`. Values are drawn on the CPU, so a seed means the same
problem on every device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qbert import reference
from qbert.dispatch import COMPOSED, embedding_operation, linear_operation
from qbert.formats import INT8, SCHEMES, Role, Scheme
from qbert.layout import Layout, from_plain
from qbert.metrics import sqnr_db
from qbert.ops import reference_of
from qbert.qtensor import OUTLIER_TENSORS
from qbert.quantizers import quantize

__all__ = [
    "EXACT_OPERATIONS", "Arguments", "assert_matches_reference", "evaluate", "random_activations", "random_arguments",
    "random_weight", "schemes_of", "sqnr_db", "to_device",
]  # fmt: skip

# Every step of these is an integer or a single IEEE operation: no target may differ from the reference in any bit.
EXACT_OPERATIONS = ("quantize_per_token", "w8_embedding", "w4_embedding", "gobo_embedding")
_WEIGHT_DEVIATION = 0.04  # of encoder weights; GOBO's outlier threshold depends on it
_EPS = 1e-12  # of BERT's LayerNorm
# Distance from a half within which float32 may round one of attention's 8-bit probabilities to either side. Scores of
# magnitude m have errors of a few m * 2**-24, which become 255 times as much: enough up to about 16.
_AMBIGUOUS = 1e-3
Arguments = tuple[Any, ...]


def schemes_of(operation: str) -> list[str]:
    """Names of the schemes whose weights `operation` reads; empty for operations without a quantized weight."""
    name = COMPOSED.get(operation, (operation,))[0].removesuffix("_requant")
    if name == "embed_layer_norm_quantize":
        return [scheme.name for scheme in SCHEMES.values() if Role.EMBEDDING in scheme.roles]
    named_by = {Role.LINEAR: linear_operation, Role.EMBEDDING: embedding_operation}
    return [
        scheme.name
        for scheme in SCHEMES.values()
        if any(role in scheme.roles and operation_of(scheme) == name for role, operation_of in named_by.items())
    ]


def random_weight(n: int, k: int, *, seed: int = 0) -> Tensor:
    """(n, k) float32 like an encoder's: normal, with about one weight in 128 far outside, unevenly over the rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * _WEIGHT_DEVIATION
    count = n * k // 128
    rows = (torch.rand(count, generator=generator).square() * n).long()  # early rows hold more: uneven row pointers
    columns = torch.randint(k, (count,), generator=generator)
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    weight[rows, columns] = signs * 12 * _WEIGHT_DEVIATION
    return weight


def random_activations(t: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(t, k) of `dtype`; magnitudes differ between tokens by up to a thousand."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** (torch.rand(t, 1, generator=generator) * 3 - 2)
    return (torch.randn(t, k, generator=generator) * magnitude).to(dtype)


def random_arguments(
    operation: str, t: int, n: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32,
    layout: Layout = Layout.PLAIN, scheme: str | None = None, bias: bool = True, activation: str = "none",
    per_token: bool = False, matrices: int = 1, device: torch.device | str = "cpu",
) -> Arguments:  # fmt: skip
    """Arguments of an operation, in the order of its schema.

    Args:
        operation: a key of `ops.SCHEMAS`.
        t, n, k: tokens, output channels, input channels of a linear; tokens, table rows, width of a look-up; tokens,
            heads, head dimension of attention (packed sequences, uneven, one of them empty); else n is unused.
        dtype: of activations, biases and float results.
        layout, scheme: of the quantized weight; by default PLAIN and the first of `schemes_of(operation)`. The scheme
            ``"float"`` is a float word table of `dtype`.
        bias, activation: of linears.
        per_token: whether attention's scales are one for each token, (t, 3), or static, (3,).
        matrices: how many matrices of n / matrices rows, each with its dictionary, a `gobo_linear`'s weight is stacked from.
        device: where the tensors are.
    """
    scheme = scheme or next(iter(schemes_of(operation)), None)
    x = random_activations(t, k, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def ids(rows: int) -> Tensor:
        return torch.randint(rows, (t,), generator=generator)

    def weight() -> dict[str, Tensor]:
        assert scheme is not None
        if scheme == reference.FLOAT_TABLE:
            return {"table": normal(n, k)}
        if matrices > 1:
            return _stacked_dictionaries(matrices, n, k, SCHEMES[scheme], seed + 2, layout)
        return quantize(random_weight(n, k, seed=seed + 2), SCHEMES[scheme]).to_layout(layout).tensors

    arguments: Arguments
    if operation == "quantize_per_token":
        arguments = (x,)
    elif operation.startswith("attention_int8"):
        qkv = torch.randint(-INT8.qmax, INT8.qmax + 1, (t, 3 * n * k), generator=generator).to(torch.int8)
        scales = torch.tensor([0.02, 0.03, 0.01])
        if per_token:  # up to four times larger in one token than in another
            scales = scales * 4 ** (torch.rand(t, 3, generator=generator) - 0.5)
        arguments = (qkv, scales, _uneven_cu_seqlens(t, generator), n, k**-0.5, dtype)
    elif operation == "add_layer_norm_quantize":
        arguments = (x, normal(t, k), normal(k), normal(k), _EPS)
    elif operation == "w8a8_linear_add_norm":
        product = (*reference.quantize_per_token(x), *weight().values(), normal(n) if bias else None)
        arguments = (*product, normal(t, n), normal(n), normal(n), _EPS, layout.value)
    elif operation == "embed_layer_norm_quantize":
        positions, types = normal(max(t, 1), k), normal(2, k)
        words = list(weight().values())
        look_up = (ids(n), torch.arange(t), ids(2), words, scheme, layout.value)
        arguments = (*look_up, positions, types, normal(k), normal(k), _EPS)
    elif operation.endswith("_embedding"):
        arguments = (ids(n), *weight().values(), dtype, *(() if operation == "w8_embedding" else (k, layout.value)))
    else:
        held = weight()
        names = [name for name in _argument_names(operation) if name in held]
        tokens = (x,) if "a16" in operation else reference.quantize_per_token(x)
        end: Arguments = (normal(n) if bias else None, activation)
        if "a16" not in operation:
            end = (*end, dtype)
        arguments = (*tokens, *(held[name] for name in names), *end, layout.value)
    if operation in reference.OUT_SCALE_AT:
        at = reference.OUT_SCALE_AT[operation]
        y = evaluate(operation, (*arguments[:at], 1.0, *arguments[at + 1 :]), torch.float64)
        # The largest values lie beyond the largest code, so that clamping is part of the problem.
        out_scale = 1.25 * float(y.abs().max()) / INT8.qmax / 2 if y.numel() else 1.0
        arguments = (*arguments[:at], out_scale, *arguments[at + 1 :])
    return to_device(arguments, device)


def to_device(arguments: Sequence[Any], device: torch.device | str) -> Arguments:
    """The same arguments, or results, with every tensor on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return [move(each) for each in value] if isinstance(value, list) else value

    return tuple(move(each) for each in arguments)


def evaluate(operation: str, arguments: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """The float result of an operation as torch computes it with dequantized tensors of `dtype` throughout.

    Only attention's 8-bit probabilities are integers here, too, and the same ones in every type. With float64 this is the
    truth that errors are measured from; with another type it is "the same arithmetic done by torch in that type", whose own
    error says what can be asked of a kernel. What an operation does to its float result afterwards (int8 codes, scales) is
    left out.
    """
    named = dict(zip(_argument_names(operation), to_device(arguments, "cpu"), strict=True))
    if operation.startswith("attention_int8"):
        return _attention(named, dtype)[0]
    if operation == "add_layer_norm_quantize":
        total = named["y"].to(dtype) + named["residual"].to(dtype)
    elif (
        operation == "w8a8_linear_add_norm"
    ):  # rounded where the operation rounds: the norm begins with what was stored
        q, s, qdata, scale, bias = (named[name] for name in ("q", "s", "qdata", "scale", "bias"))
        y = reference.w8a8_linear(q, s, qdata, scale, bias, "none", named["residual"].dtype, named["layout"])
        total = y.to(dtype) + named["residual"].to(dtype)
    elif operation == "embed_layer_norm_quantize":
        rows = reference.lookup_rows(
            named["ids"], named["words"], named["scheme"], named["layout"], named["positions"].shape[1]
        )
        float_rows = named["token_types"][named["token_type_ids"]], named["positions"][named["position_ids"]]
        total = rows.to(dtype) + float_rows[0].to(dtype) + float_rows[1].to(dtype)
    else:
        return _linear(operation, named, dtype)
    gamma, beta = named["gamma"].to(dtype), named["beta"].to(dtype)
    return torch.nn.functional.layer_norm(total, total.shape[-1:], gamma, beta, named["eps"])


def assert_matches_reference(operation: str, arguments: Sequence[Any], actual: Any) -> None:
    """Fails unless `actual` is what `operation` must return for `arguments`.

    `EXACT_OPERATIONS` are compared bit for bit. Floats may be off by twice the error that torch itself makes with the
    same arithmetic in the same type (see `evaluate`), measured from float64 and relative to the largest value of the
    token. A code made from such a float is right if it lies within half a step, and that error, of the exact value.
    Attention may besides round those of its 8-bit probabilities to either side that are closest to a half.
    NaN or infinite is exactly what is so in the reference; an infinity may become NaN (torch's own GELU does that).
    """
    arguments = to_device(arguments, "cpu")
    expected = _as_tuple(reference_of(operation)(*arguments))
    found = to_device(_as_tuple(actual), "cpu")
    assert len(found) == len(expected), f"{operation}: {len(found)} results, expected {len(expected)}"
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        assert (got.dtype, got.shape) == (want.dtype, want.shape), (
            f"{operation}[{index}]: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
        )
        if want.is_floating_point():
            wrong = ((got.isfinite() != want.isfinite()) | (want.isnan() & ~got.isnan())).nonzero().tolist()
            assert not wrong, f"{operation}[{index}]: NaN or infinity differs from the reference at {wrong[:4]}"
        if operation in EXACT_OPERATIONS:
            wrong = ((got != want) & ~(got.isnan() & want.isnan())).nonzero().tolist()
            assert not wrong, f"{operation}[{index}]: {len(wrong)} values are not the reference's, first at {wrong[:4]}"
    if operation in EXACT_OPERATIONS or expected[0].numel() == 0:
        return
    exact = evaluate(operation, arguments, torch.float64)
    room = _ambiguity(operation, arguments)
    if len(expected) == 3:  # a norm: floats, then the codes and scales of the float32 norm
        _assert_close(operation, found[0], exact, evaluate(operation, arguments, found[0].dtype))
        steps = exact.abs().amax(dim=1) / INT8.qmax
        inner = _error(evaluate(operation, arguments, torch.float32), exact)
        _assert_close(f"{operation} scales", found[2][:, None], steps[:, None], steps[:, None] * (1 + inner))
        _assert_nearest_codes(operation, found[1], exact / steps[:, None], slack=2 * inner)
    elif expected[0].dtype == torch.int8:
        out_scale = arguments[reference.OUT_SCALE_AT[operation]]
        inner = _error(evaluate(operation, arguments, torch.float32), exact)
        _assert_nearest_codes(operation, found[0], exact / out_scale, slack=2 * inner, room=room / out_scale)
    else:
        integer = operation in ("w8a8_linear", "w4a8_linear", "gobo_linear", "attention_int8")
        inner_dtype = torch.float32 if integer else found[0].dtype  # of an integer product only the epilogue is float
        torchs = evaluate(operation, arguments, inner_dtype).to(found[0].dtype)
        _assert_close(operation, found[0], exact, torchs, room=room)


def _ambiguity(operation: str, arguments: Sequence[Any]) -> Tensor | float:
    """By how much each value of the result may be off because integers inside may be rounded to either side."""
    if not operation.startswith("attention_int8"):
        return 0.0
    return _attention(dict(zip(_argument_names(operation), arguments, strict=True)), torch.float64)[1]


def _assert_close(what: str, actual: Tensor, exact: Tensor, torchs: Tensor, room: Tensor | float = 0.0) -> None:
    """At most twice torch's error; a result's own rounding is always allowed, for torch may by luck be exact."""
    allowed = 2 * max(_error(torchs, exact), torch.finfo(actual.dtype).eps)
    error = _error(actual, exact, room)
    assert error <= allowed, (
        f"{what}: error {error:.3g} of a token's largest value; allowed {allowed:.3g}, twice torch's own"
    )


def _error(actual: Tensor, exact: Tensor, room: Tensor | float = 0.0) -> float:
    """Largest error beyond `room`, relative to the largest magnitude of its row, over the rows that are finite in both."""
    actual = actual.to(torch.float64)
    finite = (actual.isfinite() & exact.isfinite()).all(dim=1)
    size = exact[finite].abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    off = ((actual - exact).abs() - room).clamp(min=0.0)[finite]
    return float((off / size).max()) if bool(finite.any()) else 0.0


def _assert_nearest_codes(
    what: str, codes: Tensor, exact_codes: Tensor, slack: float, room: Tensor | float = 0.0
) -> None:
    """`slack` is relative to the largest value of the token, `room` is in steps; a token with NaN in it has codes 0."""
    nan = exact_codes.isnan()
    assert bool((codes[nan] == 0).all()), f"{what}: a NaN must become code 0"
    size = exact_codes.nan_to_num(0.0).abs().amax(dim=1, keepdim=True)
    distance = (codes.to(torch.float64) - exact_codes.clamp(-INT8.qmax, INT8.qmax)).abs()
    wrong = (distance > 0.5 + slack * size + room + 1e-9) & ~nan
    worst = float(distance[wrong].max()) if bool(wrong.any()) else 0.0
    assert not bool(wrong.any()), f"{what}: {int(wrong.sum())} codes are not the nearest, up to {worst:.3f} steps away"


def _linear(operation: str, named: dict[str, Any], dtype: torch.dtype) -> Tensor:
    x = named["q"].to(torch.float64) * named["s"].to(torch.float64)[:, None] if "q" in named else named["x"]
    weight = _dequantized(operation, named, x.shape[1])
    bias = None if named["bias"] is None else named["bias"].to(dtype)
    y = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
    return torch.nn.functional.gelu(y) if named["activation"] == "gelu" else y


def _dequantized(operation: str, named: dict[str, Any], k: int) -> Tensor:
    """The weight of a linear, float64."""
    qdata, layout = named["qdata"], named["layout"]
    outliers = {name: named[name] for name in OUTLIER_TENSORS if name in named}
    if operation.startswith("gobo_a16"):
        codebook = named["codebook"]
        return reference.dequantize_dictionary(qdata, codebook, **outliers, k=k, layout=layout).to(torch.float64)
    if operation.startswith("w4a16"):
        return reference.dequantize_int4(qdata, named["scale"], k, layout).to(torch.float64)
    scale = named["scale"].to(torch.float64)
    if operation.startswith("gobo"):
        n = named["outlier_rowptr"].numel() - 1
        operand = reference.expand_dictionary(qdata, named["codebook"], n, k, layout).to(torch.float64)
        deltas = reference.dense_outliers(**outliers, n=n, k=k).to(torch.float64)
        return operand * reference.matrix_scales(scale, n)[:, None] + deltas
    if operation.startswith("w4a8"):
        return reference.expand_int4(qdata, named["group_scale"], k, layout).to(torch.float64) * scale[:, None]
    if operation.startswith("w8"):
        return reference.expand_int8(qdata, scale.numel(), k, layout).to(torch.float64) * scale[:, None]
    raise KeyError(operation)


def _attention(named: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result (t, width) with softmax and scales in `dtype`, and by how much ambiguous probabilities may move it.

    Which 8-bit code a probability gets is decided in float64, so that the types differ in their own rounding alone. A code
    `_AMBIGUOUS` or less from a half may become either neighbour: it counts as the half, and may move the sum by half of
    its value to both sides.
    """
    qkv, heads = named["qkv"], named["num_heads"]
    t, width = qkv.shape[0], qkv.shape[1] // 3
    query, key, value = qkv.view(t, 3, heads, width // heads).to(torch.float64).permute(1, 2, 0, 3)
    scales = named["scales"].expand(t, 3)
    out, room = torch.empty(heads, t, width // heads, dtype=dtype), torch.zeros_like(query)
    for start, stop in itertools.pairwise(named["cu_seqlens"].tolist()):
        span = slice(start, stop)
        products = query[:, span] @ key[:, span].transpose(1, 2)
        exact, exact_factor = reference.attention_weights(products, scales[span], named["softmax_scale"])
        _, factor = reference.attention_weights(products.to(dtype), scales[span], named["softmax_scale"])
        half = exact.floor() + 0.5
        ambiguous = (exact - half).abs() <= _AMBIGUOUS
        codes = torch.where(ambiguous, half, exact.round())
        out[:, span] = (codes @ value[:, span]).to(dtype) * factor
        room[:, span] = ambiguous.to(torch.float64) @ value[:, span].abs() / 2 * exact_factor
    return out.transpose(0, 1).reshape(t, width), room.transpose(0, 1).reshape(t, width)


def _stacked_dictionaries(
    matrices: int, n: int, k: int, scheme: Scheme, seed: int, layout: Layout
) -> dict[str, Tensor]:
    """Matrices of different magnitudes as one of n rows, as a merged query, key and value are."""
    weights = (random_weight(n // matrices, k, seed=seed + index) * (1 + index) for index in range(matrices))
    parts = [quantize(weight, scheme).tensors for weight in weights]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = torch.cat([part["outlier_rowptr"].diff() for part in parts])
    together["outlier_rowptr"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    together["codebook"] = together["codebook"].view(matrices, -1)
    return from_plain(together, scheme, (n, k), layout)


def _uneven_cu_seqlens(t: int, generator: torch.Generator) -> Tensor:
    """Bounds of up to five packed sequences of t tokens, one of them empty."""
    cuts = torch.randint(t + 1, (3,), generator=generator).sort().values
    return torch.cat((torch.tensor([0]), cuts, cuts[-1:], torch.tensor([t]))).to(torch.int32)


def _argument_names(operation: str) -> list[str]:
    schema = getattr(torch.ops.qbert, operation).default._schema
    return [argument.name for argument in schema.arguments]


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
