//! The forms of a sum with its norm, and of writing a step's rows to the cache.

use std::fmt;

use baton_device::Result as SeamResult;
use baton_device::conformance::uniform;

use super::trial::{agree, floats, try_on};
use super::{Candidate, Place, Verdict, first};
use crate::backend::{AscendBackend, BLOCK};
use crate::chip::Chip;
use crate::device::{Device, encode, rounded};
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::ops::fused_cache::write_cache;
use crate::ops::fused_rows::add_rms_norm;
use crate::ops::rows::{add, rms_norm};

/// What the form of a sum with its norm depends on.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct NormShape {
    pub(crate) width: usize,
    pub(crate) dtype: DataType,
}

impl fmt::Display for NormShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sum and norm of {} in {}", self.width, self.dtype)
    }
}

/// Whether a sum and its norm are one operator.
pub(crate) fn sum_and_norm(backend: &AscendBackend, shape: NormShape) -> SeamResult<bool> {
    let objection = |shape: &NormShape| {
        let short = backend.chip == Chip::P310 && shape.width * shape.dtype.bytes() < 32;
        first([
            (backend.forms.strict, "fused forms are off".into()),
            (short, format!("rows on {} have at least 32 bytes", backend.chip)),
        ])
    };
    let candidates = |shape: &NormShape| {
        vec![
            Candidate { name: "AddRmsNorm".into(), form: true, objection: objection(shape) },
            Candidate { name: "InplaceAdd and RmsNorm".into(), form: false, objection: None },
        ]
    };
    backend.forms.norm.settle(shape, Place::Everywhere, candidates, |_| {
        let outcome = try_on(&backend.owner, move |device| try_norm(device, shape))?;
        Ok(outcome.and_then(|verdict| verdict))
    })
}

/// Both forms on the same rows; the sum counts too.
fn try_norm(device: &mut Device, NormShape { width, dtype }: NormShape) -> Result<Verdict, AscendError> {
    const ROWS: usize = 5;
    const EPS: f32 = 1e-5;
    let rows: (DataType, &[usize]) = (dtype, &[ROWS, width]);
    device.with_views([rows, rows, rows, (dtype, &[width])], |device, [x, residual, out, gamma]| {
        device.upload(&encode(&uniform(1, width, 1.0), dtype), gamma.base)?;
        device.upload(&encode(&uniform(2, ROWS * width, 1.0), dtype), x.base)?;
        let mut numbers = |fused: bool| {
            device.upload(&encode(&uniform(3, ROWS * width, 1.0), dtype), residual.base)?;
            if fused {
                add_rms_norm(device, &x, &residual, &gamma, EPS, &out)?;
            } else {
                add(device, &residual, &x)?;
                rms_norm(device, &residual, &gamma, EPS, &out)?;
            }
            Ok([floats(device, &residual)?, floats(device, &out)?].concat())
        };
        Ok(agree(&numbers(true)?, &numbers(false)?, dtype))
    })
}

/// What the form of writing to the cache depends on.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct CacheShape {
    pub(crate) heads: usize,
    /// Of a head, in each plane.
    pub(crate) widths: [usize; 2],
    pub(crate) dtype: DataType,
}

impl fmt::Display for CacheShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { heads, widths: [a, b], dtype } = self;
        write!(f, "cache of {heads} heads, {a} and {b} wide, in {dtype}")
    }
}

/// Whether rows are written to both planes by one operator, in a layer.
pub(crate) fn cache_write(backend: &AscendBackend, shape: CacheShape, layer: usize) -> SeamResult<bool> {
    let candidates = |shape: &CacheShape| {
        vec![
            Candidate { name: "ScatterPaKvCache".into(), form: true, objection: scatter_refuses(backend, shape) },
            Candidate { name: "InplaceIndexCopy".into(), form: false, objection: None },
        ]
    };
    backend.forms.cache.settle(shape, Place::Layer(layer), candidates, |_| {
        let outcome = try_on(&backend.owner, move |device| try_write(device, shape))?;
        Ok(outcome.and_then(|verdict| verdict))
    })
}

fn scatter_refuses(backend: &AscendBackend, shape: &CacheShape) -> Option<String> {
    /// Bytes of a head.
    const STEP: usize = 32;
    let whole = shape.widths.iter().all(|width| (width * shape.dtype.bytes()).is_multiple_of(STEP));
    first([
        (backend.forms.strict, "fused forms are off".into()),
        (backend.chip == Chip::P310, format!("{} has none", backend.chip)),
        (shape.dtype == DataType::F32, "it takes elements of 16 bits".into()),
        (!whole, format!("heads are multiples of {STEP} bytes")),
    ])
}

/// Writes some rows to an empty cache; all of it is compared.
fn try_write(device: &mut Device, shape: CacheShape) -> Result<Verdict, AscendError> {
    const BLOCKS: usize = 3;
    const SLOTS: [usize; 4] = [BLOCK + 1, 0, 3 * BLOCK - 1, BLOCK];
    let CacheShape { heads, widths, dtype } = shape;
    let rows = widths.map(|width| rounded(uniform(width as u64, SLOTS.len() * heads * width, 1.0), dtype));
    let row_dims = widths.map(|width| [SLOTS.len(), heads * width]);
    let plane_dims = widths.map(|width| [BLOCKS * BLOCK, heads * width]);
    let shapes: [(DataType, &[usize]); 5] = [
        (dtype, &row_dims[0]),
        (dtype, &row_dims[1]),
        (dtype, &plane_dims[0]),
        (dtype, &plane_dims[1]),
        (DataType::I32, &[SLOTS.len()]),
    ];
    device.with_views(shapes, |device, [a, b, plane_a, plane_b, slots]| {
        let (views, planes) = ([&a, &b], [&plane_a, &plane_b]);
        device.upload(&SLOTS.iter().flat_map(|&slot| (slot as i32).to_le_bytes()).collect::<Vec<_>>(), slots.base)?;
        for ((view, plane), rows) in views.iter().zip(planes).zip(&rows) {
            device.upload(&encode(rows, dtype), view.base)?;
            device.clear(plane.base, plane.numel() * dtype.bytes())?;
        }
        write_cache(device, views, planes, heads, &slots)?;
        for (plane, rows) in planes.iter().zip(&rows) {
            let verdict = agree(&floats(device, plane)?, &placed(rows, &SLOTS, plane), dtype);
            if verdict.is_err() {
                return Ok(verdict);
            }
        }
        Ok(Ok(()))
    })
}

/// A plane of zeros with rows at slots.
fn placed(rows: &[f32], slots: &[usize], plane: &View) -> Vec<f32> {
    let width = plane.dims[1] as usize;
    let mut all = vec![0.0; plane.numel()];
    for (row, slot) in rows.chunks_exact(width).zip(slots) {
        all[slot * width..][..width].copy_from_slice(row);
    }
    all
}
