//! Anthropic's Messages API: shapes, order of events, and errors in its own form.

use baton_http::{ApiKey, ServiceConfig};
use serde_json::{Value, json};

use crate::harness::{CONTENT, REASONING, REPLY, Reply, Server, Setup, request, with};

const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn body(fields: Value) -> Value {
    with(json!({"max_tokens": 100, "messages": [{"role": "user", "content": "What is 1 + 1?"}]}), fields)
}

fn thinking() -> Value {
    json!({"thinking": {"type": "adaptive"}})
}

async fn post(server: &Server, fields: Value) -> Reply {
    let reply = server.post(MESSAGES, &body(fields)).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    reply
}

/// The events of a stream, each under the name that it also has inside.
#[track_caller]
fn events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    let event = |text: &str| {
        let (name, data) = text.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        data
    };
    reply.body.split_terminator("\n\n").map(event).collect()
}

/// What a client makes of a stream: the message that it would have got whole.
#[track_caller]
fn accumulated(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    for event in &events[1..] {
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                let content = message["content"].as_array_mut().unwrap();
                assert_eq!(event["index"], content.len());
                content.push(event["content_block"].clone());
            }
            "content_block_delta" => {
                let block = &mut message["content"][event["index"].as_u64().unwrap() as usize];
                let delta = &event["delta"];
                let (field, part) = match delta["type"].as_str().unwrap() {
                    "thinking_delta" => ("thinking", &delta["thinking"]),
                    "signature_delta" => ("signature", &delta["signature"]),
                    "text_delta" => ("text", &delta["text"]),
                    other => panic!("{other}"),
                };
                let joined = block[field].as_str().unwrap().to_owned() + part.as_str().unwrap();
                block[field] = joined.into();
            }
            "message_delta" => {
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["stop_sequence"] = event["delta"]["stop_sequence"].clone();
                message["usage"] = event["usage"].clone();
            }
            "content_block_stop" | "message_stop" => {}
            other => panic!("{other}"),
        }
    }
    message
}

/// Checks the form of an error and returns its type.
#[track_caller]
fn error_type(reply: &Reply) -> String {
    assert_eq!(reply.header("content-type"), Some("application/json"), "{reply:?}");
    assert_eq!(reply.header("request-id"), reply.header("x-request-id"));
    let json = reply.json();
    assert_eq!(json.as_object().unwrap().keys().collect::<Vec<_>>(), ["type", "error"], "{reply:?}");
    assert_eq!(json["type"], "error");
    assert_eq!(json["error"].as_object().unwrap().keys().collect::<Vec<_>>(), ["type", "message"]);
    assert!(!json["error"]["message"].as_str().unwrap().is_empty());
    json["error"]["type"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_whole_message_has_blocks_a_stop_reason_and_usage() {
    let server = Setup::default().start().await;
    let reply = post(&server, with(thinking(), json!({"model": "org/tiny"}))).await;
    let json = reply.json();
    let content = json!([
        {"type": "thinking", "thinking": REASONING, "signature": "unsigned"},
        {"type": "text", "text": CONTENT},
    ]);
    assert_eq!(json["content"], content);
    let expected = [("type", "message"), ("role", "assistant"), ("model", "org/tiny"), ("stop_reason", "end_turn")];
    for (name, value) in expected {
        assert_eq!(json[name], value);
    }
    assert!(json["stop_sequence"].is_null() && json["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!(json["usage"]["output_tokens"], server.text.encode(REPLY, false).unwrap().len() + 1);
    assert!(json["usage"]["input_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_streamed_message_keeps_to_the_order_of_events_and_joins_to_the_whole() {
    let server = Setup::default().start().await;
    let mut whole = post(&server, thinking()).await.json();
    let reply = post(&server, with(thinking(), json!({"stream": true}))).await;
    let events = events(&reply);
    let mut kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[0], "message_start");
    kinds.dedup();
    let block = ["content_block_start", "content_block_delta", "content_block_stop"];
    let expected = [&["message_start"], &block[..], &block, &["message_delta", "message_stop"]].concat();
    assert_eq!(kinds, expected);
    let start = &events[0]["message"];
    assert_eq!((&start["content"], &start["stop_reason"]), (&json!([]), &Value::Null));
    assert_eq!(start["usage"]["output_tokens"], 0);
    let streamed = accumulated(&events);
    whole["id"] = streamed["id"].clone();
    assert_eq!(streamed, whole);
}

#[tokio::test]
async fn the_count_of_tokens_is_what_generation_reports() {
    let server = Setup::default().start().await;
    let variants = [
        json!({}),
        thinking(),
        json!({"system": "Be brief."}),
        json!({"system": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief."}]}),
        json!({"messages": [
            {"role": "user", "content": "What is 1 + 1?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "add", "signature": "x"},
                {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "2"}]},
                {"type": "text", "text": "so?"},
            ]},
        ]}),
    ];
    for fields in variants {
        let counted = server.post(COUNT, &with(body(fields.clone()), json!({"max_tokens": null}))).await;
        assert_eq!(counted.status, 200, "{counted:?}");
        // Twice: what the cache knows already counts all the same.
        for _ in 0..2 {
            let json = post(&server, fields.clone()).await.json();
            assert_eq!(counted.json(), json!({"input_tokens": json["usage"]["input_tokens"]}), "{fields}");
        }
    }
    server.blocks_are_free().await;
}

#[tokio::test]
async fn the_prompt_is_that_of_the_same_chat() {
    let server = Setup::default().start().await;
    let theirs = json!({"max_tokens": 5, "system": "Be brief.", "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "Let me add."},
            {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1, "b": 1}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "2", "is_error": false}]},
    ], "thinking": {"type": "adaptive"}});
    let ours = json!({"max_tokens": 5, "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is\n1 + 1?"},
        {"role": "assistant", "content": "Let me add.", "tool_calls": [
            {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": "{\"a\":1,\"b\":1}"}},
        ]},
        {"role": "tool", "content": "2", "tool_call_id": "toolu_1"},
    ]});
    let tokens = |json: Value| json["usage"]["prompt_tokens"].as_u64().or(json["usage"]["input_tokens"].as_u64());
    let chat = server.post("/v1/chat/completions", &ours).await.json();
    assert_eq!(tokens(server.post(MESSAGES, &theirs).await.json()), tokens(chat));
    let again = server.post("/v1/chat/completions", &ours).await.json();
    let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached + 8 > tokens(again).unwrap(), "the same tokens, so all but the last are cached");
}

#[tokio::test]
async fn a_last_message_of_the_assistant_is_continued() {
    let server = Setup { reply: " 2".into(), ..Setup::default() }.start().await;
    let messages = json!([{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is"}]);
    let begun = json!({"messages": messages});
    let closed = with(body(begun.clone()), json!({"max_tokens": null}));
    let continued = post(&server, begun).await.json();
    assert_eq!(continued["content"], json!([{"type": "text", "text": " 2"}]));
    let asked = json!({"messages": [{"role": "user", "content": "What is 1 + 1?"}], "thinking": {"type": "adaptive"}});
    let fresh = server.post(COUNT, &asked).await.json()["input_tokens"].as_u64().unwrap();
    let count = server.post(COUNT, &closed).await.json()["input_tokens"].as_u64().unwrap();
    let text = server.text.encode("It is", false).unwrap().len() as u64;
    assert_eq!(count, fresh + text, "the turn stays open and nothing follows the text");
}

#[tokio::test]
async fn what_ended_a_message_is_said() {
    let server = Setup::default().start().await;
    for stream in [false, true] {
        let ended = async |fields: Value| {
            let reply = post(&server, with(fields, json!({"stream": stream}))).await;
            let message = if stream { accumulated(&events(&reply)) } else { reply.json() };
            (message["stop_reason"].clone(), message["stop_sequence"].clone())
        };
        assert_eq!(ended(json!({})).await, (json!("end_turn"), Value::Null));
        assert_eq!(ended(json!({"max_tokens": 3})).await, (json!("max_tokens"), Value::Null));
        let stops = json!({"stop_sequences": ["nowhere", "STOP"]});
        assert_eq!(ended(stops).await, (json!("stop_sequence"), json!("STOP")));
    }
    server.blocks_are_free().await;
}

#[tokio::test]
async fn thinking_can_be_left_unshown() {
    let server = Setup::default().start().await;
    let fields = json!({"thinking": {"type": "adaptive", "display": "omitted"}});
    let whole = post(&server, fields.clone()).await.json();
    assert_eq!(whole["content"][0], json!({"type": "thinking", "thinking": "", "signature": "unsigned"}));
    assert_eq!(whole["content"][1]["text"], CONTENT);
    let reply = post(&server, with(fields, json!({"stream": true}))).await;
    assert!(!reply.body.contains("thinking_delta") && reply.body.contains("signature_delta"));
    assert_eq!(accumulated(&events(&reply))["content"], whole["content"]);
}

#[tokio::test]
async fn bad_requests_are_refused_in_its_form_by_their_own_names() {
    let server = Setup::default().start().await;
    let image = json!({"type": "image", "source": {"type": "base64", "data": "x"}});
    let cases = [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 100_000}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [image]}]}), "messages[0].content[0].type"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}]}),
            "messages[0].content[0].mood",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}),
            "messages[0].content[0].tool_use_id",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "x"}]}]}),
            "messages[0].content[0].input",
        ),
        (json!({"system": [{"type": "text"}]}), "system[0].text"),
        (json!({"system": 5}), "system"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"top_k": "many"}), "top_k"),
        (json!({"stop_sequences": "x"}), "stop_sequences"),
        (json!({"stop_sequences": [""]}), "stop_sequences"),
        (json!({"thinking": {"type": "hard"}}), "thinking.type"),
        (json!({"thinking": {"type": "enabled"}}), "thinking.budget_tokens"),
        (json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"name": "x"}]}), "tools[0].input_schema"),
        (json!({"tool_choice": {"type": "some"}}), "tool_choice.type"),
        (json!({"mcp_servers": [{"url": "x"}]}), "mcp_servers"),
        (json!({"n": 2}), "n"),
        (json!({"max_completion_tokens": 2}), "max_completion_tokens"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"unheard_of": 1}), "unheard_of"),
    ];
    for (fields, name) in cases {
        for stream in [false, true] {
            let fields = with(fields.clone(), json!({"stream": stream}));
            let reply = server.post(MESSAGES, &body(fields)).await;
            assert_eq!(reply.status, 400, "{name}: {reply:?}");
            assert_eq!(error_type(&reply), "invalid_request_error", "{name}");
            let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
            let named = message.starts_with(&format!("{name} ")) || name == "messages";
            assert!(named, "{name}: {message}");
        }
    }
    assert_eq!(post(&server, json!({"metadata": {"user_id": "x"}, "mcp_servers": []})).await.status, 200);
    server.blocks_are_free().await;
}

