"""Studies of formats on a tiny model: what they measure, that they go on where they were killed, and what they write."""

import json
import re

import pytest
import torch
from rich.console import Console

import qbert
from qbert import QBertError, formats
from qbert.evaluate import load_fp32, task_data
from qbert.formats import block_format, get_format
from qbert.metrics import sqnr_db
from qbert.study import plan_points, plot, run, run_study, to_html, to_table
from qbert.study.measure import emulated_copy, stored
from qbert.study.report import from_html, pareto

NAMES = ("mxfp8", "mxfp4", "gobo3")


@pytest.fixture(scope="module")
def task(made_up_dataset):
    return task_data(made_up_dataset(120), n_test=40)


@pytest.fixture(scope="module")
def study(tiny_folder, task, tmp_path_factory):
    chosen = [get_format(name) for name in NAMES]
    store = tmp_path_factory.mktemp("store")
    return run_study(str(tiny_folder), chosen, [task], sites=["weights", "activations"], store=store)


def test_what_is_measured(study, tiny_folder):
    by_name = {point.name: point for point in study.points}
    assert list(by_name) == list(NAMES)
    mxfp8, mxfp4, gobo3 = by_name.values()
    assert mxfp8.sites == ["weights", "activations"]
    assert (gobo3.sites, list(gobo3.left_out)) == (["weights"], ["activations"])
    assert (mxfp8.bits_per_weight, mxfp4.bits_per_weight) == (8.25, 4.25)
    assert mxfp8.hidden_sqnr_db > mxfp4.hidden_sqnr_db + 6
    assert mxfp8.cosine_mean > mxfp4.cosine_mean > mxfp4.cosine_min
    linears = set(mxfp4.weight_sqnr_db)
    assert len(linears) == 13
    assert {each.module for each in mxfp4.sensitivity} == linears
    assert {each.layer for each in mxfp4.sensitivity} == {"encoder.layer.0", "encoder.layer.1", ""}
    pooler = next(each for each in mxfp4.sensitivity if each.module == "pooler.dense")
    assert pooler.sqnr_db is None  # nothing of it is in the last hidden states
    assert set(mxfp4.activation_sqnr_db) < linears
    assert gobo3.activation_sqnr_db == {}
    assert mxfp4.worst[0] in linears
    weight = load_fp32(str(tiny_folder)).get_submodule("pooler.dense").weight.detach()
    scheme = formats.emulated_scheme(get_format("mxfp4"))
    from qbert.quantizers import quantize
    from qbert.weight.codec import decode

    assert mxfp4.weight_sqnr_db["pooler.dense"] == sqnr_db(weight, decode(quantize(weight, scheme)))
    for point in study.points:
        change = point.results[0].comparison
        assert change.drop_interval[0] <= change.drop <= change.drop_interval[1]


def test_one_part_alone_leaves_the_model_as_it_was(study, tiny_folder, task):
    """The float reference after all parts were exchanged is that of a model that nobody touched."""
    from qbert.evaluate import load_tokenizer, prepare_baseline

    fresh = prepare_baseline(load_fp32(str(tiny_folder)), load_tokenizer(str(tiny_folder)), task)
    assert fresh.score == study.reference.results[0].score


