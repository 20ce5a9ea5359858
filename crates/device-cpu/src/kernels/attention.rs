//! Attention over full keys and values.
//!
//! A task takes some rows of one sequence and the query heads of one key/value head, so that all of them pass over a piece
//! of the context while it is in cache ([`super::context`] says in which order, [`super::grouped`] on which threads).

use std::marker::PhantomData;
use std::ops::Range;

use baton_device::{AttentionParams, KvDtype};
use half::{bf16, f16};

use crate::cache::{AttentionPlan, BLOCK, Element, Plane};
use crate::isa::Dispatch;
use crate::kernels::context::{GROUP_LEN, PIECE, Piece, Queries, Rows, Source, Sums, Walk};
use crate::kernels::grouped::{self, Task, Work};
use crate::kernels::linear::Buffers;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};
use crate::tensor::{Target, Tensor};

/// Queries of a task, about: they share what it costs to bring a piece to the first levels of cache.
const TASK_QUERIES: usize = 96;
/// From so many queries on a piece that is not kept in f32 is widened once for all of them.
const WIDEN: usize = 13;

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
    let &AttentionParams { heads, kv_heads, head_dim, window, .. } = params;
    let group = heads / kv_heads;
    let runs: Vec<_> = plan.runs(0..plan.rows(), (TASK_QUERIES / group).max(1)).collect();
    let tasks = runs.len() * kv_heads;
    let task = |i: usize| {
        let (rows, kv_head) = (runs[i / kv_heads].clone(), i % kv_heads);
        Attention { isa, q, keys, values, plan, params, rows, kv_head }
    };
    let groups = plan.groups(usize::MAX);
    let floats = plan.rows() * heads * head_dim;
    let work = Work { prepare: floats, walk: 2 * plan.context(window) * heads * head_dim, finish: floats * groups };
    // SAFETY: each task has its own rows and heads, and the caller alone has `out`.
    unsafe { grouped::run(pool, (tasks, groups), &work, task, out) };
}

/// Some rows of one sequence, and the query heads of one key/value head.
struct Attention<'a> {
    isa: Dispatch,
    q: &'a Tensor,
    keys: &'a Plane,
    values: &'a Plane,
    plan: &'a AttentionPlan,
    params: &'a AttentionParams,
    rows: Range<usize>,
    kv_head: usize,
}

impl Attention<'_> {
    /// Query heads of the key/value head.
    fn group(&self) -> usize {
        self.params.heads / self.params.kv_heads
    }

    fn queries(&self) -> usize {
        self.rows.len() * self.group()
    }

    /// Floats of a piece, if pieces are widened before use.
    fn piece(&self) -> usize {
        let widens = self.keys.dtype != KvDtype::F32 && self.queries() >= WIDEN;
        if widens { PIECE * BLOCK * (self.keys.width + self.values.width) } else { 0 }
    }

    fn run<E: Element>(&self, walk: Walk<'_>, piece: &mut [f32]) {
        let mut stored = Stored::<E> { keys: self.keys, values: self.values, head: self.kv_head, element: PhantomData };
        if piece.is_empty() {
            return walk.run(self.isa, &mut stored);
        }
        let (keys, values) = piece.split_at_mut(PIECE * BLOCK * self.keys.width);
        let (keys, values) = (keys.as_chunks_mut().0, values.as_chunks_mut().0);
        walk.run(self.isa, &mut Widened { stored, keys, values });
    }
}

