"""All methods one after the other, in the only order in which each leaves the next one possible, and what every step cost."""

from __future__ import annotations

import copy
import json
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from qbert.calibrate import tokenizer_beside
from qbert.compress.baselines import Method
from qbert.compress.latency import Load, fused_recipe, measured_ms
from qbert.compress.report import Agreement, Size
from qbert.compress.sparsify import LEAST, MOST
from qbert.compress.sparsify import Method as ZerosMethod
from qbert.compress.steps import CALIBRATED_BY, STEPS, Given, Progress, quantize_last
from qbert.compress.texts import (
    Texts,
    agreement,
    float_encoder,
    outputs_of,
    plain,
    require,
    require_pooling,
    tokenizer_inside,
)
from qbert.errors import QBertError
from qbert.recipe import NONE, Recipe
from qbert.shapes import FACTORABLE, Factorable, ShapePlan, plan_of

AfterStep = Callable[[nn.Module, Any], Any]  # (model, its tokenizer) -> what goes into the step's `scores`

_JUDGED = 8  # one text in eight is given to no step
_LEAST_JUDGED, _JUDGE_BY = 8, 512


class Pruning(BaseModel):
    """Arguments of `prune_`: one of speedup, macs, or heads and ffn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    speedup: float | None = None
    macs: float | None = None
    heads: int | list[int] | None = None
    ffn: int | list[int] | None = None
    uniform: bool = False
    refit: bool | Literal["scales"] = True
    method: Method = "second-order"


class LowRank(BaseModel):
    """Arguments of `factorize_`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] = "auto"
    energy: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.998
    linears: tuple[Factorable, ...] = FACTORABLE
    fisher: bool = True


class Zeros(BaseModel):
    """Arguments of `sparsify_`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: Annotated[float, Field(strict=True, ge=LEAST, le=MOST)] | Literal["2:4"]
    method: ZerosMethod = "refit"


class Compression(BaseModel):
    """What to take out of a model, and what to quantize the rest to. Steps that are None are left out.

    Attributes:
        vocabulary: pieces that stay, see `trim_vocabulary_`.
        layers: how many stay, or which, see `drop_layers_`.
        prune: how many times faster a forward is to be by fewer heads and neurons, or other arguments of `prune_`.
        rank: of linears that become two thin ones each, ``"auto"`` where it pays, or other arguments of `factorize_`.
        sparsity: share of weights that become zero, or ``"2:4"``, or arguments of `sparsify_`: a smaller file, no less time.
        quantize: what `quantize_` takes, ``"w8a8"`` for 8-bit embeddings too; the encoder is calibrated on the texts and fused.
        embedding: scheme of the embeddings, or ``"none"``, where `quantize` names that of the linears alone.
        batch, seq: of the forward that is measured, and that is to be faster.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **fields: Any) -> None:
        """One line for what does not fit.

        Raises:
            QBertError: a field that is unknown, of the wrong type or out of range.
        """
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise QBertError(
                f"compression: {where + ': ' if where else ''}{first['msg']}, got {first['input']!r:.80}"
            ) from None

    vocabulary: Annotated[int, Field(strict=True, ge=1)] | None = None
    layers: Annotated[int, Field(strict=True, ge=1)] | list[int] | None = None
    prune: float | Pruning | None = None
    rank: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] | LowRank | None = None
    sparsity: Annotated[float, Field(strict=True, ge=LEAST, le=MOST)] | Literal["2:4"] | Zeros | None = None
    quantize: str | None = None
    embedding: str | None = None
    batch: Annotated[int, Field(strict=True, ge=1)] = 8
    seq: Annotated[int, Field(strict=True, ge=1)] = 128

    @model_validator(mode="after")
    def _something(self) -> Compression:
        if self.embedding is not None and "+" in (self.quantize or ""):
            raise ValueError(
                f"embedding, and quantize is {self.quantize!r}; allowed: one that says what embeddings get"
            )
        scheme = self.scheme  # a QBertError is a ValueError, which pydantic reports as its own
        if not any((self.vocabulary, self.layers, self.prune, self.rank, self.sparsity, scheme)):
            raise ValueError(
                "it says nothing to do; allowed: vocabulary, layers, prune, rank, sparsity, quantize, embedding"
            )
        return self

    @property
    def word(self) -> str | None:
        """What to quantize to, as `quantize_` takes it."""
        return self.quantize if self.embedding is None else f"{self.quantize or NONE}+{self.embedding}"

    @property
    def scheme(self) -> Recipe | None:
        """What to quantize to, None where all stays float."""
        return fused_recipe(self.word)

    @property
    def pruning(self) -> Pruning | None:
        """Arguments of `prune_`."""
        return Pruning(speedup=self.prune) if isinstance(self.prune, float) else self.prune

    @property
    def low_rank(self) -> LowRank | None:
        """Arguments of `factorize_`."""
        return self.rank if self.rank is None or isinstance(self.rank, LowRank) else LowRank(rank=self.rank)

    @property
    def zeros(self) -> Zeros | None:
        """Arguments of `sparsify_`."""
        return (
            self.sparsity
            if self.sparsity is None or isinstance(self.sparsity, Zeros)
            else Zeros(sparsity=self.sparsity)
        )

    def step(self, name: str) -> Any:
        """What a row of `STEPS` takes, None where that step is left out."""
        arguments: dict[str, BaseModel | None] = {
            "prune": self.pruning, "rank": self.low_rank, "sparsity": self.zeros,
        }  # fmt: skip
        if name not in arguments:
            return getattr(self, name)
        given = arguments[name]
        return None if given is None else given.model_dump()

    @classmethod
    def of(cls, **fields: Any) -> Compression:
        """The same."""
        return cls(**fields)

    @classmethod
    def read(cls, path: str | Path) -> Compression:
        """From a TOML file with these fields.

        Raises:
            QBertError: no such file, no TOML, or a field that does not fit.
        """
        try:
            fields = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise QBertError(f"recipe {str(path)!r}: {error}") from None
        return cls.of(**fields)

    def toml(self) -> str:
        """As `read` takes it."""
        fields = self.model_dump(exclude_none=True, exclude_defaults=True)
        fields |= {"batch": self.batch, "seq": self.seq}
        plain = {name: value for name, value in fields.items() if not isinstance(value, dict)}
        tables = {name: value for name, value in fields.items() if isinstance(value, dict)}
        lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        return "\n".join(lines) + "\n"


