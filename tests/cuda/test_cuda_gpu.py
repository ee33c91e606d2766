"""qbert._cuda on an H100: bit for bit where the arithmetic is IEEE, all written and nothing beyond, the same each time.

Integer linears and what follows them must not differ from the reference in any bit; linears of float activations have its
tolerance, for their float sums are added in another order than torch's.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qbert import testing
from qbert.dispatch import COMPILED_LAYOUTS, select_layout
from qbert.errors import QBertError
from qbert.formats import SCHEMES, Role
from qbert.layout import Layout
from qbert.ops import cuda, reference_of
from qbert.ops.cpu_native import FLOAT_TYPES, activation_code
from qbert.ops.triton import TRITON
from qbert.target import Target

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"


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
    return testing.random_arguments(operation, t, n, k, layout=Layout.INT8_ROWS, device=DEVICE, **options)


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
    part = run("w8a8_linear", (q[37:101].clone(), s[37:101].clone(), *rest), tile)
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
    part = cuda.add_layer_norm_quantize(y[17:40].clone(), residual[17:40].clone(), *rest)
    assert all(torch.equal(one[17:40], other) for one, other in zip(whole, part, strict=True))


def test_a_row_that_is_not_finite_stays_alone():
    arguments = testing.random_arguments("add_layer_norm_quantize", 9, 0, 768, device="cuda")
    arguments[0][2, 700], arguments[1][5, 3] = float("nan"), float("inf")
    found = cuda.add_layer_norm_quantize(*arguments)
    testing.assert_matches_reference("add_layer_norm_quantize", arguments, found)
    assert found[2].isnan().nonzero().flatten().tolist() == [2, 5]


# ---- packed weights -------------------------------------------------------------------------------------------------

PACKED = [
    (operation, scheme)
    for operation in ("gobo_linear", "gobo_linear_requant", "w4a8_linear", "w4a8_linear_requant")
    for scheme in testing.schemes_of(operation)
]
WEIGHT_ONLY = [
    (operation, scheme)
    for operation in ("gobo_a16_linear", "w4a16_linear", "w8a16_linear")
    for scheme in testing.schemes_of(operation)
]
LOWBIT_TILES = () if _REASON else tuple(cuda.extension().lowbit_tiles())
FEW = 64  # tokens that weight-only kernels take
TRITON_TARGET = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448, prefer="triton")


def packed(operation, scheme, t, n, k, **options):
    """Arguments in the compiled kernels' own layout."""
    layout = COMPILED_LAYOUTS[operation]
    return testing.random_arguments(operation, t, n, k, scheme=scheme, layout=layout, device=DEVICE, **options)


@pytest.fixture
def poisoned(monkeypatch):
    """Results and workspaces come full of wrong bytes, with more of them around, which must stay."""
    held = []
    real = torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, **options):
        shape, dtype = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape), dtype or self.dtype
        memory = real(self, shape.numel() * dtype.itemsize + 512, dtype=torch.uint8, **options).fill_(77)
        held.append(memory)
        return memory[256:-256].view(dtype).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for memory in held:
        assert bool((memory[:256] == 77).all())
        assert bool((memory[-256:] == 77).all())


@pytest.mark.parametrize(("operation", "scheme"), PACKED)
@pytest.mark.parametrize("tile", ["", *LOWBIT_TILES])
@pytest.mark.parametrize(
    ("t", "n", "k"), [(1, 1, 128), (17, 130, 256), (64, 96, 384), (131, 768, 768), (300, 257, 128)]
)
def test_packed_weights(poisoned, operation, scheme, t, n, k, tile):
    for dtype in DTYPES if operation.endswith("_linear") else DTYPES[:1]:
        arguments = packed(operation, scheme, t, n, k, dtype=dtype, seed=t, bias=t != 64)
        testing.assert_matches_reference(operation, arguments, run(operation, arguments, tile))


@pytest.mark.parametrize(("operation", "scheme"), PACKED)
@pytest.mark.parametrize("t", [5, 200])
def test_packed_weights_with_gelu(poisoned, operation, scheme, t):
    arguments = packed(operation, scheme, t, 200, 256, activation="gelu", seed=t)
    testing.assert_matches_reference(operation, arguments, run(operation, arguments))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
@pytest.mark.parametrize("k", [17, 100, 127, 129, 255])
def test_dictionaries_of_any_width(poisoned, scheme, k):
    for t in (3, 70):
        arguments = packed("gobo_linear", scheme, t, 67, k, seed=k)
        testing.assert_matches_reference("gobo_linear", arguments, run("gobo_linear", arguments))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
def test_stacked_dictionaries(scheme):
    """Query, key and value as one product: dictionary and scale change with the row."""
    for t in (16, 500):
        arguments = packed("gobo_linear", scheme, t, 3 * 192, 256, matrices=3, dtype=torch.bfloat16)
        testing.assert_matches_reference("gobo_linear", arguments, run("gobo_linear", arguments))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8"])
@pytest.mark.parametrize(("n", "k"), BERT_BASE + BERT_LARGE)
def test_packed_weights_equal_triton_s(scheme, n, k):
    """Two programs of two hands: a token's bits depend on neither."""
    operation = "w4a8_linear" if scheme == "w4a8" else "gobo_linear"
    theirs = select_layout(SCHEMES[scheme], Role.LINEAR, TRITON_TARGET)
    for t in (1, 64, 1000):
        ours = packed(operation, scheme, t, n, k, dtype=torch.bfloat16, seed=n)
        other = testing.random_arguments(
            operation, t, n, k, scheme=scheme, layout=theirs, device=DEVICE, dtype=torch.bfloat16, seed=n
        )
        assert torch.equal(run(operation, ours), TRITON[operation](*other))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8"])
