"""Emulated models: every family, saved and loaded at their true bits, beside the kernels, in training, and what is refused."""

import copy
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from small_encoders import EVERY, float_model, hidden_of, padded_batch
from torch import nn

import qbert
from qbert import CheckpointError, QBertError, formats
from qbert.checkpoint import Record
from qbert.formats import BlockFormat, block_format, emulated_scheme, get_format
from qbert.metrics import sqnr_db
from qbert.modules import AttentionFormats, EmulatedLinear, EmulatedModule, QLinear
from qbert.modules.attention import attend
from qbert.modules.emulated import integer_sums
from qbert.numerics import round_activations
from qbert.ops import call
from qbert.ops.operations import QuantizeRows
from qbert.quantizers import quantize
from qbert.testing import random_weight

ALL_SITES = qbert.emulate("mxfp6_e2m3", "mxfp8", "mxfp8", embeddings="mxfp6_e2m3", norms="mxfp8", gelu="mxfp8")
QUERY = "encoder.layer.0.attention.self.query"
FIVE = block_format("mine", formats.minifloat("f5", 2, 2), "e8m0", 32)


def linear_pair(scheme, emulated, n=48, k=256):
    torch.manual_seed(0)
    weight, bias = random_weight(n, k, seed=3), nn.Parameter(torch.randn(n))
    native = QLinear(quantize(weight, formats.get_scheme(scheme, formats.Role.LINEAR)), bias)
    return native, EmulatedLinear(quantize(weight, emulated), bias)


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_emulated_saved_and_loaded(family, tmp_path):
    batch = padded_batch()
    there = batch["attention_mask"].bool()
    model = float_model(f"{family}Model")
    before = hidden_of(model, **batch)
    qbert.quantize_(model, ALL_SITES)
    hidden = hidden_of(model, **batch)
    assert 9 < sqnr_db(before[there], hidden[there]) < 40
    explained = qbert.explain(model)
    assert {row.kernel for row in explained.quantized} == {"emulated"}
    assert {row.bits_per_weight for row in explained.quantized} == {6.25}
    assert len(explained.notes) == 3
    assert "it is emulated" in str(explained)
    qbert.save(model, tmp_path / "saved")
    again = qbert.load(tmp_path / "saved")
    assert torch.equal(hidden_of(again, **batch), hidden)
    assert qbert.explain(again).notes == explained.notes
    qbert.dequantize_(again)
    assert not any(isinstance(module, EmulatedModule) for module in again.modules())
    assert qbert.explain(again).notes == []
    assert sqnr_db(before[there], hidden_of(again, **batch)[there]) > sqnr_db(before[there], hidden[there])


def test_a_tied_head_computes_with_the_emulated_table(tmp_path):
    batch = padded_batch()
    model = qbert.quantize_(float_model("BertForMaskedLM"), qbert.emulate("mxfp8", embeddings="int8"))
    row = next(row for row in qbert.explain(model).rows if row.name.endswith("decoder"))
    assert row.reason.startswith("tied to bert.embeddings.word_embeddings")
    logits = hidden_of(model, **batch)
    qbert.save(model, tmp_path / "saved")
    assert torch.equal(hidden_of(qbert.load(tmp_path / "saved"), **batch), logits)


def test_from_pretrained_takes_an_emulation(tmp_path):
    from transformers import AutoModel

    batch = padded_batch()
    model = float_model()
    model.save_pretrained(tmp_path)
    wanted = hidden_of(qbert.quantize_(model, qbert.emulate(FIVE, "mxfp8", "int8")), **batch)
    config = qbert.QBertConfig.of_recipe(qbert.emulate(FIVE, "mxfp8", "int8"))
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(hidden_of(loaded.eval(), **batch), wanted)


