"""What the commands do: a model in, a checkpoint out; a checkpoint in, a report out. No printing here."""

from __future__ import annotations

import platform
import random
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from qbert import checkpoint
from qbert.calibrate import calibrate, default_texts
from qbert.compress import BudgetNotMet, Compression, CompressionReport, Guide, SearchReport
from qbert.convert import Progress, quantize_
from qbert.emulation import Emulation
from qbert.encoder import Calibration, encoders
from qbert.errors import MissingDependency, QBertError
from qbert.evaluate import TASKS, file_task, get_task, prepare_baseline, read_user_file, score
from qbert.evaluate.loading import has_tokenizer, load_fp32, load_tokenizer, quiet_transformers
from qbert.explain import Explanation, explain, zeros_in
from qbert.formats import SCHEMES
from qbert.integrations.pipelines import say_quantized
from qbert.metrics import sqnr_db
from qbert.modules import FactoredLinear, QuantizedModule
from qbert.recipe import Recipe
from qbert.shapes import Kept, recorded_plan
from qbert.target import cpu_target, extensions, native_cpu, physical_cores
from qbert.weight.codec import decode
from qbert.zoo import resolve_model

# What sentence-transformers keeps beside a model: how to pool and normalize. Copied so that a quantized folder stays one.
_SENTENCE_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling",
    "2_Normalize",
)
_PACKAGES = ("torch", "transformers", "triton", "sentence-transformers", "peft")
_FLOAT32_BYTES = 4
DEFAULT_TEXTS = "default"  # calibrate with Python's own language reference
NO_TEXTS = "none"
CALIBRATION_TEXTS = 128
SEARCH_FILES = "compression"  # beside a model that was searched for: .json, .toml, .png
COMPRESSION_TEXTS = 8192  # words want all there are; the other methods stop where more change nothing


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid")


class QuantizeReport(_Report):
    """Outcome of `quantize_checkpoint`; sizes in bytes; a line for each encoder says whether it runs fused; `calibrated_with`
    names the texts of its static scales, and `notes` says what was chosen that nobody asked for."""

    source: str
    folder: str
    modules: int
    encoders: list[dict[str, Any]]
    calibrated_with: str | None
    notes: list[str]
    bits_per_weight: float
    float32_bytes: int
    file_bytes: int
    percent_of_float32: float
    seconds: float


class CompressReport(_Report):
    """Outcome of `compress_checkpoint`; sizes in bytes, of the float32 original and of the file."""

    source: str
    folder: str
    texts: int
    float32_bytes: int
    file_bytes: int
    report: CompressionReport


class SearchedReport(_Report):
    """Outcome of `search_checkpoint`; sizes in bytes. `files`: the report beside the model, as JSON, recipe and picture."""

    source: str
    folder: str
    float32_bytes: int
    file_bytes: int
    files: list[str]
    report: SearchReport


class InspectReport(_Report):
    """What stands in a checkpoint, one row for each linear and embedding, and one for each encoder; sizes in bytes.

    `shapes` says what is left of a compressed model; `extensions` are qbert's own, of this installation (`target.extensions`);
    `notes` is what is to be said of zeros.
    """

    folder: str
    source: str | None
    shapes: str | None
    modules: list[dict[str, Any]]
    encoders: list[dict[str, Any]]
    extensions: dict[str, str]
    notes: list[str]
    bits_per_weight: float
    quantized_bytes: int
    float_bytes: int
    float32_bytes: int
    file_bytes: int
    percent_of_float32: float


class InfoReport(_Report):
    """What qbert has here: versions of packages, None of those that are not installed; the CPU; extensions, see
    `target.extensions`; the GPUs' names."""

    versions: dict[str, str | None]
    cpu: dict[str, Any]
    extensions: dict[str, str]
    gpus: list[str]


class ModuleSqnr(_Report):
    """One quantized weight against the original."""

    name: str
    scheme: str
    bits_per_weight: float
    sqnr_db: float | None
    max_error: float


class VerifyReport(_Report):
    """Every rule holds; with an original, how far each weight is from it."""

    folder: str
    tensors: int
    modules: int
    against: str | None
    sqnr: list[ModuleSqnr]


