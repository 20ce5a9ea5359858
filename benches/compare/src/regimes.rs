//! What is asked of a running server, and the figures that it gives. Prompts are random token ids, the same for both
//! programs of a round and never the same again, so that no cache but the one that is measured has seen them.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use baton_loadgen::{Client, Endpoint, Form, Load, LocalServer, Mode, Objectives, Random, Report, Run, median, run};
use serde_json::{Value, json};

use crate::Args;

/// One measured figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    pub regime: String,
    pub name: &'static str,
    pub value: f64,
}

/// Clients of the regimes that ask about many at once.
pub const CLIENTS: usize = 16;
/// Tokens after the shared prefix, and those generated there.
pub const SUFFIX: usize = 16;
const SHORT_OUTPUT: u32 = 8;
/// Prompts of which the prefill figure is the median.
const PREFILLS: usize = 3;

/// The figure that is plotted.
pub const DECODE: &str = "decode tok/s";
/// That of two regimes.
const MEAN_TTFT: &str = "TTFT mean ms";

/// Puts a server through everything.
pub async fn measure(server: &LocalServer, args: &Args, round: u64) -> Result<Vec<Figure>> {
    let model = first_model(&server.client()).await?;
    let asker = Asker { server, model, seed: 1000 * (round + 1) };
    asker.ask(1, random(64, 0, SHORT_OUTPUT), 0).await?; // page in
    let mut figures = Vec::new();
    for (i, &streams) in args.streams.iter().enumerate() {
        figures.extend(asker.streams(streams, args, 10 + i as u64).await?);
    }
    figures.extend(asker.shared_prefix(args).await?);
    figures.push(asker.prefill(args).await?);
    Ok(figures)
}

struct Asker<'a> {
    server: &'a LocalServer,
    model: String,
    seed: u64,
}

fn random(input_len: usize, prefix_len: usize, output_len: u32) -> Random {
    Random { input_len, output_len, prefix_len, seed: 0 }
}

impl Asker<'_> {
    /// Makes `clients` calls at once.
    async fn ask(&self, clients: usize, prompts: Random, seed: u64) -> Result<Run> {
        let prompts = Random { seed: self.seed + seed, ..prompts };
        self.send(prompts.requests(clients, Form::Ids)).await
    }

    async fn send(&self, requests: Vec<baton_loadgen::Request>) -> Result<Run> {
        let extra = [("ignore_eos", json!(true)), ("temperature", json!(0))];
        let planned =
            |r: &baton_loadgen::Request| r.planned(Endpoint::Completions, &self.model, Duration::ZERO, &extra);
        let load = Load {
            path: Endpoint::Completions.path().to_owned(),
            calls: requests.iter().map(planned).collect(),
            max_concurrency: None,
            mode: Mode::Streamed,
        };
        let run = run(&self.server.client(), load, &Arc::default(), std::future::pending()).await;
        for (call, request) in run.calls.iter().zip(&requests) {
            let reply = call.result.as_ref().map_err(|e| anyhow::anyhow!("a call failed: {e}"))?;
            ensure!(
                reply.output_tokens == u64::from(request.output_len) && reply.prompt_tokens == request.prompt_len,
                "asked {} + {} tokens, got {} + {}",
                request.prompt_len,
                request.output_len,
                reply.prompt_tokens,
                reply.output_tokens
            );
        }
        Ok(run)
    }

    async fn streams(&self, streams: usize, args: &Args, seed: u64) -> Result<Vec<Figure>> {
        let run = self.ask(streams, random(args.input_len, 0, args.output_len as u32), seed).await?;
        let decode = all_decoding(&run)
            .with_context(|| format!("some of {streams} streams ended before others began; raise --output-len"))?;
        let report = Report::new(run, None, Objectives::default());
        let regime = if streams == 1 { "1 stream".to_owned() } else { format!("{streams} streams") };
        let figure = |(name, value)| Figure { regime: regime.clone(), name, value };
        let figures = [
            (DECODE, decode),
            ("output tok/s", report.output_throughput),
            (MEAN_TTFT, report.ttft.mean_ms),
            ("ITL median ms", report.itl.median_ms),
            ("ITL p99 ms", report.itl.p99_ms),
        ];
        Ok(figures.into_iter().map(figure).collect())
    }

    /// A prefix that one call has had before, then with other endings once more: by then every slot of a server that keeps
    /// one per client has it.
    async fn shared_prefix(&self, args: &Args) -> Result<Vec<Figure>> {
        let prompts = Random { seed: self.seed + 90, ..random(SUFFIX, args.prefix_len, SHORT_OUTPUT) };
        let mut calls = prompts.requests(1 + 2 * CLIENTS, Form::Ids).into_iter();
        self.send(calls.by_ref().take(1).collect()).await?;
        let mut figures = Vec::new();
        for seen in ["seen once", "seen by all"] {
            let run = self.send(calls.by_ref().take(CLIENTS).collect()).await?;
            let report = Report::new(run, None, Objectives::default());
            let regime = format!("{CLIENTS} clients, prefix of {} {seen}", args.prefix_len);
            let found = [(MEAN_TTFT, report.ttft.mean_ms), ("TTFT p95 ms", report.ttft.p95_ms)];
            figures.extend(found.map(|(name, value)| Figure { regime: regime.clone(), name, value }));
        }
        Ok(figures)
    }

    async fn prefill(&self, args: &Args) -> Result<Figure> {
        let mut rates = Vec::new();
        for i in 0..PREFILLS {
            let run = self.ask(1, random(args.prefill_len, 0, 1), 100 + i as u64).await?;
            let reply = run.calls[0].result.as_ref().expect("checked when sent");
            rates.push(args.prefill_len as f64 / reply.first_token.as_secs_f64());
        }
        let regime = format!("prompt of {}", args.prefill_len);
        Ok(Figure { regime, name: "prefill tok/s", value: median(&rates) })
    }
}

