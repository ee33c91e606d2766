"""The modules that `quantize_` puts in place of `nn.Linear` and `nn.Embedding`: plain buffers, one operator call each."""

from qbert.modules.attention import AttentionFormats
from qbert.modules.base import GUARD, QuantizedModule
from qbert.modules.embedding import QEmbedding
from qbert.modules.emulated import EmulatedEmbedding, EmulatedLinear, EmulatedModule, EmulatedTiedLinear
from qbert.modules.factored import FactoredLinear, products
from qbert.modules.linear import QLinear, QTiedLinear
from qbert.modules.spec import ModuleSpec, collect_specs

__all__ = [
    "GUARD", "AttentionFormats", "EmulatedEmbedding", "EmulatedLinear", "EmulatedModule", "EmulatedTiedLinear",
    "FactoredLinear", "ModuleSpec", "QEmbedding", "QLinear", "QTiedLinear", "QuantizedModule", "collect_specs", "products",
]  # fmt: skip
