//! `baton selftest`: does a device compute what it should? Every operation is compared with the judge on this machine
//! and with golden vectors from another, then the bundled model with its own golden cases.
//!
//! Invariant: what a device does not offer is skipped with the reason, never passed; and whatever the device does (refuse,
//! panic, take the process with it), the file of `--report` says how far it came.

mod cases;
mod model;
pub mod privacy;
mod report;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use baton_device::conformance::{self, Case, Vectors};
use baton_device::{DType, DeviceFacts};
use baton_handoff::Verdict;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::Value;

use crate::{backend::Device, load};
use cases::Judge;
use privacy::Redactor;
use report::{Found, Report};

/// The vectors that this build carries, so that a copied binary can judge alone.
const VECTORS: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/golden/vectors/conformance.vectors"));

/// What `baton selftest` takes.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// Device: auto (the CPU, today), cpu, cuda:N, ascend:N, or reference (naive and slow, the judge of the others)
    #[arg(long, default_value = "auto")]
    device: String,

    /// Run only cases with one of these in their names
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    filter: Vec<String>,

    /// Print the names of the cases, and run none
    #[arg(long)]
    list: bool,

    /// Write what was found to this file, as JSON: versions, cases and errors, without names or paths of this machine; it grows as cases end
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// Folder of a server's state, whose compiled kernels are taken and added to [default: kernels are compiled for this run]
    #[arg(long, value_name = "DIR", env = "BATON_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// Golden vectors to compare with, as `cargo xtask vectors` writes them [default: those inside this binary]
    #[arg(long, value_name = "FILE")]
    vectors: Option<PathBuf>,
}

/// What is run: conformance cases, all with each type of activations that the device computes in, and behind them
/// perhaps the bundled model.
struct Chosen {
    cases: Vec<(DType, Vec<Case>)>,
    model: bool,
}

impl Chosen {
    /// What has one of the texts in its name; all if there is none.
    fn new(filter: &[String], activations: &[DType]) -> Result<Self> {
        let wanted = |name: &str| filter.is_empty() || filter.iter().any(|text| name.contains(text));
        let cases = |dtype: &DType| {
            let wanted = |case: &Case| wanted(&conformance::name(case, *dtype));
            (*dtype, conformance::cases().into_iter().filter(wanted).collect())
        };
        let chosen = Self { cases: activations.iter().map(cases).collect(), model: wanted(model::NAME) };
        let any = chosen.names().next().is_some();
        ensure!(any, "--filter {}: no case has that in its name; --list names them", filter.join(" "));
        Ok(chosen)
    }

    /// Names and operations, in the order in which they are run.
    fn names(&self) -> impl Iterator<Item = (String, &'static str)> {
        let cases = self.cases.iter().flat_map(|(dtype, cases)| cases.iter().map(|case| (*dtype, case)));
        let cases = cases.map(|(dtype, case)| (conformance::name(case, dtype), case.operation()));
        cases.chain(self.model.then(|| (model::NAME.to_owned(), "model")))
    }
}

/// Runs the command.
#[allow(clippy::print_stdout)] // what was asked for
pub fn main(args: &SelftestArgs) -> Result<Verdict> {
    let device = Device::parse(&args.device)?;
    let facts = device.probe();
    let chosen = Chosen::new(&args.filter, device.activations(|| facts.clone()))?;
    if args.list {
        chosen.names().for_each(|(name, _)| println!("{name}"));
        return Ok(Verdict::Skipped);
    }
    let report = run(args, device, &facts, &chosen)?;
    print!("{report}");
    Ok(report.verdict())
}

fn run(args: &SelftestArgs, device: Device, facts: &DeviceFacts, chosen: &Chosen) -> Result<Report> {
    let vectors = vectors(args)?;
    let report = Report::new(facts, chosen.names(), Redactor::here());
    let mut session = Session { args, bar: ProgressBar::hidden(), report };
    session.write()?;
    session.run(device, chosen, &vectors)?;
    Ok(session.report)
}

/// Runs all of it on a device, and sums up what was found.
pub fn summary(device: &str, state_dir: Option<&Path>) -> Result<Value> {
    let args = SelftestArgs {
        device: device.to_owned(),
        filter: Vec::new(),
        list: false,
        report: None,
        state_dir: state_dir.map(Path::to_owned),
        vectors: None,
    };
    let device = Device::parse(&args.device)?;
    let facts = device.probe();
    let chosen = Chosen::new(&args.filter, device.activations(|| facts.clone()))?;
    Ok(run(&args, device, &facts, &chosen)?.summary(&args.device))
}

fn vectors(args: &SelftestArgs) -> Result<Vectors> {
    let Some(file) = &args.vectors else { return Ok(Vectors::parse(VECTORS)?) };
    let context = || format!("--vectors {}", file.display());
    Vectors::parse(&fs::read(file).with_context(context)?).with_context(context)
}

/// A self-test on its way.
struct Session<'a> {
    args: &'a SelftestArgs,
    bar: ProgressBar,
    report: Report,
}

impl Session<'_> {
    fn run(&mut self, device: Device, chosen: &Chosen, vectors: &Vectors) -> Result<()> {
        self.bar = ProgressBar::new(chosen.names().count() as u64);
        let mut next = 0..;
        let mut index = || next.next().expect("it has no end");
        let mut offered = None;
        for (activations, cases) in chosen.cases.iter().filter(|(_, cases)| !cases.is_empty()) {
            let judge = self.open(device, *activations, vectors)?;
            offered.get_or_insert_with(|| judge.caps().clone());
            for case in cases {
                let index = index();
                if let Some(skipped) = judge.skipped(case) {
                    self.end(index, skipped, 0.0);
                    continue;
                }
                let mut lost = false;
                self.case(index, || {
                    let found;
                    (found, lost) = judge.judge(case);
                    found
                })?;
                if lost {
                    return self.write();
                }
            }
        }
        if chosen.model {
            let caps = match offered {
                Some(caps) => caps,
                None => self.open(device, chosen.cases[0].0, vectors)?.caps().clone(),
            };
            let name = &self.args.device;
            self.case(index(), || model::judge(name, &caps))?;
        }
        self.bar.finish_and_clear();
        self.write()
    }

    /// Opens the device; it is given back with what is returned.
    fn open<'v>(&mut self, device: Device, activations: DType, vectors: &'v Vectors) -> Result<Judge<'v>> {
        match device.case_runner(activations, self.args.state_dir.as_deref().map(load::kernels)) {
            Ok(runner) => {
                self.report.opened(&runner.caps);
                Ok(Judge::new(runner, vectors))
            }
            Err(error) => {
                self.report.unavailable(&error);
                self.write()?;
                Err(error.into())
            }
        }
    }

    /// Runs a case; the file says so before it begins.
    fn case(&mut self, index: usize, run: impl FnOnce() -> Found) -> Result<()> {
        self.report.begin(index);
        self.write()?;
        let start = Instant::now();
        let found = run();
        self.end(index, found, start.elapsed().as_secs_f64());
        Ok(())
    }

    fn end(&mut self, index: usize, found: Found, seconds: f64) {
        self.report.end(index, found, seconds);
        self.bar.inc(1);
    }

    fn write(&self) -> Result<()> {
        self.args.report.as_ref().map_or(Ok(()), |file| self.report.write(file))
    }
}
