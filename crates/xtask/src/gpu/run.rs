//! The steps on a GPU machine, one after the other, each with a time limit, the most telling first.
//!
//! Invariant: the results are written when a step begins and when it has ended, so that whatever a step does to the machine,
//! the file says how far the run came.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use serde_json::{Value, json};

use super::{bench, command, correct, peers};

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// Where the results go
    #[arg(long, value_name = "FILE", default_value = "results.json")]
    out: PathBuf,
    /// Less of everything, in 12 minutes
    #[arg(long)]
    quick: bool,
    /// Tiny models and a few tokens, to try the steps themselves: through the simulator, say
    #[arg(long, conflicts_with = "quick")]
    rehearse: bool,
    /// When these are over, what runs is ended, and nothing more begins [default: the sum of all steps' limits]
    #[arg(long, value_name = "N")]
    minutes: Option<f64>,
    /// Only these steps, in the order that they have
    #[arg(long, value_name = "STEP,…", value_delimiter = ',', value_parser = PossibleValuesParser::new(STEPS.iter().map(|step| step.name)))]
    steps: Vec<String>,
    /// Device, as for `baton serve`
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Folder with `models` [default: that of this binary]
    #[arg(long, value_name = "DIR")]
    files: Option<PathBuf>,
    /// The binary to judge [default: `baton` beside this one]
    #[arg(long, value_name = "FILE")]
    baton: Option<PathBuf>,
    /// Folder for models that are made (50 GB, with --quick 35 GB; 3 more for llama.cpp), compiled kernels, and what each program said
    #[arg(long, value_name = "DIR", default_value = "work")]
    work: PathBuf,
    /// A Python with torch and transformers, to measure beside, if it has them
    #[arg(long, value_name = "FILE", default_value = "python3")]
    python: PathBuf,
    /// llama.cpp's server, to measure beside
    #[arg(long, value_name = "FILE")]
    llama_server: Option<PathBuf>,
}

/// How much is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// What the figures are to be taken from.
    Full,
    /// What fits into 12 minutes.
    Quick,
    /// Figures mean nothing.
    Rehearsal,
}

/// Where and on what steps run.
pub struct Site {
    pub baton: PathBuf,
    /// The repository's folder of that name, or what was packed of it.
    pub models: PathBuf,
    pub work: PathBuf,
    pub device: String,
    pub scale: Scale,
    pub python: PathBuf,
    pub llama_server: Option<PathBuf>,
}

impl Site {
    /// One of ours, with its caches in the folder for work.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("BATON_STATE_DIR", self.work.join("state"));
        command
    }

    /// Runs `baton` with a device.
    pub fn run(&self, name: &str, args: &[&str], until: Instant) -> Result<command::Ended> {
        let mut baton = self.command(&self.baton);
        command::run(baton.args(args).args(["--device", &self.device]), &self.logs(), name, until)
    }

    /// Where programs' output goes.
    pub fn logs(&self) -> PathBuf {
        self.work.join("logs")
    }

    /// What a program wrote to standard output, as JSON.
    pub fn output(&self, name: &str) -> Result<Value> {
        let file = self.logs().join(format!("{name}.out"));
        let text = fs::read(&file).with_context(|| file.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| file.display().to_string())
    }
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Passed,
    Failed,
    Skipped,
    Running,
    Waiting,
}

/// What a step found.
pub struct Found {
    verdict: Verdict,
    reasons: Vec<String>,
    figures: Value,
}

impl Found {
    /// Passed if there is no reason why not.
    pub fn new(reasons: Vec<String>, figures: Value) -> Self {
        let verdict = if reasons.is_empty() { Verdict::Passed } else { Verdict::Failed };
        Self { verdict, reasons, figures }
    }

    /// Not for this machine.
    pub fn skipped(reason: &str) -> Self {
        Self { verdict: Verdict::Skipped, reasons: vec![reason.to_owned()], figures: Value::Null }
    }
}

/// A step.
struct Step {
    name: &'static str,
    /// Seconds in full and in quick.
    limits: [u64; 2],
    /// Ends by the instant.
    run: fn(&Site, Instant) -> Result<Found>,
}

