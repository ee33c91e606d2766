"""What a family of encoders is, as data: where its parts are, what its forward takes, and the program of one of its layers.

Nothing here knows torch's modules beyond their attribute paths: `qbert.encoder` follows them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class EmbeddingPaths:
    """Where an encoder's embeddings are, as attribute paths from the encoder.

    Attributes:
        words, positions, token_types: tables; None where a family has none of the second or the third.
        norm: LayerNorm over their sum.
        projection: linear to the hidden size; None where there never is one.
    """

    words: str
    positions: str | None
    token_types: str | None
    norm: str
    projection: str | None = None


@dataclass(frozen=True)
class LayerPaths:
    """Where the parts of one encoder layer are, as attribute paths from the layer, in the order in which a token meets them.

    Attributes:
        qkv: the linears of queries, keys and values; or the one whose channels are all queries, then all keys, then all values.
        attention_norm: after the sum of attention.
        output_norm: after the layer's last sum; of a pre-norm family that is the next layer's, which has this path there.
    """

    qkv: tuple[str, ...]
    attention_output: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    output_norm: str

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of the layer."""
        return *self.qkv, self.attention_output, self.ffn_in, self.ffn_out


# What one layer's attention has beside its heads, of an encoder and that layer.
BiasOf = Callable[[Any, Any], Tensor]  # (heads, 2 * reach + 1) float32, see `qbert.ops.operations.Attention`
RotaryOf = Callable[[Any, Any], Tensor]  # (positions, head_dim) float32, see there
WindowOf = Callable[[Any, Any], "int | None"]


@dataclass(frozen=True)
class Part:
    """A module between an encoder's linears, norms and tables, as transformers has it; anything else may compute anything.

    Attributes:
        classes: allowed ones. A name without a dot is of the model's own module, a star in it stands for the model's name
            without ``Model`` or ``Encoder`` (``"*Layer"``: BertLayer, RobertaLayer ...).
        fixed: attribute -> the value that it must have.
        reads: attributes that a program is made from, whatever their values.
        buffers: name -> what it must hold (`COUNTING`, `ZEROS`); what the fused encoder takes for granted.
        activation: a setting of the model's configuration that says what stands there, in place of classes.
    """

    classes: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    buffers: Mapping[str, str] = field(default_factory=dict)
    activation: str | None = None


def part(*classes: str, reads: tuple[str, ...] = (), buffers: Mapping[str, str] | None = None, **fixed: Any) -> Part:
    """A `Part`, briefly: keywords that are none of its attributes are those that must have the values given."""
    return Part(classes, fixed, reads, buffers or {})


COUNTING, ZEROS = "0, 1, 2 ...", "zeros"
LIST = part("torch.nn.modules.container.ModuleList")
DROPOUT = part("torch.nn.modules.dropout.Dropout")
OPTIONAL_DROPOUT = part("torch.nn.modules.dropout.Dropout", "torch.nn.modules.linear.Identity")
ACTIVATION = Part(activation="activation")
# Name in a configuration -> the class that computes it, and what that must hold.
ACTIVATIONS: dict[str, Part] = {
    "gelu": part("transformers.activations.GELUActivation", act=torch.nn.functional.gelu),
    "gelu_new": part("transformers.activations.NewGELUActivation"),
    "gelu_pytorch_tanh": part(
        "transformers.activations.GELUTanh",
        "transformers.activations.PytorchGELUTanh",
        act=functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    ),
    "relu": part("torch.nn.modules.activation.ReLU"),
    "silu": part("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"),
    "swish": part("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"),
}


