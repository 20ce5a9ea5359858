//! A JSON object read field by field, collecting every reason for refusal instead of stopping at the
//! first. A field that is null counts as absent, as in Python.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Where the object lies in its file, for messages: `"rope_scaling."`.
    path: &'static str,
    pub(crate) reasons: Vec<String>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>, path: &'static str) -> Self {
        Self { map, path, reasons: Vec::new() }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    /// Whether the field is there, be it null.
    pub(crate) fn is_stated(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    pub(crate) fn refuse(&mut self, reason: impl Into<String>) {
        self.reasons.push(reason.into());
    }

    /// An integer in `range`; a placeholder in range if it is refused.
    pub(crate) fn size(&mut self, name: &str, range: RangeInclusive<usize>) -> usize {
        self.optional_size(name, range.clone()).unwrap_or_else(|| {
            self.require(name);
            *range.start()
        })
    }

    pub(crate) fn size_or(&mut self, name: &str, default: usize, range: RangeInclusive<usize>) -> usize {
        self.optional_size(name, range).unwrap_or(default)
    }

    pub(crate) fn optional_size(&mut self, name: &str, range: RangeInclusive<usize>) -> Option<usize> {
        let value = self.get(name)?;
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| range.contains(v));
        if size.is_none() {
            let (low, high) = range.into_inner();
            self.refuse(format!("{}{name} is {}, not an integer from {low} to {high}", self.path, short(value)));
        }
        size
    }

    /// A finite number for which `accept` holds, described by `what`.
    pub(crate) fn optional_number(&mut self, name: &str, what: &str, accept: impl Fn(f64) -> bool) -> Option<f64> {
        let value = self.get(name)?;
        let number = value.as_f64().filter(|v| v.is_finite() && accept(*v));
        if number.is_none() {
            self.refuse(format!("{}{name} is {}, not {what}", self.path, short(value)));
        }
        number
    }

    /// As above, refused if absent; 1 if refused.
    pub(crate) fn number(&mut self, name: &str, what: &str, accept: impl Fn(f64) -> bool) -> f64 {
        self.optional_number(name, what, accept).unwrap_or_else(|| {
            self.require(name);
            1.0
        })
    }

    pub(crate) fn flag(&mut self, name: &str, default: bool) -> bool {
        let Some(value) = self.get(name) else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.refuse(format!("{}{name} is {}, not true or false", self.path, short(value)));
            default
        })
    }

    pub(crate) fn text(&mut self, name: &str) -> Option<&'a str> {
        let value = self.get(name)?;
        if !value.is_string() {
            self.refuse(format!("{}{name} is {}, not a string", self.path, short(value)));
        }
        value.as_str()
    }

    /// Refuses any value but those supported; absent is fine.
    pub(crate) fn only(&mut self, name: &str, supported: &[Value]) {
        if let Some(value) = self.get(name).filter(|v| !supported.contains(v)) {
            let supported = supported.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
            self.refuse(format!("{}{name} is {}; supported: {supported}", self.path, short(value)));
        }
    }

    /// One token id or a list of them.
    pub(crate) fn token_ids(&mut self, name: &str) -> Option<Vec<u32>> {
        let value = self.get(name)?;
        let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        if ids.is_none() {
            self.refuse(format!("{}{name} is {}, not a token id or a list of them", self.path, short(value)));
        }
        ids
    }

    fn require(&mut self, name: &str) {
        if self.get(name).is_none() {
            self.refuse(format!("{}{name} is missing", self.path));
        }
    }
}

/// A value for a message, cut: it comes from outside and may be huge.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}
