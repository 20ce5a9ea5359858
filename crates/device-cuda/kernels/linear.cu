// Products with weights, and rows of weights.
//
// kernel         of what                                                       bound by
// product        up to 64 rows of 16 bits, weights of 16 bits or in blocks     bandwidth: each weight is read once per 16 · TILES rows
// product_f32    few rows, sums of f32 products: weights or rows in f32        bandwidth up to 8 rows, then f32 arithmetic
// unpack         weights as numbers: embeddings, and panels for cuBLASLt       bandwidth
// add_bias       behind a product of cuBLASLt                                  bandwidth
//
// Products of many rows are cuBLASLt's, on weights that `unpack` widened where they do not lie as it wants them.
#include "baton.cuh"
#include "blocks.cuh"

/// A weight `[out_features, k]`, and where its product goes: `[rows, out_features]`.
struct Weight {
    const unsigned char* rows;
    const float* bias;
    void* out;
    int out_features;
};

/// Weights that share an input; those that are not there have no features.
struct Group {
    Weight weight[4];
};

/// The weight of a block that has `features` of one, and the block's number among those of this weight.
__device__ __forceinline__ Weight weight_of_block(const Group& group, int features, int& block) {
    Weight weight = group.weight[0];
    block = blockIdx.x;
#pragma unroll
    for (int i = 1; i < 4; i++) {
        int blocks = (weight.out_features + features - 1) / features;
        if (block < blocks) break;
        block -= blocks;
        weight = group.weight[i];
    }
    return weight;
}

/// The pairs of x `[rows, k]` that lane t multiplies with those of a weight: of a chunk that starts at a column. Zero beyond the edges.
template <typename F, typename M>
__device__ __forceinline__ void load_pairs(unsigned (&pair)[4], const M* x, bool inside, int k, int start, int t) {
#pragma unroll
    for (unsigned& both : pair) both = 0;
    if (!inside) return;
    if (!F::SCALED && k % 8 != 0) {
        // Rows begin anywhere.
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int at = start + column<F::GROUP>(i / 4, t) + i % 4;
            if (at < k) pair[i / 2] |= static_cast<unsigned>(x[at].bits) << i % 2 * 16;
        }
    } else if (start + column<F::GROUP>(0, t) < k) {
        const unsigned* words = reinterpret_cast<const unsigned*>(x + start);
        constexpr int TOGETHER = F::GROUP == CHUNK ? 4 : 2;
#pragma unroll
        for (int j = 0; j < 4 / TOGETHER; j++) {
            Vec<unsigned, TOGETHER> read = load<TOGETHER>(words + column<F::GROUP>(j, t) / 2);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) pair[j * TOGETHER + i] = read[i];
        }
    }
}

/// The most warps that share out the columns of `product`.
template <int TILES> constexpr int WARPS = TILES == 1 ? 8 : 4;

