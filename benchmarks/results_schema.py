"""Results are data: what a row of each kind holds, and the files that rows are appended to and read from.

A file is JSON, valid after every row, with one row a line:

    {"schema": 1, "machine": {...}, "rows": [
    {"kind": "gemm", ...},
    {"kind": "gemm", ...}
    ]}

Rows are appended by one write over the closing brackets, so a benchmark that is killed loses at most the row it was writing,
and several processes may append in turn. Files are never rewritten: a new run is a new file,
`benchmarks/results/<device>/<date>-<commit>[-n].json`.

Units: seconds, bytes, operations (a multiply-add counts two); shares are 0 to 1. A row without figures has a `reason`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from qbert.errors import QBertError
from qbert.timing import Sample

from .machine import Machine

SCHEMA_VERSION = 1  # raised when a file written before would be read wrongly
RESULTS = Path(__file__).resolve().parent / "results"

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]


class _Strict(BaseModel):
    # Inf and NaN are kept (as strings): a cosine that is no number is a finding, not a gap. What is filled in later is checked
    # like the rest, for a row that does not fit would make its whole file unreadable.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", validate_assignment=True)


class Work(_Strict):
    """What a problem needs at least, whoever computes it: the roofline's two numbers.

    Attributes:
        operations: of the matrix products, without padding.
        precision: of the unit that does them at best for this candidate: int8 for w8a8, bf16 for weight-only schemes.
        bytes: inputs, weights as stored and outputs, each once.
    """

    operations: float = Field(ge=0)
    precision: Precision
    bytes: float = Field(ge=0)


class _Timed(_Strict):
    """What rows with a time have in common.

    Attributes:
        name: of the candidate: "qbert w8a8", "torch bf16".
        library: whose it is: qbert, torch, torchao ...
        time: of one call, or None where there is a reason.
        baseline, speedup: baseline's time over this one's, as a median over rounds that both ran in; above 1 this is faster.
        work: for the share of the roofline; None where no bound is meant.
        configuration: how it is run, and what it computes otherwise than the others (accuracy, padding), in a line.
        reason: why there is no time, or why something is missing.
    """

    name: str
    library: str
    time: Sample | None = None
    baseline: str | None = None
    speedup: float | None = None
    work: Work | None = None
    configuration: str = ""
    reason: str | None = None


class GemmRow(_Timed):
    """A linear of `t` tokens: (t, k) x (n, k)^T.

    Attributes:
        regime: "warm" (one set of inputs), "cold" (weights and inputs out of cache in every call).
        scheme: of qbert or the peer's nearest; None for float.
        kernel: what ran, as `explain` names it; the tile, where one was chosen.
        weight_bytes: of one weight as the kernel reads it.
        out_dtype: of what leaves it; "int32" for a bare product.
    """

    kind: Literal["gemm"] = "gemm"
    regime: Literal["warm", "cold"]
    t: int
    n: int
    k: int
    scheme: str | None = None
    kernel: str = ""
    tile: str | None = None
    weight_bytes: int | None = None
    out_dtype: str | None = None


class AttentionRow(_Timed):
    """Attention of `batch` sequences.

    Attributes:
        length: of the longest.
        tokens: all that are not padding.
        padding: "none", "computed", "masked", "not computed".
        largest_error: against float64 on the same inputs, over the largest value of the reference.
    """

    kind: Literal["attention"] = "attention"
    batch: int
    heads: int
    head_dim: int
    length: int
    tokens: int
    ragged: bool
    padding: str
    kernel: str = ""
    largest_error: float | None = None


class BertRow(_Timed):
    """A whole encoder on one batch ("8x128", "ragged32", "512 sentences"): `time` is of one forward, or of all sentences.

    Attributes:
        name: of a row of kind "system", which says what it is.
        width: tokens of the longest sequence; `tokens` are all that are not padding.
        over_best_qbert: this time over that of qbert's fastest row in this case: above 1, qbert wins.
        cosine_mean, cosine_min: over tokens (sentences), to torch's float32.
        peak_bytes: memory at the height of a forward, less what the process had before the model was loaded.
        first_seconds: the first forward, with all that it compiled.
    """

    kind: Literal["bert"] = "bert"
    model: str
    random_weights: bool
    case: str
    batch: int
    width: int
    tokens: int
    padding_share: float
    over_best_qbert: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    peak_bytes: int | None = None
    first_seconds: float | None = None


class SystemRow(_Strict):
    """A system of the `bert` rows, once a run.

    Attributes:
        configuration, source: how it is run, and what recommends that.
        padding: what it does with padding.
        weight_bytes: as stored, embeddings included.
        prepare_seconds: what is done once and kept; 0 where it was kept.
        rest_seconds: median time after a command until its threads were idle.
        reason: why it could not be measured at all.
    """

    kind: Literal["system"] = "system"
    name: str
    library: str
    model: str
    configuration: str
    source: str = ""
    padding: str | None = None
    weight_bytes: int | None = None
    prepare_seconds: float | None = None
    load_seconds: float | None = None
    rest_seconds: float | None = None
    notes: list[str] = []
    reason: str | None = None


class QuantizeRow(_Strict):
    """Quantizing a whole model, in a process of its own.

    Attributes:
        scheme: LINEAR or LINEAR+EMBEDDING.
        weights: quantized ones.
        bits_per_weight: with scales, dictionaries and outliers.
        share_of_float32: bytes of the whole model, what stays float included.
        peak_bytes: memory over that of the loaded model.
    """

    kind: Literal["quantize"] = "quantize"
    model: str
    scheme: str
    library: str = "qbert"
    device: str = "cpu"
    weights: int | None = None
    bits_per_weight: float | None = None
    share_of_float32: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None


class AccuracyRow(_Strict):
    """What one scheme keeps of a model on one task; or, with `published`, what a paper says of its own.

    Attributes:
        metric: accuracy, spearman, ..., as a share or correlation.
        drop: float's score minus this one's, with its interval (low, high) at `confidence`.
        cosine: mean, of the embeddings to float's.
        share_of_float32: bytes of the whole model.
        source: of a published figure.
    """

    kind: Literal["accuracy"] = "accuracy"
    model: str
    task: str
    name: str
    library: str
    scheme: str | None = None
    metric: str | None = None
    float_score: float | None = None
    score: float | None = None
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    confidence: float | None = None
    cosine: float | None = None
    bits_per_weight: float | None = None
    stored_bytes: int | None = None
    share_of_float32: float | None = None
    published: bool = False
    source: str | None = None
    reason: str | None = None


class SurveyScore(_Strict):
    """Of one task, in points: the score, float32's, and the paired change with its 95% interval."""

    task: str
    metric: str
    n: int
    float_score: float
    score: float
    change: float
    low: float
    high: float


