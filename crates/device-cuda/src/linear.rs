//! Linear weights and products with them.
//!
//! To be replaced whole. The backend uses `Linear`, `LinearKernels`, `weight_formats` and `narrow` as below.

use std::collections::BTreeSet;
use std::sync::Arc;

use baton_device::{HostLinear, Result, WeightFormat};

use crate::error::not_yet;
use crate::gpu::Gpu;
use crate::tensor::{DataType, Tensor};

/// A linear weight with its bias.
pub struct Linear {}

/// Formats in which weights, also those of experts, can be kept.
pub(crate) fn weight_formats() -> BTreeSet<WeightFormat> {
    [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16].into()
}

/// Formats whose weights meet activations of a type that were rounded to it; the others give f32.
pub(crate) fn narrow(activations: DataType) -> BTreeSet<WeightFormat> {
    let narrow = |format: &WeightFormat| activations != DataType::F32 && *format != WeightFormat::F32;
    weight_formats().into_iter().filter(narrow).collect()
}

/// The kernels of linear and blocks, for activations of a type.
pub(crate) struct LinearKernels {
    gpu: Arc<Gpu>,
}

impl LinearKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, _activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone() })
    }

    /// Load time: checks shape and format, packs, uploads, asks for the kernels that the format needs.
    pub(crate) fn weight(&self, _src: &HostLinear<'_>) -> Result<Linear> {
        not_yet(&self.gpu)
    }

    pub(crate) fn embed(&self, _ids: &[u32], _table: &Linear, _out: &mut Tensor) -> Result<()> {
        not_yet(&self.gpu)
    }

    /// Every weight of the group with one input.
    pub(crate) fn group(&self, _x: &Tensor, _group: &mut [(&Linear, &mut Tensor)]) -> Result<()> {
        not_yet(&self.gpu)
    }
}
