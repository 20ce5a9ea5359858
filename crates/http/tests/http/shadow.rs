//! The candidate answers unseen: what is compared, and that no client can tell.

use std::sync::Arc;
use std::time::Duration;

use baton_engine::EngineConfig;
use baton_engine::sim::MockModel;
use baton_http::{ShadowStats, Traffic};
use serde_json::{Value, json};

use crate::harness::{COMPLETIONS, Other, Server, Setup, abacus, abacus_with, eventually, read_until, script, with};

/// A server of which model 0 serves, and a candidate that shadows every request.
async fn start(serving: MockModel, candidate: MockModel, config: EngineConfig) -> (Server, Other, Other) {
    let server = Setup::default().start_loading().await.0;
    let text = Arc::new(abacus());
    let (first, new) = Other::new(0, serving, EngineConfig::default(), text.clone());
    server.service.install(new);
    let (second, new) = Other::new(1, candidate, config, text);
    server.service.stage(new).unwrap();
    server.service.set_traffic(Traffic::Shadow(1.0)).unwrap();
    (server, first, second)
}

fn hash(seed: u64) -> MockModel {
    MockModel::Hash { seed, vocab_size: 1024, end: None }
}

fn says(reply: &str) -> MockModel {
    script(&abacus(), reply)
}

fn stats(server: &Server) -> ShadowStats {
    server.service.observed().unwrap().shadow
}

async fn until(server: &Server, what: &str, condition: impl Fn(&ShadowStats) -> bool) -> ShadowStats {
    eventually(what, || condition(&stats(server))).await;
    stats(server)
}

const PLAIN: &str = "one two three four five six";

#[tokio::test]
async fn the_same_model_gives_the_same_tokens_whatever_is_asked() {
    // The mock's tokens depend on prompt, seed and every sampling parameter.
    let (server, _first, _second) = start(hash(1), hash(1), EngineConfig::default()).await;
    // Seeds are random: none shall end at its first token, behind which no time per token is known.
    let bodies = [
        json!({"prompt": "What is 1 + 1?", "max_tokens": 20, "ignore_eos": true}),
        json!({"prompt": "What?", "max_tokens": 20, "ignore_eos": true, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1}),
        json!({"prompt": [[1, 2], [3, 4]], "n": 2, "max_tokens": 9, "ignore_eos": true, "stream": true}),
        json!({"prompt": "a", "max_tokens": 9, "ignore_eos": true, "min_tokens": 5, "logit_bias": {"7": 1}, "cache_salt": "s"}),
    ];
    for body in &bodies {
        assert_eq!(server.post(COMPLETIONS, body).await.status, 200);
    }
    assert_eq!(server.chat(json!({"max_tokens": 20, "ignore_eos": true})).await.status, 200);
    let stats = until(&server, "compared", |s| s.compared == 5).await;
    assert_eq!((stats.equal, stats.started, stats.failed, stats.skipped), (5, 5, 0, 0), "{stats:?}");
    assert_eq!(stats.compared_tokens, stats.agreed_tokens);
    assert!(stats.compared_tokens > 9, "{stats:?}");
    assert_eq!(stats.serving_time_to_first_token.count(), 5);
    assert_eq!(stats.candidate_time_per_output_token.count(), 5);
    let observed = server.service.observed().unwrap();
    assert_eq!((observed.serving.requests, observed.candidate.unwrap().requests), (5, 0), "clients only");
}

#[tokio::test]
async fn another_model_is_seen_to_differ_and_its_tokens_are_shown_to_nobody() {
    let (server, first, second) = start(says(PLAIN), says("one two three FOUR"), EngineConfig::default()).await;
    for stream in [false, true] {
        let reply = server.chat(json!({"stream": stream})).await;
        assert_eq!(reply.header("x-baton-generation"), Some(first.digest.as_str()));
        assert!(!reply.body.contains("FOUR") && !reply.body.contains("fp_1"), "{reply:?}");
    }
    let stats = until(&server, "compared", |s| s.compared == 2).await;
    assert_eq!(stats.equal, 0);
    assert!(0 < stats.agreed_tokens && stats.agreed_tokens < stats.compared_tokens, "{stats:?}");
    let metrics = server.get("/metrics").await.body;
    let label = format!("generation=\"{}\",result=\"different\"}} 2\n", &second.digest[..12]);
    assert!(metrics.lines().any(|line| format!("{line}\n").ends_with(&label)), "{metrics}");
}

#[tokio::test]
async fn stop_strings_cut_both_sides_alike() {
    let (server, _first, second) = start(says(PLAIN), says(PLAIN), EngineConfig::default()).await;
    second.control.delay_steps(Duration::from_millis(2));
    let reply = server.chat(json!({"stop": "three"})).await;
    assert_eq!(reply.json()["choices"][0]["message"]["content"], "one two ");
    let stats = until(&server, "compared", |s| s.compared == 1).await;
    assert_eq!((stats.equal, stats.compared_tokens), (1, stats.agreed_tokens));
    // The candidate knows nothing of stop strings: it is told to end there.
    eventually("aborted", || second.engine.stats().finished.aborted == 1).await;
}

