//! The exporter against a collector on a real socket, which answers as it is told.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use baton_http::TraceContext;
use crossbeam_channel::{Receiver, Sender, unbounded};
use opentelemetry::KeyValue;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_sdk::{Resource, trace::SpanData};
use prost::Message;

use super::collector::{Endpoint, Means};
use super::exporter::Exporter;

const PATIENCE: Duration = Duration::from_secs(30);

/// Head and body of each request, answered with the next status, or 200 when none is left; 202 says that one span was rejected.
struct Collector {
    endpoint: Endpoint,
    requests: Receiver<(String, Vec<u8>)>,
    statuses: Sender<u16>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (sender, requests) = unbounded();
        let (statuses, answers) = unbounded();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut bytes = Vec::new();
                let head = loop {
                    let mut more = [0; 4096];
                    let read = stream.read(&mut more).unwrap();
                    bytes.extend_from_slice(&more[..read]);
                    if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                        break end + 4;
                    }
                };
                let text = String::from_utf8(bytes[..head].to_vec()).unwrap().to_ascii_lowercase();
                let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                let mut body = bytes.split_off(head);
                let read = body.len();
                body.resize(length.parse().unwrap(), 0);
                stream.read_exact(&mut body[read..]).unwrap();
                let status = answers.try_recv().unwrap_or(200);
                let rejected = ExportTracePartialSuccess { rejected_spans: 1, ..Default::default() };
                let partial_success = (status == 202).then_some(rejected);
                let answer = ExportTraceServiceResponse { partial_success }.encode_to_vec();
                let reply = format!(
                    "HTTP/1.1 {status} x\r\nlocation: http://127.0.0.1:1/\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                    answer.len()
                );
                stream.write_all(&[reply.as_bytes(), &answer].concat()).unwrap();
                if sender.send((text, body)).is_err() {
                    return;
                }
            }
        });
        Self { endpoint, requests, statuses }
    }

    fn exporter(&self) -> Exporter {
        exporter(self.endpoint.clone(), &[])
    }
}

fn exporter(endpoint: Endpoint, variables: &[(&str, &str)]) -> Exporter {
    let variables: Vec<_> =
        [variables, &[("OTEL_BSP_SCHEDULE_DELAY", "20"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "30000")]].concat();
    let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
    let resource = Resource::builder_empty().with_service_name("tests").build();
    Exporter::start(&endpoint, Means::of(variable).unwrap(), &resource, variable).unwrap()
}

fn span(name: &str) -> SpanData {
    let trace = TraceContext { trace_id: 0x0102, parent_id: None, span_id: 0x0304, sampled: true };
    let times = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_nanos(5));
    SpanData { attributes: vec![KeyValue::new("a.number", -3)], ..super::span(trace, 5, name.into(), times) }
}

/// The names of the spans in a body.
fn names(body: &[u8]) -> Vec<String> {
    let resources = ExportTraceServiceRequest::decode(body).unwrap().resource_spans;
    let scopes = resources.into_iter().flat_map(|resource| resource.scope_spans);
    scopes.flat_map(|scope| scope.spans).map(|span| span.name).collect()
}

