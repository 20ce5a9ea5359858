// Operations on rows and elements: norms, sums, activations, gathering.
//
// All are expected to be bound (not measured) by bandwidth where rows are many and by the time of a launch where they are few: reads and writes are of 8 elements at
// once wherever addresses allow, arithmetic is f32, and what is stored is rounded once.
// Types: X of what is read, Y of what is written. Tensors are row-major; element counts may be odd.
#include "activation.cuh"
#include "baton.cuh"

constexpr int STEP = 8;

/// Whether rows of `cols` elements all begin where STEP elements can be read at once.
__device__ __forceinline__ bool in_steps(int cols) { return cols % STEP == 0; }

/// Calls `f(index)` for the elements of a flat tensor that this thread has: `wide(i)` for STEP elements from i on, `one(i)` for each of
/// the last few. Grid and block: threads take STEP elements each.
template <typename Wide, typename One> __device__ __forceinline__ void each_element(long long count, Wide wide, One one) {
    long long start = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * STEP;
    if (start + STEP <= count) {
        wide(start);
    } else {
        for (long long i = start; i < count; i++) one(i);
    }
}

/// `f` of single numbers, over vectors of them.
template <typename Y, typename F> __device__ __forceinline__ Vec<Y, STEP> over_step(F f) {
    Vec<Y, STEP> result;
#pragma unroll
    for (int i = 0; i < STEP; i++) result[i] = from_float<Y>(f(i));
    return result;
}

/// `out = x`, rounded to Y.
template <typename X, typename Y> __global__ void __launch_bounds__(256) convert(const X* x, Y* out, long long count) {
    each_element(
        count,
        [&](long long i) {
            Vec<X, STEP> a = load<STEP>(x + i);
            store(out + i, over_step<Y>([&](int j) { return to_float(a[j]); }));
        },
        [&](long long i) { out[i] = from_float<Y>(to_float(x[i])); });
}

/// `x *= factor`.
template <typename X> __global__ void __launch_bounds__(256) scale(X* x, float factor, long long count) {
    each_element(
        count,
        [&](long long i) {
            Vec<X, STEP> a = load<STEP>(x + i);
            store(x + i, over_step<X>([&](int j) { return to_float(a[j]) * factor; }));
        },
        [&](long long i) { x[i] = from_float<X>(to_float(x[i]) * factor); });
}

/// `x = cap * tanh(x / cap)`.
template <typename X> __global__ void __launch_bounds__(256) softcap(X* x, float cap, long long count) {
    auto capped = [=](X a) { return cap * tanhf(to_float(a) / cap); };
    each_element(
        count,
        [&](long long i) {
            Vec<X, STEP> a = load<STEP>(x + i);
            store(x + i, over_step<X>([&](int j) { return capped(a[j]); }));
        },
        [&](long long i) { x[i] = from_float<X>(capped(x[i])); });
}

/// `y += x`.
template <typename X, typename Y> __global__ void __launch_bounds__(256) add(const X* x, Y* y, long long count) {
    each_element(
        count,
        [&](long long i) {
            Vec<X, STEP> a = load<STEP>(x + i);
            Vec<Y, STEP> b = load<STEP>(y + i);
            store(y + i, over_step<Y>([&](int j) { return to_float(b[j]) + to_float(a[j]); }));
        },
        [&](long long i) { y[i] = from_float<Y>(to_float(y[i]) + to_float(x[i])); });
}

/// `out = activation(gate) * up`.
template <typename G, typename U, typename Y>
__global__ void __launch_bounds__(256) gated_activation(int activation, const G* gate, const U* up, Y* out, long long count) {
    each_element(
        count,
        [&](long long i) {
            Vec<G, STEP> a = load<STEP>(gate + i);
            Vec<U, STEP> b = load<STEP>(up + i);
            store(out + i, over_step<Y>([&](int j) { return activated(activation, to_float(a[j])) * to_float(b[j]); }));
        },
        [&](long long i) { out[i] = from_float<Y>(activated(activation, to_float(gate[i])) * to_float(up[i])); });
}

/// Of one run `[width]`: `sum` of f(i) over its elements, by the warp or the block that has it.
struct Team {
    int rank, size;
    bool is_warp;
    /// The run that it has.
    long long run;

    /// A block has one run, or each of its warps.
    __device__ __forceinline__ explicit Team(bool warps) : is_warp(warps) {
        rank = warps ? lane_id() : threadIdx.x;
        size = warps ? LANES : blockDim.x;
        run = warps ? static_cast<long long>(blockIdx.x) * (blockDim.x / LANES) + warp_id() : blockIdx.x;
    }

    __device__ __forceinline__ float sum(float x) const { return is_warp ? warp_sum(x) : block_sum(x); }
};

