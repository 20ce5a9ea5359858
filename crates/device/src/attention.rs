//! Shapes of attention: what a cache holds per layer, and which tokens a step computes.
//!
//! The engine owns block numbers; the device owns block memory. Position p of a sequence lies in
//! block `block_table[p / block_size]` at offset `p % block_size`, in every layer.
//!
//! Of some layers a part is read for a while only: vectors as long as they are in a window, running sums by the next token.
//! Such parts pass: they lie in blocks of their own, `passing_table[p / block_size]`, which are given back behind the reach of
//! the tokens to come. The other blocks are kept as long as their sequence.

use std::fmt;

use half::{bf16, f16};

use crate::{PoolKv, int8};

/// How a cache keeps the elements of keys, values and latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KvDtype {
    /// As they are computed.
    F32,
    /// IEEE 754 binary16, to nearest even. Numbers beyond its range become its largest, ±65504: one outlier shall not
    /// make a whole sequence infinite. What is not finite stays so.
    F16,
    /// The upper half of an f32, to nearest even.
    BF16,
    /// Signed bytes with one f32 scale for each head of each position, as [`int8`] makes them; a latent and its rotated key
    /// have a scale each.
    Int8,
}

impl KvDtype {
    /// All of them, the widest first.
    pub const ALL: [KvDtype; 4] = [KvDtype::F32, KvDtype::F16, KvDtype::BF16, KvDtype::Int8];

    /// Bytes of one head's `width` elements at one position, its scale included.
    pub const fn bytes(self, width: usize) -> usize {
        match self {
            KvDtype::F32 => width * 4,
            KvDtype::F16 | KvDtype::BF16 => width * 2,
            KvDtype::Int8 => width + 4,
        }
    }

    /// Replaces one head's elements at one position by what a cache keeps of them.
    pub fn round(self, x: &mut [f32]) {
        match self {
            KvDtype::F32 => {}
            KvDtype::F16 => x.iter_mut().for_each(|x| *x = f16::from_f32(saturate_f16(*x)).to_f32()),
            KvDtype::BF16 => x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            KvDtype::Int8 => {
                let (scale, mut bytes) = (int8::scale(x), vec![0; x.len()]);
                int8::round(x, scale, &mut bytes);
                x.iter_mut().zip(bytes).for_each(|(x, q)| *x = f32::from(q) * scale);
            }
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::BF16 => "bf16",
            KvDtype::Int8 => "int8",
        })
    }
}

/// Numbers beyond the range of f16 become its largest; what is not finite stays so.
pub fn saturate_f16(x: f32) -> f32 {
    let largest = f16::MAX.to_f32();
    if x.is_finite() { x.clamp(-largest, largest) } else { x }
}

/// What one layer keeps for each cached token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKv {
    /// Keys and values: `kv_heads * head_dim` each.
    Full {
        /// Key/value heads.
        kv_heads: usize,
        /// Width of a head.
        head_dim: usize,
    },
    /// Multi-head latent attention: the normalised latent and the rotated shared key.
    Latent {
        /// Latent width.
        rank: usize,
        /// Rotary key width.
        rope: usize,
        /// Width of the key of the indexer that chooses among the positions (DeepSeek-V3.2), if there is one.
        index: Option<usize>,
    },
    /// One vector that is key and value at once, of which a token reads a window, and what is pooled of them (DeepSeek-V4).
    Windowed {
        /// Width of the vector, and of a pooled entry.
        width: usize,
        /// Positions that a token sees as they are: its own and the `window - 1` before it. At least 1.
        window: usize,
        /// What is pooled, if anything is. Running sums are kept in f32, whatever the cache is kept in.
        pool: Option<PoolKv>,
    },
}

impl LayerKv {
    /// Bytes of a kept block of so many tokens.
    pub fn kept_bytes(self, dtype: KvDtype, block_size: usize) -> usize {
        match self {
            LayerKv::Full { kv_heads, head_dim } => block_size * 2 * kv_heads * dtype.bytes(head_dim),
            LayerKv::Latent { rank, rope, index } => {
                block_size * [rank, rope].into_iter().chain(index).map(|width| dtype.bytes(width)).sum::<usize>()
            }
            LayerKv::Windowed { width, pool, .. } => pool.map_or(0, |pool| {
                let of = |width| pool.slots(block_size) * dtype.bytes(width);
                of(width) + pool.index.map_or(0, of)
            }),
        }
    }

    /// Bytes of a passing block of so many tokens.
    pub fn passing_bytes(self, dtype: KvDtype, block_size: usize) -> usize {
        let LayerKv::Windowed { width, pool, .. } = self else { return 0 };
        let sums = pool.map_or(0, |pool| pool.sums(width) + pool.index.map_or(0, |width| pool.sums(width)));
        block_size * dtype.bytes(width) + 4 * sums
    }

    /// How many positions before its own a token reads what passes of; `None` if nothing does.
    pub fn reach(self) -> Option<usize> {
        let LayerKv::Windowed { window, pool, .. } = self else { return None };
        // The sums are those of the token before.
        Some((window - 1).max(usize::from(pool.is_some())))
    }
}

/// The cache of a whole model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvSpec {
    /// One entry per layer.
    pub layers: Vec<LayerKv>,
    /// How elements are kept; one of [`crate::Caps::kv_dtypes`].
    pub dtype: KvDtype,
    /// Tokens per block; the device's choice ([`crate::Caps::kv_block_size`]).
    pub block_size: usize,
}

