//! Models on several ranks say what they say on one, whatever their architecture, their form of weights and their adapters;
//! a rank that goes wrong ends a step and no more than that, unless it does not come back; what cannot be shared out is refused.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Duration;

use crate::common::ahead::run_ahead;
use crate::common::checkpoint::{Copy, find};
use crate::common::{CASES, Pool, Sequence, alone, folder, generate_with, json, options, options_of, prompts, step};
use crate::faulty::{Fault, Faulty};
use baton_device::{Backend, BlockFormat, CompressedOps, DType, LatentOps, Reference};
use baton_device_ascend::{AscendBackend, AscendOptions};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_device_cuda::CudaBackend;
use baton_model::{
    Adapter, Files, LoadError, LoadOptions, LoadReport, Quantization, Ranks, RunError, Runner, SampledToken,
    SamplingParams, SequenceStep, StepPlan, load, load_ranks,
};

/// On log-probabilities, absolute: sums are taken in another order.
const TOLERANCE: f32 = 1e-4;
const OUTPUT: usize = 36;
const PROMPT: [u32; 4] = [1, 7, 30, 2];
/// Longer than anything here takes: nothing is decided by it.
const TIMEOUT: Duration = Duration::from_secs(120);

fn golden(case: &str) -> Files {
    Files::at(folder(case)).unwrap()
}

fn on(size: usize, files: &Files, options: &LoadOptions) -> (Ranks<Reference>, LoadReport) {
    load_ranks(Reference::ranks(size, TIMEOUT), files, options, TIMEOUT).unwrap_or_else(|e| panic!("{e}"))
}

/// Greedy, with the log-probability of every token.
fn told(runner: &mut dyn Runner, adapter: Option<&Adapter>, prompt: &[u32]) -> Vec<SampledToken> {
    let params = SamplingParams { logprobs: Some(runner.spec().vocab_size as u32), ..SamplingParams::greedy() };
    generate_with(runner, adapter, prompt, params, OUTPUT)
}

fn same(actual: &[SampledToken], expected: &[SampledToken], what: &str) {
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert_eq!(actual.token, expected.token, "{what}: token {i}");
        let by_id = |of: &SampledToken| of.top.iter().copied().collect::<BTreeMap<u32, f32>>();
        let (actual, expected) = (by_id(actual), by_id(expected));
        assert!(actual.keys().eq(expected.keys()), "{what}");
        let off = actual.values().zip(expected.values()).map(|(a, e)| (a - e).abs()).fold(0.0, f32::max);
        assert!(off <= TOLERANCE, "{what}: off by {off} at token {i}");
    }
}

/// One rank, and each of `sizes`, on the golden prompts of `case`.
fn ranks_say_what_one_says(case: &str, files: &Files, options: &LoadOptions, sizes: &[usize]) {
    let (mut one, report) = load(Reference::new(), files, options).unwrap();
    let mut prompts = prompts(case);
    prompts.retain(|prompt| ["short", "mid"].contains(&prompt.name.as_str()));
    let expected: Vec<_> = prompts.iter().map(|prompt| told(&mut one, None, &prompt.ids)).collect();
    for &size in sizes {
        let (mut ranks, of_ranks) = on(size, files, options);
        for (prompt, expected) in prompts.iter().zip(&expected) {
            same(&told(&mut ranks, None, &prompt.ids), expected, &format!("{case} on {size} ranks, {}", prompt.name));
        }
        let (name, seconds) = (format!("{case} on {size} ranks"), report.seconds);
        assert!(of_ranks.kv_bytes >= report.kv_bytes, "{name}");
        assert_eq!(LoadReport { seconds, kv_bytes: report.kv_bytes, ..of_ranks }, report, "{name}");
    }
}

/// Which numbers of ranks a golden checkpoint is tried on.
fn sizes(case: &str) -> &'static [usize] {
    match case {
        "qwen2-untied" => &[1, 2],
        "deepseek-v4" | "deepseek-v4-b" => &[1],
        _ => &[1, 2, 4],
    }
}