#[tokio::test]
async fn whoever_refuses_on_its_routes_does_so_in_its_form() {
    let key = ApiKey::new("secret".into()).unwrap();
    let config = ServiceConfig { api_keys: vec![key], body_limit_bytes: 1000, ..ServiceConfig::default() };
    let (server, card) = Setup { config, ..Setup::default() }.start_loading().await;
    let call = async |method: &str, path: &str, headers: &str, body: &Value| {
        server.raw(&request(method, path, headers, body.to_string().as_bytes())).await
    };
    let (valid, key) = (body(json!({})), "x-api-key: secret\r\nanthropic-version: 2023-06-01\r\n");
    let check = |reply: &Reply, status: u16, kind: &str| {
        assert_eq!((reply.status, error_type(reply).as_str()), (status, kind), "{reply:?}");
    };
    for path in [MESSAGES, COUNT] {
        check(&call("POST", path, "", &valid).await, 401, "authentication_error");
        check(&call("POST", path, "x-api-key: wrong\r\n", &valid).await, 401, "authentication_error");
        check(&call("GET", path, key, &Value::Null).await, 405, "invalid_request_error");
        let loading = call("POST", path, key, &valid).await;
        check(&loading, 503, "overloaded_error");
        assert!(loading.header("retry-after").is_some());
    }
    server.install(card);
    check(&call("GET", "/v1/messages/batches", key, &Value::Null).await, 404, "not_found_error");
    check(&call("POST", MESSAGES, key, &with(valid.clone(), json!({"model": "x"}))).await, 404, "not_found_error");
    let large = body(json!({"system": "x".repeat(2000)}));
    check(&call("POST", MESSAGES, key, &large).await, 413, "request_too_large");
    check(&call("POST", MESSAGES, key, &json!([])).await, 400, "invalid_request_error");
    for headers in [key, "authorization: Bearer secret\r\n"] {
        assert_eq!(call("POST", MESSAGES, headers, &valid).await.status, 200);
        assert_eq!(call("POST", COUNT, headers, &valid).await.status, 200);
    }
    let elsewhere = call("GET", "/v1/nothing", key, &Value::Null).await;
    assert_eq!(elsewhere.error_code(), "not_found", "OpenAI's form on every other route");
}

#[tokio::test]
async fn a_failure_behind_the_head_is_an_error_event_and_the_end() {
    let server = Setup::default().start().await;
    server.control.not_finite_on_token(server.text.encode("!", false).unwrap()[0]);
    let reply = server.post(MESSAGES, &body(json!({"stream": true}))).await;
    let events = events(&reply);
    let last = events.last().unwrap();
    assert_eq!(last["type"], "error");
    assert_eq!(last["error"]["type"], "api_error");
    assert!(!reply.body.contains("message_stop"));
}
