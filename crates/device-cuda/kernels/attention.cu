//! Attention over the paged cache, as the seam's `paged_attention` says, and the part of latent attention for which there is no
//! faster kernel.
//!
//! | kernel | for | expected to be bound by (not measured) |
//! |---|---|---|
//! | `attend<.., Few<H>>` | 16 / H tokens of a sequence, H query heads of a key head | reading the cache, once for all of them |
//! | `attend<.., Wide<H, K>>` | 64 tokens of a sequence, H query heads of a key head | tensor cores |
//! | `attend_rows` | numbers of 32 bits and heads that are no multiple of 16 wide | arithmetic; for comparisons |
//! | `merge` | contexts of many tokens, or of latents, that were split | launching it |
//!
//! Where a context is split, the last block that ends joins the splits of a few tokens: launching another kernel would cost more. Those of
//! many tokens are more than one block should read.
//!
//! Invariant: a row's scores are relative to the largest of those it saw, in f32; weights are rounded to the type of
//! activations on their way into tensor cores, the result once.
#include "context.cuh"

constexpr int THREADS = 128;

/// How four warps share out a tile of queries times a tile of `KEYS` positions. A warp has a run of 16 rows for each of its
/// `HEADS_APART`, and in it `HEADS_TOGETHER` for each token. Whether it JOINS splits itself.
template <int H> struct Few {
    static constexpr int ROW_WARPS = 1, KEY_WARPS = 4, HEADS_APART = 1, HEADS_TOGETHER = H, KEYS = 64;
    static constexpr bool JOINS = true;
};
template <int H, int K> struct Wide {
    static constexpr int ROW_WARPS = 4, KEY_WARPS = 1, HEADS_APART = H, HEADS_TOGETHER = 1, KEYS = K;
    static constexpr bool JOINS = false;
};

/// Shared memory of `attend`: queries, then two stages of keys and values, or of their bytes and behind these their numbers.
/// At the end all of it holds sums in f32, `[KEY_WARPS, ROWS, D]`.
template <typename T, typename KV, int D, typename S> struct Layout {
    static constexpr bool BYTES = SAME<KV, signed char>;
    static constexpr int STRIDE = D + PAD;
    static constexpr int ROWS = 16 * S::ROW_WARPS * S::HEADS_APART;
    static constexpr int QUERIES = ROWS * STRIDE * 2;
    static constexpr int PLANE = fetched<KV, S::KEYS, D, STRIDE>();
    static constexpr int STAGE = 2 * PLANE;
};

/// Whether this is the last of so many blocks to come here; it sees what the others stored before they came. The counter is then as it was
/// before the first.
__device__ inline bool is_last(unsigned* counter, int blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(counter, blocks - 1) == static_cast<unsigned>(blocks - 1);
    __syncthreads();
    if (last) __threadfence();
    return last;
}

/// N columns from `column` on of what the splits of a row left, the first of which is `at`, joined in their order. All of it comes from the
/// second cache, so that what counts is how many reads are under way.
template <int N>
__device__ inline Vec<float, N> join(const Partials& partials, size_t at, int splits, int width, int column) {
    Softmax row;
    Vec<float, N> sum{};
#pragma unroll 16
    for (int s = 0; s < splits; s++) {
        const Vec<float, 2> weight = load<2>(partials.weights + (at + s) * 2);
        const Vec<float, N> part = load<N>(partials.sums + (at + s) * width + column);
        const float before = row.raise(weight[0]), factor = relative(weight[0], row.largest);
        row.sum = fmaf(factor, weight[1], row.sum);
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] = fmaf(factor, part[i], sum[i] * before);
    }
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] /= row.sum;
    return sum;
}

