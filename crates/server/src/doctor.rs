//! `baton doctor`: what this machine offers and what is missing, said before anything is loaded.
//!
//! Invariant: a finding that would keep `baton serve` from serving as it was asked to is in the list of problems, with what
//! to do about it, and makes the exit code 1. A device that nobody asked for may be missing.

mod report;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use baton_device::{DeviceFacts, Limits};
use baton_handoff::{Bundle, Verdict};
use clap::Args;
use indicatif::HumanBytes;
use serde_json::{Value, json};

use crate::{backend::Device, facts, handoff::listed, load, memory, state_dir::StateDir};

/// What `baton doctor` takes.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Device(s) that must be there: auto (the CPU, today), cpu, cuda:N, ascend:N, or reference [default: the CPU; the others are looked for]
    #[arg(long, value_name = "DEVICE,…", value_delimiter = ',')]
    device: Vec<String>,

    /// Folder for what must survive a restart, to be looked at; made if there is none, as by `baton serve`
    #[arg(long, value_name = "DIR", env = "BATON_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// Write to this file, or to standard output if it is -, what somebody who helps needs to know, as JSON: what is found, the settings of `baton serve`, digests of the model and a self-test of the device(s), without secrets, names and paths of this machine
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// Settings file of `baton serve`, for the report; BATON_CONFIG names one too
    #[arg(long, value_name = "FILE", requires = "report")]
    config: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
#[allow(clippy::print_stdout)] // what was asked for
pub fn main(args: &DoctorArgs) -> Result<Verdict> {
    let mut findings = examine(args)?;
    print!("{}", tell(args, &mut findings)?);
    Ok(if findings.problems.is_empty() { Verdict::Pass } else { Verdict::Fail })
}

/// What is printed; the report, if one is asked for, goes to its file.
fn tell(args: &DoctorArgs, findings: &mut Findings) -> Result<String> {
    if let Some(file) = &args.report {
        if file == Path::new("-") {
            return report::make(args, findings);
        }
        // Opened first: the self-test takes a while.
        let context = || format!("--report {}", file.display());
        let mut written = fs::File::create(file).with_context(context)?;
        written.write_all(report::make(args, findings)?.as_bytes()).with_context(context)?;
    }
    if args.json { Ok(serde_json::to_string_pretty(&findings.value())? + "\n") } else { Ok(findings.text()) }
}

/// All that was found.
struct Findings {
    /// Devices that were asked for, or the CPU, of which nothing is missing.
    usable: Vec<String>,
    devices: Vec<DeviceFacts>,
    /// How many open files a process may have: each connection is one.
    open_files: Option<String>,
    model: String,
    state_dir: Option<String>,
    problems: Vec<String>,
}

fn examine(args: &DoctorArgs) -> Result<Findings> {
    let asked = args.device.iter().map(|name| Device::parse(name)).collect::<Result<Vec<_>>>()?;
    let required = if asked.is_empty() { vec![Device::Cpu] } else { asked.clone() };
    let looked_for = if asked.is_empty() { Device::KINDS.to_vec() } else { asked };
    let mut problems: Vec<String> = Vec::new();
    let (mut devices, mut usable) = (Vec::new(), Vec::new());
    for device in looked_for {
        let mut facts = device.probe();
        if device == Device::Cpu {
            let limits = match Device::cpu_limits(0) {
                Ok(limits) => rates(&limits),
                Err(error) => format!("not measured: {error:#}"),
            };
            facts.details.insert("measured".into(), limits);
        }
        if required.contains(&device) {
            problems.extend(facts.missing.iter().map(|reason| format!("device {}: {reason}", facts.device)));
            usable.extend(facts.missing.is_empty().then(|| facts.device.clone()));
        }
        devices.push(facts);
    }
    let mut found = |what: Result<String>| {
        what.unwrap_or_else(|error| {
            problems.push(format!("{error:#}"));
            format!("{error:#}")
        })
    };
    let model = found(bundled_model());
    let state_dir = args.state_dir.as_deref().map(|path| found(writable(path)));
    Ok(Findings { usable, devices, open_files: open_files(), model, state_dir, problems })
}

