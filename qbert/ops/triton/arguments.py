"""What kernels take as one argument: pointers and numbers that belong to one thing, and all that a kernel is compiled for.

Triton takes tuples apart: each part reaches the GPU as an argument of its own, and of a part that is None nothing does, for the
kernel is compiled without it. A tuple of constants is one `tl.constexpr` and always the last argument, META.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from qbert.ops.abi import inverse_scale
from qbert.ops.operations import Linear

# ---- pointers and numbers -------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of a linear: t tokens, n output channels, k input channels."""

    t: Any
    n: Any
    k: Any


class End(NamedTuple):
    """How a linear's integer sums become its result (`kernels.epilogue`).

    Attributes:
        s: (t,) float32, a scale a token.
        scale: (n,) float32, a scale a channel; of dictionaries (matrices,).
        bias: (n,) of any float type, or None.
        inverse_out_scale: float32, one over the static scale of an int8 result.
        zero: float32, the code of 0 in such a result; None where it is 0, which costs nothing then.
    """

    s: Any
    scale: Any
    bias: Any
    inverse_out_scale: Any
    zero: Any = None


def end_of(a: Linear) -> End:
    """That of a linear."""
    return End(a.s, a.weight.scale, a.bias, inverse_scale(a.out), float(a.zero) if a.zero else None)


class Outliers(NamedTuple):
    """What is to be added to a dictionary's weights, as compressed sparse rows.

    Attributes:
        rowptr, col, delta: (n + 1,) int32, (outliers,) int16 or int32, (outliers,) float32.
    """

    rowptr: Any
    col: Any
    delta: Any


class Groups(NamedTuple):
    """Integer scales of int4 weights inside a row's scale.

    Attributes:
        scale: (n, groups) uint8.
        groups: of a row.
    """

    scale: Any
    groups: Any


class Dictionaries(NamedTuple):
    """int8 dictionaries of stacked matrices, and outliers.

    Attributes:
        codebook: (matrices, 2**bits / 4) int32, four centroids each, little-endian; None where codes were looked up before.
        matrices: of n / matrices rows each.
        outliers: `Outliers`, or None.
        tokens: what outliers are multiplied with: the int8 tokens (t, k), or what `columns_kernel` makes of them.
    """

    codebook: Any
    matrices: Any
    outliers: Any
    tokens: Any


class Packed(NamedTuple):
    """A weight under float activations.

    Attributes:
        codes: rows of packed codes.
        pitch: of a row: quadruples of int32 codes, or bytes of uint8 ones.
        codebook: (2**bits,) float32 of a dictionary, else None.
        scale: (n,) float32 of int8 weights; (n, k / group) bfloat16 of int4 weights; else None.
        outliers: `Outliers`, or None.
    """

    codes: Any
    pitch: Any
    codebook: Any
    scale: Any
    outliers: Any


class Table(NamedTuple):
    """An embedding table, as `kernels.embedding.table_row` reads it.

    Attributes:
        codes: (rows, k) float or int8; (rows, bytes) uint8 of codes of fewer bits.
        scale: (rows,) of int8; (rows, k / group) of int4; the dictionary (2**bits,) of its codes; None of floats.
        outliers: `Outliers` of a dictionary's codes, else None.
        rows: of the table.
        kept: how many outliers there are.
    """

    codes: Any
    scale: Any
    outliers: Any
    rows: Any
    kept: Any


class Normed(NamedTuple):
    """Where a norm goes: floats (t, k), their codes (t, k) int8 and scales (t,) float32."""

    out: Any
    codes: Any
    scale: Any


class Heads(NamedTuple):
    """Numbers of attention: heads, factor on the scores, and one over the static scale of an int8 result."""

    number: Any
    softmax_scale: Any
    inverse_out_scale: Any


class Distances(NamedTuple):
    """What attention makes of the distance of a key from its query, and of positions: see `qbert.ops.operations.Attention`.

    Attributes:
        window: how far a query sees, or None.
        bias: (heads, 2 * reach + 1) float32, or None.
        reach: of the biases, or None.
        positions: how many have a rotation, or None: longer sequences come out as NaN.
    """

    window: Any
    bias: Any
    reach: Any
    positions: Any


# ---- what a kernel is compiled for ----------------------------------------------------------------------------------


