//! A model in a share of a device's memory, on a simulated GPU: the cache fills what weights and steps leave, no step goes beyond
//! it, and what does not fit is refused with what would.

use std::sync::Arc;
use std::time::Duration;

use crate::common::folder;
use crate::cuda::Simulator;
use baton_device::{Backend, DType};
use baton_device_cuda::{CudaBackend, CudaOptions};
use baton_model::{
    Files, KvCacheSize, LoadError, LoadOptions, ModelRunner, Runner, SampleRequest, SamplingParams, SequenceStep,
    StepPlan, Tokens, load, load_ranks,
};

const TOTAL: u64 = 256 << 20;
/// What graphs take and what is rounded up is not more.
const LITTLE: u64 = 12 << 20;
const CONTEXT: usize = 1024;
const SEQUENCES: usize = 24;
const TOKENS: usize = 200;

fn files() -> Files {
    Files::folder(folder("qwen3-moe")).unwrap()
}

fn options(share: f64) -> LoadOptions {
    LoadOptions {
        max_model_len: Some(CONTEXT),
        max_step_tokens: TOKENS,
        max_step_sequences: SEQUENCES,
        kv_cache: KvCacheSize::Share(share),
        ..crate::common::options()
    }
}

fn gpu(simulator: &Simulator) -> CudaBackend {
    simulator.control(&format!("memory={TOTAL}"));
    simulator.open(DType::F32)
}

fn used(backend: &CudaBackend) -> u64 {
    let memory = backend.memory().unwrap().unwrap();
    assert_eq!(memory.total, TOTAL);
    memory.total - memory.free
}

/// Sequences with so many new tokens each, at the end of contexts as long as they may be, that all take the likeliest token.
fn run(runner: &mut ModelRunner<CudaBackend>, tokens: impl IntoIterator<Item = usize>) {
    let spec = runner.spec().clone();
    let sequence = |(i, tokens): (usize, usize)| SequenceStep {
        id: i as u64,
        num_computed: spec.max_model_len - tokens,
        tokens: Tokens::Known(vec![7; tokens]),
        draft: Vec::new(),
        block_table: (0..spec.max_model_len.div_ceil(spec.block_size))
            .map(|b| ((b + i) % spec.num_blocks) as u32)
            .collect(),
        passing_table: Vec::new(),
        adapter: None,
        sample: Some(SampleRequest {
            params: Arc::new(SamplingParams::greedy()),
            position: 0,
            history: Vec::new(),
            prompt_len: 0,
            masks: None,
        }),
        propose: 0,
        scores: Vec::new(),
    };
    let plan = StepPlan::new(tokens.into_iter().enumerate().map(sequence).collect());
    let output = runner.step(&plan).unwrap();
    assert!(output.sequences.iter().all(|output| output.sampled.iter().all(Result::is_ok)));
}

#[test]
fn the_cache_fills_the_share_and_the_largest_steps_take_nothing_more() {
    let Some(simulator) = Simulator::new() else { return };
    let share = 0.4;
    let allowed = (TOTAL as f64 * share) as u64;
    let (mut runner, report) = load(gpu(&simulator), &files(), &options(share)).unwrap();
    let most = SEQUENCES * CONTEXT / runner.spec().block_size;
    assert!(runner.spec().num_blocks < most, "the share is less than the cache can use");
    let taken = used(runner.backend());
    assert!((allowed - LITTLE..=allowed).contains(&taken), "{taken} of {allowed} bytes");
    assert!(report.kv_bytes > LITTLE);

    // Of serving alone: before there was a cache, others had its place.
    simulator.begin_anew();
    simulator.control(&format!("memory={TOTAL}"));
    let before = runner.backend().statistics();
    let largest = || (0..SEQUENCES).map(|i| if i == 0 { TOKENS - SEQUENCES + 1 } else { 1 });
    let spread = || (0..SEQUENCES).map(|_| TOKENS / SEQUENCES);
    for _ in 0..2 {
        run(&mut runner, vec![1; SEQUENCES]);
        run(&mut runner, vec![1; SEQUENCES - 3]);
        run(&mut runner, [TOKENS]);
        run(&mut runner, largest());
        run(&mut runner, spread());
        run(&mut runner, [1]);
    }
    let after = runner.backend().statistics();
    assert_eq!((after.allocations, after.allocated), (before.allocations, before.allocated));
    assert!(after.captures > before.captures, "graphs were made");
    let peak = simulator.count("bytes.peak.0");
    assert!(peak <= allowed, "{peak} of {allowed} bytes");
    drop(runner);
    simulator.expect_clean();
}

#[test]
fn a_share_that_is_a_little_too_small_is_refused_with_what_would_fit() {
    let Some(simulator) = Simulator::new() else { return };
    let attempt = |options: &LoadOptions| load(gpu(&simulator), &files(), options).map(|(runner, _)| runner);
    let number = |words: &str, before: &str| -> f64 {
        let (_, rest) = words.split_once(before).unwrap_or_else(|| panic!("{before:?} in {words}"));
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        rest[..end].parse().unwrap_or_else(|e| panic!("{before:?} in {words}: {e}"))
    };
    let refusal = |share: f64| match attempt(&options(share)) {
        Err(error @ LoadError::NoRoom { total: TOTAL, .. }) => error.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("{share} is enough"),
    };
    let enough = number(&refusal(0.265), "would fit: a share of ");
    // Less by half a context.
    let share = ((enough - 0.003) * 1000.0).round() / 1000.0;
    let words = refusal(share);
    let [used, before, loaded, scratch, graphs, spare, left] =
        ["bytes; ", "loaded: ", "before, ", "activations, ", "compute in; ", "of steps and ", "which leaves "]
            .map(|before| number(&words, before));
    assert_eq!(used, before + loaded + scratch, "{words}");
    assert_eq!((TOTAL as f64 * share).floor() - used - graphs - spare, left, "{words}");
    assert_eq!(number(&words, "would fit: a share of "), enough, "{words}");
    let fitting = number(&words, "or contexts of ") as usize;
    assert!((1..CONTEXT).contains(&fitting), "{words}");
    assert!(attempt(&options(enough)).is_ok(), "{words}");
    assert!(attempt(&LoadOptions { max_model_len: Some(fitting), ..options(share) }).is_ok(), "{words}");
}

#[test]
fn ranks_on_devices_with_different_room_have_the_blocks_that_all_have_room_for() {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("devices=2");
    let timeout = Duration::from_secs(300);
    let blocks = || {
        let gpus = CudaBackend::ranks(&crate::cuda::options(DType::F32), &[0, 1]).unwrap();
        let (mut ranks, _) = load_ranks(gpus, &files(), &options(0.55), timeout).unwrap();
        let blocks = ranks.spec().num_blocks;
        ranks.clear_blocks(&[blocks as u32 - 1], &[]).unwrap();
        blocks
    };
    simulator.control(&format!("memory={TOTAL}"));
    let even = blocks();
    let other = CudaBackend::new(&CudaOptions { device: 1, ..crate::cuda::options(DType::F32) }).unwrap();
    let _in_the_way = other.tensor(1 << 20, 2).unwrap();
    let uneven = blocks();
    assert!(uneven < even, "{uneven}, {even}");
}
