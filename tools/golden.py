"""Digests of what the code computes and saves: they hold a refactoring to the bit.

    python tools/golden.py --check                  exit code 1, and the name of every digest that differs
    python tools/golden.py --check --only 'encoders/Bert/*'
    python tools/golden.py --check --environment torch
    python tools/golden.py --write                  after a change that is meant to change bits, or on another kind of machine

`tests/golden.json` holds SHA-256 (the first 128 bits) in sections. What qbert computes itself does not depend on the machine:
those digests stand once, in the section `any`, and every instruction set that this CPU has is held to them; the least two run
with torch's own vectors of as few bits, so that nothing of torch that depends on them can hide in there. What torch's or
numpy's float operations have a part in stands in a section for each kind of machine, which the name of the section spells out;
where there is none for this machine, nothing is compared, and it is said. To get one: check out the revision that the file is
of, `--write` there, and bring the file back. `--write` drops the sections of other machines where it changes a digest.

Problems are in `golden_cases`; how operations are called, and that alone, in `golden_calls`.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "golden.json"
ANY = "any"
_DIGITS = 32
_ERROR = "error: "
# Of a CPU, what decides which float kernels of oneDNN and MKL run on it, beside its maker and torch's own choice.
_FLAGS = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16")
# Native instruction set -> torch's vectors that it runs beside; the others run beside torch's own choice.
_TORCH_VECTORS = {"generic": "default", "avx2": "avx2"}
Digests = dict[str, str]


# ---- environments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """One process that computes digests.

    Attributes:
        name: what `--environment` takes.
        rooms: of `golden_cases.ROOMS`.
        variables: what is set for it.
        section: of the file.
        threads: None leaves them to the caller's OMP_NUM_THREADS, if there is one.
        cases: patterns of the names of those that it computes.
        prefix: of the names in the file, before the room: what tells environments of one section apart that do not agree.
    """

    name: str
    rooms: tuple[str, ...]
    variables: Mapping[str, str]
    section: str = ANY
    threads: int | None = None
    cases: tuple[str, ...] = ("*",)
    prefix: str = ""

    def computes(self, name: str, only: str) -> bool:
        """Whether it computes a case, or a digest of one, where `only` is asked for."""
        case, own = name.partition("#")[0], tuple(f"{self.prefix}{room}/" for room in self.rooms)
        return case.startswith(own) and all(
            any(map(functools.partial(fnmatch.fnmatch, case), each)) for each in (self.cases, (only,))
        )


def environments() -> list[Environment]:
    """All of this machine: the instruction sets from the least to the best, the best with two threads too, then the others."""
    isas = _instruction_sets()
    by_torch = f"torch {torch.__version__}, {_cpu_kind()}"
    found = []
    for isa in isas:
        vectors = {"ATEN_CPU_CAPABILITY": _TORCH_VECTORS[isa]} if isa in _TORCH_VECTORS else {}
        rooms = ("operations", "encoders", "files") if isa in (isas[0], isas[-1]) else ("operations", "encoders")
        found.append(Environment(isa, rooms, {"QBERT_CPU_ISA": isa, **vectors}))
    if isas:
        cases = ("operations/*", "encoders/large/*")
        found.append(Environment("two_threads", ("operations", "encoders"), {}, threads=2, cases=cases))
        found.append(Environment("models", ("models",), {}, by_torch, 1))
    without = {"QBERT_CPU_ISA": "torch"}
    found.append(Environment("torch", ("operations", "plain", "encoders"), without, by_torch, 1, prefix="torch/"))
    if importlib.util.find_spec("triton") is not None:
        versions = f"triton {_version('triton')}, numpy {_version('numpy')}, {by_torch}"
        for room in ("interpreted_few", "interpreted_more"):
            found.append(Environment(room, (room,), {"TRITON_INTERPRET": "1"}, versions, 1))
    return found


def _instruction_sets() -> list[str]:
    try:
        from qbert import _cpu
    except ImportError:
        return []
    return list(_cpu.supported_isas())


def _cpu_kind() -> str:
    """What float results of torch, MKL, oneDNN and numpy depend on."""
    capability, info = torch.backends.cpu.get_cpu_capability(), Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    vendor = re.search(r"^vendor_id\s*: (\S+)", text, re.M)
    flags = re.search(r"^flags\s*: (.*)", text, re.M)
    has = [flag for flag in _FLAGS if flags is not None and flag in flags[1].split()]
    return " ".join([capability, vendor[1] if vendor else platform.machine(), *has])


def _version(package: str) -> str:
    return importlib.metadata.version(package)


# ---- computing ------------------------------------------------------------------------------------------------------


def compute(environment: Environment, only: str = "*") -> Digests:
    """The environment's digests, from a process of its own."""
    cleared = ("QBERT_CPU_ISA", "QBERT_KERNEL", "ATEN_CPU_CAPABILITY", "TRITON_INTERPRET")
    inherited = {name: value for name, value in os.environ.items() if name not in cleared}
    threads = inherited.get("OMP_NUM_THREADS", "1") if environment.threads is None else str(environment.threads)
    path = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    variables = {**inherited, **environment.variables, "OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    command = [sys.executable, __file__, "--compute", environment.name, "--only", only]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{environment.name}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _compute_here(environment: Environment, only: str) -> Digests:
    """In this process. A case that fails is a digest that says why, so that the others are still compared."""
    from golden_cases import ROOMS

    found: Digests = {}
    for room in environment.rooms:
        for case, function in ROOMS[room]():
            name = f"{environment.prefix}{room}/{case}"
            if environment.computes(name, only):
                try:
                    found |= _digests(name, function())
                except Exception as error:
                    found[name] = f"{_ERROR}{type(error).__name__}: {error}"
    return found


def _digests(name: str, value: Any) -> Digests:
    if isinstance(value, dict):
        return {f"{name}#{key}": _digest(each) for key, each in value.items()}
    return {name: _digest(value)}


def _digest(value: Any) -> str:
    total = hashlib.sha256()
    _update(total, value)
    return total.hexdigest()[:_DIGITS]


def _update(total: Any, value: Any) -> None:
    """Tensors by type, shape and bytes, where any NaN is like any other: its bits are the CPU's affair."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.is_floating_point():
            value = torch.where(value.isnan(), torch.full_like(value, torch.nan), value)
        total.update(f"{value.dtype}{list(value.shape)}".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, tuple | list):
        total.update(f"[{len(value)}".encode())
        for each in value:
            _update(total, each)
    elif isinstance(value, dict):
        _update(total, [each for item in sorted(value.items()) for each in item])
    else:
        total.update(f"{json.dumps(value)};".encode())  # refuses what it does not know


# ---- comparing ------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What an environment's digests are against those of the file.

    Attributes:
        count: how many were compared.
        differences: a line each, which begins with the name of the digest.
        skipped: why nothing was compared, else empty.
    """

    count: int = 0
    differences: list[str] = field(default_factory=list)
    skipped: str = ""


def compare(environment: Environment, only: str = "*") -> Comparison:
    """Computes, unless the file has nothing to compare with."""
    held = _held().get(environment.section)
    if held is None:
        return Comparison(
            skipped=f"{FILE.name} holds nothing for [{environment.section}]; tools/golden.py says how to add it"
        )
    found = compute(environment, only)
    differences = [
        _difference(name, held.get(name), digest) for name, digest in found.items() if held.get(name) != digest
    ]
    missing = (name for name in held if name not in found and environment.computes(name, only))
    differences += [f"{name}: no longer computed" for name in missing]
    return Comparison(len(found), differences)


def _difference(name: str, held: str | None, found: str) -> str:
    if found.startswith(_ERROR):
        return f"{name}: {found}"
    return f"{name}: not in {FILE.name}" if held is None else f"{name}: {found}, was {held}"


@functools.cache
def _held() -> dict[str, Digests]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


# ---- commands -------------------------------------------------------------------------------------------------------


def check(chosen: list[Environment], only: str) -> int:
    """0 where nothing differs."""
    code = 0
    for environment in chosen:
        start = time.perf_counter()
        result = compare(environment, only)
        said = result.skipped or f"{result.count} digests, {len(result.differences)} differ"
        print(f"{environment.name}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
        for line in result.differences:
            print(f"  {line}", flush=True)
            code = 1
    return code


def write(chosen: list[Environment], only: str) -> int:
    """Takes what is computed for what must be. 1 where environments of one section do not agree; nothing is written then."""
    sections: dict[str, Digests] = {}
    wrong = []
    for environment in chosen:
        section = sections.setdefault(environment.section, {})
        for name, digest in compute(environment, only).items():
            if digest.startswith(_ERROR) or section.setdefault(name, digest) != digest:
                wrong.append(f"{environment.name}: {name}: {digest}, before {section.get(name)}")
    if wrong:
        print("nothing written; these differ between environments or fail:", *wrong, sep="\n  ")
        return 1
    whole = only == "*" and len(chosen) == len(environments())
    after = _merged(_held(), sections, whole)
    FILE.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
    print(
        f"{FILE.name}: {sum(map(len, sections.values()))} digests in {', '.join(sections)}; {len(after)} sections in all"
    )
    return 0


def _merged(before: dict[str, Digests], found: dict[str, Digests], whole: bool) -> dict[str, Digests]:
    """What the file holds then: where a digest has changed, those of other machines are of code that is no more."""
    changed = any(
        before.get(section, {}).get(name, digest) != digest
        for section in found
        for name, digest in found[section].items()
    )
    kept = {section: digests for section, digests in before.items() if section in (ANY, *found) or not changed}
    for section, digests in found.items():
        kept[section] = digests if whole else {**kept.get(section, {}), **digests}
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--check", action="store_true", help="compare; exit code 1 where a digest differs")
    todo.add_argument("--write", action="store_true", help=f"take what is computed for what must be in {FILE.name}")
    todo.add_argument(
        "--compute", metavar="ENVIRONMENT", help="print its digests; the variables must be set (internal)"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of cases, with wildcards")
    parser.add_argument("--environment", action="append", help="one of those that --check prints; may be repeated")
    arguments = parser.parse_args()
    known = {each.name: each for each in environments()}
    unknown = {*(arguments.environment or ()), arguments.compute} - {None, *known}
    if unknown:
        parser.error(f"no environment {', '.join(sorted(unknown))} here; there are {', '.join(known)}")
    if arguments.compute:
        print(json.dumps(_compute_here(known[arguments.compute], arguments.only)))
        return 0
    chosen = [known[name] for name in arguments.environment or known]
    return (check if arguments.check else write)(chosen, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
