"""A tiny model learns, is saved whole, and is found again."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qbert.errors import QBertError
from qbert.evaluate import Dataset, Task, evaluate, finetune, finetuned_model, load_fp32, load_task
from qbert.evaluate.finetune import TASK_FILE, _lr_factor, _shuffled_batches

MadeUp = Callable[..., Dataset]
EPOCHS, LR = 20, 3e-3  # a random model of 2 x 32 needs more than a pretrained one


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, made_up_dataset: MadeUp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finetuned") / "model"
    result = finetune(tiny_folder, made_up_dataset(), out, epochs=EPOCHS, lr=LR)
    assert result.path == out
    assert result.n_test == 48
    assert result.accuracy > 95
    return out


def test_folder_is_a_normal_one(trained: Path) -> None:
    model = load_fp32(str(trained))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == {0: "animal", 1: "colour"}  # type: ignore[union-attr]
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (trained / "tokenizer.json").is_file()
    assert (trained / "model.safetensors").is_file()


def test_record(trained: Path, made_up_dataset: MadeUp) -> None:
    record = json.loads((trained / TASK_FILE).read_text())
    assert record["task"] == "made-up"
    assert record["seed"] == 0
    assert record["label_names"] == ["animal", "colour"]
    assert record["split"]["test_sha256"] == load_task(made_up_dataset()).test.fingerprint()
    assert (record["split"]["n_train"], record["split"]["n_test"]) == (192, 48)


def test_its_own_classifier_scores_the_recorded_accuracy(trained: Path, made_up_dataset: MadeUp) -> None:
    result = evaluate(trained, made_up_dataset())
    assert result.head == "classifier"
    assert result.score == pytest.approx(json.loads((trained / TASK_FILE).read_text())["accuracy"])


def test_embeddings_were_frozen_and_the_rest_was_not(trained: Path, tiny_folder: Path) -> None:
    before, after = load_fp32(str(tiny_folder)).state_dict(), load_fp32(str(trained)).bert.state_dict()  # type: ignore
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("embeddings."), name


def test_same_seed_same_weights(tiny_folder: Path, made_up_dataset: MadeUp, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finetune(tiny_folder, made_up_dataset(80), tmp_path / name, epochs=1, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert torch.equal(state, torch.random.get_rng_state())


def test_cache(tiny_folder: Path, made_up_dataset: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made_up_dataset(80)
    first = finetuned_model(tiny_folder, data, epochs=1)
    module = sys.modules["qbert.evaluate.finetune"]  # the package has a function of that name
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained twice"))
    assert finetuned_model(tiny_folder, data, epochs=1) == first
    for other in ({"epochs": 2}, {"epochs": 1, "seed": 1}, {"epochs": 1, "lr": 1e-3}):
        with pytest.raises(pytest.fail.Exception, match="trained twice"):
            finetuned_model(tiny_folder, data, **other)
    with pytest.raises(pytest.fail.Exception, match="trained twice"):
        finetuned_model(tiny_folder, made_up_dataset(79), epochs=1)
    assert list(first.parent.iterdir()) == [first]


def test_progress(tiny_folder: Path, made_up_dataset: MadeUp, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    finetune(tiny_folder, made_up_dataset(80), tmp_path / "x", epochs=2, progress=lambda *at: seen.append(at))
    assert seen == [(i, 4) for i in (1, 2, 3, 4)]


def test_errors(tiny_folder: Path, made_up_dataset: MadeUp, tmp_path: Path) -> None:
    data = made_up_dataset(80)
    with pytest.raises(QBertError, match="exists already"):
        finetune(tiny_folder, data, tmp_path)
    with pytest.raises(QBertError, match="epochs 0"):
        finetune(tiny_folder, data, tmp_path / "x", epochs=0)
    with pytest.raises(QBertError, match="lr -1"):
        finetune(tiny_folder, data, tmp_path / "x", lr=-1)
    with pytest.raises(QBertError, match="is a similarity task"):
        finetune(tiny_folder, Dataset("s", ("a", "b"), similarity=torch.eye(2)), tmp_path / "x")
    with pytest.raises(QBertError, match="needs a local folder"):
        finetuned_model("bert-base-uncased", data)
    with pytest.raises(QBertError, match=r"no \*\.safetensors"):
        finetuned_model(tmp_path, data)
    assert not (tmp_path / "x").exists()


def test_learning_rate_goes_up_then_down_to_zero() -> None:
    factors = [_lr_factor(step, 100, 0.1) for step in range(101)]
    assert factors[9] == factors[10] == 1
    assert factors[0] == pytest.approx(0.1)
    assert factors[100] == 0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert _lr_factor(0, 1, 0.1) == 1


def test_every_text_once_an_epoch() -> None:
    generator = random.Random(0)
    lengths = [generator.randint(1, 50) for _ in range(1000)]
    batches = list(_shuffled_batches(lengths, 32, generator))
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert len(batches) == 32


@pytest.mark.slow
def test_real_finetune_on_trec(real_task: Callable[[str], Task]) -> None:
    """Minutes the first time; then the cache has it."""
    folder = finetuned_model("minilm", real_task("trec"))
    assert evaluate(folder, "trec").score > 91
