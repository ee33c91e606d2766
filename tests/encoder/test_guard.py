"""What stands between the linears of a fused encoder, and what is asked of calls, calibrations and loads."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch
import transformers
from small_encoders import (
    CONFIGS,
    FOUR,
    LEAST_SQNR_DB,
    calibration_of,
    encoder_of,
    float_model,
    fused_model,
    hidden_of,
    padded_batch,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qbert import QBertError, Recipe, calibrate, explain, fuse_, quantize_, unfuse_
from qbert.encoder import Calibration, fused_forward, obstacle
from qbert.encoder.stock import found_in, stock_obstacle
from qbert.families import family_of
from qbert.metrics import sqnr_db


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_builds_is_stock(name: str) -> None:
    model = encoder_of(float_model(f"{name}Model"))
    family = family_of(model)
    assert family is not None
    assert stock_obstacle(model, family) is None
    inside = {path for path, _ in model.named_modules() if not family.called(path)}
    assert {each.path for each in found_in(model, family)} == inside


class _Bent(transformers.models.bert.modeling_bert.BertSelfAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out - out.mean(1, keepdim=True), weights


def _set(path: str, name: str, value: Any) -> Any:
    return lambda model: setattr(model.get_submodule(path), name, value)


SELF = "encoder.layer.1.attention.self"
SURGERY = {
    "subclass": (_set(SELF, "__class__", _Bent), r"self is a .*_Bent, not transformers' BertSelfAttention"),
    "activation": (_set("encoder.layer.0.intermediate", "intermediate_act_fn", nn.ReLU()), "act_fn is a .*ReLU, not"),
    "adapter": (lambda m: m.encoder.layer[1].output.add_module("adapter", nn.Linear(2, 2)), "adapter is a Linear that no BERT"),
    "missing": (lambda m: delattr(m.encoder.layer[0].output, "dropout"), r"layer\.0\.output\.dropout is missing"),
    "forward": (_set(SELF, "forward", lambda *_, **__: None), "has a forward of its own"),
    "decoder": (lambda m: setattr(m.config, "is_decoder", True), "is_decoder is set"),
    "causal": (_set(SELF, "is_causal", True), r"self\.is_causal is True, not False"),
    "attention": (lambda m: setattr(m.config, "_attn_implementation", "mine"), "its attention implementation is 'mine'"),
    "own config": (_set(SELF, "config", transformers.BertConfig()), "has a configuration of its own"),
    "positions": (lambda m: m.embeddings.position_ids.data.copy_(m.embeddings.position_ids.flip(1)), "does not hold 0, 1, 2"),
    "types": (lambda m: m.embeddings.token_type_ids.fill_(1), "token_type_ids does not hold zeros"),
    "gelu": (_set("encoder.layer.0.intermediate.intermediate_act_fn", "act", torch.tanh), "act is .*tanh"),
    "max_norm": (_set("embeddings.word_embeddings", "max_norm", 1.0), "is not a plain table"),
    "bias": (lambda m: setattr(m.encoder.layer[0].output.dense.bias, "data", torch.zeros(3)), r"bias is \(3,\), not \(64,\)"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.encoder.layer[0].output.LayerNorm, "bias", nn.Tanh()), "LayerNorm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("what", SURGERY)
def test_what_is_not_stock_is_refused_by_name(what: str, called: bool) -> None:
    edit, words = SURGERY[what]
    model, batch = fused_model(), padded_batch()
    if called:
        hidden_of(model, **batch)
    edit(model)
    with pytest.raises(QBertError, match=rf"is fused, but now .*{words}"):
        hidden_of(model, **batch)
    assert "calls are refused now" in explain(model).encoders[0].reason


def test_a_patched_class_a_global_hook_and_a_registered_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fused_model(), padded_batch()
    before = hidden_of(model, **batch)
    kind = type(model.encoder.layer[0].output)
    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", lambda self, x, y: y)
        with pytest.raises(QBertError, match=r"BertOutput\.forward was replaced by"):
            hidden_of(model, **batch)
    with monkeypatch.context() as patched:
        patched.setattr("transformers.models.bert.modeling_bert.apply_chunking_to_forward", lambda f, *_: f)
        with pytest.raises(QBertError, match="apply_chunking_to_forward was replaced by"):
            hidden_of(model, **batch)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.raises(QBertError, match="a hook on all modules"):
        hidden_of(model, **batch)
    handle.remove()
    mapping = type(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)._global_mapping
    with monkeypatch.context() as patched:
        patched.setitem(mapping, "sdpa", lambda *_, **__: None)
        with pytest.raises(QBertError, match="attention implementation 'sdpa' was replaced"):
            hidden_of(model, **batch)
    assert torch.equal(hidden_of(model, **batch), before)


def test_one_part_in_training_mode_is_refused() -> None:
    model, batch = fused_model(), padded_batch()
    hidden_of(model, **batch)
    model.encoder.layer[1].output.dropout.train()
    with pytest.raises(
        QBertError, match=r"training mode of encoder\.layer\.1\.output\.dropout: call model\.eval\(\) first"
    ):
        hidden_of(model, **batch)
    hidden_of(model.eval(), **batch)


@pytest.mark.parametrize("called", [False, True])
def test_scaling_and_eps_are_the_modules_own(called: bool) -> None:
    model, batch = fused_model(), padded_batch()
    if called:
        hidden_of(model, **batch)
    model.encoder.layer[0].attention.self.scaling *= 4
    model.encoder.layer[1].output.LayerNorm.eps = 5.0
    there = batch["attention_mask"].bool()
    expected = hidden_of(unfuse_(copy.deepcopy(model)), **batch)[there]
    assert sqnr_db(expected, hidden_of(model, **batch)[there]) > LEAST_SQNR_DB["dynamic"]


@pytest.mark.parametrize("variant", ["dynamic", "static"])
def test_writes_through_data_are_seen(variant: str) -> None:
    model, batch = fused_model("BertModel", variant), padded_batch()
    layer = model.encoder.layer[0]
    before = hidden_of(model, **batch)
    embeddings = model.embeddings
    for tensor in (
        layer.attention.self.query.bias, layer.attention.self.value.scale, layer.output.dense.scale,
        layer.intermediate.dense.bias, layer.output.LayerNorm.weight, embeddings.LayerNorm.bias,
        embeddings.token_type_embeddings.weight,
    ):  # fmt: skip
        tensor.data.view(-1)[:3] *= 3
        found = hidden_of(model, **batch)
        assert torch.equal(found, hidden_of(copy.deepcopy(model), **batch))  # which is prepared anew
        assert not torch.equal(found, before)
        before = found


# ---- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 11, 11), (4, 1, 11, 11)], ids=str)
def test_masks_of_more_dimensions_name_the_way_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(QBertError, match=r"attention_mask is .*call qbert\.unfuse_\(model\) first"):
        fused_model()(input_ids=padded_batch()["input_ids"], attention_mask=torch.ones(shape))


@pytest.mark.parametrize("family", FOUR)
def test_left_padding_and_a_reader_of_the_first_position(family: str) -> None:
    model = fused_model(f"{family}ForSequenceClassification")
    batch = padded_batch(kind="left")
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True)
        expected = unfuse_(copy.deepcopy(model))(**batch, output_hidden_states=True)
    padded = batch["attention_mask"][:, 0] == 0
    assert padded.any()
    for state, exact in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(state[padded, 0], exact[padded, 0], atol=1e-4)  # torch's products go by the batch's size
    assert torch.allclose(found.logits[padded], expected.logits[padded], atol=1e-4)


def test_tracing_and_exporting_name_the_way_out() -> None:
    model, batch = fused_model(), padded_batch()
    hidden_of(model, **batch)
    with pytest.raises(QBertError, match=r"qbert\.unfuse_\(model\)"):
        torch.jit.trace(model, (batch["input_ids"],), check_trace=False, strict=False)


# ---- calibrations ---------------------------------------------------------------------------------------------------


@functools.cache
def _calibration(seed: int) -> Calibration:
    return calibration_of(float_model(seed=seed))


@pytest.mark.parametrize("linear", ["w8a8", "w4a8", "gobo3a8"])
def test_a_calibration_knows_its_model_again(linear: str) -> None:
    calibration = _calibration(0)
    assert Calibration.from_dict(calibration.to_dict()) == calibration
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = quantize_(float_model().to(dtype), linear)
        assert fused_forward(fuse_(model, calibration)).variant == "static"
        with pytest.raises(QBertError, match="calibration is of another model"):
            fuse_(model, _calibration(1))


def test_a_calibration_of_another_model_is_refused_before_anything_is_done() -> None:
    model, other = (transformers.BertModel(copy.deepcopy(CONFIGS["Bert"])).eval() for _ in range(2))
    foreign = calibration_of(other)  # biases are zeros and gains are ones in both: the weights tell
    with pytest.raises(QBertError, match="its model's weights are others"):
        quantize_(model, "w8a8+none", fuse=True, calibration=foreign)
    assert type(model.encoder.layer[0].output.dense) is nn.Linear
    quantize_(other, "w8a8+none", fuse=True, calibration=foreign)


def test_calibrations_of_older_files_are_taken_and_said() -> None:
    old = Calibration.from_dict({"layers": _calibration(0).to_dict()["layers"]})
    assert "fingerprint" not in old.to_dict()
    model = quantize_(float_model(seed=5), "w8a8+none", fuse=True, calibration=old)
    assert "does not say of which model" in explain(model).encoders[0].reason
    assert "does not say" not in explain(fused_model("BertModel", "static")).encoders[0].reason


def test_batches_without_a_token_are_refused_by_name() -> None:
    ids = padded_batch()["input_ids"]
    for bad in ({"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, {"input_ids": ids[:0]}):
        with pytest.raises(QBertError, match=r"batch 1 of 2, \d x 11, has no token to calibrate with"):
            calibrate(float_model(), [{"input_ids": ids}, bad])


# ---- quantizing and saving ------------------------------------------------------------------------------------------


def test_a_linear_with_a_forward_of_its_own_stays_float() -> None:
    model, batch = float_model(), padded_batch()
    for layer in model.encoder.layer:
        dense, old = layer.output.dense, layer.output.dense.forward
        dense.forward = lambda x, old=old: old(x) * 0.5
    expected = hidden_of(model, **batch)
    quantize_(model, "w8a8+none", fuse=True)
    assert obstacle(model) == "encoder.layer.0.output.dense is float"
    assert sqnr_db(expected, hidden_of(model, **batch)) > 20


def test_an_exclusion_that_matches_nothing_is_refused() -> None:
    with pytest.raises(QBertError, match=r"exclude 'encoder\.layers\.0' matches no linear or embedding"):
        quantize_(float_model(), Recipe(exclude=["encoder.layers.0"]))


# ---- loading while others call --------------------------------------------------------------------------------------


def test_calls_during_a_load_give_old_or_new_answers() -> None:
    model, batch = fused_model(), padded_batch()
    states = [copy.deepcopy(quantize_(float_model(seed=seed), "w8a8+none").state_dict()) for seed in (0, 1)]
    answers = []
    for state in states:
        model.load_state_dict(state)
        answers.append(hidden_of(model, **batch))
    done, strays = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            found = hidden_of(model, **batch)
            if not any(torch.equal(found, answer) for answer in answers):
                strays.append(found)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(10):
        model.load_state_dict(states[turn % 2])
    done.set()
    for thread in threads:
        thread.join()
    assert not strays


def test_a_load_that_fails_does_not_shut_calls_out() -> None:
    model, batch = fused_model(), padded_batch()
    expected = hidden_of(model, **batch)
    state: dict[str, Tensor] = model.state_dict()

    def fail(*_: Any) -> None:
        raise RuntimeError("of this test")

    handle = model.pooler.register_load_state_dict_pre_hook(fail)
    with pytest.raises(RuntimeError, match="of this test"):
        model.load_state_dict(state)
    handle.remove()
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(hidden_of(model, **batch)))
    thread.start()
    thread.join(30)
    assert torch.equal(found[0], expected)
    unfuse_(model)
    assert not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks
