//! Experts' products on tensor cores: tiles of many slots of one expert, weights read once for each tile.
//!
//! Expected to be bound (not measured) by reading the weights with tiles of 16 slots, by the tensor cores with tiles of 64 and 128. They are those of compute
//! capability 8.0 (mma.sync); wgmma with TMA, which 9.0 has, is what is left to gain there.
//!
//! Invariant: each row's sums are in one order, whatever tile and place in it the row has.

#include "baton.cuh"
#include "moe.cuh"

/// How a block of four warps multiplies ROWS rows with COLS columns of each of some matrices of format F: warps stand DOWN below each
/// other and ACROSS beside each other, and each has DOWN_TILES by ACROSS_TILES tiles of 16 by 8, of every matrix. Weights that are
/// as activations are go through shared memory; others are taken apart in registers, in the order in which lanes have them.
template <typename T, typename F, int ROWS_, int MATRICES_>
struct Shape {
    static constexpr bool COPIED = SAME<F, Dense<T>>;
    static constexpr int ROWS = ROWS_, MATRICES = MATRICES_;
    static constexpr int COLS = (COPIED && ROWS > 16 ? 128 : 64) / MATRICES;
    static constexpr int DOWN = ROWS > 64 ? 2 : 1, ACROSS = 4 / DOWN;
    static constexpr int DOWN_TILES = ROWS / DOWN / 16, ACROSS_TILES = COLS / ACROSS / 8;
    /// Elements of each row in a stage of shared memory, stages, and the bytes of one: of x, and of weights that are copied.
    static constexpr int DEPTH = COPIED ? 64 : SPAN;
    static constexpr int STAGES = COPIED && ROWS > 16 ? 3 : 4;
    static constexpr int STAGE_BYTES = (ROWS + (COPIED ? MATRICES * COLS : 0)) * DEPTH * 2;
    using Sums = float[MATRICES][DOWN_TILES][ACROSS_TILES][4];
};

/// What a block multiplies: the rows `rows` of x (negative for zeros; the table is in shared memory), of `k` elements, a multiple of 8, with
/// the columns from `col` on of an expert's matrices, of which there are `cols`.
template <typename T, int MATRICES>
struct Factors {
    const T* x;
    const int* rows;
    Stack stacks[MATRICES];
    int expert, col, cols, k;
};

/// Where a 16-byte part of a row of 128 bytes lies: the eight rows of an ldmatrix in different banks.
__device__ __forceinline__ unsigned char* part_of_128(unsigned char* side, int row, int part) {
    return side + row * 128 + (part ^ (row & 7)) * 16;
}

/// Of a row of 256 bytes: what four lanes read of each of two (16 bytes a lane) or four rows (8 bytes) in different banks.
__device__ __forceinline__ unsigned char* part_of_256(unsigned char* side, int row, int part) {
    return side + row * 256 + (part ^ ((row & 1) * 4 + (row & 2))) * 16;
}

/// Begins to copy a step's part of x.
template <typename S, typename T>
__device__ __forceinline__ void copy_rows(unsigned char* side, const Factors<T, S::MATRICES>& f, int step) {
    constexpr int PARTS = S::DEPTH / 8;
    const int part = threadIdx.x % PARTS, at = step * S::DEPTH + part * 8;
#pragma unroll
    for (int r = threadIdx.x / PARTS; r < S::ROWS; r += 128 / PARTS) {
        const int row = f.rows[r];
        const bool valid = row >= 0 && at < f.k;
        unsigned char* to = S::COPIED ? part_of_128(side, r, part) : part_of_256(side, r, part);
        cp_async_16(to, f.x + (valid ? static_cast<long long>(row) * f.k + at : 0), valid);
    }
}

/// Begins to copy a step's part of the weights, each matrix behind the other.
template <typename S, typename T>
__device__ __forceinline__ void copy_weights(unsigned char* side, const Factors<T, S::MATRICES>& f, int step) {
    const int part = threadIdx.x % 8, at = step * S::DEPTH + part * 8;
#pragma unroll
    for (int m = 0; m < S::MATRICES; ++m) {
        const Stack& stack = f.stacks[m];
        const unsigned char* matrix = stack.data + f.expert * stack.expert;
#pragma unroll
        for (int r = threadIdx.x / 8; r < S::COLS; r += 16) {
            const bool valid = f.col + r < f.cols && at < f.k;
            const unsigned char* from = matrix + (valid ? (f.col + r) * stack.row + at * 2 : 0);
            cp_async_16(part_of_128(side, m * S::COLS + r, part), from, valid);
        }
    }
}