#[test]
fn every_architecture_says_on_ranks_what_it_says_on_one() {
    for case in CASES {
        ranks_say_what_one_says(case, &golden(case), &options_of(case), sizes(case));
    }
}

#[test]
fn simulated_npus_say_together_what_the_reference_says_alone() {
    let simulator = crate::ascend_sim::Simulator::new();
    simulator.control("devices=4");
    let device = AscendOptions { fused: true, ..crate::ascend_sim::options(DType::F32) };
    for case in ["llama-rope3", "qwen3-moe", "mixtral", "deepseek-v3"] {
        let (mut one, _) = load(Reference::new(), &golden(case), &options()).unwrap();
        let expected = told(&mut one, None, &PROMPT);
        for size in [1, 2, 4] {
            let devices: Vec<u32> = (0..size).collect();
            let backends = AscendBackend::ranks(&device, &devices).unwrap();
            let (mut ranks, _) = load_ranks(backends, &golden(case), &options(), TIMEOUT).unwrap();
            same(&told(&mut ranks, None, &PROMPT), &expected, &format!("{case} on {size} simulated devices"));
        }
    }
    simulator.expect_clean();
}

/// Prompts of other lengths are computed beside those that have come to their end.
#[test]
fn simulated_gpus_go_ahead_together_and_say_what_the_reference_says_alone() {
    let Some(simulator) = crate::cuda::Simulator::new() else { return };
    simulator.control("devices=2");
    const TOKENS: usize = 5;
    let sampled = SamplingParams { seed: 3, top_k: 40, ..SamplingParams::default() };
    for case in ["llama-rope3", "qwen3-moe", "deepseek-v2-lite"] {
        let mut one = load(Reference::new(), &golden(case), &options()).unwrap().0;
        let gpus = CudaBackend::ranks(&crate::cuda::options(DType::F32), &[0, 1]).unwrap();
        let mut ranks = load_ranks(gpus, &golden(case), &options(), TIMEOUT).unwrap().0;
        assert!(ranks.spec().steps_ahead);
        let params = [SamplingParams::greedy(), SamplingParams::greedy(), sampled.clone()];
        let prompts = [&PROMPT[..], &PROMPT[1..], &[9, 3, 5, 11, 2, 8, 8, 20, 1]];
        let sequence = |((id, prompt), params): ((u64, &[u32]), SamplingParams)| Sequence::new(id, prompt, params);
        let mut sequences: Vec<_> = (0..).zip(prompts).zip(params).map(sequence).collect();
        let expected: Vec<_> = sequences.iter().map(|s| alone(&mut one, s.clone(), TOKENS).output).collect();
        run_ahead(&mut ranks, &mut sequences, 4, TOKENS);
        for (sequence, expected) in sequences.iter().zip(&expected) {
            // The second leaves.
            let got = if sequence.id == 1 { 4 } else { TOKENS };
            assert_eq!(sequence.output, expected[..got], "{case}, sequence {}", sequence.id);
        }
    }
    simulator.expect_clean();
}

/// Part of a prompt: nothing of it comes to the host.
#[test]
fn the_end_of_a_step_that_samples_nothing_is_waited_for_on_one_gpu_and_on_two() {
    let Some(simulator) = crate::cuda::Simulator::new() else { return };
    simulator.control("devices=2");
    for devices in [&[0][..], &[0, 1]] {
        let gpus = CudaBackend::ranks(&crate::cuda::options(DType::F32), devices).unwrap();
        let mut ranks = load_ranks(gpus, &golden("qwen3"), &options(), TIMEOUT).unwrap().0;
        let mut sequence = Sequence::new(1, &PROMPT, SamplingParams::greedy());
        Pool::new(&ranks).cover(&mut sequence, PROMPT.len());
        let waited = || simulator.count("calls.cuEventSynchronize");
        let before = waited();
        ranks.begin(&StepPlan::new(vec![sequence.step(PROMPT.len() - 1)])).unwrap();
        assert_eq!(waited(), before, "to begin it waits for nothing");
        assert!(ranks.finish().unwrap().sequences.iter().all(|sequence| sequence.sampled.is_empty()));
        assert_eq!(waited() - before, devices.len() as u64);
    }
}

