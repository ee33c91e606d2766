// Shared memory: addresses, barriers, and what the copy engine does.
#include "emulator/machine.h"

namespace qbert::cuda::emulator {
namespace {

constexpr uint64_t kBarrierMark = uint64_t{0xba441e4u} << 32;
constexpr unsigned kMaxArrivals = (1u << 20) - 1;
constexpr int64_t kMaxBytes = (1 << 20) - 1;  // that a barrier can count
constexpr uint32_t kBoxRowBytes = 128;

}  // namespace

unsigned char* shared_at(Block& block, uint32_t address, uint32_t bytes, const char* what) {
    const bool inside = address >= kSharedStart && uint64_t{address} + bytes <= uint64_t{kSharedStart} + block.shared_bytes;
    require(inside, what, " at ", int64_t{address} - kSharedStart, " ... + ", bytes, " of a block with ", block.shared_bytes,
            " bytes of shared memory");
    return block.shared + (address - kSharedStart);
}

// Where a pointer into the current block's shared memory points to.
static uint32_t offset_of(const void* pointer, uint32_t bytes, const char* what) {
    const Block& block = *machine.current->block;
    const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
    require(offset >= 0 && offset + int64_t{bytes} <= int64_t{block.shared_bytes}, what, " is not in the block's ",
            block.shared_bytes, " bytes of shared memory, but ", offset, " bytes from their start");
    return static_cast<uint32_t>(offset);
}

// ---- barriers ---------------------------------------------------------------------------------------------------------

std::string TransactionBarrier::missing(unsigned parity) const {
    std::ostringstream text;
    text << "the barrier at " << offset << " in shared memory, parity " << parity << " (in phase " << phase << ", " << pending
         << " of " << expected << " arrivals and " << bytes << " bytes are missing)";
    return text.str();
}

void TransactionBarrier::complete_if_nothing_pending() {
    if (pending > 0 || bytes > 0) return;
    require(bytes == 0, "the barrier at ", offset, " in shared memory got ", -bytes, " bytes more than were announced");
    pending = expected;
    ++phase;
    wake();
}

static TransactionBarrier& barrier_at(Block& block, uint32_t offset) {
    uint64_t word;
    std::memcpy(&word, block.shared + offset, 8);
    const auto number = static_cast<uint32_t>(word);  // from 1 on
    const bool there = word - number == kBarrierMark && number >= 1 && number <= block.barriers.size() &&
                       block.barriers[number - 1].offset == offset;
    require(there, "at ", offset, " in shared memory of block ", block.index.x,
            " there is no barrier: never initialised, or overwritten");
    return block.barriers[number - 1];
}

static void arrive(TransactionBarrier& barrier) {
    require(barrier.pending > 0, "the barrier at ", barrier.offset, " in shared memory gets more than ", barrier.expected,
            " arrivals in a phase");
    --barrier.pending;
    barrier.complete_if_nothing_pending();
}

TransactionBarrier& remote_barrier_at(Block& block, uint32_t offset) {
    TransactionBarrier& found = barrier_at(block, offset);
    require(block.barriers_fenced, "the barrier at ", offset, " in shared memory was initialised without fence_mbarrier_init");
    return found;
}

static TransactionBarrier& own_barrier(const sm90::Mbarrier& barrier) {
    return barrier_at(*machine.current->block, offset_of(&barrier, 8, "a barrier"));
}

// ---- copies -----------------------------------------------------------------------------------------------------------

// Rows of a box lie 128 bytes apart; address bits 4-6 of each byte are exclusive-ored with its bits 7-9.
static void execute_box(const Copy& copy) {
    const TensorMap& map = copy.map;
    const int columns = static_cast<int>(kBoxRowBytes) / map.element_bytes;
    const int64_t first = std::clamp<int64_t>(-int64_t{copy.column}, 0, columns);
    const int64_t past = std::clamp<int64_t>(map.columns - copy.column, first, columns);
    for (int i = 0; i < map.box_rows; ++i) {
        alignas(16) unsigned char row[kBoxRowBytes] = {};
        const int64_t at = int64_t{copy.row} + i;
        if (at >= 0 && at < map.rows && past > first) {
            std::memcpy(row + first * map.element_bytes, map.data + (at * map.pitch + copy.column + first) * map.element_bytes,
                        static_cast<size_t>((past - first) * map.element_bytes));
        }
        const uint32_t to = copy.to + kSharedStart + static_cast<uint32_t>(i) * kBoxRowBytes;
        for (uint32_t byte = 0; byte < kBoxRowBytes; byte += 16) {
            const uint32_t address = (to + byte) ^ ((to >> 7 & 7) << 4);
            std::memcpy(copy.block->shared + (address - kSharedStart), row + byte, 16);
        }
    }
}

void execute_copy(const Copy& copy) {
    if (copy.from == nullptr) {
        execute_box(copy);
    } else {
        std::memcpy(copy.block->shared + copy.to, copy.from, copy.bytes);
    }
    TransactionBarrier& barrier = remote_barrier_at(*copy.block, copy.barrier);
    barrier.bytes -= copy.bytes;
    require(barrier.bytes >= -kMaxBytes, "the barrier at ", barrier.offset, " in shared memory got ", -barrier.bytes,
            " bytes that nobody announced");
    barrier.complete_if_nothing_pending();
}

}  // namespace qbert::cuda::emulator

