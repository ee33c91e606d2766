// What integer matrix instructions this CPU has, and which of them this process may use.
#pragma once

#include <string>
#include <vector>

namespace qbert {

// Ascending: a CPU with one of the x86 sets can run all that stand before it.
enum class Isa : int { generic, avx2, avx_vnni, avx512_vnni, amx_int8 };

const char* name(Isa isa);

// All sets that the CPU has and that the operating system lets this process use, ascending; never empty.
const std::vector<Isa>& supported_isas();

// The set asked for: the best one, or the one that the environment variable QBERT_CPU_ISA names.
// Throws std::invalid_argument, naming the value and what is allowed, if it names one that is not supported.
Isa selected_isa();

// Those of supported_isas that this build has kernels for, ascending.
std::vector<Isa> usable_isas();

// Takes the kernels of the set of that name from now on. Throws std::invalid_argument if it is not among usable_isas.
void use_isa_named(const std::string& wanted);

}  // namespace qbert
