//! The block formats of GGUF files: a row is a run of blocks, each a few scales and many small integers.
//!
//! Layouts and formulas are ggml's (`ggml-common.h`, `ggml-quants.c`). [`BlockFormat::dequantize`] is the
//! judge: it gives the very f32 values that ggml's own functions give. Every format is small integers under
//! scales, so one formula ([`Unpacked`]) serves them all; its products are taken in the order written there,
//! without fused multiply-add, since the last bit depends on it.

mod blocks;
mod quantize;

use std::fmt;

use half::f16;

/// A block format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)] // the formats' own names
pub enum BlockFormat {
    /// 4 bits, a scale per 32.
    Q4_0,
    /// 4 bits, a scale and a minimum per 32.
    Q4_1,
    /// 5 bits, a scale per 32.
    Q5_0,
    /// 5 bits, a scale and a minimum per 32.
    Q5_1,
    /// 8 bits, a scale per 32.
    Q8_0,
    /// 2 bits, 4-bit scales and minima per 16, in blocks of 256.
    Q2_K,
    /// 3 bits, 6-bit scales per 16, in blocks of 256.
    Q3_K,
    /// 4 bits, 6-bit scales and minima per 32, in blocks of 256.
    Q4_K,
    /// 5 bits, 6-bit scales and minima per 32, in blocks of 256.
    Q5_K,
    /// 6 bits, 8-bit scales per 16, in blocks of 256.
    Q6_K,
    /// 4 bits into a table of 16 values, a scale per 32.
    IQ4_NL,
    /// 4 bits into the same table, 6-bit scales per 32, in blocks of 256.
    IQ4_XS,
}

use BlockFormat::*;

