//! Mixture of experts: `out = Σ_e w_e · down_e · (silu(gate_e·x) ⊙ up_e·x)` over the experts that a row's router logits choose.
//!
//! A *pair* is a row with one of the experts that it chose, number `row * top_k + i` by ascending expert; a *slot* is a pair's place
//! when pairs are sorted by expert. A *tile* is a run of slots of one expert. How many tiles there are depends on the logits,
//! so grids are as large as any logits can make them, and blocks beyond the last tile end at once: a step can be replayed.
//!
//!   few pairs    route, direct_gate_up, direct_down               slots are pairs, tiles hold one of them
//!   otherwise    route, sort_pairs, grouped_gate_up, grouped_down, combine      16-bit numbers in rows of whole 16 bytes: tensor cores
//!                route, sort_pairs, skinny_gate_up, skinny_down, combine        any other
//!
//! What bounds them: route and sort_pairs by latency; direct, skinny and grouped with 16 rows by reading the weights of the experts chosen,
//! each once; grouped with 64 and 128 rows by the tensor cores.
//!
//! Invariant: no result depends on the order of slots within an expert, which is left to chance; each row's sums are in one order.

#include "baton.cuh"

/// How logits choose and weigh experts, and which are held here.
struct Routing {
    int experts, top_k;
    /// Whether scores are sigmoids and a bias helps to choose; a softmax otherwise.
    int sigmoid;
    /// 0 for no groups.
    int groups, groups_kept;
    /// Whether a group is worth its two best experts; its best otherwise.
    int two_best;
    int normalise;
    float scale;
    /// The experts held: `first .. first + held`.
    int first, held;
};

/// Slots `first .. first + count` of one expert, numbered among those held; none if that is negative.
struct Tile {
    int expert, first, count;
};

/// One matrix of every expert held: where it lies, and the bytes from one expert and one row to the next.
struct Stack {
    const unsigned char* data;
    long long expert, row;
};

// ---------------------------------------------------------------------------------------------------------------- choosing

/// Orders floats as their bits do, every NaN included: the judge's order.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Of equal numbers the one with the lower index is larger. Never 0.
__device__ __forceinline__ unsigned long long ranked(float x, int index) {
    return static_cast<unsigned long long>(ordered(x)) << 32 | ~static_cast<unsigned>(index);
}

__device__ __forceinline__ unsigned long long warp_largest(unsigned long long x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const unsigned long long other = __shfl_xor_sync(FULL, x, lanes);
        x = other > x ? other : x;
    }
    return x;
}

/// Makes experts outside the best groups ineligible. `scores` holds every expert's and then has room for every group's.
template <int N>
__device__ void leave_best_groups(float (&choice)[N], float* scores, const Routing& r, int lane) {
    const int size = r.experts / r.groups;
    float* of_group = scores + r.experts;
    for (int i = 0; i < N; ++i) {
        if (i * 32 + lane < r.experts) scores[i * 32 + lane] = choice[i];
    }
    __syncwarp();
    for (int g = lane; g < r.groups; g += 32) {
        unsigned long long best = 0, second = 0;
        for (int e = g * size; e < (g + 1) * size; ++e) {
            const unsigned long long own = ranked(scores[e], e);
            if (own > best) {
                second = best;
                best = own;
            } else if (own > second) {
                second = own;
            }
        }
        const float first = scores[~static_cast<unsigned>(best)];
        of_group[g] = r.two_best && size > 1 ? first + scores[~static_cast<unsigned>(second)] : first;
    }
    __syncwarp();
    for (int i = 0; i < N; ++i) {
        const int e = i * 32 + lane;
        if (e >= r.experts) continue;
        const unsigned long long own = ranked(of_group[e / size], e / size);
        int better = 0;
        for (int g = 0; g < r.groups; ++g) better += ranked(of_group[g], g) > own;
        if (better >= r.groups_kept) choice[i] = -infinity();
    }
}

