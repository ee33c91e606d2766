"""`qbert.ops.cuda` without a GPU: what it leaves to Triton and why, what it says without the module, what it passes on."""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from qbert import fuse_, ops, quantize_, testing, unfuse_
from qbert.dispatch import COMPILED_LAYOUTS, select_layout
from qbert.errors import MissingDependency, QBertError
from qbert.formats import FORMATS, INT4, INT8, SCHEMES, Role
from qbert.layout import Layout, layouts_of, qdata_shape, qdata_type
from qbert.metrics import sqnr_db
from qbert.nn import QLinear
from qbert.ops import cuda, reference_of
from qbert.ops.cuda.launch import fragments_obstacle
from qbert.qtensor import QuantizedTensor, plain_specs
from qbert.reference import dequantize_dictionary, dequantize_int4, expand_int8, finish
from qbert.target import Target

H100 = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448, native=True)
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
        (768, 75, "run from compute capability 8.0 on, this GPU has 7.5"),
    ],
)
def test_row_obstacle(k, sm, reason):
    assert reason in cuda.row_obstacle(k, Target("cuda", "", sm=sm))


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_rows_run_from_ampere_on(sm):
    assert cuda.row_obstacle(768, Target("cuda", "", sm=sm, native=True)) is None


def test_cpu_tensors_are_left_to_others():
    for operation, launcher in cuda.KERNELS.items():
        n = 16 if "linear" in operation else 0
        assert launcher(*testing.random_arguments(operation, 3, n, 64)) is NotImplemented


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

    fresh_import.setattr("qbert.target.importlib.import_module", broken)
    assert cuda.missing() == "qbert._cuda does not load: libcudart.so.13: cannot open shared object file"


# ---- what reaches the extension -------------------------------------------------------------------------------------

_TYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16, -1: torch.int8}


def _matrix(address, rows, columns, pitch, dtype):
    size = rows * pitch * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, pitch)[:, :columns]


def _vector(address, length, dtype):
    return _matrix(address, 1, length, length, dtype)[0] if length else torch.empty(0, dtype=dtype)


def _fragments(a, layout):
    fmt = FORMATS[a["code"]]
    shape = qdata_shape(layout, fmt, a["n"], a["k"])
    return _vector(a["codes"], math.prod(shape), qdata_type(layout, fmt)).view(shape)


def _outliers(a):
    if not a["outliers"]:
        return torch.zeros(a["n"] + 1, dtype=torch.int32), torch.empty(0, dtype=torch.int16), torch.empty(0)
    col = _vector(a["col"], a["outliers"], {2: torch.int16, 4: torch.int32}[a["col_bytes"]])
    return _vector(a["rowptr"], a["n"] + 1, torch.int32), col, _vector(a["delta"], a["outliers"], torch.float32)


def _end(a):
    bias = _vector(a["bias"], a["n"], _TYPES[a["bias_type"]]) if a["bias"] else None
    return bias, ("none", "gelu")[a["activation"]]


