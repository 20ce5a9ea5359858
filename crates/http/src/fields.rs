//! Reading the fields of a JSON object, with errors that name the field.
//!
//! A field is taken out when it is read; what is left at the end nobody knows: it is refused or, where the server is
//! lenient, noted. `null` equals absent everywhere.

use std::ops::RangeInclusive;
use std::sync::Arc;

use axum::extract::Query;
use http::Uri;
use parking_lot::Mutex;
use serde_json::{Map, Value};

use crate::error::ApiError;

#[cfg(test)]
thread_local! {
    /// The paths of all fields that readers of this thread asked for.
    pub(crate) static READ: std::cell::RefCell<std::collections::BTreeSet<String>> = const { std::cell::RefCell::new(std::collections::BTreeSet::new()) };
}

/// The fields of one object that have not been read yet.
pub(crate) struct Fields {
    /// Where the object stands: empty for the body.
    path: String,
    map: Map<String, Value>,
    /// Paths of fields that nobody knows, of all objects of the body; `None` where they are refused.
    ignored: Option<Arc<Mutex<Vec<String>>>>,
}

impl Fields {
    /// The fields of the body, each of which must be known.
    pub fn new(map: Map<String, Value>) -> Self {
        Self { path: String::new(), map, ignored: None }
    }

    /// The parameters of a query, each given once. Whole numbers and truth values are known by their form.
    pub fn of_query(uri: &Uri) -> Result<Self, ApiError> {
        let unreadable = |_| ApiError::invalid("query", "the query must be name=value pairs, percent-encoded");
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri).map_err(unreadable)?;
        let mut map = Map::new();
        for (name, text) in pairs {
            let value = match text.as_str() {
                "true" => Value::Bool(true),
                "false" => Value::Bool(false),
                number => number.parse::<i64>().map_or_else(|_| Value::String(text), Value::from),
            };
            if map.insert(name.clone(), value).is_some() {
                return Err(ApiError::invalid(&name, "a parameter of the query must be given once"));
            }
        }
        Ok(Self::new(map))
    }

    /// The fields of an object that stands at `path`, each of which must be known.
    pub fn of(path: String, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path, map, ignored: None }),
            _ => Err(ApiError::wrong_type(&path, "an object")),
        }
    }

    /// The fields of an object that stands at `path`, somewhere inside this one: unknown ones share its fate.
    pub fn item(&self, path: String, value: Value) -> Result<Self, ApiError> {
        Ok(Self { ignored: self.ignored.clone(), ..Self::of(path, value)? })
    }

    /// From now on, if `lenient`, unknown fields are noted instead of refused, here and in what stands inside.
    pub fn lenient(mut self, lenient: bool) -> Self {
        if lenient {
            self.ignored.get_or_insert_default();
        }
        self
    }

    /// The full path of a field.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A field's value as it is.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        READ.with_borrow_mut(|read| read.insert(self.path(name)));
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// Takes a field whose value is like this.
    pub fn take_if(&mut self, name: &str, like: impl FnOnce(&Value) -> bool) {
        if self.map.get(name).is_some_and(like) {
            self.map.shift_remove(name);
        }
    }

    /// A field that must be there.
    pub fn required<T>(&self, name: &str, value: Option<T>) -> Result<T, ApiError> {
        value.ok_or_else(|| ApiError::missing(&self.path(name)))
    }

    /// A boolean.
    pub fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        let value = self.take(name);
        value.map(|v| v.as_bool().ok_or_else(|| ApiError::wrong_type(&self.path(name), "true or false"))).transpose()
    }

    /// A string.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::wrong_type(&self.path(name), "a string")),
        }
    }

    /// An array.
    pub fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(ApiError::wrong_type(&self.path(name), "an array")),
        }
    }

    /// An object.
    pub fn object(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        let value = self.take(name);
        value.map(|value| self.item(self.path(name), value)).transpose()
    }

    /// A number in a range.
    pub fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        number(&self.path(name), &value, range).map(Some)
    }

    /// A whole number in a range.
    pub fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        integer(&self.path(name), &value, range).map(Some)
    }

    /// A whole number from `low` to the largest `u32`.
    pub fn count(&mut self, name: &str, low: u32) -> Result<Option<u32>, ApiError> {
        let value = self.integer(name, i64::from(low)..=i64::from(u32::MAX))?;
        Ok(value.map(|v| v as u32))
    }

    /// The names of fields that were not read and are not null.
    pub fn rest(&self) -> impl Iterator<Item = &str> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str())
    }

    /// All remaining fields.
    pub fn into_rest(self) -> Map<String, Value> {
        self.map
    }

    /// Refuses or notes what was not read.
    pub fn finish(&self) -> Result<(), ApiError> {
        self.rest().try_for_each(|name| self.ignore(name, ApiError::unknown_parameter))
    }

    /// A field that is not done justice: refused with this error, or noted.
    pub fn ignore(&self, name: &str, refusal: impl FnOnce(&str) -> ApiError) -> Result<(), ApiError> {
        let path = self.path(name);
        match &self.ignored {
            Some(ignored) => ignored.lock().push(path),
            None => return Err(refusal(&path)),
        }
        Ok(())
    }

    /// What has been noted so far, of all objects of the body.
    pub fn ignored(&self) -> Vec<String> {
        self.ignored.as_ref().map(|ignored| ignored.lock().clone()).unwrap_or_default()
    }
}

/// A number in a range.
pub(crate) fn number(path: &str, value: &Value, range: RangeInclusive<f64>) -> Result<f32, ApiError> {
    let number = value.as_f64().ok_or_else(|| ApiError::wrong_type(path, "a number"))?;
    if !range.contains(&number) {
        return Err(ApiError::out_of_range(path, format!("between {} and {}", range.start(), range.end())));
    }
    Ok(number as f32)
}

/// A whole number in a range; `3.0` is one.
pub(crate) fn integer(path: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    let out_of_range = || match *range.end() {
        i64::MAX => ApiError::out_of_range(path, format!("at least {}", range.start())),
        end => ApiError::out_of_range(path, format!("between {} and {end}", range.start())),
    };
    let whole = match value.as_i64() {
        Some(whole) => whole,
        None => {
            let number = value.as_f64().filter(|n| n.fract() == 0.0);
            let number = number.ok_or_else(|| ApiError::wrong_type(path, "an integer"))?;
            // 2^53: up to there a float names one integer.
            if number.abs() > 9_007_199_254_740_992.0 {
                return Err(out_of_range());
            }
            number as i64
        }
    };
    if range.contains(&whole) { Ok(whole) } else { Err(out_of_range()) }
}