class SurveyRow(_Strict):
    """What a row of the survey's table comes to here: a method on the model that all of them share.

    Attributes:
        system: of `published.TABLE`, or a name of this project's own.
        method: what was done, in words; recipe: the fields of `qbert.Compression` that did it.
        share_of_float32: bytes of the finished model over the original's.
        time, float_time: of a forward of batch x seq tokens, and of the float original in turns with it; None: not timed.
        speedup: of the medians' rounds.
        seconds: that making it took.
        reason: why there are no figures.
    """

    kind: Literal["survey"] = "survey"
    system: str
    model: str
    method: str
    recipe: dict[str, Any] = {}
    stored_bytes: int | None = None
    share_of_float32: float | None = None
    batch: int = 8
    seq: int = 128
    time: Sample | None = None
    float_time: Sample | None = None
    speedup: float | None = None
    scores: list[SurveyScore] = []
    seconds: float | None = None
    reason: str | None = None


class CeilingRow(_Strict):
    """A measured ceiling of this device.

    Attributes:
        quantity: "copy" (bytes read and written a second), or a precision (operations a second of large products).
        datasheet: the same by the vendor, where known.
        how: what was run.
    """

    kind: Literal["ceiling"] = "ceiling"
    device: Literal["cpu", "cuda"]
    quantity: str
    per_second: float | None = None
    datasheet: float | None = None
    time: Sample | None = None
    how: str = ""
    reason: str | None = None


class TestsRow(_Strict):
    """A run of tests or of a sanitizer.

    Attributes:
        failures: names of what failed or errored, each with the first line of why.
        complete: False where it was stopped by its cap: then what is missing did not pass.
    """

    __test__: ClassVar[bool] = False  # pytest takes its name for that of a test class

    kind: Literal["tests"] = "tests"
    suite: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    complete: bool = True
    failures: list[str] = []
    reason: str | None = None

    @property
    def good(self) -> bool:
        """Everything ran that was to run, and nothing failed."""
        return self.complete and not self.failed and self.reason is None


class TileRow(_Strict):
    """One tile of one operation on one problem; `chosen`: the one that the tables select after tuning.

    Attributes:
        tile: the fields of `qbert.tiles.TileConfig`.
    """

    kind: Literal["tile"] = "tile"
    operation: str
    scheme: str | None = None
    t: int
    n: int
    k: int
    tile: dict[str, str | int | bool]
    time: Sample | None = None
    chosen: bool = False
    speedup: float | None = None
    reason: str | None = None


class RunRow(_Strict):
    """The beginning of one benchmark: what it was told, so that it can be run again; of the rows that follow."""

    kind: Literal["run"] = "run"
    benchmark: str
    settings: dict[str, str | int | float | bool | list[str] | None] = {}
    seconds: float | None = None


class StepRow(_Strict):
    """A step of the device suite. `reason`: why it was skipped, failed or was stopped."""

    kind: Literal["step"] = "step"
    name: str
    status: Literal["done", "failed", "stopped", "skipped"]
    seconds: float = 0.0
    rows: int = 0
    reason: str | None = None


