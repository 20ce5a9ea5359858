//! `baton rollout`: the admin routes of a server by command. Ends with 0 when it is done, 1 when it was refused or the
//! candidate was rolled back, 2 when it could not be tried.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use baton_handoff::Verdict;
use baton_loadgen::{Client, Target};
use chrono::{DateTime, Local};
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::journal::Journal;
use super::plan::Promotion;
use crate::bench::base_url;
use crate::settings::Secret;
use crate::state_dir::StateDir;

const ROLLOUT: &str = "/admin/rollout";
const GENERATIONS: &str = "/admin/generations";
/// How often a rollout is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Digits of a digest that are shown.
const DIGITS: usize = 12;

/// What `baton rollout` takes.
#[derive(Debug, Args)]
#[command(
    after_help = "A server takes rollouts if it was started with --state-dir and --admin-api-key. Exit codes: 0 done, 1 \
    refused or rolled back, 2 could not be tried."
)]
pub struct RolloutArgs {
    #[command(subcommand)]
    command: Command,

    /// The server, http://HOST:PORT; with --admin-port, that port
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000", value_parser = base_url, global = true)]
    url: String,

    /// Sent as bearer token
    #[arg(long, value_name = "KEY", env = "BATON_ADMIN_API_KEY", hide_env_values = true, global = true)]
    admin_key: Option<Secret>,

    /// Print the server's own answer
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show generations, the rollout, and what is observed of both
    Status,
    /// Load a candidate beside the model that serves, judge it, and follow a plan
    Start(StartArgs),
    /// Let the candidate answer part of the requests unseen, and compare
    Shadow {
        /// Part of the requests, 0 to 1
        #[arg(value_parser = share)]
        share: f64,
    },
    /// Let the candidate answer part of the requests
    Share {
        /// Part of the requests, 0 to 1
        #[arg(value_parser = share)]
        share: f64,
    },
    /// Let the candidate serve
    Promote {
        /// Wait until the generation before it has finished what it began
        #[arg(long)]
        wait: bool,
    },
    /// Take the candidate away
    Rollback {
        /// For the log and the journal
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Wait until the candidate has finished what it began
        #[arg(long)]
        wait: bool,
    },
    /// Forget all promotions of a server that does not run: it serves the model it is started with again
    Reset {
        /// As of the server
        #[arg(long, value_name = "DIR", env = "BATON_STATE_DIR")]
        state_dir: PathBuf,
    },
}

#[derive(Debug, Args)]
struct StartArgs {
    /// Checkpoint folder or .gguf file of the server
    #[arg(value_name = "MODEL", required_unless_present = "plan")]
    model: Option<PathBuf>,

    /// JSON with stages, rules and how to promote; without stages the candidate stands until it is commanded
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,

    /// What people call this generation
    #[arg(long)]
    name: Option<String>,

    /// A stage of the plan: part of the requests, answered unseen
    #[arg(long, value_name = "SHARE", value_parser = share, conflicts_with = "plan")]
    shadow: Option<f64>,

    /// A stage of the plan, after --shadow: part of the requests
    #[arg(long, value_name = "SHARE", value_parser = share, conflicts_with = "plan")]
    share: Option<f64>,

    /// Requests after which each of the two stages may end
    #[arg(long, value_name = "N", conflicts_with = "plan")]
    requests: Option<u64>,

    /// Seconds after which each of the two stages may end
    #[arg(long, value_name = "N", conflicts_with = "plan")]
    seconds: Option<u64>,

    /// Whether the end of the last stage promotes [default: auto with stages]
    #[arg(long, value_enum)]
    promote: Option<Promotion>,

    /// Wait until the candidate serves, is rolled back, or waits for a command
    #[arg(long)]
    wait: bool,
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "expected 0 to 1".into())
}

/// Runs the command.
pub fn main(args: &RolloutArgs) -> Result<Verdict> {
    Ok(if run(args)? { Verdict::Pass } else { Verdict::Fail })
}

/// Whether it was done.
fn run(args: &RolloutArgs) -> Result<bool> {
    if let Command::Reset { state_dir } = &args.command {
        return reset(state_dir);
    }
    let api_key = args.admin_key.as_ref().map(|key| key.0.clone());
    let client = Client::new(Target { base: args.url.clone(), api_key });
    let server = Server { client, json: args.json };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match &args.command {
            Command::Status => server.status().await,
            Command::Start(start) => server.command("", start.body()?, start.wait).await,
            Command::Shadow { share } => server.command("/shadow", json!({"share": share}), false).await,
            Command::Share { share } => server.command("/share", json!({"share": share}), false).await,
            Command::Promote { wait } => server.command("/promote", json!({}), *wait).await,
            Command::Rollback { reason, wait } => {
                let body = reason.as_ref().map_or(json!({}), |reason| json!({"reason": reason}));
                // What was asked for is no failure.
                server.command("/rollback", body, *wait).await
            }
            Command::Reset { .. } => unreachable!("needs no server"),
        }
    })
}

