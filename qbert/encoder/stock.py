"""Is an encoder what transformers made of it, between its linears, norms and tables? A fused encoder calls none of that code.

So what stands there must be what the family's file names (`families.Part`): its class, the functions of that class, attributes
that change what it computes, buffers that the fused encoder takes for granted. A user may have put anything there, before
fusing or after.
"""

from __future__ import annotations

import dis
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from qbert.encoder.parts import parts_of
from qbert.families import EncoderFamily, Part
from qbert.families.family import ACTIVATIONS, COUNTING
from qbert.families.mpnet import narrowed_bias
from qbert.modules import FactoredLinear

FORWARD, CONFIG = "forward", "config"
# Attributes of linears, norms and tables that a program is made from.
_LINEAR = Part(reads=("in_features", "out_features", "scheme"))
_NORM = Part(reads=("eps", "normalized_shape"))
_TABLE = Part(reads=("max_norm", "padding_idx", "num_embeddings", "embedding_dim", "scheme"))
_INDEX = re.compile(r"\.\d+(?=\.|$)")
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")  # of nn.Module itself
_NOT_CALLED = ("__init__", "extra_repr")
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# What attention modules look their function up in, and the maker of its mask.
_INTERFACES = (
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
)
# Hooks that transformers itself puts on layers to collect hidden states: the fused forward collects them without.
_CAPTURE = "transformers.utils.output_capturing"
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
)  # fmt: skip


class Found(NamedTuple):
    """A module of an encoder that its fused forward does not call, and what must stand there.

    Attributes:
        path: from the encoder.
        parent, name: where it stands.
        inside: modules may stand in it: it is one of the family's parts, no linear, norm or table.
    """

    path: str
    parent: nn.Module
    name: str
    module: nn.Module
    part: Part
    inside: bool


def found_in(base: nn.Module, family: EncoderFamily) -> list[Found]:
    """Every module of an encoder but itself and its pooler, in the order of their names.

    Raises:
        AttributeError: one that the family does not have, or one that is missing.
    """
    return list(_below(base, "", "", _parts_by_pattern(base, family), family))


def _below(
    parent: nn.Module, path: str, pattern: str, expected: Mapping[str, tuple[Part, bool]], family: EncoderFamily
) -> Iterator[Found]:
    prefix, stars = (f"{path}.", f"{pattern}.") if path else ("", "")
    wanted = {each.removeprefix(stars) for each in expected if each.startswith(stars)}
    wanted = {each for each in wanted if "." not in each and each != ""}
    for name, module in parent._modules.items():
        if module is None or (not path and family.called(name)):
            continue
        star = "*" if "*" in wanted and name.isdigit() else name
        if star not in wanted:
            raise AttributeError(f"{prefix}{name} is a {type(module).__name__} that no {family.name} has")
        part, inside = expected[f"{stars}{star}"]
        yield Found(f"{prefix}{name}", parent, name, module, part, inside)
        if type(module) is FactoredLinear and part is _LINEAR:
            yield from _thin(f"{prefix}{name}", module)
            continue
        yield from _below(module, f"{prefix}{name}", f"{stars}{star}", expected, family)
    optional = {family.embeddings.projection}
    for name in sorted(wanted - {"*"} - {name for name, module in parent._modules.items() if module is not None}):
        if f"{prefix}{name}" not in optional:
            raise AttributeError(f"{prefix}{name} is missing")


def _thin(path: str, factored: FactoredLinear) -> Iterator[Found]:
    """Both linears that one of low rank is.

    Raises:
        AttributeError: another module in it.
    """
    for name, module in factored._modules.items():
        if module is None or name not in ("first", "second"):
            raise AttributeError(f"{path}.{name} is no part of a linear of low rank")
        yield Found(f"{path}.{name}", factored, name, module, _LINEAR, False)


def _parts_by_pattern(base: nn.Module, family: EncoderFamily) -> dict[str, tuple[Part, bool]]:
    """What stands where, stars for indices: what the family names, and the linears, norms and tables of its program."""
    paths, program = family.embeddings, parts_of(family)
    own: dict[str | None, Part] = dict.fromkeys((paths.words, paths.positions, paths.token_types), _TABLE)
    own |= {paths.norm: _NORM, paths.projection: _LINEAR, family.final_norm: _NORM}
    if family.distances not in family.stock:
        own[family.distances] = _TABLE
    norms = program.norms if program.next_norm is None else [*program.norms, program.next_norm]
    for layer in {_INDEX.sub(".*", path) for path in family.calls(base, family.layers).values()}:
        own.update((f"{layer}.{each}", _LINEAR) for each in program.linears)
        own.update((f"{layer}.{each}", _NORM) for each in norms)
    found = {path: (part, True) for path, part in family.stock.items()}
    return {path: (part, False) for path, part in own.items() if path is not None} | found


