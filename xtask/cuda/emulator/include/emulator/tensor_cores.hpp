// crates/nn/cuda/tensor_cores.cuh on the CPU: which lane holds what is as the PTX ISA has it, so that a kernel that takes a
// value for another computes something else here too.
#pragma once

#include "narrow.hpp"
#include "runtime.hpp"

#include <cstring>
#include <vector>

namespace emulator {

// Half `high` of two bf16 in 32 bits.
inline float half_of(uint32_t pair, int high) { return Bfloat16::decode(static_cast<unsigned short>(pair >> 16 * high)); }

struct Mma16x8x16 {
    float *c;
    const uint32_t *a;
    uint32_t b[2];

    static void perform(void *const requests[warp_size], unsigned members) {
        if (members != 0xffffffff) fail("mma_16x8x16: lanes %#x take part, expected all 32", members);
        float a[16][16], b[16][8], c[16][8];
        for (int lane = 0; lane < 32; lane++) {
            auto *request = static_cast<const Mma16x8x16 *>(requests[lane]);
            int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 2; i++) {
                for (int r = 0; r < 4; r++) a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = half_of(request->a[r], i);
                for (int r = 0; r < 2; r++) b[2 * t + i + r * 8][g] = half_of(request->b[r], i);
                for (int r = 0; r < 2; r++) c[g + r * 8][2 * t + i] = request->c[2 * r + i];
            }
        }
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < 16; k++)
                for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
        for (int lane = 0; lane < 32; lane++) {
            auto *request = static_cast<const Mma16x8x16 *>(requests[lane]);
            for (int i = 0; i < 4; i++) request->c[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
        }
    }
};

// Every lane learns the rows that all lanes name.
struct MatrixRows {
    const __nv_bfloat16 *mine, *all[warp_size];

    static void perform(void *const requests[warp_size], unsigned members) {
        if (members != 0xffffffff) fail("ldmatrix: lanes %#x take part, expected all 32", members);
        for (unsigned to = 0; to < warp_size; to++)
            for (unsigned lane = 0; lane < warp_size; lane++)
                static_cast<MatrixRows *>(requests[to])->all[lane] = static_cast<MatrixRows *>(requests[lane])->mine;
    }
};

// The lane reads its values itself, so that a race is seen where it is.
inline void load_matrices(uint32_t (&to)[4], const __nv_bfloat16 *row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        fail("ldmatrix: the row's address %p is not a multiple of 16 bytes", (const void *)row);
    MatrixRows rows{row, {}};
    collective(0xffffffff, MatrixRows::perform, &rows, "ldmatrix");
    int g = int(running.lane) / 4, t = int(running.lane) % 4;
    for (int matrix = 0; matrix < 4; matrix++) {
        const __nv_bfloat16 *const *matrix_rows = rows.all + matrix * 8;
        to[matrix] = 0;
        for (int i = 0; i < 2; i++) {
            __nv_bfloat16 value = transposed ? matrix_rows[2 * t + i][g] : matrix_rows[g][2 * t + i];
            to[matrix] |= uint32_t(value.__x) << 16 * i;
        }
    }
}

}  // namespace emulator

inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Mma16x8x16 request{c, a, {b0, b1}};
    emulator::collective(0xffffffff, emulator::Mma16x8x16::perform, &request, "mma_16x8x16");
}

inline void load_matrices(uint32_t (&to)[4], const __nv_bfloat16 *row) { emulator::load_matrices(to, row, false); }
inline void load_transposed(uint32_t (&to)[4], const __nv_bfloat16 *row) { emulator::load_matrices(to, row, true); }

inline float power_of_two(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

inline unsigned thread_again() { return emulator::running.thread.x; }

// What is copied is there as late as it may be, and until then there are NaNs.
class Copies {
    struct Piece {
        void *to;
        const void *from;  // null: zeros
        int bytes;
    };
    std::vector<Piece> pending_;

public:
    template <int BYTES>
    void begin(void *to, const void *from, bool there) {
        static_assert(BYTES == 4 || BYTES == 16);
        if ((reinterpret_cast<uintptr_t>(to) | (there ? reinterpret_cast<uintptr_t>(from) : 0)) % BYTES != 0)
            emulator::fail("cp.async: %p or %p is not a multiple of %d bytes", to, from, BYTES);
        memset(to, 0xff, BYTES);
        pending_.push_back({to, there ? from : nullptr, BYTES});
    }
    void wait() {
        for (const Piece &piece : pending_) {
            if (piece.from)
                memcpy(piece.to, piece.from, piece.bytes);
            else
                memset(piece.to, 0, piece.bytes);
        }
        pending_.clear();
    }
};
