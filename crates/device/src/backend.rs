//! The traits a device implements.
//!
//! - Outputs are supplied by the caller and sized once at load: captured graphs and two-phase calls
//!   need fixed addresses. An operation sets the number of rows of its output; exceeding the capacity
//!   or passing the wrong width is a bug of the model and panics.
//! - Activations are what [`Caps::activations`] says, f32 unless a device computes in less; sums are in f32 (or exact
//!   integers) with one rounding at the end. The host sees f32.
//! - A device may take calls without waiting for their work: a failure shows at the latest at the next call that brings
//!   something to the host.
//! - Nothing of a step survives it except the cache.
//! - A backend takes steps on one thread at a time and parallelises inside; meanwhile another thread may
//!   prepare weights and activations.
//! - Backends that compute one model together are ranks: each is given its share of the weights, and its activations are
//!   parts of sums until [`Backend::all_reduce`] adds them up. All ranks call it equally often, in the same order.
//! - Where [`Caps::row_invariant`] is set, a row of any output is bit-identical whatever other rows
//!   are in the batch, however a sequence is cut into steps.

use std::borrow::Cow;

use crate::{
    AttentionBatch, AttentionParams, Caps, DeviceMemory, Draw, HostExperts, HostLatent, HostLinear, HostRope,
    HostTensor, KvBlocks, KvSpec, Result, RopeLayout, StepMemory, World,
};

/// Size of an activation.
pub trait Rows {
    /// Rows in use.
    fn rows(&self) -> usize;
    /// Features per row.
    fn cols(&self) -> usize;
}

/// The function of a gated feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))` (arXiv 1606.08415).
    GeluTanh,
}

/// The token of one row of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenId {
    /// As the host knows it.
    Known(u32),
    /// In this row of what was chosen. Where no token was chosen it is some valid id.
    Chosen(u32),
}

/// The tokens of a step, one per row.
#[derive(Debug)]
pub enum TokenIds<'a, C> {
    /// As the host knows them.
    Known(&'a [u32]),
    /// Among them those that an earlier step chose, which need not have come to the host.
    Chosen {
        /// What chose tokens last.
        tokens: &'a C,
        /// Of each row.
        ids: &'a [TokenId],
    },
}

impl<C> Clone for TokenIds<'_, C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C> Copy for TokenIds<'_, C> {}

impl<'a, C: AsRef<[Option<u32>]>> TokenIds<'a, C> {
    /// The ids, of a device that chooses when it is asked to.
    pub fn on_host(self) -> Cow<'a, [u32]> {
        match self {
            TokenIds::Known(ids) => ids.into(),
            TokenIds::Chosen { tokens, ids } => {
                let id = |id: &TokenId| match *id {
                    TokenId::Known(id) => id,
                    TokenId::Chosen(row) => tokens.as_ref()[row as usize].unwrap_or_default(),
                };
                ids.iter().map(id).collect()
            }
        }
    }
}

/// How queries and keys come from what projections give: each head is normed, where there is a norm, then rotated.
pub struct Rotary<'a, B: Backend + ?Sized> {
    /// Over each head of queries and over each head of keys, or over the latent. As [`Backend::rms_norm`] has them.
    pub norms: [Option<&'a B::Vector>; 2],
    /// Of both norms.
    pub eps: f32,
    /// Of queries and of keys.
    pub layouts: [RopeLayout; 2],
    /// Angles.
    pub table: &'a B::Rope,
}

/// What chooses the positions that latent attention reads (DeepSeek-V3.2's lightning indexer): of those that a row sees the
/// `top_k` with the largest `Σ_h weights_h · max(0, q_h·k_s)`, the earlier of equals; all where there are no more. Positive
/// factors that a model has on products or on weights are left out, for they change no choice.
pub struct Indexer<'a, B: Backend + ?Sized> {
    /// `[rows, heads * width]`, rotated; there are as many heads as `weights` has columns.
    pub q: &'a B::Tensor,
    /// `[rows, width]`, normed and rotated. Kept in the cache.
    pub k: &'a B::Tensor,
    /// `[rows, heads]`.
    pub weights: &'a B::Tensor,
    /// Positions that are read, at least 1.
    pub top_k: usize,
}