/// `sums = x·Wᵀ` from weights that go through shared memory.
template <typename S, typename T>
__device__ __forceinline__ void multiply_copied(unsigned char* shared, const Factors<T, S::MATRICES>& f, typename S::Sums& sums) {
    const int lane = lane_id(), down = warp_id() / S::ACROSS * (S::DOWN_TILES * 16), across = warp_id() % S::ACROSS * (S::ACROSS_TILES * 8);
    const int steps = (f.k + S::DEPTH - 1) / S::DEPTH;
    const auto fetch = [&](int step) {
        if (step < steps) {
            unsigned char* stage = shared + step % S::STAGES * S::STAGE_BYTES;
            copy_rows<S>(stage, f, step);
            copy_weights<S>(stage + S::ROWS * 128, f, step);
        }
        cp_async_commit();
    };
    for (int step = 0; step < S::STAGES - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<S::STAGES - 2>();
        __syncthreads();
        fetch(step + S::STAGES - 1);
        unsigned char* rows = shared + step % S::STAGES * S::STAGE_BYTES;
        unsigned char* weights = rows + S::ROWS * 128;
#pragma unroll
        for (int half = 0; half < S::DEPTH / 32; ++half) {
            unsigned b[S::MATRICES][S::ACROSS_TILES][4];
#pragma unroll
            for (int m = 0; m < S::MATRICES; ++m) {
#pragma unroll
                for (int j = 0; j < S::ACROSS_TILES; ++j)
                    ldmatrix_x4(b[m][j], part_of_128(weights, m * S::COLS + across + j * 8 + lane % 8, half * 4 + lane / 8));
            }
#pragma unroll
            for (int quarter = 0; quarter < 2; ++quarter) {
#pragma unroll
                for (int i = 0; i < S::DOWN_TILES; ++i) {
                    unsigned a[4];
                    ldmatrix_x4(a, part_of_128(rows, down + i * 16 + lane % 16, half * 4 + quarter * 2 + lane / 16));
#pragma unroll
                    for (int m = 0; m < S::MATRICES; ++m) {
#pragma unroll
                        for (int j = 0; j < S::ACROSS_TILES; ++j) {
                            const unsigned both[2] = {b[m][j][quarter * 2], b[m][j][quarter * 2 + 1]};
                            mma_16816<T>(sums[m][i][j], a, both);
                        }
                    }
                }
            }
        }
    }
}

/// What a lane has of a span of its weight row in each tile.
template <typename S, typename F>
struct Span {
    typename F::Codes codes[S::MATRICES][S::ACROSS_TILES];
    typename F::Scales scales[S::MATRICES][S::ACROSS_TILES];
};

/// `sums = x·Wᵀ` from weights in format F: lane `4g + t` takes row g of a tile of weights apart, rounded to T, and multiplies its columns with
/// the same ones of x.
template <typename S, typename T, typename F>
__device__ __forceinline__ void multiply_unpacked(unsigned char* shared, const Factors<T, S::MATRICES>& f, typename S::Sums& sums) {
    static_assert(S::DOWN == 1, "each weight is taken apart by one warp");
    const int g = lane_id() / 4, t = lane_id() % 4, across = warp_id() * (S::ACROSS_TILES * 8);
    const int steps = spans(f.k);
    const unsigned char* weights[S::MATRICES][S::ACROSS_TILES];
#pragma unroll
    for (int m = 0; m < S::MATRICES; ++m) {
#pragma unroll
        for (int j = 0; j < S::ACROSS_TILES; ++j) {
            const unsigned char* row[1];
            rows_of(row, f.stacks[m], f.expert, f.col + across + j * 8 + g, f.cols);
            weights[m][j] = row[0];
        }
    }
    const auto take = [&](Span<S, F>& span, int step) {
        if (step == steps) return;
#pragma unroll
        for (int m = 0; m < S::MATRICES; ++m) {
#pragma unroll
            for (int j = 0; j < S::ACROSS_TILES; ++j) {
                F::load_codes(span.codes[m][j], weights[m][j], f.k, step, t);
                F::load_scales(span.scales[m][j], weights[m][j], f.k, step);
            }
        }
    };
    const auto fetch = [&](int step) {
        if (step < steps) copy_rows<S>(shared + step % S::STAGES * S::STAGE_BYTES, f, step);
        cp_async_commit();
    };
    for (int step = 0; step < S::STAGES - 1; ++step) fetch(step);
    Span<S, F> span, next;
    take(next, 0);
    for (int step = 0; step < steps; ++step) {
        span = next;
        take(next, step + 1);
        cp_async_wait<S::STAGES - 2>();
        __syncthreads();
        fetch(step + S::STAGES - 1);
        unsigned char* rows = shared + step % S::STAGES * S::STAGE_BYTES;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            unsigned b[S::MATRICES][S::ACROSS_TILES][4];
#pragma unroll
            for (int m = 0; m < S::MATRICES; ++m) {
#pragma unroll
                for (int j = 0; j < S::ACROSS_TILES; ++j) {
                    float value[8];
                    F::values(value, span.codes[m][j], span.scales[m][j], chunk);
#pragma unroll
                    for (int p = 0; p < 4; ++p) b[m][j][p] = pack<T>(value[2 * p], value[2 * p + 1]);
                }
            }
#pragma unroll
            for (int i = 0; i < S::DOWN_TILES; ++i) {
// What this lane has of rows g and g + 8: the columns of its weights, in their order, for each of two products.
                unsigned a[2][4];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = i * 16 + r * 8 + g;
                    if constexpr (F::GROUP == CHUNK) {
                        const unsigned char* part = part_of_256(rows, row, chunk * (CHUNK / 8) + t);
                        const Vec<unsigned, 4> all = load<4>(reinterpret_cast<const unsigned*>(part));
                        a[0][r] = all[0], a[0][2 + r] = all[1];
                        a[1][r] = all[2], a[1][2 + r] = all[3];
                    } else {
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int at = chunk * CHUNK + column<F::GROUP>(half, t);
                            const unsigned char* part = part_of_256(rows, row, at / 8) + at % 8 * 2;
                            const Vec<unsigned, 2> both = load<2>(reinterpret_cast<const unsigned*>(part));
                            a[half][r] = both[0], a[half][2 + r] = both[1];
                        }
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int m = 0; m < S::MATRICES; ++m) {
#pragma unroll
                        for (int j = 0; j < S::ACROSS_TILES; ++j) {
                            const unsigned both[2] = {b[m][j][half * 2], b[m][j][half * 2 + 1]};
                            mma_16816<T>(sums[m][i][j], a[half], both);
                        }
                    }
                }
            }
        }
    }
}

