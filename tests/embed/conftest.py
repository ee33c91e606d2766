"""One small encoder for all of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from embed_cases import quantized_encoder, small_encoder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_encoder(tmp_path_factory.mktemp("embed") / "float")


@pytest.fixture(scope="session")
def fused(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_encoder(encoder, tmp_path_factory.mktemp("embed") / "w8a8")
