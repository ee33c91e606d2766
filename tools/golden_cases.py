"""The problems of `golden`: every operation, every fused family, what is saved; drawn here, so that no other change moves them.

A case is a name and a function of no arguments; what it returns is digested, a dictionary entry by entry. All values are made
of random integers by exact arithmetic (no `torch.randn`, whose bits depend on the CPU's vectors); a tensor's seed is its name.
"""

from __future__ import annotations

import functools
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden_calls as calls
import torch
from golden_calls import EMBEDDING_SCHEMES, LINEAR_SCHEMES
from torch import Tensor

from qbert.ops.operations import FLOAT_TABLE, Out

Case = tuple[str, Callable[[], Any]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DEVIATION = 0.04  # of encoder weights; GOBO's outlier threshold depends on it
EPS = 1e-3  # large enough to be seen; the families' own would be lost in float32


# ---- values ---------------------------------------------------------------------------------------------------------


def integers(name: str, low: int, high: int, *shape: int) -> Tensor:
    """low ... high - 1, int64."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def bell(name: str, *shape: int, deviation: float = 1.0) -> Tensor:
    """Float32, nearly normal: the sum of four equal distributions."""
    total = integers(name, -(1 << 14), 1 << 14, 4, *shape).sum(dim=0)
    return total.to(torch.float32) * (deviation / (1 << 15) * 3**0.5)


def matrix(name: str, n: int, k: int, deviation: float = DEVIATION) -> Tensor:
    """(n, k) like an encoder's weight: about one in 64 far outside, or not so far, more in even rows than in odd ones."""
    weight, dice = bell(name, n, k, deviation=deviation), integers(f"{name}/dice", 0, 512, n, k)
    often = 12 - 8 * (torch.arange(n) % 2)
    magnitude = integers(f"{name}/far", 128, 1024, n, k).to(torch.float32) * (deviation / 64)
    return torch.where(dice < often[:, None], torch.where(dice % 2 == 0, magnitude, -magnitude), weight)


def activations(name: str, t: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(t, k) whose magnitudes differ between tokens; of more than four, one is zero, one has a NaN, one an infinity."""
    magnitudes = torch.tensor([2.0**exponent for exponent in range(-6, 5)])  # torch.pow need not be exact
    x = bell(name, t, k) * magnitudes[integers(f"{name}/magnitude", 0, 11, t, 1)]
    if t > 4:
        x[1], x[2, k // 2], x[3, k - 1] = 0.0, torch.nan, -torch.inf
    return x.to(dtype)


def codes(name: str, t: int, k: int) -> tuple[Tensor, Tensor]:
    """int8 tokens and their scales; of more than four, one scale is NaN."""
    q, s = integers(name, -127, 128, t, k).to(torch.int8), integers(f"{name}/s", 1, 64, t).to(torch.float32) / 2048
    if t > 4:
        s[2] = torch.nan
    return q, s


def token_ids(name: str, rows: int, *shape: int) -> Tensor:
    """Ids of a table."""
    return integers(name, 0, rows, *shape)


# ---- operations -----------------------------------------------------------------------------------------------------

SIZES = ((1, 1, 1), (3, 17, 131), (18, 70, 192), (130, 48, 320))
FEW_SIZES = ((1, 1, 1), (6, 17, 131))  # the interpreter takes its time
Ends = tuple[tuple[bool, str, Out], ...]
A8_ENDS: Ends = (
    (False, "none", torch.float32), (True, "none", torch.bfloat16), (True, "gelu", torch.float32),
    (False, "gelu", torch.float16), (True, "none", 0.02), (True, "gelu", 0.01),
)  # fmt: skip
A16_ENDS: Ends = tuple(each for each in A8_ENDS if not isinstance(each[2], float))


def linear_cases(
    schemes: tuple[str, ...], sizes: tuple[tuple[int, int, int], ...], few: bool = False
) -> Iterator[Case]:
    """Each end of a linear at all sizes; where a file's layout is no kernel's, it is one more way to compute the same."""
    for scheme in schemes:
        ends = A8_ENDS if calls.has_int8_activations(scheme) else A16_ENDS
        for bias, activation, out in ends[::2] if few else ends:
            label = f"linear/{scheme}/{'bias' if bias else 'bare'}-{activation}-{_label(out)}"
            yield label, functools.partial(_linears, scheme, sizes, bias, activation, out)
        if calls.has_int8_activations(scheme):
            yield f"linear/{scheme}/stacked", functools.partial(_linears, scheme, sizes[1:2], True, "none", 0.02, 3)


def plain_cases() -> Iterator[Case]:
    """Weights as they lie in a file, which torch's implementations read as well."""
    for scheme in LINEAR_SCHEMES:
        yield (
            f"linear/{scheme}/plain",
            functools.partial(_linears, scheme, SIZES[:2], True, "none", torch.float32, plain=True),
        )


def _linears(
    scheme: str, sizes: tuple[tuple[int, int, int], ...], bias: bool, activation: str, out: Out, matrices: int = 1,
    plain: bool = False,
) -> list[Tensor]:  # fmt: skip
    found = []
    for t, n, k in sizes:
        k += -k % calls.group_size(scheme)
        parts = [matrix(f"linear{index}", n, k, DEVIATION * (index + 1)) for index in range(matrices)]
        shift = bell("bias", n * matrices) if bias else None
        a8 = calls.has_int8_activations(scheme)
        assert a8 or isinstance(out, torch.dtype)
        tokens = codes("tokens", t, k) if a8 else (activations("tokens", t, k, out),)  # type: ignore[arg-type]
        weight = calls.linear_weight(scheme, parts, plain)
        found.append(calls.call_linear(scheme, tokens, weight, shift, activation, out))
    return found


def row_cases() -> Iterator[Case]:
    """Everything that is done row by row."""
    for dtype in FLOATS:
        yield f"quantize/{_label(dtype)}", functools.partial(_quantize, dtype)
        yield f"add_norm/{_label(dtype)}", functools.partial(_add_norms, dtype, dtype)
    yield "add_norm/float32+bfloat16", functools.partial(_add_norms, torch.float32, torch.bfloat16)
    for scheme in EMBEDDING_SCHEMES:
        for dtype in FLOATS:
            yield f"embedding/{scheme}/{_label(dtype)}", functools.partial(_embedding, scheme, dtype)
    for scheme in (FLOAT_TABLE, *EMBEDDING_SCHEMES):
        yield f"embed_norm/{scheme}", functools.partial(_embed_norm, scheme, torch.float32)
    yield "embed_norm/w8/bfloat16", functools.partial(_embed_norm, "w8", torch.bfloat16)


def _quantize(dtype: torch.dtype) -> list[Any]:
    return [calls.call_quantize(activations("rows", t, k, dtype)) for t, k in ((1, 1), (5, 33), (17, 768), (6, 100))]


def _add_norms(y: torch.dtype, residual: torch.dtype) -> list[Any]:
    found = []
    for t, k in ((1, 1), (6, 70), (9, 768)):
        rows = activations("y", t, k, y), bell("residual", t, k).to(residual)
        found.append(calls.call_add_norm(*rows, 1 + bell("gamma", k), bell("beta", k), EPS))
    return found


def _embedding(scheme: str, dtype: torch.dtype) -> list[Tensor]:
    found = []
    for k in (64, 300):
        k += -k % calls.group_size(scheme)
        table = calls.quantized(scheme, matrix("table", 23, k))
        found += [
            calls.call_embedding(scheme, token_ids("ids", 23, *shape), table, k, dtype) for shape in ((1,), (3, 5))
        ]
    return found


def _embed_norm(scheme: str, dtype: torch.dtype) -> list[Any]:
    t, k = 11, 384
    table = (
        {"table": bell("table", 23, k)} if scheme == FLOAT_TABLE else calls.quantized(scheme, matrix("table", 23, k))
    )
    ids = token_ids("ids", 23, t), token_ids("positions", 7, t), token_ids("types", 2, t)
    tables = bell("position", 7, k, deviation=0.05).to(dtype), bell("type", 2, k, deviation=0.05).to(dtype)
    return [calls.call_embed_norm(ids, scheme, table, *tables, 1 + bell("gamma", k), bell("beta", k), EPS)]


def attention_cases(lengths: tuple[int, ...], heads: int) -> Iterator[Case]:
    """Sequences of several lengths, one of them empty, with scales of each token's own and with static ones."""
    for head_dim in (32, 64, 40):
        for per_token in (False, True):
            for out in (torch.float32, torch.bfloat16, 0.01):
                label = f"attention/{head_dim}/{'per_token' if per_token else 'static'}/{_label(out)}"
                yield label, functools.partial(_attention, lengths, heads, head_dim, per_token, out)


def _attention(lengths: tuple[int, ...], heads: int, head_dim: int, per_token: bool, out: Out) -> Tensor:
    t = sum(lengths)
    qkv = integers(f"qkv{head_dim}", -127, 128, t, 3 * heads * head_dim).to(torch.int8)
    scales = torch.tensor([0.02, 0.03, 0.01])
    if per_token:
        scales = scales * (integers("scales", 8, 33, t, 3).to(torch.float32) / 16)
        scales[2, 1] = torch.nan  # of one key: its sequence is NaN, the others are not
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return calls.call_attention(qkv, scales, cu_seqlens, heads, head_dim**-0.5, out)


def _linear_add_norms(dtype: torch.dtype) -> list[Any]:
    found = []
    for t, n, k in ((1, 1, 1), (7, 70, 131), (33, 64, 256)):
        weight, residual = calls.linear_weight("w8a8", [matrix("linear", n, k)]), bell("residual", t, n).to(dtype)
        norm = 1 + bell("gamma", n), bell("beta", n), EPS
        found.append(calls.call_linear_add_norm(codes("tokens", t, k), weight, bell("bias", n), residual, *norm))
    return found


def operations() -> Iterator[Case]:
    """On this machine's CPU."""
    yield from linear_cases(LINEAR_SCHEMES, SIZES)
    yield from row_cases()
    yield from attention_cases((5, 0, 33, 1, 70), 2)
    for dtype in FLOATS:
        yield f"linear_add_norm/{_label(dtype)}", functools.partial(_linear_add_norms, dtype)


_MAIN_SCHEMES = ("w8a8", "w4a8", "gobo3a8", "gobo4a8", "w8a16", "w4a16", "gobo3", "gobo4")


def interpreted_few() -> Iterator[Case]:
    """Triton's kernels: each of them, but not in each of their ways."""
    yield from linear_cases(_MAIN_SCHEMES, FEW_SIZES, few=True)
    yield from row_cases()
    for name, case in attention_cases((5, 0, 33), 1):
        if name.startswith("attention/32"):
            yield name, case


def interpreted_more() -> Iterator[Case]:
    """All ends, more sizes, the weights that are expanded first."""
    yield from linear_cases((*_MAIN_SCHEMES, "w4a8-g32"), ((18, 70, 192), (66, 33, 320)))
    yield from attention_cases((5, 0, 33, 1, 70), 2)
    for scheme in ("w8a16", "w4a16", "gobo3", "gobo4"):
        yield (
            f"linear/{scheme}/plain",
            functools.partial(_linears, scheme, FEW_SIZES, True, "gelu", torch.float16, plain=True),
        )


# ---- models ---------------------------------------------------------------------------------------------------------

CONFIG = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 72, "layer_norm_eps": EPS,
}  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # two heads of 64
DISTILBERT = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}  # fmt: skip
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra")
VARIANTS = ("dynamic", "static", "overflow")
# Not what `calibrate` would find, which torch's float products have a part in, but near it.
SCALES = {"query": 0.03, "key": 0.03, "value": 0.02, "attention_output": 0.015, "gelu": 0.02}
OVERFLOW = {"neurons": [3, 17, 64], "scale": 0.01}
Batch = dict[str, Tensor]


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A float model of transformers, every parameter drawn by its own name."""
    import transformers

    family = next(each for each in FAMILIES if name.startswith(each))
    config = {**CONFIG, **({"embedding_size": 32} if family == "Electra" else {}), **changes}
    if family == "DistilBert":
        config = {DISTILBERT.get(key, key): value for key, value in config.items()}
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**config)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(_parameter(path, parameter))
    return model.to(dtype)


def _parameter(path: str, like: Tensor) -> Tensor:
    if like.dim() == 2:
        return matrix(path, like.shape[0], like.shape[1], 3 * DEVIATION)  # large enough that attention is not uniform
    drawn = bell(path, *like.shape, deviation=0.1)
    return 1 + drawn if path.endswith("weight") else drawn


def calibration_of(family: str, variant: str) -> Any:
    """Fixed static scales; None for `dynamic`."""
    import qbert

    if variant == "dynamic":
        return None
    layer: dict[str, Any] = {**SCALES, **({"overflow": OVERFLOW} if variant == "overflow" else {})}
    prefix = "transformer" if family == "DistilBert" else "encoder"
    return qbert.Calibration.from_dict({"layers": {f"{prefix}.layer.{index}": layer for index in range(2)}})


def fused(
    family: str, variant: str, recipe: Any = "w8a8+none", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A fused encoder without a head."""
    import qbert

    model = model_of(f"{family}Model", dtype, **changes)
    return qbert.quantize_(model, recipe, fuse=True, calibration=calibration_of(family, variant))