template <typename S, typename F, typename T>
__device__ __forceinline__ void multiply(unsigned char* shared, const Factors<T, S::MATRICES>& f, typename S::Sums& sums) {
    if constexpr (S::COPIED) {
        multiply_copied<S>(shared, f, sums);
    } else {
        multiply_unpacked<S, T, F>(shared, f, sums);
    }
}

/// Calls `put(row, col, i, j, half)` for the pairs of neighbouring columns that this thread has: `sums[..][i][j][half ..]`.
template <typename S, typename Put>
__device__ __forceinline__ void for_pairs(const Put& put) {
    const int down = warp_id() / S::ACROSS * (S::DOWN_TILES * 16) + lane_id() / 4;
    const int across = warp_id() % S::ACROSS * (S::ACROSS_TILES * 8) + lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::DOWN_TILES; ++i) {
#pragma unroll
        for (int j = 0; j < S::ACROSS_TILES; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) put(down + i * 16 + half * 8, across + j * 8, i, j, half * 2);
        }
    }
}

/// As skinny_gate_up, gate and up in one format, for tiles of up to ROWS slots; `hidden` and `inner` are multiples of 8.
template <typename T, typename F, int ROWS>
__global__ void __launch_bounds__(128)
    grouped_gate_up(const T* x, Stack gate, Stack up, const int* order, const Tile* tiles, int top_k, int hidden, int inner, T* h) {
    using S = Shape<T, F, ROWS, 2>;
    SHARED(shared);
    __shared__ int rows[ROWS];
    const Tile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    for (int r = threadIdx.x; r < ROWS; r += 128) rows[r] = r < tile.count ? order[tile.first + r] / top_k : -1;
    __syncthreads();

    const int from = blockIdx.y * S::COLS;
    typename S::Sums sums = {};
    multiply<S, F>(shared, Factors<T, 2>{x, rows, {gate, up}, tile.expert, from, inner, hidden}, sums);
    for_pairs<S>([&](int row, int col, int i, int j, int half) {
        if (row >= tile.count || from + col >= inner) return;
        Vec<T, 2> both;
        for (int c = 0; c < 2; ++c) both[c] = from_float<T>(silu(sums[0][i][j][half + c]) * sums[1][i][j][half + c]);
        store(h + static_cast<long long>(tile.first + row) * inner + from + col, both);
    });
}

/// As skinny_down, for tiles of up to ROWS slots; `inner` and `hidden` are multiples of 8.
template <typename T, typename F, int ROWS>
__global__ void __launch_bounds__(128)
    grouped_down(const T* h, Stack down, const int* order, const Tile* tiles, int inner, int hidden, T* y) {
    using S = Shape<T, F, ROWS, 1>;
    SHARED(shared);
    __shared__ int rows[ROWS];
    const Tile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    for (int r = threadIdx.x; r < ROWS; r += 128) rows[r] = r < tile.count ? tile.first + r : -1;
    __syncthreads();

    const int from = blockIdx.y * S::COLS;
    typename S::Sums sums = {};
    multiply<S, F>(shared, Factors<T, 1>{h, rows, {down}, tile.expert, from, hidden, inner}, sums);
    for_pairs<S>([&](int row, int col, int i, int j, int half) {
        if (row >= tile.count || from + col >= hidden) return;
        Vec<T, 2> both;
        for (int c = 0; c < 2; ++c) both[c] = from_float<T>(sums[0][i][j][half + c]);
        store(y + static_cast<long long>(order[tile.first + row]) * hidden + from + col, both);
    });
}
