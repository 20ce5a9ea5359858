//! Multi-head latent attention, absorbed (arXiv 2405.04434): queries are taken into the space of the
//! cached latents, so one cached row per token serves all heads as key and as value.
//!
//! A task takes some rows of some heads through three stages: absorb, attend, project. Each stage has
//! the order of its kernel ([`super::linear`], [`super::attention`]).

use std::ops::Range;

use baton_device::{HostLatent, KvDtype, Result, Rows, WeightFormat};

use crate::cache::{AttentionPlan, BLOCK, Plane, rope_start};
use crate::isa::Dispatch;
use crate::kernels::chosen::Chosen;
use crate::kernels::context::{self, GROUP_LEN, PIECE, Piece, Queries, Source, Sums, Walk};
use crate::kernels::gather::{Gathered, Place, Transpose, widen};
use crate::kernels::grouped::{self, Task, Work};
use crate::kernels::linear::{Buffers, Part, Prepared};
use crate::pool::Pool;
use crate::simd::LANES;
use crate::tensor::{Target, Tensor, View};
use crate::weight::Matrix;

/// Rows of one task: they share each load of the head's weights.
const TASK_ROWS: usize = 16;
/// Heads of one task: they share each piece of a row's context.
const TASK_HEADS: usize = 16;
/// Queries that pass over a context together, about.
const RUN_QUERIES: usize = 128;

/// `kv_b_proj`, split by head.
pub struct Latent {
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) v: usize,
    pub(crate) rank: usize,
    heads: Vec<Head>,
}

struct Head {
    /// Key rows transposed, `[rank, nope]`.
    absorb: Matrix,
    /// Value rows, `[v, rank]`.
    project: Matrix,
}

impl Latent {
    pub(crate) fn new(pool: &Pool, src: &HostLatent<'_>) -> Result<Self> {
        let &HostLatent { ref kv_b, heads, nope, rope, v, rank, format } = src;
        kv_b.expect_shape(&[heads * (nope + v), rank])?;
        let head = |h: usize| {
            let start = h * (nope + v);
            Ok(Head {
                absorb: pack_transposed(pool, Matrix::from_host(pool, &kv_b.rows(start, nope), format)?)?,
                project: Matrix::from_host(pool, &kv_b.rows(start + nope, v), format)?,
            })
        };
        Ok(Self { nope, rope, v, rank, heads: (0..heads).map(head).collect::<Result<_>>()? })
    }

    pub(crate) fn heads(&self) -> usize {
        self.heads.len()
    }
}

/// The transpose of a matrix, same values. Blocks lie along the other side then, so it is
/// kept as the f32 that its quants stand for.
fn pack_transposed(pool: &Pool, matrix: Matrix) -> Result<Matrix> {
    let (rows, cols) = (matrix.out_features, matrix.in_features);
    let mut values = vec![0.0; rows * cols];
    for (n, row) in values.chunks_exact_mut(cols).enumerate() {
        matrix.read_row(n, row);
    }
    let format = match matrix.format() {
        WeightFormat::Ggml(_) => WeightFormat::F32,
        other => other,
    };
    Matrix::pack(pool, (cols, rows), format, |columns| {
        columns.flat_map(|c| values.iter().skip(c).step_by(cols).copied()).collect()
    })
}

/// Every row and head over latents and rotated keys already written, all of them or those that were chosen.
#[allow(clippy::too_many_arguments)] // where to run, two inputs, their context, one output
pub(crate) fn attend(
    pool: &Pool,
    isa: Dispatch,
    q: &Tensor,
    weight: &Latent,
    plane: &Plane,
    plan: &AttentionPlan,
    chosen: Option<&Chosen>,
    scale: f32,
    out: &Target<'_>,
) {
    let (rows, heads) = (plan.rows(), weight.heads.len());
    let top_k = chosen.map(Chosen::top_k);
    let work = heads * (rows * weight.rank * (weight.nope + weight.v) + 2 * plan.context(top_k) * plane.width);
    let row_chunk = pool.share(rows, work).min(TASK_ROWS);
    let head_chunks = heads.div_ceil(TASK_HEADS);
    let tasks = rows.div_ceil(row_chunk) * head_chunks;
    let task = |i: usize| {
        let (row, head) = (i / head_chunks * row_chunk, i % head_chunks * TASK_HEADS);
        let (rows, heads) = (row..rows.min(row + row_chunk), head..heads.min(head + TASK_HEADS));
        Absorbed { pool, isa, q, weight, plane, plan, chosen, scale, rows, heads }
    };
    let groups = plan.groups(top_k.unwrap_or(usize::MAX));
    let ends = heads * rows * weight.rank;
    let context = 2 * heads * plan.context(top_k) * plane.width;
    let work = Work { prepare: ends * weight.nope, walk: context, finish: ends * weight.v };
    // SAFETY: tasks differ in rows or in heads, and the caller alone has `out`.
    unsafe { grouped::run(pool, (tasks, groups), &work, task, out) };
}

