//! A server that cannot serve says why and ends: exit code not 0, one clear message, never half ready.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

const GUARD: Duration = Duration::from_secs(10);

/// Runs `baton serve flags…`, which must fail, and gives its standard error.
fn refusal(flags: &[&str]) -> String {
    let dir = TempDir::new().expect("a folder");
    let mut child = Command::new(env!("CARGO_BIN_EXE_baton"))
        .arg("serve")
        .args(flags)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let start = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        if start.elapsed() > GUARD {
            child.kill().expect("it can be killed");
            panic!("{flags:?}: still running");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("its output");
    assert_eq!(output.status.code(), Some(1), "{flags:?}");
    let message = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!message.contains("panicked"), "{flags:?}: {message}");
    message
}

fn abacus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus")
}

/// A copy of the bundled model to spoil.
fn copy() -> TempDir {
    let dir = TempDir::new().expect("a folder");
    for name in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        fs::copy(abacus().join(name), dir.path().join(name)).expect(name);
    }
    dir
}

/// Spoils one file of a copy and gives the refusal to serve it.
fn spoiled(name: &str, spoil: impl FnOnce(Vec<u8>) -> Vec<u8>) -> String {
    let dir = copy();
    let file = dir.path().join(name);
    fs::write(&file, spoil(fs::read(&file).expect(name))).expect(name);
    refusal(&["--port", "0", dir.path().to_str().expect("UTF-8")])
}

fn replaced(name: &str, from: &str, to: &str) -> String {
    spoiled(name, |bytes| {
        let text = String::from_utf8(bytes).expect("UTF-8");
        assert!(text.contains(from), "{name} has {from}");
        text.replace(from, to).into_bytes()
    })
}

#[track_caller]
fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn a_missing_folder_is_named() {
    assert_names(&refusal(&["/nowhere/at/all", "--port", "0"]), &["/nowhere/at/all"]);
}

#[test]
fn a_device_that_is_not_there_is_named_with_those_that_are() {
    assert_names(&refusal(&["--device", "tpu:0", "--port", "0"]), &["tpu:0", "cpu", "cuda:N"]);
    if Path::new("/dev/nvidiactl").exists() {
        eprintln!("skipped: there is a GPU");
        return;
    }
    let absent = refusal(&["--device", "cuda:0", "--port", "0"]);
    assert_names(&absent, &["cuda:0", "unavailable", "libcuda"]);
}

#[test]
fn a_number_of_ranks_that_does_not_divide_the_model_is_refused_with_those_that_do() {
    let ranks = |n| refusal(&["--tensor-parallel-size", n, "--port", "0"]);
    assert_names(&ranks("4"), &["4 ranks", "6 attention heads", "ranks of 1, 2"]);
    assert_names(&ranks("0"), &["--tensor-parallel-size", "at least 1"]);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    assert_names(&refusal(&["--port", &port]), &[&port]);
}

#[test]
fn an_address_that_others_reach_is_refused_without_keys_and_what_to_do_is_named() {
    let ways = ["--api-key", "--api-keys-file", "--ssl-ca-certs", "--host 127.0.0.1", "--allow-unauthenticated"];
    assert_names(&refusal(&["--host", "0.0.0.0", "--port", "0"]), &ways);
    assert_names(&refusal(&["--host", "::", "--port", "0", "--admin-api-key", "k"]), &ways);
    assert_names(&refusal(&["--port", "0", "--admin-host", "0.0.0.0", "--admin-port", "0"]), &ways);
}

#[test]
fn a_file_of_keys_that_cannot_be_used_is_named_and_not_repeated() {
    let dir = TempDir::new().expect("a folder");
    let file = dir.path().join("keys.toml");
    fs::write(&file, "[[key]]\nname = \"a\"\nsha256 = \"s3cret\"\nscopes = [\"inference\"]").expect("a file");
    let message = refusal(&["--port", "0", "--api-keys-file", file.to_str().expect("UTF-8")]);
    assert_names(&message, &["--api-keys-file", "key 1", "sha256sum"]);
    assert!(!message.contains("s3cret"), "{message}");
    assert_names(&refusal(&["--port", "0", "--api-keys-file", "/nonexistent.toml"]), &["/nonexistent.toml"]);
}

