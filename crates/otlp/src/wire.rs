//! Spans as OTLP writes them: the messages of `opentelemetry/proto/trace/v1/trace.proto` and those that they are made of,
//! with the fields that are used here. Numbers of fields are the protocol's.

use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::span::{Attribute, Kind, Span, Value};

/// `TRACE_FLAGS_SAMPLED` of the trace context.
const SAMPLED: u32 = 1;
const STATUS_ERROR: i32 = 2;

/// The body of a request to a collector.
pub(crate) fn encode(resource: &[Attribute], scope: (&str, &str), spans: &[Span]) -> Vec<u8> {
    let scope = InstrumentationScope { name: scope.0.to_owned(), version: scope.1.to_owned() };
    let spans = spans.iter().map(WireSpan::from).collect();
    let resource = Resource { attributes: resource.iter().map(KeyValue::from).collect() };
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans }];
    let request =
        ExportTraceServiceRequest { resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans }] };
    request.encode_to_vec()
}

/// How many spans the collector says that it did not take, behind a status that says it took them.
pub(crate) fn rejected(answer: &[u8]) -> usize {
    let answer = ExportTraceServiceResponse::decode(answer).unwrap_or_default();
    let rejected = answer.partial_success.map_or(0, |partial| partial.rejected_spans);
    usize::try_from(rejected).unwrap_or(0)
}

#[derive(Message)]
struct ExportTraceServiceResponse {
    #[prost(message, optional, tag = "1")]
    partial_success: Option<PartialSuccess>,
}

#[derive(Message)]
struct PartialSuccess {
    #[prost(int64, tag = "1")]
    rejected_spans: i64,
}

#[derive(Message)]
struct ExportTraceServiceRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<InstrumentationScope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<WireSpan>,
}

#[derive(Message)]
struct InstrumentationScope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Message)]
struct WireSpan {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

#[derive(Message)]
struct Status {
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Message)]
struct AnyValue {
    #[prost(oneof = "OneValue", tags = "1, 3, 4, 5")]
    value: Option<OneValue>,
}

#[derive(prost::Oneof)]
enum OneValue {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(int64, tag = "3")]
    Int(i64),
    #[prost(double, tag = "4")]
    Double(f64),
    #[prost(message, tag = "5")]
    Array(ArrayValue),
}

#[derive(Message)]
struct ArrayValue {
    #[prost(message, repeated, tag = "1")]
    values: Vec<AnyValue>,
}

impl From<&Span> for WireSpan {
    fn from(span: &Span) -> Self {
        let kind = match span.kind {
            Kind::Internal => 1,
            Kind::Server => 2,
        };
        Self {
            trace_id: span.trace_id.to_be_bytes().to_vec(),
            span_id: span.span_id.to_be_bytes().to_vec(),
            parent_span_id: span.parent_id.map_or_else(Vec::new, |id| id.to_be_bytes().to_vec()),
            name: span.name.clone(),
            kind,
            start_time_unix_nano: nanos(span.start),
            end_time_unix_nano: nanos(span.end),
            attributes: span.attributes.iter().map(KeyValue::from).collect(),
            status: span.failed.then_some(Status { code: STATUS_ERROR }),
            flags: SAMPLED,
        }
    }
}

impl From<&Attribute> for KeyValue {
    fn from((key, value): &Attribute) -> Self {
        Self { key: (*key).to_owned(), value: Some(value.into()) }
    }
}

impl From<&Value> for AnyValue {
    fn from(value: &Value) -> Self {
        let text = |text: &String| Self { value: Some(OneValue::Text(text.clone())) };
        match value {
            Value::Text(one) => text(one),
            Value::Int(number) => Self { value: Some(OneValue::Int(*number)) },
            Value::Double(number) => Self { value: Some(OneValue::Double(*number)) },
            Value::Texts(texts) => {
                let values = texts.iter().map(text).collect();
                Self { value: Some(OneValue::Array(ArrayValue { values })) }
            }
        }
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
