"""The only code that edits a model: quantize_, dequantize_, fuse_, unfuse_, and install_ (empty modules for a file)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbert.emulation import Emulation
from qbert.encoder import Calibration, check_calibration, encoders, obstacle, remove_fused, set_fused
from qbert.encoder.stock import is_stock
from qbert.errors import CheckpointError, QBertError
from qbert.formats import EmulatedScheme, Role, Scheme
from qbert.modules import (
    EmulatedEmbedding,
    EmulatedLinear,
    EmulatedModule,
    EmulatedTiedLinear,
    ModuleSpec,
    QEmbedding,
    QLinear,
    QTiedLinear,
    QuantizedModule,
)  # fmt: skip
from qbert.modules.attention import round_attention
from qbert.modules.sites import (
    describe_sites,
    remove_sites,
    round_activation_functions,
    round_inputs,
    round_norms,
)
from qbert.quantizers import quantize
from qbert.quantizers.registry import check_weight
from qbert.recipe import Decision, Recipe, as_recipe
from qbert.weight import Weight
from qbert.weight.codec import decode

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
Quantized = QLinear | QEmbedding | QTiedLinear

# torch's own transformer blocks hand the weights of their linears to fused functions, past the linears' forward.
_READS_WEIGHTS_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_ROLES: dict[type[nn.Module], Role] = {nn.Linear: Role.LINEAR, nn.Embedding: Role.EMBEDDING}
# Packages whose linears hold codes; other modules of theirs are float.
_QUANTIZERS = (
    "aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "gptqmodel", "hqq", "optimum.quanto",
    "torch.ao.nn.quantized", "torchao",
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_REASONS = "_qbert_reasons"
_ZEROS = 8
_observers: list[Callable[[nn.Module, Recipe | None], None]] = []
_planners: list[Callable[[nn.Module], Mapping[nn.Module, str]]] = []


@dataclass(frozen=True)
class PlanEntry:
    """What `quantize_` will do with one linear or embedding.

    Attributes:
        name: its first qualified name.
        module: the float module.
        decision: scheme and reason.
        owner: name of the module whose weight it shares, if it follows another one.
    """

    name: str
    module: nn.Linear | nn.Embedding
    decision: Decision
    owner: str | None = None


def quantize_(
    model: nn.Module,
    recipe: Recipe | str = "w8a8",
    *,
    fuse: bool = False,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Quantizes a model's linears and embeddings in place.

    All weights are quantized before the first module is replaced, so a model is changed wholly or, on an error, not at all.

    Args:
        model: any module with `nn.Linear` or `nn.Embedding` in it.
        recipe: which module gets which scheme, or `qbert.emulate(...)`. A word stands for a recipe (see
            `qbert.recipe.as_recipe`): a scheme's name for all linears, ``"w8a8"`` for 8-bit embeddings too, ``"w8a8+none"`` for
            8-bit linears alone.
        fuse: run encoders of known families by fused operators on packed tokens (see `fuse_`).
        calibration: static scales for the fused encoder, from `qbert.calibrate`.
        progress: called with (done, total, name) for every module.

    Returns:
        The same model.

    Raises:
        QBertError: nothing to quantize, a model that is quantized already, a weight that its scheme cannot take, or a
            calibration that is not of this model.
    """
    recipe = as_recipe(recipe)
    if fuse and isinstance(recipe, Emulation):
        raise QBertError("fuse=True with an emulation: fused encoders run kernels, and there are none for it")
    _check_fusing(model, fuse, calibration)
    entries = plan(model, recipe)
    todo = [entry for entry in entries if entry.decision.scheme is not None]
    if not todo and not (isinstance(recipe, Emulation) and recipe.sites):
        reasons = sorted({entry.decision.reason for entry in entries}) or ["it has no nn.Linear or nn.Embedding"]
        raise QBertError(f"nothing to quantize in {type(model).__name__}: {'; '.join(reasons)}")
    owners = [entry for entry in todo if entry.owner is None]
    for entry in owners:  # every weight is checked before the first is worked on
        _named(entry.name, check_weight, entry.module.weight, entry.decision.scheme)
    replacements: dict[nn.Module, Quantized] = {}
    by_name: dict[str, QLinear | QEmbedding] = {}
    for done, entry in enumerate(owners):
        if progress:
            progress(done, len(owners), entry.name)
        by_name[entry.name] = replacements[entry.module] = _quantized_module(entry, recipe)
    for entry in todo:
        if entry.owner is not None:
            replacements[entry.module] = _tied(by_name[entry.owner], entry.owner, entry.module)
    if progress:
        progress(len(owners), len(owners), "")
    _replace(model, replacements)
    if isinstance(recipe, Emulation):
        round_sites_(model, recipe)
    if fuse:
        _fuse(model, calibration)
    _finish(model, recipe, {entry.name: entry.decision.reason for entry in entries if entry.decision.scheme is None})
    return model


