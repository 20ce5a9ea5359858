// CUDA C++ on the host: what a kernel's source needs to compile as C++17 and to run block by block.
//
// Each CUDA thread is a fiber with a stack of its own; a block runs on one host thread, its warps one after the other, each until all of
// its lanes wait. Barriers and warp collectives are rendezvous of the lanes that have not returned. Invariant: what a device leaves
// undefined is made visible: shared memory holds NaN before it is written, an asynchronous copy arrives when somebody waits for it and not
// before, and a barrier that some lanes never reach is a failed launch, not a hang. Not emulated: blocks that wait for each other.
//
// A kernel's source sees the names of CUDA; everything else is in `emulated`. Loaders use `emulated_kernels`, `emulated_worker`,
// `emulated_run` and `emulated_escape`; a program of one file uses `emulated::launch` (see try.cpp).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <sys/mman.h>
#include <type_traits>
#include <utility>

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
/// Bytes of a lane's stack, of which the lowest page is a guard.
constexpr size_t STACK = 64 << 10;
constexpr size_t PAGE = 64 << 10;
constexpr size_t GUARD = 4 << 10;
/// Bytes of dynamic shared memory that any device has.
constexpr size_t MAX_SHARED = 256 << 10;
/// What memory holds before somebody writes it: NaN as f32, f16 and bf16, -1 as an integer.
constexpr int POISON = 0xff;

enum class State : unsigned char { Ready, AtWarp, AtBlock, Done };
enum class Meeting : unsigned char { None, SyncWarp, Exchange, Mma, Ldmatrix };

/// A copy into shared memory that was asked for and has not arrived.
struct Copy {
    void* to;
    const void* from;
    bool valid;
    unsigned group;
};

struct Lane {
    uint3 thread;
    unsigned index; ///< In the warp.
    State state;
    void* stack; ///< Where it goes on.
    unsigned group; ///< Copies asked for now belong to it.
    unsigned copies, capacity;
    Copy* copy;
};

struct Warp {
    unsigned lanes, live, waiting;
    Meeting meeting;
    /// What each lane brought to the meeting, and the same as it was when the last lane came.
    unsigned long long brought[WARP], met[WARP];
    /// Fragments of a product: a and b of each lane; then the product, row by row.
    unsigned a[WARP][4], b[WARP][2];
    float product[16][8];
    /// What each lane gets of the four matrices.
    unsigned matrices[WARP][4];
};

struct Kernel {
    const char* name;
    void (*call)(void** arguments);
    unsigned parameters;
    const unsigned* parameter_bytes;
};

/// One launch, as its loader asks for it.
struct Run {
    const Kernel* kernel;
    void** arguments;
    unsigned grid[3], block[3];
    unsigned shared; ///< Bytes of dynamic shared memory.
    unsigned long long order; ///< Of threads in a block: 0 forward, 1 reverse, else the seed of a shuffle.
    unsigned long long* next; ///< The next block that nobody has taken; shared by all host threads of the launch.
    int code; ///< The driver's code for it, if it failed, and why.
    char message[256];
};

/// Numbers of Linux's signals. Its header would bring names that kernels may have.
constexpr int ILLEGAL_INSTRUCTION = 4, ARITHMETIC = 8;

/// Codes of the driver.
constexpr int ILLEGAL_ADDRESS = 700, OUT_OF_RESOURCES = 701, MISALIGNED_ADDRESS = 716, LAUNCH_FAILED = 719;

/// One host thread's block. Made once and used for any number of launches, of any module.
struct Worker {
    Run* run;
    uint3 block;
    dim3 block_dim, grid_dim;
    Lane* current;
    void* scheduler;
    /// Of the lanes in every warp; the lane from which the running warp's lanes count, and how many of them had their turn.
    unsigned char order[WARP];
    unsigned first, turn;
    bool failed;
    unsigned threads, live, waiting;
    unsigned char* stacks;
    unsigned char* shared_end;
    Lane lanes[MAX_THREADS];
    Warp warps[MAX_THREADS / WARP];
};

static thread_local Worker* worker;

