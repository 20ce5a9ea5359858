// What every kernel file may use, and nothing else: types of 16 bits, vectors, reductions, tensor cores and asynchronous copies.
//
// Invariant: each function has the same meaning on a device of compute capability 8.0 or higher and, with BATON_EMULATED, on the host
// (the emulator's header is included before this one). Sums are taken in f32; rounding to 16 bits is to nearest even, done once by
// whoever stores. Blocks are one-dimensional. NVRTC has no headers of the system, so this file includes none.
#pragma once

#ifdef BATON_EMULATED
/// Dynamic shared memory, 16-byte aligned.
#define SHARED(name) unsigned char* name = ::emulated::dynamic_shared()
#else
#define SHARED(name)                                                         \
    extern __shared__ __align__(16) unsigned char baton_dynamic_shared[];    \
    unsigned char* name = baton_dynamic_shared
#endif

constexpr unsigned FULL = 0xffffffffu;
constexpr int LANES = 32;

struct alignas(2) bf16 {
    unsigned short bits;
};

/// IEEE half precision.
struct alignas(2) f16 {
    unsigned short bits;
};

/// Whether two types are one.
template <typename A, typename B> constexpr bool SAME = false;
template <typename A> constexpr bool SAME<A, A> = true;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// --- numbers ---

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

#ifdef BATON_EMULATED
inline float to_float(f16 x) {
    unsigned sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // As a float, these bits have an exponent that is too small by 112; the product is exact, denormals too.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}
#else
__device__ __forceinline__ float to_float(f16 x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
    return f;
}
#endif

template <typename T> __device__ T from_float(float x);

template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

#ifdef BATON_EMULATED
template <> inline bf16 from_float<bf16>(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <> inline f16 from_float<f16>(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return {0x7fff};
    if (rest >= 0x477ff000) return {static_cast<unsigned short>(sign | 0x7c00)};
    // Below the least normal number the sum with 0.5 leaves the bits of the result in the mantissa, rounded.
    if (rest < 0x38800000) return {static_cast<unsigned short>(sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000))};
    return {static_cast<unsigned short>(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13))};
}
#else
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
}

template <> __device__ __forceinline__ f16 from_float<f16>(float x) {
    f16 rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
}
#endif

/// Orders floats as their bits do, every NaN included.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Two numbers rounded to T, the first in the low half: half a register pair of a fragment of `mma_16816`.
template <typename T> __device__ unsigned pack(float low, float high);

/// The halves of what `pack` gave.
template <typename T> __device__ __forceinline__ float low(unsigned both) {
    return to_float(T{static_cast<unsigned short>(both & 0xffff)});
}
template <typename T> __device__ __forceinline__ float high(unsigned both) {
    return to_float(T{static_cast<unsigned short>(both >> 16)});
}

#ifdef BATON_EMULATED
#define BATON_PACK(T, instruction)                                                               \
    template <> inline unsigned pack<T>(float low, float high) {                                 \
        return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;  \
    }
