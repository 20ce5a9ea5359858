//! The cache: block memory of all layers.
//!
//! A layer has two planes, of keys and values or of latents and rotated keys, `[blocks, heads, 16, width]`: a head's sixteen
//! positions lie together, so that reading a context is reading a few thousand bytes at a time. For bytes each plane has
//! scales beside it, `[blocks, heads, 16]` in f32.

use std::collections::BTreeSet;
use std::sync::Arc;

use baton_device::{KvDtype, KvSpec, LayerKv, Result, Rows};

use crate::attention::{Attend, Kept, counters};
use crate::gpu::{Arg, Gpu};
use crate::heads::{self, Part};
use crate::memory::{Buffer, Kind};
use crate::plan::{AttentionPlan, Pod};
use crate::program::Kernel;
use crate::tensor::{DataType, Tensor};

/// Tokens of a block: of one head in bf16 and 128 columns, 4 KiB.
pub(crate) const BLOCK: usize = 16;

/// How elements can be kept beside activations of a type. Of those that were rounded to 16 bits nothing wider keeps more, so
/// it is not offered: `auto` would choose it, and pay twice the memory.
pub(crate) fn kv_dtypes(activations: DataType) -> BTreeSet<KvDtype> {
    match activations {
        DataType::F32 => KvDtype::ALL.into(),
        DataType::F16 => [KvDtype::F16, KvDtype::Int8].into(),
        DataType::BF16 => [KvDtype::BF16, KvDtype::Int8].into(),
    }
}

/// The name of an element in kernels.
fn element(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => DataType::F32.name(),
        KvDtype::F16 => DataType::F16.name(),
        KvDtype::BF16 => DataType::BF16.name(),
        KvDtype::Int8 => "signed char",
    }
}

/// Block memory of all layers.
pub struct KvCache {
    layers: Vec<Layer>,
    blocks: usize,
    enter: Kernel,
    /// Of blocks that attend to parts of a context.
    counters: Buffer,
}

/// What one layer keeps, and what attends to it.
pub(crate) struct Layer {
    pub(crate) kv: LayerKv,
    pub(crate) planes: [Plane; 2],
    pub(crate) attend: Attend,
}

/// Heads and the width of each.
#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    width: usize,
}

/// Keys or values, latents or rotated keys.
pub(crate) struct Plane {
    shape: Shape,
    data: Buffer,
    /// Of bytes.
    scales: Option<Buffer>,
}

impl KvCache {
    /// Zeroed, for activations of a type.
    pub(crate) fn new(gpu: &Arc<Gpu>, activations: DataType, spec: &KvSpec, blocks: usize) -> Result<Self> {
        assert_eq!(spec.block_size, BLOCK, "tokens of a block");
        assert!(blocks < i32::MAX as usize / BLOCK, "{blocks} blocks");
        let kept = Kept { activations, element: element(spec.dtype), bytes: spec.dtype == KvDtype::Int8 };
        let of_counters = counters(gpu) * size_of::<u32>();
        // Nothing else may come in between.
        let planes = spec.layers.iter().flat_map(|kv| shapes(*kv)).map(|shape| shape.bytes(spec.dtype));
        let buffers = planes.flat_map(|(data, scales)| std::iter::once(data).chain(scales));
        let planes = buffers.map(|bytes| blocks.saturating_mul(bytes));
        gpu.reserve_together(Kind::Lasting, std::iter::once(of_counters).chain(planes))?;
        let counters = zeros(gpu, of_counters, "counters of attention")?;
        let layer = |&kv: &LayerKv| {
            let [first, second] = shapes(kv).map(|shape| Plane::new(gpu, spec.dtype, blocks, shape));
            Ok(Layer { kv, planes: [first?, second?], attend: Attend::new(gpu, &kept, kv)? })
        };
        let enter = heads::kernel(gpu, activations, kept.element)?;
        Ok(Self { layers: spec.layers.iter().map(layer).collect::<Result<_>>()?, blocks, enter, counters })
    }

