//! What a decoder layer costs in steady decode with fused forms: in launches, beside the fewest that CANN's operators would
//! allow a layer of this shape whose weights and outputs lie as they like, and in calls of the host with and without graphs.

mod common;

use baton_device::conformance::uniform;
use baton_device::{
    Activation, AttentionBatch, Backend, DType, GroupScore, Groups, HostExperts, HostLatent, HostLinear, HostRope,
    HostTensor, KvBlocks, KvDtype, KvSpec, LatentOps, LayerKv, MoeOps, Purpose, RopeLayout, Routing, Scoring,
    SequenceSpan, WeightFormat,
};
use baton_device_ascend::AscendBackend;
use common::layer::{EPS, HIDDEN, KvCache, LLAMA_KV, Llama, Maker, Plan, Scratch};
use common::{A2, Simulator};
use serde_json::Value;

const ROWS: usize = 4;

/// What a layer costs the host.
#[derive(Debug, PartialEq, Eq)]
struct Cost {
    /// Operators that went to the stream by themselves, copies within the device among them.
    launches: u64,
    /// First phases.
    prepared: u64,
    graphs: u64,
    /// Calls of CANN's functions, these among them.
    calls: u64,
}

impl Cost {
    fn of(report: &Value) -> Self {
        let sum = |counts: &Value, counted: fn(&str) -> bool| -> u64 {
            let counts = counts.as_object().expect("counts").iter().filter(|(name, _)| counted(name));
            counts.map(|(_, n)| n.as_u64().expect("a number")).sum()
        };
        let copies = report["copies"]["device_to_device"]["count"].as_u64().unwrap_or(0);
        Self {
            launches: sum(&report["launches"], |_| true) + copies,
            prepared: sum(&report["calls"], |name| name.ends_with("GetWorkspaceSize")),
            graphs: sum(&report["calls"], |name| name == "aclmdlRIExecuteAsync"),
            calls: sum(&report["calls"], |_| true),
        }
    }
}

/// What `layer` costs in steady decode: a step with two layers less one with one, so that what a step costs whatever its
/// layers does not count.
fn steady(
    simulator: &Simulator,
    backend: &AscendBackend,
    kv: LayerKv,
    mut layer: impl FnMut(&mut KvCache, &Plan),
) -> Cost {
    let spec = KvSpec { layers: vec![kv], dtype: KvDtype::BF16, block_size: backend.caps().kv_block_size };
    let mut cache = backend.kv_cache(&spec, KvBlocks::kept(4 * ROWS)).unwrap();
    let tables: Vec<[u32; 2]> = (0..ROWS as u32).map(|s| [2 * s + 1, 2 * s]).collect();
    let mut probe = backend.tensor(1, 1).unwrap();
    let mut step = |position: usize, layers: usize| {
        let span = |table| SequenceSpan { start: position, len: 1, block_table: table, passing_table: &[] };
        let sequences: Vec<_> = tables.iter().map(|table| span(table.as_slice())).collect();
        simulator.reset();
        let plan = backend.plan_attention(&AttentionBatch { sequences: &sequences }).unwrap();
        (0..layers).for_each(|_| layer(&mut cache, &plan));
        // Whoever reads waits for all that was queued.
        backend.write(&[0.0], &mut probe).unwrap();
        backend.read(&probe, &mut Vec::new()).unwrap();
        simulator.expect_no_violation();
        simulator.report()
    };
    // Graphs are there from the third time on; what settles the forms comes before the first.
    step(120, 1);
    let [one, two] = [(121, 1), (125, 2)].map(|(start, layers)| {
        let report = (start..start + 4).map(|position| step(position, layers)).last().expect("some steps");
        assert_eq!(report["mallocs"], 0, "memory is reused");
        // The numbers of the plan, and what the test itself writes.
        assert_eq!(report["copies"]["host_to_device"]["count"], 2, "{}", report["copies"]);
        Cost::of(&report)
    });
    Cost {
        launches: two.launches - one.launches,
        prepared: two.prepared - one.prepared,
        graphs: two.graphs - one.graphs,
        calls: two.calls - one.calls,
    }
}

/// The same on a device without graphs, and on one with them.
fn without_and_with_graphs(cost: impl Fn(&Simulator, &AscendBackend) -> Cost) -> [Cost; 2] {
    let simulator = Simulator::new();
    [true, false].map(|refused| {
        let backend = simulator.open_fused(A2, DType::BF16);
        if refused {
            simulator.control("fault=aclmdlRICaptureBegin:1:207000");
        }
        let cost = cost(&simulator, &backend);
        drop(backend);
        simulator.expect_clean();
        cost
    })
}

