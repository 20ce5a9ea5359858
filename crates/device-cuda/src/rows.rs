//! Operations on rows: norms, sums, functions of single numbers, rotation, copies of rows, the greedy choice.
//!
//! To be replaced whole. The backend uses `RowKernels` and `Rope` as below.

use std::sync::Arc;

use baton_device::{Activation, HostRope, Result, RopeLayout};

use crate::error::not_yet;
use crate::gpu::Gpu;
use crate::plan::AttentionPlan;
use crate::tensor::{DataType, Tensor, Vector};

/// Rotary tables.
pub struct Rope {}

impl Rope {
    pub(crate) fn new(_gpu: &Arc<Gpu>, _src: &HostRope) -> Result<Self> {
        Ok(Self {})
    }
}

/// The kernels of this file, for activations of a type.
pub(crate) struct RowKernels {
    gpu: Arc<Gpu>,
}

impl RowKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, _activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone() })
    }

    /// Widths and rows are checked here, as in every method; `x` and `out` have any type of activations.
    pub(crate) fn rms_norm(&self, _x: &Tensor, _weight: &Vector, _eps: f32, _out: &mut Tensor) -> Result<()> {
        not_yet(&self.gpu)
    }

    pub(crate) fn rms_norm_in_place(&self, _x: &mut Tensor, _weight: &Vector, _eps: f32) -> Result<()> {
        not_yet(&self.gpu)
    }

    pub(crate) fn add_rms_norm(
        &self,
        _x: &Tensor,
        _residual: &mut Tensor,
        _weight: &Vector,
        _eps: f32,
        _out: &mut Tensor,
    ) -> Result<()> {
        not_yet(&self.gpu)
    }

    pub(crate) fn scale(&self, _x: &mut Tensor, _factor: f32) -> Result<()> {
        not_yet(&self.gpu)
    }

    pub(crate) fn softcap(&self, _x: &mut Tensor, _cap: f32) -> Result<()> {
        not_yet(&self.gpu)
    }

    pub(crate) fn add(&self, _x: &mut Tensor, _y: &Tensor) -> Result<()> {
        not_yet(&self.gpu)
    }

    pub(crate) fn gated_activation(
        &self,
        _activation: Activation,
        _gate: &Tensor,
        _up: &Tensor,
        _out: &mut Tensor,
    ) -> Result<()> {
        not_yet(&self.gpu)
    }

    /// Positions are at `plan.positions()`, one `int` for each of `plan.rows()`.
    pub(crate) fn rope(
        &self,
        _x: &mut Tensor,
        _layout: RopeLayout,
        _table: &Rope,
        _plan: &AttentionPlan,
    ) -> Result<()> {
        not_yet(&self.gpu)
    }

    pub(crate) fn gather_rows(&self, _x: &Tensor, _rows: &[u32], _out: &mut Tensor) -> Result<()> {
        not_yet(&self.gpu)
    }

    pub(crate) fn add_rows(&self, _x: &Tensor, _rows: &[u32], _out: &mut Tensor) -> Result<()> {
        not_yet(&self.gpu)
    }

    /// Replaces what `out` held.
    pub(crate) fn argmax(&self, _x: &Tensor, _out: &mut Vec<Option<u32>>) -> Result<()> {
        not_yet(&self.gpu)
    }
}