fn reset(state_dir: &Path) -> Result<bool> {
    let mut journal = Journal::open(StateDir::open(state_dir)?)?;
    let promotions = journal.ledger().promotions.clone();
    journal.reset()?;
    for (base, promoted) in promotions {
        show(&format!("{base} serves again, instead of {}", promoted.model.display()));
    }
    Ok(true)
}

impl StartArgs {
    fn body(&self) -> Result<Value> {
        let mut body = match &self.plan {
            None => Map::new(),
            Some(file) => {
                let context = || format!("--plan {}", file.display());
                serde_json::from_slice(&fs::read(file).with_context(context)?).with_context(context)?
            }
        };
        if let Some(model) = &self.model {
            // On this machine, a path means what it means here.
            let model = if model.exists() { std::path::absolute(model)? } else { model.clone() };
            body.insert("model".into(), json!(model));
        }
        if let Some(name) = &self.name {
            body.insert("name".into(), json!(name));
        }
        if let Some(promote) = self.promote {
            body.insert("promote".into(), json!(promote));
        }
        let mut stages = Vec::new();
        for (kind, share) in [("shadow", self.shadow), ("share", self.share)] {
            let Some(share) = share else { continue };
            let mut stage = Map::new();
            stage.insert(kind.into(), json!(share));
            stage.extend(self.requests.map(|n| ("requests".into(), json!(n))));
            stage.extend(self.seconds.map(|n| ("seconds".into(), json!(n))));
            stages.push(stage);
        }
        if !stages.is_empty() {
            body.insert("stages".into(), json!(stages));
        } else if self.requests.or(self.seconds).is_some() {
            bail!("--requests and --seconds end the stages of --shadow and --share");
        }
        Ok(body.into())
    }
}

/// Prints what was asked for.
fn show(text: &str) {
    #[allow(clippy::print_stdout)]
    {
        println!("{text}");
    }
}

struct Server {
    client: Client,
    json: bool,
}

impl Server {
    async fn get(&self, path: &str) -> Result<Result<Value, String>> {
        let (status, body) = self.client.get(path).await?;
        let body = serde_json::from_str(&body).with_context(|| format!("{path} does not answer with JSON"))?;
        Ok(if status == 200 { Ok(body) } else { Err(refusal(status.as_u16(), &body)) })
    }

    async fn status(&self) -> Result<bool> {
        let (status, generations) = match (self.get(ROLLOUT).await?, self.get(GENERATIONS).await?) {
            (Ok(status), Ok(generations)) => (status, generations),
            (Err(refusal), _) | (_, Err(refusal)) => {
                eprintln!("baton: {refusal}");
                return Ok(false);
            }
        };
        if self.json {
            show(&serde_json::to_string_pretty(&json!({"rollout": status, "generations": generations}))?);
        } else {
            show(&table(&status, &generations));
        }
        Ok(true)
    }

    async fn command(&self, command: &str, body: Value, wait: bool) -> Result<bool> {
        let (code, mut status) = self.client.post(&format!("{ROLLOUT}{command}"), &body).await?;
        if code != 200 {
            if self.json {
                show(&serde_json::to_string_pretty(&status)?);
            }
            eprintln!("baton: {}", refusal(code.as_u16(), &status));
            return Ok(false);
        }
        let (id, mut shown) = (status["id"].clone(), String::new());
        loop {
            let line = progress(&status);
            if !self.json && line != shown {
                eprintln!("{line}");
                shown = line;
            }
            let rollout = &status["rollout"];
            let starts = command.is_empty() && rollout["waits_for_command"] == true;
            if !wait || rollout["ended"] == true || starts || status["id"] != id {
                break;
            }
            tokio::time::sleep(LOOK).await;
            status = match self.get(ROLLOUT).await? {
                Ok(status) => status,
                Err(refusal) => bail!("{refusal}"),
            };
        }
        if self.json {
            show(&serde_json::to_string_pretty(&status)?);
        }
        let against = ["rolled_back", "rolling_back", "failed"].map(Value::from).contains(&status["phase"]);
        Ok(command == "/rollback" || !against)
    }
}

