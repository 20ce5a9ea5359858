//! `/v1/responses`: the object, the order of events, and items in and out.

use async_openai::types::responses::{Response, ResponseStreamEvent};
use serde_json::{Value, json};

use crate::harness::{CHAT, CONTENT, REASONING, REPLY, Reply, Server, Setup, with};

pub const RESPONSES: &str = "/v1/responses";

pub fn body(fields: Value) -> Value {
    with(json!({"input": "What is 1 + 1?"}), fields)
}

pub async fn post(server: &Server, fields: Value) -> Value {
    let reply = server.post(RESPONSES, &body(fields)).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let json = reply.json();
    parses(&json);
    json
}

/// Whether clients with closed types take the object.
#[track_caller]
fn parses(response: &Value) {
    serde_json::from_value::<Response>(response.clone()).unwrap_or_else(|e| panic!("{e}: {response}"));
}

/// The events of a stream: named as they say, numbered from 0, each of a type that clients know.
#[track_caller]
fn events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.header("content-type"), Some("text/event-stream"), "{reply:?}");
    let event = |(i, text): (usize, &str)| {
        let (name, data) = text.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(i)));
        serde_json::from_value::<ResponseStreamEvent>(data.clone()).unwrap_or_else(|e| panic!("{e}: {data}"));
        data
    };
    reply.body.split_terminator("\n\n").enumerate().map(event).collect()
}

/// Every field that OpenAI's and the Open Responses schema ask for.
const FIELDS: [&str; 31] = [
    "id",
    "object",
    "created_at",
    "completed_at",
    "status",
    "background",
    "error",
    "incomplete_details",
    "model",
    "output",
    "previous_response_id",
    "store",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "usage",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "reasoning",
    "service_tier",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "truncation",
    "prompt_cache_key",
    "safety_identifier",
];

#[tokio::test]
async fn a_whole_response_has_items_and_usage_and_repeats_the_request() {
    let server = Setup::default().start().await;
    let fields = json!({"model": "org/tiny", "instructions": "Be brief.", "temperature": 0.7, "top_p": 0.9,
        "max_output_tokens": 90, "metadata": {"a": "b"}, "user": "me", "store": false});
    let json = post(&server, fields).await;
    for field in FIELDS {
        assert!(json.get(field).is_some(), "{field}");
    }
    let expected = json!({"object": "response", "status": "completed", "model": "org/tiny", "error": null,
        "incomplete_details": null, "instructions": "Be brief.", "temperature": 0.7, "top_p": 0.9,
        "max_output_tokens": 90, "metadata": {"a": "b"}, "user": "me", "store": false, "background": false,
        "previous_response_id": null, "tool_choice": "auto", "tools": [], "parallel_tool_calls": true,
        "truncation": "disabled", "reasoning": {"effort": null, "summary": null}, "top_logprobs": 0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "service_tier": "default"});
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&json[name], value, "{name}");
    }
    let output = json["output"].as_array().unwrap();
    assert_eq!(output.len(), 2);
    assert_eq!(output[0]["type"], "reasoning");
    assert_eq!(output[0]["content"], json!([{"type": "reasoning_text", "text": REASONING}]));
    assert_eq!((&output[1]["type"], &output[1]["role"]), (&json!("message"), &json!("assistant")));
    let text = json!([{"type": "output_text", "text": CONTENT, "annotations": [], "logprobs": []}]);
    assert_eq!((&output[1]["content"], &output[1]["status"]), (&text, &json!("completed")));
    let usage = &json["usage"];
    assert_eq!(usage["output_tokens"], server.text.encode(REPLY, false).unwrap().len() + 1);
    assert!(usage["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 0);
    let sum = usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], sum);
}

