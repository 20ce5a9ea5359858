//! What this machine can do at most, measured: the rates that a kernel's are held against.
//!
//! Each is the best of some short runs on all threads of the pool, since other work on the machine only takes away.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use baton_device::{Limits, Result};
use half::bf16;

use crate::backend::CpuBackend;
use crate::isa::Dispatch;
use crate::memory::weights;
use crate::simd::{Kernel, LANES, PairDot, PairKernel, Simd};

/// Memory that is read: far more than caches hold.
const READ: usize = 1 << 30;
/// What a thread reads at a time.
const SHARE: usize = 4 << 20;
/// Vectors of dot products per chain and task: below a millisecond, so that some run is left alone on a busy machine.
const STEPS: usize = 1 << 17;
/// How long each rate is looked for.
const TIME: Duration = Duration::from_millis(700);
/// Enough work for the pool to wake every thread.
const MUCH: usize = usize::MAX;

impl CpuBackend {
    /// Measures what the machine gives this backend's threads and instruction set, all threads together: bytes read from
    /// large pages, as weights lie in; multiply-adds of `f32`, of bytes (`int8`) into 32-bit sums as of weights in blocks, and
    /// of `bf16` into f32 sums where there is an instruction for it.
    ///
    /// # Errors
    /// [`OutOfMemory`](baton_device::DeviceError::OutOfMemory) if there is no gibibyte to read.
    pub fn limits(&self) -> Result<Limits> {
        let isa = self.isa();
        let mut memory = weights(READ)?;
        // Ones, so that every page is there and no number is subnormal.
        self.pool().each(memory.chunks_mut(SHARE), MUCH, |_, share| {
            bytemuck::cast_slice_mut::<u8, f32>(share).fill(1.0);
        });
        let bytes = READ as f64 / self.shortest(READ / SHARE, |i| isa.run(Read(&memory[i * SHARE..][..SHARE])));
        let threads = self.pool().threads();
        let steps = (threads * STEPS * LANES) as f64 * accumulators(isa) as f64;
        let mut mul_adds = BTreeMap::from([
            ("f32".to_owned(), steps / self.shortest(threads, |_| isa.run(DotFloats))),
            ("int8".to_owned(), 4.0 * steps / self.shortest(threads, |_| isa.run(DotBytes))),
        ]);
        if isa.has_pairs() {
            mul_adds.insert("bf16".into(), 2.0 * steps / self.shortest(threads, |_| isa.run_pairs(DotPairs)));
        }
        Ok(Limits { bytes, access: "read", mul_adds })
    }

    /// Seconds of the shortest run of `tasks` tasks.
    fn shortest(&self, tasks: usize, task: impl Fn(usize) + Sync) -> f64 {
        let (start, mut best) = (Instant::now(), f64::MAX);
        while start.elapsed() < TIME {
            let run = Instant::now();
            self.pool().run(tasks, MUCH, &task);
            best = best.min(run.elapsed().as_secs_f64());
        }
        best
    }
}

/// Chains that run side by side on an instruction set.
fn accumulators(isa: Dispatch) -> usize {
    struct Accumulators<'a>(&'a mut usize);
    impl Kernel for Accumulators<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            *self.0 = S::ACCUMULATORS;
        }
    }
    let mut count = 0;
    isa.run(Accumulators(&mut count));
    count
}

/// Adds up all of the memory, in eight chains.
struct Read<'a>(&'a [u8]);

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (vectors, _) = bytemuck::cast_slice::<u8, f32>(self.0).as_chunks::<LANES>();
        let mut sums = [s.splat(0.0); 8];
        for eight in vectors.as_chunks::<8>().0 {
            for (sum, vector) in sums.iter_mut().zip(eight) {
                *sum = s.add(*sum, s.load(vector));
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = s.add(total, *sum);
        }
        black_box(s.sum(total));
    }
}

/// Independent chains of dot products of bytes.
struct DotBytes;

impl Kernel for DotBytes {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = s.load_bytes(black_box(&[1; 4 * LANES]));
        let x = *black_box(&[1i8; 4]);
        let mut sums = [s.shifted(black_box(&0), 0); 16];
        for _ in 0..STEPS {
            for sum in &mut sums[..S::ACCUMULATORS] {
                *sum = s.dot(*sum, w, &x);
            }
        }
        for sum in sums {
            black_box(s.sum(s.to_f32(sum)));
        }
    }
}

/// Independent chains of dot products of pairs.
struct DotPairs;

impl PairKernel for DotPairs {
    #[inline(always)]
    fn run<S: Simd, D: PairDot<S>>(self, s: S, pairs: D) {
        let w = s.load_bytes(black_box(&[0; 4 * LANES]));
        let x = *black_box(&[bf16::ONE; 2]);
        let mut sums = [s.splat(*black_box(&0.0)); 16];
        for _ in 0..STEPS {
            for sum in &mut sums[..S::ACCUMULATORS] {
                *sum = pairs.dot(*sum, w, &x);
            }
        }
        for sum in sums {
            black_box(s.sum(sum));
        }
    }
}

/// Independent chains of multiply-adds of floats.
struct DotFloats;

impl Kernel for DotFloats {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (w, x) = (s.splat(*black_box(&0.999)), s.splat(*black_box(&1e-3)));
        let mut sums = [s.splat(*black_box(&0.0)); 16];
        for _ in 0..STEPS {
            for sum in &mut sums[..S::ACCUMULATORS] {
                *sum = s.mul_add(*sum, w, x);
            }
        }
        for sum in sums {
            black_box(s.sum(sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuOptions, Isa};

    #[test]
    fn every_instruction_set_gives_rates_that_can_be_divided_by() {
        for isa in Isa::available() {
            let backend = CpuBackend::new(&CpuOptions { threads: 2, isa: Some(isa) }).unwrap();
            let Limits { bytes, mul_adds, .. } = backend.limits().unwrap();
            assert!(["f32", "int8"].iter().all(|kind| mul_adds.contains_key(*kind)), "{isa}: {mul_adds:?}");
            for rate in mul_adds.into_values().chain([bytes]) {
                assert!(rate.is_finite() && rate > 1e6, "{isa}: {rate}");
            }
        }
    }
}
