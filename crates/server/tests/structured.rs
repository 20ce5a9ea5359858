//! Answers of a form, from the bundled model over HTTP: behind its thinking, streamed, sampled, several at once, with
//! drafts; and the thinking budget.

use std::path::Path;

use baton_loadgen::{Client, LocalServer};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

async fn server(flags: &[&str]) -> LocalServer {
    let binary = Path::new(env!("CARGO_BIN_EXE_baton"));
    LocalServer::start(binary, &[&["--log-level", "warn"], flags].concat()).await.expect("it starts")
}

/// A chat with further fields.
fn chat(fields: Value) -> Value {
    let mut body = json!({
        "model": "abacus", "messages": [{"role": "user", "content": "What is 347 + 286?"}], "temperature": 0,
        "max_tokens": 400,
    });
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    body
}

async fn ask(client: &Client, path: &str, body: &Value) -> Value {
    let (status, reply) = client.post(path, body).await.expect("an answer");
    assert_eq!(status, 200, "{body}: {reply}");
    reply
}

const KINDS: [&str; 3] = ["sum", "product", "other"];

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "answer": {"type": "integer", "minimum": 0, "maximum": 9999},
            "sure": {"type": "boolean"},
            "kind": {"enum": KINDS},
            "steps": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 1, "maxItems": 3},
            "note": {"type": "string", "maxLength": 6},
        },
        "required": ["answer", "sure", "kind", "steps", "note"],
        "additionalProperties": false,
    })
}

fn format() -> Value {
    let named = json!({"name": "result", "strict": true, "schema": schema()});
    json!({"type": "json_schema", "json_schema": named})
}

