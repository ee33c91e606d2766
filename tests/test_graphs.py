"""Graphs of a fused encoder: which size of batch gets one, the same bits as without, and memory that nobody else sees.

Only `CudaRecorder` needs a GPU. Everything else is tested with a recorder that remembers the function which it was given and
calls it again, on the CPU's operators.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from small_encoders import (
    A8,
    EVERY,
    VARIANTS,
    calibration_of,
    float_model,
    fused_model,
    hidden_of,
    padded_batch,
)
from torch import Tensor, nn

import qbert
from qbert import QBertError, Recipe, explain, fuse_, quantize_, unfuse_
from qbert.encoder import GraphCache, GraphReport, fused_forward, recording, steps
from qbert.encoder.graphs import Bucket, GraphLimits, bucket_of
from qbert.ops.operations import Attention


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


# ---- a recorder without a GPU ---------------------------------------------------------------------------------------


class _Recorder:
    """Remembers functions and calls them again. Nothing that a graph could not do goes through unnoticed."""

    bytes_per_token = 10  # of the largest recording; they share memory

    def __init__(self) -> None:
        self.refusing: str | None = None
        self.failing: Exception | None = None
        self.recorded = self.replayed = self.waits = self.largest = 0
        self._turn = threading.Lock()

    def unavailable(self) -> str | None:
        return self.refusing

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        assert self._turn.acquire(blocking=False), "two turns at once"
        try:
            yield
        finally:
            self._turn.release()

    def record(self, run: Callable[[], None]) -> Callable[[], Any]:
        assert self._turn.locked()
        assert not torch.is_inference_mode_enabled()
        if self.failing is not None:
            raise self.failing
        run()
        self.recorded += 1
        hidden = _closed_over(run, "hidden")
        self.largest = max(self.largest, hidden.shape[0])

        def replay() -> None:
            assert self._turn.locked()
            hidden.fill_(torch.nan)  # what was there must not matter
            run()
            self.replayed += 1

        return replay

    def nbytes(self) -> int:
        return self.bytes_per_token * self.largest

    def wait(self) -> None:
        self.waits += 1

    def reset(self) -> None:
        self.largest = 0


def _closed_over(function: Any, name: str) -> Any:
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))[name].cell_contents


def _leaving_rest(attention: Callable[[Attention], Tensor]) -> Callable[[Attention], Tensor]:
    """Attention as it is on a GPU: rows that no sequence covers are whatever was in memory, here the worst."""

    def covered(a: Attention) -> Tensor:
        count = int(a.cu_seqlens[-1])
        scales = a.scales if a.scales is None or a.scales.dim() == 1 else a.scales[:count]
        out = attention(a._replace(qkv=a.qkv[:count], scales=scales))
        bad = torch.nan if out.is_floating_point() else -128
        return torch.cat([out, out.new_full((a.qkv.shape[0] - count, out.shape[1]), bad)])

    return covered


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[_Recorder]:
    """The CPU has graphs inside. The recorders that were made, one for each prepared encoder."""
    made: list[_Recorder] = []

    def recorder_of(device: torch.device) -> _Recorder:
        made.append(_Recorder())
        return made[-1]

    monkeypatch.setattr(recording, "recorder_of", recorder_of)
    whole = steps.runner

    def runner(operation: str, problem: Any, target: Any) -> Callable[[Any], Any]:
        call = whole(operation, problem, target)
        return _leaving_rest(call) if operation == "attention" else call

    monkeypatch.setattr(steps, "runner", runner)
    return made


def _compiled(model: Any, **limits: int) -> Any:
    for fused in _forwards(model):
        fused.graphs = GraphCache(GraphLimits(**limits))
    return model


def _forwards(model: nn.Module) -> list[Any]:
    return [found for found in map(fused_forward, model.modules()) if found is not None]


def _report(model: Any) -> GraphReport:
    return _forwards(model)[0].graphs.report()


def _ragged(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 97, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.to(torch.int64)}


BATCHES = [
    _ragged(lengths)
    for lengths in ([1], [16], [17], [7, 1, 9], [20] * 4, [33, 0, 5], [1] * 17, [38, 37, 3, 0, 1], [31, 2, 8], [38] * 9)
]


# ---- the recorder with one --------------------------------------------------------------------------------------------


class _Log(list[str]):
    """What was called, in order."""

    @contextlib.contextmanager
    def within(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        self.append(" ".join(["in", *map(str, args), *map(str, kwargs.values())]))
        yield
        self.append("out")


class _Thing:
    """Stands for a stream, an event or a graph of CUDA's."""

    def __init__(self, name: str, log: _Log) -> None:
        self.name, self.log = name, log

    def __str__(self) -> str:
        return self.name

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self.log.append(" ".join([self.name, method, *map(str, args)]))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Log:
    """torch.cuda, as far as a recorder needs it."""
    log = _Log()
    pools = itertools.count(1)
    segments = [{"segment_pool_id": pool, "total_size": size} for pool, size in [((0, 0), 7), ((0, 1), 5), ((0, 1), 6)]]
    cuda = {
        "Stream": lambda device: _Thing("side", log), "Event": lambda: _Thing("event", log),
        "CUDAGraph": lambda: _Thing("graph", log), "graph_pool_handle": lambda: (0, next(pools)),
        "current_stream": lambda device: _Thing("main", log), "is_current_stream_capturing": lambda: False,
        "memory_snapshot": lambda: segments, "device": log.within, "stream": log.within, "graph": log.within,
    }  # fmt: skip
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return log


