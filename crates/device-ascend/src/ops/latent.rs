//! Multi-head latent attention, absorbed and composed: one key for all heads, `[latent | rotated key]`, whose latent is the
//! value as well.

use crate::device::Device;
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::ops::attention::{attend, gather_context};
use crate::ops::rows;
use crate::plan::Step;

type Result<T> = std::result::Result<T, AscendError>;

/// Where an up-projection lies: keys `[heads, nope, rank]` and values `[heads, v, rank]`.
#[derive(Clone)]
pub(crate) struct LatentView {
    pub(crate) keys: View,
    pub(crate) values: View,
    /// Width of a rotated key.
    pub(crate) rope: usize,
}

/// See [`LatentOps::latent_attention`](baton_device::LatentOps::latent_attention); the step's own latents and rotated keys are
/// in the planes. `constants` are [`crate::plan::mask_rows`].
#[allow(clippy::too_many_arguments)] // one input, one output, and where the rest lies
pub(crate) fn attention(
    device: &mut Device,
    step: &Step,
    scale: f32,
    constants: &View,
    q: &View,
    weight: &LatentView,
    planes: &[View; 2],
    out: &View,
) -> Result<()> {
    let LatentView { keys, values, rope } = weight;
    let [heads, nope, rank] = [0, 1, 2].map(|d| keys.dims[d] as usize);
    let (all, v, dtype, width) = (step.rows, values.dims[1] as usize, keys.dtype, rank + rope);
    let q = q.split(1, heads);
    let shapes: [(DataType, &[usize]); 2] = [(dtype, &[heads, all, rank]), (dtype, &[heads, all, v])];
    device.with_views(shapes, |device, [mixed, result]| {
        device.with_views([(dtype, &[heads, all, nope])], |device, [query]| {
            device.assign(&query, &q.narrow(2, 0, nope).swap(0, 1))?;
            product(device, &query, keys, &mixed)
        })?;
        for (number, piece) in step.pieces.iter().enumerate() {
            let (sequences, rows) = (piece.sequences, piece.rows);
            // A piece's part of what has one matrix for each head, as `[sequences, heads, rows, rank]`: before attention the
            // absorbed queries, behind it the latents that it mixed.
            let part = mixed.narrow(1, piece.first_row, sequences * rows).split(1, sequences).swap(0, 1);
            let rotated = q.narrow(0, piece.first_row, sequences * rows).narrow(2, nope, *rope);
            let query = [sequences, heads, rows, width];
            let context = [sequences, 1, piece.context(), width];
            let shapes: [(DataType, &[usize]); 3] =
                [(DataType::F32, &query), (DataType::F32, &context), (DataType::F32, &query)];
            device.with_views(shapes, |device, [queries, context, answer]| {
                device.assign(&queries.narrow(3, 0, rank), &part)?;
                device.assign(&queries.narrow(3, rank, *rope), &rotated.split(0, sequences).swap(1, 2))?;
                rows::scale(device, &queries, scale)?;
                gather_context(device, step, piece, &planes[0], &context.narrow(3, 0, rank))?;
                gather_context(device, step, piece, &planes[1], &context.narrow(3, rank, *rope))?;
                let flat = |x: &View, rows: usize| x.reshape(&[sequences, rows, width]);
                let (queries, sums) = (flat(&queries, heads * rows), flat(&answer, heads * rows));
                let context = flat(&context, piece.context());
                step.with_mask(device, number, None, constants, |device, mask| {
                    attend(device, [&queries, &context, &context], mask, None, &sums)
                })?;
                device.assign(&part, &answer.narrow(3, 0, rank))
            })?;
        }
        product(device, &mixed, &values.swap(1, 2), &result)?;
        device.assign(&out.split(1, heads), &result.swap(0, 1))
    })
}

/// `out[h] = x[h]·w[h]` for every head.
pub(super) fn product(device: &mut Device, x: &View, w: &View, out: &View) -> Result<()> {
    let (x, w, out, math) = (device.tensor(x), device.tensor(w), device.tensor(out), device.cube_math());
    device.batch_mat_mul(&x, &w, &out, math)
}
