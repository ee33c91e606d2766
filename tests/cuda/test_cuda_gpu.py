"""qbert._cuda on an H100: bit for bit where the arithmetic is IEEE, all written and nothing beyond, the same each time."""

from __future__ import annotations

import itertools

import pytest
import torch

from qbert import testing
from qbert.errors import QBertError
from qbert.layout import Layout
from qbert.ops import cuda, reference_of
from qbert.ops.cpu_native import FLOAT_TYPES, activation_code


def _unusable() -> str:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return cuda.missing() or cuda.extension().device_problem()


_REASON = _unusable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_REASON), reason=_REASON or "runs")]

TILES = () if _REASON else tuple(cuda.extension().tiles())
LINEARS = ("w8a8_linear", "w8a8_linear_requant")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BERT_BASE = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]
BERT_LARGE = [(1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096)]
POISON = {torch.int8: -128}  # a code that no result has; floats are poisoned with NaN


def problem(operation, t, n, k, **options):
    return testing.random_arguments(operation, t, n, k, layout=Layout.INT8_ROWS, device="cuda", **options)


def run(operation, arguments, tile=""):
    y = cuda.KERNELS[operation](*arguments, tile=tile)
    assert y is not NotImplemented
    return y


def assert_same_bits(found, operation, arguments):
    """For what only multiplies, adds and rounds: no target may differ from the reference in any bit.

    The reference runs where the arguments are: its float64 sums are exact and its steps IEEE operations, anywhere.
    """
    expected = reference_of(operation)(*arguments)
    found = found.to(expected.device)
    wrong = ((found != expected) & ~(found.isnan() & expected.isnan())).nonzero()
    assert not len(wrong), f"{len(wrong)} values are not the reference's, first at {wrong[:4].tolist()}"


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", LINEARS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 16, 16), (129, 272, 400), (300, 768, 768), (777, 2304, 144)])
def test_same_bits_as_the_reference(operation, t, n, k, dtype, bias, tile):
    arguments = problem(operation, t, n, k, dtype=dtype, bias=bias, seed=t)
    assert_same_bits(run(operation, arguments, tile), operation, arguments)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", LINEARS)
def test_gelu(operation, dtype, tile):
    arguments = problem(operation, 333, 528, 96, dtype=dtype, activation="gelu", seed=7)
    testing.assert_matches_reference(operation, arguments, run(operation, arguments, tile))


@pytest.mark.parametrize(("n", "k"), BERT_BASE + BERT_LARGE)
@pytest.mark.parametrize("t", [64, 1000, 4096])
@pytest.mark.parametrize("operation", LINEARS)
def test_bert_shapes(operation, t, n, k):
    arguments = problem(operation, t, n, k, dtype=torch.bfloat16, seed=n)
    assert_same_bits(run(operation, arguments), operation, arguments)


def test_random_shapes():
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: int(torch.randint(1, high, (), generator=generator))
    for seed, operation in itertools.product(range(10), LINEARS):
        arguments = problem(operation, draw(1500), 16 * draw(200), 16 * draw(130), dtype=DTYPES[seed % 3], seed=seed)
        assert_same_bits(run(operation, arguments), operation, arguments)


@pytest.mark.parametrize("tile", TILES)
def test_largest_sums(tile):
    """All codes of magnitude 127, in rows so long that the sums nearly fill int32."""
    t, n, k = 70, 144, 133_136
    q = torch.full((t, k), 127, dtype=torch.int8, device="cuda")
    weight = torch.full((n, k), -127, dtype=torch.int8, device="cuda")
    weight[::2] = 127
    ones = torch.ones(n, device="cuda")
    y = cuda.w8a8_linear(q, ones[:t], weight, ones, None, "none", torch.float32, "plain", tile=tile)
    assert torch.equal(
        y, torch.where(torch.arange(n, device="cuda") % 2 == 0, 1.0, -1.0).expand(t, n) * (k * 127 * 127)
    )


