//! Attention to a window of vectors and to pooled entries (DeepSeek-V4).
//!
//! What a row reads is a context of its own: the positions of its window, behind them the entries, all or those that were chosen,
//! in the order of [`super::context`]. A task takes some heads of a row.

use std::ops::Range;

use baton_device::PoolKv;

use crate::cache::{AttentionPlan, BLOCK, Plane};
use crate::isa::Dispatch;
use crate::kernels::chosen::Chosen;
use crate::kernels::context::{GROUP_LEN, PIECE, Queries, Sums, Walk};
use crate::kernels::gather::{Gathered, Place};
use crate::kernels::grouped::{self, Task, Work};
use crate::kernels::linear::Buffers;
use crate::pool::Pool;
use crate::simd::LANES;
use crate::tensor::{Target, Tensor};

/// Heads of a task: they share each piece of a row's context.
const TASK_HEADS: Range<usize> = 16..64;

/// What is read, and how.
pub(crate) struct Reading<'a> {
    /// Vectors of positions.
    pub(crate) rows: &'a Plane,
    /// Width of a vector before it is padded.
    pub(crate) width: usize,
    pub(crate) window: usize,
    /// Entries, unless none are read.
    pub(crate) entries: Option<(&'a Plane, PoolKv)>,
    /// Which of them.
    pub(crate) chosen: Option<&'a Chosen>,
    pub(crate) scale: f32,
    /// Of each head.
    pub(crate) sink: &'a [f32],
}

impl Reading<'_> {
    /// Positions and entries that a row reads.
    fn lens(&self, plan: &AttentionPlan, row: usize) -> [usize; 2] {
        let position = plan.position(row);
        let entries = self.entries.map_or(0, |(_, pool)| {
            let some = self.chosen.and_then(|chosen| chosen.of(row));
            some.map_or(pool.visible(position), <[u32]>::len)
        });
        [(position + 1).min(self.window), entries]
    }
}

/// Every row and head over vectors and entries already written.
pub(crate) fn attend(
    (pool, isa): (&Pool, Dispatch),
    q: &Tensor,
    reading: &Reading<'_>,
    plan: &AttentionPlan,
    out: &Target<'_>,
) {
    let (rows, heads) = (plan.rows(), reading.sink.len());
    let lens: Vec<usize> = (0..rows).map(|row| reading.lens(plan, row).iter().sum()).collect();
    let work = 2 * lens.iter().sum::<usize>() * heads * reading.rows.width;
    let most = lens.iter().copied().max().unwrap_or(0);
    let blocks: Vec<u32> = (0..most.div_ceil(BLOCK) as u32).collect();
    let task_heads = pool.share(rows * heads, work).clamp(TASK_HEADS.start, TASK_HEADS.end);
    let head_chunks = heads.div_ceil(task_heads);
    let tasks = rows * head_chunks;
    let task = |i: usize| {
        let (row, head) = (i / head_chunks, i % head_chunks * task_heads);
        let heads = head..heads.min(head + task_heads);
        HeadsOfRow { isa, q, reading, plan, row, heads, blocks: &blocks[..lens[row].div_ceil(BLOCK)] }
    };
    let groups = most.div_ceil(GROUP_LEN);
    let floats = rows * heads * reading.width;
    let work = Work { prepare: floats, walk: work, finish: floats * groups };
    // SAFETY: tasks differ in rows or in heads, and the caller alone has `out`.
    unsafe { grouped::run(pool, (tasks, groups), &work, task, out) };
}

/// Some heads of a row.
struct HeadsOfRow<'a> {
    isa: Dispatch,
    q: &'a Tensor,
    reading: &'a Reading<'a>,
    plan: &'a AttentionPlan,
    row: usize,
    heads: Range<usize>,
    /// Of its context.
    blocks: &'a [u32],
}

impl HeadsOfRow<'_> {
    /// Columns of the queries and of what comes of them.
    fn columns(&self) -> Range<usize> {
        self.heads.start * self.reading.width..self.heads.end * self.reading.width
    }
}

impl Task for HeadsOfRow<'_> {
    fn query_floats(&self) -> usize {
        self.columns().len()
    }

    fn sum_floats(&self) -> usize {
        Sums::floats(self.heads.len(), self.reading.rows.width)
    }

    fn scratch_floats(&self) -> usize {
        // A piece as keys and as values, and sums once more.
        2 * PIECE * BLOCK * self.reading.rows.width + self.sum_floats()
    }

    fn prepare(&self, queries: &mut [f32], _: &mut Buffers) {
        let q = &self.q.row(self.row)[self.columns()];
        queries.iter_mut().zip(q).for_each(|(scaled, q)| *scaled = q * self.reading.scale);
    }

    fn walk(&self, groups: Range<usize>, queries: &[f32], sums: &mut [f32], scratch: &mut [f32]) {
        let &Reading { rows, width, entries, chosen, .. } = self.reading;
        let (next, piece) = scratch.split_at_mut(self.sum_floats());
        let (keys, values) = piece.as_chunks_mut().0.split_at_mut(PIECE * rows.width);
        let [window, count] = self.reading.lens(self.plan, self.row);
        let (table, passing) = (self.plan.blocks(self.row), self.plan.passing(self.row));
        let first = self.plan.position(self.row) + 1 - window;
        let some = chosen.and_then(|chosen| chosen.of(self.row));
        let (entry_rows, pool) = entries.unwrap_or((rows, PoolKv { rate: 1, overlaps: false, index: None }));
        let place = |i: usize| {
            if i < window {
                let position = first + i;
                return Place { plane: 0, block: passing[position / BLOCK], slot: position % BLOCK };
            }
            let entry = some.map_or(i - window, |some| some[i - window] as usize);
            let (block, slot) = pool.place(entry, BLOCK);
            Place { plane: 1, block: table[block], slot }
        };
        let (planes, split, len) = ([rows, entry_rows], rows.width / LANES, window + count);
        let mut source = Gathered { planes, split, len, place, keys, values };
        let heads = self.heads.len();
        let [sums, next] = [sums, next].map(|sums| Sums::new(sums, heads, rows.width));
        let queries = Queries { data: queries, heads, width, position: len - 1, window: usize::MAX, softcap: None };
        let groups = groups.start..groups.end.min(len.div_ceil(GROUP_LEN));
        Walk { queries, blocks: self.blocks, groups, sums, next }.run(self.isa, &mut source);
    }

    unsafe fn finish(&self, sums: &mut [f32], _: &mut [f32], _: &mut Buffers, out: &Target<'_>) {
        let mut sums = Sums::of_groups(self.isa, sums, self.heads.len(), self.reading.rows.width);
        // SAFETY: the caller's obligation.
        let out = unsafe { out.part(self.row, self.columns()) };
        sums.sink(self.isa, &self.reading.sink[self.heads.clone()]);
        sums.finish(self.isa, 0, out, self.reading.width);
    }
}
