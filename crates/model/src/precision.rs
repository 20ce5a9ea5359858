//! What a change of precision costs a tensor, and whether a tensor is finite to begin with.

use std::fmt::Display;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use baton_device::{BlockFormat, CodedSource, DType, HostTensor, RowSource, WeightFormat};
use half::f16;
use serde::{Serialize, Serializer};

use crate::checkpoint::{CheckpointError, Part};

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
    /// Elements that were compared, on all ranks together; some on several of them.
    #[serde(skip)]
    pub(crate) measured: u64,
    /// Bytes in the checkpoint, scales and the like included.
    pub bytes_before: u64,
    /// Bytes as kept.
    pub bytes_after: u64,
}

impl Conversion {
    /// Adds what another rank found of the same tensor.
    pub(crate) fn merge(&mut self, other: &Self) {
        let sum = |of: &Self| f64::from(of.mean_abs_error) * of.measured as f64;
        let measured = self.measured + other.measured;
        self.mean_abs_error = ((sum(self) + sum(other)) / (measured as f64).max(1.0)) as f32;
        self.max_abs_error = self.max_abs_error.max(other.max_abs_error);
        self.measured = measured;
    }
}

/// How linear layers are quantised at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// Into blocks of this format, which [can be made](BlockFormat::can_be_made).
    Blocks(BlockFormat),
    /// Into 8 bits with one scale per output row, kept as Q8_0 ([`BlockFormat::int8_rows`]).
    Int8,
}

impl Quantization {
    /// The format that weights are kept in.
    pub const fn format(self) -> BlockFormat {
        match self {
            Quantization::Blocks(format) => format,
            Quantization::Int8 => BlockFormat::Q8_0,
        }
    }
}

impl From<BlockFormat> for Quantization {
    fn from(format: BlockFormat) -> Self {
        Quantization::Blocks(format)
    }
}

/// Serialises what the logs show.
pub(crate) fn as_text<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// Elements looked at together, small enough for the first-level cache.
const CHUNK: usize = 2048;

