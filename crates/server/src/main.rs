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

use anyhow::Result;
use baton_handoff::Verdict;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

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
    match matches.subcommand() {
        Some(("serve", matches)) => done(serve::main(matches)),
        Some(("pull", matches)) => done(args(matches).and_then(|args: PullArgs| pull::main(&args))),
        Some(("bench", matches)) => done(args(matches).and_then(|args: BenchArgs| bench::main(&args))),
        Some(("quantize", matches)) => done(args(matches).and_then(|args: QuantizeArgs| quantize::main(&args))),
        Some(("verify", matches)) => told(args(matches).and_then(|args: VerifyArgs| verify::main(&args))),
        Some(("rollout", matches)) => told(args(matches).and_then(|args: RolloutArgs| rollout::cli::main(&args))),
        Some(("doctor", matches)) => told(args(matches).and_then(|args: DoctorArgs| doctor::main(&args))),
        Some(("selftest", matches)) => told(args(matches).and_then(|args: SelftestArgs| selftest::main(&args))),
        _ => unreachable!("clap refuses a missing or unknown command"),
    }
}

fn args<A: FromArgMatches>(matches: &ArgMatches) -> Result<A> {
    Ok(A::from_arg_matches(matches)?)
}

/// Of a command that does something: 0 if it is done.
fn done(result: Result<()>) -> ExitCode {
    result.map_or_else(|error| failed(&error, 1), |()| ExitCode::SUCCESS)
}

/// Of a command that finds something out: 0 if all is well, 1 if something is not, 2 if that cannot be found out.
fn told(result: Result<Verdict>) -> ExitCode {
    match result {
        Ok(Verdict::Pass | Verdict::Skipped) => ExitCode::SUCCESS,
        Ok(Verdict::Fail) => ExitCode::from(1),
        Ok(Verdict::NotRun) => ExitCode::from(2),
        Err(error) => failed(&error, 2),
    }
}

fn failed(error: &anyhow::Error, code: u8) -> ExitCode {
    // The log may not be up yet, or filtered: a failed start always says why.
    eprintln!("baton: {error:#}");
    ExitCode::from(code)
}
