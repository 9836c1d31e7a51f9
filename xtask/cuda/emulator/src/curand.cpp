// libcurand.so.10: a generator of its own (splitmix64), not cuRAND's XORWOW: seeds do not give the numbers
// they give on a GPU.
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace {

enum Status { success = 0, not_initialised = 101 };

struct Generator {
    uint64_t state = 0;

    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    // In (0, 1], as cuRAND's.
    double uniform() { return (double(next() >> 11) + 1.0) * 0x1p-53; }
    double normal() { return std::sqrt(-2.0 * std::log(uniform())) * std::cos(2.0 * M_PI * uniform()); }
};

template <class T, class Draw>
int generate(Generator *generator, T *out, size_t count, Draw draw) {
    if (!generator) return not_initialised;
    for (size_t i = 0; i < count; i++) out[i] = T(draw(*generator));
    return success;
}

// The last line of a call that answers through a pointer.
template <class T, class Value>
int give(T *to, Value value) {
    *to = value;
    return success;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int curandCreateGenerator(Generator **generator, int) { return give(generator, new Generator); }
API int curandDestroyGenerator(Generator *generator) {
    delete generator;
    return success;
}
API int curandSetStream(Generator *, void *) { return success; }
API int curandSetPseudoRandomGeneratorSeed(Generator *generator, unsigned long long seed) {
    return give(&generator->state, seed);
}
API int curandSetGeneratorOffset(Generator *generator, unsigned long long offset) {
    return give(&generator->state, generator->state + offset * 0x9e3779b97f4a7c15);
}
API int curandGenerate(Generator *generator, unsigned *out, size_t count) {
    return generate(generator, out, count, [](Generator &g) { return g.next() >> 32; });
}
API int curandGenerateUniform(Generator *generator, float *out, size_t count) {
    return generate(generator, out, count, [](Generator &g) { return g.uniform(); });
}
API int curandGenerateUniformDouble(Generator *generator, double *out, size_t count) {
    return generate(generator, out, count, [](Generator &g) { return g.uniform(); });
}
API int curandGenerateNormal(Generator *generator, float *out, size_t count, float mean, float deviation) {
    return generate(generator, out, count, [=](Generator &g) { return mean + deviation * g.normal(); });
}
API int curandGenerateNormalDouble(Generator *generator, double *out, size_t count, double mean, double deviation) {
    return generate(generator, out, count, [=](Generator &g) { return mean + deviation * g.normal(); });
}
