//! Embeddings, reranking and scores over an encoder that computes nothing: its numbers are made of the token ids.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_engine::{HiddenStates, PromptScores, Request, SamplingParams, Share};
use baton_http::{
    DecoderEmbeddings, DecoderPooling, EncoderEngine, EncoderFailure, EncoderRefusal, EncoderReply, EncoderSpec,
    EncoderStats, EncoderTask, KeyLimits, ListedKey, ModelCard, NewEncoder, Scopes,
};
use baton_text::{EncoderInput, TextFiles, TextModel, TokenizerFile};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::harness::{
    CHAT, COMPLETIONS, DIGEST, REPLY, Reply, Server, Setup, card, chat_body, eventually, request, script,
};
use crate::keys::listed;
use crate::usage;

const EMBEDDINGS: &str = "/v1/embeddings";
const WIDTH: usize = 4;
const CONTEXT: usize = 16;
const VOCAB: usize = 76;

/// Answers at once, or keeps what it is asked.
#[derive(Default)]
struct Mock {
    keeps: bool,
    refuses: Option<EncoderRefusal>,
    fails: Option<EncoderFailure>,
    scores: bool,
    kept: Mutex<Vec<EncoderReply>>,
    shares: Mutex<Vec<Share>>,
}

impl EncoderEngine for Mock {
    fn submit(
        &self,
        inputs: Vec<EncoderInput>,
        share: Share,
        _: Option<Instant>,
        reply: EncoderReply,
    ) -> Result<(), EncoderRefusal> {
        self.shares.lock().push(share);
        if let Some(refusal) = self.refuses {
            return Err(refusal);
        }
        for (index, input) in inputs.iter().enumerate() {
            let tokens = input.ids.len();
            if tokens > CONTEXT {
                return Err(EncoderRefusal::TooLong { index, tokens });
            }
            if tokens == 0 {
                return Err(EncoderRefusal::Empty { index });
            }
            if input.ids.iter().any(|&id| id as usize >= VOCAB) {
                return Err(EncoderRefusal::TokenOutOfRange { index });
            }
        }
        if self.keeps {
            self.kept.lock().push(reply);
            return Ok(());
        }
        let vector = |input: &EncoderInput| if self.scores { vec![score(input)] } else { embedding(input) };
        let result = self.fails.map_or_else(|| Ok(inputs.iter().map(vector).collect()), Err);
        // As an engine would: from a thread of its own.
        std::thread::spawn(move || reply.send(result));
        Ok(())
    }

    fn stats(&self) -> EncoderStats {
        let kept = self.kept.lock().len();
        EncoderStats { requests: kept, tokens: 7, alive: self.refuses.is_none(), ..EncoderStats::default() }
    }
}

fn embedding(input: &EncoderInput) -> Vec<f32> {
    let raw: Vec<f32> = (1..=WIDTH).map(|k| input.ids.iter().map(|&id| (id as f32 * k as f32).sin()).sum()).collect();
    let length = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
    raw.iter().map(|x| x / length).collect()
}

/// Of a pair: the tokens of the second text, told apart by their types.
fn score(input: &EncoderInput) -> f32 {
    input.type_ids.iter().sum::<u32>() as f32 / 16.0
}

fn text() -> Arc<TextModel> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../encoder/tests/data/bert/tokenizer.json");
    let json = std::fs::read(path).unwrap();
    let files = TextFiles {
        tokenizer: TokenizerFile::Json(&json),
        tokenizer_config: None,
        special_tokens_map: None,
        chat_template_jinja: None,
    };
    Arc::new(TextModel::new(&files).unwrap())
}

async fn start(mock: Mock) -> (Server, Arc<Mock>) {
    let (server, _) = Setup { drain_timeout: Duration::from_millis(100), ..Setup::default() }.start_loading().await;
    assert_eq!(server.post(EMBEDDINGS, &json!({"input": "x"})).await.error_code(), "model_loading");
    install(server, mock)
}

