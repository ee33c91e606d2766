"""Choices are pure and total: every operation on every target, with no such machine here."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from qbert import dispatch
from qbert.dispatch import OPERATIONS, KernelChoice, embedding_operation, linear_operation, select_kernel, select_layout
from qbert.formats import SCHEMES, TIED_LINEAR_SCHEME, Role, Scheme
from qbert.layout import Layout, layouts_of
from qbert.ops import cpu_torch
from qbert.target import Target, cpu_target
from qbert.tiles import TileConfig, forced

TARGETS = {
    "cpu-plain": Target(),
    "cpu-saturates": Target("cpu", int_mm_exact=False),
    "cpu-amx": Target("cpu", "amx_int8", native=True),
    "cpu-vnni": Target("cpu", "avx512_vnni", native=True),
    "cpu-avx2": Target("cpu", "avx2", native=True, int_mm_exact=False),
    "h100": Target("cuda", "", 90, 132, 232_448),
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
    assert choice.name == dispatch.REFERENCE or operation in choice.name
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
        assert known or choice.reason == f"no CUDA kernel reads layout {other.value}; exact but slow"


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


@pytest.mark.parametrize("operation", ["w8a8_linear", "w8a8_linear_requant", "add_layer_norm_quantize", "gobo_linear"])
def test_the_compiled_gpu_kernels_run_where_they_are_asked_for(operation: str) -> None:
    h100 = TARGETS["h100"]
    asked = replace(h100, native=True, prefer="cuda")
    n = 768 if "linear" in operation else 0
    compiled = operation in dispatch.CUDA_OPERATIONS
    assert dispatch.runs_compiled(operation, 4096, n, 768, asked) == compiled
    assert select_kernel(operation, asked).name == f"{'cuda' if compiled else 'triton'} {operation}"
    for target in (h100, replace(h100, native=True, prefer="triton")):
        assert not dispatch.runs_compiled(operation, 4096, n, 768, target)


def test_a_tile_of_the_table_can_ask_for_the_compiled_kernel() -> None:
    h100 = replace(TARGETS["h100"], native=True)
    with forced("w8a8_linear", TileConfig("cuda", 128, 128, 128, 12, 4)):
        assert dispatch.runs_compiled("w8a8_linear_requant", 4096, 768, 768, h100)
        assert not dispatch.runs_compiled("w8a8_linear", 4096, 768, 768, replace(h100, prefer="triton"))
        assert not dispatch.runs_compiled("w8a8_linear", 4096, 768, 768, TARGETS["h100"])