/// The experts of each row (numbered among those held, -1 for one that is not) and their weights, `[rows, top_k]` by ascending expert.
/// `tiles`, if not null, become one for each pair. A warp for each row, N experts for each lane; shared memory holds two floats for each
/// expert and warp.
template <typename T, int N>
__global__ void __launch_bounds__(128)
    route(const T* logits, const float* bias, Routing r, int rows, int* ids, float* weights, Tile* tiles) {
    SHARED(shared);
    const int lane = lane_id(), warp = warp_id();
    const int row = blockIdx.x * 4 + warp;
    if (row >= rows) return;

    float score[N], choice[N];
    float most = -infinity();
    for (int i = 0; i < N; ++i) {
        const int e = i * 32 + lane;
        score[i] = e < r.experts ? to_float(logits[static_cast<long long>(row) * r.experts + e]) : most;
    }
    if (r.sigmoid) {
        for (int i = 0; i < N; ++i) {
            const int e = i * 32 + lane;
            score[i] = 1.0f / (1.0f + expf(-score[i]));
            choice[i] = e < r.experts ? score[i] + bias[e] : 0.0f;
        }
    } else {
        for (int i = 0; i < N; ++i) most = fmaxf(most, score[i]);
        most = warp_max(most);
        float sum = 0.0f;
        for (int i = 0; i < N; ++i) {
            score[i] = expf(score[i] - most);
            sum += score[i];
        }
        sum = warp_sum(sum);
        for (int i = 0; i < N; ++i) choice[i] = score[i] = score[i] / sum;
    }
    if (r.groups > 0) leave_best_groups(choice, reinterpret_cast<float*>(shared) + warp * 2 * r.experts, r, lane);

    unsigned long long rank[N];
    for (int i = 0; i < N; ++i) rank[i] = i * 32 + lane < r.experts ? ranked(choice[i], i * 32 + lane) : 0;
    unsigned chosen = 0;
    for (int k = 0; k < r.top_k; ++k) {
        unsigned long long best = 0;
        for (int i = 0; i < N; ++i) best = rank[i] > best ? rank[i] : best;
        best = warp_largest(best);
        for (int i = 0; i < N; ++i) {
            if (rank[i] == best) {
                chosen |= 1u << i;
                rank[i] = 0;
            }
        }
    }

    float sum = 0.0f;
    for (int i = 0; i < N; ++i) sum += chosen >> i & 1 ? score[i] : 0.0f;
    sum = warp_sum(sum);
    const float norm = r.normalise ? 1.0f / (sum + 1e-20f) : 1.0f;
    int pair = row * r.top_k;
    for (int i = 0; i < N; ++i) {
        const bool mine = chosen >> i & 1;
        const unsigned all = __ballot_sync(FULL, mine);
        if (mine) {
            const int at = pair + __popc(all & ((1u << lane) - 1));
            const int own = i * 32 + lane - r.first;
            const int id = own >= 0 && own < r.held ? own : -1;
            ids[at] = id;
            weights[at] = score[i] * norm * r.scale;
            if (tiles) tiles[at] = Tile{id, at, 1};
        }
        pair += __popc(all);
    }
}

// ----------------------------------------------------------------------------------------------------------------- sorting

/// The sum of `x` over the block's threads before this one. Of 1024 threads; `totals` has room for 32.
__device__ __forceinline__ unsigned long long sum_before(unsigned long long x, unsigned long long* totals) {
    const int lane = lane_id(), warp = warp_id();
    const auto with_before = [lane](unsigned long long x) {
        for (int lanes = 1; lanes < LANES; lanes *= 2) {
            const unsigned long long other = __shfl_up_sync(FULL, x, lanes);
            x += lane >= lanes ? other : 0;
        }
        return x;
    };
    const unsigned long long own = with_before(x);
    if (lane == 31) totals[warp] = own;
    __syncthreads();
    const unsigned long long warps = with_before(totals[lane]);
    const unsigned long long before = __shfl_sync(FULL, warps, warp > 0 ? warp - 1 : 0);
    return own - x + (warp > 0 ? before : 0);
}

