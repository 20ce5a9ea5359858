//! `baton bench`: loads a server and prints what it gave. The table goes to standard output, progress and remarks to
//! standard error. Flags are named as in `vllm bench serve` where both have one. `baton bench local` measures a model
//! without a server.

mod args;
mod local;

use std::{
    fs,
    io::{self, Write},
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use baton_loadgen::{Client, Form, Live, Load, Objectives, Report, Target, run, sweep};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

pub use args::{BenchArgs, base_url};
use args::{Dataset, Local};

/// Runs the command.
pub fn main(args: &BenchArgs) -> Result<()> {
    if let Some(Local::Local(args)) = &args.local {
        return local::main(args);
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(bench(args))
}

async fn bench(args: &BenchArgs) -> Result<()> {
    let stop = stop_on_interrupt()?;
    let api_key = args.api_key.as_ref().map(|key| key.0.clone());
    let client = Client::new(Target { base: args.base_url.clone(), api_key });
    let (model, form) = tokio::select! {
        prepared = prepare(args, &client) => prepared?,
        () = stop.cancelled() => bail!("interrupted before the run began"),
    };
    let mut reports = Vec::new();
    for (concurrency, seed) in args.steps() {
        let load = args.load(&model, form, concurrency, seed)?;
        warm_up(&client, &load, args.num_warmups, &stop).await;
        let report = measure(&client, load, args.objectives(), &stop).await;
        show(&report)?;
        reports.push(report);
        if stop.is_cancelled() {
            break;
        }
    }
    save(args, &model, form, &reports)?;
    ensure!(stop.is_cancelled() || reports.iter().all(|r| r.completed > 0), "no call ended well");
    Ok(())
}

/// The model, and how random prompts of it are written; none for those of a file.
async fn prepare(args: &BenchArgs, client: &Client) -> Result<(String, Option<Form>)> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(client).await?,
    };
    let form = match args.dataset_name {
        Dataset::Random => Some(Form::ask(client, args.endpoint(), &model).await),
        Dataset::Custom => None,
    };
    Ok((model, form))
}

fn save(args: &BenchArgs, model: &str, form: Option<Form>, reports: &[Report]) -> Result<()> {
    let write =
        |file: &Path, text: String| fs::write(file, text).with_context(|| format!("writing {}", file.display()));
    if let Some(file) = &args.save_result {
        let result = |(report, (_, seed)): (&Report, (Option<usize>, u64))| {
            let mut result = args.json(model, form, seed);
            result.insert("num_prompts".into(), json!(report.planned()));
            result.extend(report.json());
            Value::Object(result)
        };
        let mut results: Vec<Value> = reports.iter().zip(args.steps()).map(result).collect();
        let result = if args.sweep.is_empty() { results.remove(0) } else { results.into() };
        write(file, serde_json::to_string_pretty(&result)? + "\n")?;
    }
    if !args.sweep.is_empty() {
        let title = format!("{model} at {}", args.base_url);
        write(&args.sweep_output.with_extension("csv"), sweep::csv(reports))?;
        write(&args.sweep_output.with_extension("html"), sweep::html(&title, reports))?;
    }
    Ok(())
}

async fn first_model(client: &Client) -> Result<String> {
    let (status, body) = client.get("/v1/models").await.context("asking for the models; is the server up?")?;
    ensure!(status.is_success(), "/v1/models: {status}: {body}");
    let models: Value = serde_json::from_str(&body).context("/v1/models")?;
    match models["data"][0]["id"].as_str() {
        Some(model) => Ok(model.to_owned()),
        None => bail!("/v1/models lists no model; name one with --model"),
    }
}

/// Cancelled by Ctrl-C; a second one ends the process at once.
fn stop_on_interrupt() -> Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        interrupt.recv().await;
        token.cancel();
        interrupt.recv().await;
        std::process::exit(130);
    });
    Ok(stop)
}

async fn warm_up(client: &Client, load: &Load, n: usize, stop: &CancellationToken) {
    let Some(first) = load.calls.first().filter(|_| n > 0) else { return };
    let mut calls = vec![first.clone(); n];
    calls.iter_mut().for_each(|call| call.at = Duration::ZERO);
    let warmups = Load { calls, ..load.clone() };
    run(client, warmups, &Arc::default(), stop.cancelled()).await;
}

/// Makes the calls with a progress line, if a terminal is there.
async fn measure(client: &Client, load: Load, objectives: Objectives, stop: &CancellationToken) -> Report {
    let style = "{bar:30} {pos}/{len} {elapsed}, {msg}";
    let style = ProgressStyle::with_template(style).expect("a valid template");
    let bar = ProgressBar::new(load.calls.len() as u64).with_style(style);
    let live = Arc::new(Live::default());
    let shown = tokio::spawn({
        let (bar, live) = (bar.clone(), live.clone());
        async move {
            loop {
                tokio::time::sleep(Duration::from_millis(200)).await;
                let [sent, completed, failed, chunks] =
                    [&live.sent, &live.completed, &live.failed, &live.chunks].map(|n| n.load(Relaxed));
                let rate = chunks as f64 / bar.elapsed().as_secs_f64();
                let in_flight = sent.saturating_sub(completed + failed);
                bar.set_position(completed + failed);
                bar.set_message(format!("{in_flight} in flight, {failed} failed, {rate:.1} chunks/s"));
            }
        }
    });
    let max_concurrency = load.max_concurrency;
    let run = run(client, load, &live, stop.cancelled()).await;
    shown.abort();
    bar.finish_and_clear();
    Report::new(run, max_concurrency, objectives)
}

fn show(report: &Report) -> Result<()> {
    for error in report.errors.iter().take(3) {
        eprintln!("baton: a call failed: {error}");
    }
    writeln!(io::stdout(), "{report}").context("writing the table")
}
