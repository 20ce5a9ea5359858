//! DeepSeek-V4: every part of it shows in the logits, and a context is the same however it is cut.

use baton_device::{Backend, CompressedOps, LatentOps, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{SamplingParams, StepPlan};
use serde_json::{Value, json};

use crate::common::checkpoint::{Copy, Tensor};
use crate::common::{Pool, Sequence, all_logits, off_by, prompts, runner};

const CASES: [&str; 2] = ["deepseek-v4", "deepseek-v4-b"];
/// What goldens are held to.
const TOLERANCE: f64 = 1e-3;

/// The values of a config's field with which logits are golden; others show.
fn shows(case: &str, field: &str, golden: &Value, others: &[Value]) {
    for (value, differs) in std::iter::once((golden, false)).chain(others.iter().map(|other| (other, true))) {
        let copy = Copy::of(case);
        copy.edit_config(|config| drop(config.insert(field.into(), value.clone())));
        let off = off_by(case, &copy);
        assert_eq!(off > TOLERANCE, differs, "{case}, {field} {value}: off by {off}");
    }
}

#[test]
fn one_more_or_less_shows() {
    let cases = [("sliding_window", [24, 17]), ("index_topk", [6, 5]), ("hc_sinkhorn_iters", [20, 6])];
    for (field, golden) in cases {
        for (case, golden) in CASES.into_iter().zip(golden) {
            let others: Vec<Value> = match field {
                // What 19 leave to be done is less than the tolerance.
                "hc_sinkhorn_iters" => vec![json!(1), json!(2)],
                _ => vec![json!(golden - 1), json!(golden + 1)],
            };
            shows(case, field, &json!(golden), &others);
        }
    }
}

#[test]
fn factors_and_bounds_show() {
    let numbers = [
        ("routed_scaling_factor", [1.5, 2.5], 1.0),
        ("swiglu_limit", [1.5, 2.0], 1e5),
        ("compress_rope_theta", [160_000.0, 40_000.0], 10_000.0),
        ("hc_eps", [1e-6, 1e-4], 0.01),
    ];
    for (field, golden, other) in numbers {
        for (case, golden) in CASES.into_iter().zip(golden) {
            // The newer style has the base elsewhere.
            if (field, case) != ("compress_rope_theta", "deepseek-v4-b") {
                shows(case, field, &json!(golden), &[json!(other)]);
            }
        }
    }
}

#[test]
fn the_stretch_of_rotation_shows() {
    let scaling = json!({"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 64,
        "type": "yarn"});
    shows("deepseek-v4", "rope_scaling", &scaling, &[Value::Null]);
}

/// Two halves of each row of a matrix in bf16 or of a table in f32 changed places.
fn swap_halves(tensor: &mut Tensor, rows: usize) {
    let half = tensor.data.len() / rows / 2;
    for row in tensor.data.chunks_exact_mut(2 * half) {
        row.rotate_left(half);
    }
}

#[test]
fn each_tensor_of_a_kind_of_its_own_shows() {
    // Zeros; of norms, what they scale.
    let zeroed = [
        "attn.attn_sink",
        "attn.wo_a.weight",
        "compressor.wkv.weight",
        "compressor.wgate.weight",
        "compressor.ape",
        "compressor.norm.weight",
        "indexer.compressor.wkv.weight",
        "indexer.compressor.wgate.weight",
        "indexer.compressor.ape",
        "indexer.compressor.norm.weight",
        "indexer.wq_b.weight",
        "indexer.weights_proj.weight",
        "ffn.gate.bias",
        "hc_attn_base",
        "hc_attn_scale",
        "hc_ffn_fn",
        "hc_head_base",
        "hc_head_fn",
        "hc_head_scale",
    ];
    for case in CASES {
        for name in zeroed {
            let copy = Copy::of(case);
            let mut met = 0;
            copy.edit_weights(|tensors| {
                for tensor in tensors.iter_mut().filter(|tensor| tensor.name.ends_with(name)) {
                    tensor.data.fill(0);
                    met += 1;
                }
            });
            let off = off_by(case, &copy);
            assert!(met > 0 && off > TOLERANCE, "{case}, {met} times {name}: off by {off}");
        }
    }
}

#[test]
fn the_two_series_and_the_rows_of_a_table_of_experts_are_not_the_other_way_round() {
    for case in CASES {
        let copy = Copy::of(case);
        copy.edit_weights(|tensors| {
            let overlapping: Vec<String> = tensors
                .iter()
                .filter_map(|tensor| Some(tensor.name.strip_suffix("attn.indexer.wq_b.weight")?.to_owned()))
                .collect();
            for tensor in tensors.iter_mut() {
                let Some(name) = overlapping.iter().find_map(|layer| tensor.name.strip_prefix(layer)) else { continue };
                match name {
                    "attn.compressor.wkv.weight" | "attn.compressor.wgate.weight" => swap_halves(tensor, 1),
                    "attn.compressor.ape" => swap_halves(tensor, tensor.shape[0]),
                    _ => {}
                }
            }
        });
        let off = off_by(case, &copy);
        assert!(off > TOLERANCE, "{case}, series swapped: off by {off}");

        let copy = Copy::of(case);
        copy.edit_weights(|tensors| {
            for tensor in tensors.iter_mut().filter(|tensor| tensor.name.ends_with("gate.tid2eid")) {
                let row = tensor.data.len() / tensor.shape[0];
                tensor.data.rotate_left(row);
            }
        });
        let off = off_by(case, &copy);
        assert!(off > TOLERANCE, "{case}, rows of tables off by one: off by {off}");
    }
}

/// A prompt in two steps, cut before, at and behind each multiple of a window, a rate and a block.
fn a_cut_changes_no_bit<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: &str, sizes: [usize; 4]) {
    let mut runner = runner(make(), case);
    let prompt = prompts(case).into_iter().max_by_key(|prompt| prompt.ids.len()).unwrap();
    let len = prompt.ids.len();
    let whole = all_logits(&mut runner, &prompt.ids);
    // All of the small ones would take minutes; the first two of each, and those that several share.
    let around = |size: usize| [size, 2 * size, 256, 384 - size].into_iter().flat_map(|at| [at - 1, at, at + 1]);
    let cuts: std::collections::BTreeSet<usize> =
        sizes.into_iter().flat_map(around).filter(|cut| (1..len).contains(cut)).collect();
    assert!(cuts.len() > 15, "{cuts:?}");
    for cut in cuts {
        let mut sequence = Sequence::new(1, &prompt.ids, SamplingParams::greedy());
        let (mut pool, mut logits) = (Pool::new(&runner), Vec::new());
        for count in [cut, len - cut] {
            let end = sequence.num_computed + count;
            pool.cover(&mut sequence, end);
            logits.extend(runner.logits(&StepPlan::new(vec![sequence.step(count)])).unwrap());
            sequence.num_computed = end;
        }
        assert!(whole == logits, "{case}: cut at {cut}");
    }
}

#[test]
fn a_cut_at_any_boundary_of_window_pools_and_blocks_changes_no_bit() {
    let cpu = || CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap();
    // Window, rates, tokens of a block.
    for (case, sizes) in CASES.into_iter().zip([[24, 4, 128, 16], [17, 3, 16, 48]]) {
        a_cut_changes_no_bit(Reference::new, case, sizes);
        a_cut_changes_no_bit(cpu, case, sizes);
    }
}
