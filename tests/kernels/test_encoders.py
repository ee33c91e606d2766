"""Whole fused encoders on Triton's kernels, in its interpreter: families whose attention is not plain, and ALBERT's calls."""

import importlib.util

import pytest
from interpreted import run

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["MPNet", "ModernBert", "Albert"])
def test_families_run_fused(family, variant):
    run("encoder_cases:runs_fused", [[family, variant]])
