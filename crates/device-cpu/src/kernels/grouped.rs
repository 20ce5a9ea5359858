//! How the tasks of an attention run: each through the whole of its context, or, where there are too few of them for the threads, each group
//! of a context by whoever is free, and the groups merged afterwards.
//!
//! Both add in the order of [`super::context`], so they give the same bits.

use std::ops::Range;

use crate::kernels::linear::Buffers;
use crate::kernels::scratch::with_scratch;
use crate::pool::Pool;
use crate::simd::LANES;
use crate::tensor::Target;

/// Some queries over the context that they read.
pub(crate) trait Task {
    /// Floats of the queries as they meet the keys.
    fn query_floats(&self) -> usize;

    /// Floats of the sums over one group.
    fn sum_floats(&self) -> usize;

    /// Floats that [`Task::walk`] and [`Task::finish`] need besides.
    fn scratch_floats(&self) -> usize;

    /// Writes the queries.
    fn prepare(&self, queries: &mut [f32], buffers: &mut Buffers);

    /// Replaces `sums` by those of some groups of the context, one group's, or more merged into one.
    fn walk(&self, groups: Range<usize>, queries: &[f32], sums: &mut [f32], scratch: &mut [f32]);

    /// Merges sums, as many as there are in `sums`, and writes the task's part of `out`.
    ///
    /// # Safety
    /// Nobody else reads or writes that part of `out` meanwhile.
    unsafe fn finish(&self, sums: &mut [f32], scratch: &mut [f32], buffers: &mut Buffers, out: &Target<'_>);
}

/// Multiply-adds of all tasks together.
pub(crate) struct Work {
    pub(crate) prepare: usize,
    pub(crate) walk: usize,
    pub(crate) finish: usize,
}

/// Runs `task(0)`, …, `task(tasks - 1)`, of which the longest context has so many groups.
///
/// # Safety
/// The parts of `out` that two tasks write are never the same, and nobody else reads or writes them meanwhile.
pub(crate) unsafe fn run<T: Task>(
    pool: &Pool,
    (tasks, groups): (usize, usize),
    work: &Work,
    task: impl Fn(usize) -> T + Sync,
    out: &Target<'_>,
) {
    if groups == 1 || pool.threads() == 1 || tasks >= 2 * pool.threads() {
        return pool.run(tasks, work.prepare + work.walk + work.finish, |i| {
            let task = task(i);
            let (queries, sums) = (task.query_floats(), task.sum_floats());
            // What follows the queries begins with a cache line too.
            let lines = queries.next_multiple_of(LANES);
            with_scratch(lines + sums + task.scratch_floats(), |scratch, buffers| {
                let (lines, scratch) = scratch.split_at_mut(lines);
                let (sums, scratch) = scratch.split_at_mut(sums);
                let queries = &mut lines[..queries];
                task.prepare(queries, buffers);
                task.walk(0..groups, queries, sums, scratch);
                // SAFETY: the caller's obligation.
                unsafe { task.finish(sums, scratch, buffers, out) };
            });
        });
    }
    let mut queries: Vec<_> = (0..tasks).map(|i| vec![0.0; task(i).query_floats()]).collect();
    pool.each(queries.iter_mut(), work.prepare, |i, queries| {
        with_scratch(0, |_, buffers| task(i).prepare(queries, buffers));
    });
    // The sums of each task, one group's behind the other's.
    let mut sums: Vec<_> = (0..tasks).map(|i| vec![0.0; groups * task(i).sum_floats()]).collect();
    pool.each(parts(&mut sums, groups), work.walk, |_, (i, group, sums)| {
        let task = task(i);
        with_scratch(task.scratch_floats(), |scratch, _| task.walk(group..group + 1, &queries[i], sums, scratch));
    });
    pool.each(sums.iter_mut(), work.finish, |i, sums| {
        let task = task(i);
        with_scratch(task.scratch_floats(), |scratch, buffers| {
            // SAFETY: the caller's obligation.
            unsafe { task.finish(sums, scratch, buffers, out) };
        });
    });
}

/// Task, group, and where the sums go.
fn parts(sums: &mut [Vec<f32>], groups: usize) -> impl Iterator<Item = (usize, usize, &mut [f32])> {
    sums.iter_mut().enumerate().flat_map(move |(task, sums)| {
        let len = sums.len() / groups;
        sums.chunks_exact_mut(len).enumerate().map(move |(group, sums)| (task, group, sums))
    })
}
