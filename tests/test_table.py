"""What `explain` shows is what runs: every operation, scheme and layout on every target, with no such machine here.

And the records: what of an operation stands in its operator's schema, and comes back from it.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qbert import ops, tiles
from qbert.errors import QBertError
from qbert.formats import SCHEMES, PerGroup, Role, Scheme, tied_linear_scheme
from qbert.ops import abi, composed, cuda, table
from qbert.ops.abi import Activation, Keeps
from qbert.ops.cpu import by_torch
from qbert.ops.kernel import Kernel, Problem, problem_of
from qbert.ops.operations import FLOAT_TABLE, OPERATIONS, Norm, QuantizeRows, operation_of
from qbert.ops.reference_kernels import REFERENCE
from qbert.ops.table import KERNELS, KernelChoice, explain, select, select_layout
from qbert.target import ISAS, Target, cpu_target, native_cpu
from qbert.testing import assert_matches_reference, random_problem, schemes_of
from qbert.tiles import Row, TileConfig, forced, tile_key
from qbert.weight import Layout, Weight
from qbert.weight.layout import FRAGMENT_LAYOUTS, layouts_of

H100 = Target("cuda", "", 90, 132, 232_448, native_missing="qbert._cuda is not there")
COMPILED = Target("cuda", "", 90, 132, 232_448, native=True)
GPUS = {
    "h100": H100,
    "h100-asked": replace(H100, prefer="cuda"),
    "h100-compiled": COMPILED,
    "h100-compiled-cuda": replace(COMPILED, prefer="cuda"),
    "h100-compiled-triton": replace(COMPILED, prefer="triton"),
    "a100": Target("cuda", "", 80, 108, 166_912),
    "a100-compiled": Target("cuda", "", 80, 108, 166_912, native=True, prefer="cuda"),
    "b200": Target("cuda", "", 100, 148, 232_448, native=True),
    "old": Target("cuda", "", 75, 40, 65_536, native=True, prefer="cuda"),
}
CPUS = {
    f"cpu-{isa}{'' if native else '-torch'}{'' if exact else '-saturates'}": Target(
        "cpu", isa, native=native, int_mm_exact=exact
    )
    for isa, native, exact in itertools.product(ISAS, (True, False), (True, False))
}
TARGETS = {**CPUS, **GPUS, "another": Target("xpu")}
TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
OPERATION = pytest.mark.parametrize("operation", list(OPERATIONS))
ROLE_AND_SCHEME = pytest.mark.parametrize(
    ("role", "scheme"),
    [
        pytest.param(role, scheme, id=f"{role.value}-{scheme.name}")
        for scheme in SCHEMES.values()
        for role in sorted(scheme.roles, key=lambda role: role.value)
    ],
)
LINEAR_SCHEMES = [SCHEMES[name] for name in schemes_of("linear")]
# Layouts that Triton's kernels read, and that the CPU's do: what is not here, torch or the reference computes.
TRITON = {
    "w8": {Layout.INT8_ROWS, Layout.PLAIN},
    "w4": {Layout.NIBBLE_HALVES},
    "dictionary": {Layout.SELECT_HALVES},
    "weight-only": {
        Layout.INT8_ROWS, Layout.NIBBLE_HALVES, Layout.SELECT_HALVES, Layout.DICT3_WORDS, Layout.PLAIN,
    },
    "table": {Layout.PLAIN},
}  # fmt: skip
PANELS = {Layout.INT8_PANELS, Layout.INT4_PANELS, Layout.INT3_PANELS}
NATIVE = {
    "w8": {Layout.INT8_PANELS, Layout.PLAIN},
    "w4": {Layout.INT4_PANELS, Layout.INT8_EXPANDED},
    "dictionary": PANELS,
    "weight-only": PANELS,
    "table": {Layout.PLAIN},
}


def operation_for(role: Role) -> str:
    return "linear" if role is Role.LINEAR else "embedding"


def kind_of(role: Role, scheme: Scheme) -> str:
    if role is Role.EMBEDDING:
        return "table"
    if scheme.activation is None:
        return "weight-only"
    return "dictionary" if scheme.has_dictionary else f"w{scheme.weight_bits}"


def problem(operation: str, scheme: Scheme | None, layout: Layout | None, t: int | None = 64, **fields: Any) -> Problem:
    return Problem(scheme, layout, 768, 768, torch.bfloat16, t)._replace(**fields)


def problems(operation: str) -> Iterator[Problem]:
    """Every scheme and layout of an operation, for sizes of an encoder and odd ones, all types of results."""
    schemes: list[Scheme | None] = [SCHEMES[name] for name in schemes_of(operation)]
    schemes += [None] if not schemes or operation == "embed_norm" else []
    dtypes = [*ops.FLOAT_DTYPES, *([torch.int8] if operation in ("linear", "attention") else [])]
    for scheme in schemes:
        for layout in layouts_of(scheme) if scheme is not None else [None]:
            for (n, k), t, dtype in itertools.product(((768, 768), (17, 128), (12, 1)), (0, 3, 4096), dtypes):
                yield Problem(scheme, layout, n, k, dtype, t)


def table_of(monkeypatch: pytest.MonkeyPatch, key: str, **where: int) -> None:
    """Tiles of one operation: Triton's for all problems, the extension's for some."""
    rows = [Row(None, None, None, TileConfig("pointer", 64, 64, 64, 4, 2))]
    rows.append(Row(where.get("n"), where.get("k"), where.get("tokens"), TileConfig("cuda", 128, 128, 128, 12, 4)))
    monkeypatch.setattr(tiles, "table", lambda gpu: {key: rows})


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    """Choices are remembered, which is right where the tables stay what they are."""
    forget()
    yield
    forget()


def forget() -> None:
    table._remembered.cache_clear()
    tiles._select.cache_clear()


# ---- every problem on every target ----------------------------------------------------------------------------------


@TARGET
@OPERATION
def test_the_first_row_without_an_obstacle_is_chosen_and_shown(operation: str, target: Target) -> None:
    rows = KERNELS[operation]
    for each in problems(operation):
        chosen = select(operation, each, target)
        obstacles = [row.obstacle(each, target) for row in rows]
        assert chosen in rows
        before = obstacles[: rows.index(chosen)]
        assert obstacles[rows.index(chosen)] is None
        assert all(isinstance(why, str) and why for why in before), (each, before)
        assert explain(operation, each, target) == KernelChoice(chosen.name, chosen.reason(each, target))
        assert all(isinstance(row.reason(each, target), str) and row.reason(each, target) for row in rows)
        assert select(operation, each, target) is chosen


@TARGET
@OPERATION
def test_a_choice_for_any_number_of_tokens_is_that_of_every_number(operation: str, target: Target) -> None:
    """`explain` without tokens, as of a module: one name where it makes no difference, else one for each range."""
    for each in problems(operation):
        whole = each._replace(t=None)
        chosen = [select(operation, each._replace(t=t), target).name for t in (1, 16, 64, 256, 1024, 4096, 16384)]
        choice = explain(operation, whole, target)
        assert choice.reason
        if len(set(chosen)) == 1:
            assert choice.name == chosen[0]
        else:
            assert choice.name.startswith(f"{chosen[0]} up to ")
            assert choice.name.endswith(f"{chosen[-1]} above")


@TARGET
def test_unknown_operation_is_an_error(target: Target) -> None:
    with pytest.raises(KeyError, match="w2a2_linear"):
        select("w2a2_linear", problem("linear", SCHEMES["w8a8"], Layout.PLAIN), target)


@OPERATION
def test_rows_are_of_their_operation_and_have_names_of_their_own(operation: str) -> None:
    rows = KERNELS[operation]
    assert {row.operation for row in rows} == {operation}
    assert len({row.name for row in rows}) == len(rows)
    assert rows[-1].name == REFERENCE


@pytest.mark.parametrize("target", [each for each in CPUS.values() if not each.native], ids=str)
@pytest.mark.parametrize(
    "scheme", [each for each in LINEAR_SCHEMES if each.activation is not None], ids=lambda s: s.name
)
def test_a_cpu_that_saturates_never_gets_int_mm(scheme: Scheme, target: Target) -> None:
    for layout, dtype in itertools.product(layouts_of(scheme), (torch.float32, torch.int8)):
        choice = explain("linear", problem("linear", scheme, layout, dtype=dtype), target)
        if target.int_mm_exact:
            assert choice == (by_torch.INT_MM, "torch's int8 product is exact on this CPU")
        else:
            assert choice == (by_torch.FLOAT32_CHUNKS, "torch's int8 product saturates on this CPU (no VNNI)")


@OPERATION
def test_a_slow_path_says_so(operation: str) -> None:
    """The reference runs where there is no kernel, and the reason says of what and that it is slow."""
    for each, target in itertools.product(problems(operation), (*GPUS.values(), TARGETS["another"])):
        choice = explain(operation, each, target)
        if choice.name == REFERENCE:
            assert choice.reason.endswith("; exact but slow")
            about = {
                each.layout.value if each.layout else "",
                "compute capability 7.5",
                f"no {target.device} kernel in",
            }
            assert any(word and word in choice.reason for word in about)


@OPERATION
def test_a_gpu_that_is_too_old_runs_the_reference_and_says_so(operation: str) -> None:
    for each in problems(operation):
        choice = explain(operation, each, GPUS["old"])
        if operation == "linear_add_norm":
            assert choice.name == composed.LINEAR_THEN_NORM
        else:
            assert choice == (REFERENCE, "no kernel for compute capability 7.5 in this version; exact but slow")


def test_choosing_touches_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pure: a Target is all that is looked at."""

    def refuse(*_: object) -> None:
        raise AssertionError("a choice asked the machine")

    for function in ("is_available", "get_device_properties", "current_device"):
        monkeypatch.setattr(torch.cuda, function, refuse)
    monkeypatch.setattr(torch, "_int_mm", refuse)
    for operation, target in itertools.product(OPERATIONS, TARGETS.values()):
        for each in problems(operation):
            explain(operation, each, target)
    for scheme, target in itertools.product(SCHEMES.values(), TARGETS.values()):
        for role in scheme.roles:
            select_layout(scheme, role, target)


