//! Latent attention where heads and latents suit tensor cores: queries are taken into the space of the latents, attend to them,
//! and what they mixed is taken out again, each head by its own matrix.
//!
//! | kernel | for | expected to be bound by (not measured) |
//! |---|---|---|
//! | `per_head` | absorbing and projecting | few rows: reading the matrices; many: tensor cores |
//! | `per_head_rows` | the same in 32 bits or of odd widths | arithmetic; for comparisons |
//! | `attend_latents` | 64 pairs of a token and a head, which share every latent | reading shared memory |
//!
//! Invariant: absorbed queries, weights of the softmax and mixed latents are rounded once each to the type of activations;
//! sums are f32.
#include "context.cuh"

/// Positions of a tile: two tiles of 512 + 64 columns and the queries fit an SM of compute capability 8.0.
constexpr int KEYS = 32;
/// Pairs of a token and a head in a block.
constexpr int ROWS = 64;
constexpr int THREADS = 256;

/// Shared memory of `attend_latents`: queries, weights, then two stages of latents with their rotated keys in one row, or of
/// their bytes and behind these their numbers.
template <typename T, typename KV, int RANK, int ROPE> struct Layout {
    static constexpr bool BYTES = SAME<KV, signed char>;
    static constexpr int STRIDE = RANK + ROPE + PAD, WEIGHT_STRIDE = KEYS + PAD;
    static constexpr int QUERIES = ROWS * STRIDE * 2;
    static constexpr int WEIGHTS = ROWS * WEIGHT_STRIDE * 2;
    /// Where rotated keys begin in a stage.
    static constexpr int ROTATED = BYTES ? fetched<KV, KEYS, RANK, STRIDE>() : RANK * 2;
    static constexpr int STAGE = BYTES ? ROTATED + fetched<KV, KEYS, ROPE, STRIDE>() : KEYS * STRIDE * 2;
};

/// absorbed `[rows, heads, RANK]`, rotated queries as `rotated_q` says, mixed `[rows, heads, RANK]`. Four times two warps make
/// scores of 16 rows and 16 positions; for the sums each of them takes some columns of all rows.
/// Grid: (runs of 64 pairs, splits, tiles of at most `tokens`).
template <typename T, typename KV, int RANK, int ROPE>
__global__ void __launch_bounds__(THREADS, 1) attend_latents(const T* absorbed, Heads rotated_q, Plane latents, Plane rotated,
                                                             const int* step_blocks, const Tile* tiles, int tokens,
                                                             Scores of, Partials partials, T* mixed) {
    using L = Layout<T, KV, RANK, ROPE>;
    constexpr int STRIDE = L::STRIDE, COLUMNS = RANK >= 128 ? RANK / 8 : 16;
    SHARED(shared);
    T* queries = reinterpret_cast<T*>(shared);
    T* weights = reinterpret_cast<T*>(shared + L::QUERIES);
    unsigned char* stages = shared + L::QUERIES + L::WEIGHTS;
    __shared__ float tops[2][ROWS], factors[ROWS], totals[2][ROWS];

    const int warp = warp_id(), lane = lane_id(), row_warp = warp % 4, key_warp = warp / 4;
    const Tile tile = tiles[blockIdx.z];
    // Row r of the block is the pair `pair + r` of the tile, tokens first.
    const int pair = blockIdx.x * ROWS, pairs = tile.tokens * of.heads;
    if (pair >= pairs) return;
    // Pairs that there are; runs of 16 rows without one are left out.
    const int live = pairs - pair < ROWS ? pairs - pair : ROWS;
    const int position = tile.position;
    const int* blocks = step_blocks + tile.table;
    const int last_token = (pair + live - 1) / of.heads;
    const Range range = visible(position, position + last_token, 0);
    const Range mine = split_tiles<KEYS>(range, blockIdx.y, gridDim.y);

    constexpr int PARTS = (RANK + ROPE) / 8;
    for (int part = threadIdx.x; part < ROWS * PARTS; part += THREADS) {
        const int i = part / PARTS, column = part % PARTS * 8;
        const bool valid = i < live;
        const int row = tile.row + (pair + i) / of.heads, head = (pair + i) % of.heads;
        const T* from = absorbed;
        if (valid) {
            from = column < RANK ? absorbed + (static_cast<size_t>(row) * of.heads + head) * RANK + column
                                 : rotated_q.of<T>(row, head) + column - RANK;
        }
        cp_async_16(queries + i * STRIDE + column, from, valid);
    }

    using Blocks = Vec<int, KEYS / BLOCK>;
    auto blocks_of = [&](int t) {
        return t < mine.end ? load<KEYS / BLOCK>(blocks + t * (KEYS / BLOCK)) : Blocks{};
    };
    auto ask = [&](int t, const Blocks& numbers) {
        unsigned char* stage = stages + t % 2 * L::STAGE;
        fetch<T, KV, KEYS, RANK, STRIDE, THREADS>(stage, latents, 0, numbers, t * KEYS, range);
        fetch<T, KV, KEYS, ROPE, STRIDE, THREADS>(stage + L::ROTATED, rotated, 0, numbers, t * KEYS, range);
    };

    Softmax rows[2];
    float sums[ROWS / 16][COLUMNS / 8][4] = {};
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
        const T* keys = reinterpret_cast<const T*>(stage);
        if constexpr (L::BYTES) {
            T* numbers = reinterpret_cast<T*>(stages + 2 * L::STAGE);
            widen<T, KEYS, RANK, STRIDE, THREADS>(numbers, stage, t * KEYS, range);
            widen<T, KEYS, ROPE, STRIDE, THREADS>(numbers + RANK, stage + L::ROTATED, t * KEYS, range);
            keys = numbers;
            __syncthreads();
        }

        // Two sums in turn, so that a product need not wait for the one before.
        float scores[2][4] = {}, others[2][4] = {};
        const T* query = queries + (row_warp * 16 + lane % 16) * STRIDE + lane / 16 * 8;
        const T* key = keys + (key_warp * 16 + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
        if (row_warp * 16 < live) {
#pragma unroll 4
            for (int d = 0; d < RANK + ROPE; d += 16) {
                unsigned a[4], b[4];
                ldmatrix_x4(a, query + d);
                ldmatrix_x4(b, key + d);
                float (&sum)[2][4] = d / 16 % 2 == 0 ? scores : others;
                mma_16816<T>(sum[0], a, {b[0], b[1]});
                mma_16816<T>(sum[1], a, {b[2], b[3]});
            }
        }
        const int first = t * KEYS + key_warp * 16 + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row_warp * 16 + lane / 4 + half * 8, last = position + (pair + row) / of.heads;
            float largest = -infinity();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& score = scores[i / 2][half * 2 + i % 2];
                score += others[i / 2][half * 2 + i % 2];
                score = first + i / 2 * 8 + i % 2 <= last ? score * of.scale * LOG2_E : -infinity();
                largest = fmaxf(largest, score);
            }
            largest = warp_max<4>(largest);
            if (lane % 4 == 0) tops[key_warp][row] = largest;
        }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row_warp * 16 + lane / 4 + half * 8;
            const float factor = rows[half].raise(fmaxf(tops[0][row], tops[1][row]));
            if (key_warp == 0 && lane % 4 == 0) factors[row] = factor;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float a = rows[half].weigh(scores[n][half * 2]), b = rows[half].weigh(scores[n][half * 2 + 1]);
                const int column = key_warp * 16 + n * 8 + lane % 4 * 2;
                store(weights + row * L::WEIGHT_STRIDE + column, Vec<T, 2>{{from_float<T>(a), from_float<T>(b)}});
            }
        }
        __syncthreads();
        if (warp * COLUMNS >= RANK) continue;
