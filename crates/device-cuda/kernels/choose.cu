// The token of each row of logits: the first of the largest, or one that is drawn behind temperature, top_k, top_p and min_p.
//
// One block has a row. It reads it once for the largest, twice more to draw, and three times more for each of top_k and top_p: the first time from memory, then
// out of the second cache, at what one multiprocessor takes from there, which for 150,000 logits in 16 bits is some 4 us (estimated, as all here, from the
// hardware's data sheets). With the atomics of both cuts a row is expected to take some 100 us, a greedy one 10 us; rows of different blocks run side by side.
//
// Invariant: the token does not depend on the order of threads and of atomics, nor on other rows. A weight is an integer, 2^40 for the most likely token, so sums are
// exact in any order. A cut is a key, an integer that is ordered as the logits are, and where it cuts through equal ones how many of these stay, by ascending id.
#include "baton.cuh"

/// A mass of probability: 2^40 is the weight of the most likely token.
using Mass = unsigned long long;

/// How a row's token is drawn. Shares of one are in units of 2^-64.
struct Draw {
    unsigned long long uniform;
    /// ~0 for all.
    unsigned long long top_p;
    /// How far below the largest logit min_p ends: temperature · ln(min_p).
    double reach;
    /// log2(e) / temperature, and what rounding took from it.
    float scale, scale_rest;
    /// 0 for all.
    int top_k;
    /// Whether it is the first of the largest.
    int largest;
};

/// Logits that a thread takes at once.
constexpr int STEP = 8;
/// A round of a search tells a key's next DIGIT bits.
constexpr int DIGIT = 11, BINS = 1 << DIGIT;
constexpr int WARPS = 32;

// ------------------------------------------------------------------------------------------------------------------- numbers

/// The key of a logit. Both zeros have one.
__device__ __forceinline__ unsigned key_of(float x) { return ordered(x + 0.0f); }

/// The logit of a key.
__device__ __forceinline__ float logit_of(unsigned key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/// The least key whose logit is not below x.
__device__ __forceinline__ unsigned key_from(double x) {
    float rounded = static_cast<float>(x);
    return key_of(rounded) + (rounded < x ? 1 : 0);
}

/// `2^40 · e^((x - largest) / temperature)` to the nearest integer, within 2^-22 of it: with the same operations on every device, so with the same bits.
__device__ __forceinline__ Mass weight_of(float x, float largest, const Draw& draw) {
    float below = x - largest;
    float power = __fmul_rn(below, draw.scale);
    if (!(power > -42)) return 0;
    // What the roundings of difference and product took.
    float part = below - x;
    float rest = (x - (below - part)) - (largest + part);
    rest = fmaf(rest, draw.scale, fmaf(below, draw.scale_rest, fmaf(below, draw.scale, -power)));
    float whole = rintf(power), f = (power - whole) + rest;
    // 2^f by its series.
    float p = 1.5252734e-5f;
    p = fmaf(p, f, 1.5403530e-4f);
    p = fmaf(p, f, 1.3333558e-3f);
    p = fmaf(p, f, 9.6181291e-3f);
    p = fmaf(p, f, 5.5504109e-2f);
    p = fmaf(p, f, 2.4022651e-1f);
    p = fmaf(p, f, 6.9314718e-1f);
    p = fmaf(p, f, 1.0f);
    Mass mantissa = static_cast<unsigned>(p * 0x1p24f);
    int shift = 16 + static_cast<int>(whole);
    return shift >= 0 ? mantissa << shift : (mantissa + (1ull << (-shift - 1))) >> -shift;
}

/// `share · mass`, rounded down.
__device__ __forceinline__ Mass share_of(unsigned long long share, Mass mass) { return __umul64hi(share, mass); }

/// The sum over this lane and those below it.
template <typename T> __device__ __forceinline__ T warp_scan(T x) {
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) {
        T below = __shfl_up_sync(FULL, x, lanes);
        x += lane_id() >= lanes ? below : T(0);
    }
    return x;
}

/// The first lane whose `reached` holds; one does.
__device__ __forceinline__ int first_lane(bool reached) { return __ffs(__ballot_sync(FULL, reached)) - 1; }

// ------------------------------------------------------------------------------------------------------------------- rows

/// Logits i .. i + STEP, of which the first is one of the row's; those beyond its end are -inf.
template <typename X> __device__ __forceinline__ void read(float (&value)[STEP], const X* x, int i, int cols) {
    if (cols % STEP == 0) {
        Vec<X, STEP> read = load<STEP>(x + i);
#pragma unroll
        for (int j = 0; j < STEP; j++) value[j] = to_float(read[j]);
    } else {
#pragma unroll
        for (int j = 0; j < STEP; j++) value[j] = i + j < cols ? to_float(x[i + j]) : -infinity();
    }
}

/// Calls `meet(logit, id)` for all logits of the row, by all threads of the block.
template <typename X, typename F> __device__ __forceinline__ void each_logit(const X* x, int cols, F meet) {
    for (int i = threadIdx.x * STEP; i < cols; i += blockDim.x * STEP) {
        float value[STEP];
        read(value, x, i, cols);
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            if (i + j < cols) meet(value[j], i + j);
        }
    }
}

