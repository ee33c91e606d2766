"""The benchmarks: what is fed in, how seconds become figures, that what fails is a row with its reason, and one tiny run."""

import itertools
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import bench_bert, bert_inputs
from benchmarks.bench_bert import Entrant, Script, Settings, batched, bench_cases, measure_case, select_rows
from benchmarks.bert_inputs import make_batch, pad, padding_share, parse_case, pick_ragged
from benchmarks.bert_models import DEVIATION, OUTLIER_SHARE, find_model, load_float32, realistic_weights
from benchmarks.bert_report import add_ratios, cosines, over_first, sample, tables
from benchmarks.bert_work import precision_of, work_of
from benchmarks.machine import describe
from benchmarks.peers import BASELINES, ISAS, ROWS, TARGETS, isa_environment, torch_peer
from benchmarks.peers import child as child_module
from benchmarks.peers.base import Bound, Job, Peer
from benchmarks.peers.child import Host, _answer, mean_pooled
from benchmarks.peers.driver import Child
from benchmarks.peers.plain_encoders import PLAIN, feed, plain_encoder
from benchmarks.peers.sdpa_bert import PackedBert, SdpaBert
from benchmarks.results_schema import BertRow, SystemRow, load_results
from qbert import timing
from qbert.errors import QBertError
from qbert.timing import Unavailable