/// q and out `[rows, heads * D]`. Grid: (runs of query heads, splits, tiles of at most `tokens`, which may be fewer than S has room
/// for).
template <typename T, typename KV, int D, typename S>
__global__ void __launch_bounds__(THREADS) attend(const T* q, Plane keys, Plane values, const int* step_blocks,
                                                  const Tile* tiles, int tokens, Scores of, Partials partials, T* out) {
    using L = Layout<T, KV, D, S>;
    constexpr int STRIDE = L::STRIDE, RUNS = S::HEADS_APART, HEADS = RUNS * S::HEADS_TOGETHER;
    constexpr int KEYS = S::KEYS, WARP_KEYS = KEYS / S::KEY_WARPS;
    SHARED(shared);
    T* queries = reinterpret_cast<T*>(shared);
    unsigned char* stages = shared + L::QUERIES;

    const int warp = warp_id(), lane = lane_id();
    const int row_warp = warp % S::ROW_WARPS, key_warp = warp / S::ROW_WARPS;
    const Tile tile = tiles[blockIdx.z];
    const int group = of.heads / of.kv_heads, runs = (group + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.x / runs, in_group = blockIdx.x % runs * HEADS;
    const int head = kv_head * group + in_group, heads = group - in_group < HEADS ? group - in_group : HEADS;
    const int position = tile.position;
    const int* blocks = step_blocks + tile.table;
    const Range range = visible(position, position + tile.tokens - 1, of.window);
    const Range mine = split_tiles<KEYS>(range, blockIdx.y, gridDim.y);

    // A row of the tile is a token and a head; rows without either are zero and are not stored.
    struct Row {
        int token, head;
    };
    auto row_of = [](int i) {
        const int run = i / (16 * S::ROW_WARPS), in_run = i % (16 * S::ROW_WARPS);
        return Row{in_run / S::HEADS_TOGETHER, run + in_run % S::HEADS_TOGETHER};
    };
    auto is_row = [&](Row row) { return row.token < tile.tokens && row.head < heads; };
    auto index_of = [&](Row row) { return static_cast<size_t>(tile.row + row.token) * of.heads + head + row.head; };
    // Where the row's first split goes.
    auto split_of = [&](Row row) {
        return (static_cast<size_t>(blockIdx.z * tokens + row.token) * of.heads + head + row.head) * gridDim.y;
    };

    constexpr int PARTS = D / 8;
    for (int part = threadIdx.x; part < L::ROWS * PARTS; part += THREADS) {
        const int i = part / PARTS, column = part % PARTS * 8;
        const Row row = row_of(i);
        const bool valid = is_row(row);
        cp_async_16(queries + i * STRIDE + column, valid ? q + index_of(row) * D + column : q, valid);
    }

    using Blocks = Vec<int, KEYS / BLOCK>;
    auto blocks_of = [&](int t) {
        return t < mine.end ? load<KEYS / BLOCK>(blocks + t * (KEYS / BLOCK)) : Blocks{};
    };
    auto ask = [&](int t, const Blocks& numbers) {
        unsigned char* stage = stages + t % 2 * L::STAGE;
        fetch<T, KV, KEYS, D, STRIDE, THREADS>(stage, keys, kv_head, numbers, t * KEYS, range);
        fetch<T, KV, KEYS, D, STRIDE, THREADS>(stage + L::PLANE, values, kv_head, numbers, t * KEYS, range);
    };

    Softmax rows[RUNS][2];
    float sums[RUNS][D / 8][4] = {};
    if (mine.begin < mine.end) ask(mine.begin, blocks_of(mine.begin));
    cp_async_commit();
    Blocks next = blocks_of(mine.begin + 1);
    for (int t = mine.begin; t < mine.end; t++) {
        cp_async_wait<0>();
        // Behind it this tile is there for all, and nobody reads the one before any longer.
        __syncthreads();
        if (t + 1 < mine.end) ask(t + 1, next);
        cp_async_commit();
        next = blocks_of(t + 2);
        const unsigned char* stage = stages + t % 2 * L::STAGE;
        const T* k = reinterpret_cast<const T*>(stage);
        const T* v = reinterpret_cast<const T*>(stage + L::PLANE);
        if constexpr (L::BYTES) {
            T* numbers = reinterpret_cast<T*>(stages + 2 * L::STAGE);
            widen<T, KEYS, D, STRIDE, THREADS>(numbers, stage, t * KEYS, range);
            widen<T, KEYS, D, STRIDE, THREADS>(numbers + KEYS * STRIDE, stage + L::PLANE, t * KEYS, range);
            k = numbers;
            v = numbers + KEYS * STRIDE;
            __syncthreads();
        }
        k += key_warp * WARP_KEYS * STRIDE;
        v += key_warp * WARP_KEYS * STRIDE;

        float scores[RUNS][WARP_KEYS / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D; d += 16) {
            unsigned a[RUNS][4];
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
                const T* at = queries + ((run * S::ROW_WARPS + row_warp) * 16 + lane % 16) * STRIDE + d;
                ldmatrix_x4(a[run], at + lane / 16 * 8);
            }
#pragma unroll
            for (int n = 0; n < WARP_KEYS; n += 16) {
                unsigned b[4];
                ldmatrix_x4(b, k + (n + lane / 16 * 8 + lane % 8) * STRIDE + d + lane / 8 % 2 * 8);
#pragma unroll
                for (int run = 0; run < RUNS; run++) {
                    mma_16816<T>(scores[run][n / 8], a[run], {b[0], b[1]});
                    mma_16816<T>(scores[run][n / 8 + 1], a[run], {b[2], b[3]});
                }
            }
        }

        const int first = t * KEYS + key_warp * WARP_KEYS + lane % 4 * 2;
        // Every row of the tile sees all positions of tiles before its first token, and behind the window of its last.
        const bool whole = t * KEYS + KEYS <= position + 1
            && (of.window == 0 || t * KEYS > position + tile.tokens - 1 - of.window);
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++) bound(scores[run][n], of, quick_tanh);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int last = position + row_of((run * S::ROW_WARPS + row_warp) * 16 + lane / 4 + half * 8).token;
                float largest = -infinity();
#pragma unroll
                for (int n = 0; n < WARP_KEYS / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& score = scores[run][n][half * 2 + i];
                        const int at = first + n * 8 + i;
                        if (!whole && (at > last || (of.window > 0 && at <= last - of.window))) score = -infinity();
                        largest = fmaxf(largest, score);
                    }
                }
                Softmax& row = rows[run][half];
                const float factor = row.raise(warp_max<4>(largest));
