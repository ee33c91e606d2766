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
from qbert.errors import QBertError
from qbert.formats import SCHEMES, Role
from qbert.ops import cuda, reference, table
from qbert.ops.abi import FLOAT_TYPES, INT8_OUT, Activation
from qbert.ops.kernel import problem_of
from qbert.ops.operations import AddNorm, Linear
from qbert.target import Target
from qbert.weight import Layout, Weight

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"


def _unusable() -> str:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return cuda.missing() or cuda.extension().device_problem()


_REASON = _unusable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_REASON), reason=_REASON or "runs")]

TILES = () if _REASON else tuple(cuda.extension().tiles())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BERT_BASE = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]
BERT_LARGE = [(1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096)]
POISON = {torch.int8: -128}  # a code that no result has; floats are poisoned with NaN


def random_problem(t, n, k, *, operation="linear", **options):
    return testing.random_problem(operation, t, n, k, scheme="w8a8", layout=Layout.INT8_ROWS, device=DEVICE, **options)


def run(a, tile=""):
    return cuda.linear(a, tile=tile)


def assert_same_bits(found, a):
    """For what only multiplies, adds and rounds: no target may differ from the reference in any bit.

    The reference runs where the arguments are: its float64 sums are exact and its steps IEEE operations, anywhere.
    """
    expected = reference.linear(a)
    found = found.to(expected.device)
    wrong = ((found != expected) & ~(found.isnan() & expected.isnan())).nonzero()
    assert not len(wrong), f"{len(wrong)} values are not the reference's, first at {wrong[:4].tolist()}"


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8_out", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 16, 16), (129, 272, 400), (300, 768, 768), (777, 2304, 144)])
def test_same_bits_as_the_reference(int8_out, t, n, k, dtype, bias, tile):
    a = random_problem(t, n, k, dtype=dtype, bias=bias, seed=t, int8_out=int8_out)
    assert_same_bits(run(a, tile), a)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8_out", [False, True])
def test_gelu(int8_out, dtype, tile):
    a = random_problem(333, 528, 96, dtype=dtype, activation="gelu", seed=7, int8_out=int8_out)
    testing.assert_matches_reference(a, run(a, tile))


@pytest.mark.parametrize(("n", "k"), BERT_BASE + BERT_LARGE)
@pytest.mark.parametrize("t", [64, 1000, 4096])
@pytest.mark.parametrize("int8_out", [False, True])
def test_bert_shapes(int8_out, t, n, k):
    a = random_problem(t, n, k, dtype=torch.bfloat16, seed=n, int8_out=int8_out)
    assert_same_bits(run(a), a)


def test_random_shapes():
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: int(torch.randint(1, high, (), generator=generator))
    for seed, int8_out in itertools.product(range(10), (False, True)):
        options = {"dtype": DTYPES[seed % 3], "seed": seed, "int8_out": int8_out}
        a = random_problem(draw(1500), 16 * draw(200), 16 * draw(130), **options)
        assert_same_bits(run(a), a)


@pytest.mark.parametrize("tile", TILES)
def test_largest_sums(tile):
    """All codes of magnitude 127, in rows so long that the sums nearly fill int32."""
    t, n, k = 70, 144, 133_136
    q = torch.full((t, k), 127, dtype=torch.int8, device="cuda")
    weight = torch.full((n, k), -127, dtype=torch.int8, device="cuda")
    weight[::2] = 127
    ones = torch.ones(n, device="cuda")
    held = Weight(SCHEMES["w8a8"], (n, k), Layout.PLAIN, {"qdata": weight, "scale": ones})
    y = run(Linear(q, ones[:t], held, None, Activation.NONE, False, torch.float32), tile)
    assert torch.equal(
        y, torch.where(torch.arange(n, device="cuda") % 2 == 0, 1.0, -1.0).expand(t, n) * (k * 127 * 127)
    )


