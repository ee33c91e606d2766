"""Checkpoints: safetensors in the PLAIN layout plus a record in the configuration, read with suspicion.

A checkpoint is a folder with ``config.json`` and ``model.safetensors`` (or its shards), exactly what transformers'
``save_pretrained`` writes. The record stands under ``quantization_config`` and says what each quantized module is; from it,
and from the model's own configuration, follows the type and shape of every tensor that must be there. `check_files` holds
the files to that, value by value, before anything is loaded. Nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qbert.emulation import Emulation
from qbert.encoder import Calibration, check_calibration, encoders, fused_forward, obstacle
from qbert.errors import CheckpointError, QBertError
from qbert.families import KEEP_FLOAT
from qbert.folders import new_folder
from qbert.modules import GUARD, ModuleSpec, collect_specs
from qbert.ops import FLOAT_DTYPES
from qbert.recipe import Recipe
from qbert.shapes import ShapePlan, recorded_plan
from qbert.weight.specs import TensorSpec
from qbert.weight.validate import check_finite, check_spec, check_stored_tensors

# 5: with linears of low rank, or with zeros left out.
# 4: records with block formats. 3: with shapes. 2: with a calibration, which names slots, where version 1 had five fields.
# Without any of these nothing differs, and older versions of qbert read it.
FORMAT_VERSION: Final = 5
_WITH_RANKS: Final = 5
_WITH_EMULATION: Final = 4
_WITH_SHAPES: Final = 3
_WITH_CALIBRATION: Final = 2
_WITH_NONE: Final = 1
METHOD: Final = "qbert"
CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
_MAX_JSON_BYTES = 16 * 2**20  # a configuration is a few hundred kilobytes at most; more is an attack or a mistake


class Record(BaseModel):
    """What a checkpoint's configuration says about its quantization.

    Attributes:
        linear, embedding, exclude, overrides, keep_float: the recipe (see `qbert.Recipe`); the overrides are pairs, because
            their order decides and transformers sorts the keys of the objects that it writes.
        modules: qualified name -> what stands there; none in a float model that was compressed.
        emulation: block formats, as `qbert.Emulation` spells them, where the recipe is one.
        shapes: what was taken out of the encoder; None where nothing was.
        fuse: the encoder runs fused.
        calibration: its static scales; None where scales are taken token by token.
        source: the model that was quantized, as the user named it, for reports.
        digest: of this record and of all tensors (see `digest`); None until they are written.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    quant_method: Literal["qbert"]
    format_version: Literal[1, 2, 3, 4, 5]
    linear: str | None
    embedding: str | None
    exclude: list[str] = []
    overrides: list[Annotated[tuple[str, str | None], Field(strict=False)]] = []
    keep_float: list[str] = list(KEEP_FLOAT)
    emulation: dict[str, Any] | None = None
    shapes: ShapePlan | None = None
    modules: dict[str, ModuleSpec]
    fuse: bool = False
    calibration: Calibration | None = None
    source: str | None = None
    digest: str | None = None

    @model_validator(mode="after")
    def _recipe_is_valid(self) -> Record:
        _ = self.recipe  # a QBertError is a ValueError, which pydantic reports as its own
        return self

    @field_validator("modules", mode="after")
    @classmethod
    def _says_something(cls, modules: dict[str, ModuleSpec], info: ValidationInfo) -> dict[str, ModuleSpec]:
        if not modules and info.data.get("shapes") is None:
            raise ValueError("must name a quantized module where there are no shapes")
        return modules

    @model_validator(mode="after")
    def _shapes_are_of_version_3(self) -> Record:
        if self.shapes is not None and self.format_version < _WITH_SHAPES:
            raise ValueError(f"shapes are of format_version {_WITH_SHAPES}, and this one is {self.format_version}")
        return self

    @model_validator(mode="after")
    def _only_emulations_are_of_their_version(self) -> Record:
        allowed = {_WITH_EMULATION, _WITH_RANKS} if self.emulation is not None else {1, 2, 3, _WITH_RANKS}
        if self.format_version not in allowed:
            there = "no emulation" if self.emulation is None else "one"
            raise ValueError(
                f"format_version {_WITH_EMULATION} is of emulated models; this is {self.format_version} with {there}"
            )
        return self

    @model_validator(mode="after")
    def _only_low_ranks_and_zeros_are_of_their_version(self) -> Record:
        smaller = _has_ranks_or_zeros(self.shapes, self.modules)
        if (self.format_version == _WITH_RANKS) != smaller:
            there = "some" if smaller else "none"
            raise ValueError(
                f"format_version {_WITH_RANKS} is of linears of low rank and of zeros left out; this is {self.format_version} "
                f"with {there}"
            )
        return self

    @model_validator(mode="after")
    def _only_fused_models_are_calibrated(self) -> Record:
        if self.calibration is not None and not self.fuse:
            raise ValueError("a calibration is for a fused encoder, and fuse is false")
        return self

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe, source: str | None = None) -> Record:
        """The record of a quantized or compressed model."""
        fields = {**recipe.to_dict(), "overrides": list(recipe.overrides.items()), **_fusion(model)}
        shapes, modules = recorded_plan(model), collect_specs(model)
        version = format_version(fields["calibration"], shapes, fields.get("emulation"), modules)
        return cls(quant_method=METHOD, format_version=version, **fields, modules=modules, shapes=shapes, source=source)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Record:
        """A record from a configuration file.

        Raises:
            CheckpointError: an entry that is missing, unknown, of the wrong type or out of range.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(("quantization_config", *(str(part) for part in first["loc"])))
            raise CheckpointError(where, first["msg"], _brief(first["input"])) from None

    @property
    def recipe(self) -> Recipe:
        """The recipe as an object."""
        recipe = Recipe(self.linear, self.embedding, tuple(self.exclude), dict(self.overrides), tuple(self.keep_float))
        return recipe if self.emulation is None else Emulation.from_dict(recipe, self.emulation)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a configuration file. What says nothing is left out, so that older versions read it too."""
        unused = {name for name in ("fuse", "calibration", "emulation", "shapes") if not getattr(self, name)}
        data = self.model_dump(mode="json", exclude=unused)
        if self.calibration is not None:  # as its version and its age spelled it: that is what its digest is of
            old = self.format_version == 1
            data["calibration"] = self.calibration.to_version_1() if old else self.calibration.to_dict()
        return data

    def canonical(self) -> str:
        """What the digest covers: the recipe, the modules and the calibration, in one spelling."""
        data = self.to_dict()
        return json.dumps({name: data[name] for name in data.keys() - {"source", "digest"}}, sort_keys=True)


