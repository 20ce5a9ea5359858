//! Calls of tools in the dialects: whole, streamed, and back in.

use async_openai::types::responses::{OutputItem, Response};
use serde_json::{Value, json};

use crate::harness::{Server, Setup, with};

const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

const REPLY: &str = "<think>\nuse both\n</think>\n\nI add.<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n\
    </tool_call>\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {}}\n</tool_call>";

async fn server() -> Server {
    Setup { reply: REPLY.into(), ..Setup::default() }.start().await
}

fn schema() -> Value {
    json!({"type": "object", "properties": {"a": {"type": "integer"}}})
}

fn message(fields: Value) -> Value {
    let tool = |name: &str| json!({"name": name, "description": "Does it.", "input_schema": schema()});
    let tools = json!([tool("add"), tool("get_weather")]);
    let user = json!([{"role": "user", "content": "What is 1 + 1?"}]);
    with(json!({"max_tokens": 200, "messages": user, "tools": tools, "thinking": {"type": "adaptive"}}), fields)
}

fn response(fields: Value) -> Value {
    let tool =
        |name: &str| json!({"type": "function", "name": name, "description": "Does it.", "parameters": schema()});
    with(json!({"input": "What is 1 + 1?", "tools": [tool("add"), tool("get_weather")]}), fields)
}

