#include "cpu/attention.h"

#include <algorithm>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace qbert {
namespace {

struct Sequence {
    int64_t start, length, number;
};

// Pieces first ... last - 1.
struct Task {
    size_t first, last;
};

constexpr double kTaskCost = 1.25e6;  // about ten microseconds

// Queries of a piece where a head is cut: a window's keys are packed once for so many, and their scores stay in the cache.
constexpr int64_t kQueryBlock = 256;

thread_local Scratch scratch_heads;  // of the calling thread, for all workers of its region

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Products and softmax of all pairs of a query and a key that it may see, and what is done once for a token.
double cost_of(const AttentionArgs& args, const AttentionPart& part) {
    const int64_t keys = is_windowed(args, part.length) ? std::min(part.length, 2 * args.window + 32) : part.length;
    return static_cast<double>(part.last - part.first) * static_cast<double>(keys + 32) * static_cast<double>(args.head_dim + 32);
}

// Those that have tokens, the longest first: what is left for the end is small.
std::vector<Sequence> sequences_of(const int32_t* cu_seqlens, int64_t sequences) {
    std::vector<Sequence> found;
    found.reserve(static_cast<size_t>(sequences));
    for (int64_t i = 0; i < sequences; ++i) {
        const int64_t start = cu_seqlens[i], length = cu_seqlens[i + 1] - start;
        if (length > 0) found.push_back({start, length, i});
    }
    std::stable_sort(found.begin(), found.end(), [](const Sequence& a, const Sequence& b) { return a.length > b.length; });
    return found;
}

// All heads of all sequences, one sequence after the other: whole ones, but blocks of queries where windows let a block do with
// few keys, and where there are too few heads to keep all threads busy.
std::vector<AttentionPart> pieces_of(const std::vector<Sequence>& sequences, const AttentionArgs& args, int threads) {
    const bool few = threads > 1 && static_cast<int64_t>(sequences.size()) * args.heads < 4 * threads;
    std::vector<AttentionPart> pieces;
    pieces.reserve(sequences.size() * static_cast<size_t>(args.heads));
    for (const Sequence& each : sequences) {
        const int64_t queries = queries_of(args, each.length);
        const int64_t block = few || is_windowed(args, each.length) ? kQueryBlock : queries;
        for (int64_t head = 0; head < args.heads; ++head) {
            for (int64_t first = 0; first < queries; first += block) {
                pieces.push_back({each.start, each.length, head, first, std::min(first + block, queries), each.number});
            }
        }
    }
    return pieces;
}

// Cuts all pieces into tasks of about the same cost, each worth a thread's while.
std::vector<Task> tasks_of(const std::vector<AttentionPart>& pieces, const AttentionArgs& args, int threads) {
    if (threads <= 1) return {{0, pieces.size()}};
    double total = 0;
    for (const AttentionPart& each : pieces) total += cost_of(args, each);
    int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(total / kTaskCost));
    if (wanted > threads) wanted = ceil_div(wanted, threads) * threads;
    std::vector<Task> tasks;
    size_t first = 0;
    double done = 0;
    for (size_t at = 0; at < pieces.size(); ++at) {
        done += cost_of(args, pieces[at]);
        if (done * static_cast<double>(wanted) < total * static_cast<double>(tasks.size() + 1) * 0.999) continue;
        tasks.push_back({first, at + 1});
        first = at + 1;
    }
    if (first < pieces.size()) tasks.push_back({first, pieces.size()});
    return tasks;
}

// Blocks of one head that see all keys go together: its keys are packed once.
void run(const Kernels& k, const AttentionArgs& args, const std::vector<AttentionPart>& pieces, const Task& task, void* scratch) {
    for (size_t at = task.first; at < task.last; ++at) {
        AttentionPart part = pieces[at];
        const int64_t queries = is_windowed(args, part.length) ? 0 : queries_of(args, part.length);
        while (part.last < queries && at + 1 < task.last) part.last = pieces[++at].last;
        k.attention_part(args, part, scratch);
    }
}

}  // namespace

void attention(const AttentionArgs& args, const int32_t* cu_seqlens, int64_t sequences, int threads) {
    if (args.heads == 0 || args.head_dim == 0) return;
    const std::vector<Sequence> packed = sequences_of(cu_seqlens, sequences);
    if (packed.empty()) return;
    threads = std::max(threads, 1);
    const std::vector<AttentionPart> pieces = pieces_of(packed, args, threads);
    const std::vector<Task> tasks = tasks_of(pieces, args, threads);
    const Kernels& k = kernels();
    const int64_t longest = packed.front().length, queries = is_windowed(args, longest) ? kQueryBlock : longest;
    const int64_t shorter = std::min(longest, args.window + 1);  // the longest that sees all of itself, where others do not
    const int64_t bytes = std::max(k.attention_scratch_bytes(args, longest, std::min(queries, longest)),
                                   shorter > 0 ? k.attention_scratch_bytes(args, shorter, shorter) : 0);
    const int64_t per_worker = ceil_div(bytes, 4096) * 4096;
    const int64_t workers = tasks.size() > 1 ? threads : 1;
    uint8_t* scratch = static_cast<uint8_t*>(scratch_heads.get(workers * per_worker));
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t task, int worker) {
        run(k, args, pieces, tasks[static_cast<size_t>(task)], scratch + worker * per_worker);
    });
}

bool bounds_cover(const int32_t* cu_seqlens, int64_t sequences, int64_t t) {
    return cu_seqlens[0] == 0 && cu_seqlens[sequences] == t && std::is_sorted(cu_seqlens, cu_seqlens + sequences + 1);
}

bool positions_cover(const int32_t* cu_seqlens, int64_t sequences, int64_t positions) {
    for (int64_t i = 0; i < sequences; ++i) {
        if (cu_seqlens[i + 1] - cu_seqlens[i] > positions) return false;
    }
    return true;
}

}  // namespace qbert
