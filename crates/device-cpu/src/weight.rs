//! Linear weights, packed at load for the kernels of [`crate::kernels::linear`].
//!
//! Panel p holds output rows `16p..16p + 16`, rows beyond the last being zero. f32 and f16: for each k the
//! 16 weights of that column; bf16: for each two k the 16 pairs, the last filled up with zeros. Blocks of small integers: see [`crate::blocks`].

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;
use half::{bf16, f16};

use baton_device::{DType, HostLinear, HostTensor, Result, WeightFormat};

use crate::blocks::{Blocks, quantized};
use crate::memory::{Weights, weights};
use crate::pool::Pool;
use crate::simd::{LANES, Simd};

/// A linear layer `y = x·Wᵀ + b`.
pub struct Linear {
    pub(crate) weight: Matrix,
    /// Padded with zeros to whole panels.
    pub(crate) bias: Option<Vec<f32>>,
}

impl Linear {
    pub(crate) fn new(pool: &Pool, src: &HostLinear<'_>) -> Result<Self> {
        let weight = Matrix::from_host(pool, &src.weight, src.format)?;
        let bias = src.bias.as_ref().map(|bias| {
            bias.expect_shape(&[weight.out_features])?;
            let mut values = bias.to_f32();
            values.resize(weight.panels() * LANES, 0.0);
            Ok(values)
        });
        Ok(Self { weight, bias: bias.transpose()? })
    }
}

/// A packed matrix `[out_features, in_features]`.
pub(crate) struct Matrix {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) data: Packed,
}

/// The panels of a matrix, by format.
pub(crate) enum Packed {
    F32(Panels<f32>),
    F16(Panels<f16>),
    BF16(Panels<Pair>),
    Blocks(Blocks),
}

impl Matrix {
    /// Packs a tensor of a checkpoint.
    ///
    /// # Panics
    /// If it has not two dimensions.
    pub(crate) fn from_host(pool: &Pool, src: &HostTensor<'_>, format: WeightFormat) -> Result<Self> {
        let &[out_features, in_features] = src.shape() else {
            panic!("{}: a linear weight has two dimensions, not {:?}", src.name(), src.shape())
        };
        src.expect_keepable(format)?;
        let shape = (out_features, in_features);
        let stored = src.stored().filter(|_| format == src.dtype().into());
        let data = match (src.dtype(), stored) {
            (DType::Ggml(format), Some(data)) => {
                let row_bytes = in_features / format.elements() * format.bytes();
                let rows = |rows: Range<usize>| data[rows.start * row_bytes..rows.end * row_bytes].into();
                Packed::Blocks(Blocks::pack(pool, format, shape, rows)?)
            }
            (DType::F32, Some(data)) => Packed::F32(Panels::arrange(pool, data, in_features)?),
            (DType::F16, Some(data)) => Packed::F16(Panels::arrange(pool, data, in_features)?),
            (DType::BF16, Some(data)) => Packed::BF16(Panels::arrange(pool, data, in_features)?),
            (_, None) if let WeightFormat::Ggml(format) = format => {
                let blocks = |range: Range<usize>| {
                    let rows = src.rows(range.start, range.len());
                    rows.to_blocks(&|values| quantized(format, values)).into()
                };
                Packed::Blocks(Blocks::pack(pool, format, shape, blocks)?)
            }
            (_, None) => {
                return Self::pack(pool, shape, format, |rows| src.rows(rows.start, rows.len()).to_f32());
            }
        };
        Ok(Self { out_features, in_features, data })
    }

    /// Packs the matrix whose rows `rows` gives, row-major, at most 16 at a time, on all threads.
    pub(crate) fn pack(
        pool: &Pool,
        (out_features, in_features): (usize, usize),
        format: WeightFormat,
        rows: impl Fn(Range<usize>) -> Vec<f32> + Sync,
    ) -> Result<Self> {
        let shape = (out_features, in_features);
        let data = match format {
            WeightFormat::F32 => Packed::F32(Panels::pack(pool, shape, rows)?),
            WeightFormat::F16 => Packed::F16(Panels::pack(pool, shape, rows)?),
            WeightFormat::BF16 => Packed::BF16(Panels::pack(pool, shape, rows)?),
            WeightFormat::Ggml(format) => {
                Packed::Blocks(Blocks::pack(pool, format, shape, |range| quantized(format, &rows(range)).into())?)
            }
            WeightFormat::Coded(code) => unreachable!("{code} is not among the formats that are kept here"),
        };
        Ok(Self { out_features, in_features, data })
    }

    pub(crate) fn format(&self) -> WeightFormat {
        match &self.data {
            Packed::F32(_) => WeightFormat::F32,
            Packed::F16(_) => WeightFormat::F16,
            Packed::BF16(_) => WeightFormat::BF16,
            Packed::Blocks(blocks) => WeightFormat::Ggml(blocks.format),
        }
    }

