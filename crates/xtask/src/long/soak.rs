//! Everything at once, for long: clients that stay, leave and stop reading, a cache too small for those who run, an adapter whose
//! values are not finite. Each request that was accepted ends once, memory stays what it was, and at the end nothing is held.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use baton_loadgen::{CallError, Client};
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinSet};

use super::{Setting, record::Record, unread, watched};

const CHAT: &str = "/v1/chat/completions";
const POISON: &str = "poison";
const CLIENTS: u64 = 24;
/// Bytes of the cache: too few for all that may run.
const CACHE_BYTES: &str = "3000000";
/// Tokens of a stream that nobody reads.
const UNREAD: u32 = 500;
/// A client that stops reading holds its connection for a minute: there is a new one this often.
const BETWEEN_STOPPED: Duration = Duration::from_secs(5);
/// The part of the time in which memory may still grow.
const WARM_UP: f64 = 0.25;

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let binary = setting.binary()?;
    let adapter = setting.folder.join(POISON);
    poison(&adapter)?;
    let mut record = Record::new("soak");
    super::runtime()?.block_on(soak(&binary, &adapter, setting.time(60.0), &mut record))?;
    record.finish(setting)
}

/// An adapter of finite values whose products are not: what it adds to the last product of the first layer is the difference of two infinities.
fn poison(folder: &Path) -> Result<()> {
    const WIDTH: usize = 192;
    fs::create_dir_all(folder)?;
    let config = json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"], "layers_to_transform": [0], "bias": "none",
        "base_model_name_or_path": "abacus", "task_type": "CAUSAL_LM",
    });
    fs::write(folder.join("adapter_config.json"), config.to_string())?;
    let name = |half: &str| format!("base_model.model.model.layers.0.self_attn.o_proj.lora_{half}.weight");
    let bytes = 2 * WIDTH * 4;
    let header = json!({
        (name("A")): {"dtype": "F32", "shape": [2, WIDTH], "data_offsets": [0, bytes]},
        (name("B")): {"dtype": "F32", "shape": [WIDTH, 2], "data_offsets": [bytes, 2 * bytes]},
    });
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    let halves = [vec![1e30_f32; 2 * WIDTH], [3e38_f32, -3e38].repeat(WIDTH)];
    file.extend(halves.concat().into_iter().flat_map(f32::to_le_bytes));
    Ok(fs::write(folder.join("adapter_model.safetensors"), file)?)
}

/// What clients have seen.
#[derive(Default)]
struct Seen {
    whole: AtomicU64,
    left: AtomicU64,
    poisoned: AtomicU64,
    refused: AtomicU64,
    wrong: AtomicU64,
}

