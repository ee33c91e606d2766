"""FLOPs and bytes moved, operation by operation, from the real shapes of one forward pass.

What is counted:
- `matmul_flops`: matrix products, a multiply-add is 2. This is the literature's "FLOPs".
- `vector_flops`: element-wise work, norms and softmax, by `VECTOR_FLOPS`. Apart, because no matrix unit does it.
- bytes: every operation reads each of its inputs once and writes its outputs once; views move nothing; a look-up
  reads the rows that it takes, not the table. Caches that carry data from one operation to the next are not modelled.

A fused encoder counts by its program: each step that runs is one operation of the cost that it says itself. Activations and
roundings in the end of a product are no operations there, so they have no `vector_flops`.

It works on the meta device as well, where torch runs scaled_dot_product_attention in its unfused form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from qbert.analyze.components import Component, component_of, component_of_step
from qbert.analyze.program import called_modules, lengths_in
from qbert.analyze.tracker import ComponentTracker
from qbert.analyze.weights import QuantizedWeight, quantized_weight
from qbert.encoder import Step
from qbert.encoder.program import Slots


@dataclass(frozen=True)
class OpCount:
    """One operation of the forward pass.

    Attributes:
        component: which part of the model ran it.
        name: ``aten::addmm``, or the class of a quantized module or the operation of a fused encoder's step, which count as
            one operation.
        math: precision of its matrix product: ``"float"`` (the model's own), ``"int8"`` or ``"fp8"``.
        matmul_flops, vector_flops: see the module.
        model_dtype_bytes: bytes moved in the model's own float dtype; they shrink with it.
        fixed_bytes: all other bytes moved: indices, masks, quantized weights.
        launches: kernels that it takes.
    """

    component: Component
    name: str
    math: str = "float"
    matmul_flops: int = 0
    vector_flops: int = 0
    model_dtype_bytes: int = 0
    fixed_bytes: int = 0
    launches: int = 1

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written, as the model stands."""
        return self.model_dtype_bytes + self.fixed_bytes


@dataclass
class OpCounts:
    """All operations of a forward pass, and those whose FLOPs no rule knows (name -> how many)."""

    ops: list[OpCount] = field(default_factory=list)
    uncounted: Counter[str] = field(default_factory=Counter)

    def of(self, component: Component) -> list[OpCount]:
        """The operations of one component."""
        return [op for op in self.ops if op.component is component]


# Operations for each element of the result; exp, erf and division count as one each.
VECTOR_FLOPS: dict[str, int] = {
    "aten::native_layer_norm": 7,  # mean, subtract, square, add up, times rstd, times gamma, plus beta
    "aten::_softmax": 5,  # max, subtract, exp, add up, divide
    "aten::_safe_softmax": 5,
    "aten::gelu": 5,  # x * 0.5 * (1 + erf(x / sqrt 2)): divide, erf, add, multiply, multiply
}
SOFTMAX_FLOPS = VECTOR_FLOPS["aten::_softmax"]
_REDUCTIONS = frozenset({"aten::sum", "aten::mean", "aten::amax", "aten::max"})  # one for each element of the input
_LOOK_UPS = frozenset({"aten::embedding", "aten::gather", "aten::index_select", "aten::index"})
# Move or make data, without arithmetic on floats.
_MOVES = _LOOK_UPS | {
    f"aten::{name}"
    for name in (
        "arange", "cat", "clone", "constant_pad_nd", "copy_", "_to_copy", "fill_", "full", "full_like", "new_full",
        "new_ones", "new_zeros", "ones", "ones_like", "repeat", "scalar_tensor", "stack", "tril", "triu", "zeros",
        "zeros_like",
    )
}  # fmt: skip
_FREE = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty", "aten::_local_scalar_dense"})
_TORCH_OWN = ("aten::", "prims::")
_ATTENTION_PREFIX = "aten::_scaled_dot_product"


def _attention_flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: object, **named_options: object
) -> int:
    """QK^T and PV of (b, h, s, d) tensors."""
    scores = query.shape[:-1].numel() * key.shape[-2]
    return 2 * scores * (query.shape[-1] + value.shape[-1])


