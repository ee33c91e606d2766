"""How `golden_cases` reaches what it holds fast: the only file of `tools` that knows how operations are called today.

When operations are renamed or merged, or modules move, this file is rewritten and nothing else: a caller says a scheme, the
tokens, a `Weight` and what shall come out. Models need no adapter, they go through the public API.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qbert.checkpoint import Record, digest
from qbert.devices import GPUS
from qbert.families import KEEP_FLOAT
from qbert.formats import SCHEMES, Role, scheme_names
from qbert.ops import Activation, Keeps, call
from qbert.ops.kernel import problem_of
from qbert.ops.operations import (
    FLOAT_TABLE,
    AddNorm,
    Attention,
    Embedding,
    EmbedNorm,
    Linear,
    LinearAddNorm,
    Norm,
    Out,
    QuantizeRows,
    Table,
    operation_of,
)
from qbert.ops.table import select, select_layout
from qbert.quantizers import quantize
from qbert.target import Target, cpu_target
from qbert.weight import Layout, Weight
from qbert.weight.stack import stacked

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LINEAR_SCHEMES = tuple(scheme_names(Role.LINEAR))
EMBEDDING_SCHEMES = tuple(scheme_names(Role.EMBEDDING))
_H100 = Target(**GPUS["h100"].limits)


# ---- weights --------------------------------------------------------------------------------------------------------


def group_size(scheme: str) -> int:
    """What a width must be a multiple of."""
    return SCHEMES[scheme].group_size or 1


def has_int8_activations(scheme: str) -> bool:
    """Whether a linear of that scheme takes codes and scales instead of floats."""
    return SCHEMES[scheme].activation is not None


def quantized(scheme: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of the file format."""
    return quantize(weight, SCHEMES[scheme]).tensors


def linear_weight(scheme: str, parts: Sequence[Tensor], plain: bool = False) -> Weight:
    """Matrices of one width, quantized each for itself and stacked, in the layout that runs here, or as in a file."""
    stack = [quantize(part, SCHEMES[scheme]) for part in parts]
    weight = stack[0] if len(stack) == 1 else stacked(stack)
    target = _H100 if INTERPRETED else cpu_target()
    return weight.to_layout(Layout.PLAIN if plain else select_layout(SCHEMES[scheme], Role.LINEAR, target))


# ---- records --------------------------------------------------------------------------------------------------------


def calibration_data(calibration: Any) -> dict[str, Any]:
    """A calibration as version 1 of a record spelled it, without what says nothing."""
    layers = calibration.to_version_1()["layers"]
    return {"layers": {name: {k: v for k, v in layer.items() if v is not None} for name, layer in layers.items()}}


# The skip list of the first version, which records hold.
_FIRST_KEEP_FLOAT = (
    "classifier", "pre_classifier", "cls", "qa_outputs", "score", "lm_head", "vocab_transform", "vocab_projector",
    "generator_predictions", "generator_lm_head", "discriminator_predictions", "classification_head", "sequence_summary",
    "relative_attention_bias",
)  # fmt: skip


def record_data(record: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint's record as version 1 spelled it, with the digest that it has then.

    Names have come to the skip list since; a recipe that takes the list as it is has the one of then.
    """
    if record["keep_float"] == list(KEEP_FLOAT):
        record = {**record, "keep_float": list(_FIRST_KEEP_FLOAT)}
    parsed = Record.parse({**record, "format_version": 1})
    return parsed.model_copy(update={"digest": digest(tensors.items(), parsed)}).to_dict()


# ---- operations -----------------------------------------------------------------------------------------------------


def call_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and a scale a row."""
    return _run(QuantizeRows(x))


def call_linear(
    scheme: str, tokens: tuple[Tensor, ...], weight: Weight, bias: Tensor | None, activation: str, out: Out
) -> Tensor:
    """`tokens`: (q, s) where activations are int8, else (x,), whose type is `out`."""
    x, s = tokens if has_int8_activations(scheme) else (tokens[0], None)
    return _run(Linear(x, s, weight, bias, Activation.named(activation), False, out))


def call_embedding(scheme: str, ids: Tensor, table: dict[str, Tensor], k: int, out: torch.dtype) -> Tensor:
    """Rows of a table as it lies in a file."""
    return _run(Embedding(ids, Weight.of(list(table.values()), SCHEMES[scheme], Layout.PLAIN, k), out))


def call_attention(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, heads: int, softmax_scale: float, out: Out
) -> Tensor:
    """Of packed sequences."""
    return _run(Attention(qkv, scales, cu_seqlens, heads, softmax_scale, None, None, None, out))


def call_add_norm(y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The norm of the sum, its codes and their scales."""
    return _run(AddNorm(y, residual, Norm(gamma, beta, eps), Keeps.NORM))


def call_embed_norm(
    ids: tuple[Tensor, Tensor, Tensor], scheme: str, table: dict[str, Tensor], positions: Tensor, token_types: Tensor,
    gamma: Tensor, beta: Tensor, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`ids`: of words, positions, token types; `table`: one tensor of any name where `scheme` is `FLOAT_TABLE`."""
    tensors = list(table.values())
    words: Table = tensors[0]
    if scheme != FLOAT_TABLE:
        words = Weight.of(tensors, SCHEMES[scheme], Layout.PLAIN, positions.shape[1])
    return _run(EmbedNorm(*ids, words, positions, token_types, Norm(gamma, beta, eps)))


def call_linear_add_norm(
    tokens: tuple[Tensor, Tensor], weight: Weight, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of a w8a8 weight; in the interpreter there is no kernel for it."""
    return _run(LinearAddNorm(*tokens, weight, bias, residual, Norm(gamma, beta, eps), Keeps.NORM))


def _run(a: Any) -> Any:
    """What runs an operation on CPU tensors: the registered one, or Triton's kernel in its interpreter."""
    if not INTERPRETED:
        return call(a)
    a.check()
    row = select(operation_of(a).name, problem_of(a), replace(_H100, native=False))
    if not row.name.startswith("triton"):
        raise ValueError(f"no Triton kernel takes this {operation_of(a).name}: {row.name}")
    return row.call(a)