# ---- layouts --------------------------------------------------------------------------------------------------------


@TARGET
@ROLE_AND_SCHEME
def test_layouts_are_legal_and_chosen_once(role: Role, scheme: Scheme, target: Target) -> None:
    layout = select_layout(scheme, role, target)
    assert layout in layouts_of(scheme)
    assert select_layout(scheme, role, target) is layout
    assert select_layout(copy.deepcopy(scheme), role, target) is layout  # as of a copied model
    assert role is Role.LINEAR or layout is Layout.PLAIN


@pytest.mark.parametrize("isa", ISAS)
@ROLE_AND_SCHEME
def test_the_native_kernels_run_what_they_can_read(role: Role, scheme: Scheme, isa: str) -> None:
    """A weight in the layout that is chosen for a native target runs there; in another, torch does it, and says so."""
    target, operation, read = Target("cpu", isa, native=True), operation_for(role), NATIVE[kind_of(role, scheme)]
    assert select_layout(scheme, role, target) in read
    for layout in layouts_of(scheme):
        chosen = select(operation, problem(operation, scheme, layout), target)
        assert (chosen.name == f"native {isa}") == (layout in read)
        assert chosen.name == f"native {isa}" or chosen.name.startswith("torch")


@pytest.mark.parametrize(
    ("name", "size", "runs"),
    [("w4a8", 8, True), ("w4a8", 24, True), ("w4a8", 4, False), ("w4a16", 96, True), ("w4a16", 8, False)],
)
def test_groups_that_the_panels_of_no_scheme_have(name: str, size: int, runs: bool) -> None:
    scheme, target = replace(SCHEMES[name], granularity=PerGroup(size)), Target("cpu", "avx2", native=True)
    chosen = select("linear", problem("linear", scheme, Layout.INT4_PANELS), target)
    assert chosen.name.startswith("native" if runs else "torch")


