"""The emulated H100 of tests/cuda/emulator: it computes what the machine computes, and punishes what the machine punishes.

Register layouts are checked against CuTe's (cute/atom/mma_traits_sm90_gmma.hpp), which are those of the PTX ISA's figures.
"""

from __future__ import annotations

import faulthandler
import os
import signal

import builds
import pytest
import torch
from guarded import guarded

from qbert import testing
from qbert.errors import QBertError
from qbert.ops import cuda
from qbert.weight import Layout

pytestmark = pytest.mark.skipif(bool(builds.emulator_missing()), reason=builds.emulator_missing() or "runs")

SEEDS = range(12)
DTYPES = {"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}
# CuTe's layouts: digits of a thread (lane % 4, lane / 4, warp) and of one of its values, and their strides in row + 64 column.
_THREADS = ((4, 8, 4), {"d": (128, 1, 16), "s8": (256, 1, 16), "f16": (128, 1, 16), "bf16": (128, 1, 16)})
_VALUES = {"d": ((2, 2, 1), (64, 8, 512)), "s8": ((4, 2, 2), (64, 8, 1024)), "f16": ((2, 2, 2), (64, 8, 512))}
_VALUES["bf16"] = _VALUES["f16"]


@pytest.fixture(scope="module")
def kernels():
    return builds.emulator_kernels()


def random(shape, operand, seed):
    """Small integers, whose sums are exact in every type."""
    limit = 128 if operand == "s8" else 8
    return torch.randint(-limit, limit, shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[operand])


def product(rows, tokens):
    result = rows.float() @ tokens.float().T  # exact: below 2**24
    return result.to(torch.int32) if rows.dtype == torch.int8 else result


def in_every_order(run):
    for seed in SEEDS:
        run(seed)


def as_int(tensor):
    """The same bytes as int32 words."""
    return tensor.contiguous().view(torch.int32)


# ---- one product: layouts of registers and of shared memory ---------------------------------------------------------


def places(which):
    """(128 threads, values of a thread) -> row + 64 * column, as CuTe's layout says."""
    digits = lambda number, shape, strides: sum(
        (number // torch.tensor(shape)[:i].prod() % shape[i]) * strides[i] for i in range(len(shape))
    )
    values = torch.tensor(_VALUES[which][0]).prod()
    threads = digits(torch.arange(128), _THREADS[0], _THREADS[1][which])
    return threads[:, None] + digits(torch.arange(values), *_VALUES[which])[None, :]


def registers_of(matrix, which):
    """What each thread holds of a matrix (64, columns)."""
    return matrix.T.reshape(-1)[places(which)]


@pytest.mark.parametrize(("operand", "in_registers"), [("s8", True), ("s8", False), ("f16", True), ("bf16", True)])
def test_one_product(kernels, operand, in_registers):
    per_step = 32 // DTYPES[operand].itemsize
    rows, tokens = random((64, 4 * per_step), operand, 1), random((8, 4 * per_step), operand, 2)
    for step in range(4):
        columns = slice(step * per_step, (step + 1) * per_step)
        a = as_int(registers_of(rows[:, columns], operand)) if in_registers else None
        d, shared = torch.zeros(128, 4, dtype=torch.int32), torch.zeros(8, 32, dtype=torch.int32)
        address = 0 if a is None else a.data_ptr()
        kernels.one_product(address, rows.data_ptr(), tokens.data_ptr(), step, d.data_ptr(), shared.data_ptr(), operand)
        assert torch.equal(d, as_int(registers_of(product(rows[:, columns], tokens[:, columns]), "d")))
        pieces = as_int(tokens).view(8, 8, 4)  # 16 bytes each
        swizzled = torch.stack([pieces[row, torch.arange(8) ^ row] for row in range(8)])
        assert torch.equal(shared.view(8, 8, 4), swizzled)


def box_of(kernels, data, columns, column, row, box_rows):
    out = torch.zeros(box_rows, 32, dtype=torch.int32)
    rows, pitch = data.shape
    kernels.one_box(data.data_ptr(), rows, columns, pitch, data.element_size(), box_rows, column, row, out.data_ptr())
    pieces = out.view(box_rows, 8, 4)
    plain = torch.stack([pieces[i, torch.arange(8) ^ (i % 8)] for i in range(box_rows)])
    return plain.view(box_rows, 32).view(data.dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@pytest.mark.parametrize(("column", "row"), [(0, 0), (128, 3), (256, 60), (-5, -2), (1000, 0)])
def test_boxes_are_zeros_outside_the_matrix(kernels, dtype, column, row):
    rows, columns, pitch, box_rows = 67, 270, 288, 16
    data = torch.randint(1, 100, (rows, pitch)).to(dtype)
    width = 128 // dtype.itemsize
    expected = torch.zeros(box_rows, width, dtype=dtype)
    for i in range(box_rows):
        for j in range(width):
            if 0 <= row + i < rows and 0 <= column + j < columns:
                expected[i, j] = data[row + i, column + j]
    assert torch.equal(box_of(kernels, data, columns, column, row, box_rows), expected)


@pytest.mark.parametrize(
    "changes",
    [{"pitch": 24}, {"pitch": 64}, {"box_rows": 257}, {"box_rows": 0}, {"element_bytes": 4}, {"rows": 0}, {"data": 8}],
    ids=str,
)
def test_maps_that_the_driver_refuses(kernels, changes):
    arguments = {"data": 1 << 20, "rows": 8, "columns": 128, "pitch": 128, "element_bytes": 1, "box_rows": 8, **changes}
    with pytest.raises(RuntimeError, match="the driver refuses it"):
        kernels.one_box(*arguments.values(), 0, 0, 0)


# ---- a pipeline, right and wrong ------------------------------------------------------------------------------------


def run_pipeline(kernels, seed, fault="none", blocks=2, operand="s8", blocks_of_k=7):
    """Whether the result is right."""
    per_block = 128 // DTYPES[operand].itemsize
    tokens = random((64, blocks_of_k * per_block), operand, 1)
    rows = random((64 * blocks, blocks_of_k * per_block), operand, 2)
    expected = product(rows, tokens)
    out = torch.zeros_like(expected)
    kernels.emulate(seed=seed)
    addresses = (each.data_ptr() for each in (tokens, rows, out))
    kernels.pipeline(*addresses, blocks_of_k, blocks, operand, kernels.FAULTS.index(fault))
    return torch.equal(out, expected)


@pytest.mark.parametrize("operand", DTYPES)
@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_pipeline_is_right_in_every_order(kernels, operand, blocks):
    for seed in SEEDS:
        assert run_pipeline(kernels, seed, blocks=blocks, operand=operand)


@pytest.mark.parametrize("blocks_of_k", [1, 2, 3, 4])
def test_short_pipelines(kernels, blocks_of_k):
    for seed in SEEDS:
        assert run_pipeline(kernels, seed, blocks_of_k=blocks_of_k)


@pytest.mark.parametrize(
    ("fault", "seeds_that_see_it"),
    [
        ("no_wait_for_full", 9),
        ("no_wait_for_empty", 12),
        ("released_early", 12),
        ("registers_reused", 12),
        ("read_early", 12),
        ("only_own_empty", 9),
    ],
)
def test_races_are_seen(kernels, fault, seeds_that_see_it):
    """By a wrong result or an error, and by most orders."""

    def seen(seed):
        try:
            return not run_pipeline(kernels, seed, fault)
        except RuntimeError:
            return True

    assert sum(map(seen, SEEDS)) >= seeds_that_see_it


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("too_few_bytes", "got 16 bytes more than were announced"),
        ("too_many_bytes", r"deadlock:(.|\n)*threads 0-127: the barrier at \d+ .*, parity 0 .*0 of 1 arrivals and 16 bytes"),
        ("wrong_parity", "gets more than 1 arrivals in a phase|deadlock"),
        ("too_few_arrivals", r"deadlock:(.|\n)*the barrier at \d+ .*, parity 0 .*1 of 9 arrivals and 0 bytes"),
        ("too_many_arrivals", "ends within a phase of the barrier at|more than 7 arrivals"),
        ("no_first_sync", "before a first cluster_sync: it may not run yet"),
        ("no_last_sync", "the cluster, which has ended|the block ends within a phase of the barrier at"),
        ("no_wait_for_grids", "ends without pdl_wait, in a grid launched to overlap"),
        ("no_begin", "the first product of a batch without warpgroup_arrive"),
        ("begun_early", "a product's registers were written after warpgroup_arrive"),
        ("no_fence", "was initialised without fence_mbarrier_init"),
        ("misaligned_box", "a box at .* in shared memory; allowed: multiples of 128"),
    ],
)  # fmt: skip
def test_faults_are_named(kernels, fault, message):
    with pytest.raises(RuntimeError, match=message):
        in_every_order(lambda seed: run_pipeline(kernels, seed, fault))


# ---- one feature at a time ------------------------------------------------------------------------------------------


def probe(kernels, which, seed=0):
    out = torch.zeros(128, dtype=torch.int32)
    kernels.emulate(seed=seed)
    kernels.probe(which, out.data_ptr())
    return out


def test_lanes_of_a_warp(kernels):
    lane = torch.arange(128) % 32
    up = torch.where(lane % 16 >= 3, lane - 3, lane)
    base = torch.arange(128) % 64 - lane
    assert torch.equal(probe(kernels, 0), ((lane ^ 5) + base + 100 * (up + base) + 320_000).int())


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_of_another_block(kernels, seed):
    assert torch.equal(probe(kernels, 1, seed), torch.cat((100 + torch.arange(64), torch.arange(64))).int())


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (2, "lanes of a warp disagree: __s"),
        (3, r"deadlock:\n  block 0, threads 0-4, 6-31: __syncwarp of lanes 0xffffffff \(0xffffffdf are there\)"),
        (4, "named barrier 3 of (32|64) threads; others say (32|64)"),
        (5, r"block 0, threads 0-31: named barrier 3 \(32 of 64 threads are there\)"),
        (6, "something was written beyond the 1024 bytes of shared memory"),
        (7, "at 64 in shared memory of block [01] there is no barrier: never initialised, or overwritten"),
        (8, "a barrier is not in the block's 1024 bytes of shared memory"),
        (9, "a barrier at 4 in shared memory; allowed: multiples of 8"),
        (10, r"block 1, threads 0: named barrier 1 \(1 of 32 threads are there\)"),
        (11, "copying 8 bytes .* allowed: multiples of 16"),
        (12, "the block ends while a copy to 256 in its shared memory is under way"),
        (13, "block 0's shared memory was written by another block after it had ended"),
        (14, "products need a whole warpgroup"),
        (15, "at 0 in shared memory of block [01] there is no barrier"),
        (16, "accessing block 2 of a cluster of 2"),
    ],
)
def test_small_faults(kernels, which, message):
    with pytest.raises(RuntimeError, match=message):
        in_every_order(lambda seed: probe(kernels, which, seed))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 1, 32, 0, 1), "blocks"),
        ((1, 65536, 32, 0, 1), "blocks"),
        ((1, 1, 33, 0, 1), "multiples of 32 threads up to 1024"),
        ((3, 1, 32, 0, 2), "clusters of 1 ... 16 blocks that divide the grid along x"),
        ((1, 1, 32, 227 * 1024 + 1, 1), "allowed: 232448 bytes of shared memory"),
    ],
)
def test_shapes_that_no_launch_takes(kernels, shape, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.shape(*shape)


def test_any_size_of_device(kernels):
    kernels.emulate(multiprocessors=0)
    with pytest.raises(RuntimeError, match="the emulator has no device"):
        kernels.shape(1, 1, 32, 0, 1)
    kernels.emulate(seed=3, multiprocessors=132)
    kernels.shape(64, 2, 512, 227 * 1024, 16)


# ---- global memory --------------------------------------------------------------------------------------------------


def test_guarded_memory_ends_a_process_that_runs_over_it(kernels):
    data = torch.randint(1, 100, (16, 128), dtype=torch.int8)
    copy = guarded(data)
    assert torch.equal(box_of(kernels, copy, 128, 0, 0, 16), data)
    for rows, ends in ((16, 0), (17, signal.SIGSEGV)):
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            kernels.one_box(copy.data_ptr(), rows, 128, 128, 1, 17, 0, 0, torch.zeros(17, 32).data_ptr())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == ends


# ---- the extension --------------------------------------------------------------------------------------------------


def test_what_is_cutlass_fails_by_name(emulated):
    problem = testing.random_problem("linear", 4, 64, 64, scheme="w8a8", layout=Layout.INT8_ROWS)
    with pytest.raises(QBertError, match="the W8A8 linear of CUTLASS is not emulated"):
        cuda.linear(problem, tile=emulated.tiles()[0])
