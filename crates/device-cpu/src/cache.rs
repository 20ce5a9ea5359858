//! Block memory and the plan of a step.
//!
//! A plane holds, block by block and head by head, the rows of 16 positions; a row is padded with
//! zeros to whole vectors. Keys and values have a plane each; a latent layer has one, whose rows are
//! the latent and behind it the rotated key.

use std::ops::Range;

use baton_device::{AttentionBatch, KvSpec, LayerKv, Result};

use crate::memory::Floats;
use crate::simd::LANES;

/// Positions of a block: attention handles one block per round, a lane for each position.
pub(crate) const BLOCK: usize = LANES;

/// Block memory of all layers, in f32.
pub struct KvCache {
    pub(crate) layers: Vec<Layer>,
}

/// What one layer keeps.
pub(crate) enum Layer {
    Full { keys: Plane, values: Plane },
    Latent(Plane),
}

impl KvCache {
    pub(crate) fn new(spec: &KvSpec, num_blocks: usize) -> Result<Self> {
        assert_eq!(spec.block_size, BLOCK, "the block size is the device's choice");
        let layer = |layer: &LayerKv| {
            Ok(match *layer {
                LayerKv::Full { kv_heads, head_dim } => Layer::Full {
                    keys: Plane::new(num_blocks, kv_heads, head_dim.next_multiple_of(LANES))?,
                    values: Plane::new(num_blocks, kv_heads, head_dim.next_multiple_of(LANES))?,
                },
                LayerKv::Latent { rank, rope } => Layer::Latent(Plane::new(num_blocks, 1, latent_width(rank, rope))?),
            })
        };
        Ok(Self { layers: spec.layers.iter().map(layer).collect::<Result<_>>()? })
    }

    pub(crate) fn clear(&mut self, block: usize) {
        for layer in &mut self.layers {
            match layer {
                Layer::Full { keys, values } => {
                    keys.clear(block);
                    values.clear(block);
                }
                Layer::Latent(plane) => plane.clear(block),
            }
        }
    }
}

/// Where the rotated key starts in a row that holds a latent before it.
pub(crate) fn rope_start(rank: usize) -> usize {
    rank.next_multiple_of(LANES)
}

/// Width of a row that holds a latent and a rotated key, each padded.
pub(crate) fn latent_width(rank: usize, rope: usize) -> usize {
    rope_start(rank) + rope.next_multiple_of(LANES)
}

/// `[blocks, heads, 16, width]`.
pub(crate) struct Plane {
    data: Floats,
    heads: usize,
    pub(crate) width: usize,
}

impl Plane {
    fn new(blocks: usize, heads: usize, width: usize) -> Result<Self> {
        let len = blocks.saturating_mul(heads * BLOCK).saturating_mul(width);
        Ok(Self { data: Floats::zeroed(len, "key/value blocks")?, heads, width })
    }

    fn clear(&mut self, block: usize) {
        let len = self.heads * BLOCK * self.width;
        self.data[block * len..][..len].fill(0.0);
    }

    /// The rows of one block of one head.
    #[inline(always)]
    pub(crate) fn block(&self, block: u32, head: usize) -> &[f32] {
        let len = BLOCK * self.width;
        &self.data[(block as usize * self.heads + head) * len..][..len]
    }

    /// Writes the heads of one position side by side from `x`, each starting at column `start`.
    pub(crate) fn put(&mut self, slot: (u32, usize), start: usize, x: &[f32]) {
        let (block, offset) = slot;
        let head_dim = x.len() / self.heads;
        for (head, x) in x.chunks_exact(head_dim).enumerate() {
            let row = ((block as usize * self.heads + head) * BLOCK + offset) * self.width;
            self.data[row + start..][..head_dim].copy_from_slice(x);
        }
    }
}

/// For every row of a step: its position and the blocks of its sequence.
pub struct AttentionPlan {
    rows: Vec<PlanRow>,
    blocks: Vec<u32>,
}

struct PlanRow {
    position: usize,
    blocks: Range<usize>,
}

impl AttentionPlan {
    pub(crate) fn new(batch: &AttentionBatch<'_>) -> Self {
        let mut rows = Vec::with_capacity(batch.num_tokens());
        let mut blocks = Vec::new();
        for s in batch.sequences {
            let used = (s.start + s.len).div_ceil(BLOCK);
            assert!(used <= s.block_table.len(), "{used} blocks needed, {} given", s.block_table.len());
            let range = blocks.len()..blocks.len() + used;
            blocks.extend_from_slice(&s.block_table[..used]);
            rows.extend((s.start..s.start + s.len).map(|position| PlanRow { position, blocks: range.clone() }));
        }
        Self { rows, blocks }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn position(&self, row: usize) -> usize {
        self.rows[row].position
    }

    /// Blocks of positions `0..=position` of a row.
    pub(crate) fn blocks(&self, row: usize) -> &[u32] {
        let row = &self.rows[row];
        &self.blocks[row.blocks.clone()][..row.position / BLOCK + 1]
    }

    /// Block and offset of a row's own position.
    pub(crate) fn slot(&self, row: usize) -> (u32, usize) {
        let position = self.position(row);
        (self.blocks(row)[position / BLOCK], position % BLOCK)
    }

    /// Positions that all rows attend to, together, where each sees at most `window`.
    pub(crate) fn context(&self, window: Option<usize>) -> usize {
        self.rows.iter().map(|r| (r.position + 1).min(window.unwrap_or(usize::MAX))).sum()
    }
}
