"""Which modules of BERT-type models stay float by default."""

from __future__ import annotations

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
