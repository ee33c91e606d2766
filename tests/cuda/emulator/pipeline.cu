// For test_emulator.py: a product as the kernels of csrc/cuda make it (a copying warp, a multiplying warpgroup, stages in
// between, tokens shared by the CTAs of a cluster), right, and with one of the faults that a GPU punishes.
#include "cuda/common/bind.h"
#include "cuda/common/grid.h"
#include "cuda/sm90/sm90.cuh"
#include "emulator/kernels.h"

namespace qbert::cuda {
namespace {

using namespace sm90;

constexpr int kRows = 64, kTokens = 64, kBoxBytes = 128, kSteps = 4;  // a stage: 128 bytes along k, 4 products
constexpr int kStages = 3;

struct Problem {
    TensorMap tokens;      // boxes of 64 / cluster rows
    const uint32_t* rows;  // (64 cluster, stages of k, 32) words: the bytes of A, plain
    void* out;             // (64 cluster, 64)
    int blocks_of_k;       // of 128 bytes
    Fault fault;
};

struct Shared {
    alignas(1024) unsigned char tokens[kStages][kTokens * kBoxBytes];
    Mbarrier full[kStages], empty[kStages];
};

template <class Operand>
using Sum = std::conditional_t<std::is_same_v<Operand, int8_t>, int32_t, float>;

template <class Operand>
__device__ void multiply(Sum<Operand> (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (std::is_same_v<Operand, int8_t>) {
        wgmma_s8<kTokens>(d, a, b, true);
    } else {
        wgmma_float<Operand, kTokens>(d, a, b, true);
    }
}

__device__ void copy_tokens(const Problem& p, Shared& shared) {
    const unsigned blocks = gridDim.x, rank = cluster_rank();
    const int own_rows = kTokens / static_cast<int>(blocks);
    unsigned phase = 0;
    for (int k = 0, stage = 0; k < p.blocks_of_k; ++k) {
        if (p.fault != Fault::no_wait_for_empty) mbarrier_wait(shared.empty[stage], phase ^ 1);
        const int wrong = p.fault == Fault::too_many_bytes ? 16 : p.fault == Fault::too_few_bytes ? -16 : 0;
        mbarrier_arrive_expect_tx(shared.full[stage], static_cast<unsigned>(kTokens * kBoxBytes + wrong));
        unsigned char* to = shared.tokens[stage] + rank * own_rows * kBoxBytes + (p.fault == Fault::misaligned_box ? 64 : 0);
        const int columns = kBoxBytes / p.tokens.element_bytes;
        tma_load_multicast(to, p.tokens, k * columns, static_cast<int>(rank) * own_rows, shared.full[stage],
                           static_cast<uint16_t>((1u << blocks) - 1));
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
}

__device__ void release(const Problem& p, Shared& shared, int stage) {
    if (threadIdx.x % 32 != 0) return;  // a warp's lanes have waited for the same products
    for (unsigned block = 0; block < gridDim.x; ++block) {
        if (p.fault == Fault::only_own_empty && block != cluster_rank()) continue;
        mbarrier_arrive_cluster(shared.empty[stage], block);
    }
}

__device__ void load_rows(const Problem& p, int k, uint32_t (&a)[kSteps][4]) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_index();
    for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < 4; ++i) {
            const int row = static_cast<int>(blockIdx.x) * kRows + 16 * warp + lane / 4 + 8 * (i % 2);
            a[step][i] = p.rows[(row * p.blocks_of_k + k) * 32 + 8 * step + 4 * (i / 2) + lane % 4];
        }
    }
}

template <class Operand>
__device__ void multiply_all(const Problem& p, Shared& shared) {
    Sum<Operand> d[kTokens / 2] = {};
    uint32_t a[2][kSteps][4];
    unsigned phase = p.fault == Fault::wrong_parity ? 1 : 0;
    for (int k = 0, stage = 0; k < p.blocks_of_k; ++k) {
        auto& rows = a[p.fault == Fault::registers_reused ? 0 : k % 2];
        if (p.fault == Fault::begun_early) warpgroup_arrive();
        load_rows(p, k, rows);
        if (p.fault != Fault::no_wait_for_full) mbarrier_wait(shared.full[stage], phase);
        if (p.fault != Fault::no_begin && p.fault != Fault::begun_early) warpgroup_arrive();
        for (int step = 0; step < kSteps; ++step) {
            multiply<Operand>(d, rows[step], smem_descriptor(shared_address(shared.tokens[stage]) + 32 * step));
        }
        warpgroup_commit();
        if (p.fault == Fault::released_early) {
            release(p, shared, stage);
        } else if (k > 0) {
            warpgroup_wait<1>();
            release(p, shared, (stage + kStages - 1) % kStages);
        }
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
    if (p.fault != Fault::read_early) warpgroup_wait<0>();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_index();
    for (int at = 0; at < kTokens / 2; ++at) {
        const int row = static_cast<int>(blockIdx.x) * kRows + 16 * warp + lane / 4 + 8 * (at / 2 % 2);
        static_cast<Sum<Operand>*>(p.out)[row * kTokens + 8 * (at / 4) + 2 * (lane % 4) + at % 2] = d[at];
    }
    if (p.fault == Fault::read_early) warpgroup_wait<0>();
}

template <class Operand>
__global__ void __launch_bounds__(160) pipeline(const __grid_constant__ Problem p) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    if (threadIdx.x == 0) {
        unsigned releases = 4 * (p.fault == Fault::only_own_empty ? 1 : gridDim.x);
        if (p.fault == Fault::too_few_arrivals) ++releases;
        if (p.fault == Fault::too_many_arrivals) --releases;
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(shared.full[stage], 1);
            mbarrier_init(shared.empty[stage], releases);
        }
        if (p.fault != Fault::no_fence) fence_mbarrier_init();
    }
    if (p.fault == Fault::no_first_sync) {
        __syncthreads();
    } else {
        cluster_sync();
    }
    if (p.fault != Fault::no_wait_for_grids) pdl_wait();
    if (warp_index() == 4) {
        if (elect_one()) copy_tokens(p, shared);
    } else {
        multiply_all<Operand>(p, shared);
    }
    if (p.fault != Fault::no_last_sync) cluster_sync();
}

template <class Operand>
void launch(const Problem& p, unsigned blocks) {
    Grid grid{};
    grid.x = grid.cluster = blocks;
    grid.y = 1;
    grid.threads = 160;
    grid.shared_bytes = sizeof(Shared);
    grid.overlap = true;
    launch_grid<pipeline<Operand>>(grid, {current_device(), nullptr}, p, "the pipeline");
}

}  // namespace

void run_pipeline(uintptr_t tokens, uintptr_t rows, uintptr_t out, int blocks_of_k, unsigned blocks, const std::string& operand,
                  int fault) {
    const int bytes = operand == "s8" ? 1 : 2, columns = blocks_of_k * kBoxBytes / bytes;
    Problem p{};
    p.tokens = tensor_map(at<void>(tokens), kTokens, columns, columns, bytes, kTokens / static_cast<int>(blocks));
    p.rows = at<uint32_t>(rows);
    p.out = at<void>(out);
    p.blocks_of_k = blocks_of_k;
    p.fault = static_cast<Fault>(fault);
    if (operand == "f16") return launch<Half>(p, blocks);
    if (operand == "bf16") return launch<BFloat>(p, blocks);
    launch<int8_t>(p, blocks);
}

}  // namespace qbert::cuda
