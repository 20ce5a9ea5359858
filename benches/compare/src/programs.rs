//! The programs under comparison: how each is started, and what each says of a model in its own process.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use baton_loadgen::{LocalServer, free_port};
use serde_json::Value;

use crate::Args;

/// Loading a large model from a cold disk takes long.
const START: Duration = Duration::from_secs(600);

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Baton,
    Peer,
}

impl Program {
    pub const ALL: [Program; 2] = [Program::Baton, Program::Peer];

    /// As tables and files have it.
    pub fn name(self) -> &'static str {
        match self {
            Program::Baton => "baton",
            Program::Peer => "llama.cpp",
        }
    }
}

/// What the runs have in common.
pub struct Setup<'a> {
    pub args: &'a Args,
    /// Tokens of a sequence, at most.
    pub context: usize,
    /// Sequences at once, at most.
    pub slots: usize,
    /// What this build of the peer calls its options.
    peer: PeerFlags,
}

struct PeerFlags {
    /// Weights in memory of its own, which can have large pages.
    load: [&'static str; 2],
    bench_load: [&'static str; 2],
}

impl<'a> Setup<'a> {
    pub fn new(args: &'a Args, context: usize, slots: usize) -> Result<Self> {
        let help = |program: &Path| -> Result<String> {
            let output = Command::new(program).arg("--help").output().with_context(|| program.display().to_string())?;
            Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
        };
        let server =
            if help(&args.llama_server)?.contains("--load-mode") { ["--load-mode", "none"] } else { ["--no-mmap", ""] };
        let bench = match &args.llama_bench {
            Some(program) if !help(program)?.contains("--load-mode") => ["-mmp", "0"],
            _ => ["--load-mode", "none"],
        };
        Ok(Self { args, context, slots, peer: PeerFlags { load: server, bench_load: bench } })
    }

    /// The command that serves the model on `port`.
    pub fn command(&self, program: Program, port: u16) -> Command {
        let (port, threads) = (port.to_string(), self.args.threads.to_string());
        let (context, slots) = (self.context, self.slots.to_string());
        match program {
            Program::Baton => {
                let mut command = Command::new(&self.args.baton);
                command.arg("serve").arg(self.baton_model()).args(["--port", &port, "--threads", &threads]);
                command.args([
                    "--max-model-len",
                    &context.to_string(),
                    "--max-num-seqs",
                    &slots,
                    "--log-level",
                    "info",
                ]);
                command.args(&self.args.baton_flags);
                command
            }
            Program::Peer => {
                let mut command = Command::new(&self.args.llama_server);
                command.arg("-m").arg(&self.args.model).args(["--host", "127.0.0.1", "--port", &port, "-np", &slots]);
                command.args(["-t", &threads, "-tb", &threads, "-c", &(context * self.slots).to_string()]);
                command.args(["-fa", "on", "--no-webui"]).args(self.peer.load.iter().filter(|f| !f.is_empty()));
                command.args(&self.args.llama_flags).env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
                command
            }
        }
    }

    fn baton_model(&self) -> &PathBuf {
        self.args.baton_model.as_ref().unwrap_or(&self.args.model)
    }

    /// Starts it; what it says goes to a file of `--out`.
    pub async fn start(&self, program: Program) -> Result<LocalServer> {
        let port = free_port()?;
        let mut command = self.command(program, port);
        let log = File::create(self.args.out.join(format!("{}.log", program.name())))?;
        command.stdout(log.try_clone()?).stderr(log);
        let ready = match program {
            Program::Baton => "/ready",
            Program::Peer => "/health",
        };
        LocalServer::launch(command, port, ready, START)
            .await
            .with_context(|| format!("{}; see its log in {}", program.name(), self.args.out.display()))
    }

    /// Tokens per second of a prompt and of one stream in its own process, with so many threads; none of a peer without
    /// `--llama-bench`.
    pub fn in_process(&self, program: Program, threads: usize) -> Result<Option<[f64; 2]>> {
        let threads = threads.to_string();
        let [prompt, generated] = [self.args.prefill_len, self.args.output_len].map(|n| n.to_string());
        let tests = ["-p", &prompt, "-n", &generated, "-r", "3", "-t", &threads];
        let results: Vec<Value> = match program {
            Program::Baton => {
                let mut command = Command::new(&self.args.baton);
                command.args(["bench", "local"]).arg(self.baton_model()).args(tests).arg("--json");
                let result: Value = serde_json::from_str(&output(&mut command)?)?;
                result["results"].as_array().context("no results")?.clone()
            }
            Program::Peer => {
                let Some(bench) = &self.args.llama_bench else { return Ok(None) };
                let mut command = Command::new(bench);
                command.arg("-m").arg(&self.args.model).args(tests).args(["-fa", "1", "-o", "jsonl"]);
                command.args(self.peer.bench_load).env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
                output(&mut command)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?
            }
        };
        let rate = |length: &str| {
            let result = results.iter().find(|r| r[length].as_u64().is_some_and(|n| n > 0));
            result.and_then(|r| r["median_ts"].as_f64().or_else(|| median_of(&r["samples_ts"])))
        };
        let rates = [rate("n_prompt"), rate("n_gen")];
        let [Some(prompt), Some(generated)] = rates else { anyhow::bail!("no rates in {results:?}") };
        Ok(Some([prompt, generated]))
    }
}

fn median_of(samples: &Value) -> Option<f64> {
    let samples: Vec<f64> = samples.as_array()?.iter().filter_map(Value::as_f64).collect();
    (!samples.is_empty()).then(|| baton_loadgen::median(&samples))
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The first line that a program prints of its version.
pub fn version(program: &Path) -> String {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let text = output.map(|o| String::from_utf8_lossy(&[o.stdout, o.stderr].concat()).into_owned()).unwrap_or_default();
    text.lines().find(|l| l.contains("version") || l.starts_with("baton")).unwrap_or("unknown").to_owned()
}
