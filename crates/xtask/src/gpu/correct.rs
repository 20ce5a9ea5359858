//! Does the device compute what it should? The binary's own self-test, the goldens and the bundled model over HTTP, and
//! the vendor's checker of memory and races.

use std::{fs, os::unix::fs::symlink, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use baton_loadgen::{
    Client,
    evaluation::{ask, rows},
};
use serde_json::{Value, json};

use super::{
    bench::{serve, within},
    command,
    run::{Found, Scale, Site},
};

/// Goldens in the order in which they are judged: each architecture once, then its variants, as many as may be carried.
pub const GOLDENS: [&str; 16] = [
    "llama-rope3",
    "qwen2-tied",
    "deepseek-v3",
    "qwen3-moe",
    "gemma3",
    "mistral-window",
    "mixtral",
    "qwen3",
    "phi3",
    "gemma2",
    "deepseek-v2",
    "llama-bias",
    "qwen2-window",
    "qwen3-moe-sparse",
    "deepseek-v2-bias",
    "deepseek-v3-fp8",
];
/// How many of them are judged in quick and in a rehearsal.
const FEW: [usize; 2] = [6, 1];
/// On log-probabilities in float32, as in the tests of goldens.
const TOLERANCE: f64 = 1e-3;

/// Cases that go through most kernels in little time; the checker makes them many times slower.
const SANITIZED: [&str; 5] = ["norm", "rope", "linear", "attention", "moe"];

/// `baton doctor`: libraries, driver, chip.
pub fn doctor(site: &Site, until: Instant) -> Result<Found> {
    let ended = site.run("doctor", &["doctor", "--json"], until)?;
    let found = site.output("doctor").unwrap_or_default();
    let problems = found["problems"].as_array().into_iter().flatten().filter_map(|problem| problem.as_str());
    let mut reasons: Vec<String> = problems.map(str::to_owned).collect();
    if reasons.is_empty() {
        reasons.extend(ended.succeeded().err());
    }
    Ok(Found::new(reasons, found))
}

/// `baton selftest`: every operation in bf16, f16 and f32, then the bundled model.
pub fn selftest(site: &Site, until: Instant) -> Result<Found> {
    let report = site.work.join("selftest.json");
    let mut args = vec!["selftest", "--report", path(&report)?];
    if site.scale == Scale::Rehearsal {
        args.extend(["--filter", "norm"]);
    }
    let ended = site.run("selftest", &args, until)?;
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap_or_default()).unwrap_or_default();
    let cases = report["cases"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of = |verdict: &str| cases.iter().filter(|case| case["verdict"] == verdict).collect::<Vec<_>>();
    let count = |verdict| (verdict, of(verdict).len());
    let counts = ["pass", "fail", "skipped", "not_run"].map(count).into_iter();
    let figures = json!({
        "counts": counts.collect::<std::collections::BTreeMap<_, _>>(),
        "running": report["running"],
        "failed": of("fail"),
        "skipped": of("skipped").iter().map(|case| &case["name"]).collect::<Vec<_>>(),
        "model": cases.iter().find(|case| case["name"] == "model-abacus"),
    });
    Ok(Found::new(ended.succeeded().err().into_iter().collect(), figures))
}

/// The bundled model's evaluation over HTTP: as right as its reference, to a point.
pub fn abacus(site: &Site, until: Instant) -> Result<Found> {
    let folder = site.models.join("abacus");
    let mut questions = rows(&folder.join("eval.jsonl"))?;
    if site.scale == Scale::Rehearsal {
        questions.truncate(4);
    }
    let references = rows(&folder.join("eval_reference.jsonl"))?;
    let reference = |question: &Value| references.iter().any(|r| r["id"] == question["id"] && r["right"] == true);
    let right_reference = questions.iter().filter(|question| reference(question)).count();
    let answers = within(until, async {
        let server = serve(site, "abacus", &["--max-num-seqs", "32"], until).await?;
        ask(server.target(), &questions).await
    })?;
    let right = answers.iter().filter(|(row, answer)| answer.is_right(row)).count();
    let apart = right.abs_diff(right_reference) * 100 > questions.len();
    let reason = apart.then(|| format!("{right} of {} right, the reference has {right_reference}", questions.len()));
    let figures = json!({"questions": questions.len(), "right": right, "right_reference": right_reference});
    Ok(Found::new(reason.into_iter().collect(), figures))
}

/// Greedy continuations of golden checkpoints in float32: the same tokens, and their log-probabilities.
pub fn goldens(site: &Site, until: Instant) -> Result<Found> {
    let chosen = match site.scale {
        Scale::Full => &GOLDENS[..],
        Scale::Quick => &GOLDENS[..FEW[0]],
        Scale::Rehearsal => &GOLDENS[..FEW[1]],
    };
    let (mut reasons, mut figures) = (Vec::new(), serde_json::Map::new());
    for name in chosen {
        match golden(site, name, until) {
            Ok(worst) => _ = figures.insert((*name).into(), json!({"max_abs_logprob_diff": worst})),
            Err(error) => reasons.push(format!("{name}: {error:#}")),
        }
        if Instant::now() >= until {
            break;
        }
    }
    Ok(Found::new(reasons, json!({"of": chosen.len(), "equal": figures})))
}

/// The largest difference of a log-probability.
fn golden(site: &Site, name: &str, until: Instant) -> Result<f64> {
    let from = site.models.join("golden").join(name);
    let folder = site.work.join("goldens").join(name);
    let golden: Value = serde_json::from_slice(&fs::read(from.join("golden.json"))?)?;
    if !folder.exists() {
        fs::create_dir_all(&folder)?;
        for file in fs::read_dir(&from)? {
            let file = file?.path();
            symlink(&file, folder.join(file.file_name().context("a name")?))?;
        }
        // Prompts are ids, and so is what comes back: any tokenizer will do.
        let model = json!({"type": "BPE", "vocab": {"a": 0}, "merges": []});
        fs::write(
            folder.join("tokenizer.json"),
            json!({"version": "1.0", "added_tokens": [], "model": model}).to_string(),
        )?;
    }
    let log = format!("golden-{name}");
    within(until, async {
        let server = serve(site, &log, &[path(&folder)?, "--dtype", "float32", "--max-num-seqs", "4"], until).await?;
        let mut worst = 0f64;
        for prompt in golden["prompts"].as_array().context("no prompts")? {
            worst = worst.max(continued(&server.client(), prompt).await.with_context(|| prompt["name"].to_string())?);
        }
        Ok(worst)
    })
}

async fn continued(client: &Client, prompt: &Value) -> Result<f64> {
    let ids = prompt["greedy_ids"].as_array().context("no ids")?;
    let body = json!({
        "prompt": prompt["ids"], "max_tokens": ids.len(), "temperature": 0, "ignore_eos": true, "logprobs": 1,
        "return_token_ids": true,
    });
    let (status, reply) = client.post("/v1/completions", &body).await?;
    ensure!(status == 200, "{status}: {reply}");
    let choice = &reply["choices"][0];
    ensure!(choice["token_ids"] == prompt["greedy_ids"], "other tokens: {}", choice["token_ids"]);
    let numbers = |values: &Value| -> Result<Vec<f64>> {
        let values = values.as_array().context("no log-probabilities")?.iter();
        values.map(|value| value.as_f64().context("a number")).collect()
    };
    let expected = numbers(&prompt["greedy_logprobs"])?;
    let actual = numbers(&choice["logprobs"]["token_logprobs"])?;
    ensure!(actual.len() == expected.len(), "{} log-probabilities for {} tokens", actual.len(), expected.len());
    let worst = actual.iter().zip(&expected).map(|(a, e)| (a - e).abs()).fold(0.0, f64::max);
    ensure!(worst <= TOLERANCE, "a log-probability is off by {worst}");
    Ok(worst)
}

/// compute-sanitizer over part of the self-test, if it is there.
pub fn sanitizer(site: &Site, until: Instant) -> Result<Found> {
    const PROGRAM: &str = "compute-sanitizer";
    const FOUND: &str = "86";
    let mut version = site.command(Path::new(PROGRAM));
    let there = command::run(version.arg("--version"), &site.logs(), "sanitizer", until);
    if !there.is_ok_and(|ended| ended.succeeded().is_ok()) {
        return Ok(Found::skipped("there is no compute-sanitizer in the path"));
    }
    let (mut reasons, mut ran) = (Vec::new(), Vec::new());
    for tool in ["memcheck", "racecheck"] {
        let mut checked = site.command(Path::new(PROGRAM));
        checked.args(["--tool", tool, "--error-exitcode", FOUND]).arg(&site.baton);
        checked.args(["selftest", "--device", &site.device, "--filter"]).args(SANITIZED);
        let ended = command::run(&mut checked, &site.logs(), tool, until)?;
        let said = command::end_of(&site.logs().join(format!("{tool}.out")));
        reasons.extend(ended.succeeded().err().map(|reason| format!("{tool}: {reason} {said}")));
        ran.push(tool);
    }
    Ok(Found::new(reasons, json!({"tools": ran, "filter": SANITIZED})))
}

/// A path as an argument.
pub fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
