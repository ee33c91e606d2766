"""On a real encoder: what the small ones cannot show, that refitted weights still mean the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import qbert
from qbert.calibrate import default_texts
from qbert.evaluate import encode
from qbert.shapes import plan_of
from qbert.zoo import resolve_model

LEAST_AGREEMENT = 0.95  # without refit it is lower


@pytest.mark.slow
def test_minilm_with_two_thirds_of_its_work_is_still_minilm(tmp_path: Path) -> None:
    source = resolve_model("minilm")
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    texts = default_texts(200)
    plain = AutoModel.from_pretrained(source).eval()
    report = qbert.prune_(model, texts, macs=2 / 3, tokenizer=tokenizer)
    without = qbert.prune_(plain, texts, macs=2 / 3, tokenizer=tokenizer, refit=False)
    assert report.agreement is not None
    assert without.agreement is not None
    assert report.agreement.mean > max(LEAST_AGREEMENT, without.agreement.mean)
    assert report.ranks > 0.5
    before = encode(model, tokenizer, texts[:20])
    qbert.quantize_(model, "w8a8", fuse=True, calibration=qbert.calibrate(model, texts[:64], tokenizer=tokenizer))
    model.save_pretrained(tmp_path)
    again = qbert.load(tmp_path)
    after = encode(again, tokenizer, texts[:20])
    assert float((before * after).sum(1).mean()) > 0.99
    assert torch.equal(after, encode(model, tokenizer, texts[:20]))
    assert plan_of(again) == report.plan