class Emulation:
    """The extension as its headers describe it, in torch, on the addresses that it is given."""

    REQUANTIZE = -1

    def __init__(self):
        self.calls = []

    def lowbit_columns_bytes(self, t, n, k, outliers, multiprocessors, tile=""):
        assert multiprocessors == H100.sm_count
        return 64 * k if outliers else 0

    def lowbit_linear(self, **a):
        self.calls.append(a)
        assert a["q"] % 16 == a["q_pitch"] % 16 == a["codes"] % 16 == 0
        assert bool(a["columns"]) == bool(a["outliers"])
        n, fmt = a["n"], FORMATS[a["code"]]
        if fmt is INT4:
            operation = "w4a8_linear"
            groups = _matrix(a["group_scale"], n, a["groups"], a["groups"], torch.uint8)
            held = (groups, _vector(a["scale"], n, torch.float32))
        else:
            operation = "gobo_linear"
            codebooks = _matrix(a["codebook"], a["matrices"], fmt.codes, fmt.codes, torch.int8)
            held = (codebooks, _vector(a["scale"], a["matrices"], torch.float32), *_outliers(a))
        self._finish(operation, a, (_fragments(a, Layout.FRAGMENTS_S8), *held), "fragments_s8")

    def weight_only_linear(self, **a):
        self.calls.append(a)
        assert a["x"] % 16 == a["x_pitch"] * 2 % 16 == a["codes"] % 16 == 0
        assert a["t"] <= 64
        dtype = _TYPES[a["x_type"]]
        x = _matrix(a["x"], a["t"], a["k"], a["x_pitch"], dtype)
        y = torch.nn.functional.linear(x.double(), self._dense(a), None)
        bias, activation = _end(a)
        _matrix(a["out"], a["t"], a["n"], a["out_pitch"], dtype)[:] = finish(y, bias, activation, dtype)

    def expand_weight(self, **a):
        self.calls.append(a)
        _matrix(a["out"], a["n"], a["k"], a["k"], _TYPES[a["out_type"]])[:] = self._dense(a)

    def _dense(self, a):
        n, fmt, codes = a["n"], FORMATS[a["code"]], _fragments(a, Layout.FRAGMENTS_F16)
        if fmt is INT8:
            values = expand_int8(codes, n, a["k"], "fragments_f16") * _vector(a["scale"], n, torch.float32)[:, None]
        elif fmt is INT4:
            scale = _matrix(a["scale"], n, a["groups"], a["groups"], torch.bfloat16)
            values = dequantize_int4(codes, scale, a["k"], "fragments_f16")
        else:
            codebook = _vector(a["codebook"], fmt.codes, torch.float32)
            values = dequantize_dictionary(codes, codebook, *_outliers(a), a["k"], "fragments_f16")
        return values.double()

    def _finish(self, operation, a, weight, layout):
        """The reference of an integer product with that weight, written where `out` says."""
        q = _matrix(a["q"], a["t"], a["k"], a["q_pitch"], torch.int8)
        bias, activation = _end(a)
        out_type = _TYPES[a["out_type"]]
        requantized = out_type == torch.int8
        out = 1.0 / a["inverse_out_scale"] if requantized else out_type
        s = _vector(a["s"], a["t"], torch.float32)
        reference = reference_of(f"{operation}_requant" if requantized else operation)
        y = reference(q, s, *weight, bias, activation, out, layout)
        _matrix(a["out"], a["t"], a["n"], a["out_pitch"], out_type)[:] = y

    def w8a8_linear(self, **a):
        self.calls.append(a)
        weight = _matrix(a["weight"], a["n"], a["k"], a["weight_pitch"], torch.int8)
        self._finish("w8a8_linear", a, (weight, _vector(a["scale"], a["n"], torch.float32)), "plain")


@pytest.fixture
def emulation(monkeypatch):
    emulated = Emulation()
    monkeypatch.setattr(cuda.launch, "extension", lambda: emulated)
    monkeypatch.setattr(cuda.launch, "target_of", lambda device: H100)
    monkeypatch.setattr(cuda.launch, "stream_of", lambda device: 77)
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
    linear = cuda.w8a8_linear
    with pytest.raises(QBertError, match="w8a8_linear: q has strides"):
        linear(q.t().contiguous().t(), s, weight, scale, bias, *rest)
    with pytest.raises(QBertError, match="unknown activation 'relu'"):
        linear(q, s, weight, scale, bias, "relu", torch.float32, "plain")
    with pytest.raises(Exception, match=r"bias is torch\.float64"):
        linear(q, s, weight, scale, bias.double(), *rest)
    assert emulation.calls == []


# ---- packed weights -------------------------------------------------------------------------------------------------

PACKED = [
    pytest.param(operation, scheme, id=f"{operation}-{scheme}")
    for operation in COMPILED_LAYOUTS
    for scheme in testing.schemes_of(operation)
]


def argument_names(operation):
    return [each.name for each in getattr(torch.ops.qbert, operation).default._schema.arguments]


def packed(operation, scheme, t, n, k, **options):
    size = SCHEMES[scheme].group_size
    k = -(-k // size) * size if size else k
    return testing.random_arguments(operation, t, n, k, scheme=scheme, layout=COMPILED_LAYOUTS[operation], **options)


def run(operation, arguments):
    y = cuda.KERNELS[operation](*arguments)
    assert y is not NotImplemented
    testing.assert_matches_reference(operation, arguments, y)
    return y


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"groups": 2}, None),
        ({"k": 120, "groups": 1}, None),
        ({"k": 0, "groups": 1}, None),
        ({"layout": "nibble_halves"}, "do not read layout nibble_halves; they read fragments_s8"),
        ({"groups": 16}, "16 groups of 16; the CUDA kernels take one, or groups of 32, 64 or multiples of 128"),
        ({"k": 384, "groups": 4}, "4 groups of 96"),
        ({"groups": 0}, "0 groups of 256"),
        ({"target": replace(H100, sm=80)}, "compiled for compute capability 9.0, this GPU has 8.0"),
        ({"target": replace(H100, native=False, native_missing="no nvcc")}, "no nvcc"),
    ],
    ids=str,
)
def test_fragments_obstacle(changes, reason):
    problem = {"operation": "w4a8_linear", "k": 256, "groups": 4, "layout": "fragments_s8", "target": H100}
    found = fragments_obstacle(**{**problem, **changes})
    assert reason in found if reason else found is None


