"""An encoder layer of few tokens, emulated: W8A8 by small tiles, and a linear with the norm after it in one launch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_encoders import encoder_of, fused_model, hidden_of, padded_batch

from qbert import testing, tiles
from qbert.errors import MissingDependency, QBertError
from qbert.formats import SCHEMES
from qbert.ops import cuda, reference, table
from qbert.ops.composed import LINEAR_THEN_NORM
from qbert.ops.cuda import launch, layer, rows
from qbert.ops.cuda.choice import norms_obstacle
from qbert.ops.kernel import Kernel, Problem
from qbert.ops.operations import AddNorm, Norm
from qbert.target import Target
from qbert.weight import Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATION = "linear_add_norm"
H100 = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448, native=True)
ASKED = replace(H100, prefer="cuda")
JOINED = Problem(SCHEMES["w8a8"], Layout.INT8_ROWS, 768, 768, torch.bfloat16, 16)
SMALL = [
    f"{tokens}x64x128 small{split}" for tokens in (64, 32, 16) for split in ("", ", k by 2", ", k by 4", ", k by 8")
]


def same_bits(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(got.isnan(), want.isnan())


# ---- W8A8 by small tiles --------------------------------------------------------------------------------------------


def random_linear(t, n, k, **problem):
    return testing.random_problem("linear", t, n, k, scheme="w8a8", layout=Layout.INT8_ROWS, **problem)


def linear(t, n, k, tile, **problem):
    a = random_linear(t, n, k, **problem)
    found = cuda.linear(a, tile=tile)
    if problem.get("activation") == "gelu":
        testing.assert_matches_reference(a, found)
    else:
        assert torch.equal(found, reference.linear(a))
    return found


@pytest.mark.parametrize("tile", SMALL)
def test_every_small_tile_gives_the_reference_s_bits(emulated, tile):
    for seed, (t, n, k) in enumerate([(1, 8, 16), (17, 72, 272), (65, 136, 144)]):
        emulated.emulate(seed=seed)
        linear(t, n, k, tile, seed=seed)


@pytest.mark.parametrize(("tile", "t"), [(SMALL[1], 70), (SMALL[6], 33), (SMALL[11], 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_tiles_end_a_linear_in_every_way(emulated, tile, t, dtype):
    for int8_out in (False, True):
        linear(t, 80, 144, tile, int8_out=int8_out, dtype=dtype, bias=False)
        linear(t, 80, 144, tile, int8_out=int8_out, dtype=dtype, activation="gelu")


@pytest.mark.parametrize("seed", range(12))
def test_small_tiles_in_any_order_of_copies_and_products(emulated, seed):
    """More steps of k than the pipeline has stages, so that stages are used again."""
    emulated.emulate(seed=seed)
    linear(20, 72, 9 * 128 + 16, SMALL[8], seed=seed)
    linear(40, 64, 12 * 128 + 16, SMALL[seed % len(SMALL)], seed=seed)


def test_small_tiles_give_a_token_the_same_bits_alone(emulated):
    a = random_linear(40, 64, 400, activation="gelu")
    whole = cuda.linear(a, tile=SMALL[2])
    for tile in SMALL[::3]:
        assert torch.equal(cuda.linear(a._replace(x=a.x[13:14], s=a.s[13:14].clone()), tile=tile), whole[13:14])


def test_nothing_beside_the_result_is_written(emulated, monkeypatch):
    """Rows in wider ones, outputs in the middle of poisoned memory."""
    t, n, k, pitch = 19, 77, 48, 96
    a = random_linear(t, n, k)
    q, s, weight, scale, bias = a.x, a.s, a.weight.qdata, a.weight.scale, a.bias
    for out_type, dtype in ((0, torch.float32), (1, torch.bfloat16), (-1, torch.int8)):
        memory = torch.full((t + 2, pitch), 77, dtype=dtype)
        emulated.w8a8_linear(
            t=t, n=n, k=k, q=q.data_ptr(), q_pitch=k, s=s.data_ptr(), weight=weight.data_ptr(), weight_pitch=k,
            scale=scale.data_ptr(), bias=bias.data_ptr(), bias_type=0, activation=0, out=memory[1].data_ptr(),
            out_pitch=pitch, out_type=out_type, inverse_out_scale=1 / 0.25, zero=0, stream=0, tile=SMALL[5],
        )  # fmt: skip
        expected = reference.linear(a._replace(out=0.25 if dtype == torch.int8 else dtype))
        assert torch.equal(memory[1:-1, :n], expected)
        assert bool((memory[0] == 77).all() and (memory[-1] == 77).all() and (memory[1:-1, n:] == 77).all())


def test_a_small_tile_refuses_what_its_grid_cannot_count(emulated):
    legal = dict.fromkeys(("q", "s", "weight", "scale", "out"), 1 << 20)
    with pytest.raises(QBertError, match=r"t is 1048561; allowed with tile 16x64x128 small: 1 \.\.\. 1048560"):
        emulated.w8a8_linear(
            **legal, t=65535 * 16 + 1, n=16, k=16, q_pitch=16, weight_pitch=16, bias=0, bias_type=0, activation=0,
            out_pitch=16, out_type=0, inverse_out_scale=0.0, zero=0, stream=0, tile=SMALL[8],
        )  # fmt: skip
    assert cuda.linear(random_linear(1, 16, 16), tile=SMALL[8]).shape == (1, 16)


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_few_tokens_get_small_tiles_and_many_do_not(emulated):
    for n, k in ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096)):
        for t in (1, 16, 64):
            assert "small" in emulated.choose(t, n, k)
        for t in (1024, 4096):
            assert "small" not in emulated.choose(t, n, k)


def test_model_of_small_tiles_counts_blocks(emulated):
    def cycles(tile, t, n, k, multiprocessors=132):
        return emulated.model_cycles(tile, t, n, k, False, multiprocessors)

    assert cycles(SMALL[0], 128, 64 * 66, 768) < cycles(SMALL[0], 129, 64 * 66, 768)  # one wave, then another
    assert cycles(SMALL[2], 64, 768, 3072) < cycles(SMALL[0], 64, 768, 3072)
    assert cycles(SMALL[2], 64, 768, 128) > cycles(SMALL[0], 64, 768, 128)  # nothing to share, but an exchange


def test_the_norm_joins_the_linear_where_that_is_faster(emulated):
    base, large = (768, 768), (1024, 1024)
    for n, k in (base, large, (384, 384)):
        assert emulated.add_norm_choose(128, n, k)
        assert emulated.add_norm_choose(8192, n, k) == ""
    for tile in emulated.add_norm_tiles():
        assert emulated.add_norm_cycles(tile, 128, 768, 768) > 0
        assert emulated.add_norm_cycles(tile, 128, 1152, 768) == float("inf")
    assert emulated.add_norm_cycles("32 tokens", 128, 256, 768) == float("inf")
    with pytest.raises(QBertError, match="there is no tile '8 tokens'; allowed: 16 tokens, 32 tokens"):
        emulated.add_norm_cycles("8 tokens", 1, 768, 768)
    with pytest.raises(QBertError, match="t is 0; allowed: 1 "):
        emulated.add_norm_choose(0, 768, 768)


@pytest.mark.parametrize(("prefer", "sm", "both"), [("cuda", 90, True), ("", 90, False), ("triton", 90, False)])
def test_one_answer_for_the_norm_alone_and_joined(prefer, sm, both):
    """Whatever the problem: a token's bits may not depend on its batch."""
    target = Target("cuda", "", sm=sm, sm_count=132, native=True, prefer=prefer)
    norms = [Problem(None, None, 0, 768, torch.bfloat16, t) for t in (1, 128, 4096)]
    answers = {rows.obstacle(norm, target) is None for norm in norms}
    answers |= {norms_obstacle(operation, norms[0], target) is None for operation in (OPERATION, "add_norm")}
    assert answers == {both}
    newer = replace(target, sm=100)
    assert norms_obstacle(OPERATION, norms[0], newer) is not None
    assert (norms_obstacle("add_norm", norms[0], newer) is None) == both  # compiled for more GPUs