impl BlockFormat {
    /// All of them.
    pub const ALL: [BlockFormat; 12] = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS];

    /// Elements of the largest block.
    pub const MAX_ELEMENTS: usize = 256;

    /// The values that 4-bit codes stand for in the IQ4 formats (`kvalues_iq4nl`).
    pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

    /// As GGUF spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q8_0 => "Q8_0",
            Q2_K => "Q2_K",
            Q3_K => "Q3_K",
            Q4_K => "Q4_K",
            Q5_K => "Q5_K",
            Q6_K => "Q6_K",
            IQ4_NL => "IQ4_NL",
            IQ4_XS => "IQ4_XS",
        }
    }

    /// Elements of a block, along K; divides [`BlockFormat::MAX_ELEMENTS`].
    pub const fn elements(self) -> usize {
        match self {
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | IQ4_NL => 32,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | IQ4_XS => 256,
        }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Q4_0 | IQ4_NL => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
            IQ4_XS => 136,
        }
    }

    /// Where a block's f16 scales (and minima) lie. A block is finite exactly if they are: products with
    /// the small integers stay far below f32's range.
    pub const fn scale_offsets(self) -> &'static [usize] {
        match self {
            Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS => &[0],
            Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
            Q2_K => &[80, 82],
            Q3_K => &[108],
            Q6_K => &[208],
        }
    }

    /// Elements that share a scale (and a minimum): 16 or 32.
    pub const fn group(self) -> usize {
        match self {
            Q2_K | Q3_K | Q6_K => 16,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4_K | Q5_K | IQ4_NL | IQ4_XS => 32,
        }
    }

    /// Whether a minimum is added to every element.
    pub const fn has_min(self) -> bool {
        self.scale_offsets().len() == 2
    }

    /// Takes one block apart.
    ///
    /// # Panics
    /// If `block` is not one block.
    pub fn unpack(self, block: &[u8], out: &mut Unpacked) {
        match self {
            Q4_0 => blocks::q4_0(one(block), out),
            Q4_1 => blocks::q4_1(one(block), out),
            Q5_0 => blocks::q5_0(one(block), out),
            Q5_1 => blocks::q5_1(one(block), out),
            Q8_0 => blocks::q8_0(one(block), out),
            Q2_K => blocks::q2_k(one(block), out),
            Q3_K => blocks::q3_k(one(block), out),
            Q4_K => blocks::q4_k(one(block), out),
            Q5_K => blocks::q5_k(one(block), out),
            Q6_K => blocks::q6_k(one(block), out),
            IQ4_NL => blocks::iq4_nl(one(block), out),
            IQ4_XS => blocks::iq4_xs(one(block), out),
        }
        let f16_at = |&at: &usize| f16::from_le_bytes([block[at], block[at + 1]]);
        let offsets = self.scale_offsets();
        (out.scale, out.min) = (f16_at(&offsets[0]), offsets.get(1).map_or(f16::ZERO, f16_at));
        match self {
            Q4_0 | Q5_0 | Q8_0 | IQ4_NL => out.scales[0] = 1,
            Q4_1 | Q5_1 => (out.scales[0], out.mins[0]) = (1, 1),
            Q2_K | Q4_K | Q5_K => out.min = -out.min,
            Q3_K | Q6_K | IQ4_XS => {}
        }
    }

    /// Whether [`BlockFormat::quantize`] makes it.
    pub const fn can_be_made(self) -> bool {
        matches!(self, Q4_0 | Q8_0 | Q4_K)
    }

    /// What is made where this format is asked for of rows of `cols` values: this one, or [`Q8_0`] if only its
    /// smaller blocks divide the rows. Wider, as llama.cpp falls back, so that no row loses more than was agreed to.
    pub const fn made_for(self, cols: usize) -> BlockFormat {
        if !cols.is_multiple_of(self.elements()) && cols.is_multiple_of(Q8_0.elements()) { Q8_0 } else { self }
    }

    /// Quantises values to whole blocks.
    ///
    /// # Panics
    /// If `values` is not whole blocks, or [`BlockFormat::can_be_made`] says no.
    #[inline(always)]
    pub fn quantize(self, values: &[f32]) -> Vec<u8> {
        match self {
            Q4_0 => each(values, quantize::q4_0),
            Q8_0 => each(values, quantize::q8_0),
            Q4_K => each(values, quantize::q4_k),
            _ => panic!("{self} is read, never made"),
        }
    }

    /// Quantises rows of `cols` values to 8 bits with one scale each (as W8A8 checkpoints have per channel): whole
    /// blocks of [`Q8_0`] whose scales are the same along a row.
    ///
    /// # Panics
    /// If `values` is not whole rows, or rows are not whole blocks.
    #[inline(always)]
    pub fn int8_rows(values: &[f32], cols: usize) -> Vec<u8> {
        assert!(cols.is_multiple_of(Q8_0.elements()) && values.len().is_multiple_of(cols), "rows of whole blocks");
        let mut out = vec![[0; Q8_0.bytes()]; values.len() / Q8_0.elements()];
        for (row, blocks) in values.chunks_exact(cols).zip(out.chunks_exact_mut(cols / Q8_0.elements())) {
            quantize::int8_row(row, blocks);
        }
        out.into_flattened()
    }

    /// Widens whole blocks.
    ///
    /// # Panics
    /// If `blocks` is not whole blocks, or `out` has another number of elements.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        let (blocks, out) = (blocks.chunks(self.bytes()), out.chunks_mut(self.elements()));
        assert_eq!(blocks.len(), out.len(), "blocks and room for them");
        let mut unpacked = Unpacked::default();
        for (block, out) in blocks.zip(out) {
            self.unpack(block, &mut unpacked);
            assert_eq!(out.len(), self.elements(), "whole blocks");
            for (j, (out, codes)) in out.chunks_mut(self.group()).zip(unpacked.codes.chunks(self.group())).enumerate() {
                let (scale, min) = (unpacked.group_scale(j), unpacked.group_min(j));
                for (out, &code) in out.iter_mut().zip(codes) {
                    let product = scale * f32::from(code);
                    *out = if self.has_min() { product + min } else { product };
                }
            }
        }
    }
}

/// The integers of a block. Element i of group j is `(scale · scales[j]) · codes[i]`, plus
/// `min · mins[j]` where the format has minima, each product rounded to f32.
#[derive(Debug, Clone)]
pub struct Unpacked {
    /// Scale of the block.
    pub scale: f16,
    /// Factor of the minima, negative in the K formats, which subtract them.
    pub min: f16,
    /// Factors of the scale, one per group.
    pub scales: [i8; BlockFormat::MAX_ELEMENTS / 16],
    /// Factors of the minimum, one per group.
    pub mins: [i8; BlockFormat::MAX_ELEMENTS / 16],
    /// One per element.
    pub codes: [i8; BlockFormat::MAX_ELEMENTS],
}

