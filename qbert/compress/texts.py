"""What a model makes of texts while it is being compressed, and how far that is from what the original made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.calibrate import tokenizer_beside
from qbert.encoder import encoders
from qbert.errors import QBertError
from qbert.evaluate.encode import (
    POOLINGS,
    batches_by_length,
    checked_max_length,
    is_classifier,
    pad,
    pool,
    tokenize,
    unwrap,
)
from qbert.modes import evaluation_mode
from qbert.modules import FactoredLinear, QTiedLinear, QuantizedModule, products
from qbert.shapes import Shaped, shaped

BATCH_TOKENS = 2048
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """Texts as rows of token ids, masks and types."""

    tokenizer: Any
    rows: list[dict[str, list[int]]]

    @classmethod
    def of(cls, model: nn.Module, texts: Sequence[str], tokenizer: Any, max_length: int | None = None) -> Texts:
        """Tokenizes them; what is longer than the model (or `max_length`) takes is cut.

        Raises:
            QBertError: no texts, something else than texts, or no tokenizer.
        """
        if isinstance(texts, str) or not all(isinstance(each, str) for each in texts):
            raise QBertError(f"texts is a {type(texts).__name__} of other things than str; allowed: a list of str")
        base = shaped(model).base
        tokenizer = tokenizer_beside(base) if tokenizer is None else tokenizer
        rows, _ = tokenize(tokenizer, list(texts), checked_max_length(base, tokenizer, max_length))
        return cls(tokenizer, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def halves(self) -> tuple[Texts, Texts]:
        """Every other text, and the others: one half to choose by, one to judge by."""
        return Texts(self.tokenizer, self.rows[::2]), Texts(self.tokenizer, self.rows[1::2])

    def first(self, count: int) -> Texts:
        """At most so many."""
        return Texts(self.tokenizer, self.rows[:count])

    def within(self, tokens: int) -> Texts:
        """The first texts, until they have so many tokens."""
        total, rows = 0, []
        for row in self.rows:
            if total >= tokens:
                break
            total += len(row["input_ids"])
            rows.append(row)
        return Texts(self.tokenizer, rows)

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(len(row["input_ids"]) for row in self.rows)

    def batches(self, device: torch.device, batch_tokens: int = BATCH_TOKENS) -> Iterator[tuple[list[int], Batch]]:
        """(places of the texts, padded batch), texts of like length together."""
        for places in batches_by_length([len(row["input_ids"]) for row in self.rows], batch_tokens):
            batch = pad(self.tokenizer, [self.rows[place] for place in places])
            yield places, {name: tensor.to(device) for name, tensor in batch.items()}


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def require_pooling(pooling: str) -> None:
    """Raises QBertError for one that there is not."""
    if pooling not in POOLINGS:
        raise QBertError(f"pooling {pooling!r}: allowed are {', '.join(POOLINGS)}")


def require(texts: Texts, least: int, what: str) -> None:
    """Raises QBertError where there are fewer texts than `what` needs."""
    if len(texts) < least:
        raise QBertError(f"{len(texts)} texts; {what} needs {least} or more")


def tokenizer_inside(model: nn.Module) -> Any:
    """The tokenizer that a pipeline of sentence-transformers cuts its texts with; None of a model that takes ids."""
    for module in model.modules():
        for name in _TOKENIZER_HELD_AS:
            held = module.__dict__.get(name)
            if held is not None:
                return getattr(held, "tokenizer", held)  # a processor has one
    return None


_TOKENIZER_HELD_AS = ("processor", "tokenizer")  # attributes of its Transformer module, the latter in older versions


def float_encoder(model: nn.Module, what: str, *, factored: bool = False) -> Shaped:
    """The encoder of a float model, before something is taken out of it.

    Args:
        factored: linears that are two thin ones will do.

    Raises:
        QBertError: see `shapes.shaped`; or a quantized or fused model: quantizing comes last.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule | QTiedLinear):
            raise QBertError(
                f"{name or type(model).__name__} is quantized already; {what} comes before quantizing: "
                f"call qbert.dequantize_ first, or start from the float model"
            )
    if any(each.is_inference() for each in model.parameters()):
        raise QBertError(
            f"{type(model).__name__} was made in torch.inference_mode, so nothing may be written to it; load it outside"
        )
    encoder = shaped(model)
    paths = encoder.family.layer
    for layer in encoder.layers:
        for path in (*paths.qkv, paths.attention_output, paths.ffn_in, paths.ffn_out):
            for each in products(layer.get_submodule(path)) if factored else (layer.get_submodule(path),):
                _require_plain(path, each, what)
    shared = [id(each) for layer in encoder.layers for each in layer.parameters()]
    if len(shared) != len(set(shared)):
        raise QBertError(
            f"{type(model).__name__} has layers that share their weights; {what} needs layers of their own"
        )
    return encoder


