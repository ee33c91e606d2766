"""L7. The modules that `quantize_` puts in place of `nn.Linear` and `nn.Embedding`: plain buffers, one operator call each."""

from qbert.nn.modules import GUARD, QEmbedding, QLinear, QTiedLinear, QuantizedModule
from qbert.nn.spec import ModuleSpec, collect_specs

__all__ = ["GUARD", "ModuleSpec", "QEmbedding", "QLinear", "QTiedLinear", "QuantizedModule", "collect_specs"]
