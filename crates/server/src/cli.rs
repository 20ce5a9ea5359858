//! Commands. `baton` alone is `baton serve`.

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::{
    bench::BenchArgs, doctor::DoctorArgs, handoff::verify::VerifyArgs, pull::PullArgs, quantize::QuantizeArgs,
    rollout::cli::RolloutArgs, selftest::SelftestArgs, settings::ServeArgs,
};

/// Serves language models that were trained somewhere else.
#[derive(Debug, Parser)]
#[command(name = "baton", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a checkpoint over OpenAI-compatible HTTP
    Serve(Box<ServeArgs>),
    /// Check that a bundle is what was handed over, and that devices compute what the trainer computed
    Verify(Box<VerifyArgs>),
    /// Fetch a checkpoint into the cache that Hugging Face tools share, and print its folder
    Pull(PullArgs),
    /// Load an OpenAI-compatible server and measure what it gives, as `vllm bench serve` does
    Bench(Box<BenchArgs>),
    /// Save a checkpoint with its linear layers quantised, to be served without the original
    Quantize(QuantizeArgs),
    /// Bring a new generation into service beside the one that serves, or take it back
    Rollout(Box<RolloutArgs>),
    /// Say what this machine offers and what is missing, before anything is loaded
    Doctor(DoctorArgs),
    /// Check that a device computes every operation and the bundled model as it should, and write a report to send back
    Selftest(SelftestArgs),
}

/// Puts `serve` in front when nothing is said.
pub fn with_default_command(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    if args.len() <= 1 {
        args.push("serve".into());
    }
    args
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn every_flag_has_help_and_the_command_is_consistent() {
        let mut command = super::Cli::command();
        command.build();
        for sub in command.get_subcommands() {
            for arg in sub.get_arguments().filter(|a| a.get_id() != "help" && a.get_id() != "version") {
                assert!(arg.get_help().is_some(), "{} {} has no help", sub.get_name(), arg.get_id());
            }
        }
        command.debug_assert();
    }
}
