//! The soak of rollouts: a server goes from one generation to another and back, many times, while streams never pause.
//!
//! It fails if a request fails; if a reply is not wholly what one generation answers, by the fingerprint in each of its
//! chunks and by its text; if a generation that was replaced leaves blocks or an engine behind. Times and memory are
//! printed and decide nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_loadgen::{Client, LocalServer, Target, median};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::task::JoinSet;

const CHAT: &str = "/v1/chat/completions";
const ROLLOUT: &str = "/admin/rollout";
const ADMIN_KEY: &str = "soak";
/// Rollouts before those that count, and without streams before memory is looked at.
const WARM_UP: usize = 8;
const QUIET: usize = 2;
/// Questions that the streams ask.
const QUESTIONS: u32 = 24;
/// How long one transition may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// The binary to start
    #[arg(long, default_value = "target/release/baton")]
    pub binary: PathBuf,
    /// Rollouts to make
    #[arg(long, default_value_t = 1000)]
    pub count: usize,
    /// Streams at any time
    #[arg(long, default_value_t = 16)]
    pub streams: usize,
    /// Checkpoint that serves first
    pub model_a: PathBuf,
    /// Checkpoint that takes over, and gives back
    pub model_b: PathBuf,
    /// Further flags for `baton serve`
    #[arg(last = true)]
    pub serve_flags: Vec<String>,
}

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run(args))
}

/// What a generation answers to the questions, alone: by fingerprint.
type Answers = BTreeMap<String, Vec<String>>;

async fn run(args: &Args) -> Result<()> {
    let models = [absolute(&args.model_a)?, absolute(&args.model_b)?];
    let mut answers = Answers::new();
    for model in &models {
        let server = LocalServer::start(&args.binary, &flags(model, &[], &args.serve_flags)).await?;
        let mut all = Vec::new();
        let mut fingerprints = BTreeSet::new();
        for n in 0..QUESTIONS {
            let reply = ask(&server.client(), n).await?;
            fingerprints.extend(reply.fingerprints);
            all.push(reply.text);
        }
        let [fingerprint] = Vec::from_iter(fingerprints).try_into().map_err(|all| anyhow!("{all:?} of one model"))?;
        ensure!(answers.insert(fingerprint, all).is_none(), "both models have the same fingerprint");
    }

    let state = std::env::temp_dir().join(format!("baton-rollouts-{}", std::process::id()));
    let state_dir = state.to_str().context("a temporary folder in UTF-8")?;
    let admin = ["--admin-api-key", ADMIN_KEY, "--state-dir", state_dir];
    let server = LocalServer::start(&args.binary, &flags(&models[0], &admin, &args.serve_flags)).await?;
    let figures = soak(&server, &models, Arc::new(answers), args.count, args.streams).await;
    drop(server);
    std::fs::remove_dir_all(&state).ok();
    let figures = figures?;
    #[allow(clippy::print_stdout)] // the chore's result
    {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    }
    for what in ["requests_failed", "requests_mixed", "blocks_leaked", "threads_left"] {
        ensure!(figures[what] == 0, "{what}: {}", figures[what]);
    }
    Ok(())
}

fn absolute(model: &Path) -> Result<String> {
    let path = model.canonicalize().with_context(|| model.display().to_string())?;
    path.into_os_string().into_string().map_err(|path| anyhow!("{path:?} is not UTF-8"))
}

fn flags<'a>(model: &'a str, more: &[&'a str], further: &'a [String]) -> Vec<&'a str> {
    let own = [model, "--served-model-name", "soak", "--log-level", "warn"];
    own.iter().chain(more).copied().chain(further.iter().map(String::as_str)).collect()
}

/// What the streams have seen.
#[derive(Default)]
struct Seen {
    requests: AtomicUsize,
    failed: AtomicUsize,
    mixed: AtomicUsize,
}

