// Outliers come from files: a column or row pointer outside the matrix would be a read out of bounds.
#pragma once

#include "cpu/kernels.h"

namespace qbert {

// Looks at all outliers, which takes less than a microsecond for a matrix of BERT-base. Throws std::invalid_argument for one
// outside the matrix.
void check_outliers(const Weight& weight);

// Whether the outliers of rows ids[0] ... ids[t - 1] lie in the arrays and in the row. The ids must be inside.
bool outliers_are_inside(const Weight& weight, const int64_t* ids, int64_t t);

}  // namespace qbert
