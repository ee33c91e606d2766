"""The Python in docs/users.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qbert.errors import QBertError
from qbert.zoo import resolve_model

DOC = Path(__file__).resolve().parents[2] / "docs/users.md"


@pytest.mark.slow
def test_the_examples_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "sentence_transformers"):
        pytest.importorskip(package, reason=f"needs {package}; requirements.txt has it")
    try:
        resolve_model("minilm")
    except QBertError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.M | re.S):
        exec(compile(code, DOC.name, "exec"), namespace)
