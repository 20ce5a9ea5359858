//! Heads on their way to attention: this step's queries, keys and values, or latents and rotated keys, each normed and rotated where it is
//! to be. Queries stay where they are, what is kept goes to its slot of the cache.
//!
//! One launch, expected to be bound (not measured) by its own time where rows are few, and by bandwidth where they are many.
//!
//! Invariant: what is kept of a number is what `KvDtype::round` of the seam says, bit for bit; on the way to it a number is f32.
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

/// `to = f(from)`, number by number, by a warp: FOUR at once where both begin at a multiple of as many.
template <typename From, typename To, typename F>
__device__ __forceinline__ void over_head(const From* from, To* to, int width, F f) {
    constexpr int FOUR = 4;
    auto begins = [](auto* at, size_t bytes) { return reinterpret_cast<size_t>(at) % bytes == 0; };
    if (width % FOUR == 0 && begins(from, alignof(Vec<From, FOUR>)) && begins(to, alignof(Vec<To, FOUR>))) {
        for (int i = lane_id() * FOUR; i < width; i += LANES * FOUR) {
            const Vec<From, FOUR> read = load<FOUR>(from + i);
            Vec<To, FOUR> written;
#pragma unroll
            for (int j = 0; j < FOUR; j++) written[j] = f(read[j]);
            store(to + i, written);
        }
    } else {
        for (int i = lane_id(); i < width; i += LANES) to[i] = f(from[i]);
    }
}

/// A head as a cache keeps it.
template <typename KV> __device__ inline void keep_head(const float* from, KV* to, int width, float*) {
    over_head(from, to, width, [](float number) { return keep<KV>(number); });
}

/// A head as bytes, which share a scale: `max|x| / 127`, not a number if one of them is not finite.
__device__ inline void keep_head(const float* from, signed char* to, int width, float* scale) {
    const int lane = lane_id();
    float largest = 0.0f;
    int infinite = 0;
    for (int i = lane; i < width; i += LANES) {
        const float x = fabsf(from[i]);
        infinite |= !(x <= LARGEST_F32);
        largest = fmaxf(largest, x);
    }
    largest = warp_max(largest);
    infinite = __any_sync(FULL, infinite);
    const float step = infinite ? infinity() - infinity() : largest / 127.0f;
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
    for (int i = lane; i < width; i += LANES) {
        // Rounded by itself: contracted with the sum below it would end elsewhere next to a half.
        const float x = __fmul_rn(from[i], inverse);
        const int q = infinite ? 0 : static_cast<int>(x + copysignf(ALMOST_HALF, x));
        to[i] = static_cast<signed char>(q < -127 ? -127 : q > 127 ? 127 : q);
    }
    if (lane == 0) *scale = step;
}

/// Heads that are treated alike, of every row.
struct Part {
    Heads x;
    /// `[width]`; null for heads that are not normed.
    const float* norm;
    /// The plane in which they are kept; null for those that go back to x.
    unsigned char* plane;
    float* scales;
    int heads;
    int width;
    /// The first rotated column, and half as many as are rotated; 0 for none.
    int first;
    int pairs;
    /// Pairs are neighbours.
    int interleaved;
    float eps;
};

/// What `enter` takes together; the rest have no heads.
struct Parts {
    Part part[3];
};

/// Every head of row r of every part, its angles being `[pairs]` of cosine and sine at `table[positions[r]]`, its slot `slots[r]`.
///
/// A warp has a head, in f32 in dynamic shared memory, `widest` floats for each warp. Grid: rows, heads of all parts by the block's warps.
template <typename T, typename KV>
__global__ void __launch_bounds__(128)
    enter(const __grid_constant__ Parts parts, const float2* table, const int* positions, const int* slots, int widest) {
    SHARED(shared);
    const int row = blockIdx.x, lane = lane_id();
    int head = blockIdx.y * (blockDim.x / LANES) + warp_id(), own = 0;
    while (own < 3 && head >= parts.part[own].heads) head -= parts.part[own++].heads;
    if (own == 3) return;
    const Part& part = parts.part[own];
    // Of heads that are only rotated the other columns stay as they are.
    const bool partly = !part.norm && !part.plane;
    const int skipped = partly ? part.first : 0, width = partly ? 2 * part.pairs : part.width;
    float* x = reinterpret_cast<float*>(shared) + warp_id() * widest;
    T* from = part.x.of<T>(row, head) + skipped;
    over_head(from, x, width, [](T number) { return to_float(number); });
    __syncwarp();

    if (part.norm) {
        float squares = 0.0f;
        for (int i = lane; i < width; i += LANES) squares = fmaf(x[i], x[i], squares);
        const float inverse = 1.0f / sqrtf(warp_sum(squares) / width + part.eps);
        for (int i = lane; i < width; i += LANES) x[i] = x[i] * inverse * part.norm[i];
        __syncwarp();
    }
    if (part.pairs > 0) {
        const float2* angles = table + static_cast<size_t>(positions[row]) * part.pairs;
        for (int i = lane; i < part.pairs; i += LANES) {
            float& a = x[part.first - skipped + (part.interleaved ? 2 * i : i)];
            float& b = x[part.first - skipped + (part.interleaved ? 2 * i + 1 : i + part.pairs)];
            const float2 angle = angles[i];
            const float first = a, second = b;
            a = first * angle.x - second * angle.y;
            b = second * angle.x + first * angle.y;
        }
        __syncwarp();
    }
    if (!part.plane) {
        over_head(x, from, width, [](float number) { return from_float<T>(number); });
        return;
    }
    const int slot = slots[row];
    const size_t at = (static_cast<size_t>(slot / BLOCK) * part.heads + head) * BLOCK + slot % BLOCK;
    keep_head(x, reinterpret_cast<KV*>(part.plane) + at * width, width, part.scales + at);
}
