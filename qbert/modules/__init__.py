"""The modules that `quantize_` puts in place of `nn.Linear` and `nn.Embedding`: plain buffers, one operator call each."""

from qbert.modules.base import GUARD, QuantizedModule
from qbert.modules.embedding import QEmbedding
from qbert.modules.linear import QLinear, QTiedLinear
from qbert.modules.spec import ModuleSpec, collect_specs

__all__ = ["GUARD", "ModuleSpec", "QEmbedding", "QLinear", "QTiedLinear", "QuantizedModule", "collect_specs"]