/// Tokens per second while every stream decodes: from the last first token to the first last one.
fn all_decoding(run: &Run) -> Option<f64> {
    let replies = || run.calls.iter().filter_map(|c| Some((c.sent, c.result.as_ref().ok()?)));
    let last = |(sent, reply): (Duration, &baton_loadgen::Reply)| {
        sent + reply.first_token + reply.gaps.iter().sum::<Duration>()
    };
    let start = replies().map(|(sent, reply)| sent + reply.first_token).max()?;
    let end = replies().map(last).min()?;
    let mut tokens = 0.0;
    for (sent, reply) in replies() {
        // A chunk may carry several tokens.
        let per_chunk = reply.output_tokens as f64 / (reply.gaps.len() + 1) as f64;
        let mut at = sent + reply.first_token;
        for gap in &reply.gaps {
            at += *gap;
            if at > start && at <= end {
                tokens += per_chunk;
            }
        }
    }
    let seconds = end.checked_sub(start).filter(|d| !d.is_zero())?.as_secs_f64();
    Some(tokens / seconds)
}

async fn first_model(client: &Client) -> Result<String> {
    let (_, body) = client.get("/v1/models").await?;
    let models: Value = serde_json::from_str(&body)?;
    match models["data"][0]["id"].as_str() {
        Some(model) => Ok(model.to_owned()),
        None => bail!("/v1/models lists none: {body}"),
    }
}

#[cfg(test)]
mod tests {
    use baton_loadgen::{Call, Reply};

    use super::*;

    fn call(sent: u64, ttft: u64, gaps: &[u64], output_tokens: u64) -> Call {
        let ms = Duration::from_millis;
        let gaps = gaps.iter().map(|&gap| ms(gap)).collect();
        let reply = Reply { output_tokens, first_token: ms(ttft), gaps, ..Reply::default() };
        Call { at: Duration::ZERO, sent: ms(sent), prompt_len: 1, result: Ok(reply) }
    }

    fn run_of(calls: Vec<Call>) -> Run {
        Run { calls, unfinished: 0, duration: Duration::from_secs(1) }
    }

    #[test]
    fn decoding_is_counted_only_while_all_streams_decode() {
        // Tokens at 100, 200, …, 500 and at 250, 300, …, 450 ms: from 250 to 450 there are 2 and 4.
        let calls = vec![call(0, 100, &[100; 4], 5), call(50, 200, &[50; 4], 5)];
        assert_eq!(all_decoding(&run_of(calls)), Some(30.0));
        // Two tokens a chunk.
        assert_eq!(all_decoding(&run_of(vec![call(0, 100, &[100; 4], 10)])), Some(20.0));
        // The first has ended when the second begins.
        assert_eq!(all_decoding(&run_of(vec![call(0, 10, &[10], 2), call(0, 100, &[10], 2)])), None);
    }
}