@pytest.mark.parametrize("gpu", ["h100", "h100-compiled-triton", "a100", "b200"])
@ROLE_AND_SCHEME
def test_the_gpu_kernels_read_the_layout_that_is_chosen(role: Role, scheme: Scheme, gpu: str) -> None:
    target, operation, read = GPUS[gpu], operation_for(role), TRITON[kind_of(role, scheme)]
    layout = select_layout(scheme, role, target)
    assert select(operation, problem(operation, scheme, layout), target).name == f"triton {operation}"
    for other in layouts_of(scheme):
        choice = explain(operation, problem(operation, scheme, other), target)
        if other in FRAGMENT_LAYOUTS and operation == "linear" and gpu == "h100-compiled-triton":
            assert choice.name == "cuda linear"  # there is nothing else that reads it
            continue
        assert choice.name == (f"triton {operation}" if other in read else REFERENCE)
        if other in FRAGMENT_LAYOUTS:
            assert choice.reason.startswith(f"the weight lies in {other.value}, but ") or gpu == "h100-compiled-triton"
        elif other not in read:
            assert choice.reason == f"no cuda kernel reads {other.value} in this version; exact but slow"


@ROLE_AND_SCHEME
def test_the_compiled_kernels_read_the_layout_that_is_chosen(role: Role, scheme: Scheme) -> None:
    target, operation = GPUS["h100-compiled-cuda"], operation_for(role)
    layout = select_layout(scheme, role, target)
    assert (layout in FRAGMENT_LAYOUTS) == (role is Role.LINEAR and cuda.own_layout(scheme) is not None)
    for t in (1, 5, 64, 4096, None):
        choice = explain(operation, problem(operation, scheme, layout, t), target)
        assert choice.name == ("cuda linear" if role is Role.LINEAR else "triton embedding")
        assert role is Role.EMBEDDING or choice.reason.startswith("QBERT_KERNEL=cuda; ")


