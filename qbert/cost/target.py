"""A machine as data: a TOML file of rates, memory levels, decoders, vector units and energies, each with its source.

`qbert/hardware/*.toml` are those that ship; a user's own is a file of the same form (docs/study.md walks one). A source that
begins with "assumption" is one, and is shown as such beside what follows from it.
"""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from qbert.devices import HARDWARE
from qbert.errors import QBertError
from qbert.formats import FORMATS, SCALES
from qbert.formats.elements import ELEMENT_ALIASES

FLOATS = ("fp32", "tf32", "bf16", "fp16")  # operands that are no low-bit format; tf32 stands for float32 in memory
FLOAT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
ASSUMED = "assumption"
_CLASS = re.compile(r"int[2-8]|fp[468]|dict[1-8]")
_OWN = "element:"  # in front of the name of an element that is in no table here

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Source = Annotated[str, Field(min_length=1, description="where the figures of this section come from")]
Joules = Annotated[float | None, Field(ge=0, lt=1, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _operands(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _check_operand(name: str) -> str:
    if name in FLOATS or _CLASS.fullmatch(name) or name in FORMATS or name in ELEMENT_ALIASES or name.startswith(_OWN):
        return name
    raise ValueError(
        f"operand {name!r}; allowed: {', '.join(FLOATS)}, int2 ... int8, fp4, fp6, fp8, dict1 ... dict8, the name of an "
        f"element (`qbert formats`), {_OWN}NAME of your own"
    )


Operands = Annotated[tuple[Annotated[str, Field()], ...], BeforeValidator(_operands), Field(min_length=1)]


class Rate(_Section):
    """How fast the array multiplies one kind of operand with another."""

    weights: Operands = Field(description="classes (int8, fp4, dict3, fp16 ...) or elements by name")
    activations: Operands
    ops: Positive = Field(description="operations a second of all units, a multiply-add is two")
    sustained: float = Field(1.0, gt=0, le=1, description="share of it that programs reach; 1: times are floors")
    blocks: tuple[str, ...] = Field((), description="block scales that the units apply: e8m0/32, e4m3/16")
    joules: Joules = Field(None, description="of one operation")
    source: Source

    @field_validator("weights", "activations")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_check_operand, names))

    @field_validator("blocks")
    @classmethod
    def _scales(cls, blocks: tuple[str, ...]) -> tuple[str, ...]:
        for block in blocks:
            scale, _, size = block.partition("/")
            if scale not in SCALES or not size.isdecimal() or int(size) < 2:
                raise ValueError(f"block {block!r}; allowed: SCALE/COLUMNS with a scale of {', '.join(SCALES)}")
        return blocks


class Memory(_Section):
    """One level, all units together."""

    name: str = Field(min_length=1)
    bytes: Positive
    bandwidth: Positive | None = Field(None, description="bytes/s that it gives; None bounds nothing")
    joules: Joules = Field(None, description="of one byte")
    source: Source


class Array(_Section):
    """What multiplies: units that take tiles, each by itself."""

    units: int = Field(ge=1, le=1_000_000, description="multiprocessors, cores, arrays")
    tiles: tuple[tuple[int, int, int], ...] = Field(
        min_length=1, description="(tokens, output channels, input channels) of one unit's tile; the fastest is taken"
    )
    dataflow: Literal["output", "weight", "activation"] = Field(
        "output", description="what stays in the units while the rest streams by"
    )
    overlap: tuple[Literal["vector", "decode", "memory"], ...] = Field(
        ("vector", "decode", "memory"), description="what works beside the array; the rest waits for it, or it waits"
    )
    source: Source

    @field_validator("tiles")
    @classmethod
    def _sides(cls, tiles: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
        for tile in tiles:
            if not all(1 <= side <= 2**20 for side in tile):
                raise ValueError(f"tile {list(tile)}; allowed: three sides of 1 to {2**20}")
        return tiles


class Decode(_Section):
    """Codes that no unit takes become operands that one does."""

    values: Positive = Field(description="values a second of all units")
    each: Literal["tile", "product"] = Field(
        "tile", description="each tile decodes what it reads, or a product does so once"
    )
    joules: Joules = Field(None, description="of one value")
    source: Source


class Vector(_Section):
    """Everything that is no product: softmax, norms, GELU, scales, rounding."""

    ops: Positive = Field(description="operations a second on float32; a fused multiply-add is one")
    joules: Joules = Field(None, description="of one operation")
    source: Source


class Launch(_Section):
    """From one operation to the next."""

    seconds: float = Field(ge=0, lt=1)
    source: Source


class Static(_Section):
    """Power that is drawn whatever is computed."""

    watts: float = Field(ge=0, lt=1e6)
    source: Source


class Measured(_Section):
    """Results stored for this machine."""

    results: tuple[str, ...] = Field(min_length=1, description="folders of benchmarks/results")


class ChipFacts(_Section):
    """What choosing a GPU's kernels asks; see `qbert.devices.Gpu`."""

    driver_name: str
    sm: int
    shared_memory: int


class Hardware(_Section):
    """A target file.

    Attributes:
        name, description, source: of the machine.
        float: what is in no format, in memory and in products: weights that are left float, results, the residual stream.
        memory: outermost level first.
        decode: None: the vector units do it.
    """

    name: str = Field(min_length=1, max_length=40, pattern=r"^[\w.+-]+$")
    description: str = Field(min_length=1)
    source: Source
    float: Literal["fp32", "bf16", "fp16"]
    array: Array
    rate: tuple[Rate, ...] = Field(min_length=1)
    memory: tuple[Memory, ...] = Field(min_length=1)
    vector: Vector
    decode: Decode | None = None
    launch: Launch | None = None
    static: Static | None = None
    measured: Measured | None = None
    gpu: ChipFacts | None = None

    @model_validator(mode="after")
    def _whole(self) -> Hardware:
        if not any(self.float in rate.weights and self.float in rate.activations for rate in self.rate):
            raise ValueError(f"no rate for {self.float} x {self.float}, which is its float; allowed: one at least")
        for outer, inner in zip(self.memory, self.memory[1:], strict=False):
            if inner.bytes >= outer.bytes:
                raise ValueError(
                    f"memory {inner.name} is not smaller than {outer.name}; allowed: levels from the outside in"
                )
        if self.memory[0].bandwidth is None:
            raise ValueError(f"memory {self.memory[0].name} has no bandwidth; allowed: further in only")
        return self

    @property
    def assumptions(self) -> list[str]:
        """Sections whose source says that it is an assumption: "section: what is assumed"."""
        rates = [(f"rate {'/'.join(each.weights)} x {'/'.join(each.activations)}", each) for each in self.rate]
        sections: list[tuple[str, Any]] = [
            ("array", self.array), *rates, *((f"memory {each.name}", each) for each in self.memory), ("decode", self.decode),
            ("vector", self.vector), ("launch", self.launch), ("static", self.static), (self.name, self),
        ]  # fmt: skip
        marked = ((name, each.source) for name, each in sections if each is not None)
        return [f"{name}: {source}" for name, source in marked if ASSUMED in source.lower()]

    @property
    def has_energy(self) -> bool:
        """Whether every section says its energy."""
        sections: list[Any] = [*self.rate, *self.memory, self.vector, *([] if self.decode is None else [self.decode])]
        return all(each.joules is not None for each in sections)

    def of_units(self, units: int) -> Hardware:
        """The same with another number of units: their rates grow or shrink with it, memory stays as it is."""
        share = units / self.array.units
        grown = {"rate": "ops", "vector": "ops", "decode": "values"}
        changed: dict[str, Any] = {"array": self.array.model_copy(update={"units": units})}
        for section, rate in grown.items():
            there = getattr(self, section)
            scaled = [
                each.model_copy(update={rate: getattr(each, rate) * share})
                for each in (there if section == "rate" else (there,))
                if each is not None
            ]
            changed[section] = tuple(scaled) if section == "rate" else next(iter(scaled), None)
        return self.model_copy(update=changed)


SHIPPED: tuple[str, ...] = tuple(sorted(path.stem for path in HARDWARE.glob("*.toml")))


def load_hardware(name: str) -> Hardware:
    """A machine that ships, by its name, or the one that a .toml file describes.

    Raises:
        QBertError: unknown, unreadable, or not of that form: every problem of the file is named.
    """
    if name in SHIPPED:
        return _read(str(HARDWARE / f"{name}.toml"))
    if not name.endswith(".toml"):
        raise QBertError(f"target {name!r}; allowed: {', '.join(SHIPPED)}, a file that ends in .toml")
    return _read(name)


@functools.lru_cache(maxsize=64)
def _cached(path: str, text: str) -> Hardware:
    return parse_hardware(text, path)


def _read(path: str) -> Hardware:
    try:
        return _cached(path, Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise QBertError(f"target {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_hardware(text: str, path: str = "target") -> Hardware:
    """From the text of a target file.

    Raises:
        QBertError: no TOML, or not of that form: every problem is named.
    """
    try:
        return Hardware.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise QBertError(f"target {path!r} is no TOML: {error}") from None
    except ValidationError as error:
        problems = [_problem(each) for each in error.errors(include_url=False)]
        raise QBertError(f"target {path!r}: {'; '.join(problems)}") from None


def _problem(error: Any) -> str:
    where = ".".join(str(each) for each in error["loc"])
    given = error["input"]
    shown = "" if isinstance(given, dict | list | tuple) or error["type"] == "missing" else f" (given: {given!r:.40})"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "no such entry"
    return f"{where}: {message}{shown}" if where else message
