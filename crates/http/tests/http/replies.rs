//! What a reply looks like on the wire, streamed and whole, chat and completions.

use async_openai::types::chat::{CreateChatCompletionResponse, CreateChatCompletionStreamResponse};
use async_openai::types::completions::CreateCompletionResponse;
use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, CONTENT, REASONING, REPLY, Reply, Server, Setup, chat_body, generation, with};

async fn server() -> Server {
    Setup::default().start().await
}

/// Joins what a stream says of one choice in one field.
fn joined(chunks: &[Value], index: usize, field: &str) -> String {
    let of_choice = |chunk: &'_ Value| chunk["choices"].as_array().unwrap().first().cloned();
    let choices = chunks.iter().filter_map(of_choice).filter(|choice| choice["index"] == index);
    choices.filter_map(|choice| choice["delta"].get(field).or(choice.get(field))?.as_str().map(str::to_owned)).collect()
}

fn message(reply: &Reply) -> Value {
    reply.json()["choices"][0]["message"].clone()
}

#[tokio::test]
async fn a_whole_chat_reply_has_reasoning_content_and_usage() {
    let server = server().await;
    let reply = server.chat(json!({"model": "org/tiny"})).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let json = reply.json();
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], "org/tiny");
    assert_eq!(json["system_fingerprint"], "fp_test");
    let expected = json!({"role": "assistant", "content": CONTENT, "refusal": null,
        "reasoning_content": REASONING, "reasoning": REASONING});
    assert_eq!(json["choices"][0], json!({"index": 0, "message": expected, "logprobs": null, "finish_reason": "stop"}));
    let tokens = |text: &str| server.text.encode(text, false).unwrap().len();
    let usage = &json["usage"];
    assert_eq!(usage["completion_tokens"], tokens(REPLY) + 1, "the end token counts");
    assert_eq!(usage["total_tokens"], usage["prompt_tokens"].as_u64().unwrap() + tokens(REPLY) as u64 + 1);
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], tokens("<think>\nadd them\n</think>"));
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    serde_json::from_value::<CreateChatCompletionResponse>(json).unwrap();

    let again = server.chat(json!({})).await.json();
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_streamed_chat_keeps_to_the_order_of_chunks() {
    let server = server().await;
    let options =
        json!({"stream": true, "n": 3, "stream_options": {"include_usage": true, "include_obfuscation": true}});
    let reply = server.chat(options).await;
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    assert_eq!(reply.header("x-accel-buffering"), Some("no"));
    let chunks = reply.chunks();

    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert!(last["usage"]["completion_tokens"].as_u64().unwrap() > 0);
    let opening = |index| json!([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}]);
    for (index, chunk) in rest[..3].iter().enumerate() {
        assert_eq!(chunk["choices"], opening(index));
    }
    let mut finished = [false; 3];
    let mut content_began = [false; 3];
    for chunk in rest {
        serde_json::from_value::<CreateChatCompletionStreamResponse>(chunk.clone()).unwrap();
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["usage"], Value::Null);
        assert!(chunk.as_object().unwrap().contains_key("usage"));
        for field in ["id", "created", "model"] {
            assert_eq!(chunk[field], last[field]);
        }
        let choice = chunk["choices"][0].as_object().unwrap();
        let index = choice["index"].as_u64().unwrap() as usize;
        assert!(!finished[index], "a chunk after the finish");
        finished[index] = !choice["finish_reason"].is_null();
        let delta = choice["delta"].as_object().unwrap();
        assert_eq!(delta.get("reasoning"), delta.get("reasoning_content"));
        assert!(!(delta.contains_key("reasoning") && delta.contains_key("content")));
        assert!(!(content_began[index] && delta.contains_key("reasoning")), "reasoning comes first");
        content_began[index] |= delta.get("content").is_some_and(|text| text != "");
    }
    assert_eq!(finished, [true; 3]);
    for index in 0..3 {
        assert_eq!(joined(rest, index, "content"), CONTENT);
        assert_eq!(joined(rest, index, "reasoning_content"), REASONING);
    }
    let roles = rest.iter().filter(|chunk| chunk["choices"][0]["delta"].get("role").is_some()).count();
    assert_eq!(roles, 3);
}