def in_training(base: nn.Module, family: EncoderFamily) -> str | None:
    """The path of a module that computes something else in training mode and is in it, None where there is none."""
    found = (each for each in found_in(base, family) if each.inside and not isinstance(each.module, nn.ModuleList))
    return next((each.path for each in found if each.module.training), None)


# ---- why not --------------------------------------------------------------------------------------------------------


def stock_obstacle(base: nn.Module, family: EncoderFamily) -> str | None:
    """What is not as transformers made it, None where everything is.

    Raises:
        AttributeError: a module that the family does not have, or one that is missing.
    """
    found = found_in(base, family)
    reasons = (_part_obstacle(base, family, each) or _call_obstacle(each) for each in found)
    reason = next((each for each in reasons if each is not None), None)
    if any(GLOBAL_HOOKS):
        reason = reason or "torch has a hook on all modules, which a fused encoder would not call"
    return reason or _class_obstacle(base, found) or _attention_obstacle(base)


def _part_obstacle(base: Any, family: EncoderFamily, found: Found) -> str | None:
    path, module, part = found.path, found.module, _resolved(found.part, base, family)
    kind = type(module)
    allowed = [qualified(each, base) for each in part.classes]
    if allowed and qualified_name(kind) not in allowed:
        shown = " or ".join(each.rpartition(".")[2] for each in allowed)
        return f"{path} is a {qualified_name(kind)}, not transformers' {shown}"
    for name, value in part.fixed.items():
        if hasattr(module, name) and not _same(getattr(module, name), value):  # other releases have other attributes
            return f"{path}.{name} is {getattr(module, name)!r}, not {value!r}"
    if CONFIG in module.__dict__ and module.__dict__[CONFIG] is not base.config:
        return f"{path} has a configuration of its own"
    reasons = (_buffer_obstacle(path, module, name, holds) for name, holds in part.buffers.items())
    return next((each for each in reasons if each is not None), None)


def _resolved(part: Part, base: Any, family: EncoderFamily) -> Part:
    """An activation is what the configuration says."""
    if part.activation is None:
        return part
    return ACTIVATIONS.get(str(family.setting(base.config, part.activation)), part)


def qualified_name(kind: type) -> str:
    """A class's module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def qualified(name: str, base: nn.Module) -> str:
    """The qualified name of a class that a family's file names."""
    if "." in name:
        return name
    kind = type(base)
    return f"{kind.__module__}.{name.replace('*', kind.__qualname__.removesuffix('Model').removesuffix('Encoder'))}"


def _same(value: object, expected: object) -> bool:
    if isinstance(expected, functools.partial):
        return isinstance(value, functools.partial) and (value.func, value.args, value.keywords) == (
            expected.func, expected.args, expected.keywords,
        )  # fmt: skip
    return type(value) is type(expected) and value == expected


def _buffer_obstacle(path: str, module: nn.Module, name: str, holds: str) -> str | None:
    buffer = module._buffers.get(name)
    if buffer is None:
        return f"{path}.{name} is missing"
    if buffer.device.type == "meta":  # a skeleton has no values
        return None
    flat = buffer.detach().reshape(-1)
    expected = torch.arange(len(flat), device=flat.device) if holds == COUNTING else torch.zeros_like(flat)
    stands = buffer.dim() == 2 and buffer.shape[0] == 1 and torch.equal(flat, expected.to(flat.dtype))
    return None if stands else f"{path}.{name} does not hold {holds}"


def _call_obstacle(found: Found) -> str | None:
    path, module = found.path, found.module
    if FORWARD in module.__dict__:
        return f"{path} has a forward of its own, which a fused encoder would not call"
    for hook in (hook for name in HOOKS for hook in getattr(module, name).values()):
        if getattr(hook, "__module__", None) != _CAPTURE and hook is not narrowed_bias:
            return f"{path} has a hook, which a fused encoder would not call"
    return None


