//! The rules of stops, usage, errors and streams that hold on every endpoint that generates: one table, run on all of
//! them, whole and streamed.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, Server, Setup, chat_body, with};

/// What differs between the endpoints.
struct Endpoint {
    path: &'static str,
    kind: &'static str,
    whole: &'static str,
    chunk: &'static str,
}

const ENDPOINTS: [Endpoint; 2] = [
    Endpoint { path: CHAT, kind: "chatcmpl-", whole: "chat.completion", chunk: "chat.completion.chunk" },
    Endpoint { path: COMPLETIONS, kind: "cmpl-", whole: "text_completion", chunk: "text_completion" },
];

impl Endpoint {
    fn body(&self, fields: &Value) -> Value {
        let body = match self.path {
            CHAT => chat_body(),
            _ => json!({"prompt": "What is 1 + 1?", "max_tokens": 100}),
        };
        with(with(body, json!({"seed": 7})), fields.clone())
    }

    /// Scores are asked for in other words.
    fn logprobs(&self) -> Value {
        if self.path == CHAT { json!({"logprobs": true, "top_logprobs": 2}) } else { json!({"logprobs": 2}) }
    }
}

/// Texts, scores and end of a choice, however it came.
#[derive(Debug, Default, PartialEq)]
struct Choice {
    reasoning: String,
    text: String,
    tokens: Vec<Value>,
    finish_reason: Value,
}

impl Choice {
    fn add(&mut self, choice: &Value) {
        let part = choice.get("message").or(choice.get("delta")).unwrap_or(choice);
        let text = |name: &str| part.get(name).and_then(Value::as_str).unwrap_or_default();
        self.reasoning += text("reasoning_content");
        self.text += text("content");
        self.text += text("text");
        let scores = choice["logprobs"].get("content").or(choice["logprobs"].get("tokens"));
        self.tokens.extend(scores.and_then(Value::as_array).cloned().unwrap_or_default());
    }
}

/// Checks what all chunks of a stream obey, and joins them.
#[track_caller]
fn joined(endpoint: &Endpoint, chunks: &[Value], whole: &Value, usage: bool) -> BTreeMap<usize, Choice> {
    let first = &chunks[0];
    let mut choices: BTreeMap<usize, Choice> = BTreeMap::new();
    let body = if usage { &chunks[..chunks.len() - 1] } else { chunks };
    for chunk in chunks {
        assert_eq!(chunk["object"], endpoint.chunk);
        assert!(chunk["id"].as_str().unwrap().starts_with(endpoint.kind), "{chunk}");
        for same in ["id", "created", "model", "system_fingerprint"] {
            assert_eq!(chunk[same], first[same]);
        }
        assert_eq!(chunk["system_fingerprint"], whole["system_fingerprint"]);
        assert_eq!(chunk.as_object().unwrap().contains_key("usage"), usage, "{chunk}");
    }
    if usage {
        let last = chunks.last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
        assert_eq!(last["usage"]["completion_tokens_details"], whole["usage"]["completion_tokens_details"]);
    }
    for chunk in body {
        if usage {
            assert_eq!(chunk["usage"], Value::Null, "{chunk}");
        }
        let [choice] = chunk["choices"].as_array().unwrap().as_slice() else { panic!("one choice: {chunk}") };
        let keys = choice.as_object().unwrap();
        assert!(keys.contains_key("index") && keys.contains_key("finish_reason") && keys.contains_key("logprobs"));
        let index = choice["index"].as_u64().unwrap() as usize;
        assert!(index <= choices.len(), "choices appear in order: {chunk}");
        let begins = !choices.contains_key(&index);
        if let Some(delta) = choice.get("delta") {
            assert_eq!(delta.get("role").is_some(), begins, "the role once: {chunk}");
            let both = delta.get("content").is_some() && delta.get("reasoning_content").is_some();
            assert!(!both, "{chunk}");
        }
        let known = choices.entry(index).or_default();
        assert_eq!(known.finish_reason, Value::Null, "nothing behind the end: {chunk}");
        let reasons = choice["delta"].get("reasoning_content").is_some();
        assert!(!reasons || known.text.is_empty(), "reasoning precedes content");
        known.add(choice);
        known.finish_reason = choice["finish_reason"].clone();
    }
    choices
}

