//! The description against the service that it describes, on the mock runner.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use baton_engine::sim::{MockModel, MockRunner};
use baton_engine::{EngineConfig, RunSpec};
use baton_text::{TextFiles, TextModel, TokenizerFile};
use http::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use tempfile::TempDir;
use tower::ServiceExt;

use super::*;
use crate::fields::READ;
use crate::routes::Surface;
use crate::{
    Adapters, ApiKey, Defaults, HandoffState, ModelCard, NewGeneration, ServiceConfig, Store, StoreLimits, router,
};

/// What the one form among the requests is sent as; the others' content type is not looked at.
const FORM: &str = "multipart/form-data; boundary=b";

/// Bodies that another crate reads, so that what it asks for is not seen here.
const READ_ELSEWHERE: [&str; 2] = ["/admin/rollout", "/admin/rollout/{command}"];

/// A server with a model and a place to keep things in, which goes when the folder is dropped.
fn served() -> (TempDir, Router) {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus").join(name);
        std::fs::read(path).unwrap()
    };
    let (tokenizer, config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let text = TextModel::new(&TextFiles {
        tokenizer: TokenizerFile::Json(&tokenizer),
        tokenizer_config: Some(&config),
        special_tokens_map: None,
        chat_template_jinja: None,
    });
    let text = Arc::new(text.unwrap());
    let reply = text.encode("<think>\nadd\n</think>\n\nHello, wörld", false).unwrap();
    let spec = RunSpec {
        vocab_size: 1024,
        max_model_len: 512,
        block_size: 4,
        num_blocks: 512,
        passing: None,
        max_step_tokens: 256,
        max_step_sequences: 32,
        max_draft_tokens: 4,
        steps_ahead: false,
    };
    let runner = MockRunner::new(spec, MockModel::Script { reply, end: text.eos_token_id().unwrap() });
    let (engine, _) = baton_engine::spawn(Box::new(runner), EngineConfig::default());
    let folder = TempDir::new().unwrap();
    let admin_api_keys = vec![ApiKey::new("admin".into()).unwrap()];
    let store = Some(Store::open(folder.path(), StoreLimits { file_bytes: 1 << 20, total_bytes: 4 << 20 }).unwrap());
    let service = Service::new(ServiceConfig { admin_api_keys, store, ..ServiceConfig::default() });
    let card = ModelCard {
        names: vec!["tiny".into()],
        created: 1_790_000_000,
        owned_by: "local".into(),
        generation: "0123456789abcdef".repeat(4),
        system_fingerprint: "fp_test".into(),
        defaults: Defaults::default(),
        load_report: br#"{"architecture":"mock"}"#.to_vec(),
        embeddings: None,
    };
    let (adapters, handoff) = (Adapters::none(), HandoffState::default());
    service.install(NewGeneration { engine, text, card, adapters, handoff });
    (folder, router(service, Surface::All))
}

/// An operation of the document.
struct Operation<'a> {
    path: &'a str,
    method: Method,
    object: &'a Value,
}

impl Operation<'_> {
    /// The schema of its JSON body.
    fn body(&self) -> Option<&Value> {
        self.object["requestBody"]["content"].get("application/json").map(|media| resolve(&media["schema"]))
    }

    /// Examples of its JSON body.
    fn examples(&self) -> Vec<Value> {
        let Some(schema) = self.body() else { return Vec::new() };
        let choices = schema["anyOf"].as_array().into_iter().flatten().map(resolve);
        let all = [schema].into_iter().chain(choices).filter_map(|schema| schema["examples"].as_array());
        all.flatten().cloned().collect()
    }

    /// The path with something in the place of its parameters.
    fn url(&self) -> String {
        let path = self.path.replace("/models/{id}", "/models/tiny").replace("{command}", "share");
        path.replace("{id}", "none").replace("{file}", "app.js")
    }

    async fn call(&self, router: &Router, key: Option<&str>, body: Option<&Value>) -> Reply {
        let body = body.map(Value::to_string).unwrap_or_default();
        send(router, &self.method, &self.url(), key, body).await
    }

    /// Checks a reply against what is said of its status.
    #[track_caller]
    fn assert_described(&self, (status, kind, body): &Reply) {
        let at = format!("{} {}: {status} {body}", self.method, self.path);
        let response = self.object["responses"].get(status.as_str()).unwrap_or_else(|| panic!("undocumented: {at}"));
        let media = kind.split(';').next().unwrap();
        let content = response["content"].get(media).unwrap_or_else(|| panic!("undocumented {media}: {at}"));
        match media {
            "application/json" => assert_valid(&content["schema"], &serde_json::from_str(body).expect("JSON"), &at),
            "text/event-stream" => {
                let data = body.lines().filter_map(|line| line.strip_prefix("data: "));
                let events: Vec<Value> = data.filter_map(|data| serde_json::from_str(data).ok()).collect();
                assert!(events.len() > 2, "{at}");
                events.iter().for_each(|event| assert_valid(&content["x-event-schema"], event, &at));
            }
            _ => assert!(!body.is_empty(), "{at}"),
        }
    }
}

