//! Rotary positions. Tables hold each pair's cosine and sine once, in f32; a step's rows of them are laid out for the pairing
//! and converted once, and serve all layers.

use baton_device::RopeLayout;

use crate::chip::Chip;
use crate::device::Device;
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::ops::index::select;
use crate::plan::Step;

type Result<T> = std::result::Result<T, AscendError>;

/// Rotates columns of x `[rows, heads * head_dim]`; `table` is `[positions, 2, dim / 2]`.
pub(crate) fn rope(device: &mut Device, x: &View, layout: RopeLayout, table: &View, step: &Step) -> Result<()> {
    let RopeLayout { heads, head_dim: _, offset, dim, interleaved } = layout;
    let key = (table.base, interleaved, x.dtype);
    let [cos, sin] = step.angles(device, key, dim, |device, out| angles(device, table, interleaved, step, out))?;
    let part = x.split(1, heads).narrow(2, offset, dim);
    if takes(device.chip(), &layout) && device.operators().rotary.is_some() {
        let rows = step.rows;
        return device.with_views([(x.dtype, &[rows, heads, dim])], |device, [rotated]| {
            {
                let [cos, sin] = [cos, sin].map(|view| view.reshape(&[rows, 1, dim]));
                let (x, cos, sin) = (device.tensor(&part), device.tensor(&cos), device.tensor(&sin));
                device.rotary(&x, &cos, &sin, i64::from(interleaved), &device.tensor(&rotated))?;
            }
            device.assign(&part, &rotated)
        });
    }
    composed(device, &part, interleaved, [&cos, &sin])
}

/// Whether the chip's operator takes the layout.
fn takes(chip: Chip, layout: &RopeLayout) -> bool {
    let RopeLayout { heads, dim, interleaved, .. } = *layout;
    heads < 1000
        && match chip {
            Chip::A2 | Chip::A3 => dim < 896,
            Chip::P310 => !interleaved && dim <= 128 && dim.is_multiple_of(32),
        }
}

/// Cosines and sines of a step's rows, `[rows, dim]` each, every one at both columns of its pair.
fn angles(device: &mut Device, table: &View, interleaved: bool, step: &Step, out: &[View; 2]) -> Result<()> {
    let (rows, pairs) = (step.rows, table.dims[2] as usize);
    device.with_views([(DataType::F32, &[rows, 2 * pairs])], |device, [picked]| {
        let positions = step.positions(device)?;
        select(device, &table.reshape(&[table.dims[0] as usize, 2 * pairs]), &positions, &picked)?;
        for (i, out) in out.iter().enumerate() {
            let once = picked.narrow(1, i * pairs, pairs);
            let (dims, twice) = if interleaved {
                ([rows, pairs, 2], once.broadcast(2, 2))
            } else {
                ([rows, 2, pairs], once.broadcast(1, 2))
            };
            device.assign(&out.reshape(&dims), &twice)?;
        }
        Ok(())
    })
}

/// As the operator, of products and sums: with x = (a, b), `a' = a·cos - b·sin` and `b' = b·cos + a·sin`.
fn composed(device: &mut Device, x: &View, interleaved: bool, angles: [&View; 2]) -> Result<()> {
    let (rows, heads, pairs) = (x.dims[0] as usize, x.dims[1] as usize, x.dims[2] as usize / 2);
    // The halves of the pairs' columns in a view whose last dimension they are.
    let half = |view: &View, second: usize| {
        let last = view.dims.len() - 1;
        if !interleaved {
            return view.narrow(last, second * pairs, pairs);
        }
        let mut every_other = view.split(last, pairs).narrow(last + 1, second, 1);
        every_other.dims.pop();
        every_other.strides.pop();
        every_other
    };
    let [cos, sin] = angles.map(|view| half(&view.reshape(&[rows, 1, 2 * pairs]), 0));
    let dims = [rows, heads, pairs];
    let shapes: [(DataType, &[usize]); 4] = [(x.dtype, &dims); 4];
    device.with_views(shapes, |device, [a_cos, b_sin, b_cos, a_sin]| {
        let (a, b) = (half(x, 0), half(x, 1));
        for (x, angle, out) in [(&a, &cos, &a_cos), (&b, &sin, &b_sin), (&b, &cos, &b_cos), (&a, &sin, &a_sin)] {
            let (x, angle, out) = (device.tensor(x), device.tensor(angle), device.tensor(out));
            device.mul(&x, &angle, &out)?;
        }
        for (sum, other, sign, to) in [(&a_cos, &b_sin, -1.0, &a), (&b_cos, &a_sin, 1.0, &b)] {
            let (x, y, sign) = (device.tensor(sum), device.tensor(other), device.scalar(sign, x.dtype));
            device.add_in_place(&x, &y, &sign)?;
            device.assign(to, sum)?;
        }
        Ok(())
    })
}
