// What an H100 can do, and how long its parts take: every number of the machine that an estimate (cost.h) or a kernel's shared
// memory goes by. Of one SM and one cycle where nothing else is said.
#pragma once

namespace qbert::cuda {

struct ArchSpec {
    int sm_count = 132;
    int gpcs = 8;  // parts of the GPU, of at least 16 SMs each; a cluster lies on one

    // Rates. Products by NVIDIA's 1979 TOPS, memory by its 3.35 TB/s; L2 by what published kernels have reached.
    double s8_macs = 4096;  // multiply-adds of int8; of 16 bits half as many
    double float_lanes = 128;
    double integer_issue_cycles = 2;  // of a scheduler, until it can begin the next one of a warp
    double memory_bytes = 14.5;
    double l2_bytes = 64;        // where few SMs ask
    double l2_bytes_all = 4224;  // of all SMs together
    double shared_bytes = 115;   // of 128: copies and products that share it never use it all

    // Latencies, in cycles.
    double launch = 2000;           // launch, barriers, descriptors, and the first tile's way from memory
    double overlapped_launch = 1300;  // the same where the weight is on its way before the grid before has ended
    double cluster_exchange = 600;  // sums from CTA to CTA of a cluster, between two of its barriers

    // Sizes, in bytes.
    int cta_shared = 227 * 1024;  // that a CTA can have
    int cta_reserved = 1024;      // that every CTA costs an SM besides
    int l2_kept = 32 << 20;       // of L2's 50 MB: weights up to so many may stay there from one forward to the next
};

inline constexpr ArchSpec kH100{};

}  // namespace qbert::cuda
