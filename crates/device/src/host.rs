//! Tensors on the host on their way to a device: borrowed from a mapped checkpoint, never owned. What is
//! stored in a form that no device keeps is a [`RowSource`], computed while it is read, so that a whole
//! widened tensor never exists.
//!
//! Invariant: stored bytes are `dtype.bytes(shape.product())` and rows are whole blocks, checked by
//! [`HostTensor::new`].

use std::fmt;
use std::ops::Range;

use half::f16;

use crate::{CodedRows, CodedSource, Coding, DType, DeviceError, Result, Routing, WeightFormat};

/// A matrix whose rows are computed when asked for: weights of a quantised checkpoint.
pub trait RowSource: fmt::Debug + Send + Sync {
    /// The elements of some rows, row-major.
    fn rows(&self, rows: Range<usize>) -> Vec<f32>;

    /// Some rows as the blocks that a device keeps, made by the device's `quantize`, unless the source has its own way.
    fn blocks(&self, rows: Range<usize>, quantize: &dyn Fn(&[f32]) -> Vec<u8>) -> Vec<u8> {
        quantize(&self.rows(rows))
    }

    /// The codes, if that is how it is stored.
    fn as_coded(&self) -> Option<&dyn CodedSource> {
        None
    }
}

/// A tensor as it lies in a checkpoint: row-major, little-endian; or the f32 matrix that it stands for.
#[derive(Debug, Clone)]
pub struct HostTensor<'a> {
    name: &'a str,
    dtype: DType,
    shape: Vec<usize>,
    data: Data<'a>,
}

#[derive(Debug, Clone)]
enum Data<'a> {
    Stored(&'a [u8]),
    /// The rows from `start` on.
    Computed {
        source: &'a dyn RowSource,
        start: usize,
    },
}

impl<'a> HostTensor<'a> {
    /// Wraps `data`.
    ///
    /// # Panics
    /// If the byte length is not what shape and dtype imply, or rows are not whole blocks; readers of
    /// files check that first.
    pub fn new(name: &'a str, dtype: DType, shape: Vec<usize>, data: &'a [u8]) -> Self {
        let want = dtype.bytes(shape.iter().product());
        let cols = shape.last().copied().unwrap_or(1);
        assert!(cols.is_multiple_of(dtype.block()), "{name}: rows of {cols} are not whole blocks of {dtype}");
        assert_eq!(data.len(), want, "{name}: {shape:?} of {dtype} takes {want} bytes");
        Self { name, dtype, shape, data: Data::Stored(data) }
    }

    /// The matrix `[rows, cols]` that `source` computes, of dtype f32.
    pub fn computed(name: &'a str, shape: [usize; 2], source: &'a dyn RowSource) -> Self {
        Self { name, dtype: DType::F32, shape: shape.to_vec(), data: Data::Computed { source, start: 0 } }
    }

    /// Name in the checkpoint, for messages.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The bytes, little-endian, possibly unaligned; `None` of a computed matrix.
    pub fn stored(&self) -> Option<&'a [u8]> {
        match self.data {
            Data::Stored(data) => Some(data),
            Data::Computed { .. } => None,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows `start..start + count` along the outermost dimension, without copying: rows of a matrix,
    /// elements of a vector.
    ///
    /// # Panics
    /// If the tensor has no dimension or the range leaves it.
    pub fn rows(&self, start: usize, count: usize) -> HostTensor<'a> {
        let [rows, inner @ ..] = self.shape.as_slice() else { panic!("{}: rows of a scalar", self.name) };
        assert!(start + count <= *rows, "{}: rows {start}+{count} of {rows}", self.name);
        let stride = self.dtype.bytes(inner.iter().product());
        let data = match self.data {
            Data::Stored(data) => Data::Stored(&data[start * stride..(start + count) * stride]),
            Data::Computed { source, start: first } => Data::Computed { source, start: first + start },
        };
        HostTensor { name: self.name, dtype: self.dtype, shape: [&[count], inner].concat(), data }
    }