def raw(out, q, s, weight, scale, bias, *, t, n, k, tile, activation="none", out_scale=None):
    """The extension itself, with rows as far apart as the tensors say."""
    cuda.extension().w8a8_linear(
        t=t, n=n, k=k, q=q.data_ptr(), q_pitch=q.stride(0), s=s.data_ptr(), weight=weight.data_ptr(),
        weight_pitch=weight.stride(0), scale=scale.data_ptr(), bias=bias.data_ptr(), bias_type=FLOAT_TYPES[bias.dtype],
        activation=activation_code(activation), out=out.data_ptr(), out_pitch=out.stride(0),
        out_type=FLOAT_TYPES.get(out.dtype, -1), inverse_out_scale=1.0 / out_scale if out_scale else 0.0,
        stream=torch.cuda.current_stream().cuda_stream, tile=tile,
    )  # fmt: skip


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 1, 1), (65, 129, 17), (131, 193, 255), (257, 515, 771)])
def test_odd_sizes_in_padded_rows(t, n, k, dtype, tile):
    """Padding is neither read nor written, and everything else is written."""
    operation = "w8a8_linear_requant" if dtype == torch.int8 else "w8a8_linear"
    options = {} if dtype == torch.int8 else {"dtype": dtype}
    arguments = testing.random_arguments(operation, t, n, k, seed=k, **options)
    q, s, weight, scale, bias = testing.to_device(arguments[:5], "cuda")
    garbage = lambda rows, columns: torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    wide_q, wide_weight = garbage(t + 1, -(-k // 16) * 16 + 16), garbage(n + 1, -(-k // 16) * 16 + 32)
    wide_q[:t, :k], wide_weight[:n, :k] = q, weight
    poison = POISON.get(dtype, float("nan"))
    out = torch.full((t + 1, -(-n // 16) * 16 + 16), poison, dtype=dtype, device="cuda")
    out_scale = arguments[6] if dtype == torch.int8 else None
    raw(out, wide_q, s, wide_weight, scale, bias, t=t, n=n, k=k, tile=tile, out_scale=out_scale)
    assert_same_bits(out[:t, :n].contiguous(), operation, arguments)
    untouched = torch.ones_like(out, dtype=torch.bool)
    untouched[:t, :n] = False
    left = out[untouched]
    assert bool((left == poison).all() if dtype == torch.int8 else left.isnan().all())


@pytest.mark.parametrize("operation", LINEARS)
def test_nan_scale_stays_in_its_token(operation):
    arguments = list(problem(operation, 200, 256, 128, activation="gelu"))
    arguments[1] = arguments[1].clone()
    arguments[1][77] = float("nan")
    testing.assert_matches_reference(operation, arguments, run(operation, arguments))


@pytest.mark.parametrize("tile", TILES)
def test_same_bits_every_time_and_in_every_batch(tile):
    arguments = problem("w8a8_linear", 500, 768, 768, dtype=torch.bfloat16, activation="gelu")
    first = run("w8a8_linear", arguments, tile)
    for _ in range(10):
        assert torch.equal(run("w8a8_linear", arguments, tile), first)
    q, s, *rest = arguments
    part = run("w8a8_linear", (q[37:101].contiguous(), s[37:101].contiguous(), *rest), tile)
    assert torch.equal(part, first[37:101])


def test_side_stream_and_graph():
    arguments = problem("w8a8_linear", 256, 768, 768, dtype=torch.float16)
    expected = run("w8a8_linear", arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run("w8a8_linear", arguments)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_host_memory_is_refused():
    arguments = [each.cpu() if isinstance(each, torch.Tensor) else each for each in problem("w8a8_linear", 16, 16, 16)]
    q, s, weight, scale, bias = arguments[:5]
    with pytest.raises(QBertError, match=r"q is not in a GPU's memory|asking where q is"):
        raw(torch.empty(16, 16), q, s, weight, scale, bias, t=16, n=16, k=16, tile="")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_memory_of_another_gpu_is_refused():
    q, s, weight, scale, bias = (each.to("cuda:1") for each in problem("w8a8_linear", 16, 16, 16)[:5])
    with torch.cuda.device(0), pytest.raises(QBertError, match="q is on device 1; the launch goes to device 0"):
        raw(torch.empty(16, 16, device="cuda:0"), q, s, weight, scale, bias, t=16, n=16, k=16, tile="")


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [8, 256, 264, 384, 512, 768, 1016, 1024, 2048])
@pytest.mark.parametrize("t", [1, 3, 4, 5, 1000, 4096])
def test_add_layer_norm_quantize(t, k):
    for y_dtype, dtype in itertools.product(DTYPES, DTYPES):
        y, *rest = testing.random_arguments("add_layer_norm_quantize", t, 0, k, dtype=dtype, seed=k, device="cuda")
        arguments = (y.to(y_dtype), *rest)
        found = cuda.add_layer_norm_quantize(*arguments)
        testing.assert_matches_reference("add_layer_norm_quantize", arguments, found)
        for _ in range(3):
            again = cuda.add_layer_norm_quantize(*arguments)
            assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_rows_do_not_depend_on_each_other():
    y, residual, *rest = testing.random_arguments("add_layer_norm_quantize", 100, 0, 768, device="cuda")
    whole = cuda.add_layer_norm_quantize(y, residual, *rest)
    part = cuda.add_layer_norm_quantize(y[17:40].contiguous(), residual[17:40].contiguous(), *rest)
    assert all(torch.equal(one[17:40], other) for one, other in zip(whole, part, strict=True))


def test_a_row_that_is_not_finite_stays_alone():
    arguments = testing.random_arguments("add_layer_norm_quantize", 9, 0, 768, device="cuda")
    arguments[0][2, 700], arguments[1][5, 3] = float("nan"), float("inf")
    found = cuda.add_layer_norm_quantize(*arguments)
    testing.assert_matches_reference("add_layer_norm_quantize", arguments, found)
    assert found[2].isnan().nonzero().flatten().tolist() == [2, 5]
