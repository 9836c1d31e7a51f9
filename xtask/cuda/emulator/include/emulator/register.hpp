// Registration of kernels: build.py appends one EMULATOR_KERNEL(name) per `__global__` function.
#pragma once

#include "runtime.hpp"

#include <type_traits>
#include <utility>

namespace emulator {

template <auto function>
struct Registration;

template <class... Arguments, void (*function)(Arguments...)>
struct Registration<function> {
    template <size_t... i>
    static void unpack(void *const *arguments, std::index_sequence<i...>) {
        (void)arguments;
        function(*static_cast<std::remove_reference_t<Arguments> *>(arguments[i])...);
    }
    static void call(void *const *arguments) { unpack(arguments, std::index_sequence_for<Arguments...>{}); }

    // One element more than arguments, as an array must not be empty.
    static constexpr unsigned char sizes[] = {static_cast<unsigned char>(sizeof(Arguments))..., 0};
    static constexpr bool pointers[] = {std::is_pointer_v<Arguments>..., false};

    explicit Registration(const char *name) { register_kernel({name, call, sizeof...(Arguments), sizes, pointers}); }
};

}  // namespace emulator

#define EMULATOR_KERNEL(name) static const ::emulator::Registration<&name> emulator_registers_##name(#name);
