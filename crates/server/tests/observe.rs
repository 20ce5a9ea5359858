//! The real binary as it is watched: traces to a collector, a log that nobody reads, metrics of both.

mod common;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufRead, BufReader, PipeReader, pipe},
    net::TcpListener,
    path::Path,
    process::Command,
    time::Duration,
};

use baton_loadgen::{Client, LocalServer, free_port};
use opentelemetry_proto::tonic::trace::v1::{span::SpanKind, status::StatusCode};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::common::otlp::{Collector, Span};

const CHAT: &str = "/v1/chat/completions";
/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts with a collector, which need not wait long, and with these variables of OpenTelemetry.
async fn start_traced(url: &str, variables: &[(&str, &str)]) -> LocalServer {
    let port = free_port().expect("a port");
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(["serve", "--port", &port.to_string(), "--log-level", "error", "--otlp-traces-endpoint", url]);
    command.env("OTEL_BSP_SCHEDULE_DELAY", "100").envs(variables.iter().copied());
    LocalServer::launch(command, port, "/ready", PATIENCE).await.expect("it starts")
}

/// Starts with a standard error of its own.
async fn start_logging_to(stderr: impl Into<std::process::Stdio>, flags: &[&str]) -> LocalServer {
    let port = free_port().expect("a port");
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(["serve", "--port", &port.to_string()]).args(flags).stderr(stderr);
    LocalServer::launch(command, port, "/ready", PATIENCE).await.expect("it starts")
}

fn question(fields: Value) -> Value {
    let mut body =
        json!({"model": "abacus", "temperature": 0, "messages": [{"role": "user", "content": "What is 347 + 286?"}]});
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    body
}

async fn ask(server: &LocalServer, fields: Value) -> (u16, Value) {
    let (status, reply) = server.client().post(CHAT, &question(fields)).await.expect("an answer");
    (status.as_u16(), reply)
}