fn refusal(code: u16, body: &Value) -> String {
    format!("{code}: {}", body["error"]["message"].as_str().unwrap_or("no reason is given"))
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => format!("{:.4}", number.as_f64().unwrap_or(f64::NAN)),
        other => other.to_string(),
    }
}

/// One line: where the rollout stands.
fn progress(status: &Value) -> String {
    let rollout = &status["rollout"];
    let mut line = format!("rollout {}: {}", text(&status["id"]), text(&status["phase"]));
    if let Some(share) = rollout["traffic"]["share"].as_f64() {
        line += &format!(" {share}");
    }
    let stage = &rollout["stage"];
    if stage.is_object() {
        line += &format!(", stage {} of {}", stage["number"], stage["of"]);
        let (requests, seconds) = (&stage["requests"], &stage["seconds"]);
        line += &format!(", {} of {} requests", requests["seen"], requests["wanted"]);
        line += &format!(", {} of {} s", seconds["passed"], seconds["wanted"]);
    }
    if rollout["waits_for_command"] == true {
        line += ", waits for a command";
    }
    if let Some(reason) = rollout["reason"].as_str() {
        line += &format!(": {reason}");
    }
    line
}

fn table(status: &Value, generations: &Value) -> String {
    let mut lines = vec![progress(status)];
    let rollout = &status["rollout"];
    if rollout.is_object() {
        lines.push(format!("model {}, called {}", text(&rollout["model"]), text(&rollout["name"])));
        lines.push(format!("gate: {}", text(&rollout["gate"]["summary"])));
    }
    lines.push(String::new());
    let row = |cells: [String; 5]| {
        let [a, b, c, d, e] = cells;
        format!("{a:14} {b:12} {c:>10} {d:>18} {e:12}").trim_end().to_owned()
    };
    lines.push(row(["GENERATION", "ROLE", "IN FLIGHT", "BLOCKS USED/TOTAL", "HAND-OFF"].map(str::to_owned)));
    for generation in generations["data"].as_array().into_iter().flatten() {
        let digest: String = text(&generation["generation"]).chars().take(DIGITS).collect();
        let blocks = &generation["kv_blocks"];
        lines.push(row([
            digest,
            text(&generation["role"]),
            text(&generation["requests_in_flight"]),
            format!("{}/{}", text(&blocks["used"]), text(&blocks["total"])),
            text(&generation["handoff"]["state"]),
        ]));
    }
    let observed = &rollout["observed"];
    if observed.is_object() {
        lines.push(String::new());
        let row = |name: &str, of: [&Value; 2]| format!("{name:22} {:>12} {:>12}", text(of[0]), text(of[1]));
        lines.push(row("SINCE IT WAS STAGED", [&json!("SERVING"), &json!("CANDIDATE")]));
        let both = [&observed["serving"], &observed["candidate"]];
        for (name, field) in [("requests", "requests"), ("errors", "errors"), ("error rate", "error_rate")] {
            lines.push(row(name, both.map(|of| &of[field])));
        }
        for (name, field) in [("median ttft, ms", "ttft_ms"), ("median tpot, ms", "tpot_ms")] {
            lines.push(row(name, both.map(|of| &of["median"][field])));
        }
        let shadow = &observed["shadow"];
        for (name, field) in [("shadow ttft, ms", "ttft_ms"), ("shadow tpot, ms", "tpot_ms")] {
            lines.push(row(name, [&shadow["serving"][field], &shadow["candidate"][field]]));
        }
        let figures = ["requests", "failed", "compared", "agreement"].map(|name| text(&shadow[name]));
        let [requests, failed, compared, agreement] = figures;
        lines.push(format!(
            "shadows: {requests}, {failed} failed, {compared} compared, agreement of tokens {agreement}"
        ));
    }
    lines.push(String::new());
    for record in status["transitions"].as_array().into_iter().flatten() {
        let time = DateTime::from_timestamp_millis(record["unix_ms"].as_i64().unwrap_or(0)).unwrap_or_default();
        let time = time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S");
        let details = &record["details"];
        let reason = details["reason"].as_str().or(details["summary"].as_str()).map(str::to_owned);
        let reason = reason.or_else(|| details["part"].as_f64().map(|part| part.to_string())).unwrap_or_default();
        let line = format!("{time}  {:>4}  {:12} {reason}", text(&record["rollout"]), text(&record["transition"]));
        lines.push(line.trim_end().to_owned());
    }
    lines.join("\n")
}
