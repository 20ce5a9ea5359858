//! A simulator of the CUDA driver, NVRTC, cuBLASLt and NCCL, for tests on machines without a GPU.
//!
//! The library exports their C ABI. Its run-time compiler gives CUDA C++ to the host's C++ compiler, with the headers of `include` in place
//! of what is built in; its driver runs grids on the host, each thread of a block as a fiber. It knows nothing about those who call it, and
//! is strict: what a device leaves undefined is made visible (NaN in memory that nobody wrote, asynchronous copies that arrive late), nothing
//! runs before somebody waits for it, device memory cannot be touched by the host, and a kernel's wrong address ends its context. It proves
//! that a caller keeps the rules and that kernels compute the right numbers for one order of threads at a time; it says nothing about
//! speed, registers, or how much static shared memory there is. Left out: captures over several streams, graphs within graphs, memory pools, peer access, blocks that
//! wait for each other.
//!
//! # Control
//!
//! `cuda_sim_control("key=value")` and, read once at the first call of anything, the variable `CUDA_SIM_KEY`; `default` sets all anew:
//!
//! | Key | Value | At first |
//! |---|---|---|
//! | `devices` | how many; 0 is a machine without one | 1 |
//! | `cc` | compute capability, which says how much shared memory there is | 90 |
//! | `sms` | multiprocessors of a device | 132 |
//! | `memory` | bytes of each device | 2 GiB |
//! | `driver` | as `cuDriverGetVersion` gives it | 13000 |
//! | `order` | of a block's threads: `forward`, `reverse`, or the seed of a shuffle | `forward` |
//! | `hang` | `on`: no task comes to an end, until `off` | `off` |
//! | `lost` | a code that every call returns from now on (46, 214, 999); 0: the device is back | 0 |
//! | `reset` | `off`: a sticky error outlives a reset of the device's primary context | `on` |
//! | `fault` | `SYMBOL:N:CODE`: the n-th call from now returns the code. `SYMBOL:N:run:CODE`: it succeeds, and its task fails with the code when it runs (launches). `SYMBOL:N:hang`: as `hang=on` from that call on. Several with commas; empty forgets them | |
//! | `report` | a file, replaced with the report whenever a context ends (before its memory goes) and at the end of the process | |
//!
//! `cuda_sim_report` gives counters, what is live and what was refused, as JSON; `cuda_sim_count` one of the counters; `cuda_sim_reset`
//! forgets counters and messages. [`Simulator`] has all of that for tests in Rust.

mod api;
mod blas;
mod codes;
mod collective;
mod compiler;
mod control;
mod dtype;
mod emulator;
mod host;
mod machine;
mod memory;
mod module;
mod report;
mod stream;
mod table;

pub use compiler::{can_compile, compiler};
pub use host::{Simulator, library, library_folder, name_library};

#[cfg(test)]
mod tests;
