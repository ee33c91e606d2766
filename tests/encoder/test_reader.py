"""Callers that read nothing but first tokens: the last layer computes those alone, with the same bits, and for nobody else."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from typing import Any

import pytest
import torch
import transformers
from small_encoders import A8, CONFIGS, VARIANTS, encoder_of, fused_model, padded_batch
from torch import Tensor, nn
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

import qbert
from qbert.encoder import forward, fused_forward
from qbert.metrics import sqnr_db

READERS = [
    f"{name}{kind}"
    for name in CONFIGS
    for kind in ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
    if hasattr(transformers, f"{name}{kind}") and name + kind != "ElectraForMultipleChoice"
]
OTHERS = [
    f"{name}{kind}"
    for name in ("Bert", "Roberta", "ModernBert")
    for kind in ("ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were computed alone in the last layer, call by call."""
    calls: list[int] = []
    inner = forward._first_tokens

    def counted(*args: Any) -> Any:
        states = inner(*args)
        calls.append(len(states[-1]))  # type: ignore[arg-type]
        return states

    monkeypatch.setattr(forward, "_first_tokens", counted)
    return calls


def _reader(name: str, **options: Any) -> Any:
    pools = {"classifier_pooling": "cls"} if name.startswith("ModernBert") else {}
    return fused_model(name, **options, **pools)


def _batch(name: str, **options: Any) -> dict[str, Tensor]:
    batch = padded_batch(**options)
    return {key: value[None] for key, value in batch.items()} if "MultipleChoice" in name else batch


@torch.no_grad()
def _both(model: Any, batch: dict[str, Tensor], alone: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Logits, those that come with every token's hidden states, and what was computed alone for the first of the two."""
    alone.clear()
    first, calls = model(**batch).logits, list(alone)
    return first, model(**batch, output_hidden_states=True).logits, calls


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", READERS)
def test_same_logits_bit_for_bit(name: str, variant: str, alone: list[int]) -> None:
    model = _reader(name, variant=variant if "MultipleChoice" not in name else "dynamic")
    first, every, calls = _both(model, _batch(name), alone)
    assert calls == [4]
    assert torch.equal(first, every)
    assert alone == [4]  # asked-for hidden states are everybody's


@pytest.mark.parametrize("scheme", A8)
@pytest.mark.parametrize("name", ["Bert", "MPNet", "ModernBert"])
def test_every_scheme(name: str, scheme: str, alone: list[int]) -> None:
    first, every, calls = _both(_reader(f"{name}ForSequenceClassification", recipe=scheme), padded_batch(), alone)
    assert calls == [4]
    assert torch.equal(first, every)


@pytest.mark.parametrize("name", OTHERS)
def test_heads_of_all_tokens_get_all(name: str, alone: list[int]) -> None:
    fused_model(name)(**padded_batch())
    assert alone == []


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_rows_that_begin_with_padding_take_the_long_way(kind: str, alone: list[int]) -> None:
    first, every, calls = _both(_reader("BertForSequenceClassification"), padded_batch(kind=kind), alone)
    assert calls == []
    assert torch.equal(first, every)


def test_portions_batches_and_threads_do_not_show(alone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _reader("MPNetForSequenceClassification", variant="static"), padded_batch(9, 17)
    whole, every, _ = _both(model, batch, alone)
    assert torch.equal(whole, every)
    monkeypatch.setattr("qbert.encoder.run.tokens_at_once", lambda target: 20)
    assert torch.equal(model(**batch).logits, whole)
    for row in range(9):  # the classifier is float, and its last bit depends on the batch
        one = model(**{name: each[row : row + 1] for name, each in batch.items()}).logits
        torch.testing.assert_close(one, whole[row : row + 1], rtol=1e-5, atol=1e-5)
    assert alone == [9, 9, *[1] * 9]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_a_bad_token_spoils_its_sequence(name: str, variant: str, alone: list[int]) -> None:
    model, mask = _reader(f"{name}ForSequenceClassification", variant=variant), padded_batch(4, 8)["attention_mask"]
    embeds = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))
    clean = model(inputs_embeds=embeds, attention_mask=mask).logits
    embeds[1, 2, 3] = torch.nan
    spoiled = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[[0, 2, 3]], clean[[0, 2, 3]])
    assert alone == [4, 4]


def test_the_program_says_what_it_saves() -> None:
    model = encoder_of(_reader("BertForSequenceClassification"))
    model(**padded_batch())
    program = fused_forward(model).encoder().program  # type: ignore[union-attr]
    assert "only first tokens read: encoder.layer.1" in str(program)
    lengths, h, ffn = (5, 9), 64, 128
    saved = sum(step.cost(lengths).macs for step in program.layers[-1].steps) - sum(
        step.cost(lengths).macs for step in program.last_of_first.steps
    )
    without_query = 14 - 2  # tokens whose query, attention output and feed-forward are not computed
    pairs = 5 * 5 + 9 * 9 - (5 + 9)
    assert saved == without_query * (2 * h * h + 2 * h * ffn) + 2 * h * pairs


# ---- whoever else looks on gets everything ----------------------------------------------------------------------------


class _Mean(RobertaClassificationHead):
    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(features.mean(1, keepdim=True), **kwargs)


