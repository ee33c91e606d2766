"""From a float weight to a `Weight`: what each scheme's codes, scales and dictionaries are."""

from qbert.quantizers.registry import quantize

__all__ = ["quantize"]
