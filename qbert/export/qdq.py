"""W8A8 as ONNX's QuantizeLinear and DequantizeLinear (QDQ): what stands in for quantized modules while a graph is taken.

The numbers are those of qbert's kernels, in their order: codes are rounded from what was scaled before, so that every
QuantizeLinear has the scale 1; integer sums stay exact, and are multiplied with scales after. A token has a scale of its own,
as in qbert, where the fused encoder has no static one. ONNX's DynamicQuantizeLinear has one for a whole batch: other numbers,
which depend on who shares the batch, so it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbert.encoder import LayerScales, fused_forward
from qbert.encoder.build import head_size
from qbert.encoder.parts import QKV
from qbert.errors import QBertError
from qbert.families import EncoderFamily
from qbert.formats import INT8, SCHEMES
from qbert.modules import FactoredLinear, QEmbedding, QLinear, QTiedLinear, QuantizedModule
from qbert.ops.reference import PROBABILITY_MAX
from qbert.quantizers import quantize
from qbert.weight import Weight
from qbert.weight.codec import MIN_ABSMAX, decode, operand, row_scales
from qbert.weight.layout import read_codes

_LINEARS = ("w8a8", "w4a8")
# Families whose attention is one of the two modules that `QdqAttention` stands in for.
_ATTENTION = {"BERT": "attention.self", "MPNet": "attention.attn"}
FAMILIES = tuple(_ATTENTION)


class Codes(NamedTuple):
    """Integers as floats (..., k), and what each token's are multiplied with (..., 1); None where that is in a weight."""

    values: Tensor
    scale: Tensor | None


class QdqLinear(nn.Module):
    """y = codes(x) @ DQ(W) * scale + bias.

    Args:
        weight: of a scheme with int8 activations.
        bias: (n,) or None.
        reads: static scale of what is read; None for one a token.
        zero: the code of 0 in what is read with a static scale.
    """

    def __init__(self, weight: Weight, bias: Tensor | None, reads: float | None = None, zero: int = 0) -> None:
        super().__init__()
        scale = row_scales(weight).clone()
        self.register_buffer("codes", operand(weight).t().contiguous())  # (k, n): MatMul's own order
        self.register_buffer("scale", scale if reads is None else scale * reads)
        self.register_buffer("bias", bias)
        self.reads, self.zero = reads, zero

    def forward(self, x: Tensor) -> Tensor:
        return self.product(codes_of(x, self.reads, self.zero))

    def product(self, given: Codes) -> Tensor:
        """Of tokens that are codes already."""
        codes, scale, bias = self.get_buffer("codes"), self.get_buffer("scale"), self._buffers["bias"]
        y = given.values @ _dequantized(codes, scale, 1)
        y = y if given.scale is None else y * given.scale
        return y if bias is None else y + bias


class QdqFeedForwardOut(nn.Module):
    """The linear from a static slot whose overflow neurons are computed apart, see `Overflow`.

    Args:
        up, down: the feed-forward network's linears.
        given: static scale of what `down` reads, and what it cuts off.
    """

    def __init__(self, up: QLinear, down: QLinear, given: LayerScales) -> None:
        super().__init__()
        overflow = given.overflow["inner"]
        neurons = torch.tensor(overflow.neurons)
        self.down = QdqLinear(down.quantized, _bias(down), given.scales["inner"], given.zeros.get("inner", 0))
        rising, back = decode(up.quantized)[neurons], decode(down.quantized)[:, neurons].contiguous()
        bias = rising.new_zeros(len(neurons)) if up.bias is None else up.bias.detach().float()[neurons]
        self.rise = QdqLinear(_int8(rising), bias - given.top("inner"))
        self.back = QdqLinear(_int8(back), None, overflow.scale)
        self.hidden: list[Tensor] = []  # what `up` read, from `QdqFeedForwardIn`

    def forward(self, x: Tensor) -> Tensor:
        excess = nn.functional.gelu(self.rise(self.hidden.pop()))
        return self.down(x) + self.back(excess)


class QdqFeedForwardIn(nn.Module):
    """A linear that tells another what it read."""

    def __init__(self, linear: QdqLinear, listener: QdqFeedForwardOut) -> None:
        super().__init__()
        self.linear, self._listener = linear, (listener,)  # in a tuple, it is no submodule twice

    def forward(self, x: Tensor) -> Tensor:
        self._listener[0].hidden[:] = [x]
        y: Tensor = self.linear(x)
        return y