/// Status, content type and body.
type Reply = (StatusCode, String, String);

async fn send(router: &Router, method: &Method, url: &str, key: Option<&str>, body: String) -> Reply {
    let mut request = Request::builder().method(method).uri(url).header(CONTENT_TYPE, FORM);
    if let Some(key) = key {
        request = request.header(AUTHORIZATION, format!("Bearer {key}"));
    }
    let reply = router.clone().oneshot(request.body(Body::from(body)).unwrap()).await.unwrap();
    let kind = reply.headers().get(CONTENT_TYPE).map_or("", |kind| kind.to_str().unwrap()).to_owned();
    let status = reply.status();
    let body = reply.into_body().collect().await.unwrap().to_bytes();
    (status, kind, String::from_utf8(body.to_vec()).unwrap())
}

fn operation(name: &str) -> Operation<'static> {
    operations().find(|operation| operation.object["operationId"] == name).expect(name)
}

fn operations() -> impl Iterator<Item = Operation<'static>> {
    DOCUMENT["paths"].as_object().unwrap().iter().flat_map(|(path, item)| {
        let methods = item.as_object().unwrap().iter().filter(|(name, _)| is_method(name));
        methods.map(|(name, object)| Operation { path, method: name.to_uppercase().parse().unwrap(), object })
    })
}

fn resolve(schema: &Value) -> &Value {
    match schema.get("$ref").and_then(Value::as_str) {
        Some(reference) => resolve(DOCUMENT.pointer(reference.strip_prefix('#').unwrap()).expect(reference)),
        None => schema,
    }
}

/// Validates against a schema of the document, in which objects have nothing but what is described.
#[track_caller]
fn assert_valid(schema: &Value, instance: &Value, at: &str) {
    let mut whole = json!({"components": DOCUMENT["components"], "allOf": [schema]});
    close(&mut whole);
    let errors: Vec<_> =
        validator(&whole).iter_errors(instance).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:?} in {at}");
}

fn validator(schema: &Value) -> jsonschema::Validator {
    jsonschema::draft202012::new(schema).expect("a schema")
}

fn close(schema: &mut Value) {
    match schema {
        Value::Array(schemas) => schemas.iter_mut().for_each(close),
        Value::Object(object) => {
            object.iter_mut().filter(|(name, _)| *name != "examples").for_each(|(_, part)| close(part));
            if object.get("properties").is_some_and(|p| !p.get("type").is_some_and(Value::is_string)) {
                object.entry("additionalProperties").or_insert(json!(false));
            }
        }
        _ => {}
    }
}

/// The paths of all fields that a schema describes; items of arrays as `name[]`.
fn described(schema: &Value, path: &str, fields: &mut BTreeSet<String>) {
    let schema = resolve(schema);
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        described(property, &path, fields);
        fields.insert(path);
    }
    for list in ["anyOf", "oneOf", "allOf"] {
        schema[list].as_array().into_iter().flatten().for_each(|part| described(part, path, fields));
    }
    if let Some(items) = schema.get("items") {
        described(items, &format!("{path}[]"), fields);
    }
}

/// `messages[3].role` as `messages[].role`.
fn without_numbers(path: &str) -> String {
    let mut out = String::new();
    for (i, part) in path.split('[').enumerate() {
        out += if i > 0 { "[" } else { "" };
        out += if i > 0 { part.trim_start_matches(|c: char| c.is_ascii_digit()) } else { part };
    }
    out
}