#[tokio::test]
async fn a_streamed_response_keeps_to_the_order_of_events_and_ends_with_the_whole() {
    let server = Setup::default().start().await;
    let events = events(&server.post(RESPONSES, &body(json!({"stream": true}))).await);
    let mut kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(kinds, expected);
    for (kind, text) in [("response.reasoning_text", REASONING), ("response.output_text", CONTENT)] {
        let of_kind =
            |suffix: &str| events.iter().filter(|e| e["type"] == format!("{kind}.{suffix}")).collect::<Vec<_>>();
        let joined: String = of_kind("delta").iter().map(|e| e["delta"].as_str().unwrap()).collect();
        assert_eq!((joined.as_str(), &of_kind("done")[0]["text"]), (text, &json!(text)));
    }
    let object = &events.last().unwrap()["response"];
    let done: Vec<_> = events.iter().filter(|e| e["type"] == "response.output_item.done").collect();
    for (i, event) in done.iter().enumerate() {
        assert_eq!((&event["item"], &event["output_index"]), (&object["output"][i], &json!(i)));
    }
    for event in &events[..2] {
        assert_eq!((&event["response"]["id"], &event["response"]["status"]), (&object["id"], &json!("in_progress")));
    }
    let mut whole = post(&server, json!({})).await;
    let output = |json: &mut Value| -> Vec<Value> {
        let items = json["output"].as_array_mut().unwrap();
        items
            .iter_mut()
            .map(|item| {
                item["id"] = json!("");
                item.take()
            })
            .collect()
    };
    assert_eq!(output(&mut whole), output(&mut object.clone()));
    server.blocks_are_free().await;
}

#[tokio::test]
async fn a_response_that_is_cut_is_incomplete_and_its_last_item_too() {
    let server = Setup::default().start().await;
    let json = post(&server, json!({"max_output_tokens": 30})).await;
    assert_eq!(json["status"], "incomplete");
    assert_eq!(json["incomplete_details"], json!({"reason": "max_output_tokens"}));
    let statuses: Vec<_> = json["output"].as_array().unwrap().iter().map(|item| &item["status"]).collect();
    assert_eq!(statuses, ["completed", "incomplete"]);
    let reply = server.post(RESPONSES, &body(json!({"max_output_tokens": 30, "stream": true}))).await;
    assert_eq!(events(&reply).last().unwrap()["type"], "response.incomplete");
}

#[tokio::test]
async fn reasoning_is_its_own_summary_where_one_is_asked_for() {
    let server = Setup::default().start().await;
    let fields = json!({"reasoning": {"summary": "auto"}});
    let json = post(&server, fields.clone()).await;
    let summary = json!([{"type": "summary_text", "text": REASONING}]);
    assert_eq!((&json["output"][0]["summary"], &json["output"][0]["content"]), (&summary, &json!([])));
    let events = events(&server.post(RESPONSES, &body(with(fields, json!({"stream": true})))).await);
    let mut kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let expected = [
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
    ];
    assert_eq!(kinds[2..8], expected);
}