def test_a_row_of_the_table_sends_both_to_the_extension(emulated, fresh_choice, monkeypatch):
    compiled = [tiles.Row(None, None, None, tiles.TileConfig("cuda", 128, 128, 128, 12, 4))]
    monkeypatch.setattr(tiles, "table", lambda gpu: {"add_norm": compiled})
    problems = {"add_norm": Problem(None, None, 0, 768, torch.bfloat16, 1), OPERATION: JOINED}
    for operation, problem in problems.items():
        assert table.select(operation, problem, H100).name == f"cuda {operation}"
    assert table.select(OPERATION, JOINED, replace(H100, prefer="triton")).name == LINEAR_THEN_NORM
    many = table.explain(OPERATION, JOINED._replace(t=None), H100)
    assert many.name.startswith("cuda linear_add_norm up to ")
    assert many.name.endswith(f"{LINEAR_THEN_NORM} above")
    assert many.reason == "one launch where that is faster by a model, else linear and add_norm"


# ---- a linear and its norm ------------------------------------------------------------------------------------------


def random_joined(t, n, k, **changes):
    return testing.random_problem(OPERATION, t, n, k, scheme="w8a8", layout=Layout.INT8_ROWS, **changes)


def two_launches(a):
    """The compiled kernels one after the other."""
    return cuda.add_norm(AddNorm(cuda.linear(a.linear, tile=SMALL[8]), a.residual, a.norm, a.keeps))


