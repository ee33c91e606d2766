"""Weights with many zeros: files hold the rest, give the same bits back, and are refused where they do not fit together."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoders import float_model, hidden_of, padded_batch
from torch import Tensor, nn

import qbert
from qbert import CheckpointError
from qbert.checkpoint import Record, signed
from qbert.formats import SCHEMES, Role, scheme_names
from qbert.modules import QLinear
from qbert.quantizers import quantize
from qbert.weight import Layout, Weight, stored_specs, zeros
from qbert.weight.codec import decode
from qbert.weight.layout import unpack_bits
from qbert.weight.validate import check_stored_tensors

LINEAR = [name for name in scheme_names(Role.LINEAR) if not SCHEMES[name].is_variant]
SIDES = (24, 128)


def sparse_matrix(kind: str, n: int = SIDES[0], k: int = SIDES[1]) -> Tensor:
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator) * 0.04
    if kind == "2:4":
        fours = weight.view(n, -1, 4)
        return fours.masked_fill(fours.abs() < fours.abs().topk(2, dim=2).values[:, :, 1:], 0.0).view(n, k)
    return weight.masked_fill(torch.rand(n, k, generator=generator) < float(kind), 0.0)


def zeroed(model: Any, kind: str) -> Any:
    """The model with such zeros in all linears of its layers."""
    with torch.no_grad():
        for layer in model.encoder.layer:
            for each in layer.modules():
                if isinstance(each, nn.Linear):
                    each.weight.copy_(sparse_matrix(kind, *each.weight.shape) * 3)
    return model


# ---- zeros stay zero ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", LINEAR)
@pytest.mark.parametrize("kind", ["0.3", "0.9", "2:4"])
def test_zeros_stay_zero_in_every_scheme(scheme: str, kind: str) -> None:
    weight = sparse_matrix(kind)
    decoded = decode(quantize(weight, SCHEMES[scheme]))
    assert bool((decoded[weight == 0] == 0).all())
    assert float((decoded - weight).norm() / weight.norm()) < 0.35


@pytest.mark.parametrize("emulated", ["mxfp4", "nvfp4", "int4-g64", "mxint8", "gobo3"])
def test_zeros_stay_zero_in_block_formats(emulated: str) -> None:
    model = nn.Sequential(nn.Linear(128, 24))
    with torch.no_grad():
        model[0].weight.copy_(sparse_matrix("0.5"))
    zero = model[0].weight == 0
    qbert.quantize_(model, qbert.emulate(emulated))
    assert bool((model[0].weight[zero] == 0).all())


def test_a_dictionary_of_a_dense_matrix_is_as_it_was() -> None:
    weight = sparse_matrix("0.0")
    few = weight.clone()
    few[0, 0] = 0
    first, second = (quantize(each, SCHEMES["gobo3"]).tensors["codebook"] for each in (weight, few))
    assert torch.allclose(first, second, atol=1e-3)
    assert not bool((second == 0).any())


# ---- the layouts of files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", LINEAR)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("0.5", Layout.BITMAP), ("0.95", Layout.BITMAP), ("2:4", Layout.BITMAP), ("2:4", Layout.TWO_OF_FOUR)],
)
def test_packed_and_unpacked_is_the_same(scheme: str, kind: str, layout: Layout) -> None:
    plain = quantize(sparse_matrix(kind), SCHEMES[scheme])
    packed = plain.to_layout(layout)
    count = int(zeros.nonzeros(plain.scheme, plain.shape, plain.tensors).sum())
    specs = stored_specs(plain.scheme, plain.shape, plain.outliers, layout, count)
    assert {name: (each.dtype, tuple(each.shape)) for name, each in packed.tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    again = check_stored_tensors(plain.scheme, plain.shape, packed.tensors, layout, count)
    assert all(torch.equal(again[name], each) for name, each in plain.tensors.items())
    back = packed.to_layout(Layout.PLAIN)
    assert all(torch.equal(back.tensors[name], each) for name, each in plain.tensors.items())


@pytest.mark.parametrize(
    ("kind", "expected", "bits"),
    [
        ("0.0", Layout.PLAIN, 8.0),
        ("0.5", Layout.BITMAP, 5.0),
        ("0.9", Layout.BITMAP, 1.8),
        ("2:4", Layout.TWO_OF_FOUR, 5.0),
    ],
)
def test_a_file_takes_the_fewest_bits(kind: str, expected: Layout, bits: float) -> None:
    plain = quantize(sparse_matrix(kind), SCHEMES["w8a8"])
    layout = zeros.best_layout(plain.scheme, plain.shape, plain.tensors)
    assert layout is expected
    stored = plain.to_layout(layout).tensors
    taken = sum(each.numel() * each.element_size() for name, each in stored.items() if name != "scale")
    assert 8 * taken / (plain.n * plain.k) == pytest.approx(bits, abs=0.1)


def test_the_packed_operand_has_the_products_sums() -> None:
    plain = quantize(sparse_matrix("2:4"), SCHEMES["w8a8"])
    packed = plain.to_layout(Layout.TWO_OF_FOUR).tensors
    places = unpack_bits(packed["places"], 2, plain.k // 2)
    x = torch.randint(-127, 128, (5, plain.k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    found = zeros.two_of_four_product(x, packed["qdata"], places)
    assert torch.equal(found, x.to(torch.int64) @ plain.qdata.to(torch.int64).T)


def spoiled(layout: Layout, edit: Any, scheme: str = "w8a8") -> tuple[Weight, dict[str, Tensor], int]:
    plain = quantize(sparse_matrix("2:4", k=132), SCHEMES[scheme])
    tensors = {name: each.clone() for name, each in plain.to_layout(layout).tensors.items()}
    edit(tensors)
    return plain, tensors, int(zeros.nonzeros(plain.scheme, plain.shape, plain.tensors).sum())


def put(name: str, value: int, at: Any = 0) -> Any:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[at] = value

    return edit


BITMAP_ERRORS: list[tuple[Any, str, str]] = [
    (put("bitmap", 255), "bitmap", "as many bits set as there are codes"),
    (put("bitmap", 0xF0, 16), "bitmap", "spare bits"),
    (put("qdata", 0), "qdata", "others than the zero's"),
    (put("qdata", -128), "qdata", "codes must be -127"),
    (lambda tensors: tensors.pop("bitmap"), "bitmap", "must be there"),
    (lambda tensors: tensors.update(places=tensors["bitmap"]), "places", "no such tensor"),
    (lambda tensors: tensors.update(bitmap=tensors["bitmap"][:, :-1]), "bitmap", "shape must be"),
    (lambda tensors: tensors.update(bitmap=tensors["bitmap"].to(torch.int8)), "bitmap", "data type"),
    (lambda tensors: tensors.update(qdata=tensors["qdata"][:-1]), "qdata", "shape must be"),
    (lambda tensors: tensors["scale"].fill_(float("nan")), "scale", "finite and positive"),
]
PLACES_ERRORS: list[tuple[Any, str, str]] = [
    (put("places", 0), "places", "must ascend"),
    (put("places", 0b0001, 0), "places", "must ascend"),
    (put("places", 0xFF, 16), "places", "spare bits"),
    (put("qdata", -128), "qdata", "codes must be -127"),
    (lambda tensors: tensors.pop("places"), "places", "must be there"),
    (lambda tensors: tensors.update(places=tensors["places"][:-1]), "places", "shape must be"),
]


@pytest.mark.parametrize(
    ("layout", "edit", "tensor", "said"),
    [(Layout.BITMAP, *each) for each in BITMAP_ERRORS] + [(Layout.TWO_OF_FOUR, *each) for each in PLACES_ERRORS],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(
    layout: Layout, edit: Any, tensor: str, said: str
) -> None:
    plain, tensors, count = spoiled(layout, edit)
    with pytest.raises(CheckpointError, match=said) as error:
        check_stored_tensors(plain.scheme, plain.shape, tensors, layout, count, "fc.")
    assert error.value.tensor == f"fc.{tensor}"


@pytest.mark.parametrize("layout", zeros.FILE_LAYOUTS)
def test_a_dictionary_without_a_zero_stores_none(layout: Layout) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["codebook"][tensors["codebook"] == 0] = 1e-9

    plain, tensors, count = spoiled(layout, edit, "gobo4")
    with pytest.raises(CheckpointError, match="must have a 0"):
        check_stored_tensors(plain.scheme, plain.shape, tensors, layout, count)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8", "gobo4a8", "w4a16"])
@pytest.mark.parametrize("kind", ["0.7", "2:4"])
def test_saved_and_loaded_without_zeros(scheme: str, kind: str, tmp_path: Path) -> None:
    model = zeroed(float_model(), kind)
    dense = qbert.quantize_(float_model(), scheme)
    dense.save_pretrained(tmp_path / "dense")
    qbert.quantize_(model, scheme, fuse=SCHEMES[scheme].activation is not None)
    expected = hidden_of(model, **padded_batch())
    model.save_pretrained(tmp_path / "sparse")
    again = qbert.load(tmp_path / "sparse")
    assert torch.equal(hidden_of(again, **padded_batch()), expected)
    assert again.config.quantization_config.record.format_version == 5
    files = [(tmp_path / each / "model.safetensors").stat().st_size for each in ("sparse", "dense")]
    assert files[0] < files[1]
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "sparse/config.json").read_bytes()
    stored = load_file(tmp_path / "sparse/model.safetensors")
    names = [
        name for name, each in again.named_modules() if isinstance(each, QLinear) and each.stored_as is not Layout.PLAIN
    ]
    assert len(names) == 12
    row = next(row for row in qbert.explain(again).rows if row.name == names[0])
    assert row.stored_bytes == sum(
        each.nbytes
        for name, each in stored.items()
        if name.startswith(f"{names[0]}.") and not name.endswith((".bias", ".weight"))
    )
    note = next(note for note in qbert.explain(again).notes if "zeros" in note)
    assert "12 linears" in note
    assert "MB saved in the file, 0 ms saved, because no kernel here skips them" in note


def test_state_dicts_go_over_both_ways() -> None:
    sparse, dense = (qbert.quantize_(each, "w8a8") for each in (zeroed(float_model(), "0.7"), float_model()))
    expected, state = hidden_of(sparse, **padded_batch()), sparse.state_dict()
    assert any(name.endswith(".bitmap") for name in state)
    twin = copy.deepcopy(dense)
    twin.load_state_dict(state)
    assert torch.equal(hidden_of(twin, **padded_batch()), expected)
    assert all(torch.equal(each, twin.state_dict()[name]) for name, each in state.items())
    sparse.load_state_dict(dense.state_dict())
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    broken = {name: each.clone() for name, each in state.items()}
    name = next(name for name in broken if name.endswith(".bitmap"))
    broken[name] = broken[name] ^ 1
    with pytest.raises(RuntimeError, match="as many bits set as there are codes"):
        twin.load_state_dict(broken)
    assert torch.equal(hidden_of(twin, **padded_batch()), expected)


def test_floats_with_zeros_are_said_to_save_nothing_and_dense_models_nothing_at_all() -> None:
    assert not any("zeros" in note for note in qbert.explain(float_model()).notes)
    assert not any("zeros" in note for note in qbert.explain(qbert.quantize_(float_model(), "w4a8")).notes)
    notes = qbert.explain(zeroed(float_model(), "0.7")).notes
    assert any("70% zeros in 12 float linears: 0 MB and 0 ms saved" in note for note in notes)


def test_dequantized_zeros_are_found_again() -> None:
    model = qbert.quantize_(zeroed(float_model(), "2:4"), "w8a8")
    before = model.state_dict()
    qbert.dequantize_(model)
    qbert.quantize_(model, "w8a8")
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda spec: spec.pop("nonzeros"), "goes with 'bitmap'"),
        (lambda spec: spec.update(nonzeros=-1), "nonzeros"),
        (lambda spec: spec.update(nonzeros=10**9), "nonzeros of"),
        (lambda spec: spec.update(nonzeros=spec["nonzeros"] - 1), "shape must be"),
        (lambda spec: spec.update(zeros="2:4"), "goes with 'bitmap'"),
        (lambda spec: (spec.pop("nonzeros"), spec.update(zeros="2:4")), "places"),
        (lambda spec: (spec.pop("nonzeros"), spec.pop("zeros")), "bitmap"),
        (lambda spec: spec.update(zeros="rows"), "zeros"),
        (lambda spec: spec.update(kind="embedding"), "embedding"),
    ],
)
def test_a_record_that_is_not_the_files_is_refused_by_name(edit: Any, said: str, tmp_path: Path) -> None:
    model = qbert.quantize_(zeroed(float_model(), "0.7"), "w8a8")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config["quantization_config"]["modules"]["encoder.layer.0.output.dense"])
    with pytest.raises(CheckpointError, match=said):
        _load_signed(tmp_path, config)


def _load_signed(folder: Path, config: dict[str, Any]) -> None:
    record = signed(Record.parse(config["quantization_config"]), load_file(folder / "model.safetensors"))
    config["quantization_config"] = record.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    qbert.load(folder)


def test_a_file_whose_bits_were_moved_is_refused(tmp_path: Path) -> None:
    """With a digest that is right: a bit more in the bitmap would take a code that is not there."""
    model = qbert.quantize_(zeroed(float_model(), "0.7"), "w8a8")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.1.intermediate.dense.bitmap"
    state[name] = torch.full_like(state[name], 255)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(CheckpointError, match="as many bits set as there are codes"):
        _load_signed(tmp_path, config)