/// The last half of a norm: `out = x * inverse * weight`. x and out may be the same.
template <typename X, typename Y>
__device__ __forceinline__ void normed(const Team& team, const X* x, const float* weight, float inverse, Y* out, int width) {
    if (in_steps(width)) {
        for (int i = team.rank * STEP; i < width; i += team.size * STEP) {
            Vec<X, STEP> a = load<STEP>(x + i);
            Vec<float, STEP> w = load<STEP>(weight + i);
            store(out + i, over_step<Y>([&](int j) { return to_float(a[j]) * inverse * w[j]; }));
        }
    } else {
        for (int i = team.rank; i < width; i += team.size) out[i] = from_float<Y>(to_float(x[i]) * inverse * weight[i]);
    }
}

/// `out = x / sqrt(mean(x²) + eps) * weight` of each run `[width]` of x. x and out may be the same.
///
/// Grid: runs, or blocks of as many as a block has warps. The second pass finds x in the first cache. Weights are in none when a layer
/// begins: the first run asks for them before its sum, so that no run waits for memory behind its own.
template <typename X, typename Y>
__global__ void __launch_bounds__(512)
    rms_norm(const X* x, const float* weight, float eps, Y* out, long long runs, int width, int warps) {
    Team team(warps);
    if (team.run >= runs) return;
    x += team.run * width;
    float squares = 0;
    if (in_steps(width)) {
        for (int i = team.rank * STEP; i < width; i += team.size * STEP) {
            if (team.run == 0) prefetch(weight + i);
            Vec<X, STEP> a = load<STEP>(x + i);
#pragma unroll
            for (int j = 0; j < STEP; j++) squares = fmaf(to_float(a[j]), to_float(a[j]), squares);
        }
    } else {
        for (int i = team.rank; i < width; i += team.size) squares = fmaf(to_float(x[i]), to_float(x[i]), squares);
    }
    float inverse = 1 / sqrtf(team.sum(squares) / width + eps);
    normed(team, x, weight, inverse, out + team.run * width, width);
}

/// `residual += x; out = rms_norm(residual)`, as it is rounded.
///
/// Grid as above.
template <typename X, typename R, typename Y>
__global__ void __launch_bounds__(512)
    add_rms_norm(const X* x, R* residual, const float* weight, float eps, Y* out, long long runs, int width, int warps) {
    Team team(warps);
    if (team.run >= runs) return;
    x += team.run * width;
    residual += team.run * width;
    float squares = 0;
    if (in_steps(width)) {
        for (int i = team.rank * STEP; i < width; i += team.size * STEP) {
            if (team.run == 0) prefetch(weight + i);
            Vec<X, STEP> a = load<STEP>(x + i);
            Vec<R, STEP> r = load<STEP>(residual + i);
            r = over_step<R>([&](int j) { return to_float(r[j]) + to_float(a[j]); });
            store(residual + i, r);
#pragma unroll
            for (int j = 0; j < STEP; j++) squares = fmaf(to_float(r[j]), to_float(r[j]), squares);
        }
    } else {
        for (int i = team.rank; i < width; i += team.size) {
            residual[i] = from_float<R>(to_float(residual[i]) + to_float(x[i]));
            squares = fmaf(to_float(residual[i]), to_float(residual[i]), squares);
        }
    }
    // Each thread reads again what it wrote itself.
    float inverse = 1 / sqrtf(team.sum(squares) / width + eps);
    normed(team, residual, weight, inverse, out + team.run * width, width);
}

/// `out[i] = x[rows[i]]`.
///
/// Grid: rows of out, parts of a row. Block: threads take STEP columns each.
template <typename X> __global__ void __launch_bounds__(256) gather_rows(const X* x, const unsigned* rows, X* out, int cols) {
    x += static_cast<long long>(rows[blockIdx.x]) * cols;
    out += static_cast<long long>(blockIdx.x) * cols;
    int start = (blockIdx.y * blockDim.x + threadIdx.x) * STEP;
    if (in_steps(cols)) {
        if (start < cols) store(out + start, load<STEP>(x + start));
    } else {
        for (int i = start; i < min(start + STEP, cols); i++) out[i] = x[i];
    }
}

/// `out[rows[i]] += x[i]`; rows are distinct.
///
/// Grid and block as above, by rows of x.
template <typename X, typename Y> __global__ void __launch_bounds__(256) add_rows(const X* x, const unsigned* rows, Y* out, int cols) {
    x += static_cast<long long>(blockIdx.x) * cols;
    out += static_cast<long long>(rows[blockIdx.x]) * cols;
    int start = (blockIdx.y * blockDim.x + threadIdx.x) * STEP;
    if (in_steps(cols)) {
        if (start >= cols) return;
        Vec<X, STEP> a = load<STEP>(x + start);
        Vec<Y, STEP> b = load<STEP>(out + start);
        store(out + start, over_step<Y>([&](int j) { return to_float(b[j]) + to_float(a[j]); }));
    } else {
        for (int i = start; i < min(start + STEP, cols); i++) out[i] = from_float<Y>(to_float(out[i]) + to_float(x[i]));
    }
}
