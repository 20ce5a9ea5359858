//! Parameters on the bundled model over HTTP: what they promise of its own numbers.

mod common;

use std::path::Path;

use baton_loadgen::{Client, LocalServer};
use serde_json::{Value, json};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus");

/// As the model's template writes a question.
const QUESTION: &str = "<｜begin▁of▁sentence｜><｜User｜>What is 7 + 5?<｜Assistant｜>";

async fn server() -> LocalServer {
    LocalServer::start(Path::new(env!("CARGO_BIN_EXE_baton")), &["--log-level", "warn"]).await.expect("it starts")
}

async fn complete(client: &Client, body: Value) -> Value {
    let (status, reply) = client.post("/v1/completions", &body).await.expect("an answer");
    assert_eq!(status, 200, "{body}: {reply}");
    reply
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|n| n.as_f64().expect("a number")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_echo_scores_what_was_generated_as_the_generation_did() {
    let server = server().await;
    let client = server.client();
    let fields = json!({"prompt": QUESTION, "max_tokens": 20, "temperature": 0,
        "logprobs": 3, "return_token_ids": true, "ignore_eos": true});
    let choice = complete(&client, fields).await["choices"][0].clone();
    let all = [&choice["prompt_token_ids"], &choice["token_ids"]].map(|ids| ids.as_array().expect("ids").clone());
    let echoed = json!({"prompt": all.concat(), "max_tokens": 1, "temperature": 0, "logprobs": 3, "echo": true});
    let echo = complete(&client, echoed).await["choices"][0]["logprobs"].clone();
    let prompt = all[0].len();
    let scored = &echo["token_logprobs"].as_array().expect("scores")[prompt..prompt + 20];
    assert_eq!(floats(&json!(scored)), floats(&choice["logprobs"]["token_logprobs"]), "to the last bit");
    let top = &echo["top_logprobs"].as_array().expect("maps")[prompt..prompt + 20];
    assert_eq!(json!(top), choice["logprobs"]["top_logprobs"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_best_of_several_is_the_likeliest_that_the_same_seed_gives() {
    let server = server().await;
    let client = server.client();
    let ask = async |n: u32, best_of: u32| {
        let fields = json!({"prompt": "So", "max_tokens": 12, "temperature": 2,
            "seed": 3, "logprobs": 0, "n": n, "best_of": best_of, "ignore_eos": true});
        complete(&client, fields).await["choices"].as_array().expect("choices").clone()
    };
    let mean = |choice: &Value| {
        let logprobs = floats(&choice["logprobs"]["token_logprobs"]);
        logprobs.iter().sum::<f64>() / logprobs.len() as f64
    };
    let mut all = ask(6, 6).await;
    all.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let texts = |choices: &[Value]| choices.iter().map(|choice| choice["text"].clone()).collect::<Vec<_>>();
    assert_eq!(texts(&ask(2, 6).await), texts(&all[..2]));
    assert_ne!(texts(&all[..1]), texts(&all[5..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn words_and_ids_that_are_not_allowed_are_not_written() {
    let server = server().await;
    let client = server.client();
    let ask = async |extra: Value| {
        let mut fields = json!({"prompt": QUESTION, "max_tokens": 40, "temperature": 0,
            "return_token_ids": true});
        fields.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        complete(&client, fields).await["choices"][0].clone()
    };
    let plain = ask(json!({})).await;
    let ids = |choice: &Value| -> Vec<u32> { serde_json::from_value(choice["token_ids"].clone()).expect("ids") };
    // A token that is a word of its own, so that the word is that token.
    let text = common::text_model(Path::new(MODEL));
    let is_word = |id: &u32| {
        let word = text.decode(&[*id], true);
        !word.trim().is_empty() && !word.starts_with(' ') && text.encode(&word, false).is_ok_and(|ids| ids == [*id])
    };
    let bad = ids(&plain).into_iter().find(is_word).expect("a word among forty tokens");
    let without = ask(json!({"bad_words": [text.decode(&[bad], true)]})).await;
    assert!(!ids(&without).contains(&bad), "{without}");
    let id = plain["token_ids"][1].clone();
    let only = ask(json!({"allowed_token_ids": [id], "max_tokens": 5})).await;
    assert_eq!(only["token_ids"], json!([id, id, id, id, id]));
}