    /// All elements widened to f32 (exact for every float, ggml's own values for blocks).
    pub fn to_f32(&self) -> Vec<f32> {
        let data = match self.data {
            Data::Stored(data) => data,
            Data::Computed { source, start } => return source.rows(start..start + self.shape[0]),
        };
        match self.dtype {
            DType::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            DType::F16 => data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            // Without the branch on NaN that `half` takes, so that it compiles to vector code.
            DType::BF16 => {
                data.as_chunks().0.iter().map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)).collect()
            }
            DType::Ggml(format) => {
                let mut values = vec![0.0; self.len()];
                format.dequantize(data, &mut values);
                values
            }
        }
    }

    /// All elements as blocks, which `quantize` makes of whole rows.
    pub fn to_blocks(&self, quantize: &dyn Fn(&[f32]) -> Vec<u8>) -> Vec<u8> {
        match self.data {
            Data::Stored(_) => quantize(&self.to_f32()),
            Data::Computed { source, start } => source.blocks(start..start + self.shape[0], quantize),
        }
    }

    /// How it is codes under scales, if it is.
    pub fn coding(&self) -> Option<&'a Coding> {
        self.coded().map(|(source, _)| source.coding())
    }

    /// All rows as codes.
    ///
    /// # Panics
    /// If it is not [coded](Self::coding).
    pub fn to_codes(&self) -> CodedRows {
        let (source, start) = self.coded().expect("a matrix of codes");
        source.codes(start..start + self.shape[0])
    }

    fn coded(&self) -> Option<(&'a dyn CodedSource, usize)> {
        match self.data {
            Data::Stored(_) => None,
            Data::Computed { source, start } => source.as_coded().map(|source| (source, start)),
        }
    }

    /// `Ok` if the tensor can be kept in `format`: as a file's blocks or codes, or in rows of whole blocks that can be made.
    pub fn expect_keepable(&self, format: WeightFormat) -> Result<()> {
        let cols = self.shape.last().copied().unwrap_or(1);
        let reason = match format {
            WeightFormat::Ggml(blocks) if self.dtype == DType::Ggml(blocks) => return Ok(()),
            WeightFormat::Coded(code) if self.coding().is_some_and(|coding| coding.code == code) => return Ok(()),
            WeightFormat::Coded(_) => "codes are kept as a file has them, never made".to_owned(),
            WeightFormat::Ggml(blocks) if !blocks.can_be_made() => {
                format!("{blocks} is kept as a file has it, never made")
            }
            WeightFormat::Ggml(blocks) if !cols.is_multiple_of(blocks.elements()) => {
                format!("its {cols} columns are not a multiple of {}", blocks.elements())
            }
            _ => return Ok(()),
        };
        Err(DeviceError::Format { tensor: self.name.to_owned(), dtype: self.dtype, format, reason })
    }

    /// `Ok` if the shape is `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(DeviceError::Shape {
            tensor: self.name.to_owned(),
            actual: self.shape.clone(),
            expected: expected.to_vec(),
        })
    }
}

/// What a linear weight is for: what a device may make of it when it prepares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Products alone: it may lie as they like it best.
    Product,
    /// Rows are looked up in it ([`Backend::embed`](crate::Backend::embed)), and products with it are asked for too where it is
    /// the head as well.
    Table,
    /// Products of an adapter: small, and prepared and freed while others are computed with, so not worth much trouble.
    Adapter,
}

/// A linear layer `y = x·Wᵀ + b` on its way to a device.
#[derive(Debug, Clone)]
pub struct HostLinear<'a> {
    /// `[out_features, in_features]`.
    pub weight: HostTensor<'a>,
    /// `[out_features]`.
    pub bias: Option<HostTensor<'a>>,
    /// How the device shall keep the weight.
    pub format: WeightFormat,
    /// What is asked of it.
    pub purpose: Purpose,
}

/// Routed experts of one mixture-of-experts layer, with the rule that chooses among all of them.
/// Expert e computes `down_e · (silu(gate_e·x) ⊙ up_e·x)`, where a limit L bounds products: `silu(min(gate_e·x, L))` and
/// `min(max(up_e·x, -L), L)`.
pub struct HostExperts<'a> {
    /// How many there are.
    pub count: usize,
    /// Those that are to be held here; all but where ranks share them out. At least one.
    pub held: Range<usize>,
    /// The weights.
    pub source: &'a mut dyn ExpertSource,
    /// How the device shall keep gates, ups and downs. Gates and ups are q8_0 both or neither: they share an input.
    pub formats: [WeightFormat; 3],
    /// Bound of the products, if there is one; for devices that offer [`Op::CompressedAttention`](crate::Op::CompressedAttention).
    pub limit: Option<f32>,
    /// How router logits choose and weigh experts.
    pub routing: Routing,
}

/// The experts of a layer one after the other: a layer may be large, so a device asks for an expert when it has
/// packed the one before, and no more than one is in memory twice.
pub trait ExpertSource {
    /// Gate `[intermediate, hidden]`, up of the same shape and down `[hidden, intermediate]` of an expert. Each that is
    /// held is asked for once, in order.
    fn expert(&mut self, expert: usize) -> Result<[HostTensor<'_>; 3]>;
}

/// Experts that lie ready.
impl ExpertSource for Vec<[HostTensor<'_>; 3]> {
    fn expert(&mut self, expert: usize) -> Result<[HostTensor<'_>; 3]> {
        Ok(self[expert].clone())
    }
}

/// The up-projection of multi-head latent attention (`kv_b_proj`), which attention absorbs.
#[derive(Debug, Clone)]
pub struct HostLatent<'a> {
    /// `[heads * (nope + v), rank]`: per head first the key rows, then the value rows.
    pub kv_b: HostTensor<'a>,
    /// Attention heads.
    pub heads: usize,
    /// Query and key width per head without position.
    pub nope: usize,
    /// Query and key width per head with rotary position.
    pub rope: usize,
    /// Value width per head.
    pub v: usize,
    /// Width of the shared latent.
    pub rank: usize,
    /// How the device shall keep the weight.
    pub format: WeightFormat,
}

/// Rotary position embedding: angle of pair i at position p is `p * inv_freq[i]`, computed in f32;
/// cosine and sine are multiplied by `scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct HostRope {
    /// Radians per position, one per rotated pair.
    pub inv_freq: Vec<f32>,
    /// Factor on cosine and sine (yarn's attention factor; 1 otherwise).
    pub scale: f32,
    /// Positions `0..max_positions` can occur.
    pub max_positions: usize,
}

impl HostRope {
    /// Cosines and sines, each `[max_positions, pairs]`, with `scale` applied.
    pub fn tables(&self) -> (Vec<f32>, Vec<f32>) {
        let angles = (0..self.max_positions).flat_map(|p| self.inv_freq.iter().map(move |f| p as f32 * f));
        angles.map(|a| (a.cos() * self.scale, a.sin() * self.scale)).unzip()
    }
}
