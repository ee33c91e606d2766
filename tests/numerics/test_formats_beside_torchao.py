"""MX and NVFP4 beside torchao's own, where it is installed (requirements-peers.txt): the same codes and the same scales."""

import pytest
import torch

from qbert.formats import get_format
from qbert.numerics import quantize_blocks
from qbert.testing import random_weight

pytest.importorskip("torchao", reason="torchao is not installed (requirements-peers.txt)")

ELEMENTS = {
    "mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2", "mxfp4": "fp4",
}  # fmt: skip


def data():
    x = random_weight(32, 256, seed=2) * torch.logspace(-6, 6, 32)[:, None]
    x[0, :32] = 0.0
    return x


@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_is_torchaos(name, rule):
    import dataclasses

    from torchao.prototype.mx_formats import constants
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    known = {"fp6_e2m3": constants.DTYPE_FP6_E2M3, "fp6_e3m2": constants.DTYPE_FP6_E3M2, "fp4": torch.float4_e2m1fn_x2}
    element = ELEMENTS[name]
    x = data()[1:]  # of zeros torchao's scale is another one, the values are zeros either way
    scale, codes = to_mx(x, known.get(element, element), 32, ScaleCalculationMode[rule.upper()])
    ours = quantize_blocks(x, dataclasses.replace(get_format(name), scale_rule=rule))
    assert torch.equal(ours.scales.stored, scale.view(torch.uint8).view(31, 8))
    theirs = codes.view(torch.uint8)
    if name == "mxfp4":
        theirs = torch.stack((theirs & 0xF, theirs >> 4), dim=-1)
    theirs = theirs.reshape(31, 256)
    sign = 1 << (get_format(name).element.bits - 1)
    assert torch.equal(ours.codes, torch.where(theirs == sign, 0, theirs))  # -0 is our 0


def test_nvfp4_is_torchaos():
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    x = data()
    scale, packed = nvfp4_quantize(x, 16, x.abs().max() / (448 * 6))
    ours = quantize_blocks(x, get_format("nvfp4"))
    assert torch.equal(ours.scales.stored.view(torch.uint8), scale.view(torch.uint8).view(32, 16))
    theirs = torch.stack((packed & 0xF, packed >> 4), dim=-1).view(32, 256)
    assert torch.equal(ours.codes, torch.where(theirs == 8, 0, theirs))
