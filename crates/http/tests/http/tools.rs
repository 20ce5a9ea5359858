//! Calls of tools: in whole replies and streams, where they end, and what of a request is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_openai::types::chat::{
    CreateChatCompletionResponse, CreateChatCompletionStreamResponse, FinishReason, FunctionType,
};
use baton_engine::EngineConfig;
use baton_http::Service;
use serde_json::{Value, json};

use crate::harness::{Other, Reply, Server, Setup, abacus_with, script, with};

const THOUGHT: &str = "<think>\nuse <tool_call> now\n</think>\n\n";

fn call(name: &str, arguments: &str) -> String {
    format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
}

async fn saying(reply: impl Into<String>) -> Server {
    Setup { reply: reply.into(), ..Setup::default() }.start().await
}

fn tool(name: &str) -> Value {
    let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    json!({"type": "function", "function": {"name": name, "description": "Does it.", "parameters": parameters}})
}

fn tools() -> Value {
    json!({"tools": [tool("add"), tool("get_weather")], "temperature": 0})
}

/// What an SDK makes of a stream: by choice its content, and the name, id and arguments of each call.
#[derive(Debug, Default, PartialEq)]
struct Accumulated {
    content: Option<String>,
    reasoning: String,
    calls: Vec<(String, String, String)>,
    finish: Option<FinishReason>,
}

/// Accumulates as SDKs do: calls by index, the first delta of each with id, type and name.
fn accumulate(chunks: &[Value]) -> BTreeMap<u32, Accumulated> {
    let mut choices: BTreeMap<u32, Accumulated> = BTreeMap::new();
    for chunk in chunks {
        let typed: CreateChatCompletionStreamResponse = serde_json::from_value(chunk.clone()).expect("an SDK's type");
        for (choice, raw) in typed.choices.into_iter().zip(chunk["choices"].as_array().unwrap()) {
            let all = choices.entry(choice.index).or_default();
            assert_eq!(all.finish, None, "nothing follows the end of a choice");
            let kinds = ["content", "tool_calls", "reasoning"].iter().filter(|kind| !raw["delta"][**kind].is_null());
            assert!(kinds.count() <= 1, "{chunk}");
            if let Some(text) = choice.delta.content.filter(|text| !text.is_empty()) {
                all.content.get_or_insert_default().push_str(&text);
            }
            all.reasoning += raw["delta"]["reasoning_content"].as_str().unwrap_or_default();
            for part in choice.delta.tool_calls.unwrap_or_default() {
                let function = part.function.expect("a function");
                match part.id {
                    Some(id) => {
                        assert_eq!(part.index as usize, all.calls.len(), "indices are dense");
                        assert_eq!(part.r#type, Some(FunctionType::Function));
                        assert_eq!(function.arguments.as_deref(), Some(""));
                        all.calls.push((id, function.name.expect("a name"), String::new()));
                    }
                    None => {
                        assert_eq!((part.r#type, function.name), (None, None), "said once");
                        all.calls[part.index as usize].2 += &function.arguments.expect("arguments");
                    }
                }
            }
            all.finish = choice.finish_reason;
        }
    }
    choices
}

/// The same of a whole reply.
fn whole(reply: &Reply) -> BTreeMap<u32, Accumulated> {
    let json = reply.json();
    serde_json::from_value::<CreateChatCompletionResponse>(json.clone()).expect("an SDK's type");
    let choice = |choice: &Value| {
        let message = &choice["message"];
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let call = |call: &Value| {
            assert_eq!(call["type"], "function");
            (text(&call["id"]), text(&call["function"]["name"]), text(&call["function"]["arguments"]))
        };
        let all = Accumulated {
            content: message["content"].as_str().map(str::to_owned),
            reasoning: message["reasoning_content"].as_str().unwrap_or_default().to_owned(),
            calls: message["tool_calls"].as_array().into_iter().flatten().map(call).collect(),
            finish: serde_json::from_value(choice["finish_reason"].clone()).unwrap(),
        };
        (choice["index"].as_u64().unwrap() as u32, all)
    };
    json["choices"].as_array().unwrap().iter().map(choice).collect()
}

/// Asks both ways, compares, and gives content, calls and the reason of the first choice.
async fn ask(server: &Server, fields: Value) -> (Option<String>, Vec<(String, String)>, String) {
    let fields = with(tools(), fields);
    let whole_reply = server.chat(fields.clone()).await;
    assert_eq!(whole_reply.status, 200, "{whole_reply:?}");
    let whole = whole(&whole_reply);
    let streamed = accumulate(&server.chat(with(fields, json!({"stream": true}))).await.chunks());
    assert_eq!(whole.len(), streamed.len());
    let calls = |all: &Accumulated| -> Vec<(String, String)> {
        all.calls.iter().map(|(_, name, arguments)| (name.clone(), arguments.clone())).collect()
    };
    for (index, all) in &whole {
        let stream = &streamed[index];
        assert_eq!(all.content.as_deref().unwrap_or(""), stream.content.as_deref().unwrap_or(""));
        assert_eq!((&all.reasoning, calls(all), all.finish), (&stream.reasoning, calls(stream), stream.finish));
    }
    let ids = |all: &BTreeMap<u32, Accumulated>| -> Vec<String> {
        all.values().flat_map(|all| all.calls.iter().map(|(id, ..)| id.clone())).collect()
    };
    for ids in [ids(&whole), ids(&streamed)] {
        assert!(ids.iter().all(|id| id.starts_with("call_")), "{ids:?}");
        assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), ids.len(), "{ids:?}");
    }
    server.blocks_are_free().await;
    let finish = whole_reply.json()["choices"][0]["finish_reason"].as_str().unwrap().to_owned();
    (whole[&0].content.clone(), calls(&whole[&0]), finish)
}

fn calls(calls: &[(&str, &str)]) -> Vec<(String, String)> {
    calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())).collect()
}

