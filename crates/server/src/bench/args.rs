//! What `baton bench` is told, and the calls that this means.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use baton_loadgen::{Endpoint, Form, Load, Mode, Objectives, Prompt, Random, Request, arrivals, read_requests};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use super::local::LocalArgs;
use crate::settings::Secret;

/// What `baton bench` takes.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Without --request-rate all calls arrive at once and --max-concurrency of them are in flight: a \
    closed loop. With it they arrive by the clock, however slow the server is; latencies count from sending, and what \
    --max-concurrency held back before that is printed as queueing. Ctrl-C ends the run and reports what \
    was measured until then."
)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub local: Option<Local>,

    /// The server, http://HOST:PORT
    #[arg(long, visible_alias = "url", value_name = "URL", default_value = "http://127.0.0.1:8000", value_parser = base_url)]
    pub base_url: String,

    /// Route to call
    #[arg(long, value_enum, default_value_t = Route::Completions)]
    pub endpoint: Route,

    /// Model to ask for; the first that the server lists, if not given
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,

    /// Sent as bearer token
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    pub api_key: Option<Secret>,

    /// Calls to make; of a file at most its lines
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = count)]
    pub num_prompts: usize,

    /// Calls in flight at most; no limit if not given
    #[arg(long, value_name = "N", value_parser = count)]
    pub max_concurrency: Option<usize>,

    /// Calls per second, or `inf`: all at once
    #[arg(long, value_name = "R", default_value = "inf", value_parser = positive)]
    pub request_rate: f64,

    /// Shape of the intervals between calls: 1 is a Poisson process, less comes in bursts, more is more even
    #[arg(long, value_name = "B", default_value = "1", value_parser = positive)]
    pub burstiness: f64,

    /// Decides prompts and arrival times; used again on one server, it finds a warm prefix cache. A sweep counts on from it
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Calls made before the run and not measured, all with its first prompt
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub num_warmups: usize,

    /// Where prompts come from: made at random, or the lines of --dataset-path
    #[arg(long, value_enum, default_value_t = Dataset::Random)]
    pub dataset_name: Dataset,

    /// JSON lines, {"prompt": text or ids, "output_len": n, "timestamp": seconds}; the last two may be absent. With
    /// timestamps and no --request-rate, calls arrive at them
    #[arg(long, value_name = "FILE", required_if_eq("dataset_name", "custom"))]
    pub dataset_path: Option<PathBuf>,

    /// Tokens to generate where a line does not say
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub custom_output_len: u32,

    /// Tokens of a random prompt, after the shared prefix
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = count)]
    pub random_input_len: usize,

    /// Tokens to generate for a random prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub random_output_len: u32,

    /// Tokens that all random prompts begin with
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = length)]
    pub random_prefix_len: usize,

    /// Generate the full length, past the end token; always so for random prompts
    #[arg(long)]
    pub ignore_eos: bool,

    /// Sampling temperature; the server's own default if not given
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,

    /// A JSON object whose fields every body has besides, in place of what is sent otherwise: {"response_format": …}
    #[arg(long, value_name = "JSON", value_parser = object)]
    pub extra_body: Option<Map<String, Value>>,

    /// Limits in milliseconds that a good call keeps: any of ttft:MS tpot:MS e2el:MS
    #[arg(long, value_name = "NAME:MS", num_args = 1.., value_parser = objective)]
    pub goodput: Vec<(Latency, Duration)>,

    /// Run once with each of these as --max-concurrency, and write a CSV and an HTML page with plots
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = count, conflicts_with = "max_concurrency")]
    pub sweep: Vec<usize>,

    /// Where the sweep goes: FILE.csv and FILE.html
    #[arg(long, value_name = "FILE", default_value = "bench")]
    pub sweep_output: PathBuf,

    /// Write the figures to this file as JSON (of a sweep an array), in the fields of `vllm bench serve`
    #[arg(long, value_name = "FILE")]
    pub save_result: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Local {
    /// Run a model in this process, as `llama-bench` does, beside what the machine can read and compute
    Local(LocalArgs),
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Route {
    #[value(name = "/v1/completions", alias = "completions")]
    Completions,
    #[value(name = "/v1/chat/completions", alias = "chat")]
    Chat,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum Dataset {
    Random,
    Custom,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Latency {
    Ttft,
    Tpot,
    E2el,
}

/// An address without the path of a route.
pub fn base_url(text: &str) -> Result<String, String> {
    let base = text.trim_end_matches('/');
    let host = base.strip_prefix("http://").filter(|host| !host.is_empty());
    host.ok_or("expected http://HOST:PORT; https is not spoken")?;
    if base.ends_with("/v1") {
        return Err("expected http://HOST:PORT without the /v1 that --endpoint begins with".into());
    }
    Ok(base.to_owned())
}

/// Enough for any run, small enough to hold.
const MAX_COUNT: usize = 10_000_000;

/// A number of calls or tokens.
pub fn length(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n <= MAX_COUNT).ok_or_else(|| format!("expected 0 to {MAX_COUNT}"))
}

/// As [`length`], and not 0.
pub fn count(text: &str) -> Result<usize, String> {
    length(text).ok().filter(|&n| n > 0).ok_or_else(|| format!("expected 1 to {MAX_COUNT}"))
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|&x: &f64| x > 0.0).ok_or_else(|| "expected a number above 0, or inf".into())
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|_| "expected a JSON object".into())
}

