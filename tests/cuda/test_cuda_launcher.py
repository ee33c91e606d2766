"""`qbert.ops.cuda` without a GPU: what it leaves to Triton and why, what it says without the module, what it passes on."""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel

from qbert import fuse_, quantize_, testing, unfuse_
from qbert.errors import MissingDependency, QBertError
from qbert.formats import DICT3, DICT4, FORMATS, INT4, INT8, SCHEMES, PerGroup, Role
from qbert.metrics import sqnr_db
from qbert.modules import QLinear
from qbert.ops import cuda, reference, table
from qbert.ops.abi import Activation
from qbert.ops.cuda import lowbit, rows
from qbert.ops.kernel import Problem, problem_of
from qbert.ops.operations import Linear
from qbert.target import Target
from qbert.weight import Layout, Weight, codec, plain_specs
from qbert.weight.layout import layouts_of, qdata_shape, qdata_type

H100 = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448, native=True)
ASKED = replace(H100, prefer="cuda")
W8A8 = Problem(SCHEMES["w8a8"], Layout.INT8_ROWS, 768, 768, torch.bfloat16, 16)
NORM = Problem(None, None, 0, 768, torch.bfloat16, 16)
LINEAR = cuda.KERNELS[0]


@pytest.mark.parametrize(
    ("n", "out"), [(768, torch.float32), (8, torch.bfloat16), (776, torch.float16), (16, torch.int8)]
)
def test_no_obstacle(n, out):
    assert LINEAR.obstacle(W8A8._replace(n=n, dtype=out), ASKED) is None
    assert LINEAR.obstacle(W8A8._replace(n=n, dtype=out, k=16, layout=Layout.PLAIN), ASKED) is None
    assert rows.obstacle(NORM._replace(k=n), ASKED) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": Target("cuda", "", sm=80)}, "compiled for compute capability 9.0, this GPU has 8.0"),
        ({"target": Target("cuda", "", sm=100)}, "this GPU has 10.0"),
        ({"target": H100}, "the table of tiles names Triton's kernel for this problem"),
        ({"target": replace(H100, prefer="triton")}, "QBERT_KERNEL=triton"),
        ({"layout": Layout.INT8_PANELS}, "the weight lies in int8_panels, the CUDA kernels read int8_rows and plain"),
        ({"k": 760}, "k is 760; the CUDA kernels take multiples of 16"),
        ({"k": 0}, "k is 0; the CUDA kernels take multiples of 16, above 0"),
        ({"n": 2}, "a row of the result is 4 bytes; the CUDA kernels store multiples of 16"),
        ({"n": 776, "dtype": torch.int8}, "a row of the result is 776 bytes"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_linear_obstacle(changes, reason):
    changes = dict(changes)
    target = changes.pop("target", ASKED)
    assert reason in LINEAR.obstacle(W8A8._replace(**changes), target)


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
    assert reason in rows.obstacle(NORM._replace(k=k), Target("cuda", "", sm=sm, native=True, prefer="cuda"))


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_rows_run_from_ampere_on(sm):
    assert rows.obstacle(NORM, Target("cuda", "", sm=sm, native=True, prefer="cuda")) is None


def test_cpu_tensors_are_left_to_others():
    for row in cuda.KERNELS:
        for scheme in testing.schemes_of(row.operation) or [None]:
            problem = problem_of(testing.random_problem(row.operation, 3, 256, 256, scheme=scheme))
            assert row.obstacle(problem, Target("cpu")) is not None
            assert table.select(row.operation, problem, Target("cpu")) not in cuda.KERNELS


@pytest.mark.parametrize(
    ("operation", "changes", "prefix"),
    [
        ("linear", {}, ""),
        ("linear", {"k": 8}, "QBERT_KERNEL=cuda, but k is 8; the CUDA kernels take multiples of 16, above 0; "),
        ("add_norm", {"k": 4096}, "QBERT_KERNEL=cuda, but k is 4096; the CUDA row kernels take multiples of 8 up to 2048; "),
        ("attention", {}, ""),
    ],
)  # fmt: skip
def test_why_not(operation, changes, prefix):
    problem = (W8A8 if operation == "linear" else NORM)._replace(**changes)
    assert cuda.why_not(operation, problem, ASKED) == prefix
    assert cuda.why_not(operation, problem, H100) == ""


def test_missing_extension():
    without = replace(H100, native=False, native_missing="no nvcc")
    assert cuda.missing_extension(without) == "no nvcc"
    for target in (H100, replace(without, prefer="triton"), replace(without, sm=80), Target("cpu")):
        assert cuda.missing_extension(target) is None


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
    return bias, Activation(a["activation"])


def _weight(a, layout, **tensors):
    """A weight of the scheme whose codes and groups the arguments say."""
    of_integers = layout is not Layout.FRAGMENTS_F16
    fmt = FORMATS[a.get("code", "int8")]
    scheme = next(
        each
        for each in SCHEMES.values()
        if Role.LINEAR in each.roles
        and (each.weight, each.activation is not None) == (fmt, of_integers)
        and each.group_size in (None, a["k"] // a.get("groups", 1))
    )
    if fmt in (DICT3, DICT4):
        tensors |= dict(zip(("outlier_rowptr", "outlier_col", "outlier_delta"), _outliers(a), strict=True))
    return Weight(scheme, (a["n"], a["k"]), layout, tensors)


class Emulation:
    """The extension as its headers describe it, in torch, on the addresses that it is given."""

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
        held = {"qdata": _fragments(a, Layout.FRAGMENTS_S8)}
        if fmt is INT4:
            held["group_scale"] = _matrix(a["group_scale"], n, a["groups"], a["groups"], torch.uint8)
            held["scale"] = _vector(a["scale"], n, torch.float32)
        else:
            held["codebook"] = _matrix(a["codebook"], a["matrices"], fmt.codes, fmt.codes, torch.int8)
            held["scale"] = _vector(a["scale"], a["matrices"], torch.float32)
        self._finish(a, _weight(a, Layout.FRAGMENTS_S8, **held))

    def weight_only_linear(self, **a):
        self.calls.append(a)
        assert a["x"] % 16 == a["x_pitch"] * 2 % 16 == a["codes"] % 16 == 0
        assert a["t"] <= 64
        dtype = _TYPES[a["x_type"]]
        x = _matrix(a["x"], a["t"], a["k"], a["x_pitch"], dtype)
        y = torch.nn.functional.linear(x.double(), self._dense(a), None)
        bias, activation = _end(a)
        _matrix(a["out"], a["t"], a["n"], a["out_pitch"], dtype)[:] = reference.to_out(
            reference.activated(y if bias is None else y + bias.to(y.dtype), activation, gated=False), dtype
        )

    def expand_weight(self, **a):
        self.calls.append(a)
        _matrix(a["out"], a["n"], a["k"], a["k"], _TYPES[a["out_type"]])[:] = self._dense(a)

    def _dense(self, a):
        n, fmt, held = a["n"], FORMATS[a["code"]], {"qdata": _fragments(a, Layout.FRAGMENTS_F16)}
        if fmt is INT8:
            held["scale"] = _vector(a["scale"], n, torch.float32)
        elif fmt is INT4:
            held["scale"] = _matrix(a["scale"], n, a["groups"], a["groups"], torch.bfloat16)
        else:
            held["codebook"] = _vector(a["codebook"], fmt.codes, torch.float32)
        return codec.decode(_weight(a, Layout.FRAGMENTS_F16, **held)).double()

    def _finish(self, a, weight):
        """The reference of an integer product with that weight, written where `out` says."""
        q = _matrix(a["q"], a["t"], a["k"], a["q_pitch"], torch.int8)
        bias, activation = _end(a)
        out_type = _TYPES[a["out_type"]]
        out = 1.0 / a["inverse_out_scale"] if out_type == torch.int8 else out_type
        y = reference.linear(
            Linear(q, _vector(a["s"], a["t"], torch.float32), weight, bias, activation, False, out, a["zero"])
        )
        _matrix(a["out"], a["t"], a["n"], a["out_pitch"], out_type)[:] = y

    def w8a8_linear(self, **a):
        self.calls.append(a)
        weight = _matrix(a["weight"], a["n"], a["k"], a["weight_pitch"], torch.int8)
        self._finish(a, _weight(a, Layout.PLAIN, qdata=weight, scale=_vector(a["scale"], a["n"], torch.float32)))


@pytest.fixture
def emulation(monkeypatch):
    emulated = Emulation()
    monkeypatch.setattr(cuda.launch, "extension", lambda: emulated)
    monkeypatch.setattr(cuda.launch, "target_of", lambda device: H100)
    monkeypatch.setattr(cuda.launch, "stream_of", lambda device: 77)
    return emulated


@pytest.mark.parametrize("int8_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "none")])
@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.INT8_ROWS])
def test_arguments_mean_what_the_header_says(emulation, int8_out, dtype, bias, activation, layout):
    options = {"dtype": dtype, "bias": bias, "activation": activation, "layout": layout, "seed": 3}
    run(testing.random_problem("linear", 5, 48, 32, scheme="w8a8", int8_out=int8_out, **options))
    assert emulation.calls[0]["stream"] == 77
    assert emulation.calls[0]["tile"] == ""


def test_no_tokens_need_no_launch(emulation):
    assert cuda.linear(testing.random_problem("linear", 0, 16, 16, scheme="w8a8")).shape == (0, 16)
    assert emulation.calls == []


def test_bad_operands_are_named(emulation):
    a = testing.random_problem("linear", 4, 16, 32, scheme="w8a8")
    with pytest.raises(QBertError, match="linear: x has strides"):
        cuda.linear(a._replace(x=a.x.t().contiguous().t()))
    with pytest.raises(QBertError, match="linear: qdata has strides"):
        cuda.linear(with_weight(a, qdata=a.weight.qdata.t().contiguous().t()))
    with pytest.raises(Exception, match=r"bias is torch\.float64"):
        cuda.linear(a._replace(bias=a.bias.double()))
    assert emulation.calls == []


# ---- packed weights -------------------------------------------------------------------------------------------------


def own_layout(scheme):
    return cuda.own_layout(SCHEMES[scheme])


# Schemes, and whether the result is int8.
PACKED = [
    pytest.param(scheme, int8_out, id=f"{scheme}-int8" if int8_out else scheme)
    for scheme in testing.schemes_of("linear")
    for int8_out in ((False, True) if SCHEMES[scheme].activation else (False,))
    if own_layout(scheme) is not None
]
ONE_OF_EACH = [each for each in PACKED if each.values[0] in ("w4a8", "gobo3a8", "w8a16", "w4a16", "gobo3")]


def packed(scheme, t, n, k, **options):
    size = SCHEMES[scheme].group_size
    k = -(-k // size) * size if size else k
    return testing.random_problem("linear", t, n, k, scheme=scheme, layout=own_layout(scheme), **options)


def with_weight(a, **tensors):
    """The same with other tensors of the weight."""
    return a._replace(weight=replace(a.weight, tensors={**a.weight.tensors, **tensors}))


def run(a):
    """By the row that is chosen for it."""
    row = table.select("linear", problem_of(a), ASKED)
    assert row.name == ("cuda linear" if a.weight.k or a.s is None else "reference")
    y = row.call(a)
    testing.assert_matches_reference(a, y)
    return y


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"size": 128}, None),
        ({"k": 120, "size": 120}, None),
        ({"k": 0}, "k is 0; the CUDA kernels take 1 and more"),
        ({"layout": Layout.NIBBLE_HALVES}, "the weight lies in nibble_halves, the CUDA kernels read fragments_s8"),
        ({"size": 16}, "16 groups of 16; the CUDA kernels take one, or groups of 32, 64 or multiples of 128"),
        ({"k": 384, "size": 96}, "4 groups of 96"),
        ({"target": replace(H100, prefer="triton")}, None),
        ({"target": replace(H100, sm=80)}, "compiled for compute capability 9.0, this GPU has 8.0"),
        ({"target": replace(H100, native=False, native_missing="no nvcc")}, "no nvcc"),
    ],
    ids=str,
)
def test_fragments_obstacle(changes, reason):
    changes = {"k": 256, "size": 64, "layout": Layout.FRAGMENTS_S8, "target": H100, **changes}
    scheme = replace(SCHEMES["w4a8"], granularity=PerGroup(changes["size"]))
    problem = Problem(scheme, changes["layout"], 64, changes["k"], torch.float32, 3)
    found = lowbit.obstacle(problem, changes["target"])
    assert reason in found if reason else found is None


