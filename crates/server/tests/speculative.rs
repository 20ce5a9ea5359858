//! Drafts change no reply: the bundled model over HTTP, with each method and without.

use std::path::Path;

use baton_loadgen::LocalServer;
use serde_json::{Value, json};

const QUESTIONS: [&str; 4] =
    ["What is 347 + 286?", "Which is larger, 512 or 215?", "Sort these numbers: 31 7 202 45", "What is 12 * 7?"];
/// Temperature and frequency penalty.
const KINDS: [(f64, f64); 3] = [(0.0, 0.0), (1.0, 0.0), (0.8, 0.4)];

/// Starts a server with these flags and asks it everything at once. All choices with their logprobs.
async fn replies(flags: &[&str]) -> (Vec<Value>, LocalServer) {
    let binary = Path::new(env!("CARGO_BIN_EXE_baton"));
    let server = LocalServer::start(binary, &[&["--log-level", "warn"], flags].concat()).await.expect("it starts");
    let ask = |question: &str, (temperature, penalty): (f64, f64)| {
        let body = json!({
            "model": "abacus", "messages": [{"role": "user", "content": question}], "n": 2, "max_tokens": 120,
            "temperature": temperature, "frequency_penalty": penalty, "seed": 5, "logprobs": true, "top_logprobs": 3,
        });
        let client = server.client();
        tokio::spawn(async move {
            let (status, reply) = client.post("/v1/chat/completions", &body).await.expect("an answer");
            assert_eq!(status, 200, "{reply}");
            reply["choices"].clone()
        })
    };
    let calls: Vec<_> = QUESTIONS.iter().flat_map(|question| KINDS.map(|kind| ask(question, kind))).collect();
    let mut replies = Vec::new();
    for call in calls {
        replies.push(call.await.expect("an answer"));
    }
    (replies, server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drafts_of_either_method_are_accepted_and_change_no_token_and_no_logprob() {
    let (plain, server) = replies(&[]).await;
    assert!(server.metric("vllm:spec_decode_num_drafts_total").await.is_err(), "no drafts, no counters");
    for config in [
        r#"{"method": "ngram", "num_speculative_tokens": 3, "disable_by_batch_size": 64}"#,
        r#"{"method": "mtp", "num_speculative_tokens": 1, "disable_by_batch_size": 64}"#,
    ] {
        let (drafted, server) = replies(&["--speculative-config", config]).await;
        assert!(drafted == plain, "{config} changed a reply");
        let accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total").await.expect("a counter");
        let drafts = server.metric("vllm:spec_decode_num_draft_tokens_total").await.expect("a counter");
        let least = if config.contains("mtp") { 0.6 } else { 0.1 };
        assert!(accepted > 100.0 * least && accepted > drafts * least, "{config}: {accepted} of {drafts} accepted");
    }
}
