"""The house stands as docs/architecture.md draws it: imports go down, kernels/ is reached without being a package."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qbert"
HEAVY = ("transformers", "triton", "bitsandbytes", "matplotlib", "typer")


class Wing(NamedTuple):
    """A row of the table in docs/architecture.md."""

    name: str
    modules: list[str]
    sees: list[str]


def documented_wings() -> list[Wing]:
    """The table in docs/architecture.md, from the ground up."""
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ((?:`\w+` ?)+)\| ([\w ]*)\| .*\|$", text, re.M)
    return [Wing(name, re.findall(r"`(\w+)`", modules), sees.split()) for name, modules, sees in rows]


WINGS = documented_wings()
WING_OF = {module: wing for wing in WINGS for module in wing.modules}
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py" and not {"kernels", "benchmarks"} & set(path.parts[len(PACKAGE.parts) :])
)
# Seen by way of the symbolic link qbert/benchmarks, so that the paths say which layer it is.
BENCHMARKS = sorted(PACKAGE / path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py"))


def unit_of(path: Path) -> str:
    """The package or module that the table knows: qbert/modules/spec.py is `modules`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    """Units of qbert that a file imports, anywhere in it."""
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if unit_of(path) != "benchmarks":
                raise AssertionError(f"{path}: relative import; say from qbert...")
            units.add("benchmarks")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qbert":
            inner = node.module.split(".")[1:]
            units |= {inner[0]} if inner else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            units |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qbert.")}
    return units


def may_import(unit: str) -> set[str]:
    """Units that a unit may import: of the wings that its own sees, and what stands before it in its own."""
    wing = WING_OF[unit]
    seen = {module for other in WINGS if other.name in wing.sees for module in other.modules}
    return seen | set(wing.modules[: wing.modules.index(unit)])


def test_every_module_is_in_the_table():
    assert {unit_of(path) for path in MODULES + BENCHMARKS} == set(WING_OF)


def test_wings_see_what_stands_below_them():
    """So that there are no circles."""
    for index, wing in enumerate(WINGS):
        assert set(wing.sees) <= {below.name for below in WINGS[:index]}, wing


@pytest.mark.parametrize("path", MODULES + BENCHMARKS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    unit = unit_of(path)
    strays = imported_units(path) - may_import(unit) - {unit, "_cpu", "_cuda", "kernels"}
    assert not strays, f"{unit} (wing {WING_OF[unit].name}) imports {sorted(strays)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_what_stands_there(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_only_ops_reaches_kernels_and_extensions():
    for path in MODULES:
        reached = imported_units(path) & {"_cpu", "_cuda", "kernels"}
        allowed = {"ops": {"_cpu", "_cuda", "kernels"}, "target": {"_cpu", "_cuda"}}.get(unit_of(path), set())
        assert reached <= allowed, f"{path.relative_to(PACKAGE)} imports {reached}"


def test_kernels_see_only_triton_and_themselves():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert all(name.split(".")[0] == "triton" or name.startswith("qbert.kernels") for name in names), path.name


def test_kernels_is_no_package_of_its_own():
    """A top-level package `kernels` would be what transformers imports in place of Hugging Face's."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts and "build" not in path.parts:
            assert not re.search(r"^\s*(import kernels|from kernels)\b", path.read_text(), re.M), path


def test_benchmarks_are_one_package_with_two_names():
    """`python -m benchmarks.x` in a clone, `qbert.benchmarks.x` in a wheel: what they import of each other is relative."""
    assert (PACKAGE / "benchmarks").is_symlink()
    assert (PACKAGE / "benchmarks").resolve() == ROOT / "benchmarks"
    for path in BENCHMARKS:
        assert not re.search(r"^\s*(from|import) (qbert\.)?benchmarks\b", path.read_text(), re.M), path


def test_benchmarks_import_each_other_without_circles():
    """Also inside functions: what needs that is two modules in one."""
    graph = {path.relative_to(PACKAGE / "benchmarks"): relative_imports(path) for path in BENCHMARKS}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def relative_imports(path: Path) -> set[Path]:
    """Files of benchmarks/ that one of them imports, by their paths in it."""
    home, found = PACKAGE / "benchmarks", set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for place in (folder, *(folder / alias.name for alias in node.names)):
                found |= {each for each in (place.with_suffix(".py"), place / "__init__.py") if each.is_file()}
    return {each.relative_to(home) for each in found} - {Path("__init__.py"), path.relative_to(home)}


def test_import_is_light():
    """`import qbert` needs no GPU, no Triton, no compiler, and none of the slow imports."""
    code = f"import qbert, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_import_works_without_the_extension():
    code = (
        "import sys; sys.modules['qbert._cpu'] = None\n"
        "import torch, qbert\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 32))\n"
        "qbert.quantize_(model, 'w8a8'); model(torch.randn(3, 64))\n"
        "print(qbert.cpu_target().native, qbert.cpu_target().isa)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "generic"]
