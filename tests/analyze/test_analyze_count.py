"""Bytes and FLOPs of single operations, of look-ups, and of quantized modules."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qbert.analyze import Component
from qbert.analyze.count import OpCount, count_ops, touched_elements
from qbert.analyze.weights import count_weights

ROWS, COLUMNS, TOKENS = 24, 16, 5


class FakeQuantized(nn.Module):
    """A quantized linear or embedding as `qbert.modules` makes them: codes in a buffer, true size by `weight_nbytes`."""

    qdata: torch.Tensor
    scale: torch.Tensor

    def __init__(self, activation_bits: int | None, name: str = "w8a8") -> None:
        super().__init__()
        self.scheme = SimpleNamespace(name=name, weight_bits=8, activation_bits=activation_bits)
        self.register_buffer("qdata", torch.zeros(ROWS, COLUMNS, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(ROWS))

    def weight_nbytes(self) -> int:
        return ROWS * COLUMNS + 4 * ROWS


class FakeLinear(FakeQuantized):
    in_features, out_features = COLUMNS, ROWS

    def __init__(self, activation_bits: int | None, name: str = "w8a8") -> None:
        super().__init__(activation_bits, name)
        self.bias = nn.Parameter(torch.zeros(ROWS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qdata.float() * self.scale[:, None]).t() + self.bias


class FakeEmbedding(FakeQuantized):
    num_embeddings, embedding_dim = ROWS, COLUMNS

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.qdata[ids].float()


class FakeTied(nn.Module):
    """A linear that computes with the table of an embedding."""

    in_features, out_features = COLUMNS, ROWS

    def __init__(self, owner: FakeQuantized) -> None:
        super().__init__()
        self._owner = (owner,)
        self.scheme = owner.scheme
        self.bias = nn.Parameter(torch.zeros(ROWS))

    @property
    def owner(self) -> FakeQuantized:
        return self._owner[0]

    def weight_nbytes(self) -> int:
        return 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.owner.qdata.float().t() + self.bias


class Holder(nn.Module):
    def __init__(self, pooler: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pooler(x)


def ops_of(module: nn.Module, x: torch.Tensor) -> list[OpCount]:
    counts = count_ops(Holder(module), {"x": x}, torch.float32)
    assert not counts.uncounted
    assert counts.of(Component.POOLER_HEAD) == counts.ops
    return counts.ops


def test_linear() -> None:
    (op,) = ops_of(nn.Linear(COLUMNS, ROWS), torch.zeros(2, TOKENS, COLUMNS))
    tokens = 2 * TOKENS
    assert op.matmul_flops == 2 * tokens * ROWS * COLUMNS
    assert op.bytes_moved == 4 * (ROWS * COLUMNS + ROWS + tokens * (COLUMNS + ROWS))


def test_embedding_reads_the_rows_it_takes() -> None:
    (op,) = ops_of(nn.Embedding(1000, COLUMNS), torch.zeros(2, TOKENS, dtype=torch.long))
    rows = 2 * TOKENS
    assert (op.matmul_flops, op.vector_flops) == (0, 0)
    assert (op.fixed_bytes, op.model_dtype_bytes) == (8 * rows, 2 * 4 * rows * COLUMNS)


@pytest.mark.parametrize(
    ("activation_bits", "name", "math", "launches"),
    [(8, "w8a8", "int8", 2), (None, "w4a16", "float", 1), (16, "w4a16", "float", 1), (8, "fp8", "fp8", 2)],
)
def test_quantized_linear(activation_bits: int | None, name: str, math: str, launches: int) -> None:
    (op,) = ops_of(FakeLinear(activation_bits, name=name), torch.zeros(TOKENS, COLUMNS))
    assert op.matmul_flops == 2 * TOKENS * ROWS * COLUMNS
    assert (op.math, op.launches) == (math, launches)
    assert op.fixed_bytes == ROWS * COLUMNS + 4 * ROWS
    assert op.model_dtype_bytes == 4 * (TOKENS * (ROWS + COLUMNS) + ROWS)


def test_quantized_embedding() -> None:
    (op,) = ops_of(FakeEmbedding(None), torch.zeros(TOKENS, dtype=torch.long))
    assert op.matmul_flops == 0
    assert op.fixed_bytes == TOKENS * (COLUMNS + 4) + 8 * TOKENS
    assert op.model_dtype_bytes == 4 * TOKENS * COLUMNS


def test_quantized_weights_count_logical_parameters_and_true_bytes() -> None:
    model = nn.ModuleDict({"pooler": FakeLinear(8), "embeddings": FakeEmbedding(None)})
    counts = count_weights(model)
    linear, table = counts[Component.POOLER_HEAD], counts[Component.EMBEDDINGS]
    stored = ROWS * COLUMNS + 4 * ROWS
    assert (linear.parameters, linear.nbytes) == (ROWS * COLUMNS + ROWS, stored + 4 * ROWS)
    assert (table.parameters, table.nbytes) == (ROWS * COLUMNS, stored)


def test_tied_quantized_weight_counts_once() -> None:
    table = FakeEmbedding(None)
    head = count_weights(nn.ModuleDict({"embeddings": table, "pooler": FakeTied(table)}))[Component.POOLER_HEAD]
    assert (head.parameters, head.nbytes) == (ROWS, 4 * ROWS)  # the bias


def test_tied_quantized_linear_reads_its_owners_weight() -> None:
    (op,) = ops_of(FakeTied(FakeEmbedding(None)), torch.zeros(TOKENS, COLUMNS))
    assert op.matmul_flops == 2 * TOKENS * ROWS * COLUMNS
    assert op.fixed_bytes == ROWS * COLUMNS + 4 * ROWS


def test_tied_float_weight_counts_once() -> None:
    table, head = nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, ROWS)
    head.weight = table.weight
    counts = count_weights(nn.ModuleDict({"embeddings": table, "pooler": head}))
    assert counts[Component.EMBEDDINGS].parameters == ROWS * COLUMNS
    assert counts[Component.POOLER_HEAD].parameters == ROWS


def test_views_and_expanded_dimensions() -> None:
    assert touched_elements(torch.zeros(3, 1).expand(3, 1000)) == 3
    assert touched_elements(torch.zeros(0, 5)) == 0
    assert ops_of(nn.Flatten(), torch.zeros(2, 3, 4)) == []


def test_unknown_operation_is_named() -> None:
    class Sorting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort().values

    counts = count_ops(Sorting(), {"x": torch.zeros(4)}, torch.float32)
    assert counts.uncounted == {"aten::sort": 1}


def test_custom_operator_is_named_even_if_it_returns_integers() -> None:
    @torch.library.custom_op("qbert_analyze_test::round", mutates_args=())
    def to_int8(x: torch.Tensor) -> torch.Tensor:
        return x.round().to(torch.int8)

    counts = count_ops(Holder(to_int8), {"x": torch.zeros(4)}, torch.float32)
    assert counts.uncounted == {"qbert_analyze_test::round": 1}
    assert counts.ops[0].bytes_moved == 4 * 4 + 4
