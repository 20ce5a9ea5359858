//! Multi-head latent attention, absorbed (arXiv 2405.04434): queries are taken into the space of the
//! cached latents, so one cached row per token serves all heads as key and as value.
//!
//! A task takes some rows of one head through three stages: absorb, attend, project. Each stage has
//! the order of its kernel ([`super::linear`], [`super::attention`]).

use std::cell::RefCell;

use baton_device::{HostLatent, Result, WeightFormat};

use crate::cache::{AttentionPlan, Plane, latent_width, rope_start};
use crate::isa::Dispatch;
use crate::kernels::attention::Attend;
use crate::kernels::linear::{Input, Part};
use crate::kernels::quantize::Quantized;
use crate::pool::Pool;
use crate::tensor::{Target, Tensor, View};
use crate::weight::Matrix;

/// Rows of one task: they share each load of the head's weights.
const TASK_ROWS: usize = 16;

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
    pub(crate) fn new(src: &HostLatent<'_>) -> Result<Self> {
        let &HostLatent { ref kv_b, heads, nope, rope, v, rank, format } = src;
        kv_b.expect_shape(&[heads * (nope + v), rank])?;
        let head = |h: usize| {
            let start = h * (nope + v);
            Ok(Head {
                absorb: pack_transposed(Matrix::from_host(&kv_b.rows(start, nope), format)?)?,
                project: Matrix::from_host(&kv_b.rows(start + nope, v), format)?,
            })
        };
        Ok(Self { nope, rope, v, rank, heads: (0..heads).map(head).collect::<Result<_>>()? })
    }

    pub(crate) fn heads(&self) -> usize {
        self.heads.len()
    }
}

/// The transpose of a matrix, same values. Blocks of Q8_0 lie along the other side then, so it is
/// kept as the f32 that its quants stand for.
fn pack_transposed(matrix: Matrix) -> Result<Matrix> {
    let (rows, cols) = (matrix.out_features, matrix.in_features);
    let mut values = vec![0.0; rows * cols];
    for (n, row) in values.chunks_exact_mut(cols).enumerate() {
        matrix.read_row(n, row);
    }
    let format = match matrix.format() {
        WeightFormat::Q8_0 => WeightFormat::F32,
        other => other,
    };
    Matrix::pack(cols, rows, format, |columns| {
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
    let &Latent { nope, rope, v, rank, ref heads } = weight;
    let rank_width = rope_start(rank);
    let width = latent_width(rank, rope);
    let rows = plan.rows();
    let chunk = rows.div_ceil(pool.threads()).clamp(1, TASK_ROWS);
    let work = heads.len() * (rows * rank * (nope + v) + 2 * plan.context() * width);
    pool.run(rows.div_ceil(chunk) * heads.len(), work, |task| {
        let (head, first) = (task % heads.len(), task / heads.len() * chunk);
        let rows = first..rows.min(first + chunk);
        with_scratch(rows.len() * (width + rank_width), |scratch, quantized| {
            scratch.fill(0.0);
            let (queries, mixed) = scratch.split_at_mut(rows.len() * width);
            let Head { absorb, project } = &heads[head];

            let stride = heads.len() * (nope + rope);
            let data = &q.data()[rows.start * stride..];
            let nopes = View { data, rows: rows.len(), stride, start: head * (nope + rope), width: nope, index: None };
            // SAFETY: this task alone has its scratch.
            unsafe { multiply_here(isa, nopes, absorb, quantized, &Target::new(queries, width)) };

            for (i, row) in rows.clone().enumerate() {
                let query = &mut queries[i * width..][..width];
                query[rank_width..][..rope].copy_from_slice(&q.row(row)[(head + 1) * (nope + rope) - rope..][..rope]);
                query.iter_mut().for_each(|x| *x *= scale);
                let (blocks, len) = (plan.blocks(row), plan.position(row) + 1);
                let out = &mut mixed[i * rank_width..][..rank_width];
                isa.run(Attend { query, keys: plane, values: plane, head: 0, blocks, len, out });
            }

            let mixed = View { data: mixed, rows: rows.len(), stride: rank_width, start: 0, width: rank, index: None };
            let out = out.shifted(rows.start, head * v);
            // SAFETY: each task has its own rows and head.
            unsafe { multiply_here(isa, mixed, project, quantized, &out) };
        });
    });
}

/// A whole product, by this thread alone.
///
/// # Safety
/// As for [`Part::run`].
unsafe fn multiply_here(isa: Dispatch, x: View<'_>, weight: &Matrix, quantized: &mut Quantized, out: &Target<'_>) {
    let input = Input::prepare(isa, x, weight, quantized);
    let part = Part { input, weight, bias: None, rows: 0..x.rows, panels: 0..weight.panels() };
    // SAFETY: the caller's obligation.
    unsafe { part.run(isa, out) }
}

/// Memory of this thread for the length of a task; its contents are arbitrary.
pub(crate) fn with_scratch(len: usize, f: impl FnOnce(&mut [f32], &mut Quantized)) {
    thread_local! {
        static SCRATCH: RefCell<(Vec<f32>, Quantized)> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(|(floats, quantized)| {
        if floats.len() < len {
            floats.resize(len, 0.0);
        }
        f(&mut floats[..len], quantized);
    });
}
