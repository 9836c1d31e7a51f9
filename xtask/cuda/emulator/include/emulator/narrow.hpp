// 16-bit floating-point types. Every operation computes in f32 and rounds once to nearest even, which is
// what the hardware's scalar instructions give.
#pragma once

#include "math.hpp"
#include "vectors.hpp"

struct __half_raw {
    unsigned short x;
};
struct __nv_bfloat16_raw {
    unsigned short x;
};

namespace emulator {

struct Bfloat16 {
    using Raw = __nv_bfloat16_raw;
    static unsigned short encode(float value) {
        if (value != value) return 0x7fff;
        unsigned bits = bit_cast<unsigned>(value);
        return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static float decode(unsigned short bits) { return bit_cast<float>(unsigned(bits) << 16); }
};

struct Float16 {
    using Raw = __half_raw;
    static unsigned short encode(float value) {
        if (value != value) return 0x7fff;
        return bit_cast<unsigned short>(static_cast<_Float16>(value));
    }
    static float decode(unsigned short bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }
};

template <class Format>
struct Narrow {
    unsigned short __x;

    Narrow() = default;
    Narrow(typename Format::Raw raw) : __x(raw.x) {}
    template <class A, class = std::enable_if_t<std::is_arithmetic_v<A>>>
    Narrow(A value) : __x(Format::encode(static_cast<float>(value))) {}
    template <class Other>
    explicit Narrow(Narrow<Other> value) : Narrow(static_cast<float>(value)) {}

    operator float() const { return Format::decode(__x); }
    operator typename Format::Raw() const { return {__x}; }

    friend Narrow operator+(Narrow a, Narrow b) { return float(a) + float(b); }
    friend Narrow operator-(Narrow a, Narrow b) { return float(a) - float(b); }
    friend Narrow operator*(Narrow a, Narrow b) { return float(a) * float(b); }
    friend Narrow operator/(Narrow a, Narrow b) { return float(a) / float(b); }
    friend Narrow operator-(Narrow a) { return -float(a); }
    friend bool operator==(Narrow a, Narrow b) { return float(a) == float(b); }
    friend bool operator!=(Narrow a, Narrow b) { return float(a) != float(b); }
    friend bool operator<(Narrow a, Narrow b) { return float(a) < float(b); }
    friend bool operator<=(Narrow a, Narrow b) { return float(a) <= float(b); }
    friend bool operator>(Narrow a, Narrow b) { return float(a) > float(b); }
    friend bool operator>=(Narrow a, Narrow b) { return float(a) >= float(b); }
    Narrow &operator+=(Narrow b) { return *this = *this + b; }
    Narrow &operator-=(Narrow b) { return *this = *this - b; }
    Narrow &operator*=(Narrow b) { return *this = *this * b; }
    Narrow &operator/=(Narrow b) { return *this = *this / b; }
};

// Two values side by side, as the paired instructions take them.
template <class Format>
struct alignas(4) Pair {
    Narrow<Format> x, y;
    Pair() = default;
    Pair(Narrow<Format> x, Narrow<Format> y) : x(x), y(y) {}

    friend Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
    friend Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
    friend Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
    friend Pair operator/(Pair a, Pair b) { return {a.x / b.x, a.y / b.y}; }
};

}  // namespace emulator

using __half = emulator::Narrow<emulator::Float16>;
using half = __half;
using __half2 = emulator::Pair<emulator::Float16>;
using half2 = __half2;
using __nv_bfloat16 = emulator::Narrow<emulator::Bfloat16>;
using nv_bfloat16 = __nv_bfloat16;
using __nv_bfloat162 = emulator::Pair<emulator::Bfloat16>;
using nv_bfloat162 = __nv_bfloat162;

inline __half __float2half(float a) { return a; }
inline __half __float2half_rn(float a) { return a; }
inline float __half2float(__half a) { return a; }
inline unsigned short __half_as_ushort(__half a) { return a.__x; }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }

inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
inline __nv_bfloat16 __double2bfloat16(double a) { return a; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16_raw{bits}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {a, a}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }

// What follows is the same for both formats.
#define EMULATOR_UNARY(name, expression)                   \
    template <class F>                                     \
    emulator::Narrow<F> name(emulator::Narrow<F> narrow) { \
        float a = narrow;                                  \
        return expression;                                 \
    }
EMULATOR_UNARY(hsqrt, sqrtf(a))
EMULATOR_UNARY(hrsqrt, rsqrtf(a))
EMULATOR_UNARY(hrcp, 1.0f / a)
EMULATOR_UNARY(hcos, cosf(a))
EMULATOR_UNARY(hsin, sinf(a))
EMULATOR_UNARY(hlog, logf(a))
EMULATOR_UNARY(hexp, expf(a))
EMULATOR_UNARY(htanh, tanhf(a))
EMULATOR_UNARY(hceil, ceilf(a))
EMULATOR_UNARY(hfloor, floorf(a))
EMULATOR_UNARY(__habs, fabsf(a))
EMULATOR_UNARY(__hneg, -a)
#undef EMULATOR_UNARY

#define EMULATOR_BINARY(name, expression)                                                  \
    template <class F>                                                                     \
    emulator::Narrow<F> name(emulator::Narrow<F> narrow_a, emulator::Narrow<F> narrow_b) { \
        float a = narrow_a, b = narrow_b;                                                  \
        return expression;                                                                 \
    }                                                                                      \
    template <class F>                                                                     \
    emulator::Pair<F> name##2(emulator::Pair<F> a, emulator::Pair<F> b) {                  \
        return {name(a.x, b.x), name(a.y, b.y)};                                           \
    }
EMULATOR_BINARY(__hadd, a + b)
EMULATOR_BINARY(__hsub, a - b)
EMULATOR_BINARY(__hmul, a *b)
EMULATOR_BINARY(__hdiv, a / b)
EMULATOR_BINARY(__hmax, fmaxf(a, b))
EMULATOR_BINARY(__hmin, fminf(a, b))
EMULATOR_BINARY(__hmax_nan, a != a ? a : b != b ? b : fmaxf(a, b))
EMULATOR_BINARY(__hmin_nan, a != a ? a : b != b ? b : fminf(a, b))
#undef EMULATOR_BINARY

template <class F>
emulator::Pair<F> __h2div(emulator::Pair<F> a, emulator::Pair<F> b) {
    return a / b;
}
template <class F>
bool __hisnan(emulator::Narrow<F> a) {
    return float(a) != float(a);
}
template <class F>
bool __hlt(emulator::Narrow<F> a, emulator::Narrow<F> b) {
    return a < b;
}
template <class F>
bool __hgt(emulator::Narrow<F> a, emulator::Narrow<F> b) {
    return a > b;
}
template <class F>
bool __heq(emulator::Narrow<F> a, emulator::Narrow<F> b) {
    return a == b;
}
template <class F>
float __low2float(emulator::Pair<F> a) {
    return a.x;
}
template <class F>
float __high2float(emulator::Pair<F> a) {
    return a.y;
}
template <class F>
emulator::Narrow<F> __hfma(emulator::Narrow<F> a, emulator::Narrow<F> b, emulator::Narrow<F> c) {
    return fmaf(a, b, c);
}
template <class F>
emulator::Pair<F> __hfma2(emulator::Pair<F> a, emulator::Pair<F> b, emulator::Pair<F> c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
