"""L7. Which encoders can be fused, why others cannot, and the `forward` that a fused one has in place of its class's.

The fused encoder is an attribute of one model object: its class, its modules and the names in its `state_dict` stay what they
were, so a checkpoint does not depend on it, and taking the attribute away gives the unfused model back.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qbert.bert import FAMILIES, EncoderFamily, LayerPaths, family_of
from qbert.errors import QBertError
from qbert.nn.calibration import Calibration
from qbert.nn.encoder import Encoder
from qbert.nn.graphs import GraphCache
from qbert.nn.modules import QEmbedding, QLinear
from qbert.nn.padding import Packing, Tokens, packing_of

HEAD_SIZES = (32, 64)  # what the attention operator is made for
GELU = "gelu"  # the exact one; every other name is an approximation or another function
_FORWARD = "forward"
# Hooks that transformers itself puts on layers to collect hidden states: the fused forward collects them without.
_CAPTURE = "transformers.utils.output_capturing"
# Handed down by heads and tokenizers, and of no meaning to an encoder.
_IGNORED = ("num_items_in_batch",)
_preparing = threading.Lock()


class _SignatureOfTheClass:
    """`inspect.signature(model.forward)` is that of the model's class: libraries look there for what a model takes."""

    def __get__(self, fused: FusedForward | None, owner: type) -> inspect.Signature:
        if fused is None:
            raise AttributeError("__signature__")
        signature = inspect.signature(type(fused.base).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class FusedForward:
    """The `forward` of one encoder object. Copies and pickles go with their model, without what was prepared from it.

    Args:
        base: a bare encoder of `family`.
        calibration: its static scales; None to take scales token by token.

    Attributes:
        graphs: CUDA graphs of its sizes of batches, where `qbert.compile` asked for them.
    """

    __name__ = _FORWARD
    __signature__ = _SignatureOfTheClass()

    def __init__(self, base: nn.Module, family: EncoderFamily, calibration: Calibration | None) -> None:
        self.base = base
        self.family = family
        self.calibration = calibration
        self.graphs: GraphCache | None = None
        self.__doc__ = type(base).forward.__doc__
        self.__setstate__({})

    @property
    def variant(self) -> str:
        """``"static"`` with calibration, ``"dynamic"`` without."""
        return "dynamic" if self.calibration is None else "static"

    def extra_bytes(self) -> int:
        """Memory held beside the modules' own tensors; 0 before the first call."""
        return 0 if self._encoder is None else self._encoder.extra_bytes()

    def encoder(self) -> Encoder:
        """What runs, prepared anew if a module or a tensor of the model was replaced, moved or written to.

        Raises:
            QBertError: the model is no longer one that can be fused.
        """
        encoder = self._encoder
        if encoder is None or not encoder.watch.unchanged():
            with _preparing:
                encoder = self._prepare()
        return encoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._untraced(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._by_name(args, kwargs)
        config: Any = self.base.config
        return_dict = given.pop("return_dict", getattr(config, "return_dict", True))
        hidden_states = given.pop("output_hidden_states", getattr(config, "output_hidden_states", False))
        if given.pop("output_attentions", getattr(config, "output_attentions", False)):
            raise QBertError(_refusal("output_attentions=True", "the attention weights are never in memory"))
        if self.base.training:
            raise QBertError(_refusal("training mode", "call model.eval() first"))
        inputs = {name: given.pop(name, None) for name in _INPUTS}
        self._refuse(given)
        encoder = self.encoder()
        wanted = _selected(hidden_states, len(encoder.layers) + 1)
        with torch.no_grad():
            states = _run(encoder, self.graphs, self.family, wanted, **inputs)
        last = states[-1]
        fields: dict[str, Any] = {"last_hidden_state": last}
        if self.family.pooler is not None:
            pooler = getattr(self.base, self.family.pooler)
            fields["pooler_output"] = None if pooler is None else pooler(last)
        if hidden_states:
            fields["hidden_states"] = (*states[:-1], last if len(encoder.layers) in wanted else None)
        output = getattr(importlib.import_module("transformers.modeling_outputs"), self.family.output)(**fields)
        return output.to_tuple() if return_dict is False else output

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_encoder", "_untraced")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encoder: Encoder | None = None
        # There is nothing left to compile, and a compiler would take what `Watch` compares for constants.
        self._untraced = torch.compiler.disable(self._forward)

    def _prepare(self) -> Encoder:
        why = obstacle(self.base)
        if why is not None:
            name = type(self.base).__name__
            raise QBertError(f"{name} is fused, but now {why}; undo that or call qbert.unfuse_(model)")
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be moved or loaded into later
            encoder = Encoder(self.base, self.family, self.calibration)
        if encoder.device.type == "cuda":  # other threads' streams will read what this one's is still writing
            torch.cuda.current_stream(encoder.device).synchronize()
        self._encoder = encoder
        return encoder

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self.family.arguments
        if len(args) > len(names):
            raise TypeError(f"forward() takes at most {len(names)} positional arguments, got {len(args)}")
        given = dict(zip(names, args, strict=False))
        twice = given.keys() & kwargs.keys()
        if twice:
            raise TypeError(f"forward() got several values for argument {sorted(twice)[0]!r}")
        return given | kwargs

    def _refuse(self, rest: Mapping[str, Any]) -> None:
        for name, value in rest.items():
            if value is not None and value is not False and name not in _IGNORED:
                raise QBertError(_refusal(name, "call qbert.unfuse_(model) first if you need it"))


_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def _run(
    encoder: Encoder, graphs: GraphCache | None, family: EncoderFamily, wanted: set[int], input_ids: Tensor | None,
    attention_mask: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """The wanted hidden states (batch, width, h) in the model's type, zeros at padding; the last is always there."""
    if (input_ids is None) == (inputs_embeds is None):
        raise QBertError("a model takes exactly one of input_ids and inputs_embeds")
    words = inputs_embeds if input_ids is None else input_ids
    assert words is not None
    if words.dim() != (3 if input_ids is None else 2):
        allowed = "inputs_embeds (batch, tokens, k)" if input_ids is None else "input_ids (batch, tokens)"
        raise QBertError(f"input is {tuple(words.shape)}; allowed: {allowed}")
    batch, width = words.shape[:2]
    packing = packing_of(batch, width, attention_mask, encoder.device)
    layers = len(encoder.layers)
    if packing.tokens == 0:
        nothing = torch.zeros(0, encoder.hidden_size, device=encoder.device)
        return [packing.unpack(nothing, encoder.dtype, copy=True) for _ in range(layers + 1)]
    positions = _positions(encoder, family, packing, input_ids, position_ids)
    # DistilBERT has no token types; transformers takes and forgets them.
    typed = token_type_ids is not None and family.embeddings.token_types is not None
    types = packing.pack(_batched(token_type_ids, packing)) if typed else torch.zeros_like(positions)
    tokens = Tokens(packing.pack(words), positions, types, packing.cu_seqlens)
    if graphs is not None:
        last = _replayed(encoder, graphs, tokens, packing, input_ids is None, wanted)
        if last is not None:
            return [*[None] * layers, last]
    embed = encoder.embedding.of_rows if input_ids is None else encoder.embedding.of_ids
    streams = encoder.run(embed(*tokens[:3]), packing, wanted)
    return [None if stream is None else packing.unpack(stream, encoder.dtype) for stream in streams]


def _replayed(
    encoder: Encoder, graphs: GraphCache, tokens: Tokens, packing: Packing, by_row: bool, wanted: set[int]
) -> Tensor | None:
    """The last hidden state (batch, width, h) by a CUDA graph, None where the batch is for none."""
    if by_row or wanted - {len(encoder.layers)}:
        graphs.decline("inputs_embeds were given" if by_row else "hidden states were asked for")
        return None
    return graphs.run(encoder, tokens, lambda hidden: packing.unpack(hidden, encoder.dtype, copy=True))


def _positions(
    encoder: Encoder, family: EncoderFamily, packing: Packing, input_ids: Tensor | None, given: Tensor | None
) -> Tensor:
    """(t,) positions of the packed tokens, as the family counts them."""
    if given is not None:
        return packing.pack(_batched(given, packing))
    rows = encoder.embedding.positions.shape[0]
    first = 0
    if family.positions_skip_padding:
        first = int(encoder.embedding.padding_idx or 0) + 1
        if input_ids is not None:
            there = input_ids.ne(first - 1).to(torch.int64)
            return packing.pack(there.cumsum(1) * there + first - 1)
    if packing.width + first > rows:
        raise QBertError(f"{packing.width} tokens; the model has positions for {rows - first}")
    tokens = packing.kept
    if tokens is None:
        tokens = torch.arange(packing.batch * packing.width, device=encoder.device)
    return tokens % packing.width + first


def _batched(ids: Tensor | None, packing: Packing) -> Tensor:
    """Ids of one row, or of each, as (batch, width)."""
    assert ids is not None
    return ids.expand(packing.batch, packing.width)


def _selected(hidden_states: bool | int | Sequence[int] | None, count: int) -> set[int]:
    """Which of `count` hidden states transformers would give: all, one or some, negative from the end."""
    if not hidden_states:
        return set()
    if hidden_states is True:
        return set(range(count))
    chosen = [hidden_states] if isinstance(hidden_states, int) else hidden_states
    return {index % count for index in chosen if -count <= index < count}


def _refusal(what: str, why: str) -> str:
    return f"a fused encoder does not take {what}: {why}"


def fused_forward(base: nn.Module) -> FusedForward | None:
    """The fused forward of an encoder, None if it is not fused."""
    forward = base.__dict__.get(_FORWARD)
    return forward if isinstance(forward, FusedForward) else None


def set_fused(base: nn.Module, calibration: Calibration | None) -> None:
    """Fuses an encoder that has no `obstacle`. One that was fused and compiled stays compiled."""
    family, former = family_of(base), fused_forward(base)
    assert family is not None
    forward = base.__dict__[_FORWARD] = FusedForward(base, family, calibration)
    if former is not None and former.graphs is not None:
        forward.graphs = GraphCache(former.graphs.limits)


def remove_fused(base: nn.Module) -> None:
    """Gives an encoder its class's forward back."""
    if fused_forward(base) is not None:
        del base.__dict__[_FORWARD]


def encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module, EncoderFamily]]:
    """Qualified name, module and family of every encoder of a known family in a model, the model itself included."""
    for name, module in model.named_modules():
        family = family_of(module)
        if family is not None:
            yield name, module, family


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Every encoder in the model runs module by module inside, so that hooks see what passes."""
    taken = [(base, fused_forward(base)) for _, base, _ in encoders(model)]
    try:
        for base, _ in taken:
            remove_fused(base)
        yield
    finally:
        for base, forward in taken:
            if forward is not None:
                base.__dict__[_FORWARD] = forward


def layer_names(base: nn.Module, family: EncoderFamily) -> list[str]:
    """Names of an encoder's layers, as a calibration has them."""
    layers: Any = base.get_submodule(family.layers)
    return [f"{family.layers}.{index}" for index in range(len(layers))]


def check_calibration(base: nn.Module, calibration: Calibration) -> None:
    """Holds a calibration to an encoder.

    Raises:
        QBertError: a layer is missing or unknown, or an overflow neuron does not exist.
    """
    family = family_of(base)
    assert family is not None
    names = layer_names(base, family)
    for name in calibration.layers:
        if name not in names:
            raise QBertError(f"calibration has a layer {name!r}; {type(base).__name__} has {names[0]} ... {names[-1]}")
    for name in names:
        if name not in calibration.layers:
            raise QBertError(f"calibration lacks layer {name!r}; it has {len(calibration.layers)} of {len(names)}")
        overflow = calibration.layers[name].overflow
        ffn: Any = base.get_submodule(f"{name}.{family.layer.ffn_in}")
        if overflow is not None and overflow.neurons[-1] >= ffn.out_features:
            last = ffn.out_features - 1
            raise QBertError(f"calibration: {name} has no neuron {overflow.neurons[-1]}; allowed: 0 ... {last}")


# ---- why not --------------------------------------------------------------------------------------------------------


def obstacle(base: nn.Module) -> str | None:
    """Why a model cannot be fused, None if it can. Looks at modules and types, not at values: a skeleton will do."""
    family = family_of(base)
    if family is None:
        known = ", ".join(each.name for each in FAMILIES)
        return f"{type(base).__name__} is of no family that can be fused ({known})"
    try:
        reason = _configuration_obstacle(base.config, family) or _module_obstacle(base, family)
    except AttributeError as error:  # of get_submodule, for a model that somebody took apart
        return f"it is not built like {family.name}: {error}"
    return reason or _hook_obstacle(base, family)


def _configuration_obstacle(config: Any, family: EncoderFamily) -> str | None:
    for flag in ("is_decoder", "add_cross_attention", "is_causal"):
        if getattr(config, flag, False):
            return f"{flag} is set: only encoders are fused"
    position_type = getattr(config, "position_embedding_type", None) or "absolute"
    if position_type != "absolute":
        return f"its position embeddings are {position_type!r}, not 'absolute'"
    activation = getattr(config, family.activation)
    if activation != GELU:
        return f"its activation is {activation!r}, not the exact {GELU!r}"
    return None


def _module_obstacle(base: nn.Module, family: EncoderFamily) -> str | None:
    paths = family.embeddings
    tables = [each for each in (paths.words, paths.positions, paths.token_types) if each is not None]
    for path in tables:
        table = base.get_submodule(path)
        if type(table) is not QEmbedding and (type(table) is not nn.Embedding or table.max_norm is not None):
            return f"{path} is not a plain table"
    if not layer_names(base, family):
        return "it has no layers"
    reason = _norm_obstacle(base, paths.norm)
    if reason is None and paths.projection and hasattr(base, paths.projection):
        reason = _linear_obstacle(base, paths.projection)
    for name in layer_names(base, family):
        reason = reason or _layer_obstacle(base, name, family.layer)
    return reason or _head_obstacle(base, family)


def _layer_obstacle(base: nn.Module, name: str, paths: LayerPaths) -> str | None:
    qkv = [f"{name}.{path}" for path in (paths.query, paths.key, paths.value)]
    others = [f"{name}.{path}" for path in (paths.attention_output, paths.ffn_in, paths.ffn_out)]
    for path in (*qkv, *others):
        reason = _linear_obstacle(base, path)
        if reason is not None:
            return reason
    schemes = [str(base.get_submodule(path).scheme.name) for path in qkv]  # type: ignore[union-attr]
    if len(set(schemes)) > 1:
        return f"query, key and value of {name} have different schemes: {', '.join(schemes)}"
    return _norm_obstacle(base, f"{name}.{paths.attention_norm}") or _norm_obstacle(base, f"{name}.{paths.output_norm}")


def _linear_obstacle(base: nn.Module, path: str) -> str | None:
    module = base.get_submodule(path)
    if type(module) is not QLinear:
        return f"{path} is {'float' if type(module) is nn.Linear else type(module).__name__}"
    if module.scheme.activation is None:
        return f"{path} has scheme {module.scheme.name}, which has no integer activations"
    return None


def _norm_obstacle(base: nn.Module, path: str) -> str | None:
    norm = base.get_submodule(path)
    plain = type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None
    return None if plain else f"{path} is not a LayerNorm with weight and bias"


def _head_obstacle(base: nn.Module, family: EncoderFamily) -> str | None:
    query: Any = base.get_submodule(f"{layer_names(base, family)[0]}.{family.layer.query}")
    heads = int(getattr(base.config, family.heads))
    size = query.out_features / heads
    return (
        None if size in HEAD_SIZES else f"its heads are of size {size:g}; fused are {HEAD_SIZES[0]} and {HEAD_SIZES[1]}"
    )


def _hook_obstacle(base: nn.Module, family: EncoderFamily) -> str | None:
    for name, module in base.named_modules():
        if not name or name.partition(".")[0] == family.pooler:  # these two are called as ever
            continue
        if _FORWARD in module.__dict__:
            return f"{name} has a forward of its own, which a fused encoder would not call"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(hook, "__module__", None) != _CAPTURE:
                return f"{name} has a hook, which a fused encoder would not call"
    return None
