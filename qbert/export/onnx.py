"""A quantized checkpoint to a folder that ONNX Runtime reads: the graph, the tokenizer and what says how to pool."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from qbert.encoder import encoders, fused_forward
from qbert.errors import MissingDependency, QBertError
from qbert.evaluate.encode import pad, tokenize
from qbert.evaluate.loading import load_tokenizer, quiet_transformers
from qbert.export import qdq
from qbert.folders import new_folder
from qbert.integrations.pipelines import say_float
from qbert.modules import QuantizedModule
from qbert.workflow import calibration_texts, copy_companions, load_any
from qbert.zoo import resolve_model

FORMATS = ("onnx-qdq",)
MODEL_FILE = "model.onnx"
OPSET = 18  # the lowest that torch writes
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_PACKAGES = ("onnx", "onnxscript", "onnx_ir")
_CHECKED_TEXTS = 32
log = logging.getLogger(__name__)


class ExportReport(BaseModel):
    """Outcome of `export_onnx`.

    Attributes:
        inputs, output: names of the graph's.
        variant: what the graph computes as: a fused encoder with static scales, one with scales a token, or unfused.
        file_bytes: of the graph with its weights.
        texts: on which ONNX Runtime's sentence vectors (means of tokens) were compared with qbert's; 0 where it is missing.
        cosine_mean, cosine_min: of those.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    folder: str
    inputs: list[str]
    output: str
    variant: str
    file_bytes: int
    texts: int
    cosine_mean: float | None
    cosine_min: float | None


def export_onnx(source: str, folder: str | Path, *, check_with: str = "default") -> ExportReport:
    """Writes the graph of a quantized model into a new or empty folder, and compares it with the model.

    Args:
        source: checkpoint of qbert's whose linears are w8a8 or w4a8, of a family in `qdq.FAMILIES`.
        check_with: texts, see `workflow.calibration_texts`.

    Raises:
        QBertError: another kind of model, or a folder that is not empty.
        MissingDependency: without onnx and onnxscript.
    """
    _require_packages()
    target, path = Path(folder), resolve_model(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise QBertError(f"{str(folder)!r} is not empty; allowed: a new folder, or an empty one")
    texts = calibration_texts(check_with, _CHECKED_TEXTS)
    model, tokenizer = load_any(source), load_tokenizer(path)
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise QBertError(
            f"{source!r} is a float model; quantize it first (qbert quantize {source} --scheme w8a8 -o OUT)"
        )
    twin, variant = stand_in(model)
    batch = _batch(model, tokenizer, texts)
    names = list(batch)
    with new_folder(target, replace=True) as fresh, quiet_transformers():
        _write(twin, batch, fresh / MODEL_FILE)
        copy_companions(path, fresh)
        say_float(fresh)
        shutil.copyfile(Path(path) / "config.json", fresh / "config.json")
        found = _compared(model, fresh / MODEL_FILE, batch)
    size = (target / MODEL_FILE).stat().st_size
    return ExportReport(
        source=source, folder=str(folder), inputs=names, output=_output(model), variant=variant, file_bytes=size,
        texts=0 if found is None else len(found), cosine_mean=None if found is None else float(found.mean()),
        cosine_min=None if found is None else float(found.min()),
    )  # fmt: skip


def stand_in(model: nn.Module) -> tuple[nn.Module, str]:
    """A copy of a quantized model that computes the same by operators that ONNX has, and what it computes as.

    Raises:
        QBertError: a model with no encoder or several, or one that `qdq.install` refuses.
    """
    twin = copy.deepcopy(model)
    found = list(encoders(twin))
    if len(found) != 1:
        raise QBertError(
            f"onnx-qdq: {type(model).__name__} has {len(found)} encoders; allowed: one of {', '.join(qdq.FAMILIES)}"
        )
    (_, encoder, family), fused = found[0], fused_forward(found[0][1])
    eager: Any = twin
    eager.set_attn_implementation("eager")
    qdq.install(twin, encoder, family)
    return twin.eval(), "unfused" if fused is None else fused.variant


class _ByPosition(nn.Module):
    """The first output of a model whose inputs are given by position."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: Tensor) -> Tensor:
        first: Tensor = self.model(**dict(zip(self.names, given, strict=True)), return_dict=True)[0]
        return first


def _write(model: nn.Module, batch: dict[str, Tensor], file: Path) -> None:
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with _quiet_exporter():
        program = torch.onnx.export(
            _ByPosition(model, list(batch)).eval(), tuple(batch.values()), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=list(batch), output_names=[_output(model)], dynamic_shapes=(tuple(axes for _ in batch),),
        )  # fmt: skip
    assert program is not None
    program.save(str(file))


def _output(model: nn.Module) -> str:
    base: Any = getattr(model, "base_model", model)
    return "last_hidden_state" if base is model else "logits"


def _batch(model: nn.Module, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Texts as the model takes them, all in one batch."""
    rows, _ = tokenize(tokenizer, texts, 128)
    padded = pad(tokenizer, rows)
    base: Any = getattr(model, "base_model", model)
    takes = inspect.signature(base.forward).parameters
    return {name: padded[name] for name in _INPUTS if name in padded and name in takes}


def _compared(model: nn.Module, file: Path, batch: dict[str, Tensor]) -> Tensor | None:
    """(texts,) cosines of what ONNX Runtime and qbert give; None without ONNX Runtime."""
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    with torch.inference_mode():
        ours = model(**batch, return_dict=True)[0]
    mask = batch["attention_mask"]
    return torch.cosine_similarity(_sentences(torch.from_numpy(theirs), mask), _sentences(ours, mask), dim=-1)


def _sentences(output: Tensor, mask: Tensor) -> Tensor:
    """(texts, k): means of tokens, or logits as they are."""
    if output.dim() == 2:
        return output.double()
    kept = mask[..., None].double()
    return (output.double() * kept).sum(1) / kept.sum(1)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch's exporter warns of what is neither wrong nor ours: torchvision is not here, names of axes are shared."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _require_packages() -> None:
    if not hasattr(torch.onnx, "ops"):
        raise MissingDependency(f"an export needs torch 2.8 or newer; this is {torch.__version__}")
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(f"an export needs {package}, which is not installed: pip install 'qbert[onnx]'")
