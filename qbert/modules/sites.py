"""What else is rounded in an emulated model, between its linears: norms, activation functions, the inputs of linears that stay
float (hooks), and attention (`attention`). Modules and their names stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qbert.errors import QBertError
from qbert.formats import BlockFormat
from qbert.modules.attention import FORMATS, give_back
from qbert.modules.emulated import rounded


class RoundInput:
    """A forward pre-hook: the module's input in a format."""

    def __init__(self, fmt: BlockFormat) -> None:
        self.fmt = fmt

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounded(inputs[0], self.fmt), *inputs[1:]


class RoundOutput:
    """A forward hook: the module's output in a format."""

    def __init__(self, fmt: BlockFormat) -> None:
        self.fmt = fmt

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return rounded(output, self.fmt)


def round_inputs(modules: Iterable[nn.Module], fmt: BlockFormat) -> None:
    """Rounds what modules take."""
    for module in modules:
        module.register_forward_pre_hook(RoundInput(fmt))


def round_norms(model: nn.Module, fmt: BlockFormat) -> None:
    """Rounds what layer norms give."""
    _round_outputs(model, [each for each in model.modules() if isinstance(each, nn.LayerNorm)], "nn.LayerNorm", fmt)


def round_activation_functions(model: nn.Module, fmt: BlockFormat) -> None:
    """Rounds what GELU and its like give."""
    found = [each for each in model.modules() if _is_activation(each)]
    _round_outputs(model, found, "activation function", fmt)


def remove_sites(model: nn.Module) -> bool:
    """Undoes all of the above, and says whether there was something to undo."""
    found = bool(describe_sites(model))
    give_back(model)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, RoundInput | RoundOutput)]:
                del hooks[key]
    return found


def describe_sites(model: nn.Module) -> list[str]:
    """A line for each kind of rounding that stands in the model beside its quantized modules."""
    counted: dict[str, int] = {}
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, RoundInput | RoundOutput):
                what = "input" if isinstance(hook, RoundInput) else "output"
                text = f"{type(module).__name__} {what} in {hook.fmt.name}"
                counted[text] = counted.get(text, 0) + 1
        formats = module.__dict__.get(FORMATS)
        if formats is not None:
            text = "attention's " + ", ".join(f"{name} in {fmt.name}" for name, fmt in formats.chosen().items())
            counted[text] = counted.get(text, 0) + 1
    return [f"emulated: {text} ({count} modules)" for text, count in counted.items()]


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    return isinstance(module, nn.GELU) or kind.__module__ == "transformers.activations"


def _round_outputs(model: nn.Module, modules: list[nn.Module], what: str, fmt: BlockFormat) -> None:
    if not modules:
        raise QBertError(f"{type(model).__name__} has no {what} to round")
    for module in dict.fromkeys(modules):
        module.register_forward_hook(RoundOutput(fmt))
