// qbert._cpu: the native CPU side.
#include <pybind11/stl.h>

#include <vector>

#include "cpu/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace {

// 0 + 1 + ... + (tasks - 1), one task a number: what the tests of the threads run from Python.
int64_t parallel_sum(int64_t tasks, int threads) {
    std::vector<int64_t> sums(static_cast<size_t>(threads > 1 ? threads : 1) * 8);  // a cache line a worker
    qbert::parallel_for(tasks, threads, [&](int64_t task, int worker) { sums[static_cast<size_t>(worker) * 8] += task; });
    int64_t sum = 0;
    for (int64_t part : sums) sum += part;
    return sum;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Native CPU side of qbert.";
    module.def("isa", [] { return qbert::name(qbert::kernels().isa); },
               "The instruction set in use: the best one, or the one that QBERT_CPU_ISA or use_isa names.");
    module.def(
        "supported_isas",
        [] {
            std::vector<std::string> names;
            for (qbert::Isa isa : qbert::usable_isas()) names.emplace_back(qbert::name(isa));
            return names;
        },
        "All instruction sets that this CPU, this process and this build have, ascending.");
    module.def("use_isa", &qbert::use_isa_named, pybind11::arg("name"),
               "Takes the kernels of another supported instruction set from now on (for tests and measurements).");
    module.def("thread_backend", &qbert::thread_backend,
               "What parallel regions run on: 'own pool', or 'OpenMP (<file of the runtime>)'. QBERT_THREADS=own|openmp forces one.");
    module.def("_parallel_sum", &parallel_sum, pybind11::call_guard<pybind11::gil_scoped_release>(),
               "The sum of 0 ... tasks - 1, one task a number (for tests).");
    qbert::bind_weight(module);
    qbert::bind_linear(module);
    qbert::bind_rows(module);
    qbert::bind_weight_only(module);
    qbert::bind_watch(module);
}
