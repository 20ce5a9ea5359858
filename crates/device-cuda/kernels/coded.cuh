// Codes of quantised checkpoints under scales of their groups, in the order of blocks.cuh. Their bits are kept:
//   codes       span, lane: words of the lane's 32 columns, as the low bits of blocks lie, without an offset.
//   scales      span: one of each run of RUN columns, in the checkpoint's own type.
//   zeros       span: bytes of its runs, the codes that mean zero; where groups have no other than the middle of the integers, or 0, none.
// What pads a row to whole spans has the code of zero, or a scale of zero. `pack` in src/coded.rs writes it.
//
// Invariant: an element is `(code - zero) · scale` in f32, and `code - zero` is a number that f16 and bf16 hold: products with it are
// exact, and the scale is applied to their sum over a chunk.
//
// By estimate, not measured: until it multiplies, a lane does some 2.3 instructions for a weight of e4m3, 2 for int8 in bf16 (1.3 in f16) and 1.3 for int4, with
// or without zeros; reading lasts as long as 6.5 for a byte and 3.4 for half of one (linear.cu). So decoding stays bound by reading. On 8.9 and newer
// `cvt.rn.f16x2.e4m3x2` would do the first in half of that, for f16.
#pragma once
#include "blocks.cuh"

/// Pairs of M times a power of two, exact.
template <typename M> __device__ unsigned scale_pairs(unsigned pair, unsigned factor);

#ifdef BATON_EMULATED
template <typename M> inline unsigned scale_pairs(unsigned pair, unsigned factor) {
    return pack<M>(low<M>(pair) * low<M>(factor), high<M>(pair) * high<M>(factor));
}
#else
template <> __device__ __forceinline__ unsigned scale_pairs<f16>(unsigned pair, unsigned factor) {
    unsigned product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(factor));
    return product;
}

// a · b + -0, as before 9.0 there is no other arithmetic of bf16.
template <> __device__ __forceinline__ unsigned scale_pairs<bf16>(unsigned pair, unsigned factor) {
    unsigned product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(pair), "r"(factor), "r"(0x80008000u));
    return product;
}
#endif

/// Integers from 0 on.
template <int BITS_> struct Int {
    static constexpr int BITS = BITS_;
    static constexpr int ZERO = 1 << (BITS - 1);

    /// The pair of a field less `zero`, in M.
    template <typename M> static __device__ __forceinline__ unsigned pair(const unsigned* words, int f, unsigned zero) {
        constexpr bool F16 = SAME<M, f16>;
        // As in `Packed`: a power of two and the code, less the power and the zero.
        constexpr unsigned POWER = TWICE<F16 ? 0x6400 : 0x4300>;
        if constexpr (F16 || BITS < 8) {
            return subtract_pairs<M>(masked_or(moved<BITS>(words, f, 0), TWICE<(1 << BITS) - 1>, POWER), POWER | zero << 16 | zero);
        } else {
            // A difference has 8 significant bits at most.
            return __byte_perm(__float_as_uint(number(words, f, 0, zero)), __float_as_uint(number(words, f, 1, zero)), 0x7632);
        }
    }

    /// One of them as a float.
    static __device__ __forceinline__ float number(const unsigned* words, int f, int half, unsigned zero) {
        unsigned both = moved<BITS>(words, f, 0);
        if (BITS < 8) both &= TWICE<(1 << BITS) - 1>;
        return byte_number<0>(both, 2 * half) - static_cast<float>(zero);
    }
};

/// Floats of BITS bits, EXPONENT of them of exponent, that have no infinities.
template <int BITS_, int EXPONENT> struct Float {
    static constexpr int BITS = BITS_;
    static constexpr int ZERO = 0;

    /// The pair of a field in M: bits of exponent and mantissa are put where M's end and begin, and are a number whose exponent is too
    /// small by the difference of both biases, denormals too.
    template <typename M> static __device__ __forceinline__ unsigned pair(const unsigned* words, int f, unsigned) {
        constexpr bool F16 = SAME<M, f16>;
        constexpr int OWN_EXPONENT = F16 ? 5 : 8, OWN_BIAS = F16 ? 15 : 127, OWN_MANTISSA = F16 ? 10 : 7;
        constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
        constexpr unsigned REST = ((1u << (BITS - 1)) - 1) << (16 - BITS);
        unsigned both = moved<BITS>(words, f, 16 - BITS);
        unsigned small = masked_or(both, 0x80008000u, (both & TWICE<REST>) >> (OWN_EXPONENT - EXPONENT));
        if constexpr (OWN_BIAS == BIAS) return small;
        return scale_pairs<M>(small, TWICE<(unsigned)(2 * OWN_BIAS - BIAS) << OWN_MANTISSA>);
    }

    static __device__ __forceinline__ float number(const unsigned* words, int f, int half, unsigned) {
        unsigned both = pair<f16>(words, f, 0);
        return half ? high<f16>(both) : low<f16>(both);
    }
};

/// Codes under a scale in S for each RUN columns; with ZEROS a zero, too.
template <typename Code, int RUN, typename S, bool ZEROS> struct Coded {
    static constexpr int GROUP = CHUNK;
    static constexpr bool SCALED = true;
    static constexpr bool MIN = false;
    static constexpr int BITS = Code::BITS;
    static constexpr int DEPTH = BITS > 4 ? 1 : 2;
    /// Runs of a span.
    static constexpr int RUNS = SPAN / RUN;

    /// What a lane has of a span.
    struct Codes {
        unsigned words[BITS];
    };
    /// Those of a row in a span.
    struct Scales {
        Vec<S, RUNS> scale;
        Vec<unsigned char, RUNS> zero;
    };

    static __device__ __forceinline__ long long row_bytes(int k) {
        return (static_cast<long long>(spans(k)) * (16 * BITS + RUNS * (sizeof(S) + ZEROS)) + 15) / 16 * 16;
    }

    static __device__ __forceinline__ void load_codes(Codes& codes, const unsigned char* row, int, int span, int t, bool = false) {
        load_words(codes.words, row + (span * 4 + t) * (4 * BITS));
    }

    static __device__ __forceinline__ void load_scales(Scales& scales, const unsigned char* row, int k, int span) {
        row += spans(k) * (16 * BITS);
        scales.scale = load<RUNS>(reinterpret_cast<const S*>(row) + span * RUNS);
        if constexpr (ZEROS) scales.zero = load<RUNS>(row + spans(k) * (RUNS * static_cast<int>(sizeof(S))) + span * RUNS);
    }

    static __device__ __forceinline__ float scale(const Scales& scales, int chunk) { return to_float(scales.scale[chunk * CHUNK / RUN]); }

    /// The codes of a chunk less their zero in M, exact.
    template <typename M>
    static __device__ __forceinline__ void pairs(unsigned (&pair)[4], const Codes& codes, const Scales& scales, int chunk) {
#pragma unroll
        for (int p = 0; p < 4; p++) pair[p] = Code::template pair<M>(codes.words, 4 * chunk + p, zero(scales, chunk));
    }

    /// The weights of a chunk.
    static __device__ __forceinline__ void values(float (&value)[8], const Codes& codes, const Scales& scales, int chunk) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            value[i] = scale(scales, chunk) * Code::number(codes.words, 4 * chunk + i / 2, i % 2, zero(scales, chunk));
    }

private:
    static __device__ __forceinline__ unsigned zero(const Scales& scales, int chunk) {
        if constexpr (ZEROS) return scales.zero[chunk * CHUNK / RUN];
        return Code::ZERO;
    }
};
