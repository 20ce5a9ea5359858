// Products with weights, and rows of weights.
//
// kernel         of what                                                       expected to be bound by (not measured)
// product        up to 64 rows of 16 bits, weights of 16 bits or in blocks     bandwidth: each weight is read once for 8 · TILES rows
// product_f32    few rows, sums of f32 products: weights or rows in f32        bandwidth up to 8 rows, then f32 arithmetic
// unpack         weights as numbers: embeddings, and panels for cuBLASLt       bandwidth
// add_parts      behind a product of parts of k                                second cache
// add_bias       behind a product of cuBLASLt                                  bandwidth
// pad_rows       x whose rows begin anywhere, or whose columns lie otherwise   bandwidth
//
// Products of many rows are cuBLASLt's, on weights that `unpack` widened where they do not lie as it wants them.
//
// Left out, as all kernels here are for compute capability 8.0 and up: wgmma and bulk copies of 9.0, and launches that begin while the one
// before ends, which would hide a decode step's gaps between kernels.
#include "activation.cuh"
#include "baton.cuh"
#include "coded.cuh"

/// A weight `[out_features, k]`, and where its product goes: `[rows, out_features]`.
struct Weight {
    const unsigned char* rows;
    const float* bias;
    void* out;
    int out_features;
    /// Of a gate.
    int activation;
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
        if (block >= blocks) block -= blocks, weight = group.weight[i];
    }
    return weight;
}

/// The pairs of x that a lane multiplies with those of a weight, from the first of its columns of a chunk on.
template <typename F, typename M> __device__ __forceinline__ void load_pairs(unsigned (&pair)[4], const M* from) {
    constexpr int TOGETHER = F::GROUP == CHUNK ? 4 : 2;
#pragma unroll
    for (int j = 0; j < 4 / TOGETHER; j++) {
        Vec<unsigned, TOGETHER> read = load<TOGETHER>(reinterpret_cast<const unsigned*>(from + 16 * j));
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) pair[j * TOGETHER + i] = read[i];
    }
}

/// `sum[tile] += a · b[tile]`: a of weights, b of x, each of half a chunk.
template <typename M, int TILES>
__device__ __forceinline__ void multiply_half(float (&sum)[TILES][4], const unsigned (&a)[4], const unsigned (&x)[TILES][4], int half) {
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const unsigned b[2] = {x[i][2 * half], x[i][2 * half + 1]};
        mma_16816<M>(sum[i], a, b);
    }
}

/// What a warp has of 16 features in a span: of lane `4g + t` the columns that t has, of features g and g + 8.
template <typename F> struct Span {
    typename F::Codes codes[2];
    typename F::Scales scales[2];

    __device__ __forceinline__ void load(const unsigned char* const (&row)[2], int k, int span, int t, bool whole) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            F::load_codes(codes[i], row[i], k, span, t, whole);
            F::load_scales(scales[i], row[i], k, span);
        }
    }

    /// Adds the products of a chunk, of floats and of codes under scales. A chunk is one group or two.
    template <typename M, int TILES>
    __device__ __forceinline__ void multiply(float (&sum)[TILES][4], const unsigned (&x)[TILES][4],
                                             const float (&row_sum)[2][TILES][4], int chunk) const {
        unsigned a[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned pair[4];
            F::template pairs<M>(pair, codes[i], scales[i], chunk);
#pragma unroll
            for (int p = 0; p < 4; p++) a[p / 2][p % 2 * 2 + i] = pair[p];
        }
        if constexpr (!F::SCALED) {
            multiply_half<M>(sum, a[0], x, 0);
            multiply_half<M>(sum, a[1], x, 1);
        } else {
            constexpr int PARTS = CHUNK / F::GROUP;
            float product[PARTS][TILES][4] = {};
            multiply_half<M>(product[0], a[0], x, 0);
            multiply_half<M>(product[PARTS - 1], a[1], x, 1);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                int group = PARTS * chunk + part;
                float scale[2] = {F::scale(scales[0], group), F::scale(scales[1], group)};
                float minimum[2] = {};
                if constexpr (F::MIN) minimum[0] = F::minimum(scales[0], group), minimum[1] = F::minimum(scales[1], group);
#pragma unroll
                for (int i = 0; i < TILES * 4; i++) {
                    float& s = sum[i / 4][i % 4];
                    s = fmaf(scale[i % 4 / 2], product[part][i / 4][i % 4], s);
                    if (F::MIN) s = fmaf(minimum[i % 4 / 2], row_sum[part][i / 4][i % 4], s);
                }
            }
        }
    }
};

/// Adds up the sums of a block's warps, a power of two, in one order. True for the warp that has the result.
template <int N> __device__ __forceinline__ bool add_warps(float (&sums)[N], int warp, int warps) {
    __shared__ float partial[4][N][LANES];
    const int lane = lane_id();
    // The upper half gives its sums to the lower, until one has all.
    for (int half = warps / 2; half > 0; half /= 2) {
        __syncthreads();
        if (warp >= half && warp < 2 * half) {
#pragma unroll
            for (int i = 0; i < N; i++) partial[warp - half][i][lane] = sums[i];
        }
        __syncthreads();
        if (warp < half) {
#pragma unroll
            for (int i = 0; i < N; i++) sums[i] += partial[warp][i][lane];
        }
    }
    return warp == 0;
}

/// The most warps of a block of `product`.
template <int TILES> constexpr int WARPS = TILES <= 2 ? 8 : 4;
/// Whether they have features of their own, and all columns, rather than columns of their own.
template <int TILES> constexpr bool APART = TILES > 2;
/// Blocks of `product` on an SM: as many as leave registers for what a lane loads at once.
template <int TILES, bool GATED> constexpr int BLOCKS = TILES == 1 && !GATED ? 3 : 2;

/// `out = x · Wᵀ + bias` on tensor cores: x `[rows, k]` in M, in f32 sums, out in Y. k is a multiple of 8.
///
/// A block has 8 · TILES rows and 16 · PANELS features; its warps take spans of k in turn and are added up in one order. Where rows are
/// many, each warp has as many features of its own, so that x, which is more bytes than the weights then, is read for all of them
/// together; and where features are too few to fill the chip like this, parts of k are blocks of their own, whose sums `add_parts` adds.
/// Codes of blocks are exact in M: the product of a group with them is multiplied by its scale in f32, and its minimum by the group's sum
/// of x. So no weight is rounded; but floats in another type than M are.
///
/// By estimate, not measured: to have the memory busy (H200: 4.8 TB/s · 600 ns are 22 KiB for each of 132 SMs) a lane loads 32 to 128 bytes of weights before it
/// multiplies, and an SM holds 24 warps with one tile. Then all that may cost time is what a lane does for a weight: at 4 bits an SM has 3.4
/// instructions for each, at 16 bits 12 (with one tile it takes 2.8 for Q4_0, 4.6 for Q4_K, 1.2 for bf16). So features are the 16 of a
/// tensor core's product, whose registers are written where they are needed, and rows its 8, which are read as they are needed; and loads
/// have no conditions: rows beyond the last are the last one again, since rows do not mix and nobody stores those.
///
/// GATED (the group is a gate and what it lets through, of equal shape; not APART): a block's two panels are the same 16 features of
/// both, and `out = activation(gate) * up` goes to the first one's out.
///
/// Grid: features of all weights, tiles of rows, parts of k (if they are more than one, out is f32 `[parts, rows, out_features]`, without
/// bias). Block: 32 lanes of 1, 2, 4 or 8 (WARPS) warps; of WARPS if they are APART, and else k has one part.
template <typename F, typename M, typename Y, int TILES, int PANELS, bool GATED = false>
__global__ void __launch_bounds__(LANES * WARPS<TILES>, (BLOCKS<TILES, GATED>))
    product(Group group, const M* x, int rows, int k) {
    static_assert(!GATED || (PANELS == 2 && !APART<TILES>), "a panel of each");
    constexpr int FEATURES = GATED ? 16 : 16 * PANELS, SUMS = PANELS * TILES * 4;
    // What a lane loads at once is of both weights where they are gated.
    constexpr int DEPTH = APART<TILES> ? 1 : GATED ? (F::DEPTH + 1) / 2 : F::DEPTH;
    int block = blockIdx.x;
    const Weight weight = GATED ? group.weight[0] : weight_of_block(group, FEATURES * (APART<TILES> ? WARPS<TILES> : 1), block);
    const int lane = lane_id(), g = lane / 4, t = lane % 4, warp = warp_id(), warps = blockDim.x / LANES;
    const int first = (APART<TILES> ? block * WARPS<TILES> + warp : block) * FEATURES, first_row = blockIdx.y * (8 * TILES);
    if (APART<TILES> && first >= weight.out_features) return;
    const unsigned char* feature[PANELS][2];
#pragma unroll
    for (int i = 0; i < PANELS * 2; i++) {
        int row = min(first + 8 * (GATED ? i % 2 : i) + g, weight.out_features - 1);
        feature[i / 2][i % 2] = (GATED ? group.weight[i / 2].rows : weight.rows) + row * F::row_bytes(k);
    }
    x += static_cast<long long>(first_row) * k;
    int from[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) from[i] = min(8 * i + g, rows - 1 - first_row) * k + column<F::GROUP>(0, t);

    float sum[PANELS][TILES][4] = {};
    auto multiply = [&](const Span<F>(&with)[PANELS], int span, bool whole) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            unsigned pair[TILES][4];
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                int start = span * SPAN + c * CHUNK;
                // Behind the last column weights are zero: x may be any number of the row.
                if (!whole && start + column<F::GROUP>(0, t) >= k) start = -column<F::GROUP>(0, t);
                load_pairs<F>(pair[i], x + (from[i] + start));
            }
            float row_sum[2][TILES][4] = {};
            if constexpr (F::MIN) {
                const unsigned ones[4] = {ONES<M>, ONES<M>, ONES<M>, ONES<M>};
                multiply_half<M>(row_sum[0], ones, pair, 0);
                multiply_half<M>(row_sum[F::GROUP == CHUNK ? 0 : 1], ones, pair, 1);
            }
