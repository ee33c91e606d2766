"""BERT-base's exact breakdown (Devlin et al., 2019: 12 layers, 768, 3072), on the meta device: no weights needed."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from qbert.analyze import AnalyzeResult, Component, analyze

# Millions of parameters and their share in percent, derived by hand from the shapes.
PARAMETERS = {
    Component.EMBEDDINGS: (23.84, 21.8),
    Component.QKV_LINEARS: (21.26, 19.4),
    Component.ATTENTION_SCORES: (0.0, 0.0),
    Component.ATTENTION_OUTPUT: (7.09, 6.5),
    Component.FFN: (56.67, 51.8),
    Component.NORMS: (0.04, 0.03),
    Component.POOLER_HEAD: (0.59, 0.5),
    Component.OTHER: (0.0, 0.0),
}
# seq -> (GFLOP of one sequence, shares in percent of QKV, scores, output, FFN)
FLOPS = {
    128: (22.35, (24.3, 2.7, 8.1, 64.9)),
    256: (45.9, (23.7, 5.3, 7.9, 63.2)),
    512: (96.64, (22.5, 10.0, 7.5, 60.0)),
}


@pytest.fixture(scope="module", params=FLOPS)
def result(request: pytest.FixtureRequest) -> AnalyzeResult:
    with torch.device("meta"):
        model = BertModel(BertConfig()).eval()
    return analyze(model, batch=1, seq=request.param, target="h100", measure=False)


@pytest.mark.parametrize("component", PARAMETERS)
def test_parameters(result: AnalyzeResult, component: Component) -> None:
    millions, share = PARAMETERS[component]
    row = result.component(component)
    assert row.parameters / 1e6 == pytest.approx(millions, abs=0.006)
    assert row.shares.parameters == pytest.approx(share, abs=0.06)
    assert row.weight_bytes == 4 * row.parameters


def test_total_parameters(result: AnalyzeResult) -> None:
    assert result.total.parameters == 109_482_240
    assert result.total.weight_bytes / 2**20 == pytest.approx(417.6, abs=0.1)


def test_flops(result: AnalyzeResult) -> None:
    gflop, shares = FLOPS[result.seq]
    assert result.total.matmul_flops / 1e9 == pytest.approx(gflop, abs=0.006)
    names = (Component.QKV_LINEARS, Component.ATTENTION_SCORES, Component.ATTENTION_OUTPUT, Component.FFN)
    assert [result.component(name).shares.matmul_flops for name in names] == pytest.approx(shares, abs=0.06)
    assert result.component(Component.EMBEDDINGS).matmul_flops == 0


def test_vector_flops_by_hand(result: AnalyzeResult) -> None:
    tokens = result.seq
    layer_norms, adds = 24 * 7, 24  # 7 operations an element, see count.VECTOR_FLOPS
    assert result.component(Component.NORMS).vector_flops == (layer_norms + adds) * tokens * 768
    assert result.component(Component.FFN).vector_flops == 12 * 5 * tokens * 3072


def test_ffn_bytes_by_hand(result: AnalyzeResult) -> None:
    tokens, weights = result.seq, 2 * 768 * 3072 + 3072 + 768
    linears = tokens * 2 * (768 + 3072)
    gelu = tokens * 2 * 3072
    assert result.component(Component.FFN).bytes_moved == 12 * 4 * (weights + linears + gelu)
