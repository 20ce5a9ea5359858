//! How many launches a decode step takes in a layer of each family, called as models call it: what lies between two of them is time in which
//! no memory is read.

mod common;

use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, DType, HostExperts, HostLatent, HostLinear, HostRope,
    HostTensor, KvBlocks, KvDtype, KvSpec, LatentOps, LayerKv, MoeOps, Purpose, Result, RopeLayout, Rotary, Routing,
    Scoring, SequenceSpan, WeightFormat, conformance::uniform,
};
use baton_device_cuda::CudaBackend;
use common::Simulator;

type Tensor = <CudaBackend as Backend>::Tensor;
type Linear = <CudaBackend as Backend>::Linear;
type Vector = <CudaBackend as Backend>::Vector;
type Cache = <CudaBackend as Backend>::KvCache;
type Plan = <CudaBackend as Backend>::AttentionPlan;
type Experts = <CudaBackend as MoeOps>::Experts;

const HIDDEN: usize = 256;
const INNER: usize = 128;
const HEADS: usize = 8;
const EPS: f32 = 1e-6;
/// Such that the context is split.
const POSITION: usize = 300;
const BLOCKS: usize = 32;

/// `[out, in]` in bf16.
fn bytes(out: usize, inputs: usize, seed: u64) -> Vec<u8> {
    let values = uniform(seed, out * inputs, (inputs as f32).sqrt().recip());
    values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect()
}

/// Makes what layers have.
#[derive(Clone, Copy)]
struct Maker<'a>(&'a CudaBackend);

impl Maker<'_> {
    fn linear(self, out: usize, inputs: usize) -> Result<Linear> {
        let bytes = bytes(out, inputs, 1);
        let weight = HostTensor::new("weight", DType::BF16, vec![out, inputs], &bytes);
        let (format, purpose) = (WeightFormat::BF16, Purpose::Product);
        self.0.linear_weight(&HostLinear { weight, bias: None, format, purpose })
    }

    fn norm(self, width: usize) -> Result<Vector> {
        let ones: Vec<u8> = (0..width).flat_map(|_| 1f32.to_le_bytes()).collect();
        self.0.vector(&HostTensor::new("norm", DType::F32, vec![width], &ones))
    }

    fn rope(self, dim: usize) -> Result<<CudaBackend as Backend>::Rope> {
        let inv_freq = (0..dim / 2).map(|i| 0.5f32.powi(i as i32)).collect();
        self.0.rope_table(&HostRope { inv_freq, scale: 1.0, max_positions: 512 })
    }

    /// One row.
    fn tensor(self, cols: usize) -> Result<Tensor> {
        let mut tensor = self.0.tensor(1, cols)?;
        self.0.write(&uniform(2, cols, 1.0), &mut tensor)?;
        Ok(tensor)
    }

    fn cache(self, kv: LayerKv) -> Result<Cache> {
        self.0.kv_cache(&KvSpec { layers: vec![kv], dtype: KvDtype::BF16, block_size: 16 }, KvBlocks::kept(BLOCKS))
    }

    fn plan(self) -> Result<Plan> {
        let block_table: Vec<u32> = (0..BLOCKS as u32).collect();
        let sequences = [SequenceSpan { start: POSITION, len: 1, block_table: &block_table, passing_table: &[] }];
        self.0.plan_attention(&AttentionBatch { sequences: &sequences })
    }

    fn experts(self) -> Result<Experts> {
        let (count, into, out_of) = (16, bytes(INNER, HIDDEN, 3), bytes(HIDDEN, INNER, 4));
        let tensor = |shape: [usize; 2], bytes| HostTensor::new("expert", DType::BF16, shape.to_vec(), bytes);
        let expert =
            || [tensor([INNER, HIDDEN], &into), tensor([INNER, HIDDEN], &into), tensor([HIDDEN, INNER], &out_of)];
        self.0.expert_weights(HostExperts {
            count,
            held: 0..count,
            source: &mut (0..count).map(|_| expert()).collect::<Vec<_>>(),
            formats: [WeightFormat::BF16; 3],
            limit: None,
            routing: Routing {
                top_k: 4,
                scoring: Scoring::Softmax,
                groups: None,
                norm_topk_prob: true,
                scaling_factor: 1.0,
                by_token: None,
            },
        })
    }
}

/// A gated network.
struct Network {
    gate: Linear,
    up: Linear,
    down: Linear,
    gate_out: Tensor,
    up_out: Tensor,
    product: Tensor,
}