def test_the_order_of_a_capture(cuda: _Log) -> None:
    recorder = recording.recorder_of(torch.device("cuda", 1))
    assert isinstance(recorder, recording.CudaRecorder)
    assert recorder.unavailable() is None
    with recorder.turn():
        assert cuda == ["main wait_event event"]
        cuda.clear()
        recorder.record(lambda: cuda.append(f"run {gc.isenabled()}"))()
        assert cuda == [
            "in cuda:1", "side wait_stream main", "in side", "run False", "out", "in graph (0, 1) side thread_local",
            "run False", "out", "main wait_stream side", "out", "graph replay",
        ]  # fmt: skip
        assert gc.isenabled()
        cuda.clear()
    assert cuda == ["event record main"]
    assert recorder.nbytes() == 11
    recorder.reset()
    assert recorder.nbytes() == 0
    cuda.clear()
    recorder.wait()
    assert cuda == ["side synchronize", "main synchronize", "event synchronize"]
    assert recording.recorder_of(torch.device("cpu")) is None


# ---- buckets --------------------------------------------------------------------------------------------------------


def test_a_bucket_holds_its_batches_and_wastes_little() -> None:
    before = Bucket(0, 0)
    for tokens in range(1, 40_000):
        bucket = bucket_of(tokens, 1)
        assert bucket.tokens >= max(tokens, before.tokens)
        assert bucket_of(bucket.tokens, 1) == bucket
        assert bucket.tokens % 64 == 0 or bucket.tokens in (16, 32)
        assert tokens <= 512 or bucket.tokens - tokens < bucket.tokens / 9
        before = bucket
    assert len({bucket_of(tokens, 1) for tokens in range(1, GraphLimits.max_tokens + 1)}) == 50


def test_sequences_go_by_powers_of_two() -> None:
    found = {count: bucket_of(64, count).sequences for count in (1, 2, 3, 4, 5, 8, 9, 64, 65)}
    assert found == {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 64: 64, 65: 128}