def info() -> InfoReport:
    """What is installed here and what would run."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cpu = {"isa": cpu_target().isa if native_cpu() is not None else None, "cores": physical_cores()}
    versions = {
        "python": platform.python_version(),
        "qbert": qbert_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    return InfoReport(versions=versions, cpu=cpu, extensions=extensions(), gpus=gpus)


def qbert_version() -> str:
    """Of the code that runs, which may lie in a clone."""
    import qbert

    return qbert.__version__


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load_float(source: str) -> nn.Module:
    """A float model, as the class that its configuration names, in the type it is stored in.

    Args:
        source: local folder, hub id or alias.

    Raises:
        QBertError: it cannot be loaded, or is quantized already.
    """
    import transformers

    path = resolve_model(source)
    if _holds_quantized(path):
        raise QBertError(f"{source!r} is quantized already; allowed: a float model")
    missing: list[str] = []
    with quiet_transformers():
        try:
            names = transformers.AutoConfig.from_pretrained(path).architectures or []
            named: Any = getattr(transformers, names[0], None) if names else None
            for model_class in filter(None, (named, transformers.AutoModel)):
                model, missing = _load_complete(model_class, path)
                if not missing:
                    return model.eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise QBertError(f"cannot load {source!r}: {' '.join(str(error).split())[:200]}") from None
    raise QBertError(
        f"{source!r} lacks {len(missing)} tensors of its model, {missing[0]!r} for one; they would be random"
    )


def _holds_quantized(path: str) -> bool:
    """Whether a folder holds a checkpoint with quantized modules; one of a compressed float model has none."""
    if not (Path(path).is_dir() and checkpoint.is_checkpoint(path)):
        return False
    return bool(checkpoint.read_config(path)["quantization_config"].get("modules"))


def _load_complete(model_class: Any, path: str) -> tuple[nn.Module, list[str]]:
    """A model, and the names of tensors that its file lacks.

    Files often hold a bare encoder where their configuration names a head model (all-mpnet-base-v2 does), and an encoder
    without its pooler: what is not there would be initialized at random, so it is left out of the model.
    """
    model, info = model_class.from_pretrained(path, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model, info = model_class.from_pretrained(path, output_loading_info=True, add_pooling_layer=False)
        missing = sorted(info["missing_keys"])
    return model, missing


def load_any(source: str) -> nn.Module:
    """A quantized checkpoint or a float32 model, whichever `source` is."""
    path = resolve_model(source)
    if Path(path).is_dir() and checkpoint.is_checkpoint(path):
        from qbert.integrations.transformers import load

        with quiet_transformers():
            return load(path).eval()
    return load_fp32(path)


def quantize_checkpoint(
    source: str,
    folder: str | Path,
    recipe: Recipe,
    *,
    fuse: bool | None = False,
    calibrate_with: str | None = NO_TEXTS,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantizes a model into a folder, with its tokenizer. Nothing is left behind on an error.

    Args:
        source: local folder, hub id or alias of a float model.
        folder: new, empty, or holding an older checkpoint.
        fuse: for the fused encoder; None where that pays.
        calibrate_with: texts for its static scales, see `calibration_texts`; ``"none"`` to take scales token by token; None for
            English prose where that pays.
    """
    from qbert.integrations.transformers import save

    if calibrate_with not in (None, NO_TEXTS):
        if fuse is False:
            raise QBertError("calibration is for the fused encoder; ask for that too (--fuse)")
        calibration_texts(calibrate_with)  # before a model is loaded for nothing
    model = load_float(source)
    fuse, calibrate_with, notes = _where_it_pays(model, recipe, resolve_model(source), fuse, calibrate_with)
    texts = None if calibrate_with is None else calibration_texts(calibrate_with)
    start = time.perf_counter()
    calibration = None if texts is None else _calibrated(model, texts, source, progress)
    quantize_(model, recipe, fuse=fuse, calibration=calibration, progress=progress)
    seconds = time.perf_counter() - start

    with checkpoint.replacing(folder) as fresh, quiet_transformers():
        save(model, fresh, source=source)
        copy_companions(resolve_model(source), fresh)
        say_quantized(fresh)
    explanation = explain(model)
    float32_bytes, file_bytes = _float32_bytes(model), _file_bytes(folder)
    return QuantizeReport(
        source=source,
        folder=str(folder),
        modules=len(explanation.quantized),
        encoders=[asdict(row) for row in explanation.encoders],
        calibrated_with=calibrate_with,
        notes=notes,
        bits_per_weight=explanation.bits_per_weight,
        float32_bytes=float32_bytes,
        file_bytes=file_bytes,
        percent_of_float32=100 * file_bytes / float32_bytes,
        seconds=seconds,
    )


