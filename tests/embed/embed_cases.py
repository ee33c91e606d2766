"""A small encoder with MiniLM's tokenizer and files of sentence-transformers' beside it, and texts for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import qbert
from qbert import QBertError
from qbert.zoo import resolve_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "wizards",
    "brew",
    "tea",
    "in",
    "paris",
)
STAGES = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]


def texts(count: int) -> list[str]:
    """Of 1 to 40 words, each another."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 41, (count,), generator=generator).tolist()
    picks = torch.randint(0, len(WORDS), (count, 40), generator=generator).tolist()
    return [
        f"{index} " + " ".join(WORDS[p] for p in pick[:n])
        for index, (n, pick) in enumerate(zip(lengths, picks, strict=True))
    ]


def write_pipeline(folder: Path, pooling: dict[str, object], stages: list[tuple[str, str, str]] = STAGES) -> None:
    """sentence-transformers' files."""
    rows = [
        {"idx": int(n), "name": n, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, path, kind in stages
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))


def small_encoder(folder: Path) -> Path:
    """A float pipeline: mean pooling, length 1."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    except QBertError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES), add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pipeline(folder, {"pooling_mode_mean_tokens": True})
    return folder


def quantized_encoder(source: Path, folder: Path) -> Path:
    """The same as a fused checkpoint."""
    from qbert.workflow import quantize_checkpoint

    quantize_checkpoint(str(source), folder, qbert.Recipe("w8a8", "w8"), fuse=True)
    return folder
