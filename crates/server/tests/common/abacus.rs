//! The bundled model's evaluation, asked over HTTP.

use std::{fs, path::Path, sync::Arc};

use baton_loadgen::{Client, LocalServer};
use serde_json::{Value, json};

/// The folder of the bundled model.
pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus");

/// The rows of one of its files.
pub fn rows(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(Path::new(MODEL).join(name)).expect(name);
    text.lines().map(|l| serde_json::from_str(l).expect("one JSON object per line")).collect()
}

/// One row's answer: its text after thinking, its calls, the bytes of its tokens, the prompt's length.
pub struct Answer {
    content: String,
    calls: Vec<Value>,
    pub bytes: Vec<u8>,
    pub prompt_tokens: Value,
}

/// Asks a row, with its tools if it has some.
async fn chat(client: &Client, row: &Value) -> Answer {
    let body = json!({
        "model": "abacus", "temperature": 0, "max_tokens": 200, "logprobs": true, "messages": row["messages"],
        "tools": row["tools"],
    });
    let (status, reply) = client.post("/v1/chat/completions", &body).await.expect("an answer");
    assert_eq!(status, 200, "{}: {reply}", row["id"]);
    let choice = &reply["choices"][0];
    let tokens = choice["logprobs"]["content"].as_array().expect("logprobs of every token");
    let bytes = tokens.iter().flat_map(|t| t["bytes"].as_array().expect("bytes"));
    let message = &choice["message"];
    assert_eq!(choice["finish_reason"] == "tool_calls", message.get("tool_calls").is_some(), "{choice}");
    Answer {
        content: message["content"].as_str().unwrap_or("").trim().to_owned(),
        calls: message["tool_calls"].as_array().cloned().unwrap_or_default(),
        bytes: bytes.map(|b| b.as_u64().expect("a byte") as u8).collect(),
        prompt_tokens: reply["usage"]["prompt_tokens"].clone(),
    }
}

/// As the evaluation of the model judges it: the whole answer, or the tool called with its arguments.
pub fn is_right(row: &Value, answer: &Answer) -> bool {
    let Some(wanted) = row.get("tool_call") else {
        return answer.calls.is_empty() && answer.content == row["answer"].as_str().expect("an answer");
    };
    let [call] = &answer.calls[..] else { return false };
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().expect("text")).expect("JSON");
    answer.content.is_empty() && *wanted == json!({"name": call["function"]["name"], "arguments": arguments})
}

/// Asks all questions, at most 32 at a time, and gives each with its answer.
pub async fn ask(server: &Arc<LocalServer>, questions: &[Value]) -> Vec<(Value, Answer)> {
    let calls: Vec<_> = questions
        .chunks(questions.len().div_ceil(32))
        .map(|chunk| {
            let (chunk, client) = (chunk.to_vec(), server.client());
            tokio::spawn(async move {
                let mut answers = Vec::new();
                for row in chunk {
                    let answer = chat(&client, &row).await;
                    answers.push((row, answer));
                }
                answers
            })
        })
        .collect();
    let mut answers = Vec::new();
    for call in calls {
        answers.extend(call.await.expect("no panic"));
    }
    answers
}
