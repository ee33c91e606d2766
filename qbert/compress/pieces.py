"""A tokenizer with fewer pieces: which may go, and the same tokenizer without them. WordPiece, Unigram and BPE.

What these three have in common: a text whose pieces are all kept is cut into the same pieces. WordPiece takes the longest match
from the left, and the matches that it took are still there and still the longest. Unigram takes the likeliest path, and it is
still there and has fewer rivals. BPE applies its merges in order, and a kept piece keeps all merges that lead to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qbert.errors import QBertError

KINDS = ("WordPiece", "Unigram", "BPE")
_SPACE = "\u2581"  # Unigram's mark of a word's beginning
_UNUSED = "[unused"


@dataclass(frozen=True)
class Pieces:
    """A tokenizer's pieces.

    Attributes:
        state: the tokenizer as data, in the spelling of the tokenizers library.
        kind: one of `KINDS`.
        names: piece -> id, added tokens included.
    """

    state: dict[str, Any]
    kind: str
    names: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Pieces:
        """Those of a tokenizer of transformers.

        Raises:
            QBertError: one without a fast implementation, of another kind, or with ids that are not 0, 1, 2 ...
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise QBertError(
                f"{type(tokenizer).__name__} has no fast tokenizer; allowed: those of the tokenizers library"
            )
        state = json.loads(backend.to_str())
        kind = state["model"].get("type")
        if kind not in KINDS:
            raise QBertError(f"the tokenizer's model is {kind!r}; allowed: {', '.join(KINDS)}")
        return cls(state, kind, backend.get_vocab(with_added_tokens=True))

    @property
    def model(self) -> dict[str, Any]:
        """The part that cuts words."""
        return cast("dict[str, Any]", self.state["model"])

    def required(self) -> set[int]:
        """Pieces that must stay: added tokens, single characters, whatever has a character that is no piece by itself."""
        stay = {each["id"] for each in self.state["added_tokens"]}
        singles = {name for name in self.names if self._is_single(name)}
        stay |= {self.names[name] for name in singles}
        stay |= {index for name, index in self.names.items() if not self._spelled(name, singles)}
        if self.kind == "Unigram":
            scores = [score for _, score in self.model["vocab"]]
            stay.add(
                scores.index(min(scores))
            )  # what an unknown character costs is counted from the least likely piece
            stay.add(self.model["unk_id"] or 0)
        elif self.model.get("unk_token") in self.names:
            stay.add(self.names[self.model["unk_token"]])
        return stay

    def _prefix(self) -> str:
        return str(self.model.get("continuing_subword_prefix") or "")

    def _is_single(self, name: str) -> bool:
        prefix = self._prefix()
        bare = name.removeprefix(prefix) if prefix else name
        is_byte = len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        return len(bare) == 1 or name == self._prefix() or is_byte

    def _spelled(self, name: str, singles: set[str]) -> bool:
        """Whether a piece could be spelled in single characters."""
        prefix = self._prefix()
        if not prefix:
            return all(letter in singles for letter in name)
        inner = name.startswith(prefix)
        bare = name.removeprefix(prefix)
        return all((prefix + letter if inner or place else letter) in singles for place, letter in enumerate(bare))

    def parents(self) -> dict[int, list[int]]:
        """Of BPE, piece -> the pieces that are merged into it; nothing of the other kinds."""
        found: dict[int, list[int]] = {}
        for left, right in self._merges():
            product = self.names.get(left + right.removeprefix(self._prefix()))
            if product is not None:
                found.setdefault(product, []).extend((self.names[left], self.names[right]))
        return found

    def _merges(self) -> list[tuple[str, str]]:
        merges = self.model.get("merges", []) if self.kind == "BPE" else []
        pairs = (each.split(" ", 1) if isinstance(each, str) else each for each in merges)  # older files have strings
        return [(left, right) for left, right in pairs]

    def unused(self) -> set[int]:
        """Pieces that were left free for later; they go first."""
        return {index for name, index in self.names.items() if name.startswith(_UNUSED)}

    def without(self, renumbered: dict[int, int]) -> dict[str, Any]:
        """The tokenizer's state with only the pieces that have a new id, under those."""
        state = cast("dict[str, Any]", json.loads(json.dumps(self.state)))
        model = state["model"]
        if self.kind == "Unigram":
            model["vocab"] = [each for index, each in enumerate(model["vocab"]) if index in renumbered]
            model["unk_id"] = None if model["unk_id"] is None else renumbered[model["unk_id"]]
        else:
            vocabulary = sorted(model["vocab"].items(), key=lambda item: item[1])
            model["vocab"] = {name: renumbered[index] for name, index in vocabulary if index in renumbered}
        if self.kind == "BPE":
            there = model["vocab"].keys()
            joined = lambda left, right: left + right.removeprefix(self._prefix())
            kept = [[a, b] for a, b in self._merges() if a in there and b in there and joined(a, b) in there]
            model["merges"] = kept
        state["added_tokens"] = [{**each, "id": renumbered[each["id"]]} for each in state["added_tokens"]]
        if state.get("padding"):
            state["padding"]["pad_id"] = renumbered[state["padding"]["pad_id"]]
        state["post_processor"] = _renumbered(state.get("post_processor"), renumbered)
        return state


def _renumbered(processor: Any, ids: dict[int, int]) -> Any:
    """A post-processor with the new ids of the special tokens that it adds."""
    if not isinstance(processor, dict):
        return processor
    done = dict(processor)
    if done.get("type") == "TemplateProcessing":
        tokens = done["special_tokens"]
        done["special_tokens"] = {name: {**each, "ids": [ids[i] for i in each["ids"]]} for name, each in tokens.items()}
    if done.get("type") in ("BertProcessing", "RobertaProcessing"):
        done |= {name: [done[name][0], ids[done[name][1]]] for name in ("sep", "cls")}
    if done.get("type") == "Sequence":
        done["processors"] = [_renumbered(each, ids) for each in done["processors"]]
    return done


def chosen(pieces: Pieces, counts: Sequence[int], size: int, also: Iterable[int]) -> list[int]:
    """Ids of `size` pieces, ascending: the required ones, then the most frequent, of equal ones the first.

    Args:
        counts: (vocabulary,) how often each id was seen.
        also: other ids that stay.

    Raises:
        QBertError: fewer than are required, or more than there are.
    """
    required = closed({*pieces.required(), *also}, pieces.parents())
    if not len(required) <= size <= len(counts):
        raise QBertError(
            f"size is {size}; allowed: {len(required)} (special tokens and single characters) ... {len(counts)}"
        )
    unused, parents, kept = pieces.unused(), pieces.parents(), set(required)
    for index in sorted(range(len(counts)), key=lambda each: (-counts[each], each in unused, each)):
        wanted = closed({index}, parents) - kept
        if wanted and len(kept) + len(wanted) <= size:
            kept |= wanted
    return sorted(kept)


def closed(ids: set[int], parents: dict[int, list[int]]) -> set[int]:
    """With everything that BPE goes through on its way to them."""
    done, open_ = set(ids), list(ids)
    while open_:
        fresh = [each for each in parents.get(open_.pop(), ()) if each not in done]
        done.update(fresh)
        open_ += fresh
    return done
