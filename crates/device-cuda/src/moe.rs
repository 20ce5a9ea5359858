//! Mixture of experts.
//!
//! To be replaced whole. The backend uses `Experts` and `MoeKernels` as below.

use std::sync::Arc;

use baton_device::{HostExperts, Result};

use crate::error::not_yet;
use crate::gpu::Gpu;
use crate::tensor::{DataType, Tensor};

/// A layer's experts.
pub struct Experts {}

/// The kernels of this file, for activations of a type.
pub(crate) struct MoeKernels {
    gpu: Arc<Gpu>,
}

impl MoeKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, _activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone() })
    }

    /// Load time: checks shapes and formats, packs and uploads one expert at a time, asks for kernels.
    pub(crate) fn experts(&self, _src: HostExperts<'_>) -> Result<Experts> {
        not_yet(&self.gpu)
    }

    /// `logits` may be f32 beside narrower `x`: a router's weights in f32 give f32.
    pub(crate) fn fused(&self, _x: &Tensor, _logits: &Tensor, _experts: &Experts, _out: &mut Tensor) -> Result<()> {
        not_yet(&self.gpu)
    }
}