async fn check(server: &Server, endpoint: &Endpoint, fields: &Value) -> Vec<Choice> {
    let body = endpoint.body(fields);
    let whole = server.post(endpoint.path, &body).await;
    assert_eq!(whole.status, 200, "{fields}: {whole:?}");
    assert_eq!(whole.header("content-type"), Some("application/json"));
    let whole = whole.json();
    assert_eq!(whole["object"], endpoint.whole);
    assert!(whole["id"].as_str().unwrap().starts_with(endpoint.kind));
    assert!(whole["created"].as_u64().unwrap() > 1_700_000_000);
    let usage = &whole["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(count("total_tokens"), count("prompt_tokens") + count("completion_tokens"));
    let mut expected = Vec::new();
    for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], index);
        let mut joined = Choice::default();
        joined.add(choice);
        joined.finish_reason = choice["finish_reason"].clone();
        assert!(["stop", "length"].contains(&joined.finish_reason.as_str().unwrap()), "{choice}");
        assert_eq!(choice["logprobs"].is_null(), body.get("logprobs").is_none());
        assert!(!joined.text.contains('\u{fffd}') && !joined.reasoning.contains('\u{fffd}'), "{choice}");
        expected.push(joined);
    }
    for usage in [false, true] {
        let mut streamed = with(body.clone(), json!({"stream": true}));
        if usage {
            streamed["stream_options"] = json!({"include_usage": true});
        }
        let reply = server.post(endpoint.path, &streamed).await;
        assert_eq!(reply.status, 200, "{fields}: {reply:?}");
        for (name, value) in [("cache-control", "no-cache"), ("x-accel-buffering", "no")] {
            assert_eq!(reply.header(name), Some(value));
        }
        assert_eq!(reply.header("content-encoding"), None);
        let choices = joined(endpoint, &reply.chunks(), &whole, usage);
        assert_eq!(choices.into_values().collect::<Vec<_>>(), expected, "{} {fields}", endpoint.path);
    }
    server.blocks_are_free().await;
    expected
}

#[tokio::test]
async fn joined_chunks_are_the_whole_reply_on_every_endpoint() {
    let server = Setup::default().start().await;
    // Fields, why the choices end, the end of each text, and what is nowhere in it.
    let cases = [
        (json!({}), "stop", "12 STOP 34", "\n\n\n"),
        (json!({"n": 3}), "stop", "12 STOP 34", "\n\n\n"),
        (json!({"stop": "STOP"}), "stop", "12 ", "S"),
        (json!({"stop": ["STOP", "12"]}), "stop", "好! ", "12"),
        (json!({"stop": ["never", " STOP 34 and more"]}), "stop", "12 STOP 34", "\n\n\n"),
        (json!({"stop": "STOP", "include_stop_str_in_output": true}), "stop", "12 STOP", "34"),
        (json!({"stop": "wörld 你好", "n": 2}), "stop", "Hello, ", "w"),
        (json!({"stop_token_ids": [1]}), "stop", "12 STOP 34", "\n\n\n"),
        (json!({"stop": "STOP", "min_tokens": 90}), "stop", "12 STOP 34", "\n\n\n"),
        (json!({"max_tokens": 10}), "length", "", "STOP"),
        (json!({"max_tokens": 30, "n": 2}), "length", "", "STOP 34"),
        (json!({"temperature": 0, "top_p": 0.5, "stop": null, "user": "ann", "metadata": {}}), "stop", "34", "\n\n\n"),
        (json!({"return_token_ids": true, "n": 2}), "stop", "34", "\n\n\n"),
    ];
    for endpoint in &ENDPOINTS {
        for (fields, reason, end, absent) in &cases {
            for scored in [json!({}), endpoint.logprobs()] {
                let fields = with(fields.clone(), scored);
                for choice in check(&server, endpoint, &fields).await {
                    assert_eq!(choice.finish_reason, *reason, "{} {fields}", endpoint.path);
                    assert!(choice.text.ends_with(end), "{} {fields}: {choice:?}", endpoint.path);
                    assert!(!choice.text.contains(absent), "{} {fields}: {choice:?}", endpoint.path);
                }
            }
        }
    }
}