def _require_plain(path: str, module: nn.Module, what: str) -> None:
    if isinstance(module, FactoredLinear):
        raise QBertError(f"{path} is two products of low rank already; {what} comes before qbert.factorize_")
    if type(module) is not nn.Linear or "weight" not in module._parameters:
        kind = type(module).__qualname__
        raise QBertError(
            f"{path} is a {kind} whose weight is not its own; merge adapters and remove pruning masks first"
        )


# ---- outputs --------------------------------------------------------------------------------------------------------


def one_class_of_several(model: nn.Module) -> bool:
    """Whether the model is a sequence classifier whose logits are those of classes that exclude one another.

    One logit is a score (rerankers, regression), and several of a regression or of many labels say nothing of one another: a
    softmax over them is not what such a model says.
    """
    config: Any = unwrap(model).config if is_classifier(model) else None
    return config is not None and config.num_labels > 1 and config.problem_type not in _NOT_EXCLUSIVE


_NOT_EXCLUSIVE = ("regression", "multi_label_classification")  # values of `problem_type` in a configuration


def output_of(model: Any, batch: Mapping[str, Tensor], pooling: str = "mean") -> Tensor:
    """(rows, d), with gradients: unit embeddings of an encoder; of a sequence classifier log-probabilities where its classes
    exclude one another, else its logits."""
    if is_classifier(model):
        logits = model(**batch, return_dict=True).logits.float()
        return torch.log_softmax(logits, dim=1) if one_class_of_several(model) else logits
    bases = [base for _, base, _ in encoders(model)]
    hidden = bases[0](**{name: each for name, each in batch.items() if name in _taken(bases[0])})[0]
    return nn.functional.normalize(pool(hidden, batch["attention_mask"], pooling), dim=1)


def _taken(base: nn.Module) -> set[str]:
    return {name for _, _, family in encoders(base) for name in family.arguments}


@torch.no_grad()
def outputs_of(model: nn.Module, texts: Texts, pooling: str = "mean") -> Tensor:
    """(texts, d), in their order; see `output_of`."""
    device = next(model.parameters()).device
    found: list[Tensor | None] = [None] * len(texts)
    with evaluation_mode(model):
        for places, batch in texts.batches(device):
            for place, row in zip(places, output_of(model, batch, pooling).cpu(), strict=True):
                found[place] = row
    return torch.stack([each for each in found if each is not None])


def agreement(model: nn.Module, before: Tensor, after: Tensor, among: Tensor | None = None) -> Tensor:
    """(texts,) 1 where nothing changed: cosine of embeddings; of a classifier 1 - KL(before || after), in nats. Where classes
    do not exclude one another 1 - the squared change of the logits over their variance, by default among these texts.

    Args:
        before, after: see `output_of`.
        among: such outputs of other texts, where these are too few to vary.
    """
    if one_class_of_several(model):
        return 1 - (before.exp() * (before - after)).sum(1)
    if is_classifier(model):
        spread = (before if among is None else among).double().var(0, correction=0).sum().clamp(min=1e-12)
        return 1 - ((after - before).double().pow(2).sum(1) / spread).to(before.dtype)
    return (before * after).sum(1)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, the model is as it was before."""
    encoder = shaped(model)
    held = [(each, dict(each.__dict__), _inner(each)) for each in encoder.base.modules()]
    config, values = encoder.base.config, dict(encoder.base.config.__dict__)
    tensors = [(each, each.detach().clone()) for each in encoder.base.parameters() if each.numel() <= _SMALL]
    try:
        yield
    except BaseException:
        for module, state, inner in held:
            module.__dict__.clear()
            module.__dict__.update(state)
            for name, value in inner.items():  # the same dictionaries, since handles of hooks know them
                state[name].clear()
                state[name].update(value)
        config.__dict__.clear()
        config.__dict__.update(values)
        with torch.no_grad():
            for parameter, value in tensors:
                parameter.copy_(value)
        raise


_SMALL = 2**16  # elements: gains and biases are written to, matrices are replaced


def _inner(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """What a module's dictionaries hold: its parameters, modules, hooks."""
    return {name: dict(value) for name, value in module.__dict__.items() if isinstance(value, dict)}