#[test]
fn a_llama_like_layer_takes_17_launches_of_at_least_10() {
    // At least: AddRmsNorm, q with k and v, rotation of both, ScatterPaKvCache, attention, o, AddRmsNorm, gate with up, SwiGlu,
    // down. More here: q, k and v and gate and up are weights of their own (3), their outputs too (Silu and Mul, 1), q and k
    // are rotated one by one and copied back (3).
    let [without, with] = without_and_with_graphs(|simulator, backend| {
        let make = Maker { backend, rows: ROWS };
        let (llama, mut scratch) = (Llama::new(make, 1), Scratch::new(make));
        steady(simulator, backend, LLAMA_KV, |cache, plan| llama.run(backend, &mut scratch, cache, 0, plan).unwrap())
    });
    assert_eq!(without, Cost { launches: 17, prepared: 15, graphs: 0, calls: 154 });
    assert_eq!(with, Cost { launches: 1, prepared: 1, graphs: 1, calls: 21 });
}

#[test]
fn a_deepseek_like_layer_takes_34_launches_of_at_least_23() {
    // At least: AddRmsNorm, q_a with kv_a, RmsNorm, q_b, KvRmsNormRopeCache, rotation of q, absorption, attention, values, o,
    // AddRmsNorm; router and its input in f32, MoeGatingTopK, MoeInitRoutingV2, its counts in int64, two grouped products,
    // SwiGlu, MoeFinalizeRoutingV2 which adds the shared expert, and of that gate with up, SwiGlu, down. (MlaProlog would take
    // the place of six.) More here: q_a, latent and key are weights of their own (2), so are gate and up (1), Silu and Mul (1),
    // the latent is normalised, its key rotated and both stored one by one (2), what was rotated is copied back (2), and the
    // rotated part of q to where attention wants it (1); the experts' weights are converted (1) and the shared expert added (1).
    let [without, with] = without_and_with_graphs(deepseek);
    assert_eq!(without, Cost { launches: 34, prepared: 33, graphs: 0, calls: 311 });
    assert_eq!(with, Cost { launches: 1, prepared: 1, graphs: 1, calls: 21 });
}

/// A router: its logits are not rounded.
fn router(backend: &AscendBackend, experts: usize) -> <AscendBackend as Backend>::Linear {
    let bytes: Vec<u8> = uniform(2, experts * HIDDEN, 0.1).iter().flat_map(|x| x.to_le_bytes()).collect();
    let weight = HostTensor::new("router", DType::F32, vec![experts, HIDDEN], &bytes);
    backend
        .linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::F32, purpose: Purpose::Product })
        .unwrap()
}

fn deepseek(simulator: &Simulator, backend: &AscendBackend) -> Cost {
    let make = Maker { backend, rows: ROWS };
    let (heads, nope, rope, v, rank, q_rank) = (4, 32, 64, 32, 512, 48);
    let (head_dim, experts, inner) = (nope + rope, 16, 32);
    let (w_q_a, w_latent, w_key) = (make.linear(q_rank, HIDDEN), make.linear(rank, HIDDEN), make.linear(rope, HIDDEN));
    let (w_q, w_o, router) =
        (make.linear(heads * head_dim, q_rank), make.linear(HIDDEN, heads * v), router(backend, experts));
    let (norm, q_norm, latent_norm) = (make.norm(HIDDEN), make.norm(q_rank), make.norm(rank));
    let bytes = Maker::bytes(1, heads * (nope + v) * rank);
    let kv_b = HostTensor::new("kv_b", DType::BF16, vec![heads * (nope + v), rank], &bytes);
    let kv_b = HostLatent { kv_b, heads, nope, rope, v, rank, format: WeightFormat::BF16 };
    let kv_b = backend.latent_weight(&kv_b).unwrap();
    let inv_freq = (0..rope / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
    let table = backend.rope_table(&HostRope { inv_freq, scale: 1.0, max_positions: 256 }).unwrap();
    let matrices = [Maker::bytes(1, inner * HIDDEN), Maker::bytes(1, HIDDEN * inner)];
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
            limit: None,
            routing: Routing {
                top_k: 4,
                scoring: Scoring::Sigmoid { correction_bias: uniform(4, experts, 0.1) },
                groups: Some(Groups { count: 4, kept: 2, score: GroupScore::TwoBest }),
                norm_topk_prob: true,
                scaling_factor: 2.5,
                by_token: None,
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

    steady(simulator, backend, LayerKv::Latent { rank, rope, index: None }, |cache, plan| {
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
    })
}
