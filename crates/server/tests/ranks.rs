//! The bundled model over HTTP on one rank and on two: the same greedy replies, with drafts and without.

use std::path::Path;

use baton_loadgen::LocalServer;
use serde_json::{Value, json};

const QUESTIONS: [&str; 4] =
    ["What is 347 + 286?", "Which is larger, 512 or 215?", "Sort these numbers: 31 7 202 45", "What is 12 * 7?"];

/// Starts a server with these flags, whose weights no instruction set makes narrow, and asks it everything at once.
async fn replies(flags: &[&str]) -> Vec<Value> {
    let binary = Path::new(env!("CARGO_BIN_EXE_baton"));
    let flags = [&["--log-level", "warn", "--dtype", "float32"], flags].concat();
    let server = LocalServer::start(binary, &flags).await.expect("it starts");
    let ask = |question: &str| {
        let body = json!({
            "model": "abacus", "messages": [{"role": "user", "content": question}], "max_tokens": 120, "temperature": 0,
        });
        let client = server.client();
        tokio::spawn(async move {
            let (status, reply) = client.post("/v1/chat/completions", &body).await.expect("an answer");
            assert_eq!(status, 200, "{reply}");
            reply["choices"][0]["message"].clone()
        })
    };
    let mut replies = Vec::new();
    for call in QUESTIONS.map(ask) {
        replies.push(call.await.expect("an answer"));
    }
    replies
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_reply_what_one_replies() {
    let plain = replies(&[]).await;
    let ranks = ["--tensor-parallel-size", "2"];
    assert_eq!(replies(&ranks).await, plain);
    let config = r#"{"method": "mtp", "num_speculative_tokens": 1}"#;
    assert_eq!(replies(&[&ranks[..], &["--speculative-config", config]].concat()).await, plain);
}
