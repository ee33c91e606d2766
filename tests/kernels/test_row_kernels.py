"""Row kernels: in Triton's interpreter against the reference, compiled for sm_90, and on a GPU where there is one."""

import importlib.util
import random
import re

import pytest
import row_cases as cases
import sm90
import torch
from interpreted import run

from qbert.errors import QBertError
from qbert.ops.triton import launch, rows
from qbert.testing import random_arguments, schemes_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# (operation, scheme) of everything that reads a table.
TABLES = [(name, scheme) for name in ("w8_embedding", "w4_embedding", "gobo_embedding") for scheme in schemes_of(name)]
TABLES += [("embed_layer_norm_quantize", scheme) for scheme in (*schemes_of("embed_layer_norm_quantize"), "float")]
NORM = ("add_layer_norm_quantize", None)


# ---- interpreter ----------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_results_are_the_references():
    # Triton's interpreter cuts bfloat16 off instead of rounding it, so only results with a tolerance can be of it.
    shapes = [{"t": 3, "n": 40, "k": 1152, "dtype": "float32"}, {"t": 2, "n": 7, "k": 128, "dtype": "float16"}]
    odd = [{"t": 3, "n": 9, "k": k, "dtype": "float32"} for k in (1, 70, 1023)]
    run("row_cases:matches_reference", [
        {"operation": operation, "scheme": scheme, **shape}
        for operation, scheme in (*TABLES, NORM)
        for shape in shapes + ([] if scheme and scheme.startswith("w4") else odd)
    ] + [{"operation": NORM[0], "t": 5, "n": 0, "k": 768, "dtype": "bfloat16"}])  # fmt: skip


@pytest.mark.interpreter
def test_rows_are_what_they_must_be():
    run("row_cases:quantizes_what_is_not_a_number", [
        [1, 1, "float32"], [5, 384, "bfloat16"], [7, 1023, "float32"], [4, 768, "float16"], [17, 31, "float32"]
    ])  # fmt: skip
    run("row_cases:mixed_types", [["float16", "float32", 70], ["float32", "bfloat16", 96], ["bfloat16", "float16", 33]])
    run("row_cases:codes_are_the_norms", [[1], [768]])
    run("row_cases:nan_stays_in_its_row", [["nan"], ["inf"], ["-inf"]])


@pytest.mark.interpreter
def test_what_is_outside_of_a_table_is_not_read():
    run("row_cases:unknown_ids_are_nan", [
        [operation, scheme, ids_type]
        for operation, scheme in TABLES
        if scheme in ("w8", "w4-g32", "gobo3", "gobo4", "float")
        for ids_type in (("int32", "int64") if scheme == "w8" else ("int64",))
    ])  # fmt: skip
    run("row_cases:damaged_outliers_stay_inside", [[]])


@pytest.mark.interpreter
def test_nothing_to_do():
    run("row_cases:nothing_to_do", [[]])


# ---- launchers ------------------------------------------------------------------------------------------------------


def test_arguments_are_refused_by_name():
    x, ones = torch.zeros(2, 8), torch.ones(8)
    table, scale = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    with pytest.raises(QBertError, match="cpu; allowed: cuda"):
        rows.quantize_per_token(x)
    with pytest.raises(RuntimeError, match="y is"):
        rows.add_layer_norm_quantize(x, x[:1], ones, ones, 1e-12)
    with pytest.raises(QBertError, match=r"y must be \(t, k\)"):
        rows.add_layer_norm_quantize(x[0], x[0], ones, ones, 1e-12)
    with pytest.raises(RuntimeError, match=r"gamma is torch\.int8"):
        rows.add_layer_norm_quantize(x, x, ones.to(torch.int8), ones, 1e-12)
    with pytest.raises(RuntimeError, match=r"ids are torch\.uint8"):
        rows.w8_embedding(torch.zeros(2, dtype=torch.uint8), table, scale, torch.float32)


