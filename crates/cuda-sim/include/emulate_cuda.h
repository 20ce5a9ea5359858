// CUDA's names for what is built in: vectors, indices, barriers, warp collectives, atomics, arithmetic. A part of emulate.h.
#pragma once

#define EMULATED_VECTOR(scalar, name, align2, align4)                                                     \
    struct alignas(align2) name##2 { scalar x, y; };                                                      \
    struct alignas(align4) name##4 { scalar x, y, z, w; };                                                \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                  \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float, 8, 16)
EMULATED_VECTOR(int, int, 8, 16)
EMULATED_VECTOR(unsigned, uint, 8, 16)
EMULATED_VECTOR(signed char, char, 2, 4)
EMULATED_VECTOR(unsigned char, uchar, 2, 4)
#undef EMULATED_VECTOR

#define threadIdx (::emulated::lane().thread)
#define blockIdx (::emulated::worker->block)
#define blockDim (::emulated::worker->block_dim)
#define gridDim (::emulated::worker->grid_dim)
constexpr int warpSize = 32;

inline void __syncthreads() {
    using namespace emulated;
    if (++worker->waiting < worker->live) return pause(State::AtBlock);
    release_block();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulated::full(mask);
    emulated::meet(emulated::Meeting::SyncWarp, [](emulated::Warp&) {});
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulated::fail("__trap"); }

template <typename T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned own = emulated::lane().index, w = width;
    return emulated::pick<T>(emulated::exchange(mask, value), (own & ~(w - 1)) | (source & (w - 1)));
}
template <typename T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    unsigned own = emulated::lane().index, from = own ^ bits, w = width;
    return emulated::pick<T>(emulated::exchange(mask, value), from < (own & ~(w - 1)) + w ? from : own);
}
template <typename T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned own = emulated::lane().index, w = width;
    return emulated::pick<T>(emulated::exchange(mask, value), (own & (w - 1)) + delta < w ? own + delta : own);
}
template <typename T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned own = emulated::lane().index, w = width;
    return emulated::pick<T>(emulated::exchange(mask, value), (own & (w - 1)) >= delta ? own - delta : own);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    // The bits of lanes that returned are zero.
    const unsigned long long* votes = emulated::exchange(mask, predicate ? 1u : 0u);
    unsigned ballot = 0;
    for (unsigned i = 0; i < emulated::warp().lanes; i++) ballot |= unsigned(votes[i] == 1) << i;
    return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// The new value of an atomic replacement of `*at`; gives the old one.
template <typename T, typename F> inline T emulated_replace(T* at, F replace) {
    T old = *const_cast<volatile T*>(at), changed = replace(old);
    while (!__atomic_compare_exchange(at, &old, &changed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) changed = replace(old);
    return old;
}
inline float atomicAdd(float* at, float value) { return emulated_replace(at, [=](float old) { return old + value; }); }
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicInc(unsigned* at, unsigned last) {
    return emulated_replace(at, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
inline int atomicMax(int* at, int value) { return emulated_replace(at, [=](int old) { return old > value ? old : value; }); }
inline unsigned atomicMax(unsigned* at, unsigned value) { return emulated_replace(at, [=](unsigned old) { return old > value ? old : value; }); }
inline int atomicExch(int* at, int value) { return __atomic_exchange_n(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicExch(unsigned* at, unsigned value) { return __atomic_exchange_n(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicCAS(unsigned* at, unsigned compare, unsigned value) {
    return emulated_replace(at, [=](unsigned old) { return old == compare ? value : old; });
}

template <typename T> inline T __ldg(const T* at) { return *at; }
template <typename T> inline T __ldcs(const T* at) { return *at; }
template <typename T> inline void __stcs(T* at, T value) { *at = value; }

template <typename To, typename From> inline To emulated_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
    To bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline int __float2int_rn(float x) { return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : int(lrintf(x)); }
inline int __float2int_rz(float x) { return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : int(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
// Never contracted with a sum.
inline float __fmul_rn(float x, float y) {
    volatile float product = x * y;
    return product;
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += static_cast<signed char>(a >> i * 8) * static_cast<signed char>(b >> i * 8);
    return c;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned picked = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = selector >> i * 4 & 15, byte = unsigned(bytes >> (s & 7) * 8) & 0xff;
        picked |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << i * 8;
    }
    return picked;
}

#define EMULATED_MINMAX(T)                                      \
    constexpr T min(T a, T b) { return b < a ? b : a; }         \
    constexpr T max(T a, T b) { return a < b ? b : a; }
EMULATED_MINMAX(int)
EMULATED_MINMAX(unsigned)
EMULATED_MINMAX(long long)
EMULATED_MINMAX(unsigned long long)
#undef EMULATED_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
