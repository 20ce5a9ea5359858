//! Checks and measurements on a machine with an NVIDIA GPU: `pack` collects a folder here, `run` in that folder needs
//! neither Rust nor network there.
//!
//! Invariant: `run` takes nothing from the machine that built it; all paths are relative to its own binary.

mod bench;
mod command;
mod correct;
mod pack;
mod peers;
mod run;

use anyhow::Result;
use clap::Subcommand;
pub use pack::built;

/// What is done.
#[derive(Subcommand)]
pub enum Chore {
    /// Build, and collect what runs on a GPU machine, in a folder
    Pack(pack::Args),
    /// Run checks and measurements, and write JSON; in a folder that `pack` made
    Run(run::Args),
}

/// Runs the chore.
pub fn main(chore: &Chore) -> Result<()> {
    match chore {
        Chore::Pack(args) => pack::main(args),
        Chore::Run(args) => run::main(args),
    }
}