def fuse_(model: nn.Module, calibration: Calibration | None = None) -> nn.Module:
    """Makes the encoders of a quantized model run fused: few operators on packed tokens, padding never computed.

    Modules, their names and the `state_dict` stay as they are; only the encoder object's `forward` is another one. An encoder
    that cannot be fused stays as it is: a warning is logged, and `qbert.explain(model)` says why.

    Args:
        model: with quantized modules in it.
        calibration: static scales from `qbert.calibrate`; without it every scale is taken token by token.

    Returns:
        The same model.

    Raises:
        QBertError: nothing is quantized, or a calibration that is not of this model.
    """
    if not any(isinstance(module, Quantized) for module in model.modules()):
        raise QBertError(f"{type(model).__name__} has no quantized module; call qbert.quantize_(model, fuse=True)")
    _check_fusing(model, True, calibration)
    _fuse(model, calibration)
    return model


def fuse_loaded_(model: nn.Module, calibration: Calibration | None) -> None:
    """`fuse_` for a model that came with its calibration in one file: a digest says already that they belong together.

    Raises:
        QBertError: a calibration that does not fit.
    """
    _check_fusing(model, True, calibration, same_model=False)
    _fuse(model, calibration)


def unfuse_(model: nn.Module) -> nn.Module:
    """Undoes `fuse_`: the encoders run module by module again. Returns the same model."""
    for _, base, _ in encoders(model):
        remove_fused(base)
    return model


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Puts float modules back in place, with the weights that the quantized ones stood for; nothing is emulated any more.

    Args:
        model: a quantized model.
        dtype: of the weights; that of the model's first float parameter by default.

    Returns:
        The same model.

    Raises:
        QBertError: a model with nothing quantized in it.
    """
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    emulated = remove_sites(model)
    if not quantized and not emulated:
        raise QBertError(f"{type(model).__name__} has no quantized module; nothing to dequantize")
    unfuse_(model)
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    weights: dict[nn.Module, nn.Parameter] = {}
    for module in quantized.values():
        if isinstance(module, QuantizedModule):
            weights[module] = nn.Parameter(decode(module.quantized).to(dtype))
    _replace(model, {module: _float_module(module, weights) for module in quantized.values()})
    _finish(model, None, {})
    return model


def install_(model: nn.Module, specs: Mapping[str, ModuleSpec], recipe: Recipe) -> None:
    """Replaces the named float modules by empty quantized ones, for a checkpoint's tensors to be loaded into.

    Args:
        model: a float model, usually on the meta device.
        specs: qualified name -> what stands there, from the checkpoint.
        recipe: the checkpoint's, to say why the other modules are float.

    Raises:
        CheckpointError: a spec that names no module of its kind and shape.
    """
    replacements: dict[nn.Module, Quantized] = {}
    installed: dict[str, QLinear | QEmbedding] = {}
    for name, spec in sorted(specs.items(), key=lambda item: item[1].kind == "tied_linear"):
        module = _module_for(model, name, spec)
        if spec.tied_to is None:
            installed[name] = replacements[module] = _empty_module(module, spec)
        elif spec.tied_to not in installed or installed[spec.tied_to].shape != spec.shape:
            raise CheckpointError(
                f"modules.{name}.tied_to", "must name a quantized module of the same shape", spec.tied_to
            )
        else:
            replacements[module] = _tied(installed[spec.tied_to], spec.tied_to, module)
    reasons = {}
    for name, module in _candidates(model):
        if module not in replacements:
            decision = recipe.decide(name, _ROLES[type(module)])
            reasons[name] = decision.reason if decision.scheme is None else "float in the checkpoint"
    _replace(model, replacements)
    setattr(model, _REASONS, reasons)


def round_sites_(model: nn.Module, emulation: Emulation) -> None:
    """Makes a model round what an emulation rounds beside its quantized modules. Nothing is changed on an error.

    Raises:
        QBertError: a model without attention, norms or activation functions to round.
    """
    try:
        round_attention(model, emulation.attention)
        if emulation.norms is not None:
            round_norms(model, emulation.norms)
        if emulation.gelu is not None:
            round_activation_functions(model, emulation.gelu)
    except QBertError:
        remove_sites(model)
        raise
    if emulation.activations is not None:
        left = {each for planner in _planners for each in planner(model)}  # adapters and their like stay as they are
        linears = (
            module
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module not in left and emulation.rounds_input_of(name)
        )
        round_inputs(linears, emulation.activations)


def plan(model: nn.Module, recipe: Recipe) -> list[PlanEntry]:
    """What `quantize_` would do with every linear and embedding, without doing it.

    Raises:
        QBertError: a model that is quantized, by qbert or another library, or a recipe with an override or an exclusion that
            matches nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            raise QBertError(f"{name or type(model).__name__} is quantized already; call qbert.dequantize_ first")
        other = _quantized_by_another(module)
        if other is not None:
            raise QBertError(f"{name or type(model).__name__} is quantized already: {other}; allowed: a float model")
    if describe_sites(model):
        raise QBertError(f"{type(model).__name__} is emulated already; call qbert.dequantize_ first")
    if type(model) in _ROLES:
        raise QBertError(f"the model is itself an {type(model).__name__}, which cannot be replaced in place; wrap it")
    direct = _directly_read(model)
    for planner in _planners:
        direct |= planner(model)
    entries = []
    obstacles: dict[str, str] = {}
    for name, module in _candidates(model):
        decision = recipe.decide(name, _ROLES[type(module)])
        obstacle = direct.get(module) or _obstacle(module)
        if obstacle:
            obstacles[name] = obstacle
        if decision.scheme is not None and obstacle:
            decision = Decision(None, obstacle)
        entries.append(PlanEntry(name, module, decision))
    _check_names_match(recipe, [entry.name for entry in entries])
    return _follow_ties(entries, recipe, obstacles)


