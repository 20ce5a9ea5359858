//! Which positions latent attention reads, where an indexer chooses them (DeepSeek-V3.2).
//!
//! Order: a head's product with a key is one chain over the features; it is scaled, taken as zero if it is less, and added with
//! its weight to those of the heads before it. So nothing depends on the rows that share a step. Of equal scores the earlier
//! position's goes first.

use baton_device::{Indexer, KvDtype, Rows};
use half::{bf16, f16};

use crate::CpuBackend;
use crate::cache::{AttentionPlan, BLOCK, Element, Plane};
use crate::isa::Dispatch;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};

/// Scores that are kept at once, unless one row has more.
const MAX_SCORES: usize = 1 << 22;
/// Blocks of a row's context that one task scores.
const TASK_BLOCKS: usize = 64;

/// For each row of a step the positions that it reads.
pub(crate) struct Chosen {
    top_k: usize,
    /// Ascending; empty for a row that reads all that it sees.
    rows: Vec<Vec<u32>>,
}

impl Chosen {
    /// By the scores of keys that are already written.
    pub(crate) fn new(
        (pool, isa): (&Pool, Dispatch),
        indexer: &Indexer<'_, CpuBackend>,
        keys: &Plane,
        plan: &AttentionPlan,
    ) -> Self {
        let top_k = indexer.top_k;
        let mut rows = vec![Vec::new(); plan.rows()];
        let mut some: Vec<_> = rows.iter_mut().enumerate().filter(|(row, _)| plan.position(*row) >= top_k).collect();
        let mut rest = &mut some[..];
        while let Some((first, _)) = rest.first() {
            let mut scores = plan.blocks(*first).len() * BLOCK;
            let more = rest[1..].iter().take_while(|(row, _)| {
                scores += plan.blocks(*row).len() * BLOCK;
                scores <= MAX_SCORES
            });
            let count = 1 + more.count();
            let batch;
            (batch, rest) = rest.split_at_mut(count);
            choose((pool, isa), indexer, keys, plan, batch);
        }
        Self { top_k, rows }
    }

    /// Positions that a row reads, ascending; `None` if it reads all that it sees.
    pub(crate) fn of(&self, row: usize) -> Option<&[u32]> {
        Some(&self.rows[row][..]).filter(|positions| !positions.is_empty())
    }

    /// Positions that a row reads at most.
    pub(crate) fn top_k(&self) -> usize {
        self.top_k
    }
}

fn choose(
    (pool, isa): (&Pool, Dispatch),
    indexer: &Indexer<'_, CpuBackend>,
    keys: &Plane,
    plan: &AttentionPlan,
    rows: &mut [(usize, &mut Vec<u32>)],
) {
    let mut scores: Vec<_> = rows.iter().map(|(row, _)| vec![0.0; plan.blocks(*row).len() * BLOCK]).collect();
    let work = scores.iter().map(Vec::len).sum::<usize>() * indexer.q.cols();
    let numbers: Vec<usize> = rows.iter().map(|(row, _)| *row).collect();
    let parts = numbers.iter().zip(&mut scores).flat_map(|(&row, scores)| {
        let blocks = plan.blocks(row).chunks(TASK_BLOCKS);
        blocks.zip(scores.chunks_mut(TASK_BLOCKS * BLOCK)).map(move |(blocks, scores)| (row, blocks, scores))
    });
    pool.each(parts, work, |_, (row, blocks, scores)| {
        let scores = scores.as_chunks_mut().0;
        let part = Scores { indexer, row, keys, blocks, scores };
        match keys.dtype {
            KvDtype::F32 => part.of::<f32>(isa),
            KvDtype::F16 => part.of::<f16>(isa),
            KvDtype::BF16 => part.of::<bf16>(isa),
            KvDtype::Int8 => part.of::<i8>(isa),
        }
    });
    let compared = scores.iter().map(Vec::len).sum::<usize>() * 8;
    pool.each(rows.iter_mut().zip(&scores), compared, |_, ((row, positions), scores)| {
        **positions = largest(&scores[..=plan.position(*row)], indexer.top_k);
    });
}

/// Scores of a row for the positions of some blocks.
struct Scores<'a> {
    indexer: &'a Indexer<'a, CpuBackend>,
    row: usize,
    keys: &'a Plane,
    blocks: &'a [u32],
    scores: &'a mut [[f32; BLOCK]],
}

