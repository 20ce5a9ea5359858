//! Attention of one row over its cached context, with softmax taken online (arXiv 2205.14135).
//!
//! Order: blocks of 16 positions from position 0 on. A block's 16 scores give their maximum, then
//! their weights; what was summed before is rescaled only if the maximum grew (a factor of 1 changes
//! no bit); values are added position by position. Nothing depends on which step wrote a position.

use baton_device::AttentionParams;

use crate::cache::{AttentionPlan, BLOCK, Plane};
use crate::isa::Dispatch;
use crate::kernels::latent::with_scratch;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};
use crate::tensor::{Target, Tensor};

/// Values computed together: vectors of 16 columns.
const STRIPE: usize = 4;

/// Every row and head over keys and values already written.
#[allow(clippy::too_many_arguments)] // where to run, three inputs, their shape, one output
pub(crate) fn attend(
    pool: &Pool,
    isa: Dispatch,
    q: &Tensor,
    (keys, values): (&Plane, &Plane),
    plan: &AttentionPlan,
    params: &AttentionParams,
    out: &Target<'_>,
) {
    let AttentionParams { heads, kv_heads, head_dim, scale } = *params;
    let group = heads / kv_heads;
    let work = 2 * plan.context() * heads * head_dim;
    pool.run(plan.rows() * kv_heads, work, |task| {
        let (row, kv_head) = (task / kv_heads, task % kv_heads);
        with_scratch(2 * keys.width, |scratch, _| {
            let (query, mixed) = scratch.split_at_mut(keys.width);
            for head in kv_head * group..(kv_head + 1) * group {
                let cols = head * head_dim..(head + 1) * head_dim;
                for (scaled, q) in query.iter_mut().zip(&q.row(row)[cols.clone()]) {
                    *scaled = q * scale;
                }
                let blocks = plan.blocks(row);
                let len = plan.position(row) + 1;
                isa.run(Attend { query, keys, values, head: kv_head, blocks, len, out: mixed });
                // SAFETY: each task has its own row and heads.
                unsafe { out.part(row, cols) }.copy_from_slice(&mixed[..head_dim]);
            }
        });
    });
}

/// `out = softmax(query·Kᵀ)·V` for one query over positions `0..len`, all widths padded.
pub(crate) struct Attend<'a> {
    /// As wide as the rows of `keys`, already scaled.
    pub(crate) query: &'a [f32],
    pub(crate) keys: &'a Plane,
    /// Its rows may be wider than `out`: values are their first columns.
    pub(crate) values: &'a Plane,
    /// Head within the planes.
    pub(crate) head: usize,
    pub(crate) blocks: &'a [u32],
    pub(crate) len: usize,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let query = self.query.as_chunks::<LANES>().0;
        let out = self.out.as_chunks_mut::<LANES>().0;
        out.fill([0.0; LANES]);
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
        for (b, &block) in self.blocks.iter().enumerate() {
            let positions = (self.len - b * BLOCK).min(BLOCK);
            let mut weights = scores(s, query, self.keys.block(block, self.head), positions);
            let block_max = weights[..positions].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut decay = 1.0;
            if block_max > max {
                decay = exp(s, max - block_max);
                max = block_max;
            }
            let mut v = s.exp(s.sub(s.load(&weights), s.splat(max)));
            s.store(v, &mut weights);
            if positions < BLOCK {
                weights[positions..].fill(0.0);
                v = s.load(&weights);
            }
            sum = sum * decay + s.sum(v);
            let values = self.values.block(block, self.head).as_chunks::<LANES>().0;
            let stride = self.values.width / LANES;
            let mut first = 0;
            while first < out.len() {
                if out.len() - first >= STRIPE {
                    mix::<S, STRIPE>(s, &weights[..positions], &values[first..], stride, decay, &mut out[first..]);
                    first += STRIPE;
                } else {
                    mix::<S, 1>(s, &weights[..positions], &values[first..], stride, decay, &mut out[first..]);
                    first += 1;
                }
            }
        }
        let inverse = s.splat(1.0 / sum);
        for out in out {
            s.store(s.mul(s.load(out), inverse), out);
        }
    }
}

/// Products of the query with the keys of a block's first positions; the rest is unspecified.
#[inline(always)]
fn scores<S: Simd>(s: S, query: &[[f32; LANES]], keys: &[f32], positions: usize) -> [f32; BLOCK] {
    let keys = keys.as_chunks::<LANES>().0;
    let mut scores = [0.0; BLOCK];
    let width = query.len();
    for (i, four) in scores.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        if 4 * i >= positions {
            break;
        }
        let rows: [_; 4] = std::array::from_fn(|j| &keys[(4 * i + j) * width..][..width]);
        let mut acc = [s.splat(0.0); 4];
        for (c, query) in query.iter().enumerate() {
            let query = s.load(query);
            for j in 0..4 {
                acc[j] = s.mul_add(query, s.load(&rows[j][c]), acc[j]);
            }
        }
        *four = s.sums(acc);
    }
    scores
}

/// `out = out * decay + Σ_j weights[j] * values[j]` on `N` vectors of columns.
#[inline(always)]
fn mix<S: Simd, const N: usize>(
    s: S,
    weights: &[f32],
    values: &[[f32; LANES]],
    stride: usize,
    decay: f32,
    out: &mut [[f32; LANES]],
) {
    let mut acc = [s.splat(0.0); N];
    for n in 0..N {
        acc[n] = s.mul(s.load(&out[n]), s.splat(decay));
    }
    for (j, &weight) in weights.iter().enumerate() {
        let weight = s.splat(weight);
        let row = &values[j * stride..][..N];
        for n in 0..N {
            acc[n] = s.mul_add(weight, s.load(&row[n]), acc[n]);
        }
    }
    for n in 0..N {
        s.store(acc[n], &mut out[n]);
    }
}

#[inline(always)]
fn exp<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(s.exp(s.splat(x)), &mut lanes);
    lanes[0]
}
