//! `baton bench local`: prompts and decoding steps of a model in this process, without HTTP, engine or tokenizer, as
//! `llama-bench` runs them; beside each line the share of what the device does at most, measured just before.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use baton_device::{Limits, WeightFormat};
use baton_loadgen::median;
use baton_model::{LoadOptions, SampleRequest, SamplingParams, SequenceStep, StepPlan, Tokens};
use clap::Args;
use serde_json::{Value, json};

use super::args::{count, length};
use crate::{
    backend::{Device, DeviceOptions, Loaded},
    load, memory,
    settings::{Dtype, KvCacheDtype, Quantize},
};

/// What `baton bench local` takes; letters are those of `llama-bench`.
#[derive(Debug, Args)]
pub struct LocalArgs {
    /// Checkpoint folder or .gguf file, else an id as for `baton pull` [default: the bundled model]
    #[arg(value_name = "MODEL")]
    model: Option<String>,

    /// Device, as for `baton serve`
    #[arg(long, default_value = "cpu")]
    device: String,

    /// Tokens of a prompt; 0 for no prompts
    #[arg(short = 'p', long, value_name = "N,N,…", value_delimiter = ',', default_value = "512", value_parser = length)]
    n_prompt: Vec<usize>,

    /// Tokens of a prompt that a step computes [default: as `baton serve`]
    #[arg(long, value_name = "N", value_parser = count)]
    ubatch_size: Option<usize>,

    /// Tokens that each stream decodes; 0 for no decoding
    #[arg(short = 'n', long, value_name = "N,N,…", value_delimiter = ',', default_value = "128", value_parser = length)]
    n_gen: Vec<usize>,

    /// Streams that decode together
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1", value_parser = count)]
    streams: Vec<usize>,

    /// Tokens that are in the cache before
    #[arg(short = 'd', long, value_name = "N,N,…", value_delimiter = ',', default_value = "0", value_parser = length)]
    n_depth: Vec<usize>,

    /// Times that each test is run, after one that is not counted
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5, value_parser = count)]
    repetitions: usize,

    /// Compute threads of the host [default: all cores]
    #[arg(short = 't', long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,

    /// Precision in which weights are kept
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Dtype,

    /// Quantise linear weights at load
    #[arg(long, value_enum, value_name = "FORMAT")]
    quantize: Option<Quantize>,

    /// Precision in which the KV cache is kept
    #[arg(long, value_enum, default_value = "auto")]
    kv_cache_dtype: KvCacheDtype,

    /// Folder of a server's state, whose compiled kernels are taken and added to [default: kernels are compiled for this run]
    #[arg(long, value_name = "DIR", env = "BATON_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// One line: some sequences, each from `depth` tokens on.
#[derive(Debug, Clone, Copy)]
struct Test {
    prompt: bool,
    streams: usize,
    depth: usize,
    tokens: usize,
    /// Tokens per sequence and step.
    step: usize,
}

impl Test {
    /// As `llama-bench` names it.
    fn name(&self) -> String {
        let kind = if self.prompt { "pp" } else { "tg" };
        let mut name = format!("{kind}{}", self.tokens);
        if self.depth > 0 {
            let _ = write!(name, " @ d{}", self.depth);
        }
        if self.streams > 1 {
            let _ = write!(name, ", {} streams", self.streams);
        }
        name
    }

    /// Context before and tokens of each step.
    fn steps(&self) -> impl Iterator<Item = (usize, usize)> {
        let (depth, tokens, step) = (self.depth, self.tokens, self.step);
        (0..tokens).step_by(step).map(move |from| (depth + from, step.min(tokens - from)))
    }
}

/// Of a test, per second.
struct Rates {
    /// Tokens of all streams, of each run, ascending.
    tokens: Vec<f64>,
    /// Bytes of weights and cached keys and values, in the median run.
    bytes: f64,
    /// Multiply-adds with the weights, in the median run.
    mul_adds: f64,
}

impl Rates {
    fn median(&self) -> f64 {
        median(&self.tokens)
    }
}

