"""What `test_encoders` runs in Triton's interpreter: whole fused encoders, whose every kernel is chosen as on an H100."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from launchers import H100

sys.path.append(str(Path(__file__).parents[1]))  # what tests of other folders share

import qbert.target
from qbert import unfuse_
from qbert.encoder import fused_forward
from qbert.metrics import sqnr_db


def runs_fused(family: str, variant: str) -> None:
    """All steps that are kernels are Triton's; it computes what the unfused model does, and a sequence alone the same bits."""
    qbert.target.cpu_target = lambda: H100
    from small_encoders import LEAST_SQNR_DB, encoder_of, fused_model, hidden_of

    model = fused_model(f"{family}Model", variant)
    ids = torch.randint(5, 97, (2, 14), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    found = hidden_of(model, input_ids=ids.masked_fill(mask == 0, 1), attention_mask=mask)
    fused = fused_forward(encoder_of(model))
    assert fused is not None
    for step in (step for layer in fused.encoder().program.layers for step in layer.steps):
        assert step.kernel in (f"triton {step.operation}", "linear, add_norm", "linear, activation", "torch"), step
    expected = hidden_of(unfuse_(copy.deepcopy(model)), input_ids=ids, attention_mask=mask)
    assert sqnr_db(expected[mask.bool()], found[mask.bool()]) > LEAST_SQNR_DB[variant] - 3
    assert torch.equal(hidden_of(model, input_ids=ids[1:, :9])[0], found[1, :9])
