//! Five hundred clients that ask for long streams and do not read them: what the server keeps for them, and that it gives them up.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
};

use super::{Setting, record::Record, watched};

const READERS: u32 = 500;
const TOKENS: u32 = 900;
/// Bytes that the reader's own system takes.
const RECEIVED: u32 = 4096;
/// A client may take nothing for 60 s; what it stalls is generated before.
const LIMIT: Duration = Duration::from_secs(240);

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let binary = setting.binary()?;
    let mut record = Record::new("readers");
    super::runtime()?.block_on(async {
        let server = watched::start(&binary, &[]).await?;
        let address = server.target().base.strip_prefix("http://").context("http")?.parse()?;
        // What runs and is read at once is not to be counted as kept for those who do not read.
        let mut warm = Vec::new();
        for seed in 0..64 {
            let (client, body) = (server.client(), body(seed));
            warm.push(tokio::spawn(async move { client.stream("/v1/chat/completions", body).await }));
        }
        for reply in warm {
            reply.await??;
        }
        let before = server.resident_mib()?;
        let watch = watched::Watch::begin(&server);
        let mut readers: Vec<TcpStream> = Vec::new();
        for seed in 0..READERS {
            let socket = TcpSocket::new_v4()?;
            socket.set_recv_buffer_size(RECEIVED)?;
            let mut stream = socket.connect(address).await?;
            let mut body = body(seed);
            body["stream"] = true.into();
            let body = body.to_string();
            let head = format!(
                "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all((head + &body).as_bytes()).await?;
            readers.push(stream);
        }
        let all = server.metric("baton_http_requests_in_flight").await?;
        let gone = watched::idle(&server, LIMIT).await?;
        let seen = watch.end().await?;
        record.figure("readers", READERS)?;
        record.figure("in_flight_at_once", all)?;
        record.figure("seconds_until_all_are_given_up", gone.as_secs_f64())?;
        let grown = seen.peak_mib() - before;
        record.must(format!("memory grew by {grown:.1} MiB (below 64)"), grown < 64.0);
        let live = seen.quantiles();
        record.must(
            format!("/live: p99 {:.1} ms (below 100), {} failed", live.p99_ms, seen.failed),
            live.p99_ms < 100.0 && seen.failed == 0,
        );
        drop(readers);
        anyhow::Ok(())
    })?;
    record.finish(setting)
}

/// A long reply of large events.
fn body(seed: u32) -> serde_json::Value {
    json!({
        "messages": [{"role": "user", "content": "What is 1 + 1?"}], "max_tokens": TOKENS, "ignore_eos": true, "seed": seed,
        "logprobs": true, "top_logprobs": 20,
    })
}
