//! JSON from outside, within bounds.
//!
//! Nesting and number of values are counted on the bytes before any tree is built, so that neither the stack nor
//! memory depends on what is sent. A name that occurs twice in an object is refused: parsers disagree on which of the
//! two counts, and a gateway in front may have checked the other.

use std::fmt;

use serde::Serialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::ApiError;

/// Deepest nesting of arrays and objects.
const MAX_DEPTH: usize = 64;

/// Values in one request: about 20 MB as a tree. Enough for a prompt of 250,000 token ids.
pub(crate) const MAX_VALUES: usize = 1 << 18;

/// The text of a value that always has one.
pub(crate) fn write(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("writing plain data into memory cannot fail")
}

/// Parses a request body, which must be an object. `budget` is how many values it may have; what it has is taken off.
pub(crate) fn parse_object(bytes: &[u8], budget: &mut usize) -> Result<Map<String, Value>, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|_| ApiError::body("is not valid UTF-8"))?;
    if text.trim_ascii().is_empty() {
        return Err(ApiError::body("is empty; a JSON object is needed"));
    }
    count(text, budget)?;
    let mut parser = serde_json::Deserializer::from_str(text);
    let value = Strict.deserialize(&mut parser).and_then(|value| parser.end().map(|()| value));
    match value {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::body("must be a JSON object")),
        Err(e) if e.is_data() => Err(ApiError::body("has an object with the same name twice")),
        Err(e) => Err(ApiError::body(format!("is not valid JSON: line {}, column {}", e.line(), e.column()))),
    }
}

/// Checks nesting and takes the number of values, at least, off the budget. Text that is not JSON passes: the parser
/// refuses it, and reads no deeper than what was counted.
fn count(text: &str, budget: &mut usize) -> Result<(), ApiError> {
    let (mut depth, mut values) = (0_usize, 1_usize);
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => loop {
                match bytes.next() {
                    Some(b'\\') => _ = bytes.next(),
                    Some(b'"') | None => break,
                    Some(_) => {}
                }
            },
            b'[' | b'{' => {
                depth += 1;
                values += 1;
                if depth > MAX_DEPTH {
                    return Err(ApiError::body(format!("is nested deeper than {MAX_DEPTH} levels")));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            _ => {}
        }
    }
    *budget = budget
        .checked_sub(values)
        .ok_or_else(|| ApiError::body(format!("has too many values; at most {MAX_VALUES} are read")))?;
    Ok(())
}

/// Builds a [`Value`], refusing duplicate names.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(Strict)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(Strict)?;
            if map.insert(name, value).is_some() {
                return Err(A::Error::custom("duplicate name"));
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Map<String, Value>, ApiError> {
        parse_object(text.as_bytes(), &mut MAX_VALUES.clone())
    }

    #[test]
    fn a_plain_object_equals_serde_json_own_reading() {
        let text = r#" {"a":[1,-2,3.5,true,null,{"b":"\u00e9\ud83d\ude00"}],"c":{},"d":18446744073709551615} "#;
        assert_eq!(Value::Object(parse(text).unwrap()), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn nesting_is_refused_before_a_tree_is_built() {
        let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(parse(&nested(MAX_DEPTH - 1)).is_ok());
        assert!(parse(&nested(MAX_DEPTH)).is_err());
        assert!(parse(&nested(100_000)).is_err());
        assert!(parse(&"{\"a\":".repeat(100_000)).is_err());
        let brackets_in_a_string = format!("{{\"a\":\"\\\"{}\"}}", "[{,".repeat(1000));
        assert!(parse(&brackets_in_a_string).is_ok());
    }

    #[test]
    fn values_are_counted_across_documents() {
        let mut budget = 10;
        parse_object(b"{\"a\":[1,2,3]}", &mut budget).unwrap();
        assert_eq!(budget, 5);
        assert!(parse_object(b"{\"a\":[1,2,3,4,5]}", &mut budget).is_err());
    }

    #[test]
    fn what_is_no_json_object_is_refused() {
        for text in ["", " ", "[]", "\"x\"", "1", "{", "{}{}", "{\"a\":1,\"a\":2}", "{\"a\":NaN}", "{\"a\":1e999}"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse(r#"{"a":"\ud800"}"#).is_err(), "a lone surrogate");
        assert!(parse_object(b"{\"a\":\"\xff\"}", &mut MAX_VALUES.clone()).is_err());
    }
}
