//! Fused forms through the simulator: they are taken where they should be, give what the judge says, and cost no more launches
//! than is written down here.

mod common;

use std::ops::Range;

use baton_device::conformance::{self, Case};
use baton_device::{
    AttentionBatch, AttentionParams, Backend, DType, GroupScore, Groups, HostExperts, HostTensor, KvBlocks, KvDtype,
    KvSpec, LayerKv, MoeOps, Reference, Routing, Scoring, SequenceSpan, WeightFormat,
};
use baton_device_ascend::AscendBackend;
use common::{A2, A3, P310, Simulator, line};

/// Full attention at the sizes of a model.
fn attention([heads, kv_heads, head_dim]: [usize; 3], window: Option<usize>, kv: KvDtype) -> Case {
    let scale = (head_dim as f32).sqrt().recip();
    Case::Attention {
        params: AttentionParams { heads, kv_heads, head_dim, scale, window, softcap: None },
        kv,
        history: 0,
    }
}

/// Latent attention of DeepSeek's widths.
fn latent(heads: usize) -> Case {
    let (format, kv) = (WeightFormat::BF16, KvDtype::BF16);
    Case::Latent { heads, nope: 32, rope: 64, v: 32, rank: 512, format, kv, history: 0 }
}

fn experts(groups: Option<GroupScore>) -> Case {
    Case::Moe { rows: 5, hidden: 96, intermediate: 64, experts: 16, format: WeightFormat::BF16, groups }
}

/// A weight of a layer, and a table of its shape.
const LAYER: Case = Case::Linear { rows: 3, in_features: 33, out_features: 17, format: WeightFormat::BF16, bias: true };

/// Runs a case and says how often an operator was launched.
fn launches(simulator: &Simulator, backend: &AscendBackend, case: &Case, operator: &str) -> u64 {
    simulator.reset();
    let outcome = conformance::run(case, backend).unwrap();
    assert!(outcome.passed(), "{case:?}: {} over {}; {:?}", outcome.max_error(), outcome.tolerance, backend.forms());
    simulator.expect_no_violation();
    simulator.report()["launches"][operator].as_u64().unwrap_or(0)
}

const FUSED_ATTENTION: &str = "aclnnFusedInferAttentionScoreV3";

#[test]
fn attention_of_common_models_is_fused_and_agrees_with_the_judge() {
    let simulator = Simulator::new();
    let on_a2 = [[28, 4, 128], [32, 8, 128]].map(|heads| (heads, None)).into_iter().chain([([28, 4, 128], Some(31))]);
    let on_a3 = [None, Some(1), Some(31)].map(|window| ([12, 2, 80], window)).into_iter().chain([([8, 1, 256], None)]);
    let chips =
        [(A2, DType::BF16, KvDtype::BF16, on_a2.collect::<Vec<_>>()), (A3, DType::F16, KvDtype::F16, on_a3.collect())];
    for (chip, dtype, kv, cases) in chips {
        let backend = simulator.open_fused(chip, dtype);
        for (heads, window) in cases {
            // Four steps and a trial, each one launch.
            let count = launches(&simulator, &backend, &attention(heads, window, kv), FUSED_ATTENTION);
            assert_eq!(count, 5, "{heads:?} {window:?}; {:?}", backend.forms());
        }
    }
}

#[test]
fn latent_attention_of_deepseek_is_fused_for_any_number_of_heads_up_to_128() {
    let simulator = Simulator::new();
    let backend = simulator.open_fused(A2, DType::BF16);
    for heads in [1, 6, 128] {
        // Four steps, and a trial of two.
        let count = launches(&simulator, &backend, &latent(heads), FUSED_ATTENTION);
        assert_eq!(count, 6, "{heads} heads; {:?}", backend.forms());
    }
}

#[test]
fn experts_are_chosen_and_multiplied_on_the_device() {
    let simulator = Simulator::new();
    let backend = simulator.open_fused(A2, DType::BF16);
    for (groups, gate) in [
        (None, "aclnnMoeGatingTopKSoftmaxV2"),
        (Some(GroupScore::Best), "aclnnMoeGatingTopK"),
        (Some(GroupScore::TwoBest), "aclnnMoeGatingTopK"),
    ] {
        // One is the trial.
        assert_eq!(launches(&simulator, &backend, &experts(groups), gate), 2, "{groups:?}: {:?}", backend.forms());
        assert_eq!(launches(&simulator, &backend, &experts(groups), gate), 1, "a shape is tried once");
        assert_eq!(simulator.report()["launches"]["aclnnGroupedMatmulV4"], 2);
    }
}

