#include "attention.cuh"

// Head sizes up to 32, 64, 80 (72 is DiT-XL's) and 128; src/cuda/attention.rs knows the same columns. dK and dV
// take two sets of accumulators, so smaller tiles where heads are wide.
EXPORT_SIZE(bf16, bf16, 32, 3, 64, 64)
EXPORT_SIZE(bf16, bf16, 64, 3, 64, 64)
EXPORT_SIZE(bf16, bf16, 80, 3, 64, 32)
EXPORT_SIZE(bf16, bf16, 128, 2, 64, 32)
EXPORT_DELTA(bf16, bf16)
