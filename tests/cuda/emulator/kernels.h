// What the kernels that test the emulator are told.
#pragma once

#include <cstdint>
#include <string>

namespace qbert::cuda {

#define QBERT_FAULTS(each)                                                                                        \
    each(none) each(no_wait_for_full) each(no_wait_for_empty) each(released_early) each(registers_reused)            \
    each(read_early) each(too_few_bytes) each(too_many_bytes) each(wrong_parity) each(too_few_arrivals)              \
    each(too_many_arrivals) each(only_own_empty) each(no_first_sync) each(no_last_sync) each(no_wait_for_grids)      \
    each(no_begin) each(begun_early) each(no_fence) each(misaligned_box)
#define QBERT_NAME(name) name,
enum class Fault { QBERT_FAULTS(QBERT_NAME) };
#undef QBERT_NAME

// out (64 blocks, 64) = rows (64 blocks, k) tokens (64, k)^T, k a number of 128-byte blocks of "s8", "f16" or "bf16".
void run_pipeline(uintptr_t tokens, uintptr_t rows, uintptr_t out, int blocks_of_k, unsigned blocks, const std::string& operand,
                  int fault);

}  // namespace qbert::cuda