def format_version(
    calibration: Calibration | None,
    shapes: ShapePlan | None = None,
    emulation: Mapping[str, Any] | None = None,
    modules: Mapping[str, ModuleSpec] | None = None,
) -> Literal[1, 2, 3, 4, 5]:
    """Of a record with that calibration, those shapes, that emulation and those modules."""
    if _has_ranks_or_zeros(shapes, modules or {}):
        return _WITH_RANKS
    if emulation is not None:
        return _WITH_EMULATION
    if shapes is not None:
        return _WITH_SHAPES
    return _WITH_NONE if calibration is None else _WITH_CALIBRATION


def _has_ranks_or_zeros(shapes: ShapePlan | None, modules: Mapping[str, ModuleSpec]) -> bool:
    return (shapes is not None and shapes.factorized) or any(each.zeros is not None for each in modules.values())


def check_fusion(record: Record, skeleton: nn.Module) -> None:
    """Holds what a record says about the fused encoder to the model.

    Raises:
        CheckpointError: there is nothing to fuse, or a calibration of other layers.
    """
    if not record.fuse:
        return
    found = [base for _, base, _ in encoders(skeleton)]
    fusable = [base for base in found if obstacle(base) is None]
    if not fusable:
        why = obstacle(found[0] if found else skeleton)
        raise CheckpointError("quantization_config.fuse", f"must be false: {why}", True)
    if record.calibration is None:
        return
    try:
        if len(fusable) > 1:
            raise QBertError(f"it is of one encoder, and {type(skeleton).__name__} has {len(fusable)}")
        check_calibration(fusable[0], record.calibration)
    except QBertError as error:
        raise CheckpointError("quantization_config.calibration", "must fit the model", str(error)) from None


