"""`weight` of a quantized module answers whoever reads it, and nothing can be put in its place."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from qbert import QBertError, Recipe, dequantize_, explain, quantize_
from qbert.convert import install_
from qbert.formats import SCHEMES, Role, scheme_names
from qbert.metrics import sqnr_db
from qbert.modules import GUARD, QEmbedding, QLinear, QTiedLinear, collect_specs
from qbert.quantizers import quantize
from qbert.testing import random_activations, random_weight
from qbert.weight.codec import decode
from qbert.weight.layout import layouts_of

N, K = 48, 128
LINEAR, EMBEDDING = scheme_names(Role.LINEAR), scheme_names(Role.EMBEDDING)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Quantized = QLinear | QEmbedding | QTiedLinear


def _linear(scheme: str = "w8a8", *, bias: bool = True) -> QLinear:
    weight = quantize(random_weight(N, K), SCHEMES[scheme])
    return QLinear(weight, nn.Parameter(torch.randn(N, generator=torch.Generator().manual_seed(1))) if bias else None)


def _embedding(scheme: str = "w8") -> QEmbedding:
    return QEmbedding(quantize(random_weight(N, K), SCHEMES[scheme]), 0, torch.float32)


def _tied(scheme: str = "w8") -> nn.ModuleDict:
    owner = _embedding(scheme) if scheme in EMBEDDING else _linear(scheme)
    return nn.ModuleDict({"owner": owner, "head": QTiedLinear(owner, "owner", nn.Parameter(torch.zeros(N)))})


KINDS: dict[str, Callable[[], Quantized]] = {
    "linear": _linear,
    "linear_outliers": lambda: _linear("gobo3a8"),
    "embedding": _embedding,
    "embedding_outliers": lambda: _embedding("gobo4"),
    "tied": lambda: _tied()["head"],
    "tied_linear": lambda: _tied("gobo4a8")["head"],
}


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- it answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", LINEAR + EMBEDDING)
def test_it_is_what_the_codes_stand_for_in_every_layout(scheme: str) -> None:
    held = quantize(random_weight(N, K), SCHEMES[scheme])
    module = QEmbedding(held, None, torch.float32) if scheme in EMBEDDING else QLinear(held, None)
    for layout in layouts_of(SCHEMES[scheme]) if scheme in LINEAR else [held.layout]:
        module._hold(held.to_layout(layout))
        assert module.layout is layout
        assert torch.equal(module.weight, decode(held))
    assert (module.weight.shape, module.weight.dtype) == ((N, K), torch.float32)
    assert module.weight.device == held.device
    assert not module.weight.requires_grad
    assert sqnr_db(random_weight(N, K), module.weight) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_the_models_float_type(kind: str) -> None:
    module = KINDS[kind]()
    held = module.owner if isinstance(module, QTiedLinear) else module
    exact = decode(held.quantized)
    for dtype in (*DTYPES, torch.float32):
        held.to(dtype)
        assert module.weight.dtype == dtype
        assert torch.equal(module.weight, exact.to(dtype))
    held.half()
    assert module.weight.dtype == torch.float16
    held.bfloat16()
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_on_the_modules_device(kind: str) -> None:
    module = KINDS[kind]()
    held = module.owner if isinstance(module, QTiedLinear) else module
    held.to("meta")
    assert module.weight.device.type == "meta"
    assert (module.weight.shape, module.weight.dtype) == ((N, K), torch.float32)


@pytest.mark.parametrize("kind", [name for name in KINDS if "embedding" not in name])
@torch.no_grad()
def test_functions_of_torch_take_it(kind: str) -> None:
    module, x = KINDS[kind](), random_activations(5, K)
    y = F.linear(x, module.weight, module.bias)
    assert sqnr_db(y, module(x)) > 25  # the module's own activations may be int8
    assert torch.equal(y, F.linear(x, decode(module.quantized), module.bias))
    assert torch.equal(x @ module.weight.t() + module.bias, x @ decode(module.quantized).t() + module.bias)
    half = module.weight.half()
    assert half.dtype == torch.float16


def test_rows_of_a_table() -> None:
    module, ids = _embedding("gobo4"), torch.tensor([[3, 0, 47], [1, 1, 2]])
    assert torch.equal(F.embedding(ids, module.weight), module(ids))
    assert torch.equal(module.weight[ids], module(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_a_copy(kind: str) -> None:
    module = KINDS[kind]()
    before = module.weight
    module.weight.zero_()
    with torch.no_grad():
        module.weight.data.fill_(7.0)
        module.weight.copy_(torch.ones(N, K))
        module.weight[0] = 3.0
    assert torch.equal(module.weight, before)


def test_a_tied_weight_is_its_owners() -> None:
    for scheme in (*EMBEDDING, "w8a8", "gobo3a8"):
        model = _tied(scheme)
        assert torch.equal(model["head"].weight, model["owner"].weight)


class _Reader(nn.Module):
    """A user's module that reads its linear's weight: for a size, for a type, for a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(64, 64), nn.Embedding(97, 64)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids).to(self.fc.weight.dtype)
        y = F.linear(x, self.fc.weight, self.fc.bias) / self.fc.weight.shape[0] ** 0.5 + self.fc(x)
        return y + self.table.weight.mean(0), self.fc.weight.pow(2).sum()


