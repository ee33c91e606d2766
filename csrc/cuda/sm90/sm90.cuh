// Hopper's machinery as functions: barriers in shared memory, the copy engine (TMA), the matrix units of a warpgroup (wgmma)
// and clusters. The instructions are CUTLASS's wrappers where it has them.
//
// Hand-written kernels touch the hardware through this header alone. With QBERT_EMULATED the same names come from the tests,
// which run a kernel's own source on a CPU: threads as fibres, copies and products late, as late as the barriers allow.
#pragma once

#ifdef QBERT_EMULATED
#include "emulator/sm90.h"
#else

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cuda/common/pdl.cuh"
#include "cuda/sm90/tensor_map.h"

namespace qbert::cuda::sm90 {

// ---- threads ----------------------------------------------------------------------------------------------------------

// The same in all lanes of a warp, and the compiler knows it.
__device__ inline int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

// True in one lane of a warp whose lanes are all here.
__device__ inline bool elect_one() { return cute::elect_one_sync(); }

// Registers of a thread, for the whole warpgroup: those that one gives up another may take. Multiples of 8.
template <int kRegisters>
__device__ inline void setmaxnreg_inc() {
    cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}
template <int kRegisters>
__device__ inline void setmaxnreg_dec() {
    cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}

// Accesses of memory stay on their side of this. CUTLASS's barriers are volatile but do not say that they order memory.
__device__ inline void compiler_fence() { asm volatile("" ::: "memory"); }

// ---- shared memory and clusters ---------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 1024 bytes, which is what swizzled tiles are aligned to.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}
__device__ inline uint32_t shared_address(const void* pointer) { return cute::cast_smem_ptr_to_uint(pointer); }

__device__ inline unsigned cluster_rank() { return cute::block_rank_in_cluster(); }
__device__ inline void cluster_arrive() { compiler_fence(), cute::cluster_arrive(); }  // releases what this thread wrote
// Releases nothing, and so waits for no write: to say that a block has begun, or has read what it wanted.
__device__ inline void cluster_arrive_relaxed() { compiler_fence(), cute::cluster_arrive_relaxed(); }
// Acquires what all wrote before they arrived.
__device__ inline void cluster_wait() { cute::cluster_wait(), compiler_fence(); }
__device__ inline void cluster_sync() { cluster_arrive(), cluster_wait(); }

// The place of the same variable in the shared memory of another CTA of the cluster, to read and to write.
template <class T>
__device__ T* in_cta(T* shared, unsigned rank) {
    return static_cast<T*>(__cluster_map_shared_rank(const_cast<std::remove_const_t<T>*>(shared), rank));
}

// Of a number of threads, a multiple of 32; identifiers 1 ... 15 (0 is __syncthreads).
__device__ inline void named_barrier_sync(unsigned id, unsigned threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(unsigned id, unsigned threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- barriers in shared memory ----------------------------------------------------------------------------------------

// Completes a phase when so many threads have arrived and so many bytes as they announced have been copied. The first wait is
// for parity 0; a wait for parity 1 of a fresh barrier does not wait.
struct alignas(8) Mbarrier {
    uint64_t word;
};
__device__ inline void mbarrier_init(Mbarrier& barrier, unsigned arrivals) {
    cutlass::arch::ClusterBarrier::init(&barrier.word, arrivals);
}
// After all inits, by the thread that made them: the copy engine and the cluster see them (then sync).
__device__ inline void fence_mbarrier_init() { compiler_fence(), cutlass::arch::fence_barrier_init(); }
__device__ inline void mbarrier_arrive(Mbarrier& barrier) {
    compiler_fence();
    cutlass::arch::ClusterBarrier::arrive(&barrier.word);
}
__device__ inline void mbarrier_arrive_cluster(Mbarrier& barrier, unsigned rank) {
    compiler_fence();
    cutlass::arch::ClusterBarrier::arrive(&barrier.word, rank, 1);
}
__device__ inline void mbarrier_arrive_expect_tx(Mbarrier& barrier, unsigned bytes) {
    compiler_fence();
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&barrier.word, bytes);
}
__device__ inline void mbarrier_wait(Mbarrier& barrier, unsigned parity) {
    cutlass::arch::ClusterBarrier::wait(&barrier.word, parity);
    compiler_fence();
}
// Between this thread's own writes to shared memory and their use by the copy engine or the matrix units.
__device__ inline void fence_proxy_async() { compiler_fence(), cutlass::arch::fence_view_async_shared(); }

// ---- copies -----------------------------------------------------------------------------------------------------------

// What L2 should do with the bytes: keep what others read too, forget what is read once.
enum class CacheHint : uint64_t {
    normal = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
    evict_first = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
    evict_last = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
};

__device__ inline void prefetch_tensor_map(const TensorMap& map) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
}
// A box of a matrix, its first column and row given, zeros where it hangs over the edge; one thread starts it. The barrier
// hears of all bytes of the box.
__device__ inline void tma_load(void* to, const TensorMap& map, int column, int row, Mbarrier& barrier,
                                CacheHint hint = CacheHint::normal) {
    cute::SM90_TMA_LOAD_2D::copy(&map, &barrier.word, static_cast<uint64_t>(hint), to, column, row);
}
// The same to the same place in all CTAs of the cluster whose bit is set; each one's own barrier hears of it.
__device__ inline void tma_load_multicast(void* to, const TensorMap& map, int column, int row, Mbarrier& barrier,
                                          uint16_t blocks, CacheHint hint = CacheHint::normal) {
    cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, &barrier.word, blocks, static_cast<uint64_t>(hint), to, column, row);
}
// Neighbouring bytes, a multiple of 16 at multiples of 16.
__device__ inline void bulk_copy(void* to, const void* from, unsigned bytes, Mbarrier& barrier,
                                 CacheHint hint = CacheHint::normal) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(&barrier.word)), "l"(static_cast<uint64_t>(hint))
        : "memory");
}
// Bytes to L2, for loads to come: no more than a hint.
__device__ inline void bulk_prefetch(const void* from, int64_t bytes) {
    // Whole pieces of 16, whose page is the bytes' own.
    const uint64_t start = reinterpret_cast<uint64_t>(from) & ~uint64_t{15};
    const uint64_t past = (reinterpret_cast<uint64_t>(from) + static_cast<uint64_t>(bytes) + 15) & ~uint64_t{15};
    const auto length = static_cast<uint32_t>(past - start);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(start), "r"(length) : "memory");
}

