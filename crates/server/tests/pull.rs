//! `baton pull` as a shell sees it: the folder on standard output, all else on standard error.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
};

use common::bundle::{Bundle, models};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Serves a folder on a free port; gives its address.
fn serve(folder: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let folder = folder.clone();
            thread::spawn(move || answer(&folder, stream));
        }
    });
    format!("http://{address}")
}

fn answer(folder: &Path, mut stream: TcpStream) -> Option<()> {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok).take_while(|l| !l.is_empty());
    let request = lines.next()?;
    lines.for_each(drop);
    let (method, path) = request.split_once(' ')?;
    let body = fs::read(folder.join(path.split(' ').next()?.trim_start_matches('/')));
    let status = if body.is_ok() { "200 OK" } else { "404 Not Found" };
    let body = body.unwrap_or_default();
    let head =
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nETag: \"1\"\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).ok()?;
    if method == "GET" { stream.write_all(&body).ok() } else { Some(()) }
}

fn pull(home: &Path, offline: &str, target: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(["pull", target])
        .env("HF_HOME", home)
        .env("HF_HUB_OFFLINE", offline)
        .env_remove("HF_HUB_CACHE")
        .env_remove("HF_TOKEN")
        .output()
        .expect("the binary starts")
}

#[test]
fn the_folder_is_printed_and_printed_again_offline() {
    let home = TempDir::new().expect("a folder");
    let url = format!("{}/abacus", serve(models("")));
    let first = pull(home.path(), "0", &url);
    let said = String::from_utf8_lossy(&first.stderr);
    assert!(first.status.success(), "{said}");
    assert!(said.contains("of which 0 B are here"), "{said}");
    let folder = String::from_utf8(first.stdout).expect("UTF-8");
    let original = fs::read(models("abacus/model.safetensors")).expect("the bundled model");
    assert!(fs::read(Path::new(folder.trim_end()).join("model.safetensors")).expect("fetched") == original);

    let again = pull(home.path(), "1", &url);
    assert_eq!((String::from_utf8_lossy(&again.stdout).into_owned(), again.stderr), (folder, Vec::new()));
}

#[test]
fn a_refusal_says_why_and_prints_no_folder() {
    let home = TempDir::new().expect("a folder");
    for (target, code, expected) in [("org/name", 1, "HF_HUB_OFFLINE"), ("../x", 2, "accepted are ORG/NAME")] {
        let output = pull(home.path(), "1", target);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(expected), "{said}");
        assert!(output.stdout.is_empty());
    }
}

/// Runs `baton verify` on what a pull printed.
fn verify(pulled: &Output, flags: &[&str]) -> (Option<i32>, Value) {
    assert!(pulled.status.success(), "{}", String::from_utf8_lossy(&pulled.stderr));
    let folder = String::from_utf8(pulled.stdout.clone()).expect("UTF-8");
    let output = Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(["verify", folder.trim_end(), "--json"])
        .args(flags)
        .output()
        .expect("the binary starts");
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

#[test]
fn what_is_pulled_of_a_bundle_is_the_bundle() {
    let home = TempDir::new().expect("a folder");
    let served = Bundle::copy(&models("abacus"));
    fs::write(served.file("besides.py"), "not handed over").expect("written");
    let (code, report) = verify(&pull(home.path(), "0", &serve(served.path().into())), &[]);
    assert_eq!((code, &report["verdict"]), (Some(0), &json!("pass")), "{report:#}");
}

#[test]
fn a_signature_comes_with_the_bundle_that_it_signs() {
    let home = TempDir::new().expect("a folder");
    let address = serve(models("golden/handoff"));
    let pulled = pull(home.path(), "0", &format!("{address}/tiny"));
    let key = models("golden/handoff/trusted.pub");
    let (code, report) = verify(&pulled, &["--trusted-keys", key.to_str().expect("UTF-8")]);
    assert_eq!((code, &report["verdict"]), (Some(0), &json!("pass")), "{report:#}");
}

#[test]
fn a_name_that_leads_out_of_a_bundle_is_refused_and_nothing_is_written() {
    let (around, home) = (TempDir::new().expect("a folder"), "home");
    let served = Bundle::copy(&models("abacus"));
    served.manifest(|manifest| {
        manifest["files"]["../../../../escaped"] = json!({"bytes": 1, "sha256": "a".repeat(64)});
    });
    let output = pull(&around.path().join(home), "0", &serve(served.path().into()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("escaped\" is refused") && output.stdout.is_empty(), "{said}");
    let there: Vec<_> =
        fs::read_dir(around.path()).expect("a folder").map(|e| e.expect("an entry").file_name()).collect();
    assert_eq!(there, [home]);
}