#pragma unroll
                for (int n = 0; n < WARP_KEYS / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& score = scores[run][n][half * 2 + i];
                        score = row.weigh(score);
                    }
                }
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    sums[run][n][half * 2] *= factor;
                    sums[run][n][half * 2 + 1] *= factor;
                }
            }
        }

#pragma unroll
        for (int n = 0; n < WARP_KEYS; n += 16) {
            unsigned a[RUNS][4];
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* pair = &scores[run][n / 8 + i / 2][i % 2 * 2];
                    a[run][i] = pack<T>(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (int d = 0; d < D; d += 16) {
                unsigned b[4];
                ldmatrix_x4_trans(b, v + (n + lane % 16) * STRIDE + d + lane / 16 * 8);
#pragma unroll
                for (int run = 0; run < RUNS; run++) {
                    mma_16816<T>(sums[run][d / 8], a[run], {b[0], b[1]});
                    mma_16816<T>(sums[run][d / 8 + 1], a[run], {b[2], b[3]});
                }
            }
        }
    }

    // The warps of a row join their parts in shared memory, from where the result leaves in whole lines.
    float* joined = reinterpret_cast<float*>(shared);
    __shared__ float largest[S::KEY_WARPS][L::ROWS], weights[S::KEY_WARPS][L::ROWS];
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = (run * S::ROW_WARPS + row_warp) * 16 + lane / 4 + half * 8;
            const Softmax& row = rows[run][half];
            const float weight = warp_sum<4>(row.sum);
            if (lane % 4 == 0) {
                largest[key_warp][i] = row.largest;
                weights[key_warp][i] = weight;
            }
            float* to = joined + (key_warp * L::ROWS + i) * D + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                store(to + n * 8, Vec<float, 2>{{sums[run][n][half * 2], sums[run][n][half * 2 + 1]}});
            }
        }
    }
    __syncthreads();
    for (int part = threadIdx.x; part < L::ROWS * PARTS; part += THREADS) {
        const int i = part / PARTS, column = part % PARTS * 8;
        const Row row = row_of(i);
        if (!is_row(row)) continue;
        float top = -infinity(), weight = 0.0f;
        for (int w = 0; w < S::KEY_WARPS; w++) top = fmaxf(top, largest[w][i]);
        Vec<float, 8> sum{};
        for (int w = 0; w < S::KEY_WARPS; w++) {
            const float factor = relative(largest[w][i], top);
            const Vec<float, 8> piece = load<8>(joined + (w * L::ROWS + i) * D + column);
            weight += factor * weights[w][i];
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += factor * piece[j];
        }
        if (gridDim.y == 1) {
            Vec<T, 8> result;
#pragma unroll
            for (int j = 0; j < 8; j++) result[j] = from_float<T>(sum[j] / weight);
            store(out + index_of(row) * D + column, result);
        } else {
            const size_t at = split_of(row) + blockIdx.y;
            store(partials.sums + at * D + column, sum);
            if (column == 0) store(partials.weights + at * 2, Vec<float, 2>{{top, weight}});
        }
    }
    if constexpr (S::JOINS) {
        if (gridDim.y == 1 || !is_last(partials.counters + blockIdx.z * gridDim.x + blockIdx.x, gridDim.y)) return;
        constexpr int N = 4;
        for (int part = threadIdx.x; part < L::ROWS * D / N; part += THREADS) {
            const Row row = row_of(part / (D / N));
            if (!is_row(row)) continue;
            const int column = part % (D / N) * N;
            const Vec<float, N> sum = join<N>(partials, split_of(row), gridDim.y, D, column);
            Vec<T, N> result;
#pragma unroll
            for (int j = 0; j < N; j++) result[j] = from_float<T>(sum[j]);
            store(out + index_of(row) * D + column, result);
        }
    }
}

