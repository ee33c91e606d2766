// One region of tasks over several threads, on the team that is there already.
//
// torch's OpenMP runtime keeps idle workers spinning for milliseconds after each of its regions, so a second team beside it would
// fight for the same cores, and a second OpenMP runtime in one process is a known trap. So regions run on torch's own team where
// there is one (found at run time, nothing is linked), and on a small pool of our own where there is none: without an OpenMP
// runtime, and in a child after fork, which no team of libgomp survives.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <string>

namespace qbert {

// `task` is 0 ... tasks - 1; `worker` is 0 ... threads - 1, no two threads of a region share one, and a thread keeps its own
// for the whole region: an index of scratch buffers.
using TaskBody = void (*)(void* context, int64_t task, int worker) noexcept;

// Calls body(context, task, worker) once for each task and returns when all are done. Tasks are handed out as workers become free,
// in ascending order, so nothing may depend on which worker gets which. Everything runs in the calling thread, as worker 0, where
// tasks or threads is at most 1, inside another region, or while another thread has our own pool. Floating point follows IEEE in
// every task, whatever the threads are set to (see torch.set_flush_denormal).
// Throws std::invalid_argument, before any task, if QBERT_THREADS (see thread_backend) is not one of the allowed values.
void run_tasks(int64_t tasks, int threads, TaskBody body, void* context);

// The same for a callable body(int64_t task, int worker). What it throws first is thrown here when the region is over; of the tasks
// that begin later none is run.
template <typename Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    auto call = [&](int64_t task, int worker) noexcept {
        if (failed.load(std::memory_order_relaxed)) return;
        try {
            body(task, worker);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
        }
    };
    using Call = decltype(call);
    run_tasks(tasks, threads, [](void* f, int64_t task, int worker) noexcept { (*static_cast<Call*>(f))(task, worker); }, &call);
    if (error != nullptr) std::rethrow_exception(error);
}

// What regions of this process run on now: "own pool", or "OpenMP (libgomp.so.1)" with the file name of the runtime.
// The environment variable QBERT_THREADS, read once, forces one: "own" or "openmp". Only a forked child has the last word: it uses
// its own pool. Throws std::invalid_argument for any other value, and for "openmp" where no runtime is loaded.
std::string thread_backend();

}  // namespace qbert