def _calibrated(model: nn.Module, texts: Sequence[str], source: str, progress: Progress | None) -> Calibration:
    advance = None if progress is None else lambda done, total: progress(done, total, "calibrating")
    return calibrate(model, texts, tokenizer=load_tokenizer(resolve_model(source)), progress=advance)


def _where_it_pays(
    model: nn.Module, recipe: Recipe, path: str, fuse: bool | None, calibrate_with: str | None
) -> tuple[bool, str | None, list[str]]:
    """Whether to fuse, the texts to calibrate with, and what is to be said about what was left to choose.

    Fused encoders are faster for every family with int8 activations, and static scales faster again (docs/cpu.md).
    """
    notes = []
    if fuse is None:
        known = not isinstance(recipe, Emulation) and any(True for _ in encoders(model))
        scheme = None if recipe.linear is None or not known else SCHEMES[recipe.linear]
        fuse = calibrate_with not in (None, NO_TEXTS) or (scheme is not None and scheme.activation is not None)
        if fuse:
            notes.append("fused, because that is faster; --no-fuse leaves the modules as they are")
        elif known:
            notes.append(f"not fused: {recipe.linear or 'float linears'} has no int8 activations")
        if calibrate_with is None and fuse:
            calibrate_with, note = _default_calibration(model, path)
            notes.append(note)
    return fuse, None if calibrate_with == NO_TEXTS else calibrate_with, notes


def _default_calibration(model: nn.Module, path: str) -> tuple[str, str]:
    """The texts to calibrate with that nobody named, and what is said about them."""
    if len(list(encoders(model))) != 1:
        return NO_TEXTS, "not calibrated: it has several encoders"
    if not has_tokenizer(path):
        return NO_TEXTS, "not calibrated, which would be faster: no tokenizer beside the model"
    return DEFAULT_TEXTS, "calibrated on English prose, because that is faster; --calibrate TEXTS takes yours, or none"


def compress_checkpoint(
    source: str,
    folder: str | Path,
    recipe: Compression,
    *,
    texts: str,
    tasks: Sequence[str] = (),
    progress: Progress | None = None,
) -> CompressReport:
    """Compresses a model into a folder, with its tokenizer. Nothing is left behind on an error.

    Args:
        source: local folder, hub id or alias of a float model.
        folder: new, empty, or holding an older checkpoint.
        texts: to choose and refit by, see `compression_texts`.
        tasks: whose test texts score each step against the original; none of their texts is seen unless `texts` names them.
    """
    from qbert.compress import compress

    checkpoint.require_replaceable(folder)
    given = compression_texts(texts)
    model, tokenizer = load_float(source), load_tokenizer(resolve_model(source))
    baselines = [prepare_baseline(model, tokenizer, task) for task in tasks]
    scored = lambda small, its: [score(small, its, baseline).model_dump(mode="json") for baseline in baselines]
    small = compress(model, recipe, texts=given, tokenizer=tokenizer, after_step=scored, progress=progress)
    with checkpoint.replacing(folder) as fresh, quiet_transformers():
        _write_small(small, source, fresh)
    return CompressReport(
        source=source,
        folder=str(folder),
        texts=len(given),
        float32_bytes=_float32_bytes(model),
        file_bytes=_file_bytes(folder),
        report=small.report,
    )


def search_checkpoint(
    source: str,
    folder: str | Path,
    *,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    texts: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    **wanted: Any,
) -> SearchedReport:
    """Searches for the recipe of a goal and writes its model into a folder, with its tokenizer and the report of the search.

    Args:
        source: local folder, hub id or alias of a float model.
        folder: new, empty, or holding an older checkpoint.
        tasks: by name.
        data: labelled texts of one's own, one more task.
        texts: for the methods, see `compression_texts`; by default the tasks' own.
        command: what was typed, for the report.
        wanted: see `qbert.compress.search`.

    Raises:
        BudgetNotMet: nothing is written.
    """
    from qbert.compress import search

    checkpoint.require_replaceable(folder)
    given = None if texts is None else compression_texts(texts)
    labelled = [*tasks, *([] if data is None else [file_task(data)])]
    model, tokenizer = load_float(source), load_tokenizer(resolve_model(source))
    sources = texts or ",".join([*tasks, *([] if data is None else [str(data)])])
    commands = [] if command is None else [command, _again(source, folder, sources)]
    try:
        found = search(model, tasks=labelled, texts=given, tokenizer=tokenizer, progress=progress, **wanted)
    except BudgetNotMet as error:
        error.report.commands = commands[:1]
        raise
    found.report.commands = commands
    with checkpoint.replacing(folder) as fresh, quiet_transformers():
        _write_small(found, source, fresh)
        files = _write_search(found.report, fresh, source)
    return SearchedReport(
        source=source,
        folder=str(folder),
        float32_bytes=_float32_bytes(model),
        file_bytes=_file_bytes(folder),
        files=[str(Path(folder) / name) for name in files],
        report=found.report,
    )


