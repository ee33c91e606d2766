"""QLinear, QEmbedding and QTiedLinear of every scheme: what they compute, what they store, what they refuse."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qbert import QBertError
from qbert.formats import SCHEMES, Role, scheme_names, tied_linear_scheme
from qbert.metrics import sqnr_db
from qbert.modules import GUARD, QEmbedding, QLinear, QTiedLinear, QuantizedModule
from qbert.ops.abi import Activation
from qbert.ops.kernel import Problem
from qbert.ops.operations import Linear
from qbert.ops.reference import codes_and_scales
from qbert.ops.table import explain, select, select_layout
from qbert.quantizers import quantize
from qbert.target import cpu_target
from qbert.testing import assert_matches_reference, random_activations, random_weight
from qbert.weight.codec import decode
from qbert.weight.layout import layouts_of

N, K, ROWS = 48, 128, 40  # K is a multiple of every group size
LINEAR, EMBEDDING = scheme_names(Role.LINEAR), scheme_names(Role.EMBEDDING)
A8 = [name for name in LINEAR if SCHEMES[name].activation is not None]
UNGROUPED = [name for name in LINEAR if SCHEMES[name].group_size is None]
PACKED = [name for name in LINEAR if SCHEMES[name].weight_bits < 8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Signal to quantization noise of the test's weight, less some room: codes in a wrong order leave 0 dB or less.
LEAST_SQNR_DB = {8: 35.0, 4: 11.0, 3: 11.0}


def _linear(scheme: str, n: int = N, k: int = K, *, bias: bool = True, seed: int = 0) -> QLinear:
    weight = quantize(random_weight(n, k, seed=seed), SCHEMES[scheme])
    generator = torch.Generator().manual_seed(seed + 1)
    return QLinear(weight, nn.Parameter(torch.randn(n, generator=generator)) if bias else None)


def _embedding(scheme: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> QEmbedding:
    return QEmbedding(quantize(random_weight(ROWS, K, seed=seed), SCHEMES[scheme]), 0, dtype)


def _problem(module: QLinear | QTiedLinear, x: Tensor) -> Linear:
    """What the module's operation must be asked for x (t, k)."""
    assert module.operation == "linear"
    tokens = (x, None) if module.scheme.activation is None else codes_and_scales(x)
    return Linear(*tokens, module.quantized, module.bias, Activation.NONE, False, x.dtype)


def _bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# ---- what a linear computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_linear_computes_the_reference(scheme: str, bias: bool, dtype: torch.dtype) -> None:
    module = _linear(scheme, bias=bias).to(dtype)
    x = random_activations(17, K, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    assert_matches_reference(_problem(module, x), y)


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_linear_is_the_dequantized_layer(scheme: str) -> None:
    """Float activations: up to rounding. Int8 activations: up to half a step of 1/127 of the token's largest value."""
    module = _linear(scheme)
    x = random_activations(33, K)
    weight = decode(module.quantized).to(torch.float64)
    exact = nn.functional.linear(x.to(torch.float64), weight, module.bias.to(torch.float64))
    room = x.abs().amax(dim=1, keepdim=True) * weight.abs().sum(dim=1) / 254 if module.scheme.activation else 0.0
    assert bool(((module(x) - exact).abs() <= room + 1e-5 * exact.abs().amax(dim=1, keepdim=True)).all())


@pytest.mark.parametrize("scheme", LINEAR + EMBEDDING)
def test_quantized_weight_is_close_to_the_float_weight(scheme: str) -> None:
    weight = random_weight(N, K)
    found = decode(quantize(weight, SCHEMES[scheme]))
    assert sqnr_db(weight, found) > LEAST_SQNR_DB[SCHEMES[scheme].weight_bits]


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_leading_dimensions_do_not_matter(scheme: str) -> None:
    module = _linear(scheme)
    x = random_activations(6, K)
    flat = module(x)
    assert torch.equal(module(x.view(2, 3, K)), flat.view(2, 3, N))
    assert torch.equal(module(x.view(1, 2, 1, 3, K)), flat.view(1, 2, 1, 3, N))
    assert torch.equal(module(x[4]), module(x[4:5])[0])
    for empty in ((0,), (2, 0), (0, 3), (2, 0, 3)):
        y = module(torch.empty(*empty, K))
        assert y.shape == (*empty, N)


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_strided_inputs(scheme: str) -> None:
    module = _linear(scheme)
    x = random_activations(8, K)
    expected = module(x)
    assert torch.equal(module(x.t().contiguous().t()), expected)  # column-major
    wide = torch.full((8, 2 * K), torch.nan)
    wide[:, ::2] = x
    assert torch.equal(module(wide[:, ::2]), expected)
    row = x[:1].expand(8, K)
    assert torch.equal(module(row), module(row.contiguous()))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 33), (17, 9)], ids=str)
