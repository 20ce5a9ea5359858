//! Linear weights, packed at load for the kernels of [`crate::kernels::linear`].
//!
//! Panel p holds output rows `16p..16p + 16`, rows beyond the last being zero. Floats: for each k the
//! 16 weights of that column. Q8_0: for each block of 32 columns eight lines, each of 16 rows × 4
//! columns, and apart from them the 16 scales of the block. A GGUF file's blocks stay as they are, row by
//! row: the kernel widens a block of each of 16 rows at a time.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use bytemuck::Pod;
use half::{bf16, f16};

use baton_device::{BlockFormat, DType, HostLinear, HostTensor, Result, WeightFormat, q8_0};

use crate::memory::{Aligned, weights};
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
    BF16(Panels<bf16>),
    Q8_0(Quants),
    Ggml(Blocks),
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
        let stored = src.stored().filter(|_| format == src.dtype().into());
        let data = match (src.dtype(), stored) {
            (DType::Ggml(format), Some(data)) => {
                Packed::Ggml(Blocks::copy(pool, data, format, out_features, in_features)?)
            }
            (DType::F32, Some(data)) => Packed::F32(Panels::arrange(pool, data, in_features)?),
            (DType::F16, Some(data)) => Packed::F16(Panels::arrange(pool, data, in_features)?),
            (DType::BF16, Some(data)) => Packed::BF16(Panels::arrange(pool, data, in_features)?),
            (_, None) => {
                let rows = |rows: Range<usize>| src.rows(rows.start, rows.len()).to_f32();
                return Self::pack(pool, out_features, in_features, format, rows);
            }
        };
        Ok(Self { out_features, in_features, data })
    }

    /// Packs the matrix whose rows `rows` gives, row-major, at most 16 at a time, on all threads.
    pub(crate) fn pack(
        pool: &Pool,
        out_features: usize,
        in_features: usize,
        format: WeightFormat,
        rows: impl Fn(Range<usize>) -> Vec<f32> + Sync,
    ) -> Result<Self> {
        let panels = out_features.div_ceil(LANES);
        let panel = |p: usize| rows(p * LANES..out_features.min((p + 1) * LANES));
        let data = match format {
            WeightFormat::F32 => Packed::F32(Panels::pack(pool, panels, in_features, panel)?),
            WeightFormat::F16 => Packed::F16(Panels::pack(pool, panels, in_features, panel)?),
            WeightFormat::BF16 => Packed::BF16(Panels::pack(pool, panels, in_features, panel)?),
            WeightFormat::Q8_0 => Packed::Q8_0(Quants::pack(pool, panels, in_features, panel)?),
            WeightFormat::Ggml(_) => unreachable!("blocks are copied from a file, never made"),
        };
        Ok(Self { out_features, in_features, data })
    }

    pub(crate) fn format(&self) -> WeightFormat {
        match &self.data {
            Packed::F32(_) => WeightFormat::F32,
            Packed::F16(_) => WeightFormat::F16,
            Packed::BF16(_) => WeightFormat::BF16,
            Packed::Q8_0(_) => WeightFormat::Q8_0,
            Packed::Ggml(blocks) => WeightFormat::Ggml(blocks.format),
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
            Packed::Q8_0(quants) => quants.read_row(panel, lane, out),
            Packed::Ggml(blocks) => blocks.format.dequantize(blocks.row(n), out),
        }
    }
}

/// Fills parts of a weight, `bytes` in all, on all threads.
fn fill_all<T: Send>(pool: &Pool, parts: &mut [T], bytes: usize, fill: impl Fn(usize, &mut T) + Sync) {
    let share = pool.share(parts.len(), bytes);
    let shares: Vec<_> = parts.chunks_mut(share).map(Mutex::new).collect();
    pool.run(shares.len(), bytes, |task| {
        let mut parts = shares[task].lock().unwrap_or_else(PoisonError::into_inner); // its own task's alone
        for (i, part) in parts.iter_mut().enumerate() {
            fill(task * share + i, part);
        }
    });
}

/// A float format that weights are kept in.
pub(crate) trait Element: Pod + Send + Sync {
    fn narrow(x: f32) -> Self;
    fn widen(self) -> f32;
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32;
}

impl Element for f32 {
    fn narrow(x: f32) -> Self {
        x
    }

    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32 {
        s.load(x)
    }
}

impl Element for f16 {
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32 {
        s.load_f16(x)
    }
}

impl Element for bf16 {
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32 {
        s.load_bf16(x)
    }
}

/// Panels of floats.
pub(crate) struct Panels<T> {
    memory: Aligned<u8>,
    in_features: usize,
    element: PhantomData<T>,
}

impl<T: Element> Panels<T> {
    fn pack(pool: &Pool, panels: usize, in_features: usize, panel: impl Fn(usize) -> Vec<f32> + Sync) -> Result<Self> {
        Self::fill(pool, panels, in_features, |p, columns| {
            let rows = panel(p);
            interleave(columns, rows.len() / in_features, |lane, tile| {
                rows[lane * in_features..][tile].iter().map(|x| T::narrow(*x))
            });
        })
    }

    /// Rows that are stored as `T` already.
    fn arrange(pool: &Pool, rows: &[u8], in_features: usize) -> Result<Self> {
        let (size, row) = (size_of::<T>(), in_features * size_of::<T>());
        let rows: Vec<&[u8]> = rows.chunks_exact(row).collect();
        Self::fill(pool, rows.len().div_ceil(LANES), in_features, |p, columns| {
            let rows = &rows[p * LANES..rows.len().min((p + 1) * LANES)];
            interleave(columns, rows.len(), |lane, tile| {
                let bytes = &rows[lane][tile.start * size..tile.end * size];
                bytes.chunks_exact(size).map(bytemuck::pod_read_unaligned)
            });
        })
    }

