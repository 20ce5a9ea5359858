//! The bundled model over HTTP, against what transformers answers to the same questions
//! (`models/abacus/eval_reference.jsonl`: float32, greedy, at most 200 new tokens).

mod common;

use std::{fs, path::Path, sync::Arc};

use baton_loadgen::{Client, LocalServer};
use baton_text::TextModel;
use serde_json::{Value, json};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus");
/// From a step on at which the reference's two best logits are closer than this, texts may differ.
const CLEAR_MARGIN: f64 = 0.5;
const END: &str = "<｜end▁of▁sentence｜>";

fn rows(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(Path::new(MODEL).join(name)).expect(name);
    text.lines().map(|l| serde_json::from_str(l).expect("one JSON object per line")).collect()
}

/// One row's answer: its text after thinking, its calls, the bytes of its tokens, the prompt's length.
struct Answer {
    content: String,
    calls: Vec<Value>,
    bytes: Vec<u8>,
    prompt_tokens: Value,
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
fn is_right(row: &Value, answer: &Answer) -> bool {
    let Some(wanted) = row.get("tool_call") else {
        return answer.calls.is_empty() && answer.content == row["answer"].as_str().expect("an answer");
    };
    let [call] = &answer.calls[..] else { return false };
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().expect("text")).expect("JSON");
    answer.content.is_empty() && *wanted == json!({"name": call["function"]["name"], "arguments": arguments})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_as_right_as_the_references_and_tokens_equal_up_to_a_near_tie() {
    let binary = Path::new(env!("CARGO_BIN_EXE_baton"));
    let server = Arc::new(LocalServer::start(binary, &["--log-level", "warn"]).await.expect("it starts"));
    let text = common::text_model(Path::new(MODEL));
    let questions = rows("eval.jsonl");
    let references = rows("eval_reference.jsonl");
    assert_eq!(questions.len(), 360);

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

    let (mut right, mut right_reference, mut compared) = (0, 0, 0);
    for call in calls {
        for (row, answer) in call.await.expect("no panic") {
            let reference = references.iter().find(|r| r["id"] == row["id"]).expect("a reference for every row");
            right += u32::from(is_right(&row, &answer));
            right_reference += u32::from(reference["right"] == true);
            assert_eq!(answer.prompt_tokens, reference["prompt_tokens"], "{}", row["id"]);
            compared += compare(&text, &row["id"], &answer.bytes, reference);
        }
    }
    assert!(compared > 15_000, "only {compared} tokens were compared");
    assert!(
        right.abs_diff(right_reference) * 100 <= 360,
        "{right} of 360 right, the reference has {right_reference}: more than a point apart"
    );
}

/// Compares the bytes of all tokens up to the first that the reference chose by a small margin, and
/// says how many those are. The end token is not sent.
fn compare(text: &TextModel, id: &Value, bytes: &[u8], reference: &Value) -> usize {
    let margins = reference["margins"].as_array().expect("margins").iter().map(|m| m.as_f64().expect("a number"));
    let clear = margins.take_while(|m| *m >= CLEAR_MARGIN).count();
    let ids = reference["output_ids"].as_array().expect("ids").iter().map(|i| i.as_u64().expect("an id") as u32);
    let end = text.token_id(END).expect("an end token");
    let clear: Vec<u32> = ids.take(clear).filter(|&i| i != end).collect();
    let wanted: Vec<u8> = clear.iter().flat_map(|&i| text.token_bytes(i)).collect();
    assert!(
        bytes.starts_with(&wanted),
        "{id}: {:?} does not begin with {:?}",
        String::from_utf8_lossy(bytes),
        String::from_utf8_lossy(&wanted)
    );
    clear.len()
}
