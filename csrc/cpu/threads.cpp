#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace qbert {
namespace {

thread_local bool inside_region = false;

// Rounding and denormals are settings of a thread (torch.set_flush_denormal changes the caller's alone), so without this a result
// would depend on who ran the task. Every task sees IEEE arithmetic.
class IeeeArithmetic {
public:
#if defined(__x86_64__)
    IeeeArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // the processor's own default: nothing flushed or trapped
    ~IeeeArithmetic() { _mm_setcsr(before_); }

private:
    const unsigned before_;
#else
    ~IeeeArithmetic() {}
#endif
};

// What the threads of one region share. The counter has a cache line of its own: everyone writes it, the rest is only read.
struct Region {
    TaskBody body;
    void* context;
    int64_t tasks;
    alignas(64) std::atomic<int64_t> next{0};

    Region(TaskBody b, void* c, int64_t n) : body(b), context(c), tasks(n) {}

    void drain(int worker) {
        const IeeeArithmetic ieee;
        inside_region = true;
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task, worker);
        inside_region = false;
    }
};

void run_inline(int64_t tasks, TaskBody body, void* context) {
    const IeeeArithmetic ieee;
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// ------------------------------------------------------------------------------------------------------------ torch's OpenMP

struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*in_parallel)() = nullptr;
    std::string file;

    bool found() const { return parallel != nullptr; }
};

const void* library_of(void* symbol, std::string* file = nullptr) {
    Dl_info info{};
    if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return nullptr;
    if (file != nullptr) {
        *file = info.dli_fname;
        *file = file->substr(file->rfind('/') + 1);
    }
    return info.dli_fbase;
}

// Empty unless all three come from one library: names looked up one by one may be answered by different runtimes, and
// omp_get_thread_num of one knows nothing of a region that GOMP_parallel of another started.
OpenMp openmp_in(void* scope) {
    OpenMp omp;
    void* parallel = dlsym(scope, "GOMP_parallel");  // exported by libgomp, libiomp5 and libomp alike
    void* thread_num = dlsym(scope, "omp_get_thread_num");
    void* in_parallel = dlsym(scope, "omp_in_parallel");
    const void* library = library_of(parallel, &omp.file);
    if (library == nullptr || library_of(thread_num) != library || library_of(in_parallel) != library) return {};
    omp.parallel = reinterpret_cast<decltype(omp.parallel)>(parallel);
    omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(thread_num);
    omp.in_parallel = reinterpret_cast<decltype(omp.in_parallel)>(in_parallel);
    return omp;
}

// In the order in which the dynamic linker bound torch's own calls: the global scope, then what libtorch_cpu.so brought along.
OpenMp find_openmp() {
    OpenMp omp = openmp_in(RTLD_DEFAULT);
    if (omp.found()) return omp;
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch == nullptr ? omp : openmp_in(torch);  // the handle is kept: the functions must stay
}

const OpenMp& openmp() {
    static const OpenMp& found = *new OpenMp(find_openmp());  // never destroyed: a daemon thread may still ask at exit
    return found;
}

void run_on_openmp(Region& region, int threads) {
    // The whole team, even for fewer tasks: libgomp ends the threads that a smaller team leaves over and torch's next region
    // would have to start them again.
    openmp().parallel([](void* r) { static_cast<Region*>(r)->drain(openmp().thread_num()); }, &region, threads, 0);
}

// ------------------------------------------------------------------------------------------------------------ our own pool

// Helpers are detached and wait for a region, spinning for a moment and then asleep. A region has seats; helpers take one each,
// and the caller, when it has run out of tasks, removes those that are left and waits only for helpers that sit on one:
// on a busy machine nobody waits for a thread that has not even woken up.
class Pool {
public:
    // False, with nothing done, if another thread has the pool.
    bool run(Region& region, int threads) {
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        const uint64_t seats = hire(threads < kMaxThreads ? threads - 1 : kMaxThreads - 1);
        region_ = &region;
        const uint64_t epoch = epoch_of(state_.load(std::memory_order_relaxed)) + 1;
        state_.store(epoch << kEpochShift | seats << kSeatShift);  // sequentially consistent: see asleep_
        if (asleep_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }  // a helper that has counted itself asleep now really is
            wake_.notify_all();
        }
        region.drain(0);
        state_.fetch_and(~(kCountMask << kSeatShift));
        wait_for_helpers();
        busy_.store(false, std::memory_order_release);
        return true;
    }

