//! Experts beyond the shared cases: every size of tile, blocks for single rows, formats that differ, a router in f32.

mod common;

use baton_device::conformance::{self, Case, random_blocks, uniform};
use baton_device::{
    BlockFormat, Code, DType, DeviceError, ExpertSource, HostExperts, HostLinear, HostTensor, KvDtype, MoeOps, Purpose,
    Reference, Result, Routing, Scoring, WeightFormat,
};
use common::Simulator;

#[test]
fn every_size_of_tile_gives_the_judges_numbers() {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("order=11");
    let backend = simulator.open(DType::BF16);
    // Pairs for each expert on average: less than one, 22, 75. The last block of each tile has few of its columns and rows.
    let cases = [(1, 8, WeightFormat::BF16), (60, 8, WeightFormat::BF16), (200, 8, WeightFormat::BF16)];
    let (q4, fp8) = (WeightFormat::Ggml(BlockFormat::Q4_K), WeightFormat::Coded(Code::E4M3));
    let cases = cases.into_iter().chain([(1, 4, q4), (4, 4, q4), (70, 4, q4), (2, 4, fp8), (70, 4, fp8)]);
    for (rows, experts, format) in cases {
        let (hidden, intermediate) = if format == q4 { (256, 256) } else { (136, 200) };
        let case = Case::Moe { rows, hidden, intermediate, experts, format, groups: None };
        let outcome = conformance::run(&case, &backend).unwrap();
        assert!(outcome.passed(), "{case:?}: {} of {}", outcome.max_error(), outcome.tolerance);
        // Tolerances are for the worst that rounding can do.
        assert!(outcome.max_error() < outcome.tolerance / 8.0, "{case:?}: {}", outcome.max_error());
    }
    for slots in [16, 64] {
        assert_eq!(simulator.count(&format!("kernels.grouped_down<bf16, Q4_K, {slots}>")), 1, "{slots}");
    }
    for slots in [64, 128] {
        assert_eq!(simulator.count(&format!("kernels.grouped_gate_up<bf16, Dense<bf16>, {slots}>")), 1, "{slots}");
    }
    assert_eq!(simulator.count("kernels.direct_down<bf16, Q4_K, 8>"), 1);
    drop(backend);
    simulator.expect_clean();
}

#[test]
fn many_rows_are_computed_in_parts() {
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::BF16);
    let format = WeightFormat::BF16;
    let case = Case::Moe { rows: 4100, hidden: 8, intermediate: 8, experts: 4, format, groups: None };
    let outcome = conformance::run(&case, &backend).unwrap();
    assert!(outcome.passed(), "{} of {}", outcome.max_error(), outcome.tolerance);
    assert_eq!(simulator.count("kernels.sort_pairs"), 2);
}

const HIDDEN: usize = 64;
const INNER: usize = 96;
const EXPERTS: usize = 40;

/// Experts of f16 gates, bf16 ups and downs in blocks, of which some are held.
#[derive(Default)]
struct Mixed([Vec<u8>; 3]);

impl ExpertSource for Mixed {
    fn expert(&mut self, expert: usize) -> Result<[HostTensor<'_>; 3]> {
        let values = |seed: usize| uniform((seed + expert) as u64, HIDDEN * INNER, 0.2);
        let f16 = |v: &f32| half::f16::from_f32(*v).to_le_bytes();
        let bf16 = |v: &f32| half::bf16::from_f32(*v).to_le_bytes();
        self.0 = [
            values(1000).iter().flat_map(f16).collect(),
            values(2000).iter().flat_map(bf16).collect(),
            random_blocks(BlockFormat::Q8_0, 3000 + expert as u64, HIDDEN * INNER, 0.2),
        ];
        let [gate, up, down] = &self.0;
        Ok([
            HostTensor::new("gate", DType::F16, vec![INNER, HIDDEN], gate),
            HostTensor::new("up", DType::BF16, vec![INNER, HIDDEN], up),
            HostTensor::new("down", DType::Ggml(BlockFormat::Q8_0), vec![HIDDEN, INNER], down),
        ])
    }
}

/// The router is a weight in f32, whose products are f32 beside narrower activations.
fn mixed<B: MoeOps>(b: &B, rows: usize) -> Vec<f32> {
    let experts = b
        .expert_weights(HostExperts {
            count: EXPERTS,
            held: 7..33,
            source: &mut Mixed::default(),
            formats: [WeightFormat::F16, WeightFormat::BF16, WeightFormat::Ggml(BlockFormat::Q8_0)],
            limit: None,
            routing: Routing {
                top_k: 4,
                scoring: Scoring::Sigmoid { correction_bias: uniform(1, EXPERTS, 0.3) },
                groups: None,
                norm_topk_prob: true,
                scaling_factor: 2.5,
                by_token: None,
            },
        })
        .unwrap();
    let router: Vec<u8> = uniform(3, EXPERTS * HIDDEN, 0.3).iter().flat_map(|v| v.to_le_bytes()).collect();
    let weight = HostTensor::new("router", DType::F32, vec![EXPERTS, HIDDEN], &router);
    let (format, purpose) = (WeightFormat::F32, Purpose::Product);
    let router = b.linear_weight(&HostLinear { weight, bias: None, format, purpose }).unwrap();
    let mut inputs = uniform(2, rows * HIDDEN, 1.0);
    KvDtype::BF16.round(&mut inputs);
    let tensor = |cols: usize| b.tensor(rows, cols).unwrap();
    let (mut x, mut logits, mut out) = (tensor(HIDDEN), tensor(EXPERTS), tensor(HIDDEN));
    b.write(&inputs, &mut x).unwrap();
    b.linear(&x, &router, &mut logits).unwrap();
    b.fused_moe(&x, &logits, &experts, &mut out).unwrap();
    let mut values = Vec::new();
    b.read(&out, &mut values).unwrap();
    values
}

#[test]
fn formats_may_differ_routers_be_wider_and_experts_be_elsewhere() {
    let Some(simulator) = Simulator::new() else { return };
    for (activations, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 2e-2)] {
        let backend = simulator.open(activations);
        for rows in [2, 11, 30] {
            let (expected, actual) = (mixed(&Reference::new(), rows), mixed(&backend, rows));
            let error = expected.iter().zip(&actual).map(|(e, a)| (e - a).abs()).fold(0.0, f32::max);
            assert!(error < tolerance, "{rows} rows in {activations}: {error}");
            assert!(expected.iter().any(|x| *x != 0.0));
        }
    }
    simulator.expect_clean();
}

#[test]
fn more_experts_than_kernels_choose_from_are_refused_in_words() {
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::BF16);
    let routing = Routing {
        top_k: 1,
        scoring: Scoring::Softmax,
        groups: None,
        norm_topk_prob: true,
        scaling_factor: 1.0,
        by_token: None,
    };
    let (formats, limit) = ([WeightFormat::BF16; 3], None);
    let many = HostExperts { count: 1025, held: 0..1, source: &mut Mixed::default(), formats, limit, routing };
    match backend.expert_weights(many).map(|_| ()) {
        Err(DeviceError::Unavailable { reason, .. }) => assert!(reason.contains("1 of 1025"), "{reason}"),
        other => panic!("{other:?}"),
    }
}