async fn soak(
    server: &LocalServer,
    models: &[String; 2],
    answers: Arc<Answers>,
    count: usize,
    streams: usize,
) -> Result<Value> {
    let admin = Client::new(Target { api_key: Some(ADMIN_KEY.into()), ..server.target().clone() });
    let under_streams = async |count: usize| {
        let (seen, stop) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
        let mut clients = JoinSet::new();
        for number in 0..streams {
            let (client, seen, stop, answers) = (server.client(), seen.clone(), stop.clone(), answers.clone());
            clients.spawn(async move {
                let mut n = number as u32;
                while !stop.load(Relaxed) {
                    stream(&client, n % QUESTIONS, &answers, &seen).await;
                    n += 7;
                }
            });
        }
        let mut seconds: Vec<f64> = Vec::new();
        for n in 0..count {
            let start = Instant::now();
            rollout(&admin, &models[(n + 1) % 2]).await.with_context(|| format!("rollout {n}"))?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        stop.store(true, Relaxed);
        while let Some(ended) = clients.join_next().await {
            ended?;
        }
        // What was touched depends on what ran; of a generation that has just been loaded, nothing has.
        for n in count..count + QUIET - count % 2 {
            rollout(&admin, &models[(n + 1) % 2]).await?;
        }
        anyhow::Ok((seen, seconds, server.resident_mib()?))
    };
    // Once before, so that what stays allocated for good is.
    let (_, _, resident) = under_streams(WARM_UP).await?;
    let threads = threads(server)?;
    let (seen, seconds, resident_after) = under_streams(count).await?;
    let used = |generations: &Value| -> u64 {
        let all = generations["data"].as_array().into_iter().flatten();
        all.filter_map(|generation| generation["kv_blocks"]["used"].as_u64()).sum()
    };
    let (_, generations) = admin.get("/admin/generations").await?;
    let generations: Value = serde_json::from_str(&generations)?;
    let left = generations["data"].as_array().map_or(0, Vec::len);
    ensure!(left == 1, "{left} generations are alive at the end: {generations}");
    let total: f64 = seconds.iter().sum();
    Ok(json!({
        "rollouts": count,
        "streams": streams,
        "requests": seen.requests.load(Relaxed),
        "requests_failed": seen.failed.load(Relaxed),
        "requests_mixed": seen.mixed.load(Relaxed),
        "blocks_leaked": used(&generations),
        "threads_left": self::threads(server)?.saturating_sub(threads),
        "resident_mib_at_start": resident,
        "resident_mib_at_end": resident_after,
        "seconds_per_rollout_mean": total / count.max(1) as f64,
        "seconds_per_rollout_median": median(&seconds),
    }))
}

/// Threads but the runtime's, whose number is its own business.
fn threads(server: &LocalServer) -> Result<usize> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid()))?;
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    Ok(names.filter(|name| !name.starts_with("tokio")).count())
}

/// One rollout: started, promoted when it stands, and waited for.
async fn rollout(admin: &Client, model: &str) -> Result<()> {
    command(admin, "", &json!({"model": model})).await?;
    until(admin, "standing").await?;
    command(admin, "/promote", &json!({})).await?;
    until(admin, "promoted").await
}

async fn command(admin: &Client, command: &str, body: &Value) -> Result<()> {
    let (status, reply) = admin.post(&format!("{ROLLOUT}{command}"), body).await?;
    ensure!(status == 200, "{command} {status}: {reply}");
    Ok(())
}

async fn until(admin: &Client, wanted: &str) -> Result<()> {
    let start = Instant::now();
    loop {
        let (_, status) = admin.get(ROLLOUT).await?;
        let status: Value = serde_json::from_str(&status)?;
        match status["phase"].as_str() {
            Some(phase) if phase == wanted => return Ok(()),
            Some("rolled_back" | "rolling_back" | "failed") => bail!("{status}"),
            phase => ensure!(start.elapsed() < LIMIT, "{phase:?} after {LIMIT:?}, not {wanted}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn stream(client: &Client, n: u32, answers: &Answers, seen: &Seen) {
    seen.requests.fetch_add(1, Relaxed);
    let reply = match ask(client, n).await {
        Ok(reply) => reply,
        Err(error) => {
            eprintln!("failed: {error:#}");
            seen.failed.fetch_add(1, Relaxed);
            return;
        }
    };
    let whole = match Vec::from_iter(&reply.fingerprints).as_slice() {
        [one] => answers.get(*one).is_some_and(|answers| answers[n as usize] == reply.text),
        _ => false,
    };
    if !whole {
        eprintln!("mixed: {:?}: {}", reply.fingerprints, reply.text);
        seen.mixed.fetch_add(1, Relaxed);
    }
}

/// A streamed reply.
struct Reply {
    /// Of all its chunks.
    fingerprints: BTreeSet<String>,
    /// Reasoning and content.
    text: String,
}

async fn ask(client: &Client, n: u32) -> Result<Reply> {
    let question = format!("What is {} + {}?", 100 + n * 31, n * 77 % 900 + 13);
    let body = json!({"temperature": 0, "max_tokens": 200, "messages": [{"role": "user", "content": question}]});
    let body = client.open_stream(CHAT, body).await?.collect().await?.to_bytes();
    let body = std::str::from_utf8(&body)?;
    let mut reply = Reply { fingerprints: BTreeSet::new(), text: String::new() };
    let mut done = false;
    for data in body.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let chunk: Value = serde_json::from_str(data)?;
        ensure!(chunk["error"].is_null(), "{chunk}");
        reply.fingerprints.extend(chunk["system_fingerprint"].as_str().map(str::to_owned));
        let delta = &chunk["choices"][0]["delta"];
        for part in ["reasoning_content", "content"] {
            reply.text += delta[part].as_str().unwrap_or("");
        }
    }
    ensure!(done, "the stream closed without [DONE]");
    Ok(reply)
}
