//! Kernels: what they compute, and what is done to those that break a rule.

use super::harness::*;

const SUM: &str = r#"
template <int factor> __global__ void sum(const float* in, float* out, int n) {
    __shared__ float partial[32];
    float x = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) x += in[blockIdx.x * n + i];
    for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    BARRIER;
    if (threadIdx.x == 0) {
        x = 0;
        for (int i = 0; i < (int)blockDim.x / 32; i++) x += partial[i];
        out[blockIdx.x] = factor * x;
    }
}
"#;

fn sums(session: &Session, barrier: &str) -> Vec<f32> {
    let kernel = session.kernel(&SUM.replace("BARRIER", barrier), "sum<2>");
    let values: Vec<f32> = (0..3000).map(|i| (i % 17) as f32).collect();
    let (input, output) = (session.upload(&values), session.alloc(12));
    well(session.launch(kernel, 3, 256, 0, &[&input, &output, &1000i32]));
    session.download(output, 3)
}

#[test]
fn a_block_sums_through_shuffles_shared_memory_and_a_barrier_in_any_order_of_threads() {
    if !can_compile() {
        return;
    }
    let values: Vec<f32> = (0..3000).map(|i| (i % 17) as f32).collect();
    let expected: Vec<f32> = values.chunks(1000).map(|row| 2.0 * row.iter().sum::<f32>()).collect();
    for order in ["order=forward", "order=reverse", "order=1", "order=2"] {
        assert_eq!(sums(&Session::with(order), "__syncthreads()"), expected, "{order}");
    }
}

#[test]
fn a_missing_barrier_shows_in_some_order_of_threads() {
    if !can_compile() {
        return;
    }
    assert!(sums(&Session::with("order=forward"), "")[0].is_nan(), "the first thread reads what nobody wrote");
}

/// A kernel without arguments, in one block of 64 threads, fails with the code, and the words say why.
#[track_caller]
fn fails(body: &str, code: i32, words: &str) {
    let session = Session::new();
    let kernel = session.kernel(&format!("__global__ void wrong() {{ {body} }}"), "wrong");
    well(session.launch(kernel, 1, 64, 1024, &[]));
    assert_eq!(session.synchronize(), code);
    assert_said(words);
    assert_eq!(cuCtxSynchronize(), code, "the error stays");
    assert_eq!(cuMemAlloc_v2(&mut 0, 1), code);
}

#[test]
fn kernels_that_break_a_rule_end_their_context() {
    if !can_compile() {
        return;
    }
    let barrier = "if (threadIdx.x % 2) __syncthreads(); else __syncwarp();";
    fails(barrier, cuda::LAUNCH_FAILED, "deadlock: 32 threads wait at a barrier, 32 at a warp collective");
    let mixed = "if (threadIdx.x % 2) __shfl_sync(~0u, 1, 0); else __syncwarp();";
    fails(mixed, cuda::LAUNCH_FAILED, "different collectives");
    fails("if (threadIdx.x == 3) *(volatile int*)8 = 1;", cuda::ILLEGAL_ADDRESS, "thread (3, 0, 0): illegal access");
    fails("emulated::dynamic_shared()[1024] = 1;", cuda::ILLEGAL_ADDRESS, "illegal access");
    fails("__shfl_xor_sync(0xffffu, 1, 1);", cuda::LAUNCH_FAILED, "mask 0xffff");
    fails("__trap();", cuda::LAUNCH_FAILED, "__trap");
    fails("emulated::aligned((char*)4, 16);", cuda::MISALIGNED_ADDRESS, "misaligned");
    let between = "*(float4*)(emulated::dynamic_shared() + 8 * threadIdx.x) = float4{};";
    fails(between, cuda::MISALIGNED_ADDRESS, "thread (1, 0, 0): a misaligned access");
    let outside = "__shared__ float few[32]; few[threadIdx.x] = 1;";
    fails(outside, cuda::MISALIGNED_ADDRESS, "thread (32, 0, 0): a misaligned access, or an index out of its array");
    fails("*(volatile int*)emulated::dynamic_shared() /= (int)threadIdx.z;", cuda::LAUNCH_FAILED, "division by zero");
    let stack = "volatile char much[200000]; for (int i = 0; i < 200000; i += 100) much[i] = 1;";
    fails(stack, cuda::ILLEGAL_ADDRESS, "illegal access");
}

#[test]
fn a_lane_that_returned_is_not_waited_for() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let source = "__global__ void votes(unsigned* out) {
        if (threadIdx.x % 32 == 5 || threadIdx.x >= 64) return;
        unsigned vote = __ballot_sync(~0u, threadIdx.x % 2);
        __syncthreads();
        if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = vote;
    }";
    let (kernel, out) = (session.kernel(source, "votes"), session.alloc(8));
    well(session.launch(kernel, 1, 96, 0, &[&out]));
    assert_eq!(session.download::<u32>(out, 2), [0xaaaa_aa8a; 2]);
}

#[test]
fn a_product_of_fragments_is_the_product() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let source = "float widen(unsigned short bits) { return (short)bits; }
    __global__ void product(const unsigned short* a, const unsigned short* b, float* c) {
        unsigned short* rows = (unsigned short*)emulated::dynamic_shared();
        int lane = threadIdx.x, g = lane / 4, p = lane % 4 * 2;
        for (int i = lane; i < 256; i += 32) rows[i] = a[i];
        __syncwarp();
        unsigned left[4], right[2] = {b[p * 8 + g] | b[p * 8 + 8 + g] << 16, b[p * 8 + 64 + g] | b[p * 8 + 72 + g] << 16};
        emulated::ldmatrix_x4(left, rows + lane % 16 * 16 + lane / 16 * 8, false);
        float sums[4] = {1, 1, 1, 1};
        emulated::mma_16816(sums, left, right, widen);
        for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + p + i % 2] = sums[i];
    }";
    let kernel = session.kernel(source, "product");
    let a: Vec<i16> = (0..256).map(|i| i * 7 % 23 - 11).collect();
    let b: Vec<i16> = (0..128).map(|i| i * 5 % 19 - 9).collect();
    let (left, right, out) = (session.upload(&a), session.upload(&b), session.alloc(512));
    well(session.launch(kernel, 1, 32, 1024, &[&left, &right, &out]));
    let sum = |at: usize| (0..16).map(|k| f32::from(a[at / 8 * 16 + k] * b[k * 8 + at % 8])).sum::<f32>() + 1.0;
    assert_eq!(session.download::<f32>(out, 128), (0..128).map(sum).collect::<Vec<_>>());
}

#[test]
fn an_asynchronous_copy_arrives_when_it_is_waited_for_and_not_before() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let source = "template <int pending> __global__ void copied(const float* in, float* out) {
        float* to = (float*)emulated::dynamic_shared();
        emulated::cp_async_16(to, in, true);
        emulated::cp_async_commit();
        emulated::cp_async_16(to + 4, in, false);
        emulated::cp_async_commit();
        emulated::cp_async_wait(pending);
        for (int i = 0; i < 8; i++) out[i] = to[i];
    }";
    let (input, out) = (session.upload(&[1f32, 2.0, 3.0, 4.0]), session.alloc(32));
    let mut results = Vec::new();
    for pending in 0..3 {
        let kernel = session.kernel(source, &format!("copied<{pending}>"));
        well(session.launch(kernel, 1, 1, 32, &[&input, &out]));
        results.push(session.download::<f32>(out, 8));
    }
    assert_eq!(results[0], [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(results[1][..4], [1.0, 2.0, 3.0, 4.0]);
    assert!(results[1][4..].iter().chain(&results[2]).all(|value| value.is_nan()), "{results:?}");
}

#[test]
fn every_block_of_a_large_grid_runs_once() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let source = "__global__ void count(int* each, int* all) {
        if (threadIdx.x == 0) each[blockIdx.x]++, atomicAdd(all, 1);
    }";
    let kernel = session.kernel(source, "count");
    let (each, all) = (session.upload(&[0i32; 1000]), session.upload(&[0i32]));
    well(session.launch(kernel, 1000, 64, 0, &[&each, &all]));
    assert_eq!(session.download::<i32>(each, 1000), [1; 1000]);
    assert_eq!(session.download::<i32>(all, 1), [1000]);
    assert_eq!((count("kernels.count"), count("calls.cuLaunchKernel")), (1, 1));
}

