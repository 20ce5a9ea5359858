//! What serving costs beside computing: a model decodes in this many streams within a process, and then for as many clients; and how
//! many calls a second there are that compute nothing.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use baton_loadgen::{LocalServer, Mode, closed_loop, median};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use super::{Setting, record::Record, watched};
use crate::random_model;

const COMPLETIONS: &str = "/v1/completions";
const STREAMS: usize = 64;
/// Tokens that each stream decodes.
const TOKENS: usize = 64;
const PROMPT: usize = 4;
/// Runs of each side, in turn.
const ROUNDS: usize = 3;
const CONNECTIONS: usize = 32;
const COUNTED: Duration = Duration::from_secs(10);

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let binary = setting.binary()?;
    let large = setting.folder.join("qwen2-0.5b");
    if !large.exists() {
        random_model::folder("qwen2-0.5b", large.clone())?;
    }
    let abacus = crate::root().join("models/abacus");
    let mut record = Record::new("overhead");
    super::runtime()?.block_on(async {
        let share = served(&binary, &large, "qwen2_0.5b", &mut record).await?;
        record.must(
            format!("{:.1} % of the engine's own throughput is lost (at most 5 %)", share * 100.0),
            share <= 0.05,
        );
        served(&binary, &abacus, "abacus", &mut record).await?;
        let server = watched::start(&binary, &[]).await?;
        let rate = calls_per_second(&server).await?;
        record.must(format!("{rate:.0} calls of /v1/models a second (at least 5,000)"), rate >= 5000.0);
        anyhow::Ok(())
    })?;
    record.finish(setting)
}

/// The share of the throughput that serving costs.
async fn served(binary: &Path, model: &Path, name: &str, record: &mut Record) -> Result<f64> {
    let path = model.to_str().context("a path in UTF-8")?;
    let (mut own, mut through) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        own.push(local(binary, path)?);
        let server =
            watched::start(binary, &[path, "--handoff", "off", "--max-num-seqs", "64", "--max-model-len", "1024"])
                .await?;
        round(&server).await?; // page in
        let before = watched::core_seconds(&server)?;
        through.push(round(&server).await?);
        let after = watched::core_seconds(&server)?;
        let used: Vec<(&str, f64)> = after
            .iter()
            .map(|(thread, seconds)| {
                let before = before.iter().find(|(known, _)| known == thread).map_or(0.0, |(_, seconds)| *seconds);
                (thread.as_str(), seconds - before)
            })
            .collect();
        record.figure(&format!("{name}_core_seconds"), json!(used))?;
    }
    record.figure(&format!("{name}_tokens_per_s_local"), &own)?;
    record.figure(&format!("{name}_tokens_per_s_served"), &through)?;
    let share = 1.0 - median(&through) / median(&own);
    record.figure(&format!("{name}_share_lost"), share)?;
    Ok(share)
}

/// Tokens a second of all streams, without a server.
fn local(binary: &Path, model: &str) -> Result<f64> {
    let streams = STREAMS.to_string();
    let tokens = TOKENS.to_string();
    let mut command = Command::new(binary);
    command.args(["bench", "local", model, "-p", "0", "-n", &tokens, "--streams", &streams, "-r", "1", "--json"]);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let figures: Value = serde_json::from_slice(&output.stdout)?;
    figures["results"][0]["median_ts"].as_f64().with_context(|| figures.to_string())
}

/// Tokens a second of all streams while all of them decode: of a stream's time only what lies behind its first token counts.
async fn round(server: &LocalServer) -> Result<f64> {
    let body = |n: usize| {
        let prompt: Vec<usize> = (0..PROMPT).map(|i| 100 + (n * 37 + i) % 800).collect();
        json!({"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": true, "temperature": 0})
    };
    let report =
        closed_loop(server.target(), COMPLETIONS, (0..STREAMS).map(body).collect(), STREAMS, Mode::Streamed).await;
    ensure!(report.errors.is_empty(), "{:?}", report.errors);
    ensure!(report.total_output_tokens == (STREAMS * TOKENS) as u64, "{} tokens", report.total_output_tokens);
    Ok(STREAMS as f64 * 1e3 / report.tpot.mean_ms)
}

/// `GET /v1/models` on connections that stay open, one after the other on each.
async fn calls_per_second(server: &LocalServer) -> Result<f64> {
    let address = server.address();
    let end = Instant::now() + COUNTED;
    let mut clients = JoinSet::new();
    for _ in 0..CONNECTIONS {
        clients.spawn(async move {
            let mut stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let (mut count, mut buffer) = (0_u64, vec![0; 16 << 10]);
            while Instant::now() < end {
                stream.write_all(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
                let mut read = 0;
                while !is_whole(&buffer[..read])? {
                    match stream.read(&mut buffer[read..]).await? {
                        0 => bail!("closed"),
                        more => read += more,
                    }
                }
                count += 1;
            }
            anyhow::Ok(count)
        });
    }
    let mut count = 0;
    while let Some(client) = clients.join_next().await {
        count += client??;
    }
    Ok(count as f64 / COUNTED.as_secs_f64())
}

/// Whether a reply of a known length is there.
fn is_whole(bytes: &[u8]) -> Result<bool> {
    let text = std::str::from_utf8(bytes)?;
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Ok(false) };
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("a length")?;
    Ok(body.len() >= length.parse::<usize>()?)
}