/// Pairs by expert: `order[slot]` is the pair there. Tiles of at most `size` slots, by ascending expert; the `bound` there can be have
/// no expert beyond the last. One block of 1024 threads, and no more experts held.
__global__ void __launch_bounds__(1024)
    sort_pairs(const int* __restrict__ ids, int pairs, int held, int size, int bound, int* order, Tile* tiles) {
    __shared__ int next[1024];
    __shared__ unsigned long long totals[32];
    __shared__ int used;
    const int e = threadIdx.x;
    next[e] = 0;
    __syncthreads();
#pragma unroll 8
    for (int pair = threadIdx.x; pair < pairs; pair += 1024) {
        const int id = ids[pair];
        if (id >= 0) atomicAdd(&next[id], 1);
    }
    __syncthreads();

    const int count = next[e];
    const int own = (count + size - 1) / size;
    const unsigned long long before = sum_before(static_cast<unsigned long long>(count) << 32 | own, totals);
    const int first = static_cast<int>(before >> 32), tile = static_cast<int>(before & FULL);
    next[e] = first;
    for (int i = 0; i < own; ++i) {
        const int left = count - i * size;
        tiles[tile + i] = Tile{e, first + i * size, left < size ? left : size};
    }
    if (e == 1023) used = tile + own;
    __syncthreads();

    for (int i = used + threadIdx.x; i < bound; i += 1024) tiles[i] = Tile{-1, 0, 0};
#pragma unroll 8
    for (int pair = threadIdx.x; pair < pairs; pair += 1024) {
        const int id = ids[pair];
        if (id >= 0) order[atomicAdd(&next[id], 1)] = pair;
    }
}

// ----------------------------------------------------------------------------------------------------------------- reading

/// N elements from the `i`th of a row on; `i` is a multiple of N. Of 8 elements the row is aligned to 16 bytes.
template <int N, typename W>
__device__ __forceinline__ void read(const W* row, int i, float (&out)[N]) {
    const Vec<W, N> all = load<N>(row + i);
    for (int j = 0; j < N; ++j) out[j] = to_float(all[j]);
}

template <int N, typename W>
__device__ __forceinline__ void read_weights(const unsigned char* row, int i, float (&out)[N]) {
    read(reinterpret_cast<const W*>(row), i, out);
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// --------------------------------------------------------------------------------------------------- products for few rows

/// Adds to `sums[r][c]` this lane's part of row `x[r]` times row `weight[c]`, of `k` elements each.
template <int N, typename W, typename T, int ROWS, int COLS>
__device__ __forceinline__ void add_products(
    float (&sums)[ROWS][COLS], const T* const (&x)[ROWS], const unsigned char* const (&weight)[COLS], int k) {
#pragma unroll 2
    for (int i = lane_id() * N; i < k; i += 32 * N) {
        float w[COLS][N];
        for (int c = 0; c < COLS; ++c) read_weights<N, W>(weight[c], i, w[c]);
        for (int r = 0; r < ROWS; ++r) {
            float v[N];
            read(x[r], i, v);
            for (int c = 0; c < COLS; ++c) {
                for (int j = 0; j < N; ++j) sums[r][c] = fmaf(v[j], w[c][j], sums[r][c]);
            }
        }
    }
}

/// Columns that a warp computes.
constexpr int FEW = 2;

/// Rows of a stack from `col` on, `cols` of which there are: beyond, the last one again.
template <int COLS>
__device__ __forceinline__ void rows_of(const Stack& stack, int expert, int col, int cols, const unsigned char* (&rows)[COLS]) {
    for (int c = 0; c < COLS; ++c) {
        const int row = col + c < cols ? col + c : cols - 1;
        rows[c] = stack.data + expert * stack.expert + row * stack.row;
    }
}

/// `h[slot] = silu(gate·x) ⊙ up·x`: x `[rows, hidden]`, h `[slots, inner]`. A block of four warps takes FEW columns each of a tile of up
/// to ROWS slots. Where `order` is null, slots are pairs.
template <typename T, typename G, typename U, int N, int ROWS>
__global__ void __launch_bounds__(128)
    skinny_gate_up(const T* x, Stack gate, Stack up, const int* order, const Tile* tiles, int top_k, int hidden, int inner, T* h) {
    const Tile tile = tiles[blockIdx.x];
    const int col = (blockIdx.y * 4 + warp_id()) * FEW;
    if (tile.expert < 0 || col >= inner) return;

    const T* rows[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const int slot = tile.first + (r < tile.count ? r : 0);
        rows[r] = x + static_cast<long long>((order ? order[slot] : slot) / top_k) * hidden;
    }
    const unsigned char *gates[FEW], *ups[FEW];
    rows_of(gate, tile.expert, col, inner, gates);
    rows_of(up, tile.expert, col, inner, ups);
    float g[ROWS][FEW] = {}, u[ROWS][FEW] = {};
    add_products<N, G>(g, rows, gates, hidden);
    add_products<N, U>(u, rows, ups, hidden);
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < FEW; ++c) {
            const float value = silu(warp_sum(g[r][c])) * warp_sum(u[r][c]);
            const bool mine = lane_id() == r * FEW + c;
            if (mine && r < tile.count && col + c < inner)
                h[static_cast<long long>(tile.first + r) * inner + col + c] = from_float<T>(value);
        }
    }
}

