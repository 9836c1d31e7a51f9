// A fault inside of a kernel: says which thread of which kernel touched what, then ends as it would have.
#include "faults.hpp"

#include "engine.hpp"
#include "memory.hpp"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

namespace emulator {

bool stack_overflow(uintptr_t address);

namespace {

struct sigaction before_segv, before_bus, before_fpe;

// What it calls is not all safe in a signal handler; the program is lost anyway, and the line is worth it.
void report(int signal, siginfo_t *info, void *context) {
    std::string at = where();
    auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (!at.empty()) {
        if (signal == SIGFPE) fprintf(stderr, "cuda emulator: %s: division of an integer by zero\n", at.c_str());
        else if (stack_overflow(address))
            fprintf(stderr, "cuda emulator: %s: its local variables overflow the stack\n", at.c_str());
        else fprintf(stderr, "cuda emulator: %s touches %s\n", at.c_str(), describe(address).c_str());
    }
    const struct sigaction &before = signal == SIGSEGV ? before_segv : signal == SIGBUS ? before_bus : before_fpe;
    if (at.empty() && (before.sa_flags & SA_SIGINFO)) {
        before.sa_sigaction(signal, info, context);  // not ours: the program's own handler
        return;
    }
    ::signal(signal, SIG_DFL);  // the instruction faults again, this time for good
}

}  // namespace

void catch_faults_on_this_thread() {
    static thread_local bool done = false;
    if (done) return;
    done = true;
    stack_t current;
    sigaltstack(nullptr, &current);
    if (!(current.ss_flags & SS_DISABLE)) return;  // Rust's runtime gave its threads one
    constexpr size_t bytes = 64 * 1024;
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return;
    stack_t alternative{};
    alternative.ss_sp = memory;
    alternative.ss_size = bytes;
    sigaltstack(&alternative, nullptr);
}

void catch_faults() {
    struct sigaction action{};
    action.sa_sigaction = report;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
    sigaction(SIGFPE, &action, &before_fpe);
}

}  // namespace emulator
