//! Multi-head latent attention.
//!
//! To be replaced whole. The backend uses `Latent` and `LatentKernels` as below.

use std::sync::Arc;

use baton_device::{HostLatent, Result};

use crate::cache::KvCache;
use crate::error::not_yet;
use crate::gpu::Gpu;
use crate::plan::AttentionPlan;
use crate::tensor::{DataType, Tensor};

/// The up-projection.
pub struct Latent {}

/// The kernels of this file, for activations of a type.
pub(crate) struct LatentKernels {
    gpu: Arc<Gpu>,
}

impl LatentKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, _activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone() })
    }

    /// Load time: checks shape and format, packs, uploads, asks for kernels.
    pub(crate) fn weight(&self, _src: &HostLatent<'_>) -> Result<Latent> {
        not_yet(&self.gpu)
    }

    #[allow(clippy::too_many_arguments)] // as the seam has them
    pub(crate) fn attend(
        &self,
        _q: &Tensor,
        _latent: &Tensor,
        _rope_key: &Tensor,
        _weight: &Latent,
        _cache: &mut KvCache,
        _layer: usize,
        _plan: &AttentionPlan,
        _scale: f32,
        _out: &mut Tensor,
    ) -> Result<()> {
        not_yet(&self.gpu)
    }
}
