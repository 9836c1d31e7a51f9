// Warp-wide intrinsics, each one a collective of the lanes in its mask.
#pragma once

#include "runtime.hpp"

#include <cstring>

namespace emulator {

template <class T>
struct Shuffle {
    T mine;
    unsigned source;
    T received;

    static void perform(void *const requests[warp_size], unsigned members) {
        for (unsigned lane = 0; lane < warp_size; lane++) {
            if (!(members >> lane & 1)) continue;
            auto *request = static_cast<Shuffle *>(requests[lane]);
            if (members >> request->source & 1)
                request->received = static_cast<Shuffle *>(requests[request->source])->mine;
            else  // a GPU gives an undefined value here; this one is a NaN, so that its use shows
                memset(static_cast<void *>(&request->received), 0xff, sizeof(T));
        }
    }
};

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char *name) {
    Shuffle<T> request{value, source, value};
    collective(mask, Shuffle<T>::perform, &request, name);
    return request.received;
}

// A vote: every member gives a bit and receives all of them.
struct Vote {
    bool mine;
    unsigned ballot, members;

    static void perform(void *const requests[warp_size], unsigned members) {
        unsigned ballot = 0;
        for (unsigned lane = 0; lane < warp_size; lane++)
            if (members >> lane & 1) ballot |= unsigned(static_cast<Vote *>(requests[lane])->mine) << lane;
        for (unsigned lane = 0; lane < warp_size; lane++)
            if (members >> lane & 1) {
                static_cast<Vote *>(requests[lane])->ballot = ballot;
                static_cast<Vote *>(requests[lane])->members = members;
            }
    }
};

inline Vote vote(unsigned mask, bool value, const char *name) {
    Vote request{value, 0, 0};
    collective(mask, Vote::perform, &request, name);
    return request;
}

}  // namespace emulator

// A lane whose source lies outside its segment of `width` lanes keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned lane = emulator::running.lane;
    return emulator::shuffle(mask, value, (lane & ~unsigned(width - 1)) | (source & (width - 1)), "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    unsigned lane = emulator::running.lane, source = lane ^ unsigned(bits);
    if (source > (lane | unsigned(width - 1))) source = lane;
    return emulator::shuffle(mask, value, source, "__shfl_xor_sync");
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = emulator::running.lane, within = lane & unsigned(width - 1);
    return emulator::shuffle(mask, value, within < delta ? lane : lane - delta, "__shfl_up_sync");
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = emulator::running.lane, within = lane & unsigned(width - 1);
    unsigned source = within + delta >= unsigned(width) ? lane : lane + delta;
    return emulator::shuffle(mask, value, source, "__shfl_down_sync");
}

inline unsigned __ballot_sync(unsigned mask, int value) { return emulator::vote(mask, value, "__ballot_sync").ballot; }
inline int __any_sync(unsigned mask, int value) { return emulator::vote(mask, value, "__any_sync").ballot != 0; }
inline int __all_sync(unsigned mask, int value) {
    emulator::Vote result = emulator::vote(mask, value, "__all_sync");
    return result.ballot == result.members;
}
inline void __syncwarp(unsigned mask = 0xffffffff) { emulator::vote(mask, true, "__syncwarp"); }
inline unsigned __activemask() { return emulator::active_lanes(); }