/// The largest logit and its first id, -1 if not all are finite.
template <typename X> __device__ __forceinline__ float largest_of(const X* x, int cols, int& id) {
    __shared__ int left;
    float largest = -infinity();
    int at = cols;
    bool finite = true;
    // In ascending order, so that a thread keeps the first of its equals.
    each_logit(x, cols, [&](float value, int i) {
        finite = finite && fabsf(value) < infinity();
        bool larger = value > largest;
        largest = larger ? value : largest;
        at = larger ? i : at;
    });
    if (threadIdx.x == 0) left = 0;
    float most = block_max(largest);
    bool sound = block_max(finite ? 0 : 1) == 0;
    // The first has most columns from it on.
    if (largest == most) atomicMax(&left, cols - at);
    __syncthreads();
    id = sound ? cols - left : -1;
    return most;
}

// ------------------------------------------------------------------------------------------------------------------- cuts

/// Sums by bin, in shared memory, which adds 32 bits at once: whoever makes the low half of a sum overflow carries.
struct Bins {
    unsigned low[BINS], high[BINS];

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) low[i] = high[i] = 0;
    }
    __device__ __forceinline__ void add(int bin, Mass x) {
        const unsigned own = static_cast<unsigned>(x), before = atomicAdd(&low[bin], own);
        const unsigned carried = static_cast<unsigned>(x >> 32) + (before + own < before);
        if (carried > 0) atomicAdd(&high[bin], carried);
    }
    __device__ __forceinline__ Mass sum(int bin) const { return static_cast<Mass>(high[bin]) << 32 | low[bin]; }
};

/// A key, and the sum over those above it.
struct Cut {
    unsigned key;
    Mass above;
};

/// The highest bin at which the sum from the top on, `above` included, reaches the goal; `above` becomes the sum over the bins above it. All warps of the block get it.
__device__ __forceinline__ int bin_at(const Bins& bins, Mass& above, Mass goal) {
    constexpr int GROUPS = BINS / LANES;
    __shared__ Mass groups[GROUPS];
    for (int g = warp_id(); g < GROUPS; g += blockDim.x / LANES) {
        Mass sum = warp_scan(bins.sum(g * LANES + lane_id()));
        if (lane_id() == LANES - 1) groups[GROUPS - 1 - g] = sum;
    }
    __syncthreads();
    static_assert(GROUPS == 2 * LANES, "two groups for each lane");
    Mass first = groups[2 * lane_id()], second = groups[2 * lane_id() + 1];
    Mass sum = above + warp_scan(first + second);
    int lane = first_lane(sum >= goal);
    bool in_first = sum - second >= goal;
    Mass before = sum - second - (in_first ? first : 0);
    int group = GROUPS - 1 - (2 * lane + (__shfl_sync(FULL, in_first ? 1 : 0, lane) ? 0 : 1));
    before = __shfl_sync(FULL, before, lane);
    Mass own = bins.sum(group * LANES + LANES - 1 - lane_id());
    sum = before + warp_scan(own);
    lane = first_lane(sum >= goal);
    above = __shfl_sync(FULL, sum - own, lane);
    return group * LANES + LANES - 1 - lane;
}

/// The highest key at which the sum of `amount(logit)` over keys from it on reaches `goal(sum over all)`, of keys from `least` on.
template <typename X, typename Amount, typename Goal>
__device__ __forceinline__ Cut cut(const X* x, int cols, unsigned least, Bins& bins, Amount amount, Goal goal) {
    Cut cut = {0, 0};
    Mass wanted = 0;
    // What is known of the key are its bits above `shift`.
    for (int shift = 32 - DIGIT, known = 0; known < 32;) {
        bins.clear();
        __syncthreads();
        const int width = min(DIGIT, 32 - known);
        each_logit(x, cols, [&](float value, int) {
            unsigned key = key_of(value);
            if (key < least || (known > 0 && (key ^ cut.key) >> (32 - known) != 0)) return;
            Mass own = amount(value);
            if (own > 0) bins.add(key >> shift & ((1u << width) - 1), own);
        });
        __syncthreads();
        if (known == 0) {
            Mass sum = 0;
            for (int i = lane_id(); i < BINS; i += LANES) sum += bins.sum(i);
            wanted = goal(__shfl_sync(FULL, warp_scan(sum), LANES - 1));
        }
        cut.key |= static_cast<unsigned>(bin_at(bins, cut.above, wanted)) << shift;
        known += width;
        shift = max(0, shift - DIGIT);
        __syncthreads(); // The bins are read.
    }
    return cut;
}

/// The tokens that can be drawn: those above the key, and of those with it the first `equals`.
struct Kept {
    unsigned key;
    Mass equals;
};