def batch(kind: str = "right", rows: int = 4, width: int = 11) -> Batch:
    """Ids and a mask, with padding wherever `kind` says."""
    ids = integers("batch", 5, 97, rows, width)
    column, row = torch.arange(width), torch.arange(rows)[:, None]
    padding = 3 * row % (width - 1)
    there = {
        "none": torch.ones(rows, width, dtype=torch.bool),
        "right": column < width - padding,
        "left": column >= padding,
        "holes": (column < row) | ((column - row) % 3 > 0),
    }[kind]
    return {"input_ids": ids.masked_fill(~there, 1), "attention_mask": there.to(torch.int64)}


@torch.no_grad()
def last_hidden(model: Any, *batches: Batch) -> list[Tensor]:
    """Of each batch, zeros where padding is: what a pooler finds in column 0 there is torch's, not qbert's."""
    states = ((model(**each)[0], each.get("attention_mask")) for each in batches)
    return [state if mask is None else state.masked_fill((mask == 0)[..., None], 0.0) for state, mask in states]


PADDED = tuple(batch(kind) for kind in ("right", "left", "holes"))
ONE_TOKEN = {"input_ids": torch.tensor([[7]])}
LARGE = batch("right", 40, 60)  # more than the 1,024 tokens that pass all layers together


def encoders() -> Iterator[Case]:
    """Fused: everything between the ids and the last hidden state is qbert's."""
    from qbert import Recipe

    def case(name: str, batches: tuple[Batch, ...], *arguments: Any, **changes: Any) -> Case:
        return name, lambda: last_hidden(fused(*arguments, **changes), *batches)

    for family in FAMILIES:
        for variant in VARIANTS:
            yield case(f"{family}/{variant}", (*PADDED, ONE_TOKEN), family, variant)
    tables = {"w8a8": None, "w4a8": "w8", "w4a8-g32": "w4-g32", "gobo3a8": "gobo3", "gobo4a8": "gobo4"}
    for variant in VARIANTS:
        for linear, embedding in tables.items():
            recipe = Recipe(linear, embedding)
            yield case(f"wide/{linear}+{embedding}/{variant}", PADDED[:1], "Bert", variant, recipe, **WIDE)
        mixed = {"layer.0.output": "gobo4a8", "layer.1.attention.self": "gobo3a8", "intermediate": "w4a8"}
        yield case(f"mixed/{variant}", PADDED[:1], "Bert", variant, Recipe("w8a8", "w4", overrides=mixed))
        yield case(f"bfloat16/{variant}", PADDED[:1], "Bert", variant, Recipe("w8a8", "w8"), torch.bfloat16)
        yield case(f"large/{variant}", (LARGE,), "Bert", variant, Recipe("w8a8", "w8"))
    for family in FAMILIES[1:]:
        yield case(f"{family}/gobo4a8+w8", PADDED[:1], family, "dynamic", Recipe("gobo4a8", "w8"))
        yield case(f"{family}/w4a8-g32+gobo3", PADDED[:1], family, "overflow", Recipe("w4a8-g32", "gobo3"))
    yield case("large/gobo3a8", (LARGE,), "Roberta", "overflow", Recipe("gobo3a8", "gobo4"), **WIDE)
    for family in ("Bert", "DistilBert", "Electra"):
        yield f"{family}/embeds", functools.partial(_of_embeddings, family)
    yield "hidden_states", _hidden_states
    yield "positions_and_types", _positions_and_types