/// Runs the command.
pub fn main(args: &LocalArgs) -> Result<()> {
    let kind = Device::parse(&args.device)?;
    let step_tokens = args.ubatch_size.unwrap_or_else(|| kind.step_tokens());
    let tests = args.tests(step_tokens);
    ensure!(!tests.is_empty(), "nothing to measure: -p and -n are 0");
    let longest = tests.iter().map(|t| t.depth + t.tokens).max().expect("not empty");
    let streams = tests.iter().map(|t| t.streams).max().expect("not empty");
    let (name, files) = load::files(args.model.as_deref())?;
    let options = LoadOptions {
        dtype: args.dtype.stored(),
        quantization: args.quantize.map(Into::into),
        max_model_len: Some(longest),
        max_step_tokens: step_tokens.max(streams),
        max_step_sequences: streams,
        kv_dtype: args.kv_cache_dtype.dtype(),
        kv_cache: kind.ample_cache(memory::available_bytes()),
        ..LoadOptions::default()
    };
    let device = DeviceOptions {
        threads: args.threads,
        kernels: args.state_dir.as_deref().map(load::kernels),
        ..DeviceOptions::default()
    };
    let limits = kind.limits(args.threads, &files, &options)?;
    let mut loaded = kind.load(device, &files, &options).with_context(|| format!("model {name}"))?;
    let mut results = Vec::new();
    for test in tests {
        let rates = run(&mut loaded, test, args.repetitions).with_context(|| test.name())?;
        results.push((test, rates));
    }
    let text = if args.json {
        serde_json::to_string_pretty(&as_json(&name, &loaded, limits.as_ref(), &results))? + "\n"
    } else {
        table(&name, &loaded, limits.as_ref(), &results)
    };
    io::stdout().write_all(text.as_bytes()).context("writing the table")
}

impl LocalArgs {
    fn tests(&self, step_tokens: usize) -> Vec<Test> {
        let mut tests = Vec::new();
        for &depth in &self.n_depth {
            let some = |lengths: &[usize]| lengths.iter().copied().filter(|&n| n > 0).collect::<Vec<_>>();
            tests.extend(some(&self.n_prompt).into_iter().map(|tokens| Test {
                prompt: true,
                streams: 1,
                depth,
                tokens,
                step: step_tokens,
            }));
            for tokens in some(&self.n_gen) {
                tests.extend(self.streams.iter().map(|&streams| Test {
                    prompt: false,
                    streams,
                    depth,
                    tokens,
                    step: 1,
                }));
            }
        }
        tests
    }
}

fn run(loaded: &mut Loaded, test: Test, repetitions: usize) -> Result<Rates> {
    let spec = loaded.runner.spec().clone();
    let blocks = (test.depth + test.tokens).div_ceil(spec.block_size);
    ensure!(
        blocks * test.streams <= spec.num_blocks,
        "{} cache blocks are needed, memory gives {}",
        blocks * test.streams,
        spec.num_blocks
    );
    // Of what passes each stream takes its part in turn: more than a step reaches.
    let passing = spec.passing.map(|passing| passing.num_blocks / test.streams);
    let mut once = || -> Result<f64> {
        let start = Instant::now();
        for (context, tokens) in test.steps() {
            let sequence = |s: usize| SequenceStep {
                id: s as u64,
                num_computed: context,
                // What they are does not matter for speed, nor does what the cache holds.
                tokens: Tokens::Known(
                    (0..tokens).map(|i| ((s * 7919 + (context + i) * 104_729) % spec.vocab_size) as u32).collect(),
                ),
                draft: Vec::new(),
                block_table: (s * blocks..(s + 1) * blocks).map(|b| b as u32).collect(),
                passing_table: passing
                    .map_or(Vec::new(), |slots| (0..blocks).map(|b| (s * slots + b % slots) as u32).collect()),
                sample: Some(SampleRequest {
                    params: Arc::new(SamplingParams::greedy()),
                    position: 0,
                    history: Vec::new(),
                    prompt_len: 1,
                    masks: None,
                }),
                adapter: None,
                propose: 0,
                scores: Vec::new(),
            };
            loaded.runner.step(&StepPlan::new((0..test.streams).map(sequence).collect()))?;
        }
        Ok(start.elapsed().as_secs_f64())
    };
    once()?;
    let mut seconds = (0..repetitions).map(|_| once()).collect::<Result<Vec<f64>>>()?;
    seconds.sort_by(|a, b| b.total_cmp(a));
    let all = (test.tokens * test.streams) as f64;
    let mut rates = Rates { tokens: seconds.iter().map(|seconds| all / seconds).collect(), bytes: 0.0, mul_adds: 0.0 };
    let seconds = all / rates.median();
    let report = &loaded.report;
    let cached = (report.kv_bytes - report.passing_bytes) as f64 / (spec.num_blocks * spec.block_size) as f64;
    for (context, tokens) in test.steps() {
        let rows = tokens * test.streams;
        rates.mul_adds += report.step_cost.mul_adds(rows, test.streams) / seconds;
        let cache = cached * ((context + tokens) * test.streams) as f64;
        rates.bytes += (report.step_cost.bytes(rows, test.streams) + cache) / seconds;
    }
    Ok(rates)
}

