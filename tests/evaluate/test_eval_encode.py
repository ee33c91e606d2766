"""Embeddings do not depend on the batch, nothing is cut silently, and nothing odd crashes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbert.errors import QBertError
from qbert.evaluate import Dataset, encode, encode_texts, load_fp32
from qbert.evaluate.encode import batches_by_length, checked_max_length

Tiny = tuple[Any, Any]
LONG = "cat " * 50  # 52 tokens for a model of 32


def _by_hand(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)


def test_equals_one_text_at_a_time(tiny: Tiny, made_up_dataset: Callable[..., Dataset]) -> None:
    texts = made_up_dataset(40).texts
    vectors = encode(*tiny, texts, batch_tokens=64)
    assert vectors.shape == (40, 32)
    assert vectors.dtype == torch.float32
    expected = torch.stack([_by_hand(*tiny, text) for text in texts])
    assert torch.allclose(vectors, expected, atol=1e-6)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(40))


def test_cls_pooling(tiny: Tiny) -> None:
    model, tokenizer = tiny
    with torch.no_grad():
        first = model(**tokenizer("red cat", return_tensors="pt")).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(first, dim=1)
    assert torch.allclose(encode(model, tokenizer, ["red cat"], pooling="cls"), expected, atol=1e-6)


def test_padding_with_nan_in_it_does_not_spread(tiny: Tiny) -> None:
    """A kernel may leave anything at padding."""
    model, tokenizer = tiny
    alone = encode(model, tokenizer, ["red", "the old cat is here"], batch_tokens=1)

    def spoil(_module: Any, _args: Any, kwargs: Any, output: Any) -> Any:
        output.last_hidden_state[kwargs["attention_mask"] == 0] = torch.nan
        return output

    handle = model.register_forward_hook(spoil, with_kwargs=True)
    assert torch.allclose(encode(model, tokenizer, ["red", "the old cat is here"]), alone, atol=1e-6)
    handle.remove()


def test_too_long_is_counted_and_warned_about(tiny: Tiny) -> None:
    encoded = encode_texts(*tiny, [LONG, "red", LONG + "dog"])
    assert encoded.n_truncated == 2
    assert encoded.n_tokens == 32 + 3 + 32
    with pytest.warns(UserWarning, match="1 of 2 texts were longer"):
        encode(*tiny, ["red", LONG])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(*tiny, ["cat " * 30])  # with [CLS] and [SEP] exactly 32


def test_truncation_keeps_the_beginning_and_the_end_token(tiny: Tiny) -> None:
    long = encode_texts(*tiny, [LONG]).embeddings
    assert torch.allclose(long, encode(*tiny, ["cat " * 30]), atol=1e-6)


def test_a_text_of_100k_tokens(tiny: Tiny) -> None:
    encoded = encode_texts(*tiny, ["cat dog " * 50_000])
    assert encoded.n_truncated == 1
    assert encoded.n_tokens == 32


@pytest.mark.parametrize("text", ["", " \n\t", "\x00", "😀", "a" * 5000, "é\u0301\u200b"])
def test_odd_texts(text: str, tiny: Tiny) -> None:
    vectors = encode(*tiny, [text, "red"])
    assert torch.isfinite(vectors).all()


def test_no_texts(tiny: Tiny) -> None:
    assert encode(*tiny, []).shape == (0, 32)


def test_max_length(tiny: Tiny) -> None:
    assert encode_texts(*tiny, ["red cat is old"], max_length=4).n_truncated == 1
    for bad in (2, 33):
        with pytest.raises(QBertError, match=f"max_length {bad}: allowed are 3 to 32"):
            encode(*tiny, ["red"], max_length=bad)


def test_models_that_count_positions_from_two() -> None:
    tokenizer = SimpleNamespace(model_max_length=10**30)
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=514, model_type="roberta"))
    assert checked_max_length(model, tokenizer) == 512
    model.config.model_type = "bert"
    assert checked_max_length(model, tokenizer) == 514


def test_bad_arguments(tiny: Tiny) -> None:
    with pytest.raises(QBertError, match="pooling 'max': allowed are mean, cls"):
        encode(*tiny, ["red"], pooling="max")
    with pytest.raises(QBertError, match="batch_tokens 0"):
        encode(*tiny, ["red"], batch_tokens=0)


def test_nan_weights_are_an_error_not_a_figure(tiny: Tiny) -> None:
    model, tokenizer = tiny
    with torch.no_grad():
        row = tokenizer.convert_tokens_to_ids("dog")
        model.embeddings.word_embeddings.weight[row] = torch.nan
    with pytest.raises(QBertError, match="NaN or Inf for 1 of 3 texts, first text 1"):
        encode(model, tokenizer, ["cat", "dog", "owl"], batch_tokens=1)


def test_mode_of_the_model_is_kept_and_dropout_off(tiny: Tiny) -> None:
    model, tokenizer = tiny
    model.train()
    assert torch.equal(encode(model, tokenizer, ["red cat"]), encode(model, tokenizer, ["red cat"]))
    assert model.training


def test_progress(tiny: Tiny) -> None:
    seen: list[tuple[int, int]] = []
    encode(*tiny, ["red", "red cat", "cat"], batch_tokens=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_classifier_gives_logits_and_the_encoders_embeddings(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model, tokenizer = tiny
    classifier = BertForSequenceClassification(model.config).eval()
    classifier.bert.load_state_dict(model.state_dict())
    texts = ["red", "the old cat is here"]
    encoded = encode_texts(classifier, tokenizer, texts)
    assert torch.allclose(encoded.embeddings, encode(model, tokenizer, texts), atol=1e-6)
    assert encoded.logits is not None
    with torch.no_grad():
        expected = torch.cat([classifier(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(encoded.logits, expected, atol=1e-6)
    classifier.save_pretrained(tmp_path)
    assert type(load_fp32(str(tmp_path))) is BertForSequenceClassification


def test_another_head_is_skipped(tiny: Tiny) -> None:
    from transformers import BertForMaskedLM

    model, tokenizer = tiny
    masked = BertForMaskedLM(model.config).eval()
    masked.bert.load_state_dict(model.state_dict(), strict=False)
    encoded = encode_texts(masked, tokenizer, ["red cat"])
    assert encoded.logits is None
    assert torch.allclose(encoded.embeddings, encode(model, tokenizer, ["red cat"]), atol=1e-6)


def test_compiled_model(tiny: Tiny) -> None:
    model, tokenizer = tiny
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.allclose(encode(compiled, tokenizer, ["red cat"]), encode(model, tokenizer, ["red cat"]), atol=1e-6)


def test_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(QBertError, match="cannot load the model of") as error:
        load_fp32(str(tmp_path))
    assert "\n" not in str(error.value)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_batches(lengths: list[int], batch_tokens: int) -> None:
    batches = list(batches_by_length(lengths, batch_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


def test_real_encoder_knows_what_is_alike(minilm: Tiny) -> None:
    """Alike above 0.6, unlike below 0.2 (cosines)."""
    a, b, c = encode(*minilm, ["The cat sits outside", "A cat is sitting outdoors", "The new movie is awesome"])
    assert a @ b > 0.6 > 0.2 > a @ c


def test_real_encoder_with_a_text_of_100k_tokens(minilm: Tiny) -> None:
    encoded = encode_texts(*minilm, ["hello world " * 50_000, ""])
    assert (encoded.n_truncated, encoded.n_tokens) == (1, 512 + 2)
    assert torch.isfinite(encoded.embeddings).all()