// Saves the registers that calls keep on the stack, and goes on with another stack.
#if defined(__x86_64__)
asm(".text\n.p2align 4\nemulated_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nretq\n");
constexpr int SAVED = 8, ENTRY = 6;
#elif defined(__aarch64__)
asm(".text\n.p2align 4\nemulated_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\n"
    "stp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\n"
    "ldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
constexpr int SAVED = 20, ENTRY = 11;
#else
#error "the emulator knows x86_64 and aarch64"
#endif
extern "C" __attribute__((visibility("hidden"))) void emulated_switch(void** save, void* load) asm("emulated_switch");

/// Gives the block up and goes back to the scheduler; what the lanes' stacks held is forgotten.
[[noreturn]] inline void leave() {
    worker->failed = true;
    void* forgotten;
    emulated_switch(&forgotten, worker->scheduler);
    __builtin_unreachable();
}

/// Ends the launch with a code and a reason.
template <typename... A> [[noreturn]] inline void fail_with(int code, const char* format, A... values) {
    const Worker& w = *worker;
    w.run->code = code;
    char* text = w.run->message;
    int start = snprintf(text, sizeof w.run->message, "%s, block (%u, %u, %u), thread (%u, %u, %u): ", w.run->kernel->name, w.block.x,
                         w.block.y, w.block.z, w.current->thread.x, w.current->thread.y, w.current->thread.z);
    if (start >= 0 && size_t(start) < sizeof w.run->message) snprintf(text + start, sizeof w.run->message - start, format, values...);
    leave();
}

template <typename... A> [[noreturn]] inline void fail(const char* format, A... values) { fail_with(LAUNCH_FAILED, format, values...); }

/// Behind `__launch_bounds__`: at the head of such a kernel.
inline void launch_bounds(unsigned threads, unsigned = 0) {
    if (worker->threads > threads) fail_with(OUT_OF_RESOURCES, "%u threads, and its bound is %u", worker->threads, threads);
}

inline Lane& lane() { return *worker->current; }
inline Warp& warp() { return worker->warps[(worker->current - worker->lanes) / WARP]; }

/// The next lane of the running warp that can go on, in this turn of its lanes; null if there is none.
inline Lane* next_lane(Worker& w) {
    while (w.turn < WARP) {
        unsigned at = w.first + w.order[w.turn++];
        if (at < w.threads && w.lanes[at].state == State::Ready) return w.current = &w.lanes[at];
    }
    return nullptr;
}

/// Lets the next lane go on, or the scheduler if there is none.
inline void pause(State state) {
    Worker& w = *worker;
    Lane& self = *w.current;
    self.state = state;
    Lane* next = next_lane(w);
    emulated_switch(&self.stack, next ? next->stack : w.scheduler);
}

/// Lets the lanes of a warp go on.
inline void release(Warp& met) {
    Lane* lanes = worker->lanes + (&met - worker->warps) * WARP;
    for (unsigned i = 0; i < met.lanes; i++)
        if (lanes[i].state == State::AtWarp) lanes[i].state = State::Ready;
    met.waiting = 0;
    met.meeting = Meeting::None;
}

inline void release_block() {
    for (unsigned i = 0; i < worker->threads; i++)
        if (worker->lanes[i].state == State::AtBlock) worker->lanes[i].state = State::Ready;
    worker->waiting = 0;
}

/// Waits until all lanes of the warp that have not returned are at the same meeting. The last one does what it is for.
template <typename F> inline void meet(Meeting meeting, F finish) {
    Warp& w = warp();
    if (w.waiting && w.meeting != meeting) fail("a warp's lanes are at different collectives");
    w.meeting = meeting;
    if (++w.waiting < w.live) return pause(State::AtWarp);
    finish(w);
    release(w);
}

inline void whole_warp(const char* what) {
    if (warp().live != WARP) fail("%s needs all 32 lanes of a warp, and has %u", what, warp().live);
}

/// All lanes are in the mask: of a warp that is not whole the others do not count.
inline void full(unsigned mask) {
    if (mask != 0xffffffffu) fail("a warp collective with the mask %#x: only the full mask is emulated", mask);
}

inline void take_value(Warp& w) {
    memcpy(w.met, w.brought, sizeof w.met);
    memset(w.brought, POISON, sizeof w.brought);
}

/// Every lane's value, as all lanes of the warp see it; of lanes that returned, poison.
template <typename T> inline const unsigned long long* exchange(unsigned mask, T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves up to 8 bytes");
    full(mask);
    Warp& w = warp();
    unsigned long long bits = 0;
    memcpy(&bits, &value, sizeof value);
    w.brought[lane().index] = bits;
    meet(Meeting::Exchange, take_value);
    return w.met;
}

template <typename T> inline T pick(const unsigned long long* values, unsigned index) {
    T value;
    memcpy(static_cast<void*>(&value), &values[index], sizeof value);
    return value;
}

template <typename T> inline void aligned(const T* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes)
        fail_with(MISALIGNED_ADDRESS, "an access of %zu bytes at %p, which is misaligned", bytes, static_cast<const void*>(pointer));
}

