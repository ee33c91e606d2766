// qbert._cpu: the native CPU side. Functions take pointers and sizes, never torch objects, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Native CPU side of qbert.";
    module.def("isa", [] { return qbert::name(qbert::selected_isa()); },
               "The integer instruction set in use: the best supported one, or the one that QBERT_CPU_ISA names.");
    module.def(
        "supported_isas",
        [] {
            std::vector<std::string> names;
            for (qbert::Isa isa : qbert::supported_isas()) names.emplace_back(qbert::name(isa));
            return names;
        },
        "All integer instruction sets that this process can use, ascending.");
}
