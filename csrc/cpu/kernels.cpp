#include "cpu/kernels.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace qbert {
namespace {

// Null where the compiler did not know the instruction set.
const Kernels* of(Isa isa) {
    switch (isa) {
        case Isa::generic: return kernels_generic();
#if defined(__x86_64__)
        case Isa::avx2: return kernels_avx2();
        case Isa::avx_vnni: return kernels_avx_vnni();
        case Isa::avx512_vnni: return kernels_avx512_vnni();
        case Isa::amx_int8: return kernels_amx_int8();
#endif
        default: return nullptr;
    }
}

std::atomic<const Kernels*> in_use{nullptr};

// Those of `isa`, or of the next lower set that this build has kernels for.
const Kernels* best_up_to(Isa isa) {
    const Kernels* best = nullptr;
    for (Isa each : usable_isas()) {
        if (each <= isa) best = of(each);
    }
    return best;
}

}  // namespace

std::vector<Isa> usable_isas() {
    std::vector<Isa> usable;
    for (Isa each : supported_isas()) {
        if (of(each) != nullptr) usable.push_back(each);
    }
    return usable;
}

const Kernels& kernels() {
    const Kernels* found = in_use.load(std::memory_order_acquire);
    if (found == nullptr) {
        found = best_up_to(selected_isa());
        in_use.store(found, std::memory_order_release);
    }
    return *found;
}

void use_isa_named(const std::string& wanted) {
    std::string allowed;
    for (Isa each : usable_isas()) {
        if (wanted == name(each)) return in_use.store(of(each), std::memory_order_release);
        allowed += (allowed.empty() ? "" : ", ") + std::string(name(each));
    }
    throw std::invalid_argument("instruction set is '" + wanted + "'; allowed here: " + allowed);
}

}  // namespace qbert
