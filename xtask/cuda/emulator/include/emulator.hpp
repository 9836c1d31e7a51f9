// Gives CUDA C++ a meaning on the host. build.py includes this header in front of every kernel source,
// and rewrites what no macro can express (`__shared__` declarations; see there).
#pragma once

#include <cassert>
#include <cstdio>

#include "emulator/atomics.hpp"
#include "emulator/math.hpp"
#include "emulator/register.hpp"
#include "emulator/runtime.hpp"
#include "emulator/vectors.hpp"
#include "emulator/warp.hpp"

#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__
// `__global__` and `__shared__` stay as they are until build.py has found them.

#define threadIdx (::emulator::running.thread)
#define blockIdx (::emulator::running.block)
#define blockDim (::emulator::running.block_dim)
#define gridDim (::emulator::running.grid_dim)
#define warpSize 32

#define __syncthreads() ::emulator::barrier(__FILE__, __LINE__)

// A device-side assertion fails the launch, it does not end the program.
extern "C" [[noreturn]] void emulator_assertion(const char *expression, const char *file, unsigned line,
                                                const char *function) noexcept;
#define __assert_fail emulator_assertion
