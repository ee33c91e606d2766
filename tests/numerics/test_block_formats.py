"""Whole matrices: the standards' own figures, scales, clipping, outliers, packing, and what is refused."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from qbert import formats
from qbert.errors import CheckpointError, QBertError
from qbert.formats import (
    NAMED,
    SCHEMES,
    BlockFormat,
    block_format,
    emulated_scheme,
    get_format,
    minifloat,
    native_scheme,
)
from qbert.metrics import sqnr_db
from qbert.numerics import dequantize, quantize_blocks, round_activations
from qbert.ops import call
from qbert.ops.operations import QuantizeRows
from qbert.quantizers import quantize
from qbert.testing import random_weight
from qbert.weight.codec import decode
from qbert.weight.validate import check_plain_tensors

SHAPES = [(1, 2), (5, 37), (48, 200), (33, 256)]
FIVE_BITS = minifloat("f5", 2, 2)
OTHERS = [
    block_format("mine", FIVE_BITS, "e8m0", 32),
    block_format("2d", "fp8_e4m3", "float32", (16, 24)),
    block_format("tensor", "int8", "float16", "tensor"),
    block_format("two levels", "int4", "uint4", 16),
    block_format("two levels, 2d", "int4", "uint4", (4, 16)),
    block_format("two levels, tensor", "fp4_e2m1", "e4m3", "tensor"),
    block_format("six", "int3", "uint6", 32),
    block_format("plain", "fp8_e5m2", "none"),
    block_format("kept", "int4", "bf16", 32, outliers="sigma:3"),
    block_format("share", "nf4", "float32", 64, outliers="share:0.01"),
    block_format("searched", "int4", "float32", 64, clipping="mse"),
    block_format("cut", "int4", "e4m3", 16, clipping="percentile:90"),
    block_format("learned", "dict2", "none", "tensor", outliers="share:0.02"),
    block_format("ternary", formats.table("ternary", (-1, 0, 1)), "bf16", 64),
    block_format("drawn", "int4", "float32", 64, rounding="stochastic:7"),
]
EVERY = [*NAMED.values(), *OTHERS]
ANY_FORMAT = pytest.mark.parametrize("fmt", EVERY, ids=lambda fmt: fmt.name)

# OCP Microscaling Formats (MX) Specification v1.0, tables 1 to 5: largest, smallest normal, smallest, emax of the element.
OCP = {
    "mxfp8_e4m3": (448.0, 2.0**-6, 2.0**-9, 8), "mxfp8_e5m2": (57344.0, 2.0**-14, 2.0**-16, 15),
    "mxfp6_e3m2": (28.0, 0.25, 0.0625, 4), "mxfp6_e2m3": (7.5, 1.0, 0.125, 2), "mxfp4": (6.0, 1.0, 0.5, 2),
    "mxint8": (1 + 63 / 64, None, 1 / 64, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", OCP)
def test_mx_formats_are_the_documents(name):
    fmt, (largest, normal, smallest, emax) = get_format(name), OCP[name]
    assert (fmt.block, fmt.scale, fmt.scale_rule) == ((1, 32), "e8m0", "floor")
    assert fmt.largest == largest
    assert fmt.element.max_exponent == (1 if name == "mxint8" else emax)  # -2.0 has a code, which is not used
    assert min(value for value in fmt.element.finite_values if value > 0) == smallest
    assert normal is None or normal == 2.0 ** (1 - fmt.element.bias)
    # Section 6.3: X is the largest power of two up to the largest magnitude, over that of the element.
    for magnitude in (1.0, 1.999, 2.0, 0.75, 3e-5, 7e9):
        row = torch.zeros(1, 32)
        row[0, 3] = -magnitude
        quantized = quantize_blocks(row, fmt)
        expected = np.floor(np.log2(magnitude)) - emax + 127
        assert int(quantized.scales.stored) == expected
        assert abs(float(dequantize(quantized, fmt)[0, 3]) + magnitude) <= magnitude / 4


def test_a_block_of_zeros_has_a_code():
    for name in ("mxfp4", "nvfp4", "int4-g64", "nf4"):
        quantized = quantize_blocks(torch.zeros(2, 64), get_format(name))
        assert torch.equal(dequantize(quantized, get_format(name)), torch.zeros(2, 64))


@pytest.mark.parametrize("name", [name for name in OCP if name != "mxint8"])
def test_mx_is_ml_dtypes_value_for_value(name):
    fmt = get_format(name)
    x = random_weight(16, 128, seed=3) * 7
    blocks = x.numpy().reshape(16, 4, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(axis=2))) - fmt.element.max_exponent
    scale = np.exp2(exponent).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
    units = np.clip(blocks / scale, -fmt.element.max, fmt.element.max)
    expected = units.astype(getattr(ml_dtypes, fmt.element.name)).astype(np.float32) * scale
    assert np.array_equal(dequantize(quantize_blocks(x, fmt), fmt).numpy(), expected.reshape(16, 128))
    assert np.array_equal(round_activations(x, fmt).numpy(), expected.reshape(16, 128))


def test_nvfp4_is_ml_dtypes_value_for_value():
    x = random_weight(16, 128, seed=4)
    blocks = x.numpy().reshape(16, 8, 16)
    outer = np.abs(blocks).max() / np.float32(448 * 6)
    scale = np.clip(np.abs(blocks).max(axis=2) / np.float32(6) / outer, 2.0**-6, 448)
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    units = np.clip(blocks * ((np.float32(1) / outer) / scale)[..., None], -6, 6)
    values = units.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    fmt = get_format("nvfp4")
    assert np.array_equal(
        dequantize(quantize_blocks(x, fmt), fmt).numpy(), (values * (scale * outer)[..., None]).reshape(16, 128)
    )


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w4a16-g32", "w4a16-g128", "gobo3", "gobo4"])
def test_formats_with_a_kernel_store_what_its_scheme_stores(scheme):
    names = {"w8a16": "int8", "w4a16": "int4-g64", "w4a16-g32": "int4-g32", "w4a16-g128": "int4-g128"}
    emulated = emulated_scheme(get_format(names.get(scheme, scheme)))
    assert native_scheme(emulated) == scheme
    weight = random_weight(24, 256, seed=5)
    assert torch.equal(decode(quantize(weight, emulated)), decode(quantize(weight, SCHEMES[scheme])))


def test_int8_activations_are_the_kernels_codes():
    x = torch.randn(17, 96, generator=torch.Generator().manual_seed(6))
    codes, scales = call(QuantizeRows(x))
    assert torch.equal(round_activations(x, get_format("int8")), codes.float() * scales[:, None])


@ANY_FORMAT
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_at_true_bits_and_back(fmt, shape):
    """What is stored is what was quantized, keeps every rule, and takes the bits that the format says."""
    weight, scheme = random_weight(*shape, seed=7), emulated_scheme(fmt)
    stored = quantize(weight, scheme)
    check_plain_tensors(scheme, shape, stored.tensors)
    restored = decode(stored)
    if not fmt.is_learned:
        assert torch.equal(restored, dequantize(quantize_blocks(weight, fmt), fmt))
    if shape[1] % 32 == 0:
        beside = 4 * (shape[0] + 1) + 6 * stored.outliers if fmt.keeps_outliers else 0
        rows_of_bits = shape[0] * 2  # integer scales and zero points end on a byte, row by row
        assert 0 <= 8 * (stored.stored_bytes - beside) - fmt.bits_per_value(*shape) * weight.numel() <= 8 * rows_of_bits
        assert sqnr_db(weight, restored) > 0
    assert stored.tensors.keys() == quantize(weight, scheme).tensors.keys()


@ANY_FORMAT
def test_a_format_is_data(fmt):
    again = BlockFormat.from_dict(fmt.to_dict())
    assert again == fmt
    assert hash(again) == hash(fmt)
    assert formats.describe(fmt)["format"] == fmt.name


def test_a_search_finds_less_error_and_kept_outliers_are_exact():
    weight = random_weight(64, 256, seed=8)
    weight[3, 7] = 40 * weight.std()
    error = {
        name: sqnr_db(weight, decode(quantize(weight, emulated_scheme(fmt))))
        for name, fmt in {
            "absmax": block_format("a", "int4"),
            "mse": block_format("b", "int4", clipping="mse"),
            "kept": block_format("c", "int4", outliers="share:0.005"),
        }.items()
    }
    assert error["mse"] > error["absmax"] + 0.3
    assert error["kept"] > error["absmax"] + 1
    kept = quantize(weight, emulated_scheme(block_format("c", "int4", outliers="sigma:4")))
    assert 0 < kept.outliers < 200
    assert decode(kept)[3, 7] == weight[3, 7]


def test_one_block_does_not_look_at_another():
    x = random_weight(4, 64, seed=9)
    before = dequantize(quantize_blocks(x, get_format("mxfp4")), get_format("mxfp4"))
    x[2, 40] = 1000.0
    after = dequantize(quantize_blocks(x, get_format("mxfp4")), get_format("mxfp4"))
    changed = (before != after).nonzero()
    assert set(changed[:, 0].tolist()) == {2}
    assert changed[:, 1].min() >= 32


@pytest.mark.parametrize("name", ["nvfp4", "int8", "mxfp6_e2m3", "int4_zp", "nf4", "posit8"])
def test_a_token_is_rounded_the_same_in_every_batch(name):
    x = torch.randn(9, 72, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 9)[:, None]
    together = round_activations(x, get_format(name))
    alone = torch.cat([round_activations(row[None], get_format(name)) for row in x])
    assert torch.equal(together, alone)


def test_a_name_with_a_block_size():
    assert get_format("int4-g64") == dataclasses.replace(
        get_format("int4"), name="int4-g64", scale="bfloat16", block=(1, 64)
    )
    assert get_format("mxfp4-g16").scale == "e8m0"


def test_a_sweep_is_the_product():
    found = formats.sweep("element=fp4_e2m1,int4 block=16,32,64 scale=e8m0,e4m3,bf16")
    assert len(found) == len({fmt.name for fmt in found}) == 18
    assert found[0].name == "fp4_e2m1/16/e8m0"
    assert formats.sweep("element=dict3")[0].is_learned


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: formats.table("t", (0, 2, 1)), "format t: 2.0 is followed by 1.0; allowed: values that ascend"),
        (lambda: formats.table("t", (0, float("inf"))), "format t: value inf; allowed: finite values"),
        (lambda: formats.table("t", range(300)), "format t: 9 bits; allowed: 1 to 8"),
        (lambda: minifloat("m", 5, 4), "format m: 10 bits; allowed: 1 to 8"),
        (lambda: minifloat("m", 0, 3), "format m: 0 exponent and 3 mantissa bits; allowed: at least 1 and 0"),
        (lambda: formats.posit("p", 9), "posit of 9 and 2 bits; allowed: 2 to 8"),
        (lambda: block_format("b", "int4", "e9m0"), "scale 'e9m0'; allowed: none, float32"),
        (lambda: block_format("b", "int4", block=1), "block 1 x 1; allowed: 1 to"),
        (lambda: block_format("b", "int4", block="column"), "block 'column'; allowed: a number"),
        (lambda: block_format("b", "int4", rounding="up"), "rounding 'up'; allowed: nearest_even"),
        (lambda: block_format("b", "int4", rounding="stochastic"), "rounding 'stochastic'; allowed"),
        (lambda: block_format("b", "int4", clipping="percentile:200"), "percentile '200'; allowed: 1 to 100"),
        (lambda: block_format("b", "int4", outliers="gobo"), "outliers gobo; allowed with a dictionary only"),
        (lambda: block_format("b", "fp4_e2m1", symmetric=False), "symmetric false with float4_e2m1fn"),
        (lambda: block_format("b", "dict3", "float32"), "scale float32; allowed with a dictionary: none"),
        (lambda: block_format("b", "int4", axis=0), "no setting 'axis'; allowed: element"),
        (lambda: block_format("b", "int4", top=20.0), "top 20.0; allowed: more than 0, at most 8"),
        (lambda: block_format("b", minifloat("m", 4, 3, bias=150)), "allowed: normal float32 numbers"),
        (lambda: block_format("b", formats.integer(1)), "element int1 has no value but 0"),
        (lambda: block_format("b", "int4", symmetric=False, top=3.0), "top with zero points"),
        (lambda: get_format("mxfp5"), "format 'mxfp5'; allowed: mxfp8"),
        (lambda: get_format("gobo3-g32"), "format 'gobo3-g32'; allowed"),
        (lambda: formats.sweep("block=16"), "names no element"),
        (lambda: formats.sweep("element=int4 size=3"), "sweep 'size=3'; allowed once each"),
        (lambda: formats.sweep("element=int4 block=x"), "sweep block=; allowed: a number"),
        (
            lambda: emulated_scheme(get_format("int8"), get_format("gobo3")),
            "activations gobo3: a dictionary is learned",
        ),
        (
            lambda: emulated_scheme(get_format("int8"), OTHERS[1]),
            "activations 2d: a block of 16 x 24 scale mixes tokens",
        ),
        (lambda: BlockFormat.from_dict({"name": "x"}), "format without 'element'"),
        (lambda: BlockFormat.from_dict({"name": "x", "element": "int4", "code": "rm"}), "format entry 'code'; allowed"),
        (
            lambda: BlockFormat.from_dict({"name": "x", "element": "int4", "block": [1, "2"]}),
            "block .* allowed: two whole",
        ),
        (
            lambda: BlockFormat.from_dict({"name": "x", "element": {"name": "y", "bits": 4, "kind": "exec"}}),
            "not a valid Kind",
        ),
    ],
)
def test_what_is_refused_and_how(make, message):
    with pytest.raises(QBertError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [[], {}, [1], 7j, "", 0, -3.0, float("nan"), "x" * 100])
@pytest.mark.parametrize("entry", sorted(each.name for each in dataclasses.fields(BlockFormat)))
def test_an_entry_of_any_type_is_refused_by_name(entry, value):
    data = block_format("b", "int4", top=3.0).to_dict()
    with pytest.raises(QBertError, match=entry.split("_")[0]):
        BlockFormat.from_dict({**data, entry: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('no\\nway')", "raises RuntimeError: no$"),
        ("def (", "raises SyntaxError"),
        ("mine = 3", "has no format 'mine'; allowed: none"),
        ("from qbert import formats\nother = formats.INT4", "has no format 'mine'; allowed: other"),
        (
            "from qbert import formats\nmine = formats.table('t', (1, 1))",
            "raises QBertError: format t: 1.0 is followed by 1.0",
        ),
    ],
)
def test_a_users_file_that_is_wrong_is_one_line(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(QBertError, match=message) as caught:
        formats.load_format(f"{tmp_path}/mine.py:mine")
    assert "\n" not in str(caught.value)
    with pytest.raises(QBertError, match="is not there; allowed: FILE"):
        formats.load_format(f"{tmp_path}/none.py:mine")


def test_a_users_file_gives_its_format(tmp_path):
    (tmp_path / "mine.py").write_text("from qbert import formats\nmine = formats.posit('p6', 6, 1)\n")
    assert formats.load_format(f"{tmp_path}/mine.py:mine").element == formats.POSIT6.__class__(
        "p6", 6, formats.Kind.TABLE, table=formats.POSIT6.table
    )


@pytest.mark.parametrize(
    ("name", "tensor", "change", "message"),
    [
        ("mxfp4", "scale", lambda t: t.fill_(255), "E8M0 must be 0 ... 254"),
        ("nvfp4", "scale", lambda t: t.fill_(127), "E4M3 must be 1 ... 126"),
        ("nvfp4", "outer_scale", lambda t: t.fill_(float("nan")), "finite and positive"),
        ("int4", "qdata", lambda t: t.fill_(0x88), "codes must be those of int4"),
        ("int4", "scale", lambda t: t.neg_(), "finite and positive"),
        ("mxfp4", "qdata", lambda t: t.fill_(0x88), "codes must be those of float4_e2m1fn"),  # -0
        ("mxfp8_e4m3", "qdata", lambda t: t.fill_(0x7F), "codes must be those of float8_e4m3fn"),  # NaN
        ("mxfp6_e2m3", "qdata", lambda t: t[:, -1].fill_(0xFF), "spare bits"),
        ("two levels", "scale", lambda t: t.zero_(), "at least 1"),
        ("ternary", "qdata", lambda t: t[:, 0].fill_(0xFF), "codes must be those of ternary"),
        ("kept", "outlier_rowptr", lambda t: t.fill_(10**6), "must start at 0"),
        ("kept", "outlier_col", lambda t: t.fill_(-1), "columns must be 0"),
        ("kept", "outlier_value", lambda t: t.fill_(float("inf")), "must be finite"),
        ("gobo3", "codebook", lambda t: t.neg_(), "values must ascend"),
    ],
)
def test_a_damaged_weight_is_a_named_error(name, tensor, change, message):
    fmt = next(fmt for fmt in EVERY if fmt.name == name)
    stored = quantize(random_weight(6, 98, seed=1), emulated_scheme(fmt))
    tensors = {key: each.clone() for key, each in stored.tensors.items()}
    change(tensors[tensor])
    with pytest.raises(CheckpointError, match=f"m.{tensor}: .*{message}"):
        check_plain_tensors(stored.scheme, stored.shape, tensors, "m.")


def test_scales_that_a_type_cannot_hold_are_an_error():
    with pytest.raises(QBertError, match="need scales that float16 does not have"):
        quantize(torch.full((2, 8), 1e9), emulated_scheme(block_format("half", "int4", "float16")))