def joined(a, tile="16 tokens"):
    return cuda.linear_add_norm(a, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "n", "k", "tile"),
    [
        (1, 256, 64, 16),
        (7, 384, 144, 16),
        (16, 512, 256, 32),
        (33, 768, 128, 16),
        (33, 768, 80, 32),
        (17, 1024, 64, 32),
    ],
)
def test_the_bits_of_two_launches(emulated, t, n, k, tile, dtype):
    emulated.emulate(seed=t)
    a = random_joined(t, n, k, dtype=dtype, seed=n + t)
    found = joined(a, f"{tile} tokens")
    same_bits(found, two_launches(a))
    testing.assert_matches_reference(a, found)


@pytest.mark.parametrize("seed", range(12))
def test_in_any_order_of_copies_products_and_blocks(emulated, seed):
    emulated.emulate(seed=seed)
    a = random_joined(18, 256, 6 * 128, seed=seed, dtype=torch.bfloat16)  # steps of k: more than stages
    same_bits(joined(a), two_launches(a))


def test_parameters_of_other_types_and_no_bias(emulated):
    a = random_joined(5, 256, 64, dtype=torch.float16)
    for bias in (None, torch.randn(256).bfloat16()):
        a = a._replace(bias=bias, norm=Norm(a.norm.gamma.float(), a.norm.beta.bfloat16(), a.norm.eps))
        found = joined(a)
        same_bits(found, two_launches(a))
        testing.assert_matches_reference(a, found)


def test_a_row_that_is_not_finite_stays_alone(emulated):
    a = random_joined(19, 256, 64)
    clean = joined(a)
    a.s[2] = float("nan")  # the token's scale
    a.residual[17, 5] = float("inf")
    found = joined(a)
    same_bits(found, two_launches(a))
    assert found[2].isnan().nonzero().flatten().tolist() == [2, 17]
    others = [row for row in range(19) if row not in (2, 17)]
    same_bits([each[others] for each in found], [each[others] for each in clean])


def test_a_token_has_the_same_bits_alone(emulated):
    a = random_joined(33, 512, 96, dtype=torch.bfloat16)
    whole = joined(a, "32 tokens")
    for row in (0, 15, 32):
        one = slice(row, row + 1)
        alone = joined(a._replace(x=a.x[one], s=a.s[one].clone(), residual=a.residual[one]))
        same_bits(alone, [each[one] for each in whole])


def test_nothing_beyond_the_rows_is_written(emulated, monkeypatch):
    t, held = 5, []

    def poisoned(shape, dtype):
        length = torch.Size(shape).numel()
        memory = torch.full((length + 64,), 77, dtype=dtype)
        held.append((memory, length))
        return memory[32 : 32 + length].view(shape)

    a = random_joined(t, 256, 64)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda tensor: poisoned(tensor.shape, tensor.dtype))
        patch.setattr(torch.Tensor, "new_empty", lambda self, *shape, dtype: poisoned(shape, dtype))
        found = joined(a)
    testing.assert_matches_reference(a, found)
    assert len(held) == 3
    for memory, length in held:
        assert bool((memory[:32] == 77).all())
        assert bool((memory[32 + length :] == 77).all())


