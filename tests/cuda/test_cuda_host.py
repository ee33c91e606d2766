"""The host side of csrc/cuda without a GPU: which tile a problem gets, and every refusal before a launch."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys

import builds
import pytest

from qbert.errors import QBertError

pytestmark = pytest.mark.skipif(bool(builds.emulator_missing()), reason=builds.emulator_missing() or "runs")

LARGE, BASE, SHORT, FEW = (
    "128x256x128 cooperative",
    "128x192x128 cooperative",
    "128x128x128 pingpong",
    "64x128x128 pingpong",
)
MAX_K = 133_144  # the largest multiple of 8 below (2**31 - 1) / 127**2


@pytest.fixture(scope="module")
def cuda():
    """Without a device: what passes all checks stops there, and the addresses are never read."""
    return builds.emulated_module(multiprocessors=0)


def legal(**changes):
    """Arguments that only lack a device; the addresses are never read."""
    t, n, k = 4096, 768, 3072
    arguments = {
        "t": t, "n": n, "k": k, "q": 1 << 20, "q_pitch": k, "s": 1 << 21, "weight": 1 << 22, "weight_pitch": k,
        "scale": 1 << 23, "bias": 1 << 24, "bias_type": 1, "activation": 1, "out": 1 << 25, "out_pitch": n,
        "out_type": 0, "inverse_out_scale": 1.0, "zero": 0, "stream": 0,
    }  # fmt: skip
    return {**arguments, **changes}


# ---- tiles ----------------------------------------------------------------------------------------------------------


def test_tiles_are_named_by_their_size(cuda):
    small = [f"{t}x64x128 small{split}" for t in (64, 32, 16) for split in ("", ", k by 2", ", k by 4", ", k by 8")]
    assert cuda.tiles() == [LARGE, BASE, SHORT, FEW, *small]


@pytest.mark.parametrize(
    ("t", "n", "k", "gelu", "tile"),
    [
        (4096, 768, 768, False, BASE),  # BERT-base: 32 x 4 tiles of 128 x 192 on 132 multiprocessors
        (4096, 2304, 768, False, BASE),
        (4096, 768, 3072, False, BASE),
        (4096, 3072, 768, True, SHORT),  # erf costs as much as the products of so short a k: hidden behind them
        (4096, 1024, 1024, False, LARGE),  # BERT-large: 32 x 4 tiles of 128 x 256
        (4096, 3072, 1024, False, LARGE),
        (4096, 1024, 4096, False, LARGE),
        (16384, 1024, 4096, False, LARGE),
        (4096, 4096, 8192, False, LARGE),
        (256, 2304, 768, False, FEW),
        (256, 3072, 768, True, FEW),
        (128, 2304, 768, False, "64x64x128 small"),  # BERT-base, one sequence: 72 tiles
        (128, 768, 768, False, "32x64x128 small"),  # 48
        (128, 3072, 768, True, "64x64x128 small"),  # 96
        (128, 768, 3072, False, "64x64x128 small, k by 4"),  # 24 tiles, 96 blocks
        (16, 768, 3072, False, "16x64x128 small, k by 8"),
    ],
)
def test_choose(cuda, t, n, k, gelu, tile):
    assert cuda.choose(t, n, k, gelu) == tile


def test_choose_takes_the_fewest_model_cycles(cuda):
    for t in (1, 63, 64, 65, 500, 4097, 100_000):
        for n, k in ((16, 16), (768, 768), (3072, 768), (1000, 4096)):
            cycles = {tile: cuda.model_cycles(tile, t, n, k, True, 114) for tile in cuda.tiles()}
            assert cuda.choose(t, n, k, True, 114) == min(cycles, key=cycles.__getitem__)


@pytest.mark.parametrize("tile", range(16))
def test_model_grows_with_the_problem(cuda, tile):
    name = cuda.tiles()[tile]
    sizes = [cuda.model_cycles(name, t, 768, 768) for t in (1, 128, 1024, 4096, 65536, 2**30)]
    assert sizes == sorted(sizes)
    assert all(math.isfinite(each) and each > 0 for each in sizes)
    assert cuda.model_cycles(name, 4096, 768, 1536) > cuda.model_cycles(name, 4096, 768, 768)
    assert cuda.model_cycles(name, 4096, 768, 768, True) > cuda.model_cycles(name, 4096, 768, 768, False)


def test_model_counts_waves(cuda):
    """One tile more than the multiprocessors take at once costs a whole round of tiles, and rounds of clusters are even."""
    full, more = (cuda.model_cycles(LARGE, t, 256, 4096, False, 132) for t in (132 * 128, 132 * 128 + 1))
    assert more > 1.8 * full
    odd = cuda.model_cycles(LARGE, 131 * 128, 256, 4096, False, 131)  # 132 with the cluster's other half
    assert odd > 1.8 * full


def test_all_choices_of_a_sweep_stay(cuda):
    """What every operation gets for 864 problems, GPUs of 132, 114 and 3 multiprocessors: a digest, so that no change of the
    cost model goes unseen. A change that is meant brings its own."""
    tokens = (1, 2, 16, 17, 33, 64, 100, 128, 200, 256, 384, 512, 513, 768, 1024, 2048, 4096, 16384)
    weights = ((384, 384), (384, 1536), (768, 768), (2304, 768), (3072, 768), (768, 3072), (1024, 1024), (1000, 4096))
    codes, chosen = ("int4", "dict4", "dict3"), []
    for t, (n, k), sms, gelu in itertools.product(tokens, weights, (132, 114, 3), (False, True)):
        chosen.append(cuda.choose(t, n, k, gelu, sms))
        chosen += [cuda.lowbit_choose(t, n, k, code, gelu, sms) for code in codes]
        chosen += [cuda.few_choose(t, n, k, code, True, sms) for code in codes]
        chosen += [cuda.few_choose(t, n, k, code, False, sms) for code in (*codes, "int8")]
        chosen.append(cuda.add_norm_choose(t, n, k, sms))
    digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
    assert digest.startswith("214351251c28efbd2f9234df659cf6f7")


@pytest.mark.parametrize("arguments", [(0, 768, 768), (1, 0, 768), (1, 768, 0), (-1, 768, 768), (1, 1, 1, False, 0)])
def test_choose_refuses_empty_problems(cuda, arguments):
    with pytest.raises(QBertError, match=r"is (0|-1); allowed: 1 \.\.\. "):
        cuda.choose(*arguments)


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_legal_arguments_reach_the_device(cuda):
    with pytest.raises(QBertError, match="has no device"):
        cuda.w8a8_linear(**legal())
    for tile in cuda.tiles():
        with pytest.raises(QBertError, match="has no device"):
            cuda.w8a8_linear(**legal(tile=tile))
    assert cuda.device_problem() == "the emulator has no device"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": 0}, "t is 0; allowed: 1 ... 2147482623"),
        ({"t": 2**31}, "t is 2147483648; allowed"),
        ({"n": -1}, "n is -1; allowed"),
        ({"n": 2**40, "out_pitch": 2**40}, "n is 1099511627776; allowed"),
        ({"k": 0}, "k is 0; allowed: 1 ... 133144"),
        ({"k": 133_152, "q_pitch": 133_152, "weight_pitch": 133_152}, "k is 133152; allowed: 1 ... 133144, beyond"),
        ({"t": 2**30, "n": 2**30, "out_pitch": 2**30}, "tiles of 64 x 128; allowed: 536870911"),
        ({"q": 0}, "q is a null pointer"),
        ({"weight": 0}, "weight is a null pointer"),
        ({"out": 0}, "out is a null pointer"),
        ({"s": 0}, "s is a null pointer"),
        ({"scale": 0}, "scale is a null pointer"),
        ({"q": (1 << 20) + 8}, "q starts 8 bytes past a multiple of 16"),
        ({"weight": (1 << 20) + 1}, "weight starts 1 bytes past a multiple of 16"),
        ({"out": (1 << 20) + 15}, "out starts 15 bytes past a multiple of 16"),
        ({"s": (1 << 20) + 2}, "s starts 2 bytes past a multiple of 4"),
        ({"bias": (1 << 20) + 1}, "bias starts 1 bytes past a multiple of 2"),
        ({"bias": (1 << 20) + 2, "bias_type": 0}, "bias starts 2 bytes past a multiple of 4"),
        ({"q_pitch": 3056}, "rows of q are 3056 elements apart; allowed: at least their length, 3072"),
        ({"k": 3064, "q_pitch": 3064}, "rows of q are 3064 bytes apart; allowed: multiples of 16"),
        ({"weight_pitch": 3080}, "rows of weight are 3080 bytes apart"),
        ({"n": 769, "out_pitch": 769}, "rows of out are 3076 bytes apart"),
        ({"n": 772, "out_pitch": 772, "out_type": 1}, "rows of out are 1544 bytes apart"),
        ({"n": 776, "out_pitch": 776, "out_type": -1}, "rows of out are 776 bytes apart"),
        ({"q_pitch": 2**40}, "rows of q are 1099511627776 elements apart; allowed: 1099511627760 bytes"),
        ({"activation": 2}, "activation has the code 2; allowed: 0 ... 1"),
        ({"activation": -1}, "activation has the code -1"),
        ({"out_type": 3}, "out's type has the code 3; allowed: 0 ... 2"),
        ({"out_type": -2}, "out's type has the code -2"),
        ({"bias_type": 7}, "bias's type has the code 7"),
        ({"tile": "256x256x128"}, f"there is no tile '256x256x128'; allowed: {LARGE}, {BASE}"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_refused_before_the_device_is_asked_for(cuda, changes, message):
    with pytest.raises(QBertError) as refusal:
        cuda.w8a8_linear(**legal(**changes))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"t": 1, "n": 1, "out_pitch": 16, "k": 16},
        {"n": 767},  # a narrower result in wider rows
        {"k": 3071},  # codes in padded rows
        {"bias": 0, "bias_type": 0},
        {"n": 784, "out_pitch": 784, "out_type": -1},
        {"n": 776, "out_pitch": 776, "out_type": 2},
        {"k": MAX_K, "q_pitch": 133_152, "weight_pitch": 133_152},
        {"t": 10**6, "n": 4096, "out_pitch": 4096},  # beyond int32 elements, which nothing counts
    ],
    ids=lambda changes: ",".join(changes),
)
def test_allowed_though_unusual(cuda, changes):
    with pytest.raises(QBertError, match="has no device"):
        cuda.w8a8_linear(**legal(**changes))


def legal_rows(**changes):
    arguments = {
        name: (index + 1) << 20 for index, name in enumerate(("y", "residual", "gamma", "beta", "normed", "codes"))
    }
    types = dict.fromkeys(("y_type", "residual_type", "gamma_type", "beta_type"), 0)
    return {"t": 10, "k": 768, **arguments, "scale": 1 << 24, **types, "eps": 1e-12, "stream": 0, **changes}


def test_legal_rows_reach_the_device(cuda):
    for k in (8, 1024, cuda.MAX_ROW_COLUMNS):
        with pytest.raises(QBertError, match="has no device"):
            cuda.add_layer_norm_quantize(**legal_rows(k=k))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": 0}, "t is 0; allowed: 1 ... 2147483647"),
        ({"k": 2056}, "k is 2056; allowed: 1 ... 2048, what a warp keeps in registers"),
        ({"k": 100}, "k is 100; allowed: multiples of 8"),
        ({"y": 0}, "y is a null pointer"),
        ({"residual": 24}, "residual starts 8 bytes past a multiple of 16"),
        ({"codes": 24}, "codes starts 8 bytes past a multiple of 16"),
        ({"scale": 2}, "scale starts 2 bytes past a multiple of 4"),
        ({"gamma_type": 3}, "gamma's type has the code 3; allowed: 0 ... 2"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_rows_are_refused(cuda, changes, message):
    with pytest.raises(QBertError) as refusal:
        cuda.add_layer_norm_quantize(**legal_rows(**changes))
    assert message in str(refusal.value)


# ---- the module itself ----------------------------------------------------------------------------------------------


def test_real_module_imports_without_a_driver():
    """And says what is missing when it is called: in a process of its own where no device is visible."""
    script = (
        "from qbert import _cuda\n"
        "print(_cuda.device_problem())\n"
        "from qbert.errors import QBertError\n"
        "try: _cuda.w8a8_linear(16, 16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 16, 16, 0, 1.0, 0)\n"
        "except QBertError as error: print(error)\n"
    )
    pytest.importorskip("qbert._cuda", reason="qbert._cuda was not built here")
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    problem, refusal = found.stdout.splitlines()
    assert problem.startswith("no CUDA device can be used: cudaError")
    assert refusal == problem
