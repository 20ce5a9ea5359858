//! Pools of tokens: running sums token by token, and the entries that they complete (DeepSeek-V4).
//!
//! Order: each feature on its own takes the tokens of a sequence one after the other. A gate larger than those before it rescales
//! what they summed; else it is rescaled. So nothing depends on the step that brings a token.

use std::ops::Range;

use baton_device::{PoolKv, Pooling};

use crate::CpuBackend;
use crate::cache::{AttentionPlan, BLOCK, EntryKv, PARTS};
use crate::isa::Dispatch;
use crate::kernels::rope::Rotate;
use crate::kernels::rows::RmsNorm;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};
use crate::tensor::Target;

/// Rough multiply-adds of a token and feature, of which most are of two exponentials.
const WORK: usize = 40;

/// Adds the rows of a step to a pool, and writes the entries that they complete.
pub(crate) fn add(
    (pool, isa): (&Pool, Dispatch),
    pooling: &Pooling<'_, CpuBackend>,
    kind: PoolKv,
    kv: &mut EntryKv,
    plan: &AttentionPlan,
) {
    let (width, stride) = (kv.width, kv.rows.width);
    let state_rows = kind.series() * PARTS;
    let sequences: Vec<Range<usize>> = plan.runs(0..plan.rows(), usize::MAX).collect();
    let mut states: Vec<f32> =
        sequences.iter().flat_map(|rows| state(plan, rows.start, kind, kv).into_iter()).collect();
    // Rows that complete an entry, and how many before each sequence.
    let closing: Vec<usize> =
        (0..plan.rows()).filter(|&row| (plan.position(row) + 1).is_multiple_of(kind.rate)).collect();
    let before: Vec<usize> = sequences.iter().map(|rows| closing.partition_point(|row| *row < rows.start)).collect();
    let mut entries = vec![0.0; closing.len() * stride];

    let vectors = stride / LANES;
    let work = plan.rows() * kind.series() * stride * WORK;
    let chunk = pool.share(sequences.len() * vectors, work).clamp(1, vectors);
    let chunks = vectors.div_ceil(chunk);
    let (states, sums) = (Target::new(&mut states, stride), Target::new(&mut kv.sums, stride));
    let targets = Target::new(&mut entries, stride);
    pool.run(sequences.len() * chunks, work, |task| {
        let (sequence, vector) = (task / chunks, task % chunks * chunk);
        let features = vector * LANES..stride.min((vector + chunk) * LANES);
        let columns = features.start..width.min(features.end);
        // SAFETY: tasks differ in sequences or in features, here and below, and sequences write no block of another.
        let mut state: Vec<&mut [f32]> =
            (0..state_rows).map(|i| unsafe { states.part(sequence * state_rows + i, features.clone()) }).collect();
        let mut entry = before[sequence];
        let rows = sequences[sequence].clone();
        for row in rows.clone() {
            let (position, place) = (plan.position(row), plan.position(row) % kind.rate);
            // The last series is of the token's own entry, whose sums come first; one before it of the next entry.
            for (sums, series) in state.chunks_exact_mut(PARTS).zip((0..kind.series()).rev()) {
                let [max, sum, mixed] = sums else { unreachable!("{PARTS} of them") };
                let own = series * width + columns.start..series * width + columns.end;
                let bias = &pooling.bias[place * kind.series() * width..];
                isa.run(Accumulate {
                    values: &pooling.values.row(row)[own.clone()],
                    gates: &pooling.gates.row(row)[own.clone()],
                    bias: &bias[own],
                    max,
                    sum,
                    mixed,
                });
            }
            if place + 1 == kind.rate {
                // SAFETY: as above.
                let out = unsafe { targets.part(entry, features.clone()) };
                isa.run(Close { sum: &*state[1], mixed: &*state[2], out });
                entry += 1;
                let (first, next) = state.split_at_mut(PARTS);
                let last = if let [_, ..] = next {
                    first.iter_mut().zip(&*next).for_each(|(first, next)| first.copy_from_slice(next));
                    next
                } else {
                    first
                };
                last[0].fill(f32::NEG_INFINITY);
                last[1..].iter_mut().for_each(|sums| sums.fill(0.0));
            }
            if (position + 1).is_multiple_of(BLOCK) || row + 1 == rows.end {
                let block = plan.passing_slot(row).0 as usize;
                for (i, state) in state.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { sums.part(block * state_rows + i, features.clone()) }.copy_from_slice(state);
                }
            }
        }
    });

    let position = |row: usize| plan.position(row) + 1 - kind.rate;
    pool.each(entries.chunks_exact_mut(stride).zip(&closing), closing.len() * width * WORK, |_, (entry, &row)| {
        let entry = &mut entry[..width];
        isa.run(RmsNorm { x: entry, weight: pooling.norm, eps: pooling.eps });
        isa.run(Rotate { row: entry, layout: pooling.layout, table: pooling.table, position: position(row) });
    });
    for (entry, &row) in entries.chunks_exact(stride).zip(&closing) {
        let (block, slot) = kind.place(plan.position(row) / kind.rate, BLOCK);
        kv.rows.put((plan.blocks(row)[block], slot), 0, 0, &entry[..width]);
    }
}

/// The sums before a row.
fn state(plan: &AttentionPlan, row: usize, kind: PoolKv, kv: &EntryKv) -> Vec<f32> {
    let len = kind.series() * PARTS * kv.rows.width;
    match plan.position(row).checked_sub(1) {
        Some(position) => {
            let block = plan.passing(row)[position / BLOCK] as usize;
            kv.sums[block * len..][..len].to_vec()
        }
        None => {
            let mut state = vec![0.0; len];
            for sums in state.chunks_exact_mut(PARTS * kv.rows.width) {
                sums[..kv.rows.width].fill(f32::NEG_INFINITY);
            }
            state
        }
    }
}

/// Adds a token to some features of the sums of an entry.
struct Accumulate<'a> {
    values: &'a [f32],
    gates: &'a [f32],
    bias: &'a [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    mixed: &'a mut [f32],
}

impl Kernel for Accumulate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let tokens = self.values.chunks(LANES).zip(self.gates.chunks(LANES)).zip(self.bias.chunks(LANES));
        let sums = self.max.as_chunks_mut().0.iter_mut().zip(self.sum.as_chunks_mut().0);
        let sums = sums.zip(self.mixed.as_chunks_mut().0);
        for (((value, gate), bias), ((max, sum), mixed)) in tokens.zip(sums) {
            let (value, gate) = (s.load_first(value), s.add(s.load_first(gate), s.load_first(bias)));
            let old = s.load(max);
            let new = s.at_least(gate, old);
            let (before, now) = (s.exp(s.sub(old, new)), s.exp(s.sub(gate, new)));
            s.store(new, max);
            s.store(s.mul_add(s.load(sum), before, now), sum);
            s.store(s.mul_add(s.load(mixed), before, s.mul(now, value)), mixed);
        }
    }
}

/// `out = mixed / sum`.
struct Close<'a> {
    sum: &'a [f32],
    mixed: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Close<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let sums = self.sum.as_chunks().0.iter().zip(self.mixed.as_chunks().0);
        for ((sum, mixed), out) in sums.zip(self.out.as_chunks_mut().0) {
            s.store(s.div(s.load(mixed), s.load(sum)), out);
        }
    }
}