async fn soak(binary: &Path, adapter: &Path, time: Duration, record: &mut Record) -> Result<()> {
    let modules = format!("{POISON}={}", adapter.to_str().context("a path in UTF-8")?);
    let flags = ["--kv-cache-memory-bytes", CACHE_BYTES, "--max-num-seqs", "32", "--max-queued-requests", "16"];
    let server = watched::start(binary, &[&flags[..], &["--enable-lora", "--lora-modules", &modules]].concat()).await?;
    let (seen, stop) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
    let watch = watched::Watch::begin(&server);
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let (client, seen, stop) = (server.client(), seen.clone(), stop.clone());
        clients.spawn(async move {
            let mut n = number;
            while !stop.load(Relaxed) {
                call(&client, n, &seen).await;
                n += CLIENTS;
            }
        });
    }
    let mut stopped: Vec<TcpStream> = Vec::new();
    let end = tokio::time::Instant::now() + time;
    while tokio::time::Instant::now() < end {
        // It reads its status, and no more.
        let mut stream = unread::stream(&server, unread::question(UNREAD, 0)).await?;
        match unread::status(&mut stream).await? {
            200 => stopped.push(stream),
            503 => _ = seen.refused.fetch_add(1, Relaxed),
            status => {
                eprintln!("a client that does not read: {status}");
                seen.wrong.fetch_add(1, Relaxed);
            }
        }
        tokio::time::sleep(BETWEEN_STOPPED.min(end - tokio::time::Instant::now())).await;
    }
    stop.store(true, Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended?;
    }
    let idle = server.idle(Duration::from_secs(120)).await?;
    let watched = watch.end().await?;

    let count = |counter: &AtomicU64| counter.load(Relaxed);
    let ends = server.metric("vllm:request_success_total").await? as u64;
    let corrupted = server.metric("vllm:corrupted_requests_total").await? as u64;
    record.figure("minutes", time.as_secs_f64() / 60.0)?;
    record.figure("whole_replies", count(&seen.whole))?;
    record.figure("left_in_the_middle", count(&seen.left))?;
    record.figure("stopped_reading", stopped.len())?;
    record.figure("not_finite", count(&seen.poisoned))?;
    record.figure("refused_for_a_full_queue", count(&seen.refused))?;
    record.figure("preemptions", server.metric("vllm:num_preemptions_total").await?)?;
    record.figure("seconds_until_nothing_was_held", idle.as_secs_f64())?;
    let wrong = count(&seen.wrong);
    record.must(format!("{wrong} calls ended otherwise than they should"), wrong == 0);
    let poisoned = count(&seen.poisoned);
    let kinds = [count(&seen.whole), count(&seen.left), poisoned, stopped.len() as u64];
    record.must(
        format!("there were clients that took all, left, asked for what is not finite, did not read: {kinds:?} (some of each)"),
        kinds.iter().all(|count| *count > 0),
    );
    let accepted: u64 = kinds.iter().sum();
    record.must(format!("{accepted} requests were accepted, and {ends} ends counted"), ends == accepted);
    record.must(format!("{poisoned} were not finite, and {corrupted} counted so"), corrupted == poisoned);
    let (first, last) = (watched.mean_mib(WARM_UP, 0.5), watched.mean_mib(0.75, 1.0));
    let change = (last / first - 1.0) * 100.0;
    record.figure("resident_mib_second_and_last_quarter_and_peak", [first, last, watched.peak_mib()])?;
    record.must(
        format!("memory changed by {change:.2} % from the second quarter to the last (3 %)"),
        change.abs() <= 3.0,
    );
    watched.live_must_answer("soak", record);
    Ok(())
}

/// One call: of every eight two leave in the middle, and one asks for what is not finite.
async fn call(client: &Client, n: u64, seen: &Seen) {
    let question = format!("What is {} + {}?", n % 1000, n * 77 % 900);
    let mut body = json!({"messages": [{"role": "user", "content": question}], "temperature": 1, "seed": n, "max_tokens": 50 + n % 300, "ignore_eos": true});
    let ended = match n % 8 {
        0 | 4 => leave(client, body).await.map(|()| &seen.left),
        1 => {
            body["model"] = json!(POISON);
            client.whole(CHAT, &body).await.map(|_| &seen.wrong)
        }
        2 => client.whole(CHAT, &body).await.map(|_| &seen.whole),
        _ => client.stream(CHAT, body).await.map(|_| &seen.whole),
    };
    let counter = ended.unwrap_or_else(|error| match &error {
        CallError::Status { status, body } if n % 8 == 1 && *status == 500 && body.contains("engine_error") => {
            &seen.poisoned
        }
        CallError::Status { status, .. } if *status == 503 => &seen.refused,
        _ => {
            eprintln!("call {n}: {error}");
            &seen.wrong
        }
    });
    counter.fetch_add(1, Relaxed);
}

/// Takes the first events, and goes.
async fn leave(client: &Client, body: Value) -> Result<(), CallError> {
    // A client of its own, so that dropping it closes the connection.
    let client = client.clone();
    let stream = client.open_stream(CHAT, body).await?;
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(stream);
    Ok(())
}
