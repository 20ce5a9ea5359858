//! Chores of the workspace, one file each: `cargo xtask CHORE`.

mod conformance;
mod dist;
mod elf;
mod gpu;
mod long;
mod python;
mod random_model;
mod readme;
mod rollouts;
mod simulators;
mod smoke;
mod vectors;

use std::{path::Path, process::Command};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Chores of the workspace")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build the simulator of the Ascend runtime, and link it under the names of the libraries that it stands for
    AscendSim(simulators::Args),
    /// Run the suites of other people's clients, each in an environment of its own, and record versions and counts
    Conformance(conformance::Args),
    /// Build the simulator of CUDA, and libraries under the names of those that it stands for
    CudaSim(simulators::Args),
    /// Build what is given to others: an archive for each target, with licences, bill of materials and sums
    Dist(dist::Args),
    /// Check and measure on a machine with an NVIDIA GPU that has nothing but a folder made here
    #[command(subcommand)]
    Gpu(gpu::Chore),
    /// Run the checks that take too long, or need too much, for `.ci/run`
    Long(long::Args),
    /// Write a checkpoint with random weights, for measuring; large ones by `cargo run --release -p xtask -- random-model`
    RandomModel(random_model::Args),
    /// Write the README's tables of what is served
    Readme,
    /// Roll a release server from one checkpoint to another and back, many times, under streams: failed and mixed requests, leaks
    Rollouts(rollouts::Args),
    /// Start a release binary with the bundled model and load it: readiness, throughput, disconnects
    Smoke(smoke::Args),
    /// Write what the reference device computes for every conformance case, for `baton selftest`
    Vectors,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().chore {
        Chore::AscendSim(args) => simulators::ascend(&args),
        Chore::Conformance(args) => conformance::main(&args),
        Chore::CudaSim(args) => simulators::cuda(&args),
        Chore::Dist(args) => dist::main(&args),
        Chore::Gpu(chore) => gpu::main(&chore),
        Chore::Long(args) => long::main(&args),
        Chore::RandomModel(args) => random_model::main(&args),
        Chore::Readme => readme::main(),
        Chore::Rollouts(args) => rollouts::main(&args),
        Chore::Smoke(args) => smoke::main(&args),
        Chore::Vectors => vectors::main(),
    }
}

/// The root of the repository.
fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// What git says of the repository, if it says anything.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).current_dir(root()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
