//! The service's own description: an OpenAPI 3.1 document, and a page that shows it.
//!
//! The document is written by hand, a file per topic beside this one. What would drift is put in here, from what the
//! code goes by: the keys and refusals of a route from the rules of `auth`, the fields without effect, those refused by name and
//! those that dialects share with chat from their lists. Its closed schemas, those of requests, let every optional
//! field be null, as every reader does. The tests compare the rest: routes, methods and fields with the code, replies with the schemas.

#[cfg(test)]
mod tests;

use std::sync::LazyLock;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use serde_json::{Map, Value, json};

use crate::anthropic;
use crate::auth;
use crate::dialect::EXTENSIONS;
use crate::json;
use crate::keys::Scopes;
use crate::openai::params::{NO_EFFECT, UNSUPPORTED};
use crate::service::Service;

const BASE: &str = include_str!("base.json");

/// The topics: objects of `paths`, `schemas` and `parameters`.
const TOPICS: &[&str] = &[
    include_str!("sampling.json"),
    include_str!("chat.json"),
    include_str!("tools.json"),
    include_str!("structured.json"),
    include_str!("completions.json"),
    include_str!("responses.json"),
    include_str!("messages.json"),
    include_str!("encoding.json"),
    include_str!("tokens.json"),
    include_str!("files.json"),
    include_str!("models.json"),
    include_str!("operations.json"),
    include_str!("admin.json"),
];

/// The schema of the parameters that generating endpoints share. Only others are made of it.
const SAMPLING: &str = "Sampling";

/// The refusals that a route may have, by status, and what they mean.
const REFUSALS: &[(u16, &str)] = &[
    (400, "The request cannot be served as it is; `param` names the field."),
    (401, "No key, or one that is not known."),
    (403, "A key of another scope; or no key, and a browser asks for a page of elsewhere."),
    (404, "There is no such thing."),
    (408, "The body did not arrive in time, or the request was not done within its `deadline_ms`."),
    (409, "It does not go together with what is under way."),
    (413, "The body exceeds `--body-limit-bytes`."),
    (
        429,
        "The key has reached one of its limits, or has as many batches as it may: try again after `retry-after` seconds.",
    ),
    (500, "A fault of the server."),
    (503, "Overloaded, loading or draining: try again after `retry-after` seconds."),
];

static DOCUMENT: LazyLock<Value> = LazyLock::new(assemble);

/// `GET /openapi.json`.
pub(crate) async fn document(State(service): State<Service>) -> Response {
    let mut document = DOCUMENT.clone();
    document["info"]["version"] = service.config().version.as_str().into();
    ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], json::write(&document)).into_response()
}

/// `GET /docs`. The page loads nothing but the document.
pub(crate) async fn page() -> Response {
    let policy = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                  base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy)),
    ];
    (headers, include_str!("docs.html")).into_response()
}

/// One document out of the files.
///
/// # Panics
/// If they are not what is described above; nothing of a request plays a part.
fn assemble() -> Value {
    let read = |text: &str| serde_json::from_str::<Value>(text).expect("a JSON file of ours");
    let mut document = read(BASE);
    for topic in TOPICS {
        let mut topic = read(topic);
        add(&mut document["paths"], topic["paths"].take());
        for kind in ["schemas", "parameters"] {
            add(&mut document["components"][kind], topic[kind].take());
        }
    }
    let schemas = document["components"]["schemas"].as_object_mut().expect("an object");
    let unaffected = NO_EFFECT.iter().map(|&name| (name.to_owned(), json!({"description": "No effect."})));
    add(&mut schemas[SAMPLING]["properties"], unaffected.collect());
    let shared = schemas[SAMPLING]["properties"].clone();
    for schema in schemas.values_mut().filter(|schema| schema["x-dialect"] == true) {
        let schema = schema.as_object_mut().expect("an object");
        schema.shift_remove("x-dialect");
        let properties = &mut schema["properties"];
        let own = |name: &str| properties.get(name).is_some();
        let extensions = EXTENSIONS.iter().filter(|&&name| shared.get(name).is_some() && !own(name));
        let extensions = extensions.map(|&name| (name.to_owned(), shared[name].clone())).collect();
        add(properties, extensions);
    }
    let names: Vec<_> = schemas.keys().cloned().collect();
    names.iter().for_each(|name| extend(schemas, name));
    schemas.shift_remove(SAMPLING);
    for (path, item) in document["paths"].as_object_mut().expect("an object") {
        for (_, operation) in item.as_object_mut().expect("an object").iter_mut().filter(|(name, _)| is_method(name)) {
            describe_access(path, operation);
        }
    }
    for (_, schema) in document["components"]["schemas"].as_object_mut().expect("an object") {
        let_options_be_null(schema);
    }
    document
}

