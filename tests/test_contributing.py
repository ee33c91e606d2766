"""The walks in CONTRIBUTING.md and the Python in README.md run as they stand."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_encoders import float_model, fused_model, hidden_of, padded_batch

from qbert import QBertError, Recipe, explain, formats, load, quantize_, save, unfuse_
from qbert.formats import INT8, PerGroup, PerRow, PerTensor, Role, Scheme, dictionary, integer
from qbert.ops import call
from qbert.testing import assert_matches_reference, random_problem

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


@pytest.fixture
def as_they_were():
    """What a walk adds to the tables of formats is not for other tests."""
    tables = (formats.FORMATS, formats.SCHEMES)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.mark.parametrize(
    ("heading", "code"), python_blocks("CONTRIBUTING.md"), ids=lambda text: text.split("\n")[0][:40]
)
def test_walk_runs_as_it_stands(heading, code, as_they_were):
    exec(compile(code, f"CONTRIBUTING.md: {heading}", "exec"), {})


def test_every_walk_is_there():
    assert [heading for heading, _ in python_blocks("CONTRIBUTING.md")] == [
        "Add a format",
        "Study a format",
        "Add a format that runs",
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
    monkeypatch.setattr(sys.modules["qbert.calibrate"], "DEFAULT_TEXTS", 8)  # for time
    namespace = {}
    for heading, code in python_blocks("README.md"):
        exec(compile(code, f"README.md: {heading}", "exec"), namespace)


@pytest.mark.slow
def test_the_page_of_formats_runs_as_it_stands(tmp_path, monkeypatch):
    """All of it, on the real model."""
    from qbert.zoo import resolve_model

    try:
        resolve_model("minilm")
    except QBertError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for heading, code in python_blocks("docs/formats.md"):
        exec(compile(code, f"docs/formats.md: {heading}", "exec"), namespace)


GOBO2 = Scheme("gobo2", dictionary(2), PerTensor(), None, frozenset({Role.LINEAR, Role.EMBEDDING}), "four centroids")
GOBO2A8 = Scheme("gobo2a8", dictionary(2), PerTensor(), INT8, frozenset({Role.LINEAR}), "four int8 centroids")
W2A8 = Scheme("w2a8", integer(2), PerRow(), INT8, frozenset({Role.LINEAR}), "2-bit rows")
W3A16 = Scheme("w3a16-g32", integer(3), PerGroup(32), None, frozenset({Role.LINEAR}), "3-bit groups")


@pytest.mark.parametrize("scheme", [GOBO2, GOBO2A8, W2A8, W3A16], ids=lambda scheme: scheme.name)
def test_a_new_format_runs_everywhere(scheme, as_they_were, tmp_path):
    """Two rows of data: the model is quantized, packed at its true bits, explained, saved, loaded and the same bits again."""
    formats.add_scheme(scheme)
    formats.add_scheme(GOBO2)
    fuse = scheme.activation is not None
    model = fused_model("BertModel", recipe=Recipe(scheme.name, "gobo2")) if fuse else None
    model = model or quantize_(float_model("BertModel"), Recipe(scheme.name, "gobo2"))
    explained = explain(model)
    linears = [row for row in explained.rows if row.scheme == scheme.name]
    assert linears
    assert all(row.kernel.startswith("torch") for row in linears)
    assert explained.encoders[0].fused == ("dynamic" if fuse else "no")
    assert all(
        row.bits_per_weight < scheme.weight_bits + 3.5 for row in linears
    )  # tiny matrices: scales and outliers count
    batch = padded_batch()
    hidden = hidden_of(model, **batch)
    save(model, tmp_path / "new")
    assert torch.equal(hidden_of(load(tmp_path / "new"), **batch), hidden)
    unfused = hidden_of(unfuse_(model), **batch)
    there = batch["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(unfused[there], hidden[there], dim=-1).min() > 0.98


@pytest.mark.parametrize("scheme", [GOBO2, GOBO2A8, W2A8, W3A16], ids=lambda scheme: scheme.name)
def test_a_new_formats_linear_is_its_references(scheme, as_they_were):
    formats.add_scheme(scheme)
    for bias, activation in ((True, "none"), (False, "gelu")):
        problem = random_problem("linear", 5, 24, 96, scheme=scheme.name, bias=bias, activation=activation)
        assert_matches_reference(problem, call(problem))


def test_a_scheme_is_not_replaced_by_another(as_they_were):
    formats.add_scheme(GOBO2)
    formats.add_scheme(GOBO2)  # the same again is nothing
    for name in ("w8a8", "gobo2", "w4a8-g64"):
        with pytest.raises(QBertError, match=rf"{name}.*known already"):
            formats.add_scheme(replace(W2A8, name=name))
    with pytest.raises(QBertError, match=r"dict2.*known already"):
        formats.add_scheme(replace(GOBO2, name="other", weight=replace(dictionary(2), bits=3)))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (replace(W2A8, activation=formats.INT4), "activations are int4; allowed: float"),
        (replace(GOBO2, granularity=PerRow()), "a dictionary is of the whole matrix"),
        (replace(GOBO2, weight=dictionary(8)), "at most 7 bits"),
        (replace(W2A8, granularity=PerTensor()), "one scale for a whole matrix"),
        (replace(W3A16, granularity=PerGroup(3)), "groups of 3; allowed: even"),
        (replace(W3A16, activation=INT8), "integers, made for int4 codes"),
        (replace(W2A8, weight=formats.NF4), "nf4 codes are no int8 operand"),
        (replace(W2A8, name="float"), "tables that are not quantized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_scheme_that_nothing_computes_is_refused(scheme, message, as_they_were):
    with pytest.raises(QBertError, match=message):
        formats.add_scheme(scheme)
