"""Has anybody touched what was prepared from a model's modules? Asked before every call, so it must cost microseconds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sized
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from qbert.encoder.stock import (
    CONFIG,
    FORWARD,
    GLOBAL_HOOKS,
    HOOKS,
    Found,
    attention_functions,
    functions_of,
    globals_of,
)
from qbert.ops.standing import Bytes, same_lengths, same_places, same_types

_version = attrgetter("_version")
_pointer = Tensor.data_ptr
_LARGEST = 2**18  # bytes of a tensor that is compared byte by byte
_SWITCHES = (
    "is_decoder", "add_cross_attention", "is_causal", "position_embedding_type", "_attn_implementation_internal",
)  # fmt: skip


class Watch:
    """Remembers modules, their code and their tensors by where they stand, and tells whether they are still the same.

    A tensor counts as changed when another stands in its place (`.to()`, `load_state_dict` of a quantized module), when its
    data was swapped under it (`tensor.data = ...`, `.to()` of a parameter) or written to. A write through ``tensor.data`` is
    not counted by torch. It is seen where the program has the same memory, and on a CPU where the program has a copy, by the
    bytes of the tensor if they are at most 256 KiB (biases, gains, scales); not of larger tensors, nor of copies on a GPU.

    Attributes:
        watched: the tensors.
    """

    def __init__(self) -> None:
        self.watched: list[Tensor] = []
        # Places: a dictionary, a name in it, and what stood there (None: nothing). Columns, compared without a loop in Python.
        self._dicts: list[dict[Any, Any]] = []
        self._names: list[Any] = []
        self._things: list[object] = []
        self._seen: set[object] = set()  # places, and ids of tensors
        self._modules: list[nn.Module] = []
        self._kinds: list[type] = []
        self._classes: list[type] = []  # whose functions are looked up, their names, and what was found
        self._lookups: list[str] = []
        self._functions: list[object] = []
        self._counted: list[Tensor] = []  # those that count writes, and how many there were
        self._versions: list[int] = []
        self._pointers: list[int] = []  # of `watched`
        self._sized: list[Sized] = list(GLOBAL_HOOKS)
        self._sizes: list[int] = [len(each) for each in GLOBAL_HOOKS]
        self._copied: list[Tensor] = []
        self._bytes = Bytes(())

    def module(self, base: nn.Module, path: str) -> nn.Module:
        """The module at an attribute path from `base`, watched at each step.

        Raises:
            AttributeError: there is none.
        """
        found = base
        for name in path.split("."):
            parent, found = found, found.get_submodule(name)
            self._place(parent._modules, name)
        return found

    def layers(self, base: nn.Module, path: str) -> int:
        """How many modules are in a list of them; more or fewer counts as changed."""
        found = self.module(base, path)
        assert isinstance(found, nn.ModuleList)
        self._sized_dict(found._modules)
        return len(found)

    def tensors(self, module: nn.Module) -> None:
        """A module's own parameters and buffers, as they are now."""
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            for name in place:
                self._tensor(place, name)

    def copied(self, tensors: Iterable[Tensor | None]) -> None:
        """Tensors of which the program has copies beside the memory that it shares with them."""
        self._copied += [each for each in tensors if each is not None]

    def configuration(self, base: Any, names: Iterable[str]) -> None:
        """The entries of a model's configuration that change what it computes, and the functions that it names."""
        self._place(base.__dict__, CONFIG)
        for name in (*_SWITCHES, *names):
            self._place(base.config.__dict__, name)
        for functions in attention_functions():
            self._place(functions, getattr(base.config, "_attn_implementation", None))

    def calls(self, base: nn.Module, found: Collection[Found]) -> None:
        """Modules whose forward a fused encoder does not call: their classes' code, their hooks, what stands in them."""
        self._sized_dict(base._modules)
        for each in found:
            self._place(each.parent._modules, each.name)
            for name in _attributes(each):
                self._place(each.module.__dict__, name)
            for name in each.part.buffers:
                self._tensor(each.module._buffers, name)
            self._modules.append(each.module)
            self._kinds.append(type(each.module))
            for things in (each.module._modules, *(getattr(each.module, name) for name in HOOKS)):
                self._sized_dict(things)
        kinds = set(self._kinds) | {type(base)}
        for kind in kinds:
            for name in (FORWARD, "__call__"):  # also where a class has it from another one
                self._function(kind, name)
        for kind, name, _ in functions_of(kinds):
            self._function(kind, name)
        for names, name in globals_of(kinds):
            self._place(names, name)

    def made(self, bound: Iterable[Tensor]) -> None:
        """The program is made, and computes with these tensors. What else is watched was copied, so it can go out of step."""
        shared, copied, small = {_storage(each) for each in bound}, {id(each) for each in self._copied}, []
        for tensor in self.watched:
            one_memory = _storage(tensor) in shared and id(tensor) not in copied
            if one_memory and tensor.is_floating_point():
                continue  # what is written there is what the program reads
            if not one_memory and _comparable(tensor):
                small.append(tensor)
            elif not tensor.is_inference():  # those do not count writes, and cannot be written to outside
                self._counted.append(tensor)
                self._versions.append(tensor._version)
        self._bytes = Bytes(small)

    def unchanged(self) -> bool:
        """Whether everything still stands where it stood, as it was."""
        return (
            same_places(self._dicts, self._names, self._things)
            and same_types(self._modules, self._kinds)
            and same_lengths(self._sized, self._sizes)
            and all(map(is_, map(getattr, self._classes, self._lookups), self._functions))
            and list(map(_pointer, self.watched)) == self._pointers
            and list(map(_version, self._counted)) == self._versions
            and self._bytes.same()
        )

    def _place(self, place: dict[Any, Any], name: Any) -> None:
        if (id(place), name) in self._seen:  # of a layer that is called again
            return
        self._seen.add((id(place), name))
        self._dicts.append(place)
        self._names.append(name)
        self._things.append(place.get(name))

    def _tensor(self, place: dict[str, Any], name: str) -> None:
        self._place(place, name)
        tensor = place.get(name)
        if tensor is not None and tensor.numel() and id(tensor) not in self._seen:
            self._seen.add(id(tensor))
            self.watched.append(tensor)
            self._pointers.append(tensor.data_ptr())

    def _sized_dict(self, things: Sized) -> None:
        self._sized.append(things)
        self._sizes.append(len(things))

    def _function(self, kind: type, name: str) -> None:
        self._classes.append(kind)
        self._lookups.append(name)
        self._functions.append(getattr(kind, name, None))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _comparable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes <= _LARGEST


def _attributes(found: Found) -> list[str]:
    """Names in a module's dictionary that change what it computes, or whether it is called."""
    names = {FORWARD, CONFIG, *found.part.reads, *found.part.fixed}
    if found.inside:  # in training linears, norms and tables compute the same
        names.add("training")
    if found.part.activation is not None:
        names |= {name for name in found.module.__dict__ if not name.startswith("_")}
    return sorted(names)
