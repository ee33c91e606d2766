"""From texts to figures: baselines, comparisons, a model's own classifier."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qbert.errors import QBertError
from qbert.evaluate import (
    Dataset,
    EvalResult,
    Options,
    Task,
    class_map,
    evaluate,
    load_fp32,
    prepare_baseline,
    score,
    task_data,
)
from qbert.evaluate.run import OTHER_CLASS

Tiny = tuple[Any, Any]
MadeUp = Callable[..., Dataset]


def _rounded(model: Any, levels: int) -> Any:
    """A crude weight quantizer: every row of every matrix to `levels` steps on each side of zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().amax(dim=1, keepdim=True) / levels
                module.weight.copy_((module.weight / scale).round() * scale)
    return model


def _classifier(tiny: Tiny, names: list[str]) -> Any:
    from transformers import BertForSequenceClassification

    config = copy.deepcopy(tiny[0].config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


def test_same_model_has_no_drop(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    baseline = prepare_baseline(*tiny, made_up_dataset())
    result = score(*tiny, baseline)
    assert baseline.score == result.score > 60
    assert result.head == "probe"
    assert (result.n, result.n_train) == (48, 192)
    assert baseline.train_embeddings is not None
    assert baseline.train_embeddings.shape == (192, 32)
    comparison = result.comparison
    assert comparison is not None
    assert baseline.result.comparison is None
    assert (comparison.drop, comparison.flips, comparison.mcnemar_p) == (0, 0, 1)
    assert comparison.drop_interval[0] < 0 < comparison.drop_interval[1]
    assert comparison.cosine_min == pytest.approx(1, abs=1e-6)
    assert comparison.similarity_spearman == pytest.approx(1, abs=1e-6)
    assert result.interval[0] < result.score < result.interval[1]
    assert result.data_sha256 == baseline.data.test.fingerprint()


def test_coarser_weights_are_farther_away(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    model, tokenizer = tiny
    baseline = prepare_baseline(model, tokenizer, made_up_dataset())
    fine, coarse = (score(_rounded(model, levels), tokenizer, baseline).comparison for levels in (127, 2))
    assert fine is not None
    assert coarse is not None
    assert coarse.cosine_mean < fine.cosine_mean < 1
    assert coarse.cosine_min <= coarse.cosine_interval[0] <= coarse.cosine_mean <= coarse.cosine_interval[1]
    assert coarse.similarity_spearman is not None
    assert fine.similarity_spearman is not None
    assert coarse.similarity_spearman < fine.similarity_spearman


def test_flips_add_up(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    model, tokenizer = tiny
    baseline = prepare_baseline(model, tokenizer, made_up_dataset())
    result = score(_rounded(model, 1), tokenizer, baseline)
    comparison = result.comparison
    assert comparison is not None
    assert comparison.flips is not None
    assert comparison.flips_to_wrong is not None
    assert comparison.flips_to_right is not None
    assert comparison.flips == comparison.flips_to_wrong + comparison.flips_to_right > 0  # two classes: no third way
    drop = 100 * (comparison.flips_to_wrong - comparison.flips_to_right) / result.n
    assert comparison.drop == pytest.approx(drop) == pytest.approx(comparison.baseline_score - result.score)


def test_result_is_json_and_back(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    result = score(*tiny, prepare_baseline(*tiny, made_up_dataset()))
    assert EvalResult.model_validate_json(result.model_dump_json()) == result
    record = json.loads(result.model_dump_json())
    with pytest.raises(ValueError, match="extra"):
        EvalResult.model_validate({**record, "surprise": 1})


def test_everything_but_the_clock_is_deterministic(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    model, tokenizer = tiny
    clock = {"seconds": 0.0, "texts_per_second": 0.0}
    first, second = (
        score(_rounded(model, 3), tokenizer, prepare_baseline(model, tokenizer, made_up_dataset())) for _ in range(2)
    )
    assert first.model_copy(update=clock) == second.model_copy(update=clock)


def test_truncated_texts_are_in_the_result(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    data = task_data(made_up_dataset())
    long = replace(data.test, texts=("cat " * 100, *data.test.texts[1:]))
    result = prepare_baseline(*tiny, replace(data, test=long)).result
    assert (result.n_truncated, result.n_train_truncated) == (1, 0)
    shorter = prepare_baseline(*tiny, data, options=Options(max_length=5))
    assert shorter.result.n_truncated > 10
    assert shorter.result.n_train_truncated > 40
    assert score(*tiny, shorter).n_train_truncated == shorter.result.n_train_truncated


def test_own_classifier(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    """Logits decide, and the order of the model's classes is its own affair."""
    data = made_up_dataset()
    classifier, tokenizer = _classifier(tiny, ["Colour", "Animal"]), tiny[1]
    assert class_map(classifier, data.label_names) == [1, 0]
    baseline = prepare_baseline(classifier, tokenizer, task_data(data, n_test=len(data)))
    assert baseline.head == "classifier"
    assert baseline.probe is None
    assert baseline.train_embeddings is None
    with torch.no_grad():
        logits = classifier(**tokenizer(baseline.data.test.texts[0], return_tensors="pt")).logits
    assert baseline.predictions is not None
    assert baseline.predictions[0] == 1 - logits.argmax()
    assert score(classifier, tokenizer, baseline).comparison is not None
    with pytest.raises(QBertError, match="BertModel has none"):
        score(tiny[0], tokenizer, baseline)


def test_class_the_task_lacks_is_a_wrong_answer(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    classifier = _classifier(tiny, ["colour", "plant", "animal"])
    with torch.no_grad():
        classifier.classifier.bias[1] = 100.0
    baseline = prepare_baseline(classifier, tiny[1], made_up_dataset())
    assert baseline.score == 0
    assert baseline.predictions is not None
    assert set(baseline.predictions.tolist()) == {OTHER_CLASS}


def test_default_label_names_fit_numbers(tiny: Tiny) -> None:
    classifier = _classifier(tiny, ["LABEL_0", "LABEL_1"])
    assert class_map(classifier, ("0", "1")) == [0, 1]
    assert class_map(classifier, ("ham", "spam")) is None
    assert class_map(tiny[0], ("0", "1")) is None


def test_classifier_of_other_labels_gets_a_probe(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    baseline = prepare_baseline(_classifier(tiny, ["ham", "spam"]), tiny[1], made_up_dataset())
    assert baseline.head == "probe"


def test_nothing_to_train_a_probe_on(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    data = made_up_dataset()
    with pytest.raises(QBertError, match="no training texts"):
        prepare_baseline(*tiny, task_data(data, n_test=len(data)))
    with pytest.raises(QBertError, match="no texts to score"):
        prepare_baseline(*tiny, task_data(data, n_test=0))


def test_other_width_is_named(tiny: Tiny, made_up_dataset: MadeUp) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(**{**tiny[0].config.to_dict(), "hidden_size": 16})
    with pytest.raises(QBertError, match="16 columns, the baseline's have 32"):
        score(BertModel(config), tiny[1], prepare_baseline(*tiny, made_up_dataset()))


def test_similarity_task(tiny: Tiny) -> None:
    words = ("red", "blue", "cat", "dog", "red cat", "blue dog", "the old cat", "a new dog", "here", "there")
    generator = torch.Generator().manual_seed(0)
    human = torch.rand(10, 10, generator=generator, dtype=torch.float64)
    data = Dataset("pairs", words, similarity=(human + human.T) / 2)
    baseline = prepare_baseline(*tiny, data)
    assert (baseline.head, baseline.result.metric, baseline.predictions) == ("similarity", "pearson", None)
    result = score(_rounded(tiny[0], 1), tiny[1], baseline)
    comparison = result.comparison
    assert comparison is not None
    assert comparison.flips is None
    assert comparison.mcnemar_p is None
    assert comparison.drop_interval[0] <= comparison.drop <= comparison.drop_interval[1]
    assert result.interval[0] < result.score < result.interval[1]


def test_evaluate_by_path(tiny_folder: Path, made_up_dataset: MadeUp) -> None:
    loaded: list[str] = []

    def load(path: str) -> Any:
        from qbert.evaluate import load_fp32

        loaded.append(path)
        return load_fp32(path)

    seen: list[tuple[int, int]] = []
    alone = evaluate(tiny_folder, made_up_dataset(), load=load, progress=lambda *at: seen.append(at))
    assert alone.comparison is None
    assert seen[-1] == (240, 240)
    assert sorted(seen) == seen
    both = evaluate(str(tiny_folder), made_up_dataset(), against=tiny_folder, load=load)
    assert both.comparison is not None
    assert both.comparison.flips == 0
    assert loaded == [str(tiny_folder)] * 3


def test_evaluate_a_model_at_hand(tiny: Tiny, tiny_folder: Path, made_up_dataset: MadeUp) -> None:
    model, tokenizer = tiny
    assert evaluate(_rounded(model, 7), made_up_dataset(), against=tiny_folder).comparison is not None
    assert evaluate(model, made_up_dataset(), tokenizer=tokenizer).n == 48
    with pytest.raises(QBertError, match="pass tokenizer="):
        evaluate(model, made_up_dataset())
    with pytest.raises(QBertError, match="task 'none': allowed are"):
        evaluate(model, "none", tokenizer=tokenizer)


def test_each_model_is_given_its_own_tokens(
    tiny: Tiny, tiny_folder: Path, tmp_path: Path, made_up_dataset: MadeUp
) -> None:
    """The same weights with the words in another order, hence the same figures; with the other's tokens it was nonsense."""
    from transformers import BertTokenizer

    model, tokenizer = tiny
    turned = list(range(5)) + list(reversed(range(5, len(tokenizer))))
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words.copy_(words[turned].clone())
    model.save_pretrained(tmp_path)
    data = made_up_dataset()
    shared = evaluate(tmp_path, data, against=tiny_folder).comparison  # no tokenizer beside it: the original's
    names = tokenizer.convert_ids_to_tokens(turned)
    own = BertTokenizer(vocab={name: i for i, name in enumerate(names)}, model_max_length=tokenizer.model_max_length)
    at_hand = evaluate(model, data, load_fp32(str(tiny_folder)), tokenizer=own, against_tokenizer=tokenizer).comparison
    own.save_pretrained(tmp_path)
    paired = evaluate(tmp_path, data, against=tiny_folder).comparison
    assert shared is not None
    assert paired is not None
    assert at_hand is not None
    assert shared.cosine_min < 0.9
    assert paired.cosine_min == pytest.approx(1, abs=1e-5) == at_hand.cosine_min
    assert paired.flips == 0


def test_a_tokenizer_of_another_vocabulary_is_not_borrowed(
    tiny: Tiny, tiny_folder: Path, made_up_dataset: MadeUp
) -> None:
    model = tiny[0]
    model.resize_token_embeddings(20)
    with pytest.raises(QBertError, match="two vocabularies: 20 words, the original's 25"):
        evaluate(model, made_up_dataset(), against=tiny_folder)


def test_trec_with_minilm_end_to_end(minilm: Tiny, real_task: Callable[[str], Task]) -> None:
    """A small part: the probe is far above the largest class (23%), 8-bit weights cost little, ternary ones a lot."""
    model, tokenizer = minilm
    baseline = prepare_baseline(model, tokenizer, real_task("trec").load().sample(300, 120))
    assert 60 < baseline.score < 92
    eight, ternary = (score(_rounded(model, levels), tokenizer, baseline).comparison for levels in (127, 1))
    assert eight is not None
    assert ternary is not None
    assert abs(eight.drop) < 3
    assert eight.cosine_mean > 0.99
    assert ternary.drop > 10
    assert ternary.mcnemar_p is not None
    assert ternary.mcnemar_p < 1e-3


def test_lee_with_minilm(minilm: Tiny, real_task: Callable[[str], Task]) -> None:
    result = prepare_baseline(*minilm, real_task("lee")).result
    assert result.n == 50
    assert result.n_truncated == 0
    assert 60 < result.score < 71