/// `out = x · Wᵀ + bias` on tensor cores: x `[rows, k]` in M, in f32 sums, out in Y.
///
/// A block has 8 · PANELS features and 16 · TILES rows; its warps take spans of k in turn and are added up in one order. Rows are the 16 of a
/// tensor core's product and features its 8, so that small weights still fill the chip. Codes of blocks are exact in M: the product of a
/// group with them is multiplied by its scale in f32, and its minimum by the group's sum of x. So no weight is rounded; but floats in
/// another type than M are.
///
/// A warp has the next span's weights on their way while it multiplies: 64 bytes for a lane, 32 KiB on an SM with two blocks, where
/// bandwidth times latency is about 22 KiB (H200: 4.8 TB/s, 132 SMs, 600 ns).
///
/// Grid: panels of all weights, tiles of rows. Block: 32 lanes of 2, 4 or 8 (WARPS) warps.
template <typename F, typename M, typename Y, int TILES, int PANELS>
__global__ void __launch_bounds__(LANES * WARPS<TILES>, TILES == 1 ? 3 : 2) product(Group group, const M* x, int rows, int k) {
    __shared__ float partial[WARPS<TILES> / 2][TILES * PANELS * 4][LANES];
    constexpr int FEATURES = 8 * PANELS;
    constexpr bool AHEAD = TILES == 1;
    int panel;
    const Weight weight = weight_of_block(group, FEATURES, panel);
    const int lane = lane_id(), g = lane / 4, t = lane % 4, warp = warp_id(), warps = blockDim.x / LANES;
    const int first = panel * FEATURES, first_row = blockIdx.y * (16 * TILES);
    const long long stride = F::row_bytes(k);
    // Features beyond the last are those of the last.
    auto feature = [&](int i) { return weight.rows + min(first + i, weight.out_features - 1) * stride; };

    struct Span {
        typename F::Codes codes[PANELS];
        typename F::Scales scales[PANELS][2];
    };
    auto load_span = [&](Span& into, int span) {
#pragma unroll
        for (int p = 0; p < PANELS; p++) {
            F::load_codes(into.codes[p], feature(8 * p + g), k, span, t);
            // Of the features whose sums this lane holds.
            if constexpr (F::SCALED) {
#pragma unroll
                for (int i = 0; i < 2; i++) F::load_scales(into.scales[p][i], feature(8 * p + 2 * t + i), k, span);
            }
        }
    };

    float sum[TILES][PANELS][4] = {};
    Span now, next;
    if (AHEAD && warp < spans(k)) load_span(next, warp);
    for (int span = warp; span < spans(k); span += warps) {
        if constexpr (AHEAD) {
            now = next;
            if (span + warps < spans(k)) load_span(next, span + warps);
        } else {
            load_span(now, span);
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            unsigned a[TILES][2][4];
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                unsigned upper[4], lower[4];
                int row = first_row + 16 * i + g, start = span * SPAN + c * CHUNK;
                load_pairs<F>(upper, x + static_cast<long long>(row) * k, row < rows, k, start, t);
                load_pairs<F>(lower, x + static_cast<long long>(row + 8) * k, row + 8 < rows, k, start, t);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    a[i][j][0] = upper[2 * j], a[i][j][1] = lower[2 * j];
                    a[i][j][2] = upper[2 * j + 1], a[i][j][3] = lower[2 * j + 1];
                }
            }
            if constexpr (!F::SCALED) {
#pragma unroll
                for (int p = 0; p < PANELS; p++) {
                    unsigned pair[4];
                    F::template pairs<M>(pair, now.codes[p], c);
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        mma_16816<M>(sum[i][p], a[i][0], {pair[0], pair[1]});
                        mma_16816<M>(sum[i][p], a[i][1], {pair[2], pair[3]});
                    }
                }
            } else {
                // A chunk is one group or two.
                constexpr int PARTS = CHUNK / F::GROUP;
                float row_sum[PARTS][TILES][4] = {};
                if constexpr (F::MIN) {
                    const unsigned ones[2] = {TWICE_ONE<M>, TWICE_ONE<M>};
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        mma_16816<M>(row_sum[0][i], a[i][0], ones);
                        mma_16816<M>(row_sum[PARTS - 1][i], a[i][1], ones);
                    }
                }
#pragma unroll
                for (int p = 0; p < PANELS; p++) {
                    unsigned pair[4];
                    F::template pairs<M>(pair, now.codes[p], c);
                    float scale[PARTS][2], minimum[PARTS][2];
#pragma unroll
                    for (int part = 0; part < PARTS; part++) {
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            scale[part][i] = F::scale(now.scales[p][i], PARTS * c + part);
                            minimum[part][i] = F::MIN ? F::minimum(now.scales[p][i], PARTS * c + part) : 0;
                        }
                    }
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        float product[PARTS][4] = {};
                        mma_16816<M>(product[0], a[i][0], {pair[0], pair[1]});
                        mma_16816<M>(product[PARTS - 1], a[i][1], {pair[2], pair[3]});
#pragma unroll
                        for (int part = 0; part < PARTS; part++) {
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                float& s = sum[i][p][e];
                                s = fmaf(scale[part][e % 2], product[part][e], s);
                                if (F::MIN) s = fmaf(minimum[part][e % 2], row_sum[part][i][e], s);
                            }
                        }
                    }
                }
            }
        }
    }

    // The upper half of the warps gives its sums to the lower, until one has all.
    float(&sums)[TILES * PANELS * 4] = reinterpret_cast<float(&)[TILES * PANELS * 4]>(sum);
    for (int half = warps / 2; half > 0; half /= 2) {
        __syncthreads();
        if (warp >= half && warp < 2 * half) {
#pragma unroll
            for (int i = 0; i < TILES * PANELS * 4; i++) partial[warp - half][i][lane] = sums[i];
        }
        __syncthreads();
        if (warp < half) {
#pragma unroll
            for (int i = 0; i < TILES * PANELS * 4; i++) sums[i] += partial[warp][i][lane];
        }
    }
    if (warp > 0) return;
    Y* out = static_cast<Y*>(weight.out);
