"""The names that stand in a sentence-transformers pipeline's modules.json, and the one that quantized pipelines have there.

Without qbert, transformers would load a quantized encoder up to an error about shapes. sentence-transformers first looks the
encoder's class up by name; this one is there only once qbert is imported, and otherwise it is what its error ends in.
"""

from __future__ import annotations

import json
from pathlib import Path

MODULES_FILE = "modules.json"
PACKAGE = "sentence_transformers"
QUANTIZED = (
    "import_qbert_first"  # `Module "sentence_transformers" does not define a "import_qbert_first" attribute/class`
)
TRANSFORMER = "Transformer"


def say_quantized(folder: Path) -> None:
    """Gives the encoder of a pipeline's folder the name that only qbert knows. A folder without a pipeline stays as it is."""
    _rename(folder, TRANSFORMER, QUANTIZED)


def say_float(folder: Path) -> None:
    """Undoes `say_quantized`, for folders that need no qbert."""
    _rename(folder, QUANTIZED, f"models.{TRANSFORMER}")


def _rename(folder: Path, former: str, name: str) -> None:
    file = folder / MODULES_FILE
    if not file.is_file():
        return
    rows = json.loads(file.read_text(encoding="utf-8"))
    for row in rows:
        package, _, last = str(row["type"]).rpartition(".")
        if last == former and package.split(".")[0] == PACKAGE:
            row["type"] = f"{PACKAGE}.{name}"
    file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
