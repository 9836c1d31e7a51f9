// CUDA's small vector types, with CUDA's sizes and alignments.
#pragma once

#include <cstdint>

struct uint3 {
    unsigned int x, y, z;
};

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// The aligned attribute matters: kernels reinterpret_cast buffers to these types for wide loads.
#define EMULATOR_VECTORS(T, name, bytes)                                       \
    struct name##1 { T x; };                                                   \
    struct alignas(2 * bytes) name##2 { T x, y; };                             \
    struct name##3 { T x, y, z; };                                             \
    struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { T x, y, z, w; }; \
    inline name##1 make_##name##1(T x) { return {x}; }                         \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                 \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }         \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATOR_VECTORS(float, float, 4)
EMULATOR_VECTORS(double, double, 8)
EMULATOR_VECTORS(int, int, 4)
EMULATOR_VECTORS(short, short, 2)
EMULATOR_VECTORS(unsigned short, ushort, 2)
EMULATOR_VECTORS(signed char, char, 1)
EMULATOR_VECTORS(unsigned char, uchar, 1)
EMULATOR_VECTORS(long long, longlong, 8)
#undef EMULATOR_VECTORS

// uint3 stands above, because threadIdx has that type.
struct uint1 {
    unsigned int x;
};
struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint3 make_uint3(unsigned int x, unsigned int y, unsigned int z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }
