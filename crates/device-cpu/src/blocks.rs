//! Weights in the block formats of GGUF files, packed for dot products of bytes.
//!
//! The unit is a chunk: 32 columns of the 16 rows of a panel. Its codes are kept as they come, with their
//! offset added where they are signed, so bits are never wasted: a *quad* is 4 columns of all rows (64
//! bytes, 4 per row), and a chunk has eight. With 8 bits a line holds a quad; with 4, line i holds quad
//! i in the low halves and quad 4 + i in the high ones; with 2, line i holds quads i, i + 2, i + 4 and i + 6. Further
//! bits follow, one line each for a bit of every code (quad j in bytes `8j..8j + 8`), or two lines of 2 bits. Behind the
//! codes of all chunks lie the scales: per block of the format those of its 16 rows, then, where the
//! format has them, minima, factors of the scale per group, factors of the minimum.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;

use half::f16;

use baton_device::{BlockFormat, Result, Unpacked};

use crate::isa::Isa;
use crate::memory::{Weights, weights};
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};

/// Columns of a chunk.
pub(crate) const CHUNK: usize = 32;
/// Quads of a chunk.
pub(crate) const QUADS: usize = 8;
/// How far ahead of its use memory is asked for, in bytes.
const AHEAD: usize = 4096;
/// Four columns of 16 rows.
pub(crate) type Quad = [u8; 4 * LANES];

/// How a format is packed, known to the compiler.
pub(crate) trait Format: Copy + Send + Sync + 'static {
    /// The format.
    const BLOCK: BlockFormat;
    /// Bits of a code in the first lines: 2, 4 or 8.
    const LOW: usize;
    /// Bits beside them: 0, 1 or 2.
    const HIGH: usize;
    /// What is added to codes so that none is negative, as a power of two; 32 for nothing.
    const OFFSET_SHIFT: u32;
    /// Codes are indices into this table of signed values.
    const TABLE: Option<[i8; LANES]> = None;
    /// Whether a block is many groups, with factors of their own on the block's scale.
    const NESTED: bool = Self::BLOCK.elements() > CHUNK;

    /// Lines of a chunk: one per bit of a code.
    const LINES: usize = Self::LOW + Self::HIGH;
    /// Chunks of a block.
    const CHUNKS: usize = Self::BLOCK.elements() / CHUNK;
    /// Groups of a chunk.
    const GROUPS: usize = CHUNK / Self::BLOCK.group();
    /// Whether the bytes of a quad are signed.
    const SIGNED: bool = Self::LOW == 8 || Self::TABLE.is_some();
    /// Bytes of the scales of a block of 16 rows.
    const SCALE_BYTES: usize = {
        let kinds = if Self::BLOCK.has_min() { 2 } else { 1 };
        let factors = if Self::NESTED { Self::CHUNKS * Self::GROUPS * LANES } else { 0 };
        kinds * (2 * LANES + factors)
    };
}

/// Code that is compiled once per format.
pub(crate) trait ForFormat {
    type Output;
    fn run<F: Format>(self, format: F) -> Self::Output;
}

macro_rules! formats {
    ($($name:ident: $low:literal + $high:literal bits, shift $shift:literal $(, table $table:expr)?;)*) => {
        $(
            #[derive(Clone, Copy)]
            #[allow(non_camel_case_types)] // the formats' own names
            struct $name;

            impl Format for $name {
                const BLOCK: BlockFormat = BlockFormat::$name;
                const LOW: usize = $low;
                const HIGH: usize = $high;
                const OFFSET_SHIFT: u32 = $shift;
                $(const TABLE: Option<[i8; LANES]> = Some($table);)?
            }
        )*

        /// Runs `f` with the compile-time form of `format`.
        #[inline(always)]
        pub(crate) fn with_format<T: ForFormat>(format: BlockFormat, f: T) -> T::Output {
            match format {
                $(BlockFormat::$name => f.run($name),)*
            }
        }
    };
}

formats! {
    Q4_0: 4 + 0 bits, shift 3;
    Q4_1: 4 + 0 bits, shift 32;
    Q5_0: 4 + 1 bits, shift 4;
    Q5_1: 4 + 1 bits, shift 32;
    Q8_0: 8 + 0 bits, shift 32;
    Q2_K: 2 + 0 bits, shift 32;
    Q3_K: 2 + 1 bits, shift 2;
    Q4_K: 4 + 0 bits, shift 32;
    Q5_K: 4 + 1 bits, shift 32;
    Q6_K: 4 + 2 bits, shift 5;
    IQ4_NL: 4 + 0 bits, shift 32, table BlockFormat::IQ4_VALUES;
    IQ4_XS: 4 + 0 bits, shift 32, table BlockFormat::IQ4_VALUES;
}

/// The blocks that [`BlockFormat::quantize`] makes, made with the best instruction set that the machine has: they are
/// the same on all of them.
pub(crate) fn quantized(format: BlockFormat, values: &[f32]) -> Vec<u8> {
    struct Quantize<'a>(BlockFormat, &'a [f32], &'a mut Vec<u8>);
    impl Kernel for Quantize<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            *self.2 = self.0.quantize(self.1);
        }
    }
    let mut blocks = Vec::new();
    Isa::detect().dispatch().expect("detected").run(Quantize(format, values, &mut blocks));
    blocks
}

/// A matrix of blocks.
pub(crate) struct Blocks {
    pub(crate) format: BlockFormat,
    in_features: usize,
    codes: Weights,
    scales: Weights,
}

impl Blocks {
    /// Packs `rows` rows of blocks. `bytes` gives some consecutive rows of one panel.
    pub(crate) fn pack<'a>(
        pool: &Pool,
        format: BlockFormat,
        (rows, in_features): (usize, usize),
        bytes: impl Fn(Range<usize>) -> Cow<'a, [u8]> + Sync,
    ) -> Result<Self> {
        struct Pack<'p, B>(&'p Pool, (usize, usize), B);
        impl<'a, B: Fn(Range<usize>) -> Cow<'a, [u8]> + Sync> ForFormat for Pack<'_, B> {
            type Output = Result<Blocks>;
            fn run<F: Format>(self, _: F) -> Result<Blocks> {
                pack::<F>(self.0, self.1, self.2)
            }
        }
        with_format(format, Pack(pool, (rows, in_features), bytes))
    }

    /// Chunks of a row.
    pub(crate) fn chunks(&self) -> usize {
        self.in_features / CHUNK
    }

    /// The packed chunks and scales of panel `p`.
    #[inline(always)]
    pub(crate) fn panel<F: Format>(&self, p: usize) -> Panel<'_, F> {
        let codes = self.in_features / CHUNK * F::LINES;
        let scales = self.in_features / F::BLOCK.elements() * F::SCALE_BYTES;
        Panel {
            codes: &bytemuck::cast_slice(&self.codes)[p * codes..][..codes],
            scales: &self.scales[p * scales..][..scales],
            format: PhantomData,
        }
    }

    /// Row `lane` of panel `p`, widened: the very values that [`BlockFormat::dequantize`] gives.
    pub(crate) fn read_row(&self, p: usize, lane: usize, out: &mut [f32]) {
        struct ReadRow<'a>(&'a Blocks, usize, usize, &'a mut [f32]);
        impl ForFormat for ReadRow<'_> {
            type Output = ();
            fn run<F: Format>(self, _: F) {
                self.0.panel::<F>(self.1).read_row(self.2, self.3);
            }
        }
        with_format(self.format, ReadRow(self, p, lane, out));
    }
}

fn pack<'a, F: Format>(
    pool: &Pool,
    (rows, in_features): (usize, usize),
    bytes: impl Fn(Range<usize>) -> Cow<'a, [u8]> + Sync,
) -> Result<Blocks> {
    let panels = rows.div_ceil(LANES);
    let code_lines = in_features / CHUNK * F::LINES;
    let scale_bytes = in_features / F::BLOCK.elements() * F::SCALE_BYTES;
    let row_bytes = in_features / F::BLOCK.elements() * F::BLOCK.bytes();
    let mut codes = weights(panels.saturating_mul(code_lines).saturating_mul(size_of::<Quad>()))?;
    let mut scales = weights(panels.saturating_mul(scale_bytes))?;
    let quads: &mut [Quad] = bytemuck::cast_slice_mut(&mut codes);
    let scale_bytes = scales.chunks_exact_mut(scale_bytes);
    pool.each(quads.chunks_exact_mut(code_lines).zip(scale_bytes), rows * in_features, |p, (codes, scales)| {
        pack_panel::<F>(&bytes(p * LANES..rows.min((p + 1) * LANES)), row_bytes, codes, scales);
    });
    Ok(Blocks { format: F::BLOCK, in_features, codes, scales })
}

/// Packs up to 16 rows into a zeroed panel.
fn pack_panel<F: Format>(rows: &[u8], row_bytes: usize, codes: &mut [Quad], scales: &mut [u8]) {
    let mut block = Unpacked::default();
    let mut spread = [[[0u8; 4 * LANES]; QUADS]; BlockFormat::MAX_ELEMENTS / CHUNK];
    let panel = codes.chunks_exact_mut(F::CHUNKS * F::LINES).zip(scales.chunks_exact_mut(F::SCALE_BYTES));
    for (b, (codes, scales)) in panel.enumerate() {
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            F::BLOCK.unpack(&row[b * F::BLOCK.bytes()..][..F::BLOCK.bytes()], &mut block);
            pack_scales::<F>(lane, &block, scales);
            let (fours, _) = bytemuck::cast_slice(&block.codes[..F::BLOCK.elements()]).as_chunks::<4>();
            for (quad, four) in spread.as_flattened_mut().iter_mut().zip(fours) {
                quad[4 * lane..][..4].copy_from_slice(four);
            }
        }
        for (quads, lines) in spread.iter().zip(codes.chunks_exact_mut(F::LINES)) {
            pack_codes::<F>(quads, lines);
        }
    }
}