#else
#define BATON_PACK(T, instruction)                                                               \
    template <> __device__ __forceinline__ unsigned pack<T>(float low, float high) {             \
        unsigned both;                                                                           \
        asm(instruction " %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));                      \
        return both;                                                                             \
    }
#endif
BATON_PACK(bf16, "cvt.rn.bf16x2.f32")
BATON_PACK(f16, "cvt.rn.f16x2.f32")
#undef BATON_PACK

/// 2^x within 2^-22 of it, for softmax: one instruction. What is below the least normal number is 0.
#ifdef BATON_EMULATED
inline float quick_exp2(float x) { return exp2f(x); }
#else
__device__ __forceinline__ float quick_exp2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
#endif

// --- vectors ---

/// `x / (1 + e^-x)`.
__device__ __forceinline__ float silu(float x) { return x / (1 + expf(-x)); }

/// N elements that are loaded and stored together, in pieces of up to 16 bytes.
template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
    T data[N];
    __device__ __forceinline__ T& operator[](int i) { return data[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

/// How many elements of T 16 bytes hold.
template <typename T> constexpr int WIDE = 16 / sizeof(T);

#ifdef BATON_EMULATED
#define BATON_ALIGNED(T, N, pointer) ::emulated::aligned(pointer, alignof(Vec<T, N>))
#else
#define BATON_ALIGNED(T, N, pointer)
#endif

/// N elements at an address that is a multiple of the vector's alignment.
template <int N, typename T> __device__ __forceinline__ Vec<T, N> load(const T* from) {
    BATON_ALIGNED(T, N, from);
    return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <int N, typename T> __device__ __forceinline__ void store(T* to, const Vec<T, N>& values) {
    BATON_ALIGNED(T, N, to);
    *reinterpret_cast<Vec<T, N>*>(to) = values;
}

/// 16 bytes of what nobody writes during the kernel and nobody reads again: weights of a step with few rows. Takes no place in L1.
template <typename T> __device__ __forceinline__ Vec<T, WIDE<T>> load_once(const T* from) {
    BATON_ALIGNED(T, WIDE<T>, from);
#ifdef BATON_EMULATED
    return *reinterpret_cast<const Vec<T, WIDE<T>>*>(from);
#else
    union {
        unsigned words[4];
        Vec<T, WIDE<T>> values;
    } read;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(read.words[0]), "=r"(read.words[1]), "=r"(read.words[2]), "=r"(read.words[3])
        : "l"(from));
    return read.values;
#endif
}

/// Asks for the 32 bytes at an address, so that whoever reads them soon finds them in the second cache.
__device__ __forceinline__ void prefetch(const void* from) {
#ifndef BATON_EMULATED
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

// --- reductions: all lanes of the warp, or all threads of the block, call them and get the result ---

__device__ __forceinline__ int lane_id() { return threadIdx.x % LANES; }

__device__ __forceinline__ int warp_id() { return threadIdx.x / LANES; }

struct Sum {
    static __device__ __forceinline__ float neutral() { return 0; }
    static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};

struct Max {
    static __device__ __forceinline__ float neutral() { return -infinity(); }
    static __device__ __forceinline__ float join(float a, float b) { return fmaxf(a, b); }
};

/// Over groups of `width` neighbouring lanes, a power of two.
template <typename Op, int width = LANES> __device__ __forceinline__ float warp_reduce(float x) {
#pragma unroll
    for (int bits = width / 2; bits > 0; bits /= 2) x = Op::join(x, __shfl_xor_sync(FULL, x, bits));
    return x;
}

template <int width = LANES> __device__ __forceinline__ float warp_sum(float x) { return warp_reduce<Sum, width>(x); }

template <int width = LANES> __device__ __forceinline__ float warp_max(float x) { return warp_reduce<Max, width>(x); }

/// Blocks are whole warps. Two barriers: what threads wrote to shared memory before is seen by all behind it.
template <typename Op> __device__ __forceinline__ float block_reduce(float x) {
    __shared__ float partial[LANES];
    x = warp_reduce<Op>(x);
    __syncthreads(); // Nobody reads the partial results of the call before any longer.
    if (lane_id() == 0) partial[warp_id()] = x;
    __syncthreads();
    return warp_reduce<Op>(lane_id() < static_cast<int>(blockDim.x) / LANES ? partial[lane_id()] : Op::neutral());
}

__device__ __forceinline__ float block_sum(float x) { return block_reduce<Sum>(x); }

__device__ __forceinline__ float block_max(float x) { return block_reduce<Max>(x); }

// --- tensor cores ---

// d[16, 8] += a[16, 16] · b[16, 8]. With g = lane / 4 and p = lane % 4 * 2, a lane holds
//   a: {(g, p..p+1), (g+8, p..p+1), (g, p+8..p+9), (g+8, p+8..p+9)}, two elements to a register, the first in the low half;
//   b: {(p..p+1, g), (p+8..p+9, g)}, two rows of one column;     d: {(g, p), (g, p+1), (g+8, p), (g+8, p+1)}.
template <typename T> __device__ void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#ifdef BATON_EMULATED
template <typename T> inline float emulated_widen(unsigned short bits) { return to_float(T{bits}); }
#define BATON_MMA(T, instruction)                                                                               \
    template <> inline void mma_16816<T>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {       \
        ::emulated::mma_16816(d, a, b, emulated_widen<T>);                                                      \
    }
#else
#define BATON_MMA(T, instruction)                                                                               \
    template <>                                                                                                 \
    __device__ __forceinline__ void mma_16816<T>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
        asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                \
    }
#endif
BATON_MMA(bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
BATON_MMA(f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
#undef BATON_MMA

// Four matrices of 8 rows of 8 elements of 16 bits in shared memory: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes,
// 16-byte aligned. r[m] gets of matrix m: element (g, p) low and (g, p+1) high; transposed: (p, g) low and (p+1, g) high.
#ifdef BATON_EMULATED
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { ::emulated::ldmatrix_x4(r, row, false); }
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { ::emulated::ldmatrix_x4(r, row, true); }
#else
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#define BATON_LDMATRIX(name, instruction)                                                        \
    __device__ __forceinline__ void name(unsigned (&r)[4], const void* row) {                    \
        asm volatile(instruction " {%0, %1, %2, %3}, [%4];"                                      \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
                     : "r"(shared_address(row))                                                  \
                     : "memory");                                                                \
    }
BATON_LDMATRIX(ldmatrix_x4, "ldmatrix.sync.aligned.m8n8.x4.shared.b16")
BATON_LDMATRIX(ldmatrix_x4_trans, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16")
#undef BATON_LDMATRIX
#endif

// --- asynchronous copies from global to shared memory ---

// 16 bytes, both addresses 16-byte aligned; zeros if not `valid`, and then `global` is not read. What arrived is seen by the thread that
// copied after `cp_async_wait`, by others after a barrier behind that.
#ifdef BATON_EMULATED
inline void cp_async_16(void* shared, const void* global, bool valid) { ::emulated::cp_async_16(shared, global, valid); }
inline void cp_async_commit() { ::emulated::cp_async_commit(); }
template <int pending> inline void cp_async_wait() { ::emulated::cp_async_wait(pending); }
#else
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

/// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// All groups but the last `pending` have arrived. Copies that are in no group yet are not waited for.
template <int pending> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#endif
