//! Weights in blocks against the widened matrix.

use baton_device::conformance::{random_blocks, uniform};
use baton_device::{BlockFormat, DType, HostTensor};

use super::{floats, open, values};
use crate::device::{Device, encode};
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::quant::{self, Blocks, Form};
use crate::simulator::Simulator;

/// A weight `[rows, cols]` in blocks, as a file has it.
struct Case {
    format: BlockFormat,
    rows: usize,
    cols: usize,
    blocks: Vec<u8>,
}

impl Case {
    fn new(format: BlockFormat, rows: usize, cols: usize) -> Self {
        let blocks = random_blocks(format, (rows * cols) as u64, rows * cols, (cols as f32).sqrt().recip());
        Self { format, rows, cols, blocks }
    }

    /// With one scale for each row.
    fn by_row(rows: usize, cols: usize) -> Self {
        let values = uniform(7, rows * cols, (cols as f32).sqrt().recip());
        Self { format: BlockFormat::Q8_0, rows, cols, blocks: BlockFormat::int8_rows(&values, cols) }
    }

    fn tensor(&self) -> HostTensor<'_> {
        HostTensor::new("weight", DType::Ggml(self.format), vec![self.rows, self.cols], &self.blocks)
    }

    /// Keeps it, and gives `x·Wᵀ` for `tokens` rows and some of its own rows; each with what they should be.
    fn run(&self, tokens: usize, activations: DataType, form: Form) -> [(Vec<f32>, Vec<f32>); 2] {
        let owner = open();
        let kept = Blocks::new(&owner, &self.tensor(), self.format, activations).expect("it is offered");
        let (view, rows, cols) = (kept.view(), self.rows, self.cols);
        assert_eq!(view.form(), form);
        // Numbers that both types have.
        let x: Vec<f32> = uniform(3, tokens * cols, 1.0).into_iter().map(|v| (v * 64.0).round() / 64.0).collect();
        let ids: Vec<u32> = (0..tokens).map(|t| (t * 7 % rows) as u32).collect();
        let (numbers, indices) = (x.clone(), ids.clone());
        let [product, picked] = owner
            .call("test", move |device| {
                let x = floats(device, &numbers, activations)?.reshape(&[tokens, cols]);
                let index = View::new(device.alloc(tokens * 4)?, DataType::I32, &[tokens]);
                let bytes: Vec<u8> = indices.iter().flat_map(|id| id.to_le_bytes()).collect();
                device.upload(&bytes, index.base)?;
                Ok([
                    output(device, &[tokens, rows], activations, |device, out| quant::product(device, &x, &view, out))?,
                    output(device, &[tokens, cols], activations, |device, out| {
                        quant::rows(device, &index, &view, out)
                    })?,
                ])
            })
            .unwrap_or_else(|error| panic!("{form:?} {rows}x{cols}: {error}"));
        let weight = self.tensor().to_f32();
        let dot = |t: usize, n: usize| -> f32 {
            let pairs = x[t * cols..][..cols].iter().zip(&weight[n * cols..][..cols]);
            pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() as f32
        };
        let products = (0..tokens).flat_map(|t| (0..rows).map(move |n| (t, n))).map(|(t, n)| dot(t, n)).collect();
        let rows = ids.iter().flat_map(|id| weight[*id as usize * cols..][..cols].to_vec()).collect();
        [(product, products), (picked, rows)]
    }
}

/// What `work` writes, in f32.
fn output(
    device: &mut Device,
    dims: &[usize],
    dtype: DataType,
    work: impl FnOnce(&mut Device, &View) -> Result<(), AscendError>,
) -> Result<Vec<f32>, AscendError> {
    let out = View::new(device.alloc(dims.iter().product::<usize>() * dtype.bytes())?, dtype, dims);
    work(device, &out)?;
    device.with_type(&out, DataType::F32, |device, wide| values(device, wide))
}

/// Half a unit in the last place of a type, for numbers of order one.
fn unit(dtype: DataType) -> f32 {
    if dtype == DataType::BF16 { 1.0 / 256.0 } else { 1.0 / 2048.0 }
}

fn close(results: &[(Vec<f32>, Vec<f32>); 2], tolerance: f32, what: &str) {
    for (actual, expected) in results {
        assert_eq!(actual.len(), expected.len());
        for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
            assert!((a - e).abs() <= tolerance * e.abs().max(1.0), "{what}, element {i}: {a}, not {e}");
        }
    }
}

#[test]
fn groups_of_8_and_4_bits_give_the_products_and_rows_of_the_widened_matrix() {
    let simulator = Simulator::new();
    for activations in [DataType::F16, DataType::BF16] {
        for (format, form) in [(BlockFormat::Q8_0, Form::Int8), (BlockFormat::Q4_0, Form::Int4)] {
            for (tokens, rows, cols) in [(1, 1, 64), (3, 17, 96), (2, 65, 160), (19, 33, 64)] {
                let results = Case::new(format, rows, cols).run(tokens, activations, form);
                // Scales and the result are rounded once each; the sums are not.
                close(&results, 4.0 * unit(activations), &format!("{format} {tokens}x{rows}x{cols} {activations:?}"));
            }
        }
    }
    simulator.expect_clean();
}

#[test]
fn rows_of_one_scale_meet_activations_in_8_bits() {
    let simulator = Simulator::new();
    for activations in [DataType::F16, DataType::BF16] {
        for (tokens, rows, cols) in [(1, 1, 32), (3, 17, 96), (19, 33, 64)] {
            let results = Case::by_row(rows, cols).run(tokens, activations, Form::Rows);
            // Activations lose up to half a step of 127 each, of random sign.
            close(&results, 2e-2, &format!("{tokens}x{rows}x{cols} {activations:?}"));
        }
    }
    simulator.expect_clean();
}

#[test]
fn a_weight_of_more_rows_than_an_operator_takes_is_multiplied_in_parts() {
    let simulator = Simulator::new();
    for (format, form) in [(BlockFormat::Q8_0, Form::Int8), (BlockFormat::Q4_0, Form::Int4)] {
        let results = Case::new(format, 70_001, 64).run(2, DataType::F16, form);
        close(&results, 4.0 * unit(DataType::F16), &format!("{format}"));
    }
    simulator.expect_clean();
}

#[test]
fn blocks_are_made_of_floats_as_the_format_makes_them() {
    let simulator = Simulator::new();
    let values = uniform(5, 3 * 64, 0.2);
    let bytes = encode(&values, DataType::F32);
    let made = HostTensor::new("weight", DType::F32, vec![3, 64], &bytes);
    let owner = open();
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_0] {
        let kept = Blocks::new(&owner, &made, format, DataType::F16).expect("it is offered");
        let (mut wide, view) = (vec![0.0; values.len()], kept.view());
        format.dequantize(&format.quantize(&values), &mut wide);
        let rows = owner
            .call("test", move |device| {
                let index = View::new(device.alloc(12)?, DataType::I32, &[3]);
                device.upload(&[0u32, 1, 2].map(u32::to_le_bytes).concat(), index.base)?;
                output(device, &[3, 64], DataType::F32, |device, out| quant::rows(device, &index, &view, out))
            })
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(rows, wide, "scales in f16 are those of the blocks");
    }
    drop(owner);
    simulator.expect_clean();
}