@pytest.mark.parametrize("scheme", UNGROUPED)
@torch.no_grad()
def test_odd_shapes(scheme: str, shape: tuple[int, int]) -> None:
    """Rows that do not end on a byte, and sizes that no matrix unit likes."""
    module = _linear(scheme, *shape)
    for t in (1, 3):
        x = random_activations(t, shape[1])
        assert_matches_reference(_problem(module, x), module(x))
    _assert_same_bits(module.state_dict(), _bits(copy.deepcopy(module)))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, K - 1), torch.zeros(K, 2), torch.zeros(()), torch.zeros(2, K).double(), torch.zeros(2, K).long()],
    ids=["narrow", "transposed", "scalar", "float64", "int64"],
)
@pytest.mark.parametrize("scheme", ["w8a8", "gobo3"])
def test_bad_inputs_are_refused(scheme: str, x: Tensor) -> None:
    with pytest.raises(QBertError, match=rf"{x.dtype}.*allowed: float32, bfloat16, float16.*{K}"):
        _linear(scheme)(x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_a_bad_token_spoils_its_own_row_alone(scheme: str, bad: float) -> None:
    module = _linear(scheme)
    x = random_activations(5, K)
    clean = module(x)
    x[3, 11] = bad
    y = module(x)
    others = [0, 1, 2, 4]
    assert torch.equal(y[others], clean[others])
    assert not bool(y[3].isfinite().any())
    if bad != bad or module.scheme.activation is not None:
        assert bool(y[3].isnan().all())


@pytest.mark.parametrize("scheme", A8)
@torch.no_grad()
def test_a_token_does_not_depend_on_its_neighbours(scheme: str) -> None:
    """Integer sums are exact, so this holds to the bit; float products of torch's promise no such thing."""
    module = _linear(scheme)
    x = random_activations(37, K)
    together = module(x)
    for t in (1, 2, 16, 31):
        assert torch.equal(module(x[:t]), together[:t])
    assert torch.equal(torch.cat([module(row[None]) for row in x]), together)


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_forward_changes_nothing_and_repeats(scheme: str) -> None:
    module = _linear(scheme)
    held = {name: tensor.clone() for name, tensor in module.named_buffers()}
    x = random_activations(9, K)
    kept = x.clone()
    first = module(x)
    assert all(torch.equal(module(x), first) for _ in range(3))
    assert torch.equal(x, kept)
    assert all(torch.equal(module.get_buffer(name), tensor) for name, tensor in held.items())


@torch.no_grad()
def test_training_mode_computes_the_same() -> None:
    module, x = _linear("w8a8"), random_activations(4, K)
    assert torch.equal(module.train()(x), module.eval()(x))


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("scheme", EMBEDDING)
def test_embedding_looks_up_dequantized_rows(scheme: str, dtype: torch.dtype) -> None:
    module = _embedding(scheme, dtype=dtype)
    table = decode(module.quantized).to(dtype)  # float32, rounded once
    ids = torch.randint(ROWS, (3, 11), generator=torch.Generator().manual_seed(0))
    for each in (ids, ids.to(torch.int32), ids[0, 0], ids[:0], ids.t(), ids[None, :, :, None]):
        found = module(each)
        assert found.dtype == dtype
        assert torch.equal(found, table[each.to(torch.int64)])


@pytest.mark.parametrize("bad", [-1, ROWS, 2**31, -(2**63)], ids=str)
@pytest.mark.parametrize("scheme", EMBEDDING)
def test_ids_outside_the_table_are_refused(scheme: str, bad: int) -> None:
    ids = torch.tensor([[0, 1], [bad, 2]])
    with pytest.raises(QBertError, match=rf"{bad} is out of range; the table has {ROWS} rows"):
        _embedding(scheme)(ids)


@pytest.mark.parametrize("scheme", EMBEDDING)
def test_embedding_rows_follow_casts(scheme: str) -> None:
    module, ids = _embedding(scheme), torch.arange(ROWS)
    before, rows = _bits(module), module(ids)
    for cast, dtype in ((module.half, torch.float16), (module.bfloat16, torch.bfloat16), (module.float, torch.float32)):
        cast()
        assert torch.equal(module(ids), rows.to(dtype))
    _assert_same_bits(module.state_dict(), before)


# ---- casts, moves and copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_casts_leave_the_weight_alone(scheme: str) -> None:
    module = _linear(scheme)
    weights = {name: tensor for name, tensor in _bits(module).items() if name != "bias"}
    for cast, dtype in ((module.half, torch.float16), (module.bfloat16, torch.bfloat16), (module.float, torch.float32)):
        cast()
        assert module.bias.dtype == dtype
        assert module(random_activations(2, K, dtype=dtype)).dtype == dtype
        _assert_same_bits({k: v for k, v in module.state_dict().items() if k != "bias"}, weights)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "gobo3", "gobo4a8"])
