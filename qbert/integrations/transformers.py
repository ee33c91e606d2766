"""transformers: `from_pretrained(..., quantization_config=QBertConfig(...))`, `save_pretrained`, `from_pretrained`, load.

Importing this module registers the method ``"qbert"`` with transformers (see `qbert.integrations`). There is one loader:
`qbert.load` is transformers' own `from_pretrained` behind the strict check, and `from_pretrained` runs the same check.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qbert import checkpoint, convert
from qbert.checkpoint import METHOD, Record
from qbert.emulation import Emulation
from qbert.encoder import Calibration
from qbert.errors import CheckpointError, QBertError
from qbert.families import KEEP_FLOAT
from qbert.modules import ModuleSpec, QEmbedding, QTiedLinear, QuantizedModule, collect_specs
from qbert.modules.attention import register as register_attention
from qbert.modules.sites import describe_sites
from qbert.recipe import Recipe
from qbert.shapes import recorded_plan, resize_

# Configuration entries with these words in their names, if they are integers, say how often something is built.
_COUNTED = {"layer": 1024, "label": 2**20}
# What a quantized transformers model has of its own in place of its class's, and where it keeps the former ties.
_REMOTE = "auto_map"
_TIES, _FORMER_TIES = "_tied_weights_keys", "_qbert_former_ties"
_RESIZE, _SET_TABLE = "resize_token_embeddings", "set_input_embeddings"


@register_quantization_config(METHOD)
class QBertConfig(QuantizationConfigMixin):
    """Quantization configuration for `from_pretrained`; takes the arguments of `qbert.Recipe`, and of `quantize_`.

    Args:
        linear, embedding, exclude, overrides, keep_float: see `qbert.Recipe`.
        fuse, calibration: see `qbert.quantize_`; a calibration may be plain data.
        modules, shapes: what stands in a checkpoint, and what was taken out of it; written on save, never given by hand.
        source: the model that was quantized, for reports.
        digest: of a checkpoint's contents; written on save.
        emulation: block formats, as in a record; `QBertConfig.of_recipe(qbert.emulate(...))` writes it.
    """

    def __init__(
        self,
        linear: str | None = "w8a8",
        embedding: str | None = None,
        exclude: Sequence[str] = (),
        overrides: Mapping[str, str | None] | Sequence[tuple[str, str | None]] = (),
        keep_float: Sequence[str] = KEEP_FLOAT,
        fuse: bool = False,
        calibration: Calibration | Mapping[str, Any] | None = None,
        modules: Mapping[str, Any] | None = None,
        shapes: Mapping[str, Any] | None = None,
        source: str | None = None,
        digest: str | None = None,
        emulation: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        self.quant_method = METHOD
        unknown = rest.keys() - {"quant_method", "format_version"}
        if unknown:
            raise QBertError(f"QBertConfig has no argument {sorted(unknown)[0]!r}; allowed: those of qbert.Recipe")
        self.record: Record | None = None
        if modules is None and shapes is None:
            linear = None if emulation is not None and linear == "w8a8" else linear
            self.recipe = Recipe(linear, embedding, exclude, dict(overrides), keep_float)
            if emulation is not None:
                self.recipe = Emulation.from_dict(self.recipe, emulation)
            self.fuse, self.calibration = _fusing(fuse, calibration)
            return
        fields: dict[str, Any] = {"linear": linear, "embedding": embedding, "modules": modules, "source": source}
        fields |= {"emulation": emulation, "fuse": fuse, "calibration": calibration, "shapes": shapes}
        for name, value in (("exclude", exclude), ("overrides", overrides), ("keep_float", keep_float)):
            fields[name] = list(value) if isinstance(value, tuple) else value  # a default; files hold lists
        self.record = Record.parse({"quant_method": METHOD, "digest": digest, **fields, **rest})
        self.recipe = self.record.recipe
        self.fuse, self.calibration = self.record.fuse, self.record.calibration

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> QBertConfig:
        """The configuration that asks for a recipe, `qbert.emulate(...)` among them."""
        return cls(**recipe.to_dict())

    @classmethod
    def of_record(cls, record: Record) -> QBertConfig:
        """The configuration of a quantized model."""
        return cls(**record.to_dict())

    def to_dict(self) -> dict[str, Any]:
        if self.record is not None:
            return self.record.to_dict()
        recipe = self.recipe.to_dict()
        version = checkpoint.format_version(self.calibration, emulation=recipe.get("emulation"))
        data = {"quant_method": METHOD, "format_version": version, **recipe}
        if self.fuse:
            data |= {"fuse": True, "calibration": self.calibration and self.calibration.to_dict()}
        return data


def _fusing(fuse: bool, calibration: Calibration | Mapping[str, Any] | None) -> tuple[bool, Calibration | None]:
    if not isinstance(fuse, bool):
        raise QBertError(f"fuse is {fuse!r}; allowed: True, False")
    if calibration is not None and not fuse:
        raise QBertError("a calibration is for the fused encoder; pass fuse=True with it")
    if calibration is None or isinstance(calibration, Calibration):
        return fuse, calibration
    return fuse, Calibration.from_dict(calibration)


@register_quantizer(METHOD)
class QBertHfQuantizer(HfQuantizer):
    """transformers' view of qbert: empty modules before the weights come, the kernels' layouts after."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        record = self.quantization_config.record
        if record is None:
            raise CheckpointError("quantization_config.modules", "must say what each quantized module is", "nothing")
        files = kwargs.get("checkpoint_files") or []
        skeleton = build_skeleton(_stored_config(files, model.config), record, checkpoint.tensor_names(files))
        with torch.device("cpu"):  # transformers builds models under the meta device; the check reads real values
            checkpoint.check_files(files, record, checkpoint.expected_tensors(skeleton, skeleton.all_tied_weights_keys))
        if record.shapes is not None:
            resize_(model, record.shapes)
        convert.install_(model, _rename(record.modules, skeleton, model), record.recipe)
        _forget_quantized_ties(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            for module in model.modules():
                if isinstance(module, QuantizedModule):
                    module.use_best_layout()
            recipe = self.quantization_config.recipe
            if isinstance(recipe, Emulation):
                convert.round_sites_(model, recipe)
            if self.quantization_config.fuse:
                convert.fuse_loaded_(model, self.quantization_config.calibration)
            record = Record.of(model, self.quantization_config.recipe, self.quantization_config.record.source)
            _attach(model, record)
        else:
            config = self.quantization_config
            convert.quantize_(model, config.recipe, fuse=config.fuse, calibration=config.calibration)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # After save_pretrained a configuration holds the name of its type.
        convert.dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        state_dict = model.state_dict()
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone are written, without a configuration
            return state_dict, {}
        # The record's names are this version's; a checkpoint that was loaded under older names is not saved under them.
        model._weight_conversions = []
        record = Record.of(model, self.quantization_config.recipe, _source(self.quantization_config))
        absent = set(model.all_tied_weights_keys) | set(model._keys_to_ignore_on_save or ())
        stored = {name: tensor for name, tensor in state_dict.items() if name not in absent}
        model.config.__dict__.pop(_REMOTE, None)  # left by files with code of their own; this class is transformers'
        _require_loadable(model, record, stored)
        model.config.quantization_config = QBertConfig.of_record(checkpoint.signed(record, stored))
        return state_dict, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # all but the quantized weights: adapters, heads, norms, biases

    @property
    def is_qat_trainable(self) -> bool:
        return True  # transformers' Trainer, evaluate() included, asks for this where a model has no adapter

    @property
    def is_compileable(self) -> bool:
        return True


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a quantized checkpoint as the class it was saved from.

    Args:
        folder: written by `qbert.save` or `save_pretrained`.
        kwargs: for `from_pretrained` (``dtype``, ``device_map``, ``attn_implementation`` ...).

    Raises:
        CheckpointError: the first rule that the checkpoint breaks.
    """
    record, config = check(folder)
    model_class = _architecture(config)
    arguments = _arguments(model_class, record, checkpoint.tensor_names(checkpoint.weight_files(folder)))
    with _refused(str(folder), "must load"):
        return model_class.from_pretrained(str(folder), local_files_only=True, **{**arguments, **kwargs})


def check(folder: str | Path) -> tuple[Record, PretrainedConfig]:
    """Holds a checkpoint folder to every rule, without loading it into a model.

    Raises:
        CheckpointError: the first rule that it breaks.
    """
    folder = checkpoint.require_folder(folder)
    data = checkpoint.read_config(folder)
    record = Record.parse(data["quantization_config"])
    files = checkpoint.weight_files(folder)
    _check_counts(data, len(record.modules))
    config = _parsed_config(data)
    skeleton = build_skeleton(config, record, checkpoint.tensor_names(files))
    checkpoint.check_files(files, record, checkpoint.expected_tensors(skeleton, skeleton.all_tied_weights_keys))
    return record, config


def save(model: PreTrainedModel, folder: str | Path, *, source: str | None = None) -> None:
    """Writes a quantized model: to a temporary folder beside the target, which then takes its place.

    Raises:
        QBertError: a model that is neither quantized nor of compressed shapes, or a target that is not a checkpoint and not
            empty.
    """
    if not isinstance(model, PreTrainedModel):
        raise QBertError(f"{type(model).__name__} is not a transformers model; allowed: one, or the one inside it")
    _keep_in_step(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None and recorded_plan(model) is not None:  # a plain one: transformers' own files say all of it
        with checkpoint.replacing(folder) as fresh:
            model.save_pretrained(fresh)
        return
    if not isinstance(quantizer, QBertHfQuantizer):
        raise QBertError(f"{type(model).__name__} is not quantized by qbert; call qbert.quantize_ first")
    if source is not None:
        record = Record.of(model, quantizer.quantization_config.recipe, source)
        _attach(model, record)
    with checkpoint.replacing(folder) as fresh:
        model.save_pretrained(fresh)


def _require_loadable(model: PreTrainedModel, record: Record, stored: Mapping[str, Tensor]) -> None:
    """Holds a model that is to be saved to what loading will build of its configuration.

    Raises:
        QBertError: a class that transformers does not have, or modules of other shapes than its configuration says.
    """
    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise QBertError(
            f"{kind.__module__}.{kind.__qualname__} is no class of transformers, so what is saved of it could not be loaded; "
            f"save the transformers model inside, or one of the class that it was made from"
        )
    config = copy.deepcopy(model.config)
    config.architectures = [kind.__name__]
    try:
        skeleton = build_skeleton(config, record, stored.keys())
    except CheckpointError as error:
        raise QBertError(f"this {kind.__name__} could not be loaded again: {error}") from None
    expected = checkpoint.expected_tensors(skeleton, skeleton.all_tied_weights_keys)
    for name, spec in expected.items():
        if name in stored and tuple(stored[name].shape) != spec.shape:
            raise QBertError(
                f"this {kind.__name__} could not be loaded again: {name} is {tuple(stored[name].shape)}, and its configuration "
                f"makes that {spec.shape}"
            )


def _stored_config(files: Sequence[str | Path], config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that was saved with a checkpoint's files, which are held to it: `config` may be what a user asks for
    instead, with other labels for example."""
    folder = Path(files[0]).parent if files else None
    if folder is None or not checkpoint.is_checkpoint(folder):
        return config
    return _parsed_config(checkpoint.read_config(folder))


def _parsed_config(data: Mapping[str, Any]) -> PretrainedConfig:
    with _refused(checkpoint.CONFIG_FILE, "must describe a model that transformers knows"):
        return transformers.AutoConfig.for_model(**{k: v for k, v in data.items() if k != "quantization_config"})


def build_skeleton(config: PretrainedConfig, record: Record, names: Collection[str]) -> PreTrainedModel:
    """The saved model on the meta device: no values, but the name, type and shape of every tensor.

    Args:
        config, record: of the checkpoint.
        names: of the tensors that it stores.
    """
    model_class = _architecture(config)
    with _refused(checkpoint.CONFIG_FILE, f"must build a {model_class.__name__}"), torch.device("meta"):
        skeleton = model_class(config, **_arguments(model_class, record, names))
    with _refused("quantization_config", "must fit the model"):
        if record.shapes is not None:
            resize_(skeleton, record.shapes)
        convert.install_(skeleton, record.modules, record.recipe)
        checkpoint.check_fusion(record, skeleton)
    _forget_quantized_ties(skeleton)
    return skeleton


@contextlib.contextmanager
def _refused(what: str, rule: str) -> Iterator[None]:
    """Foreign code over a configuration that may be hostile can raise anything; users get the one error promised."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(what, rule, " ".join(str(error).split())[:300]) from error


def _arguments(model_class: type[PreTrainedModel], record: Record, names: Collection[str]) -> dict[str, bool]:
    """Bare encoders are saved with or without a pooler; no configuration says which, the names of what is stored do."""
    if "add_pooling_layer" not in inspect.signature(model_class.__init__).parameters:
        return {}
    return {"add_pooling_layer": any(name.startswith("pooler.") for name in (*record.modules, *names))}


def _architecture(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that a checkpoint was saved from. Only transformers' own names are looked up."""
    names = config.architectures
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    found = getattr(transformers, name, None) if name and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"{checkpoint.CONFIG_FILE}: architectures", "must name one model class of transformers", names
        )
    model_class: type[PreTrainedModel] = found
    if model_class.config_class is not None and not isinstance(config, model_class.config_class):
        kind, wanted = type(config).__name__, model_class.config_class.__name__
        raise CheckpointError(
            f"{checkpoint.CONFIG_FILE}: architectures",
            f"must be of the configuration's model_type, {kind}",
            f"{name} of {wanted}",
        )
    remote = getattr(config, _REMOTE, None)
    own = [str(each) for each in (remote.values() if isinstance(remote, Mapping) else ())]
    own = [each for each in own if each.rpartition(".")[2] == name]
    if own:
        raise CheckpointError(
            f"{checkpoint.CONFIG_FILE}: {_REMOTE}",
            f"must not name code of its own for {name}: only transformers' is run",
            own[0],
        )
    return model_class


