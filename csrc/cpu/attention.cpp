#include "cpu/attention.h"

#include <algorithm>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace qbert {
namespace {

struct Sequence {
    int64_t start, length;
};

// Heads first ... last - 1 of all heads of all sequences, one sequence after the other.
struct Task {
    int64_t first, last;
};

constexpr double kTaskCost = 1.25e6;  // about ten microseconds

thread_local Scratch scratch_heads;  // of the calling thread, for all workers of its region

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of one head: products and softmax of all pairs of tokens, and what is done once for a token.
double cost_of(int64_t length, int64_t head_dim) {
    return static_cast<double>(length) * static_cast<double>(length + 32) * static_cast<double>(head_dim + 32);
}

// Those that have tokens, the longest first: what is left for the end is small.
std::vector<Sequence> sequences_of(const int32_t* cu_seqlens, int64_t sequences) {
    std::vector<Sequence> found;
    found.reserve(static_cast<size_t>(sequences));
    for (int64_t i = 0; i < sequences; ++i) {
        const int64_t start = cu_seqlens[i], length = cu_seqlens[i + 1] - start;
        if (length > 0) found.push_back({start, length});
    }
    std::stable_sort(found.begin(), found.end(), [](const Sequence& a, const Sequence& b) { return a.length > b.length; });
    return found;
}

// Cuts all heads into pieces of about the same cost, each worth a thread's while.
std::vector<Task> tasks_of(const std::vector<Sequence>& sequences, const AttentionArgs& args, int threads) {
    double total = 0;
    for (const Sequence& each : sequences) total += cost_of(each.length, args.head_dim) * static_cast<double>(args.heads);
    int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(total / kTaskCost));
    if (wanted > threads) wanted = ceil_div(wanted, threads) * threads;
    std::vector<Task> tasks;
    int64_t at = 0, first = 0;
    double done = 0;
    for (const Sequence& each : sequences) {
        for (int64_t head = 0; head < args.heads; ++head) {
            done += cost_of(each.length, args.head_dim);
            ++at;
            if (done * static_cast<double>(wanted) < total * static_cast<double>(tasks.size() + 1) * 0.999) continue;
            tasks.push_back({first, at});
            first = at;
        }
    }
    if (first < at) tasks.push_back({first, at});
    return tasks;
}

}  // namespace

void attention(const AttentionArgs& args, const int32_t* cu_seqlens, int64_t sequences, int threads) {
    if (args.heads == 0 || args.head_dim == 0) return;
    const std::vector<Sequence> packed = sequences_of(cu_seqlens, sequences);
    if (packed.empty()) return;
    threads = std::max(threads, 1);
    const std::vector<Task> tasks = threads > 1 ? tasks_of(packed, args, threads)
                                                : std::vector<Task>{{0, static_cast<int64_t>(packed.size()) * args.heads}};
    const Kernels& k = kernels();
    const int64_t per_worker = ceil_div(k.attention_scratch_bytes(args, packed.front().length), 4096) * 4096;
    const int64_t workers = tasks.size() > 1 ? threads : 1;
    uint8_t* scratch = static_cast<uint8_t*>(scratch_heads.get(workers * per_worker));
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t task, int worker) {
        for (int64_t i = tasks[static_cast<size_t>(task)].first; i < tasks[static_cast<size_t>(task)].last; ++i) {
            const Sequence& each = packed[static_cast<size_t>(i / args.heads)];
            k.attention_head(args, each.start, each.length, i % args.heads, scratch + worker * per_worker);
        }
    });
}

bool bounds_cover(const int32_t* cu_seqlens, int64_t sequences, int64_t t) {
    return cu_seqlens[0] == 0 && cu_seqlens[sequences] == t && std::is_sorted(cu_seqlens, cu_seqlens + sequences + 1);
}

}  // namespace qbert