#[tokio::test]
async fn refusals_are_the_same_object_before_a_stream_as_without_one() {
    let server = Setup::default().start().await;
    let cases = [
        (json!({"temperature": 7}), 400, "out_of_range"),
        (json!({"model": "other"}), 404, "model_not_found"),
        (json!({"max_tokens": 10_000}), 400, "context_length_exceeded"),
        (json!({"unheard_of": 1}), 400, "unknown_parameter"),
        (json!({"suffix": "x"}), 400, "unsupported_parameter"),
        (json!({"prompt_logprobs": 1, "n": 99}), 400, "out_of_range"),
    ];
    for endpoint in &ENDPOINTS {
        for (fields, status, code) in &cases {
            let replies = [false, true].map(|stream| with(endpoint.body(fields), json!({"stream": stream})));
            let mut objects = Vec::new();
            for body in replies {
                let reply = server.post(endpoint.path, &body).await;
                assert_eq!((reply.status, reply.error_code().as_str()), (*status, *code), "{fields}");
                assert!(reply.header("x-request-id").is_some());
                objects.push(reply.json());
            }
            assert_eq!(objects[0], objects[1]);
        }
    }
}

#[tokio::test]
async fn a_failure_behind_the_head_is_an_error_event_without_an_end_on_every_endpoint() {
    for endpoint in &ENDPOINTS {
        let server = Setup { reply: "ab".repeat(100), ..Setup::default() }.start().await;
        let token = server.text.encode("ab", false).unwrap()[0];
        server.control.delay_steps(std::time::Duration::from_millis(5));
        let body = endpoint.body(&json!({"stream": true, "ignore_eos": true}));
        let (reply, ()) = tokio::join!(server.post(endpoint.path, &body), async {
            tokio::time::sleep(std::time::Duration::from_millis(60)).await;
            server.control.not_finite_on_token(token);
        });
        assert_eq!(reply.status, 200, "{reply:?}");
        let events = reply.events();
        let error: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(
            error["error"].as_object().unwrap().keys().collect::<Vec<_>>(),
            ["message", "type", "param", "code"]
        );
        assert_eq!(
            (&error["error"]["type"], &error["error"]["code"]),
            (&json!("server_error"), &json!("engine_error"))
        );
        assert!(!events.contains(&"[DONE]"));
        server.blocks_are_free().await;
    }
}

#[tokio::test]
async fn a_lenient_server_names_what_it_ignores_wherever_it_stands() {
    let mut setup = Setup::default();
    setup.config.lenient = true;
    let server = setup.start().await;
    for endpoint in &ENDPOINTS {
        let fields =
            json!({"odd": 1, "stream": true, "stream_options": {"include_usage": true, "x": 1}, "suffix": "s"});
        let reply = server.post(endpoint.path, &endpoint.body(&fields)).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let warning = reply.header("warning").unwrap();
        for name in ["odd", "stream_options.x", "suffix"] {
            assert!(warning.contains(name), "{warning}");
        }
        let plain = server.post(endpoint.path, &endpoint.body(&json!({"user": "ann", "best_of": 1}))).await;
        assert_eq!((plain.status, plain.header("warning")), (200, None));
        let bad = server.post(endpoint.path, &endpoint.body(&json!({"odd": 1, "n": 0}))).await;
        assert_eq!(bad.status, 400, "ranges still hold");
    }
    let messages =
        json!([{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}], "foo": 1}]);
    let reply = server.chat(json!({"messages": messages, "thinking": {"type": "enabled", "depth": 3}})).await;
    let expected =
        "299 baton \"ignored parameters: messages[0].content[0].cache_control, messages[0].foo, thinking.depth\"";
    assert_eq!((reply.status, reply.header("warning")), (200, Some(expected)));
}
