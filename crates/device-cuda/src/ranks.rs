//! Several GPUs that compute one model.
//!
//! To be replaced whole. The backend uses `Place` as below; `join` is for `CudaBackend::ranks`.

use std::sync::Arc;

use baton_device::{Result, World};

use crate::error::not_yet;
use crate::gpu::Gpu;
use crate::tensor::Tensor;

/// A rank's place among those that it was joined with.
pub(crate) struct Place {
    pub(crate) world: World,
}

impl Place {
    /// Of a device by itself.
    pub(crate) fn alone() -> Self {
        Self { world: World::ALONE }
    }

    pub(crate) fn all_reduce(&self, gpu: &Arc<Gpu>, _x: &mut Tensor) -> Result<()> {
        if self.world.size == 1 { Ok(()) } else { not_yet(gpu) }
    }

    pub(crate) fn leave(&self) {}

    pub(crate) fn rejoin(&self) -> Result<()> {
        Ok(())
    }
}

/// Joins devices as ranks, in this order.
pub(crate) fn join(gpus: &[Arc<Gpu>]) -> Result<Vec<Place>> {
    if gpus.len() == 1 { Ok(vec![Place::alone()]) } else { not_yet(&gpus[0]) }
}
