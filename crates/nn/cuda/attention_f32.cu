#include "attention_fma.cuh"

// Head sizes up to 32, 64, 80 (72 is DiT-XL's) and 128; src/cuda/attention.rs knows the same columns.
template <int E> struct Chosen {
    typedef Sizes<E, 32, E <= 80 ? 3 : 2> Forward, Dq;
    typedef Sizes<E, 32, 2> Dkv;
};
EXPORT_SIZE(float, f32, 32)
EXPORT_SIZE(float, f32, 64)
EXPORT_SIZE(float, f32, 80)
EXPORT_SIZE(float, f32, 128)
