//! Tools on the bundled model, which knows one calculator: what it calls by itself, and what it is made to call.

use std::path::Path;

use baton_loadgen::{Client, LocalServer};
use serde_json::{Value, json};

async fn server() -> LocalServer {
    let binary = Path::new(env!("CARGO_BIN_EXE_baton"));
    LocalServer::start(binary, &["--log-level", "warn"]).await.expect("it starts")
}

fn calculator() -> Value {
    let expression = json!({"type": "string", "pattern": "^[0-9]{1,6}[-+*][0-9]{1,6}$"});
    let parameters = json!({
        "type": "object", "properties": {"expression": expression}, "required": ["expression"],
        "additionalProperties": false,
    });
    json!({"type": "function", "function":
        {"name": "calculator", "description": "A calculator.", "parameters": parameters, "strict": true}})
}

/// A tool that the model has never seen.
fn forecast() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    json!({"type": "function", "function":
        {"name": "get_forecast", "description": "A forecast.", "parameters": parameters, "strict": true}})
}

/// Asks, and gives the first choice.
async fn ask(client: &Client, question: &str, fields: Value) -> Value {
    let mut body = json!({
        "model": "abacus", "temperature": 0, "max_tokens": 200, "tools": [calculator(), forecast()],
        "messages": [{"role": "user", "content": question}],
    });
    for (name, value) in fields.as_object().expect("fields") {
        body[name] = value.clone();
    }
    let (status, reply) = client.post("/v1/chat/completions", &body).await.expect("an answer");
    assert_eq!(status, 200, "{reply}");
    reply["choices"][0].clone()
}

/// The names and arguments of a choice that is only calls.
fn calls(choice: &Value) -> Vec<(String, Value)> {
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    assert_eq!(choice["message"]["content"], Value::Null, "{choice}");
    let call = |call: &Value| {
        let arguments = call["function"]["arguments"].as_str().expect("text");
        let name = call["function"]["name"].as_str().expect("a name").to_owned();
        (name, serde_json::from_str(arguments).expect("arguments are JSON"))
    };
    choice["message"]["tool_calls"].as_array().expect("calls").iter().map(call).collect()
}

fn is_forecast(arguments: &Value) -> bool {
    let days = arguments["days"].as_u64().unwrap_or(0);
    ["Paris", "Rome"].iter().any(|city| arguments["city"] == *city) && (1..=9).contains(&days)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_and_its_result_make_an_answer() {
    let server = server().await;
    let client = server.client();
    let question = "What is 482 * 937?";
    let choice = ask(&client, question, json!({})).await;
    assert_eq!(calls(&choice), [("calculator".to_owned(), json!({"expression": "482*937"}))]);
    assert!(choice["message"]["reasoning_content"].as_str().is_some_and(|thought| thought.contains("482")));

    // The message goes back as it came.
    let id = &choice["message"]["tool_calls"][0]["id"];
    let messages = json!([
        {"role": "user", "content": question},
        choice["message"],
        {"role": "tool", "tool_call_id": id, "content": "451634"},
    ]);
    let choice = ask(&client, question, json!({"messages": messages})).await;
    assert_eq!(choice["finish_reason"], "stop", "{choice}");
    assert!(choice["message"]["content"].as_str().is_some_and(|answer| answer.contains("451634")), "{choice}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_choice_of_tools_is_kept_to_and_so_are_strict_schemas() {
    let server = server().await;
    let client = server.client();
    let small = "What is 12 + 30?";
    let choice = ask(&client, small, json!({})).await;
    assert_eq!(choice["finish_reason"], "stop", "it needs no tool: {choice}");

    for thinking in [true, false] {
        let fields = |choice: Value| {
            json!({"tool_choice": choice, "parallel_tool_calls": false,
                "chat_template_kwargs": {"enable_thinking": thinking}})
        };
        let required = calls(&ask(&client, small, fields(json!("required"))).await);
        assert_eq!(required.len(), 1, "{required:?}");
        let (name, arguments) = &required[0];
        match name.as_str() {
            "calculator" => assert!(arguments["expression"].is_string(), "{arguments}"),
            name => assert!(name == "get_forecast" && is_forecast(arguments), "{required:?}"),
        }
        let named = json!({"type": "function", "function": {"name": "get_forecast"}});
        let named = calls(&ask(&client, small, fields(named)).await);
        assert!(
            matches!(&named[..], [(name, arguments)] if name == "get_forecast" && is_forecast(arguments)),
            "{named:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_that_cannot_be_kept_to_is_refused_where_it_stands() {
    let server = server().await;
    let bad = json!({"type": "function", "function":
        {"name": "bad", "strict": true, "parameters": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}}});
    let body = json!({
        "model": "abacus", "tools": [calculator(), bad], "messages": [{"role": "user", "content": "Hello."}],
    });
    let (status, reply) = server.client().post("/v1/chat/completions", &body).await.expect("a refusal");
    assert_eq!((status.as_u16(), &reply["error"]["param"]), (400, &json!("tools[1].function.parameters")), "{reply}");
}