// ---- products of a warpgroup -----------------------------------------------------------------------------------------

// Before the first product of a batch, and after registers that products read or add to have been written.
__device__ inline void warpgroup_arrive() { cute::warpgroup_arrive(); }
__device__ inline void warpgroup_commit() { cute::warpgroup_commit_batch(); }
// Until at most so many committed batches are under way. What they read and add to is not touched before.
template <int kBatches>
__device__ inline void warpgroup_wait() {
    cute::warpgroup_wait<kBatches>();
}
// Keeps the compiler from moving accesses of registers across the products that use them.
template <class T, int kCount>
__device__ void warpgroup_fence_operand(T (&registers)[kCount]) {
    static_assert(sizeof(T) == 4);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if constexpr (std::is_same_v<T, float>) {
            asm volatile("" : "+f"(registers[i])::"memory");
        } else {
            asm volatile("" : "+r"(registers[i])::"memory");
        }
    }
}

namespace wgmma = cute::SM90::GMMA;

template <int kTokens>
struct WgmmaS8;  // 64 x kTokens x 32
#define QBERT_WGMMA_S8(tokens)                                 \
    template <>                                                  \
    struct WgmmaS8<tokens> {                                   \
        using Registers = wgmma::MMA_64x##tokens##x32_S32S8S8_RS_TN; \
        using Shared = wgmma::MMA_64x##tokens##x32_S32S8S8_SS_TN;    \
    };
QBERT_WGMMA_S8(8)
QBERT_WGMMA_S8(16)
QBERT_WGMMA_S8(32)
QBERT_WGMMA_S8(64)
QBERT_WGMMA_S8(128)
#undef QBERT_WGMMA_S8

struct Half {};      // float16
struct BFloat {};    // bfloat16
template <class Float, int kTokens>
struct WgmmaFloat;  // 64 x kTokens x 16
#define QBERT_WGMMA_FLOAT(tokens)                                                                                        \
    template <>                                                                                                            \
    struct WgmmaFloat<Half, tokens> {                                                                                    \
        using Registers = wgmma::MMA_64x##tokens##x16_F32F16F16_RS<wgmma::Major::K, wgmma::Major::K>;                      \
    };                                                                                                                     \
    template <>                                                                                                            \
    struct WgmmaFloat<BFloat, tokens> {                                                                                  \
        using Registers = wgmma::MMA_64x##tokens##x16_F32BF16BF16_RS<wgmma::Major::K, wgmma::Major::K>;                    \
    };
