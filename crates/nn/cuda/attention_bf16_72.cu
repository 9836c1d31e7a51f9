#include "attention_mma.cuh"

EXPORT_SIZE(bf16, bf16, 72)
