"""Embedding look-ups, LayerNorm and per-token int8 quantization: one program a token, one pass over memory.

Computes `qbert.ops.reference.embed_norm`: word + token type + position, in this order, in float32. The word table is
float or packed (see `embedding`). An id outside of its table makes the token's row NaN, its scale NaN and its codes 0.

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl

from qbert.kernels.embedding import table_row
from qbert.kernels.row import layer_norm, store_normed


@triton.jit
def embed_layer_norm_quantize_kernel(ids, tables, norm, to, k, META: tl.constexpr):
    """Looked-up rows and a norm as in `layer_norm` -> a `Normed`. Grid: (t,).

    Args:
        ids: of words, positions and token types, (t,) each.
        tables: of words (as META, a `TableMeta`, says), positions and token types (float): a `Table` each, of k columns.
    """
    words, positions, token_types = tables
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, META.BLOCK)
    word = tl.load(ids[0] + token).to(tl.int64)
    position = tl.load(ids[1] + token).to(tl.int64)
    token_type = tl.load(ids[2] + token).to(tl.int64)
    total = table_row(word, words, k, column, META.BITS, META.GROUP)
    total += table_row(token_type, token_types, k, column, 0, 0)
    total += table_row(position, positions, k, column, 0, 0)
    normed = layer_norm(tl.where(column < k, total, 0.0), k, column, norm)
    store_normed(normed, normed, token, k, column, to)
