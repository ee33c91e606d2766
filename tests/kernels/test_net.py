"""The net itself: what compiles badly for Hopper must be caught, or the other tests of this folder prove nothing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

from sm90 import ONE, Built, Constant, build, problems

pytestmark = pytest.mark.compile
ARGUMENTS = {"a": "*i8", "b": "*i8", "c": "*i32", "n": "i32", "k": "i32", "stride_bn": "i32", "stride_bk": "i32"}


def _product(tile: tuple[int, int, int], *, k_major: bool = True, **options: Any) -> Built:
    from wrong_kernels import product

    contiguous = "stride_bk" if k_major else "stride_bn"
    constants = dict(zip(("BM", "BN", "BK"), map(Constant, tile), strict=True))
    return build(product, {**ARGUMENTS, contiguous: ONE, **constants}, **options)


def test_a_good_kernel_has_no_problems() -> None:
    assert problems(_product((128, 128, 128), warps=8), wgmma=True) == []


def test_an_operand_that_is_not_k_major_is_caught() -> None:
    found = problems(_product((128, 128, 128), k_major=False, warps=8), wgmma=True)
    assert any("Forcing a different order" in each for each in found)


def test_a_tile_too_small_for_wgmma_is_caught() -> None:
    found = problems(_product((32, 128, 128)), wgmma=True)
    assert {"no IGMMA", "int8 products by mma.sync (IMMA)", "no wgmma of int8 in the PTX"} <= set(found)


def test_plain_loads_are_no_tma() -> None:
    assert problems(_product((128, 128, 128), warps=8), wgmma=True, tma=True) == ["no UTMALDG"]


def test_a_from_shared_memory_is_caught() -> None:
    found = problems(_product((128, 128, 128), warps=8), wgmma=True, a_from_registers=True)
    assert found == ["wgmma's A operand comes from shared memory"]


def test_spilled_registers_are_caught() -> None:
    """256 x 256 sums in 4 warps are 512 registers a thread."""
    found = " ".join(problems(_product((256, 256, 64), warps=4, stages=2), wgmma=True))
    assert "local memory traffic" in found
    assert "bytes of stack" in found


def test_too_much_shared_memory_is_caught() -> None:
    try:
        found = " ".join(problems(_product((128, 256, 128), warps=8, stages=5), wgmma=True))
    except Exception as error:  # newer compilers refuse what cannot be launched
        found = str(error)
    assert "shared memory" in found