#[test]
fn an_operator_that_refuses_a_shape_or_is_wrong_about_it_is_not_taken() {
    let simulator = Simulator::new();
    let refused = |operator: &str, how: &str, case: &Case, start: &str| {
        let backend = simulator.open_fused(A2, DType::BF16);
        simulator.control(&format!("{how}={operator}"));
        launches(&simulator, &backend, case, operator);
        line(&backend, start)
    };
    for (operator, case, start) in [
        (FUSED_ATTENTION, attention([8, 2, 64], None, KvDtype::BF16), "attention"),
        (FUSED_ATTENTION, latent(2), "latent attention"),
        ("aclnnScatterPaKvCache", attention([8, 2, 64], None, KvDtype::BF16), "cache"),
        ("aclnnMoeGatingTopKSoftmaxV2", experts(None), "experts"),
        ("aclnnMoeGatingTopK", experts(Some(GroupScore::TwoBest)), "experts"),
        ("aclnnGroupedMatmulV4", experts(None), "experts"),
        ("aclnnTransMatmulWeight", LAYER, "weight"),
    ] {
        let text = refused(&format!("{operator}:561002"), "refuse", &case, start);
        assert!(text.contains("561002"), "{text}");
        simulator.control(&format!("refuse={operator}:0"));
        let text = refused(operator, "nan", &case, start);
        assert!(text.contains("its numbers are off"), "{text}");
    }
}

#[test]
fn strict_numbers_and_310p_take_no_fused_attention() {
    let simulator = Simulator::new();
    let small = simulator.open_fused(P310, DType::F16);
    assert_eq!(launches(&simulator, &small, &attention([8, 2, 64], None, KvDtype::F16), FUSED_ATTENTION), 0);
    drop(small);
    let strict = simulator.open(A2, DType::BF16);
    assert_eq!(launches(&simulator, &strict, &attention([8, 2, 64], None, KvDtype::BF16), FUSED_ATTENTION), 0);
    assert_eq!(launches(&simulator, &strict, &experts(None), "aclnnGroupedMatmulV4"), 0);
    assert!(line(&strict, "experts").contains("brought to the host in every step"), "the start-up log says so");
}

/// A sum and its norm on two rows, with a weight that bf16 holds or not.
fn sum_and_norm(backend: &AscendBackend, exact: bool) -> [Vec<f32>; 2] {
    const WIDTH: usize = 64;
    let weight: Vec<u8> =
        (0..WIDTH).flat_map(|i| (1.0 + i as f32 / if exact { 64.0 } else { 1000.0 }).to_le_bytes()).collect();
    let weight = backend.vector(&HostTensor::new("weight", DType::F32, vec![WIDTH], &weight)).unwrap();
    let tensor = |seed| {
        let mut tensor = backend.tensor(2, WIDTH).unwrap();
        backend.write(&conformance::uniform(seed, 2 * WIDTH, 1.0), &mut tensor).unwrap();
        tensor
    };
    let (x, mut residual, mut out) = (tensor(1), tensor(2), backend.tensor(2, WIDTH).unwrap());
    backend.add_rms_norm(&x, &mut residual, &weight, 1e-6, &mut out).unwrap();
    [residual, out].map(|tensor| {
        let mut values = Vec::new();
        backend.read(&tensor, &mut values).unwrap();
        values
    })
}

#[test]
fn a_sum_and_its_norm_are_one_launch_where_the_weight_is_the_same_in_the_type_of_the_rows() {
    let simulator = Simulator::new();
    let backend = simulator.open_fused(A2, DType::BF16);
    let count = |exact| {
        simulator.reset();
        let numbers = sum_and_norm(&backend, exact);
        simulator.expect_no_violation();
        (numbers, simulator.report()["launches"]["aclnnAddRmsNorm"].as_u64().unwrap_or(0))
    };
    assert_eq!(count(false).1, 0);
    assert_eq!(count(true).1, 2, "one is the trial");
    let (fused, launches) = count(true);
    assert_eq!(launches, 1);
    simulator.control("refuse=aclnnAddRmsNorm:561002");
    let composed = simulator.open_fused(A2, DType::BF16);
    let [[fused_sum, fused_norm], [sum, norm]] = [fused, sum_and_norm(&composed, true)];
    assert_eq!(fused_sum, sum);
    // The norm is of the sum before or after it is rounded.
    assert!(fused_norm.iter().zip(&norm).all(|(a, b)| (a - b).abs() <= 2f32.powi(-7) * b.abs()));
    assert!(line(&composed, "sum and norm").contains("561002"));
    simulator.control("refuse=aclnnAddRmsNorm:0");
}