def _check_counts(config: Mapping[str, Any], quantized_modules: int) -> None:
    """A hostile count would keep a constructor busy for ever or fill the memory; every layer has linears of its own."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value, quantized_modules)
        for word, most in _COUNTED.items():
            if word in name and isinstance(value, int) and value > max(most, quantized_modules):
                where = f"{checkpoint.CONFIG_FILE}: {name}"
                raise CheckpointError(where, f"must be a plausible number of {word}s", value)


def _rename(specs: Mapping[str, ModuleSpec], saved: PreTrainedModel, target: PreTrainedModel) -> dict[str, ModuleSpec]:
    """The specs under the target's names: a head model's encoder goes by a prefix that the bare encoder does not have.

    What the target lacks (another head, a pooler) is left out; transformers reports its tensors as unexpected.
    """
    prefix = f"{saved.base_model_prefix}."
    renamed = dict(specs)
    if saved.base_model is saved and target.base_model is not target:
        renamed = {prefix + name: _retie(spec, lambda owner: prefix + owner) for name, spec in specs.items()}
    elif saved.base_model is not saved and target.base_model is target:
        renamed = {
            name.removeprefix(prefix): _retie(spec, lambda owner: owner.removeprefix(prefix))
            for name, spec in specs.items()
            if name.startswith(prefix)
        }
    there = {name for name, _ in target.named_modules(remove_duplicate=False)}
    return {name: spec for name, spec in renamed.items() if name in there}


def _retie(spec: ModuleSpec, rename: Any) -> ModuleSpec:
    return spec if spec.tied_to is None else spec.model_copy(update={"tied_to": rename(spec.tied_to)})


def _forget_quantized_ties(model: PreTrainedModel) -> None:
    """transformers ties parameters by name; where a quantized module stands there is none, and the tie is the module's.

    `tie_weights` asks each transformers model inside for its ties, as patterns of names; so each gets those that are left.
    """
    for inner in _transformers_models(model):
        parameters = dict(inner.named_parameters(remove_duplicate=False))
        weights = [
            f"{name}.weight" for name, module in inner.named_modules(remove_duplicate=False) if _quantized(module)
        ]
        if not weights:
            continue
        expanded = {
            target: source
            for target, source in getattr(inner, "all_tied_weights_keys", {}).items()
            if target in parameters and source in parameters
        }
        inner.all_tied_weights_keys = expanded
        former = inner.__dict__.setdefault(_FORMER_TIES, getattr(inner, _TIES))
        if former is not None:
            setattr(inner, _TIES, _ties_left(former, expanded, weights))
        inner.__dict__[_RESIZE] = functools.partial(_resize_token_embeddings, inner)
        inner.__dict__[_SET_TABLE] = functools.partial(_set_input_embeddings, inner)


def _ties_left(former: Mapping[str, str], expanded: Mapping[str, str], weights: Collection[str]) -> dict[str, str]:
    """Patterns of names that reach no quantized weight, and of the others the pairs that are parameters still.

    Args:
        former: pattern of targets -> pattern of sources.
        expanded: the pairs of parameters that are tied.
        weights: names of the quantized ones.
    """
    left: dict[str, str] = {}
    for target, source in former.items():
        if any(re.search(f"^{pattern}", weight) for pattern in (target, source) for weight in weights):
            left |= {name: expanded[name] for name in expanded if re.search(f"^{target}", name)}
        else:
            left[target] = source
    return left


def _remember_ties(model: PreTrainedModel) -> None:
    """Undoes `_forget_quantized_ties`."""
    found = [inner for inner in _transformers_models(model) if _FORMER_TIES in inner.__dict__]
    for inner in found:
        former = inner.__dict__.pop(_FORMER_TIES)
        for name in (_TIES, _RESIZE, _SET_TABLE):
            inner.__dict__.pop(name, None)
        if getattr(inner, _TIES) != former:  # it was the model's own before
            setattr(inner, _TIES, former)
    for inner in found:
        inner.all_tied_weights_keys = inner.get_expanded_tied_weights_keys(all_submodels=True)


def _resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """transformers' own, which rebuilds the table and the head over it where the number of rows is another.

    Raises:
        QBertError: one of them is quantized.
    """
    table: Any = model.get_input_embeddings()
    vocabulary = [each for each in (table, model.get_output_embeddings()) if each is not None]
    if any(map(_quantized, vocabulary)):
        rows = [each.shape[0] if _quantized(each) else each.weight.shape[0] for each in vocabulary]
        wanted = rows[0] if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        elif new_num_tokens is None:
            return table
        if all(each == wanted for each in rows):
            return table
        raise QBertError(
            f"resize_token_embeddings: the vocabulary of this {type(model).__name__} is quantized and has {rows[0]} rows, "
            f"not {wanted}; call qbert.dequantize_(model) first, resize it, and quantize it again"
        )
    resized: nn.Module = type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
    return resized


def _set_input_embeddings(model: PreTrainedModel, value: nn.Module) -> None:
    """transformers' own; a head that is tied to a quantized table would go on computing with that.

    Raises:
        QBertError: there is such a head.
    """
    table = model.get_input_embeddings()
    tied = [name for name, each in model.named_modules() if isinstance(each, QTiedLinear) and each.owner is table]
    if tied and value is not table:
        raise QBertError(
            f"set_input_embeddings: the table of this {type(model).__name__} is quantized, and {tied[0]} computes with it; "
            f"call qbert.dequantize_(model) first, set it, and quantize again"
        )
    type(model).set_input_embeddings(model, value)


def _quantized(module: object) -> bool:
    return isinstance(module, QuantizedModule | QTiedLinear)


def _transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _attach(model: PreTrainedModel, record: Record) -> None:
    """Makes `save_pretrained` and `model.dequantize` know that the model is quantized, or float in shapes of its own."""
    model.config.quantization_config = QBertConfig.of_record(record)
    model.hf_quantizer = QBertHfQuantizer(model.config.quantization_config, pre_quantized=True)
    model.is_quantized = bool(record.modules)
    model.quantization_method = METHOD
    _forget_quantized_ties(model)


def _source(config: QBertConfig) -> str | None:
    return config.record.source if config.record else None


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _outermost(child)]


def _follow(model: nn.Module, recipe: Recipe | None) -> None:
    """Keeps the records of every transformers model inside `model` in step with what `convert` did to it."""
    for inner in _outermost(model):
        if recipe is not None:
            if any(isinstance(module, QuantizedModule) for module in inner.modules()):
                _attach(inner, Record.of(inner, recipe, inner.config.name_or_path or None))
            continue
        _remember_ties(inner)
        for each in _transformers_models(inner):  # one inside may have been quantized by itself
            if isinstance(getattr(each, "hf_quantizer", None), QBertHfQuantizer):
                each.hf_quantizer.remove_quantization_config(each)
        if _is_reshaped(inner):
            _attach(inner, Record.of(inner, _FLOAT, inner.config.name_or_path or None))


_FLOAT = Recipe(linear=None)


def _is_reshaped(model: nn.Module) -> bool:
    """Whether it has shapes of its own, which no class of transformers builds."""
    shapes = recorded_plan(model)
    return shapes is not None and not shapes.plain


def _keep_in_step(model: PreTrainedModel) -> None:
    """Gives a model the record of what is quantized in it now: a part may have been quantized or dequantized by itself.

    Raises:
        QBertError: it computes in formats that no record could say, for none of its weights is in one.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    ours, specs = isinstance(quantizer, QBertHfQuantizer), collect_specs(model)
    rounded = [] if specs else describe_sites(model)
    if rounded:
        raise QBertError(
            f"{type(model).__name__} has {rounded[0]}, and no weights in a format that a record could name beside it; emulate "
            "weights or embeddings, too, or save the float model after qbert.dequantize_"
        )
    if quantizer is None and (specs or _is_reshaped(model)):
        recipe = _recipe_of(model, specs) if specs else _FLOAT
        _attach(model, Record.of(model, recipe, model.config.name_or_path or None))
    elif ours and not specs and not _is_reshaped(model):
        quantizer.remove_quantization_config(model)


