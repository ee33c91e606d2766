"""peft: LoRA on quantized models, quantizing adapted ones, merging, and Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_encoders import float_model, fused_model, padded_batch
from torch import nn
from transformers import Trainer, TrainingArguments

import qbert
from qbert import QBertError, Recipe, dequantize_, quantize_
from qbert.modules import QEmbedding, QLinear

peft = pytest.importorskip("peft", reason="needs peft; requirements.txt has it")

HEAD = "BertForSequenceClassification"
TARGETS = (["query", "value"], ["query", "word_embeddings"], "all-linear")
REFUSED = r"cannot be merged into a quantized weight .*qbert\.dequantize_\(model\)"


def _quantized(recipe: Recipe | str = "w8a8") -> Any:
    return quantize_(float_model(HEAD, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), recipe)


def _adapted(recipe: Recipe | str = "w8a8", targets: Any = TARGETS[0], **options: Any) -> Any:
    """A quantized classifier with LoRA on it."""
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=4, **options)
    return peft.get_peft_model(_quantized(recipe), config).eval()


def _steps(model: Any, steps: int = 4) -> tuple[float, float]:
    """Loss before and after training a little."""
    batch, labels = padded_batch(), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(**padded_batch()).logits


@pytest.mark.parametrize(
    ("recipe", "targets"), [("w8a8", TARGETS[0]), ("gobo4+w8", TARGETS[1]), ("w8a8", TARGETS[2])], ids=str
)
def test_lora_on_quantized_modules_is_trained_saved_and_loaded(recipe: Any, targets: Any, tmp_path: Path) -> None:
    before = _logits(quantize_(float_model(HEAD), recipe))
    model = _adapted(recipe, targets)
    assert torch.equal(_logits(model), before)  # LoRA begins with nothing
    first, last = _steps(model)
    assert last < first
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantize_(float_model(HEAD), recipe), str(tmp_path)).eval()
    assert torch.equal(_logits(again), _logits(model))
    assert torch.equal(_logits(copy.deepcopy(model)), _logits(model))
    with model.disable_adapter():
        assert not torch.equal(_logits(model), _logits(again))


def test_all_linear_means_every_linear_but_the_head() -> None:
    model = _adapted(targets="all-linear")
    found = {name for name, each in model.named_modules() if isinstance(each, peft.tuners.lora.LoraLayer)}
    assert len(found) == 2 * 6 + 1  # and the pooler's
    assert not any("classifier" in name for name in found)


def test_merging_is_refused_before_the_first_layer_and_right_after_dequantizing() -> None:
    model = _adapted(targets=["query", "word_embeddings"], init_lora_weights=False)
    before = _logits(model)
    layer = next(each for each in model.modules() if isinstance(getattr(each, "base_layer", None), QLinear))
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge, layer.unmerge):
        with pytest.raises(QBertError, match=REFUSED):
            merge()
    assert torch.equal(_logits(model), before)
    floats = dequantize_(copy.deepcopy(model))
    expected = _logits(floats)
    torch.testing.assert_close(_logits(floats.merge_and_unload()), expected)
    assert not torch.equal(_logits(model.unload()), before)
    assert not any(isinstance(each, peft.tuners.lora.LoraLayer) for each in model.modules())


def test_adapters_of_a_model_that_is_quantized_stay_float() -> None:
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "word_embeddings"], r=4, init_lora_weights=False
    )
    floats = peft.get_peft_model(float_model(HEAD), config).eval()
    model = quantize_(copy.deepcopy(floats), Recipe("w8a8", "w8", keep_float=()))
    assert torch.cosine_similarity(_logits(model).flatten(), _logits(floats).flatten(), 0) > 0.98
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert type(query.base_layer) is QLinear
    assert type(query.lora_A["default"]) is nn.Linear
    assert type(model.base_model.model.bert.embeddings.word_embeddings.base_layer) is QEmbedding
    reasons = {row.name: row.reason for row in qbert.explain(model).rows if row.scheme == "float32"}
    assert {reason for name, reason in reasons.items() if "lora_" in name or "modules_to_save" in name} == {
        "peft trains it"
    }
    with pytest.raises(QBertError, match=REFUSED):
        model.merge_and_unload()
    first, last = _steps(model)
    assert last < first


def test_adapters_and_emulated_linears() -> None:
    """Adapters compute in float whichever came first, and "all-linear" has the emulated ones."""
    formats = qbert.emulate(weights="int8", activations="int3")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4, init_lora_weights=False)
    first = quantize_(peft.get_peft_model(float_model(HEAD), config).eval(), formats)
    assert not [name for name, each in first.named_modules() if "lora_" in name and each._forward_pre_hooks]
    then = peft.get_peft_model(quantize_(float_model(HEAD), formats), config).eval()
    then.load_state_dict({name: each for name, each in first.state_dict().items() if "lora_" in name}, strict=False)
    torch.testing.assert_close(_logits(then), _logits(first))
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=4)
    model = peft.get_peft_model(quantize_(float_model(HEAD), formats), config)
    assert sum(isinstance(each, peft.tuners.lora.LoraLayer) for each in model.modules()) == 2 * 6 + 1


def test_prompt_tuning_reaches_the_prompt_through_quantized_linears() -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(_quantized(Recipe("w8a8", "w8")), config)
    first, last = _steps(model)
    assert last < first


def test_an_adapter_on_a_fused_encoder_is_refused_at_the_call() -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4)
    model = fused_model(HEAD)
    _logits(model)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(QBertError, match=r"is fused, but now .*query.*call qbert\.unfuse_\(model\)"):
        _logits(adapted)


class _Questions(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(5, 97, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": index % 2}


def _trainer(model: nn.Module, folder: Path) -> Trainer:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate; requirements.txt has it")
    arguments = TrainingArguments(
        str(folder), num_train_epochs=6, per_device_train_batch_size=4, learning_rate=5e-3, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=_Questions(), eval_dataset=_Questions())


@pytest.mark.parametrize("adapter", [False, True], ids=("head", "lora"))
def test_trainer_trains_and_evaluates_what_is_float(adapter: bool, tmp_path: Path) -> None:
    model = _adapted(targets="all-linear") if adapter else _quantized()
    codes = {name: each.clone() for name, each in model.named_buffers()}
    trainer = _trainer(model, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(torch.equal(each, codes[name]) for name, each in model.named_buffers())


def test_trainer_evaluates_a_fused_model_and_says_how_to_train_it(tmp_path: Path) -> None:
    trainer = _trainer(fused_model(HEAD), tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(QBertError, match=r"does not take training mode: .* qbert\.unfuse_\(model\) to train"):
        trainer.train()
