#include "cpu/rows.h"

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace qbert {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // about ten microseconds of a norm

thread_local Scratch scratch_rows;  // of the calling thread, for all workers of its region

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args, int64_t t, int64_t k, int threads) {
    if (t == 0) return;
    threads = std::max(threads, 1);
    int64_t tasks = std::clamp<int64_t>(t * k / kTaskElements, 1, t);
    if (tasks > threads) tasks = ceil_div(tasks, threads) * threads;  // as much for each thread
    const int64_t per_task = ceil_div(t, tasks), per_worker = kScratchRows * scratch_row_floats(k);
    const int64_t workers = tasks > 1 ? threads : 1;
    float* rows = static_cast<float*>(scratch_rows.get(workers * per_worker * static_cast<int64_t>(sizeof(float))));
    parallel_for(ceil_div(t, per_task), threads, [&](int64_t task, int worker) {
        kernel(args, task * per_task, std::min(t, (task + 1) * per_task), rows + worker * per_worker);
    });
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args, int64_t t, int threads) {
    run(kernels().quantize_rows, args, t, args.k, threads);
}

void add_norm_rows(const AddNormArgs& args, int64_t t, int threads) { run(kernels().add_norm_rows, args, t, args.k, threads); }

void look_up_rows(const LookUpArgs& args, int64_t t, int threads) {
    run(kernels().look_up_rows, args, t, args.table.k, threads);
}

void embed_norm_rows(const EmbedNormArgs& args, int64_t t, int threads) {
    run(kernels().embed_norm_rows, args, t, args.words.k, threads);
}

bool ids_are_inside(const int64_t* ids, int64_t t, int64_t rows) {
    return std::all_of(ids, ids + t, [rows](int64_t id) { return id >= 0 && id < rows; });
}

}  // namespace qbert