class Step(BaseModel):
    """A row of the report.

    Attributes:
        method: what was done.
        plan: what is left after it.
        size: after it.
        agreement: with the original, on texts that no step has seen.
        ms: of a forward as the finished model runs (quantized if the recipe says so); None where nothing was measured.
        speedup: how many times as long the original takes that way, measured in turns with it.
        seconds: the step took.
        notes: what the method says of itself.
        scores: what `after_step` returned.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    plan: ShapePlan
    size: Size
    agreement: Agreement
    ms: float | None
    speedup: float | None
    seconds: float
    notes: list[str] = Field(default_factory=list)
    scores: Any = None


class CompressionReport(BaseModel):
    """Outcome of `compress`: the original, then a row for each step.

    Attributes:
        recipe: what was asked for.
        float_ms: milliseconds of the original as it is and of the finished model, in turns; None where nothing was measured.
        load: of which forward.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: Compression
    steps: list[Step]
    float_ms: tuple[float, float] | None
    load: str

    def __str__(self) -> str:
        header = ("step", "parameters", "multiply-adds", "ms", "faster", "agreement", "s", "what is left")
        rows = [header, *(self._row(step) for step in self.steps)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.float_ms is not None:
            before, after = self.float_ms
            lines.append(f"x{before / after:.2f} over the float original ({before:.1f} -> {after:.1f} ms; {self.load})")
        return "\n".join(lines)

    def _row(self, step: Step) -> tuple[str, ...]:
        low, high = step.agreement.interval
        ms, faster = (f"{step.ms:.2f}", f"x{step.speedup:.2f}") if step.ms and step.speedup else ("", "")
        macs = step.size.macs / self.steps[0].size.macs
        near = f"{step.agreement.mean:.4f} [{low:.4f}, {high:.4f}]"
        size = f"{step.size.parameters / 1e6:.2f}M", f"x{macs:.3f}"
        return step.method, *size, ms, faster, near, f"{step.seconds:.0f}", str(step.plan)


class Compressed(NamedTuple):
    """A smaller model, its tokenizer (another one where the vocabulary was trimmed), and what it cost."""

    model: Any
    tokenizer: Any
    report: CompressionReport


@torch.inference_mode(False)  # weights that are made in it could not be trained or saved as others; turns gradients on
def compress(
    model: nn.Module,
    recipe: Compression,
    *,
    texts: Sequence[str],
    tokenizer: Any = None,
    labels: Sequence[int] | None = None,
    pooling: str = "mean",
    measure: bool = True,
    after_step: AfterStep | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Makes a smaller copy of a model: words, layers, heads and neurons, low rank, then calibration and quantization.

    Quantizing comes last: weights are refitted before it, and its static scales are those of what is left. One text in eight is
    given to no step and says how near each step's model is to the original.

    Args:
        model: float; left as it is, like the tokenizer.
        recipe: what to do. Compressed models may be compressed again.
        texts: of the kind the model is used on, some hundreds or more.
        tokenizer: by default the one inside a pipeline of sentence-transformers, else the one beside the model's files. A
            pipeline goes on with its own, so where the vocabulary is trimmed no other is taken.
        labels: of a classifier, for pruning, see `prune_`.
        pooling: of embeddings, ``"mean"`` or ``"cls"``.
        measure: whether each step's milliseconds are measured.
        after_step: called with the model and tokenizer after each step; what it returns is in the report.
        progress: see `prune_`.

    Raises:
        QBertError: see the methods.
    """
    require_pooling(pooling)
    encoder = float_encoder(model, "compressing", factored=True)
    labels = None if labels is None else [plain(each) for each in plain(labels)]
    if tokenizer is None:
        inside = tokenizer_inside(model)
        tokenizer = tokenizer_beside(encoder.base) if inside is None else inside
    if labels is not None and len(labels) != len(texts):
        raise QBertError(f"{len(labels)} labels for {len(texts)} texts; allowed: one for each")
    run = _Run(model, recipe, texts, tokenizer, labels, pooling, measure, after_step, progress)
    return run.finished()


class _Run:
    """A model on its way through a recipe."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Compression,
        texts: Sequence[str],
        tokenizer: Any,
        labels: Sequence[int] | None,
        pooling: str,
        measure: bool,
        after_step: AfterStep | None,
        progress: Progress | None,
    ) -> None:
        self.original, self.recipe, self.pooling, self.progress = model, recipe, pooling, progress
        # Together: a pipeline's tokenizer stays the one inside it, so that it is trimmed there too.
        self.model, self.tokenizer = copy.deepcopy((model, tokenizer))
        self.judging = list(texts)[_JUDGED - 1 :: _JUDGED][:_JUDGE_BY]
        given = [place for place in range(len(texts)) if place % _JUDGED != _JUDGED - 1]
        self.texts = [texts[place] for place in given]
        self.labels = None if labels is None else [labels[place] for place in given]
        judged = Texts.of(model, self.judging, tokenizer)
        require(judged, _LEAST_JUDGED, f"compressing, with one of {_JUDGED} set apart,")
        self.before = outputs_of(model, judged, pooling)
        self.load = Load(recipe.batch, recipe.seq, recipe.word)
        self.measure, self.after_step = measure, after_step
        self.steps: list[Step] = []

    def finished(self) -> Compressed:
        recipe = self.recipe
        self._note("original", 0.0, [])
        given = Given(self.texts, self.labels, self.pooling, self.load, progress=self.progress)
        for name, step in STEPS.items():
            value = recipe.step(name)
            if value is not None:
                report = step(self.model, self.tokenizer, value, given)
                self._note(report.method, report.seconds, str(report).splitlines()[1:])
        float_ms = self._float_ms()
        if recipe.scheme is not None:
            start = time.perf_counter()
            quantize_last(self.model, self.tokenizer, recipe.scheme, self.texts)
            what = "embeddings" if recipe.scheme.linear is None else recipe.quantize
            self._note(f"quantize {what}", time.perf_counter() - start, [])
        return Compressed(
            self.model,
            self.tokenizer,
            CompressionReport(recipe=recipe, steps=self.steps, float_ms=float_ms, load=str(self.load)),
        )

    def _float_ms(self) -> tuple[float, float] | None:
        if not self.measure:
            return None
        stays = Load(self.load.batch, self.load.seq, None)
        ms = measured_ms({"float": (self.original, stays), "now": (self.model, self.load)}, self._batches())
        return ms["float"], ms["now"]

    def _ms(self) -> tuple[float | None, float | None]:
        """Milliseconds of the model as the finished one will run, and how many times as long the original takes."""
        if not self.measure:
            return None, None
        if _is_quantized(self.model):  # so it ran already when it was measured last
            return self.steps[-1].ms, self.steps[-1].speedup
        models = {"before": self.original, "now": self.model} if self.steps else {"now": self.model}
        ms = measured_ms({name: (each, self.load) for name, each in models.items()}, self._batches())
        return ms["now"], ms.get("before", ms["now"]) / ms["now"]

    def _batches(self) -> list[dict[str, Tensor]]:
        given = Texts.of(self.model, self.texts[:CALIBRATED_BY], self.tokenizer)
        return [batch for _, batch in given.batches(next(self.model.parameters()).device)]

    def _note(self, method: str, seconds: float, notes: list[str]) -> None:
        judged = Texts.of(self.model, self.judging, self.tokenizer)
        after: Tensor = outputs_of(self.model, judged, self.pooling)
        near = Agreement.of(agreement(self.original, self.before, after))
        plan = plan_of(self.model)
        scores = None if self.after_step is None else self.after_step(self.model, self.tokenizer)
        ms, speedup = self._ms()
        size = self.steps[-1].size if self.steps and _is_quantized(self.model) else Size.of(self.model)
        self.steps.append(
            Step(
                method=method, plan=plan, size=size, agreement=near, ms=ms, speedup=speedup, seconds=seconds, notes=notes,
                scores=scores,
            )
        )  # fmt: skip


def _is_quantized(model: nn.Module) -> bool:
    from qbert.modules import QuantizedModule

    return any(isinstance(module, QuantizedModule) for module in model.modules())
