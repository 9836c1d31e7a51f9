// Atomic functions. Blocks may run on several threads of the operating system, so these are real ones.
#pragma once

#include <cstring>
#include <type_traits>

namespace emulator {

template <size_t bytes>
struct Word;
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned int;
};
template <>
struct Word<8> {
    using type = unsigned long long;
};

// Replaces *address by update(*address); returns what was there.
template <class T, class Update>
T atomic_update(T *address, Update update) {
    using Bits = typename Word<sizeof(T)>::type;
    auto *word = reinterpret_cast<Bits *>(address);
    Bits expected = __atomic_load_n(word, __ATOMIC_RELAXED), desired;
    T old;
    do {
        memcpy(&old, &expected, sizeof old);
        T next = update(old);
        memcpy(&desired, &next, sizeof desired);
    } while (!__atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}

// Keeps the second argument out of template deduction, as in CUDA's overloads: atomicAdd(&unsigned, 1).
template <class T>
using Same = typename std::common_type<T>::type;

}  // namespace emulator

template <class T>
T atomicAdd(T *address, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T old) { return T(old + value); });
}
template <class T>
T atomicSub(T *address, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T old) { return T(old - value); });
}
template <class T>
T atomicMax(T *address, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T *address, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicAnd(T *address, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T old) { return T(old & value); });
}
template <class T>
T atomicOr(T *address, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T old) { return T(old | value); });
}
template <class T>
T atomicXor(T *address, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T old) { return T(old ^ value); });
}
template <class T>
T atomicExch(T *address, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T *address, emulator::Same<T> compare, emulator::Same<T> value) {
    return emulator::atomic_update(address, [=](T old) { return old == compare ? value : old; });
}
inline unsigned atomicInc(unsigned *address, unsigned limit) {
    return emulator::atomic_update(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
