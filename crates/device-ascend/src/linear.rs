//! Linear weights: float weights as the checkpoint has them, `[out, in]`, read transposed by the product, or brought into the
//! blocks that matrix units read ([`crate::ops::fractal`]); weights in a file's blocks as [`crate::quant`] has them.
//!
//! A product is in the weight's type with f32 sums: bf16 and f16 weights meet activations in that type and give it, f32
//! weights give f32, so what must not be rounded (router logits) is not. Where activations are f32 for comparisons, all
//! weights are kept as the f32 of what their format holds.

use std::sync::Arc;

use baton_device::{DType, DeviceError, HostLinear, HostTensor, Purpose, Result as SeamResult, WeightFormat};

use crate::backend::AscendBackend;
use crate::device::{Device, encode};
use crate::error::AscendError;
use crate::forms::{self, WeightShape};
use crate::object::{DataType, Tensor, View};
use crate::ops::{fractal, index};
use crate::owner::Owner;
use crate::quant::{self, Blocks, BlocksView, block_bytes};
use crate::tensor::{Buffer, Vector};

/// A prepared weight.
pub struct Linear {
    weight: Weight,
    dtype: DataType,
    /// Whether rows may be looked up.
    pub(crate) is_table: bool,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    bias: Option<Vector>,
}

enum Weight {
    /// `[out, in]`.
    Float(Buffer),
    /// The same in FRACTAL_NZ.
    Fractal(Buffer),
    Blocks(Box<Blocks>),
}

/// Where a weight lies, for work that is queued.
#[derive(Clone)]
pub(crate) struct LinearView {
    weight: WeightView,
    /// Of the product and of its input.
    dtype: DataType,
    bias: Option<View>,
}

#[derive(Clone)]
enum WeightView {
    /// `[out, in]`.
    Float(View),
    /// `[out, in]`, as it was before it was brought into FRACTAL_NZ.
    Fractal(View),
    Blocks(BlocksView),
}

impl LinearView {
    /// Rows `[out, in]` in a float type.
    pub(crate) fn float(rows: View) -> Self {
        Self { dtype: rows.dtype, weight: WeightView::Float(rows), bias: None }
    }

    /// What were such rows before they were brought into FRACTAL_NZ.
    pub(crate) fn fractal(rows: View) -> Self {
        Self { dtype: rows.dtype, weight: WeightView::Fractal(rows), bias: None }
    }
}

impl Linear {
    pub(crate) fn new(backend: &AscendBackend, src: &HostLinear<'_>) -> SeamResult<Self> {
        let (owner, activations, table) = (&backend.owner, backend.activations, src.purpose == Purpose::Table);
        let &[out_features, in_features] = src.weight.shape() else {
            panic!("{}: a linear weight has two dimensions, not {:?}", src.weight.name(), src.weight.shape())
        };
        src.weight.expect_keepable(src.format)?;
        if let Some(bias) = &src.bias {
            bias.expect_shape(&[out_features])?;
        }
        let (dtype, weight) = match src.format {
            WeightFormat::Ggml(format) => {
                (activations, Weight::Blocks(Box::new(Blocks::new(owner, &src.weight, format, activations)?)))
            }
            _ => {
                let (dtype, bytes) = float_bytes(&src.weight, src.format, activations)?;
                let shape = WeightShape { dims: [out_features, in_features], dtype, table };
                let weight = if src.purpose != Purpose::Adapter && forms::weight_in_blocks(backend, shape)? {
                    Weight::Fractal(fractal_buffer(owner, shape, bytes)?)
                } else {
                    Weight::Float(Buffer::with(owner, bytes)?)
                };
                (dtype, weight)
            }
        };
        let bias = src.bias.as_ref().map(|bias| Vector::new(owner, &bias.to_f32(), dtype)).transpose()?;
        Ok(Self { weight, dtype, is_table: table, out_features, in_features, bias })
    }

    /// The type of the product and of its input.
    pub(crate) fn dtype(&self) -> DataType {
        self.dtype
    }

    pub(crate) fn view(&self) -> LinearView {
        let dims = [self.out_features, self.in_features];
        let weight = match &self.weight {
            Weight::Float(buffer) => WeightView::Float(View::new(buffer.address(), self.dtype, &dims)),
            Weight::Fractal(buffer) => WeightView::Fractal(fractal::with_room(buffer.address(), self.dtype, dims)),
            Weight::Blocks(blocks) => WeightView::Blocks(blocks.view()),
        };
        let bias = self.bias.as_ref().map(|bias| bias.view(self.dtype));
        LinearView { weight, dtype: self.dtype, bias }
    }
}

/// Rows, brought into FRACTAL_NZ.
fn fractal_buffer(owner: &Arc<Owner>, shape: WeightShape, rows: Vec<u8>) -> SeamResult<Buffer> {
    let WeightShape { dims, dtype, .. } = shape;
    let buffer = Buffer::new(owner, fractal::elements(dims) * dtype.bytes())?;
    let weight = fractal::with_room(buffer.address(), dtype, dims);
    owner.call("weight in blocks", move |device| {
        device.upload(&rows, weight.base)?;
        fractal::to_blocks(device, &weight)
    })?;
    Ok(buffer)
}

