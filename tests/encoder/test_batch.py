"""A batch without padding: where its tokens go, which positions they have in each family, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_encoders import padded_batch
from torch import Tensor

from qbert import QBertError
from qbert.encoder.batch import Batch, Inputs, nonzero_of, packing_of
from qbert.families import FAMILIES, EncoderFamily, PositionTable

CPU = torch.device("cpu")
BY_NAME = {family.name: family for family in FAMILIES}
COUNTED = [name for name, family in BY_NAME.items() if family.skips_padding]
TABLE = PositionTable(rows=40, padding_idx=0)
AFTER_ONE = PositionTable(rows=40, padding_idx=1)  # RoBERTa's
KINDS = ("right", "left", "holes")
# Where attention goes by distances, a row's tokens stand side by side.
EACH = [
    (name, kind) for name, family in BY_NAME.items() for kind in KINDS if kind != "holes" or family.distances is None
]
BY_COLUMN = [
    name for name, family in BY_NAME.items() if not family.skips_padding and family.embeddings.positions is not None
]
WITHOUT_TABLE = [name for name, family in BY_NAME.items() if family.embeddings.positions is None]


def _of(name: str, table: PositionTable | None = None, **inputs: Tensor) -> Batch:
    family = BY_NAME[name]
    return Batch.of(Inputs(**inputs), family, table or (AFTER_ONE if family.skips_padding else TABLE), CPU)


def _there(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_type", [torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "kind"), EACH)
def test_tokens_are_what_is_not_padding_in_order(name: str, kind: str, mask_type: torch.dtype) -> None:
    inputs = padded_batch(5, 11, kind=kind)
    there = _there(inputs)
    batch = _of(name, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"].to(mask_type))
    assert torch.equal(batch.tokens.ids, inputs["input_ids"][there])
    assert batch.size == batch.packing.tokens == int(there.sum()) < 55
    assert batch.tokens.cu_seqlens.dtype == torch.int32
    assert batch.tokens.cu_seqlens.tolist() == [0, *there.sum(1).cumsum(0).tolist()]
    assert torch.equal(batch.tokens.token_type_ids, torch.zeros(batch.size, dtype=torch.int64))
    assert not batch.by_row


@pytest.mark.parametrize("mask", [None, torch.ones(3, 7, dtype=torch.int64)], ids=["no_mask", "all_ones"])
def test_nothing_is_copied_where_nothing_is_padding(mask: Tensor | None) -> None:
    ids = torch.arange(21).view(3, 7)
    batch = _of("BERT", input_ids=ids, attention_mask=mask)
    assert batch.packing.kept is None
    assert batch.tokens.ids.data_ptr() == ids.data_ptr()
    assert batch.tokens.cu_seqlens.tolist() == [0, 7, 14, 21]
    assert batch.tokens.position_ids.tolist() == [*range(7)] * 3


def test_a_sequence_without_tokens_is_one_of_length_0() -> None:
    inputs = padded_batch(3, 5)
    inputs["attention_mask"][1] = 0
    batch = _of("BERT", **inputs)
    assert batch.tokens.cu_seqlens.diff().tolist() == [5, 0, 3]
    assert torch.all(batch.unpack(torch.ones(batch.size, 4), torch.float32)[1] == 0)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 5)], ids=str)
def test_batches_of_nothing(shape: tuple[int, int], name: str) -> None:
    nothing = torch.zeros(shape, dtype=torch.int64)
    batch = _of(name, input_ids=nothing, attention_mask=nothing)
    assert batch.size == 0
    assert [each.shape[0] for each in batch.tokens[:3]] == [0, 0, 0]
    assert batch.tokens.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    back = batch.unpack(torch.zeros(0, 4), torch.bfloat16)
    assert (back.shape, back.dtype) == ((*shape, 4), torch.bfloat16)
    assert torch.all(back == 0)


def test_a_batch_of_nothing_may_be_wider_than_the_table() -> None:
    """There is nothing to look up in it."""
    nothing = torch.zeros(2, 50, dtype=torch.int64)
    for name in BY_NAME:
        assert _of(name, input_ids=nothing, attention_mask=nothing).size == 0


def test_rows_of_the_callers_in_place_of_ids() -> None:
    inputs = padded_batch(4, 9)
    rows = torch.randn(4, 9, 8)
    batch = _of("BERT", inputs_embeds=rows, attention_mask=inputs["attention_mask"])
    assert batch.by_row
    assert torch.equal(batch.tokens.ids, rows[_there(inputs)])


# ---- positions and token types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BY_COLUMN)
def test_positions_are_columns(name: str, kind: str) -> None:
    """As transformers has them: a token's place in the padded batch, whatever stands before it."""
    inputs = padded_batch(5, 11, kind=kind)
    expected = torch.arange(11).expand(5, 11)[_there(inputs)]
    assert torch.equal(_of(name, **inputs).tokens.position_ids, expected)
    by_row = _of(name, inputs_embeds=torch.zeros(5, 11, 8), attention_mask=inputs["attention_mask"])
    assert torch.equal(by_row.tokens.position_ids, expected)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in EACH if name in COUNTED])
