//! Questions with known answers, asked over HTTP: the rows of `models/abacus/eval.jsonl`, judged as the model's own
//! evaluation judges them.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{Client, Target};

/// Rows that are asked at a time.
const TOGETHER: usize = 32;

/// The answer to a row.
#[derive(Debug)]
pub struct Answer {
    /// What follows the reasoning.
    content: String,
    calls: Vec<Value>,
    /// Of all tokens, without the one that ends.
    pub bytes: Vec<u8>,
    /// As the server counts them.
    pub prompt_tokens: Value,
}

impl Answer {
    /// Whether it is the whole answer, or the one call of a tool with its arguments, that the row wants.
    pub fn is_right(&self, row: &Value) -> bool {
        let Some(wanted) = row.get("tool_call") else {
            return self.calls.is_empty() && Some(&*self.content) == row["answer"].as_str();
        };
        let [call] = &self.calls[..] else { return false };
        let arguments =
            call["function"]["arguments"].as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        self.content.is_empty() && *wanted == json!({"name": call["function"]["name"], "arguments": arguments})
    }
}

/// The rows of a file: questions, or what was answered to them.
///
/// # Errors
/// It cannot be read, or a line is not JSON.
pub fn rows(file: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Asks all rows, at most 32 at a time, and gives each with its answer.
///
/// # Errors
/// A call that fails, or a reply that is not whole.
pub async fn ask(target: &Target, rows: &[Value]) -> Result<Vec<(Value, Answer)>> {
    let calls: Vec<_> = rows
        .chunks(rows.len().div_ceil(TOGETHER).max(1))
        .map(|chunk| {
            let (chunk, client) = (chunk.to_vec(), Client::new(target.clone()));
            tokio::spawn(async move {
                let mut answers = Vec::new();
                for row in chunk {
                    let answer = chat(&client, &row).await.with_context(|| row["id"].to_string())?;
                    answers.push((row, answer));
                }
                anyhow::Ok(answers)
            })
        })
        .collect();
    let mut answers = Vec::new();
    for call in calls {
        answers.extend(call.await??);
    }
    Ok(answers)
}

/// Asks a row, with its tools if it has some.
async fn chat(client: &Client, row: &Value) -> Result<Answer> {
    let body = json!({
        "model": "abacus", "temperature": 0, "max_tokens": 200, "logprobs": true, "messages": row["messages"],
        "tools": row["tools"],
    });
    let (status, reply) = client.post("/v1/chat/completions", &body).await?;
    ensure!(status == 200, "{status}: {reply}");
    let choice = &reply["choices"][0];
    let message = &choice["message"];
    ensure!((choice["finish_reason"] == "tool_calls") == message.get("tool_calls").is_some(), "{choice}");
    let tokens = choice["logprobs"]["content"].as_array().context("no logprobs")?;
    let bytes = tokens.iter().flat_map(|token| token["bytes"].as_array().into_iter().flatten());
    let bytes = bytes.map(|byte| byte.as_u64().and_then(|byte| u8::try_from(byte).ok()).context("a byte"));
    Ok(Answer {
        content: message["content"].as_str().unwrap_or_default().trim().to_owned(),
        calls: message["tool_calls"].as_array().cloned().unwrap_or_default(),
        bytes: bytes.collect::<Result<_>>()?,
        prompt_tokens: reply["usage"]["prompt_tokens"].clone(),
    })
}
