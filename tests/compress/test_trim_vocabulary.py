"""Vocabularies trimmed: texts whose pieces survive keep their bits, and everybody learns of the new ids."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_cases import TEXTS, make_texts, same_state, tokenizer
from small_encoders import float_model, hidden_of
from torch import Tensor
from transformers import AutoTokenizer

import qbert
from qbert import QBertError
from qbert.compress import trim_vocabulary_, vocabulary
from qbert.compress.pieces import Pieces, chosen
from qbert.shapes import plan_of

KINDS = ("WordPiece", "Unigram", "BPE")
SIZE = 64


def encoded(model: Any, tok: Any, text: str) -> tuple[list[str], Tensor]:
    inputs = tok(text, return_tensors="pt")
    return tok.convert_ids_to_tokens(inputs["input_ids"][0].tolist()), hidden_of(model, **inputs)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("BertModel", kind) for kind in KINDS), ("MPNetModel", "WordPiece")],
)
def test_a_text_whose_pieces_survive_has_the_same_bits(name: str, kind: str) -> None:
    model, tok = float_model(name, pad_token_id=1), tokenizer(kind=kind)
    old_model, old_tok = copy.deepcopy(model), copy.deepcopy(tok)
    report = trim_vocabulary_(model, tok, TEXTS, size=SIZE)
    kept, same = set(tok.get_vocab()), 0
    assert len(tok) == SIZE == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    for text in (*TEXTS, *make_texts(30, seed=3)):
        pieces, expected = encoded(old_model, old_tok, text)
        if set(pieces) <= kept:
            now, found = encoded(model, tok, text)
            assert now == pieces
            assert torch.equal(found, expected)
            same += 1
        assert tok.unk_token not in tok.tokenize(text)  # nothing new is unknown
    assert 0 < same < len(TEXTS) + 30
    assert 0 < report.untouched <= 1
    assert report.unknown == 0
    assert "have the same bits" in str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, tok = float_model(), tokenizer(kind=kind)
    trim_vocabulary_(model, tok, TEXTS, size=SIZE)
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tok.get_vocab()
    assert [again(text)["input_ids"] for text in TEXTS] == [tok(text)["input_ids"] for text in TEXTS]
    assert again.decode(again(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]


def test_special_ids_are_renumbered_everywhere() -> None:
    model, tok = float_model(pad_token_id=0), tokenizer()
    state = json.loads(tok.backend_tokenizer.to_str())
    model.config.sep_token_id = tok.sep_token_id
    trim_vocabulary_(model, tok, TEXTS, size=SIZE)
    assert model.config.sep_token_id == tok.sep_token_id
    ids = tok(TEXTS[0])["input_ids"]
    assert (ids[0], ids[-1]) == (tok.cls_token_id, tok.sep_token_id)
    assert state["added_tokens"][0]["content"] == "<s>"


def test_it_composes_with_layers_quantized_tables_and_files(tmp_path: Path) -> None:
    model, tok = float_model(pad_token_id=1), tokenizer()
    trim_vocabulary_(model, tok, TEXTS, size=80)
    trim_vocabulary_(model, tok, TEXTS, size=SIZE)
    qbert.drop_layers_(model, TEXTS, keep=1, tokenizer=tok)
    qbert.quantize_(model, qbert.Recipe("w8a8", "w8"), fuse=True)
    model.save_pretrained(tmp_path)
    again = qbert.load(tmp_path)
    inputs = tok(TEXTS[:1], return_tensors="pt")
    assert torch.equal(hidden_of(again, **inputs), hidden_of(model, **inputs))
    assert "1 of 2 layers (0)" in str(plan_of(again)) or "1 of 2 layers (1)" in str(plan_of(again))
    assert "vocabulary 64 of 97" in str(plan_of(again))


def test_the_most_frequent_pieces_stay() -> None:
    tok = tokenizer()
    pieces = Pieces.of(tok)
    required = pieces.required()
    counts = [0] * len(tok)
    frequent = max(set(range(len(tok))) - required)
    counts[frequent] = 5
    kept = chosen(pieces, counts, len(required) + 1, set())
    assert set(kept) == required | {frequent}
    assert kept == sorted(kept)


def test_bpe_keeps_what_leads_to_a_piece() -> None:
    pieces = Pieces.of(tokenizer(kind="BPE"))
    parents = pieces.parents()
    grown = max(parents, key=lambda each: len(next(name for name, index in pieces.names.items() if index == each)))
    counts = [0] * len(pieces.names)
    counts[grown] = 1
    kept = set(chosen(pieces, counts, len(pieces.required()) + 6, set()))
    assert grown in kept
    assert all(set(parents[each]) <= kept for each in kept if each in parents)


def test_unused_pieces_go_first() -> None:
    pieces = Pieces.of(tokenizer())
    names = {**pieces.names, "[unused0]": len(pieces.names)}
    more = Pieces(pieces.state, pieces.kind, names)
    assert more.unused() == {len(pieces.names)}


@pytest.mark.parametrize(
    ("size", "texts", "said"),
    [(3, TEXTS, "size is 3; allowed: "), (98, TEXTS, "size is 98"), (SIZE, TEXTS[:9], "9 texts"), (SIZE, "x", "str")],
)
def test_bad_input_leaves_model_and_tokenizer_as_they_were(size: int, texts: Any, said: str) -> None:
    model, before, tok, tok_before = float_model(), float_model(), tokenizer(), tokenizer()
    with pytest.raises(QBertError, match=said):
        trim_vocabulary_(model, tok, texts, size=size)
    assert same_state(model, before)
    assert tok.get_vocab() == tok_before.get_vocab()


def test_an_error_on_the_way_leaves_both_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before, tok = float_model(pad_token_id=1), float_model(pad_token_id=1), tokenizer()

    def broken(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(vocabulary, "_renumber", broken)
    with pytest.raises(RuntimeError):
        trim_vocabulary_(model, tok, TEXTS, size=SIZE)
    assert same_state(model, before)
    assert model.config.vocab_size == 97
    assert tok.get_vocab() == tokenizer().get_vocab()


def test_what_cannot_be_trimmed_says_why() -> None:
    tok = tokenizer()
    with pytest.raises(QBertError, match="head over its vocabulary"):
        trim_vocabulary_(float_model("BertForMaskedLM"), tok, TEXTS, size=SIZE)
    with pytest.raises(QBertError, match="not this model's"):
        trim_vocabulary_(float_model(vocab_size=50), tok, TEXTS, size=40)
    with pytest.raises(QBertError, match="comes before quantizing"):
        trim_vocabulary_(qbert.quantize_(float_model()), tok, TEXTS, size=SIZE)
    with pytest.raises(QBertError, match="no fast tokenizer"):
        trim_vocabulary_(float_model(), object(), TEXTS, size=SIZE)
