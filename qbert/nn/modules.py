"""L7. QLinear, QEmbedding, and a linear whose weight is tied to a quantized embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbert import ops as _ops
from qbert.dispatch import KernelChoice, embedding_operation, linear_operation, select_kernel, select_layout
from qbert.errors import CheckpointError, QBertError
from qbert.formats import SCHEMES, TIED_LINEAR_SCHEME, Role, Scheme
from qbert.layout import Layout
from qbert.qtensor import QuantizedTensor, plain_specs
from qbert.target import target_of
from qbert.validate import check_plain_tensors

# Stored empty under the float weight's name: a loader that does not know qbert finds a shape that cannot be right and fails,
# where it would otherwise leave the weight at its random initialization and only warn.
GUARD = "weight"
_Q = torch.ops.qbert


class QuantizedModule(nn.Module):
    """A module that holds one quantized matrix as buffers, in the layout that its device's kernel reads.

    `state_dict` always holds the PLAIN layout, so what is saved does not depend on where the model ran; loading checks every
    value. Casts of the model (`half()`, `bfloat16()`) leave scales, dictionaries and outliers in their own types.
    """

    role: Role

    def __init__(self, weight: QuantizedTensor, operation: str) -> None:
        super().__init__()
        self.scheme: Scheme = weight.scheme
        self.operation = operation
        self.shape = weight.shape
        self.register_buffer(GUARD, torch.empty(0, dtype=torch.uint8, device=weight.tensors["qdata"].device))
        self._hold(weight)
        self.use_best_layout()

    @property
    def quantized(self) -> QuantizedTensor:
        """The matrix as it lies in memory now."""
        names = plain_specs(self.scheme, self.shape)
        return QuantizedTensor(self.scheme, self.shape, self.layout, {name: getattr(self, name) for name in names})

    @property
    def kernel(self) -> KernelChoice:
        """What runs `operation` on the module's device, and why."""
        return select_kernel(self.operation, target_of(self.get_buffer("qdata").device), self.layout)

    def weight_nbytes(self) -> int:
        """Bytes of the weight as it lies in memory."""
        return self.quantized.nbytes

    def use_best_layout(self) -> None:
        """Moves the codes into the layout that this device's kernel reads. Exact, and exactly undone when saving."""
        device = self.get_buffer("qdata").device
        if device.type != "meta":  # a skeleton waits for its file, which is PLAIN
            self._hold(self.quantized.to_layout(select_layout(self.scheme, self.role, target_of(device))))

    def _hold(self, weight: QuantizedTensor) -> None:
        self.layout = weight.layout
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
        for name, tensor in self.quantized.to_layout(Layout.PLAIN).tensors.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        names = plain_specs(self.scheme, self.shape)
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if found and all(tensor.device.type != "meta" for tensor in found.values()):
            try:
                check_plain_tensors(self.scheme, self.shape, {name: each.cpu() for name, each in found.items()}, prefix)
            except CheckpointError as error:
                error_msgs.append(str(error))
                return
        if found:  # else it is not about this module: the weight stays, and its names are reported missing
            device = self.get_buffer("qdata").device
            outliers = found["outlier_col"].numel() if "outlier_col" in found else 0
            specs = plain_specs(self.scheme, self.shape, outliers)
            empty = {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}
            self._hold(QuantizedTensor(self.scheme, self.shape, Layout.PLAIN, empty))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if found:
            self.use_best_layout()


class QLinear(QuantizedModule):
    """`nn.Linear` with a quantized weight: y = x @ W.T + bias for x (..., k) float32, bfloat16 or float16.

    Args:
        weight: (n, k), of a linear scheme.
        bias: (n,) float parameter or None; kept as it is.
    """

    role = Role.LINEAR
    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight, linear_operation(weight.scheme))
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self, self.operation, self.bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, scheme={self.scheme.name}, layout={self.layout.value}"