/// `y[pair] = down·h[slot]`: y `[pairs, hidden]`. Blocks as above.
template <typename T, typename D, int N, int ROWS>
__global__ void __launch_bounds__(128)
    skinny_down(const T* h, Stack down, const int* order, const Tile* tiles, int inner, int hidden, T* y) {
    const Tile tile = tiles[blockIdx.x];
    const int col = (blockIdx.y * 4 + warp_id()) * FEW;
    if (tile.expert < 0 || col >= hidden) return;

    const T* rows[ROWS];
    for (int r = 0; r < ROWS; ++r)
        rows[r] = h + static_cast<long long>(tile.first + (r < tile.count ? r : 0)) * inner;
    const unsigned char* downs[FEW];
    rows_of(down, tile.expert, col, hidden, downs);
    float sums[ROWS][FEW] = {};
    add_products<N, D>(sums, rows, downs, inner);
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < FEW; ++c) {
            const float value = warp_sum(sums[r][c]);
            const bool mine = lane_id() == r * FEW + c;
            if (mine && r < tile.count && col + c < hidden)
                y[static_cast<long long>(order[tile.first + r]) * hidden + col + c] = from_float<T>(value);
        }
    }
}

/// `out[row] = Σ weight · down·h[pair]` where slots are pairs. A block takes four columns of a row, and a warp for each of its pairs.
template <typename T, typename D, int N>
__global__ void __launch_bounds__(1024)
    direct_down(const T* h, Stack down, const int* ids, const float* weights, int inner, int hidden, T* out) {
    constexpr int COLS = 4;
    __shared__ float parts[32][COLS];
    const int top_k = blockDim.x / 32, i = warp_id(), lane = lane_id();
    const int pair = blockIdx.y * top_k + i, col = blockIdx.x * COLS;
    const int id = ids[pair];

    float sums[1][COLS] = {};
    if (id >= 0) {
        const T* rows[1] = {h + static_cast<long long>(pair) * inner};
        const unsigned char* downs[COLS];
        rows_of(down, id, col, hidden, downs);
        add_products<N, D>(sums, rows, downs, inner);
    }
    for (int c = 0; c < COLS; ++c) {
        const float sum = warp_sum(sums[0][c]);
        if (lane == 0) parts[i][c] = id >= 0 ? weights[pair] * sum : 0.0f;
    }
    __syncthreads();
    if (threadIdx.x < COLS && col + static_cast<int>(threadIdx.x) < hidden) {
        float sum = 0.0f;
        for (int j = 0; j < top_k; ++j) sum += parts[j][threadIdx.x];
        out[static_cast<long long>(blockIdx.y) * hidden + col + threadIdx.x] = from_float<T>(sum);
    }
}

// ----------------------------------------------------------------------------------------------- products on tensor cores

/// How a block of four warps multiplies ROWS rows with COLS columns of each of some matrices: warps stand DOWN below each other and ACROSS
/// beside each other, and each has DOWN_TILES by ACROSS_TILES tiles of 16 by 8. A stage of shared memory holds DEPTH
/// elements of each row of both sides, 128 bytes, of which the 16-byte parts are permuted by the row's number, so that the eight
/// rows of an ldmatrix lie in different banks.
template <int ROWS_, int MATRICES_>
struct Shape {
    static constexpr int ROWS = ROWS_, MATRICES = MATRICES_, DEPTH = 64;
    static constexpr int COLS = (ROWS == 16 ? 64 : 128) / MATRICES;
    static constexpr int DOWN = ROWS == 128 ? 2 : 1, ACROSS = 4 / DOWN;
    static constexpr int DOWN_TILES = ROWS / DOWN / 16, ACROSS_TILES = COLS / ACROSS / 8;
    static constexpr int STAGE_BYTES = (ROWS + MATRICES * COLS) * DEPTH * 2;
    static constexpr int STAGES = ROWS == 16 ? 4 : 3;
    using Sums = float[MATRICES][DOWN_TILES][ACROSS_TILES][4];
};

