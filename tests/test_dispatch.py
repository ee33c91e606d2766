"""Choices are pure and total: every operation on every target, with no such machine here."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from qbert import dispatch, tiles
from qbert.dispatch import OPERATIONS, KernelChoice, embedding_operation, linear_operation, select_kernel, select_layout
from qbert.formats import SCHEMES, TIED_LINEAR_SCHEME, Role, Scheme
from qbert.layout import FRAGMENT_LAYOUTS, Layout, layouts_of
from qbert.ops import cpu_torch
from qbert.target import Target, cpu_target
from qbert.tiles import Row, TileConfig, forced

TARGETS = {
    "cpu-plain": Target(),
    "cpu-saturates": Target("cpu", int_mm_exact=False),
    "cpu-amx": Target("cpu", "amx_int8", native=True),
    "cpu-vnni": Target("cpu", "avx512_vnni", native=True),
    "cpu-avx2": Target("cpu", "avx2", native=True, int_mm_exact=False),
    "h100": Target("cuda", "", 90, 132, 232_448, native_missing="qbert._cuda is not there"),
    "h100-compiled": Target("cuda", "", 90, 132, 232_448, native=True, prefer="cuda"),
    "a100": Target("cuda", "", 80, 108, 166_912),
    "b200": Target("cuda", "", 100, 148, 232_448, native=True),
}
TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
ROLE_AND_SCHEME = pytest.mark.parametrize(
    ("role", "scheme"),
    [
        pytest.param(role, scheme, id=f"{role.value}-{scheme.name}")
        for scheme in SCHEMES.values()
        for role in sorted(scheme.roles, key=lambda role: role.value)
    ],
)


@TARGET
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_a_kernel_and_a_reason(operation: str, target: Target) -> None:
    choice = select_kernel(operation, target)
    assert isinstance(choice, KernelChoice)
    assert choice.name
    assert choice.reason
    assert select_kernel(operation, target) == choice


@TARGET
def test_unknown_operation_is_an_error(target: Target) -> None:
    with pytest.raises(KeyError, match="w2a2_linear"):
        select_kernel("w2a2_linear", target)


def test_operations_are_listed_once() -> None:
    assert len(set(OPERATIONS)) == len(OPERATIONS)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name.startswith(("w8a8", "w4a8", "gobo_linear"))])
def test_a_cpu_that_saturates_never_gets_int_mm(operation: str) -> None:
    assert select_kernel(operation, TARGETS["cpu-plain"]).name == dispatch.TORCH_INT_MM
    choice = select_kernel(operation, TARGETS["cpu-saturates"])
    assert choice.name == dispatch.TORCH_FLOAT32_CHUNKS
    assert "saturates" in choice.reason


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_slow_path_says_so(operation: str) -> None:
    """The reference runs where there is no kernel, and the reason says of what and that it is slow."""
    choice = select_kernel(operation, TARGETS["h100"])
    assert choice.name == dispatch.REFERENCE or dispatch.COMPOSED.get(operation, (operation,))[0] in choice.name
    if choice.name == dispatch.REFERENCE:
        assert choice.reason == f"no cuda kernel for {operation} in this version; exact but slow"


@ROLE_AND_SCHEME
def test_every_scheme_has_an_operation_that_takes_its_tensors(role: Role, scheme: Scheme) -> None:
    """Not only a name in the table: the operator's arguments are the tensors of the scheme."""
    from qbert.qtensor import plain_specs

    operation = (linear_operation if role is Role.LINEAR else embedding_operation)(scheme)
    assert operation in OPERATIONS
    arguments = [each.name for each in getattr(torch.ops.qbert, operation).default._schema.arguments]
    assert set(plain_specs(scheme, (4, 128))) <= set(arguments)
    assert ("q" in arguments) == (scheme.activation is not None)


@TARGET
@ROLE_AND_SCHEME
def test_layouts_are_legal_and_read_by_the_operation(role: Role, scheme: Scheme, target: Target) -> None:
    layout = select_layout(scheme, role, target)
    assert layout in layouts_of(scheme)
    assert select_layout(scheme, role, target) is layout
    assert select_layout(copy.deepcopy(scheme), role, target) is layout  # as of a copied model
    operation = (linear_operation if role is Role.LINEAR else embedding_operation)(scheme)
    takes_layout = any(each.name == "layout" for each in getattr(torch.ops.qbert, operation).default._schema.arguments)
    assert takes_layout or layout is Layout.PLAIN  # an operation that is not told reads PLAIN


@pytest.mark.parametrize("isa", ["amx_int8", "avx512_vnni", "avx_vnni", "avx2", "generic"])
@ROLE_AND_SCHEME
def test_the_native_kernels_run_what_they_can_read(role: Role, scheme: Scheme, isa: str) -> None:
    """A weight in the layout that is chosen for a native target runs there; in another, torch does it, and says so."""
    target = Target("cpu", isa, native=True)
    operation = (linear_operation if role is Role.LINEAR else embedding_operation)(scheme)
    assert select_kernel(operation, target, select_layout(scheme, role, target)).name == f"native {isa}"
    if scheme.weight_bits < 8:
        assert not select_kernel(operation, target, Layout.BYTES).name.startswith("native")


