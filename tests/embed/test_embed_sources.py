"""Files of texts: every kind gives the same rows in the same order, and a row that is none is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from qbert import QBertError
from qbert.embed import Source

TEXTS = ["one, with a comma", "zwei", 'a "quoted" one', "", "τέσσερα"]
IDS = ["a", "b", "c", "d", "e"]


def write(path: Path, texts: list[str] = TEXTS, ids: list[str] = IDS) -> Path:
    """A file of the kind that its ending says."""
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in zip(ids, texts, strict=True)))
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'qbert[embed]'")
        import pyarrow.parquet as parquet

        parquet.write_table(arrow.table({"id": ids, "text": texts}), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            rows.writerow(["id", "text"])
            rows.writerows(zip(ids, texts, strict=True))
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    source = Source(write(tmp_path / f"in.{kind}"), id_column=None if kind == "txt" else "id")
    assert [row.text for row in source.rows()] == TEXTS
    assert [row.id for row in source.rows(skip=2)] == ([None] * 3 if kind == "txt" else IDS[2:])
    (scan,) = source.scan()
    assert scan.rows == len(TEXTS)
    assert not scan.integer_ids


def test_a_folder_is_read_by_its_files_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [name, name])
    (tmp_path / "_SUCCESS").touch()
    source = Source(tmp_path)
    assert [row.text for row in source.rows()] == ["a.txt", "a.txt", "b.txt", "b.txt", "c/a.txt", "c/a.txt"]
    assert [row.text for row in source.rows(skip=3)] == ["b.txt", "c/a.txt", "c/a.txt"]
    assert [scan.name for scan in source.scan()] == ["a.txt", "b.txt", "c/a.txt"]


def test_lines_end_where_users_end_them(tmp_path: Path) -> None:
    """Not at every character that Unicode calls a line's end, nor before a carriage return."""
    (tmp_path / "in.txt").write_bytes("\ufeffone\u2028still\r\ntwo\x0b2\n\nfour".encode())
    assert [row.text for row in Source(tmp_path / "in.txt").rows()] == ["one\u2028still", "two\x0b2", "", "four"]


def test_a_cell_may_hold_lines_and_be_long(tmp_path: Path) -> None:
    texts = ["two\nlines", "x" * 200_000]
    assert [row.text for row in Source(write(tmp_path / "in.csv", texts, ["a", "b"])).rows()] == texts


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("in.jsonl", b'{"text": "a"}\n{"text": 3}\n', "in.jsonl line 2: 'text' is int; allowed: a string"),
        ("in.jsonl", b'{"text": "a"}\n{"text": null}\n', "in.jsonl line 2: 'text' is missing; allowed: a string"),
        ("in.jsonl", b'{"words": "a"}\n', "in.jsonl line 1: no column 'text'; it has 'words'"),
        ("in.jsonl", b"[1]\n", "in.jsonl line 1: list; allowed: an object"),
        ("in.jsonl", b'{"text": "a"\n', "in.jsonl line 1: not JSON"),
        ("in.jsonl", b'{"text": "\\ud800"}\n', "in.jsonl line 1: 'text' holds a lone surrogate"),
        ("in.csv", b"a,text\n1\n", "in.csv line 2: 'text' is missing"),
        ("in.csv", b"a,b\n1,2\n", "in.csv line 2: no column 'text'; it has 'a', 'b'"),
        ("in.txt", b"a\n\xff\n", "in.txt: byte 0xff is not UTF-8"),
        ("in.txt", b"", "has no text in it"),
        ("in.pdf", b"a", "allowed are .jsonl, .csv, .tsv, .parquet, .txt"),
        ("in.parquet", b"PAR0", "in.parquet: not Parquet"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'qbert[embed]'")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QBertError) as error:
        Source(tmp_path / name).scan()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (Source(Path("nowhere.txt")), "does not exist"),
        (Source(Path("in.txt"), id_column="id"), "lines of .txt have none"),
        (Source(Path("in.jsonl"), id_column="text"), None),
        (Source(Path("in.jsonl"), id_column="nope"), "no column 'nope'"),
        (Source(Path("empty")), "has no file in it"),
    ],
)
def test_what_is_asked_for_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Source, says: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(Path("in.txt"))
    write(Path("in.jsonl"))
    if says is None:
        assert source.scan()[0].rows == len(TEXTS)
        return
    with pytest.raises(QBertError, match=says):
        source.scan()


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "in.parquet").touch()
    with pytest.raises(QBertError, match=r"pip install 'qbert\[embed\]'"):
        Source(tmp_path / "in.parquet").scan()