def test_double_is_refused_when_called_and_can_be_undone(scheme: str) -> None:
    module, x = _linear(scheme), random_activations(3, K)
    expected = module(x)
    module.double()
    with pytest.raises(QBertError, match=r"torch\.float64"):
        module(x.double())
    assert torch.equal(module.float()(x), expected)


@torch.no_grad()
def test_bias_of_another_type_than_the_input() -> None:
    module, x = _linear("w8a8"), random_activations(3, K)
    module.half()
    y = module(x)
    assert y.dtype == torch.float32
    assert_matches_reference(_problem(module, x), y)


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_to_meta_and_back(scheme: str) -> None:
    module, x = _linear(scheme), random_activations(3, K)
    expected, stored = module(x), _bits(module)
    module.to("meta")
    assert module(torch.empty(5, K, device="meta")).shape == (5, N)
    assert {name: (t.shape, t.dtype) for name, t in module.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in stored.items()
    }
    module.to_empty(device="cpu").load_state_dict(stored)
    assert torch.equal(module(x), expected)
    _assert_same_bits(module.state_dict(), stored)


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_deepcopy_is_independent(scheme: str) -> None:
    module, x = _linear(scheme), random_activations(3, K)
    expected, stored = module(x), _bits(module)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), expected)
    for tensor in (*copied.buffers(), *copied.parameters()):
        tensor.zero_()
    assert torch.equal(module(x), expected)
    _assert_same_bits(module.state_dict(), stored)


# ---- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_state_dict_is_plain_whatever_the_layout(scheme: str) -> None:
    plain = quantize(random_weight(N, K), SCHEMES[scheme])
    module = _linear(scheme)
    for layout in layouts_of(SCHEMES[scheme]):
        module._hold(plain.to_layout(layout))
        assert module.layout is layout
        for _ in range(2):  # before and after a call
            state = module.state_dict()
            assert state.keys() == {GUARD, "bias", *plain.tensors}
            _assert_same_bits({name: state[name] for name in plain.tensors}, plain.tensors)
            assert (state[GUARD].shape, state[GUARD].dtype) == ((0,), torch.uint8)
            module(random_activations(3, K))


@pytest.mark.parametrize("scheme", PACKED)
def test_packed_weights_lie_as_the_cpu_reads_them(scheme: str) -> None:
    """Native kernels read packed codes; torch needs them unpacked."""
    module = _linear(scheme)
    assert module.layout is select_layout(SCHEMES[scheme], Role.LINEAR, cpu_target())
    assert module.weight_nbytes() == sum(tensor.nbytes for tensor in module.buffers())
    packed = module.weight_nbytes() == module.quantized.stored_bytes  # 48 rows and 128 columns are whole panels
    assert packed == cpu_target().native
    problem = Problem(module.scheme, module.layout, N, K, torch.float32)
    assert module.kernel == explain(module.operation, problem, cpu_target())
    assert module.kernel.name == select(module.operation, problem, cpu_target()).name


@pytest.mark.parametrize("scheme", LINEAR)
@torch.no_grad()
def test_state_dict_round_trip(scheme: str) -> None:
    """The weights differ, and with them how many outliers there are."""
    source, target, x = _linear(scheme, seed=0), _linear(scheme, seed=7), random_activations(4, K)
    if source.scheme.has_dictionary:
        target = QLinear(quantize(torch.linspace(-1, 1, N * K).view(N, K), source.scheme), target.bias)
        assert source.quantized.outliers > target.quantized.outliers == 0
    assert not torch.equal(source(x), target(x))
    for first, second in ((target, source), (source, target)):  # to more outliers, and to none
        expected, stored = second(x), _bits(second)
        fresh = copy.deepcopy(first)
        assert not any(fresh.load_state_dict(stored))
        assert fresh.layout is second.layout
        assert torch.equal(fresh(x), expected)
        _assert_same_bits(fresh.state_dict(), stored)