class QdqEmbedding(nn.Module):
    """int8 rows and their scales, looked up and multiplied."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        codes = read_codes(weight.qdata, weight.scheme.weight, *weight.shape, weight.layout)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", row_scales(weight).clone())

    def forward(self, ids: Tensor) -> Tensor:
        flat, codes, scale = ids.reshape(-1), self.get_buffer("codes"), self.get_buffer("scale")
        rows = _dequantized(codes.index_select(0, flat), scale.index_select(0, flat), 0)
        return rows.reshape(*ids.shape, codes.shape[1])


class QdqAttention(nn.Module):
    """In place of BERT's self-attention and MPNet's: queries, keys, values and probabilities are rounded as fused kernels do.

    Args:
        attention: the module it stands in for.
        qkv: its linears.
        out: the linear after it, where the module has that too (MPNet).
        scales: static ones of the three; None for one a token.
    """

    def __init__(
        self,
        attention: Any,
        qkv: Sequence[QdqLinear],
        out: nn.Module | None,
        heads: int,
        scales: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.scales = nn.ModuleList(qkv), out, scales
        width = qkv[0].get_buffer("codes").shape[1]
        self.size = head_size(attention, width, heads)
        self.softmax_scale = float(getattr(attention, "scaling", self.size**-0.5))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Any, ...]:
        given = codes_of(hidden_states, None)
        statics = self.scales or (None, None, None)
        query, key, value = (
            self._heads(codes_of(linear.product(given), static))  # type: ignore[operator]
            for linear, static in zip(self.qkv, statics, strict=True)
        )
        scores = (query.values @ key.values.transpose(-1, -2)) * (self._across(query, key) * self.softmax_scale)
        for each in (position_bias, attention_mask):
            scores = scores if each is None else scores + each
        powers = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        weights = powers * _of_keys(value, statics[2])
        largest = weights.amax(dim=-1, keepdim=True)
        factor = largest / PROBABILITY_MAX / powers.sum(dim=-1, keepdim=True)
        codes = _rounded(weights * (PROBABILITY_MAX / largest), torch.uint8)
        context = ((codes @ value.values) * factor).transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        if self.out is not None:
            return (self.out(context),)
        return context, None

    def _heads(self, codes: Codes) -> Codes:
        """(batch, heads, tokens, size), and scales (batch, 1, tokens, 1)."""
        values = codes.values
        split = values.reshape(*values.shape[:-1], -1, self.size).transpose(1, 2)
        return Codes(split, None if codes.scale is None else codes.scale.unsqueeze(1))

    def _across(self, query: Codes, key: Codes) -> Tensor | float:
        """What products of a query and a key are multiplied with."""
        if query.scale is None or key.scale is None:
            assert self.scales is not None
            return self.scales[0] * self.scales[1]
        return query.scale * key.scale.transpose(-1, -2)


def _of_keys(value: Codes, static: float | None) -> Tensor | float:
    """What each key's values are multiplied with."""
    if value.scale is not None:
        return value.scale.transpose(-1, -2)
    assert static is not None
    return static


def codes_of(x: Tensor, static: float | None, zero: int = 0) -> Codes:
    """Of tokens x (..., k), as `quantize_rows` and kernels with static scales round them; less the code of 0."""
    if static is not None:
        return Codes(_rounded((x * (1.0 / static)).clamp(min=-INT8.qmax - zero), torch.int8, zero), None)
    absmax = x.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_ABSMAX)
    return Codes(_rounded(x * (INT8.qmax / absmax), torch.int8), absmax / INT8.qmax)


def install(model: nn.Module, encoder: nn.Module, family: EncoderFamily) -> None:
    """Puts these modules in the places of a model's quantized ones, and of a fused encoder's attention. It computes what the
    model did, unfused or fused.

    Args:
        encoder: the one in the model.

    Raises:
        QBertError: a family that this is not written for, a module of another scheme, or one that is tied to another.
    """
    if family.name not in _ATTENTION:
        raise QBertError(f"onnx-qdq: {type(encoder).__name__} is of {family.name}; allowed: {', '.join(FAMILIES)}")
    for name, module in model.named_modules():
        if isinstance(module, QTiedLinear):
            raise QBertError(f"onnx-qdq: {name} is tied to a quantized table; allowed: the encoder inside this model")
        if isinstance(module, QuantizedModule):
            _check(name, module)
    fused = fused_forward(encoder)
    if fused is not None:
        encoder.__dict__.pop("forward", None)
        for name, path in family.calls(encoder, family.layers).items():
            given = None if fused.calibration is None else fused.calibration.layers[name]
            _install_layer(encoder, encoder.get_submodule(path), family, given)
    for name, module in dict(model.named_modules()).items():
        if isinstance(module, QEmbedding):
            _put(model, name, QdqEmbedding(module.quantized))
        elif isinstance(module, QLinear):
            _put(model, name, QdqLinear(module.quantized, _bias(module)))


