"""The user's own labelled file: TSV or JSONL, one (text, label) a line, errors with the line number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from qbert.errors import QBertError
from qbert.evaluate.datasets import Dataset, labelled_dataset

COLUMNS = ("text", "label")
MIN_CLASSES = 2


def read_user_file(path: str | Path) -> Dataset:
    """Read a labelled file in UTF-8.

    `.tsv`: two columns `text<TAB>label`, without quoting; a first line made of the two names in either order is a
    header. `.jsonl`: an object a line with `text` (a string) and `label` (a string, an integer or a boolean).

    Raises:
        QBertError: no such file, another ending, or a line that breaks the format (named by its number).
    """
    path = Path(path)
    readers = {".tsv": _tsv_rows, ".jsonl": _jsonl_rows}
    if path.suffix not in readers:
        raise QBertError(f"data file {path.name!r}: allowed are {' and '.join(readers)}, one (text, label) a line")
    if not path.is_file():
        raise QBertError(f"data file {str(path)!r} does not exist")
    dataset = labelled_dataset(path.name, readers[path.suffix](path))
    present = len(set(dataset.labels))
    if present < MIN_CLASSES:
        raise QBertError(f"data file {path.name!r} holds {len(dataset)} usable texts of {present} label(s), needed: 2")
    return dataset


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of the lines that are not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise QBertError(f"{path.name} line {number}: byte {raw[error.start]:#04x} is not UTF-8") from error
            if line.strip():
                yield number, line


def _tsv_rows(path: Path) -> Iterator[tuple[str, str]]:
    order = COLUMNS
    for number, line in _lines(path):
        cells = line.split("\t")
        if len(cells) != len(COLUMNS):
            raise QBertError(f"{path.name} line {number}: {len(cells)} column(s), needed: text<TAB>label")
        names = tuple(cell.strip().lower() for cell in cells)
        if number == 1 and set(names) == set(COLUMNS):
            order = (names[0], names[1])
            continue
        row = dict(zip(order, cells, strict=True))
        yield (row["text"], _checked_label(row["label"], path, number))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise QBertError(f"{path.name} line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise QBertError(f"{path.name} line {number}: {type(record).__name__}, needed: an object")
        missing = [name for name in COLUMNS if name not in record]
        if missing:
            raise QBertError(f"{path.name} line {number}: no {missing[0]!r}, needed: {' and '.join(COLUMNS)}")
        yield (_checked_text(record["text"], path, number), _checked_label(record["label"], path, number))


def _checked_text(text: object, path: Path, number: int) -> str:
    if not isinstance(text, str):
        raise QBertError(f"{path.name} line {number}: text is {type(text).__name__}, needed: a string")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can spell half a letter; tokenizers reject it
        raise QBertError(f"{path.name} line {number}: the text holds a lone surrogate, needed: whole characters")
    return text


def _checked_label(label: object, path: Path, number: int) -> str:
    if not isinstance(label, str | int):
        kind = type(label).__name__
        raise QBertError(f"{path.name} line {number}: label is {kind}, needed: a string or an integer")
    name = str(label).strip()
    if not name:
        raise QBertError(f"{path.name} line {number}: the label is empty")
    return name
