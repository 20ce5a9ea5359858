//! How fast is it? Models with random weights, made on the machine: in process beside what the device does at most, and
//! over HTTP.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use baton_loadgen::{LocalServer, free_port};
use serde_json::{Map, Value, json};
use tokio::{runtime, time::timeout_at};

use super::{
    command,
    correct::path,
    run::{Found, Scale, Site},
};

/// A model that is made.
pub struct Model {
    /// A shape of `random-model`.
    shape: &'static str,
    /// Layers, in full and in quick, where all of them would take too long to make or not fit on the disk.
    layers: Option<[usize; 2]>,
    /// A golden checkpoint whose config takes its place in a rehearsal.
    rehearsal: &'static str,
}

pub const SMALL: Model = Model { shape: "qwen2-1.5b", layers: None, rehearsal: "qwen2-tied" };
pub const LARGE: Model = Model { shape: "qwen2-7b", layers: None, rehearsal: "qwen2-untied" };
/// A layer is 1.2 GB; of 48 each costs the same.
pub const EXPERTS: Model = Model { shape: "qwen3-30b-a3b", layers: Some([24, 12]), rehearsal: "qwen3-moe" };

/// What must be reached.
struct Target {
    what: &'static str,
    /// Whether it is about a test.
    concerns: fn(&Value) -> bool,
    /// Of which the larger counts: the larger floor under a step's time is that of which more is reached.
    shares: &'static [&'static str],
    least: f64,
}

const TARGETS: [Target; 3] = [
    Target {
        what: "decode, one stream",
        concerns: |test| test["n_gen"] != 0 && test["streams"] == 1,
        shares: &["share_of_bytes"],
        least: 0.70,
    },
    Target {
        what: "decode, many streams",
        concerns: |test| test["n_gen"] != 0 && test["streams"].as_u64() >= Some(64),
        shares: &["share_of_bytes", "share_of_peak"],
        least: 0.60,
    },
    Target {
        what: "prefill of 8k",
        concerns: |test| test["n_prompt"] == 8192,
        shares: &["share_of_peak"],
        least: 0.50,
    },
];

/// By how much throughput may be less with more streams and still count as not falling: what runs differ by.
const NOISE: f64 = 0.03;

impl Model {
    /// Its folder, made if it is not there.
    pub fn folder(&self, site: &Site, until: Instant) -> Result<PathBuf> {
        let layers = self.layers(site.scale).map_or(String::new(), |layers| format!("-{layers}-layers"));
        let name = if site.scale == Scale::Rehearsal { self.rehearsal } else { self.shape };
        let folder = site.work.join("models").join(format!("{name}{layers}"));
        if !folder.exists() {
            made(site, &format!("make-{}", self.shape), &self.arguments(site)?, &folder, until)?;
        }
        Ok(folder)
    }

    /// Of `random-model`, for one like it.
    pub fn arguments(&self, site: &Site) -> Result<Vec<String>> {
        if site.scale == Scale::Rehearsal {
            let config = site.models.join("golden").join(self.rehearsal).join("config.json");
            return Ok(vec!["--config".into(), path(&config)?.into()]);
        }
        let layers = self.layers(site.scale).into_iter().flat_map(|layers| ["--layers".into(), layers.to_string()]);
        Ok(["--shape".into(), self.shape.into()].into_iter().chain(layers).collect())
    }

    fn layers(&self, scale: Scale) -> Option<usize> {
        match scale {
            Scale::Full => self.layers.map(|layers| layers[0]),
            Scale::Quick => self.layers.map(|layers| layers[1]),
            Scale::Rehearsal => None,
        }
    }
}

/// Makes a model with `random-model` of this binary: whole or not at all.
pub fn made(site: &Site, log: &str, args: &[String], out: &Path, until: Instant) -> Result<()> {
    // The ending of a file says what is written.
    let part = out.with_file_name(format!("part-{}", out.file_name().context("a name")?.display()));
    fs::create_dir_all(out.parent().context("a folder")?)?;
    let _ = if part.is_dir() { fs::remove_dir_all(&part) } else { fs::remove_file(&part) };
    let mut random = site.command(&env::current_exe()?);
    random.arg("random-model").args(args).arg("--out").arg(&part);
    let ended = command::run(&mut random, &site.logs(), log, until)?;
    ended.succeeded().map_err(anyhow::Error::msg).context("making the model")?;
    Ok(fs::rename(&part, out)?)
}

/// `baton bench local`: decoding of 1, 64 and 256 streams, prompts of 8k, beside the device's limits.
pub fn local(site: &Site, model: &Model, until: Instant) -> Result<Found> {
    let start = Instant::now();
    let folder = model.folder(site, until)?;
    let making = start.elapsed().as_secs_f64();
    let size: &[&str] = match site.scale {
        Scale::Full => &["-p", "8192", "-n", "128", "-d", "0,1024", "--streams", "1,8,64,256", "-r", "5"],
        Scale::Quick => &["-p", "8192", "-n", "32", "-d", "512", "--streams", "1,64,256", "-r", "3"],
        Scale::Rehearsal => &["-p", "16", "-n", "2", "--streams", "1,3", "-r", "1"],
    };
    let log = format!("bench-{}", model.shape);
    let ended = site.run(&log, &[&["bench", "local", path(&folder)?, "--json"], size].concat(), until)?;
    if let Err(reason) = ended.succeeded() {
        return Ok(Found::new(vec![reason], Value::Null));
    }
    let result = site.output(&log)?;
    let reasons = if site.scale == Scale::Rehearsal { Vec::new() } else { missed(&result) };
    Ok(Found::new(reasons, json!({"making_seconds": making, "layers": model.layers(site.scale), "bench": result})))
}

