// Device memory. New memory holds NaNs, as a GPU leaves it undefined; a strip behind each allocation
// tells at its release whether a kernel wrote past the end.
//
// With CUDA_EMULATOR_FENCE=1 each allocation instead ends at a page that cannot be touched, and its pages
// are given back at its release: reading or writing past the end or after the release then faults at
// once, and the handler of faults.cpp names the kernel.
#include "memory.hpp"

#include "statistics.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace emulator {
namespace {

constexpr size_t strip = 64, alignment = 256;  // cuMemAlloc's alignment
constexpr size_t fenced_alignment = 16;        // so that the end is near the fence, and wide loads work
constexpr unsigned char undefined = 0xff, untouched = 0xa5;

struct Allocation {
    size_t bytes;
    char *mapped;  // the pages in fence mode
    size_t mapped_bytes;
};

struct Memory {
    std::mutex mutex;
    std::map<uint64_t, Allocation> live, freed;
    size_t used = 0, peak = 0;
};

// Never destroyed: programs free device memory while they exit.
Memory &memory() {
    static Memory *instance = new Memory;
    return *instance;
}

bool fence() {
    static const bool on = set_in_environment("CUDA_EMULATOR_FENCE");
    return on;
}

size_t total_memory() {
    static const size_t bytes = [] {
        if (const char *value = getenv("CUDA_EMULATOR_MEMORY_MB")) return size_t(strtoull(value, nullptr, 10)) << 20;
        return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
    }();
    return bytes;
}

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// The allocation that `address` lies in, or that ends there.
std::map<uint64_t, Allocation>::const_iterator find(const std::map<uint64_t, Allocation> &allocations,
                                                    uint64_t address) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return allocations.end();
    auto found = std::prev(next);
    return address <= found->first + found->second.bytes ? found : allocations.end();
}

}  // namespace

uint64_t allocate(size_t bytes) {
    Memory &m = memory();
    std::lock_guard lock(m.mutex);
    if (m.used + bytes > total_memory()) return 0;
    Allocation allocation{bytes, nullptr, 0};
    char *begin;
    if (fence()) {
        size_t page = size_t(sysconf(_SC_PAGESIZE)), room = round_up(bytes, fenced_alignment);
        allocation.mapped_bytes = round_up(room, page) + page;
        void *mapped =
            mmap(nullptr, allocation.mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) return 0;
        allocation.mapped = static_cast<char *>(mapped);
        char *end = allocation.mapped + allocation.mapped_bytes - page;
        mprotect(end, page, PROT_NONE);
        begin = end - room;
        memset(begin, undefined, room);
    } else {
        void *got;
        if (posix_memalign(&got, alignment, bytes + strip) != 0) return 0;
        begin = static_cast<char *>(got);
        memset(begin, undefined, bytes);
        memset(begin + bytes, untouched, strip);
    }
    auto address = reinterpret_cast<uint64_t>(begin);
    m.live[address] = allocation;
    m.freed.erase(address);
    m.used += bytes;
    if (m.used > m.peak) m.peak = m.used;
    return address;
}

bool release(uint64_t address) {
    Memory &m = memory();
    std::lock_guard lock(m.mutex);
    auto found = m.live.find(address);
    if (found == m.live.end()) {
        fprintf(stderr, "cuda emulator: release of %#lx, which %s\n", address,
                m.freed.count(address) ? "has been released already" : "is no allocation");
        return false;
    }
    Allocation allocation = found->second;
    m.live.erase(found);
    m.used -= allocation.bytes;
    auto *begin = reinterpret_cast<char *>(address);
    if (allocation.mapped) {
        munmap(allocation.mapped, allocation.mapped_bytes);
    } else {
        bool spoiled = false;
        for (size_t i = 0; i < strip; i++)
            spoiled |= static_cast<unsigned char>(begin[allocation.bytes + i]) != untouched;
        free(begin);
        if (spoiled) {
            fprintf(stderr,
                    "cuda emulator: something wrote past the end of an allocation of %zu bytes; "
                    "CUDA_EMULATOR_FENCE=1 says what\n",
                    allocation.bytes);
            return false;
        }
    }
    if (m.freed.size() > 4096) m.freed.clear();
    m.freed[address] = allocation;
    return true;
}

Residence residence(uint64_t address) {
    Memory &m = memory();
    std::lock_guard lock(m.mutex);
    if (find(m.live, address) != m.live.end()) return Residence::inside;
    return find(m.freed, address) != m.freed.end() ? Residence::freed : Residence::unknown;
}

bool contains(uint64_t address, size_t bytes) {
    Memory &m = memory();
    std::lock_guard lock(m.mutex);
    auto found = find(m.live, address);
    return found != m.live.end() && address + bytes <= found->first + found->second.bytes;
}

std::string describe(uint64_t address) {
    Memory &m = memory();
    std::lock_guard lock(m.mutex);
    char text[128];
    // In fence mode the touched page lies up to a page behind the allocation.
    for (bool live : {true, false}) {
        const auto &allocations = live ? m.live : m.freed;
        auto next = allocations.upper_bound(address);
        if (next == allocations.begin()) continue;
        auto found = std::prev(next);
        if (address >= found->first + found->second.bytes + 4096) continue;
        snprintf(text, sizeof text, "byte %lu of %s allocation of %zu bytes", address - found->first,
                 live ? "an" : "a released", found->second.bytes);
        return text;
    }
    snprintf(text, sizeof text, "%#lx, far from any allocation", address);
    return text;
}

MemoryUse memory_use() {
    Memory &m = memory();
    std::lock_guard lock(m.mutex);
    return {total_memory(), m.used, m.peak};
}

}  // namespace emulator