def test_what_no_kernel_reads_is_left_to_others(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", True)  # so that tensors on a CPU come this far
    arguments = random_arguments("w4_embedding", 2, 4, 64)
    assert rows.w4_embedding(*arguments[:-1], "bytes") is NotImplemented
    assert rows.quantize_per_token(torch.zeros(1, 40_000)) is NotImplemented
    long = torch.zeros(1, 40_000), torch.zeros(1, 40_000), torch.zeros(40_000), torch.zeros(40_000)
    assert rows.add_layer_norm_quantize(*long, 1e-12) is NotImplemented


# ---- compiled for sm_90 ---------------------------------------------------------------------------------------------


def compiled(kernel, types, k, optional=(), **constants):
    """`types`: of the parameters that are there; `optional`: names of pointers that are None."""
    options = rows.row_options(k)
    arguments = {name: types[name] for name in kernel.arg_names if name in types}
    missing = dict.fromkeys(optional)
    return sm90.build(
        kernel, arguments, {**missing, "BLOCK": options["BLOCK"], **constants}, warps=options["num_warps"],
        unaligned=tuple(name for name in types if name.endswith("rows") or name == "outliers"), enable_fp_fusion=False,
    )  # fmt: skip


def check(built, vectors=("LDG.E.128", "STG.E.128")):
    assert not sm90.problems(built)
    assert "fma.rn" not in built.ptx, "products are rounded, as in the reference"
    assert built.registers <= 128
    for instruction in vectors:
        assert re.search(re.escape(instruction), built.sass), f"no {instruction}"


@pytest.mark.compile
@pytest.mark.parametrize("k", [768, 4096])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_quantize_per_token_compiles(k, dtype):
    from qbert.kernels.quantize_per_token import quantize_per_token_kernel

    types = {"x_ptr": f"*{dtype}", "codes_ptr": "*i8", "scale_ptr": "*fp32", "k": "i32", "x_stride": "i32"}
    check(compiled(quantize_per_token_kernel, types, k))


NORM_TYPES = {"gamma_ptr": "*fp32", "beta_ptr": "*fp32", "codes_ptr": "*i8", "k": "i32", "eps": "fp32"}


@pytest.mark.compile
@pytest.mark.parametrize("k", [768, 4096])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_add_layer_norm_quantize_compiles(k, dtype):
    from qbert.kernels.add_layer_norm_quantize import add_layer_norm_quantize_kernel

    types = NORM_TYPES | {
        "y_ptr": "*fp32", "residual_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "scale_ptr": "*fp32", "y_stride": "i32",
        "residual_stride": "i32",
    }  # fmt: skip
    built = compiled(add_layer_norm_quantize_kernel, types, k)
    check(built)
    assert (built.count("BAR") == 0) == (k <= 1024), "one warp holds a row of up to 1024 without a barrier"


OUTLIERS = ("rowptr_ptr", "col_ptr", "delta_ptr")
OUTLIER_TYPES = {"rowptr_ptr": "*i32", "col_ptr": "*i16", "delta_ptr": "*fp32"}
# Table -> types of its tensors, which of them are None, constants.
TABLE_TYPES = {
    "float": ({"table_ptr": "*fp32"}, ("scale_ptr", *OUTLIERS), {"BITS": 0, "GROUP": 0}),
    "w8": ({"table_ptr": "*i8", "scale_ptr": "*fp32"}, OUTLIERS, {"BITS": 0, "GROUP": 0}),
    "w4": ({"table_ptr": "*u8", "scale_ptr": "*bf16"}, OUTLIERS, {"BITS": 4, "GROUP": 64}),
    "gobo3": ({"table_ptr": "*u8", "scale_ptr": "*fp32", **OUTLIER_TYPES}, (), {"BITS": 3, "GROUP": 0}),
    "gobo4": ({"table_ptr": "*u8", "scale_ptr": "*fp32", **OUTLIER_TYPES}, (), {"BITS": 4, "GROUP": 0}),
}


@pytest.mark.compile
@pytest.mark.parametrize("table", TABLE_TYPES)
def test_look_ups_compile(table):
    from qbert.kernels.embed_layer_norm_quantize import embed_layer_norm_quantize_kernel
    from qbert.kernels.embedding import embedding_kernel

    tensors, missing, constants = TABLE_TYPES[table]
    shared = {"ids_ptr": "*i64", "out_ptr": "*fp32", "rows": "i32", "outliers": "i32", "k": "i32", **tensors}
    if table != "float":
        check(compiled(embedding_kernel, shared, 768, missing, **constants), vectors=("STG.E.128",))
    types = NORM_TYPES | shared | {
        "position_ids_ptr": "*i64", "token_type_ids_ptr": "*i64", "positions_ptr": "*fp32", "token_types_ptr": "*fp32",
        "out_scale_ptr": "*fp32", "position_rows": "i32", "token_type_rows": "i32",
    }  # fmt: skip
    check(compiled(embed_layer_norm_quantize_kernel, types, 768, missing, **constants))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("operation", "scheme"), [*TABLES, NORM, ("quantize_per_token", None)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_results_are_the_references(operation, scheme, dtype):
    odd = [] if scheme and scheme.startswith("w4") else [(5, 9, 1), (17, 31, 70), (3, 5, 1023), (2, 3, 5000)]
    for t, n, k in [(1, 4, 768), (1023, 50, 1024), (4096, 100, 768), (7, 3, 3072), (9, 3, 4096), *odd]:
        cases.matches_reference(operation, t, n, k, dtype, scheme, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(10))
def test_gpu_random_shapes(seed):
    choose = random.Random(seed)
    for operation, scheme in (*TABLES, NORM, ("quantize_per_token", None)):
        k = 128 * choose.randint(1, 32) if scheme and scheme.startswith("w4") else choose.randint(1, 4096)
        cases.matches_reference(
            operation, choose.randint(1, 2000), choose.randint(5, 50), k, "float32", scheme, seed, device="cuda"
        )


@pytest.mark.gpu
@needs_gpu
def test_gpu_rows_are_what_they_must_be():
    for t, k, dtype in [(1, 1, "float32"), (5, 384, "bfloat16"), (7, 1023, "float32"), (4, 4096, "float16")]:
        cases.quantizes_what_is_not_a_number(t, k, dtype, device="cuda")
    for y, residual in [("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")]:
        cases.mixed_types(y, residual, 768, device="cuda")
    for k in (1, 768, 4096):
        cases.codes_are_the_norms(k, device="cuda")
    for value in ("nan", "inf", "-inf"):
        cases.nan_stays_in_its_row(value, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("operation", "scheme"), [table for table in TABLES if table[1] != "w4-g128"])
def test_gpu_what_is_outside_of_a_table_is_not_read(operation, scheme):
    if scheme != "w4":  # whose groups of 64 do not divide these rows
        cases.unknown_ids_are_nan(operation, scheme, "int64", device="cuda")
    cases.damaged_outliers_stay_inside(device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("operation", "scheme"), [*TABLES, NORM, ("quantize_per_token", None)])
def test_gpu_every_element_is_written_and_always_the_same(operation, scheme, monkeypatch):
    arguments = cases.to_device(random_arguments(operation, 300, 40, 768, scheme=scheme), "cuda")
    empty = torch.Tensor.new_empty
    results = []
    for poison in (77, -77):
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, p=poison, **k: empty(*a, **k).fill_(p))
        results += [cases._as_tuple(rows.KERNELS[operation](*arguments)) for _ in range(5)]
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


@pytest.mark.gpu
@needs_gpu
def test_gpu_offsets_pass_32_bits():
    x = torch.zeros(2**31 // 4096 + 3, 4096, dtype=torch.float16, device="cuda")
    x[-1] = 1
    codes, scale = rows.quantize_per_token(x)
    assert bool((codes[-1] == 127).all())
    assert not bool(codes[:-1].any())
    assert float(scale[-1]) == pytest.approx(1 / 127)
