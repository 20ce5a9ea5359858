//! Tokens per second of one checkpoint on the CPU: a prompt in one step, then decoding steps of some sequences.
//!
//! `cargo run --release -p baton-model --example speed -- CHECKPOINT [--quantize q8_0|q4_0] [--threads N]
//! [--prompt N] [--decode N] [--batch B,B,…]`
//!
//! Each line has tokens per second of the clock and, as if it had the machine for itself, of the processor time that was
//! spent, and how many bytes of weights that is.

#![allow(clippy::print_stdout, missing_docs)]

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_device::BlockFormat;
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{
    Files, KvCacheSize, LoadOptions, ModelRunner, Runner, SampleRequest, SamplingParams, SequenceStep, StepPlan, load,
};
use rustix::time::{ClockId, clock_gettime};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("which checkpoint?")?;
    let (mut quantization, mut threads, mut prompt, mut decode, mut batches) = (None, 1, 512, 32, vec![1, 4, 8, 16]);
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag} wants a value"))?;
        match flag.as_str() {
            "--quantize" => {
                let made = BlockFormat::ALL.into_iter().filter(|f| f.can_be_made());
                let found = made.clone().find(|f| f.name().eq_ignore_ascii_case(&value));
                let names: Vec<_> = made.map(BlockFormat::name).collect();
                quantization = Some(found.ok_or_else(|| format!("{value}: one of {}", names.join(", ")))?);
            }
            "--threads" => threads = value.parse()?,
            "--prompt" => prompt = value.parse()?,
            "--decode" => decode = value.parse()?,
            "--batch" => batches = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            _ => return Err(format!("{flag}: --quantize, --threads, --prompt, --decode or --batch").into()),
        }
    }
    let most = batches.iter().copied().max().unwrap_or(1);
    let options = LoadOptions {
        quantization,
        max_model_len: Some(prompt + decode + 1),
        max_step_tokens: prompt.max(most),
        max_step_sequences: most,
        kv_cache: KvCacheSize::AtMost(4 << 30),
        ..LoadOptions::default()
    };
    let backend = CpuBackend::new(&CpuOptions { threads, isa: None })?;
    let (mut runner, report) = load(backend, &Files::at(&path)?, &options)?;
    println!("{threads} threads, {:.3} GB of weights", report.weight_bytes as f64 / 1e9);

    if prompt > 0 {
        let best = (0..3).map(|_| timed(1, |_| step(&mut runner, 1, 0, prompt))).min_by_key(|t| t[1]).expect("three");
        line(&format!("prompt of {prompt}"), prompt, 0, best);
    }
    for batch in batches {
        // What the cache holds does not matter for speed.
        let context = prompt.max(1);
        let time = timed(decode, |i| step(&mut runner, batch, context + i, 1));
        line(&format!("{batch} streams at {context}"), batch * decode, decode as u64 * report.weight_bytes, time);
    }
    Ok(())
}

/// Computes `tokens` tokens from position `start` on for each of some sequences, and what follows them.
fn step(runner: &mut ModelRunner<CpuBackend>, sequences: usize, start: usize, tokens: usize) {
    let blocks = (start + tokens).div_ceil(runner.spec().block_size);
    let vocab = runner.spec().vocab_size;
    let available = runner.spec().num_blocks;
    let sequence = |s: usize| SequenceStep {
        id: s as u64,
        num_computed: start,
        tokens: (0..tokens).map(|i| ((s * 7919 + (start + i) * 104_729) % vocab) as u32).collect(),
        draft: Vec::new(),
        propose: 0,
        block_table: (0..blocks).map(|b| ((s * blocks + b) % available) as u32).collect(),
        sample: Some(SampleRequest {
            params: Arc::new(SamplingParams::greedy()),
            position: 0,
            history: vec![],
            prompt_len: 1,
        }),
        adapter: None,
    };
    runner.step(&StepPlan { sequences: (0..sequences).map(sequence).collect() }).expect("a step");
}

/// Time of the clock and of all threads, for `times` calls.
fn timed(times: usize, mut f: impl FnMut(usize)) -> [Duration; 2] {
    let processor = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let (clock, spent) = (Instant::now(), processor());
    (0..times).for_each(&mut f);
    [clock.elapsed(), processor() - spent]
}

fn line(what: &str, tokens: usize, bytes: u64, [clock, spent]: [Duration; 2]) {
    let per = |time: Duration| tokens as f64 / time.as_secs_f64();
    let gigabytes = bytes as f64 / spent.as_secs_f64() / 1e9;
    println!("{what:>20}: {:9.2} tok/s, {:9.2} by processor time, {gigabytes:6.1} GB/s", per(clock), per(spent));
}
