// The shared memory of the block that runs. Everything is filled with NaNs before a block begins, as a
// GPU leaves it undefined, and a strip behind each array tells whether a thread wrote past its end.
#pragma once

#include "engine.hpp"

#include <cstring>
#include <string>
#include <vector>

namespace emulator {

class SharedMemory {
    static constexpr size_t strip = 64;
    static constexpr unsigned char undefined = 0xff, untouched = 0xa5;

    struct Array {
        const void *key;
        const char *name;
        char *begin;
        size_t bytes;
    };

public:
    SharedMemory() : memory_(max_shared_memory + 64 * 1024) {}

    void begin_block(size_t dynamic_bytes) {
        arrays_.clear();
        used_ = bytes_ = 0;
        // Aligned as on a GPU: generously, so that kernels may cast it to anything.
        dynamic_ = add(nullptr, "its dynamic shared memory", dynamic_bytes, 1024);
    }

    void *dynamic() const { return dynamic_; }

    void *declared(const void *key, size_t bytes, size_t alignment, const char *name) {
        for (const Array &array : arrays_)
            if (array.key == key) return array.begin;
        return add(key, name, bytes, alignment < 16 ? 16 : alignment);
    }

    // The name of an array that was written past its end; empty if there is none.
    std::string overrun() const {
        for (const Array &array : arrays_)
            for (size_t i = 0; i < strip; i++)
                if (static_cast<unsigned char>(array.begin[array.bytes + i]) != untouched)
                    return std::string(array.name) + " (" + std::to_string(array.bytes) + " bytes)";
        return "";
    }

private:
    char *add(const void *key, const char *name, size_t bytes, size_t alignment) {
        bytes_ += bytes;
        size_t base = reinterpret_cast<size_t>(memory_.data());
        size_t begin = (base + used_ + alignment - 1) / alignment * alignment - base;
        if (bytes_ > max_shared_memory || begin + bytes + strip > memory_.size())
            fail("%zu bytes of shared memory with %s, a block can have %zu", bytes_, name, max_shared_memory);
        char *array = memory_.data() + begin;
        memset(array, undefined, bytes);
        memset(array + bytes, untouched, strip);
        used_ = begin + bytes + strip;
        arrays_.push_back({key, name, array, bytes});
        return array;
    }

    std::vector<char> memory_;
    std::vector<Array> arrays_;
    size_t used_ = 0, bytes_ = 0;
    char *dynamic_ = nullptr;
};

}  // namespace emulator
