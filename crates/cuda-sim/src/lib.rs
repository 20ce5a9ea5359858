//! A simulator of the CUDA driver, NVRTC and cuBLASLt for tests on machines without a GPU.