impl Scores<'_> {
    fn of<E: Element>(self, isa: Dispatch) {
        let Indexer { q, weights, scale, .. } = *self.indexer;
        let (queries, weights) = (q.row(self.row), weights.row(self.row));
        for (&block, scores) in self.blocks.iter().zip(self.scores) {
            let (columns, key_scales) = (self.keys.block::<E>(block, 0), self.keys.scales(block, 0, 0));
            isa.run(BlockScores { queries, weights, scale, columns, key_scales, scores });
        }
    }
}

/// Scores for the positions of one block, whose keys lie feature by feature.
struct BlockScores<'a, E> {
    queries: &'a [f32],
    weights: &'a [f32],
    scale: f32,
    columns: &'a [[E; LANES]],
    key_scales: Option<&'a [f32; BLOCK]>,
    scores: &'a mut [f32; BLOCK],
}

impl<E: Element> Kernel for BlockScores<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (heads, mut head) = (self.weights.len(), 0);
        let mut total = s.splat(0.0);
        while head < heads {
            head += if S::ACCUMULATORS >= 16 && heads - head >= 8 {
                self.heads::<S, 8>(s, head, &mut total)
            } else if heads - head >= 4 {
                self.heads::<S, 4>(s, head, &mut total)
            } else {
                self.heads::<S, 1>(s, head, &mut total)
            };
        }
        s.store(total, self.scores);
    }
}

impl<E: Element> BlockScores<'_, E> {
    /// Adds those of `N` heads from `first` on; returns `N`.
    #[allow(clippy::needless_range_loop)] // iterators over sums would keep these in memory, not in registers
    #[inline(always)]
    fn heads<S: Simd, const N: usize>(&self, s: S, first: usize, total: &mut S::F32) -> usize {
        let width = self.columns.len();
        let mut queries: [&[f32]; N] = [&[]; N];
        for n in 0..N {
            queries[n] = &self.queries[(first + n) * width..][..width];
        }
        let mut acc = [s.splat(0.0); N];
        for feature in 0..width {
            let column = E::load(s, &self.columns[feature]);
            for n in 0..N {
                acc[n] = s.mul_add(s.splat(queries[n][feature]), column, acc[n]);
            }
        }
        for n in 0..N {
            let mut product = s.mul(acc[n], s.splat(self.scale));
            if let Some(scales) = self.key_scales {
                product = s.mul(product, s.load(scales));
            }
            *total = s.mul_add(s.splat(self.weights[first + n]), s.at_least(product, s.splat(0.0)), *total);
        }
        N
    }
}

/// Positions of the `top_k` largest scores, of which there are more; ascending.
fn largest(scores: &[f32], top_k: usize) -> Vec<u32> {
    // Integers in the order of the numbers; no zero is below another.
    let order = |score: &f32| {
        let bits = (score + 0.0).to_bits() as i32;
        bits ^ ((bits >> 31) as u32 >> 1) as i32
    };
    let mut orders: Vec<i32> = scores.iter().map(order).collect();
    let (_, &mut least, _) = orders.select_nth_unstable_by(top_k - 1, |a, b| b.cmp(a));
    let larger = orders[..top_k].iter().filter(|order| **order > least).count();
    let mut equal = top_k - larger;
    let mut positions = Vec::with_capacity(top_k);
    for (position, score) in (0..).zip(scores) {
        let order = order(score);
        if order > least {
            positions.push(position);
        } else if order == least && equal > 0 {
            equal -= 1;
            positions.push(position);
        }
    }
    positions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_scores_the_earlier_positions_go_first_and_a_zero_is_a_zero() {
        let scores = [0.0, -1.0, 2.0, -0.0, 0.0, 2.0, -3.0, 1.0];
        for (top_k, expected) in [
            (1, vec![2]),
            (2, vec![2, 5]),
            (3, vec![2, 5, 7]),
            (4, vec![0, 2, 5, 7]),
            (5, vec![0, 2, 3, 5, 7]),
            (7, vec![0, 1, 2, 3, 4, 5, 7]),
        ] {
            assert_eq!(largest(&scores, top_k), expected, "{top_k}");
        }
    }
}