/// Where a 16-byte part of a row lies in a side of a stage.
__device__ __forceinline__ unsigned char* part_of(unsigned char* side, int row, int part) {
    return side + row * 128 + ((part ^ row) & 7) * 16;
}

template <typename A, typename B>
constexpr bool same = false;
template <typename A>
constexpr bool same<A, A> = true;

/// Brings COLS rows of a matrix from the `from`th on, `rows` of which there are, to a side of a stage: elements `at .. at + 8` of `k`.
template <typename T, typename W, int COLS>
__device__ __forceinline__ void fetch_weights(unsigned char* side, const unsigned char* matrix, long long stride, int from, int rows, int at, int k) {
    const int part = threadIdx.x % 8;
    for (int r = threadIdx.x / 8; r < COLS; r += 16) {
        const bool valid = from + r < rows && at < k;
        const unsigned char* row = matrix + (valid ? (from + r) * stride : 0);
        if constexpr (same<T, W>) {
            cp_async_16(part_of(side, r, part), row + (valid ? at * sizeof(W) : 0), valid);
        } else {
            float wide[8] = {};
            if (valid) read_weights<8, W>(row, at, wide);
            Vec<T, 8> narrow;
            for (int i = 0; i < 8; ++i) narrow[i] = from_float<T>(wide[i]);
            store(reinterpret_cast<T*>(part_of(side, r, part)), narrow);
        }
    }
}

/// `sums = x·Wᵀ` of one tile: rows `row_of` of x (negative for zeros), in shared memory; `k` is a multiple of 8. `S::MATRICES` matrices
/// of the types W, of `cols` rows, from row `col` on.
template <typename S, typename T, typename... W>
__device__ __forceinline__ void multiply(
    unsigned char* shared, const T* x, const int* row_of, const Stack (&stacks)[S::MATRICES], int expert, int col, int cols, int k,
    typename S::Sums& sums) {
    const int lane = lane_id(), warp = warp_id();
    const int down = warp / S::ACROSS * (S::DOWN_TILES * 16), across = warp % S::ACROSS * (S::ACROSS_TILES * 8);
    const int steps = (k + S::DEPTH - 1) / S::DEPTH;

    const auto fetch = [&](int step) {
        if (step < steps) {
            unsigned char* side = shared + step % S::STAGES * S::STAGE_BYTES;
            const int part = threadIdx.x % 8, at = step * S::DEPTH + part * 8;
            for (int r = threadIdx.x / 8; r < S::ROWS; r += 16) {
                const int row = row_of[r];
                const bool valid = row >= 0 && at < k;
                cp_async_16(part_of(side, r, part), x + (valid ? static_cast<long long>(row) * k + at : 0), valid);
            }
            side += S::ROWS * 128;
            int m = 0;
            (..., (fetch_weights<T, W, S::COLS>(
                       side + m * S::COLS * 128, stacks[m].data + expert * stacks[m].expert, stacks[m].row, col, cols, at, k),
                   ++m));
        }
        cp_async_commit();
    };

    for (int step = 0; step < S::STAGES - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<S::STAGES - 2>();
        __syncthreads();
        fetch(step + S::STAGES - 1);
        unsigned char* side = shared + step % S::STAGES * S::STAGE_BYTES;
        unsigned char* weights = side + S::ROWS * 128;
#pragma unroll
        for (int half = 0; half < S::DEPTH / 32; ++half) {
            unsigned b[S::MATRICES][S::ACROSS_TILES][4];
#pragma unroll
            for (int m = 0; m < S::MATRICES; ++m) {
#pragma unroll
                for (int j = 0; j < S::ACROSS_TILES; ++j)
                    ldmatrix_x4(b[m][j], part_of(weights, m * S::COLS + across + j * 8 + lane % 8, half * 4 + lane / 8));
            }
#pragma unroll
            for (int quarter = 0; quarter < 2; ++quarter) {
#pragma unroll
                for (int i = 0; i < S::DOWN_TILES; ++i) {
                    unsigned a[4];
                    ldmatrix_x4(a, part_of(side, down + i * 16 + lane % 16, half * 4 + quarter * 2 + lane / 16));
#pragma unroll
                    for (int m = 0; m < S::MATRICES; ++m) {
#pragma unroll
                        for (int j = 0; j < S::ACROSS_TILES; ++j) {
                            const unsigned pair[2] = {b[m][j][quarter * 2], b[m][j][quarter * 2 + 1]};
                            mma_16816<T>(sums[m][i][j], a, pair);
                        }
                    }
                }
            }
        }
    }
}