impl Network {
    fn new(make: Maker<'_>) -> Result<Self> {
        let [gate, up, down] = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)].map(|(out, k)| make.linear(out, k));
        let [gate_out, up_out, product] = [INNER; 3].map(|cols| make.tensor(cols));
        Ok(Self { gate: gate?, up: up?, down: down?, gate_out: gate_out?, up_out: up_out?, product: product? })
    }

    fn forward(&mut self, b: &CudaBackend, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let Self { gate, up, down, gate_out, up_out, product } = self;
        b.gated_linear(Activation::Silu, x, [(gate, gate_out), (up, up_out)], product)?;
        b.linear(product, down, out)
    }
}

/// Experts behind a router, and a network that all rows share.
struct Mixture {
    router: Linear,
    logits: Tensor,
    experts: Experts,
    shared: Option<(Network, Tensor)>,
}

impl Mixture {
    fn new(make: Maker<'_>, shared: bool) -> Result<Self> {
        let shared = if shared { Some((Network::new(make)?, make.tensor(HIDDEN)?)) } else { None };
        Ok(Self { router: make.linear(16, HIDDEN)?, logits: make.tensor(16)?, experts: make.experts()?, shared })
    }

    fn forward(&mut self, b: &CudaBackend, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let Self { router, logits, experts, shared } = self;
        b.linear(x, router, logits)?;
        b.fused_moe(x, logits, experts, out)?;
        if let Some((network, shared_out)) = shared {
            network.forward(b, x, shared_out)?;
            b.add(out, shared_out)?;
        }
        Ok(())
    }
}

/// Launches of a layer, the second time: a norm, attention, a norm, and what follows it. Each half takes its input normed, and gives what is
/// added to the residual.
fn launches(
    make: Maker<'_>,
    mut attention: impl FnMut(&Tensor, &mut Tensor) -> Result<()>,
    mut feed_forward: impl FnMut(&Tensor, &mut Tensor) -> Result<()>,
) -> Result<u64> {
    let (b, norm) = (make.0, make.norm(HIDDEN)?);
    let (mut residual, mut h, mut delta) = (make.tensor(HIDDEN)?, make.tensor(HIDDEN)?, make.tensor(HIDDEN)?);
    let mut values = Vec::new();
    let mut layer = || {
        b.add_rms_norm(&delta, &mut residual, &norm, EPS, &mut h)?;
        attention(&h, &mut delta)?;
        b.add_rms_norm(&delta, &mut residual, &norm, EPS, &mut h)?;
        feed_forward(&h, &mut delta)?;
        b.read(&delta, &mut values)?;
        assert!(values.iter().all(|value| value.is_finite()), "{values:?}");
        Ok(b.statistics().launches)
    };
    let first = layer()?;
    Ok(layer()? - first)
}

/// Of a layer with grouped-query attention, norms of queries and keys or not, behind it a network or experts.
fn grouped_query(b: &CudaBackend, normed: bool, experts: bool) -> Result<u64> {
    const KV_HEADS: usize = 2;
    const HEAD_DIM: usize = 64;
    let make = Maker(b);
    let layout = |heads| RopeLayout { heads, head_dim: HEAD_DIM, offset: 0, dim: HEAD_DIM, interleaved: false };
    let (norm, table) = (make.norm(HEAD_DIM)?, make.rope(HEAD_DIM)?);
    let rotary = Rotary {
        norms: [normed.then_some(&norm); 2],
        eps: EPS,
        layouts: [layout(HEADS), layout(KV_HEADS)],
        table: &table,
    };
    let (heads, kv_heads, head_dim) = (HEADS, KV_HEADS, HEAD_DIM);
    let params = AttentionParams { heads, kv_heads, head_dim, scale: 0.125, window: None, softcap: None };
    let widths = [HEADS, KV_HEADS, KV_HEADS].map(|heads| heads * HEAD_DIM);
    let [wq, wk, wv] = widths.map(|width| make.linear(width, HIDDEN));
    let (wq, wk, wv, wo) = (wq?, wk?, wv?, make.linear(HIDDEN, HEADS * HEAD_DIM)?);
    let [q, k, v] = widths.map(|width| make.tensor(width));
    let (mut q, mut k, mut v, mut context) = (q?, k?, v?, make.tensor(HEADS * HEAD_DIM)?);
    let (mut cache, plan) = (make.cache(LayerKv::Full { kv_heads, head_dim })?, make.plan()?);
    let attention = |h: &Tensor, out: &mut Tensor| {
        b.linear_group(h, &mut [(&wq, &mut q), (&wk, &mut k), (&wv, &mut v)])?;
        b.rotary_attention(&mut q, &mut k, &v, &rotary, &mut cache, 0, &plan, &params, &mut context)?;
        b.linear(&context, &wo, out)
    };
    if experts {
        let mut mixture = Mixture::new(make, false)?;
        launches(make, attention, |h, out| mixture.forward(b, h, out))
    } else {
        let mut network = Network::new(make)?;
        launches(make, attention, |h, out| network.forward(b, h, out))
    }
}

