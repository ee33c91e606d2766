"""torch.onnx: an export of a quantized model is refused in one line, where torch's exporter would end in pages about itself."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn

from qbert.encoder import fused_forward
from qbert.errors import QBertError
from qbert.modules import QTiedLinear, QuantizedModule


def _refuse(model: object) -> None:
    """
    Raises:
        QBertError: something in a model is quantized, so that ONNX has no operators for it.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, QuantizedModule | QTiedLinear) or fused_forward(module) is not None:
            raise QBertError(
                "torch.onnx.export does not take a model that qbert quantized; for ONNX with 8-bit weights save it and call "
                "`qbert export FOLDER --to onnx-qdq -o OUT`, for float ONNX call qbert.dequantize_(model) first"
            )


def _register() -> None:
    exporter: Any = importlib.import_module("torch.onnx")  # no attribute of torch yet: this runs while it is imported
    export = exporter.export

    @functools.wraps(export)
    def checked(model: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(model)
        return export(model, *args, **kwargs)

    exporter.export = checked


_register()
