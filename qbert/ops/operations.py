"""One record an operation: the class of its arguments. Everything that needs to know them reads them there.

The schema of ``torch.ops.qbert.<name>`` follows from the fields' types, checks and result shapes stand beside the fields, and
every implementation takes the record itself: `def linear(a: Linear) -> Tensor`. Shapes in words: t tokens, n output channels,
k input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import SCHEMES, Role, get_scheme, scheme_names
from qbert.ops import checks
from qbert.ops.abi import Activation, Keeps
from qbert.weight import Layout, Weight
from qbert.weight.tensor import tensor_names

# Type of a float result, or the static scale of an int8 one: value = code * scale.
Out = torch.dtype | float
# A word table: quantized, or a float tensor (rows, k).
Table = Weight | Tensor
# In place of a scheme's name where a table is float.
FLOAT_TABLE = "float"


class Norm(NamedTuple):
    """A LayerNorm over k channels.

    Attributes:
        gamma, beta: (k,) float gains and shifts.
        eps: added to the variance.
    """

    gamma: Tensor
    beta: Tensor
    eps: float


class QuantizeRows(NamedTuple):
    """Symmetric int8 codes with one scale per token (ZeroQuant, Yao et al., 2022).

    Attributes:
        x: (t, k) float32, bfloat16 or float16.

    Returns:
        codes (t, k) int8 in -127 ... 127 and scales (t,) float32 with x ~ codes * scale. A token with NaN or infinity in it
        gets scale NaN and codes 0, so that it comes out as NaN whatever it is multiplied with, and no other token does.
    """

    x: Tensor

    def check(self) -> None:
        checks.activations(self.x)

    def results(self) -> tuple[checks.Like, ...]:
        return checks.Like(self.x.shape, torch.int8), checks.Like(self.x.shape[:1], torch.float32)


class Linear(NamedTuple):
    """y = activation(x @ weight.T + bias), or of a gated linear the product of halves of that.

    Attributes:
        x: (t, k): int8 codes where the weight's scheme has int8 activations, else floats.
        s: (t,) float32, the scale of each token's codes; None of float tokens.
        weight: (n, k) of a linear scheme, in any of its layouts; (2 n, k) of a gated linear.
        bias: float or None, one for each of the weight's rows.
        activation: applied to the float sum.
        gated: y = activation(a) * b, where a are the sums of the weight's first n rows and b those of its last n (GeGLU and
            its like: Shazeer, 2020).
        out: of y (t, n). Float tokens give floats of their own type. An int8 result clamps to -127 ... 127, and NaN becomes
            the code of 0: the residual stream, not this, carries it.
        zero: of an int8 result, the code of 0: value = (code - zero) * out. Other results have 0.

    The float epilogue of an integer product is float32: (sum * row scale + outliers) * s + bias, activation, product.
    """

    x: Tensor
    s: Tensor | None
    weight: Weight
    bias: Tensor | None
    activation: Activation
    gated: bool
    out: Out
    zero: int = 0

    def check(self) -> None:
        checks.linear(self.x, self.s, self.weight, self.bias)
        checks.zero(self.zero, self.out)
        if self.gated:
            checks.gated(self.weight)
        if self.s is not None:
            checks.out_type(self.out)
        elif self.out != self.x.dtype:
            raise QBertError(f"a linear of float activations gives their type, {self.x.dtype}, not {self.out}")

    def results(self) -> tuple[checks.Like, ...]:
        return (checks.Like((self.x.shape[0], self.n), checks.out_type(self.out)),)

    @property
    def n(self) -> int:
        """Channels of the result."""
        return self.weight.n // 2 if self.gated else self.weight.n


class Embedding(NamedTuple):
    """Rows of a table.

    Attributes:
        ids: any shape, int32 or int64.
        weight: (rows, k) of an embedding scheme.
        out: float type of the rows (*ids.shape, k).

    Raises:
        QBertError: an id outside the table (on a GPU its row is NaN: nobody looks).
    """

    ids: Tensor
    weight: Weight
    out: torch.dtype

    def check(self) -> None:
        checks.float_dtype("out_dtype is", self.out)
        checks.table(self.weight)

    def results(self) -> tuple[checks.Like, ...]:
        return (checks.Like((*self.ids.shape, self.weight.k), self.out),)


class Attention(NamedTuple):
    """Self-attention of packed sequences; tokens attend within their sequence only.

    Both products are of integers: queries, keys and values are int8 codes, or floats that are rounded to them first, and the
    probabilities are rounded to 8 bits, with a scale for each row. For query i and the keys j that it sees,
    W_i being the largest of w_ij = exp(score_ij - max_j score_ij) * s_value[j]:

        score_ij = (query_i . key_j) * (s_query[i] * s_key[j] * softmax_scale) + bias[head, clamp(j - i)]
        p_ij = round(w_ij * (255 / W_i))        out_i = (sum_j p_ij * value_j) * (W_i / 255 / sum_j exp(...))

    A token whose scale is NaN makes rows of its own sequence NaN and no others: its own row if the query's scale is, every
    row that sees it if the key's or the value's is; with a window those are its neighbours only. Of floats, a head's row with
    NaN or infinity in it gets scale NaN where scales are dynamic; where they are static, NaN becomes code 0.

    Attributes:
        qkv: (t, 3 * heads * head_dim): all queries, then all keys, then all values of a token. Int8 codes; or floats, which
            are rounded inside, after the rotation if any.
        scales: float32 scales of queries, keys and values, above 0: static (3,), or of codes (t, 3) for each token. None, of
            floats only, is dynamic: each head's query, key and value of each token is rounded as `QuantizeRows` rounds a row.
        cu_seqlens: (sequences + 1,) int32, ascending from 0 to t: sequence i is tokens cu_seqlens[i] ... cu_seqlens[i + 1] - 1.
        heads: 1 or more.
        softmax_scale: factor on the scores, usually head_dim**-0.5.
        window: a token sees the keys at most so many tokens away, |j - i| <= window (Longformer, Beltagy et al., 2020); 0 is
            itself alone. None: its whole sequence.
        bias: (heads, 2 * reach + 1) float32: bias[h, clamp(j - i, -reach, reach) + reach] is added to the scaled score
            (T5, Raffel et al., 2020). None for none.
        rotary: (positions, head_dim) float32: cosines (head_dim / 2), then sines (head_dim / 2) of each position in its
            sequence. The halves (a, b) of a head's query and key become (a cos - b sin, b cos + a sin) in float32 (RoFormer,
            Su et al., 2021). Of floats only; positions no less than the longest sequence (on a GPU longer ones are NaN:
            nobody looks). None for none.
        out: of the result (t, heads * head_dim).
        queries: (sequences, heads * head_dim) of each sequence's first token, where no other result is wanted: the result has
            their shape, of zeros where a sequence is empty. qkv then is (t, 2 * heads * head_dim), keys and values, and the
            scales of codes for each token are (t, 2). None: every token has a query.
        query_scales: float32 (sequences,), of codes with a scale for each token; else None.
    """

    qkv: Tensor
    scales: Tensor | None
    cu_seqlens: Tensor
    heads: int
    softmax_scale: float
    window: int | None
    bias: Tensor | None
    rotary: Tensor | None
    out: Out
    queries: Tensor | None = None
    query_scales: Tensor | None = None

    def check(self) -> None:
        checks.attention(self.qkv, self.scales, self.cu_seqlens, self.heads, self.softmax_scale, self.parts)
        checks.attention_pattern(self.window, self.bias, self.rotary, self.qkv.dtype, self.heads, self.head_dim)
        checks.first_queries(self.queries, self.query_scales, self.qkv, self.scales, self.cu_seqlens)
        checks.out_type(self.out)

    def results(self) -> tuple[checks.Like, ...]:
        rows = self.qkv.shape[0] if self.queries is None else self.queries.shape[0]
        return (checks.Like((rows, self.qkv.shape[1] // self.parts), checks.out_type(self.out)),)

    @property
    def parts(self) -> int:
        """How many of queries, keys and values qkv has."""
        return 3 if self.queries is None else 2

    @property
    def head_dim(self) -> int:
        return self.qkv.shape[1] // (self.parts * self.heads)


class AddNorm(NamedTuple):
    """LayerNorm(y + residual): a float (t, k) of residual's type, and the `QuantizeRows` codes and scales of the norm.

    The codes are those of the float32 norm, of the float32 sum, before anything is rounded to the residual's type.

    Attributes:
        y, residual: (t, k) float.
        norm: over k channels.
        keeps: what the float result is: the norm, or the sum y + residual, which an encoder that normalizes before its
            linears hands on (Xiong et al., 2020).
    """

    y: Tensor
    residual: Tensor
    norm: Norm
    keeps: Keeps

    def check(self) -> None:
        checks.add_norm(self.y, self.residual, self.norm)

    def results(self) -> tuple[checks.Like, ...]:
        return checks.normed(self.residual.shape, self.residual.dtype)


class EmbedNorm(NamedTuple):
    """LayerNorm of word + token type + position rows: float (t, k) of `positions`' type, with codes and scales.

    Attributes:
        ids, position_ids, token_type_ids: (t,) integers.
        words: the word table (rows, k).
        positions, token_types: (p, k) and (types, k) float tables: small, so they stay float.
        norm: over k channels.
    """

    ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    words: Table
    positions: Tensor
    token_types: Tensor
    norm: Norm

    def check(self) -> None:
        checks.embed_norm(
            (self.ids, self.position_ids, self.token_type_ids), self.words, self.positions, self.token_types, self.norm
        )

    def results(self) -> tuple[checks.Like, ...]:
        return checks.normed((self.ids.shape[0], self.positions.shape[1]), self.positions.dtype)


class LinearAddNorm(NamedTuple):
    """`AddNorm` of what `Linear` gives in residual's type: rounded to it, as if it had been stored.

    Attributes:
        x, s, weight, bias: of the linear, whose activations are int8.
        residual: (t, n) float.
        norm: over n channels.
        keeps: as in `AddNorm`.
    """

    x: Tensor
    s: Tensor
    weight: Weight
    bias: Tensor | None
    residual: Tensor
    norm: Norm
    keeps: Keeps

    def check(self) -> None:
        checks.linear(self.x, self.s, self.weight, self.bias)
        checks.result_like("residual", self.residual, (self.x.shape[0], self.weight.n), self.norm)

    def results(self) -> tuple[checks.Like, ...]:
        return checks.normed(self.residual.shape, self.residual.dtype)

    @property
    def linear(self) -> Linear:
        """Its first half."""
        return Linear(self.x, self.s, self.weight, self.bias, Activation.NONE, False, self.residual.dtype)


Arguments = QuantizeRows | Linear | Embedding | Attention | AddNorm | EmbedNorm | LinearAddNorm


# ---- a record's fields as arguments of a torch operator ---------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """How a field's type goes through a torch operator.

    Attributes:
        schema: what it is there, ``{}`` standing for the field's name.
        pack: the field's value to the operator's arguments; None where it is the one argument itself.
        unpack: the way back.
    """

    schema: tuple[str, ...]
    pack: Callable[[Any], tuple[Any, ...]] | None = None
    unpack: Callable[..., Any] | None = None


def _pack_table(table: Table) -> tuple[Any, ...]:
    if isinstance(table, Tensor):
        return [table], FLOAT_TABLE, Layout.PLAIN.value, table.shape[-1]
    tensors = [table.tensors[name] for name in tensor_names(table.scheme)]
    return tensors, table.scheme.name, table.layout.value, table.k


def _unpack_weight(tensors: list[Tensor], scheme: str, layout: str, k: int) -> Weight:
    known = SCHEMES.get(scheme) or get_scheme(scheme, Role.LINEAR)
    return checks.parse_weight(tensors, known, layout, k)


def _unpack_table(tensors: list[Tensor], scheme: str, layout: str, k: int) -> Table:
    if scheme != FLOAT_TABLE:
        if scheme not in SCHEMES:
            raise QBertError(
                f"unknown scheme {scheme!r}; allowed: {', '.join((FLOAT_TABLE, *scheme_names(Role.EMBEDDING)))}"
            )
        return _unpack_weight(tensors, scheme, layout, k)
    if len(tensors) != 1:
        raise QBertError(f"a float table is 1 tensor, got {len(tensors)}")
    return tensors[0]


def _pack_out(out: Out) -> tuple[Any, ...]:
    return (out, None) if isinstance(out, torch.dtype) else (torch.int8, out)


def _unpack_out(dtype: torch.dtype, scale: float | None) -> Out:
    if (dtype == torch.int8) != (scale is not None):
        raise QBertError(
            f"out_dtype is {dtype} and out_scale {scale}; allowed: a float type and None, or int8 and a scale"
        )
    return dtype if scale is None else scale


_STORED = ("Tensor[] {}", "str {}_scheme", "str {}_layout", "int {}_k")
_FIELDS: dict[Any, _Field] = {
    Tensor: _Field(("Tensor {}",)),
    Tensor | None: _Field(("Tensor? {}",)),
    bool: _Field(("bool {}",)),
    int: _Field(("int {}",)),
    int | None: _Field(("int? {}",)),
    float: _Field(("float {}",)),
    torch.dtype: _Field(("ScalarType {}_dtype",)),
    Activation: _Field(("str {}",), lambda activation: (activation.text,), Activation.named),
    Keeps: _Field(("str {}",), lambda keeps: (keeps.text,), Keeps.named),
    Out: _Field(("ScalarType {}_dtype", "float? {}_scale"), _pack_out, _unpack_out),
    Weight: _Field(_STORED, _pack_table, _unpack_weight),
    Table: _Field(_STORED, _pack_table, _unpack_table),
    Norm: _Field(("Tensor gamma", "Tensor beta", "float eps"), tuple, Norm),
}


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation: its name, and the class of its arguments with everything that follows from it.

    Attributes:
        arguments: one of the records above.
        gives: how many tensors.
    """

    name: str
    arguments: type[Any]
    gives: int = 1

    def __post_init__(self) -> None:
        hints = get_type_hints(self.arguments)
        fields = [(name, _FIELDS[hints[name]]) for name in self.arguments._fields]
        object.__setattr__(self, "_fields", [field for _, field in fields])
        object.__setattr__(self, "_flat", [part.format(name) for name, field in fields for part in field.schema])

    @property
    def schema(self) -> str:
        """Of its torch operator, without the name."""
        gives = "Tensor" if self.gives == 1 else f"({', '.join(['Tensor'] * self.gives)})"
        return f"({', '.join(self._flat)}) -> {gives}"  # type: ignore[attr-defined]

    def flatten(self, arguments: Any) -> tuple[Any, ...]:
        """The record as arguments of the torch operator."""
        flat: list[Any] = []
        for field, value in zip(self._fields, arguments, strict=True):  # type: ignore[attr-defined]
            flat.extend((value,) if field.pack is None else field.pack(value))
        return tuple(flat)

    def bind(self, *values: Any) -> Any:
        """The record that the torch operator's arguments say.

        Raises:
            QBertError: a name that is none, or a weight whose tensors are not those of its scheme.
        """
        built, at = [], 0
        for field in self._fields:  # type: ignore[attr-defined]
            after = at + len(field.schema)
            built.append(values[at] if field.unpack is None else field.unpack(*values[at:after]))
            at = after
        return self.arguments(*built)


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("quantize_rows", QuantizeRows, gives=2),
        Operation("linear", Linear),
        Operation("embedding", Embedding),
        Operation("attention", Attention),
        Operation("add_norm", AddNorm, gives=3),
        Operation("embed_norm", EmbedNorm, gives=3),
        Operation("linear_add_norm", LinearAddNorm, gives=3),
    )
}
_BY_ARGUMENTS = {operation.arguments: operation for operation in OPERATIONS.values()}


def operation_of(arguments: Any) -> Operation:
    """The operation that a record is the arguments of."""
    return _BY_ARGUMENTS[type(arguments)]
