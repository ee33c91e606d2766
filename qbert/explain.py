"""What runs for every module of a model, and why: the answer to "is my model really quantized?"."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch import nn

from qbert.convert import float_reasons
from qbert.encoder import FusedForward, GraphReport, encoders, fused_forward, obstacle
from qbert.modules import EmulatedModule, QLinear, QTiedLinear, QuantizedModule
from qbert.modules.sites import describe_sites
from qbert.ops.cuda import missing_extension
from qbert.shapes import recorded_plan
from qbert.target import cpu_missing, target_of
from qbert.weight import Layout

_MANY = 0.125  # share of a float linear's weights that are zero: somebody made them so


@dataclass(frozen=True)
class Row:
    """One linear or embedding.

    Attributes:
        name: qualified name.
        scheme: or ``"float32"`` and the like.
        shape: (n, k).
        layout: where the codes' bits are, in memory now.
        bits_per_weight: stored bits with all scales, dictionaries and outliers.
        stored_bytes: in a checkpoint; 0 for a weight that another module holds.
        memory_bytes: in memory now.
        outliers: weights kept exactly.
        kernel: what runs.
        reason: why that kernel, or why the module is float.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    layout: str
    bits_per_weight: float
    stored_bytes: int
    memory_bytes: int
    outliers: int
    kernel: str
    reason: str


@dataclass(frozen=True)
class EncoderRow:
    """One encoder of a family that can be fused, or the whole model where it holds none.

    Attributes:
        name: qualified name; the class's where the encoder is the model itself.
        fused: ``"static"``, ``"dynamic"`` or ``"no"``.
        reason: what that means, or why not.
        extra_bytes: memory that the fused encoder holds beside the modules' own; 0 before its first call.
        graphs: what `qbert.compile` captured for it; None where that was not asked for.
    """

    name: str
    fused: str
    reason: str
    extra_bytes: int = 0
    graphs: GraphReport | None = None

    def __str__(self) -> str:
        extra = f"; {self.extra_bytes / 1024:.0f} KiB beside the modules' own" if self.extra_bytes else ""
        graphs = "" if self.graphs is None else f"\n  {self.graphs}"
        return f"{self.name}: fused: {self.fused} ({self.reason}{extra}){graphs}"


