"""What an evaluation says, as data: validated, and written to JSON by whoever asked."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Head = Literal["probe", "classifier", "similarity"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Comparison(_Record):
    """A model against its float32 baseline on the same texts."""

    baseline_score: float = Field(description="score of the baseline, 0 to 100")
    drop: float = Field(description="baseline minus model, in points; below 0: the model is better")
    drop_interval: tuple[float, float] = Field(
        description="95%, paired; Bonett and Price 2012 for accuracy, bootstrap over texts for a correlation"
    )
    flips: int | None = Field(description="texts whose predicted class changed; None for a similarity task")
    flips_to_wrong: int | None = Field(description="right in the baseline, wrong here")
    flips_to_right: int | None = Field(description="wrong in the baseline, right here")
    mcnemar_p: float | None = Field(description="exact two-sided p that the two kinds of flip are equally likely")
    cosine_mean: float = Field(description="mean cosine of a text's embedding to the baseline's")
    cosine_interval: tuple[float, float] = Field(description="95% bootstrap interval of that mean")
    cosine_min: float = Field(description="the worst text's cosine")
    similarity_spearman: float | None = Field(
        description="rank correlation of the pairwise similarities of a fixed sample of texts; None if not defined"
    )


class EvalResult(_Record):
    """One model on one task."""

    task: str
    kind: Literal["classification", "similarity"]
    metric: Literal["accuracy", "pearson"]
    head: Head = Field(
        description="where predictions come from: a probe on the baseline's embeddings, the model's own classifier, "
        "or (similarity) cosines without a head"
    )
    n: int = Field(description="texts scored")
    n_train: int = Field(default=0, description="texts the probe was fitted on; 0 without a probe")
    n_train_truncated: int = Field(default=0, description="of those, texts of which the model saw only the beginning")
    data_sha256: str = Field(description="fingerprint of the scored texts and labels: equal only for equal data")
    score: float = Field(description="accuracy or Pearson correlation, times 100")
    interval: tuple[float, float] = Field(description="95%; Wilson for accuracy, bootstrap of texts for correlation")
    n_truncated: int = Field(description="scored texts of which the model saw only the beginning")
    n_tokens: int = Field(description="tokens of the scored texts, without padding")
    seconds: float = Field(description="forward passes over the scored texts; a hint, not a benchmark")
    texts_per_second: float
    comparison: Comparison | None = Field(default=None, description="None when the model is the baseline")
