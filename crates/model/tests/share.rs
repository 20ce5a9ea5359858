//! A model in a share of a device's memory, on a simulated GPU: the cache fills what weights and steps leave, no step goes beyond
//! it, and what does not fit is refused with what would.

mod common;
#[path = "../../device-cuda/tests/common/mod.rs"]
mod cuda;

use std::sync::Arc;
use std::time::Duration;

use baton_device::{Backend, DType};
use baton_device_cuda::{CudaBackend, CudaOptions};
use baton_model::{
    Files, KvCacheSize, LoadError, LoadOptions, ModelRunner, Runner, SampleRequest, SamplingParams, SequenceStep,
    StepPlan, load, load_ranks,
};
use common::folder;
use cuda::Simulator;

const TOTAL: u64 = 256 << 20;
/// What nothing here takes, and what the cache may be short of.
const LITTLE: u64 = 8 << 20;
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
        ..common::options()
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
        tokens: vec![7; tokens],
        draft: Vec::new(),
        block_table: (0..spec.max_model_len.div_ceil(spec.block_size))
            .map(|b| ((b + i) % spec.num_blocks) as u32)
            .collect(),
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
    let plan = StepPlan { sequences: tokens.into_iter().enumerate().map(sequence).collect() };
    let output = runner.step(&plan).unwrap();
    assert!(output.sequences.iter().all(|output| output.sampled.iter().all(Result::is_ok)));
}

#[test]
fn the_cache_fills_the_share_and_the_largest_steps_take_nothing_more() {
    let Some(simulator) = Simulator::new() else { return };
    let share = 0.55;
    let allowed = (TOTAL as f64 * share) as u64;
    let (mut runner, report) = load(gpu(&simulator), &files(), &options(share)).unwrap();
    let most = SEQUENCES * CONTEXT / runner.spec().block_size;
    assert!(runner.spec().num_blocks < most, "the share is less than the cache can use");
    let taken = used(runner.backend());
    assert!((allowed - LITTLE..=allowed).contains(&taken), "{taken} of {allowed} bytes");
    assert!(report.kv_bytes > LITTLE);

    let before = runner.backend().statistics();
    let largest = || (0..SEQUENCES).map(|i| if i == 0 { TOKENS - SEQUENCES + 1 } else { 1 });
    let spread = || (0..SEQUENCES).map(|_| TOKENS / SEQUENCES);
    for _ in 0..3 {
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
    // What is taken without a cache, and a part of one context.
    let share = {
        let bytes = KvCacheSize::Bytes(2 << 20);
        let runner = attempt(&LoadOptions { kv_cache: bytes, ..options(1.0) }).unwrap();
        ((used(runner.backend()) + (2 << 20)) as f64 / TOTAL as f64 * 1000.0).floor() / 1000.0
    };
    let Err(error @ LoadError::NoRoom { total: TOTAL, .. }) = attempt(&options(share)) else {
        panic!("{share} is enough")
    };
    let words = error.to_string();
    let number = |before: &str| -> f64 {
        let (_, rest) = words.split_once(before).unwrap_or_else(|| panic!("{before:?} in {words}"));
        rest.split([' ', ',', ';']).next().unwrap().parse().unwrap_or_else(|e| panic!("{before:?} in {words}: {e}"))
    };
    let parts =
        ["with the weights loaded: ", "before, ", "activations, ", "compute in; ", "steps and ", "which leaves "];
    let parts = parts.map(number);
    let allowed = (TOTAL as f64 * share).floor();
    assert_eq!(allowed - parts[..5].iter().sum::<f64>(), parts[5], "{words}");
    let (enough, fitting) = (number("would fit: a share of "), number("or contexts of ") as usize);
    assert!(enough > share && enough < share + 0.02 && (1..CONTEXT).contains(&fitting), "{words}");
    assert!(attempt(&options(enough)).is_ok(), "{words}");
    assert!(attempt(&LoadOptions { max_model_len: Some(fitting), ..options(share) }).is_ok(), "{words}");
    assert!(attempt(&options(enough - 0.002)).is_err(), "{words}");
}

#[test]
fn ranks_on_devices_with_different_room_have_the_blocks_that_all_have_room_for() {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("devices=2");
    let timeout = Duration::from_secs(300);
    let blocks = || {
        let gpus = CudaBackend::ranks(&cuda::options(DType::F32), &[0, 1]).unwrap();
        let (mut ranks, _) = load_ranks(gpus, &files(), &options(0.55), timeout).unwrap();
        let blocks = ranks.spec().num_blocks;
        ranks.clear_blocks(&[blocks as u32 - 1]).unwrap();
        blocks
    };
    simulator.control(&format!("memory={TOTAL}"));
    let even = blocks();
    let other = CudaBackend::new(&CudaOptions { device: 1, ..cuda::options(DType::F32) }).unwrap();
    let _in_the_way = other.tensor(1 << 20, 2).unwrap();
    let uneven = blocks();
    assert!(uneven < even, "{uneven}, {even}");
}
