//! How weights lie in device memory, floats and blocks: the counterpart of `kernels/blocks.cuh`, which says it in full.
//!
//! Invariant: bits are kept. Codes, scales and minima are those of [`BlockFormat::unpack`] in another order, rows begin at
//! multiples of 16 bytes, what pads them is zero. Beside the formats' own bytes that takes up to 3 % more where scales are
//! packed below a byte, and 19 % for Q2_K.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_device::{BlockFormat, DType, HostTensor, Result, Unpacked, WeightFormat};

use crate::gpu::Gpu;
use crate::memory::Buffer;
use crate::tensor::DataType;

/// Columns that lie together.
const SPAN: usize = 128;
/// Columns of which a lane has eight.
const CHUNK: usize = 32;
/// Bytes that are packed and copied at a time.
const PART: usize = 4 << 20;

/// Columns of a row of floats with what pads it: rows begin at multiples of 16 bytes.
pub(crate) fn padded(k: usize) -> usize {
    k.next_multiple_of(8)
}

/// The floats of a format; `None` of blocks.
pub(crate) fn float(format: WeightFormat) -> Option<DataType> {
    match format {
        WeightFormat::F32 => Some(DataType::F32),
        WeightFormat::F16 => Some(DataType::F16),
        WeightFormat::BF16 => Some(DataType::BF16),
        WeightFormat::Ggml(_) => None,
    }
}

/// The format's type in kernels.
pub(crate) fn type_name(format: WeightFormat) -> String {
    match (float(format), format) {
        (Some(dtype), _) => format!("Dense<{}>", dtype.name()),
        (None, format) => format.to_string(),
    }
}

/// Bytes of a row of `k` columns, `row_bytes` of the format's type.
pub(crate) fn row_bytes(format: WeightFormat, k: usize) -> usize {
    match format {
        WeightFormat::Ggml(format) => Layout::of(format).row_bytes(k),
        _ => padded(k) * float(format).expect("no blocks").bytes(),
    }
}

/// A matrix `[rows, k]` in device memory.
///
/// # Panics
/// If it has not two dimensions.
///
/// # Errors
/// If it cannot be kept in the format, or memory is short.
pub(crate) fn load(gpu: &Arc<Gpu>, src: &HostTensor<'_>, format: WeightFormat) -> Result<Buffer> {
    let &[rows, k] = src.shape() else { panic!("{}: {:?} is no matrix", src.name(), src.shape()) };
    src.expect_keepable(format)?;
    let buffer = gpu.alloc(rows * row_bytes(format, k), "weights")?;
    write(gpu, &buffer, 0, src, format)?;
    Ok(buffer)
}

/// Packs the rows of a matrix that can be kept in the format, and copies them to a place in a buffer. All processors pack.
pub(crate) fn write(
    gpu: &Gpu,
    buffer: &Buffer,
    offset: usize,
    src: &HostTensor<'_>,
    format: WeightFormat,
) -> Result<()> {
    let (rows, k) = (src.shape()[0], src.shape()[1]);
    let stride = row_bytes(format, k);
    let part = (PART / stride.max(1)).max(1);
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let start = part * next.fetch_add(1, Ordering::Relaxed);
            if start >= rows {
                return Ok(());
            }
            let rows = src.rows(start, part.min(rows - start));
            gpu.write(buffer, offset + start * stride, &packed(&rows, format))?;
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(rows.div_ceil(part));
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        others.into_iter().map(|other| other.join().expect("a packer's thread")).fold(own, Result::and)
    })
}

/// The rows of a matrix as they lie on the device.
fn packed<'a>(src: &HostTensor<'a>, format: WeightFormat) -> Cow<'a, [u8]> {
    let k = src.shape()[1];
    match (format, src.stored()) {
        (WeightFormat::Ggml(format), Some(blocks)) if src.dtype() == DType::Ggml(format) => {
            Layout::of(format).pack(blocks, k).into()
        }
        (WeightFormat::Ggml(format), _) => {
            Layout::of(format).pack(&src.to_blocks(&|values| format.quantize(values)), k).into()
        }
        (_, Some(floats)) if format == src.dtype().into() => pad(floats.into(), float(format), k),
        _ => pad(float(format).expect("no blocks").encode(&src.to_f32()).into(), float(format), k),
    }
}

/// Rows of floats, each with zeros behind it.
fn pad(floats: Cow<'_, [u8]>, dtype: Option<DataType>, k: usize) -> Cow<'_, [u8]> {
    let size = dtype.expect("no blocks").bytes();
    if k == padded(k) {
        return floats;
    }
    let zeros = vec![0; (padded(k) - k) * size];
    floats.chunks_exact(k * size).flat_map(|row| [row, &zeros].concat()).collect()
}

/// How blocks of a format lie on the device: the parameters of its `Packed` in `kernels/blocks.cuh`.
struct Layout {
    format: BlockFormat,
    /// Bits of a code in the first plane and in the second.
    bits: [usize; 2],
    /// What is added to codes so that none is negative.
    offset: i16,
    /// Codes are indices into [`BlockFormat::IQ4_VALUES`].
    table: bool,
}

impl Layout {
    const fn of(format: BlockFormat) -> Self {
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

    fn row_bytes(&self, k: usize) -> usize {
        self.planes(k)[4].next_multiple_of(16)
    }

    /// Rows of whole blocks.
    fn pack(&self, blocks: &[u8], k: usize) -> Vec<u8> {
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
        let place = |column: usize| {
            let (chunk, rest) = (column / CHUNK, column % CHUNK);
            let (part, lane) = match self.format.group() {
                CHUNK => (rest % 8 / 4, rest / 8),
                _ => (rest / 16, rest % 16 / 4),
            };
            let field = 4 * chunk + 2 * part + rest % 4 / 2;
            self.bits.map(|bits| {
                if bits == 0 {
                    return (0, 0);
                }
                let per_word = 16 / bits;
                let bit = field % per_word * bits + 16 * (rest % 2);
                ((lane * bits + field / per_word) * 4 + bit / 8, bit % 8)
            })
        };
        (0..SPAN).map(place).collect()
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

    #[test]
    fn floats_lie_as_they_are_with_zeros_behind_each_row() {
        let data: Vec<u8> = (0..2 * 9 * 2).collect();
        let matrix = HostTensor::new("w", DType::BF16, vec![2, 9], &data);
        let packed = packed(&matrix, WeightFormat::BF16);
        assert_eq!(packed.len(), 2 * row_bytes(WeightFormat::BF16, 9));
        for (row, data) in packed.chunks(32).zip(data.chunks(18)) {
            assert_eq!((&row[..18], &row[18..]), (data, [0; 14].as_slice()));
        }
    }
}
