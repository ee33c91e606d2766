"""Which encoders can be fused, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qbert.encoder.build import has_projection, head_size
from qbert.encoder.calibration import Calibration
from qbert.encoder.fingerprint import differs, fingerprint_of
from qbert.encoder.parts import QKV, LayerParts, parts_of
from qbert.encoder.stock import stock_obstacle
from qbert.errors import QBertError
from qbert.families import FAMILIES, EncoderFamily, family_of
from qbert.families.mpnet import KEPT_HEADS
from qbert.modules import EmulatedModule, FactoredLinear, QEmbedding, QLinear
from qbert.modules.sites import describe_sites
from qbert.ops import FLOAT_DTYPES, Activation
from qbert.ops.kernel import Pattern, Problem
from qbert.ops.reference_kernels import REFERENCE
from qbert.ops.table import select
from qbert.target import target_of


def encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module, EncoderFamily]]:
    """Qualified name, module and family of every encoder of a known family in a model, the model itself included."""
    for name, module in model.named_modules():
        family = family_of(module)
        if family is not None:
            yield name, module, family


def layer_names(base: nn.Module, family: EncoderFamily) -> list[str]:
    """Names of an encoder's layers in the order of their calls, as a calibration has them."""
    return list(family.calls(base, family.layers))


def check_calibration(base: nn.Module, calibration: Calibration, *, same_model: bool = True) -> None:
    """Holds a calibration to an encoder.

    Args:
        same_model: it must have been made of this model's weights, too, where it says of which it was made.

    Raises:
        QBertError: a layer or a slot is missing or unknown, an overflow neuron does not exist, or it is of another model.
    """
    family = family_of(base)
    assert family is not None
    names = layer_names(base, family)
    for name in calibration.layers:
        if name not in names:
            raise QBertError(f"calibration has a layer {name!r}; {type(base).__name__} has {names[0]} ... {names[-1]}")
    for name, path in family.calls(base, family.layers).items():
        if name not in calibration.layers:
            raise QBertError(f"calibration lacks layer {name!r}; it has {len(calibration.layers)} of {len(names)}")
        _check_slots(base, name, path, calibration, parts_of(family))
    if same_model:
        _check_model(base, family, calibration)


def _check_model(base: nn.Module, family: EncoderFamily, calibration: Calibration) -> None:
    found = None if calibration.fingerprint is None else fingerprint_of(base, family)
    if found is None or calibration.fingerprint is None:
        return
    reason = differs(found, calibration.fingerprint)
    if reason is not None:
        raise QBertError(f"calibration is of another model: {reason}; call qbert.calibrate on this one")


def _check_slots(base: nn.Module, name: str, path: str, calibration: Calibration, parts: LayerParts) -> None:
    scales, overflow = calibration.layers[name].scales, calibration.layers[name].overflow
    zeros = calibration.layers[name].zeros
    for slot in scales.keys() ^ parts.slots.keys():
        problem = "lacks" if slot in parts.slots else "has"
        raise QBertError(f"calibration: {name} {problem} a slot {slot!r}; allowed: {', '.join(parts.slots)}")
    for slot in (*zeros, *overflow):
        if not parts.slots[slot].activated:
            what = "a zero" if slot in zeros else "overflow"
            raise QBertError(f"calibration: {name} has {what} in {slot!r}, which comes out of no activation")
    for slot, excess in overflow.items():
        linear: Any = base.get_submodule(f"{path}.{parts.slots[slot].path}")
        if excess.neurons[-1] >= linear.in_features:
            last = linear.in_features - 1
            raise QBertError(f"calibration: {name} has no neuron {excess.neurons[-1]}; allowed: 0 ... {last}")


# ---- why not --------------------------------------------------------------------------------------------------------


def obstacle(base: nn.Module) -> str | None:
    """Why a model cannot be fused, None if it can. Looks at modules and types, not at values: a skeleton will do."""
    family = family_of(base)
    if family is None:
        known = ", ".join(each.name for each in FAMILIES)
        return f"{type(base).__name__} is of no family that can be fused ({known})"
    if any(isinstance(module, EmulatedModule) for module in base.modules()) or describe_sites(base):
        return "it is emulated, in float; fused encoders run kernels"
    try:
        reason = _configuration_obstacle(base.config, family) or _module_obstacle(base, family) or family.obstacle(base)
        return reason or stock_obstacle(base, family)
    except AttributeError as error:  # for a model that somebody took apart
        return f"it is not built like {family.name}: {error}"