@pytest.mark.parametrize(("scheme", "int8_out"), PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "none")])
def test_packed_weights_mean_what_the_headers_say(emulation, scheme, int8_out, dtype, bias, activation):
    """Sizes that leave blocks, strips and 16-byte rows open."""
    options = {"dtype": dtype, "bias": bias, "activation": activation, "int8_out": int8_out}
    run(packed(scheme, 5, 75, 165, seed=3, **options))
    call = emulation.calls[-1]
    assert call["stream"] == 77
    if SCHEMES[scheme].activation is None:
        assert ("x" in call) == (dtype != torch.float32)


@pytest.mark.parametrize(("scheme", "int8_out"), PACKED)
@pytest.mark.parametrize(("t", "n", "k"), [(0, 70, 128), (3, 0, 128), (3, 70, 0), (0, 0, 0)])
def test_problems_of_nothing_are_not_launched(emulation, scheme, int8_out, t, n, k):
    specs = plain_specs(SCHEMES[scheme], (n, k))
    plain = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    weight = Weight(SCHEMES[scheme], (n, k), Layout.PLAIN, plain).to_layout(own_layout(scheme))
    x, s, out = torch.zeros(t, k, dtype=torch.bfloat16), None, torch.bfloat16
    if SCHEMES[scheme].activation is not None:
        x, s, out = x.to(torch.int8), torch.ones(t), 0.1 if int8_out else torch.float16
    run(Linear(x, s, weight, torch.linspace(-9, 9, n), Activation.GELU, False, out))
    assert emulation.calls == []


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "gobo3"])
@pytest.mark.parametrize("t", [64, 65])
def test_many_tokens_multiply_an_expanded_weight(emulation, scheme, t):
    run(packed(scheme, t, 70, 130, dtype=torch.bfloat16))
    assert ("x" in emulation.calls[0]) == (t == 64)


