//! The form of a linear weight: rows as the checkpoint has them, or the blocks in which matrix units read.

use std::fmt;

use baton_device::Result as SeamResult;
use baton_device::conformance::uniform;

use super::trial::{agree, floats, try_on};
use super::{Candidate, Place, Verdict, first};
use crate::backend::AscendBackend;
use crate::device::{Device, encode};
use crate::error::AscendError;
use crate::linear::{LinearView, linear_group};
use crate::object::{Address, DataType, View};
use crate::ops::fractal;

/// What the form of a weight depends on.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct WeightShape {
    /// `[out, in]`.
    pub(crate) dims: [usize; 2],
    pub(crate) dtype: DataType,
    /// Whether rows are looked up in it.
    pub(crate) table: bool,
}

impl fmt::Display for WeightShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dims: [out, into], dtype, table } = self;
        write!(f, "{} of {out} by {into} in {dtype}", if *table { "table" } else { "weight" })
    }
}

/// Whether a weight is kept in blocks.
pub(crate) fn weight_in_blocks(backend: &AscendBackend, shape: WeightShape) -> SeamResult<bool> {
    let candidates = |shape: &WeightShape| {
        vec![
            Candidate { name: "FRACTAL_NZ".into(), form: true, objection: blocks_refuse(backend.forms.strict, shape) },
            Candidate { name: "rows".into(), form: false, objection: None },
        ]
    };
    backend.forms.weights.settle(shape, Place::Everywhere, candidates, |_| {
        let outcome = try_on(&backend.owner, move |device| trial(device, shape))?;
        Ok(outcome.and_then(|verdict| verdict))
    })
}

/// Why a weight is not brought into blocks, on all chips alike.
fn blocks_refuse(strict: bool, shape: &WeightShape) -> Option<String> {
    first([
        (strict, "fused forms are off".into()),
        (shape.table, "rows are looked up".into()),
        (shape.dtype == DataType::F32, "it takes f16 and bf16".into()),
        (shape.dims.contains(&1), "it takes several rows and columns".into()),
    ])
}

/// Multiplies with rows, and with the blocks that are made of them: a row of activations alone, and more than a block has.
fn trial(device: &mut Device, WeightShape { dims, dtype, .. }: WeightShape) -> Result<Verdict, AscendError> {
    const TOKENS: usize = 18;
    let (room, [out, into]) = (fractal::elements(dims), dims);
    let shapes: [(DataType, &[usize]); 3] = [(dtype, &[room]), (dtype, &[TOKENS, into]), (dtype, &[TOKENS, out])];
    device.with_views(shapes, |device, [memory, x, y]| {
        let weight = fractal::with_room(memory.base, dtype, dims);
        let asked = fractal::elements_asked(device, &weight)?;
        if asked != room as u64 {
            return Ok(Err(format!("the library wants memory for {asked} elements, blocks have {room}")));
        }
        fill(device, &weight)?;
        device.upload(&encode(&uniform(2, TOKENS * into, 1.0), dtype), x.base)?;
        let numbers = |device: &mut Device, weight: LinearView| {
            for (start, tokens) in [(0, 1), (1, TOKENS - 1)] {
                let [x, y] = [&x, &y].map(|view| view.narrow(0, start, tokens));
                linear_group(device, &x, &[(weight.clone(), y)])?;
            }
            floats(device, &y)
        };
        let judge = numbers(device, LinearView::float(weight.clone()))?;
        fractal::to_blocks(device, &weight)?;
        Ok(agree(&numbers(device, LinearView::fractal(weight))?, &judge, dtype))
    })
}

/// Numbers for a whole weight. Where it is large they repeat, but in no rhythm of rows or blocks: so the host makes few and the
/// device copies the others.
fn fill(device: &mut Device, weight: &View) -> Result<(), AscendError> {
    /// A prime times what keeps copies on boundaries of 32 bytes.
    const FIRST: usize = 4099 * 16;
    let (all, bytes) = (weight.numel(), weight.dtype.bytes());
    let mut filled = all.min(FIRST);
    device.upload(&encode(&uniform(1, filled, 1.0), weight.dtype), weight.base)?;
    while filled < all {
        let more = filled.min(all - filled);
        device.copy_within(weight.base, Address(weight.base.0 + filled * bytes), more * bytes)?;
        filled += more;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_wide_types_and_single_rows_or_columns_stay_rows() {
        let weight = WeightShape { dims: [4096, 1024], dtype: DataType::BF16, table: false };
        assert_eq!(blocks_refuse(false, &weight), None);
        assert_eq!(blocks_refuse(false, &WeightShape { dtype: DataType::F16, ..weight }), None);
        assert!(blocks_refuse(true, &weight).is_some());
        for shape in [
            WeightShape { table: true, ..weight },
            WeightShape { dtype: DataType::F32, ..weight },
            WeightShape { dims: [1, 1024], ..weight },
            WeightShape { dims: [4096, 1], ..weight },
        ] {
            assert!(blocks_refuse(false, &shape).is_some(), "{shape}");
        }
    }
}
