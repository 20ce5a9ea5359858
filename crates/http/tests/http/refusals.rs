//! What is not accepted, and how that is said.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::harness::{
    CHAT, COMPLETIONS, Reply, Server, Setup, abacus_with, chat_body, generation, read_all, request, with,
};

const CANARY: &str = "canary-7c1f";

async fn still_serves(server: &Server) {
    assert_eq!(server.chat(json!({})).await.status, 200);
    server.blocks_are_free().await;
}

#[track_caller]
fn assert_refused(reply: &Reply, code: &str, param: Option<&str>, what: &dyn std::fmt::Debug) {
    assert_eq!(reply.status, 400, "{what:?}: {reply:?}");
    assert_eq!(reply.error_code(), code, "{what:?}: {reply:?}");
    assert_eq!(reply.json()["error"]["param"], json!(param), "{what:?}");
    assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
    assert!(!reply.body.contains(CANARY), "{reply:?}");
}

#[tokio::test]
async fn bad_parameters_are_refused_by_name_on_both_endpoints() {
    let server = Setup::default().start().await;
    let bias: Value = (0..2000).map(|id| (id.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let cases = [
        ("temperature", json!(-0.1), "out_of_range"),
        ("temperature", json!(2.1), "out_of_range"),
        ("temperature", json!(CANARY), "invalid_type"),
        ("temperature", json!(true), "invalid_type"),
        ("top_p", json!(0), "out_of_range"),
        ("top_p", json!(1.5), "out_of_range"),
        ("top_k", json!(-2), "out_of_range"),
        ("top_k", json!(1.5), "invalid_type"),
        ("min_p", json!(-1), "out_of_range"),
        ("repetition_penalty", json!(0), "out_of_range"),
        ("presence_penalty", json!(3), "out_of_range"),
        ("frequency_penalty", json!(-2.5), "out_of_range"),
        ("max_tokens", json!(0), "out_of_range"),
        ("max_tokens", json!(-1), "out_of_range"),
        ("max_tokens", json!(1e300), "out_of_range"),
        ("max_tokens", json!("12"), "invalid_type"),
        ("min_tokens", json!(-1), "out_of_range"),
        ("n", json!(0), "out_of_range"),
        ("n", json!(9), "out_of_range"),
        ("n", json!(1_000_000_000), "out_of_range"),
        ("seed", json!(1e30), "out_of_range"),
        ("seed", json!("x"), "invalid_type"),
        ("stop", json!(["a", "b", "c", "d", "e"]), "out_of_range"),
        ("stop", json!(vec![CANARY; 100_000]), "out_of_range"),
        ("stop", json!(""), "out_of_range"),
        ("stop", json!("x".repeat(5000)), "out_of_range"),
        ("stop", json!([1]), "invalid_type"),
        ("stop_token_ids", json!([1024]), "out_of_range"),
        ("stop_token_ids", json!(["1"]), "invalid_type"),
        ("stop_token_ids", json!(vec![1; 129]), "out_of_range"),
        ("logit_bias", json!({"7": 101}), "out_of_range"),
        ("logit_bias", json!({"1024": 1}), "out_of_range"),
        ("logit_bias", json!({CANARY: 1}), "invalid_value"),
        ("logit_bias", json!([1]), "invalid_type"),
        ("logit_bias", bias, "out_of_range"),
        ("stream", json!("yes"), "invalid_type"),
        ("stream_options", json!({"include_usage": true}), "invalid_value"),
        ("cache_salt", json!(""), "out_of_range"),
        ("cache_salt", json!("a b"), "out_of_range"),
        ("cache_salt", json!("x".repeat(129)), "out_of_range"),
        ("model", json!(5), "invalid_type"),
        ("unheard_of", json!(CANARY), "unknown_parameter"),
        ("suffix", json!(CANARY), "unsupported_parameter"),
        ("bad_words", json!([""]), "out_of_range"),
        ("bad_words", json!([5]), "invalid_type"),
        ("bad_words", json!(vec!["x"; 129]), "out_of_range"),
        ("allowed_token_ids", json!([]), "out_of_range"),
        ("allowed_token_ids", json!([5, 1024]), "out_of_range"),
        ("allowed_token_ids", json!("5"), "invalid_type"),
        ("prompt_logprobs", json!(21), "out_of_range"),
        ("prompt_logprobs", json!(-1), "out_of_range"),
        ("return_token_ids", json!("yes"), "invalid_type"),
        ("return_tokens_as_token_ids", json!(1), "invalid_type"),
        ("add_special_tokens", json!("x"), "invalid_type"),
        ("truncate_prompt_tokens", json!(0), "out_of_range"),
        ("truncate_prompt_tokens", json!(-2), "out_of_range"),
        ("priority", json!(1e12), "out_of_range"),
        ("deadline_ms", json!(0), "out_of_range"),
        ("deadline_ms", json!(1e15), "out_of_range"),
        ("chat_template", json!(CANARY), "unsupported_parameter"),
        ("prompt_embeds", json!(CANARY), "unsupported_parameter"),
        ("length_penalty", json!(0.5), "unsupported_parameter"),
        ("use_beam_search", json!(true), "unsupported_parameter"),
        ("spaces_between_special_tokens", json!(false), "unsupported_parameter"),
        ("audio", json!({"voice": CANARY}), "unsupported_parameter"),
        ("store", json!(true), "unsupported_parameter"),
    ];
    for (name, value, code) in cases {
        for (path, body) in [(CHAT, chat_body()), (COMPLETIONS, json!({"prompt": "hi"}))] {
            let body = with(body, json!({name: value.clone()}));
            let reply = server.post(path, &body).await;
            assert_refused(&reply, code, Some(name), &(path, name));
        }
    }
    for path in [CHAT, COMPLETIONS] {
        let cases = [
            (json!({"stream_options": {"include": 1}}), "unknown_parameter", "stream_options.include"),
            (
                json!({"stream_options": {"continuous_usage_stats": true}}),
                "invalid_value",
                "stream_options.continuous_usage_stats",
            ),
            (json!({"prompt_logprobs": 0}), "invalid_value", "prompt_logprobs"),
        ];
        for (fields, code, param) in cases {
            let body = if path == CHAT { chat_body() } else { json!({"prompt": "hi"}) };
            let reply = server.post(path, &with(with(body, json!({"stream": true})), fields)).await;
            assert_refused(&reply, code, Some(param), &(path, param));
        }
    }
    let reply = server.chat(json!({"min_tokens": 5, "max_tokens": 4})).await;
    assert_refused(&reply, "invalid_value", Some("min_tokens"), &"min above max");
    still_serves(&server).await;
}

#[tokio::test]
async fn bad_chats_are_refused_with_the_path_of_the_field() {
    let server = Setup::default().start().await;
    let user = json!({"role": "user", "content": "hi"});
    let kwargs: Value = (0..33).map(|i| (format!("k{i}"), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let cases = [
        (json!({"messages": null}), "missing_required_parameter", "messages"),
        (json!({"messages": []}), "out_of_range", "messages"),
        (json!({"messages": "hi"}), "invalid_type", "messages"),
        (json!({"messages": [user, 5]}), "invalid_type", "messages[1]"),
        (json!({"messages": [{"content": "x"}]}), "missing_required_parameter", "messages[0].role"),
        (json!({"messages": [{"role": CANARY, "content": "x"}]}), "out_of_range", "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": null}]}), "missing_required_parameter", "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "invalid_type", "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x", "mood": CANARY}]}),
            "unknown_parameter",
            "messages[0].mood",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}),
            "missing_required_parameter",
            "messages[0].tool_calls[0].function",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "x", "prefix": true}, user]}),
            "invalid_value",
            "messages[0].prefix",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x", "prefix": true}]}),
            "invalid_value",
            "messages[0].prefix",
        ),
        (json!({"echo": true}), "unsupported_parameter", "echo"),
        (json!({"best_of": 3}), "unsupported_parameter", "best_of"),
        (json!({"max_completion_tokens": 0}), "out_of_range", "max_completion_tokens"),
        (json!({"include_reasoning": "no"}), "invalid_type", "include_reasoning"),
        (json!({"top_logprobs": 2}), "invalid_value", "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "out_of_range", "top_logprobs"),
        (json!({"logprobs": 3}), "invalid_type", "logprobs"),
        (json!({"max_tokens": 3, "max_completion_tokens": 4}), "invalid_value", "max_completion_tokens"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "invalid_value",
            "continue_final_message",
        ),
        (json!({"reasoning_effort": CANARY}), "out_of_range", "reasoning_effort"),
        (json!({"thinking": {"type": "maybe"}}), "out_of_range", "thinking.type"),
        (json!({"chat_template_kwargs": {"a": [1]}}), "out_of_range", "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"a": "x".repeat(300)}}), "out_of_range", "chat_template_kwargs"),
        (json!({"chat_template_kwargs": kwargs}), "out_of_range", "chat_template_kwargs"),
        (json!({"messages": [{"role": "user", "content": "x".repeat(3000)}]}), "context_length_exceeded", "messages"),
        (json!({"max_tokens": 512}), "context_length_exceeded", "messages"),
        (json!({"max_tokens": 512, "stream": true}), "context_length_exceeded", "messages"),
    ];
    for (fields, code, param) in cases {
        let reply = server.chat(fields.clone()).await;
        assert_refused(&reply, code, Some(param), &param);
    }
    still_serves(&server).await;
}