def raw(out, q, s, weight, scale, bias, *, t, n, k, tile, out_scale=None):
    """The extension itself, with rows as far apart as the tensors say."""
    cuda.extension().w8a8_linear(
        t=t, n=n, k=k, q=q.data_ptr(), q_pitch=q.stride(0), s=s.data_ptr(), weight=weight.data_ptr(),
        weight_pitch=weight.stride(0), scale=scale.data_ptr(), bias=bias.data_ptr(), bias_type=FLOAT_TYPES[bias.dtype],
        activation=Activation.NONE, out=out.data_ptr(), out_pitch=out.stride(0),
        out_type=FLOAT_TYPES.get(out.dtype, INT8_OUT), inverse_out_scale=1.0 / out_scale if out_scale else 0.0, zero=0,
        stream=torch.cuda.current_stream().cuda_stream, tile=tile,
    )  # fmt: skip


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 1, 1), (65, 129, 17), (131, 193, 255), (257, 515, 771)])
def test_odd_sizes_in_padded_rows(t, n, k, dtype, tile):
    """Padding is neither read nor written, and everything else is written."""
    options = {"int8_out": True} if dtype == torch.int8 else {"dtype": dtype}
    a = testing.random_problem("linear", t, n, k, scheme="w8a8", seed=k, **options)
    q, s, weight, scale, bias = five_of(testing.to_device(a, "cuda"))
    garbage = lambda rows, columns: torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    wide_q, wide_weight = garbage(t + 1, -(-k // 16) * 16 + 16), garbage(n + 1, -(-k // 16) * 16 + 32)
    wide_q[:t, :k], wide_weight[:n, :k] = q, weight
    poison = POISON.get(dtype, float("nan"))
    out = torch.full((t + 1, -(-n // 16) * 16 + 16), poison, dtype=dtype, device="cuda")
    out_scale = a.out if dtype == torch.int8 else None
    raw(out, wide_q, s, wide_weight, scale, bias, t=t, n=n, k=k, tile=tile, out_scale=out_scale)
    assert_same_bits(out[:t, :n].contiguous(), a)
    untouched = torch.ones_like(out, dtype=torch.bool)
    untouched[:t, :n] = False
    left = out[untouched]
    assert bool((left == poison).all() if dtype == torch.int8 else left.isnan().all())


@pytest.mark.parametrize("int8_out", [False, True])
def test_nan_scale_stays_in_its_token(int8_out):
    a = random_problem(200, 256, 128, activation="gelu", int8_out=int8_out)
    a.s[77] = float("nan")
    testing.assert_matches_reference(a, run(a))


@pytest.mark.parametrize("tile", TILES)
def test_same_bits_every_time_and_in_every_batch(tile):
    a = random_problem(500, 768, 768, dtype=torch.bfloat16, activation="gelu")
    first = run(a, tile)
    for _ in range(10):
        assert torch.equal(run(a, tile), first)
    part = run(a._replace(x=a.x[37:101].clone(), s=a.s[37:101].clone()), tile)
    assert torch.equal(part, first[37:101])


def test_side_stream_and_graph():
    a = random_problem(256, 768, 768, dtype=torch.float16)
    expected = run(a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(a)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def five_of(a):
    return a.x, a.s, a.weight.qdata, a.weight.scale, a.bias


def test_host_memory_is_refused():
    q, s, weight, scale, bias = five_of(testing.to_device(random_problem(16, 16, 16), "cpu"))
    with pytest.raises(QBertError, match=r"q is not in a GPU's memory|asking where q is"):
        raw(torch.empty(16, 16), q, s, weight, scale, bias, t=16, n=16, k=16, tile="")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_memory_of_another_gpu_is_refused():
    q, s, weight, scale, bias = five_of(testing.to_device(random_problem(16, 16, 16), "cuda:1"))
    with torch.cuda.device(0), pytest.raises(QBertError, match="q is on device 1; the launch goes to device 0"):
        raw(torch.empty(16, 16, device="cuda:0"), q, s, weight, scale, bias, t=16, n=16, k=16, tile="")


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [8, 256, 264, 384, 512, 768, 1016, 1024, 2048])
@pytest.mark.parametrize("t", [1, 3, 4, 5, 1000, 4096])
def test_add_norm(t, k):
    for y_dtype, dtype in itertools.product(DTYPES, DTYPES):
        a = testing.random_problem("add_norm", t, 0, k, dtype=dtype, seed=k, device="cuda")
        a = a._replace(y=a.y.to(y_dtype))
        found = cuda.add_norm(a)
        testing.assert_matches_reference(a, found)
        for _ in range(3):
            again = cuda.add_norm(a)
            assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_rows_do_not_depend_on_each_other():
    a = testing.random_problem("add_norm", 100, 0, 768, device="cuda")
    whole = cuda.add_norm(a)
    part = cuda.add_norm(a._replace(y=a.y[17:40].clone(), residual=a.residual[17:40].clone()))
    assert all(torch.equal(one[17:40], other) for one, other in zip(whole, part, strict=True))


def test_a_row_that_is_not_finite_stays_alone():
    a = testing.random_problem("add_norm", 9, 0, 768, device="cuda")
    a.y[2, 700], a.residual[5, 3] = float("nan"), float("inf")
    found = cuda.add_norm(a)
    testing.assert_matches_reference(a, found)
    assert found[2].isnan().nonzero().flatten().tolist() == [2, 5]


# ---- packed weights -------------------------------------------------------------------------------------------------

OWN = {
    scheme: layout
    for scheme in testing.schemes_of("linear")
    if (layout := cuda.own_layout(SCHEMES[scheme])) is not None
}
PACKED = [(scheme, int8_out) for scheme in OWN if SCHEMES[scheme].activation is not None for int8_out in (False, True)]
WEIGHT_ONLY = [scheme for scheme in OWN if SCHEMES[scheme].activation is None]
LOWBIT_TILES = () if _REASON else tuple(cuda.extension().lowbit_tiles())
FEW = 64  # tokens that weight-only kernels take
TRITON_TARGET = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448, prefer="triton")


def packed(scheme, t, n, k, **options):
    """A linear whose weight lies in the compiled kernels' own layout."""
    return testing.random_problem("linear", t, n, k, scheme=scheme, layout=OWN[scheme], device=DEVICE, **options)


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


@pytest.mark.parametrize(("scheme", "int8_out"), PACKED)
@pytest.mark.parametrize("tile", ["", *LOWBIT_TILES])
@pytest.mark.parametrize(
    ("t", "n", "k"), [(1, 1, 128), (17, 130, 256), (64, 96, 384), (131, 768, 768), (300, 257, 128)]
)
def test_packed_weights(poisoned, scheme, int8_out, t, n, k, tile):
    for dtype in DTYPES[:1] if int8_out else DTYPES:
        a = packed(scheme, t, n, k, dtype=dtype, seed=t, bias=t != 64, int8_out=int8_out)
        testing.assert_matches_reference(a, run(a, tile))


@pytest.mark.parametrize(("scheme", "int8_out"), PACKED)
@pytest.mark.parametrize("t", [5, 200])
def test_packed_weights_with_gelu(poisoned, scheme, int8_out, t):
    a = packed(scheme, t, 200, 256, activation="gelu", seed=t, int8_out=int8_out)
    testing.assert_matches_reference(a, run(a))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
@pytest.mark.parametrize("k", [17, 100, 127, 129, 255])
def test_dictionaries_of_any_width(poisoned, scheme, k):
    for t in (3, 70):
        a = packed(scheme, t, 67, k, seed=k)
        testing.assert_matches_reference(a, run(a))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
def test_stacked_dictionaries(scheme):
    """Query, key and value as one product: dictionary and scale change with the row."""
    for t in (16, 500):
        a = packed(scheme, t, 3 * 192, 256, matrices=3, dtype=torch.bfloat16)
        testing.assert_matches_reference(a, run(a))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8"])
@pytest.mark.parametrize(("n", "k"), BERT_BASE + BERT_LARGE)
def test_packed_weights_equal_triton_s(scheme, n, k):
    """Two programs of two hands: a token's bits depend on neither."""
    theirs = table.select_layout(SCHEMES[scheme], Role.LINEAR, TRITON_TARGET)
    for t in (1, 64, 1000):
        ours = packed(scheme, t, n, k, dtype=torch.bfloat16, seed=n)
        other = ours._replace(weight=ours.weight.to_layout(theirs))
        row = table.select("linear", problem_of(other), TRITON_TARGET)
        assert row.name.startswith("triton")
        assert torch.equal(run(ours), row.call(other))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8"])
def test_a_token_s_bits_do_not_depend_on_kernel_or_batch(scheme):
    a = packed(scheme, FEW, 768, 768, dtype=torch.bfloat16, activation="gelu")
    found = {tile: run(a, tile) for tile in LOWBIT_TILES}
    first = found[LOWBIT_TILES[0]]
    assert all(torch.equal(first, other) for other in found.values())
    for _ in range(10):
        assert torch.equal(run(a), first)
    for tokens in (slice(0, 1), slice(13, 40)):
        assert torch.equal(run(a._replace(x=a.x[tokens].clone(), s=a.s[tokens].clone())), first[tokens])


def test_random_packed_problems():
    generator = torch.Generator().manual_seed(1)
    draw = lambda high: int(torch.randint(1, high, (), generator=generator))
    for seed, (scheme, int8_out) in itertools.product(range(4), PACKED):
        options = {"dtype": DTYPES[seed % 3], "seed": seed, "int8_out": int8_out}
        a = packed(scheme, draw(700), draw(900), 128 * draw(9), **options)
        testing.assert_matches_reference(a, run(a))


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 1, 128), (7, 130, 256), (33, 65, 384), (64, 768, 768), (65, 96, 128)])
def test_weight_only(poisoned, scheme, dtype, t, n, k):
    """float32 and more tokens than 64 go by the expanded weight."""
    for activation in ("none", "gelu"):
        a = packed(scheme, t, n, k, dtype=dtype, seed=t, activation=activation)
        testing.assert_matches_reference(a, run(a))


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_weight_only_results_do_not_depend_on_the_batch(scheme):
    a = packed(scheme, FEW, 768, 3072, dtype=torch.bfloat16)
    whole = run(a)
    for _ in range(10):
        assert torch.equal(run(a), whole)
    for tokens in (slice(0, 1), slice(5, 22)):
        assert torch.equal(run(a._replace(x=a.x[tokens].clone())), whole[tokens])


# ---- an encoder layer of few tokens ---------------------------------------------------------------------------------

ADD_NORM_TILES = () if _REASON else tuple(cuda.extension().add_norm_tiles())


@pytest.mark.parametrize("tile", ADD_NORM_TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(256, 128), (384, 1536), (768, 768), (768, 3072), (1024, 4096)])
def test_linear_with_norm_is_one_after_the_other(poisoned, tile, dtype, n, k):
    if cuda.extension().add_norm_cycles(tile, 1, n, k) == float("inf"):
        pytest.skip("rows that this tile does not take")
    for t in (1, 16, 33, 128, 500):
        a = random_problem(t, n, k, operation="linear_add_norm", dtype=dtype, seed=t)
        found = cuda.linear_add_norm(a, tile=tile)
        expected = cuda.add_norm(AddNorm(run(a.linear), a.residual, a.norm, a.keeps))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- grids that overlap ---------------------------------------------------------------------------------------------


def chain(graph=False):
    """Codes after 48 products, each of which reads what the one before wrote: few tokens, so that grids are short."""
    steps = [
        random_problem(48, 768, 768, seed=1, int8_out=True),
        packed("gobo3a8", 48, 768, 768, seed=2, int8_out=True),
        packed("w4a8", 48, 768, 768, seed=3, int8_out=True),
    ]
    first = steps[0].x

    def forward():
        q = first
        for step in steps * 16:
            q = run(step._replace(x=q))
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
