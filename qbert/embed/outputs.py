"""Files of vectors, written chunk by chunk: .npy as numpy reads it, or .parquet with row numbers and ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qbert.embed.embedder import Vectors
from qbert.embed.sources import pyarrow
from qbert.errors import QBertError

SUFFIXES = (".npy", ".parquet")
_ID_COLUMN = "id"


def check_output(path: Path, has_ids: bool) -> None:
    """
    Raises:
        QBertError: another ending, a folder, or ids where the file has no place for them.
        MissingDependency: .parquet without pyarrow.
    """
    if path.suffix not in SUFFIXES:
        raise QBertError(f"output {str(path)!r}; allowed: a file that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise QBertError(f"output {str(path)!r} is a folder; allowed: a file that ends in {' or '.join(SUFFIXES)}")
    if path.suffix == ".npy" and has_ids:
        raise QBertError(f"output {path.name!r} has no place for ids; allowed: a file that ends in .parquet")
    if path.suffix == ".parquet":
        pyarrow()


def write_npy(path: Path, chunks: Iterable[Vectors], rows: int, dimension: int) -> None:
    """One array (rows, dimension) float32, without ever holding it."""
    with path.open("wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype("<f4")),
            "fortran_order": False,
            "shape": (rows, dimension),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype="<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_parquet(
    path: Path, chunks: Iterable[Vectors], ids: Iterator[str | int] | None, dimension: int, *, integers: bool = False
) -> None:
    """Columns `row` (int64), `id` where there are ids, and `vector` (a list of `dimension` float32); a row group a chunk.

    Args:
        ids: of all rows in their order; None for none.
        integers: whether every id is one; otherwise all are text.
    """
    arrow, parquet = pyarrow(), pyarrow("pyarrow.parquet")
    kind = arrow.int64() if integers else arrow.string()
    writer, start = None, 0
    try:
        for chunk in chunks:
            columns: dict[str, Any] = {"row": arrow.array(np.arange(start, start + len(chunk)), arrow.int64())}
            if ids is not None:
                found = list(islice(ids, len(chunk)))
                columns[_ID_COLUMN] = arrow.array(found if integers else list(map(str, found)), kind)
            flat = arrow.array(np.ascontiguousarray(chunk).reshape(-1), arrow.float32())
            columns["vector"] = arrow.FixedSizeListArray.from_arrays(flat, dimension)
            table = arrow.table(columns)
            if writer is None:
                writer = parquet.ParquetWriter(path, table.schema, compression="none")
            writer.write_table(table)
            start += len(chunk)
    finally:
        if writer is not None:
            writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