@pytest.mark.parametrize("gpu", ["h100", "a100", "b200"])
@ROLE_AND_SCHEME
def test_the_gpu_kernels_read_the_layout_that_is_chosen(role: Role, scheme: Scheme, gpu: str) -> None:
    target = TARGETS[gpu]
    operation = (linear_operation if role is Role.LINEAR else embedding_operation)(scheme)
    layout = select_layout(scheme, role, target)
    assert select_kernel(operation, target, layout).name == f"triton {operation}"
    for other in layouts_of(scheme):
        choice = select_kernel(operation, target, other)
        known = other in dispatch.TRITON_LAYOUTS[operation]
        assert choice.name == (f"triton {operation}" if known else dispatch.REFERENCE)
        if other in FRAGMENT_LAYOUTS and operation in dispatch.COMPILED_LAYOUTS:
            assert choice.reason.startswith(f"the weight lies in {other.value}, but ")
        else:
            assert known or choice.reason == f"no CUDA kernel reads layout {other.value}; exact but slow"


@ROLE_AND_SCHEME
def test_the_compiled_kernels_read_the_layout_that_is_chosen(role: Role, scheme: Scheme) -> None:
    target = TARGETS["h100-compiled"]
    operation = (linear_operation if role is Role.LINEAR else embedding_operation)(scheme)
    layout = select_layout(scheme, role, target)
    assert (layout in FRAGMENT_LAYOUTS) == (operation in dispatch.COMPILED_LAYOUTS)
    choice = select_kernel(operation, target, layout)
    assert choice == select_kernel(operation, target)
    if operation in dispatch.CUDA_OPERATIONS:
        assert choice.name == f"cuda {operation}"
        assert choice.reason.startswith("QBERT_KERNEL=cuda; ")
    else:
        assert choice.name == f"triton {operation}"
    assert dispatch.runs_compiled(operation, 5, 64, 128, target, layout.value) == (
        operation in dispatch.CUDA_OPERATIONS
    )


@pytest.mark.parametrize("name", ["w4a8", "gobo3a8", "gobo4", "w8a16", "w4a16-g32"])
def test_a_weight_in_rows_runs_triton_and_one_in_fragments_the_extension(name: str) -> None:
    """Whatever QBERT_KERNEL says later: a layout is chosen once."""
    operation, triton = linear_operation(SCHEMES[name]), replace(TARGETS["h100-compiled"], prefer="triton")
    rows, own = select_layout(SCHEMES[name], Role.LINEAR, triton), dispatch.COMPILED_LAYOUTS[operation]
    assert rows in dispatch.TRITON_LAYOUTS[operation]
    for target in (triton, TARGETS["h100-compiled"], replace(triton, prefer="")):
        assert select_kernel(operation, target, rows).name == f"triton {operation}"
        assert select_kernel(operation, target, own).name == f"cuda {operation}"
        assert not dispatch.runs_compiled(operation, 5, 64, 128, target, rows.value)
        assert dispatch.runs_compiled(operation, 5, 64, 128, target, own.value)
    assert "a layout that only Triton's kernels read" in select_kernel(operation, TARGETS["h100-compiled"], rows).reason


@pytest.mark.parametrize("operation", dispatch.CUDA_OPERATIONS)
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (TARGETS["h100"], "qbert._cuda is not there"),
        (Target("cuda", "", 90), "the CUDA kernels (qbert._cuda) are missing"),
        (Target("cuda", "", 100, native=True), "compiled for compute capability 9.0, this GPU has 10.0"),
    ],
    ids=["missing", "unknown", "newer"],
)
def test_what_cannot_run_compiled_says_why_where_it_is_asked_for(operation: str, target: Target, reason: str) -> None:
    if operation == "add_layer_norm_quantize" and target.native:
        reason, name = "QBERT_KERNEL=cuda", "cuda"  # row kernels run on newer GPUs too
    else:
        name = "triton"
    choice = select_kernel(operation, replace(target, prefer="cuda"))
    assert choice.name == f"{name} {operation}"
    assert reason in choice.reason
    assert not dispatch.runs_compiled(operation, 5, 64 if "linear" in operation else 0, 64, target)


def _table_of(monkeypatch: pytest.MonkeyPatch, operation: str, **where: int) -> None:
    rows = [Row(None, None, None, TileConfig("pointer", 64, 64, 64, 4, 2))]
    rows.append(Row(where.get("n"), where.get("k"), where.get("tokens"), TileConfig("cuda", 128, 128, 128, 12, 4)))
    monkeypatch.setattr(tiles, "table", lambda gpu: {operation: rows})