fn install(server: Server, mock: Mock) -> (Server, Arc<Mock>) {
    let engine = Arc::new(mock);
    let task = if engine.scores { EncoderTask::Score } else { EncoderTask::Embed };
    let spec = EncoderSpec { task, width: WIDTH, normalized: true, vocab_size: VOCAB, max_model_len: CONTEXT };
    server.service.install_encoder(NewEncoder { engine: engine.clone(), text: text(), card: card(DIGEST, "fp"), spec });
    (server, engine)
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn embeddings(reply: &Reply) -> Vec<Vec<f32>> {
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()["data"].as_array().unwrap().iter().map(|item| floats(&item["embedding"])).collect()
}

#[tokio::test]
async fn an_embedding_for_each_input_in_their_order_as_openai_writes_them() {
    let (server, _) = start(Mock::default()).await;
    let reply = server.post(EMBEDDINGS, &json!({"model": "tiny", "input": ["the cat", "x"], "user": "u"})).await;
    let json = reply.json();
    assert_eq!(json.as_object().unwrap().keys().collect::<Vec<_>>(), ["object", "data", "model", "usage"]);
    assert_eq!((&json["object"], &json["model"]), (&json!("list"), &json!("tiny")));
    assert_eq!(json["usage"], json!({"prompt_tokens": 4 + 3, "total_tokens": 7}));
    for (i, item) in json["data"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&item["object"], &item["index"]), (&json!("embedding"), &json!(i)));
    }
    assert_eq!(reply.header("x-baton-generation"), Some(DIGEST));
    let both = embeddings(&reply);
    assert_ne!(both[0], both[1]);
    // A text alone, and the ids that it becomes, alone and in a list.
    for input in [json!("the cat"), json!([2, 60, 61, 3]), json!([[2, 60, 61, 3]])] {
        assert_eq!(embeddings(&server.post(EMBEDDINGS, &json!({"input": input})).await), both[..1], "{input}");
    }
    usage::shown(&server, "requests", 4).await;
    usage::shown(&server, "prompt_tokens", 7 + 3 * 4).await;
}

#[tokio::test]
async fn base64_holds_the_same_floats() {
    let (server, _) = start(Mock::default()).await;
    let plain = embeddings(&server.post(EMBEDDINGS, &json!({"input": "x", "encoding_format": "float"})).await);
    let reply = server.post(EMBEDDINGS, &json!({"input": "x", "encoding_format": "base64"})).await.json();
    let base64 = reply["data"][0]["embedding"].as_str().unwrap();
    assert_eq!(base64.len(), (WIDTH * 4).div_ceil(3) * 4);
    assert_eq!(decode(base64), plain[0]);
}

