//! The CPU backend: SIMD kernels chosen at run time and a worker pool.
