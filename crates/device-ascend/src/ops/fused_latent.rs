//! Latent attention by one operator: absorbed queries over the cached latents, for the widths that it takes.

use crate::device::Device;
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::ops::fused_attention::{StepView, attend_latent};
use crate::ops::latent::{LatentView, product};

/// As [`composed`](crate::ops::latent::attention), with queries, weight and planes of one type. The operator is given `heads`:
/// those that the layer does not have are zero.
#[allow(clippy::too_many_arguments)] // what attention is of
pub(crate) fn attention(
    device: &mut Device,
    step: &StepView,
    heads: usize,
    scale: f32,
    mask: &View,
    q: &View,
    weight: &LatentView,
    planes: &[View; 2],
    out: &View,
) -> Result<(), AscendError> {
    let LatentView { keys, values, rope } = weight;
    let [own, nope, rank] = [0, 1, 2].map(|d| keys.dims[d] as usize);
    let (rows, dtype) = (q.dims[0] as usize, keys.dtype);
    let q = q.split(1, own);
    let shapes: [(DataType, &[usize]); 3] =
        [(dtype, &[rows, heads, rank]), (dtype, &[rows, heads, *rope]), (dtype, &[heads, rows, rank])];
    device.with_views(shapes, |device, [absorbed, rotated, mixed]| {
        if heads > own {
            for view in [&absorbed, &rotated] {
                device.clear(view.base, view.numel() * dtype.bytes())?;
            }
        }
        product(device, &q.narrow(2, 0, nope).swap(0, 1), keys, &absorbed.narrow(1, 0, own).swap(0, 1))?;
        device.assign(&rotated.narrow(1, 0, own), &q.narrow(2, nope, *rope))?;
        let planes = planes.each_ref();
        attend_latent(device, [&absorbed, &rotated], planes, step, mask, scale, &mixed)?;
        product(device, &mixed.narrow(0, 0, own), &values.swap(1, 2), &out.split(1, own).swap(0, 1))
    })
}
