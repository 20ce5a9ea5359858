//! Which positions latent attention reads, where an indexer chooses them (DeepSeek-V3.2), or which entries of a pool
//! (DeepSeek-V4).
//!
//! Order: a head's product with a key is one chain over the features; it is taken as zero if it is less, and added with its weight
//! to those of the heads before it. So nothing depends on the rows that share a step. Of equal scores the earlier
//! one goes first.

use baton_device::{KvDtype, PoolKv, Rows};
use half::{bf16, f16};

use crate::cache::{AttentionPlan, BLOCK, Element, Plane};
use crate::isa::Dispatch;
use crate::kernels::gather::{Place, Transpose, widen};
use crate::kernels::scratch::with_scratch;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};
use crate::tensor::Tensor;

/// Scores that are kept at once, unless one row has more.
const MAX_SCORES: usize = 1 << 22;
/// Blocks of a row's context that one task scores.
const TASK_BLOCKS: usize = 64;
/// Those that are scored together: they share what it takes to bring queries from the second level of cache.
const TILE_BLOCKS: usize = 2;

/// How a step's rows choose.
pub(crate) struct Choice<'a> {
    pub(crate) q: &'a Tensor,
    pub(crate) weights: &'a Tensor,
    pub(crate) top_k: usize,
    pub(crate) keys: Keys<'a>,
}

/// What is scored.
#[derive(Clone, Copy)]
pub(crate) enum Keys<'a> {
    /// Positions, whose keys lie feature by feature.
    Positions(&'a Plane),
    /// Entries.
    Entries(&'a Plane, PoolKv),
}

impl Keys<'_> {
    /// How many of them a row sees.
    fn seen(&self, plan: &AttentionPlan, row: usize) -> usize {
        match self {
            Keys::Positions(_) => plan.position(row) + 1,
            Keys::Entries(_, pool) => pool.visible(plan.position(row)),
        }
    }

    /// Room for the scores of all that a row sees.
    fn room(&self, plan: &AttentionPlan, row: usize) -> usize {
        self.seen(plan, row).next_multiple_of(BLOCK)
    }
}

/// For each row of a step the positions or entries that it reads.
pub(crate) struct Chosen {
    top_k: usize,
    /// Of each row, which it is of those that do not read all that they see.
    which: Vec<Option<usize>>,
    /// As many as are read for each of those, ascending.
    positions: Vec<u32>,
    /// Numbers of so many positions' blocks, if any row reads them.
    blocks: Vec<u32>,
}

impl Chosen {
    /// By the scores of keys that are already written.
    pub(crate) fn new(engine: (&Pool, Dispatch), choice: &Choice<'_>, plan: &AttentionPlan) -> Self {
        let &Choice { top_k, keys, .. } = choice;
        let some: Vec<usize> = (0..plan.rows()).filter(|&row| keys.seen(plan, row) > top_k).collect();
        let mut which = vec![None; plan.rows()];
        some.iter().enumerate().for_each(|(i, &row)| which[row] = Some(i));
        let mut positions = vec![0; some.len() * top_k];
        let (mut rows, mut to, mut scores) = (&some[..], &mut positions[..], Vec::new());
        while !rows.is_empty() {
            let mut len = 0;
            let fitting = rows.iter().take_while(|row| {
                len += keys.room(plan, **row);
                len <= MAX_SCORES
            });
            let count = fitting.count().max(1);
            let (batch, of_batch);
            (batch, rows) = rows.split_at(count);
            (of_batch, to) = to.split_at_mut(count * top_k);
            choose(engine, choice, plan, batch, &mut scores, of_batch);
        }
        let blocks = if some.is_empty() { 0 } else { top_k.div_ceil(BLOCK) as u32 };
        Self { top_k, which, positions, blocks: (0..blocks).collect() }
    }

    /// Positions that a row reads, ascending; `None` if it reads all that it sees.
    pub(crate) fn of(&self, row: usize) -> Option<&[u32]> {
        self.which[row].map(|i| &self.positions[i * self.top_k..][..self.top_k])
    }

    /// Blocks of a context of what a row reads, one position behind the other.
    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Positions that a row reads at most.
    pub(crate) fn top_k(&self) -> usize {
        self.top_k
    }
}

