//! Operations on rows: norms, sums, activations, and the conversions between types.

use baton_device::Activation;

use crate::device::Device;
use crate::error::AscendError;
use crate::object::{DataType, View};

type Result<T> = std::result::Result<T, AscendError>;

impl Device {
    /// Runs `work` with `x` in `dtype`: itself, or a contiguous copy in scratch memory.
    pub(crate) fn with_type<T>(
        &mut self,
        x: &View,
        dtype: DataType,
        work: impl FnOnce(&mut Self, &View) -> Result<T>,
    ) -> Result<T> {
        if x.dtype == dtype {
            return work(self, x);
        }
        self.with_scratch(x.numel() * dtype.bytes(), |device, block| {
            let dims: Vec<usize> = x.dims.iter().map(|&d| d as usize).collect();
            let converted = View::new(block, dtype, &dims);
            device.convert(x, &converted)?;
            work(device, &converted)
        })
    }

    /// `out = x` in the type of `out`.
    pub(crate) fn convert(&mut self, x: &View, out: &View) -> Result<()> {
        let (x, y) = (self.tensor(x)?, self.tensor(out)?);
        self.cast(&x, out.dtype, &y)
    }
}

/// `out = rms_norm(x)` over runs of the length of `gamma`; all of one type. `out` may be `x`.
pub(crate) fn rms_norm(device: &mut Device, x: &View, gamma: &View, eps: f32, out: &View) -> Result<()> {
    let run = gamma.numel();
    let runs = x.numel() / run;
    device.with_scratch(runs * DataType::F32.bytes(), |device, block| {
        let x = device.tensor(&x.reshape(&[runs, run]))?;
        let out = device.tensor(&out.reshape(&[runs, run]))?;
        let rstd = device.tensor(&View::new(block, DataType::F32, &[runs, 1]))?;
        let gamma = device.tensor(gamma)?;
        device.rms_norm(&x, &gamma, f64::from(eps), &out, &rstd)
    })
}

/// `x += y`, in the type of `x`.
pub(crate) fn add(device: &mut Device, x: &View, y: &View) -> Result<()> {
    device.with_type(y, x.dtype, |device, y| {
        let (a, b, one) = (device.tensor(x)?, device.tensor(y)?, device.scalar(1.0, x.dtype)?);
        device.add_in_place(&a, &b, &one)
    })
}

/// `x *= factor`.
pub(crate) fn scale(device: &mut Device, x: &View, factor: f32) -> Result<()> {
    let (factor, x) = (device.scalar(factor, x.dtype)?, device.tensor(x)?);
    device.muls_in_place(&x, &factor)
}

/// `out = activation(gate) ⊙ up`, all of one type and shape.
pub(crate) fn gated(device: &mut Device, activation: Activation, gate: &View, up: &View, out: &View) -> Result<()> {
    let (gate, up, out) = (device.tensor(gate)?, device.tensor(up)?, device.tensor(out)?);
    match activation {
        Activation::Silu => device.silu(&gate, &out)?,
        Activation::GeluTanh => device.gelu(&gate, 1, &out)?,
    }
    device.mul_in_place(&out, &up)
}
