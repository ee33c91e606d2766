"""calibrate: scales that are as good as they can be, plain data that comes back to the bit, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig

import qbert
from qbert import Calibration, QBertError, calibrate, quantize_
from qbert.calibrate import _Spectrum, default_texts
from qbert.encoder import LayerScales, Overflow, fused_forward
from qbert.formats import INT8
from qbert.metrics import sqnr_db
from qbert.testing import random_weight

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 40,
}  # fmt: skip
SCALES = {"query": 0.1, "key": 0.2, "value": 0.05, "context": 0.04, "inner": 0.03}
VERSION_1 = {"query": 0.1, "key": 0.2, "value": 0.05, "attention_output": 0.04, "gelu": 0.03}


def _model(name: str = "BertModel", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = getattr(transformers, name)(BertConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for index, module in enumerate(model.modules()):
            if isinstance(module, nn.Linear):
                module.weight.copy_(random_weight(*module.weight.shape, seed=seed + index) * 3)
                module.bias.normal_(std=0.1)
    return model


def _with_a_giant(model: Any) -> Any:
    """One neuron of the first layer answers some tokens with values far above all others, as in trained encoders."""
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight[37].mul_(20.0)
    return model


def _batches(count: int = 3) -> list[dict[str, Tensor]]:
    batches = []
    for seed in range(count):
        ids = torch.randint(5, 97, (6, 19), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[1, 10:] = 0
        mask[2, :4] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


class Words:
    """A tokenizer of made-up words: enough of one for `calibrate`."""

    model_max_length = 40
    pad_token_id = 0
    pad_token_type_id = 0

    def __call__(self, texts: Any, max_length: int | None = None, **_: Any) -> dict[str, Any]:
        rows = [
            [2, *(5 + sum(map(ord, word)) % 90 for word in text.split()), 3]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        rows = [row[:max_length] for row in rows]
        encoded = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], "labels": rows}
        return {name: each[0] for name, each in encoded.items()} if isinstance(texts, str) else encoded


# ---- what is chosen -------------------------------------------------------------------------------------------------


def test_a_scale_for_every_tensor_of_every_layer() -> None:
    calibration = calibrate(_model(), _batches())
    assert list(calibration.layers) == ["encoder.layer.0", "encoder.layer.1"]
    for layer in calibration.layers.values():
        assert list(layer.scales) == list(SCALES)
        assert all(0 < scale < 1 for scale in layer.scales.values())


def test_the_largest_magnitude_is_nearly_covered_where_nothing_is_far_out() -> None:
    """Of uniform values none is worth clipping; of a normal distribution with one far outlier that one is."""
    uniform = torch.rand(4000, 8) * 2 - 1
    spectrum = _Spectrum.empty(uniform.abs().amax(0))
    spectrum.add(uniform, torch.arange(4000) % 2 == 1)
    assert spectrum.best()[0] == pytest.approx(1.0 / INT8.qmax, rel=0.01)
    outlier = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    outlier[0, 0] = 100.0
    spectrum = _Spectrum.empty(outlier.abs().amax(0))
    spectrum.add(outlier, torch.arange(4000) % 2 == 1)
    scale, _, error = spectrum.best()
    assert scale * INT8.qmax < 95.0

    def squared(scale: float) -> float:
        codes = (outlier / scale).round().clamp(-INT8.qmax, INT8.qmax)
        return float(((codes * scale - outlier) ** 2).sum())

    assert error == pytest.approx(squared(scale), rel=0.05)
    assert squared(scale) <= 1.05 * min(squared(100.0 * 2 ** (-step / 16) / INT8.qmax) for step in range(128))


def test_codes_reach_as_far_down_as_the_values() -> None:
    """What an activation gives has next to nothing below 0: a code of 0 near the lowest makes steps half as wide."""
    x = torch.nn.functional.gelu(torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)))
    spectrum = _Spectrum.empty(x.abs().amax(0))
    spectrum.add(x, torch.arange(4000) % 2 == 1)
    around, shifted = spectrum.best(), spectrum.best(shifted=True)
    assert around.zero == 0
    assert shifted.zero < -100

    def squared(choice: Any) -> float:
        codes = (x / choice.scale).round().clamp(-INT8.qmax - choice.zero, INT8.qmax - choice.zero)
        return float(((codes * choice.scale - x) ** 2).sum())

    for choice in (around, shifted):
        assert choice.error == pytest.approx(squared(choice), rel=0.05)
    assert squared(shifted) < 0.35 * squared(around)
    symmetric = torch.cat((x, -x))
    spectrum = _Spectrum.empty(symmetric.abs().amax(0))
    spectrum.add(symmetric, torch.arange(8000) % 2 == 1)
    assert spectrum.best(shifted=True).scale == pytest.approx(spectrum.best().scale, rel=0.1)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_a_fused_encoder_computes_with_the_code_of_0(activation: str) -> None:
    """Codes that all are larger by as much stand for the same values: nothing but the last bits of a bias may differ."""
    model, batch = _model(hidden_act=activation), _batches(1)[0]
    calibration = calibrate(model, _batches(), overflow_neurons=0)
    first = calibration.layers["encoder.layer.0"]
    assert all(list(layer.zeros) == ["inner"] and layer.zeros["inner"] < -60 for layer in calibration.layers.values())
    scale, found = 2 * first.top("inner") / INT8.qmax, []  # none is cut off, whichever code 0 has
    for zero in (-77, -20, 0):
        moved = LayerScales(scales={**first.scales, "inner": scale}, zeros={"inner": zero})
        given = Calibration(layers={**calibration.layers, "encoder.layer.0": moved})
        with torch.no_grad():
            found.append(quantize_(copy.deepcopy(model), "w8a8+none", fuse=True, calibration=given)(**batch)[0])
    there = batch["attention_mask"].bool()
    assert all(sqnr_db(found[0][there], each[there]) > 60 for each in found[1:])


def test_padding_is_not_looked_at() -> None:
    model, batches = _model(), _batches()
    expected = calibrate(model, batches)
    for batch in batches:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 96)
    assert calibrate(model, batches) == expected
    alone = [
        {"input_ids": ids[None, mask.bool()], "position_ids": torch.arange(19)[None, mask.bool()]}
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for name, layer in calibrate(model, alone).layers.items():
        assert layer.scales == pytest.approx(expected.layers[name].scales, rel=0.1)


def test_giant_neurons_are_kept_apart() -> None:
    model = _with_a_giant(_model())
    calibration = calibrate(model, _batches())
    overflow = calibration.layers["encoder.layer.0"].overflow
    assert list(overflow) == ["inner"]
    assert 37 in overflow["inner"].neurons
    without = calibrate(model, _batches(), overflow_neurons=0)
    assert all(layer.overflow == {} for layer in without.layers.values())
    batch = _batches(1)[0]
    there = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch)[0][there]
        apart, together = (
            quantize_(copy.deepcopy(model), "w8a8+none", fuse=True, calibration=each)(**batch)[0][there]
            for each in (calibration, without)
        )
    assert sqnr_db(expected, apart) > sqnr_db(expected, together) + 2


def test_a_few_overflow_neurons_or_none() -> None:
    model = _with_a_giant(_model())
    one = calibrate(model, _batches(), overflow_neurons=1).layers["encoder.layer.0"].overflow
    assert one["inner"].neurons == (37,)
    with pytest.raises(QBertError, match=r"overflow_neurons is 17; allowed: 0 \.\.\. 16"):
        calibrate(model, _batches(), overflow_neurons=17)


def test_float_quantized_and_fused_models_are_calibrated_alike_and_left_alone() -> None:
    model = _model("BertForSequenceClassification").train()
    batches = _batches()
    exact = calibrate(model, batches)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    quantized = quantize_(copy.deepcopy(model).eval(), "w8a8+none")
    fused = quantize_(copy.deepcopy(model).eval(), "w8a8+none", fuse=True)
    static = quantize_(copy.deepcopy(model).eval(), "w8a8+none", fuse=True, calibration=exact)
    for other in (quantized, fused, static):
        before = fused_forward(other.bert)
        found = calibrate(other, batches)
        assert fused_forward(other.bert) is before
        for name, layer in found.layers.items():
            assert layer.scales == pytest.approx(exact.layers[name].scales, rel=0.25)


def test_texts() -> None:
    model, texts = _model(), ["one two three", "a much longer text of nine words or so", "short", "x " * 60]
    progress: list[tuple[int, int]] = []
    found = calibrate(model, texts, tokenizer=Words(), batch_size=3, progress=lambda *call: progress.append(call))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again = calibrate(model, iter(texts), tokenizer=Words(), batch_size=1)
    for name, layer in again.layers.items():
        assert layer.scales["inner"] == pytest.approx(found.layers[name].scales["inner"], rel=0.1)


def test_default_texts_are_prose() -> None:
    texts = default_texts(50)
    assert len(texts) == 50
    assert default_texts(50) == texts
    assert all(40 <= len(text) <= 600 and "\n" not in text for text in texts)


# ---- plain data -----------------------------------------------------------------------------------------------------


def test_calibrations_are_plain_data() -> None:
    calibration = calibrate(_with_a_giant(_model()), _batches())
    text = json.dumps(calibration.to_dict())
    assert Calibration.from_dict(json.loads(text)) == calibration
    assert "null" not in text


_BAD_OVERFLOW: list[tuple[Any, str]] = [
    (1, "overflow"),
    ({"neurons": [], "scale": 0.1}, "overflow"),
    ({"neurons": [3, 1], "scale": 0.1}, "ascend"),
    ({"neurons": [1, 1], "scale": 0.1}, "ascend"),
    ({"neurons": [-1], "scale": 0.1}, "neurons"),
    ({"neurons": [1.5], "scale": 0.1}, "neurons"),
    ({"neurons": list(range(17)), "scale": 0.1}, "17 neurons"),
    ({"neurons": [1], "scale": math.nan}, "scale"),
    ({"neurons": [1]}, "scale"),
    ({"neurons": [1], "scale": 0.1, "top": 1.0}, "top"),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": math.nan}, "query"), ({"query": math.inf}, "query"), ({"query": -0.1}, "query"), ({"key": 0.0}, "key"),
        ({"value": 1e-30}, "value"), ({"value": 1e30}, "value"), ({"inner": "0.1"}, "inner"), ({"inner": None}, "inner"),
        ({"inner": True}, "inner"),
    ],
    ids=str,
)  # fmt: skip
def test_scales_that_are_none_are_refused(changes: dict[str, Any], words: str) -> None:
    Calibration.from_dict({"layers": {"encoder.layer.0": {"scales": SCALES}}})
    with pytest.raises(QBertError, match=rf"calibration: layers\.encoder\.layer\.0\.scales\.{words}: "):
        Calibration.from_dict({"layers": {"encoder.layer.0": {"scales": {**SCALES, **changes}}}})


@pytest.mark.parametrize(("overflow", "words"), _BAD_OVERFLOW, ids=str)
def test_overflow_that_is_none_is_refused(overflow: Any, words: str) -> None:
    Calibration.from_dict({"layers": {"a": {"scales": SCALES, "overflow": {"inner": {"neurons": [1], "scale": 0.1}}}}})
    for layer in ({"scales": SCALES, "overflow": {"inner": overflow}}, {**VERSION_1, "overflow": overflow}):
        with pytest.raises(QBertError, match=f"calibration: .*{words}"):
            Calibration.from_dict({"layers": {"a": layer}})


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"scales": SCALES, "spare": 1.0}, "spare"),
        ({"scales": SCALES, "query": 1.0}, "query"),
        ({"scales": {}}, "scales"),
        ({"scales": list(SCALES.values())}, "scales"),
        ({"overflow": {}}, "scales"),
        ({}, "scales"),
        (
            {"scales": {"query": 0.1}, "overflow": {"inner": {"neurons": [1], "scale": 0.1}}},
            "overflow of a slot 'inner'",
        ),
        ({"scales": SCALES, "overflow": {"inner": None}}, "overflow.inner"),
        ({"scales": SCALES, "overflow": None}, "overflow"),
    ],
    ids=["spare", "both", "none", "list", "overflow_only", "nothing", "slotless", "null", "null_all"],
)
def test_layers_of_another_shape_are_refused(layer: dict[str, Any], words: str) -> None:
    with pytest.raises(QBertError, match=rf"calibration: layers\.encoder\.layer\.0.*{words}"):
        Calibration.from_dict({"layers": {"encoder.layer.0": layer}})


def test_version_1_of_a_calibration_is_read_and_written() -> None:
    """Its five fields are five slots; what it says of the feed-forward network's neurons is said of theirs."""
    overflow = {"neurons": [3, 5], "scale": 0.25}
    for more in ({}, {"overflow": None}, {"overflow": overflow}):
        found = Calibration.from_dict({"layers": {"encoder.layer.0": {**VERSION_1, **more}}})
        layer = found.layers["encoder.layer.0"]
        assert layer.scales == SCALES
        given = more.get("overflow")
        assert layer.overflow == ({} if given is None else {"inner": Overflow(neurons=(3, 5), scale=0.25)})
        assert found.to_version_1() == {"layers": {"encoder.layer.0": {**VERSION_1, "overflow": given}}}
        assert Calibration.from_dict(found.to_dict()) == found
        assert set(found.to_dict()["layers"]["encoder.layer.0"]) == {"scales", "overflow"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": math.nan}, "query"), ({"gelu": -1.0}, "inner"), ({"attention_output": 1e30}, "context"),
        ({"gelu": "0.1"}, "inner"), ({"gelu": True}, "inner"), ({"value": None}, "value"), ({"spare": 1.0}, "spare"),
    ],
    ids=str,
)  # fmt: skip
def test_version_1_of_a_calibration_is_held_to_the_same_rules(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(QBertError, match=f"calibration: .*{words}"):
        Calibration.from_dict({"layers": {"encoder.layer.0": {**VERSION_1, **changes}}})


def test_a_code_of_0_is_data_where_it_is_another() -> None:
    """And where it is not, calibrations are spelled as before there was one: digests of older files are of that."""
    assert "zeros" not in LayerScales(scales=SCALES).model_dump()
    layer = LayerScales(scales=SCALES, zeros={"inner": -117})
    calibration = Calibration(layers={"encoder.layer.0": layer})
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert layer.top("inner") == 244 * 0.03
    assert layer.top("value") == 127 * 0.05


@pytest.mark.parametrize(
    ("zeros", "words"),
    [
        ({"inner": 128}, r"zeros\.inner: .*less than or equal to 127"),
        ({"inner": 1.0}, r"zeros\.inner: .*valid integer"),
        ({"gate": 3}, "zero of a slot 'gate' without a scale"),
    ],
)
def test_codes_of_0_that_are_none_are_refused(zeros: Any, words: str) -> None:
    with pytest.raises(QBertError, match=f"calibration: .*{words}"):
        Calibration.from_dict({"layers": {"encoder.layer.0": {"scales": SCALES, "zeros": zeros}}})


@pytest.mark.parametrize(
    "data", [{}, {"layers": {}}, {"layers": []}, {"layers": {"a": 1}}, {"layers": {1: {"scales": SCALES}}}, {"x": 1}]
)
def test_data_of_another_shape_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(QBertError, match="calibration: "):
        Calibration.from_dict(data)


def _calibration(
    scales: dict[str, float] = SCALES, zeros: dict[str, int] | None = None, **overflow: Overflow
) -> Calibration:
    layer = LayerScales(scales=scales, zeros=zeros or {}, overflow=overflow)
    return Calibration(layers={f"encoder.layer.{index}": layer for index in range(2)})


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (
            _calibration(inner=Overflow(neurons=(5, 128), scale=0.1)),
            r"encoder\.layer\.0 has no neuron 128; allowed: 0 \.\.\. 127",
        ),
        (
            _calibration(context=Overflow(neurons=(5,), scale=0.1)),
            r"encoder\.layer\.0 has overflow in 'context', which comes out of no activation",
        ),
        (
            _calibration(zeros={"context": 5}),
            r"encoder\.layer\.0 has a zero in 'context', which comes out of no activation",
        ),
        (
            _calibration({**SCALES, "gate": 0.1}),
            r"encoder\.layer\.0 has a slot 'gate'; allowed: query, key, value, context, inner",
        ),
        (
            _calibration({name: scale for name, scale in SCALES.items() if name != "context"}),
            r"encoder\.layer\.0 lacks a slot 'context'; allowed: query, key, value, context, inner",
        ),
        (
            Calibration.from_dict(
                {"layers": {f"encoder.layer.{index}": {"query": 0.1, "gelu": 0.1} for index in (0, 1)}}
            ),
            r"encoder\.layer\.0 lacks a slot '(key|value|context)'",
        ),
    ],
    ids=["neuron", "no_activation", "no_activation_zero", "unknown", "missing", "version_1_missing"],
)
def test_slots_that_the_encoder_has_not_are_refused(calibration: Calibration, words: str) -> None:
    model = _model()
    quantize_(copy.deepcopy(model), "w8a8+none", fuse=True, calibration=_calibration())
    quantize_(
        copy.deepcopy(model),
        "w8a8+none",
        fuse=True,
        calibration=_calibration(inner=Overflow(neurons=(5, 127), scale=0.1)),
    )
    with pytest.raises(QBertError, match=f"calibration: {words}"):
        quantize_(model, "w8a8+none", fuse=True, calibration=calibration)
    assert all(type(module).__module__.partition(".")[0] != "qbert" for module in model.modules())


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "keywords", "words"),
    [
        ("one text", {}, "texts is a str; allowed: a list of str, or of batches"),
        ({"input_ids": torch.ones(1, 2)}, {}, "texts is a dict; allowed: a list"),
        ([], {}, "no text to calibrate with"),
        (["a", {"input_ids": torch.ones(1, 2)}], {}, "texts holds a str; allowed: str only, or dicts of tensors only"),
        ([1], {}, "texts holds a int"),
        ([{"labels": torch.ones(1)}], {}, "a batch has labels; needed: input_ids or inputs_embeds"),
        ([{"input_ids": torch.ones(1, 2), "attention_mask": torch.zeros(1, 2)}], {}, "no text to calibrate with"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
        (["a"], {}, r"no tokenizer beside the model \(''\); pass tokenizer="),
    ],
    ids=["str", "dict", "empty", "mixed", "int", "labels", "padding", "batch_size", "tokenizer"],
)
def test_what_cannot_be_calibrated_with_is_refused(texts: Any, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(QBertError, match=words):
        calibrate(_model(), texts, **keywords)


@pytest.mark.parametrize("times", [1, 32])
def test_one_text_again_and_again_is_refused(times: int) -> None:
    batch = {name: each[:1, :7] for name, each in _batches(1)[0].items()}
    with pytest.raises(
        QBertError, match=f"{times} texts to calibrate with, and all are the same; allowed: two or more"
    ):
        calibrate(_model(), [batch] * times)


def test_the_share_of_saturated_codes_is_that_of_texts_that_were_held_out() -> None:
    """Two halves of which one is twice as wide: what the other's scale cuts off of it is known."""
    x = torch.rand(4000, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    held_out = torch.arange(4000) % 2 == 1
    x[held_out] *= 2
    spectrum = _Spectrum.empty(x.abs().amax(0))
    spectrum.add(x, held_out)
    found = spectrum.saturated()
    assert found.held_out / found.held_out_of == pytest.approx(0.5, abs=0.02)
    assert found.own / found.own_of < 0.01
    assert (found.held_out_of, found.own_of) == (16000, 16000)


def _narrow_and_wide(copies: int) -> list[dict[str, Tensor]]:
    """Texts of one kind and another, many times: what scales of the first do to the second is seen by halves."""
    first = torch.full((1, 8, 64), 0.1)
    first[:, :, ::2] = -0.1
    wide = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)) * 3
    return [{"inputs_embeds": first}, {"inputs_embeds": wide}] * copies


