"""The benchmarks: what is fed in, how seconds become figures, that what fails is a row with its reason, and one tiny run."""

import json
import random
import threading

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import BertConfig, BertModel

from benchmarks import bench_bert, bench_gemm, bert_inputs
from benchmarks.bench_bert import Settings, bench_cases, in_rounds, measure_case, select_rows, sorted_batches
from benchmarks.bert_inputs import make_batch, pad, padding_share, parse_case, pick_ragged
from benchmarks.bert_models import DEVIATION, OUTLIER_SHARE, realistic_weights
from benchmarks.bert_report import Cell, Report, SystemRow, add_ratios, cosines, ratio, spread, tables
from benchmarks.machine import describe
from benchmarks.peers import BASELINE, ISAS, ROWS, isa_environment
from benchmarks.peers import child as child_module
from benchmarks.peers.base import Bound, Job, Peer, Unavailable
from benchmarks.peers.child import Host, _answer, mean_pooled
from benchmarks.peers.driver import Child
from benchmarks.peers.plain_bert import PlainBert
from qbert.errors import QBertError

CLS, SEP = 101, 102
TINY = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids with lengths like real sentences': most of 10 to 40 tokens, a few much longer."""
    draw = random.Random(seed)
    lengths = [min(128, 5 + int(draw.lognormvariate(2.9, 0.6))) for _ in range(count)]
    return [[CLS, *draw.choices(range(1000, 2000), k=length - 2), SEP] for length in lengths]


# ---- inputs ---------------------------------------------------------------------------------------------------------


def test_cases_are_parsed():
    assert parse_case("8x128") == bert_inputs.Case("8x128", 8, 128)
    assert parse_case("ragged32") == bert_inputs.Case("ragged32", 32, None)
    for bad in ("8", "0x4", "4x1", "1x513", "ragged1", "ragged", "8x", "x8", "08x16"):
        with pytest.raises(QBertError, match="allowed are"):
            parse_case(bad)


@pytest.mark.parametrize("batch", [4, 8, 32])
def test_half_of_a_ragged_batch_is_padding(batch):
    given = sentences(500)
    lengths = [len(each) for each in given]
    chosen = pick_ragged(lengths, batch)
    assert chosen == pick_ragged(lengths, batch)
    assert len(set(chosen)) == batch
    made = make_batch(parse_case(f"ragged{batch}"), given)
    assert made.padding_share == pytest.approx(0.5, abs=0.02)
    assert made.padding_share == pytest.approx(padding_share([lengths[i] for i in chosen]))
    for row, index in enumerate(chosen):  # whole sentences, as they were
        assert made.ids[row, : lengths[index]].tolist() == given[index]
        assert made.mask[row].tolist() == [1] * lengths[index] + [0] * (made.mask.shape[1] - lengths[index])


def test_ragged_needs_as_many_sentences():
    with pytest.raises(QBertError, match="3 sentences, a ragged batch needs 4"):
        pick_ragged([4, 5, 6], 4)


def test_a_dense_batch_is_full_of_real_tokens():
    made = make_batch(parse_case("3x16"), sentences(2))
    assert made.ids.shape == made.mask.shape == (3, 16)
    assert made.padding_share == 0.0
    assert made.ids[:, 0].tolist() == [CLS] * 3
    assert made.ids[:, -1].tolist() == [SEP] * 3
    assert not (made.ids[:, 1:-1] < 1000).any()  # neither padding nor special tokens inside


def test_real_sentences_of_training_and_test_are_apart():
    tested, trained = bert_inputs.real_sentences(60), bert_inputs.real_sentences(60, part="train")
    assert len(tested) == len(trained) == 60
    assert not set(tested) & set(trained)
    ids = bert_inputs.tokenize(tested)
    assert all(each[0] == CLS and each[-1] == SEP and len(each) <= bert_inputs.MAX_TOKENS for each in ids)


def test_sentences_are_batched_by_length():
    given = sentences(70)
    order, batches = sorted_batches(given, 32)
    assert sorted(order) == list(range(70))
    assert [batch.mask.shape[0] for batch in batches] == [32, 32, 6]
    assert [len(given[i]) for i in order] == sorted((len(each) for each in given), reverse=True)


def test_weights_have_a_few_outliers():
    weights = realistic_weights(200, 300, generator=torch.Generator().manual_seed(0))
    far = (weights.abs() > 3.9 * DEVIATION).float().mean()
    assert 0.8 * OUTLIER_SHARE < float(far) < 1.2 * OUTLIER_SHARE


