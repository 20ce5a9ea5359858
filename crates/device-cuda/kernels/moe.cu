//! Mixture of experts: `out = Σ_e w_e · down_e · (silu(gate_e·x) ⊙ up_e·x)` over the experts that a row's router logits choose.
//!
//! A *pair* is a row with one of the experts that it chose, number `row * top_k + i` by ascending expert; a *slot* is a pair's place
//! when pairs are sorted by expert. A *tile* is a run of slots of one expert. How many tiles there are depends on the logits,
//! so grids are as large as any logits can make them, and blocks beyond the last tile end at once: a step can be replayed.
//!
//!   few pairs    route, skinny_gate_up, direct_down                            slots are pairs, tiles hold one of them
//!   otherwise    route, sort_pairs, grouped_gate_up, grouped_down, combine      16-bit numbers in rows of whole 16 bytes: tensor cores
//!                route, sort_pairs, skinny_gate_up, skinny_down, combine        any other
//!
//! What is expected to bound them (not measured): route and sort_pairs by latency; direct, skinny and grouped with 16 rows by reading the weights of the experts chosen,
//! each once; grouped with 64 and 128 rows by the tensor cores.
//!
//! Invariant: no result depends on the order of slots within an expert, which is left to chance; each row's sums are in one order.

#include "baton.cuh"
#include "moe.cuh"

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

// ---------------------------------------------------------------------------------------------------------------- choosing

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

// --------------------------------------------------------------------------------------------------- products for few rows

/// Four elements of a row of `k`, from a multiple of 4 on; zeros behind the end. With N = 8, `k` is a multiple of 8 and the row aligned
/// to 16 bytes.
template <int N, typename T>
__device__ __forceinline__ void read_four(float (&out)[4], const T* row, int first, int k) {
    if constexpr (N == 8) {
        Vec<T, 4> all = {};
        if (first < k) all = load<4>(row + first);
        for (int i = 0; i < 4; ++i) out[i] = to_float(all[i]);
    } else {
        for (int i = 0; i < 4; ++i) out[i] = first + i < k ? to_float(row[first + i]) : 0.0f;
    }
}

/// Adds to `sums[r][c]` this lane's part of row `x[r]` times row `weight[c]` in format F, of `k` elements each.
template <typename F, int N, typename T, int ROWS, int COLS>
__device__ __forceinline__ void add_products(
    float (&sums)[ROWS][COLS], const T* const (&x)[ROWS], const unsigned char* const (&weight)[COLS], int k) {
    const int t = lane_id() % 4;
    for (int span = lane_id() / 4; span < spans(k); span += LANES / 4) {
        typename F::Codes codes[COLS];
        typename F::Scales scales[COLS];
#pragma unroll
        for (int c = 0; c < COLS; ++c) F::load_codes(codes[c], weight[c], k, span, t);
#pragma unroll
        for (int c = 0; c < COLS; ++c) F::load_scales(scales[c], weight[c], k, span);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            float w[COLS][8];
#pragma unroll
            for (int c = 0; c < COLS; ++c) F::values(w[c], codes[c], scales[c], chunk);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float v[4];
                    read_four<N>(v, x[r], span * SPAN + chunk * CHUNK + column<F::GROUP>(j, t), k);
#pragma unroll
                    for (int c = 0; c < COLS; ++c) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[r][c] = fmaf(v[i], w[c][j * 4 + i], sums[r][c]);
                    }
                }
            }
        }
    }
}

/// Columns that a warp computes.
constexpr int FEW = 2;

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
    rows_of(gates, gate, tile.expert, col, inner);
    rows_of(ups, up, tile.expert, col, inner);
    float g[ROWS][FEW] = {}, u[ROWS][FEW] = {};
    add_products<G, N>(g, rows, gates, hidden);
    add_products<U, N>(u, rows, ups, hidden);
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
    rows_of(downs, down, tile.expert, col, hidden);
    float sums[ROWS][FEW] = {};
    add_products<D, N>(sums, rows, downs, inner);
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < FEW; ++c) {
            const float value = warp_sum(sums[r][c]);
            const bool mine = lane_id() == r * FEW + c;
            if (mine && r < tile.count && col + c < hidden)
                y[static_cast<long long>(order[tile.first + r]) * hidden + col + c] = from_float<T>(value);
        }
    }
}

/// `out[row] = Σ weight · down·h[pair]` where slots are pairs. A block of up to eight warps takes four columns of a row, and a warp some of
/// its pairs.
template <typename T, typename D, int N>
__global__ void __launch_bounds__(256)
    direct_down(const T* h, Stack down, const int* ids, const float* weights, int top_k, int inner, int hidden, T* out) {
    constexpr int COLS = 4;
    __shared__ float parts[LANES][COLS];
    const int col = blockIdx.x * COLS;
    for (int i = warp_id(); i < top_k; i += blockDim.x / LANES) {
        const int pair = blockIdx.y * top_k + i, id = ids[pair];
        float sums[1][COLS] = {};
        if (id >= 0) {
            const T* rows[1] = {h + static_cast<long long>(pair) * inner};
            const unsigned char* downs[COLS];
            rows_of(downs, down, id, col, hidden);
            add_products<D, N>(sums, rows, downs, inner);
        }
        for (int c = 0; c < COLS; ++c) {
            const float sum = warp_sum(sums[0][c]);
            if (lane_id() == 0) parts[i][c] = id >= 0 ? weights[pair] * sum : 0.0f;
        }
    }
    __syncthreads();
    const int c = threadIdx.x;
    if (c < COLS && col + c < hidden) {
        float sum = 0.0f;
        for (int i = 0; i < top_k; ++i) sum += parts[i][c];
        out[static_cast<long long>(blockIdx.y) * hidden + col + c] = from_float<T>(sum);
    }
}

// --------------------------------------------------------------------------------------------------------------- combining

/// `out[row] = Σ weight · y[pair]` by ascending expert: y `[pairs, hidden]`. A thread takes four columns of a row. N as in `read_four`.
template <typename T, int N>
__global__ void __launch_bounds__(128)
    combine(const T* y, const int* ids, const float* weights, int top_k, int hidden, T* out) {
    const int col = (blockIdx.x * 128 + threadIdx.x) * 4;
    if (col >= hidden) return;
    float sums[4] = {};
    for (int i = 0; i < top_k; ++i) {
        const int pair = blockIdx.y * top_k + i;
        if (ids[pair] < 0) continue;
        float part[4];
        read_four<N>(part, y + static_cast<long long>(pair) * hidden, col, hidden);
        for (int c = 0; c < 4; ++c) sums[c] = fmaf(weights[pair], part[c], sums[c]);
    }
    T* to = out + static_cast<long long>(blockIdx.y) * hidden + col;
    for (int c = 0; c < 4 && col + c < hidden; ++c) to[c] = from_float<T>(sums[c]);
}