/// Gives a schema with `x-extends` what it does not say itself: the properties and examples of the schema of that name.
fn extend(schemas: &mut Map<String, Value>, name: &str) {
    let Some(extended) = schemas[name].as_object_mut().and_then(|schema| schema.shift_remove("x-extends")) else {
        return;
    };
    let extended = extended.as_str().expect("a name");
    extend(schemas, extended);
    let inherited = schemas[extended].clone();
    let schema = &mut schemas[name];
    add(&mut schema["properties"], inherited["properties"].clone());
    for name in ["required", "examples"] {
        if let (None, Some(value)) = (schema.get(name), inherited.get(name)) {
            schema[name] = value.clone();
        }
    }
    let properties = schema["properties"].as_object().expect("an object");
    let refused: Vec<_> = UNSUPPORTED.iter().filter(|&&name| !properties.contains_key(name)).copied().collect();
    let refused = format!("Refused by name, unless they ask for nothing special: {}.", refused.join(", "));
    schema["description"] = refused.into();
}

/// Adds entries that are not there yet.
fn add(to: &mut Value, entries: Value) {
    if to.is_null() {
        *to = json!({});
    }
    let Value::Object(entries) = entries else { return };
    for (name, value) in entries {
        let old = to.as_object_mut().expect("an object").insert(name, value);
        assert!(old.is_none(), "described twice");
    }
}

fn is_method(name: &str) -> bool {
    matches!(name, "get" | "post" | "put" | "patch" | "delete")
}

/// The keys that an operation asks for, and its refusals.
fn describe_access(path: &str, operation: &mut Value) {
    let operation = operation.as_object_mut().expect("an object");
    let scopes = auth::documented_scopes(path);
    let keys = Scopes::NAMES.iter().filter(|(_, scope)| scopes.is_some_and(|scopes| scopes.has_any(*scope)));
    // On a loopback address metrics need no key.
    let none = (path == auth::METRICS).then(|| json!({}));
    operation.insert("security".into(), keys.map(|(name, _)| json!({*name: []})).chain(none).collect());
    let more = operation.remove("x-refusals").unwrap_or_default();
    let more: Vec<_> = more.as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
    let has_body = operation.contains_key("requestBody");
    let responses = operation["responses"].as_object_mut().expect("an object");
    for &(status, description) in REFUSALS {
        let common = match status {
            400 | 408 | 413 => has_body,
            401 | 403 => scopes.is_some(),
            _ => status == 500,
        };
        if common || more.contains(&status.into()) {
            responses.insert(status.to_string(), refusal(path, description, matches!(status, 429 | 503)));
        }
    }
}

fn refusal(path: &str, description: &str, retried: bool) -> Value {
    let error = if path.starts_with(anthropic::ROUTES) { "AnthropicError" } else { "Error" };
    let schema = json!({"$ref": format!("#/components/schemas/{error}")});
    let mut response = json!({"description": description, "content": {"application/json": {"schema": schema}}});
    if retried {
        let seconds = json!({"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}});
        response["headers"] = json!({"retry-after": seconds});
    }
    response
}

/// Lets every optional property of closed schemas be null, at any depth.
fn let_options_be_null(schema: &mut Value) {
    match schema {
        Value::Array(schemas) => schemas.iter_mut().for_each(let_options_be_null),
        Value::Object(object) => {
            if object.get("additionalProperties") == Some(&Value::Bool(false)) {
                let required = object.get("required").cloned().unwrap_or_default();
                let is_required = |name: &str| required.as_array().is_some_and(|all| all.iter().any(|r| r == name));
                let properties = object.get_mut("properties").and_then(Value::as_object_mut);
                for (_, property) in properties.into_iter().flatten().filter(|(name, _)| !is_required(name)) {
                    or_null(property);
                }
            }
            object.iter_mut().filter(|(name, _)| *name != "examples").for_each(|(_, part)| let_options_be_null(part));
        }
        _ => {}
    }
}

fn or_null(property: &mut Value) {
    let object = property.as_object_mut().expect("a schema is an object");
    if let Some(kind) = object.get_mut("type").filter(|kind| kind.is_string()) {
        *kind = json!([kind, "null"]);
    }
    let null = json!({"type": "null"});
    if let Some(Value::Array(values)) = object.get_mut("enum") {
        values.push(Value::Null);
    } else if let Some(value) = object.remove("const") {
        object.insert("enum".into(), vec![value, Value::Null].into());
    } else if let Some(Value::Array(schemas)) = object.get_mut("anyOf") {
        schemas.push(null);
    } else if let Some(reference) = object.remove("$ref") {
        object.insert("anyOf".into(), vec![json!({"$ref": reference}), null].into());
    }
}
