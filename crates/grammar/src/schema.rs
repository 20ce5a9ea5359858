//! Refuses a JSON Schema that is too large, or that asks for what no grammar can say, before anything is built from it.

use serde_json::{Map, Value, json};

use crate::{GrammarError, Limits, finite, regex};

/// Keywords whose value is a schema.
const ONE: &[&str] = &["items", "additionalItems", "additionalProperties"];
/// Keywords whose value is a list of schemas. `items` was one in older drafts.
const LIST: &[&str] = &["anyOf", "oneOf", "allOf", "prefixItems", "items"];
/// Keywords whose value names schemas.
const NAMED: &[&str] = &["properties", "patternProperties", "$defs", "definitions"];
/// Keywords that count something.
const COUNTS: &[&str] = &["minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"];
/// Keywords that restrict a value in ways that are not supported.
const UNSUPPORTED: &[&str] = &[
    "$dynamicAnchor",
    "$dynamicRef",
    "$recursiveAnchor",
    "$recursiveRef",
    "$vocabulary",
    "contains",
    "contentSchema",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "if",
    "maxContains",
    "minContains",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
    "x-guidance",
];

/// How JSON is written: no white space but one space behind a comma or colon, if the model likes. More would be valid JSON
/// as well, but a model that has begun to write line breaks may never end.
fn style() -> Value {
    json!({ "whitespace_flexible": false, "item_separator": ", ?", "key_separator": ": ?" })
}

/// The schema as the compiler takes it.
pub(crate) fn prepared(schema: &Value, limits: &Limits) -> Result<Value, GrammarError> {
    if schema.to_string().len() > limits.spec_bytes {
        return Err(too_large(format!("a JSON Schema may have at most {} bytes", limits.spec_bytes)));
    }
    let mut schema = schema.clone();
    Walk { limits, left: limits.schemas }.schema(&mut schema, 0)?;
    match finite::may_end(&schema) {
        Some(true) => {}
        Some(false) => return Err(GrammarError::Unsatisfiable),
        None => return Err(too_large("references of a JSON Schema must not need each other in so many steps".into())),
    }
    let mut object = match schema {
        Value::Object(object) => object,
        Value::Bool(true) => Map::new(),
        _ => return Err(GrammarError::Unsatisfiable),
    };
    object.insert("x-guidance".into(), style());
    Ok(Value::Object(object))
}

/// Any JSON object.
pub(crate) fn any_object() -> Value {
    json!({ "type": "object", "x-guidance": style() })
}

fn too_large(message: String) -> GrammarError {
    GrammarError::TooLarge(message)
}

fn invalid(message: impl Into<String>) -> GrammarError {
    GrammarError::Invalid(message.into())
}

struct Walk<'a> {
    limits: &'a Limits,
    /// Schemas that may still come.
    left: usize,
}

impl Walk<'_> {
    fn schema(&mut self, schema: &mut Value, depth: usize) -> Result<(), GrammarError> {
        let limits = self.limits;
        if depth > limits.depth {
            return Err(too_large(format!("a JSON Schema may be nested at most {} deep", limits.depth)));
        }
        let most = || too_large(format!("a JSON Schema may have at most {} schemas within", limits.schemas));
        self.left = self.left.checked_sub(1).ok_or_else(most)?;
        let object = match schema {
            Value::Object(object) => object,
            Value::Bool(_) => return Ok(()),
            _ => return Err(invalid("a JSON Schema must be an object, true or false, as must each schema within")),
        };
        // What says nothing, of keywords that otherwise say too much.
        if object.get("uniqueItems") == Some(&Value::Bool(false)) {
            object.shift_remove("uniqueItems");
        }
        object.iter_mut().try_for_each(|(name, value)| self.keyword(name, value, depth))
    }

    fn keyword(&mut self, name: &str, value: &mut Value, depth: usize) -> Result<(), GrammarError> {
        let limits = self.limits;
        if let Some(keyword) = UNSUPPORTED.iter().find(|keyword| **keyword == name) {
            return Err(invalid(format!("the JSON Schema keyword {keyword} is not supported")));
        }
        match (name, value) {
            (_, Value::Array(schemas)) if LIST.contains(&name) => {
                schemas.iter_mut().try_for_each(|schema| self.schema(schema, depth + 1))
            }
            ("patternProperties", Value::Object(schemas)) => {
                for (pattern, mut schema) in std::mem::take(schemas) {
                    self.schema(&mut schema, depth + 1)?;
                    schemas.insert(in_string(&pattern, limits)?, schema);
                }
                Ok(())
            }
            (_, Value::Object(schemas)) if NAMED.contains(&name) => {
                schemas.values_mut().try_for_each(|schema| self.schema(schema, depth + 1))
            }
            (_, value) if ONE.contains(&name) => self.schema(value, depth + 1),
            _ if NAMED.contains(&name) => Err(invalid(format!("{name} of a JSON Schema must be an object"))),
            _ if LIST.contains(&name) => Err(invalid(format!("{name} of a JSON Schema must be an array"))),
            (_, value) if COUNTS.contains(&name) => match value.as_u64() {
                Some(count) if count <= limits.repetitions => Ok(()),
                _ => {
                    Err(invalid(format!("{name} of a JSON Schema must be an integer from 0 to {}", limits.repetitions)))
                }
            },
            ("enum", Value::Array(values)) if values.len() > limits.values => {
                Err(too_large(format!("enum of a JSON Schema may have at most {} values", limits.values)))
            }
            ("enum", Value::Array(values)) if values.is_empty() => {
                Err(invalid("enum of a JSON Schema must have a value"))
            }
            ("enum" | "const", value) => shallow(value, limits),
            ("pattern", Value::String(pattern)) => {
                *pattern = in_string(pattern, limits)?;
                Ok(())
            }
            ("$ref", Value::String(target)) if !target.starts_with('#') => {
                Err(invalid("$ref of a JSON Schema must point into the schema itself, as in #/$defs/name"))
            }
            _ => Ok(()),
        }
    }
}

/// The pattern of a JSON string's content.
fn in_string(pattern: &str, limits: &Limits) -> Result<String, GrammarError> {
    regex::check(pattern, limits)?;
    Ok(regex::without_nul(pattern))
}

/// A value that must be written as it is.
fn shallow(value: &Value, limits: &Limits) -> Result<(), GrammarError> {
    let mut level: Vec<&Value> = vec![value];
    for _ in 0..=limits.depth {
        let children = level.iter().flat_map(|value| {
            let (items, members) = (value.as_array(), value.as_object());
            items.into_iter().flatten().chain(members.into_iter().flat_map(|m| m.values()))
        });
        level = children.collect();
        if level.is_empty() {
            return Ok(());
        }
    }
    Err(too_large(format!("a value in a JSON Schema may be nested at most {} deep", limits.depth)))
}
