//! Blocks of GGUF's formats in device memory: `Packed` of `kernels/blocks.cuh`.
//!
//! Invariant: codes, scales and minima are those of [`BlockFormat::unpack`] in another order. Beside the formats' own bytes that takes
//! up to 3 % more where scales are packed below a byte, and 19 % for Q2_K.

use baton_device::{BlockFormat, Unpacked};

use crate::weights::{CHUNK, SPAN, place};

/// How blocks of a format lie on the device: the parameters of its `Packed` in `kernels/blocks.cuh`.
pub(crate) struct Layout {
    format: BlockFormat,
    /// Bits of a code in the first plane and in the second.
    bits: [usize; 2],
    /// What is added to codes so that none is negative.
    offset: i16,
    /// Codes are indices into [`BlockFormat::IQ4_VALUES`].
    table: bool,
}

impl Layout {
    pub(crate) const fn of(format: BlockFormat) -> Self {
        use BlockFormat::*;
        let (bits, offset) = match format {
            Q4_0 => ([4, 0], 8),
            Q4_1 | Q4_K | IQ4_NL | IQ4_XS => ([4, 0], 0),
            Q5_0 => ([4, 1], 16),
            Q5_1 | Q5_K => ([4, 1], 0),
            Q8_0 => ([8, 0], 128),
            Q2_K => ([2, 0], 0),
            Q3_K => ([2, 1], 4),
            Q6_K => ([4, 2], 32),
        };
        Self { format, bits, offset, table: matches!(format, IQ4_NL | IQ4_XS) }
    }

    /// Whether groups have factors of their own on the block's scale.
    fn nested(&self) -> bool {
        self.format.elements() > CHUNK
    }

    /// Scales and minima.
    fn kinds(&self) -> usize {
        if self.format.has_min() { 2 } else { 1 }
    }

    /// Bytes of a span's scales.
    fn scale_bytes(&self) -> usize {
        SPAN / self.format.group() * if self.nested() { 1 } else { 2 } * self.kinds()
    }

    /// Bytes of a block's scale beside the factors of its groups.
    fn nested_bytes(&self) -> usize {
        if self.nested() { 2 * self.kinds() } else { 0 }
    }

    /// Where the planes of a row begin: low bits, high bits, scales, nested scales; and where the last ends.
    fn planes(&self, k: usize) -> [usize; 5] {
        let spans = k.div_ceil(SPAN);
        let [low, high] = self.bits.map(|bits| 16 * bits * spans);
        let scales = self.scale_bytes() * spans;
        [0, low, low + high, low + high + scales, low + high + scales + k.div_ceil(256) * self.nested_bytes()]
    }

    pub(crate) fn row_bytes(&self, k: usize) -> usize {
        self.planes(k)[4].next_multiple_of(16)
    }

    /// Rows of whole blocks.
    pub(crate) fn pack(&self, blocks: &[u8], k: usize) -> Vec<u8> {
        let format = self.format;
        let (row, stride) = (k / format.elements() * format.bytes(), self.row_bytes(k));
        let mut out = vec![0; blocks.len() / row * stride];
        let places = self.places();
        let mut unpacked = Unpacked::default();
        for (row, out) in blocks.chunks_exact(row).zip(out.chunks_exact_mut(stride)) {
            for (i, block) in row.chunks_exact(format.bytes()).enumerate() {
                format.unpack(block, &mut unpacked);
                self.put_codes(&unpacked, i * format.elements(), &places, &self.planes(k), out);
                self.put_scales(&unpacked, i, &self.planes(k), out);
            }
        }
        out
    }

    /// Of each column of a span where in the span its bits lie, in either plane: the byte, and the shift within.
    fn places(&self) -> Vec<[(usize, usize); 2]> {
        let places =
            |column| self.bits.map(|bits| if bits == 0 { (0, 0) } else { place(column, bits, self.format.group()) });
        (0..SPAN).map(places).collect()
    }

    fn put_codes(
        &self,
        block: &Unpacked,
        start: usize,
        places: &[[(usize, usize); 2]],
        planes: &[usize; 5],
        row: &mut [u8],
    ) {
        let [low, high] = self.bits;
        for (column, &code) in (start..).zip(&block.codes[..self.format.elements()]) {
            let code = if self.table { index(code) } else { (i16::from(code) + self.offset) as u8 };
            let [low_place, high_place] = places[column % SPAN];
            let span = column / SPAN * 16;
            row[planes[0] + span * low + low_place.0] |= (code & ((1u16 << low) - 1) as u8) << low_place.1;
            if high > 0 {
                row[planes[1] + span * high + high_place.0] |= (code >> low) << high_place.1;
            }
        }
    }

