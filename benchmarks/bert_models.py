"""The models that are timed: real ones by name, and encoders' shapes with random weights of a realistic distribution."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbert.errors import QBertError
from qbert.evaluate.loading import quiet_transformers
from qbert.families.positions import longest
from qbert.folders import new_folder
from qbert.zoo import WEIGHTS_FILE, resolve_model, sha256_of_file

from .problems import OTHER_FAMILIES, SHAPES, Shape, read_config

# Of trained encoders: deviation 0.04 to 0.1 a matrix, and a few weights in a thousand far outside (0.32% in MiniLM beyond what
# GOBO calls an outlier). Weights as they are initialized, normal with 0.02, would have almost none of these.
DEVIATION = 0.04
OUTLIER_SHARE = 0.003
OUTLIER_DEVIATIONS = (4.0, 8.0)
_SEED = 0
_WITHOUT_POOLER = frozenset({"modernbert"})  # their classes know no `add_pooling_layer`
# What the public base models' configurations say beside sizes, where it is not their class's default.
_SETTINGS: dict[str, dict[str, Any]] = {
    "mpnet": {"max_position_embeddings": 514, "layer_norm_eps": 1e-5},
    "albert": {"embedding_size": 128},
    "modernbert": {"pad_token_id": 0},  # not 50,283, which smaller vocabularies do not have
}
_DISTRIBUTION = 1  # raised when the weights of a shape change, so that old caches are not used


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        name: as it was asked for.
        folder: what `from_pretrained` reads.
        work: folder for what is derived from it; its name changes with the weights.
        random: whether its weights are: then agreement says how exact the arithmetic is, not how good the model stays.
        float_bytes: of its weights in float32.
        longest: tokens of the longest sequence that it takes.
        vocabulary: rows of its table of words.
        padding: token id that padding has.
    """

    name: str
    folder: Path
    work: Path
    random: bool
    float_bytes: int
    longest: int
    vocabulary: int
    padding: int

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the model's own tokenizer; None where there is none, as with random weights."""
        return self.folder if any(self.folder.glob("tokenizer*")) else None


def find_model(name: str, cache: Path) -> ModelFolder:
    """A shape of `SHAPES`, made once and kept in the cache, or any model that `resolve_model` finds in a folder.

    Raises:
        QBertError: unknown, a hub id that is no folder here, or of a family that is not measured here.
    """
    if name in SHAPES:
        folder = cache / f"{name}-random{_DISTRIBUTION}"
        if not folder.is_dir():
            with new_folder(folder) as fresh, quiet_transformers():
                random_model(SHAPES[name]).save_pretrained(fresh)
        return _model_folder(name, folder, folder / "work", random=True)
    folder = Path(resolve_model(name))
    if not (folder / WEIGHTS_FILE).is_file():
        raise QBertError(f"model {name!r} is no folder with {WEIGHTS_FILE}; allowed: one, or {', '.join(SHAPES)}")
    kind = read_config(folder).model_type
    if kind != "bert" and kind not in OTHER_FAMILIES:
        allowed = ", ".join(("bert", *sorted(OTHER_FAMILIES)))
        raise QBertError(f"model {name!r} is a {kind}; this benchmark takes {allowed}")
    label = f"{Path(name).name}-{sha256_of_file(folder / WEIGHTS_FILE)[:12]}"
    return _model_folder(name, folder, cache / label / "work", random=False)


def _model_folder(name: str, folder: Path, work: Path, *, random: bool) -> ModelFolder:
    config = read_config(folder)
    positions = longest(config)
    assert positions is not None  # all of these families have tables of positions, or a limit
    size = (folder / WEIGHTS_FILE).stat().st_size
    return ModelFolder(name, folder, work, random, size, positions, config.vocab_size, int(config.pad_token_id or 0))


def load_float32(folder: str | Path) -> Any:
    """The encoder without its pooler, in float32: all that any system here computes."""
    from transformers import AutoModel

    pooler = {} if read_config(Path(folder)).model_type in _WITHOUT_POOLER else {"add_pooling_layer": False}
    with quiet_transformers():
        return AutoModel.from_pretrained(folder, dtype=torch.float32, **pooler).eval()


def fingerprint(*parts: str) -> str:
    """Short hash that names a cached file by everything it depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared storage counted once."""
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def random_model(shape: Shape, *, classifies: bool = False) -> Any:
    """An encoder of that shape without its pooler, or a classifier of sequences; the same one every time."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    config = config_of(shape)
    model = (AutoModelForSequenceClassification if classifies else AutoModel).from_config(config).eval()
    if hasattr(model, "pooler"):  # a classifier's is its encoder's
        model.pooler = None
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(realistic_weights(*parameter.shape, generator=generator))
            elif parameter.dim() == 1:  # biases; the norms' weights stay around one
                noise = torch.randn(parameter.shape, generator=generator) * DEVIATION
                parameter.add_(noise)
    return model


def config_of(shape: Shape) -> Any:
    """The configuration of an encoder of that shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        shape.family, num_hidden_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
        intermediate_size=shape.inner, vocab_size=shape.vocabulary, **_SETTINGS.get(shape.family, {}),
    )  # fmt: skip


def realistic_weights(rows: int, columns: int, *, generator: torch.Generator) -> Tensor:
    """(rows, columns) float32: normal, with a few in a thousand weights four to eight deviations from the mean."""
    weights = torch.randn(rows, columns, generator=generator) * DEVIATION
    count = int(rows * columns * OUTLIER_SHARE)
    places = torch.randint(rows * columns, (count,), generator=generator)
    low, high = OUTLIER_DEVIATIONS
    sizes = torch.rand(count, generator=generator) * (high - low) + low
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    weights.view(-1)[places] = DEVIATION * sizes * signs
    return weights
