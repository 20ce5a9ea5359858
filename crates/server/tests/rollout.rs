//! Rollouts through the real binary: streams that notice nothing, rules that take a candidate back, restarts, refusals.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use baton_loadgen::{Client, LocalServer, Target, free_port};
use common::bundle::{Bundle, models};
use serde_json::{Value, json};
use tempfile::TempDir;

const BATON: &str = env!("CARGO_BIN_EXE_baton");
const ADMIN: &str = "admin";
const ROLLOUT: &str = "/admin/rollout";
/// How long any one thing may take.
const GUARD: Duration = Duration::from_secs(60);
/// Questions that streams ask.
const QUESTIONS: usize = 6;

/// A copy of the bundled model without its bundle, to be changed.
struct Model(Bundle);

impl Model {
    fn copy() -> Self {
        let model = Bundle::copy(&models("abacus"));
        fs::remove_file(model.file("handoff.json")).expect("it was there");
        Self(model)
    }

    /// With other bytes in one tensor.
    fn changed(tensor: &str, change: impl FnOnce(&mut [u8])) -> Self {
        let model = Self::copy();
        model.0.tensors([tensor], |[bytes]| change(bytes));
        model
    }

    /// One that answers otherwise: the last norm is off.
    fn other() -> Self {
        // The high byte of a bf16 has the sign: every fourth channel is turned round.
        Self::changed("model.norm.weight", |bytes| {
            bytes.chunks_mut(8).for_each(|four| four[1] ^= 0x80);
        })
    }

    /// One that computes infinities from finite weights.
    fn infinite() -> Self {
        let huge = 0x7f00_u16.to_le_bytes();
        Self::changed("model.norm.weight", |bytes| bytes.chunks_mut(2).for_each(|b| b.copy_from_slice(&huge)))
    }

    /// One that answers the same, but is another generation.
    fn same_answers() -> Self {
        let model = Self::copy();
        model.retell();
        model
    }

    /// Says the same in other bytes.
    fn retell(&self) {
        self.0.edit("config.json", |config| config.push(b'\n'));
    }

    fn path(&self) -> &str {
        self.0.path().to_str().expect("UTF-8")
    }
}

/// A server that takes rollouts.
struct Server {
    local: LocalServer,
    admin: Client,
}

impl Server {
    async fn start(model: &str, state: &Path, flags: &[&str]) -> Self {
        let port = free_port().expect("a port");
        let local =
            LocalServer::launch(command(port, model, state, flags), port, "/ready", GUARD).await.expect("it starts");
        let admin = Client::new(Target { api_key: Some(ADMIN.into()), ..local.target().clone() });
        Self { local, admin }
    }

    fn address(&self) -> SocketAddr {
        self.local.address()
    }

    /// `POST /admin/rollout…`, status and answer.
    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let (status, reply) = self.admin.post(&format!("{ROLLOUT}{path}"), &body).await.expect("an answer");
        (status.as_u16(), reply)
    }

    async fn command(&self, path: &str, body: Value) {
        let (status, reply) = self.post(path, body).await;
        assert_eq!(status, 200, "{path}: {reply}");
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.admin.get(path).await.expect("an answer");
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).expect("JSON")
    }

    /// Waits for a phase, and gives the status.
    async fn until(&self, phase: &str) -> Value {
        let start = Instant::now();
        loop {
            let status = self.get(ROLLOUT).await;
            if status["phase"] == phase {
                return status;
            }
            let ended = status["rollout"]["ended"] == true;
            assert!(!ended && start.elapsed() < GUARD, "not {phase}: {status:#}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// From start to promotion.
    async fn roll_to(&self, model: &str) {
        self.command("", json!({"model": model})).await;
        self.until("standing").await;
        self.command("/promote", json!({})).await;
        self.until("promoted").await;
    }

    /// Names of all threads but the runtime's, whose number is its own business.
    fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.local.pid())).expect("a process");
        let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
        let mut names: Vec<String> = names.filter(|name| !name.starts_with("tokio")).collect();
        names.sort();
        names
    }

    /// The generation that answers now.
    fn serves(&self) -> String {
        stream(self.address(), 0).expect("a reply").generation
    }

    /// Without a last word.
    async fn kill(mut self) {
        let pid = self.local.pid().to_string();
        assert!(Command::new("kill").args(["-KILL", &pid]).status().expect("kill").success());
        assert!(!self.local.wait(GUARD).await.expect("it ends").success());
    }
}