def _configuration_obstacle(config: Any, family: EncoderFamily) -> str | None:
    for flag in ("is_decoder", "add_cross_attention", "is_causal"):
        if getattr(config, flag, False):
            return f"{flag} is set: only encoders are fused"
    position_type = getattr(config, "position_embedding_type", None) or "absolute"
    if position_type != "absolute":
        return f"its position embeddings are {position_type!r}, not 'absolute'"
    for name in parts_of(family).activations:
        activation = family.setting(config, name)
        try:
            Activation.named(activation)
        except QBertError as error:
            return f"its activation is none that is fused: {error}"
    return None


def _module_obstacle(base: nn.Module, family: EncoderFamily) -> str | None:
    paths = family.embeddings
    tables = [each for each in (paths.words, paths.positions, paths.token_types) if each is not None]
    width = _normed_width(base, paths.norm)
    reason = _norm_obstacle(base, paths.norm, width)
    if reason is not None:
        return reason
    for path in tables:
        table: Any = base.get_submodule(path)
        if type(table) is not QEmbedding and (type(table) is not nn.Embedding or table.max_norm is not None):
            return f"{path} is not a plain table"
        if table.embedding_dim != width:
            return f"{path} has {table.embedding_dim} columns, {paths.norm} is over {width}"
        if type(table) is nn.Embedding and table.weight.shape != (table.num_embeddings, table.embedding_dim):
            return f"{path} holds {tuple(table.weight.shape)}, not {(table.num_embeddings, table.embedding_dim)}"
        dtype = table.output_like.dtype if type(table) is QEmbedding else table.get_parameter("weight").dtype
        if dtype not in FLOAT_DTYPES:
            return f"{path} is {dtype}; fused are {', '.join(str(each) for each in FLOAT_DTYPES)}"
    reason = _padding_obstacle(base, family)
    layers = list(dict.fromkeys(family.calls(base, family.layers).values()))
    if not layers:
        return "it has no layers"
    if paths.projection is not None and has_projection(base, family):
        projection: Any = base.get_submodule(paths.projection)
        reason = reason or _linear_obstacle(base, paths.projection) or _takes(projection, paths.projection, width)
        width = getattr(projection, "out_features", width)
    for layer in layers:
        reason = reason or _layer_obstacle(base, layer, parts_of(family), width) or _head_obstacle(base, layer, family)
    return reason or _pre_norm_obstacle(base, layers, family, width)


def _pre_norm_obstacle(base: nn.Module, layers: list[str], family: EncoderFamily, width: int) -> str | None:
    """Norms before the first sum of a layer. What the first layer gets is normed already, by the embeddings' norm."""
    path = parts_of(family).next_norm
    if path is None or family.final_norm is None:
        return None
    first = f"{layers[0]}.{path}"
    if type(base.get_submodule(first)) is not nn.Identity:
        return f"{first} is not an Identity: the embeddings are normed already"
    reasons = (
        _norm_obstacle(base, norm, width) for norm in (*(f"{each}.{path}" for each in layers[1:]), family.final_norm)
    )
    return next((reason for reason in reasons if reason is not None), None)


def _padding_obstacle(base: nn.Module, family: EncoderFamily) -> str | None:
    """Positions are counted from what the embeddings module says is padding; the fused encoder asks the table."""
    if not family.skips_padding or family.embeddings.positions is None:
        return None
    embeddings, table = base.get_submodule(family.embeddings.positions.rpartition(".")[0]), family.embeddings.positions
    expected, found = base.get_submodule(table).padding_idx, getattr(embeddings, "padding_idx", None)
    return (
        None
        if found == expected
        else f"its embeddings count positions after {found}, not after the {expected} of {table}"
    )


def _layer_obstacle(base: nn.Module, name: str, parts: LayerParts, hidden: int) -> str | None:
    for path in parts.linears:
        reason = _linear_obstacle(base, f"{name}.{path}")
        if reason is not None:
            return reason
    together: list[Any] = [base.get_submodule(f"{name}.{path}") for path in parts.qkv]
    if any(type(each) is FactoredLinear for each in together):
        return f"query, key and value of {name} are one product, of which no part can be two"
    schemes = [str(each.scheme.name) for each in together]
    if len(set(schemes)) > 1:
        return f"query, key and value of {name} have different schemes: {', '.join(schemes)}"
    reasons = (_norm_obstacle(base, f"{name}.{path}", hidden) for path in parts.norms)
    return next((reason for reason in reasons if reason is not None), None) or _width_obstacle(
        base, name, parts, hidden
    )


