// A few threads of the operating system that share a piece of work with the caller.
#pragma once

#include "../include/emulator/runtime.hpp"

#include <functional>

namespace emulator {

// CUDA_EMULATOR_THREADS, else the number of processors.
unsigned pool_size();

// Calls work() on the calling thread and on the pool's, and returns when all have returned. work() finds
// its share by itself, usually from an atomic counter. If the pool is taken, only the caller works.
EMULATOR_API void share(const std::function<void()> &work);

}  // namespace emulator
