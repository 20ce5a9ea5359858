//! Layers of bf16 as tests count and compare them, small.

use baton_device::conformance::uniform;
use baton_device::{
    Activation, AttentionParams, Backend, DType, HostLinear, HostRope, HostTensor, LayerKv, Purpose, RopeLayout,
    WeightFormat,
};
use baton_device_ascend::AscendBackend;

pub type Tensor = <AscendBackend as Backend>::Tensor;
pub type Linear = <AscendBackend as Backend>::Linear;
pub type Vector = <AscendBackend as Backend>::Vector;
pub type KvCache = <AscendBackend as Backend>::KvCache;
pub type Plan = <AscendBackend as Backend>::AttentionPlan;

pub const HIDDEN: usize = 64;
pub const EPS: f32 = 1e-6;

/// Makes what a layer is of.
#[derive(Clone, Copy)]
pub struct Maker<'a> {
    pub backend: &'a AscendBackend,
    /// The most rows of a step.
    pub rows: usize,
}

impl Maker<'_> {
    pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
        uniform(seed, len, 0.1).iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
    }

    pub fn linear(&self, out: usize, into: usize) -> Linear {
        self.seeded(1, out, into)
    }

    pub fn seeded(&self, seed: u64, out: usize, into: usize) -> Linear {
        self.purposed(seed, out, into, Purpose::Product)
    }

    pub fn purposed(&self, seed: u64, out: usize, into: usize, purpose: Purpose) -> Linear {
        let bytes = Self::bytes(seed, out * into);
        let weight = HostTensor::new("weight", DType::BF16, vec![out, into], &bytes);
        self.backend.linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::BF16, purpose }).unwrap()
    }

    pub fn norm(&self, width: usize) -> Vector {
        let bytes = 1f32.to_le_bytes().repeat(width);
        self.backend.vector(&HostTensor::new("norm", DType::F32, vec![width], &bytes)).unwrap()
    }

    pub fn tensor(&self, cols: usize) -> Tensor {
        let mut tensor = self.backend.tensor(self.rows, cols).unwrap();
        self.backend.write(&uniform(3, self.rows * cols, 1.0), &mut tensor).unwrap();
        tensor
    }
}

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const INNER: usize = 96;

/// What a Llama-like layer caches.
pub const LLAMA_KV: LayerKv = LayerKv::Full { kv_heads: KV_HEADS, head_dim: HEAD_DIM };

/// A Llama-like layer.
pub struct Llama {
    qkv: [Linear; 3],
    o: Linear,
    gate_up: [Linear; 2],
    down: Linear,
    norm: Vector,
    rope: <AscendBackend as Backend>::Rope,
}

/// What Llama-like layers compute in.
pub struct Scratch {
    /// What the layer adds to the rows, and the rows.
    pub delta: Tensor,
    pub residual: Tensor,
    h: Tensor,
    q: Tensor,
    context: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    up: Tensor,
    product: Tensor,
}

impl Scratch {
    pub fn new(make: Maker<'_>) -> Self {
        let [hidden, query, key, inner] =
            [HIDDEN, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, INNER].map(|cols| move || make.tensor(cols));
        Self {
            delta: hidden(),
            residual: hidden(),
            h: hidden(),
            q: query(),
            context: query(),
            k: key(),
            v: key(),
            gate: inner(),
            up: inner(),
            product: inner(),
        }
    }
}

impl Llama {
    pub fn new(make: Maker<'_>, seed: u64) -> Self {
        let (query, key) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let linear = |n: u64, out, into| make.seeded(seed * 10 + n, out, into);
        let inv_freq = (0..HEAD_DIM / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
        Self {
            qkv: [linear(0, query, HIDDEN), linear(1, key, HIDDEN), linear(2, key, HIDDEN)],
            o: linear(3, HIDDEN, query),
            gate_up: [linear(4, INNER, HIDDEN), linear(5, INNER, HIDDEN)],
            down: linear(6, HIDDEN, INNER),
            norm: make.norm(HIDDEN),
            rope: make.backend.rope_table(&HostRope { inv_freq, scale: 1.0, max_positions: 512 }).unwrap(),
        }
    }

    pub fn run(
        &self,
        backend: &AscendBackend,
        x: &mut Scratch,
        cache: &mut KvCache,
        layer: usize,
        plan: &Plan,
    ) -> baton_device::Result<()> {
        let params = AttentionParams {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            scale: 0.2,
            window: None,
            softcap: None,
        };
        let layout = |heads| RopeLayout { heads, head_dim: HEAD_DIM, offset: 0, dim: HEAD_DIM, interleaved: false };
        let [w_q, w_k, w_v] = &self.qkv;
        let [w_gate, w_up] = &self.gate_up;
        backend.add_rms_norm(&x.delta, &mut x.residual, &self.norm, EPS, &mut x.h)?;
        backend.linear_group(&x.h, &mut [(w_q, &mut x.q), (w_k, &mut x.k), (w_v, &mut x.v)])?;
        backend.rope(&mut x.q, layout(HEADS), &self.rope, plan)?;
        backend.rope(&mut x.k, layout(KV_HEADS), &self.rope, plan)?;
        backend.paged_attention(&x.q, &x.k, &x.v, cache, layer, plan, &params, &mut x.context)?;
        backend.linear(&x.context, &self.o, &mut x.delta)?;
        backend.add_rms_norm(&x.delta, &mut x.residual, &self.norm, EPS, &mut x.h)?;
        backend.linear_group(&x.h, &mut [(w_gate, &mut x.gate), (w_up, &mut x.up)])?;
        backend.gated_activation(Activation::Silu, &x.gate, &x.up, &mut x.product)?;
        backend.linear(&x.product, &self.down, &mut x.delta)
    }
}
