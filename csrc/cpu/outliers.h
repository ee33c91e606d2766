// Outliers come from files: a column or row pointer outside the matrix would be a read out of bounds.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace qbert {

// Looks at all outliers of `args`, which costs a microsecond or two; none are there if outlier_rowptr is null.
// Throws std::invalid_argument for one outside the matrix.
template <class Args>
void check_outliers(const Args& args) {
    const int32_t* rowptr = args.outlier_rowptr;
    if (rowptr == nullptr) return;
    bool valid = rowptr[0] == 0 && rowptr[args.n] == args.outliers;
    for (int64_t i = 0; i < args.n; ++i) valid &= rowptr[i] <= rowptr[i + 1];
    if (!valid) {
        throw std::invalid_argument("outlier_rowptr must ascend from 0 to the number of outliers, " +
                                    std::to_string(args.outliers));
    }
    const auto inside = [&](const auto* col) {
        bool all = true;
        for (int64_t i = 0; i < args.outliers; ++i) all &= col[i] >= 0 && col[i] < args.k;
        return all;
    };
    valid = args.outlier_col_wide ? inside(static_cast<const int32_t*>(args.outlier_col))
                                  : inside(static_cast<const int16_t*>(args.outlier_col));
    if (!valid) throw std::invalid_argument("outlier_col must lie in 0 ... " + std::to_string(args.k - 1));
}

}  // namespace qbert
