//! Tokens of texts and chats without an answer, and texts of tokens.

use serde_json::json;

use crate::harness::{CHAT, Setup, chat_body, with};

const RENDER: &str = "/v1/chat/completions/render";

#[tokio::test]
async fn a_chat_is_tokenized_and_rendered_to_the_prompt_that_it_is_answered_from() {
    let server = Setup::default().start().await;
    let usage = server.chat(json!({"max_tokens": 1})).await.json()["usage"].clone();
    let tokenized = server.post("/tokenize", &with(chat_body(), json!({"return_token_strs": true}))).await.json();
    let rendered = server.post(RENDER, &with(chat_body(), json!({"temperature": 0.5, "stop": "x"}))).await.json();
    assert_eq!(tokenized["count"], usage["prompt_tokens"]);
    assert_eq!(tokenized["tokens"], rendered["token_ids"]);
    assert_eq!((&tokenized["max_model_len"], &rendered["model"]), (&json!(512), &json!("tiny")));
    assert_eq!(tokenized["token_strs"].as_array().unwrap().len(), tokenized["count"].as_u64().unwrap() as usize);
    let text = rendered["prompt"].as_str().unwrap();
    assert!(text.contains("What is 1 + 1?"), "{text}");
    let back = server.post("/detokenize", &json!({"tokens": tokenized["tokens"]})).await.json();
    assert_eq!(back, json!({"prompt": text}));
    let again = json!({"prompt": text, "add_special_tokens": false});
    assert_eq!(server.post("/tokenize", &again).await.json()["tokens"], tokenized["tokens"]);
    let open = with(chat_body(), json!({"add_generation_prompt": false}));
    assert!(server.post("/tokenize", &open).await.json()["count"].as_u64() < tokenized["count"].as_u64());
    let tool =
        json!({"tools": [{"type": "function", "function": {"name": "add_up", "parameters": {"type": "object"}}}]});
    let with_tools = server.post(RENDER, &with(chat_body(), tool.clone())).await.json();
    assert!(with_tools["prompt"].as_str().unwrap().contains("add_up"), "{with_tools}");
    let tokens = server.post("/tokenize", &with(chat_body(), tool)).await.json();
    assert_eq!(tokens["tokens"], with_tools["token_ids"]);
    assert_eq!(server.engine.stats().finished.length, 1, "nothing but the chat itself is generated");
}

#[tokio::test]
async fn a_text_is_tokenized_as_completions_read_it() {
    let server = Setup::default().start().await;
    let reply = server.post("/tokenize", &json!({"model": "org/tiny", "prompt": "What is 1 + 1?"})).await.json();
    let usage = server.completion(json!({})).await.json()["usage"].clone();
    assert_eq!(reply["count"], usage["prompt_tokens"]);
    assert_eq!(reply["token_strs"], json!(null));
    let strings = json!({"prompt": "1 + 1", "return_token_strs": true, "add_special_tokens": false});
    let strings = server.post("/tokenize", &strings).await.json();
    let joined: String = strings["token_strs"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    assert_eq!(joined.replace('Ġ', " "), "1 + 1");
    // Nothing says that a text must fit into the context to be counted.
    let long = server.post("/tokenize", &json!({"prompt": "1 ".repeat(5000)})).await.json();
    assert!(long["count"].as_u64().unwrap() > 5000);
}

#[tokio::test]
async fn what_a_chat_would_be_refused_for_is_refused_here() {
    let server = Setup::default().start().await;
    for fields in [json!({"temperature": 5}), json!({"unheard_of": 1}), json!({"model": "other"}), json!({"n": 0})] {
        let body = with(chat_body(), fields);
        let chat = server.post(CHAT, &body).await;
        for path in [RENDER, "/tokenize"] {
            let reply = server.post(path, &body).await;
            assert_eq!((reply.status, &reply.body), (chat.status, &chat.body), "{path}");
            assert!(reply.status >= 400);
        }
    }
    for (path, body, code) in [
        ("/tokenize", json!({}), "missing_required_parameter"),
        ("/tokenize", json!({"prompt": 1}), "invalid_type"),
        ("/tokenize", json!({"prompt": "a", "unheard_of": 1}), "unknown_parameter"),
        ("/detokenize", json!({}), "missing_required_parameter"),
        ("/detokenize", json!({"tokens": [1_000_000]}), "out_of_range"),
        ("/detokenize", json!({"tokens": [-1]}), "out_of_range"),
        ("/detokenize", json!({"tokens": ["a"]}), "invalid_type"),
    ] {
        let reply = server.post(path, &body).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, code), "{path} {body}");
    }
}