CLS, SEP = 101, 102
TINY = {
    "vocab_size": 2000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
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
    for bad in ("8", "0x4", "4x1", "1x8193", "ragged1", "ragged", "8x", "x8", "08x16"):
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
    order, batches = batched(given, size=32)
    assert sorted(order) == list(range(70))
    assert [batch.mask.shape[0] for batch in batches] == [32, 32, 6]
    assert [len(given[i]) for i in order] == sorted((len(each) for each in given), reverse=True)
    order, unsorted = batched(given, padding=1, size=32, by_length=False)
    assert order == list(range(70))
    assert [batch.mask.shape[0] for batch in unsorted] == [32, 32, 6]
    assert (unsorted[0].ids[unsorted[0].mask == 0] == 1).all()
    assert sum(batch.mask.numel() for batch in unsorted) > sum(batch.mask.numel() for batch in batches)


def test_weights_have_a_few_outliers():
    weights = realistic_weights(200, 300, generator=torch.Generator().manual_seed(0))
    far = (weights.abs() > 3.9 * DEVIATION).float().mean()
    assert 0.8 * OUTLIER_SHARE < float(far) < 1.2 * OUTLIER_SHARE


# ---- figures --------------------------------------------------------------------------------------------------------


def row(name, case="8x128", seconds=None, **fields):
    """A row of `bench_bert`, with a time of so many seconds in each round."""
    time = None if seconds is None else sample([[each] for each in seconds])
    batch, _, width = case.partition("x")
    return BertRow(
        name=name, library="x", model="tiny", random_weights=True, case=case, batch=int(batch), width=int(width),
        tokens=int(batch) * int(width), padding_share=0.0, time=time, **fields,
    )  # fmt: skip


def test_a_sample_is_over_rounds():
    found = sample([[0.001, 0.002, 0.009], [0.004], [0.006, 0.006]])
    assert (found.median, found.p25, found.p75) == pytest.approx((0.004, 0.003, 0.005))
    assert (found.repeats, found.calls) == (3, 2)
    assert "wall clock" in found.how


def test_every_row_stands_to_the_baseline_and_to_the_best_of_qbert():
    baseline = BASELINES["cpu"]
    times = {baseline: (4.0, 12.0), "qbert-a": (2.0, 6.0), "qbert-b": (1.0, 3.0), "other": (0.5, 1.5)}
    rows = {name: row(name, seconds=seconds) for name, seconds in times.items()}
    rows["broken"] = row("broken", reason="why")
    add_ratios(rows, baseline)
    assert [rows[name].speedup for name in times] == [1.0, 2.0, 4.0, 8.0]
    assert [rows[name].over_best_qbert for name in times] == [4.0, 2.0, 1.0, 0.5]
    assert rows["broken"].speedup is None


def test_ratios_without_a_baseline_are_left_out():
    rows = {"other": row("other", seconds=(1.0,))}
    add_ratios(rows, "torch-fp32")
    assert rows["other"].speedup is None
    assert rows["other"].over_best_qbert is None


def test_cosines():
    a = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    assert cosines(a, 3 * a) == pytest.approx((1.0, 1.0))
    assert cosines(a, np.array([[1.0, 0.0], [2.0, 0.0]], dtype=np.float32)) == pytest.approx((0.5, 0.0))
    assert all(np.isnan(cosines(a, np.full((2, 2), np.nan, dtype=np.float32))))


def test_pooling_leaves_padding_out():
    hidden = np.array([[[1.0], [3.0], [100.0]]], dtype=np.float32)
    assert mean_pooled(hidden, np.array([[1, 1, 0]])).tolist() == [[2.0]]


def test_tables_show_rows_that_lost_and_rows_that_failed(capsys):
    from rich.console import Console

    rows = [row(BASELINES["cpu"], "2x16", (1.0,)), row("openvino-int8", "2x16", reason="odd")]
    systems = [bench_bert._system(ROWS["cpu"][each.name], "tiny") for each in rows]
    systems.append(SystemRow(name="gone", library="x", model="tiny", configuration="", reason="not installed"))
    for table in tables(systems, rows, describe()):
        Console(width=200).print(table)
    shown = capsys.readouterr().out
    assert "openvino-int8" in shown
    assert "2x16: odd" in shown
    assert "gone: not measured: not installed" in shown


@pytest.mark.parametrize("target", TARGETS)
def test_the_bound_of_a_forward(target, tmp_path):
    config = BertConfig(**TINY)
    config.save_pretrained(tmp_path)
    batch = pad([[CLS, 5, 6, SEP], [CLS, SEP]])
    h, f = config.hidden_size, config.intermediate_size
    for name in ROWS[target]:
        work = work_of(tmp_path, batch, name, 1000)
        assert work.operations == 2 * (2 * 6 * (4 * h * h + 2 * h * f) + 4 * (4**2 + 2**2) * h)
        assert 0 <= work.bytes <= 1000 + 4 * 6 * h
    assert precision_of("qbert-gobo3a8-static-graph") == precision_of("torchao-int8-dynamic") == "int8"
    assert precision_of("bitsandbytes-nf4") == precision_of("torch-bf16-unpadded") == "bf16"
    assert (precision_of("torch-fp32"), precision_of("torchao-fp8-dynamic")) == ("fp32", "fp8")


# ---- rounds ---------------------------------------------------------------------------------------------------------


class Fake:
    """A system that answers at once, and from some call on no more."""

    def __init__(self, name: str, log: list[str], fails_at: int | None = None, fails_on: str = "") -> None:
        self.name, self.log, self.fails_at, self.fails_on, self.turns = name, log, fails_at, fails_on, 0

    def call(self, command, *arguments, timeout):
        if command == self.fails_on:
            raise Unavailable(f"{self.name} refuses to {command}")
        if command == "bind":
            return Bound(0.5, np.full((2, 3, 4), np.nan if self.name == "nan" else 1.0, dtype=np.float32))
        if command == "memory":
            return 1000
        self.log.append(self.name)
        self.turns += 1
        if self.turns == self.fails_at:
            raise Unavailable(f"{self.name} broke")
        return [0.001]


def entrants(systems, reference, keep, model="tiny"):
    script = Script((), reference, keep)
    return [
        Entrant(each, row(name, "2x3").model_copy(update={"model": model}), script) for name, each in systems.items()
    ]


def test_models_are_measured_in_the_same_rounds():
    log: list[str] = []
    names = (BASELINES["cpu"], "qbert-a")
    keep, reference = np.ones((2, 3), bool), np.ones((6, 4), np.float32)
    given = [
        entrant
        for model in ("one", "two")
        for entrant in entrants({name: Fake(f"{model} {name}", log) for name in names}, reference, keep, model)
    ]
    found = measure_case(given, seconds=0.0)
    assert [(each.model, each.name) for each in found] == [(model, name) for model in ("one", "two") for name in names]
    assert all(set(log[at : at + 4]) == {entrant.key for entrant in given} for at in range(0, len(log), 4))
    assert [each.speedup for each in found] == [1.0] * 4
    assert over_first(["one", "two"], found) == {("two", name, "2x3"): 1.0 for name in names}


def test_a_system_that_fails_is_a_row_with_its_reason():
    log: list[str] = []
    baseline = BASELINES["cpu"]
    systems = {
        baseline: Fake(baseline, log), "refuses": Fake("refuses", log, fails_on="bind"),
        "breaks": Fake("breaks", log, fails_at=1), "hides": Fake("hides", log, fails_on="memory"), "nan": Fake("nan", log),
    }  # fmt: skip
    keep = np.array([[True, True, False], [True, False, False]])
    found = measure_case(entrants(systems, np.ones((3, 4), np.float32), keep), seconds=0.0)
    cells = {each.name: each for each in found}
    assert list(cells) == list(systems)
    assert cells[baseline].reason is None
    assert cells[baseline].speedup == 1.0
    assert cells[baseline].cosine_mean == pytest.approx(1.0)
    assert cells[baseline].peak_bytes == 1000
    assert cells["refuses"].time is None
    assert cells["refuses"].reason == "refuses refuses to bind"
    assert cells["breaks"].time is None
    assert cells["breaks"].reason == "breaks broke"
    assert cells["nan"].time is None
    assert cells["nan"].reason.startswith("wrong result: mean cosine nan")
    assert cells["hides"].time is not None
    assert cells["hides"].reason == "hides refuses to memory"


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_chosen_by_library_and_by_name(target):
    choose = lambda peers, patterns, sentences=False: [
        row.name for row in select_rows(peers, patterns, sentences=sentences, target=target)
    ]
    baseline = BASELINES[target]
    assert baseline in choose("all", [])
    assert "sentence-transformers" not in choose("all", [])
    assert ("sentence-transformers" in choose("all", [], True)) == (target == "cpu")
    assert choose("none", [])[0] == baseline
    ours = {name for name, each in ROWS[target].items() if each.library == "qbert"}
    assert set(choose("none", [], True)) == {baseline, *ours}
    assert set(choose("none", [])) == {baseline, *(name for name in ours if not name.endswith("-encode"))}
    assert choose("all", ["*-int8*", baseline])[0] == baseline
    with pytest.raises(QBertError, match="allowed are all, none"):
        choose("pytorch", [])
    with pytest.raises(QBertError, match="fits none of"):
        choose("none", ["openvino*"])


@pytest.mark.parametrize("target", TARGETS)
def test_every_row_has_a_class_that_needs_no_optional_library(target):
    for each in ROWS[target].values():
        assert each.target == target
        assert issubclass(each.peer_class(), Peer)
    assert set(bench_bert.QUICK_ROWS[target]) < set(ROWS[target])


def test_a_quick_run_has_four_peers_and_the_baseline():
    names = bench_bert._quick_rows("cpu", "all")
    assert names[0] == BASELINES["cpu"]
    assert len({ROWS["cpu"][name].library for name in names} - {"qbert"}) >= 4
    assert set(bench_bert._quick_rows("cpu", "none")) == {names[0], *(name for name in names if "qbert" in name)}


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
    batch = pad([[CLS, 5, 6, SEP], [CLS, SEP]])
    with torch.inference_mode():
        expected = bert(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        sdpa = SdpaBert(bert)(batch.ids, batch.mask)
        packed = PackedBert(bert, _attention_by_sequence)(batch.ids, batch.mask)
    for actual in (sdpa, packed):
        torch.testing.assert_close(actual[batch.mask.bool()], expected[batch.mask.bool()])
    assert not packed[~batch.mask.bool()].any()


@pytest.mark.parametrize("family", PLAIN)
def test_plain_graphs_compute_what_the_models_do(family, tmp_path):
    model = find_model("tiny" if family == "bert" else f"tiny-{family}", tmp_path)
    encoder = load_float32(model.folder)
    given = sentences(3)
    batch = pad([given[0] * 8, *given[1:]], model.padding)  # longer than ModernBERT's window and MPNet's last bucket
    assert 128 < batch.mask.shape[1] <= model.longest
    with torch.inference_mode():
        expected = encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        plain = plain_encoder(encoder)
        actual = plain(**feed(plain.inputs, batch.ids, batch.mask))
    torch.testing.assert_close(actual[batch.mask.bool()], expected[batch.mask.bool()])


def test_a_model_without_a_plain_graph_is_a_reason():
    from transformers import RobertaConfig, RobertaModel

    model = RobertaModel(RobertaConfig(**TINY))
    with pytest.raises(Unavailable, match="no plain graph of roberta"):
        plain_encoder(model)
    with pytest.raises(Unavailable, match="written for bert"):
        torch_peer.checked_bert(model)


def _attention_by_sequence(query, key, value, cu_seqlens, longest):
    """What varlen_attn computes, which needs a GPU."""
    parts = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        assert 0 < end - start <= longest
        q, k, v = (each[start:end].transpose(0, 1) for each in (query, key, value))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(parts)


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
    monkeypatch.setattr(timing, "REST_LIMIT", 0.05)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        with pytest.raises(Unavailable, match="still use the processor"):
            timing.come_to_rest()
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
    baseline = BASELINES["cpu"]
    names = [baseline, "onnxruntime-fp32", "qbert-w8a8-unfused", "qbert-w8a8-static"]
    settings = Settings(
        models=("tiny",), rows=[ROWS["cpu"][name] for name in names], cases=("2x16", "ragged2"), minutes=0.01, isa="generic",
        cache=tmp_path, json_path=tmp_path / "out.json",
    )  # fmt: skip
    made = bench_cases(settings)
    systems = {system.name: system for system in made.of(SystemRow)}
    reasons = {name: system.reason for name, system in systems.items()}
    assert list(reasons) == names
    assert "no switch for its instruction set" in (reasons.pop("onnxruntime-fp32") or "")
    assert set(reasons.values()) == {None}
    rows = {(each.name, each.case): each for each in made.of(BertRow)}
    for name in reasons:
        for case in settings.cases:
            found = rows[name, case]
            assert found.reason is None
            assert found.time is not None
            assert found.time.repeats >= bench_bert.MIN_ROUNDS
            assert found.speedup is not None
            assert found.over_best_qbert is not None
            assert found.cosine_mean is not None
            assert found.cosine_mean > 0.99
            assert found.work is not None
            assert found.work.precision == ("fp32" if name == baseline else "int8")
    assert systems["qbert-w8a8-static"].padding == "not computed"
    assert systems["qbert-w8a8-static"].weight_bytes < systems[baseline].weight_bytes
    stored = load_results(tmp_path / "out.json")
    assert [each.name for each in stored.of(BertRow)] == [each.name for each in made.of(BertRow)]


@pytest.mark.slow
def test_tiny_run_of_two_models(tmp_path, monkeypatch):
    """One that has no fused encoder is a row that says so, or runs; a case that is too long for a model is one too."""
    monkeypatch.setattr(bench_bert, "CALIBRATION_SENTENCES", 16)
    monkeypatch.setattr(bench_bert, "POOL", 100)
    names = [BASELINES["cpu"], "qbert-w8a8-unfused", "qbert-w8a8"]
    settings = Settings(
        models=("tiny", "tiny-modernbert"), rows=[ROWS["cpu"][name] for name in names], cases=("2x16", "1x513"),
        minutes=0.01, cache=tmp_path,
    )  # fmt: skip
    made = bench_cases(settings)
    reasons = {(each.model, each.name): each.reason for each in made.of(SystemRow)}
    assert list(reasons) == [(model, name) for model in settings.models for name in names]
    reason = reasons.pop(("tiny-modernbert", "qbert-w8a8"))
    assert reason is None or "ModernBertModel is not fused: " in reason
    assert set(reasons.values()) == {None}
    rows = {(each.model, each.name, each.case): each for each in made.of(BertRow)}
    for model, name in reasons:
        assert rows[model, name, "2x16"].time is not None
        assert rows[model, name, "2x16"].cosine_mean > 0.99
        too_long = rows[model, name, "1x513"].reason
        assert too_long == (None if model == "tiny-modernbert" else "513 tokens; tiny takes 512")


def test_a_models_pairs_and_bytes_in_the_bound(tmp_path):
    """Windows bound what attention computes; shared layers are read once."""
    work = {}
    for name in ("tiny-modernbert", "tiny-albert", "tiny-mpnet"):
        model = find_model(name, tmp_path)
        ids = torch.ones(1, 300, dtype=torch.int64)
        work[name] = work_of(model.folder, bert_inputs.Batch(ids, ids), "x", 10**6)
    near = 300 * 129 - 64 * 65
    linears = 2 * 300 * 4 * (4 * 64 * 64 + 3 * 64 * 96)
    assert work["tiny-modernbert"].operations == linears + 4 * 64 * (2 * 300**2 + 2 * near)
    assert work["tiny-albert"].operations == work["tiny-mpnet"].operations


def test_squad_lengths():
    lengths = bert_inputs.squad_lengths(64)
    assert lengths == bert_inputs.squad_lengths(64)
    assert max(lengths) == bert_inputs.SQUAD_WIDTH
    assert sum(lengths) / 64 == pytest.approx(177, abs=2)
    made = make_batch(parse_case("squad8"), sentences(40))
    assert made.mask.sum(1).tolist() == bert_inputs.squad_lengths(8)
    assert made.ids.shape == (8, bert_inputs.SQUAD_WIDTH)
    assert 0.4 < make_batch(parse_case("squad64"), sentences(40)).padding_share < 0.6


def test_without_evaluation_sets_tokens_are_made_up(monkeypatch):
    def missing(*args, **kwargs):
        raise QBertError("not installed")

    monkeypatch.setattr(bert_inputs, "real_sentences", missing)
    made, texts = bert_inputs.any_sentences(50)
    assert not texts
    assert all(each[0] == CLS and each[-1] == SEP and 3 <= len(each) <= bert_inputs.MAX_TOKENS for each in made)
    assert made == bert_inputs.any_sentences(50)[0] != bert_inputs.any_sentences(50, "train")[0]


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_here_is_a_reason(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    host = Host(Broken)
    _, reason, _ = _answer(host, "prepare", [Job(tmp_path, tmp_path, torch.get_num_threads(), device="cuda")])
    assert reason == "no NVIDIA GPU is here"
    with pytest.raises(QBertError, match="no NVIDIA GPU"):
        bench_bert.main(target="cuda")


def test_first_forwards_on_a_gpu_are_at_once_and_not_timed(monkeypatch):
    """Each of three systems waits in its first forward until the others have begun theirs."""
    begun = threading.Barrier(3, timeout=30)

    class Compiling(Fake):
        def call(self, command, *arguments, timeout):
            if command == "bind":
                begun.wait()
            return super().call(command, *arguments, timeout=timeout)

    monkeypatch.setattr(bench_bert, "gpu_state", lambda device: timing.GpuState(sm_mhz=1000))
    names = (BASELINES["cuda"], "qbert-a", "other")
    systems = {name: Compiling(name, []) for name in names}
    keep, reference = np.ones((2, 3), bool), np.ones((6, 4), np.float32)
    rows = measure_case(entrants(systems, reference, keep), seconds=0.0, target="cuda")
    assert [each.reason for each in rows] == [None] * 3
    assert [each.first_seconds for each in rows] == [None] * 3
    assert [each.baseline for each in rows] == [BASELINES["cuda"]] * 3
    assert rows[0].time.before.sm_mhz == 1000


def test_a_batch_without_padding_is_captured_without_a_mask(monkeypatch, tmp_path):
    """The graph's road, with the capture itself left out: what is captured reads fixed inputs."""
    peer = torch_peer.TorchGraph(Job(tmp_path, tmp_path, 1, {"dtype": "float32"}))
    model = BertModel(BertConfig(**TINY), add_pooling_layer=False).eval()
    monkeypatch.setattr(torch_peer, "load_float32", lambda folder: model)
    replays = []
    monkeypatch.setattr(
        torch_peer, "captured", lambda run: (SimpleNamespace(replay=lambda: replays.append(1)), run().detach())
    )
    peer.load()
    batch = pad([[CLS, 5, 6, SEP], [CLS, SEP]])
    for ids, mask in ((batch.ids, batch.mask), (batch.ids[:1], batch.mask[:1])):
        peer.bind(ids.numpy(), mask.numpy())
        found = torch.from_numpy(peer.hidden(peer.forward()))
        with torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
    assert len(replays) == 2


def test_a_gpu_is_waited_for(monkeypatch):
    """Each forward is timed from an idle device until its result is there."""
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: log.append("synchronize"))
    times = child_module._turn(lambda: log.append("forward"), 0.0, child_module.CudaMeter())
    assert len(times) == 1
    assert log == ["synchronize", "forward", "synchronize"]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 77)
    log.clear()
    assert child_module.CudaMeter().peak(lambda: log.append("forward")) == 77
    assert log == ["empty", "reset", "forward", "synchronize"]
