// What the files of the driver API share.
#pragma once

#include "modules.hpp"

#define __CUDA_API_VERSION_INTERNAL   // cuda.h then leaves names as they are: cuMemAlloc_v2 and so on
#pragma GCC visibility push(default)  // what cuda.h declares is what the library exports
#include <cuda.h>
#pragma GCC visibility pop

namespace emulator {

// Runs the kernel to its end. CUDA_ERROR_LAUNCH_FAILED, or what was wrong with the launch.
CUresult launch_kernel(const Function &function, uint3 grid, uint3 block, size_t dynamic_shared_memory,
                       void *const *arguments);

// The last line of a call that answers through a pointer.
template <class T, class Value>
CUresult give(T *to, Value value, CUresult result = CUDA_SUCCESS) {
    *to = value;
    return result;
}

// As on a GPU, a kernel that failed spoils its context: every later call that touches the device answers
// with the same error.
extern std::atomic<CUresult> spoiled;

}  // namespace emulator
