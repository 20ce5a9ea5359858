//! The checks that take too long, or need too much, for `.ci/run`: a file and a line of [`CHECKS`] each.

mod contexts;
mod export;
mod gpu;
mod idle;
mod minilm;
mod overhead;
mod overload;
mod readers;
mod record;
mod rollouts;
mod soak;
mod unread;
mod watched;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

/// A check: its name, and what fails if it does.
type Check = (&'static str, fn(&Setting) -> Result<()>);

const CHECKS: &[Check] = &[
    ("contexts", contexts::check),
    ("export", export::check),
    ("gpu", gpu::check),
    ("idle", idle::check),
    ("minilm", minilm::check),
    ("overhead", overhead::check),
    ("overload", overload::check),
    ("readers", readers::check),
    ("rollouts", rollouts::check),
    ("soak", soak::check),
];

/// What a check is given.
struct Setting<'a> {
    /// Where it may keep what it needs, and leaves its record; it is its own, and stays.
    folder: &'a Path,
    minutes: Option<f64>,
    binary: Option<&'a Path>,
}

impl Setting<'_> {
    /// The server: the one that was named, else the release binary, built if it is not.
    fn binary(&self) -> Result<PathBuf> {
        if let Some(binary) = self.binary {
            return Ok(binary.canonicalize()?);
        }
        Ok(crate::gpu::built()?.join("baton"))
    }

    /// How long to load a server: as was asked for, else so many minutes.
    fn time(&self, minutes: f64) -> Duration {
        Duration::from_secs_f64(60.0 * self.minutes.unwrap_or(minutes))
    }
}

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// Only these checks; all if none is named
    #[arg(value_name = "CHECK", value_parser = clap::builder::PossibleValuesParser::new(CHECKS.iter().map(|(name, _)| *name)))]
    checks: Vec<String>,

    /// How long overload (5) and soak (60) load their server
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,

    /// The server that is loaded, instead of a release build
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    let chosen = |name: &str| args.checks.is_empty() || args.checks.iter().any(|check| check == name);
    let mut failed = Vec::new();
    for (name, check) in CHECKS.iter().filter(|(name, _)| chosen(name)) {
        let folder = crate::root().join("target/long").join(name);
        std::fs::create_dir_all(&folder)?;
        let setting = Setting { folder: &folder, minutes: args.minutes, binary: args.binary.as_deref() };
        if let Err(error) = timed(name, || check(&setting)) {
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

/// What loads a server.
fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

#[allow(clippy::print_stdout)] // the chore's result
fn say(line: &str) {
    println!("{line}");
}