@pytest.mark.parametrize(("operation", "scheme"), PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "none")])
def test_packed_weights_mean_what_the_headers_say(emulation, operation, scheme, dtype, bias, activation):
    """Sizes that leave blocks, strips and 16-byte rows open."""
    run(operation, packed(operation, scheme, 5, 75, 165, dtype=dtype, bias=bias, activation=activation, seed=3))
    call = emulation.calls[-1]
    assert call["stream"] == 77
    if "a16" in operation:
        assert ("x" in call) == (dtype != torch.float32)


@pytest.mark.parametrize(("operation", "scheme"), PACKED)
@pytest.mark.parametrize(("t", "n", "k"), [(0, 70, 128), (3, 0, 128), (3, 70, 0), (0, 0, 0)])
def test_problems_of_nothing_are_not_launched(emulation, operation, scheme, t, n, k):
    specs = plain_specs(SCHEMES[scheme], (n, k))
    plain = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    tensors = (
        QuantizedTensor(SCHEMES[scheme], (n, k), Layout.PLAIN, plain).to_layout(COMPILED_LAYOUTS[operation]).tensors
    )
    tokens = {
        "q": torch.zeros(t, k, dtype=torch.int8),
        "s": torch.ones(t),
        "x": torch.zeros(t, k, dtype=torch.bfloat16),
    }
    end = {"bias": torch.linspace(-9, 9, n), "activation": "gelu", "out_dtype": torch.float16, "out_scale": 0.1}
    named = {**tokens, **tensors, **end, "layout": COMPILED_LAYOUTS[operation].value}
    run(operation, [named[name] for name in argument_names(operation)])
    assert emulation.calls == []


@pytest.mark.parametrize("operation", [name for name in COMPILED_LAYOUTS if "a16" in name])
@pytest.mark.parametrize("t", [64, 65])
def test_many_tokens_multiply_an_expanded_weight(emulation, operation, t):
    run(operation, packed(operation, testing.schemes_of(operation)[0], t, 70, 130, dtype=torch.bfloat16))
    assert ("x" in emulation.calls[0]) == (t == 64)


@pytest.mark.parametrize("operation", ["gobo_linear", "gobo_linear_requant"])
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
def test_stacked_dictionaries(emulation, operation, scheme):
    run(operation, packed(operation, scheme, 5, 3 * 21, 100, matrices=3))
    assert emulation.calls[0]["matrices"] == 3


