"""Encoders made smaller without training: layers, heads, neurons and words taken out of a float model, in place.

Order: words, layers, heads and neurons, low rank, zeros, then quantize and calibrate. Every function returns a report of
what it cost.
"""

from qbert.compress.factorize import FactorizeReport, LinearRank, factorize_
from qbert.compress.guide import Guide, guide
from qbert.compress.layers import drop_layers_
from qbert.compress.prune import PruneReport, prune_
from qbert.compress.recipe import Compressed, Compression, CompressionReport, compress
from qbert.compress.report import Agreement, Report, Size
from qbert.compress.search import BudgetNotMet, Searched, search
from qbert.compress.search_report import SearchReport
from qbert.compress.sparsify import LinearZeros, SparsifyReport, sparsify_
from qbert.compress.vocabulary import VocabularyReport, trim_vocabulary_

__all__ = [
    "Agreement", "BudgetNotMet", "Compressed", "Compression", "CompressionReport", "FactorizeReport", "Guide", "LinearRank",
    "LinearZeros", "PruneReport", "Report", "SearchReport", "Searched", "Size", "SparsifyReport", "VocabularyReport",
    "compress", "drop_layers_", "factorize_", "guide", "prune_", "search", "sparsify_", "trim_vocabulary_",
]  # fmt: skip
