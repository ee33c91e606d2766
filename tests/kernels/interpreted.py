"""Runs Triton kernels in Triton's interpreter: it is chosen when a kernel is decorated, so it needs a process of its own.

A test file calls `run("module:function", cases)`: the function is imported in one such process, is called with each case, and
what it raises is raised here. Many cases share a process because starting one takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_CHILD = """
import importlib, json, sys, traceback
module, _, name = sys.argv[1].partition(":")
function = getattr(importlib.import_module(module), name)
for case in json.load(sys.stdin):
    try:
        function(*case) if isinstance(case, list) else function(**case)
    except BaseException:
        print(f"case {case}", file=sys.stderr)
        traceback.print_exc()
        sys.exit(1)
"""


def run(function: str, cases: Sequence[Sequence[Any] | dict[str, Any]], timeout: float = 600) -> None:
    """Calls ``"module:function"`` (a module beside this file) with each case, of JSON values, under TRITON_INTERPRET=1."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_HERE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, function], input=json.dumps(list(cases)), env=environment, text=True,
        capture_output=True, timeout=timeout, cwd=_HERE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