/// Little-endian floats, decoded by hand.
fn decode(base64: &str) -> Vec<f32> {
    let digit = |b: u8| match b {
        b'A'..=b'Z' => b - b'A',
        b'a'..=b'z' => b - b'a' + 26,
        b'0'..=b'9' => b - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits = base64.trim_end_matches('=').bytes().map(digit);
    let bits: String = digits.map(|d| format!("{d:06b}")).collect();
    let bytes: Vec<u8> = bits
        .as_bytes()
        .chunks_exact(8)
        .map(|b| u8::from_str_radix(std::str::from_utf8(b).unwrap(), 2).unwrap())
        .collect();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[tokio::test]
async fn fewer_dimensions_are_the_first_ones_scaled_to_length_one_again() {
    let (server, _) = start(Mock::default()).await;
    let whole = embeddings(&server.post(EMBEDDINGS, &json!({"input": "x", "dimensions": WIDTH})).await).remove(0);
    let short = embeddings(&server.post(EMBEDDINGS, &json!({"input": "x", "dimensions": 2})).await).remove(0);
    let length = (whole[0] * whole[0] + whole[1] * whole[1]).sqrt();
    assert_eq!(short.len(), 2);
    assert!((short[0] - whole[0] / length).abs() < 1e-6 && (short[1] - whole[1] / length).abs() < 1e-6);
}

#[tokio::test]
async fn what_cannot_be_embedded_is_refused_by_field() {
    let (server, _) = start(Mock::default()).await;
    let long = "x ".repeat(CONTEXT);
    for (body, code, param) in [
        (json!({}), "missing_required_parameter", "input"),
        (json!({"input": null}), "missing_required_parameter", "input"),
        (json!({"input": 1}), "invalid_type", "input"),
        (json!({"input": []}), "out_of_range", "input"),
        (json!({"input": [[]]}), "out_of_range", "input"),
        (json!({"input": ["x", 1]}), "invalid_type", "input[1]"),
        (json!({"input": vec!["x"; 2049]}), "out_of_range", "input"),
        (json!({"input": ["x", long]}), "context_length_exceeded", "input[1]"),
        (json!({"input": long}), "context_length_exceeded", "input"),
        (json!({"input": [[1], [VOCAB]]}), "out_of_range", "input[1]"),
        (json!({"input": "x", "dimensions": 0}), "out_of_range", "dimensions"),
        (json!({"input": "x", "dimensions": WIDTH + 1}), "out_of_range", "dimensions"),
        (json!({"input": "x", "encoding_format": "int8"}), "out_of_range", "encoding_format"),
        (json!({"input": "x", "truncate_prompt_tokens": 0}), "out_of_range", "truncate_prompt_tokens"),
        (json!({"input": "x", "truncate_prompt_tokens": CONTEXT + 1}), "out_of_range", "truncate_prompt_tokens"),
        (json!({"input": "x", "truncate_prompt_tokens": 1}), "invalid_value", "input"),
        (json!({"input": "x", "temperature": 1}), "unknown_parameter", "temperature"),
        (json!({"input": "x", "model": "other"}), "model_not_found", "model"),
    ] {
        let reply = server.post(EMBEDDINGS, &body).await;
        let shown = body.to_string().chars().take(100).collect::<String>();
        assert_eq!((reply.error_code().as_str(), &reply.json()["error"]["param"]), (code, &json!(param)), "{shown}");
        assert_eq!(reply.status, if code == "model_not_found" { 404 } else { 400 }, "{shown}");
    }
    let many = server.post(EMBEDDINGS, &json!({"input": vec!["x"; 2048]})).await;
    assert_eq!(embeddings(&many).len(), 2048);
}

#[tokio::test]
async fn long_texts_are_cut_where_that_is_asked_for_and_keep_their_special_tokens() {
    let (server, _) = start(Mock::default()).await;
    let ask = async |input: Value, limit: i32| {
        let reply = server.post(EMBEDDINGS, &json!({"input": input, "truncate_prompt_tokens": limit})).await;
        (embeddings(&reply).remove(0), reply.json()["usage"]["prompt_tokens"].clone())
    };
    let long = json!("the cat x x x x x x x x x x x x x x x x x x");
    let plain = embeddings(&server.post(EMBEDDINGS, &json!({"input": "the cat"})).await).remove(0);
    assert_eq!(ask(long.clone(), 4).await, (plain.clone(), json!(4)));
    assert_eq!(ask(long, -1).await.1, json!(CONTEXT));
    assert_eq!(ask(json!([2, 60, 61, 3, 31, 31]), 4).await, (plain, json!(4)));
}

#[tokio::test]
async fn documents_come_back_best_first_with_their_places() {
    let (server, _) = start(Mock { scores: true, ..Mock::default() }).await;
    let documents = json!(["x", {"text": "the cat sits"}, "the cat", "man x"]);
    let body = json!({"query": "where?", "documents": documents, "model": "org/tiny"});
    for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
        let reply = server.post(path, &body).await.json();
        assert_eq!(reply.as_object().unwrap().keys().collect::<Vec<_>>(), ["id", "model", "usage", "results"]);
        assert!(reply["id"].as_str().unwrap().starts_with("rerank-"));
        assert_eq!(reply["model"], "org/tiny");
        let results = reply["results"].as_array().unwrap();
        let order: Vec<_> = results.iter().map(|result| result["index"].as_u64().unwrap()).collect();
        // Of equal ones the earlier is first.
        assert_eq!(order, [1, 2, 3, 0]);
        assert_eq!(results[0]["document"], json!({"text": "the cat sits"}));
        assert_eq!(results[0]["relevance_score"], 4.0 / 16.0);
        let query = 1 + 2 + 1;
        let pairs = [1, 3, 2, 2].map(|document| query + document + 1);
        assert_eq!(reply["usage"]["total_tokens"], json!(pairs.iter().sum::<i32>()));
    }
    let mut few = body.clone();
    (few["top_n"], few["return_documents"]) = (json!(2), json!(false));
    let reply = server.post("/v1/rerank", &few).await.json();
    assert_eq!(reply["results"].as_array().unwrap().len(), 2);
    assert!(reply["results"][0].get("document").is_none());

    for (field, value, code, param) in [
        ("query", Value::Null, "missing_required_parameter", "query"),
        ("documents", json!([]), "out_of_range", "documents"),
        ("documents", json!("x"), "invalid_type", "documents"),
        ("documents", json!(["x", 1]), "invalid_type", "documents[1]"),
        ("documents", json!([{"text": 1}]), "invalid_type", "documents[0].text"),
        ("documents", json!([{"text": "x", "image": "y"}]), "unknown_parameter", "documents[0].image"),
        ("documents", json!(["x", "x ".repeat(20)]), "context_length_exceeded", "documents[1]"),
        ("top_n", json!(0), "out_of_range", "top_n"),
        ("max_chunks_per_doc", json!(1), "unknown_parameter", "max_chunks_per_doc"),
    ] {
        let mut body = body.clone();
        body[field] = value;
        let reply = server.post("/v1/rerank", &body).await;
        assert_eq!((reply.error_code().as_str(), &reply.json()["error"]["param"]), (code, &json!(param)));
    }
}

#[tokio::test]
async fn one_text_is_scored_against_many_or_each_against_its_own() {
    let (server, _) = start(Mock { scores: true, ..Mock::default() }).await;
    let scores = |reply: &Reply| -> Vec<f64> {
        reply.json()["data"].as_array().unwrap().iter().map(|item| item["score"].as_f64().unwrap() * 16.0).collect()
    };
    for path in ["/score", "/v1/score"] {
        let reply = server.post(path, &json!({"text_1": "where?", "text_2": ["x", "the cat"]})).await;
        assert_eq!(scores(&reply), [2.0, 3.0]);
        let json = reply.json();
        let keys: Vec<_> = json.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["id", "object", "created", "model", "data", "usage"]);
        assert_eq!((&json["object"], &json["data"][1]["object"]), (&json!("list"), &json!("score")));
        assert_eq!(json["data"][1]["index"], 1);
    }
    let each = server.post("/score", &json!({"text_1": ["x", "the"], "text_2": ["the cat sits", "x"]})).await;
    assert_eq!(scores(&each), [4.0, 2.0]);
    assert_eq!(scores(&server.post("/score", &json!({"text_1": ["x"], "text_2": "x"})).await), [2.0]);
    let uneven = server.post("/score", &json!({"text_1": ["x", "x"], "text_2": ["x", "x", "x"]})).await;
    assert_eq!((uneven.error_code().as_str(), uneven.status), ("invalid_value", 400));
    // It embeds nothing.
    let reply = server.post(EMBEDDINGS, &json!({"input": "x"})).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (404, "not_for_this_model"));
}

