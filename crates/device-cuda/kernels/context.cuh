//! What the attention kernels share: a step as the plan uploads it, planes of the cache, and the way of a tile of the cache
//! through shared memory.
//!
//! Invariant: of a cache only positions between `begin` and `end` of a range are read; the rest of a tile is zero. So what
//! another sequence left in a block, or what is not finite behind the end, reaches no sum.
#pragma once
#include "baton.cuh"

/// Positions of a cache block.
constexpr int BLOCK = 16;
/// Elements by which rows in shared memory are longer than what they hold: with an odd number of 16-byte parts, eight rows
/// of one `ldmatrix` lie in different banks.
constexpr int PAD = 8;
/// Scores are powers of two: a factor on the scale, and one special instruction for each.
constexpr float LOG2_E = 1.44269504f;

/// Some new tokens of one sequence: the first one's row, how many they are, the first one's position, and where the block
/// numbers of the sequence begin among those of the step, each sequence's padded to a multiple of four.
struct alignas(16) Tile {
    int row;
    int tokens;
    int position;
    int table;
};

/// Keys, values, latents or rotated keys of a layer: `[blocks, heads, 16, width]`, and for bytes a scale for each head of each
/// position, `[blocks, heads, 16]`.
struct Plane {
    unsigned char* data;
    float* scales;
    int heads;
    int width;
};

/// Heads, the factor on scores, the bound on them (0: none) and how many positions a token sees (0: all).
struct Scores {
    int heads;
    int kv_heads;
    float scale;
    float softcap;
    int window;
};

/// What splits of a context leave: by token of a tile, head and split the sums of weighted values and, in twos, the largest
/// score and the sum of weights. Not used where there is one split. For each block, were there one split, how many have
/// ended; zero between launches.
struct Partials {
    float* sums;
    float* weights;
    unsigned* counters;
};

/// Heads of rows in another activation: how many elements rows and heads are apart.
struct Heads {
    void* at;
    int row;
    int head;

    template <typename T> __device__ T* of(int r, int h) const {
        return static_cast<T*>(at) + static_cast<size_t>(r) * row + static_cast<size_t>(h) * head;
    }
};

/// Positions.
struct Range {
    int begin;
    int end;
};

/// What tokens at `first..=last` see together.
__device__ inline Range visible(int first, int last, int window) {
    int begin = window > 0 ? first + 1 - window : 0;
    return {begin > 0 ? begin : 0, last + 1};
}

/// The tiles of `KEYS` positions that one of several splits of a range takes.
template <int KEYS> __device__ inline Range split_tiles(Range range, int split, int splits) {
    int first = range.begin / KEYS, end = (range.end + KEYS - 1) / KEYS;
    int each = (end - first + splits - 1) / splits;
    int begin = first + split * each;
    return {begin, begin + each < end ? begin + each : end};
}

/// `tanh` for what is rounded to 16 bits later: its error is that of a number near 1, its cost that of a weight.
__device__ inline float quick_tanh(float x) { return 1.0f - __fdividef(2.0f, 1.0f + quick_exp2(2.0f * LOG2_E * x)); }

/// Scores on their way to exponents of two.
template <int N> __device__ inline void bound(float (&scores)[N], const Scores& of, float (*tanh)(float)) {
    if (of.softcap > 0.0f) {
#pragma unroll
        for (int i = 0; i < N; i++) scores[i] = of.softcap * LOG2_E * tanh(scores[i] * (of.scale / of.softcap));
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) scores[i] *= of.scale * LOG2_E;
    }
}

/// What a plane holds of a number, without its scale.
__device__ inline float kept(signed char x) { return static_cast<float>(x); }
template <typename T> __device__ inline float kept(T x) { return to_float(x); }

/// Asks for `KEYS` positions from `first` on, of one head of a plane, whose block numbers are given. Numbers of the type of
/// activations go to rows of `STRIDE`; bytes go as they are, with their scales behind them, for `widen`.
template <typename T, typename KV, int KEYS, int WIDTH, int STRIDE, int THREADS>
__device__ inline void fetch(unsigned char* to, const Plane& plane, int head, const Vec<int, KEYS / BLOCK>& blocks,
                             int first, Range range) {
    constexpr bool BYTES = SAME<KV, signed char>;
    static_assert(BYTES || SAME<KV, T>, "a cache of activations or of bytes");
    constexpr int PER_PART = 16 / sizeof(KV), PARTS = BLOCK * WIDTH / PER_PART;
#pragma unroll
    for (int b = 0; b < KEYS / BLOCK; b++) {
        const size_t at = static_cast<size_t>(blocks[b]) * plane.heads + head;
        const KV* from = reinterpret_cast<const KV*>(plane.data) + at * (BLOCK * WIDTH);
#pragma unroll
        for (int i = 0; i < PARTS; i += THREADS) {
            const int part = i + threadIdx.x;
            if (PARTS % THREADS != 0 && part >= PARTS) break;
            const int row = part * PER_PART / WIDTH, column = part * PER_PART % WIDTH;
            const int position = first + b * BLOCK + row;
            const int element = (b * BLOCK + row) * (BYTES ? WIDTH : STRIDE) + column;
            cp_async_16(to + element * sizeof(KV), from + part * PER_PART,
                        position >= range.begin && position < range.end);
        }
        if (BYTES && threadIdx.x < 4) {
            unsigned char* scales = to + KEYS * WIDTH + (b * BLOCK + threadIdx.x * 4) * sizeof(float);
            cp_async_16(scales, plane.scales + at * BLOCK + threadIdx.x * 4, true);
        }
    }
}

/// Bytes of shared memory that `fetch` fills.
template <typename KV, int KEYS, int WIDTH, int STRIDE> __device__ constexpr int fetched() {
    return sizeof(KV) == 1 ? KEYS * (WIDTH + static_cast<int>(sizeof(float))) : KEYS * STRIDE * 2;
}

/// Makes numbers of fetched bytes, in rows of `STRIDE`.
template <typename T, int KEYS, int WIDTH, int STRIDE, int THREADS>
__device__ inline void widen(T* to, const unsigned char* fetched, int first, Range range) {
    const float* scales = reinterpret_cast<const float*>(fetched + KEYS * WIDTH);
    for (int part = threadIdx.x; part < KEYS * WIDTH / 8; part += THREADS) {
        const int row = part * 8 / WIDTH, column = part * 8 % WIDTH;
        const bool inside = first + row >= range.begin && first + row < range.end;
        const Vec<signed char, 8> bytes = load<8>(reinterpret_cast<const signed char*>(fetched) + part * 8);
        Vec<T, 8> numbers;
#pragma unroll
        for (int i = 0; i < 8; i++) numbers[i] = from_float<T>(inside ? kept(bytes[i]) * scales[row] : 0.0f);
        store(to + row * STRIDE + column, numbers);
    }
}

/// The factor on sums relative to a score, when they become relative to a larger one. Nothing was summed of no score.
__device__ inline float relative(float score, float larger) {
    return score == -infinity() ? 0.0f : quick_exp2(score - larger);
}

/// The running softmax of a row: the largest score so far and the sum of weights relative to it.
struct Softmax {
    float largest = -infinity();
    float sum = 0.0f;

    /// Takes note of scores up to `score`: the factor on what was summed before.
    __device__ float raise(float score) {
        const float before = largest;
        largest = fmaxf(largest, score);
        const float factor = relative(before, largest);
        sum *= factor;
        return factor;
    }

    /// The weight of a score, added to the sum; none of one that is masked as minus infinity.
    __device__ float weigh(float score) {
        const float weight = relative(score, largest);
        sum += weight;
        return weight;
    }
};
