//! The smoke load test: starts the server with the bundled model, then measures how soon it is ready
//! and how large, what 1 and 32 streams get, and that killed clients leave no block behind.
//!
//! It fails on errors, on lost or differing replies and on leaked blocks. Timings are printed and
//! recorded, and decide nothing.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use baton_loadgen::{Client, Report, Target, closed_loop};
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
    let server = Server::start(args).await?;
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

async fn measure(server: &Server) -> Result<Value> {
    let resident = server.resident_mib()?;
    closed_loop(&server.target, CHAT, chats(900..902), 1).await; // page in
    let one = checked(closed_loop(&server.target, CHAT, chats(100..112), 1).await)?;
    let many = checked(closed_loop(&server.target, CHAT, chats(200..328), 32).await)?;
    // The same questions again, all at once: a reply must not depend on its company.
    let again = checked(closed_loop(&server.target, CHAT, chats(100..112), 12).await)?;
    for (alone, together) in one.replies.iter().zip(&again.replies) {
        ensure!(
            (&alone.reasoning, &alone.content) == (&together.reasoning, &together.content),
            "a reply differs in company: {:?} and {:?}",
            alone.content,
            together.content
        );
    }
    let freed = server.kill_clients(50).await?;
    Ok(json!({
        "ready_ms": server.ready.as_secs_f64() * 1e3,
        "resident_mib_when_ready": resident,
        "one_stream": one,
        "streams_32": many,
        "throughput_ratio_32_to_1": many.output_throughput / one.output_throughput,
        "killed_clients": 50,
        "blocks_free_after_ms": freed.as_secs_f64() * 1e3,
    }))
}

fn checked(report: Report) -> Result<Report> {
    ensure!(report.errors.is_empty(), "calls failed: {:?}", report.errors);
    Ok(report)
}

/// One greedy sum per number, all different, so that no reply comes from the prefix cache.
fn chats(numbers: std::ops::Range<u32>) -> Vec<Value> {
    let chat = |n: u32| {
        let question = format!("What is {n} + {}?", n * 7 % 900 + 13);
        json!({"model": "abacus", "temperature": 0, "messages": [{"role": "user", "content": question}]})
    };
    numbers.map(chat).collect()
}

struct Server {
    child: Child,
    target: Target,
    ready: Duration,
}

impl Server {
    async fn start(args: &Args) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let start = Instant::now();
        let child = Command::new(&args.binary)
            .args(["serve", "--port", &port.to_string(), "--log-level", "warn"])
            .args(&args.serve_flags)
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", args.binary.display()))?;
        let target = Target { base: format!("http://127.0.0.1:{port}"), api_key: None };
        let mut server = Self { child, target, ready: Duration::ZERO };
        let client = Client::new(server.target.clone());
        while !client.get("/ready").await.is_ok_and(|(status, _)| status == 200) {
            ensure!(start.elapsed() < Duration::from_secs(60), "not ready after a minute");
            if let Some(status) = server.child.try_wait()? {
                bail!("the server ended: {status}");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        server.ready = start.elapsed();
        Ok(server)
    }

    fn resident_mib(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? / 1024.0)
    }

    /// Opens `n` streams, cuts each after its first bytes, and waits until no block is in use.
    async fn kill_clients(&self, n: u32) -> Result<Duration> {
        let mut open = Vec::new();
        for mut body in chats(500..500 + n) {
            body["max_tokens"] = json!(900);
            body["ignore_eos"] = json!(true);
            // A client of its own, so that dropping it closes the connection.
            let client = Client::new(self.target.clone());
            open.push(client.open_stream(CHAT, body).await?);
        }
        ensure!(self.metric("vllm:kv_cache_usage_perc").await? > 0.0, "no block in use while {n} streams run");
        drop(open);
        let cut = Instant::now();
        while self.metric("vllm:kv_cache_usage_perc").await? > 0.0
            || self.metric("vllm:num_requests_running").await? > 0.0
        {
            ensure!(cut.elapsed() < Duration::from_secs(10), "blocks still in use 10 s after {n} clients left");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(cut.elapsed())
    }

    async fn metric(&self, name: &str) -> Result<f64> {
        let (_, text) = Client::new(self.target.clone()).get("/metrics").await?;
        let line =
            text.lines().find(|l| l.starts_with(name) && !l.starts_with('#')).with_context(|| name.to_owned())?;
        Ok(line.rsplit(' ').next().context("a value")?.parse()?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
