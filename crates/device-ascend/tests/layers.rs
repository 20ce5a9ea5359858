//! What a decoder layer costs in launches in steady decode with fused forms, beside the fewest that CANN's operators would
//! allow a layer of this shape whose weights and outputs lie as they like.

mod common;

use baton_device::conformance::uniform;
use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, DType, GroupScore, Groups, HostExperts, HostLatent,
    HostLinear, HostRope, HostTensor, KvDtype, KvSpec, LatentOps, LayerKv, MoeOps, Purpose, RopeLayout, Routing,
    Scoring, SequenceSpan, WeightFormat,
};
use baton_device_ascend::AscendBackend;
use common::{A2, Simulator};

type Tensor = <AscendBackend as Backend>::Tensor;
type Linear = <AscendBackend as Backend>::Linear;
type Vector = <AscendBackend as Backend>::Vector;

const HIDDEN: usize = 64;
const ROWS: usize = 4;
const EPS: f32 = 1e-6;

/// Makes what a layer is of.
struct Maker<'a> {
    backend: &'a AscendBackend,
}

impl Maker<'_> {
    fn bytes(len: usize) -> Vec<u8> {
        uniform(1, len, 0.1).iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
    }

    fn linear(&self, out: usize, into: usize) -> Linear {
        let bytes = Self::bytes(out * into);
        let weight = HostTensor::new("weight", DType::BF16, vec![out, into], &bytes);
        self.backend
            .linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::BF16, purpose: Purpose::Product })
            .unwrap()
    }

    /// A router: its logits are not rounded.
    fn router(&self, experts: usize) -> Linear {
        let bytes: Vec<u8> = uniform(2, experts * HIDDEN, 0.1).iter().flat_map(|x| x.to_le_bytes()).collect();
        let weight = HostTensor::new("router", DType::F32, vec![experts, HIDDEN], &bytes);
        self.backend
            .linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::F32, purpose: Purpose::Product })
            .unwrap()
    }

    fn norm(&self, width: usize) -> Vector {
        let bytes = 1f32.to_le_bytes().repeat(width);
        self.backend.vector(&HostTensor::new("norm", DType::F32, vec![width], &bytes)).unwrap()
    }

    fn tensor(&self, cols: usize) -> Tensor {
        let mut tensor = self.backend.tensor(ROWS, cols).unwrap();
        self.backend.write(&uniform(3, ROWS * cols, 1.0), &mut tensor).unwrap();
        tensor
    }
}