async fn post(server: &Server, path: &str, body: &Value) -> Value {
    let reply = server.post(path, body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()
}

/// The data of a stream's events.
async fn events(server: &Server, path: &str, body: Value) -> Vec<Value> {
    let reply = server.post(path, &with(body, json!({"stream": true}))).await;
    reply.events().into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[tokio::test]
async fn a_message_calls_tools_in_blocks_of_their_own() {
    let server = server().await;
    let json = post(&server, MESSAGES, &message(json!({}))).await;
    assert_eq!(json["stop_reason"], "tool_use");
    let [thinking, text, add, weather] = &json["content"].as_array().unwrap()[..] else { panic!("{json}") };
    assert_eq!((&thinking["type"], &text["text"]), (&json!("thinking"), &json!("I add.")));
    assert_eq!((&add["type"], &add["name"], &add["input"]), (&json!("tool_use"), &json!("add"), &json!({"a": 1})));
    assert_eq!((&weather["name"], &weather["input"]), (&json!("get_weather"), &json!({})));
    assert_ne!(add["id"], weather["id"]);

    let events = events(&server, MESSAGES, message(json!({}))).await;
    let started: Vec<_> = events.iter().filter(|event| event["type"] == "content_block_start").collect();
    assert_eq!(started.len(), 4);
    assert!(started.iter().enumerate().all(|(index, event)| event["index"] == index));
    for (call, index) in [(add, 2), (weather, 3)] {
        let block = &started[index]["content_block"];
        assert_eq!((&block["type"], &block["name"], &block["input"]), (&call["type"], &call["name"], &json!({})));
        let deltas = events.iter().filter(|event| event["index"] == index && event["type"] == "content_block_delta");
        let input: String = deltas.map(|event| event["delta"]["partial_json"].as_str().unwrap()).collect();
        assert_eq!(serde_json::from_str::<Value>(&input).unwrap(), call["input"]);
    }
    let [.., delta, stop] = &events[..] else { panic!("{events:?}") };
    assert_eq!((&delta["delta"]["stop_reason"], &stop["type"]), (&json!("tool_use"), &json!("message_stop")));
    server.blocks_are_free().await;
}

#[tokio::test]
async fn a_message_may_be_kept_to_one_call_or_to_none() {
    let server = server().await;
    let single = json!({"tool_choice": {"type": "auto", "disable_parallel_tool_use": true}});
    let json = post(&server, MESSAGES, &message(single)).await;
    assert_eq!((json["content"].as_array().unwrap().len(), &json["stop_reason"]), (3, &json!("tool_use")));
    let none = post(&server, MESSAGES, &message(json!({"tool_choice": {"type": "none"}}))).await;
    assert_eq!(none["stop_reason"], "end_turn");
    assert!(none["content"][1]["text"].as_str().unwrap().contains("<tool_call>"), "text like any other");
    let refused = server.post(MESSAGES, &message(json!({"tools": [{"name": "a b", "input_schema": {}}]}))).await;
    assert_eq!((refused.status, &refused.json()["type"]), (400, &json!("error")));
}

#[tokio::test]
async fn results_of_tools_come_back_as_the_chat_has_them() {
    let server = server().await;
    let first = post(&server, MESSAGES, &message(json!({}))).await;
    let results: Vec<_> = first["content"].as_array().unwrap()[2..]
        .iter()
        .map(|call| json!({"type": "tool_result", "tool_use_id": call["id"], "content": "2"}))
        .collect();
    let messages = json!([
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": results},
    ]);
    let second = post(&server, MESSAGES, &message(json!({"messages": messages}))).await;

    let made = post(&server, RESPONSES, &response(json!({}))).await;
    let mut input = vec![json!({"role": "user", "content": "What is 1 + 1?"})];
    input.extend(made["output"].as_array().unwrap().iter().cloned());
    for call in &made["output"].as_array().unwrap()[2..] {
        input.push(json!({"type": "function_call_output", "call_id": call["call_id"], "output": "2"}));
    }
    let again = post(&server, RESPONSES, &response(json!({"input": input}))).await;
    assert_eq!(again["usage"]["input_tokens"], second["usage"]["input_tokens"]);
}

#[tokio::test]
async fn a_response_calls_tools_in_items_of_their_own() {
    let server = server().await;
    let json = post(&server, RESPONSES, &response(json!({}))).await;
    let typed: Response = serde_json::from_value(json.clone()).unwrap();
    assert!(matches!(
        &typed.output[..],
        [OutputItem::Reasoning(_), OutputItem::Message(_), OutputItem::FunctionCall(_), OutputItem::FunctionCall(_)]
    ));
    let add = &json["output"][2];
    assert_eq!((&add["name"], &add["status"]), (&json!("add"), &json!("completed")));
    assert_eq!(serde_json::from_str::<Value>(add["arguments"].as_str().unwrap()).unwrap(), json!({"a": 1}));
    assert_eq!((&json["status"], &json["tools"][0]["name"]), (&json!("completed"), &json!("add")));

    let events = events(&server, RESPONSES, response(json!({}))).await;
    let of_call: Vec<_> = events.iter().filter(|event| event["output_index"] == 2).collect();
    let mut kinds: Vec<_> = of_call.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let expected = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ];
    assert_eq!(kinds, expected);
    assert_eq!(of_call[0]["item"]["arguments"], "");
    let joined: String = of_call.iter().filter_map(|event| event["delta"].as_str()).collect();
    let [.., done, item] = &of_call[..] else { panic!("{of_call:?}") };
    assert_eq!((&done["arguments"], &item["item"]["arguments"]), (&json!(joined), &json!(joined)));
    assert_eq!(joined, add["arguments"].as_str().unwrap());
    server.blocks_are_free().await;
}

#[tokio::test]
async fn a_response_is_given_some_of_its_tools() {
    let server = server().await;
    let allowed = json!({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]});
    let json = post(&server, RESPONSES, &response(json!({"tool_choice": allowed}))).await;
    assert_eq!(json["tool_choice"], allowed);
    assert_eq!(serde_json::from_value::<Response>(json.clone()).unwrap().tools.unwrap().len(), 2);
    let calls = json["output"].as_array().unwrap().iter().filter(|item| item["type"] == "function_call");
    assert_eq!(calls.map(|call| call["name"].as_str().unwrap()).collect::<Vec<_>>(), ["add"]);
    let unknown = json!({"tool_choice": {"type": "function", "name": "nothing"}});
    let refused = server.post(RESPONSES, &response(unknown)).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tool_choice")));
    server.blocks_are_free().await;
}