/// Checks a text against [`schema`], by hand.
fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let object = value.as_object().expect("an object");
    assert_eq!(object.keys().collect::<Vec<_>>(), ["answer", "sure", "kind", "steps", "note"], "{text}");
    assert!(object["answer"].as_u64().is_some_and(|n| n <= 9999), "{text}");
    assert!(object["sure"].is_boolean(), "{text}");
    assert!(object["kind"].as_str().is_some_and(|kind| KINDS.contains(&kind)), "{text}");
    let steps = object["steps"].as_array().expect("an array");
    assert!((1..=3).contains(&steps.len()) && steps.iter().all(|n| n.as_u64().is_some_and(|n| n <= 999)), "{text}");
    assert!(object["note"].as_str().is_some_and(|note| note.chars().count() <= 6), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_keep_to_a_schema_behind_the_thinking_whole_streamed_and_sampled() {
    let server = server(&[]).await;
    let client = server.client();
    let mut thought = 0;
    for (temperature, thinking) in [(0.0, true), (0.0, false), (1.0, true), (1.5, false)] {
        let body = chat(json!({
            "temperature": temperature, "seed": 3, "response_format": format(), "logprobs": true, "top_logprobs": 2,
            "chat_template_kwargs": {"enable_thinking": thinking}, "n": 3,
        }));
        let reply = ask(&client, CHAT, &body).await;
        for choice in reply["choices"].as_array().expect("choices") {
            let message = &choice["message"];
            // A sampled thought may take all tokens; what is said behind it is never cut but then.
            if choice["finish_reason"] == "length" && temperature > 0.0 {
                continue;
            }
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
            check(message["content"].as_str().expect("content"));
            thought += usize::from(message["reasoning_content"].as_str().is_some_and(|text| !text.is_empty()));
            assert!(!choice["logprobs"]["content"].as_array().expect("scores").is_empty());
        }
        let single = chat(json!({
            "temperature": temperature, "seed": 3, "response_format": format(),
            "chat_template_kwargs": {"enable_thinking": thinking},
        }));
        let streamed = client.stream(CHAT, single).await.expect("a stream");
        let first = &reply["choices"][0]["message"];
        assert_eq!(streamed.content, first["content"].as_str().unwrap_or_default());
        assert_eq!(streamed.reasoning, first["reasoning_content"].as_str().unwrap_or_default());
    }
    assert!(thought > 0, "the model thinks before an answer of a form as well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_to_ask_for_a_form_is_kept_to_on_both_endpoints() {
    let server = server(&[]).await;
    let client = server.client();
    let gbnf = "root ::= \"(\" digit+ (op root)? \")\"\ndigit ::= [0-9]\nop ::= [-+]\n";
    let is_parenthesised = |text: &str| text.starts_with('(') && text.ends_with(')');
    let is_json = |text: &str| serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object());
    let structure = json!({"begin": "<n>", "schema": {"type": "integer"}, "end": "</n>"});
    type Check = Box<dyn Fn(&str) -> bool>;
    let cases: Vec<(Value, Check)> = vec![
        (
            json!({"structured_outputs": {"regex": "[0-9]{2}-[a-f]{3}"}}),
            Box::new(|text| text.len() == 6 && text.as_bytes()[2] == b'-'),
        ),
        (
            json!({"structured_outputs": {"choice": ["red", "green"]}}),
            Box::new(|text| text == "red" || text == "green"),
        ),
        (
            json!({"structured_outputs": {"json": schema().to_string()}}),
            Box::new(|text| {
                check(text);
                true
            }),
        ),
        (json!({"structured_outputs": {"json_object": true}}), Box::new(is_json)),
        (json!({"response_format": {"type": "json_object"}}), Box::new(is_json)),
        (json!({"structured_outputs": {"grammar": gbnf}}), Box::new(is_parenthesised)),
        (json!({"grammar": gbnf}), Box::new(is_parenthesised)),
        (json!({"json_schema": {"const": {"a": 1}}}), Box::new(|text| text.replace(' ', "") == r#"{"a":1}"#)),
        (
            json!({"response_format": {"type": "structural_tag", "structures": [structure], "triggers": ["<n>"]}}),
            Box::new(|text| {
                text.split("<n>")
                    .skip(1)
                    .all(|part| part.split("</n>").next().is_some_and(|n| n.parse::<i64>().is_ok()))
            }),
        ),
    ];
    for (fields, holds) in cases {
        let chat = chat(json!({"chat_template_kwargs": {"enable_thinking": false}}));
        let completion = json!({"model": "abacus", "prompt": "Q", "temperature": 0.7, "seed": 1, "max_tokens": 300});
        for (path, mut body) in [(CHAT, chat), ("/v1/completions", completion)] {
            body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
            let reply = ask(&client, path, &body).await;
            let choice = &reply["choices"][0];
            let text = choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap_or_default();
            // What a small model would go on with for ever is cut.
            assert!(choice["finish_reason"] == "length" || holds(text), "{fields}: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drafts_change_no_answer_of_a_form() {
    let mut outputs = Vec::new();
    let drafting = r#"{"method": "ngram", "num_speculative_tokens": 3, "disable_by_batch_size": 64}"#;
    for flags in [&[][..], &["--speculative-config", drafting][..]] {
        let server = server(flags).await;
        let calls = (0..6).map(|i| {
            let client = server.client();
            let thinking = i % 2 == 0;
            let body = chat(json!({
                "temperature": if i < 3 { 0.0 } else { 1.0 }, "seed": i, "response_format": format(), "n": 2, "logprobs": true,
                "chat_template_kwargs": {"enable_thinking": thinking}, "thinking_token_budget": 40,
            }));
            tokio::spawn(async move { ask(&client, CHAT, &body).await["choices"].clone() })
        });
        let mut replies = Vec::new();
        for call in calls.collect::<Vec<_>>() {
            replies.push(call.await.expect("an answer"));
        }
        if !flags.is_empty() {
            let accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total").await.expect("a counter");
            assert!(accepted > 0.0, "no draft was of use");
        }
        outputs.push(replies);
    }
    assert_eq!(outputs[0], outputs[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_thinking_budget_closes_the_reasoning_and_the_answer_follows() {
    let server = server(&[]).await;
    let client = server.client();
    let free = ask(&client, CHAT, &chat(json!({}))).await;
    let reasoning =
        |reply: &Value| reply["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().expect("a count");
    assert!(reasoning(&free) > 12, "the model thinks longer than the budgets: {free}");
    for (budget, form) in [(0, false), (0, true), (5, false), (10, true)] {
        for field in ["thinking_token_budget", "thinking_budget"] {
            let mut fields = match field {
                "thinking_budget" => json!({"chat_template_kwargs": {field: budget}}),
                _ => json!({field: budget}),
            };
            if form {
                fields["response_format"] = format();
            }
            let reply = ask(&client, CHAT, &chat(fields)).await;
            // The markers count as well.
            assert_eq!(reasoning(&reply), budget + 2, "{reply}");
            let content = reply["choices"][0]["message"]["content"].as_str().expect("content");
            assert!(!content.is_empty() && !content.contains("think>"), "{content}");
            if form {
                check(content);
            }
        }
    }
}