# ---- figures --------------------------------------------------------------------------------------------------------


def test_spread_is_over_rounds():
    found = spread([[0.001, 0.002, 0.009], [0.004], [0.006, 0.006]])
    assert (found.median, found.quartile1, found.quartile3) == pytest.approx((4.0, 3.0, 5.0))
    assert (found.rounds, found.forwards) == (3, 6)


def test_ratio_is_within_rounds():
    """The machine is three times slower in the second round: both are, and the ratio stays."""
    slow, fast = [[2.0], [6.0], [2.2]], [[1.0], [3.0], [1.0]]
    assert ratio(slow, fast) == 2.0
    assert ratio(fast, slow) == 0.5
    assert ratio([], fast) is None


def test_every_row_stands_to_the_baseline_and_to_the_best_of_qbert():
    rounds = {BASELINE: [[4.0], [4.0]], "qbert-a": [[2.0], [2.0]], "qbert-b": [[1.0], [1.0]], "other": [[0.5], [0.5]]}
    cells = {name: Cell(row=name, case="8x128", time=spread(times)) for name, times in rounds.items()}
    cells["broken"] = Cell(row="broken", case="8x128", reason="why")
    add_ratios(cells, rounds)
    assert [cells[name].speedup for name in rounds] == [1.0, 2.0, 4.0, 8.0]
    assert [cells[name].over_best_qbert for name in rounds] == [4.0, 2.0, 1.0, 0.5]
    assert cells["broken"].speedup is None


def test_ratios_without_a_baseline_are_left_out():
    rounds = {"other": [[1.0]]}
    cells = {"other": Cell(row="other", case="8x128", time=spread(rounds["other"]))}
    add_ratios(cells, rounds)
    assert cells["other"].speedup is None
    assert cells["other"].over_best_qbert is None


def test_cosines():
    a = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    assert cosines(a, 3 * a) == pytest.approx((1.0, 1.0))
    assert cosines(a, np.array([[1.0, 0.0], [2.0, 0.0]], dtype=np.float32)) == pytest.approx((0.5, 0.0))
    assert all(np.isnan(cosines(a, np.full((2, 2), np.nan, dtype=np.float32))))


def test_pooling_leaves_padding_out():
    hidden = np.array([[[1.0], [3.0], [100.0]]], dtype=np.float32)
    assert mean_pooled(hidden, np.array([[1, 1, 0]])).tolist() == [[2.0]]


def report(cells: list[Cell]) -> Report:
    batch = make_batch(parse_case("2x16"), sentences(4))
    return Report(
        machine=describe(), model="tiny", random_weights=True, threads=1, isa=None, wait_policy="default", minutes=1,
        seconds=2, systems=[bench_bert._system(ROWS[cell.row]) for cell in cells], cases=[bench_bert._case("2x16", batch)],
        cells=cells,
    )  # fmt: skip


def test_report_is_json_and_back():
    made = report(
        [Cell(row=BASELINE, case="2x16", time=spread([[1.0]])), Cell(row="openvino-int8", case="2x16", reason="no")]
    )
    data = json.loads(made.model_dump_json())
    assert Report.model_validate(data) == made
    assert data["machine"]["device"]
    assert data["machine"]["versions"]["torch"] == torch.__version__
    with pytest.raises(ValidationError):
        Report.model_validate({**data, "surprise": 1})


def test_tables_show_rows_that_lost_and_rows_that_failed(capsys):
    from rich.console import Console

    made = report(
        [Cell(row=BASELINE, case="2x16", time=spread([[1.0]])), Cell(row="openvino-int8", case="2x16", reason="odd")]
    )
    made.systems.append(SystemRow(name="gone", library="x", configuration="", source="", reason="not installed"))
    for table in tables(made):
        Console(width=200).print(table)
    shown = capsys.readouterr().out
    assert "openvino-int8" in shown
    assert "2x16: odd" in shown
    assert "gone: not measured: not installed" in shown


# ---- rounds ---------------------------------------------------------------------------------------------------------


