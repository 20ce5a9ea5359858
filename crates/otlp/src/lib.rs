//! Spans to an OpenTelemetry collector: OTLP over HTTP, as protobuf.
//!
//! Whoever has spans gives them to a [`Spans`] and goes on; an [`Exporter`] sends them from a thread of its own. Its queue is
//! bounded: when the collector is slow or away, what does not fit is dropped and counted. Nothing is sent anywhere but to
//! the one [`Endpoint`], and no redirect is followed.
//!
//! Absent on purpose: what spans mean, and any use of a global.

mod endpoint;
mod exporter;
mod span;
#[cfg(test)]
mod tests;
mod wire;

pub use endpoint::{Endpoint, EndpointError};
pub use exporter::{Counts, Exporter, Spans};
pub use span::{Attribute, Kind, Span, Value};
