"""A recipe says which module gets which scheme. Pure: names and roles in, decisions with reasons out."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qbert.errors import QBertError
from qbert.families import KEEP_FLOAT
from qbert.formats import SCHEME_ALIASES, Role, Scheme, get_scheme, scheme_names

NONE = "none"  # in place of a scheme: what it is for stays float
# Embeddings beside linears that are named alone: 8-bit tables make the file a quarter of float32's, and no loss by them could
# be measured. Beside other schemes they stay float.
_TABLES = {"w8a8": "w8"}


@dataclass(frozen=True)
class Decision:
    """What happens to one module: a scheme, or None to leave it float; and why."""

    scheme: Scheme | None
    reason: str


@dataclass(frozen=True)
class Recipe:
    """Schemes for a model's linears and embeddings.

    A pattern is a shell wildcard that is matched against any run of whole components of a qualified name: ``"pooler"`` matches
    ``bert.pooler.dense``, ``"encoder.layer.1"`` does not match ``encoder.layer.10``. With ``$`` at its end it matches the last
    ones only: ``"decoder$"`` matches ``lm_head.decoder``, not ``decoder.layers.0.fc1``.

    Attributes:
        linear: scheme of linears, or None to leave them float.
        embedding: scheme of embeddings, or None.
        exclude: patterns of modules that stay float, whatever else says.
        overrides: pattern -> scheme or None; the first that matches wins over `linear`, `embedding` and `keep_float`.
        keep_float: patterns that stay float unless overridden: task heads by default (see `qbert.families.heads`).
    """

    linear: str | None = "w8a8"
    embedding: str | None = None
    exclude: Sequence[str] = ()
    overrides: Mapping[str, str | None] = field(default_factory=dict)
    keep_float: Sequence[str] = KEEP_FLOAT

    def __post_init__(self) -> None:
        for name in ("exclude", "keep_float"):
            if isinstance(getattr(self, name), str):
                raise QBertError(f"{name} is the string {getattr(self, name)!r}; allowed: a list of patterns")
        if self.linear is not None:
            get_scheme(self.linear, Role.LINEAR)
        if self.embedding is not None:
            get_scheme(self.embedding, Role.EMBEDDING)
        known = {*scheme_names(Role.LINEAR), *scheme_names(Role.EMBEDDING), None}
        for pattern, scheme in self.overrides.items():
            if scheme not in known and scheme not in SCHEME_ALIASES:
                allowed = ", ".join(sorted(filter(None, known)))
                raise QBertError(f"override {pattern!r}: unknown scheme {scheme!r}; allowed: None, {allowed}")

    def decide(self, name: str, role: Role) -> Decision:
        """The scheme for the module of that name and role.

        Raises:
            QBertError: an override names a scheme that is not for this role.
        """
        for pattern in self.exclude:
            if matches(name, pattern):
                return Decision(None, f"excluded by {pattern!r}")
        for pattern, scheme in self.overrides.items():
            if matches(name, pattern):
                if scheme is None:
                    return Decision(None, f"override {pattern!r}")
                return Decision(get_scheme(scheme, role), f"override {pattern!r}")
        for pattern in self.keep_float:
            if matches(name, pattern):
                return Decision(None, f"stays float: {pattern!r} is on the skip list")
        default = self.linear if role is Role.LINEAR else self.embedding
        if default is None:
            return Decision(None, f"the recipe leaves {role.value}s float")
        return Decision(get_scheme(default, role), "recipe")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a configuration file; `Recipe(**data)` gives it back."""
        return {
            "linear": self.linear,
            "embedding": self.embedding,
            "exclude": list(self.exclude),
            "overrides": dict(self.overrides),
            "keep_float": list(self.keep_float),
        }


def as_recipe(recipe: Recipe | str) -> Recipe:
    """A recipe as it is, or what a word stands for: ``"gobo3"`` gives all linears that scheme, ``"gobo3+gobo4"`` the embeddings
    theirs, too. ``"w8a8"`` alone takes the embeddings to 8 bits, ``"w8a8+none"`` leaves them float.

    Raises:
        QBertError: a scheme that is none, or is not for linears or embeddings.
    """
    if isinstance(recipe, Recipe):
        return recipe
    linear, _, embedding = (recipe if "+" in recipe else f"{recipe}+{_TABLES.get(recipe, NONE)}").partition("+")
    return Recipe(None if linear == NONE else linear, None if embedding == NONE else embedding)


def in_words(linear: str | None, embedding: str | None) -> Recipe:
    """`as_recipe` of two words, where either may be missing."""
    return as_recipe(linear or NONE if embedding is None else f"{linear or NONE}+{embedding}")


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` matches a run of whole dotted components of `name`, the last ones where it ends in ``$``."""
    dotted = f".{name}."
    if pattern.endswith("$"):
        return fnmatch.fnmatchcase(dotted, f"*.{pattern[:-1]}.")
    return any(fnmatch.fnmatchcase(dotted, f"*.{each}.*") for each in (pattern, pattern.removesuffix(".*")))
