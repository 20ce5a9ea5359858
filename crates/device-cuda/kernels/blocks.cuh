// How weights lie in device memory, and how four lanes take a row apart. For every kernel that reads a weight.
//
// A row `[k]` starts at a multiple of 16 bytes. Its columns are spans of 128, those chunks of 32, and four lanes share a span: lane t of
// four has 8 columns of each chunk, as four pairs (`column` says which). A pair is a register half of `mma_16816`'s b, and of its a, if the
// other factor is taken at the same columns: the order of the columns of a product is free.
//
// Floats (`Dense`) lie as they are in a checkpoint, padded with zeros to a multiple of 8. Blocks of small integers (`Packed`) keep
// their bits, in planes that are read 16 bytes at a time, each for all spans of the row:
//   low bits    span, lane: LOW words. Pair p of chunk c is field f = 4c + p: its first code at bit `f % (16 / LOW) * LOW` of word
//               `f / (16 / LOW)`, its second 16 bits higher. Codes have OFFSET added, so that none is negative.
//   high bits   span, lane: HIGH words, in the same order. A code is `low | high << LOW`.
//   scales      span: f16 of its chunks, then minima. Where blocks are nested: bytes of its groups (with 128 added), then those of minima.
//   nested      256 columns: f16 scale, then minimum: factors of the bytes.
// What pads a row to whole spans is zero, scales too. `pack` in src/blocks.rs writes it.
//
// Invariant: element i of a group is `scale · code + minimum` with the scale and minimum of baton_device's `Unpacked`, in f32.
#pragma once

constexpr int SPAN = 128;
constexpr int CHUNK = 32;
constexpr int CHUNKS = SPAN / CHUNK;

__device__ __forceinline__ int spans(int k) { return (k + SPAN - 1) / SPAN; }

/// The first of four columns of a chunk that lane t has as pairs 2j and 2j + 1. All 16 columns of a j are in one group.
template <int GROUP> __device__ __forceinline__ int column(int j, int t) { return GROUP == CHUNK ? 8 * t + 4 * j : 16 * j + 4 * t; }

template <typename A, typename B> constexpr bool SAME = false;
template <typename A> constexpr bool SAME<A, A> = true;

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

/// A number that M holds, twice.
template <typename M> constexpr unsigned TWICE_ONE = 0;
template <> constexpr unsigned TWICE_ONE<f16> = 0x3c003c00u;
template <> constexpr unsigned TWICE_ONE<bf16> = 0x3f803f80u;

/// Two codes, one in each half of `codes`, as a pair of M: exact.
template <typename M, int BITS, int OFFSET> __device__ __forceinline__ unsigned exact_pair(unsigned codes) {
    if constexpr (SAME<M, f16>) {
        // 1024 + code, and the same for the offset.
        return subtract_pairs<f16>(codes | 0x64006400u, 0x64006400u | OFFSET << 16 | OFFSET);
    } else if constexpr (BITS < 8) {
        // 128 + code: a mantissa of 7 bits.
        return subtract_pairs<bf16>(codes | 0x43004300u, 0x43004300u | OFFSET << 16 | OFFSET);
    } else {
        // As floats they have 8 significant bits at most, so that their upper halves are all of them.
        float first = byte_number<OFFSET>(codes, 0), second = byte_number<OFFSET>(codes, 2);
        return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
    }
}

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

    /// What a lane has of a span.
    struct Codes {
        unsigned words[CHUNKS][2 * sizeof(W)];
    };
    struct Scales {};

    static __device__ __forceinline__ long long row_bytes(int k) { return static_cast<long long>((k + 7) / 8 * 8) * sizeof(W); }

    static __device__ __forceinline__ void load_codes(Codes& codes, const unsigned char* row, int k, int span, int t) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int first = span * SPAN + c * CHUNK + column<GROUP>(0, t);
            if (first < k) {
                load_words(codes.words[c], row + first * static_cast<long long>(sizeof(W)));
            } else {
#pragma unroll
                for (unsigned& word : codes.words[c]) word = 0;
            }
        }
    }

    static __device__ __forceinline__ void load_scales(Scales&, const unsigned char*, int, int) {}

    /// The weights of a chunk, rounded to M.
    template <typename M> static __device__ __forceinline__ void pairs(unsigned (&pair)[4], const Codes& codes, int chunk) {
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

/// Blocks of small integers under scales.
template <int LOW, int HIGH, int OFFSET, int GROUP_, bool NESTED, bool MIN_, bool TABLE = false> struct Packed {
    static constexpr int GROUP = GROUP_;
    static constexpr bool SCALED = true;
    static constexpr bool MIN = MIN_;
    static constexpr int BITS = TABLE ? 8 : LOW + HIGH;
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

    static __device__ __forceinline__ void load_codes(Codes& codes, const unsigned char* row, int k, int span, int t) {
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
    template <typename M> static __device__ __forceinline__ void pairs(unsigned (&pair)[4], const Codes& codes, int chunk) {
#pragma unroll
        for (int p = 0; p < 4; p++) pair[p] = exact_pair<M, BITS, OFFSET>(code_pair(codes, 4 * chunk + p));
    }

    /// The weights of a chunk.
    static __device__ __forceinline__ void values(float (&value)[8], const Codes& codes, const Scales& scales, int chunk) {
#pragma unroll
        for (int p = 0; p < 4; p++) {
            int group = GROUP == CHUNK ? chunk : 2 * chunk + p / 2;
            unsigned both = code_pair(codes, 4 * chunk + p);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float product = scale(scales, group) * byte_number<OFFSET>(both, 2 * i);
                value[2 * p + i] = MIN ? product + minimum(scales, group) : product;
            }
        }
    }

private:
    template <int B> static __device__ __forceinline__ unsigned field(const unsigned* words, int f) {
        constexpr int PER_WORD = 16 / B;
        constexpr unsigned MASK = (1u << B) - 1;
        return words[f / PER_WORD] >> f % PER_WORD * B & (MASK | MASK << 16);
    }

    static __device__ __forceinline__ unsigned code_pair(const Codes& codes, int f) {
        unsigned both = field<LOW>(codes.low, f);
        if constexpr (HIGH > 0) both |= field<HIGH>(codes.high, f) << LOW;
        return TABLE ? look_up(both) : both;
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