def guide_model(
    source: str, *, tasks: Sequence[str] = (), data: str | Path | None = None, texts: str | None = None, **wanted: Any
) -> Guide:
    """Measures what each method of compression would bring to a model; see `search_checkpoint` and `qbert.compress.guide`."""
    from qbert.compress import guide

    given = None if texts is None else compression_texts(texts)
    labelled = [*tasks, *([] if data is None else [file_task(data)])]
    model, tokenizer = load_float(source), load_tokenizer(resolve_model(source))
    return guide(model, tasks=labelled, texts=given, tokenizer=tokenizer, **wanted)


def _again(source: str, folder: str | Path, texts: str) -> str:
    """The command that makes a found model by its recipe, without a search."""
    recipe = str(Path(folder) / f"{SEARCH_FILES}.toml")
    return shlex.join(["qbert", "compress", source, "--recipe", recipe, "--texts", texts, "-o", "OUT"])


def _write_search(report: SearchReport, folder: Path, source: str) -> list[str]:
    """The report as JSON, its recipe, and its picture where matplotlib is installed."""
    from qbert.compress.picture import plot

    assert report.recipe is not None
    names = [f"{SEARCH_FILES}.json", f"{SEARCH_FILES}.toml", f"{SEARCH_FILES}.png"]
    (folder / names[0]).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / names[1]).write_text(report.recipe.toml(), encoding="utf-8")
    try:
        plot(report, folder / names[2], f"{source}, {report.title}")
    except MissingDependency:
        return names[:2]
    return names


def compression_texts(names: str) -> list[str]:
    """Texts to compress by: of one source, see `calibration_texts`, or of several, by commas; mixed.

    Texts that are not of the kind a model is used on cost it far more here than in calibration: weights are refitted to them.
    """
    found = [calibration_texts(name, COMPRESSION_TEXTS) for name in names.split(",")]
    mixed = [text for texts in found for text in texts]
    random.Random(0).shuffle(mixed)  # every method takes every other text, or every fourth, for something else
    return mixed


def calibration_texts(name: str, count: int = CALIBRATION_TEXTS) -> list[str]:
    """Texts to calibrate with, a hundred-odd, or to compress by.

    Args:
        name: of a task, whose training texts are taken; a file, .txt with a text on each line, or .tsv or .jsonl as tasks
            have them; or ``"default"``, English prose that needs no package.

    Raises:
        QBertError: no such thing, or nothing in it.
    """
    if name == DEFAULT_TEXTS:
        return default_texts(count)
    path = Path(name)
    if name in TASKS:
        texts = list(get_task(name).load().train.sample(count).texts)
    elif path.suffix == ".txt":
        try:
            texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise QBertError(f"texts {name!r}: {error}") from None
    elif path.suffix:
        texts = list(read_user_file(path).sample(count).texts)
    else:
        raise QBertError(
            f"no texts {name!r}; allowed: {DEFAULT_TEXTS}, a .txt, .tsv or .jsonl file, {', '.join(TASKS)}"
        )
    if not texts:
        raise QBertError(f"{name!r} has no texts to calibrate with")
    return texts[:count]


def inspect_checkpoint(folder: str | Path) -> InspectReport:
    """What stands in a checkpoint and what would run here. The checkpoint is held to every rule first."""
    model = _load_checked(folder)
    explanation: Explanation = explain(model)
    quantized_bytes = sum(row.stored_bytes for row in explanation.quantized)
    float_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    float32_bytes, file_bytes = _float32_bytes(model), _file_bytes(folder)
    shapes = recorded_plan(model)
    return InspectReport(
        folder=str(folder),
        shapes=None if shapes is None else str(shapes),
        source=checkpoint.Record.parse(checkpoint.read_config(folder)["quantization_config"]).source,
        modules=explanation.to_dicts(),
        encoders=[asdict(row) for row in explanation.encoders],
        extensions=extensions(),
        notes=zeros_in(model),
        bits_per_weight=explanation.bits_per_weight,
        quantized_bytes=quantized_bytes,
        float_bytes=float_bytes,
        float32_bytes=float32_bytes,
        file_bytes=file_bytes,
        percent_of_float32=100 * file_bytes / float32_bytes,
    )