#[tokio::test]
async fn the_candidate_renders_with_its_own_template() {
    let server = Setup::default().start_loading().await.0;
    let text = Arc::new(abacus());
    let (first, new) = Other::new(0, says(PLAIN), EngineConfig::default(), text);
    server.service.install(new);
    let text = Arc::new(abacus_with(Some("{{ messages[0].content }}")));
    let (second, new) = Other::new(1, says(PLAIN), EngineConfig::default(), text.clone());
    server.service.stage(new).unwrap();
    server.service.set_traffic(Traffic::Shadow(1.0)).unwrap();
    assert_eq!(server.chat(json!({})).await.status, 200);
    until(&server, "compared", |s| s.compared == 1).await;
    let own = text.encode("What is 1 + 1?", false).unwrap().len() as u64;
    assert_eq!(second.engine.stats().prefix_query_tokens, own);
    assert!(first.engine.stats().prefix_query_tokens > own);
}

#[tokio::test]
async fn a_candidate_that_cannot_answer_fails_no_client() {
    let server = Setup::default().start_loading().await.0;
    let (_first, new) = Other::saying(0, PLAIN);
    server.service.install(new);
    let text = Arc::new(abacus_with(Some("{{ raise_exception('no') }}")));
    let (second, new) = Other::new(1, says(PLAIN), EngineConfig::default(), text);
    server.service.stage(new).unwrap();
    server.service.set_traffic(Traffic::Shadow(1.0)).unwrap();
    let fine = async |body: Value| assert_eq!(server.post(COMPLETIONS, &body).await.status, 200);

    assert_eq!(server.chat(json!({})).await.status, 200);
    until(&server, "the template has failed", |s| s.failed == 1).await;
    second.control.fail_steps(1);
    fine(json!({"prompt": "x"})).await;
    until(&server, "a step has failed", |s| s.failed == 2).await;
    second.control.panic_steps(1);
    fine(json!({"prompt": "x"})).await;
    until(&server, "a step has panicked", |s| s.failed == 3).await;
    second.control.not_finite_on_token(700);
    fine(json!({"prompt": [5, 700]})).await;
    let stats = until(&server, "not finite", |s| s.non_finite == 1).await;
    assert_eq!((stats.failed, stats.started, stats.compared), (4, 4, 0), "{stats:?}");
    second.engine.shutdown();
    eventually("down", || !second.engine.stats().alive).await;
    fine(json!({"prompt": "x"})).await;
    assert_eq!(stats, self::stats(&server), "nothing is asked of what is down");
}

#[tokio::test]
async fn a_slow_candidate_delays_nobody_and_is_spared_what_it_cannot_take() {
    let config = EngineConfig { max_num_seqs: 1, max_queued: 3, ..EngineConfig::default() };
    let (server, _first, second) = start(says(PLAIN), says(PLAIN), config).await;
    second.control.hang();
    server.chat(json!({})).await;
    eventually("it hangs", || second.engine.stats().step_under_way.is_some()).await;
    for _ in 0..20 {
        assert_eq!(server.chat(json!({})).await.status, 200);
    }
    // One runs and three wait; the rest found the queue full. None has ended, so none is counted but those.
    let stats = until(&server, "skipped", |s| s.skipped == 17).await;
    assert_eq!((stats.started, stats.compared), (0, 0));
    second.control.release();
    let stats = until(&server, "compared", |s| s.compared == 4).await;
    assert_eq!((stats.started, stats.equal), (4, 4));
}

#[tokio::test]
async fn there_are_never_more_than_eight_at_once() {
    let (server, _first, second) = start(says(PLAIN), says(PLAIN), EngineConfig::default()).await;
    second.control.hang();
    for _ in 0..20 {
        assert_eq!(server.chat(json!({})).await.status, 200);
    }
    assert_eq!(until(&server, "skipped", |s| s.skipped > 0).await.skipped, 12);
    second.control.release();
    until(&server, "compared", |s| s.compared == 8).await;
}

#[tokio::test]
async fn a_shadow_outlives_its_client_and_not_its_candidate() {
    let (server, first, second) = start(says(&PLAIN.repeat(9)), says(&PLAIN.repeat(9)), EngineConfig::default()).await;
    first.control.delay_steps(Duration::from_millis(5));
    second.control.delay_steps(Duration::from_millis(5));
    let mut client = server.open_chat(json!({"stream": true})).await;
    read_until(&mut client, "\"delta\":{\"content\"").await;
    drop(client);
    let stats = until(&server, "the client has left", |s| s.uncompared == 1).await;
    assert_eq!((stats.started, second.engine.stats().finished.stop), (1, 1), "it ran to its end");

    second.control.delay_steps(Duration::from_millis(20));
    let body = json!({"stream": true});
    let mut client = server.open_chat(with(body, json!({"model": "tiny"}))).await;
    eventually("both run", || first.engine.stats().running + second.engine.stats().running == 2).await;
    let retired = server.service.withdraw().unwrap();
    tokio::time::timeout(crate::harness::PATIENCE, retired.ended()).await.expect("it ends at once");
    eventually("aborted", || second.engine.stats().finished.aborted == 1).await;
    assert_eq!(second.engine.stats().blocks.used, 0);
    read_until(&mut client, "[DONE]").await;
}