fn pack_scales<F: Format>(lane: usize, block: &Unpacked, scales: &mut [u8]) {
    for (scale, at) in [(block.scale, Some(scale_at(lane))), (block.min, min_at::<F>(lane))] {
        if let Some(at) = at {
            scales[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    if F::NESTED {
        for group in 0..F::CHUNKS * F::GROUPS {
            scales[factor_at::<F>(group, lane)] = block.scales[group] as u8;
            if F::BLOCK.has_min() {
                scales[min_factor_at::<F>(group, lane)] = block.mins[group] as u8;
            }
        }
    }
}

/// Codes, a byte each, into the lines of a zeroed chunk.
fn pack_codes<F: Format>(quads: &[Quad; QUADS], lines: &mut [Quad]) {
    for (j, quad) in quads.iter().enumerate() {
        let quad = quad.map(stored::<F>);
        for (line, code) in lines[j % F::LOW].iter_mut().zip(quad) {
            *line |= (code & (0xff >> (8 - F::LOW))) << (j / F::LOW * F::LOW);
        }
        match F::HIGH {
            0 => {}
            1 => {
                for (bits, codes) in lines[F::LOW][8 * j..].iter_mut().zip(quad.as_chunks::<8>().0) {
                    *bits = codes.iter().rev().fold(0, |bits, code| bits << 1 | code >> F::LOW);
                }
            }
            _ => {
                for (line, code) in lines[F::LOW + j % 2].iter_mut().zip(quad) {
                    *line |= code >> F::LOW << (j / 2 * 2);
                }
            }
        }
    }
}

/// A code in its bits.
#[inline(always)]
fn stored<F: Format>(code: u8) -> u8 {
    match F::TABLE {
        // How many values lie below: they ascend. What is not among them lies in no row.
        Some(table) => table.iter().map(|&v| u8::from(v < code as i8)).sum::<u8>() & 15,
        None => code.wrapping_add(offset::<F>() as u8),
    }
}

fn value<F: Format>(stored: u8) -> i8 {
    match F::TABLE {
        Some(table) => table[usize::from(stored)],
        None => (stored as i8).wrapping_sub(offset::<F>()),
    }
}

const fn offset<F: Format>() -> i8 {
    if F::OFFSET_SHIFT < 8 { 1 << F::OFFSET_SHIFT } else { 0 }
}

/// Where column `k` of row `lane` has its low bits in a chunk: line, byte, shift.
const fn low_at<F: Format>(k: usize, lane: usize) -> (usize, usize, usize) {
    let (quad, byte) = (k / 4, 4 * lane + k % 4);
    (quad % F::LOW, byte, quad / F::LOW * F::LOW)
}

/// Where it has its further bits, in the same terms.
const fn high_at<F: Format>(k: usize, lane: usize) -> (usize, usize, usize) {
    let (quad, byte) = (k / 4, 4 * lane + k % 4);
    if F::HIGH == 1 { (F::LOW, 8 * quad + byte / 8, byte % 8) } else { (F::LOW + quad % 2, byte, quad / 2 * 2) }
}

fn get_code<F: Format>(lines: &[Quad], k: usize, lane: usize) -> u8 {
    let (line, byte, shift) = low_at::<F>(k, lane);
    let low = lines[line][byte] >> shift & (0xff >> (8 - F::LOW));
    if F::HIGH == 0 {
        return low;
    }
    let (line, byte, shift) = high_at::<F>(k, lane);
    low | (lines[line][byte] >> shift & (0xff >> (8 - F::HIGH))) << F::LOW
}

/// Where, in the scales of a block, a row's scale lies.
const fn scale_at(lane: usize) -> usize {
    2 * lane
}

/// Its minimum, if the format has one.
const fn min_at<F: Format>(lane: usize) -> Option<usize> {
    if F::BLOCK.has_min() { Some(2 * (LANES + lane)) } else { None }
}

/// Its factor of the scale for a group of a nested format.
const fn factor_at<F: Format>(group: usize, lane: usize) -> usize {
    let first = if F::BLOCK.has_min() { 4 * LANES } else { 2 * LANES };
    first + group * LANES + lane
}

/// Its factor of the minimum.
const fn min_factor_at<F: Format>(group: usize, lane: usize) -> usize {
    factor_at::<F>(F::CHUNKS * F::GROUPS + group, lane)
}

/// The chunks of 16 rows, and the scales of their blocks.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a, F> {
    codes: &'a [Quad],
    scales: &'a [u8],
    format: PhantomData<F>,
}

impl<F: Format> Panel<'_, F> {
    /// Brings nearer what will be read after the chunks up to this one: of this panel, or of the next.
    #[inline(always)]
    pub(crate) fn prefetch<S: Simd>(&self, s: S, chunk: usize) {
        for line in &self.codes[chunk * F::LINES..][..F::LINES] {
            s.prefetch(line.as_ptr().wrapping_add(AHEAD));
        }
        if chunk.is_multiple_of(F::CHUNKS) {
            let scales = &self.scales[chunk / F::CHUNKS * F::SCALE_BYTES..][..F::SCALE_BYTES];
            for line in scales.chunks(size_of::<Quad>()) {
                s.prefetch(line.as_ptr().wrapping_add(AHEAD));
            }
        }
    }

    /// The codes of a chunk, below 128, or signed as [`Simd::signed`] makes them.
    #[inline(always)]
    pub(crate) fn quads<S: Simd>(&self, s: S, chunk: usize) -> [S::Bytes; QUADS] {
        let lines = &self.codes[chunk * F::LINES..][..F::LINES];
        // No closure: it would not inherit the instruction set.
        let mut quads = [Self::quad(s, lines, 0); QUADS];
        for (j, quad) in quads.iter_mut().enumerate().skip(1) {
            *quad = Self::quad(s, lines, j);
        }
        quads
    }

    #[inline(always)]
    fn quad<S: Simd>(s: S, lines: &[Quad], j: usize) -> S::Bytes {
        let line = s.load_bytes(&lines[j % F::LOW]);
        let low = match F::LOW {
            8 => line,
            bits => s.field(line, (j / bits * bits) as i32, 0xff >> (8 - bits)),
        };
        let code = match F::HIGH {
            0 => low,
            1 => {
                let bits = lines[F::LOW].as_chunks().0[j];
                s.or(low, s.plane(u64::from_le_bytes(bits), 1 << F::LOW))
            }
            _ => {
                let line = s.load_bytes(&lines[F::LOW + j % 2]);
                s.or(low, s.field(line, (j / 2 * 2) as i32 - F::LOW as i32, 3 << F::LOW))
            }
        };
        match F::TABLE {
            Some(table) => s.signed(s.lookup(&table, code)),
            None if F::SIGNED => s.signed(code),
            None => code,
        }
    }

    /// Scale and minimum of a group of a chunk; the minimum is 0 where there is none.
    #[inline(always)]
    pub(crate) fn group<S: Simd>(&self, s: S, chunk: usize, group: usize) -> (S::F32, S::F32) {
        let block = &self.scales[chunk / F::CHUNKS * F::SCALE_BYTES..][..F::SCALE_BYTES];
        let group = chunk % F::CHUNKS * F::GROUPS + group;
        let mut scale = s.load_f16(f16s(block, scale_at(0)));
        let mut min = match min_at::<F>(0) {
            Some(at) => s.load_f16(f16s(block, at)),
            None => s.splat(0.0),
        };
        if F::NESTED {
            scale = s.mul(scale, s.load_i8(i8s(block, factor_at::<F>(group, 0))));
            if F::BLOCK.has_min() {
                min = s.mul(min, s.load_i8(i8s(block, min_factor_at::<F>(group, 0))));
            }
        }
        (scale, min)
    }

    fn read_row(&self, lane: usize, out: &mut [f32]) {
        let f16_at = |bytes: &[u8], at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        let blocks = self.codes.chunks_exact(F::CHUNKS * F::LINES).zip(self.scales.chunks_exact(F::SCALE_BYTES));
        for ((codes, scales), out) in blocks.zip(out.chunks_exact_mut(F::BLOCK.elements())) {
            let (scale, min) = (f16_at(scales, scale_at(lane)), min_at::<F>(lane).map(|at| f16_at(scales, at)));
            for (group, out) in out.chunks_exact_mut(F::BLOCK.group()).enumerate() {
                let factor = |at: usize| if F::NESTED { f32::from(scales[at] as i8) } else { 1.0 };
                let scale = scale * factor(factor_at::<F>(group, lane));
                let min = min.map(|min| min * factor(min_factor_at::<F>(group, lane)));
                for (i, out) in out.iter_mut().enumerate() {
                    let k = group * F::BLOCK.group() + i;
                    let lines = &codes[k / CHUNK * F::LINES..][..F::LINES];
                    let product = scale * f32::from(value::<F>(get_code::<F>(lines, k % CHUNK, lane)));
                    *out = min.map_or(product, |min| product + min);
                }
            }
        }
    }
}

#[inline(always)]
fn f16s(scales: &[u8], at: usize) -> &[f16; LANES] {
    let bytes: &[u8; 2 * LANES] = scales[at..].first_chunk().expect("within the scales of a block");
    bytemuck::cast_ref(bytes)
}

#[inline(always)]
fn i8s(scales: &[u8], at: usize) -> &[i8; LANES] {
    let bytes: &[u8; LANES] = scales[at..].first_chunk().expect("within the scales of a block");
    bytemuck::cast_ref(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_makes_the_blocks_of_the_judge() {
        let values = baton_device::conformance::uniform(3, 256 * 40, 0.1);
        for format in BlockFormat::ALL.into_iter().filter(|f| f.can_be_made()) {
            assert!(quantized(format, &values) == format.quantize(&values), "{format}");
        }
    }
}