def _install_layer(encoder: Any, layer: nn.Module, family: EncoderFamily, given: LayerScales | None) -> None:
    paths, scales = family.layer, {} if given is None else given.scales
    linears: dict[str, Any] = {path: layer.get_submodule(path) for path in _linear_paths(family)}
    for path, module in linears.items():
        if isinstance(module, FactoredLinear):
            raise QBertError(
                f"onnx-qdq: {path} is two products of low rank, which are written of an encoder that is not fused; allowed: "
                f"qbert.unfuse_(model) first, or a model without low ranks"
            )
    made = {path: QdqLinear(module.quantized, _bias(module)) for path, module in linears.items()}
    made[paths.attention_output] = QdqLinear(*_parts(linears[paths.attention_output]), scales.get("context"))
    if given is not None and "inner" in given.overflow:
        down = QdqFeedForwardOut(linears[paths.ffn_in], linears[paths.ffn_out], given)
        _put(layer, paths.ffn_out, down)
        _put(layer, paths.ffn_in, QdqFeedForwardIn(made[paths.ffn_in], down))
    else:
        _put(layer, paths.ffn_in, made[paths.ffn_in])
        zero = 0 if given is None else given.zeros.get("inner", 0)
        _put(layer, paths.ffn_out, QdqLinear(*_parts(linears[paths.ffn_out]), scales.get("inner"), zero))
    place = _ATTENTION[family.name]
    within = paths.attention_output.startswith(f"{place}.")
    statics = [scales[slot] for slot in QKV] if QKV[0] in scales else None
    attention = QdqAttention(
        layer.get_submodule(place), [made[path] for path in paths.qkv], made[paths.attention_output] if within else None,
        int(family.setting(encoder.config, "heads")), statics,
    )  # fmt: skip
    _put(layer, place, attention)
    if not within:
        _put(layer, paths.attention_output, made[paths.attention_output])


def _linear_paths(family: EncoderFamily) -> tuple[str, ...]:
    paths = family.layer
    return (*paths.qkv, paths.attention_output, paths.ffn_in, paths.ffn_out)


def _check(name: str, module: QuantizedModule) -> None:
    scheme = module.scheme
    table = isinstance(module, QEmbedding) and scheme.name == "w8"
    if not table and not (isinstance(module, QLinear) and scheme.name.split("-")[0] in _LINEARS):
        raise QBertError(
            f"onnx-qdq: {name} is {scheme.name}; allowed: linears {', '.join(_LINEARS)}, embeddings w8, or float"
        )


def _parts(module: QLinear) -> tuple[Weight, Tensor | None]:
    return module.quantized, _bias(module)


def _bias(module: QLinear) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().float()


def _int8(weight: Tensor) -> Weight:
    return quantize(weight, SCHEMES["w8a8"])


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# ---- the two operators: in a graph ONNX's own, elsewhere what they compute --------------------------------------------


def _rounded(x: Tensor, dtype: torch.dtype, zero: int = 0) -> Tensor:
    """x rounded to integers that a type has when `zero` is added to them, as floats."""
    step, point = torch.tensor(1.0), torch.tensor(zero, dtype=dtype)
    if not torch.onnx.is_in_onnx_export():
        return torch.round(x).clamp(torch.iinfo(dtype).min - zero, torch.iinfo(dtype).max - zero)
    return _onnx(
        "DequantizeLinear", (_onnx("QuantizeLinear", (x, step, point), dtype, x), step, point), torch.float32, x
    )


def _dequantized(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Integer codes of a matrix times the scales along an axis."""
    if not torch.onnx.is_in_onnx_export():
        return codes.to(torch.float32) * (scale if axis else scale[:, None])
    return _onnx("DequantizeLinear", (codes, scale), torch.float32, codes, axis=axis)


def _onnx(operator: str, inputs: Sequence[Tensor], dtype: torch.dtype, like: Tensor, **attributes: int) -> Tensor:
    given: dict[str, Any] = dict(attributes)
    found: Tensor = torch.onnx.ops.symbolic(operator, inputs, given, dtype=dtype, shape=like.shape)
    return found
