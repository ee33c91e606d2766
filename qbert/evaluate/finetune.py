"""Full fine-tuning of a small encoder on CPU cores, minutes, so that a real classifier is there to be quantized."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbert.errors import QBertError
from qbert.evaluate.datasets import SPLIT_SEED, Dataset
from qbert.evaluate.encode import Progress, checked_max_length, encode_texts, pad, tokenize
from qbert.evaluate.loading import load_tokenizer, quiet_transformers
from qbert.evaluate.tasks import Task, TaskData, load_task
from qbert.folders import new_folder
from qbert.zoo import cache_dir, resolve_model, sha256_of_file

TASK_FILE = "qbert_task.json"
TASK_FILE_VERSION = 1
KEY_CHARACTERS = 16  # of the SHA-256 that names a cached fine-tuned model

PERCENT = 100.0
DEFAULT_EPOCHS = 3
# What three passes leave short: TREC has the fewest texts and six classes.
TASK_EPOCHS = {"trec": 4}
DEFAULT_LR = 1e-4
BATCH_SIZE = 32
WARMUP_SHARE = 0.1  # of the steps, linear up; then linear down to 0
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
BUCKET_BATCHES = 16  # batches whose texts are sorted by length together: little padding, still shuffled


@dataclass(frozen=True)
class FineTuned:
    """What came out.

    Attributes:
        path: a transformers folder with tokenizer, id2label and `qbert_task.json`.
        accuracy: on the held-out texts, 0 to 100, in float32.
        n_test: how many those are.
        n_train_truncated: training texts of which the model saw only the beginning.
    """

    path: Path
    accuracy: float
    n_test: int
    n_train_truncated: int


@dataclass(frozen=True)
class _Recipe:
    """All that decides the result besides the weights and the texts: it is part of the cache key."""

    epochs: int
    lr: float
    seed: int
    bf16: bool
    batch_size: int = BATCH_SIZE
    warmup_share: float = WARMUP_SHARE
    weight_decay: float = WEIGHT_DECAY
    embeddings: str = "frozen"


def finetune(
    model_path: str | Path,
    task: str | Task | TaskData | Dataset,
    out_dir: str | Path,
    *,
    epochs: int | None = None,
    lr: float = DEFAULT_LR,
    seed: int = 0,
    progress: Progress | None = None,
) -> FineTuned:
    """Train `AutoModelForSequenceClassification` from `model_path` on a task's training texts, on the CPU.

    AdamW, learning rate with warm-up and linear decay, embeddings frozen (they hold half of a small model's parameters
    and gain little in three passes), bfloat16 autocast where the CPU has the instructions for it. Same seed, same CPU,
    same threads: same weights.

    Args:
        out_dir: a folder that does not exist yet; it appears when everything is in it.
        epochs: passes over the texts; by default 4 for trec, 3 otherwise.
        progress: called with (steps done, steps in all).

    Raises:
        QBertError: a similarity task, no training texts, an existing `out_dir`, or epochs or lr out of range.
    """
    data = load_task(task)
    out_dir = Path(out_dir)
    recipe = _recipe(data, epochs, lr, seed)
    if out_dir.exists():
        raise QBertError(f"output folder {str(out_dir)!r} exists already: name one that does not")
    source = resolve_model(model_path)
    with _seeded(seed):
        model, tokenizer = _load(source, data)
        n_truncated = _train(model, tokenizer, data.train, recipe, progress)
    encoded = encode_texts(model, tokenizer, data.test.texts)
    assert encoded.logits is not None
    n_correct = int((encoded.logits.argmax(dim=1) == torch.tensor(data.test.labels)).sum())
    accuracy = PERCENT * n_correct / len(data.test)
    with new_folder(out_dir) as folder, quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = _record(data, recipe) | {"n_train_truncated": n_truncated, "accuracy": accuracy}
        (folder / TASK_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return FineTuned(out_dir, accuracy, len(data.test), n_truncated)


def finetuned_model(
    model_path: str | Path,
    task: str | Task | TaskData | Dataset,
    *,
    epochs: int | None = None,
    lr: float = DEFAULT_LR,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Folder of `model_path` fine-tuned on `task`: trained once, then found again in `cache_dir()`.

    The key is the SHA-256 of the source's weights, configuration and tokenizer, of the texts, and of the recipe.
    """
    data = load_task(task)
    source = Path(resolve_model(model_path))
    if not source.is_dir():
        raise QBertError(f"model {str(source)!r}: fine-tuning needs a local folder, download it first")
    parts = (source_sha256(source), data.train.fingerprint(), data.test.fingerprint(),
             json.dumps(asdict(_recipe(data, epochs, lr, seed)), sort_keys=True))  # fmt: skip
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:KEY_CHARACTERS]
    target = cache_dir() / "finetuned" / f"{_file_name(data.name)}-{key}"
    if not target.is_dir():
        finetune(source, data, target, epochs=epochs, lr=lr, seed=seed, progress=progress)
    return target


