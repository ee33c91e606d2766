"""Random surgery on random models: a fused encoder computes what the unfused one does, or refuses by name.

Edits come before fusing, after it and after the first call, several in a row. What is compared is the same object, with and
without its fused forward, so both have every edit.
"""

from __future__ import annotations

import copy
import functools
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_encoders import CONFIGS, calibration_of, encoder_of, float_model, padded_batch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qbert import QBertError, fuse_, quantize_
from qbert.encoder import fused_forward, layer_names, unfused
from qbert.families import FAMILIES, family_of
from qbert.modules import QuantizedModule

MODELS = tuple(f"{name}Model" for name in CONFIGS)
# Of the hidden states of all tokens; what static scales cut off after an edit is no ignored edit.
LEAST_COSINE = {
    "dynamic": 0.97,
    "static": 0.9,
    "stale": 0.5,
}  # static scales that are older than the weights say little


class Surgery:
    """A model on the table, and how to undo what an edit changed outside it."""

    def __init__(self, model: Any, rng: random.Random, undo: ExitStack) -> None:
        self.model, self.rng, self.undo = model, rng, undo

    @property
    def base(self) -> Any:
        return encoder_of(self.model)

    @property
    def layer(self) -> Any:
        return self.base.get_submodule(self.rng.choice(self.layers))

    @property
    def layers(self) -> list[str]:
        family = family_of(self.base)
        assert family is not None
        return layer_names(self.base, family)

    def modules(self, *kinds: type) -> list[tuple[nn.Module, str, nn.Module]]:
        """Parent, name and module of those of certain kinds, or of all, below the encoder."""
        return [
            (parent, name, child)
            for path, parent in self.base.named_modules()
            if not path.startswith("pooler")
            for name, child in parent._modules.items()
            if child is not None and name != "pooler" and (not kinds or isinstance(child, kinds))
        ]

    def any(self, *kinds: type) -> tuple[nn.Module, str, nn.Module]:
        return self.rng.choice(self.modules(*kinds))

    def attention(self) -> Any:
        return self.rng.choice([module for _, _, module in self.modules() if hasattr(module, "attention_head_size")])

    def tensor(self, buffers: bool = False) -> Tensor:
        """A bias, a gain, or a quantized module's scale."""
        found = []
        for _, _, module in self.modules(nn.LayerNorm, nn.Linear, QuantizedModule):
            own = {**module._parameters, **(module._buffers if buffers else {})}
            found += [own[name] for name in ("weight", "bias", "scale") if isinstance(own.get(name), Tensor)]
        return self.rng.choice([each for each in found if each.is_floating_point() and each.numel()])

    def patch(self, owner: Any, name: str, value: Any) -> None:
        before = owner.__dict__.get(name)
        setattr(owner, name, value)
        self.undo.callback(setattr, owner, name, before) if before is not None else self.undo.callback(
            delattr, owner, name
        )


