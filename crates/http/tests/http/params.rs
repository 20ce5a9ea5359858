//! What parameters do to a reply, by the names and in the shapes that vLLM has for them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{
    CHAT, COMPLETIONS, CONTENT, REASONING, REPLY, Reply, Server, Setup, abacus_with, chat_body, generation, with,
};

async fn server() -> Server {
    Setup::default().start().await
}

#[track_caller]
fn ok(reply: &Reply) -> Value {
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap_or_else(|| panic!("no ids: {value}")).iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// All ids that a stream tells of its one choice.
fn streamed_ids(chunks: &[Value]) -> Vec<u32> {
    let told = chunks.iter().filter_map(|chunk| chunk["choices"][0].get("token_ids"));
    told.flat_map(ids).collect()
}

/// What lm-evaluation-harness reads: the scores from `context` on, but for the last, which belongs to a new token.
fn loglikelihood(choice: &Value, context: usize) -> (Vec<f64>, bool) {
    let scores = &choice["logprobs"];
    let count = scores["tokens"].as_array().unwrap().len();
    let range = context..count - 1;
    let logprobs = range.clone().map(|i| scores["token_logprobs"][i].as_f64().unwrap()).collect();
    let greedy = range.into_iter().all(|i| {
        let top = scores["top_logprobs"][i].as_object().unwrap();
        let best = top.iter().max_by(|a, b| a.1.as_f64().unwrap().total_cmp(&b.1.as_f64().unwrap())).unwrap();
        *best.0 == scores["tokens"][i]
    });
    (logprobs, greedy)
}

#[tokio::test]
async fn an_echo_scores_the_prompt_as_lm_eval_reads_it() {
    // The second model ends at once: its stop token is the one new token, and must not take a place of the prompt's.
    for reply in [REPLY, ""] {
        let server = Setup { reply: reply.into(), ..Setup::default() }.start().await;
        let prompts = [server.text.encode("What is 1 + 1? It is 2.", false).unwrap(), vec![9, 300, 7, 7]];
        for max_tokens in [0, 1] {
            let fields = json!({"prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "echo": true,
                "temperature": 0, "seed": 1234});
            let body = ok(&server.post(COMPLETIONS, &fields).await);
            for (i, prompt) in prompts.iter().enumerate() {
                let choice = &body["choices"][i];
                let scores = &choice["logprobs"];
                let tokens = scores["tokens"].as_array().unwrap();
                assert_eq!(tokens.len(), prompt.len() + max_tokens, "{reply:?} {max_tokens} {choice}");
                assert_eq!((&scores["token_logprobs"][0], &scores["top_logprobs"][0]), (&Value::Null, &Value::Null));
                for position in 1..prompt.len() {
                    assert!(scores["token_logprobs"][position].is_f64(), "{scores}");
                    assert!((1..=2).contains(&scores["top_logprobs"][position].as_object().unwrap().len()), "{scores}");
                }
                let (logprobs, _) = loglikelihood(choice, 2);
                assert_eq!(logprobs.len(), prompt.len() - 2 - (1 - max_tokens));
            }
            let usage = &body["usage"];
            assert_eq!(usage["prompt_tokens"], prompts.iter().map(Vec::len).sum::<usize>());
            assert_eq!(usage["completion_tokens"], 2 * max_tokens, "{reply:?}");
        }
    }
}

#[tokio::test]
async fn scores_of_an_echo_are_those_of_the_prompt_wherever_they_are_asked_for() {
    let server = server().await;
    let prompt = server.text.encode("What is 1 + 1?", false).unwrap();
    let fields = json!({"prompt": prompt, "max_tokens": 1, "logprobs": 3, "prompt_logprobs": 2, "echo": true});
    let choice = ok(&server.post(COMPLETIONS, &fields).await)["choices"][0].clone();
    let told = choice["prompt_logprobs"].as_array().unwrap();
    assert_eq!(told.len(), prompt.len());
    assert_eq!(told[0], Value::Null);
    for (i, (token, of_token)) in prompt.iter().zip(told).enumerate().skip(1) {
        let own = &of_token[token.to_string()];
        assert_eq!(own["logprob"], choice["logprobs"]["token_logprobs"][i]);
        assert_eq!(own["decoded_token"], choice["logprobs"]["tokens"][i]);
        let ranks: Vec<_> = of_token.as_object().unwrap().values().filter_map(|t| t["rank"].as_u64()).collect();
        assert!(ranks.contains(&1) && ranks.contains(&2) && (2..=3).contains(&ranks.len()), "{of_token}");
    }
    let alone = ok(&server.post(COMPLETIONS, &json!({"prompt": prompt, "prompt_logprobs": 0})).await);
    assert_eq!(alone["choices"][0]["prompt_logprobs"][3].as_object().unwrap().len(), 1, "only the token itself");
}

#[tokio::test]
async fn a_chat_tells_its_prompts_scores_beside_the_choices() {
    let server = server().await;
    let body = ok(&server.chat(json!({"prompt_logprobs": 1, "n": 2, "return_token_ids": true})).await);
    let told = body["prompt_logprobs"].as_array().unwrap();
    assert_eq!(told.len() as u64, body["usage"]["prompt_tokens"].as_u64().unwrap());
    for (token, of_token) in ids(&body["prompt_token_ids"]).iter().zip(told).skip(1) {
        assert!(of_token[token.to_string()]["logprob"].is_f64(), "{of_token}");
    }
    assert_eq!(body["choices"][1]["message"]["content"], CONTENT);
    assert!(ok(&server.chat(json!({})).await).get("prompt_logprobs").is_none());
}

#[tokio::test]
async fn an_echo_is_the_prompt_as_it_was_written_before_the_output() {
    let server = server().await;
    let prompt = "<｜User｜>Wie groß? 你好";
    for fields in [json!({"max_tokens": 0}), json!({"max_tokens": 100}), json!({"max_tokens": 100, "logprobs": 2})] {
        let fields = with(fields, json!({"prompt": [prompt, "x"], "echo": true, "n": 2}));
        let body = ok(&server.post(COMPLETIONS, &fields).await);
        let generated = if fields["max_tokens"] == 0 { "" } else { REPLY };
        for (i, choice) in body["choices"].as_array().unwrap().iter().enumerate() {
            let prompt = if i < 2 { prompt } else { "x" };
            let text = choice["text"].as_str().unwrap();
            assert_eq!(text, format!("{prompt}{generated}"), "{fields}");
            assert_eq!(choice["finish_reason"], if generated.is_empty() { "length" } else { "stop" });
            if fields.get("logprobs").is_some() {
                let scores = &choice["logprobs"];
                for (token, offset) in scores["tokens"].as_array().unwrap().iter().zip(ids(&scores["text_offset"])) {
                    let token = token.as_str().unwrap();
                    let at: String = text.chars().skip(offset as usize).collect();
                    assert!(at.starts_with(token) || token.starts_with("bytes:\\x"), "{token} at {offset} of {text}");
                }
            }
        }
        let chunks = server.post(COMPLETIONS, &with(fields.clone(), json!({"stream": true}))).await.chunks();
        for (i, choice) in body["choices"].as_array().unwrap().iter().enumerate() {
            let of_choice = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|c| c["index"] == i);
            let (mut text, mut tokens) = (String::new(), Vec::new());
            for chunk in of_choice {
                text += chunk["text"].as_str().unwrap();
                tokens.extend(chunk["logprobs"]["tokens"].as_array().cloned().unwrap_or_default());
            }
            assert_eq!(choice["text"], text);
            assert_eq!(choice["logprobs"].get("tokens").cloned().unwrap_or(json!([])), json!(tokens));
        }
    }
    server.blocks_are_free().await;
}

