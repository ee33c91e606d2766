"""Pooling and normalizing as sentence-transformers' files say, or as the caller does; never a guess."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from embed_cases import STAGES, texts, write_pipeline

from qbert import QBertError
from qbert.embed import SAME_BITS, Pipeline, embedder_of, pipeline_of


def test_the_files_of_older_and_newer_versions_are_read(tmp_path: Path) -> None:
    write_pipeline(tmp_path, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    assert pipeline_of(tmp_path) == Pipeline("cls", True, 32)
    write_pipeline(tmp_path, {"pooling_mode": "mean"}, STAGES[:2])
    assert pipeline_of(tmp_path) == Pipeline("mean", False, 32)
    assert pipeline_of(tmp_path, pooling="cls", normalize=True, max_length=9) == Pipeline("cls", True, 9)


def test_prompts_are_named_or_written_out(tmp_path: Path) -> None:
    write_pipeline(tmp_path, {"pooling_mode": "mean"})
    prompts = {"prompts": {"query": "query: ", "document": "passage: "}, "default_prompt_name": "document"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert [pipeline_of(tmp_path, prompt=p).prompt for p in (None, "query", "Find: ", "")] == [
        "passage: ", "query: ", "Find: ", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pooling", "stages", "says"),
    [
        ({"pooling_mode": "lasttoken"}, STAGES, "pooling lasttoken is not computed here; allowed: mean, cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, STAGES, r"pooling max\+mean is not"),
        ({"pooling_mode": "mean", "include_prompt": False}, STAGES, "pooling without the prompt"),
        ({"pooling_mode": "mean"}, [*STAGES, ("3", "3_Dense", "Dense")], "this pipeline has a Dense"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path: Path, pooling: dict, stages: list, says: str) -> None:
    write_pipeline(tmp_path, pooling, stages)
    with pytest.raises(QBertError, match=says):
        pipeline_of(tmp_path)


def test_without_files_the_pooling_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(QBertError, match="say --pooling, allowed: mean, cls"):
        pipeline_of(tmp_path)
    with pytest.raises(QBertError, match="pooling 'max'; allowed: mean, cls"):
        pipeline_of(tmp_path, pooling="max")
    assert pipeline_of(tmp_path, pooling="mean") == Pipeline("mean", False)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_sentence_transformers(fused: Path, tmp_path: Path, pooling: str) -> None:
    """But for the last bits of torch's sum over padded widths."""
    st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers; requirements.txt has it")
    folder = tmp_path / "model"
    shutil.copytree(fused, folder)
    write_pipeline(folder, {"pooling_mode": pooling})
    given = texts(40)
    ours = embedder_of(str(folder)).embed(given)
    theirs = st.SentenceTransformer(str(folder), device="cpu").encode(given)
    np.testing.assert_allclose(ours.vectors, theirs, atol=2e-6)
    assert ours.truncated > 0  # at 32 tokens, which the files say


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_fused_model_gives_the_same_bits_in_every_batch(fused: Path, pooling: str) -> None:
    given = texts(60)
    whole = embedder_of(str(fused), pooling=pooling)
    assert whole.batch_bits == SAME_BITS
    expected = whole.embed(given).vectors
    small = embedder_of(str(fused), pooling=pooling, batch_tokens=64)
    assert np.array_equal(small.embed(given).vectors, expected)
    assert np.array_equal(np.concatenate([whole.embed([text]).vectors for text in given]), expected)
    assert np.array_equal(whole.embed(given[::-1]).vectors[::-1], expected)


def test_where_batches_decide_bits_that_is_said(encoder: Path) -> None:
    assert "last bits may depend on the batch" in embedder_of(str(encoder)).batch_bits
    assert embedder_of(str(encoder), scheme="w8a8").batch_bits == SAME_BITS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scheme": "w8a8"}, "is quantized already; leave out --scheme"),
        ({"calibrate_with": "default"}, "say which scheme, too"),
        ({"max_length": 2}, "max_length 2: allowed are 3 to 512"),
        ({"max_length": 513}, "max_length 513: allowed are 3 to 512"),
        ({"batch_tokens": 0}, "batch_tokens 0; allowed: 1 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(fused: Path, arguments: dict, says: str) -> None:
    with pytest.raises(QBertError, match=says):
        embedder_of(str(fused), **arguments)
