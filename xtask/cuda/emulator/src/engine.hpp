// Runs the blocks of a launch. See engine.cpp.
#pragma once

#include "../include/emulator/runtime.hpp"

#include <atomic>
#include <string>

namespace emulator {

// What sm_90 allows, and what this device says of itself.
constexpr unsigned max_threads_per_block = 1024;
constexpr size_t max_shared_memory = 227 * 1024;         // a block's, once the kernel has opted in
constexpr size_t max_shared_memory_unasked = 48 * 1024;  // without opting in; static memory always

struct Launch {
    const Kernel *kernel;
    void *const *arguments;
    uint3 grid, block;
    size_t dynamic_shared_memory;
    std::atomic<uint64_t> next_block{0};
    std::atomic<bool> failed{false};

    uint64_t blocks() const { return uint64_t(grid.x) * grid.y * grid.z; }
    unsigned threads() const { return block.x * block.y * block.z; }
};

// Runs every block, on several threads of the operating system if that pays. False if one has failed; it
// has said why on stderr.
bool run(Launch &launch);

// "kernel NAME, block (x, y, z), thread (x, y, z)" of the emulated thread that runs on the calling
// thread of the operating system; empty outside of kernels.
std::string where();

}  // namespace emulator
