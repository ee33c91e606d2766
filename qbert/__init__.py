"""qbert: BERT-family encoders, small and actually faster on hardware with low-bit matrix units.

    qbert.quantize_(model, "w8a8")          in place, any torch model with nn.Linear or nn.Embedding
    qbert.drop_layers_(model, texts, keep=4) fewer layers, without training; also prune_, factorize_ ...
    qbert.quantize_(model, fuse=True)       and BERT, RoBERTa, ELECTRA, DistilBERT as fused encoders without padding
    qbert.quantize_(model, qbert.emulate(weights="mxfp4"))      any format, computed in float, to study it
    qbert.calibrate(model, texts)           static scales for the fused encoder: quantize_(..., fuse=True, calibration=...)
    qbert.compile(model)                    CUDA graphs for fused encoders on a GPU
    qbert.explain(model)                    what runs for every module, and why
    qbert.save(model, folder)               safetensors; model.save_pretrained(folder) writes the same
    qbert.load(folder)                      strict; AutoModel.from_pretrained(folder) after `import qbert` loads the same

Importing this needs no GPU, no Triton and no compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qbert import formats, integrations
from qbert.calibrate import calibrate
from qbert.compress import Compression, compress, drop_layers_, factorize_, prune_, sparsify_, trim_vocabulary_
from qbert.convert import dequantize_, fuse_, quantize_, unfuse_
from qbert.emulation import emulate
from qbert.encoder import Calibration, compile
from qbert.errors import CheckpointError, MissingDependency, QBertError
from qbert.explain import explain
from qbert.recipe import Recipe
from qbert.target import cpu_target

if TYPE_CHECKING:
    from qbert.integrations.transformers import QBertConfig, load, save

__version__ = "0.1.0"
__all__ = [
    "Calibration", "CheckpointError", "Compression", "MissingDependency", "QBertConfig", "QBertError", "Recipe", "calibrate",
    "compile", "compress", "cpu_target", "dequantize_", "drop_layers_", "emulate", "explain", "factorize_", "formats", "fuse_",
    "load", "prune_", "quantize_", "save", "sparsify_", "trim_vocabulary_", "unfuse_",
]  # fmt: skip

# These need transformers' model code, which takes seconds to import; they are looked up when first used.
_FROM_TRANSFORMERS = ("QBertConfig", "load", "save")


def __getattr__(name: str) -> Any:
    if name in _FROM_TRANSFORMERS:
        try:
            from qbert.integrations import transformers
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "transformers":
                raise
            message = f"qbert.{name} needs transformers; get it with: pip install 'transformers>=5,<6'"
            raise MissingDependency(message) from None
        return getattr(transformers, name)
    raise AttributeError(f"module 'qbert' has no attribute {name!r}")


integrations.register()