def _bent(value: Any) -> Any:
    """Another result of a forward."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value * 0.5 + 0.3 * value.mean() - 1.0 * value.flip(-1)
    if isinstance(value, tuple):
        return (_bent(value[0]), *value[1:])
    return value


def _bend(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _bent(forward(*args, **kwargs))


# ---- edits ----------------------------------------------------------------------------------------------------------


def swap(s: Surgery) -> None:
    parent, name, module = s.any()
    if isinstance(module, nn.LayerNorm):
        wide = module.normalized_shape
        new: nn.Module = s.rng.choice(
            [nn.LayerNorm(wide), nn.Identity(), nn.LayerNorm(wide, bias=False), nn.RMSNorm(wide)]
        )
    elif isinstance(module, nn.Dropout):
        new = s.rng.choice([nn.Dropout(0.5), nn.Identity(), nn.Tanh(), nn.AlphaDropout(0.1)])
    elif "act" in name:
        new = s.rng.choice([nn.Tanh(), nn.ReLU(), nn.GELU("tanh"), nn.GELU()])
    elif isinstance(module, nn.Linear | QuantizedModule) and hasattr(module, "in_features"):
        new = nn.Linear(module.in_features, module.out_features)
    else:
        new = copy.deepcopy(module)
    parent._modules[name] = new.eval()


def subclass(s: Surgery) -> None:
    _, _, module = s.any()
    kind = type(module)
    module.__class__ = type(f"Own{kind.__name__}", (kind,), {"forward": _method(kind.forward), "__module__": "own"})


def _method(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: _bent(forward(self, *args, **kwargs))


def own_forward(s: Surgery) -> None:
    _, _, module = s.any()
    module.forward = _bend(module.forward)


def patched_class(s: Surgery) -> None:
    kind = type(s.any()[2])
    if kind.__module__.startswith("torch") and s.rng.random() < 0.5:
        kind = type(s.layer)
    names = [each for each in ("forward", "feed_forward_chunk", "ff_chunk", "__call__") if each in vars(kind)]
    name = s.rng.choice(names or ["forward"])
    s.patch(kind, name, _method(getattr(kind, name)))


def hook(s: Surgery) -> None:
    _, _, module = s.any()
    if s.rng.random() < 0.3:
        module.register_forward_pre_hook(lambda _, args: tuple(_bent(each) for each in args))
    else:
        module.register_forward_hook(lambda _m, _a, out: _bent(out) if s.rng is not None else None)


def global_hook(s: Surgery) -> None:
    def bend(module: nn.Module, _: Any, out: Any) -> Any:
        return _bent(out) if isinstance(module, nn.Dropout) else None

    handle = nn.modules.module.register_module_forward_hook(bend)
    s.undo.callback(handle.remove)


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrized(s: Surgery) -> None:
    _, _, module = s.any(nn.LayerNorm)
    parametrize.register_parametrization(module, "weight", _Twice())


def pruned_weights(s: Surgery) -> None:
    _, _, module = s.any(nn.LayerNorm)
    prune.random_unstructured(module, s.rng.choice(["weight", "bias"]), 0.5)


def reconfigured(s: Surgery) -> None:
    name, value = s.rng.choice([
        ("is_decoder", True), ("add_cross_attention", True), ("hidden_act", "relu"), ("activation", "relu"),
        ("position_embedding_type", "relative_key"), ("chunk_size_feed_forward", 1), ("output_hidden_states", True),
        ("return_dict", False), ("_attn_implementation", "eager"), ("is_causal", True), ("layer_norm_eps", 1.0),
        ("num_attention_heads", 4), ("use_cache", True), ("tie_last_hidden_states", False), ("_attn_implementation", "bent"),
    ])  # fmt: skip
    setattr(s.base.config, name, value)


def bent_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    return v.mean(2, keepdim=True).expand_as(v).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("bent", bent_attention)


def registered_attention(s: Surgery) -> None:
    mapping = type(ALL_ATTENTION_FUNCTIONS)._global_mapping
    before = mapping["sdpa"]
    mapping["sdpa"] = bent_attention
    s.undo.callback(functools.partial(mapping.__setitem__, "sdpa", before))


def replaced_function(s: Surgery) -> None:
    """In the file of the model: what its attention calls without an implementation."""
    s.base.config._attn_implementation = "eager"
    names = __import__("sys").modules[type(s.base).__module__]
    if hasattr(names, "eager_attention_forward"):
        s.patch(names, "eager_attention_forward", bent_attention)


def attribute(s: Surgery) -> None:
    attention, layer, norm = s.attention(), s.layer, s.any(nn.LayerNorm)[2]
    choice = s.rng.randrange(7)
    if choice == 0 and hasattr(attention, "scaling"):
        attention.scaling *= 5
    elif choice == 1:
        norm.eps = s.rng.choice([0.3, 5.0])
    elif choice == 2:
        layer.is_decoder = True
    elif choice == 3:
        attention.is_causal = True
    elif choice == 4:
        layer.chunk_size_feed_forward = 1
    elif choice == 5:
        attention.attention_head_size = attention.attention_head_size * 2
    else:
        attention.config = copy.deepcopy(s.base.config)
        attention.config._attn_implementation = "bent"


def trained_part(s: Surgery) -> None:
    _, _, module = s.any(nn.Dropout)
    module.p = 0.9
    module.train()


def there_and_back(s: Surgery) -> None:
    s.model.train()
    s.model.eval()


def buffers(s: Surgery) -> None:
    found = [
        (module, name)
        for _, _, module in s.modules()
        for name in ("position_ids", "token_type_ids")
        if name in module._buffers
    ]
    if not found:
        return
    module, name = s.rng.choice(found)
    new = module._buffers[name].flip(1) if name == "position_ids" else torch.ones_like(module._buffers[name])
    if s.rng.random() < 0.5:
        module._buffers[name].data.copy_(new)
    else:
        module._buffers[name] = new.clone()


def written(s: Surgery) -> None:
    """Half of a tensor, behind torch's back or not."""
    tensor, by_data = s.tensor(buffers=True), s.rng.random() < 0.7
    with torch.no_grad():
        half = (tensor.data if by_data else tensor).view(-1)[: max(1, tensor.numel() // 2)]
        half.mul_(-0.7) if s.rng.random() < 0.5 else half.add_(half.abs().mean() * 0.5 + 0.01)


def other_data(s: Surgery) -> None:
    tensor = s.tensor()
    tensor.data = tensor.data.flip(0).clone()


def other_shape(s: Surgery) -> None:
    tensor = s.tensor()
    tensor.data = tensor.data[: max(1, tensor.shape[0] // 2)].clone()


def new_parameter(s: Surgery) -> None:
    _, _, module = s.any(nn.LayerNorm)
    module.weight = nn.Parameter(module.weight.detach() * -1.5, requires_grad=s.rng.random() < 0.5)


def added(s: Surgery) -> None:
    _, _, module = s.any()
    module.add_module("adapter", nn.Linear(4, 4))


def removed(s: Surgery) -> None:
    parent, name, _ = s.any()
    if s.rng.random() < 0.5:
        parent._modules[name] = None
    else:
        del parent._modules[name]


def cast(s: Surgery) -> None:
    target = s.model if s.rng.random() < 0.6 else s.any()[2]
    nn.Module.to(target, s.rng.choice([torch.bfloat16, torch.float32, torch.float16]))


def moved(s: Surgery) -> None:
    nn.Module.to(s.model, "cpu")
    if s.rng.random() < 0.5:
        s.model.share_memory()


def copied(s: Surgery) -> None:
    s.model = copy.deepcopy(s.model)


def pickled(s: Surgery) -> None:
    with suppress(
        pickle.PicklingError, AttributeError, TypeError, ImportError
    ):  # of a lambda or a class of this test's
        s.model = pickle.loads(pickle.dumps(s.model))


def retied(s: Surgery) -> None:
    layers: Any = s.base.get_submodule(s.layers[0].rpartition(".")[0])
    choice = s.rng.randrange(4)
    if choice == 0:
        layers[-1] = layers[0]
    elif choice == 1:
        del layers[0]
    elif choice == 2:
        layers.insert(0, layers[-1])
    else:
        norms = [(parent, name) for parent, name, _ in s.modules(nn.LayerNorm)]
        (one, name), (other, as_name) = s.rng.choice(norms), s.rng.choice(norms)
        one._modules[name] = other._modules[as_name]


def loaded(s: Surgery) -> None:
    state = {
        name: each.flip(0) if each.dim() == 1 and "bias" in name else each
        for name, each in s.model.state_dict().items()
    }
    s.model.load_state_dict(
        {name: each.clone() for name, each in state.items()}, assign=s.rng.random() < 0.3, strict=False
    )


def tables(s: Surgery) -> None:
    _, _, table = s.any(nn.Embedding)
    choice = s.rng.randrange(3)
    if choice == 0:
        table.max_norm = 0.5
    elif choice == 1:
        table.weight.data = table.weight.data.roll(1, 0)
    else:
        holder: Any = s.base.embeddings
        if hasattr(holder, "padding_idx"):
            holder.padding_idx = 3


def pooler(s: Surgery) -> None:
    if getattr(s.base, "pooler", None) is not None:
        s.base.pooler = s.rng.choice([None, nn.Identity()])


EDITS: tuple[Callable[[Surgery], None], ...] = (
    swap, subclass, own_forward, patched_class, hook, global_hook, parametrized, pruned_weights, reconfigured,
    registered_attention, replaced_function, attribute, trained_part, there_and_back, buffers, written, other_data, other_shape,
    new_parameter, added, removed, cast, moved, copied, pickled, retied, loaded, tables, pooler,
)  # fmt: skip
WHEN = ("before", "fused", "called")


# ---- what must hold -------------------------------------------------------------------------------------------------


@functools.cache
def _float(name: str) -> Any:
    return float_model(name)


def _answer(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states of the tokens, and what is pooled, if anything is."""
    with torch.no_grad():
        output = model(**batch)
    values = output if isinstance(output, tuple) else output.to_tuple()
    there = batch["attention_mask"].bool()
    tensors = [each for each in values if isinstance(each, Tensor)]
    return [each[there] if each.dim() == 3 else each for each in tensors]


def _edited(s: Surgery, edit: Callable[[Surgery], None]) -> None:
    # there is nothing of the kind left, or torch itself refuses the edit
    with suppress(IndexError, AttributeError, TypeError, ValueError, RuntimeError, KeyError):
        edit(s)


def _operate(
    name: str, variant: str, seed: int, edits: list[tuple[Callable[[Surgery], None], str]], undo: ExitStack
) -> str:
    """What became of it: "unfused", "refused", "broken" (unfused too), or "same"; a failure where fused and unfused differ."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    s = Surgery(copy.deepcopy(_float(name)), rng, undo)
    batch = padded_batch(3, 9, seed % 100)
    for edit, when in edits:
        if when == "before":
            _edited(s, edit)
    try:
        calibration = calibration_of(s.model) if variant == "static" else None
        quantize_(s.model, "w8a8+none", fuse=True, calibration=calibration)
    except Exception:  # an edited float model that does not run, or has nothing left to quantize
        return "broken"
    for edit, when in edits:
        if when == "fused":
            _edited(s, edit)
    if any(when == "called" for _, when in edits):
        with suppress(Exception):
            _answer(s.model, batch)
        for edit, when in edits:
            if when == "called":
                _edited(s, edit)
    if fused_forward(s.base) is None:
        return "unfused"
    try:
        found = _answer(s.model, batch)
    except QBertError:
        return "refused"
    except Exception:
        with pytest.raises(Exception), unfused(s.model):  # noqa: B017, PT011  (whatever it is)
            _answer(s.model, batch)
        return "broken"
    with unfused(s.model):
        try:
            exact = _answer(s.model, batch)
        except Exception:
            return "broken"
    assert len(found) == len(exact)
    least = LEAST_COSINE[_scales(s, edits)]
    for each, expected in zip(found, exact, strict=True):
        assert each.dtype == expected.dtype
        assert each.shape == expected.shape
        if not bool(expected.isfinite().all()):
            continue
        cosine = torch.cosine_similarity(each.double().flatten(), expected.double().flatten(), dim=0)
        assert cosine > least, f"{cosine:.3f}"
        assert least == LEAST_COSINE["stale"] or 0.8 < each.double().norm() / expected.double().norm() < 1.25
    return "same"


def _scales(s: Surgery, edits: Any) -> str:
    """Which scales a fused encoder has, and whether its weights are still those that they were measured with."""
    forward = fused_forward(s.base)
    if forward is None or forward.variant == "dynamic":
        return "dynamic"
    return "stale" if any(edit is written and when != "before" for edit, when in edits) else "static"


edits = st.lists(st.tuples(st.sampled_from(EDITS), st.sampled_from(WHEN)), min_size=1, max_size=3)
random_surgery = given(st.sampled_from(MODELS), st.sampled_from(("dynamic", "static")), st.integers(0, 10**6), edits)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@random_surgery
@example("BertModel", "dynamic", 0, [(written, "called")])
def test_no_edit_is_ignored(name: str, variant: str, seed: int, edits: Any) -> None:
    with ExitStack() as undo:
        _operate(name, variant, seed, edits, undo)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@random_surgery
def test_no_edit_is_ignored_many_times(name: str, variant: str, seed: int, edits: Any) -> None:
    with ExitStack() as undo:
        _operate(name, variant, seed, edits, undo)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_each_edit_after_the_first_call(edit: Callable[[Surgery], None]) -> None:
    for seed in range(2):
        with ExitStack() as undo:
            _operate("BertModel", "dynamic", seed, [(edit, "called")], undo)


def test_edits_can_be_told_from_no_edit() -> None:
    """What is patched changes the answer by more than is allowed, or the fuzz would find nothing."""
    x = torch.randn(100)
    assert torch.cosine_similarity(x, _bent(x), dim=0) < 0.9


def test_all_families_are_operated_on() -> None:
    assert {family_of(float_model(name)).name for name in MODELS} == {family.name for family in FAMILIES}
    assert fuse_ is not None
