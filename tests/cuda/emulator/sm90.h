// The names of cuda/sm90/sm90.cuh on the emulated machine; what they mean is said there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/common/pdl.cuh"
#include "cuda/sm90/tensor_map.h"
#include "emulator/cuda.h"

namespace qbert::cuda::sm90 {

// ---- threads ----------------------------------------------------------------------------------------------------------

inline int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }
inline int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
bool elect_one();

void set_registers(int registers);
template <int kRegisters>
void setmaxnreg_inc() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24, 32 ... 256");
    set_registers(kRegisters);
}
template <int kRegisters>
void setmaxnreg_dec() {
    setmaxnreg_inc<kRegisters>();
}

// ---- shared memory and clusters ---------------------------------------------------------------------------------------

unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);

unsigned cluster_rank();
void cluster_arrive();
inline void cluster_arrive_relaxed() { cluster_arrive(); }
void cluster_wait();
inline void cluster_sync() { cluster_arrive(), cluster_wait(); }

void* map_to_cta(const void* shared, unsigned rank);
template <class T>
T* in_cta(T* shared, unsigned rank) {
    return static_cast<T*>(map_to_cta(shared, rank));
}

void named_barrier_sync(unsigned id, unsigned threads);
void named_barrier_arrive(unsigned id, unsigned threads);

// ---- barriers in shared memory ----------------------------------------------------------------------------------------

struct alignas(8) Mbarrier {
    uint64_t word;
};
void mbarrier_init(Mbarrier& barrier, unsigned arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(Mbarrier& barrier);
void mbarrier_arrive_cluster(Mbarrier& barrier, unsigned rank);
void mbarrier_arrive_expect_tx(Mbarrier& barrier, unsigned bytes);
void mbarrier_wait(Mbarrier& barrier, unsigned parity);
inline void fence_proxy_async() {}

// ---- copies -----------------------------------------------------------------------------------------------------------

enum class CacheHint : uint64_t { normal, evict_first, evict_last };

void prefetch_tensor_map(const TensorMap& map);
void tma_load(void* to, const TensorMap& map, int column, int row, Mbarrier& barrier, CacheHint keep = CacheHint::normal);
void tma_load_multicast(void* to, const TensorMap& map, int column, int row, Mbarrier& barrier, uint16_t blocks,
                        CacheHint keep = CacheHint::normal);
void bulk_copy(void* to, const void* from, unsigned bytes, Mbarrier& barrier, CacheHint keep = CacheHint::normal);
inline void bulk_prefetch(const void*, int64_t) {}

// ---- products of a warpgroup -----------------------------------------------------------------------------------------

void warpgroup_arrive();
void warpgroup_commit();
void wait_for_warpgroup(unsigned batches);
template <int kBatches>
void warpgroup_wait() {
    wait_for_warpgroup(kBatches);
}
template <class T, int kCount>
void warpgroup_fence_operand(T (&)[kCount]) {
    static_assert(sizeof(T) == 4);
}

struct Half {};
struct BFloat {};

enum class Operands { s8, f16, bf16 };
// One product of a warpgroup: `a` is in the registers of its threads, or, where that is null, in shared memory.
void issue_wgmma(Operands operands, int tokens, void* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                 bool accumulate);

constexpr bool tokens_allowed(int tokens, int most) {
    return tokens >= 8 && tokens <= most && (tokens & (tokens - 1)) == 0;  // the sizes that sm90.cuh names
}
template <int kTokens>
void wgmma_s8(int32_t (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(tokens_allowed(kTokens, 128));
    issue_wgmma(Operands::s8, kTokens, d, a, 0, b, accumulate);
}
template <int kTokens>
void wgmma_s8(int32_t (&d)[kTokens / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(tokens_allowed(kTokens, 128));
    issue_wgmma(Operands::s8, kTokens, d, nullptr, a, b, accumulate);
}
template <class Float, int kTokens>
void wgmma_float(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(tokens_allowed(kTokens, 64));
    constexpr bool kHalf = std::is_same_v<Float, Half>;
    static_assert(kHalf || std::is_same_v<Float, BFloat>);
    issue_wgmma(kHalf ? Operands::f16 : Operands::bf16, kTokens, d, a, 0, b, accumulate);
}

// ---- bits -------------------------------------------------------------------------------------------------------------

inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }
inline uint32_t lop3_and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }

}  // namespace qbert::cuda::sm90
