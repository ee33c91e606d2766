// Operations on rows of floats over several threads. A row is computed by one task, so results do not depend on `threads`.
//
// All throw std::bad_alloc.
#pragma once

#include "cpu/kernels.h"

namespace qbert {

void quantize_rows(const QuantizeRowsArgs& args, int64_t t, int threads);
void add_norm_rows(const AddNormArgs& args, int64_t t, int threads);
void look_up_rows(const LookUpArgs& args, int64_t t, int threads);
void embed_norm_rows(const EmbedNormArgs& args, int64_t t, int threads);

// Whether all ids lie in 0 ... rows - 1.
bool ids_are_inside(const int64_t* ids, int64_t t, int64_t rows);

}  // namespace qbert