@pytest.mark.parametrize("name", ["w4a8", "w4a8-g128", "gobo3a8", "gobo4a8", "gobo3", "gobo4", "w8a16", "w4a16-g32"])
def test_a_weight_in_rows_runs_triton_and_one_in_fragments_the_extension(name: str) -> None:
    """Whatever QBERT_KERNEL says later: a layout is chosen once."""
    scheme, triton, asked = SCHEMES[name], GPUS["h100-compiled-triton"], GPUS["h100-compiled-cuda"]
    rows, own = select_layout(scheme, Role.LINEAR, triton), cuda.own_layout(scheme)
    assert own in FRAGMENT_LAYOUTS
    assert rows in TRITON[kind_of(Role.LINEAR, scheme)]
    for target in (triton, asked, COMPILED):
        assert select("linear", problem("linear", scheme, rows), target).name == "triton linear"
        assert select("linear", problem("linear", scheme, own), target).name == "cuda linear"
    reason = explain("linear", problem("linear", scheme, rows), asked).reason
    assert reason.startswith(f"QBERT_KERNEL=cuda, but the weight lies in {rows.value}, the CUDA kernels read ")


@TARGET
@pytest.mark.parametrize("name", schemes_of("embedding"))
def test_a_tied_linear_can_read_the_embedding_s_layout(name: str, target: Target) -> None:
    """It reads its owner's buffers as they lie, in the layout that was chosen for look-ups."""
    layout = select_layout(SCHEMES[name], Role.EMBEDDING, target)
    tied = tied_linear_scheme(SCHEMES[name])
    assert layout in layouts_of(tied)
    assert select("linear", problem("linear", tied, layout), target)


# ---- the compiled kernels of GPUs -----------------------------------------------------------------------------------


def _compiled_problems() -> Iterator[Any]:
    for scheme in LINEAR_SCHEMES:
        for dtype in (torch.bfloat16, torch.int8)[: 2 if scheme.activation is not None else 1]:
            layout = cuda.own_layout(scheme) or Layout.INT8_ROWS
            each = problem("linear", scheme, layout, dtype=dtype)
            yield pytest.param("linear", each, id=f"{scheme.name}-{str(dtype).removeprefix('torch.')}")
    yield pytest.param("add_norm", Problem(None, None, 0, 768, torch.bfloat16, 64), id="add_norm")


@pytest.mark.parametrize(("operation", "each"), list(_compiled_problems()))
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (H100, "qbert._cuda is not there"),
        (Target("cuda", "", 90), "the CUDA kernels (qbert._cuda) are missing"),
        (Target("cuda", "", 100, native=True), "compiled for compute capability 9.0, this GPU has 10.0"),
    ],
    ids=["missing", "unknown", "newer"],
)
def test_what_cannot_run_compiled_says_why_where_it_is_asked_for(
    operation: str, each: Problem, target: Target, reason: str
) -> None:
    target = replace(target, prefer="cuda")
    if each.scheme is not None:
        each = each._replace(layout=select_layout(each.scheme, Role.LINEAR, target))
    choice = explain(operation, each, target)
    if operation == "add_norm" and target.native:
        assert choice.name == "cuda add_norm"  # row kernels run on newer GPUs too
        assert choice.reason.startswith("QBERT_KERNEL=cuda")
    else:
        assert choice.name == f"triton {operation}"
        assert choice.reason.startswith("QBERT_KERNEL=cuda, but ")
        assert reason in choice.reason


@pytest.mark.parametrize(("operation", "each"), list(_compiled_problems()))
def test_the_compiled_gpu_kernels_run_where_they_are_asked_for(operation: str, each: Problem) -> None:
    for t in (1, 64, 4096):
        assert select(operation, each._replace(t=t), GPUS["h100-compiled-cuda"]).name == f"cuda {operation}"
        for target in (H100, GPUS["h100-asked"], GPUS["a100"], *([] if operation == "add_norm" else [GPUS["b200"]])):
            assert select(operation, each._replace(t=t), target).name != f"cuda {operation}"


@pytest.mark.parametrize("operation", ["quantize_rows", "attention", "embed_norm"])
def test_what_the_extension_does_not_compute_runs_triton_though_it_is_asked_for(operation: str) -> None:
    choice = explain(operation, Problem(None, None, 12, 64, torch.bfloat16, 64), GPUS["h100-compiled-cuda"])
    assert choice.name == f"triton {operation}"
    assert "QBERT_KERNEL" not in choice.reason


