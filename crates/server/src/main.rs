//! The `baton` binary: commands and their settings. `serve.rs` reads as the boot order.

mod backend;
mod bench;
mod bundled;
mod cli;
mod doctor;
mod encoder;
mod facts;
mod handoff;
mod keys;
mod listen;
mod load;
mod log;
mod memory;
mod pull;
mod quantize;
mod reload;
mod renew;
mod rollout;
mod selftest;
mod serve;
mod settings;
mod speculative;
mod state_dir;
mod traces;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use crate::{
    bench::BenchArgs,
    doctor::DoctorArgs,
    handoff::verify::{self, VerifyArgs},
    pull::PullArgs,
    quantize::QuantizeArgs,
    rollout::cli::RolloutArgs,
    selftest::SelftestArgs,
};

fn main() -> ExitCode {
    memory::keep_mappings();
    let matches = cli::Cli::command().get_matches_from(cli::with_default_command(std::env::args_os()));
    let result = match matches.subcommand() {
        Some(("serve", matches)) => serve::main(matches),
        Some(("pull", matches)) => {
            PullArgs::from_arg_matches(matches).map_err(Into::into).and_then(|args| pull::main(&args))
        }
        Some(("bench", matches)) => {
            BenchArgs::from_arg_matches(matches).map_err(Into::into).and_then(|args| bench::main(&args))
        }
        Some(("quantize", matches)) => {
            QuantizeArgs::from_arg_matches(matches).map_err(Into::into).and_then(|args| quantize::main(&args))
        }
        Some(("verify", matches)) => match VerifyArgs::from_arg_matches(matches) {
            Ok(args) => return verify::main(&args),
            Err(error) => Err(error.into()),
        },
        Some(("rollout", matches)) => match RolloutArgs::from_arg_matches(matches) {
            Ok(args) => return rollout::cli::main(&args),
            Err(error) => Err(error.into()),
        },
        Some(("doctor", matches)) => match DoctorArgs::from_arg_matches(matches) {
            Ok(args) => return doctor::main(&args),
            Err(error) => Err(error.into()),
        },
        Some(("selftest", matches)) => match SelftestArgs::from_arg_matches(matches) {
            Ok(args) => return selftest::main(&args),
            Err(error) => Err(error.into()),
        },
        _ => unreachable!("clap refuses a missing or unknown command"),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may not be up yet, or filtered: a failed start always says why.
            eprintln!("baton: {error:#}");
            ExitCode::FAILURE
        }
    }
}
