//! `baton bench` through the real binary: against the bundled model, and against servers that misbehave.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
};

use baton_loadgen::LocalServer;
use serde_json::Value;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_baton");
const SMALL: &[&str] = &["--num-prompts", "8", "--random-input-len", "24", "--random-output-len", "8"];

async fn start(flags: &[&str]) -> LocalServer {
    LocalServer::start(Path::new(BINARY), &[&["--log-level", "error"], flags].concat()).await.expect("it starts")
}

fn command(url: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(["bench", "--url", url]).args(flags).env_remove("OPENAI_API_KEY").stdin(Stdio::null());
    command
}

fn bench(url: &str, flags: &[&str]) -> Output {
    command(url, flags).output().expect("the binary starts")
}

/// Runs with `--save-result`; exit code, what was saved, and standard output.
fn saved(url: &str, flags: &[&str]) -> (Option<i32>, Value, String) {
    let dir = TempDir::new().expect("a folder");
    let file = dir.path().join("result.json");
    let output = bench(url, &[flags, &["--save-result", file.to_str().expect("UTF-8")]].concat());
    let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    let result = serde_json::from_str(&text).expect("JSON");
    (output.status.code(), result, String::from_utf8(output.stdout).expect("UTF-8"))
}

fn assert_ordered(result: &Value) {
    for latency in ["ttft", "tpot", "itl", "e2el"] {
        let ms = |figure: &str| result[format!("{figure}_{latency}_ms")].as_f64().expect(figure);
        let order = [0.0, ms("median"), ms("p90"), ms("p95"), ms("p99")];
        assert!(order.is_sorted(), "{latency}: {order:?}");
        assert!(ms("mean") >= 0.0 && ms("std") >= 0.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_loop_counts_every_token_and_saves_the_fields_of_vllm() {
    let server = start(&[]).await;
    let prefixed = [
        SMALL,
        &["--random-prefix-len", "16", "--max-concurrency", "4", "--num-warmups", "2", "--goodput", "e2el:1e9"],
    ]
    .concat();
    let (code, result, table) = saved(&server.target().base, &prefixed);
    assert_eq!(code, Some(0));
    for (field, expected) in [
        ("completed", 8),
        ("failed", 0),
        ("num_prompts", 8),
        ("max_concurrency", 4),
        ("total_input_tokens", 8 * (24 + 16)),
        ("total_output_tokens", 64),
    ] {
        assert_eq!(result[field], expected, "{field}");
    }
    assert_eq!((&result["model_id"], &result["prompts"]), (&"abacus".into(), &"token ids".into()));
    assert_eq!((&result["tokens_from"], &result["request_rate"]), (&"usage".into(), &"inf".into()));
    assert_eq!(result["request_goodput"], result["request_throughput"]);
    let per_second = |field: &str| result[field].as_f64().expect(field) * result["duration"].as_f64().expect("seconds");
    assert!((per_second("output_throughput") - 64.0).abs() < 1e-6);
    assert!((per_second("total_token_throughput") - 384.0).abs() < 1e-6);
    assert!(result["max_concurrent_requests"].as_u64().expect("a count") <= 4);
    assert_ordered(&result);
    for row in ["Successful requests:                     8", "P99 TTFT (ms):", "Mean TPOT (ms):", "Median ITL (ms):"] {
        assert!(table.contains(row), "{row}: {table}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_loop_serves_chats_and_a_file_is_replayed() {
    let server = start(&[]).await;
    let url = &server.target().base;
    let (code, result, _) =
        saved(url, &[SMALL, &["--endpoint", "chat", "--request-rate", "200", "--burstiness", "0.5"]].concat());
    assert_eq!((code, &result["completed"], &result["total_output_tokens"]), (Some(0), &8.into(), &64.into()));
    assert_eq!((&result["backend"], &result["request_rate"]), (&"openai-chat".into(), &200.0.into()));
    assert!(result.get("p99_client_queue_time_ms").is_none(), "nothing limits the calls in flight");
    assert_eq!(result["prompts"], "text of about that many tokens");

    let dir = TempDir::new().expect("a folder");
    let file = dir.path().join("trace.jsonl");
    let lines = "{\"prompt\": \"1 + 1\", \"output_len\": 3, \"timestamp\": 10}\n\
        {\"prompt\": [400, 401], \"output_len\": 4, \"timestamp\": 10.01}\n{\"prompt\": \"2\", \"timestamp\": 10.02}\n";
    fs::write(&file, lines).expect("written");
    let file = file.to_str().expect("UTF-8");
    let replay = ["--dataset-name", "custom", "--dataset-path", file, "--custom-output-len", "5", "--ignore-eos"];
    let replay = [&replay[..], &["--max-concurrency", "2"]].concat();
    let (code, result, _) = saved(url, &replay);
    assert_eq!((code, &result["completed"], &result["total_output_tokens"]), (Some(0), &3.into(), &12.into()));
    assert!(result["duration"].as_f64().expect("seconds") >= 0.019, "the last call arrives after 20 ms");
    assert!(result["p99_client_queue_time_ms"].is_number(), "{result}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_writes_a_csv_and_a_page_that_fetches_nothing() {
    let server = start(&[]).await;
    let dir = TempDir::new().expect("a folder");
    let base = dir.path().join("sweep");
    let flags = [SMALL, &["--sweep", "1,2,4", "--sweep-output", base.to_str().expect("UTF-8")]].concat();
    let (code, results, _) = saved(&server.target().base, &flags);
    assert_eq!(code, Some(0));
    let concurrencies: Vec<_> = results.as_array().expect("an array").iter().map(|r| &r["max_concurrency"]).collect();
    assert_eq!(concurrencies, [1, 2, 4]);
    assert!(results[0]["seed"] == 0 && results[2]["seed"] == 2, "prompts of its own at each step: {results}");
    let csv = fs::read_to_string(base.with_extension("csv")).expect("a CSV");
    assert_eq!(csv.lines().count(), 4, "{csv}");
    let page = fs::read_to_string(base.with_extension("html")).expect("a page");
    assert!(page.matches("<polyline").count() >= 6);
    for outside in ["<script", "<link", "<img", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_calls_are_counted_by_kind_and_the_command_fails() {
    let server = start(&["--api-key", "right"]).await;
    let url = &server.target().base;
    for (flags, kind) in [
        (["--api-key", "wrong", "--model", "abacus"], "http 401"),
        (["--api-key", "right", "--model", "other"], "http 404"),
    ] {
        let (code, result, table) = saved(url, &[SMALL, &flags].concat());
        assert_eq!((code, &result["completed"], &result["failed"]), (Some(1), &0.into(), &8.into()));
        assert_eq!(result["error_kinds"][kind], 8, "{result}");
        assert!(table.contains(kind), "{table}");
    }
    let output = bench(url, &[SMALL, &["--api-key", "wrong"]].concat());
    assert!(String::from_utf8_lossy(&output.stderr).contains("/v1/models: 401"), "{output:?}");
    let (code, result, _) = saved(&format!("http://{}", closed_address()), &[SMALL, &["--model", "abacus"]].concat());
    assert_eq!((code, &result["error_kinds"]["connection"]), (Some(1), &8.into()));
}

/// An address where nobody listens.
fn closed_address() -> String {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").to_string()
}

/// A server that reads each call, then does `answer` with its number, and closes; gives its URL.
fn serve(answer: impl Fn(usize, TcpStream) + Send + Sync + Clone + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    thread::spawn(move || {
        for (i, stream) in listener.incoming().flatten().enumerate() {
            let answer = answer.clone();
            thread::spawn(move || {
                let mut reader = BufReader::new(&stream);
                let mut length = 0;
                for line in reader.by_ref().lines().map_while(Result::ok).take_while(|l| !l.is_empty()) {
                    let (name, value) = line.split_once(':').unwrap_or_default();
                    if name.eq_ignore_ascii_case("content-length") {
                        length = value.trim().parse().expect("a length");
                    }
                }
                reader.read_exact(&mut vec![0; length]).expect("a body");
                answer(i, stream);
            });
        }
    });
    format!("http://{address}")
}

const HEAD: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n";
const CHUNK: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
const END: &str = "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\n\ndata: [DONE]\n\n";

/// A file of `n` requests, so that no call is made but those that are measured.
fn requests(dir: &TempDir, n: usize) -> String {
    let file = dir.path().join("requests.jsonl");
    fs::write(&file, "{\"prompt\": [5, 6, 7], \"output_len\": 4}\n".repeat(n)).expect("written");
    file.into_os_string().into_string().expect("UTF-8")
}

#[test]
fn a_stream_that_closes_early_is_an_error_whether_the_close_is_clean_or_not() {
    let url = serve(|i, mut stream| {
        let head = if i % 2 == 0 { "\r\n" } else { "Transfer-Encoding: chunked\r\n\r\n400\r\n" };
        stream.write_all(format!("{HEAD}{head}{CHUNK}").as_bytes()).expect("sent");
    });
    let dir = TempDir::new().expect("a folder");
    let replay = ["--model", "m", "--dataset-name", "custom", "--dataset-path", &requests(&dir, 4)];
    let (code, result, _) = saved(&url, &replay);
    assert_eq!((code, &result["completed"], &result["failed"]), (Some(1), &0.into(), &4.into()));
    assert_eq!(result["error_kinds"]["stream cut"], 4, "{result}");
}

#[test]
fn without_usage_the_chunks_are_counted_and_the_result_says_so() {
    let url = serve(|_, mut stream| {
        stream.write_all(format!("{HEAD}\r\n{CHUNK}{CHUNK}{CHUNK}{END}").as_bytes()).expect("sent");
    });
    let dir = TempDir::new().expect("a folder");
    let replay = ["--model", "m", "--dataset-name", "custom", "--dataset-path", &requests(&dir, 4)];
    let (code, result, _) = saved(&url, &replay);
    assert_eq!((code, &result["completed"], &result["tokens_from"]), (Some(0), &4.into(), &"chunks".into()));
    assert_eq!((&result["total_input_tokens"], &result["total_output_tokens"]), (&12.into(), &12.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fields_of_the_extra_body_are_sent_and_take_the_place_of_others() {
    let server = start(&[]).await;
    let lengths = |extra: &str| {
        let (code, result, _) = saved(&server.target().base, &[SMALL, &["--extra-body", extra]].concat());
        assert_eq!(result["extra_body"], serde_json::from_str::<Value>(extra).expect("JSON"));
        (code, result["total_output_tokens"].as_u64(), result["failed"].as_u64())
    };
    assert_eq!(lengths(r#"{"max_tokens": 3}"#), (Some(0), Some(8 * 3), Some(0)));
    assert_eq!(lengths(r#"{"temperature": -1}"#), (Some(1), Some(0), Some(8)));
}

#[test]
fn an_interrupt_reports_what_was_measured_until_then() {
    let (arrived, third) = mpsc::channel();
    let url = serve(move |i, mut stream| {
        if i < 2 {
            stream.write_all(format!("{HEAD}\r\n{CHUNK}{END}").as_bytes()).expect("sent");
        } else {
            arrived.send(()).expect("the test waits");
            // Never answered: the client leaves.
            let _ = stream.read(&mut [0]);
        }
    });
    let dir = TempDir::new().expect("a folder");
    let flags =
        ["--model", "m", "--dataset-name", "custom", "--dataset-path", &requests(&dir, 5), "--max-concurrency", "1"];
    let child = command(&url, &flags).stdout(Stdio::piped()).spawn().expect("the binary starts");
    third.recv().expect("a third call");
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(killed.success());
    let output = child.wait_with_output().expect("it ends");
    let table = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(output.status.code(), Some(0), "{table}");
    for row in ["Successful requests:                     2", "Stopped before they ended:               3"] {
        assert!(table.contains(row), "{row}: {table}");
    }
}

#[test]
fn wrong_values_are_refused_with_what_is_accepted() {
    for (flags, expected) in [
        (&["--request-rate", "0"][..], "a number above 0, or inf"),
        (&["--burstiness=-1"], "a number above 0, or inf"),
        (&["--max-concurrency", "0"], "1 to 10000000"),
        (&["--goodput", "latency:5"], "ttft:MS, tpot:MS or e2el:MS"),
        (&["--goodput", "ttft:-5"], "ttft:MS, tpot:MS or e2el:MS"),
        (&["--base-url", "https://host"], "https is not spoken"),
        (&["--base-url", "http://host/v1"], "without the /v1"),
        (&["--dataset-name", "custom"], "--dataset-path"),
        (&["--extra-body", "[1]"], "a JSON object"),
        (&["--sweep", "1,x"], "1 to 10000000"),
        (&["--sweep", "1", "--max-concurrency", "2"], "cannot be used with"),
    ] {
        let output = Command::new(BINARY).arg("bench").args(flags).output().expect("the binary starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(said.contains(expected), "{flags:?}: {said}");
    }
}

#[test]
fn a_model_is_measured_in_process_beside_the_limits_of_the_machine() {
    let flags = ["-p", "40", "-n", "6", "--streams", "1,3", "-d", "0,20", "-r", "2", "-t", "2"];
    let run = |more: &[&str]| {
        let output = Command::new(BINARY).args(["bench", "local"]).args(flags).args(more).output().expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let result: Value = serde_json::from_str(&run(&["--json"])).expect("JSON");
    let rate = |value: &Value| value.as_f64().filter(|rate| rate.is_finite() && *rate > 0.0).expect("a rate");
    let limits = &result["limits"];
    for limit in [&limits["bytes_per_s"], &limits["mul_adds_per_s"]["int8"], &limits["mul_adds_per_s"]["f32"]] {
        rate(limit);
    }
    let results = result["results"].as_array().expect("results");
    let tests: Vec<&str> = results.iter().map(|r| r["test"].as_str().expect("a name")).collect();
    let expected = ["pp40", "tg6", "tg6, 3 streams", "pp40 @ d20", "tg6 @ d20", "tg6 @ d20, 3 streams"];
    assert_eq!(tests, expected);
    for result in results {
        let samples: Vec<f64> = result["samples_ts"].as_array().expect("samples").iter().map(rate).collect();
        assert!(samples.len() == 2 && samples.is_sorted());
        let median = rate(&result["median_ts"]);
        assert!(samples[0] <= median && median <= samples[1]);
        assert!(["share_of_bytes", "share_of_peak"].iter().all(|share| rate(&result[share]) > 0.0));
    }
    let table = run(&[]);
    assert!(table.contains("of read") && expected.iter().all(|test| table.contains(&format!("| {test} |"))), "{table}");
}
