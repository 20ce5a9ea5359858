//! Linear weights in blocks: the integers of Q8_0 and Q4_0 as they are, under scales that the device multiplies.
//!
//! - Per group: an int8 or int4 weight, a scale for each 32 along K, in the type of the activations. Scales are f16 in the
//!   blocks, so activations in f16 keep them and activations in bf16 round each by at most 2^-9 of it. Activations are
//!   not rounded.
//! - Per row: where every block of a row has one scale ([`BlockFormat::int8_rows`]), an int8 weight with an f32 scale for each
//!   row. Activations are made int8 too, with a scale for each token: sums are exact integers.
//!
//! Invariant: codes are row-major `[out, in]`; of int4 two share a byte, the low half first (UNCONFIRMED, as is that products
//! per group take the transposed view of these rows as well as they take the other layout).

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use baton_device::{BlockFormat, DType, DeviceError, HostTensor, Result as SeamResult, Unpacked, WeightFormat};

use crate::abi::operators::Operators;
use crate::chip::Chip;
use crate::device::{Device, encode};
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::ops::index::select;
use crate::owner::Owner;
use crate::tensor::Buffer;

type Result<T> = std::result::Result<T, AscendError>;

/// Elements under a scale.
const GROUP: usize = 32;
/// K and N of a product are at most this.
const LIMIT: usize = 65_535;
/// The most rows of a larger weight that are multiplied together.
const PART: usize = 32_768;

/// Formats of blocks that the device keeps, with activations of this type.
pub(crate) fn offered(chip: Chip, operators: &Operators, activations: DataType) -> Vec<WeightFormat> {
    // The 310P has scales per row only; activations in f32 are for comparisons without rounding.
    let usable = chip != Chip::P310 && activations != DataType::F32 && operators.weight_quant_batch_matmul.is_some();
    let formats = [BlockFormat::Q8_0, BlockFormat::Q4_0].map(WeightFormat::Ggml);
    if usable { formats.to_vec() } else { Vec::new() }
}

/// How a weight is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// int8 codes, a scale for each group.
    Int8,
    /// int4 codes, a scale for each group.
    Int4,
    /// int8 codes, a scale for each row; activations in int8.
    Rows,
}

/// A weight in blocks.
pub(crate) struct Blocks {
    view: BlocksView,
    /// What the view's windows lie on.
    _buffers: Vec<Buffer>,
}

/// Where such a weight lies, for work that is queued.
#[derive(Debug, Clone)]
pub(crate) struct BlocksView {
    form: Form,
    /// `[out, in]`.
    codes: View,
    /// `[out, groups]`, or `[out]`.
    scales: View,
    /// For each byte of two int4 their values, `[256, 2]`, where codes are such bytes.
    halves: Option<View>,
}

