"""`qbert embed` as a user types it."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from embed_cases import texts
from rich.console import Console

from qbert import cli
from qbert.cli import terminal


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command line in this process."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["qbert", "embed", *map(str, arguments)]),
        mock.patch.object(terminal, "out", Console(width=160)),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, stdout.getvalue(), stderr.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(texts(50)))
    return path


def test_a_float_model_is_quantized_on_the_way(encoder: Path, source: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(encoder, source, "-o", tmp_path / "out.npy", "--scheme", "w8a8")
    assert code == 0, stderr
    assert "50 vectors of 64 float32" in stdout
    assert "pooling mean, normalized, up to 32 tokens" in stdout
    assert "bits: the same bits in every batch" in stdout
    assert np.allclose(np.linalg.norm(np.load(tmp_path / "out.npy"), axis=1), 1)
    code, stdout, _ = run(encoder, source, "-o", tmp_path / "out.npy", "--scheme", "w8a8")
    assert code == 0
    assert "50 of them were finished before" in stdout


def test_the_estimate_follows_from_its_own_figures(fused: Path, source: Path) -> None:
    code, stdout, stderr = run(fused, source, "--estimate", "--texts", 10**9, "--within", 0.5, "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    assert (found["texts"], found["sampled"], found["within_hours"]) == (10**9, 50, 0.5)
    assert found["slowest"] <= found["texts_per_second"] <= found["fastest"]
    assert found["hours"] * 3600 >= 10**9 / found["texts_per_second"]
    assert found["machines"] - 1 < found["hours"] / 0.5 <= found["machines"]
    assert found["output_gb"] == pytest.approx(64 * 4)
    assert 0.1 < found["memory_gb"] < 20
    code, stdout, stderr = run(fused, source, "--estimate")
    assert code == 0, stderr
    assert "50 texts: " in stdout
    assert "within 1: 1 machine\n" in stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say where to write (-o OUT), or --estimate"),
        (["--estimate", "-o", "x.npy"], "say where to write (-o OUT), or --estimate"),
        (["-o", "x.npy", "--texts", "5"], "--texts and --within go with --estimate"),
        (["--estimate", "--within", "0"], "within 0 hours; allowed: more than 0"),
        (["--estimate", "--texts", "0"], "texts 0; allowed: 1 or more"),
        (["-o", "x.npy", "--engine", "spark"], "engine 'spark'; allowed: local, ray"),
        (["-o", "x.npy", "--workers", "2"], "--workers goes with --engine ray"),
        (["-o", "x.npy", "--chunk", "0"], "chunk 0; allowed: 1 or more rows"),
        (["-o", "x.npy", "--scheme", "w9"], "w9"),
        (["-o", "x.pt"], "allowed: a file that ends in .npy or .parquet"),
    ],
)
def test_bad_input_is_one_line(
    encoder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(source.parent)
    code, stdout, stderr = run(encoder, source, *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert says in stderr
    assert stderr.count("\n") == 1
    assert {file.name for file in source.parent.iterdir()} == {"in.txt"}


def test_without_ray_the_engine_names_the_extra(
    encoder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, stderr = run(encoder, source, "-o", tmp_path / "out.npy", "--engine", "ray")
    assert code == 2
    assert "pip install 'qbert[ray]'" in stderr