impl Unpacked {
    /// Scale of group `j`.
    pub fn group_scale(&self, j: usize) -> f32 {
        self.scale.to_f32() * f32::from(self.scales[j])
    }

    /// Minimum of group `j`.
    pub fn group_min(&self, j: usize) -> f32 {
        self.min.to_f32() * f32::from(self.mins[j])
    }
}

impl Default for Unpacked {
    fn default() -> Self {
        Self { scale: f16::ZERO, min: f16::ZERO, scales: [0; _], mins: [0; _], codes: [0; _] }
    }
}

#[inline(always)]
fn each<const ELEMENTS: usize, const BYTES: usize>(
    values: &[f32],
    quantize: impl Fn(&[f32; ELEMENTS], &mut [u8; BYTES]),
) -> Vec<u8> {
    let (blocks, []) = values.as_chunks() else { panic!("{} values are not whole blocks", values.len()) };
    let mut out = vec![[0; BYTES]; blocks.len()];
    for (values, block) in blocks.iter().zip(&mut out) {
        quantize(values, block);
    }
    out.into_flattened()
}

fn one<const BYTES: usize>(block: &[u8]) -> &[u8; BYTES] {
    block.try_into().expect("one block")
}

impl fmt::Display for BlockFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `models/golden/gguf/dequant.bin`: per format of [`BlockFormat::ALL`] twelve blocks of random bytes and
    /// the f32 values that the gguf package gives for them.
    const GOLDEN: &[u8] = include_bytes!("../../../../models/golden/gguf/dequant.bin");
    const BLOCKS: usize = 12;

    #[test]
    fn every_format_gives_the_golden_values_to_the_last_bit() {
        let mut rest = GOLDEN;
        for format in BlockFormat::ALL {
            let (raw, tail) = rest.split_at(BLOCKS * format.bytes());
            let (values, tail) = tail.split_at(BLOCKS * format.elements() * 4);
            rest = tail;
            let mut out = vec![0.0; BLOCKS * format.elements()];
            format.dequantize(raw, &mut out);
            for (i, (ours, golden)) in out.iter().zip(values.as_chunks().0).enumerate() {
                let golden = f32::from_le_bytes(*golden);
                assert_eq!(ours.to_bits(), golden.to_bits(), "{format}, element {i}: {ours} for {golden}");
            }
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn a_block_is_finite_exactly_if_its_scales_are() {
        for format in BlockFormat::ALL {
            for pattern in [0x00, 0x55, 0xaa, 0xff] {
                for &scale in format.scale_offsets() {
                    let mut block = vec![pattern; format.bytes()];
                    for &offset in format.scale_offsets() {
                        block[offset..offset + 2].copy_from_slice(&f16::MAX.to_le_bytes());
                    }
                    let mut out = vec![0.0; format.elements()];
                    format.dequantize(&block, &mut out);
                    assert!(out.iter().all(|v| v.is_finite()), "{format}");
                    block[scale..scale + 2].copy_from_slice(&f16::NAN.to_le_bytes());
                    format.dequantize(&block, &mut out);
                    assert!(out.iter().all(|v| !v.is_finite()), "{format}");
                }
            }
        }
    }

    #[test]
    fn what_is_made_comes_back_within_its_step() {
        let values: Vec<f32> = (0..32 * 7).map(|i| ((i * 37 % 101) as f32 - 50.5) * 0.013).collect();
        for (format, step) in [(Q8_0, 0.013 * 50.5 / 127.0), (Q4_0, 0.013 * 50.5 / 8.0)] {
            let blocks = format.quantize(&values);
            assert_eq!(blocks.len(), 7 * format.bytes());
            let mut back = vec![0.0; values.len()];
            format.dequantize(&blocks, &mut back);
            for (v, b) in values.iter().zip(&back) {
                // A whole step where the largest code is one short of the range.
                assert!((v - b).abs() <= 1.01 * step, "{format}: {v} came back as {b}");
            }
        }
    }
}
