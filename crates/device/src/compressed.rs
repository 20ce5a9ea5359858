//! What DeepSeek-V4 asks of a device beyond other models: attention to a window and to pooled entries, several residual streams,
//! experts that the token names.
//!
//! A layer keeps one vector for each token, which is key and value at once. Of every `rate` tokens it pools one entry, complete
//! with the last of them; an entry lies in the block of that token, so a block holds what its tokens close, whatever rate and
//! block size are. Of the tokens behind the last entry it keeps running sums, in the block of the last of them: so what lies
//! behind a full block depends on it alone, and sequences can share it.
//!
//! Entries are kept. Vectors and sums are of use to the next few tokens alone: they lie in [passing](crate::KvBlocks::passing)
//! blocks.

use crate::{Backend, Result};
use crate::{MoeOps, RopeLayout, TokenIds};

/// What a layer pools of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolKv {
    /// Tokens of an entry, at least 1.
    pub rate: usize,
    /// Whether an entry pools the tokens of the one before it as well, by a series of their own.
    pub overlaps: bool,
    /// Width of the entries by which an indexer chooses among them, if there is one. They are pooled alike.
    pub index: Option<usize>,
}

impl PoolKv {
    /// Values that a token has for each feature: one, or one for the next entry as well.
    pub const fn series(self) -> usize {
        if self.overlaps { 2 } else { 1 }
    }

    /// Entries that a block of so many tokens has room for.
    pub const fn slots(self, block_size: usize) -> usize {
        block_size.div_ceil(self.rate)
    }

    /// Index in the block table and slot in the block of an entry.
    pub const fn place(self, entry: usize, block_size: usize) -> (usize, usize) {
        let block = ((entry + 1) * self.rate - 1) / block_size;
        (block, entry - block * block_size / self.rate)
    }

    /// Entries that a token at a position sees: those that are complete with it.
    pub const fn visible(self, position: usize) -> usize {
        (position + 1) / self.rate
    }

    /// Floats of the running sums over entries of such width: for each series and feature the largest gate, the sum of the
    /// exponentials of gates, and that of values times these.
    pub const fn sums(self, width: usize) -> usize {
        3 * self.series() * width
    }
}

/// What tokens add to a pool. Of an entry's tokens, each feature's value is weighted by the softmax over their gates; with
/// [`PoolKv::overlaps`] over those of the tokens of the entry before by their first series, then its own by their second. The
/// entry is then normed, and rotated by the angles of its first token's position.
pub struct Pooling<'a, B: Backend + ?Sized> {
    /// `[rows, series * width]`.
    pub values: &'a B::Tensor,
    /// `[rows, series * width]`.
    pub gates: &'a B::Tensor,
    /// `[rate * series * width]`, added to the gates of a token by its place in its entry.
    pub bias: &'a B::Vector,
    /// `[width]`, as [`Backend::rms_norm`] has it.
    pub norm: &'a B::Vector,
    /// Of the norm.
    pub eps: f32,
    /// Rotated columns of an entry, which is one head.
    pub layout: RopeLayout,
    /// Angles.
    pub table: &'a B::Rope,
}

/// The entries of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entries {
    /// Those that are attended to.
    Attended,
    /// Those by which an indexer chooses among them.
    Index,
}

/// What attention reads beside the window.
pub enum Reads<'a, B: Backend + ?Sized> {
    /// Nothing.
    Window,
    /// All entries that a token sees.
    All,
    /// Of those the `top_k` with the largest `Σ_h weights_h · max(0, q_h·k_s)`, the earlier of equals; all where there are no
    /// more. Positive factors are left out, as in [`crate::Indexer`].
    Chosen {
        /// `[rows, heads * index]`, rotated; there are as many heads as `weights` has columns.
        q: &'a B::Tensor,
        /// `[rows, heads]`.
        weights: &'a B::Tensor,
        /// At least 1.
        top_k: usize,
    },
}

/// How [`CompressedOps::windowed_attention`] attends.
pub struct WindowedParams<'a, B: Backend + ?Sized> {
    /// Positions that a token sees as they are: its own and the `window - 1` before it. At least 1.
    pub window: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `[heads]`: each head's score of nothing, which takes its share of the softmax.
    pub sink: &'a B::Vector,
    /// Entries beside the window.
    pub reads: Reads<'a, B>,
}

/// How streams are joined and mixed (manifold-constrained hyper-connections, arXiv 2512.24880).
pub struct Mixing<'a, B: Backend + ?Sized> {
    /// Streams, n.
    pub streams: usize,
    /// `[(2 + n) * n]`, or `[n]` where streams are only joined.
    pub base: &'a B::Vector,
    /// `[3]`, or `[1]` where streams are only joined.
    pub scale: &'a B::Vector,
    /// Normalisations of the matrix, columns and rows in turn; the first is of columns alone. At least 1.
    pub iterations: usize,
    /// Added to weights and to sums that are divided by.
    pub eps: f32,
}