def test_bytes_are_those_of_a_file(study, tiny_folder, tmp_path):
    from safetensors.torch import load_file

    model = load_fp32(str(tiny_folder))
    for name, point in zip(NAMES, study.points, strict=True):
        emulated = emulated_copy(model, qbert.emulate(name))
        qbert.save(emulated, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert point.model_bytes == stored(emulated).model_bytes == sum(each.nbytes for each in tensors.values())


def test_a_study_that_was_killed_goes_on(tiny_folder, task, tmp_path, monkeypatch):
    chosen = [get_format(name) for name in ("int8", "int4", "nf4")]
    measured = []

    def measure(model, tokenizer, point, *rest, **named):
        if len(measured) == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        measured.append(point.fmt.name)
        return original(model, tokenizer, point, *rest, **named)

    original = run.measure_point
    monkeypatch.setattr(run, "measure_point", measure)
    arguments = {"store": tmp_path / "store", "by_part": False}
    with pytest.raises(KeyboardInterrupt):
        run_study(str(tiny_folder), chosen, [task], **arguments)
    done = run_study(str(tiny_folder), chosen, [task], **arguments)
    assert measured == ["int8", "int4", "nf4"]
    assert (done.resumed, [point.name for point in done.points]) == (1, ["int8", "int4", "nf4"])
    run_study(str(tiny_folder), chosen[:1], [task], sites=["weights", "activations"], **arguments)
    assert measured[3:] == ["int8"]  # another site is another point
    changed = block_format("int8", "int8", rounding="toward_zero")
    run_study(str(tiny_folder), [changed], [task], **arguments)
    assert measured[4:] == ["int8"]  # and so is another format of that name
    for file in (tmp_path / "store").iterdir():
        file.write_text(file.read_text()[:-20])
    run_study(str(tiny_folder), chosen[:1], [task], **arguments)
    assert measured[5:] == ["int8"]  # a damaged file is nobody's result


def test_a_page_is_whole_and_runs_nothing(study, tmp_path):
    plot(study, tmp_path / "study.html")
    page = (tmp_path / "study.html").read_text()
    assert from_html(page) == study
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="application/json" id="study">']
    assert "encoder.layer.1" in page


def test_names_cannot_write_into_the_page(study):
    evil = "</script><script>alert(1)</script>"
    changed = study.model_copy(update={"points": [study.points[0].model_copy(update={"name": evil})], "model": evil})
    page = to_html(changed)
    assert "<script>alert" not in page
    assert from_html(page) == changed


def test_the_front_is_what_no_other_beats(study):
    front = pareto(study, lambda point: point.cosine_mean)
    assert [each.name for each in front][-1] == "mxfp8"
    assert [each.model_bytes for each in front] == sorted(each.model_bytes for each in front)
    plain = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    plain.print(to_table(study))
    assert "gobo3 (weights)" in plain.export_text()


def test_all_sites_and_a_format_of_ones_own(tiny_folder, task, tmp_path):
    mine = block_format("mine", formats.minifloat("f5", 2, 2), "e8m0", 16)
    sites = ["weights", "embeddings", "activations", "attention", "norms", "gelu"]
    done = run_study(str(tiny_folder), [mine], [task], sites=sites, store=tmp_path)
    point = done.points[0]
    assert point.bits_per_weight == 5.5
    assert "embeddings.word_embeddings" in point.weight_sqnr_db
    attention = "encoder.layer.1.attention.self"
    assert {name for name in point.attention_sqnr_db if name.startswith(attention)} == {
        f"{attention}.{operand}" for operand in ("query", "key", "probabilities", "value")
    }
    assert all(10 < value < 40 for value in point.attention_sqnr_db.values())
    parts = {each.module: each.sqnr_db for each in point.sensitivity}
    assert parts[attention] > point.hidden_sqnr_db
    assert torch.isfinite(torch.tensor(point.hidden_sqnr_db))
    assert json.loads(done.model_dump_json())["points"][0]["format"]["element"]["mantissa_bits"] == 2


@pytest.mark.parametrize(
    ("chosen", "sites", "message"),
    [
        ([], ["weights"], "no format to study; allowed: at least one"),
        (["int4"], ["biases"], "site 'biases'; allowed once each: weights"),
        (["int4"], ["weights", "weights"], "site 'weights'; allowed once each"),
        (["gobo3"], ["activations"], "gobo3 is for none of the sites activations: a dictionary"),
    ],
)
def test_what_is_refused_and_how(chosen, sites, message):
    with pytest.raises(QBertError, match=message):
        plan_points([get_format(name) for name in chosen], sites)
    with pytest.raises(QBertError, match="two formats are called 'int4'"):
        plan_points([get_format("int4"), block_format("int4", "int4", rounding="toward_zero")])


def test_the_command(tiny_folder, made_up_dataset, tmp_path):
    """With a user's own file of a format, and one of texts."""
    from typer.testing import CliRunner

    from qbert.cli import app

    data = made_up_dataset(60)
    rows = [f"{text}\t{data.label_names[label]}" for text, label in zip(data.texts, data.labels, strict=True)]
    (tmp_path / "mine.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    (tmp_path / "mine.py").write_text("from qbert import formats\nposit6 = formats.posit('p6', 6, 1)\n")
    arguments = [
        "study",
        str(tiny_folder),
        "--format",
        f"{tmp_path}/mine.py:posit6",
        "--sweep",
        "element=int4 block=16,32",
    ]
    rest = ["--data", str(tmp_path / "mine.tsv"), "--no-parts", "--plot", str(tmp_path / "study.html"), "--json"]
    done = CliRunner().invoke(app, [*arguments, *rest])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [point["name"] for point in found["points"]] == ["posit6", "int4/16", "int4/32"]
    assert [point["name"] for point in from_html((tmp_path / "study.html").read_text()).model_dump()["points"]] == [
        point["name"] for point in found["points"]
    ]