@torch.no_grad()
def test_a_users_module_that_reads_weights_agrees_with_the_float_one() -> None:
    torch.manual_seed(0)
    model, ids = _Reader().eval(), torch.randint(97, (3, 5))
    exact, penalty = model(ids)
    for dtype in (torch.float32, torch.bfloat16):
        quantized = quantize_(copy.deepcopy(model).to(dtype), Recipe("w8a8", "w8"))
        found, sized = quantized(ids)
        assert F.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > 0.999
        assert sized.float() == pytest.approx(float(penalty), rel=0.01)
        assert found.dtype == dtype


@torch.no_grad()
def test_t5_which_asks_a_linear_for_its_type_runs_and_agrees() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
    for changes in ({}, {"feed_forward_proj": "gated-gelu"}):
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes, **changes)).eval()
        ids = torch.randint(2, 97, (3, 9))
        exact = model(input_ids=ids).last_hidden_state
        for recipe in ("w8a8", "w8a16", Recipe("w4a8", "w8")):
            for dtype in (torch.float32, torch.bfloat16):
                quantized = quantize_(copy.deepcopy(model).to(dtype), recipe)
                assert sum(row.scheme != "float32" for row in explain(quantized).quantized) >= 12
                found = quantized(input_ids=ids).last_hidden_state
                assert found.dtype == dtype
                least = 0.99 if recipe in ("w8a8", "w8a16") else 0.95
                assert F.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > least


# ---- nothing can be put in its place --------------------------------------------------------------------------------

ASSIGNED: dict[str, Callable[[], object]] = {
    "tensor": lambda: torch.zeros(N, K),
    "parameter": lambda: nn.Parameter(torch.zeros(N, K)),
    "other_shape": lambda: nn.Parameter(torch.zeros(1)),
    "bytes": lambda: torch.zeros(N, K, dtype=torch.uint8),
    "none": lambda: None,
    "number": lambda: 3,
}


@pytest.mark.parametrize("value", ASSIGNED)
@pytest.mark.parametrize("kind", KINDS)
def test_assigning_it_is_refused_by_name(kind: str, value: str) -> None:
    module, given = KINDS[kind](), ASSIGNED[value]()
    before, expected = _state(module), module.weight
    owner = module.owner if isinstance(module, QTiedLinear) else module
    words = rf"the weight of a quantized {type(owner).__name__} \({owner.scheme.name}, \(48, 128\)\) cannot be replaced"
    with pytest.raises(QBertError, match=words + r".*call qbert\.dequantize_\(model\)"):
        module.weight = given
    with pytest.raises(QBertError, match=words):
        setattr(module, GUARD, given)
    if not isinstance(given, int | Tensor) or isinstance(given, nn.Parameter):
        with pytest.raises(QBertError, match=words):
            module.register_parameter("weight", given)
    _assert_same(_state(module), before)
    assert torch.equal(module.weight, expected)
    assert "weight" not in module.__dict__


@pytest.mark.parametrize("kind", KINDS)
def test_other_attributes_are_the_users(kind: str) -> None:
    module = KINDS[kind]()
    module.note, module.extra = "mine", nn.Parameter(torch.ones(2))
    module.register_parameter("more", nn.Parameter(torch.ones(3)))
    assert module.note == "mine"
    assert {"extra", "more"} <= {name for name, _ in module.named_parameters()}
    if not isinstance(module, QEmbedding):
        bias = nn.Parameter(torch.ones(N))
        module.bias = bias
        assert module.bias is bias