#pragma unroll
        for (int run = 0; run < ROWS / 16; run++) {
            if (run * 16 >= live) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float factor = factors[run * 16 + lane / 4 + half * 8];
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++) {
                    sums[run][n][half * 2] *= factor;
                    sums[run][n][half * 2 + 1] *= factor;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < KEYS; k += 16) {
            unsigned a[ROWS / 16][4];
#pragma unroll
            for (int run = 0; run < ROWS / 16; run++) {
                if (run * 16 >= live) break;
                ldmatrix_x4(a[run], weights + (run * 16 + lane % 16) * L::WEIGHT_STRIDE + k + lane / 16 * 8);
            }
#pragma unroll
            for (int n = 0; n < COLUMNS; n += 16) {
                unsigned b[4];
                ldmatrix_x4_trans(b, keys + (k + lane % 16) * STRIDE + warp * COLUMNS + n + lane / 16 * 8);
#pragma unroll
                for (int run = 0; run < ROWS / 16; run++) {
                    if (run * 16 >= live) break;
                    mma_16816<T>(sums[run][n / 8], a[run], {b[0], b[1]});
                    mma_16816<T>(sums[run][n / 8 + 1], a[run], {b[2], b[3]});
                }
            }
        }
    }

    cp_async_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = row_warp * 16 + lane / 4 + half * 8;
        const float total = warp_sum<4>(rows[half].sum);
        if (lane % 4 == 0) {
            totals[key_warp][row] = total;
            // Both warps of a row have the same.
            if (key_warp == 0) tops[0][row] = rows[half].largest;
        }
    }
    __syncthreads();
    if (warp * COLUMNS >= RANK) return;
