#include "attention.cuh"

// Head sizes up to 32, 64, 80 (72 is DiT-XL's) and 128; src/cuda/attention.rs knows the same columns.
EXPORT_SIZE(float, f32, 32, 3, 32, 32)
EXPORT_SIZE(float, f32, 64, 3, 32, 32)
EXPORT_SIZE(float, f32, 80, 3, 32, 32)
EXPORT_SIZE(float, f32, 128, 2, 32, 32)
EXPORT_DELTA(float, f32)