/// Of a layer with latent attention, queries through a latent of their own, behind it experts and a shared one.
fn latent(b: &CudaBackend) -> Result<u64> {
    const NOPE: usize = 32;
    const ROPE: usize = 16;
    const V: usize = 32;
    const RANK: usize = 64;
    const QUERY_RANK: usize = 96;
    let make = Maker(b);
    let layout = RopeLayout { heads: HEADS, head_dim: NOPE + ROPE, offset: NOPE, dim: ROPE, interleaved: true };
    let (query_norm, latent_norm, table) = (make.norm(QUERY_RANK)?, make.norm(RANK)?, make.rope(ROPE)?);
    let rotary = Rotary {
        norms: [None, Some(&latent_norm)],
        eps: EPS,
        layouts: [layout, RopeLayout { heads: 1, head_dim: ROPE, offset: 0, ..layout }],
        table: &table,
    };
    let kv_b = bytes(HEADS * (NOPE + V), RANK, 5);
    let kv_b = HostTensor::new("kv_b", DType::BF16, vec![HEADS * (NOPE + V), RANK], &kv_b);
    let format = WeightFormat::BF16;
    let up = b.latent_weight(&HostLatent { kv_b, heads: HEADS, nope: NOPE, rope: ROPE, v: V, rank: RANK, format })?;
    let (query_a, query_b) = (make.linear(QUERY_RANK, HIDDEN)?, make.linear(HEADS * (NOPE + ROPE), QUERY_RANK)?);
    let (to_latent, to_key, wo) =
        (make.linear(RANK, HIDDEN)?, make.linear(ROPE, HIDDEN)?, make.linear(HIDDEN, HEADS * V)?);
    let (mut query_latent, mut q) = (make.tensor(QUERY_RANK)?, make.tensor(HEADS * (NOPE + ROPE))?);
    let (mut latent, mut key, mut context) = (make.tensor(RANK)?, make.tensor(ROPE)?, make.tensor(HEADS * V)?);
    let (mut cache, plan) = (make.cache(LayerKv::Latent { rank: RANK, rope: ROPE, index: None })?, make.plan()?);
    let attention = |h: &Tensor, out: &mut Tensor| {
        b.linear_group(h, &mut [(&query_a, &mut query_latent), (&to_latent, &mut latent), (&to_key, &mut key)])?;
        b.rms_norm_in_place(&mut query_latent, &query_norm, EPS)?;
        b.linear(&query_latent, &query_b, &mut q)?;
        let (q, latent, key) = (&mut q, &mut latent, &mut key);
        b.rotary_latent_attention(q, latent, key, &rotary, &up, &mut cache, 0, &plan, 0.1, &mut context)?;
        b.linear(&context, &wo, out)
    };
    let mut mixture = Mixture::new(make, true)?;
    launches(make, attention, |h, out| mixture.forward(b, h, out))
}

#[test]
fn a_decode_step_takes_as_many_launches_in_a_layer_as_it_must() {
    let Some(simulator) = Simulator::new() else { return };
    let b = simulator.open(DType::BF16);
    // Norm, q k v, heads, attention, output; norm, gate and up, down.
    assert_eq!(grouped_query(&b, false, false).unwrap(), 8, "Llama");
    assert_eq!(grouped_query(&b, true, false).unwrap(), 8, "Qwen3");
    // Behind the norm: router, choice, gate and up, down.
    assert_eq!(grouped_query(&b, true, true).unwrap(), 10, "Qwen3-MoE");
    // Norm, three projections, norm and projection of queries, heads, absorption, attention, its splits joined, values, output; norm, the
    // four of experts, gate and up and down of the shared one, the sum of both.
    assert_eq!(latent(&b).unwrap(), 18, "DeepSeek-V3");
    drop(b);
    simulator.expect_clean();
}
