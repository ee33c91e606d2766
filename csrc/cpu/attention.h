// Attention of packed sequences over several threads.
#pragma once

#include "cpu/kernels.h"

namespace qbert {

// Longer sequences, or wider heads, could overflow the int32 sums of products.
constexpr int64_t kMaxAttentionTerms = 65536;

// Computes args.out for tokens 0 ... cu_seqlens[sequences] - 1, sequence i being cu_seqlens[i] ... cu_seqlens[i + 1] - 1; these
// must ascend from 0. What a row goes through depends on its own sequence alone, so results depend neither on `threads` nor on
// other sequences. Throws std::bad_alloc.
void attention(const AttentionArgs& args, const int32_t* cu_seqlens, int64_t sequences, int threads);

// Whether cu_seqlens ascends from 0 to t.
bool bounds_cover(const int32_t* cu_seqlens, int64_t sequences, int64_t t);

// Whether no sequence is longer than that.
bool positions_cover(const int32_t* cu_seqlens, int64_t sequences, int64_t positions);

}  // namespace qbert