/// The model that is served when none is named, as far as its files tell.
fn bundled_model() -> Result<String> {
    let (name, files) = load::files(None)?;
    let context = || format!("bundled model {name}");
    let bundle =
        Bundle::open(&files).with_context(context)?.context("there is no handoff.json").with_context(context)?;
    let problems: Vec<String> = bundle.verify_files(&|_| {}).problems.iter().map(ToString::to_string).collect();
    anyhow::ensure!(problems.is_empty(), "bundled model {name}: {}", listed(&problems));
    Ok(format!("{name}, {} files as they were handed over", bundle.manifest().files.len()))
}

/// Whether a server could keep its state there.
fn writable(path: &Path) -> Result<String> {
    let folder = StateDir::open(path)?;
    let probe = folder.file("doctor");
    fs::write(&probe, b"?")
        .and_then(|()| fs::remove_file(&probe))
        .with_context(|| format!("--state-dir {}: nothing can be written there", path.display()))?;
    Ok(format!("{} can be written", path.display()))
}

fn open_files() -> Option<String> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next().map(str::to_owned)
}

/// What all cores do in a second.
fn rates(limits: &Limits) -> String {
    let mut text = format!("{:.1} GB/s {}", limits.bytes / 1e9, limits.access);
    let rates = limits.mul_adds.iter();
    rates.for_each(|(kind, rate)| _ = write!(text, ", {:.0} G {kind} multiply-adds/s", rate / 1e9));
    text
}

impl Findings {
    fn value(&self) -> Value {
        json!({
            "baton": facts::build(),
            "system": facts::system(),
            "memory": {"total_bytes": memory::total_bytes(), "free_bytes": memory::available_bytes()},
            "open_files": self.open_files,
            "devices": self.devices.iter().map(facts::device).collect::<Vec<_>>(),
            "model": self.model,
            "state_dir": self.state_dir,
            "problems": self.problems,
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let words = |facts: BTreeMap<&str, String>| facts.into_values().collect::<Vec<_>>().join(", ");
        line(&mut text, "baton", &words(facts::build()));
        line(&mut text, "system", &words(facts::system()));
        if let Some((free, total)) = memory::available_bytes().zip(memory::total_bytes()) {
            line(&mut text, "memory", &format!("{} free of {}", HumanBytes(free), HumanBytes(total)));
        }
        self.open_files.iter().for_each(|limit| line(&mut text, "open files", &format!("{limit} at most")));
        line(&mut text, "model", &self.model);
        let state_dir = self.state_dir.as_deref().unwrap_or("not looked at: none is named (--state-dir)");
        line(&mut text, "state folder", state_dir);
        for facts in &self.devices {
            text.push('\n');
            let state = if facts.missing.is_empty() { "is there" } else { "cannot serve" };
            line(&mut text, &format!("device {}", facts.device), state);
            device_lines(facts, &mut |name, value| line(&mut text, &format!("  {name}"), value));
            // What is missing of a device that nobody asked for is no problem, and said here alone.
            let problem = |reason: &&String| self.problems.iter().any(|problem| problem.ends_with(*reason));
            let missing = facts.missing.iter().filter(|reason| !problem(reason));
            missing.for_each(|reason| line(&mut text, "  missing", reason));
        }
        text.push('\n');
        self.problems.iter().for_each(|problem| _ = writeln!(text, "{problem}"));
        if self.problems.is_empty() {
            text.push_str("nothing is missing\n");
        }
        text
    }
}

fn line(text: &mut String, name: &str, value: &str) {
    _ = writeln!(text, "{name:<20} {value}");
}

/// What there is to say of a device.
fn device_lines(facts: &DeviceFacts, line: &mut dyn FnMut(&str, &str)) {
    facts.chip.iter().for_each(|chip| line("chip", chip));
    if facts.count > 1 {
        line("count", &facts.count.to_string());
    }
    if let Some(memory) = facts.memory {
        line("memory", &format!("{} free of {}", HumanBytes(memory.free), HumanBytes(memory.total)));
    }
    facts.versions.iter().chain(&facts.details).for_each(|(name, value)| line(name, value));
    for library in &facts.libraries {
        library.opened.iter().for_each(|file| line(&library.role, file));
        for (file, problem) in &library.tried {
            line(&library.role, &format!("{file} does not serve: {problem}"));
        }
    }
    if !facts.symbols.is_empty() {
        let absent: Vec<&str> = facts.symbols.iter().filter(|(_, there)| !**there).map(|(name, _)| &**name).collect();
        let found = facts.symbols.len() - absent.len();
        line("functions", &format!("{found} of {} found", facts.symbols.len()));
        absent.iter().for_each(|name| line("not found", name));
    }
}
