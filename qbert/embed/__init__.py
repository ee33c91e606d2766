"""Files of texts to files of vectors: millions of rows, resumed after a kill, on one machine or on a Ray cluster."""

from qbert.embed.embedder import SAME_BITS, Embedded, Embedder, embedder_of
from qbert.embed.estimate import Estimate, estimate
from qbert.embed.job import DEFAULT_CHUNK_ROWS, EmbedReport, Engine, embed_file, here
from qbert.embed.pipeline import Pipeline, pipeline_of
from qbert.embed.sources import DEFAULT_COLUMN, Source

__all__ = [
    "DEFAULT_CHUNK_ROWS", "DEFAULT_COLUMN", "SAME_BITS", "EmbedReport", "Embedded", "Embedder", "Engine", "Estimate",
    "Pipeline", "Source", "embed_file", "embedder_of", "estimate", "here", "pipeline_of",
]  # fmt: skip