#[test]
fn quantised_checkpoints_say_on_ranks_what_they_say_on_one() {
    let fp8 = LoadOptions { dtype: Some(DType::F32), ..options() };
    ranks_say_what_one_says("deepseek-v3-fp8", &golden("deepseek-v3-fp8"), &fp8, &[2, 4]);
    for entry in std::fs::read_dir(folder("quantized")).unwrap().map(|entry| entry.unwrap().path()) {
        if !entry.join("config.json").exists() {
            continue;
        }
        let (files, name) = (Files::folder(entry.clone()).unwrap(), entry.display().to_string());
        let (mut one, report) = load(Reference::new(), &files, &options()).unwrap();
        let expected = told(&mut one, None, &PROMPT);
        for size in [2, 4] {
            let (mut ranks, of_ranks) = on(size, &files, &options());
            same(&told(&mut ranks, None, &PROMPT), &expected, &format!("{name} on {size} ranks"));
            conversions_agree(&of_ranks, &report, &name);
        }
    }
}

/// What is made at load is measured by each rank for its own part.
fn conversions_agree(of_ranks: &LoadReport, report: &LoadReport, what: &str) {
    assert_eq!(of_ranks.digest, report.digest, "{what}");
    assert_eq!(of_ranks.weight_bytes, report.weight_bytes, "{what}");
    assert_eq!(of_ranks.conversions.len(), report.conversions.len(), "{what}");
    for (actual, expected) in of_ranks.conversions.iter().zip(&report.conversions) {
        assert_eq!((&actual.tensor, actual.to), (&expected.tensor, expected.to), "{what}");
        assert_eq!(actual.max_abs_error, expected.max_abs_error, "{what}: {}", actual.tensor);
        let mean = expected.mean_abs_error;
        assert!((actual.mean_abs_error - mean).abs() <= 1e-5 * mean, "{what}: {actual:?}, {mean}");
    }
}

#[test]
fn weights_quantised_at_load_are_on_ranks_what_they_are_on_one() {
    for (case, form) in [
        ("llama-rope3", Quantization::Blocks(BlockFormat::Q8_0)),
        ("qwen3", Quantization::Int8),
        ("mistral-window", Quantization::Blocks(BlockFormat::Q4_0)),
        ("../abacus", Quantization::Int8),
    ] {
        let options = LoadOptions { quantization: Some(form), ..options() };
        let (mut one, report) = load(Reference::new(), &golden(case), &options).unwrap();
        let expected = told(&mut one, None, &PROMPT);
        let (mut ranks, of_ranks) = on(2, &golden(case), &options);
        same(&told(&mut ranks, None, &PROMPT), &expected, &format!("{case} as {form:?}"));
        conversions_agree(&of_ranks, &report, case);
    }
}

#[test]
fn blocks_of_gguf_say_on_ranks_what_they_say_on_one() {
    for case in ["llama-rope3-Q4_0", "qwen2-tied-Q8_0"] {
        let files = Files::at(folder("gguf").join(format!("{case}.gguf"))).unwrap();
        let (mut one, report) = load(Reference::new(), &files, &options()).unwrap();
        let prompt = &prompts(case.rsplit_once('-').unwrap().0)[0].ids;
        let expected = told(&mut one, None, prompt);
        for size in [2, 4] {
            let (mut ranks, of_ranks) = on(size, &files, &options());
            same(&told(&mut ranks, None, prompt), &expected, &format!("{case} on {size} ranks"));
            conversions_agree(&of_ranks, &report, case);
        }
    }
}

#[test]
fn adapters_change_on_ranks_what_they_change_on_one() {
    let options = LoadOptions { max_lora_rank: 16, ..options() };
    for name in ["llama-all", "mixtral-attention", "phi3-fused", "gemma2-mlp", "deepseek-v3"] {
        let base = json(folder("lora").join(name).join("golden.json"))["base"].as_str().unwrap().to_owned();
        let (mut one, _) = load(Reference::new(), &golden(&base), &options).unwrap();
        let adapter = one.adapter_loader().unwrap().load(&folder("lora").join(name)).unwrap();
        let prompt = &prompts(&format!("lora/{name}"))[0].ids;
        let (plain, expected) = (told(&mut one, None, prompt), told(&mut one, Some(&adapter), prompt));
        assert_ne!(plain[0].top, expected[0].top, "{name} changes something");
        for size in [2, 4] {
            let (mut ranks, _) = on(size, &golden(&base), &options);
            let on_ranks = ranks.adapter_loader().unwrap().load(&folder("lora").join(name)).unwrap();
            assert_eq!((on_ranks.digest(), on_ranks.bytes()), (adapter.digest(), adapter.bytes()));
            same(&told(&mut ranks, Some(&on_ranks), prompt), &expected, &format!("{name} on {size} ranks"));
            same(&told(&mut ranks, None, prompt), &plain, &format!("{base} on {size} ranks, beside {name}"));
        }
    }
}

/// The bundled model on a runner: so many tokens of its greedy answers to so many chats, and what it drafted on the way.
fn bundled_answers(runner: &mut dyn Runner, chats: usize, tokens: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    let golden = json(folder("../abacus/golden.json"));
    let answer = |chat: &serde_json::Value| {
        let prompt: Vec<u32> = serde_json::from_value(chat["prompt_ids"].clone()).unwrap();
        let mut expected: Vec<u32> = serde_json::from_value(chat["output_ids"].clone()).unwrap();
        expected.truncate(tokens);
        let mut sequence = Sequence::new(1, &prompt, SamplingParams::greedy());
        let (mut pool, mut drafts) = (Pool::new(runner), Vec::new());
        while sequence.tokens.len() < prompt.len() + expected.len() {
            let count = sequence.remaining();
            let end = sequence.num_computed + count;
            pool.cover(&mut sequence, end);
            let step = SequenceStep { propose: 1, ..sequence.step(count) };
            let output = runner.step(&StepPlan::new(vec![step])).unwrap().sequences.remove(0);
            sequence.num_computed += count;
            sequence.tokens.push(output.sampled[0].as_ref().unwrap().token);
            drafts.extend(output.proposed);
        }
        assert_eq!(sequence.tokens[prompt.len()..], expected);
        (expected, drafts)
    };
    golden["chats"].as_array().unwrap().iter().take(chats).map(answer).collect()
}

#[test]
fn the_bundled_model_answers_and_drafts_on_ranks_as_on_one() {
    let (files, options) = (golden("../abacus"), LoadOptions { mtp: true, ..options() });
    let all = |runner: &mut dyn Runner| bundled_answers(runner, usize::MAX, usize::MAX);
    let expected = all(&mut load(Reference::new(), &files, &options).unwrap().0);
    assert!(expected.iter().any(|(_, drafts)| !drafts.is_empty()));
    assert_eq!(all(&mut on(2, &files, &options).0), expected);
}

/// A rank that samples nothing has begun its part when the first waits for it, wherever the sums are.
#[test]
fn simulated_gpus_draft_together_with_sums_in_their_graphs_or_between_them() {
    let Some(simulator) = crate::cuda::Simulator::new() else { return };
    simulator.control("devices=2");
    let (files, options) = (golden("../abacus"), LoadOptions { mtp: true, ..options() });
    let few = |runner: &mut dyn Runner| bundled_answers(runner, 1, 4);
    let expected = few(&mut load(Reference::new(), &files, &options).unwrap().0);
    assert!(expected.iter().all(|(_, drafts)| drafts.len() == 4));
    for register in ["1", "0"] {
        // SAFETY: the simulator is one test's at a time, and nothing else of a test reads the environment meanwhile.
        unsafe { std::env::set_var("NCCL_GRAPH_REGISTER", register) };
        let gpus = CudaBackend::ranks(&crate::cuda::options(DType::F32), &[0, 1]).unwrap();
        let mut ranks = load_ranks(gpus, &files, &options, TIMEOUT).unwrap().0;
        assert!(!ranks.spec().steps_ahead);
        assert_eq!(few(&mut ranks), expected, "{register}");
    }
    // SAFETY: as above.
    unsafe { std::env::remove_var("NCCL_GRAPH_REGISTER") };
    simulator.expect_clean();
}

fn cpus(size: usize) -> Vec<CpuBackend> {
    CpuBackend::ranks(&CpuOptions { threads: 2, isa: None }, size, TIMEOUT).unwrap()
}

/// In f32, which no instruction set makes narrow.
#[test]
fn ranks_of_the_cpu_say_what_one_says_and_a_row_does_not_depend_on_the_others() {
    let options = LoadOptions { dtype: Some(DType::F32), ..options() };
    for case in ["qwen3-moe", "deepseek-v3"] {
        let prompts = prompts(case);
        let mut one = load(cpus(1).remove(0), &golden(case), &options).unwrap().0;
        let mut ranks = load_ranks(cpus(2), &golden(case), &options, TIMEOUT).unwrap().0;
        let alone: Vec<_> = prompts.iter().map(|prompt| told(&mut ranks, None, &prompt.ids)).collect();
        for (prompt, alone) in prompts.iter().zip(&alone) {
            same(alone, &told(&mut one, None, &prompt.ids), &format!("{case}, {}", prompt.name));
        }
        let logprobs = Some(ranks.spec().vocab_size as u32);
        let params = || SamplingParams { logprobs, ..SamplingParams::greedy() };
        let mut all: Vec<_> =
            (0..).zip(&prompts).map(|(id, prompt)| Sequence::new(id, &prompt.ids, params())).collect();
        let mut pool = Pool::new(&ranks);
        while all.iter().any(|sequence| sequence.output.len() < OUTPUT) {
            let count =
                |sequence: &Sequence| if sequence.output.len() < OUTPUT { sequence.remaining().min(29) } else { 0 };
            let counts: Vec<usize> = all.iter().map(count).collect();
            step(&mut ranks, &mut pool, &mut all, &counts);
        }
        assert!(all.iter().zip(&alone).all(|(together, alone)| together.output == *alone), "{case}");
    }
}

/// Two ranks, of which the second goes wrong as planned.
fn faulty(timeout: Duration) -> (Ranks<Faulty>, crate::faulty::Planned) {
    let (backends, planned) = crate::faulty::ranks(2, 1, timeout);
    (load_ranks(backends, &golden("qwen3"), &options(), timeout).unwrap().0, planned)
}

/// One step of a prompt, whose blocks are cleared behind it as an engine does.
fn attempt(runner: &mut dyn Runner, prompt: &[u32]) -> Result<u32, RunError> {
    let mut sequence = Sequence::new(1, prompt, SamplingParams::greedy());
    Pool::new(runner).cover(&mut sequence, prompt.len());
    let output = runner.step(&StepPlan::new(vec![sequence.step(prompt.len())]));
    let token = output.map(|output| output.sequences[0].sampled[0].as_ref().unwrap().token);
    runner.clear_blocks(&sequence.table, &[])?;
    token
}

#[test]
fn a_rank_that_fails_ends_the_step_by_its_own_error_and_the_next_step_works() {
    let prompt = &prompts("qwen3")[0].ids;
    let (mut ranks, planned) = faulty(TIMEOUT);
    let expected = attempt(&mut ranks, prompt).unwrap();
    for _ in 0..3 {
        *planned.lock().unwrap() = Some(Fault::Fail);
        let error = attempt(&mut ranks, prompt).unwrap_err().to_string();
        assert!(error.contains("gated_activation") && error.contains("as planned"), "{error}");
        assert_eq!(attempt(&mut ranks, prompt).unwrap(), expected);
    }
}

