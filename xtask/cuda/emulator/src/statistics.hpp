// Counts, printed at exit with CUDA_EMULATOR_STATISTICS=1.
#pragma once

#include "../include/emulator/runtime.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

struct Counter {
    std::atomic<uint64_t> calls{0}, bytes{0};
    void add(size_t size = 0) { calls++, bytes += size; }
};

struct Statistics {
    Counter to_device, to_host, on_device, fills, allocations, releases;
    // Uploads that a driver may make the host wait for: more than 64 KB, from memory that is not pinned.
    Counter large_uploads;
    // Events made, recorded and waited for by a stream: they keep streams apart, and cost the host time.
    Counter event_calls;
    // What makes the host wait for the device. Among it downloads to memory that is not pinned, `Async` or not.
    Counter stream_synchronisations, context_synchronisations, event_synchronisations, downloads, blocking_calls;
};

// Whether the variable is there, not empty and not 0.
bool set_in_environment(const char *name);

Statistics &statistics();
bool statistics_wanted();
// A line on stderr with CUDA_EMULATOR_TRACE=1.
EMULATOR_API void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Counts a launch and, if statistics are wanted, the time until the end of its scope.
class EMULATOR_API CountedLaunch {
public:
    explicit CountedLaunch(const std::string &kernel);
    ~CountedLaunch();

private:
    std::string kernel_;
    std::chrono::steady_clock::time_point begin_;
};

}  // namespace emulator
