//! The real binary where others can reach it: who gets in, what is read again, which sockets there are, and too few descriptors.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::TcpStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use baton_loadgen::{Client, LocalServer, Target, free_port};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// `baton serve` on a port, whose log goes to a file.
fn command(port: u16, folder: &Path) -> (Command, impl Fn() -> String + use<>) {
    let log = folder.join("log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(["serve", "--port", &port.to_string()]).stderr(File::create(&log).expect("a file"));
    (command, move || fs::read_to_string(&log).expect("a log"))
}

async fn launch(command: Command, port: u16) -> LocalServer {
    LocalServer::launch(command, port, "/ready", PATIENCE).await.expect("it starts")
}

/// The status that `/v1/models` has for a key.
async fn status(server: &LocalServer, key: &str) -> u16 {
    let target = Target { api_key: Some(key.to_owned()), ..server.target().clone() };
    Client::new(target).get("/v1/models").await.expect("an answer").0.as_u16()
}

async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn entry(key: &str) -> String {
    let digest: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("[[key]]\nname = \"of-{key}\"\nsha256 = \"{digest}\"\nscopes = [\"inference\"]\n")
}

fn hang_up(server: &LocalServer) {
    let sent = Command::new("kill").args(["-HUP", &server.pid().to_string()]).status().expect("kill");
    assert!(sent.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_read_again_at_sighup_and_when_their_file_changes_and_a_bad_file_changes_nothing() {
    let folder = TempDir::new().expect("a folder");
    let file = folder.path().join("keys.toml");
    let write = |text: String| {
        // As whoever replaces a file does it.
        let new = folder.path().join("new");
        fs::write(&new, text).and_then(|()| fs::rename(&new, &file)).expect("a file");
    };
    write(entry("one"));
    let port = free_port().expect("a port");
    let (mut command, log) = command(port, folder.path());
    command.args(["--host", "0.0.0.0", "--api-keys-file", file.to_str().expect("UTF-8")]);
    let server = launch(command, port).await;
    assert_eq!((status(&server, "one").await, status(&server, "two").await), (200, 401));

    write(entry("two"));
    hang_up(&server);
    eventually("the second key is known", async || status(&server, "two").await == 200).await;
    assert_eq!(status(&server, "one").await, 401);

    write("[[key]]\nname = \"plain-s3cret\nsha256 = \"plain-s3cret\"".into());
    hang_up(&server);
    eventually("it is refused", async || log().contains("what was in force stays")).await;
    assert_eq!(status(&server, "two").await, 200);

    write(entry("two") + &entry("three"));
    eventually("the third key is known", async || status(&server, "three").await == 200).await;
    // The line of a request comes behind its reply.
    eventually("a log names the key", async || log().contains("of-three")).await;
    assert!(!log().contains("s3cret"), "{}", log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r9_the_limits_of_a_listed_key_hold_until_the_file_says_others() {
    let folder = TempDir::new().expect("a folder");
    let file = folder.path().join("keys.toml");
    let write = |more: &str| fs::write(&file, entry("one") + more + &entry("two")).expect("a file");
    write("weight = 2\nrequests_per_minute = 2\n");
    let port = free_port().expect("a port");
    let (mut command, _) = command(port, folder.path());
    command.args(["--host", "0.0.0.0", "--api-keys-file", file.to_str().expect("UTF-8")]);
    let server = launch(command, port).await;
    let chat = async |key: &str| {
        let target = Target { api_key: Some(key.to_owned()), ..server.target().clone() };
        let body = json!({"messages": [{"role": "user", "content": "1 + 1?"}], "max_tokens": 2});
        Client::new(target).post("/v1/chat/completions", &body).await.expect("an answer")
    };
    assert_eq!((chat("one").await.0.as_u16(), chat("one").await.0.as_u16()), (200, 200));
    let (status, refused) = chat("one").await;
    assert_eq!((status.as_u16(), &refused["error"]["code"]), (429, &json!("rate_limit_exceeded")));
    assert_eq!(chat("two").await.0.as_u16(), 200);
    write("requests_per_minute = 100000\n");
    hang_up(&server);
    eventually("the new limit holds", async || chat("one").await.0.as_u16() == 200).await;
}

/// Where the TCP sockets of a process are, as the kernel lists them: port here, port there, listening.
fn sockets(pid: u32, table: &str) -> Vec<(u16, u16, bool)> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").flatten();
    let links: BTreeSet<_> =
        links.filter_map(|link| fs::read_link(link.path()).ok()?.into_os_string().into_string().ok()).collect();
    let port = |address: &str| u16::from_str_radix(address.rsplit(':').next().expect("a port"), 16).expect("hex");
    let rows = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
    let row = |row: &str| {
        let fields: Vec<&str> = row.split_whitespace().collect();
        let is_its = links.contains(&format!("socket:[{}]", fields[9]));
        is_its.then(|| (port(fields[1]), port(fields[2]), fields[3] == "0A"))
    };
    rows.lines().skip(1).filter_map(row).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r48_the_sockets_are_those_that_are_configured_and_none_goes_out() {
    let folder = TempDir::new().expect("a folder");
    let ports = [free_port().expect("a port"), free_port().expect("a port")];
    let (mut command, log) = command(ports[0], folder.path());
    command
        .args(["--admin-port", &ports[1].to_string(), "--admin-api-key", "k", "--state-dir"])
        .arg(folder.path().join("state"));
    let server = launch(command, ports[0]).await;
    let body = json!({"max_tokens": 5, "messages": [{"role": "user", "content": "What is 1 + 1?"}]});
    let client = server.client();
    assert_eq!(client.post("/v1/chat/completions", &body).await.expect("an answer").0, 200);
    let tcp: Vec<_> = ["tcp", "tcp6"].iter().flat_map(|table| sockets(server.pid(), table)).collect();
    let listening: BTreeSet<u16> = tcp.iter().filter(|(_, _, listens)| *listens).map(|(port, _, _)| *port).collect();
    assert_eq!(listening, BTreeSet::from(ports), "{}", log());
    assert!(tcp.iter().any(|(_, there, _)| *there != 0), "the client's connection shows");
    assert!(tcp.iter().all(|(here, _, _)| ports.contains(here)), "{tcp:?}");
    for table in ["udp", "udp6", "raw", "raw6"] {
        assert_eq!(sockets(server.pid(), table), [], "{table}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r23_a_server_without_descriptors_left_serves_again_when_there_are_some() {
    let folder = TempDir::new().expect("a folder");
    let port = free_port().expect("a port");
    let (baton, log) = command(port, folder.path());
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 64 && exec \"$0\" \"$@\""]).arg(baton.get_program()).args(baton.get_args());
    command.args(["--max-connections", "1000"]).stderr(File::create(folder.path().join("log")).expect("a file"));
    let server = launch(command, port).await;
    let silent: Vec<_> =
        (0..100).map(|_| TcpStream::connect(("127.0.0.1", port)).expect("the backlog takes it")).collect();
    eventually("descriptors run out", async || log().contains("connections are not accepted")).await;
    drop(silent);
    eventually("it serves again", async || server.client().get("/live").await.is_ok_and(|(status, _)| status == 200))
        .await;
}