#[tokio::test]
async fn scores_stand_beside_the_text_that_they_are_of() {
    let server = Setup::default().start().await;
    let fields = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let json = post(&server, fields.clone()).await;
    let scores = json["output"][1]["content"][0]["logprobs"].as_array().unwrap().clone();
    let bytes: Vec<u8> = scores
        .iter()
        .flat_map(|score| score["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), CONTENT, "and none of the reasoning");
    assert!(scores.iter().all(|score| score["top_logprobs"].as_array().unwrap().len() == 2));
    let events = events(&server.post(RESPONSES, &body(with(fields, json!({"stream": true})))).await);
    let done = events.iter().find(|event| event["type"] == "response.output_text.done").unwrap();
    assert_eq!(done["logprobs"], Value::from(scores));
}

#[tokio::test]
async fn the_prompt_is_that_of_the_same_chat() {
    let server = Setup::default().start().await;
    let input = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "What is"}, {"type": "input_text", "text": "1 + 1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "add"}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": "{\"a\":1}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "2", "annotations": []}]},
        {"type": "message", "role": "user", "content": "Sure?"},
    ]);
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is\n1 + 1?"},
        {"role": "assistant", "reasoning_content": "add", "content": null, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\"a\":1}"}}]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]);
    let ours = server.post(CHAT, &json!({"messages": messages})).await.json();
    let theirs = post(&server, json!({"input": input, "instructions": "Be brief."})).await;
    let prompt = ours["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(theirs["usage"]["input_tokens"], prompt);
    let cached = theirs["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached + 8 > prompt, "the same tokens, so all but the last are cached: {cached} of {prompt}");
}

#[tokio::test]
async fn bad_requests_are_refused_by_their_own_names() {
    let server = Setup::default().start().await;
    let many: Value = (0..17).map(|i| (format!("k{i}"), json!("v"))).collect::<serde_json::Map<_, _>>().into();
    let cases = [
        (json!({"input": null}), "missing_required_parameter", "input"),
        (json!({"input": []}), "out_of_range", "input"),
        (json!({"input": 5}), "invalid_type", "input"),
        (json!({"input": [{"role": "user"}]}), "missing_required_parameter", "input[0].content"),
        (json!({"input": [{"role": "tool", "content": "x"}]}), "out_of_range", "input[0].role"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "unsupported_parameter", "input[0].type"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
            "unsupported_parameter",
            "input[0].content[0].type",
        ),
        (json!({"input": [{"type": "function_call", "name": "x"}]}), "missing_required_parameter", "input[0].call_id"),
        (json!({"input": "x".repeat(3000)}), "context_length_exceeded", "input"),
        (json!({"max_output_tokens": 0}), "out_of_range", "max_output_tokens"),
        (json!({"max_output_tokens": 100_000}), "context_length_exceeded", "input"),
        (json!({"temperature": 3}), "out_of_range", "temperature"),
        (json!({"truncation": "auto"}), "unsupported_parameter", "truncation"),
        (json!({"include": ["file_search_call.results"]}), "out_of_range", "include"),
        (json!({"top_logprobs": 3}), "invalid_value", "top_logprobs"),
        (json!({"metadata": {"a": 1}}), "out_of_range", "metadata"),
        (json!({"metadata": many}), "out_of_range", "metadata"),
        (json!({"reasoning": {"effort": "hard"}}), "out_of_range", "reasoning.effort"),
        (json!({"reasoning": {"summary": "concise"}}), "out_of_range", "reasoning.summary"),
        (json!({"text": {"format": {"type": "json_schema"}}}), "missing_required_parameter", "text.format.name"),
        (json!({"text": {"verbosity": "low"}}), "out_of_range", "text.verbosity"),
        (json!({"tools": [{"type": "web_search"}]}), "unsupported_parameter", "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "missing_required_parameter", "tools[0].name"),
        (json!({"tool_choice": {"type": "mcp"}}), "unsupported_parameter", "tool_choice.type"),
        (json!({"stream_options": {"include_obfuscation": false}}), "invalid_value", "stream_options"),
        (json!({"conversation": "x"}), "unsupported_parameter", "conversation"),
        (json!({"prompt": {"id": "x"}}), "unsupported_parameter", "prompt"),
        (json!({"store": true}), "not_configured", "store"),
        (json!({"background": true}), "not_configured", "background"),
        (json!({"previous_response_id": "resp_1"}), "not_configured", "previous_response_id"),
        (json!({"n": 2}), "unknown_parameter", "n"),
        (json!({"messages": []}), "unknown_parameter", "messages"),
        (json!({"unheard_of": 1}), "unknown_parameter", "unheard_of"),
    ];
    for (fields, code, param) in cases {
        let reply = server.post(RESPONSES, &body(fields)).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, code), "{param}: {reply:?}");
        assert_eq!(reply.json()["error"]["param"], param);
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(!message.contains("messages") || code == "context_length_exceeded" || param == "messages", "{message}");
    }
    for path in ["/v1/responses/resp_0", "/v1/responses/resp_0/input_items"] {
        assert_eq!(server.get(path).await.error_code(), "not_configured");
    }
    server.blocks_are_free().await;
}

#[tokio::test]
async fn a_failure_behind_the_head_is_an_error_and_a_failed_response() {
    let server = Setup::default().start().await;
    server.control.not_finite_on_token(server.text.encode("!", false).unwrap()[0]);
    let reply = server.post(RESPONSES, &body(json!({"stream": true}))).await;
    let events = events(&reply);
    let [.., error, failed] = &events[..] else { panic!("{events:?}") };
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("engine_error")));
    assert_eq!(failed["type"], "response.failed");
    assert_eq!(failed["response"]["status"], "failed");
    assert_eq!(failed["response"]["error"]["code"], "server_error");
    assert!(failed["response"]["output"][1]["status"] == "incomplete");
}