fn objective(text: &str) -> Result<(Latency, Duration), String> {
    let expected = "expected ttft:MS, tpot:MS or e2el:MS";
    let (name, ms) = text.split_once(':').ok_or(expected)?;
    let latency = match name {
        "ttft" => Latency::Ttft,
        "tpot" => Latency::Tpot,
        "e2el" => Latency::E2el,
        _ => return Err(expected.into()),
    };
    let seconds: f64 = ms.parse::<f64>().map_err(|_| expected)? / 1e3;
    Duration::try_from_secs_f64(seconds).map(|limit| (latency, limit)).map_err(|_| expected.into())
}

impl BenchArgs {
    /// What is called.
    pub fn endpoint(&self) -> Endpoint {
        match self.endpoint {
            Route::Completions => Endpoint::Completions,
            Route::Chat => Endpoint::Chat,
        }
    }

    /// What `--goodput` asks for.
    pub fn objectives(&self) -> Objectives {
        let limit = |of: Latency| self.goodput.iter().filter(|(l, _)| *l == of).map(|(_, limit)| *limit).min();
        Objectives { ttft: limit(Latency::Ttft), tpot: limit(Latency::Tpot), e2el: limit(Latency::E2el) }
    }

    /// The runs to make: concurrency and seed. Each has prompts of its own, lest it find those of the last in a cache.
    pub fn steps(&self) -> Vec<(Option<usize>, u64)> {
        let seeds = (0..).map(|i| self.seed.wrapping_add(i));
        match self.sweep.as_slice() {
            [] => vec![(self.max_concurrency, self.seed)],
            sweep => sweep.iter().copied().map(Some).zip(seeds).collect(),
        }
    }

    /// The calls of one run. `form` is how random prompts are written.
    pub fn load(&self, model: &str, form: Option<Form>, max_concurrency: Option<usize>, seed: u64) -> Result<Load> {
        let requests = match form {
            Some(form) => {
                let random = Random {
                    input_len: self.random_input_len,
                    output_len: self.random_output_len,
                    prefix_len: self.random_prefix_len,
                    seed,
                };
                random.requests(self.num_prompts, form)
            }
            None => self.replayed()?,
        };
        let mut extra = Vec::new();
        if self.ignore_eos || form.is_some() {
            extra.push(("ignore_eos", json!(true)));
        }
        extra.extend(self.temperature.map(|t| ("temperature", json!(t))));
        extra.extend(self.extra_body.iter().flatten().map(|(name, value)| (name.as_str(), value.clone())));
        let times = arrivals(requests.len(), self.request_rate, self.burstiness, seed);
        let timed = self.request_rate.is_infinite();
        let planned = |(request, time): (&Request, Duration)| {
            request.planned(self.endpoint(), model, request.at.filter(|_| timed).unwrap_or(time), &extra)
        };
        let calls = requests.iter().zip(times).map(planned).collect();
        Ok(Load { path: self.endpoint().path().to_owned(), calls, max_concurrency, mode: Mode::Streamed })
    }

    fn replayed(&self) -> Result<Vec<Request>> {
        let file = self.dataset_path.as_ref().context("--dataset-name custom wants --dataset-path FILE")?;
        let mut requests = read_requests(file, self.custom_output_len)?;
        requests.truncate(self.num_prompts);
        let ids = requests.iter().any(|r| matches!(r.prompt, Prompt::Ids(_)));
        ensure!(!ids || self.endpoint() == Endpoint::Completions, "--endpoint chat takes text, not token ids");
        Ok(requests)
    }

    /// How the run was made, in the fields of `vllm bench serve`.
    pub fn json(&self, model: &str, form: Option<Form>, seed: u64) -> Map<String, Value> {
        let rate = if self.request_rate.is_finite() { json!(self.request_rate) } else { json!("inf") };
        let backend = match self.endpoint {
            Route::Completions => "openai",
            Route::Chat => "openai-chat",
        };
        let setup = json!({
            "date": chrono::Local::now().format("%Y%m%d-%H%M%S").to_string(),
            "endpoint_type": backend,
            "backend": backend,
            "label": null,
            "model_id": model,
            "tokenizer_id": null,
            "request_rate": rate,
            "burstiness": if self.burstiness.is_finite() { json!(self.burstiness) } else { json!("inf") },
            "seed": seed,
            "prompts": form.map_or("from a file", Form::name),
            "extra_body": self.extra_body,
        });
        let Value::Object(setup) = setup else { unreachable!("written above as an object") };
        setup
    }
}
