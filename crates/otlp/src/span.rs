//! A span, as whoever has something to tell makes it.

use std::time::SystemTime;

/// Part of a trace that took some time.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// The trace. Not 0.
    pub trace_id: u128,
    /// Its own id. Not 0.
    pub span_id: u64,
    /// The span that it is part of; `None`: the trace begins with it.
    pub parent_id: Option<u64>,
    /// What was done, in few words that are often the same.
    pub name: String,
    /// Its part in the exchange.
    pub kind: Kind,
    /// By the wall clock.
    pub start: SystemTime,
    /// Not before the start.
    pub end: SystemTime,
    /// Each name once.
    pub attributes: Vec<Attribute>,
    /// Whether it ended in an error.
    pub failed: bool,
}

/// The part of a span in an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Inside of the service.
    Internal,
    /// Its answer to a request.
    Server,
}

/// Name and value.
pub type Attribute = (&'static str, Value);

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A text.
    Text(String),
    /// A whole number.
    Int(i64),
    /// A number.
    Double(f64),
    /// Several texts.
    Texts(Vec<String>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Double(number)
    }
}