@pytest.mark.parametrize("int8_out", [False, True])
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
def test_stacked_dictionaries(emulation, int8_out, scheme):
    run(packed(scheme, 5, 3 * 21, 100, matrices=3, int8_out=int8_out))
    assert emulation.calls[0]["matrices"] == 3


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo3"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_columns_of_outliers_of_either_type(emulation, scheme, dtype):
    a = packed(scheme, 5, 70, 130, dtype=torch.bfloat16)
    run(with_weight(a, outlier_col=a.weight.tensors["outlier_col"].to(dtype)))
    assert emulation.calls[0]["col_bytes"] == dtype.itemsize


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scheme", "int8_out"), ONE_OF_EACH)
def test_biases_of_every_float_type(emulation, scheme, int8_out, bias):
    a = packed(scheme, 5, 70, 130, dtype=torch.bfloat16, int8_out=int8_out)
    run(a._replace(bias=a.bias.to(bias)))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo3"])
def test_tokens_that_do_not_start_on_16_bytes_are_copied(emulation, scheme):
    a = packed(scheme, 5, 70, 128, dtype=torch.bfloat16)
    memory = torch.empty(a.x.numel() + 1, dtype=a.x.dtype)
    shifted = memory[1:].view(a.x.shape).copy_(a.x)
    assert shifted.data_ptr() % 16
    strided = a.x.repeat(1, 2)[:, :128]
    for tokens in (shifted, strided):
        run(a._replace(x=tokens))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo3"])
