// For test_emulator.py: one feature of the machine at a time; and the module `_emulator_kernels`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/common/bind.h"
#include "cuda/common/gelu.cuh"
#include "cuda/common/grid.h"
#include "cuda/sm90/sm90.cuh"
#include "emulator/bind.h"
#include "emulator/kernels.h"

namespace qbert::cuda {
namespace {

using namespace sm90;

// ---- one product ------------------------------------------------------------------------------------------------------

struct OneProduct {
    const uint32_t* a;  // (128, 4): registers; or null, and then
    TensorMap rows;     // (64, 128 bytes)
    TensorMap tokens;   // (8, 128 bytes)
    int step;           // of 32 bytes
    int32_t* d;         // (128, 4)
    uint32_t* shared;   // (8, 32) words: the tokens as they lie
};

template <class Operand>
__global__ void one_product(const __grid_constant__ OneProduct p) {
    unsigned char* rows = shared_memory();
    unsigned char* tokens = rows + 64 * 128;
    Mbarrier& full = *reinterpret_cast<Mbarrier*>(tokens + 8 * 128);
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(full, 72 * 128);
        tma_load(rows, p.rows, 0, 0, full);
        tma_load(tokens, p.tokens, 0, 0, full);
    }
    __syncthreads();
    mbarrier_wait(full, 0);
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = p.a == nullptr ? 0 : p.a[threadIdx.x * 4 + i];
    std::conditional_t<std::is_same_v<Operand, int8_t>, int32_t, float> d[4] = {77, 77, 77, 77};
    const uint64_t b = smem_descriptor(shared_address(tokens) + 32 * p.step);
    warpgroup_arrive();
    if constexpr (!std::is_same_v<Operand, int8_t>) {
        wgmma_float<Operand, 8>(d, a, b, false);
    } else if (p.a == nullptr) {
        wgmma_s8<8>(d, smem_descriptor(shared_address(rows) + 32 * p.step), b, false);
    } else {
        wgmma_s8<8>(d, a, b, false);
    }
    warpgroup_commit();
    warpgroup_wait<0>();
    std::memcpy(p.d + threadIdx.x * 4, d, sizeof(d));
    if (threadIdx.x < 32) std::memcpy(p.shared + threadIdx.x * 8, tokens + threadIdx.x * 32, 32);
}

void run_one_product(uintptr_t a, uintptr_t rows, uintptr_t tokens, int step, uintptr_t d, uintptr_t shared,
                     const std::string& operand) {
    const int bytes = operand == "s8" ? 1 : 2, columns = 128 / bytes;
    const OneProduct p{at<uint32_t>(a),
                       tensor_map(at<void>(rows), 64, columns, columns, bytes, 64),
                       tensor_map(at<void>(tokens), 8, columns, columns, bytes, 8),
                       step,
                       at<int32_t>(d),
                       at<uint32_t>(shared)};
    const Grid grid{1, 1, 128, 72 * 128 + 8};
    const Launch launch{current_device(), nullptr};
    if (operand == "s8") return launch_grid<one_product<int8_t>>(grid, launch, p, "a product");
    if (operand == "f16") return launch_grid<one_product<Half>>(grid, launch, p, "a product");
    launch_grid<one_product<BFloat>>(grid, launch, p, "a product");
}

// ---- boxes ------------------------------------------------------------------------------------------------------------

struct OneBox {
    TensorMap map;
    int column, row;
    uint32_t* out;  // (box rows, 32) words
};

__global__ void one_box(const __grid_constant__ OneBox p) {
    unsigned char* box = shared_memory();
    const unsigned bytes = static_cast<unsigned>(p.map.box_rows) * 128;
    Mbarrier& full = *reinterpret_cast<Mbarrier*>(box + bytes);
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(full, bytes);
        tma_load(box, p.map, p.column, p.row, full);
    }
    __syncthreads();
    mbarrier_wait(full, 0);
    for (unsigned at = threadIdx.x; at < bytes / 4; at += 32) p.out[at] = reinterpret_cast<uint32_t*>(box)[at];
}

void run_one_box(uintptr_t data, int64_t rows, int64_t columns, int64_t pitch, int element_bytes, int box_rows, int column,
                 int row, uintptr_t out) {
    const OneBox p{tensor_map(at<void>(data), rows, columns, pitch, element_bytes, box_rows), column, row,
                   at<uint32_t>(out)};
    launch_grid<one_box>({1, 1, 32, static_cast<unsigned>(box_rows) * 128 + 8}, {current_device(), nullptr}, p, "a box");
}

// ---- small faults -----------------------------------------------------------------------------------------------------

struct Probe {
    int which;
    int* out;
};

