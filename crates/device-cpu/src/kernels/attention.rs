//! Attention of one row over its cached context, with softmax taken online (arXiv 2205.14135).
//!
//! Order: pieces of 64 positions from position 0 on. The scores of a piece give their maximum, then
//! their weights, which rescale what was summed before; values are added position by position.
//! A window leaves pieces and positions out but moves no border. Nothing depends on which step wrote
//! a position.

use std::ops::Range;

use baton_device::AttentionParams;

use crate::cache::{AttentionPlan, BLOCK, Plane};
use crate::isa::Dispatch;
use crate::kernels::latent::with_scratch;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};
use crate::tensor::{Target, Tensor};

/// Blocks of a piece.
const PIECE: usize = 4;
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
    let AttentionParams { heads, kv_heads, head_dim, scale, window, softcap } = *params;
    let group = heads / kv_heads;
    let work = 2 * plan.context(window) * heads * head_dim;
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
                let position = plan.position(row);
                let visible = params.first_visible(position)..position + 1;
                isa.run(Attend { query, keys, values, head: kv_head, blocks, visible, softcap, out: mixed });
                // SAFETY: each task has its own row and heads.
                unsafe { out.part(row, cols) }.copy_from_slice(&mixed[..head_dim]);
            }
        });
    });
}

/// `out = softmax(query·Kᵀ)·V` for one query over the visible positions, all widths padded.
pub(crate) struct Attend<'a> {
    /// As wide as the rows of `keys`, already scaled.
    pub(crate) query: &'a [f32],
    pub(crate) keys: &'a Plane,
    /// Its rows may be wider than `out`: values are their first columns.
    pub(crate) values: &'a Plane,
    /// Head within the planes.
    pub(crate) head: usize,
    /// Those of positions `0..visible.end`.
    pub(crate) blocks: &'a [u32],
    /// Not empty.
    pub(crate) visible: Range<usize>,
    /// Bounds the scores.
    pub(crate) softcap: Option<f32>,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let query = self.query.as_chunks::<LANES>().0;
        let out = self.out.as_chunks_mut::<LANES>().0;
        out.fill([0.0; LANES]);
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
        let first_piece = self.visible.start / (PIECE * BLOCK);
        for (piece, blocks) in self.blocks.chunks(PIECE).enumerate().skip(first_piece) {
            let start = piece * PIECE * BLOCK;
            // Of this piece, those that are visible.
            let positions = self.visible.start.saturating_sub(start)..(self.visible.end - start).min(PIECE * BLOCK);
            let mut weights = [[0.0; BLOCK]; PIECE];
            let weights = &mut weights[..blocks.len()];
            for (b, (scores, &block)) in weights.iter_mut().zip(blocks).enumerate() {
                let keys = self.keys.block(block, self.head).as_chunks().0;
                products(s, query, keys, within_block(&positions, b), scores);
                if let Some(cap) = self.softcap {
                    s.store(s.softcap(s.load(scores), cap), scores);
                }
            }
            fill_outside(weights, &positions, f32::NEG_INFINITY);

            let piece_max = weights.iter().fold(s.splat(max), |max, scores| s.at_least(s.load(scores), max));
            let piece_max = s.max(piece_max);
            let decay = if piece_max == max { 1.0 } else { exp(s, max - piece_max) };
            max = piece_max;
            for scores in weights.iter_mut() {
                s.store(s.exp(s.sub(s.load(scores), s.splat(max))), scores);
            }
            fill_outside(weights, &positions, 0.0);
            let total = weights.iter().fold(s.splat(0.0), |total, weights| s.add(total, s.load(weights)));
            sum = sum * decay + s.sum(total);

            let mix = Mix { values: self.values, head: self.head, blocks, weights, positions: &positions, decay };
            let mut first = 0;
            while first < out.len() {
                if out.len() - first >= STRIPE {
                    mix.add_to::<S, STRIPE>(s, out, first);
                    first += STRIPE;
                } else {
                    mix.add_to::<S, 1>(s, out, first);
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

/// Of a piece's `positions`, those in its block `b`, counted from the block's start; perhaps none.
#[inline(always)]
fn within_block(positions: &Range<usize>, b: usize) -> Range<usize> {
    let local = |position: usize| position.saturating_sub(b * BLOCK).min(BLOCK);
    local(positions.start)..local(positions.end)
}

#[inline(always)]
fn fill_outside(weights: &mut [[f32; BLOCK]], positions: &Range<usize>, value: f32) {
    let weights = weights.as_flattened_mut();
    weights[..positions.start].fill(value);
    weights[positions.end..].fill(value);
}

/// Products of the query with a block's keys, by fours: those outside `positions` are unspecified.
#[inline(always)]
fn products<S: Simd>(
    s: S,
    query: &[[f32; LANES]],
    keys: &[[f32; LANES]],
    positions: Range<usize>,
    products: &mut [f32; BLOCK],
) {
    let width = query.len();
    for (i, four) in products.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        if 4 * i >= positions.end || 4 * i + 4 <= positions.start {
            continue;
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
}

/// The values of a piece, weighted.
struct Mix<'a> {
    values: &'a Plane,
    head: usize,
    blocks: &'a [u32],
    weights: &'a [[f32; BLOCK]],
    positions: &'a Range<usize>,
    decay: f32,
}

impl Mix<'_> {
    /// `out = out * decay + Σ_j weights[j] * values[j]` on `N` vectors of columns from `first` on.
    #[inline(always)]
    fn add_to<S: Simd, const N: usize>(&self, s: S, out: &mut [[f32; LANES]], first: usize) {
        let out = &mut out[first..][..N];
        let stride = self.values.width / LANES;
        let mut acc = [s.splat(0.0); N];
        for n in 0..N {
            acc[n] = s.mul(s.load(&out[n]), s.splat(self.decay));
        }
        for (b, (weights, &block)) in self.weights.iter().zip(self.blocks).enumerate() {
            let values = self.values.block(block, self.head).as_chunks().0;
            let positions = within_block(self.positions, b);
            let rows = values[positions.start * stride..].chunks_exact(stride);
            for (row, &weight) in rows.zip(&weights[positions]) {
                let (row, weight) = (&row[first..][..N], s.splat(weight));
                for n in 0..N {
                    acc[n] = s.mul_add(weight, s.load(&row[n]), acc[n]);
                }
            }
        }
        for n in 0..N {
            s.store(acc[n], &mut out[n]);
        }
    }
}

/// `e^x` for x ≤ 0, and 0 for the infinity that a maximum starts from.
#[inline(always)]
fn exp<S: Simd>(s: S, x: f32) -> f32 {
    if x == f32::NEG_INFINITY {
        return 0.0;
    }
    let mut lanes = [0.0; LANES];
    s.store(s.exp(s.splat(x)), &mut lanes);
    lanes[0]
}