/// Dynamic shared memory: its end is the end of what may be touched.
inline unsigned char* dynamic_shared() { return worker->shared_end - ((worker->run->shared + 15) & ~15u); }

/// The bytes that `__shared__` variables of this module have on this host thread: all of its thread-local memory.
struct Statics {
    unsigned char* start = nullptr;
    size_t bytes = 0;
};

inline int find_statics(dl_phdr_info* info, size_t size, void* found) {
    if (size < sizeof *info || !info->dlpi_tls_data) return 0;
    auto start = static_cast<unsigned char*>(info->dlpi_tls_data);
    auto own = reinterpret_cast<unsigned char*>(&worker);
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type != PT_TLS || own < start || own >= start + header.p_memsz) continue;
        *static_cast<Statics*>(found) = {start, header.p_memsz};
        return 1;
    }
    return 0;
}

inline void poison(const Statics& statics) {
    Worker* kept = worker;
    memset(statics.start, POISON, statics.bytes);
    worker = kept;
    memset(dynamic_shared(), POISON, kept->shared_end - dynamic_shared());
}

/// What a lane does: the kernel, then nothing ever again. Those who wait for it wait no longer.
[[noreturn]] inline void lane_main() {
    Worker& w = *worker;
    w.run->kernel->call(w.run->arguments);
    Warp& own = warp();
    w.live--;
    own.live--;
    if (own.live && own.waiting == own.live) {
        if (own.meeting == Meeting::Mma || own.meeting == Meeting::Ldmatrix) fail("returns while its warp is at mma or ldmatrix");
        if (own.meeting == Meeting::Exchange) take_value(own);
        release(own);
    }
    if (w.live && w.waiting == w.live) release_block();
    pause(State::Done);
    __builtin_unreachable();
}

inline void start_lanes(Worker& w) {
    w.live = w.threads;
    w.waiting = 0;
    for (unsigned i = 0; i < w.threads; i++) {
        Lane& lane = w.lanes[i];
        lane.thread = {i % w.block_dim.x, i / w.block_dim.x % w.block_dim.y, i / w.block_dim.x / w.block_dim.y};
        lane.index = i % WARP;
        lane.state = State::Ready;
        lane.group = lane.copies = 0;
        void** top = reinterpret_cast<void**>(w.stacks + (i + 1) * STACK);
        lane.stack = top - SAVED;
        memset(lane.stack, 0, SAVED * sizeof(void*));
        top[ENTRY - SAVED] = reinterpret_cast<void*>(&lane_main);
    }
    for (unsigned i = 0; i * WARP < w.threads; i++) {
        unsigned lanes = w.threads - i * WARP;
        Warp& warp = w.warps[i];
        warp.lanes = warp.live = lanes < WARP ? lanes : WARP;
        warp.waiting = 0;
        warp.meeting = Meeting::None;
        memset(warp.brought, POISON, sizeof warp.brought);
    }
}

/// The numbers below `count` in the order that the launch asks for.
inline void put_in_order(unsigned char* order, unsigned count, unsigned long long kind, unsigned long long salt) {
    for (unsigned i = 0; i < count; i++) order[i] = static_cast<unsigned char>(kind == 1 ? count - 1 - i : i);
    if (kind < 2) return;
    unsigned long long state = kind * 0x9e3779b97f4a7c15ull + salt;
    for (unsigned i = count; i > 1; i--) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        unsigned j = static_cast<unsigned>(state >> 33) % i;
        unsigned char swapped = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swapped;
    }
}

inline bool describe_deadlock(Worker& w) {
    unsigned at_warp = 0;
    for (unsigned i = 0; i < w.threads; i++) at_warp += w.lanes[i].state == State::AtWarp;
    w.run->code = LAUNCH_FAILED;
    snprintf(w.run->message, sizeof w.run->message,
             "%s, block (%u, %u, %u): deadlock: %u threads wait at a barrier, %u at a warp collective, for others that never come",
             w.run->kernel->name, w.block.x, w.block.y, w.block.z, w.waiting, at_warp);
    return false;
}