/// Waits until a count is reached.
#[track_caller]
fn eventually(count: &AtomicU64, value: u64) {
    let start = Instant::now();
    while count.load(Ordering::Relaxed) != value {
        assert!(start.elapsed() < PATIENCE, "{count:?} does not become {value}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn spans_arrive_as_protobuf_under_the_name_of_the_resource() {
    let collector = Collector::start();
    let exporter = collector.exporter();
    exporter.spans().send(vec![span("one"), span("two")]);
    let (head, body) = collector.requests.recv_timeout(PATIENCE).unwrap();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    assert!(head.contains("content-type: application/x-protobuf\r\n"), "{head}");
    let export = ExportTraceServiceRequest::decode(&body[..]).unwrap();
    let [of_resource] = &export.resource_spans[..] else { panic!("{export:?}") };
    let [of_scope] = &of_resource.scope_spans[..] else { panic!("{export:?}") };
    let [service] = &of_resource.resource.as_ref().unwrap().attributes[..] else { panic!("{export:?}") };
    let name = Some(Value::StringValue("tests".to_owned()));
    assert_eq!((&*service.key, service.value.clone().unwrap().value), ("service.name", name));
    assert_eq!(of_scope.scope.as_ref().unwrap().name, "baton");
    let [one, two] = &of_scope.spans[..] else { panic!("{export:?}") };
    assert_eq!((&*one.name, &*two.name), ("one", "two"));
    assert_eq!((&one.trace_id[..], &one.span_id[..]), (&0x0102_u128.to_be_bytes()[..], &5_u64.to_be_bytes()[..]));
    assert_eq!((one.start_time_unix_nano, one.end_time_unix_nano), (0, 5));
    let [number] = &one.attributes[..] else { panic!("{export:?}") };
    assert_eq!((&*number.key, number.value.clone().unwrap().value), ("a.number", Some(Value::IntValue(-3))));
    eventually(&exporter.counts().exported, 2);
    assert_eq!(exporter.counts().dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn headers_arrive_as_they_were_checked_and_each_once() {
    let collector = Collector::start();
    let given = [
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", ""),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=no, Api-Key = s%20ecret%3D , x-share=100%2541,"),
    ];
    let exporter = exporter(collector.endpoint.clone(), &given);
    exporter.spans().send(vec![span("one")]);
    let (head, body) = collector.requests.recv_timeout(PATIENCE).unwrap();
    let of = |name: &str| head.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>();
    assert_eq!(of("api-key"), ["api-key: s ecret="]);
    assert_eq!(of("x-share"), ["x-share: 100%41"]);
    assert_eq!(names(&body), ["one"]);
    eventually(&exporter.counts().exported, 1);
}

#[test]
fn what_is_sent_is_compressed_if_that_is_asked_for() {
    let collector = Collector::start();
    let exporter = exporter(collector.endpoint.clone(), &[("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")]);
    exporter.spans().send(vec![span("one")]);
    let (head, body) = collector.requests.recv_timeout(PATIENCE).unwrap();
    assert!(head.contains("content-encoding: gzip\r\n") && body.starts_with(&[0x1f, 0x8b]), "{head}");
    eventually(&exporter.counts().exported, 1);
}

#[test]
fn a_batch_that_cannot_be_taken_now_is_sent_again_and_one_that_is_refused_is_not() {
    let collector = Collector::start();
    [503, 429].into_iter().for_each(|status| collector.statuses.send(status).unwrap());
    let exporter = collector.exporter();
    exporter.spans().send(vec![span("late")]);
    let bodies: Vec<_> = (0..3).map(|_| collector.requests.recv_timeout(PATIENCE).unwrap().1).collect();
    assert!(bodies.iter().all(|body| *body == bodies[0] && names(body) == ["late"]));
    eventually(&exporter.counts().exported, 1);

    // A redirect is an answer like others: nobody goes where it leads.
    for (refusals, status) in (1..).zip([400, 401, 307]) {
        collector.statuses.send(status).unwrap();
        exporter.spans().send(vec![span("refused")]);
        assert_eq!(names(&collector.requests.recv_timeout(PATIENCE).unwrap().1), ["refused"]);
        eventually(&exporter.counts().dropped, refusals);
    }
    assert_eq!(exporter.counts().exported.load(Ordering::Relaxed), 1);

    collector.statuses.send(202).unwrap();
    exporter.spans().send(vec![span("taken"), span("rejected")]);
    eventually(&exporter.counts().exported, 2);
    eventually(&exporter.counts().dropped, 4);
}

#[test]
fn whoever_gives_spans_never_waits_and_what_does_not_fit_is_counted() {
    // Accepts connections and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let exporter = exporter(url.parse().unwrap(), &[("OTEL_BSP_MAX_QUEUE_SIZE", "1000")]);
    let (spans, counts) = (exporter.spans(), exporter.counts());
    (0..5_000).for_each(|_| spans.send(vec![span("flood"); 3]));
    // What is being sent has a place too, and a group is taken as a whole.
    assert_eq!(counts.dropped.load(Ordering::Relaxed), 15_000 - 999);
    assert_eq!(counts.exported.load(Ordering::Relaxed), 0);
    // Nor does the end wait: the collector has not answered, and will not.
    exporter.stop(Duration::from_millis(50));
    assert_eq!(counts.exported.load(Ordering::Relaxed), 0);
}

#[test]
fn what_is_queued_at_the_end_is_sent() {
    let collector = Collector::start();
    let exporter = collector.exporter();
    let counts = exporter.counts();
    exporter.spans().send(vec![span("last"), span("words")]);
    exporter.stop(PATIENCE);
    assert_eq!(counts.exported.load(Ordering::Relaxed), 2);
    let mut sent = Vec::new();
    while sent.len() < 2 {
        sent.extend(names(&collector.requests.recv_timeout(PATIENCE).unwrap().1));
    }
    assert_eq!(sent, ["last", "words"]);
}

#[test]
fn a_collector_that_is_away_is_asked_as_long_as_was_said() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let exporter =
        exporter(format!("http://{nobody}").parse().unwrap(), &[("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "300")]);
    exporter.spans().send(vec![span("lost")]);
    eventually(&exporter.counts().dropped, 1);
    exporter.stop(PATIENCE);
}

#[test]
fn numbers_of_batches_that_cannot_be_had_are_refused() {
    // A queue must have places for all spans of a request.
    for (name, too_little) in
        [("OTEL_BSP_MAX_QUEUE_SIZE", "3"), ("OTEL_BSP_SCHEDULE_DELAY", "0"), ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0")]
    {
        for value in [too_little, "-1", "5s"] {
            let variable = |asked: &str| (asked == name).then(|| value.to_owned());
            let endpoint = "http://localhost".parse().unwrap();
            let resource = Resource::builder_empty().build();
            let refusal = Exporter::start(&endpoint, Means::of(variable).unwrap(), &resource, variable).err().unwrap();
            assert!(refusal.to_string().contains(name), "{refusal}");
        }
    }
}