__device__ Mbarrier& barrier_of(unsigned offset) { return *reinterpret_cast<Mbarrier*>(shared_memory() + offset); }

// 64 threads, clusters of 2, 1024 bytes of shared memory. Each does what its name in kProbes says.
__global__ void probe(const __grid_constant__ Probe p) {
    const unsigned thread = threadIdx.x, rank = cluster_rank();
    int* memory = reinterpret_cast<int*>(shared_memory());
    switch (p.which) {
        case 0:  // warps
            p.out[blockIdx.x * 64 + thread] = __shfl_xor_sync(0xffffffffu, static_cast<int>(thread), 5) +
                                              100 * __shfl_up_sync(0xffffffffu, static_cast<int>(thread), 3, 16) +
                                              10000 * __reduce_add_sync(0xffffffffu, 1);
            break;
        case 1:  // a neighbour's memory
            memory[thread] = static_cast<int>(100 * rank + thread);
            cluster_sync();
            p.out[blockIdx.x * 64 + thread] = *in_cta(memory + thread, rank ^ 1);
            cluster_sync();
            break;
        case 2:  // lanes disagree
            if (thread % 32 < 16) __syncwarp();
            else __shfl_sync(0xffffffffu, 1, 0);
            break;
        case 3:  // a lane is missing
            if (thread != 5) __syncwarp();
            break;
        case 4:  // a named barrier of two sizes
            named_barrier_sync(3, thread < 32 ? 64 : 32);
            break;
        case 5:  // a named barrier that not all reach
            if (thread < 32) named_barrier_sync(3, 64);
            break;
        case 6:  // written beyond shared memory
            memory[256 + thread] = 0;
            break;
        case 7:  // never initialised
            mbarrier_wait(barrier_of(64), 0);
            break;
        case 8:  // not in shared memory
            mbarrier_init(*reinterpret_cast<Mbarrier*>(p.out), 1);
            break;
        case 9:  // misaligned
            if (thread == 0) mbarrier_init(barrier_of(4), 1);
            break;
        case 10:  // waits for a cluster that never comes
            if (rank == 0) cluster_sync();
            else cluster_arrive();
            if (rank == 1 && thread == 0) named_barrier_sync(1, 32);
            break;
        case 11:  // 8 bytes
            if (thread == 0) {
                mbarrier_init(barrier_of(0), 1);
                fence_mbarrier_init();
                bulk_copy(memory + 64, p.out, 8, barrier_of(0));
            }
            break;
        case 12:  // under way at the end
            if (thread == 0) {
                mbarrier_init(barrier_of(0), 1);
                fence_mbarrier_init();
                mbarrier_arrive_expect_tx(barrier_of(0), 16);
                bulk_copy(memory + 64, p.out, 16, barrier_of(0));
            }
            break;
        case 13:  // into a block that has ended
            cluster_sync();
            if (rank == 1) memory = in_cta(memory, 0);
            cluster_sync();
            if (rank == 1) memory[thread] = 1;
            break;
        case 14:  // half a warpgroup
            warpgroup_arrive();
            warpgroup_commit();
            break;
        case 15:  // the barrier is overwritten
            if (thread == 0) mbarrier_init(barrier_of(0), 1), memory[0] = 0, mbarrier_arrive(barrier_of(0));
            break;
        case 16:  // beyond the cluster
            cluster_sync();
            in_cta(memory, 2);
            break;
    }
}

void run_probe(int which, uintptr_t out) {
    const Probe p{which, at<int>(out)};
    launch_grid<probe>({2, 1, 64, 1024, 2}, {current_device(), nullptr}, p, "a probe");
}

void run_shape(unsigned x, unsigned y, unsigned threads, unsigned shared_bytes, unsigned cluster) {
    launch_grid<probe>({x, y, threads, shared_bytes, cluster}, {current_device(), nullptr}, Probe{-1, nullptr}, "nothing");
}

void gelu_of(uintptr_t x, uintptr_t y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) at<float>(y)[i] = gelu(at<const float>(x)[i]);
}

}  // namespace
}  // namespace qbert::cuda

PYBIND11_MODULE(_emulator_kernels, module) {
    using namespace qbert::cuda;
    bind_emulator(module);
#define QBERT_NAME(name) #name,
    module.attr("FAULTS") = std::vector<std::string>{QBERT_FAULTS(QBERT_NAME)};
    module.def("pipeline", &run_pipeline);
    module.def("one_product", &run_one_product);
    module.def("one_box", &run_one_box);
    module.def("probe", &run_probe);
    module.def("shape", &run_shape);
    module.def("gelu", &gelu_of);
}
