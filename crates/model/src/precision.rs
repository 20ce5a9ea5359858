//! What a change of precision costs a tensor, and whether a tensor is finite to begin with.

use std::fmt::Display;

use baton_device::{DType, HostTensor, WeightFormat, q8_0};
use half::{bf16, f16};
use serde::{Serialize, Serializer};

use crate::checkpoint::CheckpointError;

/// A change of precision at load.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Conversion {
    /// Name of the weight: that of its tensor, or of the one it would have without quantisation.
    pub tensor: String,
    /// Form stored: an element type, or a quantisation as its parts and sizes (`fp8 e4m3, block 128x128`).
    pub from: String,
    /// Format kept.
    #[serde(serialize_with = "as_text")]
    pub to: WeightFormat,
    /// Largest absolute difference between an element kept and the f32 value of the stored one.
    pub max_abs_error: f32,
    /// Mean absolute difference.
    pub mean_abs_error: f32,
    /// Bytes in the checkpoint, scales and the like included.
    pub bytes_before: u64,
    /// Bytes as kept.
    pub bytes_after: u64,
}

/// Serialises what the logs show.
pub(crate) fn as_text<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// Elements looked at together: a multiple of every block size, small enough for the first-level cache.
const CHUNK: usize = 64 * q8_0::BLOCK;

/// Index and value of the first stored NaN or infinity: an element whose exponent bits are all set.
pub(crate) fn first_non_finite(tensor: &HostTensor<'_>) -> Option<(usize, f32)> {
    let data = tensor.stored()?;
    let element = match tensor.dtype() {
        DType::F32 => first_where(data, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        DType::F16 => first_where(data, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::BF16 => first_where(data, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        DType::Ggml(format) => data.chunks_exact(format.bytes()).position(|block| {
            let scale = |&at: &usize| u16::from_le_bytes([block[at], block[at + 1]]);
            format.scale_offsets().iter().map(scale).any(|s| s & 0x7c00 == 0x7c00)
        }),
    }?;
    let (elements, size) = (tensor.dtype().block(), tensor.dtype().bytes(tensor.dtype().block()));
    let found = HostTensor::new(tensor.name(), tensor.dtype(), vec![elements], &data[element * size..][..size]);
    let element = element * elements;
    Some((element, found.to_f32()[0]))
}

/// Index of the first element for which `hit` holds. A chunk is searched without an early exit, which
/// compiles to vector code, and again only if something is in it.
fn first_where<const N: usize>(data: &[u8], hit: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (elements, _) = data.as_chunks::<N>();
    elements.chunks(CHUNK).enumerate().find_map(|(i, chunk)| {
        let any = chunk.iter().fold(false, |any, e| any | hit(*e));
        any.then(|| chunk.iter().position(|e| hit(*e)))?.map(|at| i * CHUNK + at)
    })
}

/// Largest and mean absolute difference between `tensor`'s elements and what `format` keeps of them.
pub(crate) fn loss(tensor: &HostTensor<'_>, format: WeightFormat) -> Result<(f32, f32), CheckpointError> {
    let (mut max, mut sum) = (0.0f32, 0.0f64);
    for chunk in chunks(tensor) {
        for block in chunk.chunks(q8_0::BLOCK) {
            for (value, kept) in block.iter().zip(keep(block, format)) {
                let error = (value - kept).abs();
                if !error.is_finite() {
                    return Err(CheckpointError::OutOfRange { tensor: tensor.name().into(), value: *value, format });
                }
                max = max.max(error);
                sum += f64::from(error);
            }
        }
    }
    Ok((max, (sum / tensor.len() as f64) as f32))
}

/// A block as `format` gives it back.
fn keep(block: &[f32], format: WeightFormat) -> [f32; q8_0::BLOCK] {
    let mut kept = [0.0; q8_0::BLOCK];
    kept[..block.len()].copy_from_slice(block);
    match format {
        WeightFormat::F32 | WeightFormat::Ggml(_) => kept,
        WeightFormat::F16 => kept.map(|v| f16::from_f32(v).to_f32()),
        WeightFormat::BF16 => kept.map(|v| bf16::from_f32(v).to_f32()),
        WeightFormat::Q8_0 => {
            let (scale, q) = q8_0::quantize_weight_block(&kept);
            q.map(|q| f32::from(q) * scale.to_f32())
        }
    }
}

/// A matrix's elements, some rows at a time.
fn chunks<'a>(tensor: &HostTensor<'a>) -> impl Iterator<Item = Vec<f32>> + use<'a> {
    let tensor = tensor.clone();
    let (rows, cols) = (tensor.shape()[0], tensor.len() / tensor.shape()[0]);
    let step = (CHUNK / cols).max(1);
    (0..rows).step_by(step).map(move |start| tensor.rows(start, step.min(rows - start)).to_f32())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn a_non_finite_element_is_found_wherever_it_lies() {
        for at in [0, 31, CHUNK - 1, CHUNK, 3 * CHUNK + 5] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![f32::MAX; 3 * CHUNK + 6];
                let finite = tensor(&values);
                assert_eq!(first_non_finite(&HostTensor::new("t", DType::F32, vec![values.len()], &finite)), None);
                values[at] = bad;
                let data = tensor(&values);
                let found = first_non_finite(&HostTensor::new("t", DType::F32, vec![values.len()], &data));
                assert_eq!(found.map(|f| f.0), Some(at));
            }
        }
        let f16s: Vec<u8> = [f16::MAX, f16::MIN, f16::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(first_non_finite(&HostTensor::new("t", DType::F16, vec![3], &f16s)).map(|f| f.0), Some(2));
        let bf16s: Vec<u8> = [bf16::MAX, bf16::INFINITY].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(first_non_finite(&HostTensor::new("t", DType::BF16, vec![2], &bf16s)), Some((1, f32::INFINITY)));
    }

    #[test]
    fn a_loss_is_measured_and_overflow_refused() {
        let data = tensor(&[1.0 + 1.0 / 512.0, 1.0]);
        let host = |data| HostTensor::new("t", DType::F32, vec![1, 2], data);
        assert_eq!(loss(&host(&data), WeightFormat::BF16).unwrap(), (1.0 / 512.0, 0.5 / 512.0));
        assert_eq!(loss(&host(&data), WeightFormat::F32).unwrap(), (0.0, 0.0));
        let large = tensor(&[1e6, 0.0]);
        assert!(matches!(loss(&host(&large), WeightFormat::F16), Err(CheckpointError::OutOfRange { .. })));
    }
}
