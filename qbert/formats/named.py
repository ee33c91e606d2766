"""Block formats by name: those of standards and papers, ``-gN`` for blocks of another size, and a user's own file."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from qbert.errors import QBertError
from qbert.formats.blocks import BlockFormat, block_format
from qbert.formats.elements import ELEMENT_ALIASES, FORMATS, NF4, Format, Kind, get_element, integer

MX_BLOCK, NVFP4_BLOCK, NF4_BLOCK = 32, 16, 64

_MX = {
    "mxfp8": "float8_e4m3fn", "mxfp8_e4m3": "float8_e4m3fn", "mxfp8_e5m2": "float8_e5m2", "mxfp6_e2m3": "float6_e2m3fn",
    "mxfp6_e3m2": "float6_e3m2fn", "mxfp4": "float4_e2m1fn", "mxint8": "int8_mx",
}  # fmt: skip


def _named() -> Iterable[BlockFormat]:
    # OCP Microscaling Formats (MX) Specification v1.0, table 1.
    yield from (block_format(name, FORMATS[element], "e8m0", MX_BLOCK) for name, element in _MX.items())
    yield block_format("nvfp4", "fp4_e2m1", "e4m3", NVFP4_BLOCK)  # NVIDIA, "Introducing NVFP4", 2025
    yield from (block_format(name, name) for name in ELEMENT_ALIASES)  # a float32 scale for each row
    yield from (block_format(f"int{bits}", integer(bits)) for bits in range(8, 1, -1))
    yield from (block_format(f"int{bits}_zp", integer(bits), symmetric=False) for bits in (8, 4, 3, 2))
    yield block_format("nf4", NF4, "float32", NF4_BLOCK)  # Dettmers et al., QLoRA, 2023
    # Half of a posit's values lie between 1/16 and 16 (posit8) or 1/4 and 4 (posit6): that is where matrices should be.
    yield from (block_format(name, name, top=top) for name, top in (("posit8", 16.0), ("posit6", 4.0), ("log4", None)))
    yield from (block_format(f"gobo{bits}", f"dict{bits}", "none", "tensor", outliers="gobo") for bits in (3, 4))


NAMED: dict[str, BlockFormat] = {each.name: each for each in _named()}
_SUFFIX = re.compile(r"(?P<base>.+)-g(?P<size>[1-9]\d*)")


def get_format(name: str) -> BlockFormat:
    """The block format of that name. ``int4-g64`` is int4 in blocks of 64 with bfloat16 scales, as the schemes have them;
    ``mxfp4-g16`` is mxfp4 in blocks of 16.

    Raises:
        QBertError: there is none.
    """
    if name in NAMED:
        return NAMED[name]
    match = _SUFFIX.fullmatch(name) if isinstance(name, str) else None
    base = NAMED.get(match["base"]) if match else None
    if match is None or base is None or base.is_learned:
        raise QBertError(f"format {name!r}; allowed: {', '.join(NAMED)}, any but gobo with -gN, FILE.py:NAME")
    scale = "bfloat16" if base.block == (1, 0) else base.scale
    return dataclasses.replace(base, name=name, block=(1, int(match["size"])), scale=scale)


def as_format(value: BlockFormat | str) -> BlockFormat:
    """A block format as it is, or the one of that name."""
    return value if isinstance(value, BlockFormat) else get_format(value)


def load_format(spec: str) -> BlockFormat:
    """A format by name, or ``FILE.py:NAME`` of a user's file, which is run: only files that a user names are.

    Raises:
        QBertError: no such file or name, a file that raises, or something that is no format.
    """
    file, colon, name = spec.rpartition(":")
    return _from_file(Path(file), name) if colon and file.endswith(".py") else get_format(spec)


def _from_file(path: Path, name: str) -> BlockFormat:
    if not path.is_file():
        raise QBertError(f"format file {str(path)!r} is not there; allowed: FILE.py:NAME")
    module_spec = importlib.util.spec_from_file_location(f"qbert_user_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises is a user's mistake
        first = (str(error).splitlines() or [""])[0][:200]
        raise QBertError(f"format file {str(path)!r} raises {type(error).__name__}: {first}") from None
    found = getattr(module, name, None)
    if isinstance(found, Format):  # an element alone: a float32 scale for each row
        found = block_format(name, found)
    if not isinstance(found, BlockFormat):
        ours = [each for each, value in vars(module).items() if isinstance(value, BlockFormat | Format)]
        raise QBertError(
            f"{str(path)!r} has no format {name!r}; allowed: {', '.join(ours) or 'none, it defines no format'}"
        )
    return found


_SWEPT = ("element", "block", "scale", "rounding", "clipping", "outliers", "scale_rule", "symmetric")
_BOOLEANS = {"true": True, "false": False}


def sweep(text: str) -> list[BlockFormat]:
    """All combinations of ``"element=fp4_e2m1,int4 block=16,32 scale=e8m0,bf16"``, named after what they are.

    Raises:
        QBertError: a setting or value that is not allowed, or no element.
    """
    axes: dict[str, list[str]] = {}
    for part in text.split():
        key, equals, values = part.partition("=")
        if not equals or key not in _SWEPT or not all(values.split(",")) or key in axes:
            raise QBertError(f"sweep {part!r}; allowed once each: {', '.join(f'{each}=A,B' for each in _SWEPT)}")
        axes[key] = list(dict.fromkeys(values.split(",")))
    if "element" not in axes:
        raise QBertError(f"sweep {text!r} names no element; allowed: element=fp4_e2m1,int4 ...")
    return [_swept(dict(zip(axes, values, strict=True))) for values in product(*axes.values())]


def _swept(settings: Mapping[str, str]) -> BlockFormat:
    values: dict[str, Any] = dict(settings)
    element = get_element(values.pop("element"))
    if element.kind is Kind.DICTIONARY:
        values = {"scale": "none", "block": "tensor"} | values
    if "symmetric" in values:
        if values["symmetric"] not in _BOOLEANS:
            raise QBertError(f"sweep symmetric={values['symmetric']}; allowed: true, false")
        values["symmetric"] = _BOOLEANS[values["symmetric"]]
    if "block" in values and "x" in values["block"]:
        rows, _, columns = values["block"].partition("x")
        values["block"] = (_whole(rows), _whole(columns))
    elif values.get("block", "row") not in ("row", "token", "tensor"):
        values["block"] = _whole(values["block"])
    return block_format("/".join(settings.values()), element, **values)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise QBertError(f"sweep block={text}; allowed: a number, ROWSxCOLUMNS, row, tensor")
    return int(text)


def describe(fmt: BlockFormat) -> dict[str, Any]:
    """What a format is, as rows for people: its element, spacing, scale, and what a block costs in bits."""
    element, scale = fmt.element, fmt.scale_format
    rows, columns = fmt.block
    values = None if fmt.is_learned else _usable(fmt)
    block_bits = None
    if rows and columns:
        zero = 0 if fmt.symmetric else element.bits
        size, beside = rows * columns, scale.bits + zero
        block_bits = f"{size} x {element.bits} + {beside} = {size * element.bits + beside}"
    return {
        "format": fmt.name,
        "element": f"{element.name}, {element.bits} bits, {element.kind.value}",
        "values": values,
        "largest": None if values is None else max(map(abs, values)),
        "smallest positive": None if values is None else min((each for each in values if each > 0), default=None),
        "scale": f"{scale.name}, {scale.bits} bits: {scale.summary}"
        + (f" (rule {fmt.scale_rule})" if scale.name == "e8m0" else ""),
        "granularity": fmt.granularity,
        "zero point": not fmt.symmetric,
        "rounding": fmt.rounding,
        "clipping": fmt.clipping,
        "outliers": fmt.outliers,
        "bits of a block": block_bits,
        "bits per value at 768 x 768, outliers on top": round(fmt.bits_per_value(768, 768), 4),
    }


def usable_codes(fmt: BlockFormat) -> list[int]:
    """The codes that quantizing gives, by value: no NaN or infinity, no -0, no lowest integer of symmetric ones."""
    element = fmt.element
    if not fmt.symmetric:
        return list(range(element.codes))
    if element.kind is Kind.INTEGER:
        return [code & (element.codes - 1) for code in range(-element.qmax, element.qmax + 1)]
    by_value: dict[float, int] = {}
    for code, value in enumerate(element.values):
        if value in element.finite_values:
            by_value.setdefault(value, code)
    return [by_value[value] for value in sorted(by_value)]


def _usable(fmt: BlockFormat) -> list[float]:
    if not fmt.symmetric:
        return [float(code) for code in usable_codes(fmt)]
    return [fmt.element.values[code] for code in usable_codes(fmt)]