const STEPS: &[Step] = &[
    Step { name: "doctor", limits: [60, 20], run: correct::doctor },
    Step { name: "selftest", limits: [900, 140], run: correct::selftest },
    Step { name: "bench-1.5b", limits: [600, 90], run: |site, until| bench::local(site, &bench::SMALL, until) },
    Step { name: "load-1.5b", limits: [900, 100], run: bench::load },
    Step { name: "abacus", limits: [300, 40], run: correct::abacus },
    Step { name: "goldens", limits: [600, 50], run: correct::goldens },
    Step { name: "bench-7b", limits: [900, 80], run: |site, until| bench::local(site, &bench::LARGE, until) },
    Step { name: "bench-moe", limits: [1200, 100], run: |site, until| bench::local(site, &bench::EXPERTS, until) },
    Step { name: "peers", limits: [1200, 60], run: peers::measure },
    Step { name: "sanitizer", limits: [1800, 40], run: correct::sanitizer },
];

/// The file.
#[derive(Serialize)]
struct Results {
    /// What `pack` wrote of the build.
    build: Value,
    device: String,
    scale: Scale,
    /// Seconds since 1970.
    began: u64,
    steps: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    name: &'static str,
    verdict: Verdict,
    limit_seconds: u64,
    seconds: f64,
    reasons: Vec<String>,
    figures: Value,
}

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    let own = env::current_exe()?;
    let folder = own.parent().context("this binary is in a folder")?;
    let files = args.files.as_deref().unwrap_or(folder);
    let scale = match (args.quick, args.rehearse) {
        (true, _) => Scale::Quick,
        (_, true) => Scale::Rehearsal,
        _ => Scale::Full,
    };
    fs::create_dir_all(args.work.join("logs"))?;
    let absolute = |path: &Path| path.canonicalize().with_context(|| path.display().to_string());
    let site = Site {
        baton: absolute(args.baton.as_deref().unwrap_or(&folder.join("baton")))?,
        models: absolute(&files.join("models"))?,
        work: absolute(&args.work)?,
        device: args.device.clone(),
        scale,
        python: args.python.clone(),
        llama_server: args.llama_server.clone(),
    };
    let build = fs::read(folder.join("build.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let chosen = |step: &&Step| args.steps.is_empty() || args.steps.iter().any(|name| name == step.name);
    let steps: Vec<&Step> = STEPS.iter().filter(chosen).collect();
    let limit = |step: &Step| step.limits[usize::from(scale == Scale::Quick)];
    let entry = |step: &&Step| Entry {
        name: step.name,
        verdict: Verdict::Waiting,
        limit_seconds: limit(step),
        seconds: 0.0,
        reasons: Vec::new(),
        figures: Value::Null,
    };
    let mut results = Results {
        build: build.unwrap_or(Value::Null),
        device: args.device.clone(),
        scale,
        began: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        steps: steps.iter().map(entry).collect(),
    };
    let all = steps.iter().map(|step| limit(step)).sum::<u64>() as f64;
    let end = Instant::now() + Duration::from_secs_f64(args.minutes.map_or(all, |minutes| 60.0 * minutes));
    for (i, step) in steps.iter().enumerate() {
        results.steps[i].verdict = Verdict::Running;
        results.write(&args.out)?;
        let start = Instant::now();
        let until = end.min(start + Duration::from_secs(limit(step)));
        let found = if start >= end { Ok(Found::skipped("no time was left")) } else { (step.run)(&site, until) };
        let found = found.unwrap_or_else(|error| Found::new(vec![format!("{error:#}")], Value::Null));
        let entry = &mut results.steps[i];
        (entry.verdict, entry.reasons, entry.figures) = (found.verdict, found.reasons, found.figures);
        entry.seconds = start.elapsed().as_secs_f64();
        say(&format!("{:<12} {:>7.1} s  {:?}", entry.name, entry.seconds, entry.verdict));
        entry.reasons.iter().for_each(|reason| say(&format!("    {reason}")));
        results.write(&args.out)?;
    }
    let failed: Vec<_> = results.steps.iter().filter(|step| step.verdict == Verdict::Failed).map(|s| s.name).collect();
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

impl Results {
    /// Whole or not at all.
    fn write(&self, file: &Path) -> Result<()> {
        let part = file.with_extension("part");
        fs::write(&part, serde_json::to_string_pretty(&json!(self))? + "\n")
            .and_then(|()| fs::rename(&part, file))
            .with_context(|| file.display().to_string())
    }
}

#[allow(clippy::print_stdout)] // the chore's result
fn say(line: &str) {
    println!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quick_run_takes_twelve_minutes_at_most() {
        assert!(STEPS.iter().map(|step| step.limits[1]).sum::<u64>() <= 12 * 60);
    }
}