#[test]
fn a_certificate_that_is_missing_or_none_is_named() {
    let dir = TempDir::new().expect("a folder");
    let file = dir.path().join("not-a-certificate.pem");
    fs::write(&file, "nonsense").expect("a file");
    let file = file.to_str().expect("UTF-8");
    assert_names(&refusal(&["--ssl-certfile", "/nonexistent.pem", "--ssl-keyfile", file]), &["/nonexistent.pem"]);
    assert_names(&refusal(&["--ssl-certfile", file, "--ssl-keyfile", file]), &["TLS", "certificate", "PEM"]);
}

#[test]
fn a_share_of_memory_is_refused_where_there_is_none_to_share() {
    let share = ["--port", "0", "--gpu-memory-utilization", "0.5"];
    assert_names(&refusal(&share), &["--gpu-memory-utilization", "--kv-cache-memory-bytes"]);
}

#[test]
fn a_context_beyond_the_models_is_refused() {
    assert_names(&refusal(&["--port", "0", "--max-model-len", "4096"]), &["4096", "1024"]);
}

#[test]
fn a_cache_too_small_for_one_context_is_refused_with_the_arithmetic() {
    assert_names(&refusal(&["--port", "0", "--kv-cache-memory-bytes", "1000"]), &["1000", "1024"]);
}

#[test]
fn a_truncated_checkpoint_is_refused_by_file() {
    assert_names(&spoiled("model.safetensors", |b| b[..b.len() / 2].to_vec()), &["model.safetensors"]);
    assert_names(&spoiled("model.safetensors", |_| Vec::new()), &["model.safetensors", "empty"]);
}

#[test]
fn a_wrong_shape_is_refused_by_tensor() {
    assert_names(&replaced("config.json", "\"intermediate_size\": 384", "\"intermediate_size\": 386"), &["mlp", "386"]);
}

#[test]
fn an_unknown_architecture_is_refused_with_the_known_ones() {
    assert_names(
        &replaced("config.json", "DeepseekV3ForCausalLM", "MambaForCausalLM"),
        &["MambaForCausalLM", "LlamaForCausalLM", "DeepseekV3ForCausalLM"],
    );
}

#[test]
fn a_missing_tokenizer_is_refused_by_file() {
    let dir = copy();
    fs::remove_file(dir.path().join("tokenizer.json")).expect("it is there");
    let accepted = ["tokenizer.json", "tokenizer.model", "tiktoken.model", "*.tiktoken"];
    assert_names(&refusal(&["--port", "0", dir.path().to_str().expect("UTF-8")]), &accepted);
}

#[test]
fn a_converted_tokenizer_is_read_and_refused_like_any_other() {
    let ranks = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/golden/tokenizers/converted/ranks.tiktoken");
    let dir = copy();
    let path = |name: &str| dir.path().join(name);
    fs::remove_file(path("tokenizer.json")).expect("it is there");
    fs::copy(ranks, path("tokenizer.model")).expect("a copy");
    fs::write(path("tokenizer_config.json"), r#"{"added_tokens_decoder": {"1100": {"content": "<far>"}}}"#)
        .expect("a file");
    let arguments = ["--port", "0", dir.path().to_str().expect("UTF-8")];
    assert_names(&refusal(&arguments), &["the tokenizer has ids up to 1100", "ends at 1024"]);
    fs::rename(path("tokenizer.model"), path("own.tiktoken")).expect("a new name");
    assert_names(&refusal(&arguments), &["own.tiktoken", "qwen.tiktoken", "QWenTokenizer"]);
}

#[test]
fn a_template_that_does_not_parse_is_refused() {
    assert_names(&replaced("tokenizer_config.json", "{%- for m in messages -%}", "{%- for m in -%}"), &["template"]);
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_refused() {
    let message = replaced("config.json", "\"vocab_size\": 1024", "\"vocab_size\": 1000");
    assert_names(&message, &["1000"]);
}