/// Waits for the spans of one request to be counted there.
async fn four_are_counted(server: &LocalServer, metric: &str) {
    let counted = async {
        while server.metric(metric).await.expect("a metric") != 4.0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, counted).await.expect("four spans are counted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_arrives_at_the_collector_as_a_span_with_its_parts_and_its_figures() {
    let collector = Collector::start();
    let url = format!("http://{}", collector.address);
    let server = start_traced(&url, &[]).await;
    let (_, reply) = ask(&server, json!({"max_tokens": 20})).await;
    let spans: Vec<Span> = (0..4).map(|_| collector.next()).collect();
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["chat abacus", "queue", "prefill", "decode"]);
    let request = &spans[0];
    assert_eq!((request.kind, request.parent_id.len()), (SpanKind::Server, 0));
    assert_eq!(request.status, StatusCode::Unset);
    assert_eq!((request.trace_id.len(), request.span_id.len()), (16, 8));
    assert_eq!(request.resource["service.name"], "baton");
    let usage = &reply["usage"];
    for (name, value) in [
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.request.model", json!("abacus")),
        ("gen_ai.response.model", json!("abacus")),
        ("gen_ai.request.max_tokens", json!(20)),
        ("gen_ai.request.temperature", json!(0.0)),
        ("gen_ai.request.n", json!(1)),
        ("gen_ai.usage.input_tokens", usage["prompt_tokens"].clone()),
        ("gen_ai.usage.output_tokens", usage["completion_tokens"].clone()),
        ("gen_ai.response.finish_reasons", json!([reply["choices"][0]["finish_reason"]])),
        ("http.route", json!(CHAT)),
        ("http.response.status_code", json!(200)),
    ] {
        assert_eq!(request.attributes[name], value, "{name}");
    }
    let seconds = |name: &str| request.attributes[name].as_f64().expect(name);
    let (first, whole) = (seconds("gen_ai.latency.time_to_first_token"), seconds("gen_ai.latency.e2e"));
    assert!(0.0 < first && first < whole && whole < 60.0, "{request:?}");
    // The parts follow each other inside of the whole.
    assert!(spans[1..].windows(2).all(|pair| pair[0].end == pair[1].start), "{spans:?}");
    for part in &spans[1..] {
        assert_eq!(
            (&part.trace_id, &part.parent_id, part.kind),
            (&request.trace_id, &request.span_id, SpanKind::Internal)
        );
        assert!(request.start <= part.start && part.end <= request.end, "{part:?} in {request:?}");
    }
    let ids: BTreeSet<&Vec<u8>> = spans.iter().map(|span| &span.span_id).collect();
    assert_eq!(ids.len(), 4);
    // The collector's answer may come after the next request.
    four_are_counted(&server, "baton_trace_spans_exported_total").await;
    assert!(collector.is_empty(), "probes and metrics are no traces");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_under_tls_is_believed_by_the_authority_that_is_named_and_by_no_public_one() {
    let (collector, pem) = Collector::encrypted();
    let url = format!("https://{}", collector.address);
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), pem).expect("a certificate");
    let authority = ("OTEL_EXPORTER_OTLP_CERTIFICATE", file.path().to_str().expect("UTF-8"));
    let server = start_traced(
        &url,
        &[authority, ("OTEL_SERVICE_NAME", "ours"), ("OTEL_RESOURCE_ATTRIBUTES", "service.name=not-so,team=search")],
    )
    .await;
    ask(&server, json!({"max_tokens": 5})).await;
    let span = collector.next();
    assert_eq!((&span.resource["service.name"], &span.resource["team"]), (&json!("ours"), &json!("search")));

    let server = start_traced(&url, &[("OTEL_EXPORTER_OTLP_TIMEOUT", "300")]).await;
    ask(&server, json!({"max_tokens": 5})).await;
    four_are_counted(&server, "baton_trace_spans_dropped_total").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_spans_are_sent_before_the_server_ends_and_refusals_are_among_them() {
    let collector = Collector::start();
    let url = format!("http://{}/v1/traces", collector.address);
    let mut server = start_traced(&url, &[]).await;
    assert_eq!(ask(&server, json!({"temperature": -1, "user": "canary-77"})).await.0, 400);
    server.terminate().expect("a signal");
    assert!(server.wait(Duration::from_secs(30)).await.expect("it ends").success());
    let refused = collector.next();
    let expected = ("chat", StatusCode::Unset);
    assert_eq!((refused.name.as_str(), refused.status), expected, "the client's fault is no error of the server");
    assert_eq!(refused.attributes["error.type"], "out_of_range");
    assert!(!format!("{refused:?}").contains("canary") && collector.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_of_the_variables_arrive_with_what_is_sent_and_an_empty_variable_takes_none_away() {
    let collector = Collector::start();
    let url = format!("http://{}", collector.address);
    for (variables, expected) in [
        (
            [
                ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", ""),
                ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=s%20ecret, x-scope = one"),
            ],
            ["\r\nx-key: s ecret\r\n", "\r\nx-scope: one\r\n"],
        ),
        (
            [
                ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-key=100%2541,x-scope=two"),
                ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=no"),
            ],
            ["\r\nx-key: 100%41\r\n", "\r\nx-scope: two\r\n"],
        ),
    ] {
        let server = start_traced(&url, &variables).await;
        ask(&server, json!({"max_tokens": 5})).await;
        for span in (0..4).map(|_| collector.next()) {
            for header in expected {
                assert_eq!(span.head.matches(header).count(), 1, "{header:?} in {}", span.head);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_refuses_costs_spans_and_nothing_else() {
    let collector = Collector::answering(400);
    let url = format!("http://{}", collector.address);
    let server = start_traced(&url, &[]).await;
    assert_eq!(ask(&server, json!({"max_tokens": 5})).await.0, 200);
    four_are_counted(&server, "baton_trace_spans_dropped_total").await;
    assert_eq!(server.metric("baton_trace_spans_exported_total").await.expect("a metric"), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_keeps_no_request_waiting_and_no_server_from_its_end() {
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let mut server = start_traced(&format!("http://{nobody}"), &[]).await;
    for _ in 0..3 {
        assert_eq!(ask(&server, json!({"max_tokens": 5})).await.0, 200);
    }
    server.terminate().expect("a signal");
    assert!(server.wait(Duration::from_secs(30)).await.expect("it ends").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r45_a_log_that_nobody_reads_blocks_nobody_and_what_is_lost_is_counted() {
    let (unread, stderr) = pipe().expect("a pipe");
    let mut server = start_logging_to(stderr, &["--log-format", "json"]).await;
    let flood = async |client: Client| {
        for _ in 0..50 {
            assert_eq!(client.get("/live").await.expect("an answer").0, 200);
        }
    };
    let until_lost = async {
        while server.metric("baton_log_lines_lost_total").await.expect("a metric") == 0.0 {
            tokio::join!(
                flood(server.client()),
                flood(server.client()),
                flood(server.client()),
                flood(server.client())
            );
        }
    };
    timeout(PATIENCE, until_lost).await.expect("it serves on, and loses lines");
    assert_eq!(ask(&server, json!({"max_tokens": 5})).await.0, 200);
    server.terminate().expect("a signal");
    assert!(server.wait(Duration::from_secs(30)).await.expect("it ends").success());
    let lines = requests(unread);
    assert!(lines.len() > 50, "{} lines were written before", lines.len());
    assert!(lines.iter().all(|line| line["fields"]["total_ms"].is_u64() && line["fields"]["route"].is_string()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r45_a_full_disk_under_the_log_stops_nothing() {
    let full = File::options().write(true).open("/dev/full").expect("/dev/full");
    let mut server = start_logging_to(full, &[]).await;
    assert_eq!(ask(&server, json!({"max_tokens": 5})).await.0, 200);
    assert!(server.metric("baton_log_lines_lost_total").await.expect("a metric") > 0.0);
    server.terminate().expect("a signal");
    assert!(server.wait(Duration::from_secs(30)).await.expect("it ends").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_of_json_says_of_a_request_what_an_operator_asks_for() {
    let (read, stderr) = pipe().expect("a pipe");
    let mut server = start_logging_to(stderr, &["--log-format", "json", "--slow-request-seconds", "0"]).await;
    let (_, reply) = ask(&server, json!({"max_tokens": 20})).await;
    server.terminate().expect("a signal");
    assert!(server.wait(Duration::from_secs(30)).await.expect("it ends").success());
    let lines = requests(read);
    let line = lines.iter().find(|line| line["fields"]["route"] == CHAT).expect("its line");
    assert_eq!((&line["level"], &line["target"]), (&json!("INFO"), &json!("baton_http::access")));
    let fields = line["fields"].as_object().expect("an object");
    assert_eq!((&fields["model"], &fields["status"]), (&json!("abacus"), &json!(200)));
    assert_eq!(
        (&fields["prompt_tokens"], &fields["completion_tokens"]),
        (&reply["usage"]["prompt_tokens"], &reply["usage"]["completion_tokens"])
    );
    for name in ["cached_tokens", "first_token_ms", "queue_ms", "prefill_ms", "decode_ms", "total_ms"] {
        assert!(fields[name].is_u64(), "{name}: {line}");
    }
    assert!(fields["request_id"].as_str().is_some_and(|id| id.starts_with("req_")));
    assert!(!fields.contains_key("trace_id"), "there is no trace");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_keys_have_used_goes_on_behind_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let flags = ["--log-level", "warn", "--state-dir", folder.path().to_str().expect("UTF-8")];
    let (mut prompt, mut completion) = (0.0, 0.0);
    for before in 0..3 {
        let mut server = LocalServer::start(Path::new(env!("CARGO_BIN_EXE_baton")), &flags).await.expect("it starts");
        for (name, value) in
            [("requests", f64::from(before)), ("prompt_tokens", prompt), ("completion_tokens", completion)]
        {
            let found = server.metric(&format!("baton_key_{name}_total")).await.expect("it is there");
            assert_eq!(found, value, "{name} behind {before} restarts");
        }
        let (_, reply) = ask(&server, json!({"max_tokens": 8})).await;
        prompt += reply["usage"]["prompt_tokens"].as_f64().expect("a number");
        completion += reply["usage"]["completion_tokens"].as_f64().expect("a number");
        server.terminate().expect("it is told to end");
        assert!(server.wait(PATIENCE).await.expect("it ends").success());
    }
}

/// The lines of the access log in what was logged, all of which is JSON; the last line may be cut off.
fn requests(log: PipeReader) -> Vec<Value> {
    let lines: Vec<String> = BufReader::new(log).lines().map(|line| line.expect("UTF-8")).collect();
    let Some((last, whole)) = lines.split_last() else { return Vec::new() };
    let parse = |line: &String| serde_json::from_str::<Value>(line);
    let whole = whole.iter().map(|line| parse(line).expect("JSON"));
    whole.chain(parse(last).ok()).filter(|line| line["target"] == "baton_http::access").collect()
}
