"""Embedding look-ups, LayerNorm and per-token int8 quantization: one program a token, one pass over memory.

Computes `qbert.reference.embed_layer_norm_quantize`: word + token type + position, in this order, in float32. The word table is
float or packed (see `embedding`). An id outside of its table makes the token's row NaN, its scale NaN and its codes 0.
"""

import triton
import triton.language as tl

from qbert.kernels.embedding import table_row
from qbert.kernels.row import layer_norm, store_normed


@triton.jit
def embed_layer_norm_quantize_kernel(
    ids_ptr, position_ids_ptr, token_type_ids_ptr, positions_ptr, token_types_ptr, gamma_ptr, beta_ptr, out_ptr,
    codes_ptr, out_scale_ptr, rows, position_rows, token_type_rows, outliers, k, eps, table_ptr, scale_ptr, rowptr_ptr,
    col_ptr, delta_ptr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids (t,) of a word table as `table_row` reads it, positions (p, k) and token types (types, k), float.

    Writes out (t, k) float, codes (t, k) int8, out_scale (t,) float32. Grid: (t,). BLOCK: power of two, at least k.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    word = tl.load(ids_ptr + token).to(tl.int64)
    position = tl.load(position_ids_ptr + token).to(tl.int64)
    token_type = tl.load(token_type_ids_ptr + token).to(tl.int64)
    total = table_row(
        word, table_ptr, scale_ptr, rowptr_ptr, col_ptr, delta_ptr, rows, outliers, k, column, BITS, GROUP, BLOCK
    )
    total += table_row(token_type, token_types_ptr, None, None, None, None, token_type_rows, 0, k, column, 0, 0, BLOCK)
    total += table_row(position, positions_ptr, None, None, None, None, position_rows, 0, k, column, 0, 0, BLOCK)
    normed = layer_norm(tl.where(column < k, total, 0.0), k, column, gamma_ptr, beta_ptr, eps)
    store_normed(normed, token, k, column, out_ptr, codes_ptr, out_scale_ptr)
