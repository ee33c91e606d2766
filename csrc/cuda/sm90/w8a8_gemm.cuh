// int8 x int8 -> int32 on Hopper's matrix units: CUTLASS 3.x collectives (TMA, warp-specialised, persistent) with the whole
// end of a linear as an epilogue visitor tree. Only the w8a8_<tile>.cu files include this; each makes the kernels of one tile.
#pragma once

// Before CUTLASS's headers. Its grids overlap with the one before: the warp that copies waits (griddepcontrol.wait) before its
// first copy. The warps that multiply and finish do not, but read s, which the grid before may have written, only after they
// have waited for a copy to arrive, which began after that wait. They let the next grid start after their last product.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include <atomic>

#include "cuda/common/finish.cuh"
#include "cuda/common/grid.h"
#include "cuda/sm90/arch.h"
#include "cuda/sm90/launch.h"

namespace qbert::cuda {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// What the nodes of a tree are asked for on the host, of nodes whose arguments are their parameters.
struct PlainNode {
    template <class Problem, class Arguments>
    static constexpr Arguments to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
        return arguments;
    }
    template <class Problem, class Arguments>
    static bool can_implement(const Problem&, const Arguments&) {
        return true;
    }
    template <class Problem, class Arguments>
    static size_t get_workspace_size(const Problem&, const Arguments&) {
        return 0;
    }
    template <class Problem, class Arguments>
    static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                                cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }
};

// A bias of any float type, as float32. CUTLASS's broadcast of a row is typed at compile time, which would triple the kernels.
template <class Tile>
struct BiasBroadcast : fusion::Sm90RowBroadcast<0, Tile, float>, PlainNode {
    using Base = fusion::Sm90RowBroadcast<0, Tile, float>;
    using typename Base::SharedStorage;
    using PlainNode::can_implement;
    using PlainNode::get_workspace_size;
    using PlainNode::initialize_workspace;
    using PlainNode::to_underlying_arguments;

    struct Arguments {
        const void* bias = nullptr;
        FloatType type = FloatType::f32;
    };
    using Params = Arguments;

    CUTLASS_HOST_DEVICE BiasBroadcast() {}
    CUTLASS_HOST_DEVICE BiasBroadcast(const Params& params, const SharedStorage& storage)
        : Base({static_cast<const float*>(params.bias)}, storage), type(params.type) {}

    FloatType type = FloatType::f32;

    template <class BaseCallbacks>
    struct Callbacks : BaseCallbacks {
        FloatType type;

        CUTLASS_DEVICE Callbacks(BaseCallbacks&& base, FloatType type_) : BaseCallbacks(base), type(type_) {}

        CUTLASS_DEVICE float load(const float* at) const {
            const auto index = at - this->params.ptr_row;  // the base counts in floats, whatever lies there
            const void* bias = this->params.ptr_row;
            if (type == FloatType::f32) return *at;
            if (type == FloatType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(bias)[index]);
            return __half2float(static_cast<const __half*>(bias)[index]);
        }

        CUTLASS_DEVICE void begin() {
            Tensor from = filter_zeros(this->tGS_gRow);
            Tensor to = filter_zeros(this->tGS_sRow);
            Tensor at = filter_zeros(this->tGS_cRow, this->tGS_gRow.stride());
            for (int i = 0; i < size(from); ++i) {
                if (get<1>(at(i)) >= size<1>(Tile{})) continue;  // more threads than columns
                const bool here = this->params.ptr_row != nullptr && elem_less(at(i), this->residue_cRow);
                to(i) = here ? load(&from(i)) : 0.0f;
            }
        }
    };

    template <bool ReferenceSrc, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
        auto base = Base::template get_consumer_store_callbacks<ReferenceSrc>(args);
        return Callbacks<decltype(base)>(std::move(base), type);
    }
};

template <class Out, int N>
struct Round;

template <int N>
struct Round<float, N> {
    CUTLASS_DEVICE static cutlass::Array<float, N> to(const cutlass::Array<float, N>& y, const Finish&) { return y; }
};

// bfloat16 or float16 by a flag: the store moves 16 bits in either case, so one kernel serves both.
template <int N>
struct Round<uint16_t, N> {
    template <class Half>
    CUTLASS_DEVICE static cutlass::Array<uint16_t, N> as(const cutlass::Array<float, N>& y) {
        const auto half = cutlass::NumericArrayConverter<Half, float, N>{}(y);
        return reinterpret_cast<const cutlass::Array<uint16_t, N>&>(half);
    }
    CUTLASS_DEVICE static cutlass::Array<uint16_t, N> to(const cutlass::Array<float, N>& y, const Finish& finish) {
        return finish.float_type == FloatType::bf16 ? as<cutlass::bfloat16_t>(y) : as<cutlass::half_t>(y);
    }
};

template <int N>
struct Round<int8_t, N> {
    CUTLASS_DEVICE static cutlass::Array<int8_t, N> to(const cutlass::Array<float, N>& y, const Finish& finish) {
        cutlass::Array<int8_t, N> codes;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
            codes[i] = static_cast<int8_t>(round_to_int8(y[i], finish));
        }
        return codes;
    }
};

// What reference.finish and reference.requantize do, in their order: (sum * scale[n]) * s[t] + bias[n], then none or GELU, then
// one rounding. The intrinsics are never fused into a multiply-add, which would round once where the reference rounds twice.
template <class Out>
struct FinishLinear : PlainNode {
    struct SharedStorage {};
    using Arguments = Finish;
    using Params = Finish;

