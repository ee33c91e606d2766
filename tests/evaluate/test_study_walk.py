"""docs/study.md's chip, as it stands there: read, modelled, and studied by the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from qbert.cli import app
from qbert.cost import Formats, encoder_cost, parse_hardware, read_work
from qbert.formats import get_format
from qbert.study.report import from_html

DOC = Path(__file__).resolve().parents[2] / "docs/study.md"


@pytest.fixture(scope="module")
def chip() -> str:
    found = re.findall(r"^```toml\n(.*?)^```", DOC.read_text(), re.M | re.S)
    assert len(found) == 1
    return found[0]


def test_what_the_walk_says_of_its_chip(chip: str) -> None:
    target = parse_hardware(chip)
    with torch.device("meta"):
        work = read_work(BertModel(BertConfig()))
    formats = {name: get_format(name) for name in ("mxfp4", "nvfp4", "nf4", "int8")}
    costs = {
        name: encoder_cost(work, target, Formats(weights=fmt, activations=get_format("mxfp8")))
        for name, fmt in formats.items()
    }
    linears = {
        name: {each.runs_as for each in cost.operations if each.kind == "linear"} for name, cost in costs.items()
    }
    assert linears["mxfp4"] == linears["nvfp4"] == {"fp4 x fp8"}
    assert linears["nf4"] == {"bf16 x bf16"}
    assert costs["mxfp4"].ms < costs["nf4"].ms / 2
    assert "weights nf4: no unit takes it here; decoded to bf16, rounded to it" in costs["nf4"].notes
    assert costs["mxfp4"].mj < costs["int8"].mj
    assert target.assumptions


def test_the_command_of_the_walk(chip: str, tiny_folder: Path, made_up_dataset, tmp_path: Path) -> None:
    data = made_up_dataset(60)
    rows = [f"{text}\t{data.label_names[label]}" for text, label in zip(data.texts, data.labels, strict=True)]
    (tmp_path / "mine.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    (tmp_path / "chip.toml").write_text(chip)
    page = tmp_path / "chip.html"
    arguments = ["study", str(tiny_folder), "--format", "mxfp4", "--format", "nf4", "--data", str(tmp_path / "mine.tsv"),
                 "--no-parts", "--sites", "weights,activations", "--store", str(tmp_path / "store"), "--batch", "2",
                 "--seq", "32", "--target", str(tmp_path / "chip.toml"), "--target", "amx", "--plot", str(page)]  # fmt: skip
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [each["name"] for each in found["targets"]] == ["chip", "amx"]
    for costs in (found["reference"]["costs"], *(point["costs"] for point in found["points"])):
        assert [(each["target"], each["batch"], each["tokens"]) for each in costs] == [("chip", 2, 64), ("amx", 2, 64)]
        assert all(each["ms"] > 0 and each["mj"] > 0 and 0 < each["utilization"] <= 1 for each in costs)
    assert found["beside"]  # stored results of that CPU
    html = page.read_text()
    assert from_html(html).model_dump(mode="json")["targets"] == found["targets"]
    for shown in (
        "modelled ms on chip",
        "chip\nms",
        "amx\nbound",
        "step by step",
        "by layer",
        "assumption: a sketch",
        "measured ms",
    ):
        assert shown in html or shown.replace("\n", "&#10;") in html
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert "modelled" in again.output
    assert "no unit" in again.output


def test_a_chip_with_a_mistake_is_one_line(chip: str, tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from qbert.cli import main

    path = tmp_path / "chip.toml"
    path.write_text(chip.replace("units = 8", "unit = 8"))
    monkeypatch.setattr("sys.argv", ["qbert", "study", str(tiny_folder), "--format", "mxfp4", "--target", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "array.units: Field required" in said
    assert "array.unit: no such entry" in said
    assert said.count("\n") == 1