private:
    // One word holds the region's number, the seats left and the helpers at work, so that joining is one compare-and-swap.
    static constexpr int kSeatShift = 16, kEpochShift = 32;
    static constexpr uint64_t kCountMask = 0xffff;
    static constexpr int kMaxThreads = 4096;
    static constexpr int kSpins = 1000;  // tens of microseconds: longer than the gap between two regions of one operator

    static uint64_t epoch_of(uint64_t state) { return state >> kEpochShift; }
    static uint64_t seats_of(uint64_t state) { return state >> kSeatShift & kCountMask; }
    static uint64_t active_of(uint64_t state) { return state & kCountMask; }

    // Starts helpers until there are `wanted`, and says how many there are for this region: fewer if the system gives no more.
    int hire(int wanted) {
        sigset_t all, before;  // signals are for the threads that the program made
        if (helpers_ < wanted) {
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);
            try {
                for (; helpers_ < wanted; ++helpers_) std::thread(&Pool::help, this).detach();
            } catch (const std::system_error&) {
            }
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
        }
        return helpers_ < wanted ? helpers_ : wanted;
    }

    void help() {
        for (uint64_t seen = 0;;) {
            uint64_t state = wait_for_region(seen);
            while (epoch_of(state) != seen && seats_of(state) > 0) {
                const uint64_t joined = state - (uint64_t{1} << kSeatShift) + 1;
                if (!state_.compare_exchange_weak(state, joined)) continue;
                seen = epoch_of(state);
                region_->drain(static_cast<int>(seats_of(state)));
                leave();
                break;
            }
            seen = epoch_of(state);
        }
    }

    // Until there is a region whose number is not `seen`; the state in which it was found.
    uint64_t wait_for_region(uint64_t seen) {
        for (int spin = 0; spin < kSpins; ++spin, pause_briefly()) {
            const uint64_t state = state_.load();
            if (epoch_of(state) != seen) return state;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        uint64_t state;
        while (epoch_of(state = state_.load()) == seen) wake_.wait(lock);
        asleep_.fetch_sub(1);
        return state;
    }

    void leave() {
        const uint64_t state = state_.fetch_sub(1) - 1;
        if (active_of(state) > 0 || !caller_asleep_.load()) return;
        { std::lock_guard<std::mutex> lock(mutex_); }
        done_.notify_one();
    }

    void wait_for_helpers() {
        for (int spin = 0; spin < kSpins; ++spin, pause_briefly()) {
            if (active_of(state_.load()) == 0) return;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        caller_asleep_.store(true);
        while (active_of(state_.load()) > 0) done_.wait(lock);
        caller_asleep_.store(false);
    }

    std::atomic<bool> busy_{false};
    int helpers_ = 0;           // only the caller that has the pool touches it
    Region* region_ = nullptr;  // written before the region's number, read after joining
    alignas(64) std::atomic<uint64_t> state_{0};
    // Whoever falls asleep counts itself first and then looks at state_; whoever wakes changes state_ first and then looks at the
    // count. In one total order of these operations at least one of the two sees the other, so no wake-up is lost.
    std::atomic<int> asleep_{0};
    std::atomic<bool> caller_asleep_{false};
    std::mutex mutex_;
    std::condition_variable wake_, done_;
};

// Never destroyed: helpers sleep in it until the process ends. A child after fork leaves its parent's to itself, whose helpers
// and perhaps locks belong to threads that do not exist there.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<bool> forked{false};

Pool& pool() {
    Pool* current = the_pool.load(std::memory_order_acquire);
    if (current != nullptr) return *current;
    Pool* made = new Pool;
    if (the_pool.compare_exchange_strong(current, made)) return *made;
    delete made;  // another thread was first
    return *current;
}

// When the extension is loaded, not at the first region: a fork in between counts too.
const int fork_is_watched = pthread_atfork(nullptr, nullptr, [] {
    forked.store(true);
    the_pool.store(nullptr);
});

// ------------------------------------------------------------------------------------------------------------ which of the two

bool choose_openmp() {
    const char* setting = std::getenv("QBERT_THREADS");
    const std::string wanted = setting == nullptr ? "" : setting;
    if (wanted.empty()) return openmp().found();
    if (wanted == "own") return false;
    if (wanted != "openmp") throw std::invalid_argument("QBERT_THREADS is '" + wanted + "'; allowed: own, openmp");
    if (!openmp().found()) {
        throw std::invalid_argument("QBERT_THREADS is 'openmp', but no OpenMP runtime is loaded in this process; allowed: own");
    }
    return true;
}

bool uses_openmp() {
    static const bool chosen = choose_openmp();
    return chosen && !forked.load(std::memory_order_relaxed);
}

}  // namespace

void run_tasks(int64_t tasks, int threads, TaskBody body, void* context) {
    const bool on_openmp = uses_openmp();
    if (tasks <= 1 || threads <= 1 || inside_region || (on_openmp && openmp().in_parallel())) {
        return run_inline(tasks, body, context);
    }
    Region region(body, context, tasks);
    if (on_openmp) return run_on_openmp(region, threads);
    if (!pool().run(region, threads)) run_inline(tasks, body, context);
}

std::string thread_backend() { return uses_openmp() ? "OpenMP (" + openmp().file + ")" : "own pool"; }

}  // namespace qbert
