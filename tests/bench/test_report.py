"""The page from stored results: the same bytes each time, nothing left out, and only what the files say."""

import re
from io import BytesIO

import pytest
from test_results_schema import MACHINE

from benchmarks import plots, report
from benchmarks.bounds import Bounds
from benchmarks.results_schema import (
    RESULTS,
    AccuracyRow,
    AttentionRow,
    BertRow,
    CeilingRow,
    GemmRow,
    QuantizeRow,
    ResultsWriter,
    StepRow,
    SystemRow,
    TestsRow,
    TileRow,
    Work,
    load_results,
)
from qbert.errors import MissingDependency, QBertError
from qbert.timing import Sample

PNG = b"\x89PNG"


def time(seconds):
    return Sample.of([seconds * factor for factor in (0.99, 1.0, 1.01)], how="clock")


def gemm(name, t, seconds, speedup, **more):
    work = Work(operations=2.0 * t * 64 * 32, precision="int8", bytes=64.0 * 32)
    library = name.split()[0]
    return GemmRow(name=name, library=library, regime="cold", t=t, n=64, k=32, time=time(seconds), baseline="torch bf16",
                   speedup=speedup, work=work, **more)  # fmt: skip


ROWS = [
    TestsRow(suite="gpu", passed=3, failed=1, failures=["test_x: 1 != 2"]),
    TestsRow(suite="memcheck", complete=False),
    StepRow(name="tune", status="skipped", reason="too little time"),
    CeilingRow(device="cuda", quantity="copy", per_second=3e12, datasheet=3.35e12),
    CeilingRow(device="cuda", quantity="int8", per_second=1.5e15),
    CeilingRow(device="cuda", quantity="fp8", reason="not here"),
    *(gemm("torch bf16", t, 4e-6, 1.0) for t in (1, 16)),
    *(gemm("torch fp8", t, 2e-6, 2.0) for t in (1, 16)),
    gemm("qbert w8a8", 1, 1e-6, 4.0), gemm("qbert w8a8", 16, 3e-6, 1.33), gemm("qbert w4a8", 16, 8e-6, 0.5),
    GemmRow(name="gemlite", library="gemlite", regime="cold", t=1, n=64, k=32, reason="needs n | 128"),
    AttentionRow(name="qbert int8", library="qbert", batch=8, heads=12, head_dim=64, length=128, tokens=900, ragged=True,
                 padding="not computed", time=time(1e-5), work=Work(operations=1e6, precision="int8", bytes=1e4)),
    SystemRow(name="torch-bf16", library="torch", model="base", configuration="eager", weight_bytes=10**8),
    SystemRow(name="openvino", library="openvino", model="base", configuration="x", reason="not installed"),
    *(BertRow(name=name, library=name.split("-")[0], model="base", random_weights=True, case=case, batch=8, width=128,
              tokens=tokens, padding_share=share, time=time(seconds), baseline="torch-bf16", speedup=1e-2 / seconds)
      for name, seconds in (("torch-bf16", 1e-2), ("qbert-w8a8", 5e-3))
      for case, tokens, share in (("8x128", 1024, 0.0), ("1x16", 16, 0.0), ("ragged8", 500, 0.5))),
    QuantizeRow(model="minilm", scheme="w8a8", bits_per_weight=8.05, share_of_float32=0.25, seconds=1.0),
    AccuracyRow(model="base", task="MNLI", name="GOBO", library="paper", drop=0.009, published=True, source="MICRO 2020"),
    TileRow(operation="w8a8_linear", t=1, n=64, k=32, tile={"road": "tma"}, time=time(1e-6), chosen=True, speedup=1.1),
]  # fmt: skip


@pytest.fixture
def results(tmp_path):
    writer = ResultsWriter(tmp_path / "2026-11-22-abc1234.json", MACHINE)
    for row in ROWS:
        writer.add(row)
    return load_results(writer.path)


