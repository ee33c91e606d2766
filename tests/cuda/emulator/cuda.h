// CUDA's language and intrinsics for a C++ compiler: given to it before each .cu file, as nvcc does with its own. Number types
// and their conversions come from CUDA's headers; what threads of a warp or a block do together, from the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __grid_constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ kernels_use_dynamic_shared_memory_only  // no type: does not compile

// Set whenever a thread goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// ---- threads together -------------------------------------------------------------------------------------------------

namespace qbert::cuda::emulator {

struct WarpValues {
    uint64_t of_lane[32];
};
// Waits until all lanes of the mask are here with the same call, and gives what each of them brought.
WarpValues exchange(const char* call, unsigned mask, uint64_t mine);
// Waits until all threads of the block are here.
void synchronize_block();

template <class To, class From>
To bits(From value) {
    To result{};
    std::memcpy(&result, &value, std::min(sizeof(To), sizeof(From)));
    return result;
}
inline int lane() { return static_cast<int>(threadIdx.x % 32); }
// What a lane of this lane's segment of so many lanes brought; its own where there is no such lane.
template <class T>
T shuffle(const char* call, unsigned mask, T value, int from, bool there) {
    static_assert(sizeof(T) <= 8);
    const WarpValues values = exchange(call, mask, bits<uint64_t>(value));
    if (!there) return value;
    return bits<T>(values.of_lane[from]);
}
template <class Take>
unsigned reduce(const char* call, unsigned mask, unsigned value, const Take& take) {
    const WarpValues values = exchange(call, mask, value);
    bool first = true;
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const auto each = static_cast<unsigned>(values.of_lane[lane]);
        result = first ? each : take(result, each);
        first = false;
    }
    return result;
}

}  // namespace qbert::cuda::emulator

inline void __syncthreads() { qbert::cuda::emulator::synchronize_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { qbert::cuda::emulator::exchange("__syncwarp", mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    const int own = qbert::cuda::emulator::lane();
    return qbert::cuda::emulator::shuffle("__shfl_sync", mask, value, own / width * width + (lane & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
    const int own = qbert::cuda::emulator::lane(), from = own ^ distance;
    return qbert::cuda::emulator::shuffle("__shfl_xor_sync", mask, value, from, from < (own / width + 1) * width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    const int own = qbert::cuda::emulator::lane(), from = own - static_cast<int>(distance);
    return qbert::cuda::emulator::shuffle("__shfl_up_sync", mask, value, from, from >= own / width * width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    const int own = qbert::cuda::emulator::lane(), from = own + static_cast<int>(distance);
    return qbert::cuda::emulator::shuffle("__shfl_down_sync", mask, value, from, from < (own / width + 1) * width);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
    const unsigned mine = unsigned{predicate} << qbert::cuda::emulator::lane();
    return qbert::cuda::emulator::reduce("__ballot_sync", mask, mine, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    const auto larger = [](unsigned a, unsigned b) { return std::max(a, b); };
    return qbert::cuda::emulator::reduce("__reduce_max_sync", mask, value, larger);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    const auto smaller = [](unsigned a, unsigned b) { return std::min(a, b); };
    return qbert::cuda::emulator::reduce("__reduce_min_sync", mask, value, smaller);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    return qbert::cuda::emulator::reduce("__reduce_add_sync", mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
    return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}

// One thread of the emulator runs at a time, and its accesses happen in order.
inline void __threadfence_block() {}
inline void __threadfence() {}
template <class T>
T atomicAdd(T* to, std::common_type_t<T> value) {
    const T before = *to;
    *to = before + value;
    return before;
}
template <class T>
T atomicMax(T* to, std::common_type_t<T> value) {
    const T before = *to;
    *to = std::max(before, value);
    return before;
}

// ---- memory -----------------------------------------------------------------------------------------------------------

#define QBERT_LOAD(name)                     \
    template <class T>                       \
    T name(const T* from) {                  \
        return *from;                        \
    }
QBERT_LOAD(__ldg)
QBERT_LOAD(__ldcg)
QBERT_LOAD(__ldca)
QBERT_LOAD(__ldcs)
QBERT_LOAD(__ldlu)
QBERT_LOAD(__ldcv)
#undef QBERT_LOAD
#define QBERT_STORE(name)                                \
    template <class T>                                   \
    void name(T* to, std::common_type_t<T> value) {      \
        *to = value;                                     \
    }
QBERT_STORE(__stwb)
QBERT_STORE(__stcg)
QBERT_STORE(__stcs)
QBERT_STORE(__stwt)
#undef QBERT_STORE

// ---- numbers ----------------------------------------------------------------------------------------------------------

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    return std::min<std::common_type_t<A, B>>(a, b);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    return std::max<std::common_type_t<A, B>>(a, b);
}

inline unsigned __float_as_uint(float value) { return qbert::cuda::emulator::bits<unsigned>(value); }
inline int __float_as_int(float value) { return qbert::cuda::emulator::bits<int>(value); }
inline float __uint_as_float(unsigned value) { return qbert::cuda::emulator::bits<float>(value); }
inline float __int_as_float(int value) { return qbert::cuda::emulator::bits<float>(value); }

// Compiled without contraction and without fast-math, these are what their names say.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return std::exp(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __saturatef(float value) { return std::isnan(value) ? 0.0f : std::clamp(value, 0.0f, 1.0f); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }
// As PTX's cvt: NaN gives 0, what is too large saturates.
inline int float_to_int(double value) {
    if (std::isnan(value)) return 0;
    return static_cast<int>(std::clamp<double>(value, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()));
}
inline int __float2int_rn(float value) { return float_to_int(std::nearbyint(value)); }
inline int __float2int_rz(float value) { return float_to_int(std::trunc(value)); }
inline int __float2int_rd(float value) { return float_to_int(std::floor(value)); }
inline int __float2int_ru(float value) { return float_to_int(std::ceil(value)); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
// Byte i of the result is the byte of {high, low} that nibble i of `selector` names, or, with its bit 3, that byte's sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t{high} << 32 | low;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> 4 * i & 0xf;
        auto byte = static_cast<unsigned>(bytes >> 8 * (nibble & 7)) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
}

// Products and sums that CUDA's headers leave to the device; exact in double but for far exponents, then rounded once.
inline __half __hfma(__half a, __half b, __half c) {
    return __double2half(std::fma(double{__half2float(a)}, double{__half2float(b)}, double{__half2float(c)}));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __double2bfloat16(std::fma(double{__bfloat162float(a)}, double{__bfloat162float(b)}, double{__bfloat162float(c)}));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
