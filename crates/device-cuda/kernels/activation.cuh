// Functions of gated networks: `baton_device::Activation`, by its number.
#pragma once
#include "baton.cuh"

/// 0: silu; 1: the approximation of GELU by tanh.
__device__ __forceinline__ float activated(int activation, float x) {
    return activation == 0 ? silu(x) : 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