class Int8Meta(NamedTuple):
    """Of the int8 linear.

    Attributes:
        BLOCK_T, BLOCK_N, BLOCK_K: tokens, output and input channels of a tile.
        ACTIVATION: its number, see `kernels.epilogue`.
        GROUP: see `place`.
        SUBTILES: parts in which a tile is stored.
        EVEN_K: whether k is a multiple of BLOCK_K, so that loads need no mask.
    """

    BLOCK_T: int
    BLOCK_N: int
    BLOCK_K: int
    ACTIVATION: int
    GROUP: int = 1
    SUBTILES: int = 1
    EVEN_K: bool = False


class LowbitMeta(NamedTuple):
    """Of the linears of int4 and dictionary weights with int8 tokens.

    Attributes:
        BLOCK_T, BLOCK_N: tokens and output channels of a tile.
        SPLIT_K: programs that share a tile's input channels; with more than one they leave partial sums.
        ACTIVATION: its number, see `kernels.epilogue`.
        GROUP: see `tile_of`.
        TMA: whether tokens and codes are descriptors of (BLOCK_T, 128) and (BLOCK_N, 64) blocks; else they are pointers.
        PRMT: see `kernels.expand`.
        GROUP_SIZE: int4 weights that share a group scale: 32, 64 or a multiple of 128.
        BITS: of a dictionary's code.
        TURNED: whether outliers read what `columns_kernel` made of the tokens, for BLOCK_T = 128.
        WARPS: of the program.
    """

    BLOCK_T: int
    BLOCK_N: int
    SPLIT_K: int
    ACTIVATION: int
    GROUP: int = 1
    TMA: bool = False
    PRMT: bool = False
    GROUP_SIZE: int = 0
    BITS: int = 0
    TURNED: bool = False
    WARPS: int = 0


class WeightOnlyMeta(NamedTuple):
    """Of the linear of packed weights and float tokens.

    Attributes:
        LAYOUT: of `qbert.weight.layout`: int8_rows, nibble_halves, select_halves or dict3_words.
        BITS: of a code.
        GROUP: input channels that share a scale, a multiple of 32; 0 where a row or none has one.
        OUTLIERS: how many of a row are added at a time.
        ACTIVATION: its number, see `kernels.epilogue`.
        BLOCK_T: tokens of a program, a multiple of 8; of float32, any power of two.
        REPEATS: groups of eight rows of a program.
        WARPS: of a program.
        PRMT: whether codes are decoded by NVIDIA's instructions.
    """

    LAYOUT: str
    BITS: int
    GROUP: int
    OUTLIERS: int
    ACTIVATION: int
    BLOCK_T: int
    REPEATS: int
    WARPS: int
    PRMT: bool


class ExpandMeta(NamedTuple):
    """Of a packed weight's expansion: as of `WeightOnlyMeta`, LAYOUT also plain; BLOCK_K input channels at a time."""

    LAYOUT: str
    BITS: int
    GROUP: int
    BLOCK_K: int


class TableMeta(NamedTuple):
    """Of a look-up.

    Attributes:
        BITS: of a packed code, 0 where a value is a whole element.
        GROUP: codes that share a scale, 0 but of int4.
        BLOCK: power of two, at least k.
    """

    BITS: int
    GROUP: int
    BLOCK: int


class AttentionMeta(NamedTuple):
    """Of attention.

    Attributes:
        HEAD_DIM: channels of a head.
        BLOCK_D: power of two, at least HEAD_DIM and 32, which is the least K of an int8 wgmma.
        BLOCK_Q: queries of a program.
        PER_TOKEN: whether each token has scales of its own.
        PER_HEAD: whether each of its heads has.
        PTX: whether biases are looked up by NVIDIA's instruction.
    """

    HEAD_DIM: int
    BLOCK_D: int
    BLOCK_Q: int
    PER_TOKEN: bool
    PER_HEAD: bool = False
    PTX: bool = False


class HeadsMeta(NamedTuple):
    """Of the rounding of heads.

    Attributes:
        HEAD_DIM: channels of a head.
        HALF: power of two, at least half of them.
        HEADS: of a program, a power of two.
    """

    HEAD_DIM: int
    HALF: int
    HEADS: int