/// What the weights are multiplied as, and how many of that the device does at most.
fn peak<'a>(loaded: &Loaded, limits: &'a Limits) -> (&'a str, f64) {
    let narrow = |wanted: fn(&WeightFormat) -> bool| {
        loaded.report.weight_formats.intersection(&loaded.caps.narrow_activations).any(wanted)
    };
    let blocks = narrow(|f| matches!(f, WeightFormat::Ggml(_))).then(|| "int8".to_owned());
    let halves = narrow(|f| *f == WeightFormat::BF16).then(|| "bf16".to_owned());
    let kinds = [blocks, halves, Some(loaded.caps.activations.to_string())];
    let mut known = kinds.iter().flatten().filter_map(|kind| limits.mul_adds.get_key_value(kind));
    known.next().map(|(kind, rate)| (&**kind, *rate)).expect("the type of activations is measured")
}

/// Shares of the limits on bytes and on multiply-adds; `None` where these are not known.
fn shares(loaded: &Loaded, limits: Option<&Limits>, rates: &Rates) -> [Option<f64>; 2] {
    let share = |of: &dyn Fn(&Limits) -> f64| limits.map(of);
    [share(&|limits| rates.bytes / limits.bytes), share(&|limits| rates.mul_adds / peak(loaded, limits).1)]
}

fn table(name: &str, loaded: &Loaded, limits: Option<&Limits>, results: &[(Test, Rates)]) -> String {
    let formats: Vec<String> = loaded.report.weight_formats.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "{name}, {} ({:.2} GB of weights), {} ({}) with {} threads\n",
        formats.join("+"),
        loaded.report.weight_bytes as f64 / 1e9,
        loaded.caps.device,
        loaded.caps.isa,
        loaded.caps.threads,
    );
    let access = match limits {
        None => "limit",
        Some(limits) => {
            let (kind, peak) = peak(loaded, limits);
            let (bytes, operations) = (limits.bytes / 1e9, 2.0 * peak / 1e9);
            let _ = writeln!(text, "limits measured: {bytes:.1} GB/s {}, {kind} {operations:.0} GOP/s", limits.access);
            limits.access
        }
    };
    let _ = writeln!(text, "\n| test | tok/s | min – max | GB/s | of {access} | GOP/s | of peak |");
    text += "|---|---|---|---|---|---|---|\n";
    for (test, rates) in results {
        let shares = shares(loaded, limits, rates);
        let [bytes, mul_adds] = shares.map(|share| share.map_or("-".to_owned(), |s| format!("{:.0} %", 100.0 * s)));
        let _ = writeln!(
            text,
            "| {} | {:.2} | {:.2} – {:.2} | {:.1} | {bytes} | {:.0} | {mul_adds} |",
            test.name(),
            rates.median(),
            rates.tokens[0],
            rates.tokens[rates.tokens.len() - 1],
            rates.bytes / 1e9,
            2.0 * rates.mul_adds / 1e9,
        );
    }
    text
}

fn as_json(name: &str, loaded: &Loaded, limits: Option<&Limits>, results: &[(Test, Rates)]) -> Value {
    let result = |(test, rates): &(Test, Rates)| {
        let [bytes, mul_adds] = shares(loaded, limits, rates);
        json!({
            "test": test.name(),
            "n_prompt": if test.prompt { test.tokens } else { 0 },
            "n_gen": if test.prompt { 0 } else { test.tokens },
            "n_depth": test.depth,
            "streams": test.streams,
            "median_ts": rates.median(),
            "samples_ts": rates.tokens,
            "bytes_per_s": rates.bytes,
            "share_of_bytes": bytes,
            "mul_adds_per_s": rates.mul_adds,
            "share_of_peak": mul_adds,
        })
    };
    let limits = limits.map(|limits| {
        json!({
            "bytes_per_s": limits.bytes,
            "access": limits.access,
            "mul_adds_per_s": limits.mul_adds,
            "peak": peak(loaded, limits).0,
        })
    });
    json!({
        "model": name,
        "weights": loaded.report.weight_formats.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "weight_bytes": loaded.report.weight_bytes,
        "device": loaded.caps.device,
        "isa": loaded.caps.isa,
        "n_threads": loaded.caps.threads,
        "limits": limits,
        "results": results.iter().map(result).collect::<Vec<_>>(),
    })
}
