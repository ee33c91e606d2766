#include "cpu/outliers.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace qbert {
namespace {

// By the smallest and the largest, which vectors find for many at once.
template <class Column>
bool all_inside(const Column* col, int64_t count, int64_t k) {
    Column low = 0, high = -1;
    for (int64_t i = 0; i < count; ++i) {
        low = std::min(low, col[i]);
        high = std::max(high, col[i]);
    }
    return low >= 0 && high < k;
}

}  // namespace

void check_outliers(const Weight& weight) {
    const Outliers& outliers = weight.outliers;
    const int32_t* rowptr = outliers.rowptr;
    if (rowptr == nullptr) return;
    int descends = 0;
    for (int64_t i = 0; i < weight.n; ++i) descends |= rowptr[i] > rowptr[i + 1];
    if (descends != 0 || rowptr[0] != 0 || rowptr[weight.n] != outliers.count) {
        throw std::invalid_argument("outlier_rowptr must ascend from 0 to the number of outliers, " +
                                    std::to_string(outliers.count));
    }
    const bool inside = outliers.wide ? all_inside(static_cast<const int32_t*>(outliers.col), outliers.count, weight.k)
                                      : all_inside(static_cast<const int16_t*>(outliers.col), outliers.count, weight.k);
    if (!inside) throw std::invalid_argument("outlier_col must lie in 0 ... " + std::to_string(weight.k - 1));
}

bool outliers_are_inside(const Weight& weight, const int64_t* ids, int64_t t) {
    const Outliers& outliers = weight.outliers;
    if (outliers.rowptr == nullptr) return true;
    for (int64_t i = 0; i < t; ++i) {
        const int64_t begin = outliers.rowptr[ids[i]], end = outliers.rowptr[ids[i] + 1];
        if (begin < 0 || end < begin || end > outliers.count) return false;
        for (int64_t entry = begin; entry < end; ++entry) {
            const int64_t column = column_of(outliers, entry);
            if (column < 0 || column >= weight.k) return false;
        }
    }
    return true;
}

}  // namespace qbert