#[tokio::test]
async fn without_include_usage_no_chunk_has_a_usage_key() {
    let reply = server().await.chat(json!({"stream": true})).await;
    for chunk in reply.chunks() {
        assert!(!chunk.as_object().unwrap().contains_key("usage"));
        assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn joined_chunks_equal_the_whole_and_no_stop_string_leaks() {
    let server = server().await;
    let cases = [
        (json!({}), "stop", CONTENT),
        (json!({"stop": "STOP"}), "stop", "Hello, wörld 你好! 12 "),
        (json!({"stop": ["34", " STOP 3"]}), "stop", "Hello, wörld 你好! 12"),
        (json!({"stop": "STOP", "include_stop_str_in_output": true}), "stop", "Hello, wörld 你好! 12 STOP"),
        (json!({"stop": ["好"]}), "stop", "Hello, wörld 你"),
        (json!({"stop": ["34 and more", "never"]}), "stop", CONTENT),
        (json!({"stop": "them"}), "stop", ""),
        (json!({"stop": "lo", "min_tokens": 1}), "stop", "Hel"),
        (json!({"stop": "lo", "min_tokens": 60}), "stop", CONTENT),
    ];
    for (fields, reason, content) in cases {
        let whole = server.chat(fields.clone()).await.json();
        assert_eq!(whole["choices"][0]["message"]["content"], content, "{fields}");
        assert_eq!(whole["choices"][0]["finish_reason"], reason, "{fields}");
        let chunks = server.chat(with(fields.clone(), json!({"stream": true}))).await.chunks();
        assert_eq!(joined(&chunks, 0, "content"), content, "{fields}");
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], reason, "{fields}");

        // Completions are not split, so markers and their white space are text there.
        let whole = server.completion(fields.clone()).await.json();
        let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
        assert!(REPLY.starts_with(&text), "{text}");
        assert!(text.ends_with(content), "{fields}: {text}");
        let chunks = server.completion(with(fields.clone(), json!({"stream": true}))).await.chunks();
        assert_eq!(joined(&chunks, 0, "text"), text, "{fields}");
        server.blocks_are_free().await;
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_work_and_counts_its_tokens() {
    let server = Setup { reply: "a".repeat(400), ..Setup::default() }.start().await;
    server.control.delay_steps(std::time::Duration::from_millis(2));
    let reply = server.chat(json!({"stop": "aaaaa"})).await.json();
    assert_eq!(reply["choices"][0]["message"]["content"], "");
    assert!(reply["usage"]["completion_tokens"].as_u64().unwrap() <= 5, "{reply}");
    server.blocks_are_free().await;
    assert!(server.engine.stats().generated_tokens < 100);
}

#[tokio::test]
async fn what_was_held_back_is_sent_at_the_end() {
    for (reply, stop) in [("<thi", "never"), ("Hi. STO", "STOP"), ("Hi \n", "\n\n")] {
        let server = Setup { reply: reply.into(), ..Setup::default() }.start().await;
        let whole = server.chat(json!({"stop": stop})).await.json();
        assert_eq!(whole["choices"][0]["message"]["content"], reply);
        let chunks = server.chat(json!({"stop": stop, "stream": true})).await.chunks();
        assert_eq!(joined(&chunks, 0, "content"), reply);
    }
}

#[tokio::test]
async fn a_length_cut_says_so_and_closes_half_a_character() {
    let server = Setup { reply: "你好".into(), ..Setup::default() }.start().await;
    assert!(server.text.encode("你", false).unwrap().len() > 1, "a character of several tokens");
    let cut = server.chat(json!({"max_completion_tokens": 1})).await.json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert_eq!(cut["choices"][0]["message"]["content"], "\u{fffd}");
    let chunks = server.chat(json!({"max_tokens": 1, "stream": true})).await.chunks();
    assert_eq!(joined(&chunks, 0, "content"), "\u{fffd}");
    let chunks = server.chat(json!({"stream": true})).await.chunks();
    assert_eq!(joined(&chunks, 0, "content"), "你好");
}

#[tokio::test]
async fn max_tokens_comes_from_the_request_then_the_checkpoint_then_the_context() {
    let setup = |max_new_tokens| {
        let defaults = baton_http::Defaults { max_new_tokens, ..Default::default() };
        Setup { reply: "a".repeat(2000), defaults, ..Setup::default() }
    };
    let used = |reply: Reply| reply.json()["usage"]["completion_tokens"].as_u64().unwrap();
    let server = setup(Some(7)).start().await;
    assert_eq!(used(server.chat(json!({})).await), 7);
    assert_eq!(used(server.chat(json!({"max_tokens": 9})).await), 9);
    assert_eq!(used(server.post(COMPLETIONS, &json!({"prompt": "x"})).await), 16);
    let server = setup(None).start().await;
    let reply = server.chat(json!({})).await;
    assert_eq!(reply.json()["usage"]["total_tokens"], 512, "the whole context");
}

#[tokio::test]
async fn chat_logprobs_cover_every_token_and_join_to_the_text() {
    let server = server().await;
    let fields = json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 200});
    let whole = server.chat(fields.clone()).await.json();
    let scores = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let bytes: Vec<u8> = scores
        .iter()
        .flat_map(|score| score["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8))
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), REPLY);
    assert_eq!(scores[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(scores[0]["logprob"], -0.5);
    serde_json::from_value::<CreateChatCompletionResponse>(whole).unwrap();

    let chunks = server.chat(with(fields, json!({"stream": true}))).await.chunks();
    let streamed: Vec<Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(streamed, scores);

    let cut = server.chat(json!({"logprobs": true, "stop": "STOP"})).await.json();
    let scores = cut["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let text: String = scores.iter().map(|score| score["token"].as_str().unwrap()).collect();
    assert!(!text.contains("ST"), "{text}");
}

#[tokio::test]
async fn completion_logprobs_are_parallel_arrays_with_offsets() {
    let server = server().await;
    let reply = server.completion(json!({"logprobs": 1, "max_tokens": 11})).await.json();
    serde_json::from_value::<CreateCompletionResponse>(reply.clone()).unwrap();
    let scores = &reply["choices"][0]["logprobs"];
    let text = reply["choices"][0]["text"].as_str().unwrap();
    let mut offset = 0;
    for (token, at) in scores["tokens"].as_array().unwrap().iter().zip(scores["text_offset"].as_array().unwrap()) {
        assert_eq!(at, offset);
        offset += token.as_str().unwrap().chars().count();
    }
    assert_eq!(offset, text.chars().count());
    for field in ["token_logprobs", "top_logprobs"] {
        assert_eq!(scores[field].as_array().unwrap().len(), 11);
    }
    let none = server.completion(json!({})).await.json();
    assert_eq!(none["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn completion_choices_are_numbered_by_prompt_and_sample() {
    let server = server().await;
    let body = json!({"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 4});
    let whole = server.post(COMPLETIONS, &body).await.json();
    assert_eq!(whole["object"], "text_completion");
    let indices: Vec<_> = whole["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(whole["usage"]["prompt_tokens"], 3, "each prompt once");
    assert_eq!(whole["usage"]["completion_tokens"], 16);
    // The first choice of a prompt computes it, the second finds it in the cache: that is not the client's saving.
    let body = json!({"prompt": vec![9; 40], "n": 2, "max_tokens": 4});
    let usage = server.post(COMPLETIONS, &body).await.json()["usage"].clone();
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    let body = json!({"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 4});
    let chunks = server.post(COMPLETIONS, &with(body, json!({"stream": true}))).await.chunks();
    let first: Vec<_> = chunks[..4].iter().map(|chunk| chunk["choices"][0]["index"].as_u64().unwrap()).collect();
    assert_eq!(first, [0, 1, 2, 3]);
    for chunk in &chunks {
        serde_json::from_value::<CreateCompletionResponse>(chunk.clone()).unwrap();
    }
}

#[tokio::test]
async fn thinking_can_be_switched_off_in_three_ways_and_prompts_render_alike() {
    let server = server().await;
    let tokens = |reply: Reply| reply.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    let on = tokens(server.chat(json!({"thinking": {"type": "enabled"}, "reasoning_effort": "high"})).await);
    for off in [
        json!({"reasoning_effort": "none"}),
        json!({"thinking": {"type": "disabled"}}),
        json!({"chat_template_kwargs": {"enable_thinking": false}, "reasoning_effort": "low"}),
    ] {
        assert!(tokens(server.chat(off.clone()).await) > on, "{off}");
    }
}

#[tokio::test]
async fn messages_of_all_roles_and_forms_are_taken() {
    let server = server().await;
    let messages = json!([
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "2 times 3?", "name": "ann"},
        {"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "calculator", "arguments": "{\"expression\":\"2*3\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "6"},
        {"role": "assistant", "content": "6", "refusal": null, "reasoning": "so"},
        {"role": "user", "content": "thanks"},
    ]);
    let reply = server.chat(json!({"messages": messages, "user": "ann", "metadata": {"a": "b"}, "store": false})).await;
    assert_eq!(reply.status, 200, "{reply:?}");

    let continued = json!([{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two"}]);
    let reply = server.chat(json!({"messages": continued, "continue_final_message": true})).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(message(&reply)["content"], CONTENT);
}

#[tokio::test]
async fn null_is_absent_and_neutral_values_of_unsupported_fields_are_taken() {
    let server = server().await;
    let nulls = json!({"temperature": null, "stop": null, "tools": null, "n": null, "unheard_of": null, "model": null,
        "logit_bias": null, "stream": null, "stream_options": null, "response_format": {"type": "text"}, "tools": []});
    for path in [CHAT, COMPLETIONS] {
        let body = if path == CHAT { chat_body() } else { json!({"prompt": "x"}) };
        let reply = server.post(path, &with(body, nulls.clone())).await;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

#[tokio::test]
async fn sampling_parameters_reach_the_engine() {
    // The mock's `Hash` model draws on every parameter; the script ignores them. Seeds: same seed, same text.
    let text = crate::harness::abacus();
    let model = baton_engine::sim::MockModel::Hash { seed: 1, vocab_size: 1024, end: None };
    let spec = Setup::default().spec;
    let runner = baton_engine::sim::MockRunner::new(spec, model);
    let (engine, _) = baton_engine::spawn(Box::new(runner), baton_engine::EngineConfig::default());
    let (server, card) = Setup::default().start_loading().await;
    server.service.install(generation(&engine, &std::sync::Arc::new(text), card));
    let generate = async |fields: Value| {
        let body = with(json!({"prompt": [9, 9], "seed": 5, "max_tokens": 8, "skip_special_tokens": false}), fields);
        let reply = server.post(COMPLETIONS, &body).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let choices = reply.json()["choices"].as_array().unwrap().clone();
        choices.into_iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let plain = generate(json!({})).await;
    assert_eq!(generate(json!({})).await, plain);
    for fields in [
        json!({"seed": 6}),
        json!({"temperature": 0.5}),
        json!({"top_p": 0.5}),
        json!({"top_k": 4}),
        json!({"min_p": 0.1}),
        json!({"repetition_penalty": 1.1}),
        json!({"presence_penalty": 0.5}),
        json!({"frequency_penalty": -0.5}),
        json!({"logit_bias": {"7": 5}}),
        json!({"min_tokens": 2}),
        json!({"bad_words": ["two words"]}),
        json!({"allowed_token_ids": [5, 6, 7]}),
    ] {
        assert_ne!(generate(fields.clone()).await, plain, "{fields}");
    }
    let choices = generate(json!({"n": 3})).await;
    assert_eq!(choices[0], plain[0], "choice 0 does not depend on n");
    assert!(choices[0] != choices[1] && choices[1] != choices[2]);
    assert_ne!(generate(json!({"seed": null})).await, generate(json!({"seed": null})).await);
}