def _of_embeddings(family: str) -> list[Tensor]:
    width = 32 if family == "Electra" else 64
    embeds = {
        "inputs_embeds": bell("embeds", 4, 11, width, deviation=0.1),
        "attention_mask": PADDED[0]["attention_mask"],
    }
    return [hidden for variant in VARIANTS for hidden in last_hidden(fused(family, variant), embeds)]


@torch.no_grad()
def _hidden_states() -> list[Any]:
    return [fused("Bert", variant)(**PADDED[0], output_hidden_states=True).hidden_states for variant in VARIANTS]


def _positions_and_types() -> list[Tensor]:
    ids = {"input_ids": PADDED[0]["input_ids"]}
    places = {"position_ids": torch.arange(20, 31)[None], "token_type_ids": token_ids("types", 2, 4, 11)}
    return last_hidden(fused("Bert", "dynamic"), {**ids, **places}, {**PADDED[2], **places})


def models() -> Iterator[Case]:
    """What torch's own float products have a part in: models that are not fused, poolers, heads, calibration."""
    import qbert
    from qbert import Recipe

    def outputs(model: Any) -> Any:
        with torch.no_grad():
            return [model(**each).to_tuple() for each in PADDED[:2]]

    def case(name: str, model: str, recipe: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
        return name, lambda: outputs(qbert.quantize_(model_of(model, dtype, **WIDE), recipe, **options))

    for linear in LINEAR_SCHEMES:
        yield case(linear, "BertModel", linear)
    for linear, embedding in (("w8a16", "w8"), ("w4a16", "w4"), ("gobo3", "gobo3"), ("gobo4", "gobo4")):
        yield case(f"{linear}+{embedding}", "BertModel", Recipe(linear, embedding))
        yield case(f"{linear}+{embedding}/bfloat16", "BertModel", Recipe(linear, embedding), torch.bfloat16)
    for family in FAMILIES:
        yield case(f"{family}/w8a8+w8", f"{family}Model", Recipe("w8a8", "w8"))
        yield case(f"{family}/fused", f"{family}Model", "w8a8+none", fuse=True)
    for family in ("Bert", "Roberta"):
        for embedding in ("w8", "w4", "gobo3"):
            tied = Recipe("w8a8", embedding, keep_float=())
            yield case(f"{family}/tied_{embedding}", f"{family}ForMaskedLM", tied, fuse=True)
    yield case("classifier/fused", "BertForSequenceClassification", "gobo4a8", fuse=True)
    for family in ("Bert", "DistilBert"):
        for start in ("float", "w8a8"):
            yield f"calibrate/{family}/{start}", functools.partial(_calibrated, family, start)


def _calibrated(family: str, start: str) -> Any:
    import qbert

    model = model_of(f"{family}Model")
    if start != "float":
        qbert.quantize_(model, f"{start}+none", fuse=True)
    return calls.calibration_data(qbert.calibrate(model, [batch(kind, 8, 17) for kind in ("right", "holes")]))


# ---- what is saved --------------------------------------------------------------------------------------------------


def files() -> Iterator[Case]:
    """Quantizers, and every tensor and record of a saved model."""
    for scheme in dict.fromkeys((*LINEAR_SCHEMES, *EMBEDDING_SCHEMES)):
        yield f"quantizer/{scheme}", functools.partial(_quantized, scheme)
    for linear, embedding in (
        *((each, None) for each in LINEAR_SCHEMES),
        *(("w8a8", each) for each in EMBEDDING_SCHEMES),
    ):
        name = f"saved/{linear}" + (f"+{embedding}" if embedding else "")
        yield name, functools.partial(_saved, "Bert", linear, embedding)
    for family in FAMILIES:
        for variant in VARIANTS:
            yield f"saved/{family}/{variant}", functools.partial(_saved, family, "w8a8", "w8", variant)
    yield "saved/bfloat16", functools.partial(_saved, "Bert", "gobo3a8", "gobo4", "static", torch.bfloat16)


def _quantized(scheme: str) -> dict[str, list[Tensor]]:
    shapes, group = ((1, 1), (5, 33), (70, 384)), calls.group_size(scheme)
    weights = [matrix("weight", n, k + -k % group) for n, k in shapes]
    weights += [torch.full((3, group), 0.5), torch.zeros(3, group), matrix("weight", 17, 128, 1e-4)]
    weights.append(matrix("weight", 17, 128).to(torch.bfloat16))
    found = [calls.quantized(scheme, weight) for weight in weights]
    return {name: [each[name] for each in found] for name in found[0]}


def _saved(
    family: str, linear: str, embedding: str | None, variant: str = "", dtype: torch.dtype = torch.float32
) -> Any:
    """{"tensors by their names' ends", "record", and of what is loaded the last hidden state where it is fused}."""
    from safetensors.torch import load_file

    import qbert

    changes = {} if variant else WIDE
    model, recipe = model_of(f"{family}Model", dtype, **changes), qbert.Recipe(linear, embedding)
    qbert.quantize_(model, recipe, fuse=bool(variant), calibration=calibration_of(family, variant) if variant else None)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        qbert.save(model, folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        for path, tensor in sorted(tensors.items()):
            found.setdefault(path.rpartition(".")[2], {})[path] = tensor
        record = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        found["record"] = calls.record_data(record, tensors)
        if variant:
            found["loaded"] = last_hidden(qbert.load(folder), PADDED[0])
    return found


ROOMS: dict[str, Callable[[], Iterator[Case]]] = {
    "operations": operations,
    "encoders": encoders,
    "models": models,
    "files": files,
    "plain": plain_cases,
    "interpreted_few": interpreted_few,
    "interpreted_more": interpreted_more,
}


def _label(out: Out) -> str:
    return "int8" if isinstance(out, float) else str(out).removeprefix("torch.")
