"""Linears and attention: what is timed computes what it should, a wrong result has no time, and what fails says why."""

import functools
import math
import re

import pytest
import torch
from rich.console import Console

from benchmarks import bench_attention, bench_gemm, linears, recorder
from benchmarks import predict as prediction
from benchmarks.bench_attention import Case
from benchmarks.bounds import Bounds
from benchmarks.linears import Entry, Problem, Weights, entries
from benchmarks.machine import describe
from benchmarks.peers import gemlite_peer
from benchmarks.results_schema import AttentionRow, CeilingRow, GemmRow, Work, load_results
from qbert.errors import MissingDependency, QBertError
from qbert.ops import Activation
from qbert.ops.kernel import Kernel
from qbert.ops.operations import Linear
from qbert.ops.reference import linear
from qbert.timing import Unavailable

CPU = torch.device("cpu")
SETTINGS = bench_gemm.Settings(CPU, 0.001)
BOUNDS = Bounds({"copy": 1e10, "fp32": 1e11, "bf16": 1e11, "int8": 1e12})
PEERS = ("torchao", "bitsandbytes")


@pytest.fixture(scope="module")
def weights():
    return Weights(96, 64, CPU)


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(linears, "sets_beyond_caches", lambda size, device: 3)


@pytest.mark.parametrize("t", [1, 17, 65])
def test_every_scheme_is_measured_and_right(weights, t):
    rows = bench_gemm.measure_problem(Problem(weights, t, cold=t < 65), SETTINGS)
    ours = {row.name: row for row in rows if row.library in ("qbert", "torch")}
    for name in linears.INTEGER_SCHEMES:
        assert {f"qbert {name}", f"qbert {name} + quantize"} <= set(ours)
    assert ("qbert gobo3" in ours) == (t <= linears.WEIGHT_ONLY_TOKENS)
    for row in ours.values():
        assert row.reason is None, row
        assert row.time is not None
        assert row.work is not None
        assert (row.t, row.n, row.k, row.regime) == (t, 96, 64, "cold" if t < 65 else "warm")
        assert row.kernel
        if "quantize_per_token" not in row.name:
            assert row.work.operations == 2 * t * 96 * 64
            assert row.baseline == "torch fp32"
            assert row.speedup is not None
    assert 64 * 96 + 4 * 96 <= ours["qbert w8a8"].weight_bytes < 4 * 64 * 96
    assert ours["qbert w8a8 int8 out"].out_dtype == "int8"
    assert ours["qbert w8a8"].work.bytes < ours["qbert w8a8 + quantize"].work.bytes < ours["torch fp32"].work.bytes
    assert ours["qbert quantize_per_token"].speedup is None


def test_missing_peers_are_rows_with_their_reason(weights):
    for row in bench_gemm.measure_problem(Problem(weights, 4, cold=False), SETTINGS):
        if row.library in PEERS and row.time is None:
            assert row.reason == f"{row.library} is not installed: pip install --no-deps -r requirements-peers.txt"


def _entry(name, call, problem=None, limit=0.01):
    """A candidate that computes whatever `call` does."""

    def build(problem):
        built = linears._torch_linear(problem, torch.float32)
        built.candidate = linears.Candidate(call, problem.sets(built.candidate.sets[0]))
        return built

    return Entry(name, "made-up", build)


def test_a_wrong_result_has_no_time(weights):
    def broken(x, weight, bias):
        raise RuntimeError("no kernel\nfor this shape")

    fit = functools.partial(_entry)
    chosen = [
        fit("torch fp32", torch.nn.functional.linear), fit("nan", lambda x, w, b: x @ w.t() * math.nan),
        fit("no bias", lambda x, w, b: x @ w.t()), fit("broken", broken),
    ]  # fmt: skip
    rows = {row.name: row for row in bench_gemm.measure_problem(Problem(weights, 8, cold=True), SETTINGS, chosen)}
    assert rows["torch fp32"].time is not None
    assert [rows[name].time for name in ("nan", "no bias", "broken")] == [None] * 3
    assert rows["nan"].reason.startswith("wrong result")
    assert rows["no bias"].reason.startswith("wrong result: relative error")
    assert rows["broken"].reason == "RuntimeError: no kernel for this shape"


