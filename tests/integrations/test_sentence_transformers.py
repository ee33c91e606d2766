"""sentence-transformers: pipelines and rerankers, quantized in place, saved, loaded, and while they are loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

import qbert
from qbert import QBertConfig, QBertError, Recipe, quantize_
from qbert.modules import QuantizedModule
from qbert.zoo import resolve_model

st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers; requirements.txt has it")

TEXTS = ["a text", "another text, of more words than the first", "a third"]
PAIRS = [("what is it?", "a text"), ("which one?", "another text, of more words")]
RECIPE = Recipe("w8a8", "w8")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def _folder(model_class: Any, folder: Path, **settings: Any) -> Path:
    """A float model of random weights with MiniLM's tokenizer beside it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    except QBertError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model_class(BertConfig(vocab_size=len(tokenizer), **SIZES, **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(BertModel, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(BertForSequenceClassification, tmp_path_factory.mktemp("reranker"), num_labels=1)


def _pipeline(folder: Path, **arguments: Any) -> Any:
    return st.SentenceTransformer(str(folder), device="cpu", **arguments)


def _cosines(a: Any, b: Any) -> Any:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("fuse", [False, True], ids=("unfused", "fused"))
def test_a_pipeline_is_quantized_in_place_saved_and_loaded(encoder: Path, fuse: bool, tmp_path: Path) -> None:
    pipeline = _pipeline(encoder)
    floats = pipeline.encode(TEXTS)
    assert quantize_(pipeline, RECIPE, fuse=fuse) is pipeline
    expected = pipeline.encode(TEXTS)
    assert _cosines(expected, floats).min() > 0.98
    assert np.array_equal(pipeline.encode(TEXTS), expected)  # and once more
    pipeline.save_pretrained(str(tmp_path))
    again = _pipeline(tmp_path)
    assert np.array_equal(again.encode(TEXTS), expected)
    assert (qbert.explain(again).encoders[0].fused == "dynamic") is fuse


def test_a_pipeline_is_quantized_while_it_is_loaded(encoder: Path) -> None:
    config = QBertConfig(linear="w8a8", embedding="w8", fuse=True)
    pipeline = _pipeline(encoder, model_kwargs={"quantization_config": config})
    expected = quantize_(_pipeline(encoder), RECIPE, fuse=True).encode(TEXTS)
    assert np.array_equal(pipeline.encode(TEXTS), expected)


def test_layers_that_the_pipeline_saves_itself_stay_float(encoder: Path, tmp_path: Path) -> None:
    pipeline = _pipeline(encoder)
    pipeline.append(st.sentence_transformer.modules.Dense(64, 32))
    quantize_(pipeline, RECIPE)
    dense = pipeline[-1]
    assert not any(isinstance(each, QuantizedModule) for each in dense.modules())
    (row,) = [row for row in qbert.explain(pipeline).rows if row.shape == (32, 64)]
    assert "sentence-transformers' Dense saves it" in row.reason
    expected = pipeline.encode(TEXTS)
    pipeline.save_pretrained(str(tmp_path))
    assert np.array_equal(_pipeline(tmp_path).encode(TEXTS), expected)
    with pytest.raises(QBertError, match="nothing to quantize in Dense: sentence-transformers' Dense saves it"):
        quantize_(dense)


@pytest.mark.parametrize("fuse", [False, True], ids=("unfused", "fused"))
def test_a_reranker_is_quantized_in_place_saved_and_loaded(reranker: Path, fuse: bool, tmp_path: Path) -> None:
    model = st.CrossEncoder(str(reranker), device="cpu")
    floats = model.predict(PAIRS)
    quantize_(model, RECIPE, fuse=fuse)
    expected = model.predict(PAIRS)
    assert np.abs(expected - floats).max() < 0.05
    model.save_pretrained(str(tmp_path))
    again = st.CrossEncoder(str(tmp_path), device="cpu")
    assert np.array_equal(again.predict(PAIRS), expected)
    assert again.rank(PAIRS[0][0], [text for _, text in PAIRS]) == model.rank(PAIRS[0][0], [text for _, text in PAIRS])


@pytest.mark.slow
def test_processes_of_a_pool_give_the_same_bits(encoder: Path) -> None:
    pipeline = quantize_(_pipeline(encoder), RECIPE, fuse=True)
    expected = pipeline.encode(TEXTS * 4)
    pool = pipeline.start_multi_process_pool(["cpu", "cpu"])
    try:
        assert np.array_equal(pipeline.encode(TEXTS * 4, pool=pool, chunk_size=3), expected)
    finally:
        pipeline.stop_multi_process_pool(pool)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder"])
def test_without_qbert_the_last_line_names_the_cure(encoder: Path, reranker: Path, tmp_path: Path, kind: str) -> None:
    """Of a pipeline that sentence-transformers saved, and of a reranker."""
    source = encoder if kind == "SentenceTransformer" else reranker
    model = quantize_(getattr(st, kind)(str(source), device="cpu"), RECIPE, fuse=True)
    model.save_pretrained(str(tmp_path / "out"))
    done = _load_elsewhere(kind, tmp_path / "out", first="")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")
    assert "import_qbert_first" in done.stderr.splitlines()[-1]
    done = _load_elsewhere(kind, tmp_path / "out", first="import qbert")
    assert done.returncode == 0, done.stderr
    qbert.dequantize_(model).save_pretrained(str(tmp_path / "float"))
    assert _load_elsewhere(kind, tmp_path / "float", first="").returncode == 0


@pytest.mark.slow
def test_the_commands_folder_names_the_cure_too(encoder: Path, tmp_path: Path) -> None:
    from qbert.workflow import quantize_checkpoint

    pipeline = tmp_path / "pipeline"
    _pipeline(encoder).save_pretrained(str(pipeline))
    quantize_checkpoint(str(pipeline), tmp_path / "out", RECIPE, fuse=True)
    done = _load_elsewhere("SentenceTransformer", tmp_path / "out", first="")
    assert "import_qbert_first" in done.stderr.splitlines()[-1]
    again = _pipeline(tmp_path / "out")
    assert type(again[0]) is type(_pipeline(encoder)[0])  # sentence-transformers' own class
    assert _cosines(again.encode(TEXTS), _pipeline(encoder).encode(TEXTS)).min() > 0.99


def _load_elsewhere(kind: str, folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where qbert is imported or not."""
    load = f"import sentence_transformers as st; st.{kind}({str(folder)!r}, device='cpu')"
    environment = {**os.environ, "PYTHONPATH": str(Path(qbert.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", f"{first}\n{load}"], capture_output=True, text=True, env=environment, check=False
    )