impl Blocks {
    /// Keeps a matrix `[out, in]` in a format that is offered.
    pub(crate) fn new(
        owner: &Arc<Owner>,
        matrix: &HostTensor<'_>,
        format: BlockFormat,
        activations: DataType,
    ) -> SeamResult<Self> {
        let &[rows, cols] = matrix.shape() else { panic!("{}: {:?} is no matrix", matrix.name(), matrix.shape()) };
        matrix.expect_keepable(WeightFormat::Ggml(format))?;
        let refused = |reason: String| DeviceError::Format {
            tensor: matrix.name().to_owned(),
            dtype: matrix.dtype(),
            format: WeightFormat::Ggml(format),
            reason,
        };
        if !matches!(format, BlockFormat::Q8_0 | BlockFormat::Q4_0) {
            return Err(refused("of block formats this device keeps Q8_0 and Q4_0".into()));
        }
        if cols > LIMIT {
            return Err(refused(format!(
                "it has {cols} columns: blocks are kept up to {LIMIT}, wider rows as f16 or bf16"
            )));
        }
        let Taken { codes, scales } = take(matrix, format);
        let groups = cols / GROUP;
        let by_row = scales.chunks_exact(groups).all(|row| row.iter().all(|scale| *scale == row[0]));
        let operators = owner.operators();
        let narrow = operators.dynamic_quant.is_some() && operators.quant_matmul.is_some();
        let form = match (format, by_row) {
            (BlockFormat::Q8_0, true) if narrow => Form::Rows,
            // Of one row nobody can tell whether it lies turned, and so along which dimension two codes share a byte.
            (BlockFormat::Q4_0, _) if rows > 1 => Form::Int4,
            _ => Form::Int8,
        };
        // The scales of a group that is a whole row are those of rows.
        let per_row = form == Form::Rows || groups == 1;
        let scale_type = if form == Form::Rows { DataType::F32 } else { activations };
        let scale_dims = if per_row { vec![rows] } else { vec![rows, groups] };
        let scales: Vec<f32> = if per_row { scales.into_iter().step_by(groups).collect() } else { scales };
        let (code_type, bytes) = match form {
            Form::Int4 => (DataType::I4, codes.as_chunks().0.iter().map(|[low, high]| low & 15 | high << 4).collect()),
            _ => (DataType::I8, codes),
        };
        let codes = Buffer::with(owner, bytes)?;
        let scales = Buffer::with(owner, encode(&scales, scale_type))?;
        let halves = match form {
            Form::Int4 => Some(Buffer::with(owner, encode(&halves(), DataType::F32))?),
            _ => None,
        };
        let view = BlocksView {
            form,
            codes: View::new(codes.address(), code_type, &[rows, cols]),
            scales: View::new(scales.address(), scale_type, &scale_dims),
            halves: halves.as_ref().map(|table| View::new(table.address(), DataType::F32, &[256, 2])),
        };
        Ok(Self { view, _buffers: [codes, scales].into_iter().chain(halves).collect() })
    }

    pub(crate) fn view(&self) -> BlocksView {
        self.view.clone()
    }
}

#[cfg(test)]
impl BlocksView {
    pub(crate) fn form(&self) -> Form {
        self.form
    }
}

/// Codes, one to a byte, and the scales of groups.
struct Taken {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

/// A matrix in blocks: a file's own, or made.
pub(crate) fn block_bytes<'a>(matrix: &HostTensor<'a>, format: BlockFormat) -> Cow<'a, [u8]> {
    match matrix.stored() {
        Some(stored) if matrix.dtype() == DType::Ggml(format) => stored.into(),
        _ => matrix.to_blocks(&|values| format.quantize(values)).into(),
    }
}

/// Takes blocks apart.
fn take(matrix: &HostTensor<'_>, format: BlockFormat) -> Taken {
    let mut taken = Taken { codes: Vec::with_capacity(matrix.len()), scales: Vec::with_capacity(matrix.len() / GROUP) };
    let mut unpacked = Unpacked::default();
    for block in block_bytes(matrix, format).chunks_exact(format.bytes()) {
        format.unpack(block, &mut unpacked);
        taken.codes.extend(unpacked.codes[..GROUP].iter().map(|code| *code as u8));
        taken.scales.push(unpacked.group_scale(0));
    }
    taken
}

/// The two values of every byte of int4.
fn halves() -> Vec<f32> {
    let value = |half: u8| f32::from((half << 4) as i8 >> 4);
    (0..=u8::MAX).flat_map(|byte| [value(byte & 15), value(byte >> 4)]).collect()
}

/// `out = x·Wᵀ`, all in the type of the activations. `out` is contiguous.
pub(crate) fn product(device: &mut Device, x: &View, weight: &BlocksView, out: &View) -> Result<()> {
    let (tokens, rows) = (x.dims[0] as usize, weight.codes.dims[0] as usize);
    if rows <= LIMIT {
        return part(device, x, weight, 0..rows, out);
    }
    // The operator takes no more; its results are put side by side. Parts are as even as can be: none of one row.
    let part_rows = rows.div_ceil(rows.div_ceil(PART));
    for start in (0..rows).step_by(part_rows) {
        let len = part_rows.min(rows - start);
        device.with_views([(out.dtype, &[tokens, len])], |device, [piece]| {
            part(device, x, weight, start..start + len, &piece)?;
            device.assign(&out.narrow(1, start, len), &piece)
        })?;
    }
    Ok(())
}

