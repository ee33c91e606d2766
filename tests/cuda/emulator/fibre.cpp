#include "emulator/fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "cuda/common/error.h"

namespace qbert::cuda::emulator {

#ifdef __x86_64__

// Keeps what a called function must keep (System V ABI), and goes on where the other one stopped.
extern "C" void qbert_emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden qbert_emulator_switch
.globl qbert_emulator_switch
.type qbert_emulator_switch, @function
qbert_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size qbert_emulator_switch, .-qbert_emulator_switch
)");

void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
    constexpr int kKeptRegisters = 6;
    auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack) + bytes);
    *--top = 0;  // where entry would return to; it also makes the stack's alignment that of a call
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < kKeptRegisters; ++i) *--top = 0;
    context = top;
}

void switch_context(Context& from, Context& to) { qbert_emulator_switch(&from, to); }

#else

void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

void* stack_of(size_t number) {
    static std::vector<char*> stacks;
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    while (stacks.size() <= number) {
        void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        require(memory != MAP_FAILED && mprotect(memory, page, PROT_NONE) == 0, "no memory for stack ", stacks.size());
        stacks.push_back(static_cast<char*>(memory) + page);
    }
    return stacks[number];
}

}  // namespace qbert::cuda::emulator
