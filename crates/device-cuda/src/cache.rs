//! The cache: block memory of all layers.
//!
//! To be replaced whole. The backend uses `KvCache`, `BLOCK` and `kv_dtypes` as below.

use std::collections::BTreeSet;
use std::sync::Arc;

use baton_device::{KvDtype, KvSpec, Result};

use crate::error::not_yet;
use crate::gpu::Gpu;
use crate::tensor::DataType;

/// Tokens of a block.
pub(crate) const BLOCK: usize = 16;

/// How elements can be kept beside activations of a type.
pub(crate) fn kv_dtypes(activations: DataType) -> BTreeSet<KvDtype> {
    match activations {
        DataType::F32 => [KvDtype::F32].into(),
        DataType::F16 => [KvDtype::F16].into(),
        DataType::BF16 => [KvDtype::BF16].into(),
    }
}

/// Block memory of all layers.
pub struct KvCache {}

impl KvCache {
    pub(crate) fn new(gpu: &Arc<Gpu>, _spec: &KvSpec, _num_blocks: usize) -> Result<Self> {
        not_yet(gpu)
    }

    pub(crate) fn clear(&mut self, gpu: &Arc<Gpu>, _blocks: &[u32]) -> Result<()> {
        not_yet(gpu)
    }
}
