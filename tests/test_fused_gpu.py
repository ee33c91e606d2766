"""The fused encoder and its graphs on a GPU: what the CPU computes, the same bits in every batch, no waiting for the host."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from small_encoders import (
    A8,
    BY_DISTANCE,
    FOUR,
    LEAST_SQNR_DB,
    VARIANTS,
    bound,
    calibrated,
    float_model,
    fused_model,
    hidden_of,
    padded_batch,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import qbert
from qbert import QBertError, Recipe, quantize_, unfuse_
from qbert.encoder import fused_forward
from qbert.encoder.batch import packing_of
from qbert.encoder.graphs import Bucket
from qbert.formats import Role, scheme_names
from qbert.metrics import sqnr_db

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEARS = scheme_names(Role.LINEAR)
FEW = ("w8a8", "gobo3a8", "w4a16")  # of them, each of which Inductor compiles for many seconds
LENGTHS = (1, 2, 16, 17, 31, 64, 65, 129, 300)
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}  # heads of 64


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def _on_gpu(model: Any) -> Any:
    return copy.deepcopy(model).to("cuda")


def _moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.cuda() for name, each in batch.items()}


def _ragged(lengths: tuple[int, ...], seed: int = 0, width: int = 0) -> dict[str, Tensor]:
    width = max(width, *lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 97, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return _moved({"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.to(torch.int64)})


@functools.cache
def _wide(variant: str, linear: str = "w8a8", dtype: torch.dtype = torch.float32) -> Any:
    calibration = calibrated("BertModel", tuple(WIDE.items())) if variant == "static" else None
    model = float_model("BertModel", **WIDE).to(dtype)
    return quantize_(model, Recipe(linear, "w8"), fuse=True, calibration=calibration).to("cuda")


@contextmanager
def _sync_debug(mode: str) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- what the CPU computes ------------------------------------------------------------------------------------------


def _assert_alike(found: Tensor, expected: Tensor, there: Tensor, least: float) -> None:
    found, expected = found.cpu().float(), expected.float()
    assert torch.all(found[~there] == 0)
    assert sqnr_db(expected[there], found[there]) > least
    assert cosine_similarity(found[there], expected[there], dim=-1).min() > 0.98


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_computes_what_the_cpu_does(dtype: torch.dtype, linear: str, variant: str) -> None:
    calibration = calibrated("BertModel", ()) if variant == "static" else None
    model = quantize_(float_model().to(dtype), linear, fuse=True, calibration=calibration)
    batch = padded_batch(6, 23)
    there = batch["attention_mask"].bool()
    found = hidden_of(_on_gpu(model), **_moved(batch))
    assert found.dtype == dtype
    least = LEAST_SQNR_DB[variant] if dtype == torch.float32 else 18.0  # half precision has errors of its own
    _assert_alike(found, hidden_of(model, **batch), there, least)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_families_and_padding(kind: str, family: str, variant: str) -> None:
    model, batch = fused_model(f"{family}Model", variant), padded_batch(5, 13, kind=kind)
    found = hidden_of(_on_gpu(model), **_moved(batch))
    _assert_alike(found, hidden_of(model, **batch), batch["attention_mask"].bool(), LEAST_SQNR_DB[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["Albert", *BY_DISTANCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_families_whose_attention_goes_by_distance(family: str, variant: str, dtype: torch.dtype) -> None:
    """Beyond reach and window; a sequence alone has the bits that it has in a batch."""
    changes = {"max_position_embeddings": 400}
    calibration = calibrated(f"{family}Model", tuple(changes.items())) if variant == "static" else None
    model = quantize_(float_model(f"{family}Model", **changes).to(dtype), "w8a8", fuse=True, calibration=calibration)
    ids = torch.randint(5, 97, (2, 320), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 150:] = 0
    batch, moved = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}, _on_gpu(model)
    found = hidden_of(moved, **_moved(batch))
    least = LEAST_SQNR_DB[variant] - 3 if dtype == torch.float32 else 15.0
    _assert_alike(found, hidden_of(model, **batch), mask.bool(), least)
    assert torch.equal(hidden_of(moved, input_ids=ids[1:, :150].cuda())[0], found[1, :150])


@pytest.mark.parametrize("embedding", [None, *scheme_names(Role.EMBEDDING)])
def test_word_tables(embedding: str | None) -> None:
    model = fused_model("BertModel", "static", Recipe("w8a8", embedding), **WIDE)
    batch = padded_batch()
    found = hidden_of(_on_gpu(model), **_moved(batch))
    _assert_alike(found, hidden_of(model, **batch), batch["attention_mask"].bool(), LEAST_SQNR_DB["static"])


@pytest.mark.parametrize("linear", A8)
def test_static_scales_give_the_codes_of_the_cpu(linear: str) -> None:
    """Sums are exact on both; the last bit of a float epilogue may put a value that lies between two codes to either."""
    model = fused_model("BertModel", "static", linear, **WIDE)
    q = torch.randint(-127, 128, (77, 128), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    s = torch.rand(77, generator=torch.Generator().manual_seed(1)) * 0.02
    layers = [fused_forward(each).encoder().program.layers[0] for each in (model, _on_gpu(model))]
    for name in ("query, key, value", "feed-forward in"):
        found = []
        for layer, device in zip(layers, ("cpu", "cuda"), strict=True):
            (step,) = [each for each in layer.steps if each.name == name]
            slots = {bound(step, "codes"): q.to(device), bound(step, "scales"): s.to(device)}
            step.run(slots)
            (written,) = step.writes
            assert slots[written].dtype == torch.int8
            found.append(slots[written].cpu().int())
        cpu, gpu = found
        assert (cpu - gpu).abs().max() <= 1, name
        assert (cpu != gpu).float().mean() < 1e-3, name


def test_bert_base_shapes() -> None:
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512}
    model = fused_model("BertModel", "static", **sizes)
    batch = _ragged((128, 5, 77, 128, 31, 1, 100, 64))
    expected = hidden_of(model, **{name: each.cpu() for name, each in batch.items()})
    found = hidden_of(_on_gpu(model), **batch)
    _assert_alike(found, expected, batch["attention_mask"].bool().cpu(), LEAST_SQNR_DB["static"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_stream_is_of_the_models_type(dtype: torch.dtype) -> None:
    model = _wide("static", dtype=dtype)
    with torch.no_grad():
        found = model(**_ragged((5, 9)), output_hidden_states=True)
    program = fused_forward(model).encoder().program
    tables = bound(program.embedding[0], "positions"), bound(program.embedding[0], "types")
    assert {program.residual, *(table.dtype for table in tables)} == {dtype}
    assert {each.dtype for each in (found[0], *found.hidden_states)} == {dtype}


def test_there_and_back_again() -> None:
    model, batch = fused_model("BertModel", "static", "gobo3a8"), padded_batch()
    expected = hidden_of(model, **batch)
    moved = _on_gpu(model)
    hidden_of(moved, **_moved(batch))
    assert torch.equal(hidden_of(moved.to("cpu"), **batch), expected)


def test_embeddings_of_the_callers() -> None:
    model, batch = _wide("dynamic"), _ragged((9, 30))
    rows = model.embeddings.word_embeddings(batch["input_ids"])
    by_row = hidden_of(model, inputs_embeds=rows, attention_mask=batch["attention_mask"])
    assert torch.equal(by_row, hidden_of(model, **batch))


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_gives_the_same_bits_in_every_batch_and_graph(dtype: torch.dtype, linear: str, variant: str) -> None:
    model = _wide(variant, linear, dtype)
    compiled = qbert.compile(copy.deepcopy(model))
    together = _ragged(LENGTHS, width=310)
    orders = [list(range(len(LENGTHS))), [8, 0, 3], [4, 4, 7], [5, 1]]
    for index, length in enumerate(LENGTHS):
        alone = hidden_of(model, input_ids=together["input_ids"][index : index + 1, :length])[0]
        assert torch.equal(hidden_of(compiled, input_ids=together["input_ids"][index : index + 1, :length])[0], alone)
        for order in (each for each in orders if index in each):
            batch = {name: each[order] for name, each in together.items()}
            for runs in (model, compiled):
                assert torch.equal(hidden_of(runs, **batch)[order.index(index), :length], alone), (index, order)


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_tokens_and_few_give_the_same_bits(variant: str) -> None:
    """Tiles, and the roads through a product, differ with the number of tokens; sums of integers do not."""
    model = _wide(variant)
    ids = _ragged((64,) * 64)["input_ids"]
    expected = hidden_of(model, input_ids=ids)
    for rows in (1, 2, 7, 16, 33):
        assert torch.equal(hidden_of(model, input_ids=ids[:rows]), expected[:rows]), rows


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replays_are_deterministic_and_equal_an_eager_run(dtype: torch.dtype, variant: str) -> None:
    model = _wide(variant, dtype=dtype)
    batches = [
        _ragged(lengths, seed) for seed, lengths in enumerate([(1,), (7, 1, 9), (129, 300, 4), (64,) * 16, (3,) * 70])
    ]
    eager = [hidden_of(model, **batch) for batch in batches]
    compiled = qbert.compile(copy.deepcopy(model))
    for _ in range(10):
        for batch, expected in zip(batches, eager, strict=True):
            assert torch.equal(hidden_of(compiled, **batch), expected)
    report = fused_forward(compiled).graphs.report()
    assert list(report.replays.values()) == [10] * len(batches)
    assert report.eager == {}
    assert report.nbytes > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
def test_every_element_that_counts_is_written(linear: str, variant: str) -> None:
    """Fresh memory is full of NaN and extreme codes here, and still no bit changes."""
    model, batch = _wide(variant, linear), _ragged(LENGTHS)
    expected = hidden_of(model, **batch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(hidden_of(model, **batch), expected)
            assert torch.equal(hidden_of(qbert.compile(copy.deepcopy(model)), **batch), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_token_stays_in_its_sequence(variant: str) -> None:
    model = _wide(variant)
    embeds = torch.randn(4, 8, 128, generator=torch.Generator().manual_seed(0)).cuda()
    clean = hidden_of(model, inputs_embeds=embeds)
    embeds[2, 5, 10] = torch.nan
    spoiled = hidden_of(model, inputs_embeds=embeds)
    assert clean.isfinite().all()
    assert torch.equal(spoiled[[0, 1, 3]], clean[[0, 1, 3]])
    assert spoiled[2, 5].isnan().all()


# ---- no waiting for the host ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_for_the_gpu(variant: str, compiled: bool) -> None:
    model = copy.deepcopy(_wide(variant))
    if compiled:
        qbert.compile(model)
    batch = _ragged((30, 7))
    on_cpu = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].cpu()}
    expected = [
        hidden_of(model, **each) for each in (on_cpu, {"input_ids": batch["input_ids"]})
    ]  # prepares and captures
    with _sync_debug("error"):
        found = [hidden_of(model, **each) for each in (on_cpu, {"input_ids": batch["input_ids"]})]
    assert all(torch.equal(each, other) for each, other in zip(found, expected, strict=True))


def test_a_mask_on_the_gpu_costs_one_wait() -> None:
    model, batch = copy.deepcopy(_wide("static")), _ragged((30, 7))
    expected = hidden_of(qbert.compile(model), **batch)
    with warnings.catch_warnings(record=True) as caught, _sync_debug("warn"):
        warnings.simplefilter("always")
        found = hidden_of(model, **batch)
    assert torch.equal(found, expected)
    assert len([each for each in caught if "called a synchronizing" in str(each.message)]) == 1


def test_masks_wherever_they_are() -> None:
    mask = torch.rand(9, 33, generator=torch.Generator().manual_seed(0)) < 0.5
    packings = [packing_of(9, 33, each, torch.device("cuda")) for each in (mask, mask.cuda())]
    for packing in packings:
        assert torch.equal(packing.kept.cpu(), mask.view(-1).nonzero().view(-1))
        assert packing.cu_seqlens.diff().tolist() == mask.sum(1).tolist()


# ---- graphs ---------------------------------------------------------------------------------------------------------


def test_threads_with_streams_of_their_own() -> None:
    model = copy.deepcopy(_wide("static"))
    batches = [_ragged((length, 3, length), seed=length) for length in (5, 17, 40, 100)]
    eager = [hidden_of(model, **batch) for batch in batches]
    qbert.compile(model, max_graphs=3)
    torch.cuda.synchronize()

    def work(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [hidden_of(model, **batches[(index + step) % 4]) for step in range(20)]
            return all(torch.equal(each, eager[(index + step) % 4]) for step, each in enumerate(found))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert fused_forward(model).graphs.report().evicted > 0


def test_results_are_the_callers() -> None:
    model = qbert.compile(copy.deepcopy(_wide("static")))
    batch, other = _ragged((20, 20)), _ragged((20, 20), seed=1)
    first = hidden_of(model, **batch)
    kept = first.clone()
    hidden_of(model, **other)
    assert torch.equal(first, kept)


def test_limits_on_a_gpu() -> None:
    model, batch = copy.deepcopy(_wide("static")), _ragged((100, 28))
    expected = hidden_of(model, **batch)
    qbert.compile(model, warm=[(1, 128)], max_tokens=128)
    least = fused_forward(model).graphs.report().nbytes
    qbert.compile(model, max_tokens=128, max_bytes=least - 1)
    assert torch.equal(hidden_of(model, **batch), expected)
    assert list(fused_forward(model).graphs.report().replays) == []
    qbert.compile(model, max_tokens=100)
    assert torch.equal(hidden_of(model, **batch), expected)
    assert fused_forward(model).graphs.report().eager == {"more than 100 tokens": 1}


def test_changes_and_moves_drop_graphs() -> None:
    model, batch = qbert.compile(copy.deepcopy(_wide("static"))), _ragged((20, 20))
    before = hidden_of(model, **batch)
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.weight.mul_(2.0)
    assert torch.equal(hidden_of(model, **batch), hidden_of(copy.deepcopy(model), **batch))
    assert not torch.equal(hidden_of(model, **batch), before)
    hidden_of(model.to("cpu"), **{name: each.cpu() for name, each in batch.items()})
    assert fused_forward(model).graphs.report().eager == {"the model is on cpu": 1}
    hidden_of(model.to("cuda"), **batch)
    assert fused_forward(model).graphs.report().replays == {Bucket(64, 2): 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_caller_may_capture_it(variant: str) -> None:
    model = qbert.compile(copy.deepcopy(_wide(variant)))
    ids = _ragged((20, 20))["input_ids"]
    expected = hidden_of(model, input_ids=ids)
    static, graph = torch.zeros_like(ids), torch.cuda.CUDAGraph()
    unfused_graphs, fused_forward(model).graphs = fused_forward(model).graphs, None
    hidden_of(model, input_ids=static)  # loads what an eager run needs
    fused_forward(model).graphs = unfused_graphs
    with torch.cuda.graph(graph):
        out = hidden_of(model, input_ids=static)
    static.copy_(ids)
    graph.replay()
    assert torch.equal(out, expected)
    assert fused_forward(model).graphs.report().eager == {"the caller is capturing a CUDA graph": 1}


def test_compile_wants_a_fused_model() -> None:
    model = unfuse_(copy.deepcopy(_wide("dynamic")))
    with pytest.raises(QBertError, match=r"BertModel is not fused: call qbert\.fuse_\(model\) first"):
        qbert.compile(model)


# ---- torch.compile of the unfused model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "linear", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in LINEARS]
)
def test_unfused_models_compile_without_graph_breaks(linear: str) -> None:
    torch._dynamo.reset()
    model: nn.Module = float_model("BertModel", num_hidden_layers=1, **WIDE).to(torch.bfloat16)
    quantize_(model, Recipe(linear, "w8")).to("cuda")
    batch = _moved(padded_batch())
    there = batch["attention_mask"].bool()
    found = hidden_of(torch.compile(model, fullgraph=True), **batch)
    assert sqnr_db(hidden_of(model, **batch)[there].float(), found[there].float()) > 18  # Inductor rounds less often
