"""How much the output changes when parts of a layer go: gradients of random projections of the output, no labels needed.

For an embedding e and v ~ N(0, I), the gradient g of v.e at a linear's output says how v.e changes with it to first order, and
the mean of its square over v is the squared change of e itself. So with a linear's inputs x, its weight W and another one W',
the change of e is predicted for any W' by one matrix product: the mean over texts of (sum_t g_t . (W - W') x_t)^2. It sees
neurons that make up for one another, and it has no zero gradient at the model itself, as distances to its own output have.
Logits of a classifier whose classes do not exclude one another (one logit, regression, many labels) are taken as embeddings
are. Of other classifiers the scalar is the log-probability of a class drawn from the model's own prediction (the true Fisher
information), or, where labels are given, of the label (the empirical one, Kwon et al., 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.compress.texts import Texts, one_class_of_several, output_of
from qbert.errors import QBertError
from qbert.evaluate.encode import is_classifier
from qbert.evaluate.stats import spearman
from qbert.shapes import Shaped

Site = tuple[int, str]  # place of a layer, and ATTENTION or FFN
ATTENTION, FFN = "attention", "ffn"
PROJECTIONS = 2  # of each text


@dataclass(frozen=True)
class Seen:
    """What passed at the last linear of a sublayer, over all texts, padding left out.

    Attributes:
        inputs: (tokens, k).
        gradients: (projections, tokens, n) of the scalars with respect to the linear's outputs.
        texts: (tokens,) the text of each token, counted from 0.
        count: texts.
    """

    inputs: Tensor
    gradients: Tensor
    texts: Tensor
    count: int

    def half(self, which: int) -> Seen:
        """Of every other text."""
        chosen = self.texts % 2 == which
        return Seen(
            self.inputs[chosen], self.gradients[:, chosen], self.texts[chosen] // 2, (self.count + 1 - which) // 2
        )

    def change(self, difference: Tensor) -> float:
        """Predicted mean squared change of the output where (n, k) `difference` is taken off the weight.

        Inputs are taken from their means: what is constant goes into the bias.
        """
        centred = self.inputs - self.inputs.mean(0)
        moved = centred @ difference.T.to(centred.dtype)  # (tokens, n)
        per_token = (self.gradients * moved).sum(2)  # (projections, tokens)
        per_text = torch.zeros(len(per_token), self.count, dtype=per_token.dtype, device=per_token.device)
        per_text.index_add_(1, self.texts, per_token)
        return float(per_text.double().pow(2).mean())

    def slopes(self, weight: Tensor, group: int, *, centred: bool = True) -> Tensor:
        """(projections, texts, k / group) of each scalar with respect to a factor at one unit of `group` inputs.

        Args:
            centred: whether inputs are taken from their means, which go into the bias when a unit goes.
        """
        inputs = self.inputs - self.inputs.mean(0) if centred else self.inputs
        found = []
        for gradients in self.gradients:
            per_token = ((gradients @ weight) * inputs).unflatten(1, (-1, group)).sum(2)
            per_text = torch.zeros(self.count, per_token.shape[1], dtype=per_token.dtype, device=per_token.device)
            found.append(per_text.index_add_(0, self.texts, per_token))
        return torch.stack(found)

    def importance(self, weight: Tensor, group: int) -> Tensor:
        """(k / group,) predicted squared change of the output when one unit of `group` inputs goes, by itself."""
        return self.slopes(weight, group).double().pow(2).mean((0, 1)).cpu()


def look(
    model: nn.Module,
    encoder: Shaped,
    texts: Texts,
    labels: Sequence[int] | None,
    pooling: str,
    seed: int,
    paths: Mapping[str, str] | None = None,
) -> dict[Site, Seen]:
    """Runs the model on texts, forward and backward.

    Args:
        paths: of the linears of a layer that are looked at, by name; the last of each sublayer by default.

    Raises:
        QBertError: labels for something that is no classifier, not one for each text, or a gradient that is NaN or infinite.
    """
    _check_labels(model, texts, labels)
    generator = torch.Generator().manual_seed(seed)
    paths = _paths(encoder) if paths is None else paths
    sites = {(place, kind): path for place in range(len(encoder.layers)) for kind, path in paths.items()}
    inputs: dict[Site, list[Tensor]] = {site: [] for site in sites}
    gradients: dict[Site, list[Tensor]] = {site: [] for site in sites}
    owners: list[Tensor] = []
    device = next(model.parameters()).device
    for places, batch in texts.batches(device):
        mask = batch["attention_mask"].bool()
        with _watched(encoder, paths) as passed:
            output = output_of(model, batch, pooling)
        owners.append(torch.tensor(places, device=device)[:, None].expand(mask.shape)[mask])
        outputs = [passed[site][1] for site in sites]
        found = []
        for turn in range(PROJECTIONS):
            scalar = _scalar(model, output, None if labels is None else [labels[place] for place in places], generator)
            found.append(torch.autograd.grad(scalar, outputs, retain_graph=turn + 1 < PROJECTIONS))
        for index, site in enumerate(sites):
            inputs[site].append(passed[site][0].detach()[mask])
            gradients[site].append(torch.stack([each[index][mask] for each in found]))
    texts_of = torch.cat(owners)
    seen = {site: Seen(torch.cat(inputs[site]), torch.cat(gradients[site], 1), texts_of, len(texts)) for site in sites}
    if not all(bool(each.gradients.isfinite().all()) for each in seen.values()):
        raise QBertError("a gradient is NaN or infinite on these texts; nothing can be said of what may go")
    return seen


def output_root(gradients: Tensor) -> Tensor:
    """(n, n) upper triangular R with R' R the mean product of gradients (projections, tokens, n), a little damped."""
    flat = gradients.flatten(0, 1).double().cpu()
    gram = flat.T @ flat / max(1, len(flat))
    level = float(gram.diagonal().mean())
    eye = torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.cholesky((gram + 0.1 * level * eye) / max(level, 1e-300), upper=True) if level > 0 else eye


