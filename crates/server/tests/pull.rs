//! `baton pull` as a shell sees it: the folder on standard output, all else on standard error.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Output},
    thread,
};

use tempfile::TempDir;

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models");

/// Serves the folder of models on a free port; gives its address.
fn serve_models() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    format!("http://{address}")
}

fn answer(mut stream: TcpStream) -> Option<()> {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok).take_while(|l| !l.is_empty());
    let request = lines.next()?;
    lines.for_each(drop);
    let (method, path) = request.split_once(' ')?;
    let body = fs::read(format!("{MODELS}{}", path.split(' ').next()?));
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
    let url = format!("{}/abacus", serve_models());
    let first = pull(home.path(), "0", &url);
    let said = String::from_utf8_lossy(&first.stderr);
    assert!(first.status.success(), "{said}");
    assert!(said.contains("of which 0 B are here"), "{said}");
    let folder = String::from_utf8(first.stdout).expect("UTF-8");
    let original = fs::read(format!("{MODELS}/abacus/model.safetensors")).expect("the bundled model");
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
