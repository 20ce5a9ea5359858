//! The reference, but a rank of it can be told to go wrong at the next of its layers.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, Caps, CompressedOps, DeviceError, Draw, HostExperts,
    HostLatent, HostLinear, HostRope, HostTensor, KvBlocks, KvSpec, LatentOps, MoeOps, Reference, Result, RopeLayout,
    TokenIds, World,
};

/// What a rank shall do instead of an activation.
pub enum Fault {
    Fail,
    Panic,
    /// Until there is something to receive, or never will be.
    Hang(Receiver<()>),
}

/// Where a test leaves a fault.
pub type Planned = Arc<Mutex<Option<Fault>>>;

type Tensor = <Reference as Backend>::Tensor;
type Vector = <Reference as Backend>::Vector;
type Linear = <Reference as Backend>::Linear;
type Rope = <Reference as Backend>::Rope;
type KvCache = <Reference as Backend>::KvCache;
type Plan = <Reference as Backend>::AttentionPlan;

pub struct Faulty {
    inner: Reference,
    planned: Planned,
}

/// Ranks, of which the one numbered `faulty` goes wrong as planned.
pub fn ranks(size: usize, faulty: usize, timeout: Duration) -> (Vec<Faulty>, Planned) {
    let planned = Planned::default();
    let of = |rank| if rank == faulty { planned.clone() } else { Planned::default() };
    let ranks = Reference::ranks(size, timeout).into_iter().enumerate();
    (ranks.map(|(rank, inner)| Faulty { inner, planned: of(rank) }).collect(), planned)
}

impl Backend for Faulty {
    type Tensor = Tensor;
    type Vector = Vector;
    type Linear = Linear;
    type Rope = Rope;
    type KvCache = KvCache;
    type AttentionPlan = Plan;
    type Chosen = <Reference as Backend>::Chosen;

    fn caps(&self) -> &Caps {
        self.inner.caps()
    }
    fn world(&self) -> World {
        self.inner.world()
    }
    fn tensor(&self, capacity: usize, cols: usize) -> Result<Tensor> {
        self.inner.tensor(capacity, cols)
    }
    fn vector(&self, src: &HostTensor<'_>) -> Result<Vector> {
        self.inner.vector(src)
    }
    fn linear_weight(&self, src: &HostLinear<'_>) -> Result<Linear> {
        self.inner.linear_weight(src)
    }
    fn rope_table(&self, src: &HostRope) -> Result<Rope> {
        self.inner.rope_table(src)
    }
    fn kv_cache(&self, spec: &KvSpec, blocks: KvBlocks) -> Result<KvCache> {
        self.inner.kv_cache(spec, blocks)
    }
    fn plan_attention(&self, batch: &AttentionBatch<'_>) -> Result<Plan> {
        self.inner.plan_attention(batch)
    }
    fn embed(&self, ids: TokenIds<'_, Self::Chosen>, table: &Linear, out: &mut Tensor) -> Result<()> {
        self.inner.embed(ids, table, out)
    }
    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32, out: &mut Tensor) -> Result<()> {
        self.inner.rms_norm(x, weight, eps, out)
    }
    fn rms_norm_in_place(&self, x: &mut Tensor, weight: &Vector, eps: f32) -> Result<()> {
        self.inner.rms_norm_in_place(x, weight, eps)
    }
    fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        self.inner.add_rms_norm(x, residual, weight, eps, out)
    }
    fn scale(&self, x: &mut Tensor, factor: f32) -> Result<()> {
        self.inner.scale(x, factor)
    }
    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        self.inner.softcap(x, cap)
    }
    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        self.inner.add(x, y)
    }
    fn linear(&self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        self.inner.linear(x, weight, out)
    }
    fn rope(&self, x: &mut Tensor, layout: RopeLayout, table: &Rope, plan: &Plan) -> Result<()> {
        self.inner.rope(x, layout, table, plan)
    }
    fn gated_activation(&self, activation: Activation, gate: &Tensor, up: &Tensor, out: &mut Tensor) -> Result<()> {
        let planned = self.planned.lock().unwrap().take();
        match planned {
            None => self.inner.gated_activation(activation, gate, up, out),
            Some(Fault::Panic) => panic!("as planned"),
            Some(Fault::Hang(end)) => {
                let _ = end.recv();
                Ok(())
            }
            Some(Fault::Fail) => {
                let (device, reason) = (self.caps().device.clone(), "as planned".into());
                Err(DeviceError::Execution { device, op: "gated_activation", reason })
            }
        }
    }
    fn paged_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: &mut KvCache,
        layer: usize,
        plan: &Plan,
        params: &AttentionParams,
        out: &mut Tensor,
    ) -> Result<()> {
        self.inner.paged_attention(q, k, v, cache, layer, plan, params, out)
    }
    fn all_reduce(&self, x: &mut Tensor) -> Result<()> {
        self.inner.all_reduce(x)
    }
    fn leave(&self) {
        self.inner.leave();
    }
    fn rejoin(&self) -> Result<()> {
        self.inner.rejoin()
    }
    fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        self.inner.gather_rows(x, rows, out)
    }
    fn add_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        self.inner.add_rows(x, rows, out)
    }
    fn clear_blocks(&self, cache: &mut KvCache, kept: &[u32], passing: &[u32]) -> Result<()> {
        self.inner.clear_blocks(cache, kept, passing)
    }
    fn write(&self, data: &[f32], out: &mut Tensor) -> Result<()> {
        self.inner.write(data, out)
    }
    fn read(&self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        self.inner.read(x, out)
    }
    fn choose(&self, logits: &Tensor, draws: &[Draw]) -> Result<Self::Chosen> {
        self.inner.choose(logits, draws)
    }
    fn submit(&self) -> Result<Self::Chosen> {
        self.inner.submit()
    }
    fn read_chosen(&self, chosen: &Self::Chosen, out: &mut Vec<Option<u32>>) -> Result<()> {
        self.inner.read_chosen(chosen, out)
    }
}

impl LatentOps for Faulty {
    type Latent = <Reference as LatentOps>::Latent;

    fn latent_weight(&self, src: &HostLatent<'_>) -> Result<Self::Latent> {
        self.inner.latent_weight(src)
    }
    fn latent_attention(
        &self,
        q: &Tensor,
        latent: &Tensor,
        rope_key: &Tensor,
        weight: &Self::Latent,
        cache: &mut KvCache,
        layer: usize,
        plan: &Plan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        self.inner.latent_attention(q, latent, rope_key, weight, cache, layer, plan, scale, out)
    }
}

impl MoeOps for Faulty {
    type Experts = <Reference as MoeOps>::Experts;

    fn expert_weights(&self, src: HostExperts<'_>) -> Result<Self::Experts> {
        self.inner.expert_weights(src)
    }
    fn fused_moe(&self, x: &Tensor, logits: &Tensor, experts: &Self::Experts, out: &mut Tensor) -> Result<()> {
        self.inner.fused_moe(x, logits, experts, out)
    }
}

/// Of models that its tests do not load.
impl CompressedOps for Faulty {}