/// One row and head of a split, keys in turns of 32 for each warp; `COLUMNS` is a 32nd of the width of values, rounded up.
/// A query and its keys may have a second part, behind the first; `rotated.width` is 0 if they have none. The width of a key
/// in floats is the dynamic shared memory. Grid: (tiles times their `tokens`, heads, splits).
template <typename T, typename KV, int COLUMNS>
__global__ void __launch_bounds__(THREADS) attend_rows(Heads q, Heads rotated_q, Plane keys, Plane rotated, Plane values,
                                                       const int* step_blocks, const Tile* tiles, int tokens,
                                                       Scores of, Partials partials, T* out) {
    constexpr int WARPS = THREADS / LANES, KEYS = 64;
    SHARED(shared);
    float* query = reinterpret_cast<float*>(shared);
    __shared__ float joined[WARPS][COLUMNS * LANES], largest[WARPS], weights[WARPS];
    const Tile tile = tiles[blockIdx.x / tokens];
    const int token = blockIdx.x % tokens, head = blockIdx.y, lane = lane_id(), warp = warp_id();
    if (token >= tile.tokens) return;
    const int row = tile.row + token, own = tile.position + token;
    const int kv_head = head / (of.heads / of.kv_heads);
    const int* blocks = step_blocks + tile.table;
    const Range range = visible(own, own, of.window);
    const Range mine = split_tiles<KEYS>(range, blockIdx.z, gridDim.z);
    for (int d = threadIdx.x; d < keys.width; d += THREADS) query[d] = to_float(q.of<T>(row, head)[d]);
    for (int d = threadIdx.x; d < rotated.width; d += THREADS) {
        query[keys.width + d] = to_float(rotated_q.of<T>(row, head)[d]);
    }
    __syncthreads();

    auto slot = [&](int position) {
        return (static_cast<size_t>(blocks[position / BLOCK]) * keys.heads + kv_head) * BLOCK + position % BLOCK;
    };
    auto dot = [&](const float* x, const Plane& plane, size_t at) {
        const KV* key = reinterpret_cast<const KV*>(plane.data) + at * plane.width;
        constexpr int N = WIDE<KV>;
        // Rows of whole parts of 16 bytes begin at one.
        const int whole = plane.width % N == 0 ? plane.width : 0;
        float sum = 0.0f;
        for (int d = 0; d < whole; d += N) {
            const Vec<KV, N> part = load<N>(key + d);
#pragma unroll
            for (int i = 0; i < N; i++) sum += x[d + i] * kept(part[i]);
        }
        for (int d = whole; d < plane.width; d++) sum += x[d] * kept(key[d]);
        return SAME<KV, signed char> && plane.width > 0 ? sum * plane.scales[at] : sum;
    };

    Softmax softmax;
    float sums[COLUMNS] = {};
    for (int first = mine.begin * KEYS + warp * LANES; first < mine.end * KEYS; first += THREADS) {
        const int position = first + lane;
        float score[1] = {-infinity()};
        size_t at = 0;
        if (position >= range.begin && position < range.end) {
            at = slot(position);
            score[0] = dot(query, keys, at) + dot(query + keys.width, rotated, at);
            bound(score, of, tanhf);
        }
        const float factor = softmax.raise(warp_max(score[0]));
        float weight = softmax.weigh(score[0]);
        if (SAME<KV, signed char>) weight *= values.scales[at];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) sums[c] *= factor;
        for (int j = 0; j < LANES; j++) {
            const float shared_weight = __shfl_sync(FULL, weight, j);
            if (first + j < range.begin || first + j >= range.end) continue;
            const KV* value = reinterpret_cast<const KV*>(values.data) + slot(first + j) * values.width;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const int d = c * LANES + lane;
                if (d < values.width) sums[c] += shared_weight * kept(value[d]);
            }
        }
    }

    const float sum = warp_sum(softmax.sum);
    if (lane == 0) {
        largest[warp] = softmax.largest;
        weights[warp] = sum;
    }
    for (int c = 0; c < COLUMNS; c++) joined[warp][c * LANES + lane] = sums[c];
    __syncthreads();
    float top = -infinity(), weight = 0.0f;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, largest[w]);
    for (int w = 0; w < WARPS; w++) weight += relative(largest[w], top) * weights[w];
    const size_t index = static_cast<size_t>(row) * of.heads + head;
    const size_t first_split = (static_cast<size_t>(blockIdx.x) * of.heads + head) * gridDim.z, at = first_split + blockIdx.z;
    for (int d = threadIdx.x; d < values.width; d += THREADS) {
        float total = 0.0f;
        for (int w = 0; w < WARPS; w++) total += relative(largest[w], top) * joined[w][d];
        if (gridDim.z == 1) {
            out[index * values.width + d] = from_float<T>(total / weight);
        } else {
            partials.sums[at * values.width + d] = total;
        }
    }
    if (gridDim.z == 1) return;
    if (threadIdx.x == 0) store(partials.weights + at * 2, Vec<float, 2>{{top, weight}});
    if (!is_last(partials.counters + blockIdx.x * gridDim.y + blockIdx.y, gridDim.z)) return;
    for (int d = threadIdx.x; d < values.width; d += THREADS) {
        out[index * values.width + d] = from_float<T>(join<1>(partials, first_split, gridDim.z, values.width, d)[0]);
    }
}

/// Joins the splits of what tiles of at most `tokens` left. out `[rows, heads * width]`; a thread takes N columns at a time, of
/// which `width` is a multiple.
///
/// Grid: (tiles times tokens, heads). Block: whole warps.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS) merge(const Tile* tiles, int tokens, Partials partials, int splits, int width, T* out) {
    const Tile tile = tiles[blockIdx.x / tokens];
    const int token = blockIdx.x % tokens;
    if (token >= tile.tokens) return;
    const size_t index = static_cast<size_t>(tile.row + token) * gridDim.y + blockIdx.y;
    const size_t first_split = (static_cast<size_t>(blockIdx.x) * gridDim.y + blockIdx.y) * splits;
    for (int d = threadIdx.x * N; d < width; d += blockDim.x * N) {
        const Vec<float, N> sum = join<N>(partials, first_split, splits, width, d);
        Vec<T, N> result;
#pragma unroll
        for (int i = 0; i < N; i++) result[i] = from_float<T>(sum[i]);
        store(out + index * width + d, result);
    }
}