/// What top_k, top_p and min_p leave; at least one.
template <typename X>
__device__ __forceinline__ Kept kept_of(const X* x, int cols, float largest, const Draw& draw, Bins& bins) {
    constexpr Mass ALL = ~0ull;
    Kept kept = {key_of(-infinity()) + 1, ALL};
    if (draw.top_k > 0 && draw.top_k < cols) {
        Mass count = draw.top_k;
        kept.key = cut(x, cols, kept.key, bins, [](float) { return Mass(1); }, [=](Mass) { return count; }).key;
    }
    if (draw.top_p != ~0ull) {
        Mass wanted = 0;
        auto goal = [&](Mass all) {
            // Rounded up, and at least one token's.
            wanted = max(share_of(draw.top_p, all) + (draw.top_p * all != 0 ? 1 : 0), 1ull);
            return wanted;
        };
        Cut nucleus = cut(x, cols, kept.key, bins, [&](float value) { return weight_of(value, largest, draw); }, goal);
        Mass one = weight_of(logit_of(nucleus.key), largest, draw);
        kept = {nucleus.key, (wanted - nucleus.above + one - 1) / one};
    }
    unsigned reached = key_from(largest + draw.reach);
    if (reached > kept.key) kept = {reached, ALL};
    if (kept.key > key_of(largest)) kept = {key_of(largest), 1};
    return kept;
}

// ------------------------------------------------------------------------------------------------------------------- the draw

/// Writes the first id at which the cumulative mass of what is kept exceeds the random number's share of the whole.
///
/// Each warp sums up a stretch of the row; the one in whose stretch the id lies goes through it again.
template <typename X>
__device__ __forceinline__ void draw_from(const X* x, int cols, float largest, const Draw& draw, Kept kept, int* out) {
    __shared__ Mass above[WARPS], equals[WARPS];
    const int warps = blockDim.x / LANES, steps = (cols + STEP - 1) / STEP;
    const int stretch = (steps + warps - 1) / warps * STEP, start = warp_id() * stretch, end = min(cols, start + stretch);
    const Mass one = weight_of(logit_of(kept.key), largest, draw);
    float value[STEP];
    Mass mass = 0, count = 0;
    for (int i = start + lane_id() * STEP; i < end; i += LANES * STEP) {
        read(value, x, i, cols);
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            unsigned key = key_of(value[j]);
            if (key > kept.key) mass += weight_of(value[j], largest, draw);
            count += key == kept.key;
        }
    }
    mass = warp_scan(mass), count = warp_scan(count);
    if (lane_id() == LANES - 1) above[warp_id()] = mass, equals[warp_id()] = count;
    __syncthreads();

    // Each lane has a warp's stretch.
    mass = lane_id() < warps ? above[lane_id()] : 0, count = lane_id() < warps ? equals[lane_id()] : 0;
    Mass equals_before = warp_scan(count) - count;
    mass += min(count, kept.equals - min(equals_before, kept.equals)) * one;
    Mass sum = warp_scan(mass);
    const Mass goal = share_of(draw.uniform, __shfl_sync(FULL, sum, LANES - 1));
    const int drawn = first_lane(sum > goal);
    if (warp_id() != drawn) return;

    Mass before = __shfl_sync(FULL, sum - mass, drawn);
    equals_before = __shfl_sync(FULL, equals_before, drawn);
    // All lanes stay together until one has met the goal.
    for (int i = start; i < end; i += LANES * STEP) {
        const int own = i + lane_id() * STEP;
        if (own < end) {
            read(value, x, own, cols);
        } else {
#pragma unroll
            for (int j = 0; j < STEP; j++) value[j] = -infinity();
        }
        count = 0;
#pragma unroll
        for (int j = 0; j < STEP; j++) count += key_of(value[j]) == kept.key;
        const Mass counted = warp_scan(count);
        Mass left = kept.equals - min(equals_before + counted - count, kept.equals);
        Mass weight[STEP];
        mass = 0;
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            unsigned key = key_of(value[j]);
            bool equal = key == kept.key && left > 0;
            left -= equal;
            weight[j] = equal ? one : key > kept.key ? weight_of(value[j], largest, draw) : 0;
            mass += weight[j];
        }
        sum = before + warp_scan(mass);
        if (__any_sync(FULL, sum > goal)) {
            if (lane_id() != first_lane(sum > goal)) return;
            sum -= mass;
#pragma unroll
            for (int j = 0; j < STEP; j++) {
                sum += weight[j];
                if (sum > goal) {
                    *out = own + j;
                    return;
                }
            }
        }
        before = __shfl_sync(FULL, sum, LANES - 1);
        equals_before += __shfl_sync(FULL, counted, LANES - 1);
    }
}

/// Chooses a token of each row of logits `[rows, cols]`; -1 of a row that is not finite throughout.
///
/// Grid: rows. Block: any number of warps.
template <typename X>
__global__ void __launch_bounds__(1024) choose(const X* logits, const Draw* draws, int* out, int cols) {
    __shared__ Bins bins;
    const X* x = logits + static_cast<long long>(blockIdx.x) * cols;
    const Draw draw = draws[blockIdx.x];
    int id;
    float largest = largest_of(x, cols, id);
    if (id < 0 || draw.largest) {
        if (threadIdx.x == 0) out[blockIdx.x] = id;
        return;
    }
    draw_from(x, cols, largest, draw, kept_of(x, cols, largest, draw, bins), out + blockIdx.x);
}
