"""Triton kernels: in Triton's interpreter against the reference, and compiled for sm_90 without a GPU."""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

# TRITON_INTERPRET is read when a kernel is decorated, so the interpreter gets a process of its own.
INTERPRET = """
import json, sys, torch
from qbert import reference
from qbert.ops.triton import TRITON
t, k, dtype, seed = json.loads(sys.argv[1])
torch.manual_seed(seed)
x = (torch.randn(t, k) * torch.exp(5 * torch.randn(t, 1))).to(getattr(torch, dtype))
x[0] = 0
if t > 3:
    x[1, k // 2], x[2, 0], x[3, k - 1] = float("nan"), float("inf"), float("-inf")
codes, scale = TRITON["quantize_per_token"](x)
want_codes, want_scale = reference.quantize_per_token(x)
assert torch.equal(codes, want_codes)
assert torch.equal(scale.view(torch.int32)[~want_scale.isnan()], want_scale.view(torch.int32)[~want_scale.isnan()])
assert torch.equal(scale.isnan(), want_scale.isnan())
"""


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("t", "k", "dtype"),
    [(1, 1, "float32"), (5, 384, "bfloat16"), (7, 1023, "float32"), (4, 768, "float16"), (17, 31, "float32")],
)
def test_quantize_per_token_equals_reference(t, k, dtype):
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"}
    arguments = json.dumps([t, k, dtype, 0])
    done = subprocess.run([sys.executable, "-c", INTERPRET, arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def compile_for_sm90(kernel, signature, constants, *, num_warps=4):
    """The compiled kernel, and its SASS and resource usage as text."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        read = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
        return built, read("-sass"), read("-res-usage")


@pytest.mark.compile
@pytest.mark.parametrize("block_k", [1024, 4096])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_quantize_per_token_compiles_without_spills(block_k, dtype):
    from qbert.kernels.quantize_per_token import quantize_per_token_kernel

    signature = {"x_ptr": f"*{dtype}", "codes_ptr": "*i8", "scale_ptr": "*fp32", "k": "i32", "x_stride": "i32"}
    built, sass, usage = compile_for_sm90(quantize_per_token_kernel, signature, {"BLOCK_K": block_k})
    assert "fma.rn" not in built.asm["ptx"], "the product is rounded before ROUND is added, as in the reference"
    assert not re.search(r"\b(STL|LDL)\b", sass), "local memory traffic"
    assert int(re.search(r"STACK:(\d+)", usage).group(1)) == 0
    assert int(re.search(r"REG:(\d+)", usage).group(1)) <= 128


def test_dispatch_names_the_triton_kernel_on_cuda():
    from qbert.dispatch import select_kernel
    from qbert.target import Target

    h100 = Target("cuda", "", sm=90, sm_count=132, shared_memory=232448)
    assert select_kernel("quantize_per_token", h100).name == "triton quantize_per_token"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_per_token_on_gpu(dtype):
    from qbert import reference

    for t, k in [(1, 1), (3, 768), (1023, 3072), (4096, 1024)]:
        x = torch.randn(t, k, device="cuda").to(dtype)
        codes, scale = torch.ops.qbert.quantize_per_token(x)
        want_codes, want_scale = reference.quantize_per_token(x.cpu())
        assert torch.equal(codes.cpu(), want_codes)
        assert torch.equal(scale.cpu(), want_scale)