def test_positions_count_what_is_not_padding(name: str, kind: str, padding: int) -> None:
    """RoBERTa asks the ids, not the mask; without ids it counts columns. Either way from after the padding's index."""
    inputs = padded_batch(5, 11, kind=kind)
    ids, there = inputs["input_ids"], _there(inputs)
    ids[0, 3] = padding  # in the middle, and not masked
    table = PositionTable(40, padding)
    kept = ids.ne(padding).long()
    expected = kept.cumsum(1) * kept + padding  # transformers' create_position_ids_from_input_ids
    assert torch.equal(_of(name, table, **inputs).tokens.position_ids, expected[there])
    by_row = _of(name, table, inputs_embeds=torch.zeros(5, 11, 8), attention_mask=inputs["attention_mask"])
    assert torch.equal(by_row.tokens.position_ids, (torch.arange(11) + padding + 1).expand(5, 11)[there])


@pytest.mark.parametrize("name", BY_NAME)
def test_positions_and_types_of_the_callers(name: str) -> None:
    inputs = padded_batch(4, 9)
    there = _there(inputs)
    each, shared = torch.arange(36).view(4, 9), torch.arange(20, 29)[None]
    for given in (each, shared):
        found = _of(name, **inputs, position_ids=given, token_type_ids=given % 2).tokens
        expected = given.expand(4, 9)[there]
        assert torch.equal(found.position_ids, torch.zeros_like(expected) if name in WITHOUT_TABLE else expected)
        types = given.expand(4, 9)[there] % 2 if BY_NAME[name].embeddings.token_types else torch.zeros_like(found.ids)
        assert torch.equal(found.token_type_ids, types)


@pytest.mark.parametrize("name", WITHOUT_TABLE)
def test_without_a_table_positions_are_not_looked_up(name: str) -> None:
    for kind in ("right", "left"):
        inputs = padded_batch(4, 9, kind=kind)
        assert torch.equal(
            _of(name, **inputs).tokens.position_ids, torch.zeros(int(_there(inputs).sum()), dtype=torch.int64)
        )


@pytest.mark.parametrize("name", [name for name, family in BY_NAME.items() if family.distances is not None])
def test_what_changes_distances_is_refused(name: str) -> None:
    """Packed tokens are as far apart as they lie; transformers counts columns, or what the caller gave."""
    ids = torch.full((3, 6), 7)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    for fine in (mask, mask[:, :1], torch.ones_like(mask), torch.zeros_like(mask)):
        assert _of(name, input_ids=ids[:, : fine.shape[1]], attention_mask=fine).size == int(fine.sum())
    for row in ([1, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1]):
        for broken in (mask.clone(), mask.bool(), mask.float()):
            broken[1] = torch.tensor(row)
            with pytest.raises(
                QBertError, match="attention_mask has padding between tokens of a row, which changes how far"
            ):
                _of(name, input_ids=ids, attention_mask=broken)
    columns = torch.arange(6)
    for positions in (columns + 3, columns.flip(0), columns * 2, torch.zeros(6, dtype=torch.int64)):
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.expand(3, 6)}
        if name in WITHOUT_TABLE and not torch.equal(positions, columns + 3):
            with pytest.raises(QBertError, match="position_ids do not go up by one from token to token"):
                _of(name, **given)
        else:  # a table's rows, not distances
            assert _of(name, **given).size == 6
    padding = torch.where(mask.bool(), columns, 0)  # what stands where no token is does not count
    assert _of(name, input_ids=ids, attention_mask=mask, position_ids=padding).size == 6