def test_one_token_may_have_any_stride(emulation, scheme):
    a = packed(scheme, 1, 70, 128, dtype=torch.bfloat16)
    column = a.x.view(-1, 1).t()
    assert column.stride() == (1, 1)
    assert column.is_contiguous()
    run(a._replace(x=column))


@pytest.mark.parametrize(("scheme", "int8_out"), PACKED)
def test_other_layouts_are_left_to_others(scheme, int8_out):
    own = own_layout(scheme)
    for layout in set(layouts_of(SCHEMES[scheme])) - {own}:
        problem = Problem(SCHEMES[scheme], layout, 64, 128, torch.int8 if int8_out else torch.float32, 3)
        reason = f"the weight lies in {layout.value}, the CUDA kernels read {own.value}"
        assert LINEAR.obstacle(problem, ASKED) == reason
        assert table.select("linear", problem, ASKED).name != "cuda linear"


def test_groups_that_no_kernel_takes_are_left_to_the_reference(emulation):
    a = packed("w4a8", 3, 64, 128)
    scheme = replace(a.weight.scheme, name="w4a8 in groups of 16", granularity=PerGroup(16))
    narrow = {**a.weight.tensors, "group_scale": a.weight.group_scale.repeat_interleave(4, dim=1)}
    a = a._replace(weight=replace(a.weight, scheme=scheme, tensors=narrow))
    row = table.select("linear", problem_of(a), ASKED)
    assert row.name == "reference"
    testing.assert_matches_reference(a, row.call(a))
    assert emulation.calls == []