    fn put_scales(&self, block: &Unpacked, number: usize, planes: &[usize; 5], row: &mut [u8]) {
        let groups = SPAN / self.format.group();
        let both = [block.scale, block.min].map(half::f16::to_le_bytes);
        if !self.nested() {
            for (kind, bytes) in both.iter().enumerate().take(self.kinds()) {
                let at = planes[2] + number / groups * self.scale_bytes() + (kind * groups + number % groups) * 2;
                row[at..at + 2].copy_from_slice(bytes);
            }
            return;
        }
        let all = self.format.elements() / self.format.group();
        for (kind, factors) in [&block.scales, &block.mins].into_iter().enumerate().take(self.kinds()) {
            for (group, &factor) in (number * all..).zip(&factors[..all]) {
                let at = planes[2] + group / groups * self.scale_bytes() + kind * groups + group % groups;
                row[at] = (i16::from(factor) + 128) as u8;
            }
            let at = planes[3] + number * self.nested_bytes() + 2 * kind;
            row[at..at + 2].copy_from_slice(&both[kind]);
        }
    }
}

/// The index of one of the table's values.
fn index(value: i8) -> u8 {
    BlockFormat::IQ4_VALUES.iter().position(|v| *v == value).expect("a value of the table") as u8
}

#[cfg(test)]
mod tests {
    use baton_device::WeightFormat;

    use super::*;

    /// Reads an element as the device does: by the words that its header tells of.
    fn element(layout: &Layout, row: &[u8], k: usize, column: usize) -> f32 {
        let format = layout.format;
        let word = |at: usize| u32::from_le_bytes(row[at..at + 4].try_into().unwrap());
        let f16 = |at: usize| half::f16::from_le_bytes([row[at], row[at + 1]]).to_f32();
        let (span, chunk, rest) = (column / SPAN, column % SPAN / CHUNK, column % CHUNK);
        let mut found = None;
        for (lane, part) in (0..4).flat_map(|lane| [0, 1].map(|part| (lane, part))) {
            let first = if format.group() == CHUNK { 8 * lane + 4 * part } else { 16 * part + 4 * lane };
            if (first..first + 4).contains(&rest) {
                found = Some((lane, 4 * chunk + 2 * part + (rest - first) / 2, (rest - first) % 2));
            }
        }
        let (lane, field, second) = found.unwrap();
        let planes = layout.planes(k);
        let mut code = 0;
        let mut shift = 0;
        for (plane, bits) in layout.bits.into_iter().enumerate().filter(|(_, bits)| *bits > 0) {
            let per_word = 16 / bits;
            let word = word(planes[plane] + ((span * 4 + lane) * bits + field / per_word) * 4);
            code |= (word >> (field % per_word * bits) >> (16 * second) & ((1 << bits) - 1)) << shift;
            shift += bits;
        }
        let code = match layout.table {
            true => f32::from(BlockFormat::IQ4_VALUES[code as usize]),
            false => code as f32 - f32::from(layout.offset),
        };
        let groups = SPAN / format.group();
        let group = column % SPAN / format.group();
        let number = |kind: usize| match layout.nested() {
            false => f16(planes[2] + span * layout.scale_bytes() + (kind * groups + group) * 2),
            true => {
                let factor = row[planes[2] + span * layout.scale_bytes() + kind * groups + group];
                f16(planes[3] + column / 256 * layout.nested_bytes() + 2 * kind) * (f32::from(factor) - 128.0)
            }
        };
        let product = number(0) * code;
        if format.has_min() { product + number(1) } else { product }
    }

    #[test]
    fn every_element_of_every_format_is_where_the_device_looks_for_it() {
        for format in BlockFormat::ALL {
            let layout = Layout::of(format);
            for blocks in [1, 2, 5] {
                let (k, rows) = (blocks * format.elements(), 3);
                let bytes = baton_device::conformance::random_blocks(format, 7, rows * k, 1.0);
                let mut values = vec![0.0; rows * k];
                format.dequantize(&bytes, &mut values);
                let packed = layout.pack(&bytes, k);
                assert_eq!(packed.len(), rows * layout.row_bytes(k));
                for (row, values) in packed.chunks(layout.row_bytes(k)).zip(values.chunks(k)) {
                    for (column, value) in values.iter().enumerate() {
                        let found = element(&layout, row, k, column);
                        assert_eq!(found.to_bits(), value.to_bits(), "{format}, column {column} of {k}");
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_take_little_more_than_their_own_bytes() {
        for format in BlockFormat::ALL {
            let k = 4096;
            let more = Layout::of(format).row_bytes(k) as f64 / WeightFormat::Ggml(format).bytes(k) as f64;
            let most = if format == BlockFormat::Q2_K { 1.20 } else { 1.04 };
            assert!((1.0..most).contains(&more), "{format}: {more}");
        }
    }
}