def _attention_vector_flops(query: torch.Tensor, key: torch.Tensor) -> int:
    """Scale and softmax of the scores inside a fused attention."""
    return query.shape[:-1].numel() * key.shape[-2] * (SOFTMAX_FLOPS + 1)


def _int_mm_flops(left: torch.Tensor, right: torch.Tensor) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


# Products that torch's own table (torch.utils.flop_counter.flop_registry) lacks. A custom operator's formula goes here.
MATMUL_FLOPS: dict[str, Callable[..., int]] = {
    "aten::_int_mm": _int_mm_flops,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention_flops,
}


def _matmul_flops(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """FLOPs of a matrix product, or None where the operation is none."""
    if name in MATMUL_FLOPS:
        return MATMUL_FLOPS[name](*args, **kwargs)
    formula = flop_registry.get(func.overloadpacket)
    return None if formula is None else int(formula(*args, **kwargs, out_val=out))


def _vector_flops(func: Any, name: str, args: tuple[Any, ...], out: torch.Tensor) -> int | None:
    """Element-wise FLOPs, 0 for moves and integer work, or None where no rule knows the operation."""
    if not name.startswith(_TORCH_OWN):  # a custom operator: nothing is known of it, whatever it returns
        return VECTOR_FLOPS[name] * out.numel() if name in VECTOR_FLOPS else None
    if name in _MOVES or not out.is_floating_point():
        return 0
    if name in VECTOR_FLOPS:
        return VECTOR_FLOPS[name] * out.numel()
    if name in _REDUCTIONS:
        return int(args[0].numel())
    return out.numel() if torch.Tag.pointwise in func.tags else None


def touched_elements(tensor: torch.Tensor) -> int:
    """Elements of `tensor` that lie in memory: a dimension that `expand` made (stride 0) is stored once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_view(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether the result lies in the storage of an input that was not written to."""
    if func._schema.is_mutable or not outputs:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


class _Recorder(TorchDispatchMode):
    """Turns every operation that torch dispatches into an `OpCount`."""

    def __init__(self, model: nn.Module, model_dtype: torch.dtype) -> None:
        super().__init__()
        self.counts = OpCounts()
        self.tracker = ComponentTracker(model, on_step=self._step)
        self._model_dtype = model_dtype
        self._opaque_depth = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        running = self.tracker.running
        if not self._opaque_depth and (running is None or running.step is None):
            self._record(func, args, kwargs, out)
        return out

    def _step(self, step: Step, slots: Slots) -> None:
        self.counts.ops.append(step_op(step, lengths_in(slots, step), self._model_dtype))

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func._schema.name
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if name in _FREE or _is_view(func, inputs, outputs):
            return
        if not outputs:
            if func._schema.is_mutable:  # a custom operator that writes into its arguments
                self.counts.uncounted[name] += 1
            return
        matmul = _matmul_flops(func, name, args, kwargs, out)
        vector: int | None = 0
        if name.startswith(_ATTENTION_PREFIX):
            vector = _attention_vector_flops(args[0], args[1])
        elif matmul is None:
            vector = _vector_flops(func, name, args, outputs[0])
        if vector is None:
            self.counts.uncounted[name] += 1
        own, fixed = self._bytes(name, inputs, outputs)
        component = self.tracker.current or Component.OTHER
        math = _math_of_dtype(inputs[0].dtype) if matmul and inputs else "float"
        self.counts.ops.append(OpCount(component, name, math, matmul or 0, vector or 0, own, fixed))

    def _bytes(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> tuple[int, int]:
        """Bytes moved in the model's dtype, and other bytes."""
        if name in _LOOK_UPS:
            inputs = [*inputs[1:], *outputs]  # of the table, what was taken: as much as comes out
        own = fixed = 0
        for tensor in (*inputs, *outputs):
            nbytes = touched_elements(tensor) * tensor.element_size()
            if tensor.dtype is self._model_dtype:
                own += nbytes
            else:
                fixed += nbytes
        return own, fixed

    def enter_quantized(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of a quantized module: what happens inside depends on the kernel, so it is not recorded."""
        self._opaque_depth += 1

    def leave_quantized(self, weight: QuantizedWeight, component: Component) -> Callable[..., None]:
        """Forward hook of a quantized module: one operation that reads the stored weight, the input, and writes."""

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
            self._opaque_depth -= 1
            if not self._opaque_depth:
                source = _tensors((args, kwargs))[0]
                self.counts.ops.append(_quantized_op(module, weight, component, source, out))

        return leave


def _math_of_dtype(dtype: torch.dtype) -> str:
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return "fp8"
    return "float" if dtype.is_floating_point else "int8"


def _quantized_op(
    module: nn.Module, weight: QuantizedWeight, component: Component, source: torch.Tensor, out: torch.Tensor
) -> OpCount:
    name = type(module).__name__
    if weight.is_embedding:
        rows_bytes = weight.nbytes * source.numel() // weight.rows
        return OpCount(component, name, fixed_bytes=rows_bytes + source.nbytes, model_dtype_bytes=out.nbytes)
    bias = getattr(module, "bias", None)
    float_bytes = source.nbytes + out.nbytes + (bias.nbytes if isinstance(bias, torch.Tensor) else 0)
    return OpCount(
        component,
        name,
        weight.math,
        matmul_flops=2 * source.shape[:-1].numel() * weight.rows * weight.columns,
        model_dtype_bytes=float_bytes,
        fixed_bytes=weight.nbytes,
        launches=1 if weight.math == "float" else 2,  # quantize the activations, multiply
    )


def step_op(step: Step, lengths: Sequence[int], model_dtype: torch.dtype) -> OpCount:
    """A fused encoder's step on sequences of that many tokens. Floats as wide as the model's own count as its."""
    cost = step.cost(lengths)
    floats = 0
    if step.float_bytes == model_dtype.itemsize:
        floats = cost.activation_bytes - replace(step, float_bytes=0).cost(lengths).activation_bytes
    return OpCount(
        component_of_step(step.name, step.part),
        step.operation,
        "int8",
        matmul_flops=2 * cost.macs,
        vector_flops=_step_vector_flops(step, lengths),
        model_dtype_bytes=floats,
        fixed_bytes=cost.weight_bytes + cost.activation_bytes - floats,
    )


def _step_vector_flops(step: Step, lengths: Sequence[int]) -> int:
    """Of softmax, norms and sums; see the module."""
    n, k = step.shape
    if step.operation == "attention":
        return n * sum(length * length for length in lengths) * (SOFTMAX_FLOPS + 1)
    adds = _STEP_ADDS.get(step.operation)
    if adds is None:
        return 0
    norm = 0 if step.operation == "add" else VECTOR_FLOPS["aten::native_layer_norm"]
    return sum(lengths) * (n or k) * (norm + adds)


_STEP_ADDS = {"add": 1, "add_norm": 1, "linear_add_norm": 1, "embed_norm": 2}  # of rows, before the norm


def count_ops(model: nn.Module, inputs: Mapping[str, torch.Tensor], model_dtype: torch.dtype) -> OpCounts:
    """Run `model(**inputs)` once and count its operations.

    Args:
        model: the encoder, in eval mode.
        inputs: its keyword arguments.
        model_dtype: the model's own float dtype; bytes in it are kept apart (see `OpCount`).
    """
    recorder = _Recorder(model, model_dtype)
    handles = []
    for name, module in called_modules(model):
        weight = quantized_weight(module)
        if weight is not None:
            handles.append(module.register_forward_pre_hook(recorder.enter_quantized))
            leave = recorder.leave_quantized(weight, component_of(name))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        # Not inference_mode: there, composite operations reach the mode before they are taken apart.
        with torch.no_grad(), recorder.tracker, recorder:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.counts
