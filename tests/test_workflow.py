"""Loading float models without a random tensor in them, and the benchmark of quantizing."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from benchmarks import bench_quantize
from qbert import QBertError
from qbert.workflow import load_float, quantize_checkpoint, verify_checkpoint

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def saved(model, folder, architecture=None):
    """A model folder; with the architecture that its configuration shall name."""
    model.save_pretrained(folder)
    if architecture:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    return str(folder)


def test_the_class_that_the_configuration_names(tmp_path):
    assert type(load_float(saved(BertForMaskedLM(BertConfig(**CONFIG)), tmp_path))) is BertForMaskedLM


def test_a_head_that_the_file_lacks_is_left_out(tmp_path):
    """all-mpnet-base-v2 names a head model and holds the encoder; a random head must not be quantized and saved."""
    float_model = BertModel(BertConfig(**CONFIG))
    loaded = load_float(saved(float_model, tmp_path, "BertForMaskedLM"))
    assert type(loaded) is BertModel
    assert torch.equal(loaded.pooler.dense.weight, float_model.pooler.dense.weight)


def test_a_pooler_that_the_file_lacks_is_left_out(tmp_path):
    source = saved(BertModel(BertConfig(**CONFIG), add_pooling_layer=False), tmp_path / "float")
    assert load_float(source).pooler is None
    from qbert.recipe import Recipe

    quantize_checkpoint(source, tmp_path / "out", Recipe("gobo4"))
    assert len(verify_checkpoint(tmp_path / "out", source).sqnr) == 6


def test_other_missing_tensors_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    source = saved(BertModel(BertConfig(**CONFIG)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QBertError, match=r"lacks 1 tensors of its model, 'encoder\.layer\.0\.output\.dense\.weight"):
        load_float(source)


def test_bench_quantize_measures_a_row(tmp_path):
    row = bench_quantize.measure(saved(BertModel(BertConfig(**CONFIG)), tmp_path), "gobo3", "gobo4")
    assert row.scheme == "gobo3+gobo4"
    assert 3 < row.bits_per_weight < 5
    assert row.seconds > 0