@pytest.mark.parametrize(("scheme", "int8_out"), ONE_OF_EACH)
def test_bad_packed_operands_are_named(emulation, scheme, int8_out):
    a = packed(scheme, 4, 64, 128, int8_out=int8_out)
    codes = a.weight.qdata
    memory = torch.empty(codes.numel() + 1, dtype=codes.dtype)
    with pytest.raises(QBertError, match="linear: qdata starts at an address 1 bytes past"):
        cuda.linear(with_weight(a, qdata=memory[1:].view(codes.shape).copy_(codes)))
    assert emulation.calls == []


@pytest.mark.parametrize(("scheme", "int8_out"), ONE_OF_EACH)
def test_operators_send_fragments_to_the_extension_and_rows_to_triton(emulation, monkeypatch, scheme, int8_out):
    """What runs on CUDA tensors, called with tensors of the CPU."""
    monkeypatch.setattr(table, "target_of", lambda device: H100)
    a = packed(scheme, 5, 70, 130, dtype=torch.bfloat16, int8_out=int8_out)
    testing.assert_matches_reference(a, table.run(a))
    assert len(emulation.calls) == 1
    layout = table.select_layout(SCHEMES[scheme], Role.LINEAR, H100)
    with pytest.raises(QBertError, match=r"a Triton kernel was given a tensor on cpu"):
        table.run(testing.random_problem("linear", 5, 64, 128, scheme=scheme, layout=layout, int8_out=int8_out))


# ---- the kernels themselves, emulated -------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "int8_out"), PACKED)
@pytest.mark.parametrize(
    ("t", "n", "k", "dtype"),
    [(1, 64, 128, torch.bfloat16), (5, 70, 165, torch.float16), (66, 130, 95, torch.float32)],
    ids=["one", "few", "many"],
)
def test_launchers_of_packed_weights_by_emulated_kernels(emulated, scheme, int8_out, t, n, k, dtype):
    """From the operation's record to its result: launcher, bindings, choice of a kernel, and the kernel's own source."""
    activation = "none" if t == 1 else "gelu"
    run(packed(scheme, t, n, k, dtype=dtype, activation=activation, bias=t != 5, int8_out=int8_out))


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
@pytest.mark.parametrize("t", [5, 70])
def test_stacked_dictionaries_by_emulated_kernels(emulated, scheme, t):
    run(packed(scheme, t, 3 * 43, 200, matrices=3))


@pytest.mark.parametrize("scheme", ["w4a8", "gobo3a8"])
def test_a_fused_encoder_by_emulated_kernels(emulated, fresh_choice, monkeypatch, scheme):
    """A model whose linears lie in fragments: query, key and value stacked, static scales folded in, int8 between operators."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=40,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(97, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    model = quantize_(BertModel(config).eval(), f"{scheme}+none", fuse=True)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    for module in model.modules():
        if isinstance(module, QLinear):
            module._hold(module.quantized.to_layout(Layout.FRAGMENTS_S8))
    row = replace(LINEAR, obstacle=lambda problem, target: LINEAR.obstacle(problem, H100))
    monkeypatch.setitem(table.KERNELS, "linear", (row, *table.KERNELS["linear"]))
    fuse_(unfuse_(model))
    calls, kernel = [], emulated.lowbit_linear
    monkeypatch.setattr(emulated, "lowbit_linear", lambda **a: [calls.append((a["n"], a["matrices"])), kernel(**a)])
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
    matrices = 1 if scheme == "w4a8" else 3
    assert calls == [(192, matrices), (64, 1), (128, 1), (64, 1), (64, 1)]  # the last is the pooler's
    assert sqnr_db(expected, found) > 60