    fn fill(
        pool: &Pool,
        panels: usize,
        in_features: usize,
        fill: impl Fn(usize, &mut [[T; LANES]]) + Sync,
    ) -> Result<Self> {
        let bytes = panels.saturating_mul(in_features).saturating_mul(LANES * size_of::<T>());
        let mut memory = weights(bytes)?;
        let columns: &mut [[T; LANES]] = bytemuck::cast_slice_mut(&mut memory);
        let mut parts: Vec<_> = columns.chunks_exact_mut(in_features).collect();
        fill_all(pool, &mut parts, bytes, |p, columns| fill(p, columns));
        Ok(Self { memory, in_features, element: PhantomData })
    }

    /// The columns of one panel.
    #[inline(always)]
    pub(crate) fn panel(&self, p: usize) -> &[[T; LANES]] {
        &bytemuck::cast_slice(&self.memory)[p * self.in_features..][..self.in_features]
    }

    fn read_row(&self, panel: usize, lane: usize, out: &mut [f32]) {
        for (out, column) in out.iter_mut().zip(self.panel(panel)) {
            *out = column[lane].widen();
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

/// One block of a panel: line j holds columns `4j..4j + 4` of each row.
pub(crate) type QuantBlock = [[i8; 4 * LANES]; q8_0::BLOCK / 4];

/// Panels of Q8_0.
pub(crate) struct Quants {
    quants: Aligned<u8>,
    scales: Aligned<u8>,
    blocks: usize,
}

impl Quants {
    fn pack(pool: &Pool, panels: usize, in_features: usize, panel: impl Fn(usize) -> Vec<f32> + Sync) -> Result<Self> {
        let blocks = in_features / q8_0::BLOCK;
        let total = panels.saturating_mul(blocks);
        let mut quants = weights(total.saturating_mul(size_of::<QuantBlock>()))?;
        let mut scales = weights(total.saturating_mul(size_of::<[f16; LANES]>()))?;
        let quant_blocks: &mut [QuantBlock] = bytemuck::cast_slice_mut(&mut quants);
        let scale_blocks: &mut [[f16; LANES]] = bytemuck::cast_slice_mut(&mut scales);
        let parts = quant_blocks.chunks_exact_mut(blocks).zip(scale_blocks.chunks_exact_mut(blocks));
        let mut parts: Vec<_> = parts.collect();
        fill_all(pool, &mut parts, panels * LANES * in_features, |p, (quant_blocks, scale_blocks)| {
            for (lane, row) in panel(p).chunks_exact(in_features).enumerate() {
                for (b, block) in row.as_chunks().0.iter().enumerate() {
                    let (scale, quants) = q8_0::quantize_weight_block(block);
                    scale_blocks[b][lane] = scale;
                    for (line, quad) in quant_blocks[b].iter_mut().zip(quants.as_chunks::<4>().0) {
                        line[4 * lane..][..4].copy_from_slice(quad);
                    }
                }
            }
        });
        Ok(Self { quants, scales, blocks })
    }

    /// The blocks of one panel and their scales.
    #[inline(always)]
    pub(crate) fn panel(&self, p: usize) -> (&[QuantBlock], &[[f16; LANES]]) {
        let range = p * self.blocks..(p + 1) * self.blocks;
        (&bytemuck::cast_slice(&self.quants)[range.clone()], &bytemuck::cast_slice(&self.scales)[range])
    }

    fn read_row(&self, panel: usize, lane: usize, out: &mut [f32]) {
        let (blocks, scales) = self.panel(panel);
        for (k, out) in out.iter_mut().enumerate() {
            let (block, column) = (k / q8_0::BLOCK, k % q8_0::BLOCK);
            let quant = blocks[block][column / 4][4 * lane + column % 4];
            *out = f32::from(quant) * scales[block][lane].to_f32();
        }
    }
}

/// Rows of a GGUF file's blocks.
pub(crate) struct Blocks {
    memory: Aligned<u8>,
    pub(crate) format: BlockFormat,
    row_bytes: usize,
    rows: usize,
}

/// One block of each row of a panel, widened: for each k the 16 weights of that column.
pub(crate) type Widened = [[f32; LANES]; BlockFormat::MAX_ELEMENTS];

impl Blocks {
    fn copy(pool: &Pool, data: &[u8], format: BlockFormat, rows: usize, in_features: usize) -> Result<Self> {
        const PART: usize = 1 << 20;
        let mut memory = weights(data.len())?;
        let mut parts: Vec<_> = memory.chunks_mut(PART).zip(data.chunks(PART)).collect();
        fill_all(pool, &mut parts, data.len(), |_, (copy, data)| copy.copy_from_slice(data));
        Ok(Self { memory, format, row_bytes: in_features / format.elements() * format.bytes(), rows })
    }

    fn row(&self, n: usize) -> &[u8] {
        &self.memory[n * self.row_bytes..][..self.row_bytes]
    }

    /// Widens block `b` of the rows of panel `p` and gives its columns; rows beyond the last are zero.
    pub(crate) fn widen<'a>(&self, p: usize, b: usize, out: &'a mut Widened) -> &'a [[f32; LANES]] {
        let (bytes, columns) = (self.format.bytes(), &mut out[..self.format.elements()]);
        let mut values = [0.0; BlockFormat::MAX_ELEMENTS];
        let values = &mut values[..columns.len()];
        for lane in 0..LANES {
            if p * LANES + lane < self.rows {
                self.format.dequantize(&self.row(p * LANES + lane)[b * bytes..][..bytes], values);
            } else {
                values.fill(0.0);
            }
            for (column, value) in columns.iter_mut().zip(&*values) {
                column[lane] = *value;
            }
        }
        columns
    }
}