/// Some rows of some heads.
struct Absorbed<'a> {
    pool: &'a Pool,
    isa: Dispatch,
    q: &'a Tensor,
    weight: &'a Latent,
    plane: &'a Plane,
    plan: &'a AttentionPlan,
    chosen: Option<&'a Chosen>,
    scale: f32,
    rows: Range<usize>,
    heads: Range<usize>,
}

impl Absorbed<'_> {
    fn queries(&self) -> usize {
        self.rows.len() * self.heads.len()
    }

    /// Of some rows, the first at a position, what they sum over groups of a context.
    fn over<'s>(
        &self,
        rows: Range<usize>,
        (position, blocks): (usize, &'s [u32]),
        groups: Range<usize>,
        queries: &'s [f32],
        [sums, next]: &'s mut [Sums<'_>; 2],
    ) -> Walk<'s> {
        let (heads, width) = (self.heads.len(), self.plane.width);
        let of = |row: usize| (row - self.rows.start) * heads;
        let of = of(rows.start)..of(rows.end);
        let data = &queries[of.start * width..of.end * width];
        Walk {
            queries: Queries { data, heads, width, position, window: usize::MAX, softcap: None },
            blocks,
            groups: groups.start..groups.end.min(blocks.len().div_ceil(GROUP_LEN / BLOCK)),
            sums: sums.part(of.clone()),
            next: next.part(of),
        }
    }
}

impl Task for Absorbed<'_> {
    fn query_floats(&self) -> usize {
        // In the space of the cached rows, `[rows, heads, width]`.
        self.queries() * self.plane.width
    }

    fn sum_floats(&self) -> usize {
        Sums::floats(self.queries(), rope_start(self.weight.rank))
    }

    fn scratch_floats(&self) -> usize {
        // A piece as keys and as values, and sums once more.
        2 * PIECE * BLOCK * self.plane.width + self.sum_floats()
    }

    fn prepare(&self, queries: &mut [f32], buffers: &mut Buffers) {
        let &Latent { nope, rope, rank, .. } = self.weight;
        let (rows, width, row_width) = (self.rows.len(), self.plane.width, self.heads.len() * self.plane.width);
        queries.fill(0.0);
        for (i, head) in self.heads.clone().enumerate() {
            let (stride, start) = (self.q.cols(), head * (nope + rope));
            let data = &self.q.data()[self.rows.start * stride..];
            let nopes = View { data, rows, stride, start, width: nope, index: None };
            let target = Target::new(queries, row_width);
            // SAFETY: this task alone has its queries.
            unsafe {
                let target = &target.shifted(0, i * width);
                multiply_here((self.pool, self.isa), nopes, &self.weight.heads[head].absorb, buffers, target);
            }
            for (row, queries) in self.rows.clone().zip(queries.chunks_exact_mut(row_width)) {
                let query = &mut queries[i * width..][..width];
                query[rope_start(rank)..][..rope].copy_from_slice(&self.q.row(row)[start + nope..][..rope]);
                query.iter_mut().for_each(|x| *x *= self.scale);
            }
        }
    }

    fn walk(&self, groups: Range<usize>, queries: &[f32], sums: &mut [f32], scratch: &mut [f32]) {
        let (heads, width) = (self.heads.len(), self.plane.width);
        let value_width = rope_start(self.weight.rank);
        let (next, scratch) = scratch.split_at_mut(self.sum_floats());
        let (keys, values) = scratch.as_chunks_mut().0.split_at_mut(PIECE * width);
        let mut sums = [sums, next].map(|sums| Sums::new(sums, self.queries(), value_width));
        let (plane, split) = (self.plane, value_width / LANES);
        let blocks = self.chosen.map_or(&[][..], Chosen::blocks);
        for run in self.plan.runs(self.rows.clone(), RUN_QUERIES.div_ceil(heads)) {
            let of_row = |row: usize| self.chosen.and_then(|chosen| chosen.of(row));
            // Of a sequence's rows the first see few enough positions to read all of them.
            let all = run.start..run.clone().find(|&row| of_row(row).is_some()).unwrap_or(run.end);
            if !all.is_empty() {
                let (position, blocks) = (self.plan.position(all.start), self.plan.blocks(all.end - 1));
                let mut source = Latents { plane, split, keys: &mut *keys, values: &mut *values };
                let walk = self.over(all.clone(), (position, blocks), groups.clone(), queries, &mut sums);
                walk.run(self.isa, &mut source);
            }
            for row in all.end..run.end {
                // As a context of its own, in blocks of the positions that are read, one behind the other.
                let positions = of_row(row).expect("a row behind one that reads some reads some");
                let (table, len) = (self.plan.blocks(row), positions.len());
                let place = |i: usize| {
                    let position = positions[i] as usize;
                    Place { plane: 0, block: table[position / BLOCK], slot: position % BLOCK }
                };
                let (planes, keys, values) = ([plane; 2], &mut *keys, &mut *values);
                let mut source = Gathered { planes, split, len, place, keys, values };
                let walk = self.over(row..row + 1, (len - 1, blocks), groups.clone(), queries, &mut sums);
                walk.run(self.isa, &mut source);
            }
        }
    }

    unsafe fn finish(&self, sums: &mut [f32], scratch: &mut [f32], buffers: &mut Buffers, out: &Target<'_>) {
        let &Latent { v, rank, .. } = self.weight;
        let (rows, width) = (self.rows.len(), rope_start(rank));
        let mut sums = Sums::of_groups(self.isa, sums, self.queries(), width);
        let mixed = &mut scratch[..self.queries() * width];
        sums.finish(self.isa, 0, mixed, width);
        for (i, head) in self.heads.clone().enumerate() {
            let stride = self.heads.len() * width;
            let mixed = View { data: mixed, rows, stride, start: i * width, width: rank, index: None };
            let out = out.shifted(self.rows.start, head * v);
            // SAFETY: the caller's obligation.
            unsafe { multiply_here((self.pool, self.isa), mixed, &self.weight.heads[head].project, buffers, &out) };
        }
    }
}