AnyRow = (
    GemmRow | AttentionRow | BertRow | SystemRow | QuantizeRow | AccuracyRow | CeilingRow | TestsRow | TileRow
    | RunRow | StepRow | SurveyRow
)  # fmt: skip
_ROW: TypeAdapter[AnyRow] = TypeAdapter(Annotated[AnyRow, Field(discriminator="kind")])
RowType = TypeVar("RowType", bound=BaseModel)


class Results(_Strict):
    """A file.

    Attributes:
        path: where it was read from.
        torn: its last row was cut off by a kill, and is left out.
    """

    path: Path
    machine: Machine
    rows: list[AnyRow]
    torn: bool = False

    def of(self, kind: type[RowType]) -> list[RowType]:
        """Rows of one class, in their order."""
        return [row for row in self.rows if isinstance(row, kind)]


# ---- reading --------------------------------------------------------------------------------------------------------


def load_results(path: str | Path) -> Results:
    """A file, every row checked.

    Raises:
        QBertError: unreadable, no results, of another schema version, or a row that does not fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QBertError(f"results {path}: cannot be read: {error}") from None
    data, torn = _parse(path, text)
    version = data.get("schema")
    if version != SCHEMA_VERSION:
        found = "no schema version" if version is None else f"schema version {version!r}"
        raise QBertError(f"results {path}: {found}; this qbert reads version {SCHEMA_VERSION}")
    unknown = sorted(set(data) - {"schema", "machine", "rows"})
    if unknown or not isinstance(data.get("rows"), list):
        raise QBertError(f"results {path}: a file has schema, machine and a list of rows; found {', '.join(data)}")
    return Results(
        path=path, machine=_machine(path, data.get("machine")), rows=list(_rows(path, data["rows"])), torn=torn
    )


def _parse(path: Path, text: str) -> tuple[dict[str, Any], bool]:
    """The JSON object; where a kill has cut the last row off, that of the rows before it."""
    try:
        data, torn = json.loads(text), False
    except ValueError as error:
        whole = text.rpartition("\n")[0].rstrip().removesuffix(",")
        try:
            data, torn = json.loads(whole + _END), True
        except ValueError:
            raise QBertError(f"results {path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise QBertError(f"results {path}: not an object, but a {type(data).__name__}")
    return data, torn


def _machine(path: Path, data: object) -> Machine:
    try:
        return Machine.model_validate(data)
    except ValidationError as error:
        raise QBertError(f"results {path}: machine: {_first(error)}") from None


def _rows(path: Path, rows: list[object]) -> Iterator[AnyRow]:
    for number, row in enumerate(rows, 1):
        try:
            yield _ROW.validate_python(row)
        except ValidationError as error:
            raise QBertError(f"results {path}: row {number}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'value'}: {problem['msg']}"


# ---- writing --------------------------------------------------------------------------------------------------------

_END = "\n]}\n"


class ResultsWriter:
    """Appends rows to a file, each as soon as it is there.

    Args:
        path: made, with its folders, where it is not there; otherwise appended to.
        machine: of this run; a file that is there must be of the same device and commit.

    Raises:
        QBertError: the file is no results file, or of another device or commit.
    """

    def __init__(self, path: str | Path, machine: Machine) -> None:
        self.path = Path(path)
        if self.path.exists():
            self._join(load_results(self.path), machine)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            head = f'{{"schema": {SCHEMA_VERSION}, "machine": {machine.model_dump_json()}, "rows": ['
            fresh = self.path.with_name(self.path.name + ".new")
            fresh.write_text(head + _END, encoding="utf-8")
            os.replace(fresh, self.path)  # no reader meets half a header

    def _join(self, there: Results, machine: Machine) -> None:
        if there.machine.identity != machine.identity:
            old, new = " ".join(there.machine.identity), " ".join(machine.identity)
            raise QBertError(f"results {self.path}: of {old}, not of {new}; write to another file")
        if there.torn:  # by a kill: what is left becomes valid JSON again
            text = self.path.read_text(encoding="utf-8").rpartition("\n")[0].rstrip().removesuffix(",")
            self.path.write_text(text + _END, encoding="utf-8")

    def add(self, row: AnyRow) -> None:
        """Writes one row; it is on the disk when this returns."""
        line = "\n" + row.model_dump_json(exclude_none=True) + _END
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(-len(_END) - 1, os.SEEK_END)
            last = file.read(1).decode()  # "[" before the first row
            file.write((line if last == "[" else "," + line).encode())
            os.fsync(file.fileno())


def results_path(machine: Machine, folder: str | Path = RESULTS) -> Path:
    """A file that is not there yet: <folder>/<device>/<date>-<commit>[-n].json."""
    stem = f"{machine.date[:10]}-{(machine.commit or 'no-commit').replace('+', '-dirty')}"
    home = Path(folder) / machine.slug
    names = (f"{stem}.json", *(f"{stem}-{n}.json" for n in range(2, 10_000)))
    return next(home / name for name in names if not (home / name).exists())
