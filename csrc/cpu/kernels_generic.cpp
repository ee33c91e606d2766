// Compiled with the flags of its instruction set (setup.py); without them it has nothing to offer.
#include "cpu/kernels.h"


#define QBERT_ISA generic
#include "cpu/dot_generic.h"
#include "cpu/table.h"

const qbert::Kernels* qbert::kernels_generic() {
    static constexpr Kernels kernels = generic::table(Isa{0});
    return &kernels;
}