class QEmbedding(QuantizedModule):
    """`nn.Embedding` with a quantized table: rows (..., k) of integer ids (...).

    Args:
        weight: (rows, k), of an embedding scheme.
        padding_idx: as in `nn.Embedding`; kept for code that asks for it.
        dtype: of the rows; follows casts of the model.

    Raises (in forward):
        QBertError: an id outside the table.
    """

    role = Role.EMBEDDING
    output_like: Tensor  # empty; its type is the rows' type and follows casts of the model

    def __init__(self, weight: QuantizedTensor, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__(weight, embedding_operation(weight.scheme))
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        like = torch.empty(0, dtype=dtype, device=weight.tensors["qdata"].device)
        self.register_buffer("output_like", like, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return _EMBEDDING_CALLS[self.operation](ids, self, self.output_like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}, layout={self.layout.value}"


class QTiedLinear(nn.Module):
    """A linear that computes with another module's quantized weight: y = x @ W.T + bias. Holds no weight itself.

    Args:
        owner: the embedding or linear. Not a submodule: it is saved, moved and counted once, where it stands.
        owner_name: its qualified name in the model, for `explain` and the checkpoint.
        bias: (rows,) float parameter or None.
    """

    role = Role.LINEAR
    bias: nn.Parameter | None

    def __init__(self, owner: QuantizedModule, owner_name: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, nn.Module does not register it; deepcopy still follows it
        self.owner_name = owner_name
        name = owner.scheme.name
        self.scheme = SCHEMES[TIED_LINEAR_SCHEME[name]] if owner.role is Role.EMBEDDING else owner.scheme
        self.operation = linear_operation(self.scheme)
        self.shape = owner.shape
        self.out_features, self.in_features = owner.shape
        self.register_parameter("bias", bias)

    @property
    def owner(self) -> QuantizedModule:
        """The module that holds the weight."""
        return self._owner[0]

    @property
    def kernel(self) -> KernelChoice:
        """What runs the operator on the owner's device, and why."""
        return select_kernel(self.operation, target_of(self.owner.get_buffer("qdata").device), self.owner.layout)

    def weight_nbytes(self) -> int:
        """0: the owner counts the bytes."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.owner, self.operation, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme.name}, tied to {self.owner_name}"


def _linear(x: Tensor, held: QuantizedModule, operation: str, bias: Tensor | None) -> Tensor:
    n, k = held.shape
    if x.dtype not in _ops.FLOAT_DTYPES or x.shape[-1:] != (k,):
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _ops.FLOAT_DTYPES)
        raise QBertError(f"input is {x.dtype} of shape {tuple(x.shape)}; allowed: {allowed} of shape (..., {k})")
    y = _LINEAR_CALLS[operation](x.reshape(-1, k), held, bias)
    return y.view(*x.shape[:-1], n)


def _w8a8(x: Tensor, m: Any, bias: Tensor | None) -> Tensor:
    q, s = _Q.quantize_per_token(x)
    return _Q.w8a8_linear(q, s, m.qdata, m.scale, bias, "none", x.dtype, m.layout.value)


def _w4a8(x: Tensor, m: Any, bias: Tensor | None) -> Tensor:
    q, s = _Q.quantize_per_token(x)
    return _Q.w4a8_linear(q, s, m.qdata, m.group_scale, m.scale, bias, "none", x.dtype, m.layout.value)


def _gobo_a8(x: Tensor, m: Any, bias: Tensor | None) -> Tensor:
    q, s = _Q.quantize_per_token(x)
    outliers = (m.outlier_rowptr, m.outlier_col, m.outlier_delta)
    return _Q.gobo_linear(q, s, m.qdata, m.codebook, m.scale, *outliers, bias, "none", x.dtype, m.layout.value)


def _w8a16(x: Tensor, m: Any, bias: Tensor | None) -> Tensor:
    return _Q.w8a16_linear(x, m.qdata, m.scale, bias, "none", m.layout.value)


def _w4a16(x: Tensor, m: Any, bias: Tensor | None) -> Tensor:
    return _Q.w4a16_linear(x, m.qdata, m.scale, bias, "none", m.layout.value)


def _gobo_a16(x: Tensor, m: Any, bias: Tensor | None) -> Tensor:
    outliers = (m.outlier_rowptr, m.outlier_col, m.outlier_delta)
    return _Q.gobo_a16_linear(x, m.qdata, m.codebook, *outliers, bias, "none", m.layout.value)


def _w8_embedding(ids: Tensor, m: Any, dtype: torch.dtype) -> Tensor:
    return _Q.w8_embedding(ids, m.qdata, m.scale, dtype)


def _w4_embedding(ids: Tensor, m: Any, dtype: torch.dtype) -> Tensor:
    return _Q.w4_embedding(ids, m.qdata, m.scale, dtype, m.embedding_dim, m.layout.value)


def _gobo_embedding(ids: Tensor, m: Any, dtype: torch.dtype) -> Tensor:
    outliers = (m.outlier_rowptr, m.outlier_col, m.outlier_delta)
    return _Q.gobo_embedding(ids, m.qdata, m.codebook, *outliers, dtype, m.embedding_dim, m.layout.value)


_LINEAR_CALLS: dict[str, Callable[[Tensor, Any, Tensor | None], Tensor]] = {
    "w8a8_linear": _w8a8,
    "w4a8_linear": _w4a8,
    "gobo_linear": _gobo_a8,
    "w8a16_linear": _w8a16,
    "w4a16_linear": _w4a16,
    "gobo_a16_linear": _gobo_a16,
}
_EMBEDDING_CALLS: dict[str, Callable[[Tensor, Any, torch.dtype], Tensor]] = {
    "w8_embedding": _w8_embedding,
    "w4_embedding": _w4_embedding,
    "gobo_embedding": _gobo_embedding,
}
