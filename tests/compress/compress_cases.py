"""Texts of a made-up language, and tokenizers of it that fit the small encoders."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = 97  # rows of the small encoders' tables
_SYLLABLES = ("ka", "lo", "mi", "tu", "ser", "an", "po", "ri", "ve", "do")


def make_texts(count: int, seed: int = 0, words: int = 9) -> list[str]:
    rng = random.Random(seed)
    made = lambda: "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 3)))
    return [" ".join(made() for _ in range(rng.randint(3, words))) for _ in range(count)]


TEXTS = make_texts(40)


@functools.cache
def _backend(kind: str) -> str:
    corpus = make_texts(400, seed=7)
    if kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, unk_token="<unk>")
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL)
    made.train_from_iterator(corpus, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", made.token_to_id("<s>")), ("</s>", made.token_to_id("</s>"))]
    )
    return str(made.to_str())


def tokenizer(name: str = "BertModel", kind: str = "WordPiece") -> Any:
    """A tokenizer of 97 pieces or fewer, of the kind, that gives what a model of that name takes."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)), bos_token="<s>", cls_token="<s>", pad_token="<pad>",
        eos_token="</s>", sep_token="</s>", unk_token="<unk>", mask_token="<mask>", model_max_length=30,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def same_state(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same tensors under the same names."""
    state, wanted = model.state_dict(), other.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[name], each) for name, each in wanted.items())
