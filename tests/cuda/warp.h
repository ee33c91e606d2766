// A warp on the CPU: 32 threads as its lanes, so that a kernel's own source runs here, its index arithmetic included.
// Include it before the kernel. It knows what the row kernels use of CUDA; conversions come from CUDA's own headers.
#pragma once

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

using std::max;
using std::min;

thread_local uint3 threadIdx, blockIdx;

namespace warp {

inline pthread_barrier_t barrier;
inline uint32_t slots[32];

// What every lane gives, seen by all.
template <class Use>
auto exchange(uint32_t mine, const Use& use) {
    slots[threadIdx.x % 32] = mine;
    pthread_barrier_wait(&barrier);
    const auto result = use(slots);
    pthread_barrier_wait(&barrier);
    return result;
}

// Runs body() in 32 lanes as the warp of that number.
template <class Body>
void run(unsigned number, unsigned warps_a_block, const Body& body) {
    pthread_barrier_init(&barrier, nullptr, 32);
    std::vector<std::thread> lanes;
    for (unsigned lane = 0; lane < 32; ++lane) {
        lanes.emplace_back([&, lane] {
            threadIdx = {number % warps_a_block * 32 + lane, 0, 0};
            blockIdx = {number / warps_a_block, 0, 0};
            body();
        });
    }
    for (std::thread& lane : lanes) lane.join();
    pthread_barrier_destroy(&barrier);
}

}  // namespace warp

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline int __float2int_rn(float value) {  // as PTX's cvt.rni.s32.f32: NaN gives 0, the rest saturates
    if (std::isnan(value)) return 0;
    const double clamped = std::clamp<double>(value, std::numeric_limits<int>::min(), std::numeric_limits<int>::max());
    return static_cast<int>(std::nearbyint(clamped));
}
inline float __shfl_xor_sync(unsigned, float value, int distance) {
    const unsigned other = (threadIdx.x % 32) ^ static_cast<unsigned>(distance);
    return __uint_as_float(warp::exchange(__float_as_uint(value), [&](const uint32_t* all) { return all[other]; }));
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    return warp::exchange(value, [](const uint32_t* all) { return *std::max_element(all, all + 32); });
}