/// The type in which a weight is kept where products are of floats, and its elements in that type: its own bytes where they
/// are that already; blocks in the type of the activations.
pub(crate) fn float_bytes(
    tensor: &HostTensor<'_>,
    format: WeightFormat,
    activations: DataType,
) -> SeamResult<(DataType, Vec<u8>)> {
    let refused = |reason: String| DeviceError::Format {
        tensor: tensor.name().to_owned(),
        dtype: tensor.dtype(),
        format,
        reason,
    };
    let dtype = match format {
        WeightFormat::F32 => DataType::F32,
        WeightFormat::F16 => DataType::F16,
        WeightFormat::BF16 => DataType::BF16,
        WeightFormat::Ggml(blocks) => {
            tensor.expect_keepable(format)?;
            let mut values = vec![0.0; tensor.len()];
            blocks.dequantize(&block_bytes(tensor, blocks), &mut values);
            return Ok((activations, encode(&values, activations)));
        }
        WeightFormat::Coded(code) => unreachable!("{code} is not among the formats that are kept here"),
    };
    let same = matches!(
        (tensor.dtype(), dtype),
        (DType::F32, DataType::F32) | (DType::F16, DataType::F16) | (DType::BF16, DataType::BF16)
    );
    let widened = activations == DataType::F32 && dtype != DataType::F32;
    let bytes = match tensor.stored() {
        Some(bytes) if same && !widened => return Ok((dtype, bytes.to_vec())),
        _ => encode(&tensor.to_f32(), dtype),
    };
    let values =
        HostTensor::new(tensor.name(), stored_type(format), vec![bytes.len() / dtype.bytes()], &bytes).to_f32();
    // A device would go on with infinities, or with its largest number, and say nothing.
    if let Some(i) = values.iter().position(|x| x.is_infinite()) {
        return Err(refused(format!("element {i} is beyond the range of {format}; bf16 or f32 would hold it")));
    }
    Ok(if widened { (DataType::F32, encode(&values, DataType::F32)) } else { (dtype, bytes) })
}

pub(crate) fn stored_type(format: WeightFormat) -> DType {
    match format {
        WeightFormat::F32 => DType::F32,
        WeightFormat::F16 => DType::F16,
        WeightFormat::BF16 => DType::BF16,
        WeightFormat::Ggml(blocks) => DType::Ggml(blocks),
        WeightFormat::Coded(code) => unreachable!("{code} is not among the formats that are kept here"),
    }
}

/// `out = x·Wᵀ + b` for each weight and out, which are in the weight's type. `x` is converted once for all weights of a type.
pub(crate) fn linear_group(device: &mut Device, x: &View, group: &[(LinearView, View)]) -> Result<(), AscendError> {
    for dtype in [DataType::F32, DataType::F16, DataType::BF16] {
        let mut of_type = group.iter().filter(|(weight, _)| weight.dtype == dtype).peekable();
        if of_type.peek().is_some() {
            device.with_type(x, dtype, |device, x| {
                of_type.try_for_each(|(weight, out)| linear(device, x, weight, out))
            })?;
        }
    }
    Ok(())
}

/// As above for one weight, and x in its type.
fn linear(device: &mut Device, x: &View, weight: &LinearView, out: &View) -> Result<(), AscendError> {
    match &weight.weight {
        WeightView::Float(rows) => dense(device, x, &device.tensor(&rows.swap(0, 1)), out)?,
        WeightView::Fractal(rows) => dense(device, x, &fractal::turned(rows), out)?,
        WeightView::Blocks(blocks) => quant::product(device, x, blocks, out)?,
    }
    if let Some(bias) = &weight.bias {
        let (y, one) = (device.tensor(out), device.scalar(1.0, bias.dtype));
        let bias = device.tensor(bias);
        device.add_in_place(&y, &bias, &one)?;
    }
    Ok(())
}

/// `out = x · weight`, which is `[in, out]`.
fn dense(device: &mut Device, x: &View, weight: &Tensor, out: &View) -> Result<(), AscendError> {
    let math = device.cube_math();
    let (x, out) = (device.tensor(x), device.tensor(out));
    device.mm(&x, weight, &out, math)
}

/// `out[t] = row ids[t]`, in the weight's type.
pub(crate) fn embed(device: &mut Device, ids: &[i32], table: &LinearView, out: &View) -> Result<(), AscendError> {
    match &table.weight {
        WeightView::Float(rows) => index::embed(device, ids, rows, out),
        WeightView::Fractal(_) => unreachable!("tables stay rows"),
        WeightView::Blocks(blocks) => {
            index::with_indices(device, ids, |device, ids| quant::rows(device, ids, blocks, out))
        }
    }
}