def test_checks():
    expected = torch.tensor([[100.0, -50.0], [0.0, 1.0]])
    one_off = expected.clone()
    one_off[1, 0] = 5.0  # the norm of the error is small, the element is wrong
    assert linears.near(expected, 0.05)(one_off) is None
    assert "off by 0.05" in linears.everywhere(expected, 0.01)(one_off)
    codes = linears.codes_of(expected, 0.5)  # 100 / 0.5 saturates
    assert codes(torch.tensor([[127, -100], [0, 2]], dtype=torch.int8)) is None
    assert codes(torch.tensor([[126, -99], [1, 3]], dtype=torch.int8)) is None
    assert codes(torch.tensor([[125, -100], [0, 2]], dtype=torch.int8)) == "wrong result: a code is off by 2"


def test_cold_sets_are_copies(weights):
    held, _ = weights.quantized("w8a8")
    record = Linear(torch.ones(2), None, held, None, Activation.GELU, False, torch.float32)
    first = (torch.ones(2), weights.linear(torch.float32), record, 1)
    sets = Problem(weights, 1, cold=True).sets(first)
    assert len(sets) == 3
    addresses = lambda each: (each[0], each[1].weight, each[2].x, each[2].weight.qdata)
    assert len({tensor.data_ptr() for each in sets for tensor in addresses(each)}) == 12
    assert all(each[2].activation is Activation.GELU and each[3] == 1 for each in sets)
    assert all(torch.equal(each[2].weight.qdata, held.qdata) for each in sets)
    assert linears.bytes_of(record) == 8 + held.nbytes
    assert Problem(weights, 1, cold=False).sets(first) == [first]


def test_candidates_of_a_gpu_are_those_of_the_plan():
    names = [entry.name for entry in entries(torch.device("cuda"), 4096)]
    assert names[0] == bench_gemm.BASELINE["cuda"] == "torch bf16"
    assert {"torch fp16", "torch._int_mm", "torch._int_mm compiled", "torchao int8 dynamic", "bitsandbytes int8",
            "bitsandbytes nf4", "gemlite a8w8", "gemlite a16w4", "qbert w8a8 int8 out"} <= set(names)  # fmt: skip
    assert "qbert gobo3" not in names
    assert {"qbert gobo3a8 cuda", "qbert gobo3a8 triton", "qbert w8a8 int8 out cuda"} <= set(names)
    few = [entry.name for entry in entries(torch.device("cuda"), 64)]
    assert {"qbert gobo3", "qbert gobo3 cuda", "qbert w4a16 triton"} <= set(few)
    assert len(set(names)) == len(names)


def test_kernels_past_the_operator(weights, monkeypatch):
    """A launcher computes what the operator does, and says by name that it does not take a problem."""

    def row(name, obstacle):
        return Kernel("linear", name, linear, lambda problem, target: obstacle, lambda problem, target: "")

    rows = {"cuda": (row("cuda linear", None),), "triton": (row("triton linear", "not that one"),)}
    monkeypatch.setattr(linears, "KERNELS", rows)
    monkeypatch.setattr(linears, "compiled_tile", lambda problem, scheme: f"a tile for {scheme}")
    chosen = [linears._qbert_entry("w8a8", "", f" {each}", kernels=each) for each in linears.KERNELS]
    good, bad = bench_gemm.measure_problem(Problem(weights, 4, cold=False), SETTINGS, chosen)
    assert (good.name, good.kernel, good.reason) == ("qbert w8a8 cuda", "cuda linear", None)
    assert good.tile == "a tile for w8a8"
    assert bad.reason == "triton has no kernel for this problem: not that one"


def test_gemlite_by_whatever_its_helper_is_called(monkeypatch):
    class Helper:
        def __init__(self, device):
            self.device = device

        def from_linear(self, linear):
            return (self.device, linear)

    layer = torch.nn.Linear(2, 2)
    with pytest.raises(Unavailable, match="gemlite"):
        gemlite_peer.layer_of(layer, "a8w8")
    for name in gemlite_peer.HELPERS["a8w8"]:
        monkeypatch.setattr(gemlite_peer, "library", lambda module, name=name: type("helper", (), {name: Helper}))
        assert gemlite_peer.layer_of(layer, "a8w8") == ("cpu", layer)
    with pytest.raises(Unavailable, match="A16W4"):
        gemlite_peer.layer_of(layer, "a16w4")


