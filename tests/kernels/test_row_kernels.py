"""Row kernels: in Triton's interpreter against the reference, compiled for sm_90, and on a GPU where there is one."""

import importlib.util
import random
import re

import pytest
import row_cases as cases
import sm90
import torch
from interpreted import run
from launchers import is_left_to_others, launch, obstacle_of

from qbert.errors import QBertError
from qbert.ops.abi import Keeps
from qbert.ops.operations import AddNorm, Norm, QuantizeRows
from qbert.ops.triton import rows
from qbert.ops.triton.arguments import Normed, Outliers, Table, TableMeta
from qbert.testing import random_problem, schemes_of
from qbert.weight import Layout

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# (operation, scheme) of everything that reads a table.
TABLES = [("embedding", scheme) for scheme in schemes_of("embedding")]
TABLES += [("embed_norm", scheme) for scheme in (*schemes_of("embed_norm"), "float")]
NORM, QUANTIZE = ("add_norm", None), ("quantize_rows", None)


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
    ] + [{"operation": NORM[0], "t": 5, "n": 0, "k": 768, "dtype": "bfloat16"}] + [
        {"operation": NORM[0], "n": 0, "keeps": Keeps.SUM.value, **shape}
        for shape in ({"t": 3, "k": 70, "dtype": "float32"}, {"t": 2, "k": 768, "dtype": "float16"})
    ])  # fmt: skip


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
    x, norm = torch.zeros(2, 8), Norm(torch.ones(8), torch.ones(8), 1e-12)
    with pytest.raises(QBertError, match="cpu; allowed: cuda"):
        launch(QuantizeRows(x))
    with pytest.raises(RuntimeError, match="y is"):
        launch(AddNorm(x, x[:1], norm, Keeps.NORM))
    with pytest.raises(RuntimeError, match=r"y must be \(t, k\)"):
        AddNorm(x[0], x[0], norm, Keeps.NORM).check()
    with pytest.raises(RuntimeError, match=r"gamma is torch\.int8"):
        launch(AddNorm(x, x, norm._replace(gamma=torch.ones(8, dtype=torch.int8)), Keeps.NORM))
    look_up = random_problem("embedding", 2, 4, 8, scheme="w8")
    with pytest.raises(RuntimeError, match=r"ids are torch\.uint8"):
        launch(look_up._replace(ids=torch.zeros(2, dtype=torch.uint8)))


def test_what_no_kernel_reads_is_left_to_others():
    long, norm = torch.zeros(1, 40_000), Norm(torch.zeros(40_000), torch.zeros(40_000), 1e-12)
    none = Norm(torch.zeros(0), torch.zeros(0), 1e-12)
    for a, why in (
        (
            random_problem("embedding", 2, 4, 64, scheme="w4", layout=Layout.BYTES),
            "does not read w4 weights in layout bytes",
        ),
        (random_problem("embed_norm", 2, 4, 64, scheme="gobo4", layout=Layout.BYTES), "gobo4 weights in layout bytes"),
        (random_problem("embed_norm", 1, 1, 40_000, scheme="float"), "rows of 40000"),
        (QuantizeRows(long), "rows of 40000"),
        (AddNorm(long, long, norm, Keeps.NORM), "rows of 40000"),
        (AddNorm(long[:, :0], long[:, :0], none, Keeps.NORM), "without columns"),
    ):
        assert why in str(obstacle_of(a))
        assert is_left_to_others(a)


# ---- compiled for sm_90 ---------------------------------------------------------------------------------------------


