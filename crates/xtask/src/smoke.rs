//! The smoke load test: starts the server with the bundled model, then measures how soon it is ready
//! and how large, what 1 and 32 clients get (streamed and in one piece), and that killed clients leave no block behind.
//!
//! It fails on errors, on lost or differing replies and on leaked blocks. Timings are printed and
//! recorded, and decide nothing.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use baton_loadgen::{LocalServer, Mode, Report, closed_loop};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// The binary to start
    #[arg(long, default_value = "target/release/baton")]
    binary: PathBuf,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Further flags for `baton serve`
    #[arg(last = true)]
    serve_flags: Vec<String>,
}

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(run(args))
}

async fn run(args: &Args) -> Result<()> {
    let flags: Vec<&str> =
        ["--log-level", "warn"].into_iter().chain(args.serve_flags.iter().map(String::as_str)).collect();
    let server = LocalServer::start(&args.binary, &flags).await?;
    let figures = measure(&server).await?;
    let text = serde_json::to_string_pretty(&figures)?;
    #[allow(clippy::print_stdout)] // the chore's result
    {
        println!("{text}");
    }
    if let Some(file) = &args.record {
        fs::create_dir_all(file.parent().context("a file in a folder")?)?;
        fs::write(file, text + "\n")?;
    }
    Ok(())
}

async fn measure(server: &LocalServer) -> Result<Value> {
    let resident = server.resident_mib()?;
    let target = server.target();
    closed_loop(target, CHAT, chats(900..902), 1, Mode::Streamed).await; // page in
    let mut figures = serde_json::Map::new();
    let mut alone = None;
    for (mode, name) in [(Mode::Streamed, "streamed"), (Mode::Whole, "whole")] {
        let one = checked(closed_loop(target, CHAT, chats(100..140), 1, mode).await)?;
        let many = checked(closed_loop(target, CHAT, chats(200..520), 32, mode).await)?;
        let ratio = many.output_throughput / one.output_throughput;
        figures.insert(name.into(), json!({"one_client": one, "clients_32": many, "throughput_ratio": ratio}));
        alone.get_or_insert(one);
    }
    // The same questions again, all at once: a reply must not depend on its company.
    let together = checked(closed_loop(target, CHAT, chats(100..140), 32, Mode::Streamed).await)?;
    let alone = alone.context("two modes were measured")?;
    for (alone, together) in alone.replies.iter().zip(&together.replies) {
        ensure!(
            (&alone.reasoning, &alone.content) == (&together.reasoning, &together.content),
            "a reply differs in company: {:?} and {:?}",
            alone.content,
            together.content
        );
    }
    let freed = kill_clients(server, 50).await?;
    figures.insert("ready_ms".into(), json!(server.ready().as_secs_f64() * 1e3));
    figures.insert("resident_mib_when_ready".into(), json!(resident));
    figures.insert("killed_clients".into(), json!(50));
    figures.insert("blocks_free_after_ms".into(), json!(freed.as_secs_f64() * 1e3));
    Ok(figures.into())
}

fn checked(report: Report) -> Result<Report> {
    ensure!(report.errors.is_empty(), "calls failed: {:?}", report.errors);
    Ok(report)
}

/// One greedy sum per number, all different.
fn chats(numbers: std::ops::Range<u32>) -> Vec<Value> {
    let chat = |n: u32| {
        let question = format!("What is {n} + {}?", n * 7 % 900 + 13);
        json!({"model": "abacus", "temperature": 0, "messages": [{"role": "user", "content": question}]})
    };
    numbers.map(chat).collect()
}

/// Opens `n` streams, cuts each after its head, and waits until no block is in use.
async fn kill_clients(server: &LocalServer, n: u32) -> Result<Duration> {
    let mut open = Vec::new();
    for mut body in chats(500..500 + n) {
        body["max_tokens"] = json!(900);
        body["ignore_eos"] = json!(true);
        // A client of its own, so that dropping it closes the connection.
        let client = server.client();
        let stream = client.open_stream(CHAT, body).await?;
        open.push((client, stream));
    }
    ensure!(server.metric("vllm:kv_cache_usage_perc").await? > 0.0, "no block in use while {n} streams run");
    drop(open);
    server.idle(Duration::from_secs(10)).await.with_context(|| format!("after {n} clients left"))
}