def source_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of a model folder's weights, configuration and vocabulary.

    Raises:
        QBertError: no `*.safetensors` in the folder.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise QBertError(f"model folder {str(folder)!r} holds no *.safetensors file")
    digest = hashlib.sha256()
    for path in [*weights, *sorted(folder.glob("*.json")), *sorted(folder.glob("*.txt"))]:
        digest.update(f"{path.name} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX-BF16); elsewhere autocast is slower."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _recipe(data: TaskData, epochs: int | None, lr: float, seed: int) -> _Recipe:
    if data.kind != "classification":
        raise QBertError(f"task {data.name!r} is a {data.kind} task: fine-tuning needs a classification task")
    if not len(data.train) or not len(data.test):
        sizes = f"{len(data.train)} training and {len(data.test)} test texts"
        raise QBertError(f"task {data.name!r} has {sizes}, needed: at least 1 of each")
    epochs = TASK_EPOCHS.get(data.name, DEFAULT_EPOCHS) if epochs is None else epochs
    if epochs < 1:
        raise QBertError(f"epochs {epochs}: must be at least 1")
    if not 0 < lr < 1:
        raise QBertError(f"lr {lr}: must be between 0 and 1")
    return _Recipe(epochs=epochs, lr=lr, seed=seed, bf16=cpu_has_bf16())


def _load(source: str, data: TaskData) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification

    names = data.label_names
    with quiet_transformers():  # it warns that the head is new, which is the point
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            dtype=torch.float32,
        )
    return model, load_tokenizer(source)


def _train(model: Any, tokenizer: Any, train: Dataset, recipe: _Recipe, progress: Progress | None) -> int:
    """Train in place. Returns how many texts were longer than the model takes."""
    for parameter in _embeddings(model).parameters():
        parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    inputs, n_truncated = tokenize(tokenizer, train.texts, checked_max_length(model, tokenizer))
    total = recipe.epochs * math.ceil(len(inputs) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, total, recipe.warmup_share))
    shuffle = random.Random(recipe.seed)
    done = 0
    model.train()
    for _ in range(recipe.epochs):
        for batch in _shuffled_batches([len(row["input_ids"]) for row in inputs], recipe.batch_size, shuffle):
            labels = torch.tensor([train.labels[i] for i in batch])
            with torch.autocast("cpu", dtype=torch.bfloat16) if recipe.bf16 else nullcontext():
                logits = model(**pad(tokenizer, [inputs[i] for i in batch])).logits
            nn.functional.cross_entropy(logits.float(), labels).backward()
            nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if progress:
                progress(done, total)
    model.requires_grad_(True).eval()
    return n_truncated


def _embeddings(model: Any) -> nn.Module:
    """The whole embedding block (words, positions, types, norm) where the model names it so, else the word table."""
    base = model.base_model
    block = getattr(base, "embeddings", None)
    return block if isinstance(block, nn.Module) else base.get_input_embeddings()


def _lr_factor(step: int, total: int, warmup_share: float) -> float:
    """Share of the learning rate at `step` (from 0): up over the warm-up, then down to 0 after the last step."""
    warmup = max(1, round(warmup_share * total))
    return (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)


def _shuffled_batches(lengths: list[int], size: int, shuffle: random.Random) -> Iterator[list[int]]:
    """Every index once: shuffled, sorted by length within buckets of batches, batches of a bucket shuffled again."""
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    bucket_size = size * BUCKET_BATCHES
    for start in range(0, len(order), bucket_size):
        bucket = sorted(order[start : start + bucket_size], key=lambda i: lengths[i])
        batches = [bucket[k : k + size] for k in range(0, len(bucket), size)]
        shuffle.shuffle(batches)
        yield from batches


def _record(data: TaskData, recipe: _Recipe) -> dict[str, Any]:
    return {
        "version": TASK_FILE_VERSION,
        "task": data.name,
        "label_names": list(data.label_names),
        "split": {
            "seed": SPLIT_SEED,
            "n_train": len(data.train),
            "n_test": len(data.test),
            "train_sha256": data.train.fingerprint(),
            "test_sha256": data.test.fingerprint(),
        },
        "seed": recipe.seed,
        "recipe": asdict(recipe),
        "metric": data.metric,
    }


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside, and give the caller's generator back untouched."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        yield
