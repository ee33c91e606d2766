"""What the code computes and saves has the bits that `golden.json` holds; `tools/golden.py` says what they depend on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import golden
import pytest
import torch

ENVIRONMENTS = {each.name: each for each in golden.environments()}
NATIVE = [name for name, each in ENVIRONMENTS.items() if each.section == golden.ANY]
# The best instruction set is last but for the run with two threads; the others must agree with it.
SLOW = {*NATIVE[:-2], "two_threads", "interpreted_more"}
MARKS = {"interpreted_few": [pytest.mark.interpreter], "interpreted_more": [pytest.mark.interpreter]}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[*MARKS.get(name, []), *([pytest.mark.slow] if name in SLOW else [])])
        for name in ENVIRONMENTS
    ],
)
def test_no_bit_has_changed(name: str) -> None:
    result = golden.compare(ENVIRONMENTS[name])
    if result.skipped:
        pytest.skip(result.skipped)
    assert not result.differences, "\n".join(result.differences)


# ---- the comparison itself ------------------------------------------------------------------------------------------


def test_a_digest_sees_every_bit_but_those_of_a_nan() -> None:
    x = torch.tensor([[1.0, 0.0, torch.nan]])
    same = x.view(torch.int32) ^ torch.tensor([0, 0, 1], dtype=torch.int32)
    assert golden._digest([x, None]) == golden._digest([same.view(torch.float32), None])
    others = [x[0], x.double(), x * torch.tensor([1.0, -1.0, 1.0]), x.nextafter(torch.tensor(9.0)), x.nan_to_num()]
    digests = {golden._digest([each, None]) for each in (x, *others)} | {golden._digest([x])}
    assert len(digests) == len(others) + 2
    with pytest.raises(TypeError):
        golden._digest(object())


def test_differences_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"rows/a": "1", "rows/b": "2", "rows/c#scale": "3", "others/a": "4", "torch/rows/a": "5"}
    found = {"rows/a": "1", "rows/b": "9", "rows/d": "7", "rows/e": "error: ValueError: no"}
    monkeypatch.setattr(golden, "compute", lambda environment, only: found)
    monkeypatch.setattr(golden, "_held", lambda: {golden.ANY: held})
    environment = golden.Environment("some", ("rows",), {})
    assert golden.compare(environment).differences == [
        "rows/b: 9, was 2",
        "rows/d: not in golden.json",
        "rows/e: error: ValueError: no",
        "rows/c#scale: no longer computed",
    ]
    assert "holds nothing for [other]" in golden.compare(dataclasses.replace(environment, section="other")).skipped


def test_write_keeps_other_machines_until_a_digest_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = {golden.ANY: {"linear/a": "1"}, "other": {"model/a": "2"}}
    monkeypatch.setattr(golden, "FILE", tmp_path / "golden.json")
    monkeypatch.setattr(golden, "_held", lambda: before)
    here = [golden.Environment("x", (), {}), golden.Environment("y", (), {}, section="here")]
    monkeypatch.setattr(golden, "environments", lambda: here)
    for digest, kept in (("1", True), ("3", False)):
        monkeypatch.setattr(golden, "compute", lambda environment, only, digest=digest: {"linear/a": digest})
        assert golden.write(here, "*") == 0
        assert ("other" in json.loads(golden.FILE.read_text())) is kept
    monkeypatch.setattr(golden, "compute", lambda environment, only: {"linear/a": environment.name})
    assert golden.write([here[0], dataclasses.replace(here[1], section=golden.ANY)], "*") == 1
