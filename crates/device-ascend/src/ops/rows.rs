//! Operations on rows: norms, sums, activations, and the conversions between types.

use baton_device::Activation;

use crate::abi::consts::cube_math;
use crate::chip::Chip;
use crate::device::{Device, decode};
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
        let dims: Vec<usize> = x.dims.iter().map(|&d| d as usize).collect();
        self.with_views([(dtype, &dims)], |device, [converted]| {
            device.convert(x, &converted)?;
            work(device, &converted)
        })
    }

    /// `out = x` in the type of `out`.
    pub(crate) fn convert(&mut self, x: &View, out: &View) -> Result<()> {
        let (x, y) = (self.tensor(x), self.tensor(out));
        self.cast(&x, out.dtype, &y)
    }

    /// `to = from` for any strides and types; shapes are equal.
    pub(crate) fn assign(&mut self, to: &View, from: &View) -> Result<()> {
        assert_eq!(to.dims, from.dims, "a copy between shapes");
        if to.dtype == from.dtype && to.is_contiguous() && from.is_contiguous() {
            return self.copy_within(from.start(), to.start(), to.numel() * to.dtype.bytes());
        }
        let (to, from) = (self.tensor(to), self.tensor(from));
        self.copy(&to, &from)
    }

    /// How matrix products are to be computed: in the operands' type where the chip has that.
    pub(crate) fn cube_math(&self) -> i8 {
        let math = match self.chip() {
            Chip::P310 => cube_math::ALLOW_FP32_DOWN_PRECISION,
            Chip::A2 | Chip::A3 => cube_math::KEEP_DTYPE,
        };
        math as i8
    }
}

/// Fewest bytes of a row that the 310P norms.
const MIN_NORM_BYTES_310P: usize = 32;

/// `out = rms_norm(x)` over runs of the length of `gamma`; x and out of one type. `out` may be `x`: that the operator reads a
/// run before it writes it is UNCONFIRMED. `gamma` is f32, on 310P of the type of x.
pub(crate) fn rms_norm(device: &mut Device, x: &View, gamma: &View, eps: f32, out: &View) -> Result<()> {
    let run = gamma.numel();
    let runs = x.numel() / run;
    let (x, out) = (x.reshape(&[runs, run]), out.reshape(&[runs, run]));
    let least = MIN_NORM_BYTES_310P / x.dtype.bytes();
    if device.chip() == Chip::P310 && run < least {
        return padded_norm(device, &x, gamma, eps, &out, least);
    }
    device.with_views([(DataType::F32, &[runs, 1])], |device, [rstd]| {
        let (x, out, gamma) = (device.tensor(&x), device.tensor(&out), device.tensor(gamma));
        let rstd = device.tensor(&rstd);
        device.rms_norm(&x, &gamma, f64::from(eps), &out, &rstd)
    })
}

/// As above for rows that are too short for the chip, with zeros behind them up to `width` columns: the mean over those is
/// `run / width` of theirs, so epsilon and weights are scaled to that.
fn padded_norm(device: &mut Device, x: &View, gamma: &View, eps: f32, out: &View, width: usize) -> Result<()> {
    let (runs, run) = (x.dims[0] as usize, gamma.numel());
    let share = run as f32 / width as f32;
    let shapes: [(DataType, &[usize]); 4] =
        [(x.dtype, &[runs, width]), (x.dtype, &[runs, width]), (gamma.dtype, &[width]), (DataType::F32, &[runs, 1])];
    device.with_views(shapes, |device, [wide, normed, weights, rstd]| {
        for view in [&wide, &weights] {
            device.clear(view.base, view.numel() * view.dtype.bytes())?;
        }
        device.assign(&wide.narrow(1, 0, run), x)?;
        device.assign(&weights.narrow(0, 0, run), gamma)?;
        scale(device, &weights, share.sqrt())?;
        let (x, y) = (device.tensor(&wide), device.tensor(&normed));
        let (gamma, rstd) = (device.tensor(&weights), device.tensor(&rstd));
        device.rms_norm(&x, &gamma, f64::from(eps * share), &y, &rstd)?;
        device.assign(out, &normed.narrow(1, 0, run))
    })
}

/// `x += y`, in the type of `x`.
pub(crate) fn add(device: &mut Device, x: &View, y: &View) -> Result<()> {
    device.with_type(y, x.dtype, |device, y| {
        let (a, b, one) = (device.tensor(x), device.tensor(y), device.scalar(1.0, x.dtype));
        device.add_in_place(&a, &b, &one)
    })
}

/// `x *= factor`. The factor is f32 whatever the type of `x`, so that it is not rounded.
pub(crate) fn scale(device: &mut Device, x: &View, factor: f32) -> Result<()> {
    let (factor, x) = (device.scalar(factor, DataType::F32), device.tensor(x));
    device.muls_in_place(&x, &factor)
}

/// `x = cap · tanh(x / cap)`; `x` is f32.
pub(crate) fn softcap(device: &mut Device, x: &View, cap: f32) -> Result<()> {
    let dims: Vec<usize> = x.dims.iter().map(|&d| d as usize).collect();
    device.with_views([(DataType::F32, &dims)], |device, [y]| {
        let (x, y) = (device.tensor(x), device.tensor(&y));
        let (inverse, cap) = (device.scalar(cap.recip(), DataType::F32), device.scalar(cap, DataType::F32));
        device.muls(&x, &inverse, &y)?;
        device.tanh(&y, &x)?;
        device.muls_in_place(&x, &cap)
    })
}

/// `out = activation(gate) ⊙ up`, in the type of `gate`.
pub(crate) fn gated(device: &mut Device, activation: Activation, gate: &View, up: &View, out: &View) -> Result<()> {
    device.with_type(up, gate.dtype, |device, up| {
        let (gate, up, out) = (device.tensor(gate), device.tensor(up), device.tensor(out));
        match activation {
            Activation::Silu => device.silu(&gate, &out)?,
            Activation::GeluTanh => device.gelu(&gate, 1, &out)?,
        }
        device.mul_in_place(&out, &up)
    })
}

/// The elements on the host.
pub(crate) fn read(device: &mut Device, x: &View) -> Result<Vec<f32>> {
    device.with_type(x, DataType::F32, |device, x| {
        let bytes = device.download(x.start(), x.numel() * DataType::F32.bytes())?;
        let mut values = Vec::new();
        decode(&bytes, &mut values);
        Ok(values)
    })
}
