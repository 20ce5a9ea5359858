//! What is known of requests when they have ended: summaries, traces, the slowest, and the timeline of steps.

use std::sync::Arc;
use std::time::Duration;

use baton_http::{ApiKey, RequestObserver, RequestSummary, ServiceConfig};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::harness::{CHAT, DIGEST, PATIENCE, Server, Setup, chat_body, eventually, read_until, request, with};

const TRACEPARENT: &str = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";

/// What an observer was told.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<RequestSummary>>>);

impl Told {
    fn config(&self) -> ServiceConfig {
        let told = self.clone();
        let observer = RequestObserver::new(move |summary| told.0.lock().push(summary.clone()));
        let admin_api_keys = vec![ApiKey::new("admin".into()).unwrap()];
        ServiceConfig { observer: Some(observer), admin_api_keys, ..ServiceConfig::default() }
    }

    async fn start() -> (Self, Server) {
        let told = Self::default();
        let server = Setup { config: told.config(), ..Setup::default() }.start().await;
        (told, server)
    }

    /// The last request, which may end a moment after its client has read it.
    async fn last(&self, count: usize) -> RequestSummary {
        eventually("all are told", || self.0.lock().len() == count).await;
        self.0.lock().last().unwrap().clone()
    }
}

#[tokio::test]
async fn a_request_is_summed_up_once_with_its_model_tokens_and_times() {
    let (told, server) = Told::start().await;
    let fields = json!({"model": "org/tiny", "n": 2, "max_tokens": 10, "temperature": 0.5});
    let reply = server.chat(fields.clone()).await;
    let usage = &reply.json()["usage"];
    let summary = told.last(1).await;
    let known = &summary.known;
    assert_eq!(summary.request_id, reply.header("x-request-id").unwrap());
    assert_eq!((summary.method, summary.route.as_str(), summary.status), ("POST", CHAT, 200));
    assert_eq!((known.model.as_deref(), known.generation.as_deref()), (Some("org/tiny"), Some(DIGEST)));
    assert_eq!(json!(known.prompt_tokens), usage["prompt_tokens"]);
    assert_eq!((known.completion_tokens, known.cached_tokens), (20, 0));
    assert_eq!((known.endings.as_slice(), known.error), (["length", "length"].as_slice(), None));
    let asked = known.asked.unwrap();
    assert_eq!((asked.n, asked.max_tokens, asked.temperature, asked.top_p), (2, Some(10), 0.5, 1.0));
    let (submitted, first_token, timings) =
        (known.submitted.unwrap(), known.first_token.unwrap(), known.timings.unwrap());
    assert!(submitted <= first_token && first_token <= summary.total, "{summary:?}");
    assert!(submitted + timings.queue + timings.prefill + timings.decode <= summary.total, "{summary:?}");

    let reply = server.chat(fields).await.json();
    let cached = told.last(2).await.known.cached_tokens;
    assert!(cached > 0 && json!(cached) == reply["usage"]["prompt_tokens_details"]["cached_tokens"], "{reply}");
}

#[tokio::test]
async fn refusals_failures_and_clients_that_leave_are_summed_up_as_what_they_are() {
    let (told, server) = Told::start().await;
    server.chat(json!({"model": "nobody-s"})).await;
    let refused = told.last(1).await;
    assert_eq!((refused.status, refused.known.error), (404, Some("model_not_found")));
    assert_eq!((&refused.known.model, &refused.known.generation, refused.known.timings), (&None, &None, None));

    server.control.fail_steps(1);
    server.chat(json!({})).await;
    let failed = told.last(2).await;
    assert_eq!((failed.status, failed.known.endings.as_slice()), (500, ["error"].as_slice()));
    assert!(failed.known.error.is_some() && failed.known.timings.is_some(), "{failed:?}");

    server.control.delay_steps(Duration::from_millis(5));
    let mut stream = server.open_chat(json!({"stream": true, "max_tokens": 400})).await;
    read_until(&mut stream, "add").await;
    drop(stream);
    let left = told.last(3).await;
    assert_eq!((left.status, left.known.endings.as_slice()), (200, ["abort"].as_slice()));
}