impl KvSpec {
    /// Bytes of a kept block over all layers.
    pub fn kept_bytes(&self) -> usize {
        self.layers.iter().map(|l| l.kept_bytes(self.dtype, self.block_size)).sum()
    }

    /// Bytes of a passing block over all layers.
    pub fn passing_bytes(&self) -> usize {
        self.layers.iter().map(|l| l.passing_bytes(self.dtype, self.block_size)).sum()
    }

    /// How many positions before its own a token reads what passes of, in any layer; `None` if nothing does.
    pub fn reach(&self) -> Option<usize> {
        self.layers.iter().filter_map(|layer| layer.reach()).max()
    }
}

/// How many blocks a cache has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvBlocks {
    /// For what a sequence has as long as it is there.
    pub kept: usize,
    /// For what passes; 0 where nothing does.
    pub passing: usize,
}

impl KvBlocks {
    /// Of a model of which nothing passes.
    pub const fn kept(kept: usize) -> Self {
        Self { kept, passing: 0 }
    }
}

/// Stands in a passing table for a block that was given back.
pub const PASSED: u32 = u32::MAX;

/// New tokens of one sequence: positions `start..start + len`, all earlier ones being in the cache.
#[derive(Debug, Clone, Copy)]
pub struct SequenceSpan<'a> {
    /// Tokens already in the cache.
    pub start: usize,
    /// Tokens of this step.
    pub len: usize,
    /// Blocks of positions `0..start + len`, and possibly more.
    pub block_table: &'a [u32],
    /// Passing blocks of the same positions, [`PASSED`] where all of them are further than [`KvSpec::reach`] before `start`;
    /// not read where nothing passes.
    pub passing_table: &'a [u32],
}

/// The ragged batch of one step. Rows of every activation follow it: all new tokens of the first
/// sequence, then of the second, and so on.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// One entry per sequence, none empty.
    pub sequences: &'a [SequenceSpan<'a>],
}

impl AttentionBatch<'_> {
    /// Rows of the step.
    pub fn num_tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.len).sum()
    }
}

/// Grouped-query attention over full keys and values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionParams {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads; query head h reads key/value head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores before softmax.
    pub scale: f32,
    /// Positions that a token sees: its own and the `window - 1` before it; `None` for all. At least 1.
    pub window: Option<usize>,
    /// Bounds the scores smoothly: `score = cap * tanh(score / cap)`, after scaling (Gemma 2, arXiv
    /// 2408.00118, section 2).
    pub softcap: Option<f32>,
}

impl AttentionParams {
    /// The first position that a token at `position` sees.
    pub fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Which columns of a `[tokens, heads * head_dim]` activation are rotated, and how they pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RopeLayout {
    /// Heads in a row.
    pub heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// First rotated column within a head.
    pub offset: usize,
    /// Rotated columns: twice the number of frequencies.
    pub dim: usize,
    /// Pairs are columns (2i, 2i+1) if set, (i, i + dim/2) if not.
    pub interleaved: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_takes_the_bytes_of_its_dtype_and_scales() {
        let layers = vec![
            LayerKv::Full { kv_heads: 2, head_dim: 64 },
            LayerKv::Latent { rank: 512, rope: 64, index: None },
            LayerKv::Latent { rank: 256, rope: 32, index: Some(128) },
        ];
        let spec = |dtype| KvSpec { layers: layers.clone(), dtype, block_size: 16 };
        let bytes = |dtype| spec(dtype).kept_bytes();
        assert_eq!((spec(KvDtype::F32).passing_bytes(), spec(KvDtype::F32).reach()), (0, None));
        let elements = 16 * (2 * 2 * 64 + 512 + 64 + 256 + 32 + 128);
        assert_eq!([KvDtype::F32, KvDtype::F16, KvDtype::BF16].map(bytes), [4 * elements, 2 * elements, 2 * elements]);
        assert_eq!(bytes(KvDtype::Int8), elements + 16 * 4 * (2 * 2 + 2 + 3));

        let windowed = |window, pool| {
            let layers = vec![LayerKv::Windowed { width: 48, window, pool }];
            let spec = KvSpec { layers, dtype: KvDtype::BF16, block_size: 16 };
            (spec.kept_bytes(), spec.passing_bytes(), spec.reach())
        };
        let pool = |rate, overlaps, index| Some(PoolKv { rate, overlaps, index });
        let sparse = (2 * 4 * (48 + 32), 2 * 16 * 48 + 4 * 6 * (48 + 32), Some(127));
        assert_eq!(windowed(128, pool(4, true, Some(32))), sparse);
        assert_eq!(windowed(1, pool(128, false, None)), (2 * 48, 2 * 16 * 48 + 4 * 3 * 48, Some(1)));
        assert_eq!(windowed(1, None), (0, 2 * 16 * 48, Some(0)));
    }

    #[test]
    fn rounding_keeps_what_the_dtype_can_hold_and_shows_what_is_not_finite() {
        for dtype in KvDtype::ALL {
            let mut x = [0.5, -1.0, 0.25, 0.0];
            let exact = x;
            dtype.round(&mut x);
            let step = if dtype == KvDtype::Int8 { 0.5001 / 127.0 } else { 0.0 };
            assert!(x.iter().zip(exact).all(|(a, b)| (a - b).abs() <= step), "{dtype}: {x:?}");
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = [1.0, bad];
                dtype.round(&mut x);
                assert!(!x[1].is_finite(), "{dtype}: {x:?}");
            }
        }
        let mut large = [70_000.0, -1e30, 65_504.0];
        KvDtype::F16.round(&mut large);
        assert_eq!(large, [65_504.0, -65_504.0, 65_504.0]);
    }
}