def when_changed(observer: Callable[[nn.Module, Recipe | None], None]) -> None:
    """Registers a function to call after `quantize_` (with the recipe), `dequantize_` and a change of shapes (with None).

    This is how an integration keeps a framework's own records (a config, a quantizer object) in step without `convert`
    knowing the framework.
    """
    _observers.append(observer)


def when_planned(planner: Callable[[nn.Module], Mapping[nn.Module, str]]) -> None:
    """Registers a function that says which modules of a model a framework needs float, and why; it may refuse the model."""
    _planners.append(planner)


def note_reshaped(model: nn.Module) -> None:
    """Tells the frameworks that layers, heads, neurons or words of a float model are gone (see `qbert.shapes`)."""
    for observer in _observers:
        observer(model, None)


def float_reasons(model: nn.Module) -> dict[str, str]:
    """Qualified name -> why that linear or embedding is float."""
    return dict(getattr(model, _REASONS, {}))


def _check_fusing(model: nn.Module, fuse: bool, calibration: Calibration | None, *, same_model: bool = True) -> None:
    if calibration is None:
        return
    if not fuse:
        raise QBertError("a calibration is for the fused encoder; pass fuse=True with it")
    found = [base for _, base, _ in encoders(model)]
    if len(found) != 1:
        raise QBertError(f"a calibration is of one encoder; {type(model).__name__} has {len(found)}")
    check_calibration(found[0], calibration, same_model=same_model)


def _fuse(model: nn.Module, calibration: Calibration | None) -> None:
    found = list(encoders(model))
    if not found:
        log.warning("not fused: %s", obstacle(model))
    for name, base, _ in found:
        why = obstacle(base)
        if why is None:
            set_fused(base, calibration)
        else:
            log.warning("%s is not fused: %s", name or type(base).__name__, why)


