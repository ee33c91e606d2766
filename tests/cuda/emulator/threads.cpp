// What threads do together: in warps, blocks and clusters. Whoever waits is parked until the last one comes.
#include "emulator/machine.h"

namespace qbert::cuda::emulator {

void Waitable::park(unsigned detail) {
    Thread& thread = *machine.current;
    waiting_.push_back(&thread);
    thread.waits_for = this;
    thread.detail = detail;
    machine.suspend();
}

void Waitable::wake() {
    for (Thread* thread : waiting_) machine.make_ready(*thread);
    waiting_.clear();
}

std::string Rendezvous::missing(unsigned) const {
    return name + " (" + std::to_string(arrived) + " of " + std::to_string(expected) + " threads are there)";
}

void Rendezvous::complete_if_all_arrived() {
    if (arrived == 0 || arrived < expected) return;
    arrived = 0;
    ++phase;
    wake();
}

void Rendezvous::arrive() {
    ++arrived;
    complete_if_all_arrived();
}

void Rendezvous::sync() {
    const uint64_t begun = phase;
    arrive();
    while (phase == begun) park();
}

std::string Exchange::missing(unsigned) const {
    std::ostringstream text;
    text << call << " of lanes 0x" << std::hex << mask << " (0x" << here << " are there)";
    return text.str();
}

WarpValues exchange(const char* call, unsigned mask, uint64_t mine) {
    Warp& warp = *machine.current->warp;
    const unsigned lane = machine.current->index % kWarp;
    require(mask >> lane & 1, call, " by lane ", lane, " with the mask 0x", std::hex, mask, ", which is without it");
    Exchange* found = nullptr;
    for (Exchange& open : warp.exchanges) {
        if (open.here == 0) {
            found = found == nullptr ? &open : found;
        } else if (open.mask & mask) {
            require(open.mask == mask && std::strcmp(open.call, call) == 0, "lanes of a warp disagree: ", call,
                    " with the mask 0x", std::hex, mask, " by one, ", open.call, " with 0x", open.mask, " by another");
            found = &open;
            break;
        }
    }
    if (found == nullptr) found = &warp.exchanges.emplace_back();
    WarpValues all;
    found->call = call;
    found->mask = mask;
    found->here |= 1u << lane;
    found->values.of_lane[lane] = mine;
    found->answers[lane] = &all;
    if (found->here != mask) {
        found->park();
        return all;
    }
    for (unsigned i = 0; i < kWarp; ++i) {
        if (mask >> i & 1) *found->answers[i] = found->values;
    }
    found->here = 0;
    found->wake();
    return all;
}

void synchronize_block() { machine.current->block->all.sync(); }

}  // namespace qbert::cuda::emulator

namespace qbert::cuda::sm90 {

using emulator::machine;

bool elect_one() {
    emulator::exchange("elect_one", 0xffffffffu, 0);
    return machine.current->index % emulator::kWarp == machine.leader;
}

void set_registers(int registers) {
    if (machine.current->group != nullptr) machine.current->group->registers = registers;
}

unsigned cluster_rank() { return machine.current->block->rank; }

void cluster_arrive() {
    emulator::Thread& thread = *machine.current;
    require(!thread.arrived_at_cluster, "cluster_arrive twice without cluster_wait");
    thread.arrived_at_cluster = true;
    thread.cluster_phase = machine.cluster.phase;
    machine.cluster.arrive();
    machine.yield();
}

void cluster_wait() {
    emulator::Thread& thread = *machine.current;
    require(thread.arrived_at_cluster, "cluster_wait without cluster_arrive");
    while (machine.cluster.phase == thread.cluster_phase) machine.cluster.park();
    thread.arrived_at_cluster = false;
}

static emulator::Rendezvous& named_barrier(unsigned id, unsigned threads) {
    require(id >= 1 && id <= 15, "named barrier ", id, "; allowed: 1 ... 15");
    require(threads >= 32 && threads % 32 == 0 && threads <= blockDim.x, "named barrier ", id, " of ", threads,
            " threads; allowed: multiples of 32 up to the block's ", blockDim.x);
    emulator::Rendezvous& barrier = machine.current->block->named[id];
    require(barrier.arrived == 0 || barrier.expected == threads, "named barrier ", id, " of ", threads, " threads; others say ",
            barrier.expected);
    barrier.name = "named barrier " + std::to_string(id);
    barrier.expected = threads;
    return barrier;
}

void named_barrier_sync(unsigned id, unsigned threads) { named_barrier(id, threads).sync(); }

void named_barrier_arrive(unsigned id, unsigned threads) {
    named_barrier(id, threads).arrive();
    machine.yield();
}

}  // namespace qbert::cuda::sm90

void qbert::cuda::pdl_wait() { emulator::machine.current->block->waited_for_earlier_grids = true; }
