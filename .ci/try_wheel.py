"""What an installed qbert computes and says, run by .ci/wheel: `python try_wheel.py native|reference`."""

import sys
from pathlib import Path

import torch
from torch import nn

import qbert
from qbert.benchmarks.results_schema import RESULTS, load_results

expected = sys.argv[1]
assert Path(qbert.__file__).is_relative_to(sys.prefix), f"{qbert.__file__} is not the installed package"
try:
    from qbert import _cpu
except ImportError:
    _cpu = None
assert (_cpu is not None) == (expected == "native"), f"expected {expected}, qbert._cpu is {_cpu}"
if _cpu is not None:
    assert Path(_cpu.__file__).is_relative_to(sys.prefix), _cpu.__file__
    print("instruction sets:", ", ".join(_cpu.supported_isas()), "| threads:", _cpu.thread_backend())

for scheme in ("w8a8", "w4a16", "gobo3a8"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 32)).eval()
    x = torch.randn(5, 128)
    with torch.inference_mode():
        exact = model(x)
        qbert.quantize_(model, scheme)
        found = model(x)
    kernels = {row.kernel for row in qbert.explain(model).quantized}
    error = ((found - exact).norm() / exact.norm()).item()
    print(f"{scheme}: kernels {', '.join(sorted(kernels))}, relative error {error:.3f}")
    assert error < 0.35, scheme
    native = {kernel for kernel in kernels if kernel.startswith("native")}
    assert native == (kernels if expected == "native" else set()), (scheme, kernels)

# `qbert bench report` and `qbert advise` read them.
stored = [load_results(path) for path in sorted(RESULTS.rglob("*.json"))]
assert stored, f"no results in {RESULTS}"
print("stored results:", ", ".join(f"{results.machine.slug} {results.machine.date[:10]}" for results in stored))
