"""peft: LoRA on quantized linears and tables, and quantizing a model that has adapters. Adapters stay float and are trained.

Importing this module registers with peft (see `qbert.integrations`). An adapter cannot be merged into a quantized weight, whose
codes have no room for it: that is a named error, where peft would add it to a decoded copy that nobody reads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NoReturn

from peft import LoraConfig, PeftModel
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from qbert import convert
from qbert.errors import QBertError
from qbert.modules import EmulatedLinear, QEmbedding, QLinear, QTiedLinear, QuantizedModule
from qbert.recipe import Recipe

_ALL_LINEAR = "all-linear"
_MERGING = ("merge", "unmerge")


class LoraQLinear(lora.Linear):
    """`peft`'s LoRA layer around a `QLinear` or a linear tied to a quantized table."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        _refuse_merging(self)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


class LoraQEmbedding(lora.Embedding):
    """`peft`'s LoRA layer around a `QEmbedding`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        _refuse_merging(self)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim


_LINEARS = (QLinear, EmulatedLinear)
_LAYERS = {QLinear: LoraQLinear, QTiedLinear: LoraQLinear, QEmbedding: LoraQEmbedding}


def _merging_refused(*_: Any, **__: Any) -> NoReturn:
    raise QBertError(
        "an adapter cannot be merged into a quantized weight or taken out of it; call qbert.dequantize_(model) first, merge, "
        "and quantize again"
    )


def _refuse_merging(layer: BaseTunerLayer) -> None:
    """Of this layer alone, until its base is float again."""
    layer.__dict__.update(dict.fromkeys(_MERGING, _merging_refused))


def _allow_merging(layer: BaseTunerLayer) -> None:
    for name in _MERGING:
        if layer.__dict__.get(name) is _merging_refused:
            del layer.__dict__[name]


def _adapters(model: nn.Module) -> Mapping[nn.Module, str]:
    """Linears and tables that peft trains, or keeps to be put back -> why they stay float."""
    found: dict[nn.Module, str] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            parts = [part for name, part in layer.named_children() if name != "base_layer"]
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            parts = list(layer.children())
        else:
            continue
        found |= {inner: "peft trains it" for part in parts for inner in part.modules()}
    return found


def _follow(model: nn.Module, _: Recipe | None) -> None:
    """Merging is refused where the base is quantized, and peft's own elsewhere."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            quantized = isinstance(layer.get_base_layer(), QuantizedModule | QTiedLinear)
            (_refuse_merging if quantized else _allow_merging)(layer)


def _register() -> None:
    """Every configuration knows the quantized layers, those that `PeftModel.from_pretrained` reads too, "all-linear" has them;
    prompts find a quantized table; and a model is asked whether it may be merged before its first layer is."""
    made, expand = LoraConfig.__post_init__, tuners_utils._maybe_include_all_linear_layers
    allowed, set_up = BaseTuner._check_merge_allowed, PeftModel._setup_prompt_encoder

    @functools.wraps(made)
    def post_init(self: LoraConfig) -> None:
        made(self)
        self._register_custom_module(_LAYERS)

    @functools.wraps(expand)
    def include(config: Any, model: nn.Module) -> Any:
        given = getattr(config, "target_modules", None)
        config = expand(config, model)
        if isinstance(given, str) and given.lower() == _ALL_LINEAR:
            config.target_modules |= {name for name, module in model.named_modules() if type(module) in _LINEARS}
        return config

    @functools.wraps(allowed)
    def check_merge_allowed(self: BaseTuner) -> None:
        allowed(self)
        layers = (layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer))
        if any(layer.__dict__.get(_MERGING[0]) is _merging_refused for layer in layers):
            _merging_refused()

    @functools.wraps(set_up)
    def set_up_prompts(self: PeftModel, adapter_name: str) -> None:
        set_up(self, adapter_name)
        if self.word_embeddings is None:  # peft looks for a parameter as long as the vocabulary
            self.word_embeddings = self.base_model.get_input_embeddings()

    PeftModel._setup_prompt_encoder = set_up_prompts
    LoraConfig.__post_init__ = post_init
    BaseTuner._check_merge_allowed = check_merge_allowed
    tuners_utils._maybe_include_all_linear_layers = include


_register()
convert.when_planned(_adapters)
convert.when_changed(_follow)