def test_gemlites_four_bit_codes():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).half()
    codes, scales, zeros = gemlite_peer.four_bits(weight)
    assert (codes.dtype, codes.shape, scales.shape, zeros.shape) == (torch.uint8, (8, 128), (8, 2), (8, 2))
    meant = (codes.float().view(8, 2, 64) - zeros[..., None].float()) * scales[..., None].float()
    assert float((meant.flatten(1) - weight.float()).norm() / weight.float().norm()) < 0.12
    assert torch.isfinite(gemlite_peer.four_bits(torch.zeros(1, 64).half())[1]).all()


def test_the_grid_has_all_shapes_and_the_most_valuable_tokens_first():
    problems = bench_gemm.grid(["base", "large"], bench_gemm.TOKENS)
    assert len(problems) == len(set(problems)) == 8 * 15
    assert {t for _, _, t in problems} == {2**i for i in range(15)}
    assert {t for _, _, t in problems[:8]} == {1024}
    assert set(bench_gemm.QUICK_TOKENS["cuda"]) < set(bench_gemm.TOKENS)


def test_a_deadline_leaves_the_rest_out():
    assert bench_gemm.run([(8, 8, 1), (8, 8, 2)], SETTINGS, lambda row: pytest.fail("measured"), deadline=0.0) == 2


def test_the_command_writes_rows_and_prints_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_gemm, "LINEARS", {"base": ((32, 64),)})
    monkeypatch.setattr(bench_gemm, "device_bounds", lambda recorder, device: BOUNDS)
    path = tmp_path / "out.json"
    bench_gemm.main(tokens=[2], model=["base"], only=["w8a8"], seconds=0.001, json_path=path, threads=1)
    stored = load_results(path).of(GemmRow)
    assert [row.name for row in stored if row.library in ("torch", "qbert")] == [
        "torch fp32", "qbert w8a8", "qbert w8a8 + quantize", "qbert w8a8 int8 out"
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "linear 32 x 64" in shown
    assert "qbert w8a8 + quantize" in shown


def test_prediction_needs_no_gpu(capsys):
    bench_gemm.main(target="h100", predict=True, model=["base"], tokens=[4096])
    assert "computed, not measured" in capsys.readouterr().out
    with pytest.raises(QBertError, match="allowed are base, large"):
        bench_gemm.main(model=["huge"])
    with pytest.raises(QBertError, match="allowed are cpu, cuda"):
        bench_gemm.main(target="tpu", quick=True)


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case((5, 17, 3), 2, 32), Case((16, 16), 3, 64), Case((1,), 1, 64)], ids=str)
def test_attention_is_right_with_and_without_padding(case):
    rows = {row.name: row for row in bench_attention.measure_case(case, CPU, 0.001)}
    assert next(iter(rows)) == bench_attention.BASELINE
    for row in rows.values():
        assert row.reason is None, row
        assert row.time is not None
        assert row.largest_error < 0.03
        assert row.work.operations == 4 * sum(n * n for n in case.lengths) * case.heads * case.head_dim
        assert (row.tokens, row.length, row.ragged) == (sum(case.lengths), max(case.lengths), case.ragged)
    ragged = ("masked", "not computed") if case.ragged else ("none", "none")
    assert (rows["torch sdpa"].padding, rows["qbert int8"].padding) == ragged
    assert rows["torch sdpa fp32"].largest_error < 1e-5


def test_wrong_attention_has_no_time():
    def build(problem, wrong):
        made = bench_attention._sdpa(problem, dtype=torch.float32)
        call = made.candidate.call
        candidate = bench_attention.Candidate(lambda qkv: wrong(call(qkv)), made.candidate.sets)
        return bench_attention.Built(candidate, made.unpadded, made.padding, made.kernel, made.work)

    def entry(name, wrong):
        return bench_attention.Entry(name, "made-up", functools.partial(build, wrong=wrong))

    chosen = [
        entry("right", lambda y: y), entry("nan", lambda y: y * math.nan), entry("double", lambda y: 2 * y),
        bench_attention.Entry("flash_attn", "flash_attn", bench_attention._flash_attn),
    ]  # fmt: skip
    rows = {row.name: row for row in bench_attention.measure_case(Case((4, 2), 1, 32), CPU, 0.001, chosen)}
    assert rows["right"].time is not None
    assert rows["right"].speedup is None  # the baseline is not there
    for name in ("nan", "double"):
        assert rows[name].time is None
        assert rows[name].reason.startswith("wrong result: off by")
    assert "flash_attn is not installed" in rows["flash_attn"].reason


