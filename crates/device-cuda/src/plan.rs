//! What attention needs to know of a step, on the device.
//!
//! To be replaced whole. The backend uses `Planner` and `AttentionPlan` as below.

use std::sync::Arc;

use baton_device::{AttentionBatch, Result};

use crate::error::not_yet;
use crate::gpu::Gpu;

/// Makes plans: owns the places on the device into which they are copied.
pub(crate) struct Planner {
    gpu: Arc<Gpu>,
}

impl Planner {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        Ok(Self { gpu: gpu.clone() })
    }

    pub(crate) fn plan(&self, _batch: &AttentionBatch<'_>) -> Result<AttentionPlan> {
        not_yet(&self.gpu)
    }
}

/// A step's plan.
pub struct AttentionPlan {
    positions: u64,
    rows: usize,
}

impl AttentionPlan {
    /// Where the position of each row is, `int`.
    pub(crate) fn positions(&self) -> u64 {
        self.positions
    }

    /// Rows of the step.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }
}