def test_sharing_a_quantized_weight_by_hand_is_refused() -> None:
    """As old code ties a head to a table; a new one takes the values."""
    table, head = _embedding(), nn.Linear(K, N)
    with pytest.raises(TypeError):
        head.weight = table.weight  # torch's own: no parameter
    with pytest.raises(QBertError, match="cannot be replaced by a tensor"):
        table.weight = head.weight


# ---- it is no parameter and no buffer -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_living_module_holds_none(kind: str) -> None:
    module = KINDS[kind]()
    for names in (module.named_parameters(), module.named_buffers()):
        assert GUARD not in {name for name, _ in names}
    assert isinstance(module.weight, Tensor)
    assert GUARD not in module._buffers
    assert GUARD not in module._parameters
    assert "weight" not in module.__dict__


def test_no_module_of_a_living_model_holds_one() -> None:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    model = quantize_(transformers.BertForMaskedLM(config), Recipe("w8a8", "w8"))
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name.endswith(".weight")}
    quantized = set(collect_specs(model))
    assert not {name.removesuffix(".weight") for name in names} & quantized
    assert {f"{name}.weight" for name, spec in collect_specs(model).items() if spec.kind != "tied_linear"} <= set(
        model.state_dict()
    )


@pytest.mark.parametrize("kind", [name for name in KINDS if "tied" not in name])
def test_what_is_stored_is_the_guard(kind: str) -> None:
    """The names, types and bytes that a file has always had."""
    module = KINDS[kind]()
    state = module.state_dict()
    assert (state[GUARD].dtype, state[GUARD].shape) == (torch.uint8, (0,))
    plain = module.quantized.to_layout(layouts_of(module.scheme)[0])
    assert set(state) == {GUARD, *plain.tensors} | ({"bias"} if isinstance(module, QLinear) else set())
    for name, tensor in plain.tensors.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(state[name], tensor)
    prefixed = nn.Sequential(module).state_dict(prefix="a.")
    assert set(prefixed) == {f"a.0.{name}" for name in state}


@pytest.mark.parametrize("kind", ["tied", "tied_linear"])
def test_a_tied_linear_stores_none(kind: str) -> None:
    assert set(KINDS[kind]().state_dict()) == {"bias"}


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [name for name in KINDS if "tied" not in name])
def test_a_strict_load_finds_all_and_keeps_no_guard(kind: str, assign: bool) -> None:
    module = KINDS[kind]()
    stored = _state(module)
    with torch.no_grad():
        other = copy.deepcopy(module)
        for buffer in other.buffers():
            buffer.zero_()
    assert tuple(other.load_state_dict(stored, assign=assign)) == ([], [])
    _assert_same(_state(other), stored)
    assert torch.equal(other.weight, module.weight)
    assert GUARD not in other._buffers


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
@pytest.mark.parametrize("with_codes", [True, False], ids=["with_codes", "alone"])
@pytest.mark.parametrize("kind", [name for name in KINDS if "tied" not in name])
def test_a_float_weight_is_refused_and_changes_nothing(kind: str, with_codes: bool, strict: bool) -> None:
    """Also beside codes that are good: a file that says both says neither."""
    model = nn.Sequential(KINDS[kind]())
    before = _state(model)
    weight = random_weight(N, K)
    state = {**before, "0.weight": weight} if with_codes else {"0.weight": weight}
    with pytest.raises(RuntimeError, match=r"0\.weight is torch\.float32 \(48, 128\): a float weight does not fit"):
        model.load_state_dict(state, strict=strict)
    _assert_same(_state(model), before)
    for guard in (torch.zeros(3, dtype=torch.uint8), torch.zeros(0), torch.zeros(0, 1, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match=r"0\.weight is torch\..*a float weight does not fit"):
            model.load_state_dict({**before, "0.weight": guard}, strict=strict)
        _assert_same(_state(model), before)


@pytest.mark.parametrize("kind", [name for name in KINDS if "tied" not in name])
def test_a_missing_guard_is_reported_missing(kind: str) -> None:
    model = nn.Sequential(KINDS[kind]())
    state = _state(model)
    del state["0.weight"]
    assert tuple(model.load_state_dict(state, strict=False)) == (["0.weight"], [])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.weight"'):
        model.load_state_dict(state)


@pytest.mark.parametrize("kind", ["tied", "tied_linear"])
def test_a_weight_for_a_tied_linear_is_unexpected(kind: str) -> None:
    module = KINDS[kind]()
    state = {**_state(module), "weight": random_weight(N, K)}
    assert tuple(module.load_state_dict(state, strict=False)) == ([], ["weight"])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict(state)


def test_skeletons_have_a_place_for_the_guard() -> None:
    """A loader looks for a place for everything that a file holds; once the file is there, it is gone."""
    model = quantize_(nn.Sequential(nn.Embedding(N, K), nn.Linear(K, N)), Recipe("gobo3", "w8"))
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Embedding(N, K), nn.Linear(K, N))
    install_(skeleton, collect_specs(model), Recipe("gobo3", "w8"))
    for module in skeleton:
        assert (module.weight.dtype, module.weight.shape, module.weight.device.type) == (torch.uint8, (0,), "meta")
        assert GUARD in dict(module.named_buffers())
        with pytest.raises(QBertError, match="cannot be replaced"):
            module.register_parameter("weight", nn.Parameter(torch.zeros(N, K)))
    state = _state(model)
    assert list(skeleton.state_dict()) == list(state)
    skeleton.load_state_dict(state, assign=True)
    for found, module in zip(skeleton, model, strict=True):
        assert GUARD not in found._buffers
        assert torch.equal(found.weight, module.weight)
    ids = torch.tensor([1, 2, 40])
    assert torch.equal(skeleton(ids), model(ids))