@pytest.mark.parametrize("operation", ["gobo_linear", "gobo_a16_linear"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_columns_of_outliers_of_either_type(emulation, operation, dtype):
    arguments = list(packed(operation, testing.schemes_of(operation)[0], 5, 70, 130, dtype=torch.bfloat16))
    at = next(i for i, each in enumerate(arguments) if isinstance(each, torch.Tensor) and each.dtype == torch.int16)
    arguments[at] = arguments[at].to(dtype)
    run(operation, arguments)
    assert emulation.calls[0]["col_bytes"] == dtype.itemsize


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", list(COMPILED_LAYOUTS))
def test_biases_of_every_float_type(emulation, operation, bias):
    arguments = list(packed(operation, testing.schemes_of(operation)[0], 5, 70, 130, dtype=torch.bfloat16))
    at = argument_names(operation).index("bias")
    arguments[at] = arguments[at].to(bias)
    run(operation, arguments)


@pytest.mark.parametrize("operation", ["gobo_linear", "gobo_a16_linear"])
def test_tokens_that_do_not_start_on_16_bytes_are_copied(emulation, operation):
    first, *rest = packed(operation, testing.schemes_of(operation)[0], 5, 70, 128, dtype=torch.bfloat16)
    memory = torch.empty(first.numel() + 1, dtype=first.dtype)
    shifted = memory[1:].view(first.shape).copy_(first)
    assert shifted.data_ptr() % 16
    strided = first.repeat(1, 2)[:, :128]
    for tokens in (shifted, strided):
        run(operation, (tokens, *rest))


@pytest.mark.parametrize("operation", ["gobo_linear", "gobo_a16_linear"])
def test_one_token_may_have_any_stride(emulation, operation):
    first, *rest = packed(operation, testing.schemes_of(operation)[0], 1, 70, 128, dtype=torch.bfloat16)
    column = first.view(-1, 1).t()
    assert column.stride() == (1, 1)
    assert column.is_contiguous()
    run(operation, (column, *rest))


@pytest.mark.parametrize(("operation", "scheme"), PACKED)
def test_rows_of_triton_are_left_to_triton(emulation, operation, scheme):
    for layout in set(layouts_of(SCHEMES[scheme])) - {COMPILED_LAYOUTS[operation]}:
        arguments = testing.random_arguments(operation, 3, 64, 128, scheme=scheme, layout=layout)
        assert cuda.KERNELS[operation](*arguments) is NotImplemented
    assert emulation.calls == []


def test_groups_that_no_kernel_takes_are_left_to_the_reference(emulation):
    q, s, qdata, group_scale, *rest = packed("w4a8_linear", "w4a8", 3, 64, 128)
    narrow = group_scale.repeat_interleave(4, dim=1)
    assert cuda.KERNELS["w4a8_linear"](q, s, qdata, narrow, *rest) is NotImplemented


@pytest.mark.parametrize("operation", list(COMPILED_LAYOUTS))
def test_bad_packed_operands_are_named(emulation, operation):
    arguments = list(packed(operation, testing.schemes_of(operation)[0], 4, 64, 128))
    at = next(i for i, each in enumerate(arguments) if isinstance(each, torch.Tensor) and each.dim() == 3)
    memory = torch.empty(arguments[at].numel() + 1, dtype=arguments[at].dtype)
    arguments[at] = memory[1:].view(arguments[at].shape).copy_(arguments[at])
    with pytest.raises(
        QBertError, match=f"{operation.removesuffix('_requant')}: codes starts at an address 1 bytes past"
    ):
        cuda.KERNELS[operation](*arguments)
    assert emulation.calls == []


@pytest.mark.parametrize("operation", list(COMPILED_LAYOUTS))
def test_operators_send_fragments_to_the_extension_and_rows_to_triton(emulation, monkeypatch, operation):
    """What runs on CUDA tensors, called with tensors of the CPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(ops, "target_of", lambda device: H100)
    implementation, scheme = getattr(ops.direct("cuda"), operation), testing.schemes_of(operation)[0]
    arguments = packed(operation, scheme, 5, 70, 130, dtype=torch.bfloat16)
    testing.assert_matches_reference(operation, arguments, implementation(*arguments))
    assert len(emulation.calls) == 1
    rows = select_layout(SCHEMES[scheme], Role.LINEAR, H100)
    with pytest.raises(QBertError, match=r"a Triton kernel was given a tensor on cpu"):
        implementation(*testing.random_arguments(operation, 5, 64, 128, scheme=scheme, layout=rows))


# ---- the kernels themselves, emulated -------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "scheme"), PACKED)
@pytest.mark.parametrize(
    ("t", "n", "k", "dtype"),
    [(1, 64, 128, torch.bfloat16), (5, 70, 165, torch.float16), (66, 130, 95, torch.float32)],
    ids=["one", "few", "many"],
)
def test_launchers_of_packed_weights_by_emulated_kernels(emulated, operation, scheme, t, n, k, dtype):
    """From the operator's arguments to its result: launcher, bindings, choice of a kernel, and the kernel's own source."""
    activation = "none" if t == 1 else "gelu"
    run(operation, packed(operation, scheme, t, n, k, dtype=dtype, activation=activation, bias=t != 5))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
@pytest.mark.parametrize("t", [5, 70])
def test_stacked_dictionaries_by_emulated_kernels(emulated, scheme, t):
    run("gobo_linear", packed("gobo_linear", scheme, t, 3 * 43, 200, matrices=3))


@pytest.mark.parametrize("scheme", ["w4a8", "gobo3a8"])
def test_a_fused_encoder_by_emulated_kernels(emulated, monkeypatch, scheme):
    """A model whose linears lie in fragments: query, key and value stacked, static scales folded in, int8 between operators."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=40,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(97, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    model = quantize_(BertModel(config).eval(), scheme, fuse=True)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    for module in model.modules():
        if isinstance(module, QLinear):
            module._hold(module.quantized.to_layout(Layout.FRAGMENTS_S8))
    fuse_(unfuse_(model))
    operators = {**vars(ops.direct("cpu")), **{name: cuda.KERNELS[name] for name in COMPILED_LAYOUTS}}
    monkeypatch.setattr("qbert.nn.stack.direct", lambda device: SimpleNamespace(**operators))
    calls, kernel = [], emulated.lowbit_linear
    monkeypatch.setattr(emulated, "lowbit_linear", lambda **a: [calls.append((a["n"], a["matrices"])), kernel(**a)])
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
    matrices = 1 if scheme == "w4a8" else 3
    assert calls == [(192, matrices), (64, 1), (128, 1), (64, 1)]
    assert sqnr_db(expected, found) > 60