def verify_checkpoint(folder: str | Path, against: str | None = None) -> VerifyReport:
    """Holds a checkpoint to every rule, and measures each weight against the original's where one is given."""
    from qbert.integrations.transformers import check

    record, _ = check(folder)
    tensors = sum(len(list(_tensor_names(file))) for file in checkpoint.weight_files(folder))
    sqnr = [] if against is None else _compare_weights(_load_checked(folder), load_float(against), against)
    return VerifyReport(folder=str(folder), tensors=tensors, modules=len(record.modules), against=against, sqnr=sqnr)


def source_of(folder: str | Path) -> str | None:
    """The model that a checkpoint was made from, if it says so and it can be found here."""
    source = checkpoint.Record.parse(checkpoint.read_config(folder)["quantization_config"]).source
    if source is None:
        return None
    try:
        path = resolve_model(source)
    except QBertError:
        return None
    return source if Path(path).is_dir() else None


def _load_checked(folder: str | Path) -> nn.Module:
    from qbert.integrations.transformers import load

    with quiet_transformers():
        return load(folder).eval()


def _compare_weights(model: nn.Module, original: nn.Module, against: str) -> list[ModuleSqnr]:
    rows, kept = [], Kept.of(model, original)
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        source = kept.source(name)
        _require_as_factored(model, name, original, source, against)
        try:
            whole = original.get_submodule(source).get_parameter("weight").detach().to(torch.float32)
        except AttributeError:
            raise QBertError(f"{against!r} has no module {source!r}; it is not the model that was quantized") from None
        weight = kept.part(name, whole)
        if tuple(weight.shape) != module.shape:
            sizes = f"{name} is {list(module.shape)} here and {source} {list(whole.shape)} in {against!r}"
            if kept.plan is None:
                raise QBertError(sizes)
            raise QBertError(
                f"{sizes}: this model is compressed ({kept.plan}), and which neurons or words are left is not recorded; "
                f"allowed: the float model that was quantized"
            )
        restored = decode(module.quantized)
        ratio = sqnr_db(weight, restored)
        rows.append(
            ModuleSqnr(
                name=name,
                scheme=module.scheme.name,
                bits_per_weight=8 * module.stored_bytes() / max(1, module.shape[0] * module.shape[1]),
                sqnr_db=ratio if abs(ratio) != float("inf") else None,
                max_error=float((weight - restored).abs().max()),
            )
        )
    return rows


def _require_as_factored(model: nn.Module, name: str, original: nn.Module, source: str, against: str) -> None:
    """Raises QBertError for a part of a linear that is two products here and one there."""
    here, there = name.rpartition(".")[0], source.rpartition(".")[0]
    if isinstance(model.get_submodule(here), FactoredLinear) and type(original.get_submodule(there)) is nn.Linear:
        raise QBertError(
            f"{here} is two products of low rank here and one in {against!r}; allowed: the float model that was quantized"
        )


def _float32_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters as float32: quantized weights count as many weights as they stand for."""
    floats = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(m.shape[0] * m.shape[1] for m in model.modules() if isinstance(m, QuantizedModule))
    return _FLOAT32_BYTES * (floats + quantized)


def _file_bytes(folder: str | Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.weight_files(folder))


def _tensor_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _write_small(small: Any, source: str, folder: Path) -> None:
    """What compressing gave, with its own tokenizer."""
    small.model.save_pretrained(folder)  # of a plain float one transformers' own files say all of it
    copy_companions(resolve_model(source), folder)
    small.tokenizer.save_pretrained(folder)
    if any(isinstance(module, QuantizedModule) for module in small.model.modules()):
        say_quantized(folder)


def copy_companions(path: str, folder: Path) -> None:
    """The tokenizer, and what sentence-transformers needs, if the source has them."""
    source = Path(path)
    try:
        load_tokenizer(path).save_pretrained(folder)
    except QBertError:
        if source.is_dir() and any(source.glob("tokenizer*")):  # it has one, and it is broken: do not hide that
            raise
    for name in _SENTENCE_FILES if source.is_dir() else ():
        found = source / name
        if found.is_dir():
            _copy_json(found, folder / name)
        elif found.is_file():
            shutil.copyfile(found, folder / name)


def _copy_json(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.glob("*.json")):
        shutil.copyfile(file, target / file.name)