fn command(port: u16, model: &str, state: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(BATON);
    command.args(["serve", model, "--port", &port.to_string(), "--served-model-name", "m", "--log-level", "warn"]);
    command.args(["--admin-api-key", ADMIN, "--state-dir", state.to_str().expect("UTF-8")]).args(flags);
    // What these models compute is not what any bundle says.
    command.env("BATON_HANDOFF", "off");
    command
}

/// A streamed reply.
#[derive(Debug)]
struct Reply {
    /// From the head.
    generation: String,
    /// Of all chunks.
    fingerprints: BTreeSet<String>,
    text: String,
}

/// Asks a question over a connection of its own. As HTTP/1.0, so that the body is what follows the head.
fn stream(address: SocketAddr, n: usize) -> Result<Reply, String> {
    let question = format!("What is {} + {}?", 120 + n * 31, n * 77 + 13);
    let body = json!({
        "model": "m", "stream": true, "temperature": 0, "max_tokens": 120,
        "messages": [{"role": "user", "content": question}],
    });
    let body = body.to_string();
    let mut connection = TcpStream::connect(address).map_err(|error| error.to_string())?;
    let length = body.len();
    let head = format!("POST /v1/chat/completions HTTP/1.0\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
    let mut reply = String::new();
    connection.write_all((head + &body).as_bytes()).map_err(|error| error.to_string())?;
    connection.read_to_string(&mut reply).map_err(|error| error.to_string())?;
    let (head, body) = reply.split_once("\r\n\r\n").ok_or("no head")?;
    if !head.starts_with("HTTP/1.0 200") || !body.ends_with("data: [DONE]\n\n") {
        return Err(reply);
    }
    let generation = head.lines().find_map(|line| line.strip_prefix("x-baton-generation: ")).ok_or("no generation")?;
    let (mut fingerprints, mut text) = (BTreeSet::new(), String::new());
    for data in body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]") {
        let chunk: Value = serde_json::from_str(data).map_err(|error| error.to_string())?;
        fingerprints.insert(chunk["system_fingerprint"].as_str().ok_or("no fingerprint")?.to_owned());
        for part in ["reasoning_content", "content"] {
            text += chunk["choices"][0]["delta"][part].as_str().unwrap_or("");
        }
    }
    Ok(Reply { generation: generation.to_owned(), fingerprints, text })
}

/// Streams that never pause, each checked against what its generation answers alone.
struct Streams {
    stop: Arc<AtomicBool>,
    clients: Vec<thread::JoinHandle<Vec<String>>>,
}

/// Answers alone, by generation: fingerprint and texts.
type Alone = BTreeMap<String, (String, Vec<String>)>;

fn answers(address: SocketAddr, alone: &mut Alone) {
    for n in 0..QUESTIONS {
        let reply = stream(address, n).expect("a reply");
        let fingerprint = reply.fingerprints.first().expect("a fingerprint").clone();
        let known = alone.entry(reply.generation).or_insert_with(|| (fingerprint, Vec::new()));
        known.1.push(reply.text);
    }
}

impl Streams {
    fn start(address: SocketAddr, streams: usize, alone: &Arc<Alone>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |number: usize| {
            let (stop, alone) = (stop.clone(), alone.clone());
            thread::spawn(move || {
                let mut generations = Vec::new();
                let mut n = number;
                while !stop.load(Relaxed) {
                    let reply = stream(address, n % QUESTIONS).expect("a request failed");
                    let (fingerprint, texts) = &alone[&reply.generation];
                    assert_eq!(reply.fingerprints, [fingerprint.clone()].into(), "mixed");
                    assert_eq!(reply.text, texts[n % QUESTIONS], "not what {} answers alone", reply.generation);
                    generations.push(reply.generation);
                    n += 1;
                }
                generations
            })
        };
        Self { clients: (0..streams).map(client).collect(), stop }
    }