#[tokio::test]
async fn a_model_that_embeds_scores_by_the_cosine() {
    let (server, _) = start(Mock::default()).await;
    let reply = server.post("/score", &json!({"text_1": "the cat", "text_2": ["the cat", "x"]})).await.json();
    let score = |i: usize| reply["data"][i]["score"].as_f64().unwrap();
    assert!((score(0) - 1.0).abs() < 1e-6, "{reply}");
    let both = embeddings(&server.post(EMBEDDINGS, &json!({"input": ["the cat", "x"]})).await);
    let cosine: f32 = both[0].iter().zip(&both[1]).map(|(a, b)| a * b).sum();
    assert!((score(1) - f64::from(cosine)).abs() < 1e-6, "{reply}");
    assert_eq!(reply["usage"]["prompt_tokens"], 4 + 4 + 3);
    let long = json!({"query": "x ".repeat(20), "documents": ["x"]});
    let refused = server.post("/v1/rerank", &long).await;
    assert_eq!(
        (refused.error_code().as_str(), &refused.json()["error"]["param"]),
        ("context_length_exceeded", &json!("query"))
    );
}

#[tokio::test]
async fn routes_for_another_kind_of_model_say_what_this_one_does() {
    let (server, _) = start(Mock::default()).await;
    for (path, body) in [(CHAT, chat_body()), (COMPLETIONS, json!({"prompt": "x"}))] {
        let reply = server.post(path, &body).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (404, "not_for_this_model"), "{path}");
        assert!(reply.body.contains(EMBEDDINGS), "{reply:?}");
    }
    let generates = Setup::default().start().await;
    for path in [EMBEDDINGS, "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"] {
        let body = match path {
            EMBEDDINGS => json!({"input": "x"}),
            "/score" | "/v1/score" => json!({"text_1": "x", "text_2": "x"}),
            _ => json!({"query": "x", "documents": ["x"]}),
        };
        let reply = generates.post(path, &body).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (404, "not_for_this_model"), "{path}");
        assert!(reply.body.contains(CHAT), "{reply:?}");
    }
}

