//! The same load on others' servers, on the same device in the same run: transformers with continuous batching, and
//! llama.cpp's server.

use std::{fs, path::Path, time::Instant};

use anyhow::{Context, Result};
use baton_loadgen::{LocalServer, free_port};
use serde_json::{Value, json};

use super::{
    bench::{SMALL, made, serve, throughput, tokens, within},
    command,
    correct::path,
    run::{Found, Scale, Site},
};

/// How many streams all of them get.
const STREAMS: usize = 64;
/// Peers, and what Baton's output tokens per second must be of theirs, at least.
const TRANSFORMERS: (&str, f64) = ("transformers", 3.0);
const LLAMA: (&str, f64) = ("llama.cpp", 1.5);
/// Room for a stream in llama.cpp's cache.
const CONTEXT: usize = 512;
/// Generates with continuous batching and prints JSON.
const SCRIPT: &str = include_str!("transformers_batching.py");

/// Measures Baton and those that are there.
pub fn measure(site: &Site, until: Instant) -> Result<Found> {
    let streams = if site.scale == Scale::Rehearsal { 2 } else { STREAMS };
    let mut import = site.command(&site.python);
    import.args(["-c", "import torch, transformers"]);
    // It is no failure that there is no such program.
    let imported = command::run(&mut import, &site.logs(), "import", until);
    let importable = imported.is_ok_and(|ended| ended.succeeded().is_ok());
    if !importable && site.llama_server.is_none() {
        let python = site.python.display();
        return Ok(Found::skipped(&format!("{python} has no torch and transformers, and no --llama-server is named")));
    }
    let folder = SMALL.folder(site, until)?;
    let most = streams.to_string();
    let own = {
        let flags = [path(&folder)?, "--max-num-seqs", &most, "--handoff", "off"];
        let server = within(until, serve(site, "peers", &flags, until))?;
        throughput(site, &server.target().base, "own", streams, until)?
    };
    let mut measured = Vec::new();
    if importable {
        measured.push((TRANSFORMERS, transformers(site, &folder, streams, until)));
    }
    if let Some(program) = &site.llama_server {
        measured.push((LLAMA, llama(site, program, streams, until)));
    }
    let rate = |figures: &Value| figures["output_throughput"].as_f64();
    let mut figures = json!({"streams": streams, "baton": own, "peers": {}, "times": {}});
    let mut reasons = Vec::new();
    for ((name, wanted), result) in measured {
        match result {
            Ok(theirs) => {
                let times = rate(&own).context("no throughput")? / rate(&theirs).context("no throughput")?;
                if times < wanted && site.scale != Scale::Rehearsal {
                    reasons.push(format!("{times:.2} times {name}, not {wanted}"));
                }
                (figures["peers"][name], figures["times"][name]) = (theirs, json!(times));
            }
            Err(error) => reasons.push(format!("{name}: {error:#}")),
        }
    }
    Ok(Found::new(reasons, figures))
}

/// transformers' own loop of continuous batching, in its process: no HTTP on its side.
fn transformers(site: &Site, folder: &Path, streams: usize, until: Instant) -> Result<Value> {
    let script = site.work.join("transformers_batching.py");
    fs::write(&script, SCRIPT)?;
    let mut python = site.command(&site.python);
    python.arg(&script).arg(folder).arg(streams.to_string()).args(tokens(site.scale));
    command::run(&mut python, &site.logs(), "transformers", until)?.succeeded().map_err(anyhow::Error::msg)?;
    let said = command::end_of(&site.logs().join("transformers.out"));
    Ok(serde_json::from_str(said.lines().last().context("it printed nothing")?)?)
}

/// llama.cpp's server on the GGUF file of the same weights' shape.
fn llama(site: &Site, program: &Path, streams: usize, until: Instant) -> Result<Value> {
    let file = site.work.join("models/peer.gguf");
    if !file.exists() {
        made(site, "make-gguf", &SMALL.arguments(site)?, &file, until)?;
    }
    let port = free_port()?;
    let mut command = site.command(program);
    command.arg("-m").arg(&file).args(["-ngl", "999", "--host", "127.0.0.1", "--port", &port.to_string()]);
    command.args(["-np", &streams.to_string(), "-c", &(streams * CONTEXT).to_string()]);
    let log = |ending: &str| fs::File::create(site.logs().join(format!("llama.{ending}")));
    command.stdout(log("out")?).stderr(log("err")?);
    let limit = until.saturating_duration_since(Instant::now());
    let server = within(until, LocalServer::launch(command, port, "/health", limit))?;
    throughput(site, &server.target().base, "llama", streams, until)
}
