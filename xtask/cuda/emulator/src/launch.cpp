// cuLaunchKernel: everything that can be wrong with a launch is checked before it runs.
#include "driver.hpp"

#include "faults.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "statistics.hpp"

#include <cstring>

namespace emulator {

bool run_on_this_thread(Launch &launch);

namespace {

// Below this many threads, waking another thread of the operating system costs more than it brings.
constexpr uint64_t worth_sharing = 4096;

CUresult check_grid(const Function &function, const Launch &launch) {
    const uint3 grid = launch.grid, block = launch.block;
    const char *name = function.name.c_str();
    auto zero = [](uint3 v) { return v.x == 0 || v.y == 0 || v.z == 0; };
    if (zero(grid) || zero(block) || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || block.x > 1024 ||
        block.y > 1024 || block.z > 64 || launch.threads() > max_threads_per_block) {
        fprintf(stderr,
                "cuda emulator: kernel %s: a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads is not possible\n",
                name, grid.x, grid.y, grid.z, block.x, block.y, block.z);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (launch.threads() > function.max_threads) {
        fprintf(stderr, "cuda emulator: kernel %s: %u threads per block, its launch bounds allow %u\n", name,
                launch.threads(), function.max_threads);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (launch.dynamic_shared_memory > function.dynamic_shared_limit) {
        fprintf(stderr,
                "cuda emulator: kernel %s: %zu bytes of dynamic shared memory, allowed are %zu "
                "(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES raises that to %zu)\n",
                name, launch.dynamic_shared_memory, function.dynamic_shared_limit, max_shared_memory);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

// Every pointer argument is null or lies in an allocation, or just behind one (of an empty slice).
CUresult check_pointers(const Kernel &kernel, void *const *arguments) {
    for (unsigned i = 0; i < kernel.argument_count; i++) {
        if (!kernel.argument_is_pointer[i]) continue;
        uint64_t address;
        memcpy(&address, arguments[i], sizeof address);
        if (address == 0) continue;
        Residence where = residence(address);
        if (where == Residence::inside) continue;
        fprintf(stderr, "cuda emulator: kernel %s: argument %u, the pointer %#lx, %s\n", kernel.name, i, address,
                where == Residence::freed ? "has been released" : "is not device memory");
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    return CUDA_SUCCESS;
}

}  // namespace

CUresult launch_kernel(const Function &function, uint3 grid, uint3 block, size_t dynamic_shared_memory,
                       void *const *arguments) {
    const Kernel &kernel = *function.kernel;
    Launch launch{&kernel, arguments, grid, block, dynamic_shared_memory};
    if (CUresult result = check_grid(function, launch)) return result;
    if (CUresult result = check_pointers(kernel, arguments)) return result;
    trace("%s, grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory", kernel.name, grid.x, grid.y, grid.z,
          block.x, block.y, block.z, dynamic_shared_memory);

    CountedLaunch counted(function.name);
    catch_faults_on_this_thread();
    if (launch.blocks() > 1 && launch.blocks() * launch.threads() >= worth_sharing)
        share([&] { run_on_this_thread(launch); });
    else run_on_this_thread(launch);
    return launch.failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

}  // namespace emulator