# ---- the way back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, None], ids=str)
def test_back_where_it_was_and_zeros_elsewhere(kind: str | None, dtype: torch.dtype) -> None:
    inputs = padded_batch(5, 11, kind=kind) if kind else {"input_ids": torch.ones(5, 11, dtype=torch.int64)}
    there = _there(inputs) if kind else torch.ones(5, 11, dtype=torch.bool)
    batch = _of("BERT", **inputs)
    rows = torch.randn(batch.size, 6)
    for copy in (False, True):
        back = batch.unpack(rows, dtype, copy=copy)
        assert (back.shape, back.dtype) == ((5, 11, 6), dtype)
        assert torch.equal(back[there], rows.to(dtype))
        assert torch.all(back[~there] == 0)
        shared = back.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        assert shared == (not copy and kind is None and dtype == torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_again(kind: str) -> None:
    inputs = padded_batch(6, 13, kind=kind)
    rows = torch.randn(6, 13, 5)
    batch = _of("BERT", inputs_embeds=rows, attention_mask=inputs["attention_mask"])
    assert torch.equal(batch.unpack(batch.tokens.ids, torch.float32), rows * _there(inputs)[:, :, None])


# ---- what is refused ------------------------------------------------------------------------------------------------

IDS, ROWS = torch.ones(4, 11, dtype=torch.int64), torch.ones(4, 11, 8)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "a model takes exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": ROWS}, "a model takes exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS[0]}, r"input is \(11,\); allowed: input_ids \(batch, tokens\)"),
        ({"input_ids": IDS[None]}, r"input is \(1, 4, 11\); allowed: input_ids \(batch, tokens\)"),
        ({"inputs_embeds": ROWS[0]}, r"input is \(11, 8\); allowed: inputs_embeds \(batch, tokens, k\)"),
        ({"attention_mask": IDS[:, :-1]}, r"attention_mask is \(4, 10\); allowed with a fused encoder: \(4, 11\)"),
        ({"attention_mask": IDS[:, None]}, r"attention_mask is \(4, 1, 11\); allowed with a fused encoder: \(4, 11\)"),
        ({"attention_mask": IDS[0]}, r"attention_mask is \(11,\)"),
    ],
    ids=["nothing", "both", "one_dimension", "three", "two_of_rows", "mask_narrow", "mask_three", "mask_one"],
)
def test_inputs_of_other_shapes_are_refused(inputs: dict[str, Tensor], words: str) -> None:
    given: dict[str, Any] = inputs if "attention_mask" not in inputs else {"input_ids": IDS, **inputs}
    for name in BY_NAME:
        with pytest.raises(QBertError, match=words):
            _of(name, **given)


def _most(family: EncoderFamily) -> int:
    return 38 if family.skips_padding else 40


@pytest.mark.parametrize("name", BY_NAME)
def test_more_tokens_than_positions_are_refused(name: str) -> None:
    """Where RoBERTa counts ids, the look-up itself refuses what is beyond the table."""
    most = _most(BY_NAME[name])
    _of(name, inputs_embeds=torch.ones(1, most, 8))
    with pytest.raises(QBertError, match=f"{most + 1} tokens; the model has positions for {most}"):
        _of(name, inputs_embeds=torch.ones(1, most + 1, 8))
    wide = torch.full((1, 41), 5)
    if name in COUNTED:
        assert int(_of(name, input_ids=wide).tokens.position_ids.max()) == 42
    else:
        with pytest.raises(QBertError, match="41 tokens; the model has positions for 40"):
            _of(name, input_ids=wide)
    if name not in WITHOUT_TABLE:
        positions = torch.zeros(1, 41, dtype=torch.int64)
        assert _of(name, input_ids=wide, position_ids=positions).size == 41


# ---- portions -------------------------------------------------------------------------------------------------------


def test_portions_are_whole_sequences_of_about_equal_size() -> None:
    lengths = [5, 0, 9, 1, 30, 2, 0, 7]
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    packing = packing_of(len(lengths), 30, mask, torch.device("cpu"))
    assert packing.portions(None) == packing.portions(54) == [(slice(0, 54), packing.cu_seqlens)]
    for most in (1, 10, 20, 30, 40):
        portions = packing.portions(most)
        assert [token for tokens, _ in portions for token in range(tokens.start, tokens.stop)] == list(range(54))
        assert torch.cat([bounds.diff() for _, bounds in portions]).tolist() == lengths
        for tokens, bounds in portions:
            assert bounds[0] == 0
            assert bounds[-1] == tokens.stop - tokens.start
            assert bounds[-1] <= most or int((bounds.diff() > 0).sum()) == 1


def test_indices_without_counting_twice() -> None:
    for there in (torch.rand(50) < 0.5, torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)):
        assert torch.equal(nonzero_of(there, int(there.sum())), there.nonzero().view(-1))