/// Of some rows the positions that they read, `top_k` each.
fn choose(
    (pool, isa): (&Pool, Dispatch),
    choice: &Choice<'_>,
    plan: &AttentionPlan,
    rows: &[usize],
    scores: &mut Vec<f32>,
    positions: &mut [u32],
) {
    let &Choice { q, top_k, keys, .. } = choice;
    let len = |row: usize| keys.room(plan, row);
    scores.resize(rows.iter().map(|&row| len(row)).sum(), 0.0);
    let (compared, work) = (scores.len() * 8, scores.len() * q.cols());
    let mut rest = &mut scores[..];
    let parts = rows.iter().flat_map(|&row| {
        let own = rest.split_off_mut(..len(row)).expect("scores of all rows");
        let parts = (0..).step_by(TASK_BLOCKS).zip(own.chunks_mut(TASK_BLOCKS * BLOCK));
        parts.map(move |(first, scores)| (row, first, scores))
    });
    pool.each(parts, work, |_, (row, first, scores)| {
        let part = Scores { choice, plan, row, first, scores: scores.as_chunks_mut().0 };
        match keys {
            Keys::Positions(keys) => match keys.dtype {
                KvDtype::F32 => part.of_positions::<f32>(isa, keys),
                KvDtype::F16 => part.of_positions::<f16>(isa, keys),
                KvDtype::BF16 => part.of_positions::<bf16>(isa, keys),
                KvDtype::Int8 => part.of_positions::<i8>(isa, keys),
            },
            Keys::Entries(entries, kind) => part.of_entries(isa, entries, kind),
        }
    });
    let mut rest = &scores[..];
    let rows = rows.iter().zip(positions.chunks_exact_mut(top_k)).map(|(&row, positions)| {
        let own = rest.split_off(..len(row)).expect("scores of all rows");
        (&own[..keys.seen(plan, row)], positions)
    });
    pool.each(rows, compared, |_, (scores, positions)| largest(scores, positions));
}

/// Scores of a row for some of what it sees, 16 together.
struct Scores<'a> {
    choice: &'a Choice<'a>,
    plan: &'a AttentionPlan,
    row: usize,
    /// The first 16.
    first: usize,
    scores: &'a mut [[f32; BLOCK]],
}

impl Scores<'_> {
    fn of_positions<E: Element>(self, isa: Dispatch, keys: &Plane) {
        let (queries, weights) = (self.choice.q.row(self.row), self.choice.weights.row(self.row));
        let blocks = &self.plan.blocks(self.row)[self.first..];
        for (blocks, scores) in blocks.chunks(TILE_BLOCKS).zip(self.scores.chunks_mut(TILE_BLOCKS)) {
            let filled: [u32; TILE_BLOCKS] = std::array::from_fn(|b| blocks[b.min(blocks.len() - 1)]);
            let (columns, key_scales) =
                (filled.map(|block| keys.block::<E>(block, 0)), filled.map(|block| keys.scales(block, 0, 0)));
            isa.run(TileScores { queries, weights, columns, key_scales, scores });
        }
    }

    /// Entries lie one by one: they are brought side by side, which is cheap beside the products with all heads.
    fn of_entries(self, isa: Dispatch, entries: &Plane, pool: PoolKv) {
        let (queries, weights) = (self.choice.q.row(self.row), self.choice.weights.row(self.row));
        let (width, padded) = (queries.len() / weights.len(), entries.width);
        let (table, seen) = (self.plan.blocks(self.row), pool.visible(self.plan.position(self.row)));
        with_scratch((1 + TILE_BLOCKS) * BLOCK * padded, |scratch, _| {
            let (rows, columns) = scratch.as_chunks_mut().0.split_at_mut(padded);
            for (first, scores) in (self.first..).step_by(TILE_BLOCKS).zip(self.scores.chunks_mut(TILE_BLOCKS)) {
                for (block, columns) in (first..first + scores.len()).zip(columns.chunks_exact_mut(padded)) {
                    let numbers = block * BLOCK..seen.min((block + 1) * BLOCK);
                    let mut places = [Place::default(); BLOCK];
                    for (entry, place) in numbers.clone().zip(&mut places) {
                        let (block, slot) = pool.place(entry, BLOCK);
                        *place = Place { plane: 0, block: table[block], slot };
                    }
                    widen(isa, [entries; 2], padded / LANES, &places[..numbers.len()], rows);
                    isa.run(Transpose { rows, columns });
                }
                let columns = std::array::from_fn(|b| &columns[b * padded..][..width]);
                isa.run(TileScores { queries, weights, columns, key_scales: [None; TILE_BLOCKS], scores });
            }
        });
    }
}