/// The operations of devices that offer [`Op::CompressedAttention`](crate::Op::CompressedAttention); nobody asks others.
pub trait CompressedOps: MoeOps {
    /// Adds this step's tokens to the pool of a layer, and writes the entries that they complete.
    fn pool(
        &self,
        _: &Pooling<'_, Self>,
        _: Entries,
        _cache: &mut Self::KvCache,
        _layer: usize,
        _plan: &Self::AttentionPlan,
    ) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }

    /// Writes this step's vectors into the cache of `layer`, then attends, per head h with one softmax over window and entries:
    /// `out = Σ_j exp(scale · q_h·c_j) c_j / (exp(sink_h) + Σ_j exp(scale · q_h·c_j))`. Entries are those that
    /// [`CompressedOps::pool`] wrote, for this step too.
    ///
    /// q and out `[rows, heads * width]`, kv `[rows, width]`.
    #[allow(clippy::too_many_arguments)] // two inputs, one output, and where the rest lies
    fn windowed_attention(
        &self,
        _q: &Self::Tensor,
        _kv: &Self::Tensor,
        _: &WindowedParams<'_, Self>,
        _cache: &mut Self::KvCache,
        _layer: usize,
        _plan: &Self::AttentionPlan,
        _out: &mut Self::Tensor,
    ) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }

    /// `out_g = x_g·W_gᵀ` for consecutive groups of columns, one for each weight: x `[rows, groups * in]`, out
    /// `[rows, groups * out]`.
    fn grouped_linear(&self, _x: &Self::Tensor, _: &[Self::Linear], _out: &mut Self::Tensor) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }

    /// `x = min(max(x, low), high)`.
    fn clamp(&self, _x: &mut Self::Tensor, _low: f32, _high: f32) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }

    /// [`MoeOps::fused_moe`] with experts whose routing goes by token: row t's is `ids[t]`.
    fn fused_moe_by_token(
        &self,
        _x: &Self::Tensor,
        _logits: &Self::Tensor,
        _: TokenIds<'_, Self::Chosen>,
        _: &Self::Experts,
        _out: &mut Self::Tensor,
    ) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }

    /// Every stream becomes x: x `[rows, hidden]`, streams `[rows, n * hidden]`.
    fn fill_streams(&self, _x: &Self::Tensor, _streams: &mut Self::Tensor) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }

    /// Makes weights of what a projection of the streams gave, `[rows, (2 + n) * n]`, or `[rows, n]` of which only the first part
    /// comes. In place, with `a_0 … a_2` for its parts of n, n and n·n columns, and the same parts of the base:
    /// `pre = σ(a_0 scale_0 + base_0) + eps`; `post = 2 σ(a_1 scale_1 + base_1)`; `C = softmax(a_2 scale_2 + base_2) + eps` over
    /// each row of `[n, n]`, then divided by (column sums + eps), and `iterations - 1` times by (row sums + eps), then by
    /// (column sums + eps).
    fn stream_weights(&self, _: &Mixing<'_, Self>, _x: &mut Self::Tensor) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }

    /// `out = Σ_i pre_i S_i`: streams `[rows, n * hidden]`, weights `[rows, n or more]`, out `[rows, hidden]`.
    fn join_streams(&self, _streams: &Self::Tensor, _weights: &Self::Tensor, _out: &mut Self::Tensor) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }

    /// `S_j = post_j x + Σ_i C[i, j] S_i`, where the sum is over the streams as they were.
    fn mix_streams(&self, _x: &Self::Tensor, _weights: &Self::Tensor, _streams: &mut Self::Tensor) -> Result<()> {
        unreachable!("{} has no compressed attention", self.caps().device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_a_slot_for_each_entry_that_its_tokens_complete() {
        for (rate, block_size) in [(1, 16), (3, 16), (4, 16), (16, 16), (17, 16), (128, 16), (5, 1), (3, 32), (7, 64)] {
            let pool = PoolKv { rate, overlaps: false, index: None };
            let mut next = std::collections::BTreeMap::<usize, usize>::new();
            for position in 0..40 * rate {
                let (before, now) =
                    (if position == 0 { 0 } else { pool.visible(position - 1) }, pool.visible(position));
                assert_eq!(now - before, usize::from((position + 1) % rate == 0));
                if now > before {
                    let (block, slot) = pool.place(before, block_size);
                    assert_eq!(block, position / block_size, "rate {rate}, blocks of {block_size}");
                    let expected = next.entry(block).or_default();
                    assert_eq!(slot, *expected, "rate {rate}, blocks of {block_size}");
                    *expected += 1;
                }
            }
            assert!(next.values().all(|&entries| entries <= pool.slots(block_size)));
        }
    }
}