    CUTLASS_HOST_DEVICE FinishLinear() : params() {}
    CUTLASS_HOST_DEVICE FinishLinear(const Params& params_, const SharedStorage&) : params(params_) {}

    Params const params;

    CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
    CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

    template <class... Args>
    CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::ProducerLoadArgs<Args...>&) {
        return fusion::EmptyProducerLoadCallbacks{};
    }

    struct ConsumerStoreCallbacks : fusion::EmptyConsumerStoreCallbacks {
        CUTLASS_DEVICE explicit ConsumerStoreCallbacks(const Params& params_) : params(params_) {}
        const Params& params;

        template <int N>
        CUTLASS_DEVICE cutlass::Array<Out, N> visit(const cutlass::Array<int32_t, N>&, int, int, int,
                                                    const cutlass::Array<int32_t, N>& sum,
                                                    const cutlass::Array<float, N>& scale, const cutlass::Array<float, N>& s,
                                                    const cutlass::Array<float, N>& bias) {
            cutlass::Array<float, N> y;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < N; ++i) {
                y[i] = __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum[i]), scale[i]), s[i]), bias[i]);
            }
            if (params.activation == Activation::gelu) {
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < N; ++i) y[i] = gelu(y[i]);
            }
            return Round<Out, N>::to(y, params);
        }
    };

    template <bool ReferenceSrc, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>&) {
        return ConsumerStoreCallbacks(params);
    }
};

// The kernel of one tile with results of one size.
template <TileIndex kIndex, class Out>
struct W8a8Gemm {
    static constexpr Tile kTile = kTiles[kIndex];
    static constexpr bool kPingpong = kTile.schedule == cuda::Schedule::pingpong;
    static constexpr int kOutAlignment = kAlignment / sizeof(Out);
    using TileShape = Shape<Int<kTile.t>, Int<kTile.n>, Int<kTile.k>>;
    using ClusterShape = Shape<Int<kTile.cluster>, _1, _1>;
    using Schedule = std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                        cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
    using EpilogueSchedule = std::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                                cutlass::epilogue::TmaWarpSpecializedCooperative>;
    using RowMajor = cutlass::layout::RowMajor;

    using Tree = fusion::Sm90EVT<FinishLinear<Out>, fusion::Sm90AccFetch, fusion::Sm90RowBroadcast<0, TileShape, float>,
                                 fusion::Sm90ColBroadcast<0, TileShape, float>, BiasBroadcast<TileShape>>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
        cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, RowMajor, kOutAlignment, Out, RowMajor,
        kOutAlignment, EpilogueSchedule, Tree>::CollectiveOp;
    using Stages = cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, RowMajor, kAlignment, int8_t,
        cutlass::layout::ColumnMajor, kAlignment, int32_t, TileShape, ClusterShape, Stages, Schedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                        cutlass::gemm::PersistentScheduler>;
};

// A matrix's strides as CUTLASS wants them: rows a pitch apart, elements neighbours, one matrix.
inline Stride<int64_t, _1, int64_t> rows_apart(int64_t pitch) { return {pitch, _1{}, int64_t{0}}; }

template <class Gemm, class Out>
typename Gemm::Kernel::Arguments kernel_arguments(const W8a8Linear& a, const Device& device) {
    typename Gemm::Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {static_cast<int>(a.t), static_cast<int>(a.n), static_cast<int>(a.k), 1};
    arguments.mainloop = {a.q, rows_apart(a.q_pitch), a.weight, rows_apart(a.weight_pitch)};
    arguments.epilogue.thread = {{}, {a.scale}, {a.s}, {a.bias, a.bias_type}, a.finish};  // the tree's leaves, then its root
    arguments.epilogue.ptr_D = static_cast<Out*>(a.out);
    arguments.epilogue.dD = rows_apart(a.out_pitch);
    arguments.hw_info = {device.index, device.sm_count};
    return arguments;
}

template <TileIndex kIndex, class Out>
void launch_kernel(const W8a8Linear& linear, const Launch& launch) {
    using Gemm = W8a8Gemm<kIndex, Out>;
    using Kernel = typename Gemm::Kernel;
    static_assert(Kernel::SharedStorageSize <= kH100.cta_shared);
    auto params = Kernel::to_underlying_arguments(kernel_arguments<Gemm, Out>(linear, launch.device), nullptr);
    const dim3 blocks = Kernel::get_grid_shape(params);

    Grid grid{};
    grid.x = blocks.x;
    grid.y = blocks.y;  // one matrix: blocks.z is 1
    grid.threads = Kernel::get_block_shape().x;
    grid.shared_bytes = Kernel::SharedStorageSize;
    grid.cluster = static_cast<unsigned>(kTiles[kIndex].cluster);
    grid.overlap = true;
    static std::atomic<uint64_t> allowed{0};
    const auto kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
    prepare_kernel(kernel, launch.device, allowed);
    void* arguments[] = {&params};
    launch_prepared(kernel, grid, launch, arguments, description_of(kTiles[kIndex], linear).text);
}

template <TileIndex kIndex>
void launch_w8a8(const W8a8Linear& linear, const Launch& launch) {
    if (linear.requantize) {
        launch_kernel<kIndex, int8_t>(linear, launch);
    } else if (linear.finish.float_type == FloatType::f32) {
        launch_kernel<kIndex, float>(linear, launch);
    } else {
        launch_kernel<kIndex, uint16_t>(linear, launch);
    }
}

}  // namespace qbert::cuda