namespace qbert::cuda {

TensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t pitch, int element_bytes, int box_rows) {
    constexpr int64_t kMaxExtent = int64_t{1} << 32, kMaxPitch = int64_t{1} << 40;
    const bool extents = rows >= 1 && rows <= kMaxExtent && columns >= 1 && columns <= kMaxExtent;
    const bool pitches = pitch >= columns && pitch * element_bytes % 16 == 0 && pitch * element_bytes < kMaxPitch;
    const bool boxes = (element_bytes == 1 || element_bytes == 2) && box_rows >= 1 && box_rows <= 256;
    const bool aligned = data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    require(extents && pitches && boxes && aligned, "describing a matrix at ", data, " of ", rows, " x ", columns, ", pitch ",
            pitch, ", elements of ", element_bytes, " bytes, boxes of ", box_rows, " rows: the driver refuses it");
    return {static_cast<const unsigned char*>(data), rows, columns, pitch, element_bytes, box_rows};
}

}  // namespace qbert::cuda

namespace qbert::cuda::sm90 {

using namespace emulator;

unsigned char* shared_memory() { return machine.current->block->shared; }

uint32_t shared_address(const void* pointer) { return kSharedStart + offset_of(pointer, 0, "a pointer"); }

void* map_to_cta(const void* shared, unsigned rank) {
    const uint32_t offset = offset_of(shared, 0, "a pointer");
    return machine.block(rank, "accessing").shared + offset;
}

void mbarrier_init(Mbarrier& barrier, unsigned arrivals) {
    Block& block = *machine.current->block;
    const uint32_t offset = offset_of(&barrier, 8, "a barrier");
    require(offset % 8 == 0, "a barrier at ", offset, " in shared memory; allowed: multiples of 8");
    require(arrivals >= 1 && arrivals <= kMaxArrivals, "a barrier for ", arrivals, " arrivals; allowed: 1 ... ", kMaxArrivals);
    for (const TransactionBarrier& other : block.barriers) {
        require(other.offset != offset, "the barrier at ", offset, " in shared memory is initialised twice");
    }
    TransactionBarrier& made = block.barriers.emplace_back();
    barrier.word = kBarrierMark | block.barriers.size();
    made.offset = offset;
    made.expected = made.pending = arrivals;
    block.barriers_fenced = false;
}

void fence_mbarrier_init() { machine.current->block->barriers_fenced = true; }

void mbarrier_arrive(Mbarrier& barrier) {
    arrive(own_barrier(barrier));
    machine.yield();
}

void mbarrier_arrive_cluster(Mbarrier& barrier, unsigned rank) {
    arrive(remote_barrier_at(machine.block(rank, "arriving in"), offset_of(&barrier, 8, "a barrier")));
    machine.yield();
}

void mbarrier_arrive_expect_tx(Mbarrier& barrier, unsigned bytes) {
    TransactionBarrier& found = own_barrier(barrier);
    found.bytes += bytes;
    require(found.bytes <= kMaxBytes, "the barrier at ", found.offset, " in shared memory shall expect ", found.bytes,
            " bytes; allowed: ", kMaxBytes);
    arrive(found);
    machine.yield();
}

void mbarrier_wait(Mbarrier& barrier, unsigned parity) {
    require(parity <= 1, "waiting for parity ", parity, "; allowed: 0, 1");
    TransactionBarrier& found = own_barrier(barrier);
    while (found.phase % 2 == parity) found.park(parity);
}

void prefetch_tensor_map(const TensorMap& map) {
    require(reinterpret_cast<uintptr_t>(&map) % 64 == 0, "a tensor map that is not aligned to 64 bytes");
}

void tma_load(void* to, const TensorMap& map, int column, int row, Mbarrier& barrier, CacheHint keep) {
    tma_load_multicast(to, map, column, row, barrier, static_cast<uint16_t>(1u << cluster_rank()), keep);
}

void tma_load_multicast(void* to, const TensorMap& map, int column, int row, Mbarrier& barrier, uint16_t blocks, CacheHint) {
    prefetch_tensor_map(map);
    Copy copy{};
    copy.bytes = static_cast<uint32_t>(map.box_rows) * kBoxRowBytes;
    copy.to = offset_of(to, copy.bytes, "the destination of a box");
    copy.barrier = offset_of(&barrier, 8, "a barrier");
    copy.map = map;
    copy.column = column;
    copy.row = row;
    require(copy.to % kBoxRowBytes == 0, "a box at ", copy.to, " in shared memory; allowed: multiples of ", kBoxRowBytes);
    require(blocks != 0, "a box for no block");
    for (unsigned rank = 0; blocks >> rank != 0; ++rank) {
        if (!(blocks >> rank & 1)) continue;
        copy.block = &machine.block(rank, "copying to");
        machine.start(copy);
    }
    machine.yield();
}

void bulk_copy(void* to, const void* from, unsigned bytes, Mbarrier& barrier, CacheHint) {
    Copy copy{};
    copy.block = machine.current->block;
    copy.bytes = bytes;
    copy.to = offset_of(to, bytes, "the destination of a copy");
    copy.barrier = offset_of(&barrier, 8, "a barrier");
    copy.from = static_cast<const unsigned char*>(from);
    require((bytes | copy.to | reinterpret_cast<uintptr_t>(from)) % 16 == 0, "copying ", bytes, " bytes from ", from, " to ",
            copy.to, " in shared memory; allowed: multiples of 16");
    machine.start(copy);
    machine.yield();
}

}  // namespace qbert::cuda::sm90
