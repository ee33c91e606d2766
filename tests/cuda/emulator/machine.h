// The emulated SMs: the blocks of one cluster, their threads as fibres, and the work that goes on by itself, which
// is done as late as it may be: when all threads wait, or at moments that the seed chooses.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/common/error.h"
#include "cuda/common/grid.h"
#include "cuda/sm90/tensor_map.h"
#include "emulator/cuda.h"
#include "emulator/fibre.h"
#include "emulator/sm90.h"

namespace qbert::cuda::emulator {

inline constexpr unsigned kWarp = 32, kWarpGroup = 128;
inline constexpr uint32_t kSharedStart = 1024;  // address of a block's dynamic shared memory: what lies before is the system's
inline constexpr uint32_t kSharedBytes = 227 * 1024;
inline constexpr int kPoison = 0xff;  // NaN in every float type: what a copy will overwrite, and memory never written

struct Settings {
    uint64_t seed = 0;
    int sm_count = 3;  // of the emulated device; 0: there is no device
};
inline Settings settings;

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint32_t below(size_t limit) { return static_cast<uint32_t>((next() >> 32) * limit >> 32); }
    bool chance(unsigned of_256) { return below(256) < of_256; }

  private:
    uint64_t next() {  // splitmix64
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    uint64_t state_;
};

// ---- what threads wait for --------------------------------------------------------------------------------------------

struct Thread;

class Waitable {
  public:
    virtual ~Waitable() = default;
    // For the report of a deadlock: what is missing, for a thread that waits with that detail.
    virtual std::string missing(unsigned detail) const = 0;
    void park(unsigned detail = 0);  // the current thread, until the next wake()
    void wake();

  private:
    std::vector<Thread*> waiting_;
};

// Of a number of threads: phases end when all have arrived.
struct Rendezvous : Waitable {
    std::string name;
    unsigned expected = 0, arrived = 0;
    uint64_t phase = 0;
    std::string missing(unsigned) const override;
    void arrive();
    void sync();  // arrive, and wait for the others
    void complete_if_all_arrived();
};

// An mbarrier. Its word in shared memory holds only its number, so that whatever overwrites it is noticed.
struct TransactionBarrier : Waitable {
    uint32_t offset;  // in shared memory
    unsigned expected, pending;
    int64_t bytes = 0;
    uint64_t phase = 0;
    std::string missing(unsigned parity) const override;
    void complete_if_nothing_pending();
};

// A call that lanes of a warp make together.
struct Exchange : Waitable {
    const char* call = nullptr;
    unsigned mask = 0, here = 0;
    WarpValues values;
    std::array<WarpValues*, kWarp> answers{};
    std::string missing(unsigned) const override;
};

struct Product {
    sm90::Operands operands;
    int tokens;
    bool a_in_registers, accumulate;
    uint64_t a, b;  // descriptors
    std::array<const uint32_t*, kWarpGroup> a_registers{};
    std::array<void*, kWarpGroup> d{};
    unsigned issued = 0;  // by so many threads
};

struct Block;

// The products of 128 threads, which issue the same ones in the same order.
struct WarpGroup : Waitable {
    struct Batch {
        size_t end;  // the number of its last product + 1
        unsigned committed;
    };
    Block* block;
    std::deque<Product> products;
    std::deque<Batch> batches;
    size_t first_product = 0, first_batch = 0;  // numbers of those at the front
    int registers = 0;                          // by setmaxnreg; 0: never called
    std::string missing(unsigned most) const override;
    bool batch_ready() const { return !batches.empty() && batches.front().committed == kWarpGroup; }
};

// ---- threads and blocks -----------------------------------------------------------------------------------------------

struct Warp {
    Block* block;
    unsigned first_thread;
    uint32_t ready = 0;  // lanes that can go on
    bool queued = false;
    unsigned priority;
    std::deque<Exchange> exchanges;  // those without lanes are free
};

struct Thread {
    Context context{};
    Block* block;
    Warp* warp;
    WarpGroup* group;
    unsigned index;  // threadIdx.x
    bool ended = false;
    const Waitable* waits_for = nullptr;
    unsigned detail = 0;
    bool arrived_at_cluster = false;
    uint64_t cluster_phase = 0;
    bool products_begun = false;  // since the last batch
    // Registers that products of this thread read, as they were at the last warpgroup_arrive.
    std::vector<std::pair<const uint32_t*, std::array<uint32_t, 4>>> a_registers;
    size_t products_issued = 0, batches_committed = 0;
};

struct Block {
    unsigned rank;  // in the cluster
    uint3 index;
    unsigned char* shared;
    uint32_t shared_bytes;
    unsigned live;  // threads
    bool waited_for_earlier_grids = false;
    bool barriers_fenced = true;  // since the last was initialised
    std::deque<Thread> threads;
    std::deque<Warp> warps;
    std::deque<WarpGroup> groups;
    std::deque<TransactionBarrier> barriers;
    Rendezvous all;  // __syncthreads
    std::array<Rendezvous, 16> named;
};

// A copy of the copy engine into one block.
struct Copy {
    Block* block;
    uint32_t to, bytes, barrier;  // offsets in shared memory
    const unsigned char* from;    // or, where null, the box:
    TensorMap map;
    int column, row;
};

// ---- the machine ------------------------------------------------------------------------------------------------------

class Machine {
  public:
    void run(const Grid& grid, Kernel kernel, const void* parameters);