#[tokio::test]
async fn bad_prompts_are_refused() {
    let server = Setup::default().start().await;
    let cases = [
        (json!({"prompt": null}), "missing_required_parameter", "prompt"),
        (json!({"prompt": []}), "out_of_range", "prompt"),
        (json!({"prompt": [[]]}), "out_of_range", "prompt"),
        (json!({"prompt": 5}), "invalid_type", "prompt"),
        (json!({"prompt": [1024]}), "out_of_range", "prompt"),
        (json!({"prompt": [-1]}), "out_of_range", "prompt"),
        (json!({"prompt": [[1], ["x"]]}), "invalid_type", "prompt[1]"),
        (json!({"prompt": vec!["x"; 65]}), "out_of_range", "prompt"),
        (json!({"prompt": vec![5; 512]}), "context_length_exceeded", "prompt"),
        (json!({"prompt": "x", "logprobs": 21}), "out_of_range", "logprobs"),
        (json!({"prompt": "x", "logprobs": true}), "invalid_type", "logprobs"),
        (json!({"prompt": "x", "messages": []}), "unknown_parameter", "messages"),
        (json!({"prompt": "x", "include_reasoning": false}), "unknown_parameter", "include_reasoning"),
        (json!({"prompt": "x", "best_of": 9}), "out_of_range", "best_of"),
        (json!({"prompt": "x", "best_of": 1, "n": 2}), "invalid_value", "best_of"),
        (json!({"prompt": "x", "best_of": 2, "stream": true}), "invalid_value", "best_of"),
        (json!({"prompt": vec!["x"; 64], "n": 5}), "out_of_range", "n"),
        (
            json!({"prompt": vec![vec![5; 500]; 64], "n": 4, "echo": true, "logprobs": 20, "max_tokens": 1}),
            "out_of_range",
            "logprobs",
        ),
        (json!({"prompt": vec!["x"; 64], "best_of": 5}), "out_of_range", "best_of"),
        (json!({"prompt": vec![5; 512], "echo": true, "max_tokens": 0}), "context_length_exceeded", "prompt"),
    ];
    for (body, code, param) in cases {
        let reply = server.post(COMPLETIONS, &body).await;
        assert_refused(&reply, code, Some(param), &body);
    }
    let reply = server.post(COMPLETIONS, &json!({"prompt": vec!["x"; 1_000_000]})).await;
    assert_refused(&reply, "invalid_json", None, &"a million prompts");
    still_serves(&server).await;
}

