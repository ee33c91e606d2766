"""Which modules of BERT-type models stay float by default."""

from __future__ import annotations

# Task heads: small, at the end, and trained for one task; their error goes straight into the answer. transformers' own
# default skip list is made for decoders and protects nothing in an encoder. A name is matched as a whole component of a
# module's qualified name, the last one where it ends in "$". The pooler is part of the encoder, as in the GOBO paper.
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
    "predictions",  # ALBERT
    "sop_classifier",  # ALBERT
    "lm_predictions",  # DeBERTa
    "head",  # ModernBERT
    "decoder$",  # ModernBERT; encoder-decoder models have layers below a decoder of theirs, which is no head
    "qa_classifier",  # BigBird
)

# What attention scores are made of beside queries and keys, where an error is one of all tokens: tables whose rows are not
# words, and DeBERTa's products over a few heads. DeBERTa reads its table's weight, past the table's forward.
SCORE_TABLES: tuple[str, ...] = (
    "relative_attention_bias",  # MPNet
    "rel_embeddings",  # DeBERTa
    "head_logits_proj",  # DeBERTa, "talking heads"
    "head_weights_proj",
)

KEEP_FLOAT: tuple[str, ...] = TASK_HEADS + SCORE_TABLES