@pytest.mark.parametrize("name", ["w4a8", "gobo3a8", "gobo3", "w8a16", "w4a16"])
def test_the_table_can_send_a_scheme_to_the_extension(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, own = SCHEMES[name], cuda.own_layout(SCHEMES[name])
    assert select_layout(scheme, Role.LINEAR, COMPILED) is not own
    table_of(monkeypatch, tile_key(scheme))
    assert select_layout(scheme, Role.LINEAR, COMPILED) is own
    assert select("linear", problem("linear", scheme, own), COMPILED).name == "cuda linear"
    for other in (H100, GPUS["h100-compiled-triton"], GPUS["a100"], GPUS["b200"]):
        layout = select_layout(scheme, Role.LINEAR, other)
        assert layout is not own
        assert select("linear", problem("linear", scheme, layout), other).name == "triton linear"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_where_the_table_sends_some_problems_to_the_extension_both_are_named(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_of(monkeypatch, "w8a8_linear", n=768, k=768, tokens=512)
    each = problem("linear", SCHEMES["w8a8"], Layout.INT8_ROWS, t=None, dtype=dtype)
    assert explain("linear", each, COMPILED).name == "cuda linear up to 512 tokens; triton linear above"
    assert explain("linear", each._replace(t=512), COMPILED).name == "cuda linear"
    assert explain("linear", each._replace(t=513), COMPILED).name == "triton linear"
    assert explain("linear", each._replace(n=3072), COMPILED).name == "triton linear"
    assert explain("linear", each, H100).name == "triton linear"


def test_a_tile_that_is_forced_is_what_runs_meanwhile() -> None:
    """Of what was chosen before nothing is remembered, and nothing of this afterwards."""
    each = problem("linear", SCHEMES["w8a8"], Layout.INT8_ROWS, t=4096, dtype=torch.int8)
    triton, by_cuda = TileConfig("pointer", 128, 128, 128, 8, 3), TileConfig("cuda", 128, 128, 128, 12, 4)
    before = select("linear", each, COMPILED)
    for _ in range(2):
        with forced("w8a8_linear", by_cuda):
            assert select("linear", each, COMPILED).name == "cuda linear"
            for target in (H100, GPUS["h100-compiled-triton"]):
                assert select("linear", each, target).name == "triton linear"
            with forced("w8a8_linear", triton):
                assert select("linear", each, COMPILED).name == "triton linear"
        assert select("linear", each, COMPILED) is before


def test_a_norm_runs_in_one_launch_where_the_extension_says_that_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qbert.ops.cuda.launch.extension",
        lambda: SimpleNamespace(add_norm_choose=lambda t, n, k, multiprocessors: "small" if t <= 64 else ""),
    )
    each = problem("linear_add_norm", SCHEMES["w8a8"], Layout.INT8_ROWS, t=None)
    for target, name in [
        (GPUS["h100-compiled-cuda"], "cuda linear_add_norm up to 64 tokens; linear, add_norm above"),
        (GPUS["h100-compiled-triton"], composed.LINEAR_THEN_NORM),
        (GPUS["h100-asked"], composed.LINEAR_THEN_NORM),
        (GPUS["a100"], composed.LINEAR_THEN_NORM),
        (CPUS["cpu-avx2"], composed.LINEAR_THEN_NORM),
    ]:
        assert explain("linear_add_norm", each, target).name == name
        assert composed.composes(each, target) == (target.device == "cpu")


# ---- what runs ------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(
    monkeypatch: pytest.MonkeyPatch, target: Target, instead: Callable[[Any], Any] | None = None
) -> Iterator[list[Kernel]]:
    """The rows of the table whose callables are called within the block, on a machine that is `target`."""
    called: list[Kernel] = []

    def watch(row: Kernel) -> Kernel:
        def call(a: Any) -> Any:
            called.append(watched)
            return row.call(a) if instead is None else instead(a)

        watched = replace(row, call=call)
        return watched

    with monkeypatch.context() as patch:
        for operation, rows in KERNELS.items():
            patch.setitem(KERNELS, operation, tuple(map(watch, rows)))
        patch.setattr(table, "target_of", lambda device: target)
        forget()
        yield called
    forget()


