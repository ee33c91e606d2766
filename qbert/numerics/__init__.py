"""What a block format does to numbers, in plain torch on any device: `rounding`, `scales`, and whole matrices (`blocks`).

No loop runs over elements. Rounding a number never looks at another one, and scales look at their block alone.
"""

from qbert.numerics.blocks import Blocks, dequantize, quantize_blocks, round_activations
from qbert.numerics.rounding import encode, round_units, values_of

__all__ = ["Blocks", "dequantize", "encode", "quantize_blocks", "round_activations", "round_units", "values_of"]
