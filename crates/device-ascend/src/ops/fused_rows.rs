//! A sum and its norm in one operator.

use crate::device::Device;
use crate::error::AscendError;
use crate::object::{DataType, View};

/// `residual += x; out = rms_norm(residual)`, all of one type. That the sum may be written over one of its terms:
/// UNCONFIRMED.
pub(crate) fn add_rms_norm(
    device: &mut Device,
    x: &View,
    residual: &View,
    gamma: &View,
    eps: f32,
    out: &View,
) -> Result<(), AscendError> {
    device.with_scratch(x.dims[0] as usize * DataType::F32.bytes(), |device, block| {
        let rstd = device.tensor(&View::new(block, DataType::F32, &[x.dims[0] as usize, 1]));
        let (x, residual, gamma, out) =
            (device.tensor(x), device.tensor(residual), device.tensor(gamma), device.tensor(out));
        device.add_rms_norm(&x, &residual, &gamma, f64::from(eps), &out, &rstd, &residual)
    })
}