#[tokio::test]
async fn token_ids_are_all_that_went_in_and_came_out() {
    let server = server().await;
    let end = server.text.eos_token_id().unwrap();
    let all = [server.text.encode(REPLY, false).unwrap(), vec![end]].concat();
    let prompt = server.text.encode("What is 1 + 1?", true).unwrap();
    for stop in [json!(null), json!("STOP")] {
        let fields = json!({"return_token_ids": true, "stop": stop, "max_tokens": 100});
        let completion = ok(&server.completion(fields.clone()).await);
        let choice = &completion["choices"][0];
        assert_eq!(ids(&choice["prompt_token_ids"]), prompt);
        let told = ids(&choice["token_ids"]);
        assert_eq!(told.len() as u64, completion["usage"]["completion_tokens"].as_u64().unwrap());
        assert_eq!(told, all[..told.len()], "those of the stop string, and the end token, included");
        let chunks = server.completion(with(fields.clone(), json!({"stream": true}))).await.chunks();
        assert_eq!(streamed_ids(&chunks), told);
        let with_prompt = chunks.iter().filter_map(|chunk| chunk["choices"][0].get("prompt_token_ids"));
        assert_eq!(with_prompt.map(ids).collect::<Vec<_>>(), std::slice::from_ref(&prompt));

        let chat = ok(&server.chat(fields.clone()).await);
        assert_eq!(ids(&chat["choices"][0]["token_ids"]), told);
        let prompt = ids(&chat["prompt_token_ids"]);
        assert!(server.text.decode(&prompt, false).contains("What is 1 + 1?"));
        let chunks = server.chat(with(fields.clone(), json!({"stream": true}))).await.chunks();
        assert_eq!(streamed_ids(&chunks), told);
        let with_prompt: Vec<_> = chunks.iter().filter_map(|chunk| chunk.get("prompt_token_ids")).map(ids).collect();
        assert_eq!(with_prompt, [prompt]);
    }
    let plain = ok(&server.completion(json!({})).await);
    assert!(plain["choices"][0].get("token_ids").is_none());
}

