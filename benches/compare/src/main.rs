//! Runs Baton and a llama-server in turn on the same model, and prints how they compare.
//!
//! Invariant: a round measures both programs one right after the other, in an order that alternates, and only ratios
//! within a round are formed: what else the machine does meanwhile falls on both.

mod programs;
mod regimes;
mod table;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use programs::{Program, Setup};
use serde_json::json;
use table::Row;

/// Compare Baton with llama.cpp on this machine: several rounds, the programs in turn
#[derive(Debug, Parser)]
#[command(
    name = "baton-compare",
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "The peer runs with flash attention, its weights in memory of its own and with large pages \
    (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, for which transparent huge pages must not be switched off). Nothing else should \
    run meanwhile. --out gets raw.csv, setup.json, table.md, throughput.svg and the logs."
)]
struct Cli {
    #[command(subcommand)]
    plot: Option<Other>,
    #[command(flatten)]
    args: Option<Args>,
}

#[derive(Debug, Subcommand)]
enum Other {
    /// Print the plot of a raw.csv as SVG
    Plot {
        /// The raw.csv of an earlier run
        #[arg(value_name = "FILE")]
        raw: PathBuf,
    },
    /// Print the table of a raw.csv
    Table {
        /// The raw.csv of an earlier run
        #[arg(value_name = "FILE")]
        raw: PathBuf,
    },
}

/// What is compared, and how.
#[derive(Debug, clap::Args)]
struct Args {
    /// The peer
    #[arg(long, value_name = "PATH")]
    llama_server: PathBuf,

    /// Compare in-process rates too, each program with its best number of threads
    #[arg(long, value_name = "PATH")]
    llama_bench: Option<PathBuf>,

    /// GGUF file that both serve
    #[arg(long, value_name = "FILE")]
    model: PathBuf,

    /// What Baton serves instead: the checkpoint that the file was made from
    #[arg(long, value_name = "PATH")]
    baton_model: Option<PathBuf>,

    /// The binary of Baton
    #[arg(long, value_name = "PATH", default_value = "target/release/baton")]
    baton: PathBuf,

    /// Folder for the results
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,

    /// Rounds
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    /// Compute threads of each program
    #[arg(long, value_name = "N", default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,

    /// Streams at once
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1,8,16,32")]
    streams: Vec<usize>,

    /// Tokens of each stream's prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    input_len: usize,

    /// Tokens that each stream generates
    #[arg(long, value_name = "N", default_value_t = 64)]
    output_len: usize,

    /// Tokens of the shared prefix
    #[arg(long, value_name = "N", default_value_t = 1000)]
    prefix_len: usize,

    /// Tokens of the prompt whose prefill is timed
    #[arg(long, value_name = "N", default_value_t = 512)]
    prefill_len: usize,

    /// Further flag of `baton serve`; repeatable
    #[arg(long = "baton-flag", value_name = "FLAG", allow_hyphen_values = true)]
    baton_flags: Vec<String>,

    /// Further flag of llama-server; repeatable
    #[arg(long = "llama-flag", value_name = "FLAG", allow_hyphen_values = true)]
    llama_flags: Vec<String>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match (&cli.plot, &cli.args) {
        (Some(Other::Plot { raw }), _) => print(&table::svg(&read(raw)?)?),
        (Some(Other::Table { raw }), _) => print(&table::markdown(&read(raw)?)),
        (None, Some(args)) => {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(compare(args))
        }
        (None, None) => unreachable!("clap asks for one of them"),
    }
}

fn read(raw: &Path) -> Result<Vec<Row>> {
    let text = fs::read_to_string(raw).with_context(|| raw.display().to_string())?;
    table::parse(&text).with_context(|| raw.display().to_string())
}

fn print(text: &str) -> Result<()> {
    Ok(io::stdout().write_all(text.as_bytes())?)
}

async fn compare(args: &Args) -> Result<()> {
    ensure!(!args.streams.contains(&0) && args.output_len > 1 && args.input_len > 0, "nothing to measure");
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let longest = (args.prefix_len + regimes::SUFFIX).max(args.input_len).max(args.prefill_len) + args.output_len;
    let slots = args.streams.iter().copied().max().unwrap_or(1).max(regimes::CLIENTS);
    let setup = Setup::new(args, longest.next_multiple_of(256), slots)?;
    let write = |name: &str, text: String| {
        let file = args.out.join(name);
        fs::write(&file, text).with_context(|| file.display().to_string())
    };
    write("setup.json", describe(&setup)?)?;
    let mut rows = Vec::new();
    for round in 0..usize::from(args.rounds) {
        let mut order = Program::ALL;
        order.rotate_left(round % 2);
        for program in order {
            eprintln!("round {}, {}", round + 1, program.name());
            let mut add = |regime: &str, figure: &str, value: f64| {
                let (program, regime, figure) = (program.name().into(), regime.into(), figure.into());
                rows.push(Row { round, program, regime, figure, value });
            };
            let server = setup.start(program).await?;
            let figures = regimes::measure(&server, args, round as u64).await.with_context(|| program.name())?;
            drop(server);
            figures.iter().for_each(|figure| add(&figure.regime, figure.name, figure.value));
            if args.llama_bench.is_some() {
                for (figure, value) in in_process(&setup, program)? {
                    add("in process, best threads", &figure, value);
                }
            }
        }
        // After every round, so that an interrupted comparison leaves what it has.
        write("raw.csv", table::csv(&rows))?;
    }
    write("table.md", table::markdown(&rows))?;
    write("throughput.svg", table::svg(&rows)?)?;
    print(&table::markdown(&rows))
}

/// Prefill and decode of one stream, with as many threads as serve each best.
fn in_process(setup: &Setup<'_>, program: Program) -> Result<Vec<(String, f64)>> {
    let args = setup.args;
    let mut best = [0f64; 2];
    let mut counts = vec![args.threads.div_ceil(2), args.threads];
    counts.dedup();
    for threads in counts {
        let rates = setup.in_process(program, threads)?.unwrap_or_default();
        best.iter_mut().zip(rates).for_each(|(best, rate)| *best = best.max(rate));
    }
    let names = [format!("pp{} tok/s", args.prefill_len), format!("tg{} tok/s", args.output_len)];
    Ok(names.into_iter().zip(best).collect())
}

/// What a reader needs to repeat the run.
fn describe(setup: &Setup<'_>) -> Result<String> {
    let args = setup.args;
    let commit = Command::new("git").args(["rev-parse", "HEAD"]).output().ok().filter(|o| o.status.success());
    let commit = commit.and_then(|o| String::from_utf8(o.stdout).ok()).map(|c| c.trim().to_owned());
    let command = |program| {
        let command = setup.command(program, 0);
        let words = [command.get_program()].into_iter().chain(command.get_args());
        words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    };
    let description = json!({
        "processor": baton_loadgen::processor(),
        "commit": commit,
        "baton": programs::version(&args.baton),
        "llama.cpp": programs::version(&args.llama_server),
        "commands": {"baton": command(Program::Baton), "llama.cpp": command(Program::Peer)},
        "threads": args.threads,
        "rounds": args.rounds,
        "streams": args.streams,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "prefix_len": args.prefix_len,
        "prefill_len": args.prefill_len,
    });
    Ok(serde_json::to_string_pretty(&description)? + "\n")
}
