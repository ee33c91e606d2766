"""Loading float models without a random tensor in them, and the benchmark of quantizing."""

import copy
import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

import qbert
from benchmarks import bench_quantize
from qbert import QBertError
from qbert.shapes import keep_heads_, keep_layers_, keep_neurons_, keep_words_
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


def test_layers_and_heads_are_compared_with_those_they_were(tmp_path):
    """Layer 1 of a model that kept layers 0 and 3 was measured against layer 1 of the original."""
    config = BertConfig(**CONFIG | {"num_hidden_layers": 4, "num_attention_heads": 4})
    source, out = saved(BertModel(config), tmp_path / "float"), tmp_path / "out"
    model = load_float(source)
    keep_layers_(model, [0, 3])
    layers = saved(model, tmp_path / "layers")
    keep_heads_(model, 1, [0, 2])
    qbert.quantize_(copy.deepcopy(model), qbert.Recipe("w8a8", "w8")).save_pretrained(out)
    for against in (source, layers):
        report = verify_checkpoint(out, against)
        assert len(report.sqnr) == 2 * 6 + 1 + 3
        assert all(row.sqnr_db > 35 for row in report.sqnr)
    with pytest.raises(QBertError, match="it had 4 layers, the model to compare with has 3"):
        verify_checkpoint(out, saved(BertModel(BertConfig(**CONFIG | {"num_hidden_layers": 3})), tmp_path / "three"))
    for cut in (lambda: keep_neurons_(model, 0, range(64)), lambda: keep_words_(model, range(50))):
        cut()
        qbert.quantize_(copy.deepcopy(model), qbert.Recipe("w8a8", "w8")).save_pretrained(out)
        with pytest.raises(QBertError, match=r"this model is compressed \(2 of 4 layers \(0 3\)"):
            verify_checkpoint(out, source)


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
