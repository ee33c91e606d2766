"""What taking something out of a model cost and saved, as data that prints itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from qbert.errors import QBertError
from qbert.evaluate.stats import bootstrap_mean
from qbert.explain import explain
from qbert.modules import products
from qbert.shapes import ShapePlan, plan_of, shaped

SEQUENCE = 128  # tokens, of the multiply-adds in reports


class Size(BaseModel):
    """What a model takes.

    Attributes:
        parameters: all of them.
        macs: multiply-adds of its layers for a token of a sequence of `SEQUENCE`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: int
    macs: int

    @classmethod
    def of(cls, model: nn.Module) -> Size:
        encoder, macs = shaped(model), 0
        paths = encoder.family.layer
        for layer in encoder.layers:
            linears: list[Any] = [layer.get_submodule(path) for path in paths.linears]
            macs += sum(each.out_features * each.in_features for linear in linears for each in products(linear))
            macs += 2 * SEQUENCE * linears[len(paths.qkv)].in_features  # scores, and what they weigh
        return cls(parameters=sum(each.numel() for each in model.parameters()), macs=macs)


def stored_bytes(model: nn.Module) -> int:
    """What the tensors of a file of the model take."""
    floats = sum(each.numel() * each.element_size() for each in model.parameters())
    return floats + sum(row.stored_bytes for row in explain(model).quantized)


class Agreement(BaseModel):
    """How near the outputs on held-out texts are to the original's: cosines of embeddings, 1 - KL of a classifier, or
    the share of the variance of logits that is kept, where classes do not exclude one another (see `texts.agreement`).

    Attributes:
        mean: 1 where nothing changed.
        interval: 95%, bootstrap over texts.
        least: of the text that changed most.
        n: texts, which nothing was chosen by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    interval: tuple[float, float]
    least: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Agreement:
        if not bool(values.isfinite().all()):
            raise QBertError(f"the compressed model gives NaN or Inf for {int((~values.isfinite()).sum())} texts")
        low, high = bootstrap_mean(values.double().numpy())
        return cls(mean=float(values.mean()), interval=(low, high), least=float(values.min()), n=len(values))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.4f} [{low:.4f}, {high:.4f}] on {self.n} held-out texts, least {self.least:.3f}"


class Report(BaseModel):
    """Outcome of one method.

    Attributes:
        method: what was done.
        plan: what is left of the original.
        before, after: sizes.
        agreement: with the outputs before; None where no texts were given.
        notes: what else is to be said.
        seconds: it took.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    plan: ShapePlan
    before: Size
    after: Size
    agreement: Agreement | None = None
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0

    @property
    def macs(self) -> float:
        """Share of the multiply-adds that is kept."""
        return self.after.macs / self.before.macs

    def __str__(self) -> str:
        size = f"{self.after.parameters / 1e6:.2f}M of {self.before.parameters / 1e6:.2f}M parameters"
        lines = [f"{self.method}: {self.plan}", f"  multiply-adds x{self.macs:.3f}, {size}, {self.seconds:.1f} s"]
        if self.agreement is not None:
            lines.append(f"  agreement {self.agreement}")
        return "\n".join((*lines, *(f"  {note}" for note in self.notes)))


def report_of(method: str, model: nn.Module, before: Size, seconds: float, agreement: Tensor | None = None) -> Report:
    """The report of a method that is done with `model`."""
    found = None if agreement is None else Agreement.of(agreement)
    return Report(
        method=method, plan=plan_of(model), before=before, after=Size.of(model), agreement=found, seconds=seconds
    )
