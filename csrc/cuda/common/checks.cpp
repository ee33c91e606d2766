#include "cuda/common/checks.h"

#include "cuda/common/error.h"

namespace qbert::cuda {

void check_extent(const char* name, int64_t extent, int64_t limit, const char* because) {
    require(extent >= 1 && extent <= limit, name, " is ", extent, "; allowed: 1 ... ", limit, because);
}

void check_tokens_and_channels(int64_t t, int64_t n) {
    check_extent("t", t, kMaxExtent);
    check_extent("n", n, kMaxExtent);
    constexpr int64_t kMaxTiles = INT32_MAX / 4;
    const int64_t tiles = (t / 64 + 1) * (n / 128 + 1);
    require(tiles <= kMaxTiles, "t = ", t, " by n = ", n, " is ", tiles, " tiles of 64 x 128; allowed: ", kMaxTiles);
}

void check_problem(int64_t t, int64_t n, int64_t k, int sm_count) {
    check_tokens_and_channels(t, n);
    check_extent("k", k, kMaxExtent);
    check_extent("multiprocessors", sm_count, INT32_MAX);
}

void check_vector(const char* name, const void* address, int64_t alignment) {
    require(address != nullptr, name, " is a null pointer");
    const auto past = reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment);
    require(past == 0, name, " starts ", past, " bytes past a multiple of ", alignment, "; allowed: multiples of ", alignment);
}

void check_pitch(const char* name, int64_t columns, int64_t pitch, int64_t element_bytes) {
    require(pitch >= columns, "rows of ", name, " are ", pitch, " elements apart; allowed: at least their length, ", columns);
    constexpr int64_t kMaxPitch = (int64_t{1} << 40) - kAlignment;  // of the copy engine, in bytes
    require(pitch <= kMaxPitch / element_bytes, "rows of ", name, " are ", pitch, " elements apart; allowed: ", kMaxPitch,
            " bytes");
}

void check_matrix(const char* name, const void* address, int64_t columns, int64_t pitch, int64_t element_bytes) {
    check_vector(name, address, kAlignment);
    check_pitch(name, columns, pitch, element_bytes);
    require(pitch * element_bytes % kAlignment == 0, "rows of ", name, " are ", pitch * element_bytes,
            " bytes apart; allowed: multiples of ", kAlignment);
}

void check_code(const char* name, int code, int count) {
    require(code >= 0 && code < count, name, " has the code ", code, "; allowed: 0 ... ", count - 1);
}

}  // namespace qbert::cuda
