//! Linear weights: float weights as the checkpoint has them, `[out, in]`, read transposed by the product.
//!
//! A product is in the weight's type with f32 sums: bf16 and f16 weights meet activations in that type and give it, f32
//! weights give f32, so what must not be rounded (router logits) is not.

use std::sync::Arc;

use baton_device::{DType, DeviceError, HostLinear, HostTensor, Result as SeamResult, WeightFormat};

use crate::abi::consts::cube_math;
use crate::chip::Chip;
use crate::device::{Device, encode};
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::owner::Owner;
use crate::tensor::{Buffer, Vector};

/// A prepared weight.
pub struct Linear {
    /// `[out, in]`.
    weight: Buffer,
    dtype: DataType,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    bias: Option<Vector>,
}

/// Where a weight lies, for work that is queued.
#[derive(Clone)]
pub(crate) struct LinearView {
    /// `[in, out]`, strided.
    pub(crate) transposed: View,
    pub(crate) bias: Option<View>,
}

impl Linear {
    pub(crate) fn new(owner: &Arc<Owner>, src: &HostLinear<'_>) -> SeamResult<Self> {
        let &[out_features, in_features] = src.weight.shape() else {
            panic!("{}: a linear weight has two dimensions, not {:?}", src.weight.name(), src.weight.shape())
        };
        src.weight.expect_keepable(src.format)?;
        if let Some(bias) = &src.bias {
            bias.expect_shape(&[out_features])?;
        }
        let dtype = float_type(&src.weight, src.format)?;
        let weight = Buffer::with(owner, float_bytes(&src.weight, dtype))?;
        let bias = src.bias.as_ref().map(|bias| Vector::new(owner, &bias.to_f32(), dtype)).transpose()?;
        Ok(Self { weight, dtype, out_features, in_features, bias })
    }

    /// The type of the product and of its input.
    pub(crate) fn dtype(&self) -> DataType {
        self.dtype
    }

    /// `[out, in]`.
    pub(crate) fn rows(&self) -> View {
        View::new(self.weight.address(), self.dtype, &[self.out_features, self.in_features])
    }

    pub(crate) fn view(&self) -> LinearView {
        LinearView { transposed: self.rows().swap(0, 1), bias: self.bias.as_ref().map(|bias| bias.view(self.dtype)) }
    }
}

/// The element type of a float format.
pub(crate) fn float_type(tensor: &HostTensor<'_>, format: WeightFormat) -> SeamResult<DataType> {
    Ok(match format {
        WeightFormat::F32 => DataType::F32,
        WeightFormat::F16 => DataType::F16,
        WeightFormat::BF16 => DataType::BF16,
        WeightFormat::Ggml(_) => {
            return Err(DeviceError::Format {
                tensor: tensor.name().to_owned(),
                dtype: tensor.dtype(),
                format,
                reason: "this device keeps f32, f16 and bf16".into(),
            });
        }
    })
}

/// A tensor's elements in a float type: its own bytes where they are that already.
pub(crate) fn float_bytes(tensor: &HostTensor<'_>, dtype: DataType) -> Vec<u8> {
    let same = matches!(
        (tensor.dtype(), dtype),
        (DType::F32, DataType::F32) | (DType::F16, DataType::F16) | (DType::BF16, DataType::BF16)
    );
    match tensor.stored() {
        Some(bytes) if same => bytes.to_vec(),
        _ => encode(&tensor.to_f32(), dtype),
    }
}

/// `out = x·Wᵀ + b`, out in the weight's type.
pub(crate) fn linear(device: &mut Device, x: &View, weight: &LinearView, out: &View) -> Result<(), AscendError> {
    let dtype = weight.transposed.dtype;
    device.with_type(x, dtype, |device, x| {
        let math =
            if device.chip() == Chip::P310 { cube_math::ALLOW_FP32_DOWN_PRECISION } else { cube_math::KEEP_DTYPE };
        let (x, w, y) = (device.tensor(x)?, device.tensor(&weight.transposed)?, device.tensor(out)?);
        device.mm(&x, &w, &y, math as i8)?;
        if let Some(bias) = &weight.bias {
            let (bias, one) = (device.tensor(bias)?, device.scalar(1.0, dtype)?);
            device.add_in_place(&y, &bias, &one)?;
        }
        Ok(())
    })
}
