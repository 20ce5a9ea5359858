//! The checks that take too long, or need too much, for `.ci/run`: a file and a line of [`CHECKS`] each.

mod export;
mod gpu;
mod minilm;
mod rollouts;

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, Result, ensure};

/// A check: its name, and what fails if it does. It may keep what it needs in the folder, which is its own and stays.
type Check = (&'static str, fn(&Path) -> Result<()>);

const CHECKS: &[Check] =
    &[("export", export::check), ("gpu", gpu::check), ("minilm", minilm::check), ("rollouts", rollouts::check)];

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// Only these checks; all if none is named
    #[arg(value_name = "CHECK", value_parser = clap::builder::PossibleValuesParser::new(CHECKS.iter().map(|(name, _)| *name)))]
    checks: Vec<String>,
}

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    let chosen = |name: &str| args.checks.is_empty() || args.checks.iter().any(|check| check == name);
    let mut failed = Vec::new();
    for (name, check) in CHECKS.iter().filter(|(name, _)| chosen(name)) {
        let folder = crate::root().join("target/long").join(name);
        std::fs::create_dir_all(&folder)?;
        if let Err(error) = timed(name, || check(&folder)) {
            say(&format!("{name} failed: {error:#}"));
            failed.push(*name);
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Runs a step, and prints its name before and the seconds that it took after it.
fn timed<T>(name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
    say(&format!("=== {name}"));
    let start = Instant::now();
    let result = step().with_context(|| name.to_owned());
    say(&format!("--- {name}: {:.1} s", start.elapsed().as_secs_f64()));
    result
}

/// Runs a command, which must succeed.
fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

#[allow(clippy::print_stdout)] // the chore's result
fn say(line: &str) {
    println!("{line}");
}