def test_too_little_is_said_with_the_figure_that_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    calibrate(_model(), _batches(16))
    assert "too little" not in caplog.text
    for batches in (_narrow_and_wide(16), [{"input_ids": torch.arange(10, 25).view(3, 5)}]):
        caplog.clear()
        calibrate(_model(), batches)
        texts = 2 if len(batches) == 32 else 3
        said = rf"calibrated on too little: {texts} texts that differ, .* cut off \d+\.\d{{3}}% of the codes of the other half"
        assert re.search(said, caplog.text)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Any) -> None:
    _model().save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(QBertError, match=rf"no tokenizer beside the model \('{tmp_path}'\)"):
        calibrate(model, ["a text"])


def test_models_without_one_encoder_are_refused() -> None:
    with pytest.raises(QBertError, match="Sequential has 0 encoders that can be fused"):
        calibrate(nn.Sequential(nn.Linear(8, 8)), ["a"])
    with pytest.raises(QBertError, match="ModuleList has 2 encoders"):
        calibrate(nn.ModuleList([_model(), _model()]), ["a"])


def test_activations_that_are_not_finite_are_refused() -> None:
    model = _model()
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.bias[3] = torch.nan
    with pytest.raises(QBertError, match=r"encoder\.layer\.1: key is NaN or infinite on these texts"):
        calibrate(model, _batches())


def test_dead_tensors_get_a_scale() -> None:
    model = _model()
    with torch.no_grad():
        for module in (model.encoder.layer[0].intermediate.dense, model.encoder.layer[1].attention.self.value):
            module.weight.zero_()
            module.bias.zero_()
    calibration = calibrate(model, _batches())
    fused = quantize_(model, "w8a8+none", fuse=True, calibration=calibration)
    with torch.no_grad():
        assert fused(**_batches(1)[0])[0].isfinite().all()


def test_public_names() -> None:
    assert qbert.calibrate is calibrate
    assert qbert.Calibration is Calibration