@torch.no_grad()
def test_load_state_dict_by_assignment() -> None:
    source, target, x = _linear("gobo3a8", seed=0), _linear("gobo3a8", seed=7), random_activations(4, K)
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(x), source(x))


@torch.no_grad()
def test_state_dict_survives_torch_save() -> None:
    source, target, x = _linear("w4a8", seed=0), _linear("w4a8", seed=7), random_activations(4, K)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("scheme", LINEAR)
def test_a_state_dict_about_other_modules_leaves_the_weight(scheme: str) -> None:
    module = _linear(scheme)
    before = _bits(module)
    missing, unexpected = module.load_state_dict({"other": torch.zeros(1)}, strict=False)
    assert set(missing) == before.keys()
    assert unexpected == ["other"]
    _assert_same_bits(module.state_dict(), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})


def _edited(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        state[name] = edit(state[name].clone())

    return apply


def _set_first(value: float) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return edit


def _remove(name: str) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        del state[name]

    return apply


@pytest.mark.parametrize(
    ("scheme", "edit", "message"),
    [
        ("w8a8", _edited("scale", lambda t: t[:1]), r"scale: shape must be \[48\], got \[1\]"),
        ("w8a8", _edited("scale", lambda t: t.half()), "scale: data type must be float32, got float16"),
        ("w8a8", _edited("scale", _set_first(torch.nan)), "scale: every value must be finite and positive"),
        ("w8a8", _edited("qdata", lambda t: t[:, :-1]), r"qdata: shape must be \[48, 128\]"),
        ("w8a8", _edited("qdata", lambda t: t.view(torch.uint8)), "qdata: data type must be int8, got uint8"),
        ("w8a8", _edited("qdata", _set_first(-128)), r"qdata: codes must be -127 \.\.\. 127, got -128"),
        ("w8a8", _remove("scale"), "scale: tensor must be there"),
        ("w4a8", _edited("group_scale", _set_first(19)), "group_scale: every value must be 1 ... 18"),
        ("w4a16", _edited("scale", lambda t: t.float()), "scale: data type must be bfloat16"),
        ("gobo3", _edited("codebook", lambda t: t.flip(0)), "codebook: values must ascend"),
        ("gobo3", _edited("outlier_col", _set_first(K)), "outlier_col: columns must be 0 ... 127, got 128"),
        ("gobo3", _edited("outlier_rowptr", _set_first(1)), "outlier_rowptr: must start at 0"),
        ("gobo3", _edited("outlier_delta", lambda t: t[:-1]), "outlier_delta: shape must be"),
        ("gobo4a8", _edited("codebook", _set_first(-128)), "codebook: values must be -127 ... 127"),
    ],
)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
def test_bad_state_is_reported_and_changes_nothing(
    scheme: str, edit: Callable[[dict[str, Tensor]], None], message: str, strict: bool
) -> None:
    model = nn.Sequential(_linear(scheme))
    before = _bits(model)
    state = {name.removeprefix("0."): tensor for name, tensor in before.items()}
    edit(state)
    with pytest.raises(RuntimeError, match=r"checkpoint: 0\." + message):
        model.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, strict=strict)
    _assert_same_bits(model.state_dict(), before)


def test_a_float_state_dict_is_not_taken_for_a_quantized_one() -> None:
    for module in (_linear("w8a8"), _linear("gobo3")):
        with pytest.raises(RuntimeError, match=r"weight is torch\.float32 \(48, 128\): a float weight does not fit"):
            module.load_state_dict(nn.Linear(K, N).state_dict(), strict=False)


# ---- tied linears ---------------------------------------------------------------------------------------------------


class _Tied(nn.Module):
    """An embedding whose weight is also the output projection, as in a masked language model."""

    def __init__(self, owner: QuantizedModule) -> None:
        super().__init__()
        self.owner = owner
        bias = nn.Parameter(torch.randn(owner.shape[0], generator=torch.Generator().manual_seed(3)))
        self.decoder = QTiedLinear(owner, "owner", bias)


def _owners() -> list[str]:
    return [*EMBEDDING, *(name for name in LINEAR if name not in EMBEDDING)]


