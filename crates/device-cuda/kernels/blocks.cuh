// How weights lie in device memory, and how four lanes take a row apart. For every kernel that reads a weight.
//
// A row `[k]` starts at a multiple of 16 bytes. Its columns are spans of 128, those chunks of 32, and four lanes share a span: lane t of
// four has 8 columns of each chunk, as four pairs (`column` says which). Two pairs are a row's part of `mma_16816`'s a, and the same of x a
// column's of its b: the order of the columns of a product is free.
//
// Floats (`Dense`) lie as they are in a checkpoint, padded with zeros to a multiple of 8. Blocks of small integers (`Packed`) keep
// their bits, in planes that are read 16 bytes at a time, each for all spans of the row:
//   low bits    span, lane: LOW words. Pair p of chunk c is field f = 4c + p: its first code at bit `f % (16 / LOW) * LOW` of word
//               `f / (16 / LOW)`, its second 16 bits higher. Codes have OFFSET added, so that none is negative.
//   high bits   span, lane: HIGH words, in the same order. A code is `low | high << LOW`.
//   scales      span: f16 of its chunks, then minima. Where blocks are nested: bytes of its groups (with 128 added), then those of minima.
//   nested      256 columns: f16 scale, then minimum: factors of the bytes.
// What pads a row to whole spans is zero, scales too. `pack` in src/blocks.rs writes it. Codes of other checkpoints are in coded.cuh.
//
// Invariant: element i of a group is `scale · code + minimum` with the scale and minimum of baton_device's `Unpacked`, in f32.
#pragma once

constexpr int SPAN = 128;
constexpr int CHUNK = 32;
constexpr int CHUNKS = SPAN / CHUNK;

__device__ __forceinline__ int spans(int k) { return (k + SPAN - 1) / SPAN; }

/// The first of four columns of a chunk that lane t has as pairs 2j and 2j + 1. All 16 columns of a j are in one group.
template <int GROUP> __device__ __forceinline__ int column(int j, int t) { return GROUP == CHUNK ? 8 * t + 4 * j : 16 * j + 4 * t; }

/// Byte i of a word as a number, less `bias`.
template <int bias> __device__ __forceinline__ float byte_number(unsigned word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540u | i)) - (8388608.0f + bias);
}

/// Differences of two pairs of M.
template <typename M> __device__ unsigned subtract_pairs(unsigned a, unsigned b);

#ifdef BATON_EMULATED
template <typename M> inline unsigned subtract_pairs(unsigned a, unsigned b) {
    return pack<M>(low<M>(a) - low<M>(b), high<M>(a) - high<M>(b));
}
#else
template <> __device__ __forceinline__ unsigned subtract_pairs<f16>(unsigned a, unsigned b) {
    unsigned difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

// Before 9.0 there is no other arithmetic of bf16 than this: a · 1 + -b.
template <> __device__ __forceinline__ unsigned subtract_pairs<bf16>(unsigned a, unsigned b) {
    unsigned difference;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
    return difference;
}
#endif

/// A pair of ones.
template <typename M> constexpr unsigned ONES = SAME<M, f16> ? 0x3c003c00u : 0x3f803f80u;

/// `(word & mask) | base` in one instruction.
__device__ __forceinline__ unsigned masked_or(unsigned word, unsigned mask, unsigned base) {
#ifdef BATON_EMULATED
    return (word & mask) | base;
#else
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(base));
    return result;
#endif
}

/// A number in both halves.
template <unsigned x> constexpr unsigned TWICE = x << 16 | x;

template <int WORDS> __device__ __forceinline__ void load_words(unsigned (&words)[WORDS], const unsigned char* from) {
    const unsigned* source = reinterpret_cast<const unsigned*>(from);
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            Vec<unsigned, 4> read = load_once(source + i);
#pragma unroll
            for (int j = 0; j < 4; j++) words[i + j] = read[j];
        }
    } else {
        constexpr int STEP = WORDS % 2 == 0 ? 2 : 1;
#pragma unroll
        for (int i = 0; i < WORDS; i += STEP) {
            Vec<unsigned, STEP> read = load<STEP>(source + i);
#pragma unroll
            for (int j = 0; j < STEP; j++) words[i + j] = read[j];
        }
    }
}

