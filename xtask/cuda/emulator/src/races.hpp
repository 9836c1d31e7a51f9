// Data races between the CUDA threads of a block. build.py --races compiles the kernels for ThreadSanitizer
// and preloads its runtime; the engine then tells it which CUDA thread runs, and what orders threads: a
// barrier, __syncwarp, the beginning and the end of a block. Shuffles and votes order nothing, as in CUDA.
#pragma once

#include <vector>

namespace emulator::races {

// Whether ThreadSanitizer's runtime is in the process.
bool wanted();

// What ThreadSanitizer knows a CUDA thread by.
using Context = void *;
Context create(unsigned number);
void destroy(Context context);
Context current();
void enter(Context context);

// Whatever any of these did comes before whatever any of them will do. They must all be waiting, except for
// the current one.
void order(const std::vector<Context> &contexts);

// While one lives, the current context's accesses count for nothing.
struct Ignored {
    Ignored();
    ~Ignored();
};

}  // namespace emulator::races
