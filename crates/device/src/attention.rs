//! Shapes of attention: what a cache holds per layer, and which tokens a step computes.
//!
//! The engine owns block numbers; the device owns block memory. Position p of a sequence lies in
//! block `block_table[p / block_size]` at offset `p % block_size`, in every layer.

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
    },
}

impl LayerKv {
    /// Elements kept per token.
    pub const fn elements_per_token(self) -> usize {
        match self {
            LayerKv::Full { kv_heads, head_dim } => 2 * kv_heads * head_dim,
            LayerKv::Latent { rank, rope } => rank + rope,
        }
    }
}

/// The cache of a whole model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvSpec {
    /// One entry per layer.
    pub layers: Vec<LayerKv>,
    /// Tokens per block; the device's choice ([`crate::Caps::kv_block_size`]).
    pub block_size: usize,
}

impl KvSpec {
    /// Bytes of one block over all layers, kept in f32.
    pub fn block_bytes(&self) -> usize {
        self.layers.iter().map(|l| l.elements_per_token()).sum::<usize>() * self.block_size * 4
    }
}

/// New tokens of one sequence: positions `start..start + len`, all earlier ones being in the cache.
#[derive(Debug, Clone, Copy)]
pub struct SequenceSpan<'a> {
    /// Tokens already in the cache.
    pub start: usize,
    /// Tokens of this step.
    pub len: usize,
    /// Blocks of positions `0..start + len`, and possibly more.
    pub block_table: &'a [u32],
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