/// Scores for the keys of some blocks, which lie feature by feature; where there are fewer blocks one is repeated.
struct TileScores<'a, E> {
    queries: &'a [f32],
    weights: &'a [f32],
    columns: [&'a [[E; LANES]]; TILE_BLOCKS],
    key_scales: [Option<&'a [f32; BLOCK]>; TILE_BLOCKS],
    /// Of those that there are.
    scores: &'a mut [[f32; BLOCK]],
}

impl<E: Element> Kernel for TileScores<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        if self.scores.len() == TILE_BLOCKS {
            self.blocks::<S, TILE_BLOCKS>(s);
        } else {
            self.blocks::<S, 1>(s);
        }
    }
}

impl<E: Element> TileScores<'_, E> {
    /// Those of the first `M` blocks: of as many heads at a time as the registers allow.
    #[inline(always)]
    fn blocks<S: Simd, const M: usize>(&mut self, s: S) {
        let (heads, mut head) = (self.weights.len(), 0);
        let mut totals = [s.splat(0.0); M];
        while head < heads {
            let left = heads - head;
            head += if S::ACCUMULATORS >= 16 && left >= 8 {
                self.heads::<S, 8, M>(s, head, &mut totals)
            } else if (S::ACCUMULATORS >= 16 || M == 1) && left >= 4 {
                self.heads::<S, 4, M>(s, head, &mut totals)
            } else if left >= 2 {
                self.heads::<S, 2, M>(s, head, &mut totals)
            } else {
                self.heads::<S, 1, M>(s, head, &mut totals)
            };
        }
        for (total, scores) in totals.into_iter().zip(&mut *self.scores) {
            s.store(total, scores);
        }
    }

    /// Adds those of `N` heads from `first` on; returns `N`.
    #[allow(clippy::needless_range_loop)] // iterators over sums would keep these in memory, not in registers
    #[inline(always)]
    fn heads<S: Simd, const N: usize, const M: usize>(&self, s: S, first: usize, totals: &mut [S::F32; M]) -> usize {
        let width = self.columns[0].len();
        let mut queries: [&[f32]; N] = [&[]; N];
        for n in 0..N {
            queries[n] = &self.queries[(first + n) * width..][..width];
        }
        let mut columns: [&[[E; LANES]]; M] = [&[]; M];
        for m in 0..M {
            columns[m] = &self.columns[m][..width];
        }
        let mut acc = [[s.splat(0.0); M]; N];
        for feature in 0..width {
            let mut column = [s.splat(0.0); M];
            for m in 0..M {
                // SAFETY: every slice was cut to `width`.
                column[m] = E::load(s, unsafe { columns[m].get_unchecked(feature) });
            }
            for n in 0..N {
                // SAFETY: as above.
                let query = s.splat(unsafe { *queries[n].get_unchecked(feature) });
                for m in 0..M {
                    acc[n][m] = s.mul_add(query, column[m], acc[n][m]);
                }
            }
        }
        for n in 0..N {
            let weight = s.splat(self.weights[first + n]);
            for m in 0..M {
                let mut product = acc[n][m];
                if let Some(scales) = self.key_scales[m] {
                    product = s.mul(product, s.load(scales));
                }
                totals[m] = s.mul_add(weight, s.at_least(product, s.splat(0.0)), totals[m]);
            }
        }
        N
    }
}

/// The positions of as many of the largest scores as there is room for, ascending; there are more scores.
fn largest(scores: &[f32], positions: &mut [u32]) {
    // Integers in the order of the numbers; no zero is below another.
    let order = |score: &f32| {
        let bits = (score + 0.0).to_bits() as i32;
        bits ^ ((bits >> 31) as u32 >> 1) as i32
    };
    with_scratch(scores.len(), |scratch, _| {
        let (orders, top_k) = (bytemuck::cast_slice_mut::<f32, i32>(scratch), positions.len());
        orders.iter_mut().zip(scores).for_each(|(to, score)| *to = order(score));
        let (_, &mut least, _) = orders.select_nth_unstable_by(top_k - 1, |a, b| b.cmp(a));
        let mut equal = orders[..top_k].iter().filter(|order| **order == least).count();
        let mut read = (0..).zip(scores).filter(|(_, score)| {
            let order = order(score);
            let is_next = order == least && equal > 0;
            equal -= usize::from(is_next);
            order > least || is_next
        });
        positions.fill_with(|| read.next().expect("as many as are largest").0);
    });
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
            let mut positions = vec![0; top_k];
            largest(&scores, &mut positions);
            assert_eq!(positions, expected, "{top_k}");
        }
    }
}