    pub(crate) fn panels(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    /// Row `n`, widened.
    pub(crate) fn read_row(&self, n: usize, out: &mut [f32]) {
        assert!(n < self.out_features, "row {n} of {}", self.out_features);
        let (panel, lane) = (n / LANES, n % LANES);
        match &self.data {
            Packed::F32(panels) => panels.read_row(panel, lane, out),
            Packed::F16(panels) => panels.read_row(panel, lane, out),
            Packed::BF16(panels) => panels.read_row(panel, lane, out),
            Packed::Blocks(blocks) => blocks.read_row(panel, lane, out),
        }
    }
}

/// Consecutive columns of one row as they lie in a panel.
pub(crate) trait Element: Pod + Send + Sync {
    /// How many columns.
    const COLUMNS: usize;
    /// Up to as many values; those that are missing are 0.
    fn narrow(x: &[f32]) -> Self;
    /// Column `i` of them.
    fn widen(self, i: usize) -> f32;
    /// Column `i` of all rows of a panel.
    fn load<S: Simd>(s: S, x: &[Self; LANES], i: usize) -> S::F32;
}

impl Element for f32 {
    const COLUMNS: usize = 1;

    fn narrow(x: &[f32]) -> Self {
        x[0]
    }

    fn widen(self, _: usize) -> f32 {
        self
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES], _: usize) -> S::F32 {
        s.load(x)
    }
}

impl Element for f16 {
    const COLUMNS: usize = 1;

    fn narrow(x: &[f32]) -> Self {
        f16::from_f32(x[0])
    }

    fn widen(self, _: usize) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES], _: usize) -> S::F32 {
        s.load_f16(x)
    }
}

/// Two columns of a row, as dot products of bf16 take them.
pub(crate) type Pair = [bf16; 2];

impl Element for Pair {
    const COLUMNS: usize = 2;

    fn narrow(x: &[f32]) -> Self {
        [bf16::from_f32(x[0]), x.get(1).map_or(bf16::ZERO, |x| bf16::from_f32(*x))]
    }

    fn widen(self, i: usize) -> f32 {
        self[i].to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES], i: usize) -> S::F32 {
        let pairs = s.load_bytes(bytemuck::cast_ref(x));
        if i == 0 { s.first_bf16(pairs) } else { s.second_bf16(pairs) }
    }
}

/// Panels of floats.
pub(crate) struct Panels<T> {
    memory: Weights,
    /// Elements of a row.
    width: usize,
    element: PhantomData<T>,
}

impl<T: Element> Panels<T> {
    fn pack(
        pool: &Pool,
        (rows, in_features): (usize, usize),
        values: impl Fn(Range<usize>) -> Vec<f32> + Sync,
    ) -> Result<Self> {
        Self::fill(pool, rows.div_ceil(LANES), in_features, |p, columns| {
            let rows = values(p * LANES..rows.min((p + 1) * LANES));
            interleave(columns, rows.len() / in_features, |lane, tile| {
                let row = &rows[lane * in_features..][..in_features];
                row[tile.start * T::COLUMNS..in_features.min(tile.end * T::COLUMNS)].chunks(T::COLUMNS).map(T::narrow)
            });
        })
    }

    /// Rows that are stored as `T` already.
    fn arrange(pool: &Pool, rows: &[u8], in_features: usize) -> Result<Self> {
        let (size, row) = (size_of::<T>(), in_features * size_of::<T>() / T::COLUMNS);
        let rows: Vec<&[u8]> = rows.chunks_exact(row).collect();
        Self::fill(pool, rows.len().div_ceil(LANES), in_features, |p, columns| {
            let rows = &rows[p * LANES..rows.len().min((p + 1) * LANES)];
            interleave(columns, rows.len(), |lane, tile| {
                let bytes = &rows[lane][tile.start * size..row.min(tile.end * size)];
                let whole = bytes.chunks_exact(size);
                // A last column alone.
                let rest = Some(whole.remainder()).filter(|rest| !rest.is_empty()).map(|rest| {
                    let mut x = T::zeroed();
                    bytemuck::bytes_of_mut(&mut x)[..rest.len()].copy_from_slice(rest);
                    x
                });
                whole.map(bytemuck::pod_read_unaligned).chain(rest)
            });
        })
    }

    fn fill(
        pool: &Pool,
        panels: usize,
        in_features: usize,
        fill: impl Fn(usize, &mut [[T; LANES]]) + Sync,
    ) -> Result<Self> {
        let width = in_features.div_ceil(T::COLUMNS);
        let bytes = panels.saturating_mul(width).saturating_mul(LANES * size_of::<T>());
        let mut memory = weights(bytes)?;
        let columns: &mut [[T; LANES]] = bytemuck::cast_slice_mut(&mut memory);
        pool.each(columns.chunks_exact_mut(width), bytes, fill);
        Ok(Self { memory, width, element: PhantomData })
    }

    /// The columns of one panel.
    #[inline(always)]
    pub(crate) fn panel(&self, p: usize) -> &[[T; LANES]] {
        &bytemuck::cast_slice(&self.memory)[p * self.width..][..self.width]
    }

    fn read_row(&self, panel: usize, lane: usize, out: &mut [f32]) {
        for (out, column) in out.chunks_mut(T::COLUMNS).zip(self.panel(panel)) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = column[lane].widen(i);
            }
        }
    }
}

/// Writes rows, one lane each, as the columns of a panel; `part` gives some columns of a row.
fn interleave<T, I: Iterator<Item = T>>(
    columns: &mut [[T; LANES]],
    lanes: usize,
    part: impl Fn(usize, Range<usize>) -> I,
) {
    /// Columns that stay in the first-level cache while the rows pass.
    const TILE: usize = 128;
    let width = columns.len();
    for start in (0..width).step_by(TILE) {
        let tile = start..width.min(start + TILE);
        for lane in 0..lanes {
            for (column, x) in columns[tile.clone()].iter_mut().zip(part(lane, tile.clone())) {
                column[lane] = x;
            }
        }
    }
}