class LayerBuilder(Protocol):
    """What a family's program writes a layer's steps with; `qbert.encoder.build` makes them, static or dynamic.

    Values go from step to step in named slots. "hidden" is the residual stream, which every layer begins and ends with; its
    codes are what linears read of it: of the stream itself where the norm comes after the sum, of the stream's norm where it
    comes before the linear. A quantized slot is int8 with scales: static where it is calibrated, else one a token.
    """

    def attention(
        self, *qkv: str, bias: BiasOf | None = None, rotary: RotaryOf | None = None, window: WindowOf | None = None
    ) -> None:
        """The linears of queries, keys and values of "hidden" as one product, and attention over them, into "context"."""

    def linear(self, path: str, reads: str, writes: str, activation: str | None = None, gated: bool = False) -> None:
        """A linear from one quantized slot to another; `activation` names a setting of the model's configuration.

        With `gated` its result is activation(first half of the channels) * second half.
        """

    def linear_add_norm(self, linear: str, norm: str, reads: str) -> None:
        """Post-norm: LayerNorm(linear + "hidden"), into "hidden"."""

    def linear_add(self, linear: str, norm: str, reads: str) -> None:
        """Pre-norm: linear + "hidden", into "hidden", with the codes of its norm."""

    def linear_add_last(self, linear: str, norm: str, reads: str) -> None:
        """The same at the end of a layer: the norm is the next layer's. After the last layer it is the encoder's final norm,
        which then is "hidden" itself.
        """


def post_norm_layer(b: LayerBuilder, paths: LayerPaths) -> None:
    """BERT's layer (Devlin et al., 2019): attention, then a feed-forward network, each added to its input and normed."""
    b.attention(*paths.qkv)
    b.linear_add_norm(paths.attention_output, paths.attention_norm, reads="context")
    b.linear(paths.ffn_in, reads="hidden", writes="inner", activation="activation")
    b.linear_add_norm(paths.ffn_out, paths.output_norm, reads="inner")


@dataclass(frozen=True)
class PositionTable:
    """What the counting of positions must know of a model's position table.

    Attributes:
        rows: of the table.
        padding_idx: of the table, where positions start after it.
    """

    rows: int
    padding_idx: int | None


# (columns (t,) of packed tokens, input_ids (batch, width) or None, how to pack (batch, width), table) -> positions (t,)
Positions = Callable[[Tensor, "Tensor | None", Callable[[Tensor], Tensor], PositionTable], Tensor]


def positions_by_column(
    columns: Tensor, input_ids: Tensor | None, pack: Callable[[Tensor], Tensor], table: PositionTable
) -> Tensor:
    """Columns of the padded batch, from 0 on."""
    return columns


def positions_after_padding(
    columns: Tensor, input_ids: Tensor | None, pack: Callable[[Tensor], Tensor], table: PositionTable
) -> Tensor:
    """Tokens that are not padding, counted from padding_idx + 1 on (RoBERTa); columns where no ids say what is padding."""
    padding = int(table.padding_idx or 0)
    if input_ids is None:
        return columns + padding + 1
    there = input_ids.ne(padding).to(torch.int64)
    return pack(there.cumsum(1) * there + padding)


def layers_in_order(encoder: Any, layers: str) -> dict[str, str]:
    """A list of layers, each called once."""
    return {f"{layers}.{index}": f"{layers}.{index}" for index in range(len(encoder.get_submodule(layers)))}


def pooled_by_module(encoder: Any, hidden: Tensor) -> Tensor | None:
    """(batch, h) of the last hidden states (batch, width, h), by the encoder's pooler; None where it was made without."""
    pooled: Tensor | None = None if encoder.pooler is None else encoder.pooler(hidden)
    return pooled


@dataclass(frozen=True)
class Reshaping:
    """Where an encoder says its sizes, which change when layers, heads or neurons are taken out of it.

    Attributes:
        layers, ffn: names in the model's configuration: how many layers, and the width of their feed-forward networks.
        heads, width: attributes of an attention module: how many heads it has, and their channels together; None where it
            has no such attribute.
        biased: heads have biases of their own in a table that all layers share, so an attention module must say which
            heads it kept (`qbert.families.mpnet.KEPT_HEADS`).
    """

    layers: str = "num_hidden_layers"
    ffn: str = "intermediate_size"
    heads: str = "num_attention_heads"
    width: str | None = "all_head_size"
    biased: bool = False