def test_a_token_s_bits_do_not_depend_on_kernel_or_batch(scheme):
    operation = "w4a8_linear" if scheme == "w4a8" else "gobo_linear"
    arguments = packed(operation, scheme, FEW, 768, 768, dtype=torch.bfloat16, activation="gelu")
    found = {tile: run(operation, arguments, tile) for tile in LOWBIT_TILES}
    first = found[LOWBIT_TILES[0]]
    assert all(torch.equal(first, other) for other in found.values())
    for _ in range(10):
        assert torch.equal(run(operation, arguments), first)
    q, s, *rest = arguments
    for tokens in (slice(0, 1), slice(13, 40)):
        assert torch.equal(run(operation, (q[tokens].clone(), s[tokens].clone(), *rest)), first[tokens])


def test_random_packed_problems():
    generator = torch.Generator().manual_seed(1)
    draw = lambda high: int(torch.randint(1, high, (), generator=generator))
    for seed, (operation, scheme) in itertools.product(range(4), PACKED):
        arguments = packed(operation, scheme, draw(700), draw(900), 128 * draw(9), dtype=DTYPES[seed % 3], seed=seed)
        testing.assert_matches_reference(operation, arguments, run(operation, arguments))


@pytest.mark.parametrize(("operation", "scheme"), WEIGHT_ONLY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 1, 128), (7, 130, 256), (33, 65, 384), (64, 768, 768), (65, 96, 128)])
def test_weight_only(poisoned, operation, scheme, dtype, t, n, k):
    """float32 and more tokens than 64 go by the expanded weight."""
    for activation in ("none", "gelu"):
        arguments = packed(operation, scheme, t, n, k, dtype=dtype, seed=t, activation=activation)
        testing.assert_matches_reference(operation, arguments, run(operation, arguments))


@pytest.mark.parametrize(("operation", "scheme"), WEIGHT_ONLY)
def test_weight_only_results_do_not_depend_on_the_batch(operation, scheme):
    x, *rest = packed(operation, scheme, FEW, 768, 3072, dtype=torch.bfloat16)
    whole = run(operation, (x, *rest))
    for _ in range(10):
        assert torch.equal(run(operation, (x, *rest)), whole)
    for tokens in (slice(0, 1), slice(5, 22)):
        assert torch.equal(run(operation, (x[tokens].clone(), *rest)), whole[tokens])


# ---- an encoder layer of few tokens ---------------------------------------------------------------------------------

ADD_NORM_TILES = () if _REASON else tuple(cuda.extension().add_norm_tiles())


@pytest.mark.parametrize("tile", ADD_NORM_TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(256, 128), (384, 1536), (768, 768), (768, 3072), (1024, 4096)])
def test_linear_with_norm_is_one_after_the_other(poisoned, tile, dtype, n, k):
    operation = "w8a8_linear_add_norm"
    if cuda.extension().add_norm_cycles(tile, 1, n, k) == float("inf"):
        pytest.skip("rows that this tile does not take")
    for t in (1, 16, 33, 128, 500):
        arguments = problem(operation, t, n, k, dtype=dtype, seed=t)
        found = cuda.KERNELS[operation](*arguments, tile=tile)
        linear, (residual, gamma, beta, eps, layout) = arguments[:5], arguments[5:]
        y = cuda.w8a8_linear(*linear, "none", residual.dtype, layout)
        expected = cuda.add_layer_norm_quantize(y, residual, gamma, beta, eps)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- grids that overlap ---------------------------------------------------------------------------------------------


def chain(graph=False):
    """Codes after 48 products, each of which reads what the one before wrote: few tokens, so that grids are short."""
    steps = [
        ("w8a8_linear_requant", problem("w8a8_linear_requant", 48, 768, 768, seed=1)),
        ("gobo_linear_requant", packed("gobo_linear_requant", "gobo3a8", 48, 768, 768, seed=2)),
        ("w4a8_linear_requant", packed("w4a8_linear_requant", "w4a8", 48, 768, 768, seed=3)),
    ]
    first = steps[0][1][0]

    def forward():
        q = first
        for operation, (_, *rest) in steps * 16:
            q = run(operation, (q, *rest))
        return q

    if not graph:
        return forward()
    forward()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        q = forward()
    q.zero_()
    captured.replay()
    torch.cuda.synchronize()
    return q


def digest(codes):
    return hashlib.sha256(codes.cpu().numpy().tobytes()).hexdigest()


def test_overlapping_grids_change_nothing():
    """Launched one on the heels of the other, in a graph, and where QBERT_PDL=0 makes each wait: the same codes."""
    path = os.pathsep.join((str(Path(__file__).parent), str(ROOT)))
    command = [sys.executable, "-c", "import test_cuda_gpu as gpu; print(gpu.digest(gpu.chain()))"]
    waiting = subprocess.run(
        command, env={**os.environ, "QBERT_PDL": "0", "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    found = {digest(chain()) for _ in range(10)} | {digest(chain(graph=True))}
    assert found == {waiting.stdout.split()[-1]}