#[tokio::test]
async fn tokens_can_be_written_as_their_ids() {
    let server = server().await;
    let first = server.text.encode(REPLY, false).unwrap()[0];
    let as_ids = json!({"return_tokens_as_token_ids": true, "max_tokens": 3});
    let chat = ok(&server.chat(with(as_ids.clone(), json!({"logprobs": true, "top_logprobs": 2}))).await);
    let score = &chat["choices"][0]["logprobs"]["content"][0];
    assert_eq!(score["token"], format!("token_id:{first}"));
    assert_eq!(score["top_logprobs"][1]["token"], format!("token_id:{}", first + 1));
    let completion = ok(&server.completion(with(as_ids, json!({"logprobs": 0}))).await);
    let scores = &completion["choices"][0]["logprobs"];
    assert_eq!(scores["tokens"][0], format!("token_id:{first}"));
    assert!(scores["top_logprobs"][0].get(format!("token_id:{first}")).is_some());
}

#[tokio::test]
async fn a_token_that_is_no_text_is_told_from_others_by_its_bytes() {
    let server = Setup { reply: "你".into(), ..Setup::default() }.start().await;
    let parts = server.text.encode("你", false).unwrap();
    assert!(parts.len() > 1, "a character of several tokens");
    let scores = ok(&server.completion(json!({"logprobs": 0})).await)["choices"][0]["logprobs"].clone();
    let expected = parts.iter().map(|&id| {
        let bytes = server.text.token_bytes(id);
        format!("bytes:{}", bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>())
    });
    assert_eq!(scores["tokens"], json!(expected.collect::<Vec<_>>()));
}

