//! Multi-head latent attention, absorbed (arXiv 2405.04434): queries are taken into the space of the
//! cached latents, so one cached row per token serves all heads as key and as value.
//!
//! A task takes some rows of some heads through three stages: absorb, attend, project. Each stage has
//! the order of its kernel ([`super::linear`], [`super::attention`]).

use std::cell::RefCell;
use std::ops::Range;

use baton_device::{HostLatent, Result, Rows, WeightFormat};

use crate::cache::{AttentionPlan, Plane, latent_width, rope_start};
use crate::isa::Dispatch;
use crate::kernels::attention::Attend;
use crate::kernels::linear::{Buffers, Part, Prepared};
use crate::pool::Pool;
use crate::tensor::{Target, Tensor, View};
use crate::weight::Matrix;

/// Rows of one task: they share each load of the head's weights.
const TASK_ROWS: usize = 16;
/// Heads of one task: they share each load of a row's context.
const TASK_HEADS: usize = 8;

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

/// Every row and head over latents and rotated keys already written.
#[allow(clippy::too_many_arguments)] // where to run, two inputs, their context, one output
pub(crate) fn attend(
    pool: &Pool,
    isa: Dispatch,
    q: &Tensor,
    weight: &Latent,
    plane: &Plane,
    plan: &AttentionPlan,
    scale: f32,
    out: &Target<'_>,
) {
    let (rows, heads) = (plan.rows(), weight.heads.len());
    let width = latent_width(weight.rank, weight.rope);
    let work = heads * (rows * weight.rank * (weight.nope + weight.v) + 2 * plan.context(None) * width);
    let row_chunk = pool.share(rows, work).min(TASK_ROWS);
    let head_chunks = heads.div_ceil(TASK_HEADS);
    pool.run(rows.div_ceil(row_chunk) * head_chunks, work, |task| {
        let (row, head) = (task / head_chunks * row_chunk, task % head_chunks * TASK_HEADS);
        let rows = row..rows.min(row + row_chunk);
        let heads = head..heads.min(head + TASK_HEADS);
        let task = Task { pool, isa, q, weight, plane, plan, scale, rows, heads };
        with_scratch(task.rows.len() * task.heads.len() * (width + rope_start(weight.rank)), |scratch, buffers| {
            // SAFETY: tasks differ in rows or in heads.
            unsafe { task.run(scratch, buffers, out) };
        });
    });
}

/// Some rows of some heads.
struct Task<'a> {
    pool: &'a Pool,
    isa: Dispatch,
    q: &'a Tensor,
    weight: &'a Latent,
    plane: &'a Plane,
    plan: &'a AttentionPlan,
    scale: f32,
    rows: Range<usize>,
    heads: Range<usize>,
}

impl Task<'_> {
    /// # Safety
    /// Nobody else reads or writes these rows and heads of `out` meanwhile.
    unsafe fn run(self, scratch: &mut [f32], buffers: &mut Buffers, out: &Target<'_>) {
        let Task { pool, isa, q, weight, plane, plan, scale, .. } = self;
        let &Latent { nope, rope, v, rank, .. } = weight;
        let (rank_width, rows) = (rope_start(rank), self.rows.len());
        // Queries in the space of the cached rows, and mixed latents: both [heads, rows, width].
        let (queries, mixed) = scratch.split_at_mut(rows * self.heads.len() * plane.width);
        queries.fill(0.0);

        let (first, stride) = (self.rows.start, q.cols());
        let queries_of_heads = queries.chunks_exact_mut(rows * plane.width);
        for (head, queries) in self.heads.clone().zip(queries_of_heads) {
            let start = head * (nope + rope);
            let nopes = View { data: &q.data()[first * stride..], rows, stride, start, width: nope, index: None };
            // SAFETY: this task alone has its scratch.
            unsafe {
                multiply_here(
                    (pool, isa),
                    nopes,
                    &weight.heads[head].absorb,
                    buffers,
                    &Target::new(queries, plane.width),
                )
            };
            for (row, query) in self.rows.clone().zip(queries.chunks_exact_mut(plane.width)) {
                query[rank_width..][..rope].copy_from_slice(&q.row(row)[start + nope..][..rope]);
                query.iter_mut().for_each(|x| *x *= scale);
            }
        }

        // Heads innermost: a row's context stays in cache while they pass.
        for (i, row) in self.rows.clone().enumerate() {
            for head in 0..self.heads.len() {
                let query = &queries[(head * rows + i) * plane.width..][..plane.width];
                let out = &mut mixed[(head * rows + i) * rank_width..][..rank_width];
                let (blocks, visible) = (plan.blocks(row), 0..plan.position(row) + 1);
                isa.run(Attend { query, keys: plane, values: plane, head: 0, blocks, visible, softcap: None, out });
            }
        }

        for (head, mixed) in self.heads.clone().zip(mixed.chunks_exact(rows * rank_width)) {
            let mixed = View { data: mixed, rows, stride: rank_width, start: 0, width: rank, index: None };
            let out = out.shifted(first, head * v);
            // SAFETY: the caller's obligation.
            unsafe { multiply_here((pool, isa), mixed, &weight.heads[head].project, buffers, &out) };
        }
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

/// Memory of this thread for the length of a task; its contents are arbitrary.
pub(crate) fn with_scratch(len: usize, f: impl FnOnce(&mut [f32], &mut Buffers)) {
    thread_local! {
        static SCRATCH: RefCell<(Vec<f32>, Buffers)> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(|(floats, buffers)| {
        if floats.len() < len {
            floats.resize(len, 0.0);
        }
        f(&mut floats[..len], buffers);
    });
}