#[tokio::test]
async fn a_model_that_generates_embeds_by_its_hidden_states() {
    for (pooling, hidden) in [(DecoderPooling::Last, HiddenStates::Last), (DecoderPooling::Mean, HiddenStates::All)] {
        let (server, card) = Setup::default().start_loading().await;
        server.install(ModelCard { embeddings: Some(DecoderEmbeddings { pooling, width: WIDTH }), ..card });
        let model = script(&server.text, REPLY);
        let expected = |prompt: &[u32]| {
            let prompt_scores = Some(PromptScores { hidden: Some(hidden), ..PromptScores::default() });
            let request = Request { prompt_scores, ..Request::new(prompt.to_vec(), SamplingParams::greedy(), 1) };
            let states = model.solo_scores(&request, 1024);
            let sum = |k: usize| states.iter().map(|state| state.hidden[k]).sum::<f32>();
            let sums: Vec<f32> = (0..WIDTH).map(sum).collect();
            let length = sums.iter().map(|x| x * x).sum::<f32>().sqrt();
            sums.iter().map(|x| x / length).collect::<Vec<f32>>()
        };
        let texts: Vec<String> = (0..100).map(|i| format!("What is {i} + 1?")).collect();
        let reply = server.post(EMBEDDINGS, &json!({"input": texts})).await;
        let ids: Vec<Vec<u32>> = texts.iter().map(|text| server.text.encode(text, true).unwrap()).collect();
        for (embedding, ids) in embeddings(&reply).iter().zip(&ids) {
            let expected = expected(ids);
            assert!(embedding.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{embedding:?} {expected:?}");
        }
        assert_eq!(reply.json()["usage"]["prompt_tokens"], json!(ids.iter().map(Vec::len).sum::<usize>()));
        let short = server.post(EMBEDDINGS, &json!({"input": ids[0], "dimensions": 2})).await;
        assert_eq!(embeddings(&short)[0].len(), 2);
        for (input, code, param) in [
            (json!([ids[0], vec![5; 512]]), "context_length_exceeded", "input[1]"),
            (json!([[1024]]), "out_of_range", "input"),
            (json!([[]]), "out_of_range", "input"),
        ] {
            let reply = server.post(EMBEDDINGS, &json!({"input": input})).await;
            assert_eq!((reply.error_code().as_str(), &reply.json()["error"]["param"]), (code, &json!(param)));
        }
        server.blocks_are_free().await;
        usage::shown(&server, "requests", 2).await;
    }
}

#[tokio::test]
async fn an_encoder_is_told_whose_turn_a_request_takes() {
    let key = |name: &str, weight| ListedKey {
        limits: KeyLimits { weight, ..KeyLimits::default() },
        ..listed(name, Scopes::INFERENCE)
    };
    let mut setup = Setup::default();
    setup.config.listed_keys = Some(vec![key("a", 1), key("b", 3)]);
    let (server, _) = setup.start_loading().await;
    let (server, engine) = install(server, Mock::default());
    for name in ["a", "b", "a"] {
        assert_eq!(server.post_with_key(EMBEDDINGS, name, &json!({"input": "x"})).await.status, 200);
    }
    let shares = engine.shares.lock().clone();
    assert_eq!(shares.iter().map(|share| share.weight).collect::<Vec<_>>(), [1, 3, 1]);
    assert!(shares[0] == shares[2] && shares[0].tenant != shares[1].tenant);
}

#[tokio::test]
async fn probes_models_and_metrics_know_an_encoder() {
    let (server, _) = start(Mock::default()).await;
    for path in ["/live", "/ready", "/startup"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["data"][1]["id"], "org/tiny");
    assert_eq!(models["data"][0]["max_model_len"], CONTEXT);
    assert_eq!(server.get("/v1/models/org/tiny").await.json(), models["data"][1]);
    assert_eq!(server.get("/v1/models/other").await.error_code(), "model_not_found");
    let metrics = server.get("/metrics").await.body;
    for line in
        ["baton_ready 1", r#"vllm:prompt_tokens_total{model_name="tiny",engine="0",generation="0123456789ab"} 7"#]
    {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    let (server, _) = start(Mock { refuses: Some(EncoderRefusal::Stopped), ..Mock::default() }).await;
    assert_eq!(server.get("/ready").await.error_code(), "engine_down");
    assert_eq!(server.get("/live").await.status, 503);
}

#[tokio::test]
async fn load_and_failures_have_the_statuses_that_clients_retry_by() {
    let full = Mock { refuses: Some(EncoderRefusal::QueueFull), ..Mock::default() };
    let late = Mock { fails: Some(EncoderFailure::Expired), ..Mock::default() };
    for mock in [full, late] {
        let (server, _) = start(mock).await;
        let reply = server.post(EMBEDDINGS, &json!({"input": "x"})).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (503, "overloaded"));
        assert_eq!(reply.header("retry-after"), Some("1"));
    }
    let (server, _) = start(Mock { fails: Some(EncoderFailure::NonFinite), ..Mock::default() }).await;
    let reply = server.post(EMBEDDINGS, &json!({"input": "x"})).await;
    assert_eq!((reply.status, reply.header("x-should-retry")), (500, Some("false")));
    let (server, _) = start(Mock { fails: Some(EncoderFailure::Failed), ..Mock::default() }).await;
    assert_eq!(server.post(EMBEDDINGS, &json!({"input": "x"})).await.error_code(), "engine_error");
}

#[tokio::test]
async fn a_client_that_leaves_is_not_waited_for_and_a_drain_that_lasts_too_long_ends_the_others() {
    let (server, mock) = start(Mock { keeps: true, ..Mock::default() }).await;
    let mut leaves = server.connect().await;
    leaves.write_all(&request("POST", EMBEDDINGS, "", br#"{"input": "x"}"#)).await.unwrap();
    eventually("the request arrives", || mock.kept.lock().len() == 1).await;
    assert!(mock.kept.lock()[0].wanted());
    drop(leaves);
    eventually("the client is missed", || !mock.kept.lock()[0].wanted()).await;

    let body = json!({"input": "x"});
    let stays = server.post(EMBEDDINGS, &body);
    let stop = async {
        eventually("the second arrives", || mock.kept.lock().len() == 2).await;
        server.shutdown.cancel();
    };
    let (reply, ()) = tokio::join!(stays, stop);
    assert_eq!((reply.status, reply.error_code().as_str()), (503, "draining"));
}
