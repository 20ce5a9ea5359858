//! Experts one after the other, for a choice that the host knows: for what grouped products do not take, and as their judge.

use std::ops::Range;

use super::moe::{ExpertsView, host_choices};
use crate::device::{Device, encode};
use crate::error::AscendError;
use crate::linear::{LinearView, linear_group};
use crate::object::{DataType, View};

type Result<T> = std::result::Result<T, AscendError>;

/// Every expert that is chosen and held, one after the other, added up in f32.
pub(super) fn run(device: &mut Device, x: &View, logits: &View, experts: &ExpertsView, out: &View) -> Result<()> {
    let (rows, hidden, inner) = (x.dims[0] as usize, experts.hidden(), experts.intermediate());
    let mut by_expert = vec![Vec::new(); experts.held.len()];
    for (row, choice) in host_choices(device, logits, rows, experts.count, &experts.routing)?.into_iter().enumerate() {
        for (e, weight) in choice.into_iter().filter(|(e, _)| experts.held.contains(e)) {
            by_expert[e - experts.held.start].push((row as i32, weight));
        }
    }
    let (ids, weights): (Vec<_>, Vec<_>) = by_expert.iter().flatten().copied().unzip();
    let (all, dtype) = (ids.len().max(1), experts.dtype());
    let full: &[usize] = &[rows, hidden];
    let shapes: [(DataType, &[usize]); 9] = [
        (DataType::F32, full),
        (DataType::I32, &[all]),
        (DataType::F32, &[all, 1]),
        (dtype, full),
        (dtype, &[rows, 2 * inner]),
        (dtype, &[rows, inner]),
        (dtype, full),
        (DataType::F32, full),
        (DataType::F32, full),
    ];
    device.with_views(shapes, |device, [sum, row_ids, row_weights, x_rows, gate_up, product, down, wide, old]| {
        let parts = &Each { sum, ids: row_ids, weights: row_weights, x: x_rows, gate_up, product, down, wide, old };
        device.clear(parts.sum.base, rows * hidden * DataType::F32.bytes())?;
        if !ids.is_empty() {
            device.upload(&ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>(), parts.ids.base)?;
            device.upload(&encode(&weights, DataType::F32), parts.weights.base)?;
        }
        let mut start = 0;
        for (e, chosen) in by_expert.iter().enumerate().filter(|(_, chosen)| !chosen.is_empty()) {
            one_expert(device, x, experts, e, start..start + chosen.len(), parts)?;
            start += chosen.len();
        }
        device.convert(&parts.sum, out)
    })
}

/// Intermediate results of [`run`]; those of one expert's rows have room for all.
struct Each {
    /// `[rows, hidden]` f32: what experts gave so far.
    sum: View,
    /// Rows by expert, i32, and their weights, f32.
    ids: View,
    weights: View,
    x: View,
    gate_up: View,
    product: View,
    down: View,
    /// `down` in f32.
    wide: View,
    /// The rows of `sum`.
    old: View,
}

/// Adds expert `e` of those held for the `entries` of the list of rows.
fn one_expert(
    device: &mut Device,
    x: &View,
    experts: &ExpertsView,
    e: usize,
    entries: Range<usize>,
    parts: &Each,
) -> Result<()> {
    let count = entries.len();
    let first = |view: &View| view.narrow(0, 0, count);
    let weight = |all: &View, out: usize, into: usize| LinearView::float(all.narrow(0, e, 1).reshape(&[out, into]));
    let (hidden, inner) = (experts.hidden(), experts.intermediate());
    let ids = parts.ids.narrow(0, entries.start, count);
    let (x_rows, gate_up, product, down) =
        (first(&parts.x), first(&parts.gate_up), first(&parts.product), first(&parts.down));
    {
        let (x, ids, rows) = (device.tensor(x), device.tensor(&ids), device.tensor(&x_rows));
        device.index_select(&x, 0, &ids, &rows)?;
    }
    linear_group(device, &x_rows, &[(weight(&experts.gate_up, 2 * inner, hidden), gate_up.clone())])?;
    {
        let gate = device.tensor(&gate_up.narrow(1, 0, inner));
        let up = device.tensor(&gate_up.narrow(1, inner, inner));
        let product = device.tensor(&product);
        device.silu(&gate, &product)?;
        device.mul_in_place(&product, &up)?;
    }
    linear_group(device, &product, &[(weight(&experts.down, hidden, inner), down.clone())])?;
    device.with_type(&down, DataType::F32, |device, wide| {
        let scaled = device.tensor(&first(&parts.wide));
        let (wide, weights) = (device.tensor(wide), device.tensor(&parts.weights.narrow(0, entries.start, count)));
        device.mul(&wide, &weights, &scaled)?;
        let (sum, ids, old) = (device.tensor(&parts.sum), device.tensor(&ids), device.tensor(&first(&parts.old)));
        let one = device.scalar(1.0, DataType::F32);
        device.index_select(&sum, 0, &ids, &old)?;
        device.add_in_place(&old, &scaled, &one)?;
        device.index_copy_in_place(&sum, 0, &ids, &old)
    })
}
