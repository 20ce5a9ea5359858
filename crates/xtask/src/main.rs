//! Chores of the workspace, one file each: `cargo xtask CHORE`.

mod conformance;
mod long;
mod random_model;
mod readme;
mod rollouts;
mod smoke;
mod vectors;

use std::path::Path;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Chores of the workspace")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Run the suites of other people's clients, each in an environment of its own, and record versions and counts
    Conformance(conformance::Args),
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
        Chore::Conformance(args) => conformance::main(&args),
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
