// What cuBLAS and cuBLASLt share. Declared here, as the toolkit's wheel brings no cuBLAS headers; the numbers are
// those of cublas_api.h and library_types.h.
#pragma once

#include "gemm.hpp"

#include <cstddef>

#define API extern "C" __attribute__((visibility("default")))

namespace emulator {

enum Status { success = 0, not_initialised = 1, invalid_value = 7, not_supported = 15 };
enum Type { real_f32 = 0, real_f64 = 1, real_f16 = 2, real_bf16 = 14 };

inline Format format_of(int type, bool &known) {
    known = true;
    switch (type) {
        case real_f32: return Format::f32;
        case real_f64: return Format::f64;
        case real_f16: return Format::f16;
        case real_bf16: return Format::bf16;
        default: return known = false, Format::f32;
    }
}

// The last line of a call that answers through a pointer.
template <class T, class Value>
int give(T *to, Value value) {
    *to = value;
    return success;
}

inline const char *status_name(int status) {
    return status == success ? "CUBLAS_STATUS_SUCCESS" : "a cuBLAS error";
}
inline const char *status_string(int status) {
    return status == success ? "success" : "an error the emulator explained on stderr";
}

}  // namespace emulator