/// Floats of type W.
template <typename W> struct Dense {
    static constexpr int GROUP = CHUNK;
    static constexpr bool SCALED = false;
    static constexpr bool MIN = false;
    /// Spans of two rows that a lane loads at once.
    static constexpr int DEPTH = 1;

    /// What a lane has of a span.
    struct Codes {
        unsigned words[CHUNKS][2 * sizeof(W)];
    };
    struct Scales {};

    static __device__ __forceinline__ long long row_bytes(int k) { return static_cast<long long>((k + 7) / 8 * 8) * sizeof(W); }

    /// What lane t has of a span; `whole` says that the span does not reach beyond the row.
    static __device__ __forceinline__ void load_codes(Codes& codes, const unsigned char* row, int k, int span, int t, bool whole = false) {
        row += (span * (SPAN / 8) + t) * (8 * sizeof(W));
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            if (whole || span * SPAN + c * CHUNK + column<GROUP>(0, t) < k) {
                load_words(codes.words[c], row + c * (CHUNK * sizeof(W)));
            } else {
#pragma unroll
                for (unsigned& word : codes.words[c]) word = 0;
            }
        }
    }

    static __device__ __forceinline__ void load_scales(Scales&, const unsigned char*, int, int) {}

    /// The weights of a chunk, rounded to M.
    template <typename M> static __device__ __forceinline__ void pairs(unsigned (&pair)[4], const Codes& codes, const Scales&, int chunk) {
#pragma unroll
        for (int p = 0; p < 4; p++) {
            unsigned word = codes.words[chunk][p];
            pair[p] = SAME<M, W> ? word : pack<M>(low<W>(word), high<W>(word));
        }
    }

    /// The weights of a chunk.
    static __device__ __forceinline__ void values(float (&value)[8], const Codes& codes, const Scales&, int chunk) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if constexpr (SAME<W, float>) {
                value[i] = __uint_as_float(codes.words[chunk][i]);
            } else {
                unsigned word = codes.words[chunk][i / 2];
                value[i] = i % 2 ? high<W>(word) : low<W>(word);
            }
        }
    }
};

/// `BlockFormat::IQ4_VALUES`, with 128 added, as words.
constexpr unsigned TABLE_WORDS[4] = {0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u};

/// Two indices into the table, one in each half, as two of its values.
__device__ __forceinline__ unsigned look_up(unsigned indices) {
    unsigned selector = (indices & 7) | (indices >> 8 & 0x700);
    unsigned lower = __byte_perm(TABLE_WORDS[0], TABLE_WORDS[1], selector);
    unsigned upper = __byte_perm(TABLE_WORDS[2], TABLE_WORDS[3], selector);
    unsigned is_upper = (indices >> 3 & 0x00010001u) * 0xffu;
    return (upper & is_upper) | (lower & ~is_upper & 0x00ff00ffu);
}

/// The words of planes of B bits, moved so that field f begins at bit `to`: the second half's at bit `to` of the upper half.
template <int B> __device__ __forceinline__ unsigned moved(const unsigned* words, int f, int to) {
    constexpr int PER_WORD = 16 / B;
    int from = f % PER_WORD * B;
    return from >= to ? words[f / PER_WORD] >> (from - to) : words[f / PER_WORD] << (to - from);
}