    /// How many replies there were, and of which generations.
    fn end(self) -> (usize, BTreeSet<String>) {
        self.stop.store(true, Relaxed);
        let seen: Vec<String> =
            self.clients.into_iter().flat_map(|client| client.join().expect("no failure")).collect();
        (seen.len(), seen.into_iter().collect())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_never_notice_rollouts_and_retired_generations_leave_nothing() {
    let (a, b, state) = (Model::copy(), Model::other(), TempDir::new().expect("a folder"));
    let server = Server::start(a.path(), state.path(), &[]).await;
    let mut alone = Alone::new();
    answers(server.address(), &mut alone);
    server.roll_to(b.path()).await;
    answers(server.address(), &mut alone);
    server.roll_to(a.path()).await;
    let [(_, of_a), (_, of_b)] = alone.values().collect::<Vec<_>>()[..] else { panic!("{alone:?}") };
    assert!(of_a.iter().zip(of_b).all(|(a, b)| a != b), "the two cannot be told apart: {alone:?}");

    let threads = server.threads();
    let streams = Streams::start(server.address(), 8, &Arc::new(alone));
    for n in 0..5 {
        let (next, after) = if n % 2 == 0 { (&b, &a) } else { (&a, &b) };
        server.roll_to(next.path()).await;
        // And one that is taken back while it answers.
        server.command("", json!({"model": after.path()})).await;
        server.until("standing").await;
        server.command("/share", json!({"share": 0.5})).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.command("/rollback", json!({})).await;
        server.until("rolled_back").await;
    }
    let (replies, generations) = streams.end();
    assert!(replies >= 8 && generations.len() == 2, "{replies} replies of {generations:?}");

    let generations = server.get("/admin/generations").await;
    let [last] = generations["data"].as_array().expect("a list").as_slice() else { panic!("{generations}") };
    assert_eq!((&last["role"], &last["kv_blocks"]["used"]), (&json!("serving"), &json!(0)), "{last}");
    assert_eq!(server.threads(), threads, "threads of engines that are gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_promotes_by_itself_what_answers_as_before() {
    let (a, b, state) = (Model::copy(), Model::same_answers(), TempDir::new().expect("a folder"));
    let server = Server::start(a.path(), state.path(), &[]).await;
    let before = server.serves();
    let mut alone = Alone::new();
    answers(server.address(), &mut alone);
    let candidate = Arc::new(AtomicBool::new(true));
    let clients = (0..4).map(|number| {
        let (address, go) = (server.address(), candidate.clone());
        thread::spawn(move || {
            (number..).take_while(|_| go.load(Relaxed)).all(|n| stream(address, n % QUESTIONS).is_ok())
        })
    });
    let clients: Vec<_> = clients.collect();
    let stages = json!([{"shadow": 1, "requests": 8}, {"share": 0.5, "requests": 8}]);
    let rules = json!({"min_requests": 5, "min_shadow_agreement": 1.0});
    server.command("", json!({"model": b.path(), "name": "retold", "stages": stages, "rules": rules})).await;
    let status = server.until("promoted").await;
    candidate.store(false, Relaxed);
    assert!(clients.into_iter().all(|client| client.join().expect("no panic")), "a request failed");
    let kinds =
        status["transitions"].as_array().expect("a list").iter().map(|t| t["transition"].as_str().unwrap_or(""));
    let expected = ["started", "loaded", "admitted", "shadow", "share", "promoted", "retired"];
    assert_eq!(kinds.collect::<Vec<_>>(), expected, "{status:#}");
    let shadow = &status["rollout"]["observed"]["shadow"];
    assert!(shadow["compared"].as_u64() >= Some(8) && shadow["agreement"] == 1.0, "{shadow}");
    assert_ne!(server.serves(), before);
    assert_eq!(status["rollout"]["name"], "retold");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_take_back_what_answers_otherwise_or_not_at_all() {
    let (a, state) = (Model::copy(), TempDir::new().expect("a folder"));
    let server = Server::start(a.path(), state.path(), &[]).await;
    let before = server.serves();
    let cases = [
        (Model::other(), json!({"min_requests": 3, "min_shadow_agreement": 0.999}), "min_shadow_agreement"),
        (Model::infinite(), json!({}), "nan_logits"),
    ];
    for (b, rules, rule) in cases {
        let stages = json!([{"shadow": 1, "requests": 1000}]);
        server.command("", json!({"model": b.path(), "stages": stages, "rules": rules})).await;
        server.until("shadow").await;
        let start = Instant::now();
        while server.get(ROLLOUT).await["phase"] == "shadow" {
            // Clients get what they always got.
            assert_eq!(server.serves(), before);
            assert!(start.elapsed() < GUARD);
        }
        let status = server.until("rolled_back").await;
        assert!(status["rollout"]["reason"].as_str().expect("a reason").starts_with(rule), "{status:#}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_promoted_serves_after_a_restart_and_what_is_not_does_not() {
    let (a, b, state) = (Model::copy(), Model::other(), TempDir::new().expect("a folder"));
    let server = Server::start(a.path(), state.path(), &[]).await;
    let of_a = server.serves();
    // Killed with a candidate that has traffic: it never was.
    server.command("", json!({"model": b.path()})).await;
    server.until("standing").await;
    server.command("/share", json!({"share": 0.5})).await;
    server.kill().await;
    let server = Server::start(a.path(), state.path(), &[]).await;
    assert_eq!(server.serves(), of_a);
    let status = server.get(ROLLOUT).await;
    assert_eq!((&status["id"], &status["phase"]), (&json!(1), &json!("rolled_back")), "{status:#}");
    assert!(status.to_string().contains("interrupted by a restart"), "{status:#}");

    // Killed after a promotion: it serves.
    server.roll_to(b.path()).await;
    let of_b = server.serves();
    assert_ne!(of_a, of_b);
    server.kill().await;
    let server = Server::start(a.path(), state.path(), &[]).await;
    assert_eq!(server.serves(), of_b);
    let status = server.get(ROLLOUT).await;
    assert_eq!((&status["id"], &status["phase"]), (&json!(2), &json!("promoted")), "{status:#}");
    assert_eq!(status["serving"]["model"], b.path());
    server.kill().await;

    // So it does without its base.
    let away = a.0.path().with_extension("away");
    fs::rename(a.path(), &away).expect("another name");
    let server = Server::start(a.path(), state.path(), &[]).await;
    assert_eq!(server.serves(), of_b);
    server.kill().await;
    fs::rename(away, a.path()).expect("its name");

    // Of another base the journal says nothing.
    let other = Model::same_answers();
    let server = Server::start(other.path(), state.path(), &[]).await;
    assert!(![&of_a, &of_b].contains(&&server.serves()));
    server.kill().await;

    // What was promoted has changed, then is gone: the start says how to go back, and that works.
    for refused in ["has changed since rollout 2", "is gone"] {
        if refused == "is gone" {
            fs::remove_dir_all(b.path()).expect("a folder");
        } else {
            b.retell();
        }
        let output = command(free_port().expect("a port"), a.path(), state.path(), &[]).output().expect("it runs");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains(refused), "{message}");
        assert!(message.contains("baton rollout reset") && message.contains(b.path()), "{message}");
    }
    let state_dir = state.path().to_str().expect("UTF-8");
    let output = Command::new(BATON).args(["rollout", "reset", "--state-dir", state_dir]).output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    let server = Server::start(a.path(), state.path(), &[]).await;
    assert_eq!(server.serves(), of_a);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_takes_its_candidate_back() {
    let (a, b, state) = (Model::copy(), Model::other(), TempDir::new().expect("a folder"));
    let mut server = Server::start(a.path(), state.path(), &[]).await;
    server.command("", json!({"model": b.path()})).await;
    server.until("standing").await;
    server.local.terminate().expect("a signal");
    assert!(server.local.wait(GUARD).await.expect("it ends").success());
    let journal = fs::read_to_string(state.path().join("rollout.jsonl")).expect("a journal");
    let last: Vec<&str> = journal.lines().rev().take(2).collect();
    assert!(last[1].contains("rolled_back") && last[1].contains("the server is stopping"), "{journal}");
    assert!(last[0].contains("retired"), "{journal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_is_refused_by_name_and_the_model_serves_on() {
    let (a, b, state) = (Model::copy(), Model::other(), TempDir::new().expect("a folder"));
    // So large a cache can be had once: what is not touched is not taken, but it is counted.
    let meminfo = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let kib = |l: &str| l.split_whitespace().nth(1)?.parse::<u64>().ok();
    let available = meminfo.lines().find(|l| l.starts_with("MemAvailable")).and_then(kib).expect("a number") << 10;
    let cache = (available / 10 * 6).to_string();
    let server = Server::start(a.path(), state.path(), &["--kv-cache-memory-bytes", &cache]).await;
    let before = server.serves();
    let (status, reply) = server.post("", json!({"model": b.path()})).await;
    let message = reply["error"]["message"].as_str().expect("a message");
    assert!(status == 400 && message.contains("not enough memory") && message.contains(&cache), "{message}");
    assert_eq!(server.get(ROLLOUT).await["phase"], "none");
    drop(server);

    let server = Server::start(a.path(), state.path(), &[]).await;
    let empty = TempDir::new().expect("a folder");
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let refused = [
        ("", json!({}), 400, "model"),
        ("", json!({"model": "/no/such/folder"}), 400, "/no/such/folder"),
        ("", json!({"model": text(empty.path())}), 400, "no weights"),
        ("", json!({"model": b.path(), "frobnicate": 1}), 400, "frobnicate"),
        ("", json!({"model": b.path(), "stages": [{"share": 2, "requests": 1}]}), 400, "share"),
        ("/promote", json!({}), 409, "no rollout"),
        ("/rollback", json!({}), 409, "no rollout"),
        ("/share", json!({"share": 1.5}), 400, "share"),
        ("/share", json!({"share": "half"}), 400, "share"),
        ("/shadow", json!({}), 400, "share"),
        ("/shadow", json!({"share": 0.1, "more": 1}), 400, "more"),
    ];
    for (path, body, status, name) in refused {
        let (got, reply) = server.post(path, body.clone()).await;
        assert!(got == status && reply["error"].to_string().contains(name), "{path} {body}: {got} {reply}");
    }
    // These are known only once it is read: the rollout fails, with the reason.
    let cut = Model::copy();
    let weights = cut.0.path().join("model.safetensors");
    let half = fs::read(&weights).expect("weights");
    fs::write(&weights, &half[..half.len() / 2]).expect("weights");
    for (model, reason) in [(a.path(), "is served already"), (cut.path(), "model.safetensors")] {
        server.command("", json!({"model": model})).await;
        let status = server.until("failed").await;
        assert!(status["rollout"]["reason"].as_str().expect("a reason").contains(reason), "{status:#}");
    }
    server.command("", json!({"model": b.path()})).await;
    let (status, reply) = server.post("", json!({"model": b.path()})).await;
    assert!(status == 409 && reply.to_string().contains("under way"), "{reply}");
    server.until("standing").await;
    server.command("/rollback", json!({"reason": "enough"})).await;
    let status = server.until("rolled_back").await;
    assert_eq!(status["rollout"]["reason"], "by command: enough");
    assert_eq!(server.serves(), before);

    // Without a key, or with that of clients, nobody may.
    let (status, reply) = server.local.client().post(ROLLOUT, &json!({"model": b.path()})).await.expect("an answer");
    assert_eq!(status, 401, "{reply}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_state_folder_there_are_no_rollouts_and_with_a_damaged_journal_no_start() {
    let state = TempDir::new().expect("a folder");
    let flags = ["--log-level", "warn", "--admin-api-key", ADMIN];
    let server = LocalServer::start(Path::new(BATON), &flags).await.expect("it starts");
    let admin = Client::new(Target { api_key: Some(ADMIN.into()), ..server.target().clone() });
    let (status, reply) = admin.post(ROLLOUT, &json!({"model": "/b"})).await.expect("an answer");
    assert!(status == 400 && reply.to_string().contains("--state-dir"), "{reply}");

    fs::write(state.path().join("rollout.jsonl"), "not a record\n").expect("a file");
    let a = Model::copy();
    let output = command(free_port().expect("a port"), a.path(), state.path(), &[]).output().expect("it runs");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && message.contains("rollout.jsonl is damaged at line 1"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_does_it_all_over_a_listener_of_its_own() {
    let (a, b, state) = (Model::copy(), Model::other(), TempDir::new().expect("a folder"));
    let port = free_port().expect("a port").to_string();
    let server = Server::start(a.path(), state.path(), &["--admin-port", &port]).await;
    // Gone from where clients are.
    let (status, _) = server.admin.get(ROLLOUT).await.expect("an answer");
    assert_eq!(status, 404);

    let url = format!("http://127.0.0.1:{port}");
    let baton = |args: &[&str]| -> Output {
        let mut command = Command::new(BATON);
        command.arg("rollout").args(args).args(["--url", &url]).env("BATON_ADMIN_API_KEY", ADMIN);
        command.output().expect("it runs")
    };
    let check = |args: &[&str], code: i32, wanted: &[&str]| {
        let output = baton(args);
        let text = [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat();
        assert!(output.status.code() == Some(code) && wanted.iter().all(|w| text.contains(w)), "{args:?}: {output:?}");
    };
    let of_a = server.serves();
    check(&["promote"], 1, &["no rollout"]);
    check(&["start", b.path(), "--name", "step 2", "--wait"], 0, &["loading", "standing, waits for a command"]);
    check(&["start", b.path()], 1, &["under way"]);
    check(&["shadow", "0.5"], 0, &["shadow 0.5"]);
    server.serves();
    check(&["status"], 0, &["step 2", "serving", "candidate", "ROLE", "admitted", &of_a[..12], "median ttft"]);
    check(&["rollback", "--reason", "just so", "--wait"], 0, &["rolled_back", "by command: just so"]);
    let plan = state.path().join("plan.json");
    fs::write(&plan, r#"{"stages": [{"share": 1, "seconds": 1}]}"#).expect("a plan");
    check(&["start", b.path(), "--plan", plan.to_str().expect("UTF-8"), "--wait"], 0, &["stage 1 of 1", "promoted"]);
    assert_ne!(server.serves(), of_a);
    let output = baton(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&status["rollout"]["phase"], &status["rollout"]["id"]), (&json!("promoted"), &json!(2)));
    check(&["start", "/no/such/model", "--wait"], 1, &["/no/such/model"]);
    check(&["start", b.path(), "--wait"], 1, &["is served already"]);
    check(&["share", "2"], 2, &["0 to 1"]);
    let output =
        Command::new(BATON).args(["rollout", "status", "--url", "http://127.0.0.1:9"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_that_the_device_does_not_bear_out_never_gets_traffic_and_one_that_it_does_may_serve() {
    let (a, state) = (Bundle::copy(&models("abacus")), TempDir::new().expect("a folder"));
    let path = |bundle: &Bundle| bundle.path().to_str().expect("UTF-8").to_owned();
    let server = Server::start(&path(&a), state.path(), &["--handoff", "require"]).await;
    let before = server.serves();

    let flipped = Bundle::copy(&models("abacus"));
    flipped.edit("model.safetensors", |bytes| *bytes.last_mut().expect("weights") ^= 1);
    server.command("", json!({"model": path(&flipped)})).await;
    let status = server.until("failed").await;
    assert!(status["rollout"]["reason"].as_str().expect("a reason").contains("model.safetensors"), "{status:#}");

    let other = Bundle::copy(&models("abacus"));
    other.bf16("model.layers.2.self_attn.o_proj.weight", |_, weight| weight * 2.0);
    other.digest_anew(true);
    server.command("", json!({"model": path(&other), "stages": [{"share": 1, "requests": 1}]})).await;
    let status = server.until("rolled_back").await;
    let reason = status["rollout"]["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("the gate does not admit it"), "{status:#}");
    let kinds = status["transitions"].as_array().expect("a list").iter().map(|record| record["transition"].clone());
    assert!(kinds.clone().all(|kind| kind != "admitted" && kind != "share"), "{status:#}");
    assert_eq!(server.serves(), before);

    // What is measured at the gate is what the plan's rules are about.
    let retold = Bundle::copy(&models("abacus"));
    retold.edit("README.md", |bytes| bytes.push(b'\n'));
    retold.digest_anew(false);
    for (rule, phase) in [(json!({"max_parity_kl": 1e-30}), "rolled_back"), (json!({"max_parity_kl": 0.1}), "standing")]
    {
        server.command("", json!({"model": path(&retold), "rules": rule})).await;
        let status = server.until(phase).await;
        let kl = &status["rollout"]["gate"]["parity"]["kl"];
        assert!(kl.as_f64().is_some_and(|kl| kl.is_finite()), "{status:#}");
    }
    server.command("/promote", json!({})).await;
    server.until("promoted").await;
    assert_ne!(server.serves(), before);
}