#pragma unroll
            for (int p = 0; p < PANELS; p++) with[p].template multiply<M>(sum[p], pair, row_sum, c);
        }
    };

    const int per_part = (spans(k) + gridDim.z - 1) / gridDim.z, step = APART<TILES> ? 1 : warps;
    const int begin = APART<TILES> ? blockIdx.z * per_part : warp, end = min(spans(k), static_cast<int>(blockIdx.z + 1) * per_part);
    const int whole_end = min(end, k / SPAN);
    for (int start = begin; start < whole_end; start += DEPTH * step) {
        Span<F> span[DEPTH][PANELS];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
#pragma unroll
            for (int p = 0; p < PANELS; p++) {
                if (start + d * step < whole_end) span[d][p].load(feature[p], k, start + d * step, t, true);
            }
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (start + d * step < whole_end) multiply(span[d], start + d * step, true);
        }
    }
    if (whole_end < end && (APART<TILES> ? begin < end : whole_end % warps == warp)) {
        Span<F> span[PANELS];
#pragma unroll
        for (int p = 0; p < PANELS; p++) span[p].load(feature[p], k, whole_end, t, false);
        multiply(span, whole_end, false);
    }

    float(&sums)[SUMS] = reinterpret_cast<float(&)[SUMS]>(sum);
    if constexpr (!APART<TILES>) {
        if (!add_warps(sums, warp, warps)) return;
    }
    const bool is_part = gridDim.z > 1;
#pragma unroll
    for (int i = 0; i < (GATED ? SUMS / 2 : SUMS); i++) {
        int row = first_row + i / 4 % TILES * 8 + 2 * t + i % 2;
        int at = first + i / (4 * TILES) * 16 + i % 4 / 2 * 8 + g;
        if (row >= rows || at >= weight.out_features) continue;
        long long place = static_cast<long long>(row) * weight.out_features + at;
        if constexpr (GATED) {
            const float* of_up = group.weight[1].bias;
            float gate = sums[i] + (weight.bias ? weight.bias[at] : 0), up = sums[SUMS / 2 + i] + (of_up ? of_up[at] : 0);
            static_cast<Y*>(weight.out)[place] = from_float<Y>(activated(weight.activation, gate) * up);
        } else if (is_part) {
            static_cast<float*>(weight.out)[static_cast<long long>(blockIdx.z) * rows * weight.out_features + place] = sums[i];
        } else {
            static_cast<Y*>(weight.out)[place] = from_float<Y>(sums[i] + (weight.bias ? weight.bias[at] : 0));
        }
    }
}