#pragma unroll
    for (int run = 0; run < ROWS / 16; run++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = run * 16 + lane / 4 + half * 8;
            if (row >= live) continue;
            const float weight = totals[0][row] + totals[1][row];
            const size_t index = static_cast<size_t>(tile.row) * of.heads + pair + row;
            const size_t in_list = static_cast<size_t>(blockIdx.z) * tokens * of.heads + pair + row;
            const size_t at = in_list * gridDim.y + blockIdx.y;
            const int column = warp * COLUMNS + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                const float a = sums[run][n][half * 2], b = sums[run][n][half * 2 + 1];
                if (gridDim.y == 1) {
                    store(mixed + index * RANK + column + n * 8, Vec<T, 2>{{from_float<T>(a / weight), from_float<T>(b / weight)}});
                } else {
                    store(partials.sums + at * RANK + column + n * 8, Vec<float, 2>{{a, b}});
                }
            }
            if (gridDim.y > 1 && warp == 0 && lane % 4 == 0) {
                store(partials.weights + at * 2, Vec<float, 2>{{tops[0][row], weight}});
            }
        }
    }
}

/// Columns of a tile of `per_head`, and elements of the sum in a stage.
constexpr int TILE_COLUMNS = 64, DEPTH = 64, STAGES = 3, HEAD_THREADS = 128;

/// `out[row, head, n] = Σ_k x[row, head, k] · weight[head, n, k]`: 16 · RUNS rows and 64 columns in a block, 16 columns to a
/// warp. Elements along k are whole and aligned parts of 16 bytes. Grid: (tiles of columns, heads, tiles of rows).
template <typename T, int RUNS>
__global__ void __launch_bounds__(HEAD_THREADS) per_head(Heads x, const T* weight, Heads out, int rows, int columns, int depth) {
    constexpr int STRIDE = DEPTH + PAD, TILE_ROWS = 16 * RUNS, STAGE = (TILE_ROWS + TILE_COLUMNS) * STRIDE, PARTS = DEPTH / 8;
    SHARED(shared);
    T* stages = reinterpret_cast<T*>(shared);
    const int head = blockIdx.y, first_row = blockIdx.z * TILE_ROWS, first_column = blockIdx.x * TILE_COLUMNS;
    const int warp = warp_id(), lane = lane_id();
    const T* matrix = weight + static_cast<size_t>(head) * columns * depth;

    auto ask = [&](int t) {
        T* stage = stages + t % STAGES * STAGE;
        for (int part = threadIdx.x; part < (TILE_ROWS + TILE_COLUMNS) * PARTS; part += HEAD_THREADS) {
            const int i = part / PARTS, k = t * DEPTH + part % PARTS * 8;
            const int row = first_row + i, column = first_column + i - TILE_ROWS;
            const bool is_x = i < TILE_ROWS, valid = k < depth && (is_x ? row < rows : column < columns);
            const T* from = is_x ? x.of<T>(row, head) + k : matrix + static_cast<size_t>(column) * depth + k;
            cp_async_16(stage + i * STRIDE + part % PARTS * 8, valid ? from : matrix, valid);
        }
    };

    const int turns = (depth + DEPTH - 1) / DEPTH;
    float sums[RUNS][2][4] = {};
    for (int t = 0; t < STAGES - 1; t++) {
        if (t < turns) ask(t);
        cp_async_commit();
    }
    for (int t = 0; t < turns; t++) {
        cp_async_wait<STAGES - 2>();
        // Behind it this stage is there for all, and nobody reads the one before any longer.
        __syncthreads();
        if (t + STAGES - 1 < turns) ask(t + STAGES - 1);
        cp_async_commit();
        const T* stage = stages + t % STAGES * STAGE;
        const T* columns_at = stage + (TILE_ROWS + warp * 16 + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            unsigned b[4];
            ldmatrix_x4(b, columns_at + k);
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
                unsigned a[4];
                ldmatrix_x4(a, stage + (run * 16 + lane % 16) * STRIDE + k + lane / 16 * 8);
                mma_16816<T>(sums[run][0], a, {b[0], b[1]});
                mma_16816<T>(sums[run][1], a, {b[2], b[3]});
            }
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = first_row + run * 16 + lane / 4 + i / 2 % 2 * 8;
            const int column = first_column + warp * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (row < rows && column < columns) out.of<T>(row, head)[column] = from_float<T>(sums[run][i / 4][i % 4]);
        }
    }
}

/// The same, a warp for each number. Grid: (runs of columns, heads, rows).
template <typename T>
__global__ void per_head_rows(Heads x, const T* weight, Heads out, int columns, int depth) {
    const int row = blockIdx.z, head = blockIdx.y, column = blockIdx.x * (blockDim.x / LANES) + warp_id();
    if (column >= columns) return;
    const T* from = x.of<T>(row, head);
    const T* matrix = weight + (static_cast<size_t>(head) * columns + column) * depth;
    float sum = 0.0f;
    for (int k = lane_id(); k < depth; k += LANES) sum += to_float(from[k]) * to_float(matrix[k]);
    sum = warp_sum(sum);
    if (lane_id() == 0) out.of<T>(row, head)[column] = from_float<T>(sum);
}