def digest(tensors: Iterable[tuple[str, Tensor]], record: Record) -> str:
    """SHA-256 over the record and over every tensor's name, type, shape and bytes, in the order of the names.

    It catches accidents (a flipped bit, swapped tensors), not attackers, who can compute it too; the rules catch those.
    """
    total = hashlib.sha256(record.canonical().encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def signed(record: Record, tensors: Mapping[str, Tensor]) -> Record:
    """The record with the digest of what is stored with it.

    It stands in the configuration, not in the headers of the safetensors files: safetensors writes their entries in random
    order, so two files would differ, and weights that are left from an older save would still match themselves.
    """
    return record.model_copy(update={"digest": digest(tensors.items(), record)})


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: missing, too large, not JSON, or without a qbert record.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(CONFIG_FILE, "must be in the folder", f"{str(folder)!r} without it")
    config = _read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
        raise CheckpointError(CONFIG_FILE, "must have a quantization_config of qbert", "none")
    return config


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint that calls itself qbert's."""
    try:
        return read_config(folder)["quantization_config"].get("quant_method") == METHOD
    except CheckpointError:
        return False


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names, all inside the folder."""
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(WEIGHTS_FILE, "must be in the folder", f"{str(folder)!r} without it")
    try:
        names = sorted(set(_read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(INDEX_FILE, "must have a weight_map", repr(error)) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(INDEX_FILE, "must name files in its own folder", _brief(name))
    return [folder / name for name in names]


def tensor_names(files: Iterable[str | Path]) -> set[str]:
    """Names of the tensors in safetensors files.

    Raises:
        CheckpointError: a file that is not well formed, or a name that is in two of them.
    """
    return set(_open(files))


def expected_tensors(skeleton: nn.Module, absent: Iterable[str] = ()) -> dict[str, TensorSpec]:
    """Type and shape of every tensor that a checkpoint of this model must hold.

    Args:
        skeleton: the model with empty quantized modules in place, usually on the meta device.
        absent: names that are not stored, because they are tied to others that are.
    """
    left_out = set(absent)
    return {
        name: TensorSpec(tensor.dtype, tuple(tensor.shape))
        for name, tensor in skeleton.state_dict().items()
        if name not in left_out
    }


def check_files(files: Iterable[str | Path], record: Record, expected: Mapping[str, TensorSpec]) -> None:
    """Holds a checkpoint's files to its record.

    Args:
        files: the safetensors files.
        record: of the same checkpoint.
        expected: from `expected_tensors`. Float tensors that are not quantized may have any float type.

    Raises:
        CheckpointError: the first rule that is broken, with the tensor and the value.
    """
    tensors = _open(files)
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(name, "tensor must be there", "nothing")
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(name, "no such tensor belongs to this model", name)
    quantized = _quantized_names(record)
    for name, spec in expected.items():
        found = tensors[name]
        anchor = TensorSpec(found.dtype, spec.shape) if _is_plain_float(name, spec, found, quantized) else spec
        check_spec(name, anchor, found.dtype, tuple(found.shape))
    for name, module in record.modules.items():
        if module.kind != "tied_linear":
            scheme, shape = module.resolved_scheme, module.shape
            parts = {part: tensors[f"{name}.{part}"] for part in module.stored_specs()}
            check_stored_tensors(scheme, shape, parts, module.layout, module.nonzeros, f"{name}.")
    for name, tensor in tensors.items():
        if name not in quantized and tensor.is_floating_point():
            check_finite(name, tensor)
    actual = digest(tensors.items(), record)
    if record.digest != actual:
        rule = f"must be that of the tensors and of this record, {actual}"
        raise CheckpointError("quantization_config.digest", rule, _brief(record.digest))


def _fusion(model: nn.Module) -> dict[str, Any]:
    """What a record says about a model's fused encoders."""
    fused = [found for found in (fused_forward(base) for _, base, _ in encoders(model)) if found is not None]
    calibrations = [each.calibration for each in fused]
    if any(each != calibrations[0] for each in calibrations[1:]):
        raise QBertError(f"{len(fused)} encoders are fused with different calibrations; a checkpoint holds one")
    return {"fuse": bool(fused), "calibration": calibrations[0] if fused else None}


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(path.name, f"must be at most {_MAX_JSON_BYTES} bytes", path.stat().st_size)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of thousands of digits, too deep
        raise CheckpointError(path.name, "must be JSON", _brief(str(error))) from None


def _open(files: Iterable[str | Path]) -> dict[str, Tensor]:
    """All tensors, mapped, not read."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        name = Path(path).name
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    if key in tensors:
                        raise CheckpointError(key, "must be in one file only", name)
                    tensors[key] = file.get_tensor(key)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(name, "must be a safetensors file", _brief(str(error))) from None
    return tensors


def _quantized_names(record: Record) -> set[str]:
    names = set()
    for module, spec in record.modules.items():
        if spec.kind != "tied_linear":
            parts = (GUARD, *spec.stored_specs())
            names |= {f"{module}.{part}" for part in parts}
    return names


def _is_plain_float(name: str, spec: TensorSpec, found: Tensor, quantized: set[str]) -> bool:
    return name not in quantized and spec.dtype in FLOAT_DTYPES and found.dtype in FLOAT_DTYPES


def _brief(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def require_folder(folder: str | Path) -> Path:
    """The folder as a path.

    Raises:
        QBertError: it is not there.
    """
    path = Path(folder)
    if not path.is_dir():
        raise QBertError(
            f"no folder {str(folder)!r}; allowed: a checkpoint folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return path


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Fill a checkpoint folder that takes the place of `folder`; on an error nothing is left behind.

    Raises:
        QBertError: see `require_replaceable`.
    """
    require_replaceable(folder)
    with new_folder(Path(folder).resolve(), replace=True) as fresh:
        yield fresh


def require_replaceable(folder: str | Path) -> None:
    """What `replacing` asks for, to be said before something long begins.

    Raises:
        QBertError: what is there is not a folder, or neither empty nor a checkpoint.
    """
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise QBertError(f"{str(path)!r} is a file; allowed: a folder, new, empty or with a checkpoint in it")
    if path.is_dir() and any(path.iterdir()) and not is_checkpoint(path):
        raise QBertError(f"folder {str(path)!r} is not empty and holds no qbert checkpoint; it is left alone")