#[tokio::test]
async fn best_of_tells_n_and_counts_all() {
    let server = server().await;
    let body = ok(&server.completion(json!({"prompt": ["a", "b"], "n": 2, "best_of": 3, "max_tokens": 4})).await);
    let choices = body["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(choices.iter().all(|choice| choice["logprobs"].is_null()), "nobody asked for them");
    assert_eq!(body["usage"]["completion_tokens"], 2 * 3 * 4);
    server.blocks_are_free().await;
}

#[tokio::test]
async fn a_prompt_is_cut_at_its_beginning_if_that_is_asked_for() {
    let server = server().await;
    let long: Vec<u32> = (0..700).map(|i| 10 + i % 900).collect();
    let kept = async |fields: Value| {
        let body = with(json!({"prompt": long, "max_tokens": 4, "return_token_ids": true}), fields);
        ids(&ok(&server.post(COMPLETIONS, &body).await)["choices"][0]["prompt_token_ids"])
    };
    assert_eq!(kept(json!({"truncate_prompt_tokens": 5})).await, long[695..]);
    assert_eq!(kept(json!({"truncate_prompt_tokens": -1})).await, long[700 - (512 - 4)..]);
    assert_eq!(server.post(COMPLETIONS, &json!({"prompt": long})).await.status, 400, "never silently");

    let echo = json!({"prompt": "one two three four", "truncate_prompt_tokens": 2, "echo": true, "max_tokens": 0});
    let text = ok(&server.post(COMPLETIONS, &echo).await)["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!("one two three four".ends_with(&text) && text.len() < 10, "{text}");

    let user = json!({"messages": [{"role": "user", "content": "x ".repeat(600)}]});
    for cut in [json!(-1), json!(20)] {
        let fields = with(user.clone(), json!({"truncate_prompt_tokens": cut, "max_tokens": 30}));
        let body = ok(&server.chat(fields).await);
        let expected = if cut == 20 { 20 } else { 512 - 30 };
        assert_eq!(body["usage"]["prompt_tokens"], expected);
        assert_eq!(body["choices"][0]["message"]["reasoning_content"], REASONING);
    }
}

#[tokio::test]
async fn every_chunk_tells_the_tokens_so_far_if_that_is_asked_for() {
    let server = server().await;
    let fields = json!({"stream": true, "n": 2,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    for path in [CHAT, COMPLETIONS] {
        let body = if path == CHAT { chat_body() } else { json!({"prompt": "What is 1 + 1?", "max_tokens": 50}) };
        let chunks = server.post(path, &with(body, fields.clone())).await.chunks();
        let totals: Vec<_> = chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64().unwrap()).collect();
        assert!(totals.is_sorted() && totals[0] == 0, "{totals:?}");
        assert!(totals.iter().collect::<std::collections::BTreeSet<_>>().len() > 10, "{totals:?}");
        let prompt = chunks[0]["usage"]["prompt_tokens"].as_u64().unwrap();
        assert!(prompt > 0 && chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"] == prompt));
        assert_eq!(chunks.last().unwrap()["choices"], json!([]));
    }
}

#[tokio::test]
async fn hidden_reasoning_shows_neither_text_nor_scores_nor_ids() {
    let server = server().await;
    let fields = json!({"include_reasoning": false, "logprobs": true, "top_logprobs": 0, "return_token_ids": true});
    for stop in [json!(null), json!("STOP"), json!("</think>\n\nHello, and more")] {
        let fields = with(fields.clone(), json!({"stop": stop}));
        let body = ok(&server.chat(fields.clone()).await);
        let choice = &body["choices"][0];
        assert!(choice["message"].get("reasoning").is_none() && choice["message"].get("reasoning_content").is_none());
        let content = choice["message"]["content"].as_str().unwrap();
        assert!(CONTENT.starts_with(content) && content.len() > 20, "{content}");
        let scores = choice["logprobs"]["content"].as_array().unwrap();
        let shown: Vec<u8> = scores.iter().flat_map(|score| ids(&score["bytes"])).map(|byte| byte as u8).collect();
        // The token in which a stop string begins is shown.
        let shown = String::from_utf8(shown).unwrap();
        assert!(shown.strip_prefix(content).is_some_and(|rest| rest.len() <= 1), "{shown}");
        let told = server.text.decode(&ids(&choice["token_ids"]), true);
        assert!(told.starts_with(content) && !told.contains("add"), "{told}");
        assert!(body["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 3);

        let reply = server.chat(with(fields.clone(), json!({"stream": true}))).await;
        assert!(!reply.body.contains("reasoning") && !reply.body.contains("think"), "{}", reply.body);
        assert_eq!(streamed_ids(&reply.chunks()), ids(&choice["token_ids"]));
    }
    // It never stops thinking, or never begins.
    for (reply, shown) in [("<think>\nadd them", false), ("no thoughts", true)] {
        let server = Setup { reply: reply.into(), ..Setup::default() }.start().await;
        let choice = ok(&server.chat(fields.clone()).await)["choices"][0].clone();
        assert_eq!(choice["message"]["content"], if shown { reply } else { "" });
        assert_eq!(!ids(&choice["token_ids"]).is_empty(), shown, "{choice}");
        assert_eq!(!choice["logprobs"]["content"].as_array().unwrap().is_empty(), shown, "{choice}");
    }
}

#[tokio::test]
async fn an_effort_reaches_the_template_in_a_word_that_it_knows() {
    let deepseek = "{{ thinking }} {{ reasoning_effort }}";
    let own = "{% if reasoning_effort == 'medium' %}{% endif %}{{ thinking }} {{ reasoning_effort }}";
    let cases = [
        (deepseek, json!({"reasoning_effort": "minimal"}), "True low"),
        (deepseek, json!({"reasoning_effort": "low"}), "True low"),
        (deepseek, json!({"reasoning_effort": "medium"}), "True high"),
        (deepseek, json!({"reasoning_effort": "xhigh"}), "True high"),
        (deepseek, json!({"reasoning_effort": "max"}), "True max"),
        (deepseek, json!({"reasoning_effort": "none"}), "False "),
        (deepseek, json!({"thinking": {"type": "enabled"}}), "True "),
        (deepseek, json!({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}), "False max"),
        (own, json!({"reasoning_effort": "medium"}), "True medium"),
        (own, json!({"reasoning_effort": "max", "chat_template_kwargs": {"reasoning_effort": "odd"}}), "True odd"),
        (own, json!({"reasoning_effort": "max", "chat_template_kwargs": {"thinking": false}}), "False max"),
    ];
    for (template, fields, prompt) in cases {
        let (server, card) = Setup::default().start_loading().await;
        server.service.install(generation(&server.engine, &Arc::new(abacus_with(Some(template))), card));
        let body = ok(&server.chat(with(fields.clone(), json!({"return_token_ids": true, "max_tokens": 1}))).await);
        assert_eq!(server.text.decode(&ids(&body["prompt_token_ids"]), false), prompt, "{fields}");
    }
}

#[tokio::test]
async fn reasoning_of_earlier_turns_reaches_the_template_by_both_names() {
    let template = "{% for m in messages %}{{ m.reasoning_content }}={{ m.reasoning }};{% endfor %}";
    let (server, card) = Setup::default().start_loading().await;
    server.service.install(generation(&server.engine, &Arc::new(abacus_with(Some(template))), card));
    let messages = json!([{"role": "assistant", "content": "4", "reasoning_content": "a"},
        {"role": "assistant", "content": "4", "reasoning": "b"}]);
    let body = ok(&server.chat(json!({"messages": messages, "return_token_ids": true, "max_tokens": 1})).await);
    assert_eq!(server.text.decode(&ids(&body["prompt_token_ids"]), false), "a=a;b=b;");
}

#[tokio::test]
async fn a_prefix_is_continued_as_a_final_message_is() {
    let server = server().await;
    let prompt = async |last: Value, fields: Value| {
        let messages = json!([{"role": "user", "content": "Count."}, last]);
        let fields = with(fields, json!({"messages": messages, "return_token_ids": true}));
        ids(&ok(&server.chat(fields).await)["prompt_token_ids"])
    };
    let message = json!({"role": "assistant", "content": "One, two"});
    let prefix = with(message.clone(), json!({"prefix": true}));
    let continued = prompt(prefix, json!({})).await;
    assert!(server.text.decode(&continued, false).ends_with("One, two"));
    assert_eq!(continued, prompt(message.clone(), json!({"continue_final_message": true})).await);
    assert_ne!(continued, prompt(message, json!({})).await);
}

#[tokio::test]
async fn a_request_is_not_answered_beyond_its_deadline() {
    let server = Setup { reply: "a".repeat(400), ..Setup::default() }.start().await;
    server.control.delay_steps(Duration::from_millis(20));
    let reply = server.chat(json!({"deadline_ms": 60})).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (408, "deadline_exceeded"));
    let reply = server.completion(json!({"deadline_ms": 200, "stream": true})).await;
    let events = reply.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "deadline_exceeded", "an error, and no [DONE]");
    assert!(events.len() > 2, "{events:?}");
    server.blocks_are_free().await;
    assert!(server.engine.stats().generated_tokens < 100);
    assert_eq!(server.chat(json!({"deadline_ms": 60_000, "max_tokens": 2})).await.status, 200);
}