# ---- beside the kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [96, 1040, 3072])
def test_w8a8_has_the_kernels_codes_and_sums(k):
    """Codes, int32 sums, and the result within the rounding of its last float operations."""
    native, emulated = linear_pair("w8a8", emulated_scheme(get_format("int8"), get_format("int8")), k=k)
    x = torch.randn(17, k, generator=torch.Generator().manual_seed(k)) * 3
    codes, scales = call(QuantizeRows(x))
    assert torch.equal(round_activations(x, get_format("int8")), codes.float() * scales[:, None])
    weight = quantize(native.weight, formats.SCHEMES["w8a8"]).qdata
    sums = codes.long() @ weight.long().T
    assert torch.equal(integer_sums(codes.float(), weight.float(), 127 * 127).long(), sums)
    with torch.no_grad():
        torch.testing.assert_close(emulated(x), native(x), rtol=1e-6, atol=1e-6 * float(native(x).abs().max()))
    assert "the kernels of scheme w8a8 compute the same" in emulated.kernel.reason


def test_the_longest_sums_are_exact():
    codes, weight = torch.full((1, 5000), 127.0), torch.full((1, 5000), -127.0)
    assert int(integer_sums(codes, weight, 127 * 127)) == -127 * 127 * 5000


@pytest.mark.parametrize(
    ("scheme", "weights"),
    [("w8a16", "int8"), ("w4a16", "int4-g64"), ("w4a16-g32", "int4-g32"), ("gobo3", "gobo3"), ("gobo4", "gobo4")],
)
def test_what_has_a_kernel_is_what_the_kernel_computes(scheme, weights):
    native, emulated = linear_pair(scheme, emulated_scheme(get_format(weights)))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(emulated(x), native(x), rtol=1e-5, atol=1e-5)
    assert f"scheme {scheme} compute the same" in emulated.kernel.reason


def test_a_format_may_be_called_anything():
    """Also what a float type is called."""
    model = nn.Sequential(nn.Linear(64, 8))
    qbert.quantize_(model, qbert.emulate(block_format("float5", formats.minifloat("f5", 2, 2), "e8m0", 32)))
    assert qbert.explain(model).bits_per_weight == 5.25


def test_a_block_that_does_not_divide_is_said():
    _, emulated = linear_pair("w8a16", emulated_scheme(get_format("mxfp4")), k=70)
    assert "the last block of a row has 6 of 32 columns" in emulated.kernel.reason
    with torch.no_grad():
        assert emulated(torch.randn(3, 70)).shape == (3, 48)


# ---- attention -------------------------------------------------------------------------------------------------------


def operands(tokens=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, tokens, 16, generator=generator) for _ in range(3)]


def test_attention_without_formats_is_attention():
    q, k, v = operands()
    context, _ = attend(q, k, v, None, 0.25, 0.0, AttentionFormats())
    expected = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(context, expected.transpose(1, 2))


def test_attention_sums_over_rounded_operands():
    q, k, v = operands(tokens=40)
    fmt = get_format("mxfp4")
    context, probabilities = attend(q, k, v, None, 0.25, 0.0, AttentionFormats.of(fmt))

    def by_hand(x):
        return round_activations(x.reshape(-1, x.shape[-1]), fmt).view(x.shape)

    scores = by_hand(q) @ by_hand(k).transpose(2, 3) * 0.25
    assert torch.equal(probabilities, by_hand(torch.softmax(scores, dim=-1)))
    values = by_hand(v.transpose(2, 3).contiguous()).transpose(2, 3)
    torch.testing.assert_close(context, (probabilities @ values).transpose(1, 2))


@pytest.mark.parametrize("name", ["mxfp8", "int8", "nvfp4"])
def test_padding_is_in_nobodys_scale(name):
    """Values are rounded in blocks of keys: those that are masked, whatever they are, change nothing."""
    q, k, v = operands(tokens=24)
    mask = torch.zeros(2, 1, 1, 24)
    mask[..., 17:] = torch.finfo(torch.float32).min
    formats_ = AttentionFormats.of({"probabilities": name, "value": name, "scores": name})
    context, _ = attend(q, k, v, mask, 0.25, 0.0, formats_)
    v[:, :, 17:] = 1e6
    changed, _ = attend(q, k, v, mask, 0.25, 0.0, formats_)
    assert torch.equal(context, changed)