QBERT_WGMMA_FLOAT(8)
QBERT_WGMMA_FLOAT(16)
QBERT_WGMMA_FLOAT(32)
QBERT_WGMMA_FLOAT(64)
#undef QBERT_WGMMA_FLOAT

template <class Product, class T, size_t... kAt>
__device__ void issue_wgmma(T* d, const uint32_t (&a)[4], uint64_t b, bool accumulate, std::index_sequence<kAt...>) {
    Product::fma(a[0], a[1], a[2], a[3], b, d[kAt]..., accumulate ? wgmma::ScaleOut::One : wgmma::ScaleOut::Zero);
}
template <class Product, class T, size_t... kAt>
__device__ void issue_wgmma(T* d, uint64_t a, uint64_t b, bool accumulate, std::index_sequence<kAt...>) {
    Product::fma(a, b, d[kAt]..., accumulate ? wgmma::ScaleOut::One : wgmma::ScaleOut::Zero);
}

// d (64, kTokens) (+)= a (64, 32) b (kTokens, 32)^T in int8, by all 128 threads, begun and not waited for. Lane l of warp w
// holds
//     a[i], byte e:        row 16 w + l / 4 + 8 (i % 2), column 16 (i / 2) + 4 (l % 4) + e
//     d[4 j + 2 i + e]:    row 16 w + l / 4 + 8 i, token 8 j + 2 (l % 4) + e
// Without `accumulate` d is overwritten.
template <int kTokens>
__device__ void wgmma_s8(int32_t (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    issue_wgmma<typename WgmmaS8<kTokens>::Registers>(reinterpret_cast<uint32_t*>(d), a, b, accumulate,
                                                      std::make_index_sequence<kTokens / 2>());
}
// The same with a in shared memory.
template <int kTokens>
__device__ void wgmma_s8(int32_t (&d)[kTokens / 2], uint64_t a, uint64_t b, bool accumulate) {
    issue_wgmma<typename WgmmaS8<kTokens>::Shared>(reinterpret_cast<uint32_t*>(d), a, b, accumulate,
                                                   std::make_index_sequence<kTokens / 2>());
}
// d (64, kTokens) (+)= a (64, 16) b (kTokens, 16)^T, a and b of Float (Half or BFloat). Lane l of warp w holds
//     a[i], half e:        row 16 w + l / 4 + 8 (i % 2), column 8 (i / 2) + 2 (l % 4) + e
// and d as above.
template <class Float, int kTokens>
__device__ void wgmma_float(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    issue_wgmma<typename WgmmaFloat<Float, kTokens>::Registers>(d, a, b, accumulate,
                                                                std::make_index_sequence<kTokens / 2>());
}

// ---- bits -------------------------------------------------------------------------------------------------------------

// Byte i of the result is the byte of {high, low} that nibble i of `selector` names, of its low 16 bits; a nibble's bit 3
// replicates the byte's sign instead.
__device__ inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}
// (a & b) ^ c in one instruction, where the compiler makes two of constants b and c.
__device__ inline uint32_t lop3_and_xor(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

}  // namespace qbert::cuda::sm90

#endif  // QBERT_EMULATED

namespace qbert::cuda::sm90 {

// ---- descriptors of operands ------------------------------------------------------------------------------------------

// An operand in shared memory: rows of 128 bytes along k, eight rows to 1024 bytes, swizzled as tma_load leaves them (16-byte
// piece p of row r lies in place p ^ (r % 8)). `start` is of the tile's first row plus a multiple of 32 bytes along k.
__device__ inline uint64_t smem_descriptor(uint32_t start) {
    constexpr uint64_t kEightRows = 1024, kSwizzle128 = 1;
    return uint64_t{(start & 0x3ffff) >> 4} | uint64_t{1} << 16 | (kEightRows >> 4) << 32 | kSwizzle128 << 62;
}
// The operand so many bytes further, a multiple of 16.
__device__ inline uint64_t descriptor_advance(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

}  // namespace qbert::cuda::sm90