def no_obstacle(encoder: Any) -> str | None:
    """None: every encoder of the family whose modules are what they should be can be fused."""
    return None


@dataclass(frozen=True)
class Reader:
    """A model around an encoder whose own forward takes the first token of each sequence, and no other, of what it gives.

    Attributes:
        classes: of the model, a star standing as in `Part`.
        takes: the attribute of the model that is called with all hidden states, and its class, which takes the first; None
            where the model itself does, or the encoder's pooler.
        settings: of the model's configuration: name -> the value with which that is so.
    """

    classes: tuple[str, ...]
    takes: tuple[str, str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


POOLED = Reader(("*ForSequenceClassification", "*ForMultipleChoice", "*ForNextSentencePrediction"))
CLASSIFIED = Reader(("*ForSequenceClassification",), takes=("classifier", "*ClassificationHead"))


@dataclass(frozen=True)
class EncoderFamily:
    """One architecture of encoder.

    Attributes:
        name: as people call it.
        models: qualified names of the classes of the bare encoder. A subclass may compute something else, so it is not one.
        arguments: names of the positional arguments of its `forward`.
        output: class in ``transformers.modeling_outputs`` that `forward` returns.
        embeddings, layers, layer: attribute paths; `layers` is the list of layers, or of groups of them.
        pool: the pooled output of an encoder and its last hidden states; None where a family has none.
        poolers: first components of the paths of the modules that `pool` calls.
        readers: models around the encoder that take nothing but first tokens.
        positions: how it counts positions.
        skips_padding: positions start after the table's padding_idx.
        distances: path of the module that says what the distance between two tokens does to their attention. Distances are
            those in the padded batch, so there a row's tokens must stand side by side. None where attention knows none.
        program: writes the steps of one layer.
        calls: (encoder, `layers`) -> in order, a name for each call of a layer -> the path of that layer.
        final_norm: path of the norm after the last layer of a pre-norm family.
        settings: names in the model's configuration: of "heads" and "activation".
        reads: other names there that say what the encoder computes.
        collects: its `forward` collects hidden states by itself: all or none, and beside them in a tuple the place of a pooler
            that is not there.
        obstacle: why an encoder of it cannot be fused though its modules are what they should be; None where it can.
        reshaping: how layers, heads and neurons are taken out of it; a string says why they cannot be.
        stock: every module but its linears, norms and tables: attribute path -> what must stand there; a star stands for an
            index of a list. A module that is not named here is an obstacle, and so is one that is missing.
    """

    name: str
    models: tuple[str, ...]
    arguments: tuple[str, ...]
    output: str
    embeddings: EmbeddingPaths
    layers: str
    layer: LayerPaths
    stock: Mapping[str, Part]
    pool: Callable[[Any, Tensor], Tensor | None] | None = pooled_by_module
    poolers: tuple[str, ...] = ("pooler",)
    readers: tuple[Reader, ...] = (POOLED,)
    positions: Positions = positions_by_column
    skips_padding: bool = False
    distances: str | None = None
    program: Callable[[LayerBuilder, LayerPaths], None] = post_norm_layer
    calls: Callable[[Any, str], dict[str, str]] = layers_in_order
    final_norm: str | None = None
    settings: dict[str, str] = field(
        default_factory=lambda: {"heads": "num_attention_heads", "activation": "hidden_act"}
    )
    reads: tuple[str, ...] = ()
    collects: bool = False
    obstacle: Callable[[Any], str | None] = no_obstacle
    reshaping: Reshaping | str = field(default_factory=Reshaping)

    def setting(self, config: Any, name: str) -> Any:
        """A setting of the model's configuration."""
        return getattr(config, self.settings[name])

    def called(self, name: str) -> bool:
        """Whether a fused encoder still calls the module of that qualified name: itself, and what pools."""
        return not name or name.partition(".")[0] in self.poolers
