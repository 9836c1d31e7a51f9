// Stacks to switch between: a CUDA thread that waits for others keeps its state on one.
#pragma once

#include "races.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#if !defined(__x86_64__)
#error "the switch between stacks is written for x86-64"
#endif

// Saves the callee-saved registers of the System V ABI on the current stack, stores its pointer in
// *from, and goes on where the stack `to` was left.
extern "C" void emulator_switch_stack(void **from, void *to);
asm(R"(
.text
.p2align 4
.hidden emulator_switch_stack
.type emulator_switch_stack,@function
emulator_switch_stack:
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
.size emulator_switch_stack, .-emulator_switch_stack
)");

namespace emulator {

struct Fiber {
    static constexpr size_t page = 4096, stack_bytes = 256 * 1024;
    char *memory;
    // Of the stack's beginning: were all at one place in their pages, they would share a few lines of the cache.
    size_t shift;
    void *stack;  // the stack pointer while the fiber does not run
    races::Context context;

    // The lowest page stays inaccessible: a stack that overflows faults rather than spoils its neighbour.
    Fiber(void (*entry)(), unsigned number, races::Context context) : shift(number * 17 % 256 * 64), context(context) {
        void *mapped = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (mapped == MAP_FAILED || mprotect(mapped, page, PROT_NONE) != 0) {
            perror("cuda emulator: a stack for an emulated thread");
            abort();
        }
        memory = static_cast<char *>(mapped);
        restart(entry);
    }

    Fiber(const Fiber &) = delete;
    ~Fiber() {
        munmap(memory, stack_bytes);
        races::destroy(context);
    }

    // Forgets what the fiber was doing; it will begin with entry(), which must not return.
    void restart(void (*entry)()) {
        auto **top = reinterpret_cast<void **>(memory + stack_bytes - shift);
        *--top = nullptr;                          // entry's return address, where a call would put it
        *--top = reinterpret_cast<void *>(entry);  // where the first switch "returns" to
        for (int i = 0; i < 6; i++) *--top = nullptr;
        stack = top;
    }

    bool in_guard(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(memory) < page; }
};

}  // namespace emulator