#[tokio::test]
async fn a_call_has_null_content_text_arguments_and_its_own_finish_reason() {
    let server = saying(THOUGHT.to_owned() + &call("add", r#"{"a": 1, "s": "é </tool_call> {"}"#)).await;
    let expected = calls(&[("add", r#"{"a": 1, "s": "é </tool_call> {"}"#)]);
    assert_eq!(ask(&server, json!({})).await, (None, expected.clone(), "tool_calls".into()));
    let json = server.chat(tools()).await.json();
    let message = json["choices"][0]["message"].as_object().unwrap();
    assert_eq!(message["content"], Value::Null);
    assert_eq!(message["reasoning_content"], "use <tool_call> now", "reasoning is never searched");
    // Each choice has its own calls.
    assert_eq!(ask(&server, json!({"n": 2})).await, (None, expected, "tool_calls".into()));
}

#[tokio::test]
async fn several_calls_come_in_order_and_text_stays_beside_them() {
    let text = "Let me see.\n".to_owned() + &call("add", r#"{"a":1}"#) + "\n" + &call("get_weather", "{}");
    let server = saying(text).await;
    let both = calls(&[("add", r#"{"a":1}"#), ("get_weather", "{}")]);
    assert_eq!(ask(&server, json!({})).await, (Some("Let me see.".into()), both, "tool_calls".into()));
    // Only one is wanted: the work ends with it.
    let one = (Some("Let me see.".into()), calls(&[("add", r#"{"a":1}"#)]), "tool_calls".into());
    assert_eq!(ask(&server, json!({"parallel_tool_calls": false})).await, one);
    let tokens = |reply: Reply| reply.json()["usage"]["completion_tokens"].as_u64().unwrap();
    let single = tokens(server.chat(with(tools(), json!({"parallel_tool_calls": false}))).await);
    assert!(single < tokens(server.chat(tools()).await));
}

#[tokio::test]
async fn only_the_tools_that_may_be_called_are_found() {
    let text = call("add", "{}");
    let server = saying(text.clone()).await;
    let as_text = (Some(text), Vec::new(), "stop".to_owned());
    let as_call = (None, calls(&[("add", "{}")]), "tool_calls".to_owned());
    let allow = |name: &str| {
        let tools = json!([{"type": "function", "function": {"name": name}}]);
        json!({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}}})
    };
    assert_eq!(ask(&server, json!({"tool_choice": "auto"})).await, as_call);
    assert_eq!(ask(&server, allow("add")).await, as_call);
    assert_eq!(ask(&server, json!({"tool_choice": "none"})).await, as_text);
    assert_eq!(ask(&server, allow("get_weather")).await, as_text);
    assert_eq!(ask(&server, json!({"tools": [tool("other")]})).await, as_text);
    assert_eq!(ask(&server, json!({"tools": []})).await, as_text);
    // The template is told of all tools whatever may be called: the prompt stays the same.
    let prompt = async |fields| server.chat(with(tools(), fields)).await.json()["usage"]["prompt_tokens"].clone();
    let told = prompt(json!({})).await;
    assert_eq!(prompt(json!({"tool_choice": "none"})).await, told);
    assert_eq!(prompt(allow("add")).await, told);
    assert_ne!(prompt(json!({"tools": null})).await, told);
}

#[tokio::test]
async fn a_call_that_is_cut_off_does_not_finish_as_a_call() {
    let server = saying(call("add", r#"{"a": "one two three four five six seven eight"}"#)).await;
    let (content, cut, reason) = ask(&server, json!({"max_tokens": 25})).await;
    assert_eq!((content, cut.len(), reason.as_str()), (None, 1, "length"));
    assert!(cut[0].1.starts_with(r#"{"a": "one"#), "{cut:?}");
    let (_, cut, reason) = ask(&server, json!({"stop": "three"})).await;
    assert_eq!((cut, reason.as_str()), (calls(&[("add", r#"{"a": "one two "#)]), "stop"));

    // A stop string behind a whole call ends the text, not the call.
    let server = saying(call("add", "{}") + "\nNow END of it").await;
    let whole = (Some("Now ".into()), calls(&[("add", "{}")]), "tool_calls".into());
    assert_eq!(ask(&server, json!({"stop": "END"})).await, whole);
}

#[tokio::test]
async fn arguments_are_streamed_before_they_are_complete() {
    let server = saying(call("add", r#"{"a": "some longer text to be sent"}"#)).await;
    let chunks = server.chat(with(tools(), json!({"stream": true}))).await.chunks();
    let parts = chunks.iter().filter(|chunk| !chunk["choices"][0]["delta"]["tool_calls"].is_null());
    assert!(parts.count() > 5, "{chunks:?}");
}

#[tokio::test]
async fn results_of_calls_come_back_in() {
    let server = saying("3").await;
    let called = json!({"role": "assistant", "content": "", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}}]});
    let result = |content: Value| json!({"role": "tool", "tool_call_id": "call_1", "content": content});
    let ask = async |called: &Value, content| {
        let messages = json!([{"role": "user", "content": "1+2?"}, called, result(content)]);
        let reply = server.chat(with(tools(), json!({"messages": messages}))).await.json();
        assert_eq!(reply["choices"][0]["message"]["content"], "3", "{reply}");
        reply["usage"]["prompt_tokens"].clone()
    };
    let plain = ask(&called, json!("3")).await;
    assert_eq!(ask(&called, json!([{"type": "text", "text": "3"}])).await, plain);
    assert_eq!(ask(&with(called.clone(), json!({"content": null})), json!("3")).await, plain);
}

#[tokio::test]
async fn bad_tools_are_refused_with_the_path_of_the_field() {
    let server = saying("hi").await;
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let many: Vec<Value> = (0..129).map(|i| tool(&format!("t{i}"))).collect();
    let cases = [
        (json!({"tools": 1}), "invalid_type", "tools"),
        (json!({"tools": [1]}), "invalid_type", "tools[0]"),
        (json!({"tools": [{"function": {"name": "a"}}]}), "missing_required_parameter", "tools[0].type"),
        (json!({"tools": [{"type": "custom", "custom": {}}]}), "unsupported_parameter", "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "missing_required_parameter", "tools[0].function"),
        (
            json!({"tools": [{"type": "function", "function": {}}]}),
            "missing_required_parameter",
            "tools[0].function.name",
        ),
        (json!({"tools": [with(tool("a"), json!({"x": 1}))]}), "unknown_parameter", "tools[0].x"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}),
            "invalid_type",
            "tools[0].function.parameters",
        ),
        (json!({"tools": [tool("a b")]}), "out_of_range", "tools"),
        (json!({"tools": [tool("")]}), "out_of_range", "tools"),
        (json!({"tools": [tool(&"a".repeat(65))]}), "out_of_range", "tools"),
        (json!({"tools": [tool("a"), tool("a")]}), "out_of_range", "tools"),
        (json!({"tools": many}), "out_of_range", "tools"),
        (json!({"tool_choice": "any"}), "out_of_range", "tool_choice"),
        (json!({"tool_choice": 1}), "invalid_type", "tool_choice"),
        (json!({"tool_choice": named("other")}), "invalid_value", "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), "missing_required_parameter", "tool_choice.function"),
        (
            json!({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}),
            "missing_required_parameter",
            "tool_choice.allowed_tools.tools",
        ),
        (json!({"tools": [], "tool_choice": "required"}), "invalid_value", "tool_choice"),
        (json!({"tools": null, "tool_choice": named("add")}), "invalid_value", "tool_choice"),
        (json!({"parallel_tool_calls": "no"}), "invalid_type", "parallel_tool_calls"),
        (json!({"functions": [{"name": "a"}]}), "unsupported_parameter", "functions"),
        (json!({"function_call": {"name": "a"}}), "unsupported_parameter", "function_call"),
    ];
    for (fields, code, param) in cases {
        let reply = server.chat(with(tools(), fields.clone())).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, code), "{fields}");
        assert_eq!(reply.json()["error"]["param"], param, "{fields}");
    }
    let reply = server.completion(tools()).await;
    assert_eq!(reply.error_code(), "unsupported_parameter");
    assert_eq!(server.chat(json!({"tools": [], "tool_choice": "none", "parallel_tool_calls": true})).await.status, 200);
}

#[tokio::test]
async fn a_model_that_cannot_call_tools_refuses_them_by_name() {
    let (server, _) = Setup::default().start_loading().await;
    let text = Arc::new(abacus_with(Some("{% for m in messages %}{{ m.content }}{% endfor %}")));
    let (_other, generation) = Other::new(1, script(&text, "hi"), EngineConfig::default(), text);
    Service::install(&server.service, generation);
    let reply = server.chat(tools()).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (400, "invalid_value"));
    assert_eq!(reply.json()["error"]["param"], "tools");
    // Without any that may be called it answers.
    assert_eq!(server.chat(with(tools(), json!({"tool_choice": "none"}))).await.status, 200);
}

#[tokio::test]
async fn demanded_calls_and_strict_arguments_are_kept_to() {
    // What the model would say by itself is no call.
    let server = saying("<think>\nadd them\n</think>\n\nHello there, this is an answer.").await;
    let choose = |unit: Value, strict: bool| {
        let parameters = json!({"type": "object", "properties": {"unit": unit}, "required": ["unit"],
            "additionalProperties": false});
        json!({"type": "function", "function": {"name": "choose", "parameters": parameters, "strict": strict}})
    };
    let named = json!({"type": "function", "function": {"name": "choose"}});
    let one = |choice: &Value, strict: bool| json!({"tools": [tool("add"), choose(json!({"enum": ["metre"]}), strict)], "tool_choice": choice});
    let expected = calls(&[("choose", r#"{"unit":"metre"}"#)]);
    let spaceless = |(content, mut calls, reason): (Option<String>, Vec<(String, String)>, String)| {
        calls.iter_mut().for_each(|(_, arguments)| arguments.retain(|c| c != ' '));
        (content, calls, reason)
    };
    for strict in [true, false] {
        let found = spaceless(ask(&server, one(&named, strict)).await);
        assert_eq!(found, (None, expected.clone(), "tool_calls".into()), "strict: {strict}");
    }
    let required = json!({"tools": [choose(json!({"enum": ["metre"]}), true)], "tool_choice": "required",
        "parallel_tool_calls": false});
    assert_eq!(spaceless(ask(&server, required).await), (None, expected, "tool_calls".into()));
    // Free to answer, it answers; and a form binds the answer beside tools.
    let (content, found, reason) = ask(&server, one(&json!("auto"), true)).await;
    assert_eq!(
        (content.as_deref(), found.len(), reason.as_str()),
        (Some("Hello there, this is an answer."), 0, "stop")
    );
    let form = json!({"structured_outputs": {"choice": ["yes"]}});
    let (content, found, _) = ask(&server, with(one(&json!("auto"), false), form)).await;
    assert!(content.as_deref() == Some("yes") || found.len() == 1, "{content:?} {found:?}");

    // A schema that cannot be kept to is refused if that is promised.
    let bad = |strict: bool, choice: Value| json!({"tools": [tool("add"), choose(json!({"$ref": "#/nowhere"}), strict)], "tool_choice": choice});
    for choice in [json!("auto"), json!("required"), named.clone()] {
        let reply = server.chat(with(tools(), bad(true, choice))).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, "invalid_value"));
        assert_eq!(reply.json()["error"]["param"], "tools[1].function.parameters");
    }
    let reply = server.chat(with(bad(false, named), json!({"max_tokens": 50}))).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "choose");
}