def _owner(scheme: str, seed: int = 0) -> QuantizedModule:
    return _embedding(scheme, seed=seed) if scheme in EMBEDDING else _linear(scheme, ROWS, K, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("scheme", _owners())
@torch.no_grad()
def test_tied_linear_is_a_linear_with_the_owners_weight(scheme: str, dtype: torch.dtype) -> None:
    model = _Tied(_owner(scheme)).to(dtype)
    decoder, x = model.decoder, random_activations(5, K, dtype=dtype)
    y = decoder(x)
    assert (y.dtype, y.shape) == (dtype, (5, ROWS))
    assert_matches_reference(_problem(decoder, x), y)
    assert decoder.scheme.weight is model.owner.scheme.weight
    assert Role.LINEAR in decoder.scheme.roles
    owner = SCHEMES[scheme]
    assert decoder.scheme == (tied_linear_scheme(owner) if scheme in EMBEDDING else owner)
    tied = {"w8": "w8a16", "w4": "w4a16", "w4-g32": "w4a16-g32", "w4-g128": "w4a16-g128"}
    assert decoder.scheme.name == tied.get(scheme, scheme)


def test_tied_linear_stores_and_counts_nothing_of_its_own() -> None:
    model = _Tied(_embedding("w8"))
    assert {name for name in model.state_dict() if name.startswith("decoder")} == {"decoder.bias"}
    assert [name for name, _ in model.named_modules()] == ["", "owner", "decoder"]
    assert model.decoder.weight_nbytes() == 0
    assert "tied to owner" in repr(model.decoder)


@pytest.mark.parametrize("scheme", ["w8", "gobo3", "w8a8"])
@torch.no_grad()
def test_tied_linear_follows_its_owner(scheme: str) -> None:
    model, other, x = _Tied(_owner(scheme)), _Tied(_owner(scheme, seed=9)), random_activations(3, K)
    expected = model.decoder(x)
    copied = copy.deepcopy(model)
    assert copied.decoder.owner is copied.owner
    assert model.decoder.owner is model.owner
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied.decoder(x), other.decoder(x))
    assert torch.equal(model.decoder(x), expected)
    copied.half().float()
    other.decoder.half().float()  # only the bias is rounded
    assert torch.equal(copied.decoder(x), other.decoder(x))


@torch.no_grad()
def test_tied_linear_confines_nan() -> None:
    model, x = _Tied(_embedding("w8")), random_activations(4, K)
    clean = model.decoder(x)
    x[2, 0] = torch.nan
    y = model.decoder(x)
    assert bool(y[2].isnan().all())
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


# ---- compilers ------------------------------------------------------------------------------------------------------

COMPILED = ["w8a8", "w8a16", "w4a8", "w4a16", "gobo3", "gobo4a8"]  # one of each operator


@pytest.mark.parametrize("scheme", COMPILED)
@torch.no_grad()
def test_compiles_without_graph_breaks(scheme: str) -> None:
    torch._dynamo.reset()
    module = _linear(scheme)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (3, 8):
        x = random_activations(t, K)
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("scheme", ["w8", "w4", "gobo3"])
def test_embedding_and_tied_linear_compile(scheme: str) -> None:
    torch._dynamo.reset()
    model = _Tied(_embedding(scheme)).eval()

    def forward(ids: Tensor) -> Tensor:
        return model.decoder(model.owner(ids))

    ids = torch.arange(6).view(2, 3)
    with torch.no_grad():
        assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(ids), forward(ids))


@pytest.mark.parametrize("scheme", COMPILED)
@torch.no_grad()
def test_exports(scheme: str) -> None:
    """The exported program keeps the layout that its graph names, also through a file."""
    module, x = _linear(scheme), random_activations(5, K)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("t", min=2)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer)
    for t in (2, 5, 9):
        x = random_activations(t, K)
        assert torch.equal(program.module()(x), module(x))
        assert torch.equal(again.module()(x), module(x))


# ---- names ----------------------------------------------------------------------------------------------------------


def test_repr_says_what_stands_there() -> None:
    assert f"128, 48, bias=True, scheme=w8a8, layout={_linear('w8a8').layout.value}" in repr(_linear("w8a8"))
    assert "40, 128, scheme=gobo4, layout=plain" in repr(_embedding("gobo4"))
    assert (_linear("w8a8").in_features, _linear("w8a8").out_features) == (K, N)
    embedding = _embedding("w8")
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (ROWS, K, 0)
