//! Five times as many calls as the server can answer, by the clock: what it answers in time stays what it was, what it accepts it
//! finishes, the rest is refused at once, and when it is over all is as before.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use baton_loadgen::{Call, CallError, LocalServer, Mode, Planned, Report, arrivals, closed_loop, run};
use serde_json::{Value, json};

use super::{Setting, record::Record, watched};
use crate::random_model;

const COMPLETIONS: &str = "/v1/completions";
/// So small that hundreds of calls end within a minute, so large that computing is what takes the time.
const MODEL: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 32000, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": true}"#;
/// Sequences that run at once, and those that may wait.
const RUNNING: usize = 16;
const WAITING: &str = "32";
const PROMPT: usize = 16;
const TOKENS: usize = 16;
const TIMES: f64 = 5.0;
/// At the begin, before what is counted is steady.
const WARM_UP: Duration = Duration::from_secs(10);
const PEAK_CALLS: usize = 600;

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let time = setting.time(5.0);
    ensure!(time > WARM_UP, "{time:?} end before anything counts, at {WARM_UP:?}");
    let binary = setting.binary()?;
    let model = setting.folder.join("model");
    if !model.exists() {
        random_model::folder(MODEL, model.clone())?;
    }
    let mut record = Record::new("overload");
    super::runtime()?.block_on(overload(&binary, &model, time, &mut record))?;
    record.finish(setting)
}

fn calls(seed: usize) -> impl Iterator<Item = Value> {
    // All different, so that nothing is cached.
    (seed..).map(|n| {
        let prompt: Vec<usize> = (0..PROMPT).map(|i| 1000 + (n * 7919 + i * 104_729) % 30_000).collect();
        json!({"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": true, "temperature": 0})
    })
}

async fn overload(binary: &Path, model: &Path, time: Duration, record: &mut Record) -> Result<()> {
    let model = model.to_str().context("a path in UTF-8")?;
    let running = RUNNING.to_string();
    // The load is made on the same machine: a core is left to it, or what it takes would count as the server's loss.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores - 1).max(1).to_string();
    let flags = [
        model,
        "--threads",
        &threads,
        "--max-num-seqs",
        &running,
        "--max-queued-requests",
        WAITING,
        "--handoff",
        "off",
    ];
    let server = watched::start(binary, &flags).await?;
    let peak = peak(&server, record).await?;
    let rate = peak.request_throughput;
    let objective = Duration::from_secs_f64(4.0 * peak.e2el.median_ms / 1e3);
    record.figure("capacity_calls_per_s", rate)?;
    record.figure("objective_ms", objective.as_secs_f64() * 1e3)?;
    server.idle(Duration::from_secs(10)).await?;
    let (before, descriptors) = (server.resident_mib()?, watched::entries(&server, "fd")?);
    let answered = successes(&server).await?;

    let count = (rate * TIMES * time.as_secs_f64()) as usize;
    let times = arrivals(count, rate * TIMES, 1.0, 1);
    let planned = calls(1 << 20).zip(times).map(|(body, at)| Planned { at, body, prompt_len: PROMPT as u64 });
    let load = baton_loadgen::Load {
        path: COMPLETIONS.into(),
        calls: planned.collect(),
        max_concurrency: None,
        mode: Mode::Streamed,
    };
    let watch = watched::Watch::begin(&server);
    let run = run(&server.client(), load, &Arc::default(), std::future::pending()).await;
    let seen = watch.end().await?;

    let good = run.calls.iter().filter(|call| {
        let end = |reply: &baton_loadgen::Reply| call.sent + reply.total;
        call.result.as_ref().is_ok_and(|reply| reply.total <= objective && (WARM_UP..time).contains(&end(reply)))
    });
    let goodput = good.count() as f64 / (time - WARM_UP).as_secs_f64();
    let [completed, refused, lost] = sorted(&run.calls);
    record.figure("minutes", time.as_secs_f64() / 60.0)?;
    record.figure("calls", run.calls.len())?;
    record.figure("completed", completed)?;
    record.figure("refused", refused)?;
    record.figure("goodput_calls_per_s", goodput)?;
    let share = goodput / rate;
    record.must(format!("goodput is {:.1} % of the peak (at least 95 %)", share * 100.0), share >= 0.95);
    record.must(format!("{lost} calls were neither completed nor refused"), lost == 0 && run.unfinished == 0);
    let ended = successes(&server).await? - answered;
    record.must(format!("the server ended {ended} requests, clients saw {completed} ends"), ended == completed as f64);
    record.figure("live_probes", seen.live.len())?;
    record.figure("live_median_ms", seen.quantiles().median_ms)?;
    seen.live_must_answer("overload", record);
    server.idle(Duration::from_secs(10)).await?;
    let after = server.resident_mib()?;
    record.figure("resident_mib_before_peak_after", [before, seen.peak_mib(), after])?;
    record.must(
        format!("memory grew by {:.1} MiB at most (64)", seen.peak_mib() - before),
        seen.peak_mib() - before < 64.0,
    );
    // The connections of the load are those that it had at most, and are closed when idle for 10 s.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let left = watched::entries(&server, "fd")?;
    record.must(format!("{descriptors} descriptors before, {left} after"), left <= descriptors + 2);
    Ok(())
}

/// The best of some numbers of calls in flight, none so large that a call that comes before the next of the queue runs is refused.
async fn peak(server: &LocalServer, record: &mut Record) -> Result<Report> {
    closed_loop(server.target(), COMPLETIONS, calls(0).take(4 * RUNNING).collect(), RUNNING, Mode::Streamed).await;
    let mut best: Option<Report> = None;
    for (round, concurrency) in [RUNNING, RUNNING * 3 / 2, 2 * RUNNING].into_iter().enumerate() {
        let bodies = calls((round + 1) << 16).take(PEAK_CALLS).collect();
        let report = closed_loop(server.target(), COMPLETIONS, bodies, concurrency, Mode::Streamed).await;
        ensure!(report.errors.is_empty(), "{} failed, the first: {}", report.errors.len(), report.errors[0]);
        record.figure(&format!("calls_per_s_of_{concurrency}_in_flight"), report.request_throughput)?;
        if best.as_ref().is_none_or(|best| best.request_throughput < report.request_throughput) {
            best = Some(report);
        }
    }
    best.context("some were tried")
}

async fn successes(server: &LocalServer) -> Result<f64> {
    server.metric("vllm:request_success_total").await
}

/// How many completed, were refused with 503, and neither.
fn sorted(calls: &[Call]) -> [usize; 3] {
    let mut counts = [0; 3];
    for call in calls {
        counts[match &call.result {
            Ok(_) => 0,
            Err(CallError::Status { status, .. }) if status.as_u16() == 503 => 1,
            Err(_) => 2,
        }] += 1;
    }
    counts
}
