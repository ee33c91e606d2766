"""What quantized modules share: one stored matrix as plain buffers, kept in the layout that its device's kernel reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qbert.errors import CheckpointError, QBertError
from qbert.formats import Role, Scheme
from qbert.ops.kernel import Problem
from qbert.ops.table import KernelChoice, explain, select_layout
from qbert.target import target_of
from qbert.weight import Layout, Weight, plain_specs, stored_specs, zeros
from qbert.weight.codec import decode
from qbert.weight.tensor import recall, tensor_names
from qbert.weight.validate import check_stored_tensors

# Stored empty under the float weight's name: a loader that does not know qbert finds a shape that cannot be right and fails,
# where it would otherwise leave the weight at its random initialization and only warn.
GUARD = "weight"


class DecodedWeight:
    """The `weight` of a quantized module, as an attribute: decoded anew whenever somebody reads it, which is slow.

    Libraries and models read a linear's `weight` for its type, shape and device, sometimes for its values, and all four are
    right. It is a copy: writing to it changes nothing, so putting another weight in its place is an error.
    """

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        guard = module._buffers.get(GUARD)
        if guard is not None:  # a skeleton that waits for its file
            return guard
        return decode(module.quantized).to(module.output_like.dtype)

    def __set__(self, module: Any, value: object) -> None:
        module.refuse_weight(value)


class QuantizedModule(nn.Module):
    """A module that holds one quantized matrix as buffers, in the layout that its device's kernel reads.

    `state_dict` always holds the PLAIN layout, so what is saved does not depend on where the model ran; loading checks every
    value. Casts of the model (`half()`, `bfloat16()`) leave scales, dictionaries and outliers in their own types.

    Attributes:
        weight: (n, k), what the codes stand for, in the model's float type (see `DecodedWeight`).
        stored_as: in which layout `state_dict` has it: PLAIN, or one that leaves zeros out (`qbert.weight.zeros`).
        operation: what its forward computes.
    """

    role: Role
    operation: str
    weight = DecodedWeight()
    output_like: Tensor  # empty; its type is that of the model's floats and follows casts of the model

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme: Scheme = weight.scheme
        self.shape = weight.shape
        self.stored_as = weight.layout if weight.layout in zeros.FILE_LAYOUTS else Layout.PLAIN
        self._hold(weight)
        self.register_buffer("output_like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)
        if weight.device.type == "meta":  # loaders look for a place for everything that a file holds
            self._buffers[GUARD] = torch.empty(0, dtype=torch.uint8, device=weight.device)
        self.use_best_layout()

    @property
    def quantized(self) -> Weight:
        """The matrix as it lies in memory now."""
        if self.layout in zeros.FILE_LAYOUTS:  # a skeleton that waits for its file
            names = (*tensor_names(self.scheme), *(name for name in zeros.EXTRA if name in self._buffers))
            return Weight(self.scheme, self.shape, self.layout, {name: self.get_buffer(name) for name in names})
        return weight_of(self, self.scheme, self)

    @property
    def kernel(self) -> KernelChoice:
        """What runs `operation` on the module's device, and why."""
        return kernel_of(self.operation, self, self.scheme, self.output_like.dtype)

    def weight_nbytes(self) -> int:
        """Bytes of the weight as it lies in memory."""
        return self.quantized.nbytes

    def stored_bytes(self) -> int:
        """Bytes of the weight in a file."""
        held = self.quantized
        count = self.nonzeros() if self.stored_as is Layout.BITMAP else 0
        specs = stored_specs(self.scheme, self.shape, held.outliers, self.stored_as, count)
        return sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs.values())

    def nonzeros(self) -> int:
        """How many of its codes are none of the zero's."""
        plain = self.quantized.to_layout(Layout.PLAIN)
        return int(zeros.nonzeros(self.scheme, self.shape, plain.tensors).sum())

    def leave_zeros_out(self) -> None:
        """Has files hold the weight without its zeros, if that makes them smaller."""
        plain = self.quantized.to_layout(Layout.PLAIN)
        self.stored_as = zeros.best_layout(self.scheme, self.shape, plain.tensors)

    def use_best_layout(self) -> None:
        """Moves the codes into the layout that this device's kernel reads. Exact, and exactly undone when saving."""
        device = self.get_buffer("qdata").device
        if device.type != "meta":  # a skeleton waits for its file, which is PLAIN
            self._buffers.pop(GUARD, None)
            self._hold(self.quantized.to_layout(select_layout(self.scheme, self.role, target_of(device))))

    def refuse_weight(self, value: object) -> None:
        """What becomes of a value that somebody puts in the weight's place: a file's guard and the weight itself pass, and are
        forgotten.

        Raises:
            QBertError: the weight is quantized.
        """
        if _is_guard(value) or self._is_own(value):
            return
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
        raise QBertError(
            f"the weight of a quantized {type(self).__name__} ({self.scheme.name}, {self.shape}) cannot be replaced by "
            f"{shown}; call qbert.dequantize_(model), change it, and quantize again"
        )

    def _is_own(self, value: object) -> bool:
        """Whether it is what reading `weight` gives: libraries that put a module back in its place hand over its parts."""
        return type(value) is Tensor and tuple(value.shape) == self.shape and torch.equal(value, self.weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == GUARD and GUARD not in self._buffers:
            self.refuse_weight(value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == GUARD:
            self.refuse_weight(param)
        else:
            super().register_parameter(name, param)

    def _hold(self, weight: Weight) -> None:
        self.layout = weight.layout
        for name in zeros.EXTRA - weight.tensors.keys():
            self._buffers.pop(name, None)
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        before = dict(self.quantized.tensors)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self.get_buffer(name)
            if after.dtype != tensor.dtype:  # a cast: take the move, leave the rounding
                self.register_buffer(name, tensor.to(after.device))
        if self.get_buffer("qdata").device.type != before["qdata"].device.type:
            self.use_best_layout()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = self.quantized.to_layout(self.stored_as)
        destination[prefix + GUARD] = torch.empty(0, dtype=torch.uint8, device=stored.device)
        for name, tensor in stored.tensors.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        guard = state_dict.get(prefix + GUARD)
        if guard is not None and not _is_guard(guard):
            error_msgs.append(
                f"{prefix}{GUARD} is {guard.dtype} {tuple(guard.shape)}: a float weight does not fit a quantized module"
            )
            return
        names = (*plain_specs(self.scheme, self.shape), *zeros.EXTRA)
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        rest = dict(state_dict)
        if found and all(tensor.device.type != "meta" for tensor in found.values()):
            stored_as = zeros.layout_of(found)
            try:
                given = {name: each.cpu() for name, each in found.items()}
                found = check_stored_tensors(self.scheme, self.shape, given, stored_as, None, prefix)
            except CheckpointError as error:
                error_msgs.append(str(error))
                return
            self.stored_as = stored_as
            for name in zeros.EXTRA:
                rest.pop(prefix + name, None)
            rest |= {prefix + name: each for name, each in found.items()}
        if found:  # else it is not about this module: the weight stays, and its names are reported missing
            device = self.get_buffer("qdata").device
            outliers = found["outlier_col"].numel() if "outlier_col" in found else 0
            specs = plain_specs(self.scheme, self.shape, outliers)
            empty = {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}
            self._hold(Weight(self.scheme, self.shape, Layout.PLAIN, empty))
        if GUARD not in self._buffers:  # a skeleton has a place for it
            rest.pop(prefix + GUARD, None)
            if guard is None:
                missing_keys.append(prefix + GUARD)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if found:
            self.use_best_layout()


# Module -> its weight as it was last asked for, so that what kernels prepared of it is there at the next call.
_weights: WeakKeyDictionary[nn.Module, Weight] = WeakKeyDictionary()


def weight_of(module: nn.Module, scheme: Scheme, owner: QuantizedModule) -> Weight:
    """The matrix that `owner` holds, as `module` computes with it under a scheme: the same object while nothing was moved."""
    buffers = owner._buffers
    tensors = [cast(Tensor, buffers[name]) for name in tensor_names(scheme)]
    if torch.compiler.is_compiling():
        return Weight(scheme, owner.shape, owner.layout, dict(zip(tensor_names(scheme), tensors, strict=True)))
    found = recall(tensors, scheme, owner.layout.value, owner.shape[1])
    if found is None:
        found = Weight(scheme, owner.shape, owner.layout, dict(zip(tensor_names(scheme), tensors, strict=True)))
        _weights[module] = found.remember()
    return found


def _is_guard(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape == (0,)


def kernel_of(operation: str, held: QuantizedModule, scheme: Scheme, dtype: torch.dtype) -> KernelChoice:
    """What runs an operation with the weight that a module holds, and why."""
    return explain(
        operation, Problem(scheme, held.layout, *held.shape, dtype), target_of(held.get_buffer("qdata").device)
    )