#[tokio::test]
async fn paths_and_methods_are_those_of_the_router() {
    let (_folder, router) = served();
    // The one way to ask a router for its routes. "/" is always among them: it is where a router keeps its fallback.
    let debug = format!("{router:?}");
    let routes: BTreeSet<&str> =
        debug.split('"').filter(|text| text.starts_with('/') && !text.contains("__private")).collect();
    assert!(routes.len() > 10, "{debug}");

    let mut documented: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for operation in operations() {
        let route = if operation.path.starts_with(auth::MODEL.trim_end_matches("{*id}")) {
            auth::MODEL
        } else {
            operation.path
        };
        documented.entry(route).or_default().insert(operation.method.to_string());
    }
    assert_eq!(documented.keys().copied().collect::<BTreeSet<_>>(), routes);
    for (route, methods) in documented {
        let url = route.replace("{*id}", "tiny").replace("{command}", "share");
        let url = url.replace("{id}", "none").replace("{file}", "app.js");
        let request = Request::options(url).header(AUTHORIZATION, "Bearer admin").body(Body::empty()).unwrap();
        let reply = router.clone().oneshot(request).await.unwrap();
        let allow = reply.headers().get(ALLOW).unwrap_or_else(|| panic!("{route}: {reply:?}")).to_str().unwrap();
        let allowed: BTreeSet<_> =
            allow.split(',').map(|m| m.trim().to_owned()).filter(|m| m != "HEAD" && m != "OPTIONS").collect();
        assert_eq!(allowed, methods, "{route}");
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_component_is_used() {
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            Value::Object(object) => {
                found.extend(object.get("$ref").and_then(Value::as_str).map(str::to_owned));
                object.values().for_each(|value| references(value, found));
            }
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    references(&DOCUMENT, &mut found);
    for reference in &found {
        assert!(DOCUMENT.pointer(&reference[1..]).is_some(), "{reference}");
    }
    for kind in ["schemas", "parameters"] {
        for name in DOCUMENT["components"][kind].as_object().unwrap().keys() {
            assert!(found.contains(&format!("#/components/{kind}/{name}")), "{name} is not used");
        }
    }
}

#[test]
fn operations_are_named_once_and_tagged_and_examples_fit_their_schemas() {
    let tags: Vec<_> = DOCUMENT["tags"].as_array().unwrap().iter().map(|tag| &tag["name"]).collect();
    let mut names = BTreeSet::new();
    for operation in operations() {
        let name = operation.object["operationId"].as_str().expect(operation.path);
        assert!(names.insert(name), "{name}");
        assert!(tags.contains(&&operation.object["tags"][0]), "{name}");
        assert!(operation.object["summary"].as_str().is_some_and(|text| !text.is_empty()), "{name}");
        if let Some(schema) = operation.body() {
            let examples = operation.examples();
            assert!(!examples.is_empty(), "{name} has no example");
            examples.iter().for_each(|example| assert_valid(schema, example, name));
        }
    }
    for (name, schema) in DOCUMENT["components"]["schemas"].as_object().unwrap() {
        jsonschema::draft202012::meta::validate(schema).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[tokio::test]
async fn replies_to_the_examples_are_as_described() {
    let (_folder, router) = served();
    let mut refused = Vec::new();
    for operation in operations() {
        let bodies = match operation.body() {
            Some(_) => operation.examples().into_iter().map(Some).collect(),
            None => vec![None],
        };
        for body in bodies {
            let reply = operation.call(&router, Some("admin"), body.as_ref()).await;
            operation.assert_described(&reply);
            if operation.object["tags"][0] == "inference" && reply.0 != StatusCode::OK {
                refused.push(format!("{}: {} to {}", operation.path, reply.2, body.unwrap_or_default()));
            }
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[tokio::test]
async fn files_and_batches_are_as_described() {
    let (_folder, router) = served();
    let call = async |name: &str, id: &str, body: String| -> Value {
        let operation = operation(name);
        let url = operation.path.replace("{id}", id);
        let reply = send(&router, &operation.method, &url, None, body).await;
        assert_eq!(reply.0, StatusCode::OK, "{name}: {reply:?}");
        operation.assert_described(&reply);
        serde_json::from_str(&reply.2).unwrap_or_default()
    };
    let line = json!({"custom_id": "one", "method": "POST", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "hm"}], "max_tokens": 2}});
    let part =
        |head: &str, content: &str| format!("--b\r\ncontent-disposition: form-data; {head}\r\n\r\n{content}\r\n");
    let form =
        part("name=\"purpose\"", "batch") + &part("name=\"file\"; filename=\"in\"", &line.to_string()) + "--b--\r\n";
    let file = call("createFile", "", form).await["id"].as_str().unwrap().to_owned();
    let request = json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"});
    let batch = call("createBatch", "", request.to_string()).await["id"].as_str().unwrap().to_owned();
    loop {
        let batch = call("retrieveBatch", &batch, String::new()).await;
        if let Some(output) = batch["output_file_id"].as_str() {
            call("retrieveFile", output, String::new()).await;
            call("downloadFile", output, String::new()).await;
            break;
        }
        assert!(!["failed", "cancelled", "expired"].contains(&batch["status"].as_str().unwrap()), "{batch}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    for name in ["listFiles", "listBatches"] {
        assert!(!call(name, "", String::new()).await["data"].as_array().unwrap().is_empty(), "{name}");
    }
    call("deleteFile", &file, String::new()).await;
}

#[tokio::test]
async fn refusals_are_as_described() {
    let (_folder, router) = served();
    let config = ServiceConfig { api_keys: vec![ApiKey::new("user".into()).unwrap()], ..ServiceConfig::default() };
    let without_model = crate::router(Service::new(config), Surface::All);
    for operation in operations() {
        let bodies = if operation.body().is_some() {
            vec![Some(json!({"unheard_of": 1})), Some(json!([])), None]
        } else {
            vec![None]
        };
        for body in bodies {
            operation.assert_described(&operation.call(&router, Some("admin"), body.as_ref()).await);
            for key in [None, Some("user"), Some("wrong")] {
                operation.assert_described(&operation.call(&without_model, key, body.as_ref()).await);
            }
        }
    }
}

#[tokio::test]
async fn every_field_that_is_read_is_described_and_every_described_one_is_read() {
    let (_folder, router) = served();
    let mut wrong = Vec::new();
    for operation in operations().filter(|operation| !READ_ELSEWHERE.contains(&operation.path)) {
        let Some(schema) = operation.body() else { continue };
        READ.with_borrow_mut(BTreeSet::clear);
        for example in operation.examples() {
            operation.call(&router, Some("admin"), Some(&example)).await;
        }
        let read: BTreeSet<_> = READ.with_borrow(|read| read.iter().map(|path| without_numbers(path)).collect());
        let mut fields = BTreeSet::new();
        described(schema, "", &mut fields);
        // A dialect's request is read twice, the second time as a chat; and it has many words for what does nothing.
        let dialect = ["/v1/messages", "/v1/responses"].iter().any(|path| operation.path.starts_with(path));
        let matters = |name: &&String| !dialect && !NO_EFFECT.contains(&name.as_str());
        let unknown: Vec<_> = read.difference(&fields).filter(matters).collect();
        if !unknown.is_empty() {
            wrong.push(format!("{} reads {unknown:?}, which are not described", operation.path));
        }
        let own = |name: &&String| !dialect || !EXTENSIONS.iter().any(|shared| name.starts_with(shared));
        let unread: Vec<_> = fields.difference(&read).filter(own).collect();
        if !unread.is_empty() {
            wrong.push(format!("{} describes {unread:?}, which no example makes it read", operation.path));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn the_page_needs_no_key_and_loads_nothing_from_elsewhere() {
    let config = ServiceConfig { api_keys: vec![ApiKey::new("user".into()).unwrap()], ..ServiceConfig::default() };
    let router = router(Service::new(config), Surface::All);
    let (status, kind, page) = send(&router, &Method::GET, "/docs", None, String::new()).await;
    assert_eq!((status.as_u16(), kind.as_str()), (200, "text/html; charset=utf-8"));
    assert!(page.contains("fetch(\"openapi.json\")"));
    for outside in ["http://", "https://", "src=", "@import", "innerHTML"] {
        assert!(!page.contains(outside), "{outside}");
    }
    let (status, _, document) = send(&router, &Method::GET, "/openapi.json", None, String::new()).await;
    assert_eq!(status, 200);
    let document: Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}