#[tokio::test]
async fn a_request_goes_on_with_the_trace_that_it_is_sent_in_or_begins_one() {
    let (told, server) = Told::start().await;
    let body = with(chat_body(), json!({"max_tokens": 2})).to_string();
    let send = async |headers: &str| server.raw(&request("POST", CHAT, headers, body.as_bytes())).await;
    send(&format!("{TRACEPARENT}-01\r\n")).await;
    let inside = told.last(1).await.trace.unwrap();
    assert_eq!(inside.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
    assert_eq!((inside.parent_id, inside.sampled), (Some(0xb7ad_6b71_6920_3331), true));
    assert!(inside.span_id != 0 && Some(inside.span_id) != inside.parent_id);

    send(&format!("{TRACEPARENT}-00\r\n")).await;
    assert!(!told.last(2).await.trace.unwrap().sampled);
    for (count, headers) in [(3, String::new()), (4, format!("{TRACEPARENT}-zz\r\n"))] {
        send(&headers).await;
        let root = told.last(count).await.trace.unwrap();
        assert!(root.parent_id.is_none() && root.sampled && root.trace_id != inside.trace_id, "{root:?}");
    }
}

#[tokio::test]
async fn the_slowest_requests_are_listed_for_an_admin_with_where_their_time_went() {
    let (told, server) = Told::start().await;
    server.get("/live").await;
    server.chat(json!({"max_tokens": 5})).await;
    server.control.delay_steps(Duration::from_millis(20));
    let slow = server.chat(json!({"max_tokens": 10})).await;
    told.last(3).await;
    let list = server.get_with_key("/admin/slow-requests", "admin").await.json();
    let data = list["data"].as_array().unwrap();
    assert_eq!(data.len(), 2, "what asks no model is never slow: {list}");
    let slowest = &data[0];
    assert_eq!(slowest["request_id"], slow.header("x-request-id").unwrap());
    assert_eq!((&slowest["route"], &slowest["model"]), (&json!(CHAT), &json!("tiny")));
    assert_eq!((&slowest["completion_tokens"], &slowest["finish_reasons"]), (&json!(10), &json!(["length"])));
    assert!(
        slowest["decode_ms"].as_u64().unwrap() >= 9 * 20 && slowest["total_ms"].as_u64() > data[1]["total_ms"].as_u64()
    );
    assert_eq!(server.get("/admin/slow-requests").await.status, 401);
}

#[tokio::test]
async fn a_timeline_has_the_steps_of_its_seconds_for_perfetto() {
    let (_, server) = Told::start().await;
    server.control.delay_steps(Duration::from_millis(2));
    let running = server.open_chat(json!({"stream": true, "ignore_eos": true, "max_tokens": 400})).await;
    let reply = server.get_with_key("/admin/timeline?seconds=1", "admin").await;
    drop(running);
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{}", reply.body);
    let trace = reply.json();
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |phase: &str| events.iter().filter(|event| event["ph"] == phase).collect::<Vec<_>>();
    assert_eq!(of("M")[0]["args"]["name"], "serving 0123456789ab");
    let steps = of("X");
    assert!(steps.len() > 3 && of("C").len() == 2 * steps.len(), "{} steps", steps.len());
    let number = |event: &Value, name: &str| event[name].as_f64().unwrap();
    for step in &steps {
        assert!(
            step["name"] == "step" && number(step, "dur") >= 2000.0 && step["args"]["tokens"].as_u64() >= Some(1),
            "{step}"
        );
    }
    for pair in steps.windows(2) {
        assert!(number(pair[0], "ts") + number(pair[0], "dur") <= number(pair[1], "ts"), "{pair:?}");
    }
    assert_eq!(trace["otherData"]["lost_steps"], 0);
}

#[tokio::test]
async fn one_timeline_is_recorded_at_a_time_and_a_client_that_leaves_ends_it() {
    let (_, server) = Told::start().await;
    let path = |seconds: &str| format!("/admin/timeline?{seconds}");
    let key = "authorization: Bearer admin\r\n";
    let mut first = server.connect().await;
    tokio::io::AsyncWriteExt::write_all(&mut first, &request("GET", &path("seconds=60"), key, b"")).await.unwrap();
    let taken = tokio::time::timeout(PATIENCE, async {
        while server.engine.record_steps(1).is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    taken.await.expect("the recording begins");
    let second = server.get_with_key(&path("seconds=1"), "admin").await;
    assert_eq!((second.status, second.error_code().as_str()), (409, "conflict"));
    drop(first);
    eventually("it ends with its client", || server.engine.record_steps(1).is_some()).await;
    for wrong in ["seconds=0", "seconds=61", "seconds=x", "second=1"] {
        assert_eq!(server.get_with_key(&path(wrong), "admin").await.status, 400, "{wrong}");
    }
}