def test_activations_and_attention_alone_leave_the_weights():
    batch = padded_batch()
    model, original = float_model(), float_model()
    qbert.quantize_(model, qbert.emulate(activations="mxfp8", attention={"value": "int8"}))
    assert "Linear input in mxfp8 (13 modules)" in "\n".join(qbert.explain(model).notes)
    assert 15 < sqnr_db(hidden_of(original, **batch), hidden_of(model, **batch)) < 40
    twin = copy.deepcopy(model)
    assert torch.equal(hidden_of(twin, **batch), hidden_of(model, **batch))
    with pytest.raises(QBertError, match="emulated already"):
        qbert.quantize_(model, "w8a8")
    qbert.dequantize_(model)
    assert torch.equal(hidden_of(model, **batch), hidden_of(original, **batch))


# ---- training --------------------------------------------------------------------------------------------------------


def test_what_no_record_can_say_is_not_saved_as_if_it_were_float(tmp_path):
    model = float_model("BertModel")
    qbert.quantize_(model, qbert.emulate(attention={"value": "int8"}))
    for save in (lambda: model.save_pretrained(tmp_path / "new"), lambda: qbert.save(model, tmp_path / "new")):
        with pytest.raises(QBertError, match=r"attention's value in int8 .* no weights in a format"):
            save()
    assert not (tmp_path / "new").exists()
    qbert.dequantize_(model)
    model.save_pretrained(tmp_path / "new")