class Fake:
    """A system that answers at once, and from some call on no more."""

    def __init__(self, name: str, log: list[str], fails_at: int | None = None, fails_on: str = "") -> None:
        self.name, self.log, self.fails_at, self.fails_on, self.turns = name, log, fails_at, fails_on, 0

    def call(self, command, *arguments, timeout):
        if command == self.fails_on:
            raise Unavailable(f"{self.name} refuses to {command}")
        if command == "bind":
            return Bound(0.5, np.ones((2, 3, 4), dtype=np.float32))
        if command == "memory":
            return 1000
        self.log.append(self.name)
        self.turns += 1
        if self.turns == self.fails_at:
            raise Unavailable(f"{self.name} broke")
        return [0.001]


def test_rounds_are_interleaved_and_rotate():
    log: list[str] = []
    systems = {name: Fake(name, log) for name in "abc"}
    rounds, failed = in_rounds(systems, ("turn", 0.0), seconds=0.0)
    assert not failed
    assert "".join(log) == "abc" + "bca" + "cab"  # no fewer than three rounds
    assert {name: len(times) for name, times in rounds.items()} == dict.fromkeys("abc", 3)


def test_rounds_end():
    rounds, _ = in_rounds({"a": Fake("a", [])}, ("turn", 0.0), seconds=1e9)
    assert len(rounds["a"]) == bench_bert.MAX_ROUNDS


def test_what_breaks_is_left_out_of_later_rounds():
    log: list[str] = []
    systems = {"a": Fake("a", log), "b": Fake("b", log, fails_at=2)}
    rounds, failed = in_rounds(systems, ("turn", 0.0), seconds=0.0)
    assert list(rounds) == ["a"]
    assert failed == {"b": "b broke"}
    assert log.count("b") == 2


def test_a_system_that_fails_is_a_row_with_its_reason():
    log: list[str] = []
    systems = {
        BASELINE: Fake(BASELINE, log), "refuses": Fake("refuses", log, fails_on="bind"),
        "breaks": Fake("breaks", log, fails_at=1), "hides": Fake("hides", log, fails_on="memory"),
    }  # fmt: skip
    keep = np.array([[True, True, False], [True, False, False]])
    cells = {c.row: c for c in measure_case(systems, "2x3", (), np.ones((3, 4), np.float32), keep, seconds=0.0)}
    assert list(cells) == list(systems)
    assert cells[BASELINE].reason is None
    assert cells[BASELINE].speedup == 1.0
    assert cells[BASELINE].cosine_mean == pytest.approx(1.0)
    assert cells[BASELINE].peak_bytes == 1000
    assert cells["refuses"].time is None
    assert cells["refuses"].reason == "refuses refuses to bind"
    assert cells["breaks"].time is None
    assert cells["breaks"].reason == "breaks broke"
    assert cells["hides"].time is not None
    assert cells["hides"].reason == "hides refuses to memory"


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_are_chosen_by_library_and_by_name():
    names = [row.name for row in select_rows("all", [], sentences=False)]
    assert BASELINE in names
    assert "sentence-transformers" not in names
    assert "sentence-transformers" in [row.name for row in select_rows("all", [], sentences=True)]
    alone = [row.name for row in select_rows("none", [], sentences=False)]
    assert alone == [BASELINE, *(name for name in ROWS if name.startswith("qbert"))]
    assert next(row.name for row in select_rows("all", ["*-int8", BASELINE], sentences=False)) == BASELINE
    with pytest.raises(QBertError, match="allowed are all, none"):
        select_rows("pytorch", [], sentences=False)
    with pytest.raises(QBertError, match="fits none of"):
        select_rows("none", ["openvino*"], sentences=False)


def test_every_row_has_a_class_that_needs_no_optional_library():
    for row in ROWS.values():
        assert issubclass(row.peer_class(), Peer)


def test_instruction_sets_are_limited_alike():
    for isa in ISAS:
        assert isa_environment("qbert", isa)["QBERT_CPU_ISA"] == isa
        assert (
            isa_environment("openvino", isa)["ONEDNN_MAX_CPU_ISA"]
            == isa_environment("torch", isa)["ONEDNN_MAX_CPU_ISA"]
        )
    with pytest.raises(Unavailable, match="no switch"):
        isa_environment("onnxruntime", "avx2")


