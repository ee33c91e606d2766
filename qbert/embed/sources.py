"""Texts of files, a row at a time, always in the same order: a file of lines or rows, or a folder of such files."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from qbert.errors import MissingDependency, QBertError
from qbert.zoo import sha256_of_file

DEFAULT_COLUMN = "text"
_HIDDEN = (".", "_")  # what other programs leave in folders of theirs: .crc, _SUCCESS
_READ_ROWS = 4096
_SURROGATES = ("\ud800", "\udfff")


class Row(NamedTuple):
    """A text, and its id where a column of ids was named."""

    text: str
    id: str | int | None = None


@dataclass(frozen=True)
class FileScan:
    """A file as it was when it was looked through.

    Attributes:
        name: in the folder.
        sha256: of its bytes.
        rows: of texts.
        integer_ids: whether every id is an integer of 64 bits.
    """

    name: str
    bytes: int
    sha256: str
    rows: int
    integer_ids: bool


@dataclass(frozen=True)
class Source:
    """Where texts stand.

    Attributes:
        path: .jsonl, .csv, .tsv, .parquet or .txt, or a folder of them, whose files are taken by their names' order.
        column: with the texts; of no meaning for .txt, where each line is one.
        id_column: whose strings or integers go beside the vectors; None for none.
    """

    path: Path
    column: str = DEFAULT_COLUMN
    id_column: str | None = None

    def files(self) -> list[Path]:
        """
        Raises:
            QBertError: nothing there, or a file of another kind.
        """
        if self.path.is_file():
            found = [self.path]
        elif self.path.is_dir():
            inside = (file for file in self.path.rglob("*") if file.is_file())
            found = sorted(file for file in inside if not _is_hidden(file.relative_to(self.path)))
        else:
            raise QBertError(f"{str(self.path)!r} does not exist; allowed: a file or a folder of texts")
        for file in found:
            if file.suffix not in _READERS:
                raise QBertError(f"{str(file)!r}: allowed are {', '.join(_READERS)}, or a folder of them")
        if not found:
            raise QBertError(f"folder {str(self.path)!r} has no file in it; allowed: {', '.join(_READERS)}")
        if self.id_column is not None and any(file.suffix == ".txt" for file in found):
            raise QBertError(f"id column {self.id_column!r}: lines of .txt have none; allowed: other kinds of files")
        return found

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """All rows from number `skip` on, counted through all files from 0.

        Raises:
            QBertError: a row that is none; the message names its file and line.
        """
        every = (row for file in self.files() for row in _READERS[file.suffix](file, self))
        return islice(every, skip, None)

    def scan(self, progress: Callable[[int], None] | None = None) -> list[FileScan]:
        """Reads every row once, so that a bad one is known before anything is computed.

        Args:
            progress: called with the rows seen so far.
        """
        scans, seen = [], 0
        for file in self.files():
            rows, integers = 0, True
            for rows, row in enumerate(_READERS[file.suffix](file, self), start=1):
                integers = integers and isinstance(row.id, int) and -(2**63) <= row.id < 2**63
                if progress and rows % _READ_ROWS == 0:
                    progress(seen + rows)
            seen += rows
            name = file.name if self.path.is_file() else str(file.relative_to(self.path))
            scans.append(FileScan(name, file.stat().st_size, sha256_of_file(file), rows, integers))
        if not seen:
            raise QBertError(f"{str(self.path)!r} has no text in it")
        return scans


def pyarrow(module: str = "pyarrow") -> Any:
    """A module of pyarrow, which files of the kind .parquet need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependency(".parquet needs pyarrow, which is not installed: pip install 'qbert[embed]'") from None


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(_HIDDEN) for part in name.parts)


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as opened:
            for line in opened:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise QBertError(f"{file.name}: byte {error.object[error.start]:#04x} is not UTF-8") from None


def _of_txt(file: Path, source: Source) -> Iterator[Row]:
    """Each line is a text, an empty one too, so that row numbers are line numbers."""
    return map(Row, _lines(file))


def _of_jsonl(file: Path, source: Source) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file.name} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QBertError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise QBertError(f"{where}: {type(record).__name__}; allowed: an object")
        yield _row(record, source, where)


def _of_table(file: Path, source: Source, delimiter: str) -> Iterator[Row]:
    with _long_fields(), file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened, delimiter=delimiter)
        try:
            for record in reader:
                yield _row(record, source, f"{file.name} line {reader.line_num}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise QBertError(f"{file.name} after line {reader.line_num}: {error}") from None


def _of_csv(file: Path, source: Source) -> Iterator[Row]:
    return _of_table(file, source, ",")


def _of_tsv(file: Path, source: Source) -> Iterator[Row]:
    return _of_table(file, source, "\t")


def _of_parquet(file: Path, source: Source) -> Iterator[Row]:
    parquet = pyarrow("pyarrow.parquet")
    try:
        opened = parquet.ParquetFile(file)
    except (OSError, pyarrow().ArrowException) as error:
        raise QBertError(f"{file.name}: not Parquet ({' '.join(str(error).split())[:120]})") from None
    with opened:
        names = opened.schema_arrow.names
        wanted = [name for name in (source.column, source.id_column) if name is not None]
        for name in wanted:
            _require(name, names, file.name)
        number = 0
        for batch in opened.iter_batches(batch_size=_READ_ROWS, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield _row(record, source, f"{file.name} row {number}")


_READERS: dict[str, Callable[[Path, Source], Iterator[Row]]] = {
    ".jsonl": _of_jsonl, ".csv": _of_csv, ".tsv": _of_tsv, ".parquet": _of_parquet, ".txt": _of_txt,
}  # fmt: skip


def _row(record: dict[Any, Any], source: Source, where: str) -> Row:
    _require(source.column, record, where)
    text, given = record[source.column], None
    if not isinstance(text, str):
        raise QBertError(f"{where}: {source.column!r} is {_kind(text)}; allowed: a string")
    if any(
        _SURROGATES[0] <= letter <= _SURROGATES[1] for letter in text
    ):  # JSON spells half a letter; tokenizers refuse
        raise QBertError(f"{where}: {source.column!r} holds a lone surrogate; allowed: whole characters")
    if source.id_column is not None:
        _require(source.id_column, record, where)
        given = record[source.id_column]
        if not isinstance(given, str | int) or isinstance(given, bool):
            raise QBertError(f"{where}: {source.id_column!r} is {_kind(given)}; allowed: a string or an integer")
    return Row(text, given)


def _require(column: str, names: Any, where: str) -> None:
    if column not in names:
        have = ", ".join(map(repr, sorted(str(name) for name in names if name is not None))) or "none"
        raise QBertError(f"{where}: no column {column!r}; it has {have}")


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields of more than 128 KiB."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
