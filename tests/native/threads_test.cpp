// Regions of tasks. Counters are plain integers on purpose: ThreadSanitizer sees what is not ordered.
#include "cpu/threads.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "check.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using qbert::parallel_for;

namespace {

constexpr int kPad = 16;  // a cache line of integers for each worker

void run_and_check(int64_t tasks, int threads) {
    std::vector<int> runs(tasks > 0 ? tasks : 0);
    std::vector<int> of_worker((threads > 1 ? threads : 1) * kPad);
    parallel_for(tasks, threads, [&](int64_t task, int worker) {
        ++runs.at(task);
        ++of_worker.at(worker * kPad);
    });
    int64_t total = 0;
    for (int run : runs) CHECK_EQ(run, 1);
    for (int part : of_worker) total += part;
    CHECK_EQ(total, static_cast<int64_t>(runs.size()));
}

void wait_until_asleep() { std::this_thread::sleep_for(std::chrono::milliseconds(2)); }

}  // namespace

TEST(threads_run_each_task_once) {
    for (int threads : {-1, 0, 1, 2, 3, 8}) {
        for (int64_t tasks : {-1, 0, 1, 2, 3, 7, 64, 1000}) run_and_check(tasks, threads);
    }
}

TEST(threads_survive_many_short_regions) {
    for (int i = 0; i < 5000; ++i) run_and_check(i % 5, 2 + i % 3);
}

TEST(threads_wake_up_after_a_rest) {
    for (int i = 0; i < 50; ++i) {
        wait_until_asleep();
        run_and_check(100, 2 + i % 4);
    }
}

TEST(threads_wait_for_a_slow_task) {
    int64_t done = 0;
    parallel_for(2, 2, [&](int64_t task, int worker) {
        if (worker != 0) wait_until_asleep();
        __atomic_fetch_add(&done, task + 1, __ATOMIC_RELAXED);
        wait_until_asleep();
    });
    CHECK_EQ(done, 3);
}

TEST(threads_keep_their_worker_number) {
    constexpr int kThreads = 4;
    std::vector<std::thread::id> ids(kThreads);
    bool same = true;
    parallel_for(2000, kThreads, [&](int64_t, int worker) {
        std::thread::id& id = ids.at(worker);
        if (id == std::thread::id()) id = std::this_thread::get_id();
        if (id != std::this_thread::get_id()) same = false;
    });
    CHECK(same);
    for (int a = 0; a < kThreads; ++a) {
        for (int b = 0; b < a; ++b) CHECK(ids[a] == std::thread::id() || ids[a] != ids[b]);
    }
    CHECK(ids[0] == std::thread::id() || ids[0] == std::this_thread::get_id());
}

TEST(threads_run_a_region_inside_a_region_inline) {
    std::vector<int> inner(8 * kPad), wrong(8 * kPad);
    parallel_for(8, 4, [&](int64_t task, int) {
        const std::thread::id self = std::this_thread::get_id();
        parallel_for(10, 4, [&](int64_t, int worker) {
            ++inner[task * kPad];
            if (worker != 0 || std::this_thread::get_id() != self) ++wrong[task * kPad];
        });
    });
    for (int task = 0; task < 8; ++task) {
        CHECK_EQ(inner[task * kPad], 10);
        CHECK_EQ(wrong[task * kPad], 0);
    }
    run_and_check(100, 4);
}

TEST(threads_hand_on_what_a_task_throws) {
    for (int threads : {1, 4}) {
        for (int i = 0; i < 100; ++i) {
            std::string caught;
            try {
                parallel_for(50, threads, [&](int64_t task, int) {
                    if (task >= 7) throw std::runtime_error(std::string("from a task"));
                });
            } catch (const std::runtime_error& error) {
                caught = error.what();
            }
            CHECK(caught == "from a task");
            run_and_check(20, threads);
        }
    }
}

TEST(threads_run_inline_inside_a_foreign_openmp_region) {
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (qbert::thread_backend() == "own pool" || parallel == nullptr) throw check::Skipped("no OpenMP in use");
    int wrong = 0;
    parallel(
        [](void* count) {
            const std::thread::id self = std::this_thread::get_id();
            parallel_for(50, 2, [&](int64_t, int worker) {
                if (worker != 0 || std::this_thread::get_id() != self) __atomic_fetch_add(static_cast<int*>(count), 1, __ATOMIC_RELAXED);
            });
        },
        &wrong, 2, 0);
    CHECK_EQ(wrong, 0);
}

TEST(threads_serve_many_callers) {
    std::vector<std::string> errors(4);
    std::vector<std::thread> callers;
    for (std::string& error : errors) {
        callers.emplace_back([&error] {
            try {
                for (int i = 0; i < 500; ++i) run_and_check(1 + i % 40, 3);
            } catch (const std::exception& e) {
                error = e.what();
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::string& error : errors) CHECK_EQ(error.size(), 0u);
}

TEST(threads_of_a_forked_child_are_its_own_pool) {
#if defined(__SANITIZE_THREAD__)
    throw check::Skipped("ThreadSanitizer does not follow a fork of several threads");
#endif
    run_and_check(100, 3);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);  // a child that hangs is a failure, not a wait
        int code = qbert::thread_backend() == "own pool" ? 0 : 2;
        try {
            for (int i = 0; i < 200; ++i) run_and_check(100, 3);
            const pid_t grandchild = fork();
            if (grandchild == 0) {
                run_and_check(100, 3);
                _exit(0);
            }
            int status = 1;
            if (waitpid(grandchild, &status, 0) != grandchild || status != 0) code = 3;
        } catch (const std::exception&) {
            code = 4;
        }
        _exit(code);
    }
    int status = 1;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    run_and_check(100, 3);
}

TEST(threads_compute_ieee_arithmetic_whatever_the_caller_set) {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    const unsigned flushing = before | 0x8040;  // denormals are zeros, results too
    _mm_setcsr(flushing);
    std::vector<unsigned> seen(64);
    for (int threads : {1, 4}) {
        parallel_for(64, threads, [&](int64_t task, int) { seen[task] = _mm_getcsr(); });
        const unsigned after = _mm_getcsr();
        for (unsigned state : seen) CHECK_EQ(state & 0xffc0u, 0x1f80u);
        CHECK_EQ(after, flushing);
    }
    _mm_setcsr(before);
#else
    throw check::Skipped("x86 only");
#endif
}
