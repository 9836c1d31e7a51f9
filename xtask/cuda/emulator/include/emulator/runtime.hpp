// What a running kernel asks of the emulator: who am I, wait for the others, where is my shared memory.
// Implemented in libcuda.so.1 (src/engine.cpp); both it and the compiled kernels include this header.
#pragma once

#include "vectors.hpp"

#include <cstddef>

#define EMULATOR_API __attribute__((visibility("default")))

namespace emulator {

// The coordinates of the CUDA thread that runs now on this thread of the operating system; the engine
// rewrites them whenever it switches. `initial-exec` makes reading one as cheap as reading a global.
struct Running {
    uint3 thread, block;
    uint3 block_dim, grid_dim;
    unsigned lane;  // linear thread index % 32
};
extern __thread Running running __attribute__((tls_model("initial-exec"))) EMULATOR_API;

constexpr unsigned warp_size = 32;

// __syncthreads(): returns when every thread of the block stands at the barrier of the same line. A
// thread that never comes, or stands at another line, fails the launch.
EMULATOR_API void barrier(const char *file, int line);

// Something the lanes named in `mask` do together. Each brings a request; the last to arrive performs
// the operation on all of them (absent lanes are null) and then all go on. Lanes that have ended, or
// that the block does not have, are not waited for.
using Operation = void (*)(void *const requests[warp_size], unsigned members);
EMULATOR_API void collective(unsigned mask, Operation operation, void *request, const char *name);

// The lanes of the calling thread's warp that have not ended.
EMULATOR_API unsigned active_lanes();

// The block's instance of one `__shared__` declaration; `key` identifies the declaration.
EMULATOR_API void *shared_memory(const void *key, size_t bytes, size_t alignment, const char *name);

// The block's dynamic shared memory: as many bytes as the launch asked for.
EMULATOR_API void *dynamic_shared_memory();

// Ends the launch with an error that names the kernel, block and thread.
[[noreturn]] EMULATOR_API void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// A kernel as the plug-ins register it. `call` unpacks the driver's array of argument pointers.
struct Kernel {
    const char *name;
    void (*call)(void *const *arguments);
    unsigned argument_count;
    const unsigned char *argument_sizes;
    const bool *argument_is_pointer;
};
EMULATOR_API void register_kernel(const Kernel &kernel);

}  // namespace emulator