def test_the_plain_graph_computes_what_bert_does():
    bert = BertModel(BertConfig(**TINY), add_pooling_layer=False).eval()
    batch = pad([[CLS % 200, 5, 6, SEP % 200], [CLS % 200, SEP % 200]])
    with torch.inference_mode():
        expected = bert(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        actual = PlainBert(bert)(batch.ids, batch.mask, torch.zeros_like(batch.ids))
    torch.testing.assert_close(actual[batch.mask.bool()], expected[batch.mask.bool()])


# ---- processes ------------------------------------------------------------------------------------------------------


class Broken(Peer):
    """Loads, and cannot run."""

    def load(self):
        pass

    def bind(self, ids, mask):
        raise RuntimeError("shape\n  not supported")

    def forward(self):
        return 0

    def hidden(self, result):
        return np.zeros((1, 1, 1), np.float32)

    def weight_bytes(self):
        return 7


def test_any_exception_is_a_reason(tmp_path):
    host = Host(Broken)
    assert _answer(host, "prepare", [Job(tmp_path, tmp_path, torch.get_num_threads())])[1] is None
    loaded, reason, _ = _answer(host, "load", [])
    assert reason is None
    assert loaded.weight_bytes == 7
    ids = np.zeros((1, 1), np.int64)
    assert _answer(host, "bind", [ids, ids])[:2] == (None, "RuntimeError: shape not supported")
    times, reason, _ = _answer(host, "turn", [0.0])
    assert reason is None
    assert len(times) == 1


def test_a_system_that_never_rests_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(child_module, "_REST_LIMIT", 0.05)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        with pytest.raises(Unavailable, match="still use the processor"):
            child_module.come_to_rest()
    finally:
        stop.set()
        thread.join()


def test_a_child_that_dies_gives_a_reason(tmp_path):
    child = Child("openvino-fp32", {"OMP_NUM_THREADS": "1"})
    try:
        with pytest.raises(Unavailable, match="AttributeError"):
            child.call("no_such_command", timeout=60)
        child._process.kill()
        with pytest.raises(Unavailable, match="its process ended"):
            child.call("load", timeout=60)
    finally:
        child.close()


def test_tiny_run(tmp_path, monkeypatch):
    """All of it, limited to plain instructions, so that one system has no way to take part and says so."""
    monkeypatch.setattr(bench_bert, "CALIBRATION_SENTENCES", 16)
    monkeypatch.setattr(bench_bert, "POOL", 100)
    names = [BASELINE, "onnxruntime-fp32", "qbert-w8a8-unfused", "qbert-w8a8-static"]
    settings = Settings(
        model="tiny", rows=[ROWS[name] for name in names], cases=("2x16", "ragged2"), minutes=0.01, isa="generic",
        cache=tmp_path,
    )  # fmt: skip
    made = bench_cases(settings)
    reasons = {system.name: system.reason for system in made.systems}
    assert list(reasons) == names
    assert "no switch for its instruction set" in (reasons.pop("onnxruntime-fp32") or "")
    assert set(reasons.values()) == {None}
    for name in reasons:
        for case in settings.cases:
            cell = made.cell(name, case)
            assert cell is not None
            assert cell.reason is None
            assert cell.time is not None
            assert cell.time.rounds >= bench_bert.MIN_ROUNDS
            assert cell.speedup is not None
            assert cell.over_best_qbert is not None
            assert cell.cosine_mean is not None
            assert cell.cosine_mean > 0.99
    systems = {system.name: system for system in made.systems}
    assert systems["qbert-w8a8-static"].padding == "not computed"
    assert systems["qbert-w8a8-static"].weight_bytes < systems[BASELINE].weight_bytes
    assert Report.model_validate_json(made.model_dump_json()) == made


def test_gemm_rows():
    compute = bench_gemm.measure("compute", 17, 32, 64, repeats=1, peak=100.0)
    memory = bench_gemm.measure("memory", 2, 32, 64, repeats=1, peak=None, beyond=1 << 14)
    assert [row.name for row in compute] == ["torch fp32", "torch bf16", "torch._int_mm", *bench_gemm.COMPUTE_SCHEMES]
    assert [row.name for row in memory] == ["torch fp32", "torch bf16", *bench_gemm.MEMORY_SCHEMES]
    for row in compute + memory:
        assert row.reason is None
        assert row.seconds is not None
        assert row.seconds > 0
        assert row.gops == pytest.approx(2 * row.t * row.n * row.k / row.seconds / 1e9)
        assert (row.peak_share is not None) == (row.name in bench_gemm.COMPUTE_SCHEMES)
        assert row.speedup is not None
    assert {row.weight_bytes for row in memory if row.name == "torch fp32"} == {32 * 64 * 4}
