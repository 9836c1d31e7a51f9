#include "attention.cuh"

EXPORT_DELTA(float, f32)
EXPORT_DELTA(bf16, bf16)