/// The product with some rows.
fn part(device: &mut Device, x: &View, weight: &BlocksView, rows: Range<usize>, out: &View) -> Result<()> {
    let narrow = |view: &View| view.narrow(0, rows.start, rows.len());
    let (codes, scales) = (narrow(&weight.codes), narrow(&weight.scales));
    if weight.form == Form::Rows {
        return by_rows(device, x, &codes, &scales, out);
    }
    let (scales, group) = if scales.dims.len() == 2 { (scales.swap(0, 1), GROUP as i32) } else { (scales, 0) };
    let (x, out) = (device.tensor(x), device.tensor(out));
    let (codes, scales) = (device.tensor(&codes.swap(0, 1)), device.tensor(&scales));
    device.weight_quant_batch_matmul(&x, &codes, &scales, None, None, None, None, group, &out)
}

/// The product of activations made int8 with int8 rows.
fn by_rows(device: &mut Device, x: &View, codes: &View, scales: &View, out: &View) -> Result<()> {
    let [tokens, cols] = [x.dims[0], x.dims[1]].map(|d| d as usize);
    device.with_views(
        [(DataType::I8, &[tokens, cols]), (DataType::F32, &[tokens])],
        |device, [narrow, token_scales]| {
            let (x, out) = (device.tensor(x), device.tensor(out));
            let (narrow, token_scales) = (device.tensor(&narrow), device.tensor(&token_scales));
            let (codes, scales) = (device.tensor(codes), device.tensor(scales));
            device.dynamic_quant(&x, None, &narrow, &token_scales)?;
            device.quant_matmul(&narrow, &codes, &scales, None, Some(&token_scales), None, false, true, &out)
        },
    )
}

/// `out[t] = row ids[t]`, widened. `ids` are integers `[tokens]`; `out` is contiguous `[tokens, in]`.
pub(crate) fn rows(device: &mut Device, ids: &View, weight: &BlocksView, out: &View) -> Result<()> {
    let (tokens, [rows, cols]) = (ids.numel(), [0, 1].map(|d| weight.codes.dims[d] as usize));
    let groups = weight.scales.numel() / rows;
    let all_scales = weight.scales.reshape(&[rows, groups]);
    let shapes: [(DataType, &[usize]); 2] = [(DataType::F32, &[tokens, cols]), (all_scales.dtype, &[tokens, groups])];
    device.with_views(shapes, |device, [wide, scales]| {
        codes(device, ids, weight, &wide)?;
        select(device, &all_scales, ids, &scales)?;
        device.with_type(&scales, DataType::F32, |device, scales| {
            let product = device.tensor(&wide.reshape(&[tokens, groups, cols / groups]));
            let scales = device.tensor(&scales.broadcast(2, cols / groups));
            device.mul_in_place(&product, &scales)
        })?;
        device.convert(&wide, out)
    })
}

/// The codes of some rows in f32.
fn codes(device: &mut Device, ids: &View, weight: &BlocksView, out: &View) -> Result<()> {
    let (tokens, [rows, cols]) = (ids.numel(), [0, 1].map(|d| weight.codes.dims[d] as usize));
    let Some(halves) = &weight.halves else {
        return device.with_views([(weight.codes.dtype, &[tokens, cols])], |device, [picked]| {
            select(device, &weight.codes, ids, &picked)?;
            device.convert(&picked, out)
        });
    };
    // Two to a byte: each byte stands for a row of the table.
    let bytes = View::new(weight.codes.base, DataType::U8, &[rows, cols / 2]);
    device.with_views([(DataType::U8, &[tokens, cols / 2])], |device, [picked]| {
        select(device, &bytes, ids, &picked)?;
        device.with_type(&picked, DataType::I32, |device, index| {
            let (table, index) = (device.tensor(halves), device.tensor(index));
            let out = device.tensor(&out.reshape(&[tokens, cols / 2, 2]));
            device.embedding(&table, &index, &out)
        })
    })
}