class _MeanPooler(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(1)


class _Subclass(transformers.BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.bert(*args, **kwargs).last_hidden_state


EDITS: dict[str, tuple[str, Any]] = {
    "another classifier": ("Roberta", lambda m: setattr(m.classifier, "__class__", _Mean)),
    "a classifier's forward": (
        "Roberta", lambda m: setattr(m.classifier, "forward", lambda x: x.mean(1)[:, :2]),
    ),
    "a hook on the classifier": ("Roberta", lambda m: m.classifier.register_forward_hook(lambda *_: None)),
    "another pooler": ("Bert", lambda m: setattr(m.bert, "pooler", _MeanPooler())),
    "a hook on the pooler": ("Bert", lambda m: m.bert.pooler.register_forward_pre_hook(lambda *_: None)),
    "a hook on the encoder": ("Bert", lambda m: m.bert.register_forward_hook(lambda *_: None)),
    "a model's forward": (
        "Bert", lambda m: setattr(m, "forward", types.MethodType(lambda self, **given: self.bert(**given), m)),
    ),
    "a subclass": ("Bert", lambda m: setattr(m, "__class__", _Subclass)),
    "pooling of all": ("ModernBert", lambda m: setattr(m.config, "classifier_pooling", "mean")),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_whoever_may_read_more_gets_more(edit: str, alone: list[int]) -> None:
    name, change = EDITS[edit]
    model, batch = _reader(f"{name}ForSequenceClassification"), padded_batch(kind="none")
    model(**batch)
    assert alone.pop() == 4
    change(model)
    found = model(**batch)
    assert alone == []
    qbert.unfuse_(encoder_of(model))
    expected = model(**batch)
    take = lambda out: out if isinstance(out, Tensor) else out[0]
    assert sqnr_db(take(expected), take(found)) > 10  # logits are small beside what they are summed from


def test_a_replaced_method_of_the_class(alone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = _reader("BertForSequenceClassification"), transformers.BertForSequenceClassification
    monkeypatch.setattr(kind, "forward", lambda self, **given: self.bert(**given).last_hidden_state)
    assert model(**padded_batch()).shape == (4, 11, 64)
    assert alone == []


def test_direct_calls_get_everything(alone: list[int]) -> None:
    model, batch = _reader("BertForSequenceClassification"), padded_batch()
    assert model.bert(**batch).last_hidden_state.shape == (4, 11, 64)
    assert model.bert.forward(**batch).last_hidden_state.shape == (4, 11, 64)
    assert alone == []


def test_copies_pickles_and_tuples(alone: list[int]) -> None:
    model, batch = _reader("BertForSequenceClassification"), padded_batch()
    expected = model(**batch).logits
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(**batch, return_dict=False)[0], expected)
    assert alone == [4, 4, 4]


def test_new_weights_of_the_last_layer_are_seen(alone: list[int]) -> None:
    model, batch = _reader("BertForSequenceClassification", variant="static"), padded_batch()
    before = model(**batch).logits
    model.bert.encoder.layer[1].output.LayerNorm.weight.data.mul_(1.5)
    first, every, calls = _both(model, batch, alone)
    assert calls == [4]
    assert torch.equal(first, every)
    assert not torch.equal(first, before)


def test_where_no_kernel_attends_first_tokens_alone(alone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _reader("MPNetForSequenceClassification")(**padded_batch()).logits
    monkeypatch.setattr("qbert.encoder.steps.attends_first", lambda *_: False)
    for variant in VARIANTS:
        model = _reader("MPNetForSequenceClassification", variant=variant)
        first, every, calls = _both(model, padded_batch(), alone)
        assert calls == [4]
        assert torch.equal(first, every)
        assert variant == "static" or torch.equal(first, expected)


# ---- sentence-transformers, as it calls its encoder ---------------------------------------------------------------------

_LIBRARY = """
from torch import nn

class Transformer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features):
        features["token_embeddings"] = self.model.forward(**features)[0]
        return features

class Pooling(nn.Module):
    def __init__(self, mode, include_prompt=True):
        super().__init__()
        self.pooling_mode, self.include_prompt = mode, include_prompt

    def forward(self, features):
        tokens = features["token_embeddings"]
        features["sentence_embedding"] = tokens[:, 0] if self.pooling_mode == "cls" else tokens.mean(1)
        return features

class Normalize(nn.Module):
    def forward(self, features):
        features["sentence_embedding"] = nn.functional.normalize(features["sentence_embedding"])
        return features

class SentenceTransformer(nn.Sequential):
    def forward(self, features):
        for module in self:
            features = module(features)
        return features

    def encode(self, batch, output_value="sentence_embedding"):
        return self(dict(batch))[output_value]
"""


@pytest.fixture
def library(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of that name with the same classes and calls; the real one is not among the packages of the tests."""
    (tmp_path / "sentence_transformers").mkdir()
    (tmp_path / "sentence_transformers" / "__init__.py").write_text(_LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    import sentence_transformers

    yield sentence_transformers
    sys.modules.pop("sentence_transformers", None)


def test_sentence_embeddings_of_first_tokens(library: Any, alone: list[int]) -> None:
    base, batch = fused_model("MPNetModel"), padded_batch()
    model = library.SentenceTransformer(library.Transformer(base), library.Pooling("cls"), library.Normalize())
    found = model.encode(batch)
    assert alone == [4]
    assert torch.equal(found, nn.functional.normalize(base(**batch).last_hidden_state[:, 0]))
    assert model.encode(batch, output_value="token_embeddings").shape == (4, 11, 64)
    assert model(dict(batch))["token_embeddings"].shape == (4, 11, 64)
    assert alone == [4]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[1], "pooling_mode", "mean"),
        lambda m: setattr(m[1], "pooling_mode", ("cls", "mean")),
        lambda m: setattr(m[1], "include_prompt", False),
        lambda m: m[0].register_forward_hook(lambda *_: None),
        lambda m: m.append(nn.Identity()),
    ],
)
def test_embedders_that_may_read_more(library: Any, alone: list[int], change: Any) -> None:
    model = library.SentenceTransformer(library.Transformer(fused_model("MPNetModel")), library.Pooling("cls"))
    change(model)
    model.encode(padded_batch())
    assert alone == []