/// Blocks of small integers under scales.
template <int LOW, int HIGH, int OFFSET, int GROUP_, bool NESTED, bool MIN_, bool TABLE = false> struct Packed {
    static constexpr int GROUP = GROUP_;
    static constexpr bool SCALED = true;
    static constexpr bool MIN = MIN_;
    static constexpr int BITS = TABLE ? 8 : LOW + HIGH;
    static constexpr int DEPTH = LOW + HIGH > 4 ? 1 : 2;
    /// Groups of a span.
    static constexpr int GROUPS = SPAN / GROUP;
    /// Bytes of the scales of a span.
    static constexpr int SCALE_BYTES = (NESTED ? GROUPS : 2 * GROUPS) * (MIN ? 2 : 1);
    static constexpr int NESTED_BYTES = NESTED ? (MIN ? 4 : 2) : 0;

    /// What a lane has of a span.
    struct Codes {
        unsigned low[LOW];
        unsigned high[HIGH ? HIGH : 1];
    };
    /// Those of a row in a span.
    struct Scales {
        unsigned words[SCALE_BYTES / 4];
        f16 factor, min_factor;
    };

    static __device__ __forceinline__ long long row_bytes(int k) {
        return (static_cast<long long>(spans(k)) * (16 * (LOW + HIGH) + SCALE_BYTES) + (k + 255) / 256 * NESTED_BYTES + 15) / 16 * 16;
    }

    static __device__ __forceinline__ void load_codes(Codes& codes, const unsigned char* row, int k, int span, int t, bool = false) {
        load_words(codes.low, row + (span * 4 + t) * (4 * LOW));
        if constexpr (HIGH > 0) load_words(codes.high, row + spans(k) * (16 * LOW) + (span * 4 + t) * (4 * HIGH));
    }

    static __device__ __forceinline__ void load_scales(Scales& scales, const unsigned char* row, int k, int span) {
        row += spans(k) * (16 * (LOW + HIGH));
        load_words(scales.words, row + span * SCALE_BYTES);
        if constexpr (NESTED) {
            row += spans(k) * SCALE_BYTES + span / 2 * NESTED_BYTES;
            scales.factor = *reinterpret_cast<const f16*>(row);
            if constexpr (MIN) scales.min_factor = *reinterpret_cast<const f16*>(row + 2);
        }
    }

    static __device__ __forceinline__ float scale(const Scales& scales, int group) { return number(scales, group, scales.factor); }

    static __device__ __forceinline__ float minimum(const Scales& scales, int group) {
        return number(scales, GROUPS + group, scales.min_factor);
    }

    /// The codes of a chunk in M, exact.
    template <typename M> static __device__ __forceinline__ void pairs(unsigned (&pair)[4], const Codes& codes, const Scales&, int chunk) {
        // Where a code is the low end of a mantissa, M's number is a power of two and the code; what is too much is taken off.
        constexpr bool F16 = SAME<M, f16>;
        constexpr unsigned POWER = TWICE<F16 ? 0x6400 : 0x4300>;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            int f = 4 * chunk + p;
            if constexpr (F16 || BITS < 8) {
                unsigned code = TABLE ? code_pair<0>(codes, f) | POWER : code_pair<POWER>(codes, f);
                pair[p] = subtract_pairs<M>(code, POWER | TWICE<OFFSET>);
            } else {
                // As floats they have 8 significant bits at most, so that their upper halves are all of them.
                pair[p] = __byte_perm(__float_as_uint(code_number(codes, f, 0)), __float_as_uint(code_number(codes, f, 1)), 0x7632);
            }
        }
    }

    /// The weights of a chunk.
    static __device__ __forceinline__ void values(float (&value)[8], const Codes& codes, const Scales& scales, int chunk) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int group = GROUP == CHUNK ? chunk : 2 * chunk + i / 4;
            float product = scale(scales, group) * code_number(codes, 4 * chunk + i / 2, i % 2);
            value[i] = MIN ? product + minimum(scales, group) : product;
        }
    }

private:
    /// The codes of a pair, one in each half, and the bits of `base`; of a table its values.
    template <unsigned base> static __device__ __forceinline__ unsigned code_pair(const Codes& codes, int f) {
        unsigned both = masked_or(moved<LOW>(codes.low, f, 0), TWICE<(1 << LOW) - 1>, base);
        if constexpr (HIGH > 0) both = masked_or(moved<HIGH>(codes.high, f, LOW), TWICE<((1 << HIGH) - 1) << LOW>, both);
        return TABLE ? look_up(both) : both;
    }

    /// A code of a pair.
    static __device__ __forceinline__ float code_number(const Codes& codes, int f, int half) {
        if constexpr (LOW == 8) return byte_number<OFFSET>(codes.low[f / 2], f % 2 + 2 * half);
        return byte_number<OFFSET>(code_pair<0>(codes, f), 2 * half);
    }

    static __device__ __forceinline__ float number(const Scales& scales, int i, f16 factor) {
        if constexpr (NESTED) {
            return to_float(factor) * byte_number<128>(scales.words[i / 4], i % 4);
        } else {
            unsigned both = scales.words[i / 2];
            return i % 2 ? high<f16>(both) : low<f16>(both);
        }
    }
};

using Q4_0 = Packed<4, 0, 8, 32, false, false>;
using Q4_1 = Packed<4, 0, 0, 32, false, true>;
using Q5_0 = Packed<4, 1, 16, 32, false, false>;
using Q5_1 = Packed<4, 1, 0, 32, false, true>;
using Q8_0 = Packed<8, 0, 128, 32, false, false>;
using Q2_K = Packed<2, 0, 0, 16, true, true>;
using Q3_K = Packed<2, 1, 4, 16, true, false>;
using Q4_K = Packed<4, 0, 0, 32, true, true>;
using Q5_K = Packed<4, 1, 0, 32, true, true>;
using Q6_K = Packed<4, 2, 32, 16, true, false>;
using IQ4_NL = Packed<4, 0, 128, 32, false, false, true>;
using IQ4_XS = Packed<4, 0, 128, 32, true, false, true>;