@pytest.mark.parametrize("name", ["w4a8", "gobo3a8", "gobo3", "w8a16", "w4a16"])
def test_the_table_can_send_an_operation_to_the_extension(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, h100 = linear_operation(SCHEMES[name]), replace(TARGETS["h100"], native=True)
    own = dispatch.COMPILED_LAYOUTS[operation]
    assert select_layout(SCHEMES[name], Role.LINEAR, h100) is not own
    _table_of(monkeypatch, operation)
    assert select_layout(SCHEMES[name], Role.LINEAR, h100) is own
    assert select_kernel(operation, h100).name == f"cuda {operation}"
    for other in (TARGETS["h100"], replace(h100, prefer="triton"), TARGETS["a100"], TARGETS["b200"]):
        assert select_layout(SCHEMES[name], Role.LINEAR, other) is not own
        assert select_kernel(operation, other).name == f"triton {operation}"


def test_where_the_table_sends_some_problems_to_the_extension_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = replace(TARGETS["h100"], native=True)
    _table_of(monkeypatch, "w8a8_linear", n=768, k=768, tokens=512)
    assert select_kernel("w8a8_linear_requant", h100).name == "triton or cuda w8a8_linear_requant"
    assert select_kernel("w8a8_linear", TARGETS["h100"]).name == "triton w8a8_linear"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gpu_that_is_too_old_runs_the_reference_and_says_so(operation: str) -> None:
    choice = select_kernel(operation, Target("cuda", "", 75, 40, 65_536))
    assert choice.name == dispatch.REFERENCE
    assert choice.reason == "no kernel for compute capability 7.5; exact but slow"


@TARGET
@pytest.mark.parametrize("name", list(TIED_LINEAR_SCHEME))
def test_a_tied_linear_can_read_the_embedding_s_layout(name: str, target: Target) -> None:
    """It reads its owner's buffers as they lie, in the layout that was chosen for look-ups."""
    layout = select_layout(SCHEMES[name], Role.EMBEDDING, target)
    assert layout in layouts_of(SCHEMES[TIED_LINEAR_SCHEME[name]])


def test_choosing_touches_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pure: a Target is all that is looked at."""

    def refuse(*_: object) -> None:
        raise AssertionError("a choice asked the machine")

    for function in ("is_available", "get_device_properties", "current_device"):
        monkeypatch.setattr(torch.cuda, function, refuse)
    monkeypatch.setattr(torch, "_int_mm", refuse)
    for operation, target in itertools.product(OPERATIONS, TARGETS.values()):
        select_kernel(operation, target)
    for scheme, target in itertools.product(SCHEMES.values(), TARGETS.values()):
        for role in scheme.roles:
            select_layout(scheme, role, target)


def test_torch_runs_what_select_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`qbert.explain` shows `select_kernel`; what runs must be the same."""
    calls: list[str] = []
    int_mm = torch._int_mm

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append("int_mm")
        return int_mm(*arguments)

    monkeypatch.setattr(torch, "_int_mm", counted)
    q = torch.ones(2, 8, dtype=torch.int8)
    for target in (TARGETS["cpu-plain"], TARGETS["cpu-saturates"]):
        calls.clear()
        monkeypatch.setattr(cpu_torch, "cpu_target", lambda target=target: target)
        cpu_torch.CPU_TORCH["w8a8_linear"](q, torch.ones(2), q, torch.ones(2), None, "none", torch.float32, "plain")
        expected = select_kernel("w8a8_linear", target).name == dispatch.TORCH_INT_MM
        assert bool(calls) == expected


def test_this_machine_has_a_choice_for_everything() -> None:
    for operation in OPERATIONS:
        assert select_kernel(operation, cpu_target()).name


@pytest.mark.parametrize(
    "operation", ["w8a8_linear", "w8a8_linear_requant", "add_layer_norm_quantize", "attention_int8"]
)
def test_the_compiled_gpu_kernels_run_where_they_are_asked_for(operation: str) -> None:
    h100 = TARGETS["h100"]
    asked = replace(h100, native=True, prefer="cuda")
    n = 768 if "linear" in operation else 0
    compiled = operation in dispatch.CUDA_OPERATIONS
    assert dispatch.runs_compiled(operation, 4096, n, 768, asked) == compiled
    assert select_kernel(operation, asked).name == f"{'cuda' if compiled else 'triton'} {operation}"
    for target in (h100, replace(h100, prefer="cuda"), replace(h100, native=True, prefer="triton")):
        assert not dispatch.runs_compiled(operation, 4096, n, 768, target)


def test_a_tile_of_the_table_can_ask_for_the_compiled_kernel() -> None:
    h100 = replace(TARGETS["h100"], native=True)
    with forced("w8a8_linear", TileConfig("cuda", 128, 128, 128, 12, 4)):
        assert dispatch.runs_compiled("w8a8_linear_requant", 4096, 768, 768, h100)
        assert not dispatch.runs_compiled("w8a8_linear", 4096, 768, 768, replace(h100, prefer="triton"))
        assert not dispatch.runs_compiled("w8a8_linear", 4096, 768, 768, TARGETS["h100"])