def test_attention_cases_and_table(capsys):
    cases = bench_attention.cases(["base", "minilm"], bench_attention.LENGTHS, "cuda")
    assert {case.head_dim for case in cases} == {64, 32}
    assert {max(case.lengths) for case in cases if not case.ragged} == {64, 128, 256, 384, 512}
    assert [len(case.lengths) for case in cases if case.ragged] == [64, 64]
    assert len(set(cases)) == len(cases)
    rows = bench_attention.measure_case(Case((4, 4), 1, 32), CPU, 0.001)
    Console(width=200).print(bench_attention.table(rows, describe(), BOUNDS))
    assert "qbert int8 per token" in capsys.readouterr().out
    assert AttentionRow.model_validate_json(rows[0].model_dump_json()).model_dump() == rows[0].model_dump()
    with pytest.raises(QBertError, match="1 to 512"):
        bench_attention.main(length=[513])
    with pytest.raises(QBertError, match="base, large, minilm"):
        bench_attention.main(model=["huge"])


def test_names_of_candidates_on_a_gpu():
    names = [entry.name for entry in bench_attention.entries(torch.device("cuda"))]
    assert {"torch sdpa flash", "torch sdpa cudnn", "torch sdpa efficient", "torch varlen_attn", "flash_attn"} < set(
        names
    )


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_bounds():
    rows = [
        CeilingRow(device="cpu", quantity="copy", per_second=10.0), CeilingRow(device="cpu", quantity="int8", per_second=100.0),
        CeilingRow(device="cpu", quantity="fp8", reason="no such unit"),
    ]  # fmt: skip
    bounds = Bounds.of(rows)
    assert bounds.seconds(Work(operations=200, precision="int8", bytes=10)) == 2.0
    assert bounds.share(Work(operations=200, precision="int8", bytes=40), 8.0) == 0.5
    assert bounds.seconds(Work(operations=0, precision="fp8", bytes=40)) == 4.0
    assert bounds.share(Work(operations=1, precision="fp8", bytes=40), 8.0) is None


def test_pictures_of_what_was_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_gemm, "LINEARS", {"base": ((32, 64),)})
    monkeypatch.setattr(bench_attention, "HEADS", {"base": (1, 32)})
    monkeypatch.setitem(bench_attention.TOKENS, "cpu", 16)
    monkeypatch.setitem(bench_attention.RAGGED, "cpu", 2)
    for benchmark in (bench_gemm, bench_attention):
        monkeypatch.setattr(benchmark, "device_bounds", lambda recorder, device: BOUNDS)
    bench_gemm.main(tokens=[2, 4], model=["base"], only=["w8a8"], seconds=0.001, plot=tmp_path / "gemm.svg", threads=1)
    bench_attention.main(model=["base"], length=[8], seconds=0.001, plot=tmp_path / "attention.svg", threads=1)
    assert {path.name for path in tmp_path.iterdir()} == {"gemm.svg", "attention.svg"}


def test_a_picture_that_cannot_be_drawn_is_known_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder.importlib.util, "find_spec", lambda name: None)
    for main in (bench_gemm.main, bench_attention.main):
        with pytest.raises(MissingDependency, match="matplotlib"):
            main(plot=tmp_path / "x.png")


def test_the_tile_of_a_gpu_in_a_line(weights, monkeypatch):
    monkeypatch.setattr(linears, "target_of", lambda device: prediction.GPUS["h100"])
    problem = Problem(weights, 4096, cold=False)
    assert re.fullmatch(r"\w+ \d+x\d+x\d+, \d+ warps, \d+ stages(, k / \d+)?", linears.tile_of("w8a8_linear", problem))
    assert linears.tile_of("no_such_operation", problem) is None