def compiled(kernel, arguments, k):
    return sm90.build(
        kernel, arguments, warps=rows.row_options(k)["num_warps"], unaligned=("rows", "kept"), enable_fp_fusion=False
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

    arguments = {"x_ptr": f"*{dtype}", "codes_ptr": "*i8", "scale_ptr": "*fp32", "k": "i32", "x_stride": "i32"}
    check(compiled(quantize_per_token_kernel, {**arguments, "BLOCK": sm90.Constant(rows.block_of(k))}, k))


NORM_TYPES = Norm("*fp32", "*fp32", "fp32")


def compiled_norm(y, residual, k, keeps=Keeps.NORM):
    from qbert.kernels.add_layer_norm_quantize import add_layer_norm_quantize_kernel

    arguments = {
        "y_ptr": f"*{y}", "residual_ptr": f"*{residual}", "norm": NORM_TYPES, "to": Normed(f"*{residual}", "*i8", "*fp32"),
        "k": "i32", "strides": ("i32", "i32"), "BLOCK": sm90.Constant(rows.block_of(k)),
        "SUM": sm90.Constant(keeps is Keeps.SUM),
    }  # fmt: skip
    return compiled(add_layer_norm_quantize_kernel, arguments, k)


@pytest.mark.compile
@pytest.mark.parametrize("k", [768, 4096])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("keeps", list(Keeps))
def test_add_layer_norm_quantize_compiles(k, dtype, keeps):
    built = compiled_norm("fp32", dtype, k, keeps)
    check(built)
    assert (built.count("BAR") == 0) == (k <= 1024), "one warp holds a row of up to 1024 without a barrier"


OUTLIERS = Outliers("*i32", "*i16", "*fp32")
# Table -> types of its codes, scales or dictionary, and outliers; bits; group.
TABLE_TYPES = {
    "float": (("*fp32", None, None), 0, 0),
    "w8": (("*i8", "*fp32", None), 0, 0),
    "w4": (("*u8", "*bf16", None), 4, 64),
    "gobo3": (("*u8", "*fp32", OUTLIERS), 3, 0),
    "gobo4": (("*u8", "*fp32", OUTLIERS), 4, 0),
}


def compiled_look_up(table, normed):
    """Of 768 columns."""
    from qbert.kernels.embed_layer_norm_quantize import embed_layer_norm_quantize_kernel
    from qbert.kernels.embedding import embedding_kernel

    types, bits, group = TABLE_TYPES[table]
    table, meta = Table(*types, "i32", "i32"), sm90.Constant(TableMeta(bits, group, rows.block_of(768)))
    if not normed:
        arguments = {"ids_ptr": "*i64", "out_ptr": "*fp32", "table": table, "k": "i32", "META": meta}
        return compiled(embedding_kernel, arguments, 768)
    floats = Table("*fp32", None, None, "i32", "i32")
    arguments = {
        "ids": ("*i64",) * 3, "tables": (table, floats, floats), "norm": NORM_TYPES,
        "to": Normed("*fp32", "*i8", "*fp32"), "k": "i32", "META": meta,
    }  # fmt: skip
    return compiled(embed_layer_norm_quantize_kernel, arguments, 768)


@pytest.mark.compile
@pytest.mark.parametrize("table", TABLE_TYPES)
def test_look_ups_compile(table):
    if table != "float":
        check(compiled_look_up(table, normed=False), vectors=("STG.E.128",))
    check(compiled_look_up(table, normed=True))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("operation", "scheme"), [*TABLES, NORM, QUANTIZE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_results_are_the_references(operation, scheme, dtype):
    odd = [] if scheme and scheme.startswith("w4") else [(5, 9, 1), (17, 31, 70), (3, 5, 1023), (2, 3, 5000)]
    for t, n, k in [(1, 4, 768), (1023, 50, 1024), (4096, 100, 768), (7, 3, 3072), (9, 3, 4096), *odd]:
        cases.matches_reference(operation, t, n, k, dtype, scheme=scheme, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(10))
def test_gpu_random_shapes(seed):
    choose = random.Random(seed)
    for operation, scheme in (*TABLES, NORM, QUANTIZE):
        k = 128 * choose.randint(1, 32) if scheme and scheme.startswith("w4") else choose.randint(1, 4096)
        t, n = choose.randint(1, 2000), choose.randint(5, 50)
        cases.matches_reference(operation, t, n, k, scheme=scheme, seed=seed, device="cuda")


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
@pytest.mark.parametrize(("operation", "scheme"), [*TABLES, NORM, QUANTIZE])
def test_gpu_every_element_is_written_and_always_the_same(operation, scheme, monkeypatch):
    problem = random_problem(operation, 300, 40, 768, scheme=scheme, device="cuda")
    empty = torch.Tensor.new_empty
    results = []
    for poison in (77, -77):
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, p=poison, **k: empty(*a, **k).fill_(p))
        results += [cases._as_tuple(launch(problem)) for _ in range(5)]
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


@pytest.mark.gpu
@needs_gpu
def test_gpu_offsets_pass_32_bits():
    x = torch.zeros(2**31 // 4096 + 3, 4096, dtype=torch.float16, device="cuda")
    x[-1] = 1
    codes, scale = launch(QuantizeRows(x))
    assert bool((codes[-1] == 127).all())
    assert not bool(codes[:-1].any())
    assert float(scale[-1]) == pytest.approx(1 / 127)