def rank_agreement(seen: Seen, weight: Tensor, group: int) -> float:
    """Rank correlation of the importance by one half of the texts with that by the other: low where texts are too few."""
    first, second = (seen.half(which).importance(weight, group) for which in (0, 1))
    return spearman(first.numpy(), second.numpy()) if len(first) > 1 and first.max() > 0 and second.max() > 0 else 1.0


def _check_labels(model: nn.Module, texts: Texts, labels: Sequence[int] | None) -> None:
    if labels is None:
        return
    if not is_classifier(model):
        raise QBertError(f"labels are for sequence classifiers; {type(model).__name__} is none")
    if not one_class_of_several(model):
        raise QBertError(
            f"labels are for classes that exclude one another; {type(model).__name__} has one logit, or several of a "
            f"regression or of many labels. Allowed: labels=None"
        )
    classes = int(model.config.num_labels)  # type: ignore[union-attr,arg-type]
    if len(labels) != len(texts) or not all(isinstance(each, int) and 0 <= each < classes for each in labels):
        raise QBertError(f"{len(labels)} labels for {len(texts)} texts; allowed: one for each, 0 ... {classes - 1}")


def _paths(encoder: Shaped) -> dict[str, str]:
    return {ATTENTION: encoder.family.layer.attention_output, FFN: encoder.family.layer.ffn_out}


@contextmanager
def _watched(encoder: Shaped, paths: Mapping[str, str]) -> Iterator[dict[Site, tuple[Tensor, Tensor]]]:
    """Inside, (input, output) of those linears of every layer; outputs are where gradients begin."""
    passed: dict[Site, tuple[Tensor, Tensor]] = {}
    handles = []
    for place, layer in enumerate(encoder.layers):
        for kind, path in paths.items():
            linear: Any = layer.get_submodule(path)

            def caught(_: Any, given: tuple[Tensor, ...], output: Tensor, site: Site = (place, kind)) -> Tensor:
                output = output if output.requires_grad else output.requires_grad_()
                passed[site] = given[0], output
                return output

            handles.append(linear.register_forward_hook(caught))
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _scalar(model: nn.Module, output: Tensor, labels: Sequence[int] | None, generator: torch.Generator) -> Tensor:
    """The sum over texts of one number each, whose gradient is looked at. `output` is (rows, d), see `output_of`."""
    if one_class_of_several(model):
        classes = (
            torch.multinomial(output.detach().exp().cpu(), 1, generator=generator)
            if labels is None
            else torch.tensor(labels)[:, None]
        )
        return output.gather(1, classes.to(output.device)).sum()
    v = torch.randn(output.shape, generator=generator).to(output)
    return (v * output).sum()