/// What experts of a range give for some rows, and what the others would.
fn held<B: MoeOps>(backend: &B, held: Range<usize>, groups: Option<Groups>) -> Vec<f32> {
    const HIDDEN: usize = 32;
    const WIDTH: usize = 16;
    const COUNT: usize = 12;
    const ROWS: usize = 7;
    let bytes = |seed, len| -> Vec<u8> {
        conformance::uniform(seed, len, 0.3).iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
    };
    let weights: Vec<_> = (0..COUNT as u64).map(|e| [0, 1, 2].map(|i| bytes(3 * e + i, HIDDEN * WIDTH))).collect();
    let shapes = [[WIDTH, HIDDEN], [WIDTH, HIDDEN], [HIDDEN, WIDTH]];
    let matrix = |e: usize, i: usize| HostTensor::new("expert", DType::BF16, shapes[i].to_vec(), &weights[e][i]);
    let scoring = match groups {
        Some(_) => Scoring::Sigmoid { correction_bias: conformance::uniform(90, COUNT, 0.1) },
        None => Scoring::Softmax,
    };
    let experts = backend.expert_weights(HostExperts {
        count: COUNT,
        held,
        source: &mut (0..COUNT).map(|e| [0, 1, 2].map(|i| matrix(e, i))).collect::<Vec<_>>(),
        formats: [WeightFormat::BF16; 3],
        limit: None,
        routing: Routing { top_k: 4, scoring, groups, norm_topk_prob: true, scaling_factor: 1.5, by_token: None },
    });
    let tensor = |seed, cols, scale| {
        let mut tensor = backend.tensor(ROWS, cols).unwrap();
        let values = conformance::uniform(seed, ROWS * cols, scale);
        // Multiples that every type holds, so that all choose the same experts.
        let values: Vec<f32> = values.iter().map(|x| (x * 64.0).round() / 64.0).collect();
        backend.write(&values, &mut tensor).unwrap();
        tensor
    };
    let (x, logits, mut out) = (tensor(91, HIDDEN, 1.0), tensor(92, COUNT, 2.0), backend.tensor(ROWS, HIDDEN).unwrap());
    backend.fused_moe(&x, &logits, &experts.unwrap(), &mut out).unwrap();
    let mut values = Vec::new();
    backend.read(&out, &mut values).unwrap();
    values
}

#[test]
fn experts_that_are_held_elsewhere_add_nothing_whatever_the_form() {
    let simulator = Simulator::new();
    let (fused, composed) = (simulator.open_fused(A2, DType::BF16), simulator.open(A2, DType::BF16));
    let sigmoid = Groups { count: 4, kept: 3, score: GroupScore::TwoBest };
    for groups in [None, Some(sigmoid)] {
        for range in [0..12, 0..5, 5..12, 3..4, 11..12] {
            let judged = held(&Reference::new(), range.clone(), groups);
            for backend in [&fused, &composed] {
                let actual = held(backend, range.clone(), groups);
                let error = actual.iter().zip(&judged).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error < 1e-2, "{range:?}: {error}; {:?}", backend.forms());
            }
        }
    }
    simulator.expect_no_violation();
    let lines = fused.forms();
    let grouped = lines.iter().filter(|line| line.starts_with("experts"));
    assert!(grouped.clone().count() > 0 && grouped.clone().all(|line| line.contains("GroupedMatmulV4")), "{lines:?}");
}

#[test]
fn sequences_that_share_blocks_are_attended_to_in_calls_that_the_cache_has_blocks_for() {
    let simulator = Simulator::new();
    let attend = |backend: &AscendBackend| {
        let (heads, kv_heads, head_dim) = (4, 2, 32);
        let params = AttentionParams { heads, kv_heads, head_dim, scale: 0.2, window: None, softcap: None };
        let layers = vec![LayerKv::Full { kv_heads, head_dim }];
        let mut cache =
            backend.kv_cache(&KvSpec { layers, dtype: KvDtype::BF16, block_size: 128 }, KvBlocks::kept(4)).unwrap();
        let mut values = Vec::new();
        // A prompt of two blocks, then three sequences that go on from its first block, each in its own second.
        for spans in
            [vec![(0, 200, vec![2, 1])], vec![(128, 3, vec![2, 0]), (128, 1, vec![2, 1]), (128, 2, vec![2, 3])]]
        {
            let sequences: Vec<_> = spans
                .iter()
                .map(|(start, len, table)| SequenceSpan {
                    start: *start,
                    len: *len,
                    block_table: table,
                    passing_table: &[],
                })
                .collect();
            let rows = sequences.iter().map(|s| s.len).sum();
            let plan = backend.plan_attention(&AttentionBatch { sequences: &sequences }).unwrap();
            let tensor = |seed, heads| {
                let mut tensor = backend.tensor(rows, heads * head_dim).unwrap();
                backend.write(&conformance::uniform(seed, rows * heads * head_dim, 1.0), &mut tensor).unwrap();
                tensor
            };
            let (q, k, v, mut out) = (tensor(1, heads), tensor(2, kv_heads), tensor(3, kv_heads), tensor(4, heads));
            backend.paged_attention(&q, &k, &v, &mut cache, 0, &plan, &params, &mut out).unwrap();
            backend.read(&out, &mut values).unwrap();
        }
        values
    };
    let (fused, composed) = (simulator.open_fused(A2, DType::BF16), simulator.open(A2, DType::BF16));
    let (actual, judged) = (attend(&fused), attend(&composed));
    assert!(actual.iter().zip(&judged).all(|(a, b)| (a - b).abs() < 2e-2), "{:?}", fused.forms());
    simulator.expect_no_violation();
    assert!(fused.forms()[0].contains("FusedInferAttentionScoreV3"), "{:?}", fused.forms());
}
