//! Multi-head latent attention, absorbed: queries are taken into the space of the latents, all heads attend to the same
//! cached rows, and each head takes what it mixed out again.
//!
//! The up-projection is kept in the type of activations, whatever the format of its checkpoint: absorbed queries and mixed
//! latents are rounded to that type anyway. Its key rows are transposed, so that both products sum over what lies together.
//!
//! Rows are taken in parts, so that absorbed queries and mixed latents of a long prompt need not all be there at once.

use std::sync::Arc;

use baton_device::{AttentionParams, DeviceError, HostLatent, LayerKv, Result, Rows};

use crate::attention::{Attend, Kept, PAD, Pass, RowWise, heads, in_type, scores, shared_memory};
use crate::cache::{KvCache, Layer, expect};
use crate::gpu::{Arg, Gpu, Launch};
use crate::memory::Buffer;
use crate::plan::AttentionPlan;
use crate::program::{Kernel, Source};
use crate::tensor::{DataType, Tensor};

/// Rows of a part.
const PART: usize = 1024;
/// Pairs of a token and a head in a block, and positions of a tile, as the kernel has them.
const PAIRS: usize = 64;
const KEYS: usize = 32;

/// Attention over latents that are in the cache.
pub(crate) struct Absorbed {
    /// On tensor cores, where shape and chip allow it, and its shared memory.
    tiled: Option<(Kernel, u32)>,
    rows: RowWise,
}

impl Absorbed {
    pub(crate) fn new(gpu: &Gpu, kept: &Kept, rank: usize, rope: usize) -> Result<Self> {
        let Kept { activations, element, bytes } = *kept;
        let halves = activations != DataType::F32;
        let shape = [rank, rope].iter().all(|width| width.is_multiple_of(16))
            && (rank <= 128 || rank.is_multiple_of(128) && rank <= 512);
        let shared = shared(rank, rope, bytes);
        let tiled = if halves && shape && shared + STATIC <= shared_memory(gpu)? {
            let name = format!("attend_latents<{}, {element}, {rank}, {rope}>", activations.name());
            Some((gpu.kernel(Source::Latent, name)?, shared as u32))
        } else {
            None
        };
        Ok(Self { tiled, rows: RowWise::new(gpu, kept, rank + rope, rank)? })
    }
}

/// Dynamic shared memory of the kernel, and what it has beside.
fn shared(rank: usize, rope: usize, bytes: bool) -> usize {
    let stride = 2 * (rank + rope + PAD);
    let stages = if bytes { 2 * KEYS * (rank + rope + 8) + KEYS * stride } else { 2 * KEYS * stride };
    PAIRS * (stride + 2 * (KEYS + PAD)) + stages
}
const STATIC: usize = 5 * PAIRS * size_of::<f32>();

/// The up-projection.
pub struct Latent {
    heads: usize,
    nope: usize,
    rope: usize,
    v: usize,
    rank: usize,
    /// `[heads, rank, nope]`.
    absorb: Buffer,
    /// `[heads, v, rank]`.
    project: Buffer,
    /// Whether rows of queries lie in whole parts of 16 bytes; and those of latents.
    aligned: [bool; 2],
}

/// The kernels of this file, for activations of a type.
pub(crate) struct LatentKernels {
    gpu: Arc<Gpu>,
    activations: DataType,
}

impl LatentKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone(), activations })
    }

    /// Load time: checks shape and format, packs, uploads, asks for kernels.
    pub(crate) fn weight(&self, src: &HostLatent<'_>) -> Result<Latent> {
        let &HostLatent { ref kv_b, heads, nope, rope, v, rank, format } = src;
        kv_b.expect_shape(&[heads * (nope + v), rank])?;
        kv_b.expect_keepable(format)?;
        TODO
    }
}
