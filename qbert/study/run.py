"""A study from beginning to end: float references once, then a point at a time, each stored when it is done."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

import qbert
from qbert.analyze.targets import device_description
from qbert.calibrate import default_texts
from qbert.cost import Beside, EncoderCost, EncoderWork, Formats, Hardware, encoder_cost, read_work
from qbert.emulation import Emulation
from qbert.errors import QBertError
from qbert.evaluate import Baseline, load_fp32, load_tokenizer, prepare_baseline, score
from qbert.evaluate.encode import checked_max_length, pad, tokenize
from qbert.formats import BlockFormat
from qbert.study.measure import (
    Sample,
    activation_errors,
    attention_errors,
    emulated_copy,
    hidden_error,
    sensitivity,
    stored,
    weight_errors,
)  # fmt: skip
from qbert.study.plan import Point, plan_points
from qbert.study.result import PointResult, Reference, Study, TargetNote
from qbert.zoo import cache_dir, resolve_model

Step = Callable[[str], None]

STORE_VERSION = 1  # of what a stored point means; another one is measured anew
SAMPLE_TEXTS, SAMPLE_TOKENS = 8, 64  # texts for errors site by site, and the tokens that each is cut to


def run_study(
    source: str,
    formats: Sequence[BlockFormat],
    tasks: Sequence[Any],
    *,
    sites: Sequence[str] = ("weights",),
    store: str | Path | None = None,
    by_part: bool = True,
    targets: Sequence[Hardware] = (),
    batch: int = 8,
    seq: int = 128,
    beside: Sequence[Beside] = (),
    step: Step = lambda text: None,
) -> Study:
    """What formats do to a model.

    Args:
        source: local folder, hub id or alias of a float model.
        formats: see `qbert.formats`.
        tasks: names or data, see `qbert.evaluate`.
        sites: where each format is put, all at once; see `plan.SITES`.
        store: folder for finished points, by default in qbert's cache: a study that was killed goes on where it was.
        by_part: measure each linear and table alone, too (a forward of the sample each).
        targets: machines to model a forward's time and energy on (`qbert.cost`); `batch` sequences of `seq` tokens.
        beside: what of these machines was measured, for the page.
        step: told what is being done.

    Raises:
        QBertError: no task, a model that is quantized, or what `plan_points` refuses.
    """
    start = time.perf_counter()
    points = plan_points(formats, sites)
    if not tasks:
        raise QBertError("no task to study on; allowed: at least one")
    folder = cache_dir() / "study" if store is None else Path(store)
    path = resolve_model(source)
    model, tokenizer = load_fp32(path), load_tokenizer(path)
    work = read_work(model) if targets else None
    modelled = functools.partial(_costs, work, targets, batch, seq)
    float_costs = modelled(None)  # before anything takes long: a target that cannot do floats is refused at once
    sample = Sample.of(model, _sample_inputs(model, tokenizer))
    baselines = []
    for task in tasks:
        step(f"float32 on {getattr(task, 'name', task)}")
        baselines.append(prepare_baseline(model, tokenizer, task))
    key = _key(model, baselines, by_part)
    results, resumed = [], 0
    for number, point in enumerate(points, 1):
        step(f"{point.fmt.name} ({number} of {len(points)})")
        file = folder / f"{_point_key(key, point)}.json"
        known = _read(file, point)
        resumed += known is not None
        if known is None:
            known = measure_point(model, tokenizer, point, baselines, sample, by_part=by_part)
            _write(file, known)
        results.append(known.model_copy(update={"costs": modelled(point)}))
    return Study(
        model=source,
        sites=list(sites),
        device=device_description(torch.device("cpu")),
        torch_version=torch.__version__,
        qbert_version=qbert.__version__,
        sample_tokens=sample.tokens,
        reference=Reference(
            model_bytes=stored(model).model_bytes, results=[each.result for each in baselines], costs=float_costs
        ),
        points=results,
        targets=[
            TargetNote(name=each.name, description=each.description, source=each.source, assumptions=each.assumptions)
            for each in targets
        ],
        beside=list(beside),
        resumed=resumed,
        seconds=time.perf_counter() - start,
    )


def _costs(
    work: EncoderWork | None, targets: Sequence[Hardware], batch: int, seq: int, point: Point | None
) -> list[EncoderCost]:
    """Of a point, or of float, on each target. Not stored: a target may change, and modelling takes milliseconds."""
    formats = Formats() if point is None else formats_of(point.emulation)
    return [] if work is None else [encoder_cost(work, each, formats, batch=batch, seq=seq) for each in targets]


def formats_of(emulation: Emulation) -> Formats:
    """What the model of cost is told of an emulation; formats of norms and GELU change no product."""
    return Formats(
        weights=emulation.weights,
        activations=emulation.activations,
        attention=emulation.attention,
        embeddings=emulation.embeddings,
    )


def measure_point(
    model: nn.Module, tokenizer: Any, point: Point, baselines: Sequence[Baseline], sample: Sample, *, by_part: bool
) -> PointResult:
    """Everything about one format."""
    start = time.perf_counter()
    emulated = emulated_copy(model, point.emulation)
    size, float_bytes = stored(emulated), stored(model).model_bytes
    rounded = {name for name in sample.taken if "activations" in point.sites and point.emulation.rounds_input_of(name)}
    errors: dict[str, Any] = {
        "weight_sqnr_db": weight_errors(model, emulated),
        "activation_sqnr_db": activation_errors(sample, point.fmt, rounded),
        "attention_sqnr_db": attention_errors(sample, point.fmt) if "attention" in point.sites else {},
        "sensitivity": sensitivity(model, emulated, sample, point.emulation.attention) if by_part else [],
    }
    results = [score(emulated, tokenizer, baseline) for baseline in baselines]
    compared = [(result.n, result.comparison) for result in results if result.comparison is not None]
    return PointResult(
        name=point.fmt.name,
        format=point.fmt.to_dict(),
        sites=list(point.sites),
        left_out=point.left_out,
        bits_per_weight=size.bits_per_weight,
        model_bytes=size.model_bytes,
        percent_of_float32=100 * size.model_bytes / float_bytes,
        **errors,
        hidden_sqnr_db=hidden_error(emulated, sample),
        cosine_mean=sum(n * each.cosine_mean for n, each in compared) / sum(n for n, _ in compared),
        cosine_min=min(each.cosine_min for _, each in compared),
        results=results,
        forward_ratio=sum(each.seconds for each in results) / sum(each.result.seconds for each in baselines),
        seconds=time.perf_counter() - start,
    )


def _sample_inputs(model: nn.Module, tokenizer: Any) -> dict[str, torch.Tensor]:
    limit = min(SAMPLE_TOKENS, checked_max_length(model, tokenizer))
    rows, _ = tokenize(tokenizer, default_texts(SAMPLE_TEXTS), limit)
    return pad(tokenizer, rows)


def _key(model: nn.Module, baselines: Sequence[Baseline], by_part: bool) -> str:
    """Of everything but the point that decides what a point's result is."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    tasks = [(each.data.name, each.result.data_sha256, each.result.n_train) for each in baselines]
    total.update(json.dumps([STORE_VERSION, qbert.__version__, torch.__version__, tasks, by_part]).encode())
    return total.hexdigest()


def _point_key(key: str, point: Point) -> str:
    text = json.dumps([key, point.fmt.to_dict(), point.sites, sorted(point.left_out)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(file: Path, point: Point) -> PointResult | None:
    """A stored point; None where there is none, or one that is damaged: it is measured anew."""
    try:
        found = PointResult.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return found if found.format == json.loads(json.dumps(point.fmt.to_dict())) else None


def _write(file: Path, result: PointResult) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(result.model_dump_json(), encoding="utf-8")
    fresh.replace(file)
