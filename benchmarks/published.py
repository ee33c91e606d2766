"""What papers say of their own: rows of a survey's table, beside which `bench_accuracy` puts what was measured here.

Ganesh et al. 2021, Compressing Large-Scale Transformer-Based Models: A Case Study on BERT, TACL 9, table 1: size of the model
with embeddings, and the mean change of its scores against BERT-base's over the tasks that each paper reports (MNLI, QQP, SST-2,
SQuAD). Its sizes of encoders alone are left out: those of the dictionary rows cannot follow from 3- and 4-bit codes.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def published_rows() -> list[AccuracyRow]:
    """The table as rows of results."""
    return [
        AccuracyRow(
            model=MODEL, task=TASK, name=each.system, library=each.kind, drop=-each.change / 100,
            share_of_float32=each.share / 100, published=True, source=SOURCE,
        )
        for each in TABLE
    ]  # fmt: skip
