"""The `forward` that a fused encoder has in place of its class's.

The fused encoder is an attribute of one model object: its class, its modules and the names in its `state_dict` stay what they
were, so a checkpoint does not depend on it, and taking the attribute away gives the unfused model back.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing

from qbert.encoder.batch import Batch, Inputs
from qbert.encoder.calibration import Calibration
from qbert.encoder.eligibility import check_calibration, encoders, obstacle
from qbert.encoder.gate import Gate
from qbert.encoder.graphs import GraphCache
from qbert.encoder.reader import takes_first
from qbert.encoder.run import Encoder
from qbert.encoder.stock import FORWARD, in_training
from qbert.errors import QBertError
from qbert.families import EncoderFamily, family_of

# Handed down by heads and tokenizers, and of no meaning to an encoder.
_IGNORED = ("num_items_in_batch",)
_UNTRAINED = "call model.eval() first, or qbert.unfuse_(model) to train it or what is below it"
_preparing = threading.Lock()
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # older torch cannot say so
log = logging.getLogger(__name__)


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
        gate: keeps calls and loads of weights apart.
        every_token: the last layer computes all tokens, whoever reads them.
    """

    __name__ = FORWARD
    __signature__ = _SignatureOfTheClass()

    def __init__(self, base: nn.Module, family: EncoderFamily, calibration: Calibration | None) -> None:
        self.base = base
        self.family = family
        self.calibration = calibration
        self.graphs: GraphCache | None = None
        self.every_token = False
        self._told = False
        self.__doc__ = type(base).forward.__doc__
        self.__setstate__({})

    @property
    def __code__(self) -> CodeType:
        """Where torch.export says that a model's forward stands."""
        return FusedForward.__call__.__code__

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
                encoder = self._encoder  # another thread may have prepared it meanwhile
                if encoder is None or not encoder.watch.unchanged():
                    encoder = self._prepare()
        return encoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_tracing() or _is_exporting():
            raise QBertError(
                _refusal("torch.export or torch.jit.trace", "call qbert.unfuse_(model) first, or qbert export for ONNX")
            )
        return self._untraced(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = not self.every_token and takes_first(self.base, self.family, FusedForward.__call__.__code__)
        given = self._by_name(args, kwargs)
        config: Any = self.base.config
        return_dict = given.pop("return_dict", getattr(config, "return_dict", True))
        hidden_states = given.pop("output_hidden_states", getattr(config, "output_hidden_states", False))
        if given.pop("output_attentions", getattr(config, "output_attentions", False)):
            raise QBertError(_refusal("output_attentions=True", "the attention weights are never in memory"))
        if self.base.training:
            raise QBertError(_refusal("training mode", _UNTRAINED))
        inputs = Inputs(*(given.pop(name, None) for name in Inputs._fields))
        self._refuse(given)
        call = self.gate.enter()
        try:
            return self._run(inputs, hidden_states, return_dict, first)
        finally:
            self.gate.leave(call)

    def _run(
        self, inputs: Inputs, hidden_states: bool | int | Sequence[int] | None, return_dict: bool | None, first: bool
    ) -> Any:
        encoder = self.encoder()
        layers = len(encoder.program.layers)
        asked = bool(hidden_states) if self.family.collects else hidden_states
        config: Any = self.base.config
        wanted = set(range(layers + 1)) if asked is True else _selected(asked, config.num_hidden_layers + 1)
        with torch.no_grad():
            batch = Batch.of(inputs, self.family, encoder.program.positions, encoder.device)
            alone = first and not hidden_states and self.graphs is None and batch.packing.begun and batch.size > 0
            states = _first_tokens(encoder, batch) if alone else _states(encoder, self.graphs, batch, wanted)
            if self.calibration is not None and not alone:
                _spoil_sequences(batch, states)
            if batch.packing.headless is not None:
                self._fill_first_column(states, inputs, batch.packing.headless)
        states = _without_backward(self.base, inputs.inputs_embeds, states)
        last = states[-1]
        assert last is not None
        fields: dict[str, Any] = {"last_hidden_state": last}
        if self.family.pool is not None:
            fields["pooler_output"] = self.family.pool(self.base, last)
        if hidden_states:
            fields["hidden_states"] = (*states[:-1], last if layers in wanted else None)
        output = getattr(importlib.import_module("transformers.modeling_outputs"), self.family.output)(**fields)
        if return_dict is not False:
            return output
        return tuple(fields.values()) if self.family.collects else output.to_tuple()

    def _fill_first_column(self, states: list[Tensor | None], inputs: Inputs, rows: Tensor) -> None:
        """What padding before a row's first token is read as: a pooler and its like take column 0, whatever is there.

        It is computed module by module, as unfused: such a token sees the row's tokens and is seen by none.

        Args:
            states: (batch, width, h) or None; column 0 of `rows` is written.
            rows: (rows,) that begin with padding.
        """
        if not self._told:
            self._told = True
            log.warning("rows begin with padding: their first column is computed unfused; padding at the end is faster")
        base: Any = self.base
        twin = object.__new__(type(base))  # the same modules, without the fused forward and without a pooler
        twin.__dict__.update({name: value for name, value in base.__dict__.items() if name != FORWARD})
        twin.__dict__["_modules"] = base._modules | dict.fromkeys(self.family.poolers)
        given = {name: _rows_of(each, rows) for name, each in inputs._asdict().items() if each is not None}
        wanted = any(state is not None for state in states[:-1])
        found = type(base).forward(twin, **given, output_hidden_states=wanted, return_dict=True)
        base.__dict__.update(
            {name: value for name, value in twin.__dict__.items() if name != "_modules"}
        )  # what it noted
        exact = found.hidden_states if wanted else [*[None] * (len(states) - 1), found.last_hidden_state]
        for state, column in zip(states, exact, strict=True):
            if state is not None:
                state[rows.to(state.device), 0] = column[:, 0].to(state.dtype)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_encoder", "_untraced", "gate")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.gate = Gate()
        self._encoder: Encoder | None = None
        # There is nothing left to compile, and a compiler would take what `Watch` compares for constants.
        self._untraced = torch.compiler.disable(self._forward)

    def _prepare(self) -> Encoder:
        why = obstacle(self.base)
        if why is not None:
            name = type(self.base).__name__
            raise QBertError(f"{name} is fused, but now {why}; undo that or call qbert.unfuse_(model)")
        if self.calibration is not None:  # there may be other layers by now; other weights are the user's own
            check_calibration(self.base, self.calibration, same_model=False)
        part = in_training(self.base, self.family)
        if part is not None:
            raise QBertError(_refusal(f"training mode of {part}", _UNTRAINED))
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


class _NoBackward(torch.autograd.Function):
    """The identity, for values that a fused encoder computed of tensors that require gradients: there is no way back."""

    @staticmethod
    def forward(ctx: Any, asked: Tensor, value: Tensor) -> Tensor:
        return value.detach()  # no view of it: callers may write to what they get

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise QBertError(
            "a fused encoder has no backward: call qbert.unfuse_(model) to train through it, or "
            "encoder.requires_grad_(False) to train only what is above it"
        )


def _without_backward(base: nn.Module, given: Tensor | None, states: list[Tensor | None]) -> list[Tensor | None]:
    """The states, which require gradients where those of an unfused encoder would: an optimizer that got none would not say
    so, a backward that reaches them does."""
    if not torch.is_grad_enabled():
        return states
    sources = (given,) if given is not None and given.requires_grad else base.parameters()
    asked = next((each for each in sources if each is not None and each.requires_grad), None)
    if asked is None:
        return states
    return [None if state is None else _NoBackward.apply(asked, state) for state in states]


def _rows_of(given: Tensor, rows: Tensor) -> Tensor:
    """Those rows of an input; all of one that is the same for every row."""
    return given if given.shape[0] == 1 else given[rows.to(given.device)]


def _first_tokens(encoder: Encoder, batch: Batch) -> list[Tensor | None]:
    """The same of the first tokens alone (batch, 1, h): all that is read of the last, and nothing of the others."""
    last = encoder.first_tokens(batch).to(encoder.dtype)
    return [*[None] * len(encoder.program.layers), last[:, None]]


def _states(encoder: Encoder, graphs: GraphCache | None, batch: Batch, wanted: set[int]) -> list[Tensor | None]:
    """The wanted hidden states (batch, width, h) in the model's type, zeros at padding; the last is always there."""
    program = encoder.program
    if batch.size == 0:
        nothing = torch.zeros(0, encoder.hidden_size, device=encoder.device)
        return [batch.unpack(nothing, encoder.dtype, copy=True) for _ in range(len(program.layers) + 1)]
    if graphs is not None:
        last = _replayed(encoder, graphs, batch, wanted)
        if last is not None:
            return [*[None] * len(program.layers), last]
    streams = encoder.run(batch, wanted)
    return [None if stream is None else batch.unpack(stream, encoder.dtype) for stream in streams]


def _spoil_sequences(batch: Batch, states: list[Tensor | None]) -> None:
    """Codes with a static scale have no NaN, so to the others of its sequence a token that is NaN looks like one that is not:
    what they are after the first layer is written over with NaN.

    On a GPU only where rows were given: a host that asks for the answer would wait, and ids have finite rows there.
    """
    for state in states[1:]:
        if state is None or not (batch.by_row or state.device.type == "cpu"):
            continue
        spoiled = state[:, :, 0].isnan().any(1)  # a norm makes all channels of such a token NaN
        if state.device.type == "cpu" and not bool(spoiled.any()):
            continue
        there = batch.unpack(torch.ones(batch.size, 1, device=state.device), torch.bool)
        state.masked_fill_(spoiled[:, None, None] & there, torch.nan)


def _replayed(encoder: Encoder, graphs: GraphCache, batch: Batch, wanted: set[int]) -> Tensor | None:
    """The last hidden state (batch, width, h) by a CUDA graph, None where the batch is for none."""
    if batch.by_row or wanted - {len(encoder.program.layers)}:
        graphs.decline("inputs_embeds were given" if batch.by_row else "hidden states were asked for")
        return None
    return graphs.run(encoder, batch.tokens, lambda hidden: batch.unpack(hidden, encoder.dtype, copy=True))


def _selected(hidden_states: int | Sequence[int] | None, count: int) -> set[int]:
    """Which hidden states transformers would give, one or some; negative from the end of `count`, the configuration's."""
    if not hidden_states:
        return set()
    chosen = [hidden_states] if isinstance(hidden_states, int) else hidden_states
    return {index % count for index in chosen if -count <= index < count}


def _refusal(what: str, why: str) -> str:
    return f"a fused encoder does not take {what}: {why}"


def fused_forward(base: nn.Module) -> FusedForward | None:
    """The fused forward of an encoder, None if it is not fused."""
    forward = base.__dict__.get(FORWARD)
    return forward if isinstance(forward, FusedForward) else None


def set_fused(base: nn.Module, calibration: Calibration | None) -> None:
    """Fuses an encoder that has no `obstacle`. One that was fused and compiled stays compiled."""
    family, former = family_of(base), fused_forward(base)
    assert family is not None
    remove_fused(base)
    forward = FusedForward(base, family, calibration)
    _attach(base, forward)
    if former is not None and former.graphs is not None:
        forward.graphs = GraphCache(former.graphs.limits)


def remove_fused(base: nn.Module) -> None:
    """Gives an encoder its class's forward back."""
    if fused_forward(base) is None:
        return
    del base.__dict__[FORWARD]
    for hooks, own in (
        (base._load_state_dict_pre_hooks, _before_loading),
        (base._load_state_dict_post_hooks, _after_loading),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is own]:
            del hooks[key]


def _attach(base: nn.Module, forward: FusedForward) -> None:
    base.__dict__[FORWARD] = forward
    base.register_load_state_dict_pre_hook(_before_loading)
    base.register_load_state_dict_post_hook(_after_loading)


def _before_loading(base: nn.Module, *_: Any) -> None:
    forward = fused_forward(base)
    if forward is not None:
        forward.gate.shut()
        if torch.cuda.is_available() and any(each.is_cuda for each in base.parameters()):
            torch.cuda.synchronize()  # calls that are out may not be computed yet


def _after_loading(base: nn.Module, _: Any) -> None:
    forward = fused_forward(base)
    if forward is not None:
        forward.gate.open()


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
                _attach(base, forward)
