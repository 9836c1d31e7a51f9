// Device memory, which here is the host's. See memory.cpp.
#pragma once

#include "../include/emulator/runtime.hpp"

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

// How an address relates to the allocations.
enum class Residence { inside, freed, unknown };

struct MemoryUse {
    size_t total, used, peak;
};

// 0 if there is not enough.
uint64_t allocate(size_t bytes);
// False, with a reason on stderr, if `address` does not begin an allocation.
bool release(uint64_t address);
Residence residence(uint64_t address);
// True if all the bytes lie in one allocation (its end itself is allowed when bytes is 0).
EMULATOR_API bool contains(uint64_t address, size_t bytes);
// "byte 12 of an allocation of 100 bytes" and the like, for messages.
std::string describe(uint64_t address);
MemoryUse memory_use();

}  // namespace emulator
