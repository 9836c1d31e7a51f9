#include "statistics.hpp"

#include "memory.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace emulator {
namespace {

struct Launches {
    uint64_t calls = 0;
    double seconds = 0;
};

std::mutex mutex;
std::map<std::string, Launches> &launches() {
    static auto *table = new std::map<std::string, Launches>;
    return *table;
}

void line(const char *name, const Counter &counter) {
    fprintf(stderr, "  %-32s %10lu", name, counter.calls.load());
    if (counter.bytes) fprintf(stderr, " %14.3f MB", double(counter.bytes) / 1e6);
    fprintf(stderr, "\n");
}

void print() {
    const Statistics &s = statistics();
    MemoryUse use = memory_use();
    uint64_t waits = s.stream_synchronisations.calls + s.context_synchronisations.calls +
                     s.event_synchronisations.calls + s.downloads.calls + s.blocking_calls.calls;
    fprintf(stderr, "cuda emulator: statistics\n");
    line("copies host to device", s.to_device);
    line("  large, not from pinned memory", s.large_uploads);
    line("copies device to host", s.to_host);
    line("copies on the device", s.on_device);
    line("fills", s.fills);
    line("allocations", s.allocations);
    line("releases", s.releases);
    fprintf(stderr, "  %-32s %10s %14.3f MB\n", "memory at its peak", "", double(use.peak) / 1e6);
    fprintf(stderr, "  %-32s %10s %14.3f MB\n", "memory never released", "", double(use.used) / 1e6);
    line("event calls", s.event_calls);
    line("stream synchronisations", s.stream_synchronisations);
    line("context synchronisations", s.context_synchronisations);
    line("event synchronisations", s.event_synchronisations);
    line("downloads that wait", s.downloads);
    line("other calls that block", s.blocking_calls);
    fprintf(stderr, "  %-32s %10lu\n", "synchronisations in all", waits);

    std::lock_guard lock(mutex);
    std::vector<std::pair<std::string, Launches>> table(launches().begin(), launches().end());
    std::sort(table.begin(), table.end(), [](auto &a, auto &b) { return a.second.seconds > b.second.seconds; });
    Launches all;
    for (auto &[name, entry] : table) all.calls += entry.calls, all.seconds += entry.seconds;
    fprintf(stderr, "  %-32s %10lu %14.3f s\n", "launches", all.calls, all.seconds);
    for (auto &[name, entry] : table)
        fprintf(stderr, "    %-30s %10lu %14.3f s\n", name.c_str(), entry.calls, entry.seconds);
}

}  // namespace

bool set_in_environment(const char *name) {
    const char *value = getenv(name);
    return value && *value && strcmp(value, "0") != 0;
}

Statistics &statistics() {
    static auto *instance = new Statistics;
    return *instance;
}

bool statistics_wanted() {
    static const bool wanted = [] {
        bool on = set_in_environment("CUDA_EMULATOR_STATISTICS");
        if (on) atexit(print);
        return on;
    }();
    return wanted;
}

void trace(const char *format, ...) {
    static const bool wanted = set_in_environment("CUDA_EMULATOR_TRACE");
    if (!wanted) return;
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "cuda emulator: %s\n", text);
}

CountedLaunch::CountedLaunch(const std::string &kernel) : kernel_(kernel), begin_(std::chrono::steady_clock::now()) {}

CountedLaunch::~CountedLaunch() {
    if (!statistics_wanted()) return;
    std::lock_guard lock(mutex);
    Launches &entry = launches()[kernel_];
    entry.calls++;
    entry.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
}

}  // namespace emulator