def test_a_loader_that_sets_tensors_one_by_one() -> None:
    """As transformers does: the guard is put where it was, and forgotten when the layout is chosen."""
    model = quantize_(nn.Sequential(nn.Linear(K, N)), "w4a8")
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(K, N))
    install_(skeleton, collect_specs(model), Recipe("w4a8"))
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        is_parameter = last == "bias"
        setattr(skeleton.get_submodule(path), last, nn.Parameter(tensor) if is_parameter else tensor)
    assert skeleton[0].weight.shape == (0,)
    skeleton[0].use_best_layout()
    assert torch.equal(skeleton[0].weight, model[0].weight)
    skeleton[0].weight = torch.empty(0, dtype=torch.uint8)  # once more, late: it says nothing
    assert torch.equal(skeleton[0].weight, model[0].weight)


# ---- copies and compilers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_answer_for_themselves(kind: str) -> None:
    module = KINDS[kind]()
    expected = module.weight
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)]
    for each in copies:
        assert torch.equal(each.weight, expected)
        each.weight = expected  # itself, as peft puts a module back in its place
        with pytest.raises(QBertError):
            each.weight = expected * 2
    held = copies[0].owner if isinstance(copies[0], QTiedLinear) else copies[0]
    held.get_buffer("qdata").zero_()
    assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "gobo3a8"])
@torch.no_grad()
def test_a_compiler_reads_it(scheme: str) -> None:
    torch._dynamo.reset()
    module, x = _linear(scheme), random_activations(5, K)

    def forward(x: Tensor) -> Tensor:
        return F.linear(x.to(module.weight.dtype), module.weight) * module.weight.shape[0]

    assert torch.allclose(torch.compile(forward, backend="eager")(x), forward(x))


def test_dequantizing_leaves_what_was_read() -> None:
    model = quantize_(nn.Sequential(nn.Embedding(N, K), nn.Linear(K, N)), Recipe("gobo4a8", "gobo3"))
    read = [module.weight for module in model]
    dequantize_(model)
    for module, weight in zip(model, read, strict=True):
        assert isinstance(module.weight, nn.Parameter)
        assert torch.equal(module.weight, weight)


def test_the_attribute_of_the_class_is_itself() -> None:
    """So that tools which look at classes do not decode anything."""
    for kind in (QLinear, QEmbedding, QTiedLinear):
        described: Any = kind.weight
        assert type(described).__name__ == "DecodedWeight"
        assert "decoded anew" in (type(described).__doc__ or "")
