"""The survey's table measured again: rows on a tiny model, what two runs make of a row, and the page."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertModel

from benchmarks import published, survey
from benchmarks.machine import describe
from benchmarks.recorder import Recorder
from benchmarks.results_schema import Results, SurveyRow, SurveyScore, load_results
from qbert.compress import Compression
from qbert.errors import QBertError
from qbert.timing import Sample

SCORE = SurveyScore(
    task="trec", metric="accuracy", n=1000, float_score=86.0, score=84.2, change=-1.8, low=-3.7, high=0.1
)
TIME = Sample.of([0.02, 0.021, 0.022])


def row(system: str = "GOBO", **fields: object) -> SurveyRow:
    method = survey.METHODS[system]
    return SurveyRow(
        system=system, model="minilm", method=method.how, recipe=method.settings, share_of_float32=0.117, **fields
    )


def results(tmp_path, *rows: SurveyRow, date: str = "2026-11-30T10:00:00") -> Results:
    machine = describe("cpu").model_copy(
        update={"device": "A Processor, 2 threads", "isa": "avx2", "date": date, "commit": "abc1234"}
    )
    return Results(path=tmp_path / "a.json", machine=machine, rows=list(rows))


def test_every_method_is_of_the_table_and_can_be_done() -> None:
    systems = [each.system for each in published.TABLE]
    assert set(survey.METHODS) | set(survey.ELSEWHERE) <= set(systems)
    assert not set(survey.METHODS) & set(survey.ELSEWHERE)
    assert list(published.REPORTED) == systems
    for method in survey.METHODS.values():
        assert method.recipe or method.then
        if method.recipe:
            Compression(**method.recipe)
    assert not set(survey.TEXTS.split(",")) & set(survey.TASKS)  # nothing is scored on what a method has looked at


def test_the_published_figures_fit_their_changes() -> None:
    """Mean change over the reported tasks against the baseline, within what the table's own rounding and baselines leave."""
    for entry in published.TABLE:
        scores = published.REPORTED[entry.system].scores
        changes = [score - base for score, base in zip(scores, published.BERT_BASE, strict=True) if score is not None]
        if len(changes) == 4:
            assert sum(changes) / 4 == pytest.approx(entry.change, abs=0.75), entry.system


def test_gobo_is_a_tenth_of_a_model(monkeypatch) -> None:
    """Of one whose embeddings are a small part; scores and times left out."""
    config = BertConfig(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=512, vocab_size=400,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config).eval()
    lab = survey.Lab("tiny", ["trec"], scored=False, timed=False)
    lab._parts |= {"model": model, "tokenizer": None, "texts": []}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = survey.run(lab, "GOBO")
    assert made.reason is None
    assert 0.09 < made.share_of_float32 < 0.16
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())  # the next row's original
    timed = survey.Lab("tiny", ["trec"], scored=False)
    timed._parts |= lab._parts
    monkeypatch.setattr(survey, "_SECONDS", 0.05)
    monkeypatch.setattr(survey, "SEQ", 16)
    found = survey.run(timed, "GOBO")
    assert found.reason is None
    assert found.speedup == pytest.approx(found.float_time.median / found.time.median, rel=0.5)


def test_what_cannot_be_done_is_a_row_with_its_reason() -> None:
    lab = survey.Lab("tiny", ["trec"], scored=False, timed=False)
    lab._parts |= {"model": BertModel(BertConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, vocab_size=50)),
                   "tokenizer": None, "texts": []}  # fmt: skip
    made = survey.run(lab, "DistilBERT")
    assert made.share_of_float32 is None
    assert made.reason == "QBertError: no tokenizer beside the model (''); pass tokenizer="


def test_the_newest_scores_and_the_newest_times_make_a_row(tmp_path) -> None:
    scored = results(tmp_path, row(scores=[SCORE]))
    timed = results(tmp_path, row(time=TIME, float_time=TIME, speedup=2.0), date="2026-12-01T10:00:00")
    found = survey.merged([timed, scored])["A Processor (avx2)", "GOBO"]
    assert (found.scores, found.speedup, found.time) == ([SCORE], 2.0, TIME)
    other = row(time=TIME).model_copy(update={"recipe": {"then": "gobo4"}})  # of another recipe: nothing is kept
    assert (
        survey.merged([scored, results(tmp_path, other, date="2026-12-02")])["A Processor (avx2)", "GOBO"].scores == []
    )


def test_the_page_has_every_row(tmp_path) -> None:
    page = survey.page(
        [results(tmp_path, row(scores=[SCORE], time=TIME, speedup=2.13), row("EdgeBERT", reason="no texts"))]
    )
    lines = page.splitlines()
    assert all(any(line.startswith(f"| {each.kind} | {each.system} |") for line in lines) for each in published.TABLE)
    gobo = next(line for line in lines if "| GOBO |" in line)
    assert "| 10.2 | 1x | 1x | 83.7 / - / - / - | -0.90 |" in gobo
    assert gobo.endswith("| 11.7 | 21.0 | 2.13x | -1.8 [-3.7, +0.1] |")
    columns = {line.count("|") for line in lines if line.startswith("| ")}
    assert len(columns) == 1  # Markdown's tables drop what stands in too few cells
    assert "| not here |" in next(line for line in lines if "| RPP |" in line)
    assert "not measured yet" in next(line for line in lines if "| Q-BERT |" in line)
    assert "EdgeBERT: no texts" in lines
    with pytest.raises(QBertError, match="no row of the survey is stored"):
        survey.page([])


def test_rows_are_stored_and_read(tmp_path) -> None:
    recorder = Recorder("survey", {}, tmp_path / "rows.json")
    recorder.add(row(scores=[SCORE], time=TIME, float_time=TIME, speedup=1.0))
    assert load_results(tmp_path / "rows.json").of(SurveyRow)[0].scores == [SCORE]


def test_the_page_in_docs_is_that_of_what_is_stored() -> None:
    files = survey.stored()
    assert files
    assert (survey.SURVEYS.parents[1] / "docs/survey.md").read_text() == survey.page(files)
