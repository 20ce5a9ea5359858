//! Keys, ids, probes, models, metrics and logs.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_engine::{DraftMethod, EngineConfig, Passing, RunSpec, SpeculationConfig};
use baton_http::{ApiKey, OutsideCounter, RequestObserver, Store, StoreLimits};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::timeout;
use tracing_subscriber::fmt::MakeWriter;

use crate::harness::{CHAT, COMPLETIONS, PATIENCE, Reply, Server, Setup, chat_body, request, with};
use crate::keys::PUBLIC;

async fn guarded() -> Server {
    let mut setup = Setup::default();
    setup.config.api_keys = ["first-key", "second-key"].map(|key| ApiKey::new(key.into()).unwrap()).to_vec();
    setup.start().await
}

#[tokio::test]
async fn every_route_but_the_public_ones_needs_a_key() {
    let server = guarded().await;
    let closed = [
        ("POST", CHAT),
        ("GET", CHAT),
        ("POST", COMPLETIONS),
        ("POST", "/v1/embeddings"),
        ("POST", "/rerank"),
        ("POST", "/v1/rerank"),
        ("POST", "/v2/rerank"),
        ("POST", "/score"),
        ("POST", "/v1/score"),
        ("GET", "/v1/models"),
        ("HEAD", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/v1/models/tiny/load-report"),
        ("GET", "/v1/models/tiny/handoff"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("GET", "/admin/generations"),
        ("GET", "/admin/slow-requests"),
        ("GET", "/admin/timeline"),
        ("GET", "/admin/rollout"),
        ("POST", "/admin/rollout"),
        ("POST", "/admin/rollout/shadow"),
        ("POST", "/admin/rollout/share"),
        ("POST", "/admin/rollout/promote"),
        ("POST", "/admin/rollout/rollback"),
        ("POST", "/admin/rollout/nope"),
        ("POST", "/v1/chat/completions/render"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/files/file-0"),
        ("DELETE", "/v1/files/file-0"),
        ("GET", "/v1/files/file-0/content"),
        ("GET", "/v1/batches"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches/batch_0"),
        ("POST", "/v1/batches/batch_0/cancel"),
        ("OPTIONS", CHAT),
        ("GET", "//v1/models"),
        ("GET", "/v1/../live"),
        ("GET", "/v1%2fmodels"),
        ("GET", "/live/"),
        ("GET", "/LIVE"),
        ("GET", "/nope"),
        ("GET", "http://elsewhere/v1/models"),
    ];
    for (method, path) in closed {
        let wrong =
            ["", "authorization: first-key\r\n", "authorization: Bearer first-ke\r\n", "authorization: Bearer\r\n"];
        for headers in wrong {
            let reply = server.raw(&request(method, path, headers, b"{}")).await;
            assert_eq!(reply.status, 401, "{method} {path} {headers}");
            if method != "HEAD" {
                assert_eq!(reply.error_code(), "invalid_api_key");
                assert!(!reply.body.contains("first-ke"));
            }
        }
    }
    for path in PUBLIC {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    assert_eq!(server.get("/metrics").await.status, 200, "open on loopback");
    for key in ["Bearer first-key", "bearer second-key"] {
        let reply = server.raw(&request("GET", "/v1/models", &format!("authorization: {key}\r\n"), b"")).await;
        assert_eq!(reply.status, 200);
    }
    let absolute = request("GET", "http://elsewhere/v1/models", "authorization: Bearer first-key\r\n", b"");
    assert_eq!(server.raw(&absolute).await.status, 200);
}

#[tokio::test]
async fn head_is_get_without_the_body_on_every_route_and_options_say_what_a_route_takes() {
    let dir = TempDir::new().unwrap();
    let mut setup = Setup::default();
    setup.config.admin_api_keys = vec![ApiKey::new("admin".into()).unwrap()];
    setup.config.store =
        Some(Store::open(dir.path(), StoreLimits { file_bytes: 1 << 20, total_bytes: 1 << 20 }).unwrap());
    let server = setup.start().await;
    let key = "authorization: Bearer admin\r\n";
    let routes = [
        "/v1/models",
        "/v1/models/tiny",
        "/v1/models/tiny/load-report",
        "/v1/files",
        "/v1/files/file-0",
        "/v1/batches",
        "/v1/batches/batch_0",
        "/admin/generations",
        "/admin/rollout",
        "/nope",
    ];
    for path in PUBLIC.iter().chain(&routes) {
        let (get, head) = (request("GET", path, key, b""), request("HEAD", path, key, b""));
        let (get, head) = (server.raw(&get).await, server.raw(&head).await);
        let headers = |reply: &Reply| -> Vec<_> {
            let lasting = |(name, _): &&(String, String)| name != "x-request-id" && name != "date";
            reply.headers.iter().filter(lasting).cloned().collect()
        };
        assert_eq!((head.status, headers(&head), head.body.as_str()), (get.status, headers(&get), ""), "{path}");
    }
    for (path, allow) in [
        ("/v1/files", "POST,GET,HEAD"),
        ("/v1/files/file-0", "GET,HEAD,DELETE"),
        ("/v1/batches/batch_0", "GET,HEAD"),
        ("/tokenize", "POST"),
        ("/live", "GET,HEAD"),
    ] {
        let options = server.raw(&request("OPTIONS", path, key, b"")).await;
        assert_eq!((options.status, options.header("allow"), options.body.as_str()), (204, Some(allow), ""), "{path}");
        let other = server.raw(&request("PATCH", path, key, b"")).await;
        assert_eq!((other.status, other.header("allow")), (405, Some(allow)), "{path}");
    }
}

#[test]
fn keys_are_not_shown() {
    assert_eq!(format!("{:?}", ApiKey::new("secret".into()).unwrap()), "ApiKey(…)");
    assert!(ApiKey::new(String::new()).is_none() && ApiKey::new("a b".into()).is_none());
}

#[tokio::test]
async fn request_ids_are_echoed_if_they_are_ids_and_made_otherwise() {
    let server = Setup::default().start().await;
    let longest = "x".repeat(128);
    for id in ["abc-1", "{!}", &longest] {
        let reply = server.raw(&request("GET", "/live", &format!("x-request-id: {id}\r\n"), b"")).await;
        assert_eq!(reply.header("x-request-id"), Some(id));
    }
    let too_long = format!("x-request-id: {}\r\n", "x".repeat(129));
    for headers in
        ["", "x-request-id: a b\r\n", "x-request-id: \u{e9}\r\n", "x-request-id: a\r\nx-request-id: b\r\n", &too_long]
    {
        let reply = server.raw(&request("GET", "/nope", headers, b"")).await;
        assert_eq!(reply.status, 404);
        assert!(reply.header("x-request-id").unwrap().starts_with("req_"), "{headers}");
    }
    let reply = server.raw(&request("POST", CHAT, "x-request-id: mine\r\n", b"nonsense")).await;
    assert_eq!((reply.status, reply.header("x-request-id")), (400, Some("mine")));
}

#[tokio::test]
async fn models_are_listed_and_found_by_any_of_their_names() {
    let server = Setup::default().start().await;
    let object = |id: &str| json!({"id": id, "object": "model", "created": 1_790_000_000, "owned_by": "local", "max_model_len": 512});
    let list = server.get("/v1/models").await.json();
    assert_eq!(list, json!({"object": "list", "data": [object("tiny"), object("org/tiny")]}));
    assert_eq!(server.get("/v1/models/tiny").await.json(), object("tiny"));
    assert_eq!(server.get("/v1/models/org/tiny").await.json(), object("org/tiny"));
    assert_eq!(server.get("/v1/models/org%2Ftiny").await.json(), object("org/tiny"));
    for other in ["/v1/models/org", "/v1/models/%ff", "/v1/models/tiny/x"] {
        assert_eq!(server.get(other).await.error_code(), "model_not_found", "{other}");
    }
}

/// The first 25 names of vLLM, then what its dashboards and scaling rules ask for besides.
const NAMES: [&str; 29] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
    "vllm:admission_rejections_total",
    "vllm:corrupted_requests_total",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:iteration_tokens_total",
    "vllm:cache_config_info",
    "vllm:time_per_output_token_seconds",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:request_max_num_generation_tokens",
];

#[tokio::test]
async fn metrics_have_every_name_with_both_labels_and_count_what_happened() {
    let server = Setup::default().start().await;
    assert_eq!(server.chat(json!({"n": 2, "max_tokens": 10})).await.status, 200);
    let reply = server.get("/metrics").await;
    assert!(reply.header("content-type").unwrap().starts_with("text/plain"));
    for name in NAMES {
        assert!(reply.body.contains(&format!("# TYPE {name} ")), "{name}");
        let is_of =
            |line: &&str| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name}_count{{"));
        let sample = reply.body.lines().find(is_of).unwrap_or_else(|| panic!("no sample of {name}"));
        assert!(sample.contains("model_name=\"tiny\"") && sample.contains("engine=\"0\""), "{sample}");
    }
    let labels = "{engine=\"0\",generation=\"0123456789ab\",model_name=\"tiny\"}";
    let value = |name: &str| {
        let start = format!("{name} ");
        let line = reply.body.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{name}"));
        line[start.len()..].parse::<f64>().unwrap()
    };
    let length = "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",generation=\"0123456789ab\",model_name=\"tiny\"}";
    assert_eq!(value(length), 2.0);
    for counted_once_per_choice in
        ["time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens"]
    {
        assert_eq!(value(&format!("vllm:{counted_once_per_choice}_count{labels}")), 2.0);
    }
    for name in ["inter_token_latency_seconds", "time_per_output_token_seconds"] {
        assert_eq!(value(&format!("vllm:{name}_count{labels}")), 18.0);
    }
    for (per_request, sum) in
        [("request_params_n", 2.0), ("request_params_max_tokens", 10.0), ("request_max_num_generation_tokens", 10.0)]
    {
        assert_eq!(value(&format!("vllm:{per_request}_count{labels}")), 1.0);
        assert_eq!(value(&format!("vllm:{per_request}_sum{labels}")), sum);
    }
    assert_eq!(value(&format!("vllm:request_generation_tokens_sum{labels}")), 20.0);
    assert_eq!(value("baton_http_requests_in_flight"), 0.0);
    assert_eq!(value("baton_http_requests_total{route=\"/v1/chat/completions\",status=\"200\"}"), 1.0);
}

#[tokio::test]
async fn blocks_of_the_last_tokens_are_shown_where_a_model_has_such() {
    let server = Setup::default().start().await;
    assert!(!server.get("/metrics").await.body.contains("baton_passing_blocks"));
    let mut setup = Setup::default();
    let RunSpec { block_size, max_step_sequences, max_step_tokens, .. } = setup.spec;
    let num_blocks = Passing::fewest(5, block_size, max_step_sequences, max_step_tokens);
    setup.spec.passing = Some(Passing { reach: 5, num_blocks });
    let server = setup.start().await;
    assert_eq!(server.chat(json!({"max_tokens": 10})).await.status, 200);
    let body = server.get("/metrics").await.body;
    let count = |state: &str| {
        let is_it =
            |line: &&str| line.starts_with("baton_passing_blocks{") && line.contains(&format!("state=\"{state}\""));
        let line = body.lines().find(is_it).unwrap_or_else(|| panic!("no {state}: {body}"));
        line.rsplit(' ').next().unwrap().parse::<usize>().unwrap()
    };
    let [used, cached, free] = ["used", "cached", "free"].map(count);
    assert_eq!((used, cached + free), (0, num_blocks));
    assert!(cached > 0, "the end of what was answered is kept");
}

#[tokio::test]
async fn connections_refusals_and_what_is_counted_elsewhere_are_shown() {
    let elsewhere = Arc::new(AtomicU64::new(7));
    let mut setup = Setup::default();
    let name = "baton_elsewhere_total";
    setup.config.counters = vec![OutsideCounter { name, help: "Things elsewhere.", value: elsewhere.clone() }];
    let server = setup.start().await;
    let metrics = async || server.get("/metrics").await.body;
    let idle = [server.connect().await, server.connect().await];
    // Those two and the one that asks; who accepts them is a moment behind.
    let all = async { while !metrics().await.contains("\nbaton_http_connections 3\n") {} };
    timeout(PATIENCE, all).await.expect("all three are counted");
    drop(idle);
    let gone = async { while !metrics().await.contains("\nbaton_http_connections 1\n") {} };
    timeout(PATIENCE, gone).await.expect("those that left are not");

    server.chat(json!({"temperature": -1})).await;
    server.chat(json!({"model": "odd"})).await;
    elsewhere.store(9, Ordering::Relaxed);
    let text = metrics().await;
    for line in [
        "baton_http_errors_total{code=\"out_of_range\"} 1",
        "baton_http_errors_total{code=\"model_not_found\"} 1",
        "# TYPE baton_elsewhere_total counter",
        "baton_elsewhere_total 9",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
    }
}

#[tokio::test]
async fn drafts_are_counted_as_vllm_counts_them_where_there_are_any() {
    let plain = Setup::default().start().await;
    assert!(!plain.get("/metrics").await.body.contains("spec_decode"));

    let speculation =
        SpeculationConfig { method: DraftMethod::Model, num_speculative_tokens: 3, disable_by_batch_size: 16 };
    let engine = EngineConfig { speculation: Some(speculation), ..EngineConfig::default() };
    let server = Setup { engine, ..Setup::default() }.start().await;
    assert_eq!(server.chat(json!({"max_tokens": 40})).await.status, 200);
    let metrics = server.get("/metrics").await.body;
    let value = |name: &str, more: &str| {
        let start = format!(
            "vllm:spec_decode_{name}_total{{model_name=\"tiny\",engine=\"0\",generation=\"0123456789ab\"{more}}} "
        );
        let line = metrics.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{start}"));
        line[start.len()..].parse::<u32>().unwrap()
    };
    let accepted = value("num_accepted_tokens", "");
    assert!(0 < value("num_drafts", "") && accepted <= value("num_draft_tokens", ""));
    let by_position: u32 = (0..3).map(|i| value("num_accepted_tokens_per_pos", &format!(",position=\"{i}\""))).sum();
    assert!(accepted > 0 && by_position == accepted);
}

#[tokio::test]
async fn r44_odd_models_keys_paths_and_headers_add_no_series() {
    let server = Setup::default().start().await;
    let series = async || {
        let text = server.get("/metrics").await.body;
        text.lines().filter(|line| !line.starts_with('#')).count()
    };
    let odd = async |i: u32| {
        server.post_with_key(CHAT, &format!("odd-{i}"), &with(chat_body(), json!({"max_tokens": 1}))).await;
        server.chat(json!({"model": format!("odd-{i}")})).await;
        server.raw(&request(&format!("M{i}"), &format!("/odd/{i}"), &format!("x-odd-{i}: {i}\r\n"), b"")).await;
        server.raw(&request("GET", &format!("/v1/models/odd-{i}"), "", b"")).await;
    };
    odd(0).await;
    series().await;
    let before = series().await;
    for i in 1..100 {
        odd(i).await;
    }
    assert_eq!(series().await, before);
}

/// Everything that is logged in this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn r46_nothing_of_a_request_but_its_id_is_logged() {
    const CANARY: &str = "canary-9d2e";
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();

    let mut setup = Setup { reply: format!("Sure: {CANARY}"), ..Setup::default() };
    setup.config.slow_request = Some(Duration::ZERO);
    setup.config.admin_api_keys = vec![ApiKey::new("admin".into()).unwrap()];
    let summaries = Arc::new(Mutex::new(String::new()));
    let told = summaries.clone();
    setup.config.observer =
        Some(RequestObserver::new(move |summary| *told.lock().unwrap() += &format!("{summary:?}\n")));
    let server = setup.start().await;
    let fields = ["model", "stop", "user", "cache_salt", "temperature", "reasoning_effort", CANARY];
    for field in fields {
        server.chat(json!({field: CANARY})).await;
        server.completion(json!({field: CANARY})).await;
    }
    // Every field that is described, on every route, as a text and inside of what it should not have.
    let description = server.get("/openapi.json").await.json();
    let mut sent = 0;
    for (path, item) in description["paths"].as_object().unwrap() {
        let reference = &item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        let Some(name) = reference.as_str().and_then(|reference| reference.rsplit('/').next()) else { continue };
        let schema = &description["components"]["schemas"][name];
        let example = schema["examples"][0].clone();
        let fields = schema["properties"].as_object().into_iter().flatten();
        for (field, _) in fields {
            for value in [json!(CANARY), json!([CANARY]), json!({CANARY: CANARY})] {
                let body = with(if example.is_object() { example.clone() } else { json!({}) }, json!({field: value}));
                server
                    .raw(&request("POST", path, "authorization: Bearer admin\r\n", body.to_string().as_bytes()))
                    .await;
                sent += 1;
            }
        }
    }
    assert!(sent > 300, "{sent}");
    let message = json!({"messages": [{"role": "user", "content": CANARY, "name": CANARY}]});
    assert!(server.chat(message.clone()).await.body.contains(CANARY), "the reply itself says it");
    assert_eq!(server.chat(with(message, json!({"stream": true, "logprobs": true}))).await.status, 200);
    assert_eq!(server.completion(json!({"prompt": CANARY})).await.status, 200);
    server.chat(json!({"messages": [{"role": CANARY, "content": CANARY}]})).await;
    server.chat(json!({"chat_template_kwargs": {"a": CANARY}})).await;
    server.raw(&request("POST", CHAT, "", CANARY.as_bytes())).await;
    let headers = format!(
        "authorization: Bearer {CANARY}\r\ncookie: {CANARY}\r\nuser-agent: {CANARY}\r\ntraceparent: {CANARY}\r\n\
         tracestate: a={CANARY}\r\nbaggage: a={CANARY}\r\n"
    );
    let body = with(chat_body(), json!({"max_tokens": 5})).to_string();
    server.raw(&request("POST", &format!("{CHAT}?q={CANARY}"), &headers, body.as_bytes())).await;
    server.get(&format!("/{CANARY}")).await;
    server.get(&format!("/v1/models/{CANARY}")).await;
    server.raw(&request(CANARY, "/live", "", b"")).await;
    let metrics = server.get("/metrics").await.body;
    assert!(!metrics.contains(CANARY));
    for path in ["/admin/slow-requests", "/admin/timeline"] {
        let reply = server.get_with_key(path, "admin").await;
        assert!(reply.status == 200 && !reply.body.contains(CANARY), "{path}");
    }
    let id = "x-request-id: the-id-of-this\r\n";
    server.raw(&request("POST", CHAT, id, body.as_bytes())).await;

    let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines = logged.lines().filter(|line| line.contains("baton_http::access")).count();
    assert!(lines > 20, "{lines}");
    let line = logged.lines().find(|line| line.contains("the-id-of-this")).expect("the line of a request");
    for part in [
        "route=/v1/chat/completions",
        "status=200",
        "model=\"tiny\"",
        "trace_id=",
        "cached_tokens=",
        "completion_tokens=5",
        "queue_ms=",
        "first_token_ms=",
        "total_ms=",
    ] {
        assert!(line.contains(part), "{line}");
    }
    let slow = logged.lines().find(|line| line.contains("a slow request") && line.contains("the-id-of-this"));
    assert!(slow.is_some_and(|line| line.contains("WARN") && line.contains("seconds=")), "{slow:?}");
    let summaries = summaries.lock().unwrap();
    assert!(summaries.lines().count() > 20 && !summaries.contains("canary"), "{summaries}");
    if let Some(leak) = logged.lines().find(|line| line.contains("canary")) {
        panic!("leaked: {leak}");
    }
}