#[test]
fn a_rank_that_panics_panics_the_step_and_the_next_step_works() {
    let prompt = &prompts("qwen3")[0].ids;
    let (mut ranks, planned) = faulty(TIMEOUT);
    let expected = attempt(&mut ranks, prompt).unwrap();
    *planned.lock().unwrap() = Some(Fault::Panic);
    let step = std::panic::AssertUnwindSafe(|| attempt(&mut ranks, prompt));
    let panic = std::panic::catch_unwind(step).unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"as planned"));
    assert_eq!(attempt(&mut ranks, prompt).unwrap(), expected);
}

#[test]
fn a_rank_that_hangs_is_given_up_within_the_timeout_and_the_device_is_lost() {
    let prompt = &prompts("qwen3")[0].ids;
    let (mut ranks, planned) = faulty(Duration::from_millis(100));
    let (end, hangs) = mpsc::channel();
    *planned.lock().unwrap() = Some(Fault::Hang(hangs));
    for _ in 0..2 {
        let error = attempt(&mut ranks, prompt).unwrap_err().to_string();
        assert!(error.contains("lost") && error.contains("rank 1"), "{error}");
    }
    drop(ranks); // waits for nobody who hangs
    drop(end);
}

fn refused<B: Backend + LatentOps + CompressedOps>(backends: Vec<B>, files: &Files, options: &LoadOptions) -> String {
    match load_ranks(backends, files, options, TIMEOUT) {
        Err(error @ LoadError::Unsupported { .. }) => error.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was loaded"),
    }
}

#[test]
fn what_cannot_be_shared_out_is_refused_with_the_numbers_that_can() {
    let q4_k = Files::at(folder("gguf").join("llama-256-Q4_K_M.gguf")).unwrap();
    let int8 = LoadOptions { quantization: Some(Quantization::Int8), ..options() };
    for (files, options, size, reasons) in [
        (golden("qwen2-untied"), options(), 4, &["4 ranks", "6 attention heads", "ranks of 1, 2"][..]),
        (golden("qwen2-untied"), options(), 3, &["2 key/value heads", "224 columns"]),
        (golden("llama-rope3"), options(), 3, &["4 attention heads", "256 columns", "ranks of 1, 2, 4"]),
        (golden("../abacus"), options(), 4, &["6 attention heads", "ranks of 1, 2"]),
        (golden("mixtral"), options(), 8, &["8 ranks are more than the 5 experts"]),
        (q4_k, options(), 2, &["blocks of 256 columns", "has 256 columns", "ranks of 1"]),
        (
            golden("deepseek-v4"),
            options_of("deepseek-v4"),
            2,
            &["DeepseekV4ForCausalLM is computed on one rank", "ranks of 1"],
        ),
        (golden("deepseek-v2-lite"), int8, 4, &["blocks of 32 columns", "has 192 columns"]),
    ] {
        let told = refused(Reference::ranks(size, TIMEOUT), &files, &options);
        assert!(reasons.iter().all(|reason| told.contains(reason)), "{told}");
    }
}

/// What only one rank reads is found by one rank alone.
#[test]
fn a_weight_that_is_not_finite_is_refused_whichever_rank_has_it() {
    for expert in [0, 4] {
        let copy = Copy::of("mixtral");
        copy.edit_weights(|tensors| {
            let tensor = find(tensors, &format!("model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"));
            let last = tensor.data.len() - 2;
            tensor.data[last..].copy_from_slice(&0x7f80_u16.to_le_bytes());
        });
        let files = Files::folder(copy.path()).unwrap();
        let Err(error) = load_ranks(Reference::ranks(2, TIMEOUT), &files, &options(), TIMEOUT) else {
            panic!("loaded")
        };
        assert!(error.to_string().contains("must be finite"), "{error}");
    }
}
