"""The walks in CONTRIBUTING.md and the Python in README.md run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(file: str) -> list[tuple[str, str]]:
    """(heading, code) of each Python block."""
    blocks, heading = [], ""
    for match in re.finditer(r"^(#+ [^\n]*)$|^```python\n(.*?)^```$", (ROOT / file).read_text(), re.M | re.S):
        if match.group(1):
            heading = match.group(1).lstrip("# ")
        else:
            blocks.append((heading, match.group(2)))
    return blocks


@pytest.mark.parametrize(
    ("heading", "code"), python_blocks("CONTRIBUTING.md"), ids=lambda text: text.split("\n")[0][:40]
)
def test_walk_runs_as_it_stands(heading, code):
    exec(compile(code, f"CONTRIBUTING.md: {heading}", "exec"), {})


def test_every_walk_is_there():
    assert [heading for heading, _ in python_blocks("CONTRIBUTING.md")] == [
        "Add a format",
        "Add a quantizer",
        "Add a kernel",
    ]


def test_readme_python_runs_as_it_stands(tmp_path, monkeypatch):
    """In one namespace, as a reader would type it, in a folder of its own."""
    from qbert.errors import QBertError
    from qbert.zoo import resolve_model

    try:
        resolve_model("minilm")
    except QBertError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for heading, code in python_blocks("README.md"):
        exec(compile(code, f"README.md: {heading}", "exec"), namespace)
