//! What this GPU does at most, measured: the rates that a step's are held against.
//!
//! Each is the best of some short runs, between two waits for the device, since other work on it only takes away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_device::Result;

use crate::blas::Matmul;
use crate::gpu::Gpu;
use crate::memory::Buffer;
use crate::tensor::DataType;

/// Bytes that are copied at a time: far more than caches hold.
const COPY: usize = 1 << 30;
/// Sides of the matrices that are multiplied.
const SIDE: usize = 8192;
/// Sides below which nothing would be measured but calls.
const SMALLEST: usize = 128;
/// Numbers without a pattern, then again from the first.
const NOISE: usize = (1 << 20) + 1;
/// Each copy, and the matrices together, take at most this part of what is free.
const PART: u64 = 64;
/// Times that something is queued between two waits, so that these do not count.
const QUEUED: usize = 8;
/// Runs at least: the first chooses an algorithm, the second makes a graph.
const RUNS: usize = 4;
/// How long each rate is looked for.
const TIME: Duration = Duration::from_millis(500);

/// Bytes of the device's memory read and written in a second, by a copy of a GiB or less.
pub(crate) fn copied(gpu: &Arc<Gpu>) -> Result<f64> {
    let bytes = COPY.min(part(gpu)?);
    let (from, to) = (gpu.alloc(bytes, "a copy's source")?, gpu.alloc(bytes, "a copy")?);
    gpu.fill(from.address(), bytes, 1)?;
    let seconds = shortest(gpu, || gpu.copy(from.address(), to.address(), bytes))?;
    Ok(2.0 * bytes as f64 / seconds)
}

/// Multiply-adds in a second, by cuBLASLt's product of two square matrices of a type.
pub(crate) fn multiplied(gpu: &Arc<Gpu>, dtype: DataType) -> Result<f64> {
    let part = part(gpu)?;
    let fits = |side: &usize| 3 * side * side * dtype.bytes() <= part;
    let side = std::iter::successors(Some(SIDE), |side| Some(side / 2)).find(fits).expect("0 fits").max(SMALLEST);
    let size = side * side * dtype.bytes();
    let [x, weight] = [noise(gpu, size, dtype)?, noise(gpu, size, dtype)?];
    let out = gpu.alloc(size, "a product")?;
    let product = Matmul {
        rows: side,
        n: side,
        k: side,
        input: dtype,
        output: dtype,
        x: x.address(),
        weight: weight.address(),
        out: out.address(),
        out_stride: side,
    };
    let seconds = shortest(gpu, || gpu.matmul(&product))?;
    Ok((side as f64).powi(3) / seconds)
}

/// Bytes that are taken at most.
fn part(gpu: &Gpu) -> Result<usize> {
    Ok((gpu.memory()?.free / PART) as usize)
}

/// Numbers between -1 and 1 without a pattern: chips are faster at constant ones, which need less power.
fn noise(gpu: &Arc<Gpu>, bytes: usize, dtype: DataType) -> Result<Buffer> {
    let mut state = 1u32;
    let values: Vec<f32> = (0..NOISE)
        .map(|_| {
            // Numerical Recipes' linear congruential generator; its upper bits are good.
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let piece = dtype.encode(&values);
    let buffer = gpu.alloc(bytes, "a factor")?;
    for offset in (0..bytes).step_by(piece.len()) {
        gpu.write(&buffer, offset, &piece[..piece.len().min(bytes - offset)])?;
    }
    Ok(buffer)
}

/// Seconds of what `queue` queues, in the shortest of some runs.
fn shortest(gpu: &Arc<Gpu>, queue: impl Fn() -> Result<()>) -> Result<f64> {
    gpu.synchronize()?;
    let (start, mut best) = (Instant::now(), f64::MAX);
    for run in 0.. {
        if run >= RUNS && start.elapsed() >= TIME {
            break;
        }
        let begin = Instant::now();
        (0..QUEUED).try_for_each(|_| queue())?;
        gpu.synchronize()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(best / QUEUED as f64)
}