def records(operation: str) -> Iterator[Any]:
    """A problem of every scheme, layout and kind of result."""
    for scheme in [*(schemes_of(operation) or [None]), *([FLOAT_TABLE] if operation == "embed_norm" else [])]:
        known = SCHEMES.get(scheme or "")
        k = known.group_size or 72 if known else 72
        integer = operation == "attention" or (
            operation == "linear" and known is not None and known.activation is not None
        )
        for layout in layouts_of(known) if known else [Layout.PLAIN]:
            for int8_out in (False, True) if integer else (False,):
                yield random_problem(operation, 5, 6, k, scheme=scheme, layout=layout, int8_out=int8_out)


@TARGET
@OPERATION
def test_what_is_shown_is_what_is_called(operation: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines that are not here too: only the kernels' own work is left out."""
    for a in records(operation):
        with recorded(monkeypatch, target, instead=lambda a: a) as called:
            assert table.run(a) is a
            assert called == [select(operation, problem_of(a), target)]
            assert called[0].name == explain(operation, problem_of(a), target).name
            assert ops.checked_run(a) is a
            assert table.runner(operation, problem_of(a), target)(a) is a
            assert [row.name for row in called] == [called[0].name] * 3


def _machines() -> Iterator[Any]:
    extension = native_cpu()
    isas = extension.supported_isas() if extension is not None else []
    for name, target in CPUS.items():
        if target.isa in isas if target.native else target.isa == "generic":
            yield pytest.param(target, id=name)


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Target]:
    """This CPU, with one of its instruction sets or without the extension."""
    target: Target = request.param
    if not target.native and target.int_mm_exact and not cpu_target().int_mm_exact:
        pytest.skip("torch._int_mm saturates on this CPU")
    extension = native_cpu()
    before = extension.isa() if extension is not None else ""
    if target.native:
        extension.use_isa(target.isa)
    yield target
    if target.native:
        extension.use_isa(before)