def _recipe_of(model: PreTrainedModel, specs: Mapping[str, ModuleSpec]) -> Recipe:
    """The recipe of the one part of a model that was quantized; where it has several or none, one that says what is there."""
    found = [
        each.hf_quantizer for each in _transformers_models(model) if getattr(each, "hf_quantizer", None) is not None
    ]
    if len(found) == 1:
        recipe: Recipe = found[0].quantization_config.recipe
        return recipe
    return Recipe(linear=None, overrides={name: spec.scheme for name, spec in specs.items() if spec.tied_to is None})


def _refuse_others(model: nn.Module) -> Mapping[nn.Module, str]:
    """
    Raises:
        QBertError: transformers loaded a part of it quantized by another method.
    """
    for inner in _transformers_models(model):
        quantizer = getattr(inner, "hf_quantizer", None)
        if quantizer is not None and not isinstance(quantizer, QBertHfQuantizer):
            method = getattr(
                quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method
            )
            raise QBertError(f"{type(inner).__name__} is quantized already, by {method}; allowed: a float model")
    return {}


def _open_to_others(folder: Path) -> None:
    """safetensors closes its files to all other users; they get what the user's umask gave the configuration."""
    config = folder / checkpoint.CONFIG_FILE
    if config.is_file():
        for file in folder.glob("*.safetensors"):
            file.chmod(config.stat().st_mode)


def _extend_transformers() -> None:
    """What every transformers model does in other words where something in it is quantized, whichever part that was."""
    save, count = PreTrainedModel.save_pretrained, PreTrainedModel.num_parameters

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        _keep_in_step(self)
        result = save(self, save_directory, *args, **kwargs)
        if isinstance(getattr(self, "hf_quantizer", None), QBertHfQuantizer):
            _open_to_others(Path(save_directory))
        return result

    @functools.wraps(count)
    def num_parameters(self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        left_out = QEmbedding if exclude_embeddings else ()
        codes = [] if only_trainable else [each for each in self.modules() if isinstance(each, QuantizedModule)]
        weights = sum(math.prod(each.shape) for each in codes if not isinstance(each, left_out))
        return int(count(self, only_trainable, exclude_embeddings)) + weights

    PreTrainedModel.save_pretrained, PreTrainedModel.num_parameters = save_pretrained, num_parameters


_extend_transformers()
register_attention()  # of pickled models that are emulated, too
convert.when_planned(_refuse_others)
convert.when_changed(_follow)