def table(text, heading):
    """Rows of the first table after a heading, by their first cell."""
    lines = text.split(heading, 1)[1].split("\n\n")
    rows = next(part for part in lines if part.startswith("|")).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def test_markdown_has_every_kind_of_row(results, tmp_path):
    written = report.write_report([results], tmp_path / "docs" / "benchmarks.md")
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    for heading in ("Tests and steps", "Measured ceilings", "BERT: base", "Linears", "Attention", "Quantizing", "Accuracy",
                    "Tiles"):  # fmt: skip
        assert f"### {heading}\n" in text
    for said in ("test_x: 1 != 2", "stopped before its end", "too little time", "not here", "openvino: not installed",
                 "A Processor", "abc1234+", "2026-11-22T10:00:00", "published: MICRO 2020", "road=tma"):  # fmt: skip
        assert said in text
    linked = set(re.findall(r"\]\(figures/(.+?)\)", text))
    assert linked == {path.name for path in written if path.suffix == ".png"}
    assert len(linked) == 6
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(PNG)
            assert path.stat().st_size < 200_000


def test_losers_stay_and_are_marked(results):
    rows = table(report.to_markdown(report.page([results])), "#### 64 x 32")
    assert rows["qbert w8a8"]["1"].startswith("**1 ±")
    assert rows["qbert w8a8"]["16"].endswith("▼")  # faster than the baseline, slower than a peer
    assert rows["qbert w4a8"]["16"].endswith("▼")
    assert rows["torch fp8"]["16"].startswith("**2 ±")
    assert "▼" not in rows["torch bf16"]["1"]
    assert rows["qbert w4a8"]["1"] == rows["gemlite"]["1"] == "-"
    assert "gemlite, 1 tokens: needs n / 128" not in rows
    assert "- gemlite, 1 tokens: needs n | 128" in report.to_markdown(report.page([results]))


def test_shares_are_of_the_measured_ceilings(results):
    rows = table(report.to_markdown(report.page([results])), "#### 64 x 32")
    least = max(2.0 * 64 * 32 / 1.5e15, 64 * 32 / 3e12)
    assert rows["qbert w8a8"]["1"] == f"**1 ±0% 4.00x {least / 1e-6:.0%}**"


def test_the_same_files_give_the_same_bytes(results, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    results = results.model_copy(update={"rows": [row for row in results.rows if not isinstance(row, GemmRow)]})
    for suffix in report.SUFFIXES:
        one = report.write_report([results], first / f"page{suffix}")
        two = report.write_report([results.model_copy(deep=True)], second / f"page{suffix}")
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_html_holds_everything(results, tmp_path):
    assert report.write_report([results], tmp_path / "page.html") == [tmp_path / "page.html"]
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png;base64,") == 6
    assert "<b>1 ±0% 4.00x" in text
    assert "needs n | 128" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_text_of_results_cannot_break_the_page(tmp_path):
    writer = ResultsWriter(tmp_path / "r.json", MACHINE)
    writer.add(QuantizeRow(model="<script>|x", scheme="w8a8"))
    blocks = report.page([load_results(writer.path)])
    assert "<script>" not in report.to_html(blocks)
    assert "| <script>/x |" in report.to_markdown(blocks)


def test_bad_input_is_named(results, tmp_path, monkeypatch):
    with pytest.raises(QBertError, match=r"report '.*page\.pdf': allowed are \.md and \.html"):
        report.write_report([results], tmp_path / "page.pdf")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"pip install 'qbert\[plot\]'"):
        report.write_report([results], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_nothing_to_draw_is_said():
    for draw in (plots.speedup_bars, plots.gemm_speedups, plots.latency_by_tokens, plots.bert_latency):
        with pytest.raises(QBertError, match="nothing to draw"):
            draw([], BytesIO())
    with pytest.raises(QBertError, match="nothing to draw"):
        plots.roofline([], Bounds({}), BytesIO())


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_of_all_kinds(tmp_path, results, suffix):
    path = tmp_path / "new" / f"x.{suffix}"
    plots.latency_by_tokens(results.of(GemmRow), path)
    first = path.read_bytes()
    plots.latency_by_tokens(results.of(GemmRow), path)
    assert path.read_bytes() == first
    with pytest.raises(QBertError, match="not supported"):
        plots.latency_by_tokens(results.of(GemmRow), tmp_path / "x.bmpp")


def test_the_committed_page_is_that_of_the_committed_results():
    """The text only: pictures' bytes change with matplotlib."""
    files = [load_results(path) for path in sorted(RESULTS.rglob("*.json"))]
    page = RESULTS.parents[1] / "docs/benchmarks.md"
    assert page.read_text() == report.to_markdown(report.page(files))
