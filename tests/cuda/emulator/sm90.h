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
void take_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24, 32 ... 256");
    set_registers(kRegisters);
}
template <int kRegisters>
void give_registers() {
    take_registers<kRegisters>();
}

// ---- shared memory and clusters ---------------------------------------------------------------------------------------

unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);

unsigned cluster_rank();
void cluster_arrive();
inline void cluster_arrive_relaxed() { cluster_arrive(); }
void cluster_wait();
inline void cluster_sync() { cluster_arrive(), cluster_wait(); }

void* map_to_block(const void* shared, unsigned rank);
template <class T>
T* in_block(T* shared, unsigned rank) {
    return static_cast<T*>(map_to_block(shared, rank));
}

void named_barrier_sync(unsigned id, unsigned threads);
void named_barrier_arrive(unsigned id, unsigned threads);

// ---- barriers in shared memory ----------------------------------------------------------------------------------------

struct alignas(8) Barrier {
    uint64_t word;
};
void barrier_init(Barrier& barrier, unsigned arrivals);
void fence_barrier_init();
void barrier_arrive(Barrier& barrier);
void barrier_arrive_in_block(Barrier& barrier, unsigned rank);
void barrier_arrive_expect(Barrier& barrier, unsigned bytes);
void barrier_wait(Barrier& barrier, unsigned parity);
inline void fence_shared_for_async() {}

// ---- copies -----------------------------------------------------------------------------------------------------------

enum class Keep : uint64_t { normal, first_out, last_out };

void prefetch_map(const TensorMap& map);
void copy_box(void* to, const TensorMap& map, int column, int row, Barrier& barrier, Keep keep = Keep::normal);
void copy_box_to_blocks(void* to, const TensorMap& map, int column, int row, Barrier& barrier, uint16_t blocks,
                        Keep keep = Keep::normal);
void copy_bytes(void* to, const void* from, unsigned bytes, Barrier& barrier, Keep keep = Keep::normal);
inline void prefetch_bytes(const void*, int64_t) {}

// ---- products of a warp group -----------------------------------------------------------------------------------------

void products_begin();
void products_commit();
void wait_for_products(unsigned batches);
template <int kBatches>
void products_wait() {
    wait_for_products(kBatches);
}
template <class T, int kCount>
void keep_in_place(T (&)[kCount]) {
    static_assert(sizeof(T) == 4);
}

struct Half {};
struct BFloat {};

enum class Operands { s8, f16, bf16 };
// One product of a warp group: `a` is in the registers of its threads, or, where that is null, in shared memory.
void issue_product(Operands operands, int tokens, void* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                   bool accumulate);

constexpr bool tokens_allowed(int tokens, int most) {
    return tokens >= 8 && tokens <= most && (tokens & (tokens - 1)) == 0;  // the sizes that sm90.cuh names
}
template <int kTokens>
void multiply_s8(int32_t (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(tokens_allowed(kTokens, 256));
    issue_product(Operands::s8, kTokens, d, a, 0, b, accumulate);
}
template <int kTokens>
void multiply_s8(int32_t (&d)[kTokens / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(tokens_allowed(kTokens, 256));
    issue_product(Operands::s8, kTokens, d, nullptr, a, b, accumulate);
}
template <class Float, int kTokens>
void multiply_float(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(tokens_allowed(kTokens, 64));
    constexpr bool kHalf = std::is_same_v<Float, Half>;
    static_assert(kHalf || std::is_same_v<Float, BFloat>);
    issue_product(kHalf ? Operands::f16 : Operands::bf16, kTokens, d, a, 0, b, accumulate);
}

// ---- bits -------------------------------------------------------------------------------------------------------------

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }
inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }

}  // namespace qbert::cuda::sm90
