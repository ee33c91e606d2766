"""bitsandbytes: LLM.int8() as its documentation shows it (`Linear8bitLt`, threshold 6), on its CPU backend."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from benchmarks.peers.base import library
from benchmarks.peers.torch_peer import TorchPeer

_THRESHOLD = 6.0  # columns with larger activations are multiplied in float: its paper's and its documentation's value


class BitsAndBytes(TorchPeer):
    """bfloat16 model, int8 linears."""

    def converted(self, model: Any) -> Any:
        layers = library("bitsandbytes").nn
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says in every call that it casts to float16
        model = model.to(torch.bfloat16)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    new = layers.Linear8bitLt(
                        child.in_features, child.out_features, bias=child.bias is not None, has_fp16_weights=False,
                        threshold=_THRESHOLD,
                    )  # fmt: skip
                    new.load_state_dict(child.state_dict())
                    setattr(parent, name, new.to("cpu"))
        return model.eval()