/// Targets that are not reached.
fn missed(result: &Value) -> Vec<String> {
    let mut reasons = Vec::new();
    for Target { what, concerns, shares, least } in TARGETS {
        let tests = result["results"].as_array().into_iter().flatten().filter(|test| concerns(test));
        reasons.extend(tests.filter_map(|test| {
            let share = shares.iter().filter_map(|share| test[share].as_f64()).fold(0.0, f64::max);
            let (name, percent) = (test["test"].as_str().unwrap_or_default(), |share: f64| (100.0 * share).round());
            (share < least).then(|| format!("{what}, {name}: {} % of {} %", percent(share), percent(least)))
        }));
    }
    reasons
}

/// Aggregate throughput over HTTP, of more and more streams: it never falls.
pub fn load(site: &Site, until: Instant) -> Result<Found> {
    let streams: &[usize] = match site.scale {
        Scale::Full => &[1, 2, 4, 8, 16, 32, 64, 128, 256],
        Scale::Quick => &[1, 4, 16, 64, 256],
        Scale::Rehearsal => &[1, 2],
    };
    let folder = SMALL.folder(site, until)?;
    let most = streams[streams.len() - 1].to_string();
    let flags = [path(&folder)?, "--max-num-seqs", &most, "--handoff", "off"];
    let server = within(until, serve(site, "load", &flags, until))?;
    let mut figures = Map::new();
    let (mut reasons, mut before) = (Vec::new(), 0.0);
    for &streams in streams {
        let result = throughput(site, &server.target().base, "load", streams, until)?;
        let rate = result["output_throughput"].as_f64().context("no throughput")?;
        if rate < before * (1.0 - NOISE) {
            reasons.push(format!("{streams} streams give {rate:.0} tokens/s, fewer gave {before:.0}"));
        }
        before = rate.max(before);
        figures.insert(streams.to_string(), result);
    }
    Ok(Found::new(reasons, figures.into()))
}

/// Tokens of a stream's prompt and of its answer.
pub fn tokens(scale: Scale) -> [&'static str; 2] {
    if scale == Scale::Rehearsal { ["8", "2"] } else { ["128", "128"] }
}

/// `baton bench` against a server: what so many streams get.
pub fn throughput(site: &Site, url: &str, log: &str, streams: usize, until: Instant) -> Result<Value> {
    let calls = match site.scale {
        Scale::Full => (4 * streams).max(8),
        Scale::Quick => (2 * streams).max(3),
        Scale::Rehearsal => streams,
    };
    let [prompt, answer] = tokens(site.scale);
    let (streams, calls) = (streams.to_string(), calls.to_string());
    let saved = site.work.join(format!("{log}-{streams}.json"));
    let mut bench = site.command(&site.baton);
    bench.args(["bench", "--url", url, "--max-concurrency", &streams, "--num-prompts", &calls, "--num-warmups", "1"]);
    bench.args(["--random-input-len", prompt, "--random-output-len", answer, "--save-result"]).arg(&saved);
    let ended = command::run(&mut bench, &site.logs(), &format!("{log}-{streams}"), until)?;
    ended.succeeded().map_err(anyhow::Error::msg).with_context(|| format!("{streams} streams"))?;
    let result: Value = serde_json::from_slice(&fs::read(&saved)?)?;
    ensure!(result["failed"] == 0, "{streams} streams: calls failed: {}", result["failed"]);
    let wanted = ["completed", "duration", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms"];
    Ok(wanted.iter().map(|field| ((*field).to_owned(), result[field].clone())).collect::<Map<_, _>>().into())
}

/// `baton serve` with the device, once it is ready.
pub async fn serve(site: &Site, log: &str, flags: &[&str], until: Instant) -> Result<LocalServer> {
    let port = free_port()?;
    let mut command = site.command(&site.baton);
    command.args(["serve", "--port", &port.to_string(), "--device", &site.device, "--log-level", "warn"]).args(flags);
    let file = site.logs().join(format!("serve-{log}.err"));
    command.stdout(fs::File::create(site.logs().join(format!("serve-{log}.out")))?).stderr(fs::File::create(&file)?);
    let limit = until.saturating_duration_since(Instant::now());
    LocalServer::launch(command, port, "/ready", limit).await.with_context(|| command::end_of(&file))
}

/// Does something, until the instant at most.
pub fn within<T>(until: Instant, work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async { timeout_at(until.into(), work).await.context("its time was up")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_missed_by_the_share_of_the_larger_floor() {
        let test = |name: &str, prompt, streams, bytes, peak| {
            let generated = if prompt == 0 { 32 } else { 0 };
            json!({"test": name, "n_prompt": prompt, "n_gen": generated, "streams": streams, "share_of_bytes": bytes, "share_of_peak": peak})
        };
        let reached = [
            test("tg32", 0, 1, 0.71, 0.01),
            test("tg32, 8 streams", 0, 8, 0.1, 0.1),
            test("tg32, 256 streams", 0, 256, 0.3, 0.61),
            test("pp8192", 8192, 1, 0.1, 0.5),
        ];
        assert_eq!(missed(&json!({"results": reached})), [""; 0]);
        let fallen = [
            test("tg32", 0, 1, 0.69, 0.9),
            test("tg32, 64 streams", 0, 64, 0.2, 0.59),
            test("pp8192", 8192, 1, 0.9, 0.4),
        ];
        let missed = missed(&json!({"results": fallen}));
        assert_eq!(missed.len(), 3, "{missed:?}");
        assert_eq!(missed[1], "decode, many streams, tg32, 64 streams: 59 % of 60 %");
    }
}
