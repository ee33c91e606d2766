"""Tiny models and texts of our own, and MiniLM where its package is installed."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qbert import zoo
from qbert.evaluate import Dataset, Task, get_task, labelled_dataset, load_fp32, load_tokenizer

COLOURS = ("red", "blue", "green", "pink", "grey")
ANIMALS = ("cat", "dog", "cow", "owl", "bee")
FILLER = ("the", "a", "is", "was", "here", "there", "very", "old", "new", "big")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TINY_POSITIONS = 32
TINY_WEIGHT_STD = 0.2  # ten times BERT's, so that 2 narrow layers are more than their residual connections


def _needs(package: str, requirement: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {requirement}")


def _made_up_dataset(n: int = 240, seed: int = 0) -> Dataset:
    """Sentences that name a colour or an animal: two classes that a tiny model can tell apart."""
    generator = random.Random(seed)
    rows: list[tuple[str, str]] = []
    while len(rows) < n:
        label = "animal" if len(rows) % 2 else "colour"
        words = [*generator.choices(FILLER, k=generator.randint(1, 9))]
        words.insert(generator.randrange(len(words) + 1), generator.choice(ANIMALS if label == "animal" else COLOURS))
        row = (" ".join(words), label)
        if row not in rows:
            rows.append(row)
    return labelled_dataset("made-up", rows)


@pytest.fixture(scope="session")
def made_up_dataset() -> Callable[..., Dataset]:
    """made_up_dataset(n=240, seed=0): see `_made_up_dataset`."""
    return _made_up_dataset


@pytest.fixture(scope="session")
def real_task() -> Callable[[str], Task]:
    """real_task(name): a row of the table whose package is installed; skips, saying what is missing."""

    def find(name: str) -> Task:
        task = get_task(name)
        _needs(task.package.partition("==")[0], task.package)
        return task

    return find


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertModel of 2 layers x 32 with random weights, and a word tokenizer, saved as transformers saves them."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    words = (*SPECIAL, *COLOURS, *ANIMALS, *FILLER)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, model_max_length=TINY_POSITIONS).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=TINY_POSITIONS,
            initializer_range=TINY_WEIGHT_STD,
        )
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer), loaded afresh: a test may change the weights."""
    return load_fp32(str(tiny_folder)), load_tokenizer(str(tiny_folder))


@pytest.fixture(scope="session")
def minilm() -> tuple[Any, Any]:
    """(model, tokenizer) of the real MiniLM; not to be changed."""
    _needs(zoo.MINILM_PACKAGE, zoo.MINILM_REQUIREMENT)
    folder = zoo.resolve_model("minilm")
    return load_fp32(folder), load_tokenizer(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No test but a slow one touches the user's cache."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("QBERT_CACHE", str(tmp_path / "cache"))