inline bool run_block(Worker& w, unsigned long long index) {
    start_lanes(w);
    unsigned char warps[MAX_THREADS / WARP];
    unsigned warp_count = (w.threads + WARP - 1) / WARP;
    put_in_order(warps, warp_count, w.run->order, index);
    put_in_order(w.order, WARP, w.run->order, ~index);
    for (;;) {
        bool moved = false;
        for (unsigned i = 0; i < warp_count; i++) {
            w.first = warps[i] * WARP;
            for (w.turn = 0; Lane* lane = next_lane(w); w.turn = 0) {
                moved = true;
                emulated_switch(&w.scheduler, lane->stack);
                if (w.failed) return false;
            }
        }
        if (!w.live) return true;
        if (!moved) return describe_deadlock(w);
    }
}

/// Memory whose end is the end of what may be touched; null if there is none.
inline unsigned char* map_guarded(size_t bytes) {
    size_t size = (bytes + PAGE - 1) / PAGE * PAGE;
    void* start = mmap(nullptr, size + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED || mprotect(start, size, PROT_READ | PROT_WRITE)) return nullptr;
    return static_cast<unsigned char*>(start) + size - bytes;
}

template <auto F> struct Entry;
template <typename... A, void (*F)(A...)> struct Entry<F> {
    static constexpr unsigned bytes[sizeof...(A) + 1] = {sizeof(A)..., 0};
    static void call(void** arguments) { spread(arguments, std::make_integer_sequence<int, sizeof...(A)>{}); }
    template <int... I> static void spread([[maybe_unused]] void** arguments, std::integer_sequence<int, I...>) {
        F(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
    }
};

/// The table entry of a kernel.
template <auto F> constexpr Kernel kernel(const char* name) {
    return {name, &Entry<F>::call, sizeof(Entry<F>::bytes) / sizeof(unsigned) - 1, Entry<F>::bytes};
}

} // namespace emulated

#define EMULATED_API extern "C" __attribute__((visibility("default"), used))

/// A worker, or null if there is no memory. It is never given back.
EMULATED_API inline emulated::Worker* emulated_worker() {
    using namespace emulated;
    void* stacks = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    unsigned char* shared = map_guarded(MAX_SHARED);
    auto made = static_cast<Worker*>(calloc(1, sizeof(Worker)));
    if (stacks == MAP_FAILED || !shared || !made) return nullptr;
    made->stacks = static_cast<unsigned char*>(stacks);
    made->shared_end = shared + MAX_SHARED;
    for (unsigned i = 0; i < MAX_THREADS; i++)
        if (mprotect(made->stacks + i * STACK, GUARD, PROT_NONE)) return nullptr;
    return made;
}

/// Runs the blocks that nobody has taken yet, on this thread. False, with a message, if one failed.
EMULATED_API inline bool emulated_run(emulated::Worker* with, emulated::Run* run) {
    using namespace emulated;
    Worker& w = *with;
    worker = &w;
    w.run = run;
    w.failed = false;
    w.block_dim = {run->block[0], run->block[1], run->block[2]};
    w.grid_dim = {run->grid[0], run->grid[1], run->grid[2]};
    w.threads = w.block_dim.x * w.block_dim.y * w.block_dim.z;
    Statics statics;
    dl_iterate_phdr(find_statics, &statics);
    unsigned long long blocks = 1ull * run->grid[0] * run->grid[1] * run->grid[2];
    bool well = true;
    for (unsigned long long at; well && (at = __atomic_fetch_add(run->next, 1, __ATOMIC_RELAXED)) < blocks;) {
        w.block = {unsigned(at % run->grid[0]), unsigned(at / run->grid[0] % run->grid[1]), unsigned(at / run->grid[0] / run->grid[1])};
        poison(statics);
        well = run_block(w, at);
    }
    if (!well) __atomic_store_n(run->next, blocks, __ATOMIC_RELAXED);
    worker = nullptr;
    return well;
}

/// For a handler of signals, on the thread that is in `emulated_run`: the lane that runs did what it may not, and the launch ends. What the
/// compiler checks (alignment, indices of arrays) is an illegal instruction.
EMULATED_API [[noreturn]] inline void emulated_escape(int signal, const void* address) {
    using namespace emulated;
    switch (signal) {
    case ILLEGAL_INSTRUCTION: fail_with(MISALIGNED_ADDRESS, "a misaligned access, or an index out of its array");
    case ARITHMETIC: fail("a division by zero");
    default: fail_with(ILLEGAL_ADDRESS, "illegal access of the address %p", address);
    }
}

#include "emulate_cuda.h"
#include "emulate_tensor.h"
#ifdef EMULATED_MAIN
#include "emulate_main.h"
#endif