def test_another_attention_function_is_not_taken_for_the_emulated_one(tmp_path):
    model, batch = float_model("BertModel"), padded_batch()
    before = hidden_of(model, **batch)
    qbert.quantize_(model, qbert.emulate(attention="fp4_e2m1"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(QBertError, match="its implementation is 'sdpa' now"):
        model(**batch)
    qbert.dequantize_(model)
    torch.testing.assert_close(hidden_of(model, **batch), before)


def test_a_pickle_runs_in_another_process(tmp_path):
    model = qbert.quantize_(float_model("BertModel"), qbert.emulate(weights="int8", attention="mxfp8"))
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = """
import pickle, sys, torch, qbert
model = pickle.load(open(sys.argv[1], "rb"))
print(model(torch.tensor([[5, 6]]))[0].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pkl")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "torch.Size([1, 2, 64])", done.stderr


def test_a_backward_after_inference():
    model, batch = qbert.quantize_(float_model("BertModel"), qbert.emulate(weights="int8")), padded_batch()
    with torch.inference_mode():
        model(**batch)
    model.embeddings.LayerNorm.weight.grad = None
    model(**batch)[0].sum().backward()
    assert model.embeddings.LayerNorm.weight.grad.abs().sum() > 0


def test_gradients_pass_straight_through():
    _, emulated = linear_pair("w8a8", emulated_scheme(get_format("int8"), get_format("int8")))
    x = torch.randn(4, 256, requires_grad=True)
    emulated(x).sum().backward()
    torch.testing.assert_close(x.grad, emulated.float_weight().sum(0).expand(4, -1))


@pytest.mark.parametrize("weights", ["mxfp4", pytest.param("int4_zp", marks=pytest.mark.slow)])
def test_a_model_is_trained_in_its_format(weights, tmp_path):
    torch.manual_seed(0)
    batch = padded_batch()
    model = float_model()
    teacher = hidden_of(float_model(), **batch)
    qbert.quantize_(model, qbert.emulate(weights, "mxfp8", trainable=True))
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if n.endswith("master")], lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(**batch)[0] - teacher).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-3:]) < 0.85 * losses[0]
    assert not any("master" in name for name in model.state_dict())
    hidden = hidden_of(model.eval(), **batch)
    qbert.save(model, tmp_path / "trained")
    torch.testing.assert_close(hidden_of(qbert.load(tmp_path / "trained"), **batch), hidden)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated") / "saved"
    qbert.save(qbert.quantize_(float_model(), qbert.emulate(FIVE, "mxfp8", "int8", embeddings="nf4")), folder)
    return folder


def record_of(saved):
    return json.loads((saved / "config.json").read_text())["quantization_config"]


def test_a_file_spells_its_formats_out(saved):
    """A format that nobody named is read back without the code that made it."""
    record = Record.parse(record_of(saved))
    assert record.format_version == 4
    spec = next(spec for name, spec in record.modules.items() if name.endswith("query"))
    assert BlockFormat.from_dict(spec.weights) == FIVE
    assert record.recipe == qbert.emulate(FIVE, "mxfp8", "int8", embeddings="nf4")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("emulation", "weights", "scale"), "e9m0", "scale 'e9m0'; allowed"),
        (("emulation", "weights"), "mine.py:f", "allowed: formats, as objects"),
        (("emulation", "code"), {}, "emulation 'code'; allowed"),
        (("emulation", "attention"), {"query": 3}, "allowed: formats, as objects"),
        (
            ("modules", QUERY, "weights", "block"),
            [1, 10**9],
            "block 1 x 1000000000; allowed",
        ),
        (
            ("modules", QUERY, "weights", "element"),
            {"name": "x"},
            "element without 'bits'",
        ),
        (
            ("modules", QUERY, "weights", "name"),
            "other",
            "has the formats other/mxfp8",
        ),
        (
            ("modules", QUERY, "activations"),
            {"name": "x", "element": 3},
            "format element 3",
        ),
        (
            ("modules", QUERY, "weights", "rounding"),
            "__import__('os')",
            "allowed: nearest_even",
        ),
    ],
)
def test_a_hostile_record_is_one_named_error(saved, path, value, message):
    record = record_of(saved)
    place = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        Record.parse(record)
    assert "\n" not in str(caught.value)


def test_a_changed_format_does_not_fit_its_tensors(saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "changed")
    config = json.loads((saved / "config.json").read_text())
    spec = config["quantization_config"]["modules"][QUERY]
    spec["weights"]["block"] = [1, 16]
    (tmp_path / "changed/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"query.scale: shape must be \[64, 4\]"):
        qbert.load(tmp_path / "changed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to emulate; allowed: weights"),
        ({"weights": "mxfp5"}, "format 'mxfp5'; allowed"),
        ({"activations": "gobo3"}, "activations gobo3: a dictionary is learned"),
        ({"attention": {"keys": "int8"}}, "attention 'keys'; allowed: query, key"),
        ({"attention": block_format("t", "int8", block="tensor")}, "a tensor scale mixes tokens"),
        ({"weights": "gobo3", "trainable": True}, "format gobo3 learns its values; allowed in training"),
        ({"activations": "int8", "trainable": True}, "nothing to train"),
    ],
)
def test_what_is_refused_and_how(arguments, message):
    with pytest.raises(QBertError, match=message):
        qbert.emulate(**arguments)


def test_what_a_model_has_not_is_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(QBertError, match="has no attention that is emulated"):
        qbert.quantize_(model, qbert.emulate(attention="int8"))
    with pytest.raises(QBertError, match=r"has no nn\.LayerNorm to round"):
        qbert.quantize_(model, qbert.emulate(norms="int8", activations="int8"))
    assert qbert.explain(model).notes == []
    with pytest.raises(QBertError, match="fuse=True with an emulation"):
        qbert.quantize_(float_model(), qbert.emulate("int8"), fuse=True)


def test_nan_stays_in_its_row():
    _, emulated = linear_pair("w8a8", emulated_scheme(get_format("int8"), get_format("int8")))
    x = torch.randn(3, 256)
    x[1, 5] = math.nan
    with torch.no_grad():
        assert emulated(x).isnan().any(dim=1).tolist() == [False, True, False]
