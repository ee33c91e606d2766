"""How a model's tokens become one vector: read from the files that sentence-transformers keeps beside a model, or named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qbert.errors import QBertError
from qbert.evaluate.encode import POOLINGS
from qbert.integrations.pipelines import MODULES_FILE, QUANTIZED, TRANSFORMER

_TRANSFORMER_FILE = "sentence_bert_config.json"
_PROMPTS_FILE = "config_sentence_transformers.json"
# Before version 6 a pooling's configuration had a switch for each mode.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_STAGES = (TRANSFORMER, "Pooling", "Normalize")


@dataclass(frozen=True)
class Pipeline:
    """What is done before and after an encoder.

    Attributes:
        pooling: ``"mean"`` of a text's tokens, or ``"cls"``, its first one.
        normalize: whether vectors get Euclidean length 1.
        max_length: tokens of a text that are read, special ones included; None for as many as the model takes.
        prompt: what is put before each text.
    """

    pooling: str
    normalize: bool
    max_length: int | None = None
    prompt: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def pipeline_of(
    folder: str | Path,
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
) -> Pipeline:
    """What the files beside a model say, and in their place what is given.

    Args:
        folder: of the model; a hub id has no files here.
        prompt: name of one of the model's prompts, or a text; by default the model's own default, if it has one.

    Raises:
        QBertError: neither the files nor the caller name a pooling, or the files ask for what is not computed here.
    """
    path = Path(folder)
    stages = _stages(path) if (path / MODULES_FILE).is_file() else {}
    if pooling is None:
        if "Pooling" not in stages:
            raise QBertError(
                f"{str(folder)!r} has no sentence-transformers configuration that says how to pool; "
                f"say --pooling, allowed: {', '.join(POOLINGS)}"
            )
        pooling = _pooling(path / stages["Pooling"])
    if pooling not in POOLINGS:
        raise QBertError(f"pooling {pooling!r}; allowed: {', '.join(POOLINGS)}")
    given = _read(path / _TRANSFORMER_FILE).get("max_seq_length") if stages else None
    return Pipeline(
        pooling=pooling,
        normalize="Normalize" in stages if normalize is None else normalize,
        max_length=given if max_length is None else max_length,
        prompt=_prompt(_read(path / _PROMPTS_FILE) if stages else {}, prompt),
    )


def _stages(folder: Path) -> dict[str, str]:
    """Name of each stage's class -> its folder."""
    listed = _read(folder / MODULES_FILE)
    rows = listed if isinstance(listed, list) else []
    found = {str(row.get("type", "")).rpartition(".")[2]: str(row.get("path", "")) for row in rows}
    found = {TRANSFORMER if name == QUANTIZED else name: path for name, path in found.items()}
    for name in found:
        if name not in _STAGES:
            raise QBertError(
                f"{MODULES_FILE}: this pipeline has a {name}, which is not computed here; allowed: {', '.join(_STAGES)}; "
                "SentenceTransformer(...).encode does"
            )
    if _read(folder / _TRANSFORMER_FILE).get("do_lower_case"):
        raise QBertError(f"{_TRANSFORMER_FILE}: do_lower_case is not computed here; allowed: a tokenizer that does so")
    return found


def _pooling(folder: Path) -> str:
    data = _read(folder / "config.json")
    modes = data.get("pooling_mode")
    if modes is None:
        modes = [mode for switch, mode in _SWITCHES.items() if data.get(switch)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise QBertError(
            f"{folder.name}: pooling {'+'.join(map(str, modes))} is not computed here; allowed: {', '.join(POOLINGS)}"
        )
    if not data.get("include_prompt", True):
        raise QBertError(f"{folder.name}: pooling without the prompt is not computed here; allowed: with it")
    return str(modes[0])


def _prompt(data: dict[str, Any], wanted: str | None) -> str:
    prompts = data.get("prompts") or {}
    name = data.get("default_prompt_name") if wanted is None else wanted
    return str(prompts.get(name, "" if wanted is None else wanted) or "")


def _read(file: Path) -> Any:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QBertError(f"{file.name}: not JSON ({error})") from None