/// Calls `put(row, col, sums of each matrix)` for each number of a tile that this thread has: two neighbouring columns.
template <typename S, typename Put>
__device__ __forceinline__ void for_pairs(const typename S::Sums& sums, const Put& put) {
    const int lane = lane_id(), warp = warp_id();
    const int down = warp / S::ACROSS * (S::DOWN_TILES * 16) + lane / 4;
    const int across = warp % S::ACROSS * (S::ACROSS_TILES * 8) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::DOWN_TILES; ++i) {
#pragma unroll
        for (int j = 0; j < S::ACROSS_TILES; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) put(down + i * 16 + half * 8, across + j * 8, i, j, half * 2);
        }
    }
}

/// As skinny_gate_up, for tiles of up to ROWS slots; `hidden` and `inner` are multiples of 8.
template <typename T, typename G, typename U, int ROWS>
__global__ void __launch_bounds__(128)
    grouped_gate_up(const T* x, Stack gate, Stack up, const int* order, const Tile* tiles, int top_k, int hidden, int inner, T* h) {
    using S = Shape<ROWS, 2>;
    SHARED(shared);
    __shared__ int row_of[ROWS];
    const Tile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    for (int r = threadIdx.x; r < ROWS; r += 128) row_of[r] = r < tile.count ? order[tile.first + r] / top_k : -1;
    __syncthreads();

    const int from = blockIdx.y * S::COLS;
    typename S::Sums sums = {};
    multiply<S, T, G, U>(shared, x, row_of, {gate, up}, tile.expert, from, inner, hidden, sums);
    for_pairs<S>(sums, [&](int row, int col, int i, int j, int half) {
        if (row >= tile.count || from + col >= inner) return;
        Vec<T, 2> both;
        for (int c = 0; c < 2; ++c) both[c] = from_float<T>(silu(sums[0][i][j][half + c]) * sums[1][i][j][half + c]);
        store(h + static_cast<long long>(tile.first + row) * inner + from + col, both);
    });
}

/// As skinny_down, for tiles of up to ROWS slots; `inner` and `hidden` are multiples of 8.
template <typename T, typename D, int ROWS>
__global__ void __launch_bounds__(128)
    grouped_down(const T* h, Stack down, const int* order, const Tile* tiles, int inner, int hidden, T* y) {
    using S = Shape<ROWS, 1>;
    SHARED(shared);
    __shared__ int row_of[ROWS];
    const Tile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    for (int r = threadIdx.x; r < ROWS; r += 128) row_of[r] = r < tile.count ? tile.first + r : -1;
    __syncthreads();

    const int from = blockIdx.y * S::COLS;
    typename S::Sums sums = {};
    multiply<S, T, D>(shared, h, row_of, {down}, tile.expert, from, hidden, inner, sums);
    for_pairs<S>(sums, [&](int row, int col, int i, int j, int half) {
        if (row >= tile.count || from + col >= hidden) return;
        Vec<T, 2> both;
        for (int c = 0; c < 2; ++c) both[c] = from_float<T>(sums[0][i][j][half + c]);
        store(y + static_cast<long long>(order[tile.first + row]) * hidden + from + col, both);
    });
}

// --------------------------------------------------------------------------------------------------------------- combining

/// `out[row] = Σ weight · y[pair]` by ascending expert: y `[pairs, hidden]`. A thread takes N columns of a row.
template <typename T, int N>
__global__ void __launch_bounds__(128)
    combine(const T* y, const int* ids, const float* weights, int top_k, int hidden, T* out) {
    const int col = (blockIdx.x * 128 + threadIdx.x) * N;
    if (col >= hidden) return;
    float sums[N] = {};
    for (int i = 0; i < top_k; ++i) {
        const int pair = blockIdx.y * top_k + i;
        if (ids[pair] < 0) continue;
        float part[N];
        read(y + static_cast<long long>(pair) * hidden, col, part);
        for (int j = 0; j < N; ++j) sums[j] = fmaf(weights[pair], part[j], sums[j]);
    }
    T* to = out + static_cast<long long>(blockIdx.y) * hidden + col;
    for (int j = 0; j < N; ++j) to[j] = from_float<T>(sums[j]);
}