@pytest.mark.parametrize("machine", list(_machines()), indirect=True)
@OPERATION
def test_what_is_shown_is_what_computes_on_this_cpu(
    operation: str, machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator itself, past torch's dispatcher, and what was chosen ahead: one row, and the right result."""
    for a in records(operation):
        with recorded(monkeypatch, machine) as called:
            chosen = select(operation, problem_of(a), machine)
            runs = ops.call, ops.checked_run, table.runner(operation, problem_of(a), machine)
            for run in runs:
                called.clear()
                assert_matches_reference(a, run(a))
                if operation == "linear_add_norm":
                    parts = (
                        ("linear", problem_of(a.linear)),
                        ("add_norm", Problem(None, None, 0, 6, a.residual.dtype, 5)),
                    )
                    assert called == [chosen, *(select(*part, machine) for part in parts)]
                else:
                    assert called == [chosen]


def test_torch_multiplies_as_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the row's callable: `torch._int_mm` itself is called where it is exact, and nowhere else."""
    calls: list[str] = []
    int_mm = torch._int_mm

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append("int_mm")
        return int_mm(*arguments)

    monkeypatch.setattr(torch, "_int_mm", counted)
    a = random_problem("linear", 2, 8, 8)
    for target in CPUS.values():
        calls.clear()
        row = select("linear", problem_of(a), target)
        if not target.native:
            row.call(a)
            assert bool(calls) == (row.name == by_torch.INT_MM) == target.int_mm_exact


@pytest.mark.parametrize(
    ("forced_isa", "expected"), [("torch", "torch"), ("generic", "native generic")], ids=["torch", "generic"]
)
def test_the_environment_says_which_kernels_run(forced_isa: str, expected: str) -> None:
    if native_cpu() is None and forced_isa != "torch":
        pytest.skip("the extension qbert._cpu is not built here")
    code = (
        "from qbert.ops import table, checked_run; from qbert.ops.kernel import problem_of; from qbert import testing\n"
        "from qbert.target import cpu_target\n"
        "a = testing.random_problem('attention', 5, 2, 8)\n"
        "testing.assert_matches_reference(a, checked_run(a))\n"
        "print(table.explain('attention', problem_of(a), cpu_target()).name)"
    )
    environment = {**os.environ, "QBERT_CPU_ISA": forced_isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == expected, done.stderr[-2000:]


@OPERATION
def test_this_machine_has_a_kernel_for_everything(operation: str) -> None:
    for a in records(operation):
        assert select(operation, problem_of(a), cpu_target()).name != REFERENCE


def test_a_launch_is_made_on_the_device_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, wherever its arguments are."""
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    x: Any = SimpleNamespace(device=torch.device("cuda", 1), shape=(2, 8), dtype=torch.float16)
    with recorded(monkeypatch, H100, instead=lambda a: current[0]) as called:
        assert table.run(QuantizeRows(x)) == 1
    assert current == [0]
    assert [row.name for row in called] == ["triton quantize_rows"]


# ---- records --------------------------------------------------------------------------------------------------------

WEIGHT = "Tensor[] weight, str weight_scheme, str weight_layout, int weight_k"
SCHEMAS = {
    "quantize_rows": "(Tensor x) -> (Tensor, Tensor)",
    "linear": (
        f"(Tensor x, Tensor? s, {WEIGHT}, Tensor? bias, str activation, bool gated, ScalarType out_dtype, float? out_scale, "
        "int zero) -> Tensor"
    ),
    "embedding": f"(Tensor ids, {WEIGHT}, ScalarType out_dtype) -> Tensor",
    "attention": (
        "(Tensor qkv, Tensor? scales, Tensor cu_seqlens, int heads, float softmax_scale, int? window, Tensor? bias, "
        "Tensor? rotary, ScalarType out_dtype, float? out_scale, Tensor? queries, Tensor? query_scales) -> Tensor"
    ),
    "add_norm": (
        "(Tensor y, Tensor residual, Tensor gamma, Tensor beta, float eps, str keeps) -> (Tensor, Tensor, Tensor)"
    ),
    "embed_norm": (
        "(Tensor ids, Tensor position_ids, Tensor token_type_ids, Tensor[] words, str words_scheme, str words_layout, "
        "int words_k, Tensor positions, Tensor token_types, Tensor gamma, Tensor beta, float eps) -> (Tensor, Tensor, Tensor)"
    ),
    "linear_add_norm": (
        f"(Tensor x, Tensor s, {WEIGHT}, Tensor? bias, Tensor residual, Tensor gamma, Tensor beta, float eps, str keeps) -> "
        "(Tensor, Tensor, Tensor)"
    ),
}  # fmt: skip


def test_schemas() -> None:
    """Written out once: exported programs hold them."""
    assert {name: operation.schema for name, operation in OPERATIONS.items()} == SCHEMAS
    for name, schema in SCHEMAS.items():
        registered = str(getattr(torch.ops.qbert, name).default._schema)
        assert registered.startswith(f"qbert::{name}{schema.partition(' -> ')[0]} -> ")


def _assert_same_record(found: Any, wanted: Any) -> None:
    """The same tensors, not copies."""
    assert type(found) is type(wanted)
    for name, got, want in zip(wanted._fields, found, wanted, strict=True):
        if isinstance(want, Weight):
            assert (got.scheme, got.shape, got.layout) == (want.scheme, want.shape, want.layout)
            assert list(got.tensors) == list(want.tensors)
            assert all(got.tensors[key] is tensor for key, tensor in want.tensors.items())
        elif isinstance(want, Norm):
            _assert_same_record(got, want)
        else:
            assert got is want or (type(got) is type(want) and got == want), name


@OPERATION
def test_a_record_comes_back_from_the_operator_s_arguments(operation: str) -> None:
    known = OPERATIONS[operation]
    for a in records(operation):
        assert operation_of(a) is known
        flat = known.flatten(a)
        assert len(flat) == len(getattr(torch.ops.qbert, operation).default._schema.arguments)
        _assert_same_record(known.bind(*flat), a)
        assert len(a.results()) == known.gives


def test_what_may_be_none_comes_back() -> None:
    for a in (
        random_problem("linear", 2, 3, 64, scheme="gobo3", bias=False),
        random_problem("linear", 2, 6, 64, scheme="gobo4a8", activation="gelu", matrices=3),
        random_problem("linear", 2, 6, 64, activation="silu", gated=True),
        random_problem("add_norm", 2, 6, 64, keeps=Keeps.SUM),
        random_problem("linear_add_norm", 2, 3, 64, bias=False),
        random_problem("attention", 2, 3, 64, per_token=True, int8_out=True),
    ):
        _assert_same_record(operation_of(a).bind(*operation_of(a).flatten(a)), a)


def test_a_weight_s_tensors_go_in_the_order_of_their_scheme_whatever_order_they_are_held_in() -> None:
    """safetensors gives them by the alphabet."""
    a = random_problem("linear", 2, 3, 64, scheme="gobo3a8")
    held = a.weight
    shuffled = Weight(held.scheme, held.shape, held.layout, dict(sorted(held.tensors.items())))
    flat = operation_of(a).flatten(a._replace(weight=shuffled))
    _assert_same_record(operation_of(a).bind(*flat), a)
    assert torch.equal(ops.call(a._replace(weight=shuffled)), ops.call(a))


def test_activations_have_names() -> None:
    assert [Activation.named(each.text) for each in Activation] == list(Activation)
    assert [each.text for each in Activation] == ["none", "gelu", "gelu_tanh", "relu", "silu"]
    assert {Activation.named(name) for name in ("gelu_new", "gelu_pytorch_tanh")} == {Activation.GELU_TANH}
    assert Activation.named("swish") is Activation.SILU
    with pytest.raises(
        QBertError, match="unknown activation 'NONE'; allowed: none, gelu, gelu_tanh, relu, silu, gelu_new"
    ):
        Activation.named("NONE")


def test_what_a_norm_keeps_has_names() -> None:
    assert [Keeps.named(each.text) for each in Keeps] == list(Keeps) == [Keeps.NORM, Keeps.SUM]
    with pytest.raises(QBertError, match="keeps is 'total'; allowed: norm, sum"):
        Keeps.named("total")


def test_what_a_problem_is_of_a_record() -> None:
    w8a8, gobo3 = SCHEMES["w8a8"], SCHEMES["gobo3"]
    wanted = {
        "quantize_rows": Problem(None, None, 0, 64, torch.float16, 5),
        "linear": Problem(w8a8, Layout.PLAIN, 6, 64, torch.float16, 5),
        "embedding": Problem(gobo3, Layout.PLAIN, 6, 64, torch.float16, 5),
        "attention": Problem(None, None, 6, 64, torch.float16, 5),
        "add_norm": Problem(None, None, 0, 64, torch.float16, 5),
        "embed_norm": Problem(gobo3, Layout.PLAIN, 6, 64, torch.float16, 5),
        "linear_add_norm": Problem(w8a8, Layout.PLAIN, 6, 64, torch.float16, 5),
    }
    for operation, want in wanted.items():
        assert problem_of(random_problem(operation, 5, 6, 64, dtype=torch.float16)) == want
    gated = problem_of(random_problem("linear", 5, 6, 64, gated=True, activation="relu"))
    assert (gated.n, gated.gated, gated.activation) == (12, True, Activation.RELU)
    for operation in ("add_norm", "linear_add_norm"):
        assert problem_of(random_problem(operation, 5, 6, 64, keeps=Keeps.SUM)).keeps is Keeps.SUM
    for operation in ("linear", "attention"):
        assert problem_of(random_problem(operation, 5, 6, 64, int8_out=True)).dtype == torch.int8
    float_table = random_problem("embed_norm", 5, 6, 64, scheme=FLOAT_TABLE)
    assert problem_of(float_table) == Problem(None, None, 6, 64, torch.float32, 5)


# ---- extensions -----------------------------------------------------------------------------------------------------


def _extension(**enums: Any) -> Any:
    exported = {each.__name__: {member.name: member.value for member in each} for each in abi.ENUMS}
    return SimpleNamespace(__name__="qbert._cpu", ENUMS={**exported, **enums})


def test_an_extension_that_counts_otherwise_is_refused() -> None:
    abi.require_same_enums(_extension())
    for each in abi.ENUMS:
        numbers = {member.name: member.value for member in each}
        (first, second, *_) = numbers
        for wrong in ({**numbers, first: 1, second: 0}, {**numbers, "NEW": 99}, {first: 0}):
            with pytest.raises(ImportError, match=rf"qbert._cpu was compiled with {each.__name__} .*: build it again"):
                abi.require_same_enums(_extension(**{each.__name__: wrong}))


def test_an_extension_of_before_there_were_enums_is_refused() -> None:
    with pytest.raises(ImportError, match=r"qbert\._cpu was compiled by another version: build it again"):
        abi.require_same_enums(SimpleNamespace(__name__="qbert._cpu"))


def test_an_extension_that_lacks_an_enum_is_refused() -> None:
    with pytest.raises(ImportError, match=r"qbert\._cuda was compiled with Keeps None.*build it again"):
        abi.require_same_enums(
            SimpleNamespace(
                __name__="qbert._cuda", ENUMS={"Activation": {each.name: each.value for each in Activation}}
            )
        )


@pytest.mark.skipif(native_cpu() is None, reason="the extension qbert._cpu is not built here")
def test_the_extension_here_exports_all_that_it_is_told() -> None:
    extension: Any = native_cpu()
    assert set(extension.ENUMS) == {each.__name__ for each in abi.ENUMS}
    abi.require_same_enums(extension)


def test_a_module_of_kernels_takes_records_only() -> None:
    """No row is called with an operator's flat arguments."""
    for rows in KERNELS.values():
        for row in rows:
            required = [
                each
                for each in inspect.signature(row.call).parameters.values()
                if each.default is each.empty and each.kind is not each.KEYWORD_ONLY
            ]
            assert len(required) == 1, row