def _finish(model: nn.Module, recipe: Recipe | None, reasons: dict[str, str]) -> None:
    setattr(model, _REASONS, reasons)
    for observer in _observers:
        observer(model, recipe)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    for name, module in model.named_modules():
        if type(module) in _ROLES:  # a subclass may read its weight in ways of its own
            yield name, module


def _directly_read(model: nn.Module) -> dict[nn.Module, str]:
    """Linears inside torch's own transformer blocks -> why they stay float."""
    return {
        inner: f"torch's {type(outer).__name__} reads the weight directly"
        for outer in model.modules()
        if isinstance(outer, _READS_WEIGHTS_DIRECTLY)
        for inner in outer.modules()
    }


def _quantized_by_another(module: nn.Module) -> str | None:
    """What another library made of a linear or a table, None of a plain one."""
    kind = type(module)
    if "Linear" in kind.__name__ and kind.__module__.startswith(tuple(f"{each}." for each in _QUANTIZERS)):
        return f"it is a {kind.__module__}.{kind.__qualname__}"
    weight = type(module._parameters.get("weight")) if kind in _ROLES else nn.Parameter
    if weight in (nn.Parameter, Tensor, type(None)) or weight.__module__.startswith("torch."):
        return None
    return f"its weight is a {weight.__module__}.{weight.__qualname__}, no plain parameter"


def _obstacle(module: nn.Linear | nn.Embedding) -> str | None:
    if module.weight.device.type == "meta":
        return "its weight is on the meta device and has no values"
    if "forward" in module.__dict__:
        return "it has a forward of its own, which a quantized module would not have"
    if not is_stock(type(module)):
        return f"the forward of all {type(module).__name__}s was replaced, and a quantized module would not have it"
    if "weight" not in module._parameters:
        return "its weight is computed from others (weight norm, pruning)"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"max_norm={module.max_norm} rewrites the table while looking up"
    return None


def _follow_ties(entries: list[PlanEntry], recipe: Recipe, obstacles: Mapping[str, str]) -> list[PlanEntry]:
    """Modules that share a weight are quantized as one or not at all, so that the weight stays shared and is stored once."""
    groups: dict[int, list[PlanEntry]] = {}
    for entry in entries:
        groups.setdefault(id(entry.module.weight), []).append(entry)
    followed: dict[str, PlanEntry] = {}
    for group in groups.values():
        followed |= {entry.name: entry for entry in (_tie(group, recipe, obstacles) if len(group) > 1 else group)}
    return [followed[entry.name] for entry in entries]


def _tie(group: list[PlanEntry], recipe: Recipe, obstacles: Mapping[str, str]) -> list[PlanEntry]:
    embeddings = [entry for entry in group if isinstance(entry.module, nn.Embedding)]
    owner = embeddings[0] if embeddings else group[0]
    vetoes = {entry.name: obstacles.get(entry.name) or _veto(entry, recipe) for entry in group}
    vetoed = next((name for name, reason in vetoes.items() if reason), None)
    if len(embeddings) > 1:
        decision = Decision(None, f"{len(embeddings)} embeddings share the weight; that is not supported")
    elif vetoed is not None:
        decision = Decision(None, vetoes[owner.name] or f"shares its weight with {vetoed}: {vetoes[vetoed]}")
    else:
        decision = owner.decision
    rest = [entry for entry in group if entry is not owner]
    tied = Decision(decision.scheme, f"tied to {owner.name}")
    return [
        PlanEntry(owner.name, owner.module, decision),
        *(PlanEntry(entry.name, entry.module, tied, owner.name) for entry in rest),
    ]


def _veto(entry: PlanEntry, recipe: Recipe) -> str | None:
    """Why the recipe, by name, wants this module float; the skip list is no veto: a tied head follows its embedding."""
    decision = recipe.decide(entry.name, _ROLES[type(entry.module)])
    return decision.reason if decision.scheme is None and decision.reason.startswith(("excluded", "override")) else None


