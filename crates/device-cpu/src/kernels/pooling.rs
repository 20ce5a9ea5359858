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
    let sequences: Vec<Range<usize>> = plan.runs(0..plan.rows(), usize::MAX).collect();
    let mut states: Vec<f32> = sequences.iter().flat_map(|rows| state(plan, rows.start, kind, kv)).collect();
    // Rows that complete an entry.
    let closing: Vec<usize> =
        (0..plan.rows()).filter(|&row| (plan.position(row) + 1).is_multiple_of(kind.rate)).collect();
    let mut entries = vec![0.0; closing.len() * stride];

    let vectors = stride / LANES;
    let work = plan.rows() * kind.series() * stride * WORK;
    let chunk = pool.share(sequences.len() * vectors, work).clamp(1, vectors);
    let chunks = vectors.div_ceil(chunk);
    let targets = [&mut states[..], &mut kv.sums, &mut entries].map(|data| Target::new(data, stride));
    let step = Step { isa, pooling, kind, plan, width, closing: &closing, targets };
    pool.run(sequences.len() * chunks, work, |task| {
        let (sequence, vector) = (task / chunks, task % chunks * chunk);
        let features = vector * LANES..stride.min((vector + chunk) * LANES);
        // SAFETY: tasks differ in sequences or in features, and the plan has no two sequences that write one passing block.
        unsafe { step.run(sequence, sequences[sequence].clone(), features) };
    });

    let first = |row: usize| plan.position(row) + 1 - kind.rate;
    pool.each(entries.chunks_exact_mut(stride).zip(&closing), closing.len() * width * WORK, |_, (entry, &row)| {
        let entry = &mut entry[..width];
        isa.run(RmsNorm { x: entry, weight: pooling.norm, eps: pooling.eps });
        isa.run(Rotate { row: entry, layout: pooling.layout, table: pooling.table, position: first(row) });
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

/// What tasks have in common.
struct Step<'a> {
    isa: Dispatch,
    pooling: &'a Pooling<'a, CpuBackend>,
    kind: PoolKv,
    plan: &'a AttentionPlan,
    width: usize,
    /// Rows that complete an entry.
    closing: &'a [usize],
    /// Sums that sequences begin with, `[sequences, series, PARTS]`; of blocks, `[blocks, series, PARTS]`; completed entries.
    targets: [Target<'a>; 3],
}

impl Step<'_> {
    /// Takes some features of a sequence through its rows.
    ///
    /// # Safety
    /// Nobody else has these features of the sequence's sums, of its blocks, or of its entries meanwhile. No two sequences write
    /// one block.
    unsafe fn run<'s>(&'s self, sequence: usize, rows: Range<usize>, features: Range<usize>) {
        let Self { pooling, plan, targets: [states, blocks, entries], .. } = self;
        let &Self { isa, kind, width, .. } = self;
        let sums = kind.series() * PARTS;
        // SAFETY: the caller's obligation, here and below.
        let part = |target: &'s Target<'s>, row: usize| unsafe { target.part(row, features.clone()) };
        let mut state: Vec<&mut [f32]> = (0..sums).map(|i| part(states, sequence * sums + i)).collect();
        let mut entry = self.closing.partition_point(|row| *row < rows.start);
        for row in rows.clone() {
            let place = plan.position(row) % kind.rate;
            let bias = &pooling.bias[place * kind.series() * width..];
            // The sums of the entry that is completed next take the last series, those of the one behind it the first.
            for (sums, series) in state.chunks_exact_mut(PARTS).zip((0..kind.series()).rev()) {
                let [max, sum, mixed] = sums else { unreachable!("{PARTS} of them") };
                let own = series * width + features.start..series * width + width.min(features.end);
                let (values, gates) = (&pooling.values.row(row)[own.clone()], &pooling.gates.row(row)[own.clone()]);
                isa.run(Accumulate { values, gates, bias: &bias[own], max, sum, mixed });
            }
            if place + 1 == kind.rate {
                isa.run(Close { sum: &*state[1], mixed: &*state[2], out: part(entries, entry) });
                entry += 1;
                // The sums of the next entry become those of this one, and then there are none.
                let (this, next) = state.split_at_mut(PARTS);
                this.iter_mut().zip(&*next).for_each(|(this, next)| this.copy_from_slice(next));
                let empty = if next.is_empty() { this } else { next };
                empty[0].fill(f32::NEG_INFINITY);
                empty[1..].iter_mut().for_each(|sums| sums.fill(0.0));
            }
            if (plan.position(row) + 1).is_multiple_of(BLOCK) || row + 1 == rows.end {
                let block = plan.passing_slot(row).0 as usize;
                state.iter().enumerate().for_each(|(i, state)| part(blocks, block * sums + i).copy_from_slice(state));
            }
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