def _width_obstacle(base: nn.Module, name: str, parts: LayerParts, hidden: int) -> str | None:
    """A linear that does not fit what fills its slot: torch says so at the call, a kernel would read what is not there."""
    widths = {"hidden": hidden}
    for flow in parts.flow:
        for path in flow.linears:
            linear: Any = base.get_submodule(f"{name}.{path}")
            reason = _takes(linear, f"{name}.{path}", widths[flow.reads])
            if reason is not None:
                return reason
            width = flow.parts * widths.setdefault(flow.writes, linear.out_features // flow.parts)
            if linear.out_features != width:
                return f"{name}.{path} gives {linear.out_features} channels, not {width}"
    return None


def _takes(linear: Any, path: str, width: int) -> str | None:
    return None if linear.in_features == width else f"{path} takes {linear.in_features} channels, not {width}"


def _linear_obstacle(base: nn.Module, path: str) -> str | None:
    module = base.get_submodule(path)
    if type(module) is FactoredLinear:
        return _factored_obstacle(base, path, module)
    if type(module) is not QLinear:
        return f"{path} is {'float' if type(module) is nn.Linear else type(module).__name__}"
    if module.scheme.activation is None:
        return f"{path} has scheme {module.scheme.name}, which has no integer activations"
    if (module.out_features, module.in_features) != tuple(module.shape):
        return f"{path} says that it is {(module.out_features, module.in_features)}, and its weight is {tuple(module.shape)}"
    if module.bias is not None and module.bias.shape != (module.out_features,):
        return f"{path}.bias is {tuple(module.bias.shape)}, not {(module.out_features,)}"
    return None


def _factored_obstacle(base: nn.Module, path: str, factored: FactoredLinear) -> str | None:
    for part in ("first", "second"):
        reason = _linear_obstacle(base, f"{path}.{part}")
        if reason is not None:
            return reason
    first, second = factored.first, factored.second
    if first.bias is not None:
        return f"{path}.first has a bias, which a linear of low rank has at its end alone"
    return _takes(second, f"{path}.second", int(first.out_features))


def _norm_obstacle(base: nn.Module, path: str, width: int) -> str | None:
    norm = base.get_submodule(path)
    if type(norm) is not nn.LayerNorm or norm.weight is None:
        return f"{path} is not a LayerNorm with a weight"
    for name, tensor in (("weight", norm.weight), ("bias", norm.bias)):
        if tensor is not None and tensor.shape != tuple(norm.normalized_shape):
            return f"{path}.{name} is {tuple(tensor.shape)}, not {tuple(norm.normalized_shape)}"
    found = _normed_width(base, path)
    return None if found == width else f"{path} is over {found} channels, not {width}"


def _normed_width(base: nn.Module, path: str) -> int:
    """Channels that a norm is over, 0 of what is no norm."""
    shape = getattr(base.get_submodule(path), "normalized_shape", ())
    return int(shape[-1]) if shape else 0


def _head_obstacle(base: nn.Module, name: str, family: EncoderFamily) -> str | None:
    qkv: list[Any] = [base.get_submodule(f"{name}.{path}") for path in family.layer.qkv]
    attention = base.get_submodule(f"{name}.{family.layer.qkv[0]}".rpartition(".")[0])
    width, heads = sum(each.out_features for each in qkv) // len(QKV), int(family.setting(base.config, "heads"))
    size = head_size(attention, width, heads)
    if size < 1 or width % size:
        return f"{name} is {width} wide, which heads of {size} do not make"
    parts = parts_of(family)
    kept = getattr(attention, KEPT_HEADS, None)
    if parts.bias is not None and width // size != (heads if kept is None else len(kept)):
        return f"{name} has {width // size} heads; biases are of {heads}, and which are gone is not said"
    if kept is not None and not (list(kept) == sorted(set(kept)) and set(kept) <= set(range(heads))):
        return f"{name} says that it kept the heads {list(kept)}; there are {heads}, in ascending order"
    device = base.get_submodule(family.embeddings.norm).get_parameter("weight").device
    given = (parts.rotary is not None, parts.window is not None, parts.bias is not None, parts.rotary is not None)
    problem = Problem(None, None, width // size, size, torch.float32, pattern=Pattern(*given))
    if select("attention", problem, target_of(device)).name != REFERENCE:
        return None
    asked = "".join(f", {name}" for name, there in problem.pattern._asdict().items() if there)
    return f"there is no attention kernel on {device} for heads of size {size}{asked}"