#[test]
fn the_last_block_to_count_sees_what_all_have_stored_and_leaves_the_counter_as_it_was() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let source = "__global__ void total(unsigned* counter, int* each, int* all) {
        if (threadIdx.x > 0) return;
        each[blockIdx.x] += blockIdx.x;
        __threadfence();
        if (atomicInc(counter, gridDim.x - 1) < gridDim.x - 1) return;
        __threadfence();
        *all = 0;
        for (int i = 0; i < gridDim.x; i++) *all += each[i];
    }";
    let kernel = session.kernel(source, "total");
    let (counter, each, all) = (session.upload(&[0u32]), session.upload(&[0i32; 100]), session.upload(&[0i32]));
    for launch in 1..4 {
        well(session.launch(kernel, 100, 32, 0, &[&counter, &each, &all]));
        assert_eq!(session.download::<i32>(all, 1), [launch * 4950]);
        assert_eq!(session.download::<i32>(counter, 1), [0]);
    }
}

#[test]
fn the_upper_half_of_a_product_is_whole() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let source = "__global__ void upper(const unsigned long long* x, unsigned long long* out) {
        out[threadIdx.x] = __umul64hi(x[threadIdx.x], x[threadIdx.x + 1]);
    }";
    let factors = [u64::MAX, u64::MAX, 1 << 63, 0x0123_4567_89ab_cdef, 6];
    let (kernel, x, out) = (session.kernel(source, "upper"), session.upload(&factors), session.alloc(32));
    well(session.launch(kernel, 1, 4, 0, &[&x, &out]));
    let upper = |pair: &[u64]| ((u128::from(pair[0]) * u128::from(pair[1])) >> 64) as u64;
    assert_eq!(session.download::<u64>(out, 4), factors.windows(2).map(upper).collect::<Vec<_>>());
}

#[test]
fn launches_that_no_device_takes_are_refused_at_the_call() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let kernel = session.kernel("__global__ void nothing(int n) {}", "nothing");
    for (grid, block, shared) in [(0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, (48 << 10) + 1)] {
        assert_eq!(session.launch(kernel, grid, block, shared, &[&1i32]), cuda::INVALID_VALUE);
    }
    let most = function::MAX_DYNAMIC_SHARED_SIZE_BYTES;
    assert_eq!(cuFuncSetAttribute(kernel, most, (227 << 10) + 1), cuda::INVALID_VALUE);
    well(cuFuncSetAttribute(kernel, most, 227 << 10));
    well(session.launch(kernel, 1, 32, 227 << 10, &[&1i32]));
    well(session.synchronize());
    assert_eq!(session.launch(kernel + 16, 1, 32, 0, &[&1i32]), cuda::INVALID_HANDLE);
}

#[test]
fn a_launch_of_more_threads_than_the_kernels_bound_fails() {
    if !can_compile() {
        return;
    }
    let source = "template <int n> __global__ void
    __launch_bounds__(32 * max(n, 1), 2) bounded(void (*unused)(int)) { }";
    for (threads, code) in [(64, 0), (65, 701)] {
        let session = Session::new();
        let kernel = session.kernel(source, "bounded<2>");
        well(session.launch(kernel, 1, threads, 0, &[&0u64]));
        assert_eq!(session.synchronize(), code);
        if code != 0 {
            assert_said("65 threads, and its bound is 64");
        }
    }
}