#pragma unroll
    for (int i = 0; i < TILES * PANELS * 4; i++) {
        int row = first_row + i / (4 * PANELS) * 16 + i / 2 % 2 * 8 + g;
        int at = first + i / 4 % PANELS * 8 + 2 * t + i % 2;
        if (row < rows && at < weight.out_features) {
            float bias = weight.bias ? weight.bias[at] : 0;
            out[static_cast<long long>(row) * weight.out_features + at] = from_float<Y>(sums[i] + bias);
        }
    }
}

/// `out = x · Wᵀ + bias` in f32: x `[rows, k]` in X, out in f32. A block has one feature, and 8 rows, that share its weights.
///
/// Grid: features of all weights, groups of 8 rows. Block: any number of warps.
template <typename F, typename X> __global__ void __launch_bounds__(128) product_f32(Group group, const X* x, int rows, int k) {
    constexpr int ROWS = 8;
    int feature;
    const Weight weight = weight_of_block(group, 1, feature);
    const int first_row = blockIdx.y * ROWS;
    x += static_cast<long long>(first_row) * k;
    rows = min(rows - first_row, ROWS);
    const unsigned char* row = weight.rows + feature * F::row_bytes(k);

    float sum[ROWS] = {};
    for (int unit = threadIdx.x; unit < spans(k) * 4; unit += blockDim.x) {
        int span = unit / 4, t = unit % 4;
        typename F::Codes codes;
        typename F::Scales scales;
        F::load_codes(codes, row, k, span, t);
        F::load_scales(scales, row, k, span);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            float value[8];
            F::values(value, codes, scales, c);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int at = span * SPAN + c * CHUNK + column<F::GROUP>(j, t);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    if (r >= rows || at >= k) continue;
                    const X* from = x + static_cast<long long>(r) * k + at;
                    if (k % 4 == 0) {
                        Vec<X, 4> read = load<4>(from);
#pragma unroll
                        for (int i = 0; i < 4; i++) sum[r] = fmaf(to_float(read[i]), value[4 * j + i], sum[r]);
                    } else {
                        for (int i = 0; i < min(4, k - at); i++) sum[r] = fmaf(to_float(from[i]), value[4 * j + i], sum[r]);
                    }
                }
            }
        }
    }
    float* out = static_cast<float*>(weight.out) + static_cast<long long>(first_row) * weight.out_features + feature;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float total = block_sum(sum[r]);
        if (threadIdx.x == r && r < rows) {
            out[static_cast<long long>(r) * weight.out_features] = total + (weight.bias ? weight.bias[feature] : 0);
        }
    }
}

/// `out[i] = row ids[i]` of a weight `[_, k]`, or `row first + i` without ids; rounded to Y.
///
/// Grid: rows of out, parts of a row. Block: threads take 32 columns each.
template <typename F, typename Y>
__global__ void __launch_bounds__(128) unpack(const unsigned char* weight, const unsigned* ids, int first, int k, Y* out) {
    int unit = blockIdx.y * blockDim.x + threadIdx.x, span = unit / 4, t = unit % 4;
    if (span >= spans(k)) return;
    long long id = ids ? static_cast<long long>(ids[blockIdx.x]) : first + static_cast<long long>(blockIdx.x);
    const unsigned char* row = weight + id * F::row_bytes(k);
    out += static_cast<long long>(blockIdx.x) * k;
    typename F::Codes codes;
    typename F::Scales scales;
    F::load_codes(codes, row, k, span, t);
    F::load_scales(scales, row, k, span);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float value[8];
        F::values(value, codes, scales, c);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int at = span * SPAN + c * CHUNK + column<F::GROUP>(j, t);
            Vec<Y, 4> rounded;
#pragma unroll
            for (int i = 0; i < 4; i++) rounded[i] = from_float<Y>(value[4 * j + i]);
            if (k % 4 != 0) {
                for (int i = 0; i < min(4, k - at); i++) out[at + i] = rounded[i];
            } else if (at < k) {
                store(out + at, rounded);
            }
        }
    }
}

/// `out[r, i] = x[r, i] + bias[i]`, `[count / cols, cols]`, or x in another type where there is no bias; out may be x.
///
/// Grid and block: a thread per element.
template <typename X, typename Y> __global__ void __launch_bounds__(256) add_bias(const X* x, const float* bias, Y* out, long long count, int cols) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) out[i] = from_float<Y>(to_float(x[i]) + (bias ? bias[i % cols] : 0));
}