    /// Zeroes blocks in every layer.
    pub(crate) fn clear(&mut self, gpu: &Arc<Gpu>, blocks: &[u32]) -> Result<()> {
        for plane in self.layers.iter().flat_map(|layer| &layer.planes) {
            for buffer in std::iter::once(&plane.data).chain(&plane.scales) {
                let bytes = buffer.bytes() / self.blocks;
                for &block in blocks {
                    gpu.fill(buffer.address() + u64::from(block) * bytes as u64, bytes, 0)?;
                }
            }
        }
        Ok(())
    }

    /// As many as [`counters`] says, zero between launches.
    pub(crate) fn counters(&self) -> &Buffer {
        &self.counters
    }

    /// A layer.
    pub(crate) fn layer(&self, layer: usize) -> &Layer {
        &self.layers[layer]
    }

    /// Brings heads of a step to where attention finds them: those that are kept into their slots.
    pub(crate) fn enter(&self, gpu: &Gpu, parts: &[Part<'_>], plan: &AttentionPlan) -> Result<()> {
        assert!(plan.highest_block() < self.blocks, "block {} of {}", plan.highest_block(), self.blocks);
        heads::enter(gpu, &self.enter, parts, plan)
    }
}

/// Those of a layer's planes.
fn shapes(kv: LayerKv) -> [Shape; 2] {
    match kv {
        LayerKv::Full { kv_heads: heads, head_dim: width } => [Shape { heads, width }; 2],
        LayerKv::Latent { rank, rope, index: None } => [rank, rope].map(|width| Shape { heads: 1, width }),
        LayerKv::Latent { index: Some(_), .. } => panic!("no indexed attention: the capabilities do not offer it"),
        LayerKv::Windowed { .. } => panic!("no compressed attention: the capabilities do not offer it"),
    }
}

impl Shape {
    /// Bytes of a block's elements, and of their scales if they are bytes.
    fn bytes(self, dtype: KvDtype) -> (usize, Option<usize>) {
        let positions = self.heads * BLOCK;
        let (size, scales) = match dtype {
            KvDtype::F32 => (4, None),
            KvDtype::F16 | KvDtype::BF16 => (2, None),
            KvDtype::Int8 => (1, Some(positions * size_of::<f32>())),
        };
        (positions * self.width * size, scales)
    }
}

impl Plane {
    fn new(gpu: &Arc<Gpu>, dtype: KvDtype, blocks: usize, shape: Shape) -> Result<Self> {
        let memory = |bytes: usize| zeros(gpu, blocks.saturating_mul(bytes), "key/value blocks");
        let (data, scales) = shape.bytes(dtype);
        let scales = scales.map(memory).transpose()?;
        Ok(Self { shape, data: memory(data)?, scales })
    }

    /// `Plane` of kernels.
    pub(crate) fn arg(&self) -> Arg {
        let [data, scales] = self.addresses();
        Pod::default().ptr(data).ptr(scales).int(self.shape.heads).int(self.shape.width).arg()
    }

    /// Of elements, and of scales if there are any.
    pub(crate) fn addresses(&self) -> [u64; 2] {
        [self.data.address(), self.scales.as_ref().map_or(0, Buffer::address)]
    }

    /// A plane of nothing.
    pub(crate) fn none() -> Arg {
        Pod::default().ptr(0).ptr(0).int(1).int(0).arg()
    }
}

/// Memory that is zero when what is queued now has run.
fn zeros(gpu: &Arc<Gpu>, bytes: usize, what: &'static str) -> Result<Buffer> {
    let buffer = gpu.alloc(bytes, what)?;
    gpu.fill(buffer.address(), buffer.bytes(), 0)?;
    Ok(buffer)
}

/// Checks the shape of an input of a step.
pub(crate) fn expect(x: &Tensor, plan: &AttentionPlan, cols: usize) {
    assert_eq!((x.rows(), x.cols()), (plan.rows(), cols), "shape of an input of attention");
}
