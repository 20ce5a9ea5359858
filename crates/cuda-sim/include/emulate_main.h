// What a program of one file needs beside emulate.h: device memory, a launch that ends the program when it fails.
#pragma once

#include <csignal>
#include <ucontext.h>

namespace emulated {

inline void on_fault(int signal, siginfo_t* info, void*) {
    if (!worker) abort();
    emulated_escape(signal, info->si_addr);
}

/// `count` elements of device memory, poisoned, with a guard behind.
template <typename T> T* device(size_t count) {
    size_t bytes = (count * sizeof(T) + 15) / 16 * 16;
    unsigned char* start = map_guarded(bytes);
    if (!start) abort();
    memset(start, POISON, bytes);
    return reinterpret_cast<T*>(start);
}

/// Runs a grid; the program ends with status 1 and the reason if it fails. CUDA_SIM_ORDER is the order of threads.
template <auto F, typename... A> void launch(const char* name, dim3 grid, dim3 block, unsigned shared, A... arguments) {
    static_assert(sizeof...(A) == sizeof(Entry<F>::bytes) / sizeof(unsigned) - 1, "as many arguments as the kernel has parameters");
    static Worker* own = [] {
        static unsigned char handlers[64 << 10];
        stack_t alternate{};
        alternate.ss_sp = handlers;
        alternate.ss_size = sizeof handlers;
        sigaltstack(&alternate, nullptr);
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
        for (int signal : signals) sigaction(signal, &action, nullptr);
        return emulated_worker();
    }();
    const char* order = getenv("CUDA_SIM_ORDER");
    Kernel made = kernel<F>(name);
    void* pointers[] = {static_cast<void*>(&arguments)..., nullptr};
    unsigned long long next = 0;
    Run run = {&made, pointers, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, 0, &next, 0, {}};
    run.order = !order || !strcmp(order, "forward") ? 0 : !strcmp(order, "reverse") ? 1 : strtoull(order, nullptr, 10) + 2;
    if (emulated_run(own, &run)) return;
    fprintf(stderr, "%s\n", run.message);
    exit(1);
}

} // namespace emulated