/// Cached rows as keys, transposed, and as values; in f32 and scaled. Rows are kept once: for the heads that share a piece
/// it is cheap to transpose.
struct Latents<'a> {
    plane: &'a Plane,
    /// Vectors of the first part of a row.
    split: usize,
    /// `[PIECE, width, 16]`.
    keys: &'a mut [[f32; LANES]],
    /// `[PIECE, 16, width]`.
    values: &'a mut [[f32; LANES]],
}

impl Source for Latents<'_> {
    type Key = f32;
    type Value = f32;

    fn piece(&mut self, isa: Dispatch, blocks: &[u32], _: &[u32]) -> Piece<'_, f32, f32> {
        let (plane, width) = (self.plane, self.plane.width);
        let mut values: [&[[f32; LANES]]; PIECE] = [&[]; PIECE];
        for (b, to) in self.values.chunks_exact_mut(width).enumerate() {
            let block = blocks[b.min(blocks.len() - 1)];
            values[b] = if plane.dtype == KvDtype::F32 {
                plane.block(block, 0)
            } else {
                let places: [Place; BLOCK] = std::array::from_fn(|slot| Place { plane: 0, block, slot });
                widen(isa, [plane; 2], self.split, &places, to);
                to
            };
        }
        for (columns, rows) in self.keys.chunks_exact_mut(width).zip(&values[..blocks.len()]) {
            isa.run(Transpose { rows, columns });
        }
        let keys = std::array::from_fn(|b| &self.keys[b * width..][..width]);
        let (rows, scales) = (context::Rows { keys, values }, [None; PIECE]);
        Piece { rows, key_scales: scales, value_scales: scales, stride: width / LANES, next: None }
    }
}

/// A whole product, by this thread alone.
///
/// # Safety
/// As for [`Part::run`].
unsafe fn multiply_here(
    engine: (&Pool, Dispatch),
    x: View<'_>,
    weight: &Matrix,
    buffers: &mut Buffers,
    out: &Target<'_>,
) {
    let input = Prepared::new(engine, x, [weight], buffers);
    let part = Part { input, first: 0, weight, bias: None, rows: 0..x.rows, panels: 0..weight.panels() };
    // SAFETY: the caller's obligation.
    unsafe { part.run(engine.1, out) }
}
