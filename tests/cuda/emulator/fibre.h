// Fibres: a thread of a kernel is a stack of its own and the place where it stopped, all in one thread of the system.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace qbert::cuda::emulator {

#ifdef __x86_64__
using Context = void*;  // the stack's pointer; what else is kept lies on the stack
#else
using Context = ucontext_t;
#endif

// A context that will run entry() on that stack; entry never returns.
void prepare(Context& context, void* stack, size_t bytes, void (*entry)());
void switch_context(Context& from, Context& to);

// A stack for the fibre of that number, with a page below it that nobody may touch. Kept for later fibres.
inline constexpr size_t kStackBytes = 128 * 1024;
void* stack_of(size_t number);

}  // namespace qbert::cuda::emulator