def _check_names_match(recipe: Recipe, names: list[str]) -> None:
    from qbert.recipe import matches

    for kind, patterns in (("override", recipe.overrides), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                some = ", ".join(names[:3]) or "none"
                raise QBertError(
                    f"{kind} {pattern!r} matches no linear or embedding; the model has {len(names)}: {some}, ..."
                )


def _quantized_module(entry: PlanEntry, recipe: Recipe) -> QLinear | QEmbedding:
    module, scheme = entry.module, entry.decision.scheme
    assert scheme is not None
    made = _holding(_named(entry.name, quantize, module.weight, scheme), module)
    if isinstance(made, QLinear) and not isinstance(made, EmulatedModule) and _is_sparse(module.weight):
        made.leave_zeros_out()
    if isinstance(recipe, Emulation) and recipe.trainable and isinstance(made, EmulatedModule):
        made.train_from(module.weight)
    return made


def _is_sparse(weight: Tensor) -> bool:
    """Whether somebody made weights zero: an eighth of them, which no training does by itself."""
    return _ZEROS * int((weight.detach() == 0).sum()) >= weight.numel()


def _empty_module(module: nn.Linear | nn.Embedding, spec: ModuleSpec) -> QLinear | QEmbedding:
    return _holding(spec.empty_weight(module.weight.device), module)


def _holding(weight: Weight, module: nn.Linear | nn.Embedding) -> QLinear | QEmbedding:
    """The module that computes with a quantized weight in a float one's place."""
    emulated = isinstance(weight.scheme, EmulatedScheme)
    if isinstance(module, nn.Embedding):
        return (EmulatedEmbedding if emulated else QEmbedding)(weight, module.padding_idx, module.weight.dtype)
    return (EmulatedLinear if emulated else QLinear)(weight, module.bias, module.weight.dtype)


def _tied(owner: QLinear | QEmbedding, name: str, module: nn.Linear | nn.Embedding) -> QTiedLinear:
    return (EmulatedTiedLinear if isinstance(owner, EmulatedModule) else QTiedLinear)(owner, name, _bias(module))


def _float_module(module: Quantized, weights: dict[nn.Module, nn.Parameter]) -> nn.Linear | nn.Embedding:
    n, k = module.shape
    if isinstance(module, QEmbedding):
        embedding = nn.Embedding(n, k, module.padding_idx, device="meta")
        embedding.weight = weights[module]
        return embedding
    linear = nn.Linear(k, n, bias=module.bias is not None, device="meta")
    linear.weight = weights[module.owner if isinstance(module, QTiedLinear) else module]
    linear.register_parameter("bias", module.bias)
    return linear


def _module_for(model: nn.Module, name: str, spec: ModuleSpec) -> nn.Linear | nn.Embedding:
    kind = nn.Embedding if spec.kind == "embedding" else nn.Linear
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"modules.{name}", f"must name a module of {type(model).__name__}", name) from None
    if type(module) is not kind:
        raise CheckpointError(f"modules.{name}", f"must be an {kind.__name__} in the model", type(module).__name__)
    assert isinstance(module, nn.Linear | nn.Embedding)
    if tuple(module.weight.shape) != spec.shape:
        raise CheckpointError(f"modules.{name}.shape", f"must be {list(module.weight.shape)}", list(spec.shape))
    return module


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts each replacement wherever its module stands; one module may stand in several places.

    What users set on a module goes over to its replacement: its mode, and its forward hooks, whose handles stay good.
    """
    for module, replacement in replacements.items():
        replacement.train(module.training)
        for hooks in _HOOKS:
            setattr(replacement, hooks, getattr(module, hooks))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children gives a module that stands twice only once
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def _bias(module: nn.Linear | nn.Embedding) -> nn.Parameter | None:
    return getattr(module, "bias", None)


def _named(name: str, function: Callable[[Tensor, Scheme], object], weight: Tensor, scheme: Scheme | None):  # type: ignore[no-untyped-def]
    """Calls a check or a quantizer and puts the module's name before what it complains of."""
    assert scheme is not None
    try:
        return function(weight, scheme)
    except QBertError as error:
        raise QBertError(f"{name}: {error}") from None
