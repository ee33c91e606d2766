"""What `qbert.emulate` asks for: a recipe whose schemes are any block formats, and what else is rounded. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qbert.errors import QBertError
from qbert.families import KEEP_FLOAT
from qbert.formats import BlockFormat, Role, as_format, check_activations, emulated_scheme, load_format
from qbert.modules import AttentionFormats
from qbert.recipe import Decision, Recipe, matches

_SITES = ("weights", "embeddings", "activations", "norms", "gelu")


@dataclass(frozen=True)
class Emulation(Recipe):
    """Block formats for a model: see `emulate`.

    `linear`, `embedding` and `overrides` of a recipe are names of schemes, which have kernels; here they are empty.

    Attributes:
        weights, embeddings, activations: formats of linears' weights, of tables, and of what linears take; None leaves float.
        attention: of attention's operands.
        norms, gelu: of what norms and activation functions give.
        trainable: weights follow float parameters. Not part of a file: what is stored are the codes.
    """

    linear: str | None = None
    weights: BlockFormat | None = None
    embeddings: BlockFormat | None = None
    activations: BlockFormat | None = None
    attention: AttentionFormats = field(default_factory=AttentionFormats)
    norms: BlockFormat | None = None
    gelu: BlockFormat | None = None
    trainable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linear is not None or self.embedding is not None or self.overrides:
            raise QBertError(
                "an emulation takes block formats, and no schemes; allowed: weights=, embeddings=, exclude="
            )
        for fmt in (self.activations, self.norms, self.gelu):
            check_activations(fmt)
        trained = [fmt for fmt in (self.weights, self.embeddings) if fmt is not None]
        if self.trainable and not trained:
            raise QBertError("trainable: nothing to train in a format; allowed with weights= or embeddings=")
        for fmt in trained if self.trainable else ():
            if fmt.is_learned:
                raise QBertError(f"format {fmt.name} learns its values; allowed in training: any other")
        if not trained and not self.sites:
            raise QBertError("nothing to emulate; allowed: weights, embeddings, activations, attention, norms, gelu")

    @property
    def sites(self) -> bool:
        """Whether something is rounded beside quantized modules."""
        return bool(self.attention.chosen()) or any((self.activations, self.norms, self.gelu))

    def decide(self, name: str, role: Role) -> Decision:
        """The emulated scheme for the module of that name and role."""
        for patterns, reason in ((self.exclude, "excluded by"), (self.keep_float, "stays float, on the skip list:")):
            for pattern in patterns:
                if matches(name, pattern):
                    return Decision(None, f"{reason} {pattern!r}")
        fmt = self.weights if role is Role.LINEAR else self.embeddings
        if fmt is None:
            return Decision(None, f"the emulation leaves {role.value}s float")
        return Decision(emulated_scheme(fmt, self.activations if role is Role.LINEAR else None), "emulation")

    def rounds_input_of(self, name: str) -> bool:
        """Whether a linear of that name, whose weight is float, takes rounded activations."""
        return self.activations is not None and not any(
            matches(name, each) for each in (*self.exclude, *self.keep_float)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a configuration file; `from_dict` gives it back."""
        formats = {name: getattr(self, name) for name in _SITES}
        data = {name: fmt.to_dict() for name, fmt in formats.items() if fmt is not None}
        attention = {name: fmt.to_dict() for name, fmt in self.attention.chosen().items()}
        return super().to_dict() | {"emulation": data | ({"attention": attention} if attention else {})}

    @classmethod
    def from_dict(cls, recipe: Recipe, data: Mapping[str, Any]) -> Emulation:
        """From what a file holds, which may come from anywhere.

        Raises:
            QBertError: an entry that is unknown, of another type or out of range.
        """
        for name in data:
            if name not in (*_SITES, "attention"):
                raise QBertError(f"emulation {name!r}; allowed: {', '.join(_SITES)}, attention")
        for each in (*data.values(), *(data.get("attention") or {}).values()):
            if not isinstance(each, Mapping):
                raise QBertError(f"emulation has {str(each)[:40]!r}; allowed: formats, as objects")
        formats: dict[str, Any] = {name: BlockFormat.from_dict(data[name]) for name in _SITES if name in data}
        operands = {name: BlockFormat.from_dict(each) for name, each in data.get("attention", {}).items()}
        kept = {name: getattr(recipe, name) for name in ("linear", "embedding", "exclude", "overrides", "keep_float")}
        return cls(**kept, **formats, attention=AttentionFormats.of(operands))


def emulate(
    weights: BlockFormat | str | None = None,
    activations: BlockFormat | str | None = None,
    attention: AttentionFormats | BlockFormat | str | Mapping[str, Any] | None = None,
    *,
    embeddings: BlockFormat | str | None = None,
    norms: BlockFormat | str | None = None,
    gelu: BlockFormat | str | None = None,
    exclude: Sequence[str] = (),
    keep_float: Sequence[str] = KEEP_FLOAT,
    trainable: bool = False,
) -> Emulation:
    """Any block formats on any model, computed in float: ``qbert.quantize_(model, qbert.emulate(weights="mxfp4"))``.

    Args:
        weights: format of linears' weights, packed at its true bits, or its name (`qbert.formats.NAMED`).
        activations: of what linears take, rounded token by token.
        attention: of query, key, probabilities and value; or a mapping of these names and ``"scores"`` to formats.
        embeddings: of embedding tables.
        norms, gelu: of what layer norms and activation functions give.
        exclude, keep_float: patterns of modules that stay float, as in `qbert.Recipe`.
        trainable: keep float parameters that the codes follow, so that the model can be fine-tuned in its formats.

    Raises:
        QBertError: an unknown name, a format that is not for its place, or nothing to emulate.
    """
    chosen = {"weights": weights, "activations": activations, "embeddings": embeddings, "norms": norms, "gelu": gelu}
    formats: dict[str, Any] = {name: None if fmt is None else as_format(fmt) for name, fmt in chosen.items()}
    return Emulation(
        **formats, attention=AttentionFormats.of(attention), exclude=exclude, keep_float=keep_float, trainable=trainable
    )


def parse_emulation(text: str) -> Emulation:
    """``"weights=mxfp4 activations=mxfp8 attention=mxfp8"``, as the command line takes it; ``FILE.py:NAME`` runs that file.

    Raises:
        QBertError: a place or a format that there is not.
    """
    places = (*_SITES, "attention")
    chosen: dict[str, Any] = {}
    for part in text.split():
        place, equals, name = part.partition("=")
        if not equals or place not in places or place in chosen:
            raise QBertError(f"emulation {part!r}; allowed once each: {', '.join(f'{each}=FORMAT' for each in places)}")
        chosen[place] = load_format(name)
    return emulate(**chosen)