/// Index and value of the first stored NaN or infinity: an element whose exponent bits are all set.
pub(crate) fn first_non_finite(tensor: &HostTensor<'_>) -> Option<(usize, f32)> {
    let data = tensor.stored()?;
    let element = match tensor.dtype() {
        DType::F32 => first_where(data, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        DType::F16 => first_where(data, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::BF16 => first_where(data, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        DType::Ggml(format) => first_part(data, format.bytes(), |data| {
            data.chunks_exact(format.bytes()).position(|block| {
                let scale = |&at: &usize| u16::from_le_bytes([block[at], block[at + 1]]);
                format.scale_offsets().iter().map(scale).any(|s| s & 0x7c00 == 0x7c00)
            })
        }),
    }?;
    let (elements, size) = (tensor.dtype().block(), tensor.dtype().bytes(tensor.dtype().block()));
    let found = HostTensor::new(tensor.name(), tensor.dtype(), vec![elements], &data[element * size..][..size]);
    let element = element * elements;
    Some((element, found.to_f32()[0]))
}

/// Index of the first element for which `hit` holds. A chunk is searched without an early exit, which
/// compiles to vector code, and again only if something is in it.
pub(crate) fn first_where<const N: usize>(data: &[u8], hit: impl Fn([u8; N]) -> bool + Sync) -> Option<usize> {
    first_part(data, N, |data| {
        let (elements, _) = data.as_chunks::<N>();
        elements.chunks(CHUNK).enumerate().find_map(|(i, chunk)| {
            let any = chunk.iter().fold(false, |any, e| any | hit(*e));
            any.then(|| chunk.iter().position(|e| hit(*e)))?.map(|at| i * CHUNK + at)
        })
    })
}

/// The first element of `size` bytes that `find` finds, searched on all cores if there is much.
fn first_part(data: &[u8], size: usize, find: impl Fn(&[u8]) -> Option<usize> + Sync) -> Option<usize> {
    const MUCH: usize = 4 << 20;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if data.len() < MUCH || cores == 1 {
        return find(data);
    }
    let share = (data.len() / size).div_ceil(cores);
    std::thread::scope(|scope| {
        let parts: Vec<_> = data.chunks(share * size).map(|part| scope.spawn(|| find(part))).collect();
        let found = parts.into_iter().map(|part| part.join().expect("a search does not panic"));
        found.enumerate().find_map(|(i, at)| at.map(|at| i * share + at))
    })
}

/// A matrix on its way to another format: while its rows are read, what that costs is measured. Blocks are made once,
/// to keep and to measure.
#[derive(Debug)]
pub(crate) struct Measured {
    rows: Box<dyn RowSource>,
    cols: usize,
    format: WeightFormat,
    /// Blocks have one scale along a row ([`BlockFormat::int8_rows`]).
    by_row: bool,
    /// By row, so that neither order nor number of readings matters.
    losses: Mutex<Vec<Option<Loss>>>,
}

/// What was found.
#[derive(Debug, PartialEq)]
pub(crate) struct Measurement {
    /// Largest absolute difference between the rows read and what the format keeps of them.
    pub(crate) max_abs_error: f32,
    /// Mean difference.
    pub(crate) mean_abs_error: f32,
    /// Elements of these rows.
    pub(crate) elements: u64,
}

/// Of one row.
#[derive(Debug, Clone, Copy, Default)]
struct Loss {
    max: f32,
    sum: f64,
    /// An element that the format cannot hold.
    beyond: Option<f32>,
}

impl Measured {
    /// The matrix `[rows, cols]` that `rows` gives.
    pub(crate) fn new(rows: Box<dyn RowSource>, shape: [usize; 2], format: WeightFormat, by_row: bool) -> Self {
        Self { rows, cols: shape[1], format, by_row, losses: Mutex::new(vec![None; shape[0]]) }
    }

    /// The format that it goes to.
    pub(crate) fn format(&self) -> WeightFormat {
        self.format
    }

    /// What the rows that were read have lost.
    pub(crate) fn loss(&self, name: &str) -> Result<Measurement, CheckpointError> {
        let losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        let losses = || losses.iter().flatten();
        if let Some(value) = losses().find_map(|l| l.beyond) {
            return Err(CheckpointError::OutOfRange { tensor: name.into(), value, format: self.format });
        }
        let elements = losses().count() * self.cols;
        Ok(Measurement {
            max_abs_error: losses().map(|l| l.max).fold(0.0, f32::max),
            mean_abs_error: (losses().map(|l| l.sum).sum::<f64>() / elements.max(1) as f64) as f32,
            elements: elements as u64,
        })
    }

    /// Notes what rows lose; `keep` writes a piece of them, which starts at that element, as the format gives it back.
    fn measure(&self, rows: Range<usize>, values: &[f32], keep: impl Fn(usize, &[f32], &mut [f32])) {
        let rows_of = values.chunks_exact(self.cols).enumerate();
        let losses: Vec<_> = rows_of
            .map(|(i, row)| Some(Self::loss_of(row, |at, piece, kept| keep(i * self.cols + at, piece, kept))))
            .collect();
        self.losses.lock().unwrap_or_else(PoisonError::into_inner)[rows].copy_from_slice(&losses);
    }

    fn loss_of(row: &[f32], keep: impl Fn(usize, &[f32], &mut [f32])) -> Loss {
        let mut loss = Loss::default();
        for (i, block) in row.chunks(PIECE).enumerate() {
            let mut errors = [0.0; PIECE];
            keep(i * PIECE, block, &mut errors[..block.len()]);
            errors.iter_mut().zip(block).for_each(|(kept, value)| *kept = (*kept - value).abs());
            // In several sums at once, for speed: the report needs no order.
            let (parts, []) = errors.as_chunks::<8>() else { unreachable!("pieces are of 256") };
            let sums: [f32; 8] = std::array::from_fn(|i| parts.iter().map(|part| part[i]).sum());
            let sum: f32 = sums.iter().sum();
            if !sum.is_finite() {
                let beyond = block.iter().zip(&errors).find(|(_, error)| !error.is_finite());
                loss.beyond = beyond.map(|(value, _)| *value).or(loss.beyond);
            }
            loss.max = errors.iter().copied().fold(loss.max, f32::max);
            loss.sum += f64::from(sum);
        }
        loss
    }
}

impl RowSource for Measured {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let values = self.rows.rows(rows.clone());
        match self.format {
            WeightFormat::F16 => self.measure(rows, &values, |_, piece, kept| {
                kept.iter_mut().zip(piece).for_each(|(kept, v)| *kept = f16::from_f32(*v).to_f32());
            }),
            WeightFormat::BF16 => self.measure(rows, &values, |_, piece, kept| {
                kept.iter_mut().zip(piece).for_each(|(kept, v)| *kept = nearest_bf16(*v));
            }),
            // f32 holds every value; blocks are measured when they are made; codes lose nothing.
            WeightFormat::F32 | WeightFormat::Ggml(_) | WeightFormat::Coded(_) => {}
        }
        values
    }

    fn blocks(&self, rows: Range<usize>, quantize: &dyn Fn(&[f32]) -> Vec<u8>) -> Vec<u8> {
        let WeightFormat::Ggml(format) = self.format else { panic!("asked for blocks, on its way to {}", self.format) };
        let values = self.rows.rows(rows.clone());
        let blocks = if self.by_row { BlockFormat::int8_rows(&values, self.cols) } else { quantize(&values) };
        let bytes = |elements: usize| elements / format.elements() * format.bytes();
        self.measure(rows, &values, |at, piece, kept| {
            format.dequantize(&blocks[bytes(at)..][..bytes(piece.len())], kept);
        });
        blocks
    }

    fn as_coded(&self) -> Option<&dyn CodedSource> {
        self.rows.as_coded().filter(|_| matches!(self.format, WeightFormat::Coded(_)))
    }
}

/// Rows as they are stored.
#[derive(Debug)]
pub(crate) struct StoredRows {
    pub(crate) dtype: DType,
    pub(crate) cols: usize,
    pub(crate) part: Part,
}

impl RowSource for StoredRows {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let bytes = self.dtype.bytes(self.cols);
        let data = &self.part[rows.start * bytes..rows.end * bytes];
        HostTensor::new("rows", self.dtype, vec![rows.len(), self.cols], data).to_f32()
    }
}

/// Elements of a row looked at together: whole blocks of any format.
const PIECE: usize = BlockFormat::MAX_ELEMENTS;

/// The bf16 that `half` rounds a number to, without branches, so that it compiles to vector code.
fn nearest_bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn bf16_is_rounded_as_half_does() {
        let numbers = (0..=u32::MAX).step_by(4099).chain([0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff]);
        for value in numbers.map(f32::from_bits).filter(|v| !v.is_nan()) {
            assert_eq!(nearest_bf16(value).to_bits(), bf16::from_f32(value).to_f32().to_bits(), "{value}");
        }
    }

    fn tensor(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn a_non_finite_element_is_found_wherever_it_lies() {
        let len = (1 << 20) + 6; // searched in parts
        for at in [0, 31, CHUNK - 1, CHUNK, 3 * CHUNK + 5, len / 2, len - 1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![f32::MAX; len];
                let finite = tensor(&values);
                assert_eq!(first_non_finite(&HostTensor::new("t", DType::F32, vec![values.len()], &finite)), None);
                (values[at], values[len - 1]) = (bad, bad);
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
    fn a_loss_is_measured_however_rows_are_read_and_overflow_refused() {
        #[derive(Debug)]
        struct Rows(&'static [f32]);
        impl RowSource for Rows {
            fn rows(&self, rows: Range<usize>) -> Vec<f32> {
                self.0[rows.start * 2..rows.end * 2].to_vec()
            }
        }
        let measured = |values, format| Measured::new(Box::new(Rows(values)), [2, 2], format, false);
        for reads in [[0..1, 1..2], [1..2, 0..1], [0..2, 0..2]] {
            let exact = measured(&[1.0 + 1.0 / 512.0, 1.0, 1.0, 1.0 + 1.0 / 512.0], WeightFormat::F32);
            let rounded = measured(&[1.0 + 1.0 / 512.0, 1.0, 1.0, 1.0], WeightFormat::BF16);
            let large = measured(&[0.0, 1.0, 1e6, 0.0], WeightFormat::F16);
            for source in [&exact, &rounded, &large] {
                reads.iter().for_each(|rows| assert_eq!(source.rows(rows.clone()).len(), rows.len() * 2));
            }
            let loss = |of: &Measured| of.loss("t").map(|found| (found.max_abs_error, found.mean_abs_error)).unwrap();
            assert_eq!(loss(&exact), (0.0, 0.0));
            assert_eq!(loss(&rounded), (1.0 / 512.0, 0.25 / 512.0));
            assert_eq!(rounded.loss("t").unwrap().elements, 4);
            assert!(matches!(large.loss("t"), Err(CheckpointError::OutOfRange { value: 1e6, .. })));
        }
    }
}
