"""`qbert.ops.cuda` without a GPU: what it leaves to Triton and why, what it says without the module, what it passes on."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from qbert import testing
from qbert.errors import MissingDependency, QBertError
from qbert.layout import Layout
from qbert.ops import cuda, reference_of
from qbert.target import Target

H100 = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448)
ROWS = Layout.INT8_ROWS.value


@pytest.mark.parametrize(
    ("n", "out"), [(768, torch.float32), (8, torch.bfloat16), (776, torch.float16), (16, torch.int8)]
)
def test_no_obstacle(n, out):
    assert cuda.linear_obstacle(n, 768, out, ROWS, H100) is None
    assert cuda.linear_obstacle(n, 16, out, Layout.PLAIN.value, H100) is None
    assert cuda.row_obstacle(n, H100) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": Target("cuda", "", sm=80)}, "compiled for compute capability 9.0, this GPU has 8.0"),
        ({"target": Target("cuda", "", sm=100)}, "this GPU has 10.0"),
        ({"layout": Layout.INT8_PANELS.value}, "do not read layout int8_panels; they read int8_rows, plain"),
        ({"k": 760}, "k is 760; the CUDA kernels take multiples of 16"),
        ({"k": 0}, "k is 0; the CUDA kernels take multiples of 16, above 0"),
        ({"n": 2}, "a row of the result is 4 bytes; the CUDA kernels store multiples of 16"),
        ({"n": 776, "out": torch.int8}, "a row of the result is 776 bytes"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_linear_obstacle(changes, reason):
    problem = {"n": 768, "k": 768, "out": torch.bfloat16, "layout": ROWS, "target": H100}
    assert reason in cuda.linear_obstacle(**{**problem, **changes})


@pytest.mark.parametrize(
    ("k", "sm", "reason"),
    [
        (0, 90, "k is 0; the CUDA row kernels take multiples of 8 up to 2048"),
        (2056, 90, "k is 2056;"),
        (770, 90, "k is 770;"),
        (768, 89, "this GPU has 8.9"),
    ],
)
def test_row_obstacle(k, sm, reason):
    assert reason in cuda.row_obstacle(k, Target("cuda", "", sm=sm))


def test_cpu_tensors_are_left_to_others():
    arguments = testing.random_arguments("w8a8_linear", 3, 16, 16)
    assert cuda.w8a8_linear(*arguments) is NotImplemented
    assert (
        cuda.add_layer_norm_quantize(*testing.random_arguments("add_layer_norm_quantize", 3, 0, 16)) is NotImplemented
    )


@pytest.fixture
def fresh_import(monkeypatch):
    cuda.extension.cache_clear()
    yield monkeypatch
    cuda.extension.cache_clear()


def test_missing_module_says_how_to_get_it(fresh_import):
    fresh_import.setitem(sys.modules, "qbert._cuda", None)
    assert cuda.missing() == (
        "qbert was installed without its CUDA kernels (qbert._cuda); to build them: CUDA's nvcc, QBERT_CUDA=1, and "
        "install again (docs/cuda.md)"
    )
    with pytest.raises(MissingDependency):
        cuda.extension()


def test_module_that_does_not_load_says_why(fresh_import):
    def broken(name):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    fresh_import.setattr(cuda.importlib, "import_module", broken)
    assert cuda.missing() == "qbert._cuda does not load: libcudart.so.13: cannot open shared object file"


# ---- what reaches the extension -------------------------------------------------------------------------------------

_TYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16, -1: torch.int8}


def _matrix(address, rows, columns, pitch, dtype):
    size = rows * pitch * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, pitch)[:, :columns]


class Emulation:
    """The extension as its header describes it, in torch, on the addresses that it is given."""

    REQUANTIZE = -1

    def __init__(self):
        self.calls = []

    def w8a8_linear(self, **a):
        self.calls.append(a)
        t, n, k = a["t"], a["n"], a["k"]
        vector = lambda address, length, dtype: _matrix(address, 1, length, length, dtype)[0]
        q = _matrix(a["q"], t, k, a["q_pitch"], torch.int8)
        weight = _matrix(a["weight"], n, k, a["weight_pitch"], torch.int8)
        bias = vector(a["bias"], n, _TYPES[a["bias_type"]]) if a["bias"] else None
        tensors = (q, vector(a["s"], t, torch.float32), weight, vector(a["scale"], n, torch.float32), bias)
        activation, out_type = ("none", "gelu")[a["activation"]], _TYPES[a["out_type"]]
        name = "w8a8_linear_requant" if out_type == torch.int8 else "w8a8_linear"
        out = 1.0 / a["inverse_out_scale"] if out_type == torch.int8 else out_type
        y = reference_of(name)(*tensors, activation, out, "plain")
        _matrix(a["out"], t, n, a["out_pitch"], out_type)[:] = y


@pytest.fixture
def emulation(monkeypatch):
    emulated = Emulation()
    monkeypatch.setattr(cuda, "extension", lambda: emulated)
    monkeypatch.setattr(cuda, "target_of", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    return emulated


@pytest.mark.parametrize("operation", ["w8a8_linear", "w8a8_linear_requant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "none")])
@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.INT8_ROWS])
def test_arguments_mean_what_the_header_says(emulation, operation, dtype, bias, activation, layout):
    arguments = testing.random_arguments(
        operation, 5, 48, 32, dtype=dtype, bias=bias, activation=activation, layout=layout, seed=3
    )
    testing.assert_matches_reference(operation, arguments, cuda.KERNELS[operation](*arguments))
    assert emulation.calls[0]["stream"] == 77
    assert emulation.calls[0]["tile"] == ""


def test_no_tokens_need_no_launch(emulation):
    arguments = testing.random_arguments("w8a8_linear", 0, 16, 16)
    assert cuda.w8a8_linear(*arguments).shape == (0, 16)
    assert emulation.calls == []


def test_bad_operands_are_named(emulation):
    q, s, weight, scale, bias, *rest = testing.random_arguments("w8a8_linear", 4, 16, 32)
    with pytest.raises(QBertError, match="w8a8_linear: q has strides"):
        cuda.w8a8_linear(q.t().contiguous().t(), s, weight, scale, bias, *rest)
    with pytest.raises(QBertError, match="unknown activation 'relu'"):
        cuda.w8a8_linear(q, s, weight, scale, bias, "relu", torch.float32, "plain")
    with pytest.raises(Exception, match=r"bias is torch\.float64"):
        cuda.w8a8_linear(q, s, weight, scale, bias.double(), *rest)
    assert emulation.calls == []
