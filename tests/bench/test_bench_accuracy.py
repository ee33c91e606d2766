"""Accuracy and quantizing as rows: real models on made-up texts, peers that are missing, and a survey's table beside them."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks import bench_accuracy, bench_quantize, published
from benchmarks.bench_accuracy import Entry, way
from benchmarks.machine import describe
from benchmarks.results_schema import AccuracyRow, QuantizeRow, load_results
from qbert.errors import QBertError
from qbert.evaluate import labelled_dataset, prepare_baseline, task_data
from qbert.formats import SCHEMES
from qbert.workflow import load_any
from qbert.zoo import resolve_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny float model with MiniLM's tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    except QBertError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("accuracy") / "tiny"
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def baselines(source):
    texts = [f"word{i % 7} number {i}" for i in range(60)]
    data = task_data(labelled_dataset("made-up", [(text, "odd" if i % 2 else "even") for i, text in enumerate(texts)]))
    return [prepare_baseline(load_any(source), AutoTokenizer.from_pretrained(source), data)]


def rows_of(entry, source, baselines):
    return list(bench_accuracy.measure(entry, source, AutoTokenizer.from_pretrained(source), baselines))


@pytest.mark.parametrize("name", ["w8a8", "w8a8:static", "gobo3+gobo4"])
def test_a_way_is_scored_after_a_file(name, source, baselines):
    (row,) = rows_of(way(name), source, baselines)
    assert row.reason is None
    assert (row.name, row.scheme, row.library, row.task) == (name, name.split("+")[0].split(":")[0], "qbert", "made-up")
    assert row.drop == pytest.approx(row.float_score - row.score)
    assert row.drop_low <= row.drop <= row.drop_high
    assert 0.7 < row.cosine <= 1
    assert 0 < row.share_of_float32 < 1
    assert row.stored_bytes > 0


def test_what_cannot_be_built_or_scored_is_a_reason(source, baselines):
    def broken(source):
        raise RuntimeError("no such\ncall")

    (row,) = rows_of(Entry("broken", "x", None, broken), source, baselines)
    assert (row.reason, row.score) == ("RuntimeError: no such call", None)
    nan = load_any(source)
    torch.nn.init.constant_(nan.embeddings.LayerNorm.weight, torch.nan)
    (row,) = rows_of(Entry("nan", "x", None, lambda source: bench_accuracy.Stored(nan, 8, 1, 0.5)), source, baselines)
    assert row.score is None
    assert row.reason


def test_peers_are_scored_or_say_what_is_missing(source, baselines):
    for entry in bench_accuracy.peers():
        (row,) = rows_of(entry, source, baselines)
        assert (row.score is None) == (row.reason is not None)
        assert row.score is None or 4 <= row.bits_per_weight < 10


def test_stored_bytes_looks_into_subclasses():
    class Pair(torch.Tensor):
        @staticmethod
        def __new__(cls, codes, scale):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes, scale):
            self.codes, self.scale = codes, scale

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    pair = Pair(torch.ones(4, 6, dtype=torch.int8), torch.ones(4))
    assert bench_accuracy.stored_bytes(pair) == 24 + 16
    assert bench_accuracy.stored_bytes(torch.ones(3)) == 12
    assert bench_accuracy.stored_bytes("not a tensor") == 0


def test_ways_are_checked_before_anything_runs():
    for name in (*bench_accuracy.WAYS, *bench_accuracy.QUICK_WAYS):
        assert way(name).scheme in SCHEMES
    for name in ("w8a8:sometimes", "w9a9", "w8a8+w9"):
        with pytest.raises(QBertError):
            way(name)


def test_the_survey_beside_what_was_measured(capsys):
    """Figures of the survey's table 1, and columns for ours."""
    rows = {row.name: row for row in published.published_rows()}
    assert (rows["GOBO"].share_of_float32, rows["GOBO"].drop) == (pytest.approx(0.102), pytest.approx(0.009))
    assert (rows["Q-BERT"].share_of_float32, rows["Q-BERT"].drop) == (pytest.approx(0.15), pytest.approx(0.006))
    assert all(row.published and row.source == published.SOURCE for row in rows.values())
    assert {each.nearest for each in published.TABLE if each.nearest} <= set(bench_accuracy.WAYS)
    ours = AccuracyRow(
        model="minilm", task="trec", name="gobo3+gobo4", library="qbert", score=0.8, float_score=0.85, drop=0.05,
        drop_low=0.03, drop_high=0.07, cosine=0.9, bits_per_weight=3.3, share_of_float32=0.111,
    )  # fmt: skip
    lost = AccuracyRow(
        model="minilm", task="trec", name="quanto int4", library="optimum-quanto", reason="not installed"
    )
    for table in bench_accuracy.tables([ours, lost, *rows.values()], describe()):
        Console(width=200).print(table)
    shown = capsys.readouterr().out
    assert "-5.0 [-7.0, -3.0]" in shown
    assert "not installed" in shown
    gobo = next(line for line in shown.splitlines() if "GOBO" in line and "10.2%" in line)
    assert "11.1%" in gobo
    assert "not done here" in shown


# ---- quantizing -----------------------------------------------------------------------------------------------------


def test_quantizing_runs_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "out.json"
    bench_quantize.main(model=["tiny"], scheme=["gobo3+gobo4"], json_path=path)
    (row,) = load_results(path).of(QuantizeRow)
    assert row.reason is None
    assert (row.model, row.scheme, row.device) == ("tiny", "gobo3+gobo4", "cpu")
    assert 3 < row.bits_per_weight < 5
    assert row.seconds > 0
    assert row.weights > 64 * 30_000


def test_a_model_that_cannot_be_quantized_is_a_row(monkeypatch, tmp_path):
    job = ("nowhere/at/all", "w8a8", None, "cpu")
    row = bench_quantize.in_own_process(job)
    assert "nowhere" in row.reason
    monkeypatch.setattr(bench_quantize, "child_command", lambda module: [str(tmp_path / "missing")])
    assert "FileNotFoundError" in bench_quantize.in_own_process(job).reason
    monkeypatch.setattr(bench_quantize, "in_own_process", lambda job: row)
    with pytest.raises(QBertError, match="nothing could be quantized"):
        bench_quantize.main(model=["tiny"], scheme=["w8a8"])
    with pytest.raises(QBertError, match="w9a9"):
        bench_quantize.main(model=["tiny"], scheme=["w9a9"])
    assert json.loads(row.model_dump_json())["kind"] == "quantize"
