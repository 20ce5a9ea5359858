// A kernel tried with the host's compiler alone, from the repository's root:
//   g++ -std=c++17 -O2 -w -DBATON_EMULATED -DEMULATED_MAIN -include crates/cuda-sim/include/emulate.h
//       -I crates/device-cuda/kernels crates/cuda-sim/include/try.cpp -o try && ./try && CUDA_SIM_ORDER=7 ./try
// Replace the kernel by an #include of a .cu, and the checks by your own. A launch that fails says why and ends with status 1.
#include "baton.cuh"

/// out[n] = sum over i of in[n, i]; a block for each row.
template <typename T> __global__ void row_sums(const T* in, float* out, int columns) {
    float sum = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += to_float(in[blockIdx.x * columns + i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

/// c[16, 8] = a[16, 16] · b[8, 16]ᵀ in one warp, through shared memory.
template <typename T> __global__ void product(const T* a, const T* b, float* c) {
    SHARED(memory);
    T* rows = reinterpret_cast<T*>(memory);
    int lane = lane_id();
    cp_async_16(rows + lane * 8, a + lane * 8, true);
    cp_async_16(rows + 256 + lane * 8, b + lane % 16 * 8, lane < 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    unsigned left[4], right[4];
    ldmatrix_x4(left, rows + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x4(right, rows + 256 + (lane % 8) * 16 + (lane / 8 % 2) * 8 + lane / 16 * 128);
    float sums[4] = {0, 0, 0, 0};
    const unsigned columns[2] = {right[0], right[1]};
    mma_16816<T>(sums, left, columns);
    for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <typename T> void check() {
    const int rows = 5, columns = 1000;
    T* in = emulated::device<T>(rows * columns);
    float* out = emulated::device<float>(rows);
    for (int i = 0; i < rows * columns; i++) in[i] = from_float<T>((i * 7 % 31 - 15) / 8.0f);
    emulated::launch<row_sums<T>>("row_sums", rows, 256, 0, static_cast<const T*>(in), out, columns);
    for (int row = 0; row < rows; row++) {
        float sum = 0;
        for (int i = 0; i < columns; i++) sum += to_float(in[row * columns + i]);
        if (fabsf(out[row] - sum) > 1e-2f) printf("row %d: %g, not %g\n", row, out[row], sum), exit(1);
    }
    T *a = emulated::device<T>(256), *b = emulated::device<T>(128);
    float* c = emulated::device<float>(128);
    for (int i = 0; i < 256; i++) a[i] = from_float<T>((i * 5 % 17 - 8) / 4.0f);
    for (int i = 0; i < 128; i++) b[i] = from_float<T>((i * 3 % 13 - 6) / 4.0f);
    emulated::launch<product<T>>("product", 1, 32, 1024, static_cast<const T*>(a), static_cast<const T*>(b), c);
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += to_float(a[m * 16 + k]) * to_float(b[n * 16 + k]);
            if (c[m * 8 + n] != sum) printf("(%d, %d): %g, not %g\n", m, n, c[m * 8 + n], sum), exit(1);
        }
}

int main() {
    check<bf16>();
    check<f16>();
    // Every finite f16 comes back from f32, and what lies between two is rounded to the even one.
    for (unsigned bits = 0; bits < 0x7c00; bits++) {
        float exact = to_float(f16{static_cast<unsigned short>(bits)}), next = to_float(f16{static_cast<unsigned short>(bits + 1)});
        if (from_float<f16>(-exact).bits != (bits | 0x8000)) printf("f16 %#x\n", bits), exit(1);
        if (bits < 0x7bff && from_float<f16>((exact + next) / 2).bits != ((bits + 1) & ~1u)) printf("between f16 %#x\n", bits), exit(1);
    }
    puts("as plain loops have it");
}
