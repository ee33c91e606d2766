// The scheduler: threads and asynchronous work taking turns, blocks beginning and ending.
#include "emulator/machine.h"

#include <sys/mman.h>

#include <map>
#include <mutex>
#include <numeric>

namespace qbert::cuda::emulator {

Machine machine;

namespace {

constexpr unsigned kMaxCluster = 16, kMaxThreads = 1024;
constexpr int kRegisters = 65536 / kWarpGroup;       // of an SM, for a thread of each warpgroup
constexpr size_t kCanary = 4096;                     // poisoned bytes behind a block's shared memory
constexpr size_t kSlot = 256 * 1024, kFront = 4096;  // from block to block, and before the first

unsigned char* shared_memory_of(unsigned rank) {
    static unsigned char* memory = [] {
        void* got = mmap(nullptr, kMaxCluster * kSlot + kFront, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        require(got != MAP_FAILED, "no memory for the emulated shared memory");
        return static_cast<unsigned char*>(got);
    }();
    return memory + kFront + rank * kSlot;
}

bool poisoned(const unsigned char* bytes, size_t count) {
    return std::all_of(bytes, bytes + count, [](unsigned char byte) { return byte == kPoison; });
}

std::string name_of(const Block& block) {
    std::string name = "block " + std::to_string(block.index.x);
    return block.index.y == 0 ? name : name + ", " + std::to_string(block.index.y);
}

}  // namespace

std::string here() { return name_of(*machine.current->block) + ", thread " + std::to_string(machine.current->index); }

// ---- the scheduler ----------------------------------------------------------------------------------------------------

void Machine::make_ready(Thread& thread) {
    thread.waits_for = nullptr;
    thread.warp->ready |= 1u << thread.index % kWarp;
    if (!thread.warp->queued) ready_.push_back(thread.warp);
    thread.warp->queued = true;
}

void Machine::suspend() { switch_context(current->context, scheduler_); }

void Machine::yield() {
    if (!random_.chance(policy_.yields)) return;
    make_ready(*current);
    yielded_ = true;
    suspend();
}

Block& Machine::block(unsigned rank, const char* doing) {
    require(rank < blocks_.size(), doing, " block ", rank, " of a cluster of ", blocks_.size());
    Block& found = blocks_[rank];
    if (&found == current->block) return found;
    require(cluster.phase > 0, doing, " block ", rank, " of the cluster before a first cluster_sync: it may not run yet");
    require(found.live > 0, doing, " block ", rank, " of the cluster, which has ended");
    return found;
}

void Machine::thread_main() {
    try {
        machine.kernel_(machine.parameters_);
        machine.thread_ended();
    } catch (const std::exception& error) {
        machine.failure_ = here() + ": " + error.what();
        machine.failed_ = true;
    }
    machine.suspend();
}

void Machine::resume(Thread& thread) {
    current = &thread;
    threadIdx = {thread.index, 0, 0};
    blockIdx = thread.block->index;
    switch_context(scheduler_, thread.context);
    current = nullptr;
    if (failed_) fail(failure_);
}

Warp* Machine::choose_warp() {
    if (ready_.empty()) return nullptr;
    size_t at = random_.below(ready_.size());
    if (policy_.by_priority) {
        const auto less = [](const Warp* a, const Warp* b) { return a->priority < b->priority; };
        at = static_cast<size_t>(std::max_element(ready_.begin(), ready_.end(), less) - ready_.begin());
    }
    std::swap(ready_[at], ready_.back());
    Warp* warp = ready_.back();
    ready_.pop_back();
    warp->queued = false;
    return warp;
}

// Its lanes in a row, from any of them on, until all wait.
void Machine::run_warp(Warp& warp) {
    const unsigned first = random_.below(kWarp);
    yielded_ = false;
    warp.queued = true;
    while (warp.ready != 0 && !yielded_) {
        const uint32_t rotated = warp.ready >> first | warp.ready << (kWarp - first) % kWarp;
        const unsigned lane = (static_cast<unsigned>(__builtin_ctz(rotated)) + first) % kWarp;
        warp.ready &= ~(1u << lane);
        resume(warp.block->threads[warp.first_thread + lane]);
    }
    warp.queued = warp.ready != 0;
    if (warp.queued) ready_.push_back(&warp);
    if (yielded_) warp.priority = random_.below(1u << 30);
}

bool Machine::do_something_asynchronous() {
    const size_t count = copies_.size() + batches_.size();
    if (count == 0) return false;
    size_t at = random_.below(count);
    if (policy_.first == Policy::copies && !copies_.empty()) at = random_.below(copies_.size());
    if (policy_.first == Policy::products && !batches_.empty()) at = copies_.size() + random_.below(batches_.size());
    if (at < copies_.size()) {
        const Copy copy = copies_[at];
        copies_.erase(copies_.begin() + static_cast<ptrdiff_t>(at));
        execute_copy(copy);
        return true;
    }
    at -= copies_.size();
    WarpGroup& group = *batches_[at];
    execute_batch(group);
    if (!group.batch_ready()) batches_.erase(batches_.begin() + static_cast<ptrdiff_t>(at));
    return true;
}

void Machine::start(const Copy& copy) {
    for (const Copy& other : copies_) {
        const bool apart = copy.to + copy.bytes <= other.to || other.to + other.bytes <= copy.to;
        require(other.block != copy.block || apart, "a copy of ", copy.bytes, " bytes to ", copy.to,
                " in shared memory starts while one of ", other.bytes, " bytes to ", other.to, " is under way");
    }
    remote_barrier_at(*copy.block, copy.barrier);
    std::memset(copy.block->shared + copy.to, kPoison, copy.bytes);
    copies_.push_back(copy);
}

void Machine::report_deadlock() const {
    std::ostringstream report;
    report << "deadlock:";
    for (const Block& block : blocks_) {
        std::map<std::string, std::string> threads_of;  // what they wait for -> "0-127, 130"
        for (size_t first = 0, past; first < block.threads.size(); first = past) {
            const auto described = [&](size_t i) {
                const Thread& thread = block.threads[i];
                return thread.ended ? std::string() : thread.waits_for->missing(thread.detail);
            };
            const std::string what = described(first);
            for (past = first + 1; past < block.threads.size() && described(past) == what; ++past) {}
            if (what.empty()) continue;
            std::string& threads = threads_of[what];
            threads += (threads.empty() ? "" : ", ") + std::to_string(first);
            if (past > first + 1) threads += "-" + std::to_string(past - 1);
        }
        for (const auto& [what, threads] : threads_of) {
            report << "\n  " << name_of(block) << ", threads " << threads << ": " << what;
        }
    }
    fail(report.str());
}

// ---- a grid -----------------------------------------------------------------------------------------------------------

void Machine::thread_ended() {
    Thread& thread = *current;
    Block& block = *thread.block;
    if (const WarpGroup* group = thread.group) {
        require(thread.batches_committed <= group->first_batch, "ends while products are under way");
        require(thread.products_issued <= group->first_product, "ends with products that were not committed");
    }
    thread.ended = true;
    --live_;
    --block.live;
    --block.all.expected;
    block.all.complete_if_all_arrived();
    if (thread.arrived_at_cluster && thread.cluster_phase == cluster.phase) --cluster.arrived;
    --cluster.expected;
    cluster.complete_if_all_arrived();
    if (block.live == 0) block_ended(block);
}

void Machine::block_ended(Block& block) {
    for (const Copy& copy : copies_) {
        require(copy.block != &block, "the block ends while a copy to ", copy.to, " in its shared memory is under way");
    }
    for (const Rendezvous& barrier : block.named) {
        require(barrier.arrived == 0, "the block ends while ", barrier.missing(0));
    }
    for (const TransactionBarrier& barrier : block.barriers) {
        const bool between_phases = barrier.pending == barrier.expected && barrier.bytes == 0;
        require(between_phases, "the block ends within a phase of ", barrier.missing(barrier.phase % 2));
    }
    require(!grid_->overlap || block.waited_for_earlier_grids,
            "the block ends without pdl_wait, in a grid launched to overlap");
    int registers = 0, groups_that_said = 0;
    for (const WarpGroup& group : block.groups) registers += group.registers, groups_that_said += group.registers > 0;
    const bool all_said = groups_that_said == static_cast<int>(block.groups.size());
    require(!all_said || registers <= kRegisters, "the warpgroups take ", registers, " registers a thread together; allowed: ",
            kRegisters);
    require(poisoned(block.shared + block.shared_bytes, kCanary), "something was written beyond the ", block.shared_bytes,
            " bytes of shared memory");
    std::memset(block.shared, kPoison, block.shared_bytes);  // whoever still reads it reads nothing useful
}

void Machine::check_memory_of_ended_blocks() {
    for (const Block& block : blocks_) {
        require(poisoned(block.shared, block.shared_bytes), name_of(block),
                "'s shared memory was written by another block after it had ended");
    }
}

void Machine::make_blocks(unsigned x, unsigned y) {
    const unsigned threads = grid_->threads, warps = threads / kWarp;
    blocks_.clear();
    ready_.clear();
    copies_.clear();
    batches_.clear();
    live_ = grid_->cluster * threads;
    cluster = {};
    cluster.name = "the cluster's barrier";
    cluster.expected = live_;
    for (unsigned rank = 0; rank < grid_->cluster; ++rank) {
        Block& block = blocks_.emplace_back();
        block.rank = rank;
        block.index = {x + rank, y, 0};
        block.shared = shared_memory_of(rank);
        block.shared_bytes = grid_->shared_bytes;
        block.live = threads;
        block.all.name = "__syncthreads";
        block.all.expected = threads;
        std::memset(block.shared, kPoison, block.shared_bytes + kCanary);
        block.groups.resize(threads / kWarpGroup);
        for (WarpGroup& group : block.groups) group.block = &block;
        for (unsigned i = 0; i < warps; ++i) {
            Warp& warp = block.warps.emplace_back();
            warp.block = &block;
            warp.first_thread = i * kWarp;
            warp.priority = random_.below(1u << 30);
        }
        for (unsigned i = 0; i < threads; ++i) {
            Thread& thread = block.threads.emplace_back();
            thread.block = &block;
            thread.warp = &block.warps[i / kWarp];
            thread.group = i / kWarpGroup < block.groups.size() ? &block.groups[i / kWarpGroup] : nullptr;
            thread.index = i;
            prepare(thread.context, stack_of(rank * threads + i), kStackBytes, &thread_main);
            make_ready(thread);
        }
    }
}

void Machine::run_cluster(unsigned x, unsigned y) {
    make_blocks(x, y);
    while (live_ > 0) {
        if (random_.chance(policy_.early)) do_something_asynchronous();
        if (Warp* warp = choose_warp()) {
            run_warp(*warp);
        } else if (!do_something_asynchronous()) {
            report_deadlock();
        }
    }
    check_memory_of_ended_blocks();
}

void Machine::run(const Grid& grid, Kernel kernel, const void* parameters) {
    grid_ = &grid;
    kernel_ = kernel;
    parameters_ = parameters;
    failed_ = false;
    const uint64_t seed = settings.seed;
    random_ = Random(seed);
    policy_.by_priority = seed % 2 == 1;
    policy_.first = std::array{Policy::any, Policy::copies, Policy::products}[seed / 2 % 3];
    policy_.early = seed % 4 == 3 ? 64 : 0;
    policy_.yields = seed == 0 ? 0 : std::array{0u, 16u, 128u}[random_.below(3)];
    leader = random_.below(kWarp);
    blockDim = dim3(grid.threads);
    gridDim = dim3(grid.x, grid.y);
    std::vector<unsigned> clusters(grid.x / grid.cluster * grid.y);
    std::iota(clusters.begin(), clusters.end(), 0u);
    if (seed != 0) {
        for (size_t i = clusters.size(); i > 1; --i) std::swap(clusters[i - 1], clusters[random_.below(i)]);
    }
    const unsigned across = grid.x / grid.cluster;
    for (const unsigned each : clusters) run_cluster(each % across * grid.cluster, each / across);
}

static void check_shape(const Grid& grid, const Device& device) {
    require(grid.x >= 1 && grid.x < 1u << 31 && grid.y >= 1 && grid.y <= 65535,
            "allowed: 1 ... 2147483647 x 1 ... 65535 blocks");
    require(grid.threads >= kWarp && grid.threads <= kMaxThreads && grid.threads % kWarp == 0,
            "allowed: multiples of 32 threads up to 1024");
    require(grid.cluster >= 1 && grid.cluster <= kMaxCluster && grid.x % grid.cluster == 0,
            "allowed: clusters of 1 ... 16 blocks that divide the grid along x");
    require(grid.shared_bytes <= static_cast<unsigned>(device.shared_memory), "allowed: ", device.shared_memory,
            " bytes of shared memory");
}

void run_grid(const Grid& grid, const Launch& launch, Kernel kernel, const void* parameters, const char* what) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    try {
        check_shape(grid, launch.device);
        machine.run(grid, kernel, parameters);
    } catch (const Error& error) {
        fail("launching ", what, ", grid ", grid.x, " x ", grid.y, ", clusters of ", grid.cluster, ", ", grid.threads,
             " threads, ", grid.shared_bytes, " bytes of shared memory, emulated with seed ", settings.seed, ": ",
             error.what());
    }
}

}  // namespace qbert::cuda::emulator
