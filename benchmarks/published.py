"""What papers say of their own: rows of a survey's table, beside which `bench_accuracy` puts what was measured here.

Ganesh et al. 2021, Compressing Large-Scale Transformer-Based Models: A Case Study on BERT, TACL 9, table 1: size of the model
with embeddings, and the mean change of its scores against BERT-base's over the tasks that each paper reports (MNLI, QQP, SST-2,
SQuAD). Its sizes of encoders alone are left out: those of the dictionary rows cannot follow from 3- and 4-bit codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .results_schema import AccuracyRow

SOURCE = "Ganesh et al. 2021, Compressing Large-Scale Transformer-Based Models, TACL 9, table 1"
MODEL, TASK = "BERT-base", "mean change over MNLI, QQP, SST-2, SQuAD, as each paper reports"


@dataclass(frozen=True)
class Published:
    """A row of the table.

    Attributes:
        kind: of compression.
        share: percent of BERT-base's size, embeddings included.
        change: of the mean score, in points.
        nearest: name of the row of `bench_accuracy` that does the same or comes nearest, and how near; None: not done here.
    """

    kind: str
    system: str
    share: float
    change: float
    nearest: str | None = None
    how_near: str = ""


TABLE = (
    Published("quantization", "Q-BERT", 15.0, -0.6, "gobo3+w8", "3 bits and 8-bit embeddings, no fine-tuning"),
    Published("quantization", "GOBO", 10.2, -0.9, "gobo3+gobo4", "the same method"),
    Published("unstructured pruning", "RPP", 67.6, 0.0),
    Published("unstructured pruning", "LTH-BERT", 48.9, -0.63),
    Published("unstructured pruning", "movement pruning", 23.8, -4.73),
    Published("structured pruning", "Lin et al. 2020", 60.7, -1.0),
    Published("structured pruning", "schuBERT", 39.1, -1.86),
    Published("distillation", "LightPAFF", 22.8, -0.6),
    Published("distillation", "BiLSTM", 24.1, -3.03),
    Published("distillation", "AdaBERT", 7.4, -2.06),
    Published("distillation", "MiniLM", 60.7, -0.1),
    Published("distillation", "DistilBERT", 60.7, -1.73),
    Published("distillation", "MobileBERT", 23.1, -0.16),
    Published("distillation", "TinyBERT", 13.3, -1.0),
    Published("distillation", "Zhao et al. 2019", 1.6, -12.3),
    Published("matrix decomposition", "Noach and Goldberg 2020", 60.6, -0.13),
    Published("dynamic inference", "DeFormer", 100.0, -0.76),
    Published("dynamic inference", "DeeBERT", 100.0, -0.26),
    Published("dynamic inference", "PoWER-BERT", 100.0, -1.1),
    Published("parameter sharing", "ALBERT", 10.7, -0.58),
    Published("pruning and distillation", "LadaBERT", 40.0, -0.7),
    Published("pruning and distillation", "DynaBERT", 31.2, -0.96),
    Published("quantization and distillation", "DistilBERT with GOBO", 7.6, -2.6, "gobo4+gobo4", "the same bits, on MiniLM"),
    Published("quantization and distillation", "MobileBERT, 8 bits", 5.7, -0.23, "w8a8+w8", "8 bits everywhere, on MiniLM"),
    Published("compound", "EdgeBERT", 1.3, -1.53),
)  # fmt: skip


class Reported(NamedTuple):
    """What the table says of a system beside size and mean change; None: not reported.

    Attributes:
        gpu, cpu: times as fast as BERT-base; some timed by the survey's authors, some by the papers' on phones and small GPUs.
        scores: MNLI, QQP, SST-2 (accuracy) and SQuAD v1.1 (F1).
    """

    gpu: float | None
    cpu: float | None
    scores: tuple[float | None, float | None, float | None, float | None]


BERT_BASE = (84.6, 89.2, 93.5, 88.5)  # the table's baseline on these four
REPORTED: dict[str, Reported] = {
    "Q-BERT": Reported(1, 1, (83.9, None, 92.6, 88.3)),
    "GOBO": Reported(1, 1, (83.7, None, None, None)),
    "RPP": Reported(1, 1, (None, None, None, 88.5)),
    "LTH-BERT": Reported(1, 1, (83.1, 89.5, 92.9, 87.8)),
    "movement pruning": Reported(1, 1, (79.0, 89.3, None, 79.9)),
    "Lin et al. 2020": Reported(None, None, (None, 88.9, 91.8, None)),
    "schuBERT": Reported(2.93, 2.76, (83.4, None, 90.9, 86.7)),
    "LightPAFF": Reported(6.25, 7.09, (None, 88.6, 92.9, None)),
    "BiLSTM": Reported(10.7, 8.6, (78.6, 88.6, 91.0, None)),
    "AdaBERT": Reported(19.5, None, (81.6, 88.7, 91.8, None)),
    "MiniLM": Reported(1.94, 1.73, (84.0, 91.0, 92.0, None)),
    "DistilBERT": Reported(1.94, 1.73, (82.2, 88.5, 91.3, 86.9)),
    "MobileBERT": Reported(3.9, 4.7, (83.3, None, 92.8, 90.0)),
    "TinyBERT": Reported(9.4, 9.3, (82.5, 89.2, 92.6, None)),
    "Zhao et al. 2019": Reported(25.5, 22.7, (71.3, None, 82.2, None)),
    "Noach and Goldberg 2020": Reported(0.92, 1.05, (84.8, 89.7, 92.4, None)),
    "DeFormer": Reported(3.14, 3.55, (82.6, 90.3, None, 87.1)),
    "DeeBERT": Reported(1.25, 1.28, (83.9, 89.2, 93.4, None)),
    "PoWER-BERT": Reported(2.5, 3.1, (83.8, None, 92.1, None)),
    "ALBERT": Reported(1.2, 1.2, (84.3, 89.6, 90.3, 89.3)),
    "LadaBERT": Reported(1, 1, (83.5, 88.9, 92.8, None)),
    "DynaBERT": Reported(5.9, 8.7, (82.0, 90.4, 92.0, None)),
    "DistilBERT with GOBO": Reported(1.94, 1.73, (82.0, None, None, None)),
    "MobileBERT, 8 bits": Reported(3.9, 4.7, (83.3, None, 92.6, 90.0)),
    "EdgeBERT": Reported(1.83, None, (84.4, 89.8, 88.5, None)),
}


def published_rows() -> list[AccuracyRow]:
    """The table as rows of results."""
    return [
        AccuracyRow(
            model=MODEL, task=TASK, name=each.system, library=each.kind, drop=-each.change / 100,
            share_of_float32=each.share / 100, published=True, source=SOURCE,
        )
        for each in TABLE
    ]  # fmt: skip
