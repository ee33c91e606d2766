// Kernels with one fault each, which the checks of machine code must catch (test_cuda_build.py). Never launched.
#include "cuda/sm90/sm90.cuh"

namespace qbert::cuda::sm90 {

struct Problem {
    TensorMap q;
    const uint32_t* weight;
    int* out;
    int steps;
};

enum class Fault { none, serialized, a_from_shared, no_tma, no_prmt, no_overlap, in_local_memory };

inline constexpr int kTokens = 128;

// 64 rows of a weight times the tokens, a box of 128 columns a step.
template <Fault kFault>
__global__ void __launch_bounds__(128) kernel(const __grid_constant__ Problem p) {
    unsigned char* box = shared_memory();
    Mbarrier& full = *reinterpret_cast<Mbarrier*>(box + kTokens * 128);
    if (threadIdx.x == 0) mbarrier_init(full, 1), fence_mbarrier_init();
    __syncthreads();
    if constexpr (kFault != Fault::no_overlap) {
        pdl_wait();
        pdl_launch_dependents();
    }
    int32_t sums[kTokens / 2] = {};
    uint32_t history[16] = {};
    for (int step = 0; step < p.steps; ++step) {
        if constexpr (kFault == Fault::no_tma) {
            reinterpret_cast<uint32_t*>(box)[threadIdx.x] = p.weight[threadIdx.x + step];
            fence_proxy_async();
            __syncthreads();
        } else {
            if (threadIdx.x == 0) {
                mbarrier_arrive_expect_tx(full, kTokens * 128);
                tma_load(box, p.q, step * 128, 0, full);
            }
            mbarrier_wait(full, step & 1);
        }
        uint32_t a[4];
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = p.weight[(step * 4 + i) * 128 + threadIdx.x];
            a[i] = kFault == Fault::no_prmt ? word : prmt(0x03020100, 0x07060504, word);
        }
        if constexpr (kFault == Fault::in_local_memory) history[step % 16] = a[0];  // registers have no index
        const uint64_t b = smem_descriptor(shared_address(box));
        warpgroup_arrive();
        if constexpr (kFault == Fault::a_from_shared) {
            wgmma_s8<kTokens>(sums, b, b, true);
        } else {
            wgmma_s8<kTokens>(sums, a, b, true);
        }
        if constexpr (kFault == Fault::serialized) sums[0] += 1;  // what products under way add to
        warpgroup_commit();
        warpgroup_wait<0>();
        __syncthreads();
    }
    if constexpr (kFault == Fault::in_local_memory) sums[0] ^= static_cast<int>(history[p.steps % 16]);
    for (int i = 0; i < kTokens / 2; ++i) p.out[i * blockDim.x + threadIdx.x] = sums[i];
}

template __global__ void kernel<Fault::none>(const __grid_constant__ Problem);
template __global__ void kernel<Fault::serialized>(const __grid_constant__ Problem);
template __global__ void kernel<Fault::a_from_shared>(const __grid_constant__ Problem);
template __global__ void kernel<Fault::no_tma>(const __grid_constant__ Problem);
template __global__ void kernel<Fault::no_prmt>(const __grid_constant__ Problem);
template __global__ void kernel<Fault::no_overlap>(const __grid_constant__ Problem);
template __global__ void kernel<Fault::in_local_memory>(const __grid_constant__ Problem);

}  // namespace qbert::cuda::sm90
