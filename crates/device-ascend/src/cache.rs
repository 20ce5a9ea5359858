//! The paged cache: for each layer two planes of `[blocks * BLOCK, width]`, each one block of device memory.
//!
//! Invariant: all slots are finite unless a sequence that is not failed yet wrote others: memory is zeroed at the start, and
//! the blocks of failed sequences are cleared. Attention relies on it: what is masked still enters its sums, as zero times a
//! number.

use std::sync::Arc;

use baton_device::{KvDtype, KvSpec, LayerKv, Result};

use crate::backend::BLOCK;
use crate::object::{DataType, View};
use crate::owner::Owner;
use crate::tensor::Buffer;

/// Block memory of all layers.
pub struct KvCache {
    layers: Vec<[Plane; 2]>,
}

/// Keys or values, latents or rotated keys.
struct Plane {
    view: View,
    /// Keeps the memory.
    _buffer: Buffer,
}

impl KvCache {
    pub(crate) fn new(owner: &Arc<Owner>, spec: &KvSpec, num_blocks: usize) -> Result<Self> {
        assert_eq!(spec.block_size, BLOCK, "tokens of a block");
        let dtype = match spec.dtype {
            KvDtype::F32 => DataType::F32,
            KvDtype::F16 => DataType::F16,
            KvDtype::BF16 => DataType::BF16,
            KvDtype::Int8 => panic!("no cache in int8: the capabilities do not offer it"),
        };
        let plane = |width: usize| {
            let bytes = num_blocks * BLOCK * width * dtype.bytes();
            let buffer = Buffer::new(owner, bytes)?;
            let view = View::new(buffer.address(), dtype, &[num_blocks * BLOCK, width]);
            let at = view.base;
            owner.submit("kv_cache", move |device| device.clear(at, bytes))?;
            Ok(Plane { view, _buffer: buffer })
        };
        let layer = |layer: &LayerKv| {
            Ok(match *layer {
                LayerKv::Full { kv_heads, head_dim } => [plane(kv_heads * head_dim)?, plane(kv_heads * head_dim)?],
                LayerKv::Latent { rank, rope, index: None } => [plane(rank)?, plane(rope)?],
                LayerKv::Latent { index: Some(_), .. } => {
                    panic!("no indexed attention: the capabilities do not offer it")
                }
                LayerKv::Windowed { .. } => panic!("no compressed attention: the capabilities do not offer it"),
            })
        };
        Ok(Self { layers: spec.layers.iter().map(layer).collect::<Result<_>>()? })
    }

    /// Both planes of a layer, each `[slots, width]`.
    pub(crate) fn planes(&self, layer: usize) -> [View; 2] {
        let [a, b] = &self.layers[layer];
        [a.view.clone(), b.view.clone()]
    }

    /// Zeroes blocks in every layer.
    pub(crate) fn clear(&self, owner: &Owner, blocks: &[u32]) -> Result<()> {
        let planes: Vec<View> = self.layers.iter().flatten().map(|plane| plane.view.clone()).collect();
        let blocks = blocks.to_vec();
        owner.submit("clear_blocks", move |device| {
            for plane in &planes {
                for &block in &blocks {
                    let part = plane.narrow(0, block as usize * BLOCK, BLOCK);
                    device.clear(part.start(), part.numel() * part.dtype.bytes())?;
                }
            }
            Ok(())
        })
    }
}