def _class_obstacle(base: nn.Module, found: list[Found]) -> str | None:
    """A function of a class, or one that it calls, that somebody put there."""
    for kind, name, function in functions_of({type(each.module) for each in found} | {type(base)}):
        if not _is_stock_of(kind, name, function):
            return (
                f"{kind.__name__}.{name} was replaced by {_described(function)}, which a fused encoder would not call"
            )
    for names, name in globals_of({type(each.module) for each in found} | {type(base)}):
        if not _comes_with_library(names[name]):
            where = names["__name__"]
            return f"{where}.{name} was replaced by {_described(names[name])}, which a fused encoder would not call"
    return None


def _attention_obstacle(base: Any) -> str | None:
    """An attention function, or a mask for it, that somebody registered."""
    chosen = getattr(base.config, "_attn_implementation", None)
    if chosen not in _ATTENTION:
        return f"its attention implementation is {chosen!r}, not one of transformers' own"
    for mapping in attention_functions():
        function = mapping.get(chosen)
        if function is not None and not _comes_with_library(function):
            return f"its attention implementation {chosen!r} was replaced by {_described(function)}"
    return None


# ---- where code comes from ------------------------------------------------------------------------------------------


def is_stock(kind: type) -> bool:
    """Whether the functions of a class are those that it came with."""
    return all(_is_stock_of(*each) for each in functions_of({kind}))


def functions_of(kinds: set[type]) -> Iterator[tuple[type, str, Any]]:
    """Class, name and function of every function that calls of modules of these classes may run."""
    bases = {each for kind in kinds for each in kind.__mro__}
    for kind in sorted(bases, key=lambda each: each.__qualname__):
        if kind is nn.Module:
            yield from ((kind, name, getattr(kind, name)) for name in _CALLS)
        elif issubclass(kind, nn.Module) and kind.__module__ != "transformers.modeling_utils":
            for name, value in vars(kind).items():
                if name == FORWARD or (isinstance(value, FunctionType) and name not in _NOT_CALLED):
                    yield kind, name, value


def globals_of(kinds: set[type]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the functions of these classes look other functions up: the dictionary of a module, and the name there."""
    seen: set[tuple[int, str]] = set()
    for _, _, function in functions_of(kinds):
        inner = _innermost(function)
        if not isinstance(inner, FunctionType):
            continue
        for name in _looked_up(inner.__code__):
            names = inner.__globals__
            called = callable(names.get(name)) and not isinstance(names[name], type)
            if called and (id(names), name) not in seen:
                seen.add((id(names), name))
                yield names, name


@functools.cache
def _looked_up(code: CodeType) -> tuple[str, ...]:
    """Names of a function's globals: `co_names` has those of attributes, too, which may stand for something else there."""
    names = (each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL")
    return tuple(dict.fromkeys(names))


def attention_functions() -> Iterator[dict[Any, Any]]:
    """The dictionaries in which attention modules look up what computes attention, and its masks."""
    for module, name in _INTERFACES:
        interface = getattr(sys.modules.get(module), name, None)
        mappings = (getattr(interface, part, None) for part in ("_local_mapping", "_global_mapping"))
        yield from (each for each in mappings if each is not None)


def _is_stock_of(kind: type, name: str, function: Any) -> bool:
    return is_own(kind, name, function) is not None


def is_own(kind: type, name: str, function: Any) -> CodeType | None:
    """The code of the function that stands in the class's own file under that name; None of any other function."""
    inner = _innermost(function)
    if not isinstance(inner, FunctionType) or not _comes_with_library(function):
        return None
    code = inner.__code__
    same_file = code.co_filename == getattr(sys.modules.get(kind.__module__), "__file__", None)
    owner, _, own_name = code.co_qualname.rpartition(".")
    return code if same_file and owner == kind.__qualname__ and (own_name == name or kind is nn.Module) else None


def comes_from(module: nn.Module, folder: str) -> bool:
    """Whether the forward of a module's class stands in a file of that folder."""
    code = getattr(_innermost(type(module).forward), "__code__", None)
    return code is not None and code.co_filename.startswith(folder)


def _comes_with_library(function: Any) -> bool:
    """Whether a function and all that is wrapped around it stand in files of torch, transformers or qbert."""
    while True:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_libraries()):
            return False
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__


@functools.cache
def _libraries() -> tuple[str, ...]:
    files = (sys.modules[name].__file__ for name in ("torch", "transformers", "qbert") if name in sys.modules)
    return tuple(f"{Path(each).parent}/" for each in files if each)


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _described(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