    // A CTA of the cluster; another than the current one must be there already, and still.
    Block& block(unsigned rank, const char* doing);
    // The current thread goes on when make_ready is called for it; after `yield` sometimes at once.
    void suspend();
    void yield();
    void make_ready(Thread& thread);
    // Work that goes on by itself.
    void start(const Copy& copy);
    void batch_is_ready(WarpGroup& group) { batches_.push_back(&group); }

    Thread* current = nullptr;
    Rendezvous cluster;   // its barrier
    unsigned leader = 0;  // the lane that elect_one elects

  private:
    // How this grid's threads and asynchronous work take turns.
    struct Policy {
        bool by_priority;  // some warps run as far as they can before others, or all take turns
        unsigned early;    // of 256: how often asynchronous work is done before all have to wait for it
        unsigned yields;   // of 256: how often a thread that has arrived somewhere lets others go first
        enum { any, copies, products } first;
    };

    void run_cluster(unsigned x, unsigned y);
    void make_blocks(unsigned x, unsigned y);
    Warp* choose_warp();
    void run_warp(Warp& warp);
    void resume(Thread& thread);
    bool do_something_asynchronous();
    static void thread_main();
    void thread_ended();
    void block_ended(Block& block);
    void check_memory_of_ended_blocks();
    [[noreturn]] void report_deadlock() const;

    const Grid* grid_ = nullptr;
    Kernel kernel_ = nullptr;
    const void* parameters_ = nullptr;
    Random random_{0};
    Policy policy_{};
    Context scheduler_{};
    std::string failure_;
    bool failed_ = false, yielded_ = false;
    unsigned live_ = 0;
    std::deque<Block> blocks_;
    std::vector<Warp*> ready_;
    std::vector<Copy> copies_;
    std::vector<WarpGroup*> batches_;  // whose first batch can be executed
};

extern Machine machine;

// "block 3, thread 17": the current one.
std::string here();

// Bytes of a block's shared memory by their address, checked.
unsigned char* shared_at(Block& block, uint32_t address, uint32_t bytes, const char* what);
// A barrier that the copy engine or another block arrives at.
TransactionBarrier& remote_barrier_at(Block& block, uint32_t offset);
// What a copy does when its time has come, and what a warpgroup's first batch does.
void execute_copy(const Copy& copy);
void execute_batch(WarpGroup& group);

}  // namespace qbert::cuda::emulator