# ---- what is left to others, what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 640 + 64}, "n is 704; a cluster of blocks takes multiples of 128, 2 to 8 of them"),
        ({"n": 128}, "n is 128;"),
        ({"n": 1152}, "n is 1152;"),
        ({"k": 24}, "k is 24; the CUDA kernels take multiples of 16"),
        ({"layout": Layout.INT8_PANELS}, "the weight lies in int8_panels, the CUDA kernels read int8_rows and plain"),
        ({"scheme": SCHEMES["w4a8"]}, "the CUDA kernel of a linear and its norm is for W8A8"),
        ({"target": Target("cuda", "", sm=80, native=True)}, "this GPU has 8.0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_obstacles(changes, reason):
    changes = dict(changes)
    target = changes.pop("target", ASKED)
    assert layer.shape_obstacle(JOINED, ASKED) is None
    assert reason in layer.shape_obstacle(JOINED._replace(**changes), target)


@pytest.mark.parametrize(("tile", "n", "name"), [("16 tokens", 768, f"cuda {OPERATION}"), ("", 768, LINEAR_THEN_NORM),
                                                 ("16 tokens", 192, LINEAR_THEN_NORM)])  # fmt: skip
def test_what_is_faster_in_two_launches_is_left_to_them(tile, n, name, fresh_choice, monkeypatch):
    monkeypatch.setattr(launch, "extension", lambda: SimpleNamespace(add_norm_choose=lambda *problem: tile))
    assert table.select(OPERATION, JOINED._replace(n=n), ASKED).name == name
    assert layer.obstacle(JOINED, ASKED) == (None if tile else "two launches are faster, by a model")


def test_nobody_asks_the_model_of_a_machine_that_is_not_here(monkeypatch):
    def missing():
        raise MissingDependency("qbert was installed without it")

    monkeypatch.setattr(launch, "extension", missing)
    assert layer.obstacle(JOINED, ASKED) == "qbert was installed without it"


def test_no_tokens_need_no_launch(emulated):
    normed, codes, scale = joined(random_joined(0, 256, 64))
    assert (normed.shape, codes.shape, scale.shape) == ((0, 256), (0, 256), (0,))


def test_bad_operands_are_named(emulated):
    a = random_joined(4, 256, 64)
    with pytest.raises(Exception, match=r"residual must be \(4, 256\) as the result, got \(3, 256\)"):
        a._replace(residual=a.residual[:3]).check()
    with pytest.raises(QBertError, match="linear_add_norm: residual has strides"):
        joined(a._replace(residual=a.residual.t().contiguous().t()))
    with pytest.raises(Exception, match=r"bias is torch\.float64"):
        joined(a._replace(bias=a.bias.double()))
    with pytest.raises(QBertError, match="n is 256; allowed with tile 32 tokens: multiples of 128, 4 to 8 of them"):
        joined(a, "32 tokens")


# ---- a whole encoder ------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 1}


@pytest.mark.parametrize("variant", ["dynamic", "static"])
def test_an_encoder_gets_the_same_states(emulated, fresh_choice, variant, monkeypatch):
    """The two linears that a norm follows by the emulated kernel, all else by the CPU's."""
    batch, calls = padded_batch(2, 9), 0
    expected = hidden_of(fused_model("BertModel", variant, "w8a8", **WIDE), **batch)

    def compiled(a):
        nonlocal calls
        calls += 1
        return joined(a._replace(weight=a.weight.to_layout(Layout.INT8_ROWS)))

    row = Kernel(OPERATION, "emulated", compiled, lambda problem, target: None, lambda problem, target: "")
    monkeypatch.setitem(table.KERNELS, OPERATION, (row, *table.KERNELS[OPERATION]))
    model = fused_model("BertModel", variant, "w8a8", **WIDE)
    found = hidden_of(model, **batch)
    layers = encoder_of(model).forward.encoder().program.layers
    assert calls == sum(step.kernel == "emulated" for each in layers for step in each.steps)
    assert calls >= len(layers)  # what an overflow adds comes before the norm
    assert testing.sqnr_db(expected, found) > 60
