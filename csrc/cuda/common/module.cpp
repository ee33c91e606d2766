// qbert._cuda: the native GPU side. Functions take pointers, sizes and the stream as integers, never torch objects, so one
// build serves every torch; it imports without a driver, and what is missing speaks when it is used.
#include <pybind11/pybind11.h>

#include <string>

#include "bind_enums.h"
#include "cuda/common/bind.h"
#include "cuda/common/device.h"
#include "cuda/common/error.h"
#ifdef QBERT_EMULATED
#include "emulator/bind.h"
#endif

namespace py = pybind11;

namespace qbert::cuda {
namespace {

std::string device_problem(bool rows) {
    try {
        const Device device = current_device();
        if (!rows) require_hopper(device, "this kernel");
        return "";
    } catch (const Error& error) {
        return error.what();
    }
}

// The error's type is looked up when the first error is thrown: while this module is imported, qbert may be half imported.
void translate(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const Error& error) {
        py::set_error(py::module_::import("qbert.errors").attr("QBertError"), error.what());
    }
}

}  // namespace
}  // namespace qbert::cuda

PYBIND11_MODULE(_cuda, module) {
    using namespace qbert::cuda;
    module.doc() = "Native GPU side of qbert: for compute capability 9.0 (H100), row kernels from 8.0 on.";
    py::register_local_exception_translator(&translate);
    module.def("device_problem", &device_problem, py::arg("rows") = false,
               "Why the kernels, or with `rows` the row kernels, cannot run on the current device; empty where they can.");
    module.attr("ENUMS") = qbert::enums();
    bind_w8a8(module);
    bind_rows(module);
    bind_lowbit(module);
    bind_weight_only(module);
    bind_layer(module);
#ifdef QBERT_EMULATED
    bind_emulator(module);
#endif
}
