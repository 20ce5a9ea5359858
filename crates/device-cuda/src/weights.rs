//! How weights lie in device memory: floats, blocks and codes. The counterpart of `kernels/blocks.cuh`, which says it in full.
//!
//! Invariant: stored bits are kept, rows begin at multiples of 16 bytes, and what pads them is zero or means it.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_device::{BlockFormat, DType, HostTensor, Result, WeightFormat};

use crate::gpu::Gpu;
use crate::memory::Buffer;
use crate::tensor::DataType;
use crate::{blocks, coded};

/// Columns that lie together.
pub(crate) const SPAN: usize = 128;
/// Columns of which a lane has eight.
pub(crate) const CHUNK: usize = 32;
/// Bytes that are packed and copied at a time.
const PART: usize = 4 << 20;

/// Columns of a row of floats with what pads it: rows begin at multiples of 16 bytes.
pub(crate) fn padded(k: usize) -> usize {
    k.next_multiple_of(8)
}

/// The floats of a format; `None` of blocks and codes.
pub(crate) fn float(format: WeightFormat) -> Option<DataType> {
    match format {
        WeightFormat::F32 => Some(DataType::F32),
        WeightFormat::F16 => Some(DataType::F16),
        WeightFormat::BF16 => Some(DataType::BF16),
        WeightFormat::Ggml(_) | WeightFormat::Coded(_) => None,
    }
}

/// How the elements of a matrix lie: what its kernels are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    Floats(DataType),
    Blocks(BlockFormat),
    Coded(coded::Layout),
}

impl Form {
    /// The floats; `None` of blocks and codes.
    pub(crate) fn float(self) -> Option<DataType> {
        match self {
            Form::Floats(dtype) => Some(dtype),
            Form::Blocks(_) | Form::Coded(_) => None,
        }
    }

    /// Its type in kernels.
    pub(crate) fn type_name(self) -> String {
        match self {
            Form::Floats(dtype) => format!("Dense<{}>", dtype.name()),
            Form::Blocks(format) => format.to_string(),
            Form::Coded(layout) => layout.type_name(),
        }
    }

    /// Bytes of a row of `k` columns, `row_bytes` of its type.
    pub(crate) fn row_bytes(self, k: usize) -> usize {
        match self {
            Form::Floats(dtype) => padded(k) * dtype.bytes(),
            Form::Blocks(format) => blocks::Layout::of(format).row_bytes(k),
            Form::Coded(layout) => layout.row_bytes(k),
        }
    }
}

/// How a matrix is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) form: Form,
    /// Columns on the device: the matrix's with what pads them, a multiple of 8.
    pub(crate) columns: usize,
    /// Which of the matrix's they are, if not in its order; those that are none of them are negative, and mean zero.
    pub(crate) order: Option<Vec<i32>>,
}

impl Kept {
    /// How a matrix is kept in a format.
    ///
    /// # Panics
    /// If it has not two dimensions.
    ///
    /// # Errors
    /// If it cannot be.
    pub(crate) fn of(src: &HostTensor<'_>, format: WeightFormat) -> Result<Self> {
        let &[_, k] = src.shape() else { panic!("{}: {:?} is no matrix", src.name(), src.shape()) };
        src.expect_keepable(format)?;
        let in_order = |form| Self { form, columns: padded(k), order: None };
        Ok(match (format, src.coding()) {
            (WeightFormat::Coded(_), Some(coding)) => {
                let (layout, order) = coded::arrange(coding);
                let form = Form::Coded(layout);
                order.map_or(in_order(form), |order| Self { form, columns: order.len(), order: Some(order) })
            }
            (WeightFormat::Ggml(format), _) => in_order(Form::Blocks(format)),
            _ => in_order(Form::Floats(float(format).expect("codes are keepable"))),
        })
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.form.row_bytes(self.columns)
    }

    /// The matrix in device memory.
    ///
    /// # Errors
    /// If memory is short.
    pub(crate) fn load(&self, gpu: &Arc<Gpu>, src: &HostTensor<'_>) -> Result<Buffer> {
        let buffer = gpu.alloc(src.shape()[0] * self.row_bytes(), "weights")?;
        self.write(gpu, &buffer, 0, src)?;
        Ok(buffer)
    }

    /// Packs the rows of a matrix that is kept like this, and copies them to a place in a buffer. All processors pack.
    pub(crate) fn write(&self, gpu: &Gpu, buffer: &Buffer, offset: usize, src: &HostTensor<'_>) -> Result<()> {
        let (rows, stride) = (src.shape()[0], self.row_bytes());
        let part = (PART / stride.max(1)).max(1);
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let start = part * next.fetch_add(1, Ordering::Relaxed);
                if start >= rows {
                    return Ok(());
                }
                let rows = src.rows(start, part.min(rows - start));
                gpu.write(buffer, offset + start * stride, &self.packed(&rows))?;
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
    fn packed<'a>(&self, src: &HostTensor<'a>) -> Cow<'a, [u8]> {
        let k = src.shape()[1];
        match (self.form, src.stored()) {
            (Form::Blocks(format), Some(blocks)) if src.dtype() == DType::Ggml(format) => {
                blocks::Layout::of(format).pack(blocks, k).into()
            }
            (Form::Blocks(format), _) => {
                blocks::Layout::of(format).pack(&src.to_blocks(&|values| format.quantize(values)), k).into()
            }
            (Form::Coded(layout), _) => {
                let coding = src.coding().expect("a matrix of codes");
                layout.pack(coding, &src.to_codes(), self.columns, self.order.as_deref()).into()
            }
            (Form::Floats(dtype), Some(floats)) if Some(dtype) == DataType::of(src.dtype()) => {
                pad(floats.into(), dtype, k)
            }
            (Form::Floats(dtype), _) => pad(dtype.encode(&src.to_f32()).into(), dtype, k),
        }
    }
}

/// Rows of floats, each with zeros behind it.
fn pad(floats: Cow<'_, [u8]>, dtype: DataType, k: usize) -> Cow<'_, [u8]> {
    let size = dtype.bytes();
    if k == padded(k) {
        return floats;
    }
    let zeros = vec![0; (padded(k) - k) * size];
    floats.chunks_exact(k * size).flat_map(|row| [row, &zeros].concat()).collect()
}

/// Where in a span the bits of a column's code lie, `bits` of them in a plane: the byte, and the shift within. `group` is that of
/// `column` in the kernels.
pub(crate) fn place(column: usize, bits: usize, group: usize) -> (usize, usize) {
    let (chunk, rest) = (column / CHUNK, column % CHUNK);
    let (part, lane) = match group {
        CHUNK => (rest % 8 / 4, rest / 8),
        _ => (rest / 16, rest % 16 / 4),
    };
    let field = 4 * chunk + 2 * part + rest % 4 / 2;
    let per_word = 16 / bits;
    let bit = field % per_word * bits + 16 * (rest % 2);
    ((lane * bits + field / per_word) * 4 + bit / 8, bit % 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_lie_as_they_are_with_zeros_behind_each_row() {
        let data: Vec<u8> = (0..2 * 9 * 2).collect();
        let matrix = HostTensor::new("w", DType::BF16, vec![2, 9], &data);
        let kept = Kept::of(&matrix, WeightFormat::BF16).unwrap();
        let packed = kept.packed(&matrix);
        assert_eq!((packed.len(), kept.columns), (2 * kept.row_bytes(), 16));
        for (row, data) in packed.chunks(32).zip(data.chunks(18)) {
            assert_eq!((&row[..18], &row[18..]), (data, [0; 14].as_slice()));
        }
    }
}
