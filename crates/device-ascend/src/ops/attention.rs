//! Attention of products, sums and a softmax: for every head size and chip, in f32 between the cache and the result. Fused
//! forms are judged by it.

use baton_device::AttentionParams;

use crate::backend::BLOCK;
use crate::device::Device;
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::ops::fused_cache::write_cache;
use crate::ops::index::select;
use crate::ops::rows;
use crate::plan::{Piece, Step};

type Result<T> = std::result::Result<T, AscendError>;

/// Writes a step's rows to both planes of a layer, in one operator if `fused`.
pub(crate) fn write(
    device: &mut Device,
    step: &Step,
    fused: bool,
    heads: usize,
    rows: [&View; 2],
    planes: &[View; 2],
) -> Result<()> {
    if fused {
        let slots = step.slots(device)?;
        return write_cache(device, rows, planes.each_ref(), heads, &slots);
    }
    rows.into_iter().zip(planes).try_for_each(|(rows, plane)| write_slots(device, step, plane, rows))
}

/// Writes each row of x `[rows, width]` to its slot of a plane.
fn write_slots(device: &mut Device, step: &Step, plane: &View, x: &View) -> Result<()> {
    device.with_type(x, plane.dtype, |device, x| {
        let slots = step.slots(device)?;
        let (plane, slots, x) = (device.tensor(plane), device.tensor(&slots), device.tensor(x));
        device.index_copy_in_place(&plane, 0, &slots, &x)
    })
}

/// Copies the context of a piece out of a plane, into `out[sequences, heads, context, width of a head]`.
pub(crate) fn gather_context(device: &mut Device, step: &Step, piece: &Piece, plane: &View, out: &View) -> Result<()> {
    let (width, blocks) = (plane.dims[1] as usize, plane.dims[0] as usize / BLOCK);
    let (all, heads) = (piece.sequences * piece.blocks, out.dims[1] as usize);
    device.with_views([(plane.dtype, &[all, BLOCK * width])], |device, [picked]| {
        let table = step.table(device, piece)?;
        select(device, &plane.reshape(&[blocks, BLOCK * width]), &table, &picked)?;
        let picked = picked.reshape(&[piece.sequences, piece.context(), width]).split(2, heads);
        device.assign(out, &picked.permute(&[0, 2, 1, 3]))
    })
}

/// `out = softmax(softcap(q·kᵀ) + mask)·v`, all f32 and contiguous: q `[sequences * kv_heads, rows of a group, width]`,
/// k and v `[sequences * kv_heads, context, width]`, mask `[sequences, rows, context]`, out as q.
pub(crate) fn attend(
    device: &mut Device,
    [q, k, v]: [&View; 3],
    mask: &View,
    softcap: Option<f32>,
    out: &View,
) -> Result<()> {
    let (heads, group_rows, context) = (q.dims[0] as usize, q.dims[1] as usize, k.dims[1] as usize);
    let (sequences, rows) = (mask.dims[0] as usize, mask.dims[1] as usize);
    let dims = [heads, group_rows, context];
    let math = device.cube_math();
    device.with_views([(DataType::F32, &dims), (DataType::F32, &dims)], |device, [scores, shares]| {
        {
            let (q, k, y) = (device.tensor(q), device.tensor(&k.swap(1, 2)), device.tensor(&scores));
            device.batch_mat_mul(&q, &k, &y, math)?;
        }
        if let Some(cap) = softcap {
            rows::softcap(device, &scores, cap)?;
        }
        // Rows of a group are its heads' rows, head by head.
        let by_row = scores.reshape(&[sequences, heads * group_rows / (sequences * rows), rows, context]);
        rows::add(device, &by_row, &mask.reshape(&[sequences, 1, rows, context]))?;
        let (scores, shares) = (device.tensor(&scores), device.tensor(&shares));
        device.softmax(&scores, 2, &shares)?;
        let (v, out) = (device.tensor(v), device.tensor(out));
        device.batch_mat_mul(&shares, &v, &out, math)
    })
}

/// See [`Backend::paged_attention`](baton_device::Backend::paged_attention); the step's own keys and values are in the planes.
/// `constants` are [`crate::plan::mask_rows`].
pub(crate) fn paged(
    device: &mut Device,
    step: &Step,
    params: &AttentionParams,
    constants: &View,
    q: &View,
    planes: &[View; 2],
    out: &View,
) -> Result<()> {
    let AttentionParams { heads, kv_heads, head_dim, scale, window, softcap } = *params;
    let group = heads / kv_heads;
    for (number, piece) in step.pieces.iter().enumerate() {
        let (sequences, rows) = (piece.sequences, piece.rows);
        // `[sequences, rows, kv_heads, group, head_dim]`, with the rows of each head together.
        let by_head = |x: &View| {
            let x = x.narrow(0, piece.first_row, sequences * rows).split(0, sequences);
            x.split(2, kv_heads).split(3, group).permute(&[0, 2, 3, 1, 4])
        };
        let query = [sequences, kv_heads, group, rows, head_dim];
        let context = [sequences, kv_heads, piece.context(), head_dim];
        let shapes: [(DataType, &[usize]); 4] =
            [(DataType::F32, &query), (DataType::F32, &context), (DataType::F32, &context), (DataType::F32, &query)];
        device.with_views(shapes, |device, [queries, keys, values, result]| {
            device.assign(&queries, &by_head(q))?;
            rows::scale(device, &queries, scale)?;
            gather_context(device, step, piece, &planes[0], &keys)?;
            gather_context(device, step, piece, &planes[1], &values)?;
            let flat = |x: &View, rows: usize| x.reshape(&[sequences * kv_heads, rows, head_dim]);
            let (queries, answer) = (flat(&queries, group * rows), flat(&result, group * rows));
            let (keys, values) = (flat(&keys, piece.context()), flat(&values, piece.context()));
            step.with_mask(device, number, window, constants, |device, mask| {
                attend(device, [&queries, &keys, &values], mask, softcap, &answer)
            })?;
            device.assign(&by_head(out), &result)
        })?;
    }
    Ok(())
}