@dataclass(frozen=True)
class Explanation:
    """Rows for all linears and embeddings of a model, a line for each of its encoders, and notes; prints as a table."""

    rows: list[Row]
    encoders: list[EncoderRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> list[Row]:
        """The rows of quantized modules."""
        return [row for row in self.rows if "/" in row.scheme or not row.scheme.startswith(("float", "bfloat"))]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the quantized modules."""
        weights = sum(row.shape[0] * row.shape[1] for row in self.quantized if row.stored_bytes)
        return 8 * sum(row.stored_bytes for row in self.quantized) / max(1, weights)

    def to_dicts(self) -> list[dict[str, object]]:
        """The rows as plain data."""
        return [{each.name: getattr(row, each.name) for each in fields(row)} for row in self.rows]

    def __str__(self) -> str:
        header = ("module", "scheme", "shape", "layout", "bits", "kernel", "why")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        )
        return "\n".join((*lines, *map(str, self.encoders), *self.notes))


def explain(model: nn.Module) -> Explanation:
    """What runs for every linear and embedding of `model`, quantized or not, and whether its encoders run fused."""
    reasons = float_reasons(model)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule | QTiedLinear):
            rows.append(_quantized_row(name, module))
        elif isinstance(module, nn.Linear | nn.Embedding):
            rows.append(_float_row(name, module, reasons.get(name, "not quantized")))
    quantized = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    plan = recorded_plan(model)
    shapes = [] if plan is None else [f"compressed: {plan}"]
    notes = [*shapes, *zeros_in(model), *_notes(quantized), *describe_sites(model)]
    return Explanation(rows, _encoder_rows(model) if quantized else [], notes)


def zeros_in(model: nn.Module) -> list[str]:
    """What is to be said of linears with many zeros: what they save in a file, and that they save no time."""
    stored = [each for each in model.modules() if isinstance(each, QLinear) and each.stored_as is not Layout.PLAIN]
    if stored:
        weights = sum(each.shape[0] * each.shape[1] for each in stored)
        share = 1 - sum(each.nonzeros() for each in stored) / weights
        saved = sum(each.quantized.stored_bytes - each.stored_bytes() for each in stored)
        ways = " and ".join(sorted({each.stored_as.value for each in stored}))
        said = f"{100 * share:.0f}% zeros in {len(stored)} linears ({ways}): {saved / 1e6:.2f} MB saved in the file, 0 ms saved"
        return [f"{said}, because no kernel here skips them: in memory they are codes like others"]
    floats = [each for each in model.modules() if type(each) is nn.Linear and _zeros_of(each) >= _MANY]
    if not floats:
        return []
    share = sum(_zeros_of(each) for each in floats) / len(floats)
    said = (
        f"{100 * share:.0f}% zeros in {len(floats)} float linears: 0 MB and 0 ms saved, because floats are stored whole"
    )
    return [f"{said} and no kernel here skips zeros; quantized, the file leaves them out"]


def _zeros_of(linear: nn.Linear) -> float:
    if linear.weight.device.type == "meta" or linear.weight.numel() == 0:
        return 0.0
    return int((linear.weight.detach() == 0).sum()) / linear.weight.numel()


def _notes(quantized: list[QuantizedModule]) -> list[str]:
    """What is to be said once for all rows: that this CPU's or this GPU's compiled kernels are not here."""
    native = [module for module in quantized if not isinstance(module, EmulatedModule)]
    targets = {target_of(module.get_buffer("qdata").device) for module in native}
    missing = sorted({reason for target in targets if (reason := missing_extension(target)) is not None})
    notes = [f"Triton kernels alone: {reason}" for reason in missing]
    if any(target.device == "cpu" and not target.native for target in targets):
        notes.append(f"torch's kernels alone: {cpu_missing()}")
    return notes


_VARIANTS = {"static": "calibrated scales", "dynamic": "scales token by token; calibration makes it faster"}


def _encoder_rows(model: nn.Module) -> list[EncoderRow]:
    found = list(encoders(model))
    if not found:
        return [EncoderRow(type(model).__name__, "no", obstacle(model) or "")]
    rows = []
    for name, base, _ in found:
        fused, shown = fused_forward(base), name or type(base).__name__
        if fused is not None:
            graphs = None if fused.graphs is None else fused.graphs.report()
            rows.append(EncoderRow(shown, fused.variant, _reason(base, fused), fused.extra_bytes(), graphs))
        else:
            rows.append(EncoderRow(shown, "no", obstacle(base) or "not asked for: fuse=True, or qbert.fuse_(model)"))
    return rows


def _reason(base: nn.Module, fused: FusedForward) -> str:
    """What a fused encoder computes with, and what keeps it from that now."""
    reason, why = _VARIANTS[fused.variant], obstacle(base)
    if fused.calibration is not None and fused.calibration.fingerprint is None:
        reason += ", of an older file that does not say of which model"
    return reason if why is None else f"{reason}; calls are refused now: {why}"


def _quantized_row(name: str, module: QuantizedModule | QTiedLinear) -> Row:
    tied = isinstance(module, QTiedLinear)
    weight = module.owner.quantized if isinstance(module, QTiedLinear) else module.quantized
    stored = weight.stored_bytes if isinstance(module, QTiedLinear) else module.stored_bytes()
    reason = (
        f"tied to {module.owner_name}; {module.kernel.reason}"
        if isinstance(module, QTiedLinear)
        else module.kernel.reason
    )
    return Row(
        name=name,
        scheme=module.scheme.name,
        shape=module.shape,
        layout=weight.layout.value,
        bits_per_weight=8 * stored / max(1, weight.n * weight.k),
        stored_bytes=0 if tied else stored,
        memory_bytes=0 if tied else weight.nbytes,
        outliers=weight.outliers,
        kernel=module.kernel.name,
        reason=reason,
    )


def _float_row(name: str, module: nn.Linear | nn.Embedding, reason: str) -> Row:
    weight = module.weight
    nbytes = weight.numel() * weight.element_size()
    n, k = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    return Row(name, dtype, (n, k), "plain", 8.0 * weight.element_size(), nbytes, nbytes, 0, "torch", reason)


def _cells(row: Row) -> tuple[str, ...]:
    shape, bits = f"{row.shape[0]}x{row.shape[1]}", f"{row.bits_per_weight:.3g}"
    return (row.name, row.scheme, shape, row.layout, bits, row.kernel, row.reason)
