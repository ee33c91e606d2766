// The emulated device, and what stands in for kernels that are not emulated.
#include "emulator/bind.h"

#include "cuda/sm90/launch.h"
#include "emulator/machine.h"

namespace qbert::cuda {

Device current_device() {
    require(emulator::settings.sm_count > 0, "the emulator has no device");
    return {0, kHopper, emulator::settings.sm_count, static_cast<int>(emulator::kSharedBytes)};
}

void check_on_device(const char*, const void*, const Device&) {}

template <TileIndex kIndex>
void launch_w8a8(const W8a8Linear&, const Launch&) {
    fail("the W8A8 linear of CUTLASS is not emulated");
}
template void launch_w8a8<k128x256>(const W8a8Linear&, const Launch&);
template void launch_w8a8<k128x192>(const W8a8Linear&, const Launch&);
template void launch_w8a8<k128x128>(const W8a8Linear&, const Launch&);
template void launch_w8a8<k64x128>(const W8a8Linear&, const Launch&);

static void emulate(uint64_t seed, int sm_count) { emulator::settings = {seed, sm_count}; }

void bind_emulator(pybind11::module_& module) {
    namespace py = pybind11;
    module.def("emulate", &emulate, py::arg("seed") = 0, py::arg("multiprocessors") = 3,
               "The order in which threads, copies and products take turns from now on, and the size of the device; 0 "
               "multiprocessors: there is no device.");
}

}  // namespace qbert::cuda
