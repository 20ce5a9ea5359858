//! The block formats of GGUF files: a row is a run of blocks, each a few scales and many small integers.
//!
//! Layouts and formulas are ggml's (`ggml-common.h`, `ggml-quants.c`). [`BlockFormat::dequantize`] is the
//! judge: it gives the very f32 values that ggml's own functions give. Products of scales and quants
//! are taken in the order written here, without fused multiply-add, since the last bit depends on it.

mod blocks;

use std::fmt;

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

    /// Widens whole blocks.
    ///
    /// # Panics
    /// If `blocks` is not whole blocks, or `out` has another number of elements.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        match self {
            Q4_0 => each(blocks, out, blocks::q4_0),
            Q4_1 => each(blocks, out, blocks::q4_1),
            Q5_0 => each(blocks, out, blocks::q5_0),
            Q5_1 => each(blocks, out, blocks::q5_1),
            Q8_0 => each(blocks, out, blocks::q8_0),
            Q2_K => each(blocks, out, blocks::q2_k),
            Q3_K => each(blocks, out, blocks::q3_k),
            Q4_K => each(blocks, out, blocks::q4_k),
            Q5_K => each(blocks, out, blocks::q5_k),
            Q6_K => each(blocks, out, blocks::q6_k),
            IQ4_NL => each(blocks, out, blocks::iq4_nl),
            IQ4_XS => each(blocks, out, blocks::iq4_xs),
        }
    }
}

fn each<const BYTES: usize, const ELEMENTS: usize>(
    blocks: &[u8],
    out: &mut [f32],
    widen: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let ((blocks, []), (out, [])) = (blocks.as_chunks(), out.as_chunks_mut()) else {
        panic!("{} bytes and {} elements are not whole blocks", blocks.len(), out.len())
    };
    assert_eq!(blocks.len(), out.len(), "blocks and room for them");
    for (block, out) in blocks.iter().zip(out) {
        widen(block, out);
    }
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
                        block[offset..offset + 2].copy_from_slice(&half::f16::MAX.to_le_bytes());
                    }
                    let mut out = vec![0.0; format.elements()];
                    format.dequantize(&block, &mut out);
                    assert!(out.iter().all(|v| v.is_finite()), "{format}");
                    block[scale..scale + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
                    format.dequantize(&block, &mut out);
                    assert!(out.iter().all(|v| !v.is_finite()), "{format}");
                }
            }
        }
    }
}
