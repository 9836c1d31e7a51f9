// The 8-bit format e4m3 (OCP 8-bit Floating Point Specification 1.0): bias 7, no infinity, NaN 0x7f,
// largest value 448; conversions saturate, as `__nv_fp8_e4m3(float)` does.
#pragma once

#include "emulator/narrow.hpp"

using __nv_fp8_storage_t = unsigned char;
enum __nv_fp8_interpretation_t { __NV_E4M3 };

struct __nv_fp8_e4m3 {
    __nv_fp8_storage_t __x;

    __nv_fp8_e4m3() = default;
    template <class A, class = std::enable_if_t<std::is_arithmetic_v<A>>>
    explicit __nv_fp8_e4m3(A value) : __x(encode(static_cast<float>(value))) {}
    explicit __nv_fp8_e4m3(__half value) : __nv_fp8_e4m3(float(value)) {}
    explicit __nv_fp8_e4m3(__nv_bfloat16 value) : __nv_fp8_e4m3(float(value)) {}
    explicit operator float() const { return decode(__x); }

    static float decode(__nv_fp8_storage_t bits) {
        int exponent = bits >> 3 & 15, mantissa = bits & 7;
        float magnitude = exponent == 15 && mantissa == 7 ? NAN
                          : exponent == 0                 ? ldexpf(float(mantissa), -9)
                                                          : ldexpf(float(8 + mantissa), exponent - 10);
        return bits & 0x80 ? -magnitude : magnitude;
    }
    static __nv_fp8_storage_t encode(float value) {
        __nv_fp8_storage_t sign = signbit(value) ? 0x80 : 0;
        float magnitude = fabsf(value);
        if (magnitude != magnitude) return 0x7f;
        if (magnitude >= 448.0f) return sign | 0x7e;
        int exponent = magnitude < 0x1p-6f ? -6 : ilogbf(magnitude);
        // In units of the last place; rintf rounds halves to even. 16 carries into the exponent by itself.
        int units = static_cast<int>(rintf(ldexpf(magnitude, 3 - exponent)));
        int bits = ((exponent + 6) << 3) + units;
        return sign | static_cast<__nv_fp8_storage_t>(bits > 0x7e ? 0x7e : bits);
    }
};

inline __half_raw __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t bits, __nv_fp8_interpretation_t) {
    return __half(__nv_fp8_e4m3::decode(bits));
}