impl Task for Attention<'_> {
    fn query_floats(&self) -> usize {
        self.queries() * self.params.head_dim
    }

    fn sum_floats(&self) -> usize {
        Sums::floats(self.queries(), self.values.width)
    }

    fn scratch_floats(&self) -> usize {
        self.piece() + self.sum_floats()
    }

    fn prepare(&self, queries: &mut [f32], _: &mut Buffers) {
        let &AttentionParams { head_dim, scale, .. } = self.params;
        let width = self.group() * head_dim;
        for (row, scaled) in self.rows.clone().zip(queries.chunks_exact_mut(width)) {
            let q = &self.q.row(row)[self.kv_head * width..][..width];
            scaled.iter_mut().zip(q).for_each(|(scaled, q)| *scaled = q * scale);
        }
    }

    fn walk(&self, groups: Range<usize>, queries: &[f32], sums: &mut [f32], scratch: &mut [f32]) {
        let &AttentionParams { head_dim, window, softcap, .. } = self.params;
        let (piece, next) = scratch.split_at_mut(self.piece());
        let (first, last) = (self.rows.start, self.rows.end - 1);
        let queries = Queries {
            data: queries,
            heads: self.group(),
            width: head_dim,
            position: self.plan.position(first),
            window: window.unwrap_or(usize::MAX),
            softcap,
        };
        let blocks = self.plan.blocks(last);
        let groups = groups.start..groups.end.min(blocks.len().div_ceil(GROUP_LEN / BLOCK));
        let [sums, next] = [sums, next].map(|sums| Sums::new(sums, self.queries(), self.values.width));
        let walk = Walk { queries, blocks, groups, sums, next };
        match self.keys.dtype {
            KvDtype::F32 => self.run::<f32>(walk, piece),
            KvDtype::F16 => self.run::<f16>(walk, piece),
            KvDtype::BF16 => self.run::<bf16>(walk, piece),
            KvDtype::Int8 => self.run::<i8>(walk, piece),
        }
    }

    unsafe fn finish(&self, sums: &mut [f32], _: &mut [f32], _: &mut Buffers, out: &Target<'_>) {
        let width = self.params.head_dim;
        let row_width = self.group() * width;
        let mut sums = Sums::of_groups(self.isa, sums, self.queries(), self.values.width);
        for (i, row) in self.rows.clone().enumerate() {
            let start = self.kv_head * row_width;
            // SAFETY: the caller's obligation.
            let out = unsafe { out.part(row, start..start + row_width) };
            sums.finish(self.isa, i * self.group(), out, width);
        }
    }
}

/// Keys and values as they are kept.
struct Stored<'a, E> {
    keys: &'a Plane,
    values: &'a Plane,
    head: usize,
    element: PhantomData<E>,
}

impl<'a, E: Element> Stored<'a, E> {
    /// The rows of some blocks where they lie.
    fn rows(&self, blocks: [u32; PIECE]) -> Rows<'a, E, E> {
        Rows {
            keys: blocks.map(|block| self.keys.block(block, self.head)),
            values: blocks.map(|block| self.values.block(block, self.head)),
        }
    }

    fn piece(&self, blocks: &[u32], next: &[u32]) -> Piece<'a, E, E> {
        let filled = |blocks: &[u32]| std::array::from_fn(|b| blocks[b.min(blocks.len() - 1)]);
        let blocks: [u32; PIECE] = filled(blocks);
        Piece {
            rows: self.rows(blocks),
            key_scales: blocks.map(|block| self.keys.scales(block, self.head, 0)),
            value_scales: blocks.map(|block| self.values.scales(block, self.head, 0)),
            stride: self.values.width / LANES,
            next: (!next.is_empty()).then(|| self.rows(filled(next))),
        }
    }
}

impl<E: Element> Source for Stored<'_, E> {
    type Key = E;
    type Value = E;

    fn piece(&mut self, _: Dispatch, blocks: &[u32], next: &[u32]) -> Piece<'_, E, E> {
        Stored::piece(self, blocks, next)
    }
}

/// The same in f32, before their scales, which are applied where they would be without.
struct Widened<'a, E> {
    stored: Stored<'a, E>,
    keys: &'a mut [[f32; LANES]],
    values: &'a mut [[f32; LANES]],
}

impl<E: Element> Source for Widened<'_, E> {
    type Key = f32;
    type Value = f32;

    fn piece(&mut self, isa: Dispatch, blocks: &[u32], next: &[u32]) -> Piece<'_, f32, f32> {
        let Piece { rows, key_scales, value_scales, stride, .. } = self.stored.piece(blocks, next);
        let (key_rows, value_rows) = (self.stored.keys.width, BLOCK * stride);
        for b in 0..blocks.len() {
            isa.run(Widen { from: rows.keys[b], to: &mut self.keys[b * key_rows..][..key_rows] });
            isa.run(Widen { from: rows.values[b], to: &mut self.values[b * value_rows..][..value_rows] });
        }
        let rows = Rows {
            keys: std::array::from_fn(|b| &self.keys[b * key_rows..][..key_rows]),
            values: std::array::from_fn(|b| &self.values[b * value_rows..][..value_rows]),
        };
        Piece { rows, key_scales, value_scales, stride, next: None }
    }
}

struct Widen<'a, E> {
    from: &'a [[E; LANES]],
    to: &'a mut [[f32; LANES]],
}

impl<E: Element> Kernel for Widen<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (from, to) in self.from.iter().zip(self.to) {
            s.store(E::load(s, from), to);
        }
    }
}