/// The sum of parts, `[parts, count / out_features, out_features]` at each weight's `rows`, and its bias, to its out.
///
/// Grid: a thread per element of the largest result, weights.
template <typename Y> __global__ void __launch_bounds__(256) add_parts(const __grid_constant__ Group group, int parts, int rows) {
    const Weight& weight = group.weight[blockIdx.y];
    long long count = static_cast<long long>(rows) * weight.out_features;
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float* part = reinterpret_cast<const float*>(weight.rows) + i;
    float sum = weight.bias ? weight.bias[i % weight.out_features] : 0;
    for (int p = 0; p < parts; p++) sum += part[p * count];
    static_cast<Y*>(weight.out)[i] = from_float<Y>(sum);
}

/// `out = x · Wᵀ + bias` in f32: x `[rows, k]` in X, k a multiple of 8, out in f32. A block has one feature, and 8 rows that share its
/// weights.
///
/// Grid: features of all weights, groups of 8 rows. Block: up to 4 warps.
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
        F::load_codes(codes, row, k, span, t, false);
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
                    Vec<X, 4> read = load<4>(x + static_cast<long long>(r) * k + at);
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[r] = fmaf(to_float(read[i]), value[4 * j + i], sum[r]);
                }
            }
        }
    }
    __shared__ float parts[ROWS][4];
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows) break;
        float part = warp_sum(sum[r]);
        if (threadIdx.x % 32 == 0) parts[r][warp] = part;
    }
    __syncthreads();
    if (threadIdx.x >= rows) return;
    float total = weight.bias ? weight.bias[feature] : 0;
    for (int i = 0; i < blockDim.x / 32; i++) total += parts[threadIdx.x][i];
    long long at = static_cast<long long>(first_row + threadIdx.x) * weight.out_features + feature;
    static_cast<float*>(weight.out)[at] = total;
}

/// Marks an id that is the number of a token chosen on the device.
constexpr unsigned CHOSEN = 1u << 31;

/// `out[i] = row ids[i]` of a weight `[_, k]`, or `row first + i` without ids; rounded to Y. An id may be a token that a step before chose;
/// where there is none, any row will do.
///
/// Grid: rows of out, parts of a row. Block: threads take 32 columns each.
template <typename F, typename Y>
__global__ void __launch_bounds__(128) 
    unpack(const unsigned char* weight, const unsigned* ids, const int* chosen, int first, int k, Y* out) {
    int unit = blockIdx.y * blockDim.x + threadIdx.x, span = unit / 4, t = unit % 4;
    if (span >= spans(k)) return;
    long long id = first + static_cast<long long>(blockIdx.x);
    if (ids) {
        id = ids[blockIdx.x];
        if (id & CHOSEN) id = max(chosen[id & ~CHOSEN], 0);
    }
    const unsigned char* row = weight + id * F::row_bytes(k);
    out += static_cast<long long>(blockIdx.x) * k;
    typename F::Codes codes;
    typename F::Scales scales;
    F::load_codes(codes, row, k, span, t, false);
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

/// Rows `[cols]` of x as rows `[padded]` of out, rounded to Y: zeros behind, or with an order the columns that it says, and zeros for
/// negative ones.
///
/// Grid and block: a thread per element of out.
template <typename X, typename Y>
__global__ void __launch_bounds__(256) pad_rows(const X* x, const int* order, Y* out, long long count, int cols, int padded) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    long long row = i / padded;
    int column = i % padded;
    if (order) {
        column = order[column];
    } else if (column >= cols) {
        column = -1;
    }
    out[i] = from_float<Y>(column >= 0 ? to_float(x[row * cols + column]) : 0);
}

/// `out[r, i] = x[r, i] + bias[i]`, `[count / cols, cols]`, or x in another type where there is no bias; out may be x.
///
/// Grid and block: a thread per element.
template <typename X, typename Y>
__global__ void __launch_bounds__(256) add_bias(const X* x, const float* bias, Y* out, long long count, int cols) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) out[i] = from_float<Y>(to_float(x[i]) + (bias ? bias[i % cols] : 0));
}