@pytest.mark.parametrize("field", ["max_tokens", "max_graphs", "max_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, None], ids=str)
def test_limits_that_are_none(field: str, value: Any) -> None:
    with pytest.raises(QBertError, match=rf"{field} is {value!r}; allowed: integers from 1 on"):
        GraphLimits(**{field: value})


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", EVERY)
def test_a_graph_gives_the_bits_of_an_eager_run(family: str, variant: str, recorders: list[_Recorder]) -> None:
    model = fused_model(f"{family}Model", variant)
    eager = [hidden_of(model, **batch) for batch in BATCHES]
    _compiled(model)
    for _ in range(2):
        for batch, expected in zip(BATCHES, eager, strict=True):
            assert torch.equal(hidden_of(model, **batch), expected)
    (recorder,) = recorders
    buckets = {bucket_of(int(batch["attention_mask"].sum()), len(batch["input_ids"])) for batch in BATCHES}
    report = _report(model)
    assert set(report.replays) == buckets
    assert recorder.recorded == len(buckets)
    assert recorder.replayed == sum(report.replays.values()) == 2 * len(BATCHES)
    assert (report.eager, report.evicted) == ({}, 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
def test_every_scheme(linear: str, variant: str, recorders: list[_Recorder]) -> None:
    model = fused_model("BertModel", variant, Recipe(linear, "gobo4"), hidden_size=128, intermediate_size=192)
    eager = [hidden_of(model, **batch) for batch in BATCHES[3:7]]
    for batch, expected in zip(BATCHES[3:7], eager, strict=True):
        assert torch.equal(hidden_of(_compiled(model), **batch), expected)
    assert all(recorder.replayed for recorder in recorders)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_types_of_models_and_padding_anywhere(kind: str, dtype: torch.dtype, recorders: list[_Recorder]) -> None:
    model = quantize_(float_model().to(dtype), "w8a8+none", fuse=True)
    batch = padded_batch(kind=kind)
    expected = hidden_of(model, **batch)
    for _ in range(2):
        found = hidden_of(_compiled(model), **batch)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert all(recorder.replayed for recorder in recorders)


def test_everything_that_ids_come_with(recorders: list[_Recorder]) -> None:
    model, ids = fused_model(), padded_batch(3, 9)["input_ids"]
    positions, types = torch.arange(20, 29), torch.randint(0, 2, (3, 9))
    calls: list[dict[str, Any]] = [
        {"position_ids": positions[None]},
        {"position_ids": positions.flip(0).expand(3, 9), "token_type_ids": types},
        {"token_type_ids": types[:1]},
        {"output_hidden_states": -1},
        {"input_ids": ids.to(torch.int32)},
        {"input_ids": ids.repeat_interleave(2, dim=1)[:, ::2]},
    ]
    calls = [{"input_ids": ids} | call for call in calls]
    eager = [hidden_of(model, **call) for call in calls]
    _compiled(model)
    for call, expected in zip(calls, eager, strict=True):
        assert torch.equal(hidden_of(model, **call), expected), list(call)
    assert _report(model).replays == {Bucket(32, 4): len(calls)}


def test_heads_and_poolers_run_as_ever(recorders: list[_Recorder]) -> None:
    model, batch = fused_model("BertForSequenceClassification", "static"), padded_batch()
    expected = hidden_of(model, **batch)
    assert torch.equal(hidden_of(_compiled(model), **batch), expected)
    assert recorders[0].replayed == 1


def test_nothing_to_compute(recorders: list[_Recorder]) -> None:
    model = _compiled(fused_model())
    padding = torch.zeros(2, 5, dtype=torch.int64)
    assert torch.all(hidden_of(model, input_ids=padding, attention_mask=padding) == 0)
    assert hidden_of(model, input_ids=torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 64)
    assert _report(model) == GraphReport({}, {}, 0, 0)


def test_bad_ids_are_refused_and_leave_nothing_behind(recorders: list[_Recorder]) -> None:
    model, batch = fused_model(), padded_batch()
    expected = hidden_of(model, **batch)
    _compiled(model)
    with pytest.raises(QBertError, match="97 is out of range"):
        hidden_of(model, input_ids=torch.full((6, 11), 97))
    with pytest.raises(RuntimeError, match=r"ids are torch\.uint8; allowed: torch\.int32, torch\.int64"):
        hidden_of(model, input_ids=batch["input_ids"].to(torch.uint8))
    assert torch.equal(hidden_of(model, **batch), expected)


# ---- memory that only the graphs know -------------------------------------------------------------------------------


def test_results_are_the_callers(recorders: list[_Recorder]) -> None:
    model = _compiled(fused_model())
    for batch in (BATCHES[4], BATCHES[3]):  # with and without padding
        with torch.no_grad():
            first = model(**batch)
            kept = [first.last_hidden_state.clone(), first.pooler_output.clone()]
            model(**{name: each.flip(0) for name, each in batch.items()})
            assert torch.equal(first.last_hidden_state, kept[0])
            assert torch.equal(first.pooler_output, kept[1])
            again = model(**batch).last_hidden_state
            again.fill_(torch.nan)  # the caller's to write to
            assert torch.equal(model(**batch).last_hidden_state, kept[0])


def test_a_replay_reads_and_writes_static_memory_only(recorders: list[_Recorder]) -> None:
    model = fused_model("BertModel", "static")
    batch, other = _ragged([20, 9]), _ragged([8, 20], seed=1)
    expected = [hidden_of(model, **each) for each in (batch, other)]
    _compiled(model)
    given = {name: each.clone() for name, each in batch.items()}
    first = hidden_of(model, **given)
    for each in given.values():  # what the graph was captured with
        each.fill_(10**6)
    assert torch.equal(first, expected[0])
    first.fill_(torch.nan)
    assert torch.equal(hidden_of(model, **other), expected[1])
    assert torch.equal(hidden_of(model, **batch), expected[0])
    assert recorders[0].recorded == 1


def test_captured_under_inference_mode_and_replayed_outside(recorders: list[_Recorder]) -> None:
    model, batch = fused_model(), padded_batch()
    expected = hidden_of(model, **batch)
    _compiled(model)
    with torch.inference_mode():
        assert torch.equal(model(**batch).last_hidden_state, expected)
    with torch.no_grad():
        found = model(**batch).last_hidden_state
    assert not found.is_inference()
    assert torch.equal(found, expected)
    assert recorders[0].recorded == 1


def test_tokens_beyond_the_batch_do_not_depend_on_the_batch_before(recorders: list[_Recorder]) -> None:
    model = _compiled(fused_model())
    hidden_of(model, **_ragged([30, 30, 4]))
    hidden_of(model, **_ragged([30, 3, 1]))
    buffers = _forwards(model)[0].graphs._graphs._buffers
    assert torch.all(buffers.ids[:, 34:64] == 0)
    assert buffers.cu_seqlens[:5].tolist() == [0, 30, 33, 34, 34]


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_the_graph_not_used_for_longest_goes(recorders: list[_Recorder], caplog: pytest.LogCaptureFixture) -> None:
    model = fused_model()
    sizes = {16: _ragged([10]), 32: _ragged([20]), 64: _ragged([40])}
    eager = {size: hidden_of(model, **batch) for size, batch in sizes.items()}
    _compiled(model, max_graphs=2)
    held = []
    with caplog.at_level(logging.WARNING, logger="qbert"):
        for size in (16, 32, 16, 64, 16, 32, 32):
            assert torch.equal(hidden_of(model, **sizes[size]), eager[size])
            held.append([bucket.tokens for bucket in _report(model).replays])
    assert held == [[16], [16, 32], [32, 16], [16, 64], [64, 16], [16, 32], [16, 32]]
    assert _report(model).evicted == 2
    assert recorders[0].recorded == 4
    assert caplog.text.count("more buckets than max_graphs=2") == 1


def test_too_much_memory(recorders: list[_Recorder], caplog: pytest.LogCaptureFixture) -> None:
    model = fused_model()
    small, large = _ragged([10]), _ragged([40] * 5)
    eager = [hidden_of(model, **batch) for batch in (small, large)]
    _compiled(model, max_tokens=256, max_bytes=256 * (3 * 8 + 4 + 64 * 4) + 4 + 10 * 100)
    with caplog.at_level(logging.WARNING, logger="qbert"):
        for _ in range(3):
            for batch, expected in zip((small, large), eager, strict=True):
                assert torch.equal(hidden_of(model, **batch), expected)
    report = _report(model)
    reason = "graphs of more than 255 tokens take more memory than there is or max_bytes allows"
    assert report.eager == {reason: 3}
    assert report.replays == {Bucket(16, 1): 2}  # it went when all memory was given back, and came again
    assert caplog.text.count(reason) == 1
    assert 0 < report.nbytes <= 256 * 284 + 4 + 10 * 16


def test_out_of_memory_while_capturing(recorders: list[_Recorder]) -> None:
    model, batch = fused_model(), padded_batch()
    expected = hidden_of(model, **batch)
    _compiled(model)
    hidden_of(model, **_ragged([3]))
    recorders[0].failing = torch.OutOfMemoryError("no")
    assert torch.equal(hidden_of(model, **batch), expected)
    recorders[0].failing = None
    assert torch.equal(hidden_of(model, **batch), expected)
    assert [reason[:30] for reason in _report(model).eager] == ["graphs of more than 31 tokens "]
    hidden_of(model, **_ragged([3]))
    assert list(_report(model).replays) == [Bucket(16, 1)]


def test_what_cannot_be_captured_is_an_error(recorders: list[_Recorder]) -> None:
    model, batch = fused_model(), padded_batch()
    expected = hidden_of(model, **batch)
    _compiled(model)
    hidden_of(model, **_ragged([3]))
    recorders[0].failing = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="not permitted"):
        hidden_of(model, **batch)
    recorders[0].failing = None
    assert torch.equal(hidden_of(model, **batch), expected)
    assert list(_report(model).replays) == [Bucket(32, 4)]


def test_limits_that_do_not_go_together(recorders: list[_Recorder]) -> None:
    model = _compiled(fused_model(), max_tokens=4096, max_bytes=4096)
    with pytest.raises(QBertError, match=r"max_bytes is 4096, but batches of max_tokens=4096 .* through 11\d{5} bytes"):
        hidden_of(model, **padded_batch())


# ---- what runs eagerly, and that it is said -------------------------------------------------------------------------


def test_reasons_for_an_eager_run(recorders: list[_Recorder], caplog: pytest.LogCaptureFixture) -> None:
    model, batch = fused_model(), padded_batch()
    rows = model.embeddings.word_embeddings(batch["input_ids"])
    many = {"input_ids": torch.ones(80, 1, dtype=torch.int64), "attention_mask": torch.arange(80)[:, None] < 3}
    calls: dict[str, dict[str, Any]] = {
        "inputs_embeds were given": {"inputs_embeds": rows, "attention_mask": batch["attention_mask"]},
        "hidden states were asked for": batch | {"output_hidden_states": True},
        "more than 50 tokens": _ragged([40, 11]),
        "more than 64 sequences": many,
    }
    eager = [hidden_of(model, **call) for call in calls.values()]
    _compiled(model, max_tokens=50)
    with caplog.at_level(logging.WARNING, logger="qbert"):
        for _ in range(2):
            for call, expected in zip(calls.values(), eager, strict=True):
                assert torch.equal(hidden_of(model, **call), expected)
    assert _report(model).eager == dict.fromkeys(calls, 2)
    assert all(caplog.text.count(reason) == 1 for reason in calls)
    hidden_of(model, **_ragged([40, 10]))
    recorders[0].refusing = "the caller is capturing a CUDA graph"
    hidden_of(model, **_ragged([40, 10]))
    assert _report(model).eager["the caller is capturing a CUDA graph"] == 1
    assert _report(model).replays == {Bucket(64, 2): 1}


def test_a_compiled_model_on_a_device_without_graphs_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = fused_model(), padded_batch()
    expected = hidden_of(model, **batch)
    assert torch.equal(hidden_of(_compiled(model), **batch), expected)
    assert _report(model) == GraphReport({}, {"the model is on cpu": 1}, 0, 0)
    assert "a batch runs without a CUDA graph, others may follow: the model is on cpu" in caplog.text


def test_explain_says_what_was_captured(recorders: list[_Recorder]) -> None:
    model = _compiled(fused_model("BertForSequenceClassification"))
    hidden_of(model, **padded_batch())
    hidden_of(model, **padded_batch())
    with torch.no_grad():
        model(**padded_batch(), output_hidden_states=True)
    row = explain(model).encoders[0]
    assert row.graphs == _report(model)
    assert str(row).splitlines()[1:] == [
        "  CUDA graphs: 1 captured, 4 MiB",
        "  32 tokens in 4 sequences: replayed 2 times",
        "  no graph 1 times: hidden states were asked for",
    ]
    assert explain(unfuse_(model)).encoders[0].graphs is None


# ---- the model changes ----------------------------------------------------------------------------------------------


def test_changes_of_the_model_drop_its_graphs(recorders: list[_Recorder]) -> None:
    model, batch = _compiled(fused_model()), padded_batch()
    before = hidden_of(model, **batch)

    def check() -> Tensor:
        found = hidden_of(model, **batch)
        assert torch.equal(found, hidden_of(fuse_(unfuse_(copy.deepcopy(model))), **batch))
        return found

    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.bias.add_(1.0)
    assert not torch.equal(check(), before)
    assert [recorder.waits for recorder in recorders] == [1, 0]
    model.load_state_dict(quantize_(float_model(seed=5), "w8a8+none").state_dict())
    check()
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(64)
    check()
    model.encoder.layer = model.encoder.layer[:1]
    check()
    nn.Module.to(model, torch.bfloat16)
    assert check().dtype == torch.bfloat16
    assert [recorder.waits for recorder in recorders] == [1] * (len(recorders) - 1) + [0]
    assert len(_report(model).replays) == 1


def test_training_is_refused(recorders: list[_Recorder]) -> None:
    model = _compiled(fused_model())
    with pytest.raises(QBertError, match="does not take training mode"):
        model.train()(**padded_batch())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_compiled_and_have_no_graphs(copied: Any, recorders: list[_Recorder]) -> None:
    model, batch = _compiled(fused_model(), max_graphs=3), padded_batch()
    expected = hidden_of(model, **batch)
    other = copied(model)
    assert _forwards(other)[0].graphs.limits == GraphLimits(max_graphs=3)
    assert _report(other) == GraphReport({}, {}, 0, 0)
    assert torch.equal(hidden_of(other, **batch), expected)
    assert len(recorders) == 2
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.bias.add_(1.0)
    assert torch.equal(hidden_of(other, **batch), expected)


def test_saved_and_loaded(recorders: list[_Recorder], tmp_path: Any) -> None:
    model, batch = _compiled(fused_model("BertModel", "static")), padded_batch()
    expected = hidden_of(model, **batch)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert _forwards(loaded)[0].graphs is None
    assert torch.equal(hidden_of(loaded, **batch), expected)


def test_unfusing_takes_graphs_away_and_fusing_again_keeps_them(recorders: list[_Recorder]) -> None:
    model, batch = quantize_(float_model(), "w8a8+none", fuse=True), padded_batch()
    qbert.compile(model, max_graphs=5)
    dynamic = hidden_of(model, **batch)
    fuse_(model, calibration_of(model))  # the calibration runs it module by module
    assert not torch.equal(hidden_of(model, **batch), dynamic)
    assert _forwards(model)[0].graphs.limits.max_graphs == 5
    assert len(_report(model).replays) == 1
    fuse_(unfuse_(model))
    assert _forwards(model)[0].graphs is None
    assert torch.equal(hidden_of(model, **batch), dynamic)


# ---- threads --------------------------------------------------------------------------------------------------------


def test_threads_take_turns(recorders: list[_Recorder]) -> None:
    model = fused_model("BertModel", "static")
    eager = [hidden_of(model, **batch) for batch in BATCHES]
    _compiled(model, max_graphs=4)

    def work(index: int) -> bool:
        return torch.equal(hidden_of(model, **BATCHES[index % len(BATCHES)]), eager[index % len(BATCHES)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8 * len(BATCHES))))
    assert recorders[0].replayed == 8 * len(BATCHES)
    assert len(_report(model).replays) == 4


def test_two_models_have_graphs_of_their_own(recorders: list[_Recorder]) -> None:
    models = [fused_model(), fused_model(num_hidden_layers=1)]
    eager = [[hidden_of(model, **batch) for batch in BATCHES[:4]] for model in models]
    for model in models:
        _compiled(model)
    for (batch, *expected), _ in itertools.product(zip(BATCHES, *eager, strict=False), range(2)):
        for model, each in zip(models, expected, strict=True):
            assert torch.equal(hidden_of(model, **batch), each)


# ---- qbert.compile --------------------------------------------------------------------------------------------------


def test_compile_captures_ahead(recorders: list[_Recorder]) -> None:
    model, batch = fused_model("BertForSequenceClassification"), _ragged([20, 11])
    expected = hidden_of(model, **batch)
    assert qbert.compile(model, warm=[(1, 16), (2, 16), (4, 40)]) is model
    assert list(_report(model).replays) == [Bucket(16, 1), Bucket(32, 2), Bucket(192, 4)]
    recorded = recorders[-1].recorded
    assert torch.equal(hidden_of(model, **batch), expected)
    assert recorders[-1].recorded == recorded


def test_compile_takes_every_encoder(recorders: list[_Recorder]) -> None:
    model = nn.ModuleList([fused_model(), fused_model("RobertaModel")])
    qbert.compile(model, warm=[(1, 8)])
    assert [len(fused.graphs.report().replays) for fused in _forwards(model)] == [1, 1]


def test_compile_refuses_by_name() -> None:
    model = fused_model()
    with pytest.raises(QBertError, match=r"BertModel is on cpu; allowed: cuda\. qbert\.compile captures CUDA graphs"):
        qbert.compile(model)
    assert _forwards(model)[0].graphs is None
    unfused = quantize_(float_model("BertForSequenceClassification"), "w8a8+none")
    with pytest.raises(
        QBertError, match=r"bert is not fused: call qbert\.fuse_\(model\) first.*torch\.compile for others"
    ):
        qbert.compile(unfused)
    with pytest.raises(QBertError, match=r"BertModel is not fused: .* is float"):
        qbert.compile(float_model())
    with pytest.raises(QBertError, match="nothing to compile: Sequential is of no family"):
        qbert.compile(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("size", [(0, 4), (4,), 4, (2.0, 4), (1, 2, 3), (5, 20)], ids=str)
def test_sizes_to_warm_that_are_none(size: Any, recorders: list[_Recorder]) -> None:
    model = fused_model()
    with pytest.raises(QBertError, match=r"warm: .*; allowed: \(batch, tokens\) from \(1, 1\) up to 64 tokens in all"):
        qbert.compile(model, warm=[(1, 4), size], max_tokens=64)
    assert _forwards(model)[0].graphs is None


def test_a_compiler_leaves_graphs_alone(recorders: list[_Recorder]) -> None:
    model, batch = _compiled(fused_model()), padded_batch()
    expected = hidden_of(model, **batch)
    assert torch.equal(hidden_of(torch.compile(model, backend="eager"), **batch), expected)
    assert _report(model).replays == {Bucket(32, 4): 2}
