"""L1. What BERT-type models are made of, as data: which modules stay float by default, and where an encoder's parts are."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Task heads: small, at the end, and trained for one task; their error goes straight into the answer. transformers' own
# default skip list is made for decoders and protects nothing in an encoder. A name is matched as a whole component of a
# module's qualified name. The pooler is part of the encoder, as in the GOBO paper.
TASK_HEADS: tuple[str, ...] = (
    "classifier",  # ...ForSequenceClassification, ...ForTokenClassification, ...ForMultipleChoice
    "pre_classifier",  # DistilBERT
    "cls",  # BertForMaskedLM, BertForNextSentencePrediction, BertForPreTraining
    "qa_outputs",  # ...ForQuestionAnswering
    "score",
    "lm_head",  # RoBERTa, MPNet
    "vocab_transform",  # DistilBERT
    "vocab_projector",  # DistilBERT
    "generator_predictions",  # ELECTRA
    "generator_lm_head",  # ELECTRA
    "discriminator_predictions",  # ELECTRA
    "classification_head",
    "sequence_summary",
)

# Tables whose rows are not words: a handful of biases added to attention scores in every layer.
SCORE_TABLES: tuple[str, ...] = ("relative_attention_bias",)

KEEP_FLOAT: tuple[str, ...] = TASK_HEADS + SCORE_TABLES


@dataclass(frozen=True)
class EmbeddingPaths:
    """Where an encoder's embeddings are, as attribute paths from the encoder.

    Attributes:
        words, positions, token_types: tables; the third is None where a family has no token types.
        norm: LayerNorm over their sum.
        projection: linear to the hidden size; None where there never is one.
    """

    words: str
    positions: str
    token_types: str | None
    norm: str
    projection: str | None = None


@dataclass(frozen=True)
class LayerPaths:
    """Where the parts of one encoder layer are, as attribute paths from the layer, in the order in which a token meets them."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    output_norm: str


@dataclass(frozen=True)
class EncoderFamily:
    """One architecture of encoder: post-norm layers of attention and a feed-forward network.

    Attributes:
        name: as people call it.
        models: qualified names of the classes of the bare encoder. A subclass may compute something else, so it is not one.
        arguments: names of the positional arguments of its `forward`.
        output: class in ``transformers.modeling_outputs`` that `forward` returns.
        embeddings, layers, layer: attribute paths; `layers` is the list of layers.
        pooler: attribute of the module that pools the last hidden states; None where a family has none.
        positions_skip_padding: positions count the tokens that are not padding, from padding_idx + 1 on, where the others
            count columns from 0 on.
        heads, activation: names in the model's configuration.
    """

    name: str
    models: tuple[str, ...]
    arguments: tuple[str, ...]
    output: str
    embeddings: EmbeddingPaths
    layers: str
    layer: LayerPaths
    pooler: str | None
    positions_skip_padding: bool = False
    heads: str = "num_attention_heads"
    activation: str = "hidden_act"


_BERT_ARGUMENTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "encoder_hidden_states",
    "encoder_attention_mask", "past_key_values", "use_cache",
)  # fmt: skip
_BERT_EMBEDDINGS = EmbeddingPaths(
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    token_types="embeddings.token_type_embeddings",
    norm="embeddings.LayerNorm",
)
_BERT_LAYER = LayerPaths(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    output_norm="output.LayerNorm",
)
_BERT = EncoderFamily(
    name="BERT",
    models=("transformers.models.bert.modeling_bert.BertModel",),
    arguments=_BERT_ARGUMENTS,
    output="BaseModelOutputWithPoolingAndCrossAttentions",
    embeddings=_BERT_EMBEDDINGS,
    layers="encoder.layer",
    layer=_BERT_LAYER,
    pooler="pooler",
)

FAMILIES: tuple[EncoderFamily, ...] = (
    _BERT,
    replace(
        _BERT,
        name="RoBERTa",
        models=(
            "transformers.models.roberta.modeling_roberta.RobertaModel",
            "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaModel",
            "transformers.models.camembert.modeling_camembert.CamembertModel",
        ),
        positions_skip_padding=True,
    ),
    replace(
        _BERT,
        name="ELECTRA",
        models=("transformers.models.electra.modeling_electra.ElectraModel",),
        output="BaseModelOutputWithPastAndCrossAttentions",
        embeddings=replace(_BERT_EMBEDDINGS, projection="embeddings_project"),
        pooler=None,
    ),
    EncoderFamily(
        name="DistilBERT",
        models=("transformers.models.distilbert.modeling_distilbert.DistilBertModel",),
        arguments=("input_ids", "attention_mask", "inputs_embeds", "position_ids"),
        output="BaseModelOutput",
        embeddings=replace(_BERT_EMBEDDINGS, token_types=None),
        layers="transformer.layer",
        layer=LayerPaths(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            attention_output="attention.out_lin",
            attention_norm="sa_layer_norm",
            ffn_in="ffn.lin1",
            ffn_out="ffn.lin2",
            output_norm="output_layer_norm",
        ),
        pooler=None,
        heads="n_heads",
        activation="activation",
    ),
)
_BY_CLASS = {model: family for family in FAMILIES for model in family.models}


def family_of(model: object) -> EncoderFamily | None:
    """The family of a bare encoder, None for anything else (a head model is not one, the encoder inside it is)."""
    return _BY_CLASS.get(f"{type(model).__module__}.{type(model).__qualname__}")
