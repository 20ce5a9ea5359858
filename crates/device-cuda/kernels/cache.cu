//! Writing to the cache: this step's keys and values, or latents and rotated keys, each head of each row into its slot.
//!
//! Invariant: what is kept of a number is what `KvDtype::round` of the seam says, bit for bit.
#include "context.cuh"

constexpr float LARGEST_F32 = 3.402823466e38f;
constexpr float LARGEST_F16 = 65504.0f;
/// Just below a half: added before the fraction is cut off, it rounds halves away from zero.
constexpr float ALMOST_HALF = 0.49999997f;

/// Numbers beyond the range of f16 become its largest; what is not finite stays so.
template <typename KV> __device__ inline KV keep(float x) {
    if (SAME<KV, f16> && fabsf(x) <= LARGEST_F32) x = fminf(fmaxf(x, -LARGEST_F16), LARGEST_F16);
    return from_float<KV>(x);
}

/// One warp writes one head of one position.
template <typename T, typename KV>
__device__ inline void keep_row(const T* from, KV* to, int width, float*) {
    if constexpr (SAME<T, KV>) {
        // Rows of whole parts of 16 bytes begin at one.
        constexpr int N = WIDE<T>;
        if (width % N == 0) {
            for (int i = lane_id() * N; i < width; i += LANES * N) store(to + i, load<N>(from + i));
            return;
        }
    }
    for (int i = lane_id(); i < width; i += LANES) to[i] = keep<KV>(to_float(from[i]));
}

/// Likewise as bytes, which share a scale: `max|x| / 127`, not a number if one of them is not finite.
template <typename T>
__device__ inline void keep_row(const T* from, signed char* to, int width, float* scale) {
    const int lane = lane_id();
    float largest = 0.0f;
    int infinite = 0;
    for (int i = lane; i < width; i += LANES) {
        const float x = fabsf(to_float(from[i]));
        infinite |= !(x <= LARGEST_F32);
        largest = fmaxf(largest, x);
    }
    largest = warp_max(largest);
    infinite = __any_sync(FULL, infinite);
    const float step = infinite ? infinity() - infinity() : largest / 127.0f;
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
    for (int i = lane; i < width; i += LANES) {
        // Rounded by itself: contracted with the sum below it would end elsewhere next to a half.
        const float x = __fmul_rn(to_float(from[i]), inverse);
        const int q = infinite ? 0 : static_cast<int>(x + copysignf(ALMOST_HALF, x));
        to[i] = static_cast<signed char>(q < -127 ? -127 : q > 127 ? 127 : q);
    }
    if (lane == 0) *scale = step;
}

/// Row r of `a` goes to slot `slots[r]` of the first plane, that of `b` to the second's. A warp for each head of a row;
/// the grid is (rows, planes) and blocks take the heads of a row in turn.
template <typename T, typename KV>
__global__ void write_slots(const T* a, const T* b, Plane first, Plane second, const int* slots) {
    const Plane plane = blockIdx.y == 0 ? first : second;
    const T* x = (blockIdx.y == 0 ? a : b) + static_cast<size_t>(blockIdx.x) * plane.heads * plane.width;
    const int slot = slots[blockIdx.x];
    for (int head = warp_id(); head < plane.heads; head += blockDim.x / LANES) {
        const size_t at = (static_cast<size_t>(slot / BLOCK) * plane.heads + head) * BLOCK + slot % BLOCK;
        keep_row(x + head * plane.width, reinterpret_cast<KV*>(plane.data) + at * plane.width, plane.width,
                 plane.scales + at);
    }
}
