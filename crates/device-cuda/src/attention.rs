//! Attention over keys and values.
//!
//! To be replaced whole. The backend uses `AttentionKernels` as below.

use std::sync::Arc;

use baton_device::{AttentionParams, Result};

use crate::cache::KvCache;
use crate::error::not_yet;
use crate::gpu::Gpu;
use crate::plan::AttentionPlan;
use crate::tensor::{DataType, Tensor};

/// The kernels of this file, for activations of a type.
pub(crate) struct AttentionKernels {
    gpu: Arc<Gpu>,
}

impl AttentionKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, _activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone() })
    }

    #[allow(clippy::too_many_arguments)] // as the seam has them
    pub(crate) fn paged(
        &self,
        _q: &Tensor,
        _k: &Tensor,
        _v: &Tensor,
        _cache: &mut KvCache,
        _layer: usize,
        _plan: &AttentionPlan,
        _params: &AttentionParams,
        _out: &mut Tensor,
    ) -> Result<()> {
        not_yet(&self.gpu)
    }
}