/// Launches of `layer` in steady decode, copies within the device among them: those of a step with two layers less those of
/// one with one, so that what a step costs whatever its layers does not count.
fn steady(
    simulator: &Simulator,
    backend: &AscendBackend,
    kv: LayerKv,
    mut layer: impl FnMut(&mut <AscendBackend as Backend>::KvCache, &<AscendBackend as Backend>::AttentionPlan),
) -> u64 {
    let spec = KvSpec { layers: vec![kv], dtype: KvDtype::BF16, block_size: backend.caps().kv_block_size };
    let mut cache = backend.kv_cache(&spec, 4 * ROWS).unwrap();
    let tables: Vec<[u32; 2]> = (0..ROWS as u32).map(|s| [2 * s + 1, 2 * s]).collect();
    let mut probe = backend.tensor(1, 1).unwrap();
    let mut step = |position: usize, layers: usize| {
        let span = |table| SequenceSpan { start: position, len: 1, block_table: table };
        let sequences: Vec<_> = tables.iter().map(|table| span(table.as_slice())).collect();
        simulator.reset();
        let plan = backend.plan_attention(&AttentionBatch { sequences: &sequences }).unwrap();
        (0..layers).for_each(|_| layer(&mut cache, &plan));
        // Whoever reads waits for all that was queued.
        backend.write(&[0.0], &mut probe).unwrap();
        backend.read(&probe, &mut Vec::new()).unwrap();
        simulator.expect_no_violation();
        let report = simulator.report();
        let launches: u64 = report["launches"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
        let copies = report["copies"]["device_to_device"]["count"].as_u64().unwrap_or(0);
        (launches + copies, report)
    };
    step(126, 1);
    let (one, _) = step(127, 1);
    let (two, report) = step(128, 2);
    assert_eq!(report["mallocs"], 0, "memory is reused");
    // The numbers of the plan, and what the test itself writes.
    assert_eq!(report["copies"]["host_to_device"]["count"], 2, "{}", report["copies"]);
    two - one
}

#[test]
fn a_llama_like_layer_takes_17_launches_of_at_least_10() {
    // At least: AddRmsNorm, q with k and v, rotation of both, ScatterPaKvCache, attention, o, AddRmsNorm, gate with up, SwiGlu,
    // down. More here: q, k and v and gate and up are weights of their own (3), their outputs too (Silu and Mul, 1), q and k
    // are rotated one by one and copied back (3).
    let simulator = Simulator::new();
    let backend = &simulator.open_fused(A2, DType::BF16);
    let make = Maker { backend };
    let (heads, kv_heads, head_dim, inner) = (4, 2, 32, 96);
    let params = AttentionParams { heads, kv_heads, head_dim, scale: 0.2, window: None, softcap: None };
    let (query, key) = (heads * head_dim, kv_heads * head_dim);
    let [w_q, w_k, w_v] = [query, key, key].map(|out| make.linear(out, HIDDEN));
    let (w_o, w_gate, w_up) = (make.linear(HIDDEN, query), make.linear(inner, HIDDEN), make.linear(inner, HIDDEN));
    let (w_down, norm) = (make.linear(HIDDEN, inner), make.norm(HIDDEN));
    let inv_freq = (0..head_dim / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
    let rope = backend.rope_table(&HostRope { inv_freq, scale: 1.0, max_positions: 256 }).unwrap();
    let [mut delta, mut residual, mut h] = [(); 3].map(|()| make.tensor(HIDDEN));
    let ([mut q, mut context], [mut k, mut v]) =
        ([(); 2].map(|()| make.tensor(query)), [(); 2].map(|()| make.tensor(key)));
    let [mut gate, mut up, mut product] = [(); 3].map(|()| make.tensor(inner));
    let layout = |heads| RopeLayout { heads, head_dim, offset: 0, dim: head_dim, interleaved: false };

    let launches = steady(&simulator, backend, LayerKv::Full { kv_heads, head_dim }, |cache, plan| {
        backend.add_rms_norm(&delta, &mut residual, &norm, EPS, &mut h).unwrap();
        backend.linear_group(&h, &mut [(&w_q, &mut q), (&w_k, &mut k), (&w_v, &mut v)]).unwrap();
        backend.rope(&mut q, layout(heads), &rope, plan).unwrap();
        backend.rope(&mut k, layout(kv_heads), &rope, plan).unwrap();
        backend.paged_attention(&q, &k, &v, cache, 0, plan, &params, &mut context).unwrap();
        backend.linear(&context, &w_o, &mut delta).unwrap();
        backend.add_rms_norm(&delta, &mut residual, &norm, EPS, &mut h).unwrap();
        backend.linear_group(&h, &mut [(&w_gate, &mut gate), (&w_up, &mut up)]).unwrap();
        backend.gated_activation(Activation::Silu, &gate, &up, &mut product).unwrap();
        backend.linear(&product, &w_down, &mut delta).unwrap();
    });
    assert_eq!(launches, 17);
}

#[test]
fn a_deepseek_like_layer_takes_34_launches_of_at_least_23() {
    // At least: AddRmsNorm, q_a with kv_a, RmsNorm, q_b, KvRmsNormRopeCache, rotation of q, absorption, attention, values, o,
    // AddRmsNorm; router and its input in f32, MoeGatingTopK, MoeInitRoutingV2, its counts in int64, two grouped products,
    // SwiGlu, MoeFinalizeRoutingV2 which adds the shared expert, and of that gate with up, SwiGlu, down. (MlaProlog would take
    // the place of six.) More here: q_a, latent and key are weights of their own (2), so are gate and up (1), Silu and Mul (1),
    // the latent is normalised, its key rotated and both stored one by one (2), what was rotated is copied back (2), and the
    // rotated part of q to where attention wants it (1); the experts' weights are converted (1) and the shared expert added (1).
    let simulator = Simulator::new();
    let backend = &simulator.open_fused(A2, DType::BF16);
    let make = Maker { backend };
    let (heads, nope, rope, v, rank, q_rank) = (4, 32, 64, 32, 512, 48);
    let (head_dim, experts, inner) = (nope + rope, 16, 32);
    let (w_q_a, w_latent, w_key) = (make.linear(q_rank, HIDDEN), make.linear(rank, HIDDEN), make.linear(rope, HIDDEN));
    let (w_q, w_o, router) =
        (make.linear(heads * head_dim, q_rank), make.linear(HIDDEN, heads * v), make.router(experts));
    let (norm, q_norm, latent_norm) = (make.norm(HIDDEN), make.norm(q_rank), make.norm(rank));
    let bytes = Maker::bytes(heads * (nope + v) * rank);
    let kv_b = HostTensor::new("kv_b", DType::BF16, vec![heads * (nope + v), rank], &bytes);
    let kv_b = HostLatent { kv_b, heads, nope, rope, v, rank, format: WeightFormat::BF16 };
    let kv_b = backend.latent_weight(&kv_b).unwrap();
    let inv_freq = (0..rope / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
    let table = backend.rope_table(&HostRope { inv_freq, scale: 1.0, max_positions: 256 }).unwrap();
    let matrices = [Maker::bytes(inner * HIDDEN), Maker::bytes(HIDDEN * inner)];
    let expert = |_| {
        let into = HostTensor::new("gate", DType::BF16, vec![inner, HIDDEN], &matrices[0]);
        [into.clone(), into, HostTensor::new("down", DType::BF16, vec![HIDDEN, inner], &matrices[1])]
    };
    let routed = backend
        .expert_weights(HostExperts {
            count: experts,
            held: 0..experts,
            source: &mut (0..experts).map(expert).collect::<Vec<_>>(),
            formats: [WeightFormat::BF16; 3],
            routing: Routing {
                top_k: 4,
                scoring: Scoring::Sigmoid { correction_bias: uniform(4, experts, 0.1) },
                groups: Some(Groups { count: 4, kept: 2, score: GroupScore::TwoBest }),
                norm_topk_prob: true,
                scaling_factor: 2.5,
            },
        })
        .unwrap();
    let shared = [make.linear(inner, HIDDEN), make.linear(inner, HIDDEN)];
    let shared_down = make.linear(HIDDEN, inner);
    let [mut delta, mut residual, mut h, mut shared_out] = [(); 4].map(|()| make.tensor(HIDDEN));
    let (mut q_latent, mut q, mut context) =
        (make.tensor(q_rank), make.tensor(heads * head_dim), make.tensor(heads * v));
    let (mut latent, mut key, mut logits) = (make.tensor(rank), make.tensor(rope), make.tensor(experts));
    let [mut gate, mut up, mut product] = [(); 3].map(|()| make.tensor(inner));
    let layout = |heads, head_dim, offset| RopeLayout { heads, head_dim, offset, dim: rope, interleaved: true };

    let launches = steady(&simulator, backend, LayerKv::Latent { rank, rope }, |cache, plan| {
        backend.add_rms_norm(&delta, &mut residual, &norm, EPS, &mut h).unwrap();
        let group = &mut [(&w_q_a, &mut q_latent), (&w_latent, &mut latent), (&w_key, &mut key)];
        backend.linear_group(&h, group).unwrap();
        backend.rms_norm_in_place(&mut q_latent, &q_norm, EPS).unwrap();
        backend.linear(&q_latent, &w_q, &mut q).unwrap();
        backend.rms_norm_in_place(&mut latent, &latent_norm, EPS).unwrap();
        backend.rope(&mut q, layout(heads, head_dim, nope), &table, plan).unwrap();
        backend.rope(&mut key, layout(1, rope, 0), &table, plan).unwrap();
        backend.latent_attention(&q, &latent, &key, &kv_b, cache, 0, plan, 0.1, &mut context).unwrap();
        backend.linear(&context, &w_o, &mut delta).unwrap();
        backend.add_rms_norm(&delta, &mut residual, &norm, EPS, &mut h).unwrap();
        backend.linear(&h, &router, &mut logits).unwrap();
        backend.fused_moe(&h, &logits, &routed, &mut delta).unwrap();
        backend.linear_group(&h, &mut [(&shared[0], &mut gate), (&shared[1], &mut up)]).unwrap();
        backend.gated_activation(Activation::Silu, &gate, &up, &mut product).unwrap();
        backend.linear(&product, &shared_down, &mut shared_out).unwrap();
        backend.add(&mut delta, &shared_out).unwrap();
    });
    assert_eq!(launches, 34);
}