#[tokio::test]
async fn a_request_larger_than_the_whole_cache_is_refused_and_a_default_fits_it() {
    let mut setup = Setup::default();
    setup.spec.num_blocks = 20;
    setup.reply = "a".repeat(500);
    let server = setup.start().await;
    let reply = server.chat(json!({"max_tokens": 200})).await;
    assert_refused(&reply, "context_length_exceeded", Some("messages"), &"cache");
    let reply = server.chat(json!({})).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.json()["usage"]["total_tokens"], 81);
    server.blocks_are_free().await;
}

#[tokio::test]
async fn bodies_that_are_no_json_object_are_refused() {
    let server = Setup::default().start().await;
    let deep = |open: &str| open.repeat(100_000).into_bytes();
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"[]".to_vec(),
        b"\"text\"".to_vec(),
        b"17".to_vec(),
        b"{".to_vec(),
        b"{\"messages\": NaN}".to_vec(),
        b"{\"messages\": \"\\ud800\"}".to_vec(),
        b"{\"messages\": \"\xff\xfe\"}".to_vec(),
        b"{\"n\": 1, \"n\": 2}".to_vec(),
        b"{\"metadata\": {\"a\": 1, \"a\": 2}}".to_vec(),
        deep("["),
        deep("{\"a\":"),
        [&b"{\"metadata\":"[..], &deep("["), &deep("]"), b"}"].concat(),
    ];
    for path in [CHAT, COMPLETIONS] {
        for body in &bodies {
            // No content type: it is not looked at.
            let reply = server.raw(&request("POST", path, "", body)).await;
            let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
            assert_refused(&reply, "invalid_json", None, &start);
        }
    }
    still_serves(&server).await;
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_and_nothing_is_kept() {
    let server = Setup::default().start().await;
    let check = |reply: Reply| {
        assert_eq!(reply.status, 413, "{reply:?}");
        assert_eq!(reply.error_code(), "request_too_large");
        assert_eq!(reply.header("connection"), Some("close"));
    };
    // 100 MB, announced.
    check(server.raw(&request("POST", CHAT, "", &vec![b'['; 100 << 20])).await);

    // 20 MB in chunks, not announced.
    let mut stream = server.connect().await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = [&b"100000\r\n"[..], &vec![b' '; 1 << 20], b"\r\n"].concat();
    for _ in 0..20 {
        if stream.write_all(&chunk).await.is_err() {
            break;
        }
    }
    let _ = stream.write_all(b"0\r\n\r\n").await;
    check(read_all(stream).await);

    // A client that asks first is refused before it sends.
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n");
    check(server.raw(head.as_bytes()).await);

    let both = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n0\r\n\r\n"
    );
    assert_eq!(server.raw(both.as_bytes()).await.status, 400, "two lengths");
    still_serves(&server).await;
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_not_waited_for() {
    let mut setup = Setup::default();
    setup.config.body_timeout = std::time::Duration::from_millis(50);
    let server = setup.start().await;
    let reply = server.raw(format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{{").as_bytes()).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (408, "request_timeout"));
    still_serves(&server).await;
}

#[tokio::test]
async fn a_template_that_fails_or_never_ends_refuses_the_chat() {
    let cases = [
        (Some("{{ raise_exception('roles must alternate') }}"), "roles must alternate"),
        (Some("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"), "limit"),
        (Some("{{ messages[7].content.nothing }}"), "failed"),
        (None, "no chat template"),
    ];
    for (template, message) in cases {
        let (server, card) = Setup::default().start_loading().await;
        server.service.install(generation(&server.engine, &Arc::new(abacus_with(template)), card));
        let reply = server.chat(json!({})).await;
        assert_refused(&reply, "invalid_value", Some("messages"), &template);
        assert!(reply.body.contains(message), "{reply:?}");
        assert_eq!(server.completion(json!({})).await.status, 200);
    }
}

#[tokio::test]
async fn heads_over_the_limits_are_refused() {
    let server = Setup::default().start().await;
    let many = "a: b\r\n".repeat(200);
    assert_eq!(server.raw(&request("GET", "/live", &many, b"")).await.status, 431);
    let large = format!("a: {}\r\n", "x".repeat(200 << 10));
    assert_eq!(server.raw(&request("GET", "/live", &large, b"")).await.status, 431);
    still_serves(&server).await;
}

#[tokio::test]
async fn unknown_models_routes_and_methods() {
    let server = Setup::default().start().await;
    let reply = server.chat(json!({"model": CANARY})).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (404, "model_not_found"));
    assert!(!reply.body.contains(CANARY));
    for path in ["/nope", "/v1", "/v1/chat/completions/", "//v1/models", "/v1/../x", "/v1/models/", "/%ff"] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, 404, "{path}");
        reply.error_code();
    }
    for (path, method, allow) in [
        (CHAT, "GET", "POST"),
        (COMPLETIONS, "DELETE", "POST"),
        ("/v1/models", "POST", "GET,HEAD"),
        ("/v1/models/tiny", "PUT", "GET,HEAD"),
        ("/live", "POST", "GET,HEAD"),
        ("/metrics", "PATCH", "GET,HEAD"),
        ("/version", "BREW", "GET,HEAD"),
    ] {
        let reply = server.raw(&request(method, path, "", b"")).await;
        assert_eq!(reply.status, 405, "{method} {path}");
        assert_eq!(reply.error_code(), "method_not_allowed");
        assert_eq!(reply.header("allow"), Some(allow), "{method} {path}");
    }
    let options = server.raw(&request("OPTIONS", CHAT, "", b"")).await;
    assert_eq!((options.status, options.header("allow")), (204, Some("POST")));
    let head = server.raw(&request("HEAD", "/v1/models", "", b"")).await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
}

#[tokio::test]
async fn a_lenient_server_warns_instead() {
    let mut setup = Setup::default();
    setup.config.lenient = true;
    let server = setup.start().await;
    let reply = server.chat(json!({"unheard_of": 1, "suffix": "x", CANARY: 1})).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("warning"), Some("299 baton \"ignored parameters: unheard_of, suffix\""));
    assert_eq!(server.chat(json!({"temperature": 5})).await.status, 400, "ranges still hold");
}