/// A device: memory for weights, activations and cache, and the operations every decoder needs.
pub trait Backend: Send + Sync + 'static {
    /// Activation `[rows, cols]`.
    type Tensor: Rows + Send;
    /// A vector of parameters: a norm's weight.
    type Vector: Send + Sync;
    /// Linear weight, in this backend's own layout, any format, bias included.
    type Linear: Send + Sync;
    /// Rotary tables.
    type Rope: Send + Sync;
    /// Block memory of all layers.
    type KvCache: Send;
    /// What attention needs to know of a step; built once, read by every layer.
    type AttentionPlan: Send;
    /// The end of a step, and the tokens that it chose: on their way to the host, and where [`Backend::embed`] finds them.
    type Chosen: Send;

    /// What this device offers.
    fn caps(&self) -> &Caps;
    /// Which rank this is, as it was made.
    fn world(&self) -> World {
        World::ALONE
    }

    /// Memory of the device as it is now, if it has its own: free is what a cache could have of it. `None` where it is the
    /// host's.
    fn memory(&self) -> Result<Option<DeviceMemory>> {
        Ok(None)
    }

    /// Finds out what steps take beside weights, activations and cache, from `steps` that are like the largest to come: keeps
    /// memory for them, so that later ones ask for none. What they compute is nothing's, and need not be computed; they wait
    /// for nothing. A device that takes memory as steps need it asks for no steps, and knows of none.
    fn rehearse(&self, _: impl FnOnce() -> Result<()>) -> Result<StepMemory> {
        Ok(StepMemory::default())
    }

    // Load time.

    /// An activation with room for `capacity` rows; 0 rows in use.
    fn tensor(&self, capacity: usize, cols: usize) -> Result<Self::Tensor>;
    /// A parameter vector, kept in f32.
    fn vector(&self, src: &HostTensor<'_>) -> Result<Self::Vector>;
    /// Prepares a linear weight: packs it, converts it to the format asked for.
    fn linear_weight(&self, src: &HostLinear<'_>) -> Result<Self::Linear>;
    /// Prepares rotary tables.
    fn rope_table(&self, src: &HostRope) -> Result<Self::Rope>;
    /// Block memory, zeroed.
    fn kv_cache(&self, spec: &KvSpec, blocks: KvBlocks) -> Result<Self::KvCache>;

    // Step time.

    /// Digests the batch. Slots of all new tokens must lie within their block tables, and where something passes those of all
    /// tokens in their reach within their passing tables.
    fn plan_attention(&self, batch: &AttentionBatch<'_>) -> Result<Self::AttentionPlan>;
    /// `out[t] = row ids[t] of table`, widened to f32. The table is a linear weight so that a tied
    /// head shares its memory, and was prepared as [`Purpose::Table`](crate::Purpose::Table). Ids are below the table's rows.
    fn embed(&self, ids: TokenIds<'_, Self::Chosen>, table: &Self::Linear, out: &mut Self::Tensor) -> Result<()>;
    /// Root-mean-square norm over each run of `weight.len()` columns (a whole row, or each head):
    /// `out = x / sqrt(mean(x²) + eps) * weight` (arXiv 1910.07467).
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Vector, eps: f32, out: &mut Self::Tensor) -> Result<()>;
    /// `x = rms_norm(x)`, as above.
    fn rms_norm_in_place(&self, x: &mut Self::Tensor, weight: &Self::Vector, eps: f32) -> Result<()>;
    /// `residual += x; out = rms_norm(residual)`.
    fn add_rms_norm(
        &self,
        x: &Self::Tensor,
        residual: &mut Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `x *= factor`.
    fn scale(&self, x: &mut Self::Tensor, factor: f32) -> Result<()>;
    /// `x = cap * tanh(x / cap)`, elementwise.
    fn softcap(&self, x: &mut Self::Tensor, cap: f32) -> Result<()>;
    /// `x += y`.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;
    /// `out = x·Wᵀ + b`: x `[rows, in]`, out `[rows, out]`.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Linear, out: &mut Self::Tensor) -> Result<()>;
    /// [`Backend::linear`] of one input with every weight of a group, the same bits as one by one. A device may prepare
    /// `x` once for all of them and share out their work together.
    fn linear_group(&self, x: &Self::Tensor, group: &mut [(&Self::Linear, &mut Self::Tensor)]) -> Result<()> {
        group.iter_mut().try_for_each(|(weight, out)| self.linear(x, weight, out))
    }
    /// Rotates pairs of columns by the angle of each row's position in the plan (arXiv 2104.09864).
    fn rope(
        &self,
        x: &mut Self::Tensor,
        layout: RopeLayout,
        table: &Self::Rope,
        plan: &Self::AttentionPlan,
    ) -> Result<()>;
    /// `out = activation(gate) ⊙ up`, all of equal shape.
    fn gated_activation(
        &self,
        activation: Activation,
        gate: &Self::Tensor,
        up: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `out = activation(x·gateᵀ) ⊙ (x·upᵀ)`, biases included: [`Backend::linear_group`], then
    /// [`Backend::gated_activation`]. Each weight brings room for its product; a device that needs none leaves it as it was.
    fn gated_linear(
        &self,
        activation: Activation,
        x: &Self::Tensor,
        [(gate, gate_out), (up, up_out)]: [(&Self::Linear, &mut Self::Tensor); 2],
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.linear_group(x, &mut [(gate, &mut *gate_out), (up, &mut *up_out)])?;
        self.gated_activation(activation, gate_out, up_out, out)
    }
    /// Writes this step's keys and values into the cache of `layer`, then for every row attends
    /// causally over the positions of its sequence up to its own, or over the last `window` of them:
    /// `out = softmax(softcap(scale * q·Kᵀ))·V` per head.
    ///
    /// q `[rows, heads * head_dim]`, k and v `[rows, kv_heads * head_dim]`, out as q.
    #[allow(clippy::too_many_arguments)] // three inputs, one output, and where the rest lies
    fn paged_attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        cache: &mut Self::KvCache,
        layer: usize,
        plan: &Self::AttentionPlan,
        params: &AttentionParams,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// [`Backend::paged_attention`] of queries and keys that are first normed and rotated as `rotary` says. What q and k hold
    /// afterwards is the device's business.
    #[allow(clippy::too_many_arguments)] // as above
    fn rotary_attention(
        &self,
        q: &mut Self::Tensor,
        k: &mut Self::Tensor,
        v: &Self::Tensor,
        rotary: &Rotary<'_, Self>,
        cache: &mut Self::KvCache,
        layer: usize,
        plan: &Self::AttentionPlan,
        params: &AttentionParams,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        for (x, (norm, layout)) in [&mut *q, &mut *k].into_iter().zip(rotary.norms.into_iter().zip(rotary.layouts)) {
            if let Some(norm) = norm {
                self.rms_norm_in_place(x, norm, rotary.eps)?;
            }
            self.rope(x, layout, rotary.table, plan)?;
        }
        self.paged_attention(q, k, v, cache, layer, plan, params, out)
    }
    /// Replaces `x` by its sum over all ranks: equal shapes, and the same bits on every rank. Nothing where there is one
    /// rank.
    ///
    /// # Errors
    /// If another rank has left or does not come in time; it need not show before something is brought to the host.
    fn all_reduce(&self, _: &mut Self::Tensor) -> Result<()> {
        assert_eq!(self.world().size, 1, "a backend with ranks sums over them");
        Ok(())
    }
    /// Says, when a step of this rank failed, that it will not come to the sums that are left of the step, so that other
    /// ranks do not wait for it. It may be called on any thread.
    fn leave(&self) {}
    /// Lets ranks sum again after some left. Called on each of them, before any takes the next step.
    ///
    /// # Errors
    /// [`DeviceError::Lost`](crate::DeviceError::Lost) if they cannot any more.
    fn rejoin(&self) -> Result<()> {
        Ok(())
    }
    /// `out[i] = x[rows[i]]`.
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32], out: &mut Self::Tensor) -> Result<()>;
    /// `out[rows[i]] += x[i]`. Rows are distinct.
    fn add_rows(&self, x: &Self::Tensor, rows: &[u32], out: &mut Self::Tensor) -> Result<()>;
    /// Zeroes kept and passing blocks in every layer, so that nothing of a failed sequence remains.
    fn clear_blocks(&self, cache: &mut Self::KvCache, kept: &[u32], passing: &[u32]) -> Result<()>;
    /// Copies from the host: `data.len()` is a multiple of the width.
    fn write(&self, data: &[f32], out: &mut Self::Tensor) -> Result<()>;
    /// Copies the rows in use to the host, replacing what `out` held.
    fn read(&self, x: &Self::Tensor, out: &mut Vec<f32>) -> Result<()>;
    /// Chooses a token from each row of logits in use, by one draw per row. Nobody waits: a device that collects what it is asked
    /// for begins it now, and the next step can be asked for before the tokens are read.
    fn choose(&self, logits: &Self::Tensor, draws: &[Draw]) -> Result<Self::Chosen>;
    /// [`Backend::choose`] of the first rank for all of them: it brings the logits, the others the same draws, and how many columns
    /// logits have. Where [`Caps::runs_ahead`] is set the tokens are on every rank then, as ranks are at the same place of the
    /// same step; elsewhere others have none.
    fn choose_for_all(&self, logits: Option<&Self::Tensor>, _cols: usize, draws: &[Draw]) -> Result<Self::Chosen> {
        assert!(self.world().size == 1 || !self.caps().runs_ahead, "a device that runs ahead shares its tokens");
        logits.map_or_else(|| self.submit(), |logits| self.choose(logits, draws))
    }
    /// Says that a step asks for nothing more and chooses no tokens: a device that collects what it is asked for begins it now.
    fn submit(&self) -> Result<Self::Chosen>;
    /// Waits for the end of a step and its tokens, replacing what `out` held; `None` for a row that is not finite throughout.
    fn read_chosen(&self, chosen: &Self::Chosen, out: &mut Vec<Option<u32>>) -> Result<()>;
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), absorbed: the cache
/// holds one latent and one rotated key per token, shared by all heads.
pub trait LatentOps: Backend {
    /// `kv_b_proj`, split and laid out for absorption.
    type Latent: Send + Sync;

    /// Prepares the up-projection.
    fn latent_weight(&self, src: &HostLatent<'_>) -> Result<Self::Latent>;
    /// Writes this step's latents and rotated keys into the cache of `layer`, then attends. Per head
    /// with `q = [q_nope | q_rope]`, key rows `U` and value rows `V` of the weight:
    /// `s_j = scale * ((Uᵀ q_nope)·c_j + q_rope·r_j)`, `out = V (Σ_j softmax(s)_j c_j)`.
    ///
    /// q `[rows, heads * (nope + rope)]`, latent `[rows, rank]`, rope_key `[rows, rope]`,
    /// out `[rows, heads * v]`.
    #[allow(clippy::too_many_arguments)] // three inputs, one output, and where the rest lies
    fn latent_attention(
        &self,
        q: &Self::Tensor,
        latent: &Self::Tensor,
        rope_key: &Self::Tensor,
        weight: &Self::Latent,
        cache: &mut Self::KvCache,
        layer: usize,
        plan: &Self::AttentionPlan,
        scale: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// [`LatentOps::latent_attention`] of latents that are first normed, and of queries and keys that are first rotated, as
    /// `rotary` says. What inputs hold afterwards is the device's business.
    #[allow(clippy::too_many_arguments)] // as above
    fn rotary_latent_attention(
        &self,
        q: &mut Self::Tensor,
        latent: &mut Self::Tensor,
        rope_key: &mut Self::Tensor,
        rotary: &Rotary<'_, Self>,
        weight: &Self::Latent,
        cache: &mut Self::KvCache,
        layer: usize,
        plan: &Self::AttentionPlan,
        scale: f32,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.norm_and_rotate(q, latent, rope_key, rotary, plan)?;
        self.latent_attention(q, latent, rope_key, weight, cache, layer, plan, scale, out)
    }
    /// What comes before latent attention: queries and latents are normed, where there is a norm, then queries and keys rotated.
    fn norm_and_rotate(
        &self,
        q: &mut Self::Tensor,
        latent: &mut Self::Tensor,
        rope_key: &mut Self::Tensor,
        rotary: &Rotary<'_, Self>,
        plan: &Self::AttentionPlan,
    ) -> Result<()> {
        for (x, norm) in [&mut *q, latent].into_iter().zip(rotary.norms) {
            if let Some(norm) = norm {
                self.rms_norm_in_place(x, norm, rotary.eps)?;
            }
        }
        for (x, layout) in [q, rope_key].into_iter().zip(rotary.layouts) {
            self.rope(x, layout, rotary.table, plan)?;
        }
        Ok(())
    }

    // Of devices that offer [`Op::IndexedAttention`](crate::Op::IndexedAttention); nobody asks others.

    /// `x = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`, over each row (arXiv 1607.06450).
    fn layer_norm_in_place(&self, _: &mut Self::Tensor, _: [&Self::Vector; 2], _: f32) -> Result<()> {
        unreachable!("{} has no indexed attention", self.caps().device)
    }
    /// [`LatentOps::latent_attention`] to the positions that an indexer chooses, whose keys are written into the cache with the
    /// latents. Every position is either read as there or not at all.
    #[allow(clippy::too_many_arguments)] // as above
    fn indexed_attention(
        &self,
        _q: &Self::Tensor,
        _latent: &Self::Tensor,
        _rope_key: &Self::Tensor,
        _indexer: &Indexer<'_, Self>,
        _weight: &Self::Latent,
        _cache: &mut Self::KvCache,
        _layer: usize,
        _plan: &Self::AttentionPlan,
        _scale: f32,
        _out: &mut Self::Tensor,
    ) -> Result<()> {
        unreachable!("{} has no indexed attention", self.caps().device)
    }
}

/// Mixture of experts.
pub trait MoeOps: Backend {
    /// The experts of one layer that are held here, and the rule that routes among all of them.
    type Experts: Send + Sync;

    /// Prepares a layer's experts.
    fn expert_weights(&self, src: HostExperts<'_>) -> Result<Self::Experts>;
    /// `out = Σ_e w_e · expert_e(x)` over the experts that [`crate::select_experts`] chooses from the
    /// row's router logits, summed by ascending expert. Those that are not held are left out.
    ///
    /// x and out `[rows, hidden]`, logits `[rows, experts]`.
    fn fused_moe(
        &self,
        x: &Self::Tensor,
        logits: &Self::Tensor,
        experts: &Self::Experts,
        out: &mut Self::Tensor,
    ) -> Result<()>;
}
