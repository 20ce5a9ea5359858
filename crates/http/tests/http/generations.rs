//! One generation replaces another: what requests, streams, metrics and memory see of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use baton_engine::Adapter;
use baton_http::{Adapters, NewGeneration, Retired, Traffic, TransitionError};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::harness::{
    CHAT, COMPLETIONS, DIGEST, Other, PATIENCE, Reply, Server, Setup, chat_body, eventually, read_until, request, with,
};

const GENERATION: &str = "x-baton-generation";

/// What the model of a number says.
fn says(number: u32) -> String {
    format!("model {number} says {number} and {number} again")
}

/// A server whose first model is number 0.
async fn start() -> (Server, Other) {
    let server = Setup::default().start_loading().await.0;
    let (first, new) = Other::saying(0, &says(0));
    assert!(server.service.install(new).is_none());
    (server, first)
}

/// A chat under this request id.
async fn chat_as(server: &Server, id: &str, fields: Value) -> Reply {
    let body = with(chat_body(), fields).to_string();
    server.raw(&request("POST", CHAT, &format!("x-request-id: {id}\r\n"), body.as_bytes())).await
}

/// The text of a reply of whatever kind, and the fingerprints in it.
fn text(reply: &Reply) -> (String, BTreeSet<String>) {
    assert_eq!(reply.status, 200, "{reply:?}");
    let pieces = match reply.header("content-type") {
        Some("text/event-stream") => reply.chunks(),
        _ => vec![reply.json()],
    };
    let fingerprint = |piece: &Value| piece["system_fingerprint"].as_str().unwrap().to_owned();
    let content = |piece: &Value| {
        let choice = &piece["choices"][0];
        let text = [&choice["text"], &choice["message"]["content"], &choice["delta"]["content"]];
        text.iter().find_map(|text| text.as_str()).unwrap_or_default().to_owned()
    };
    (pieces.iter().map(content).collect(), pieces.iter().map(fingerprint).collect())
}

/// The number of the model that a reply says it is of, by its header; everything else must say the same.
fn of_one(reply: &Reply) -> u32 {
    let digest = reply.header(GENERATION).expect("every reply names its generation");
    let number = u32::from_str_radix(&digest[..12], 16).unwrap();
    let expected = (says(number), [format!("fp_{number}")].into());
    assert_eq!(text(reply), expected, "mixed: {reply:?}");
    number
}

/// Waits for the last request of a generation, and shuts it down.
async fn end(retired: Retired, other: Other) {
    timeout(PATIENCE, retired.ended()).await.expect("its requests end");
    assert_eq!((retired.generation(), Arc::strong_count(&other.text)), (other.digest.as_str(), 1), "it is freed");
    let stats = retired.engine().stats();
    assert_eq!((stats.blocks.used, stats.running, stats.waiting), (0, 0, 0), "{stats:?}");
    retired.engine().shutdown();
    other.thread.join();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r34_rollouts_under_load_fail_and_mix_nothing() {
    const ROLLOUTS: u32 = 12;
    let (server, mut serving) = start().await;
    let (server, stop, replies) = (Arc::new(server), Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for client in 0..16 {
        let (server, stop, replies) = (server.clone(), stop.clone(), replies.clone());
        clients.spawn(async move {
            let mut seen = BTreeSet::new();
            while !stop.load(Ordering::Relaxed) {
                let reply = match client % 4 {
                    0 => server.chat(json!({})).await,
                    1 => server.completion(json!({"stream": true})).await,
                    _ => server.chat(json!({"stream": true})).await,
                };
                seen.insert(of_one(&reply));
                replies.fetch_add(1, Ordering::Relaxed);
            }
            seen
        });
    }
    for number in 1..=ROLLOUTS {
        let (candidate, new) = Other::saying(number, &says(number));
        candidate.control.delay_steps(Duration::from_micros(300));
        server.service.stage(new).unwrap();
        for traffic in [Traffic::Shadow(0.5), Traffic::Share(0.5)] {
            server.service.set_traffic(traffic).unwrap();
            let until = replies.load(Ordering::Relaxed) + 16;
            eventually("traffic", || replies.load(Ordering::Relaxed) >= until || clients.is_empty()).await;
        }
        match number % 3 {
            0 => end(server.service.withdraw().unwrap(), candidate).await,
            _ => end(server.service.promote().unwrap(), std::mem::replace(&mut serving, candidate)).await,
        }
    }
    stop.store(true, Ordering::Relaxed);
    let seen: BTreeSet<u32> = clients.join_all().await.into_iter().flatten().collect();
    assert!(seen.len() > ROLLOUTS as usize / 2, "the load saw most of them: {seen:?}");
    assert!(serving.digest.starts_with(&format!("{:012x}", ROLLOUTS - 1)), "the last was withdrawn");
}

#[tokio::test]
async fn a_request_finishes_on_the_generation_it_began_with() {
    let (server, first) = start().await;
    let (second, new) = Other::saying(1, &says(1));
    first.control.delay_steps(Duration::from_millis(2));
    let mut stream = server.open_chat(json!({"stream": true})).await;
    let mut head = read_until(&mut stream, "model").await;
    first.control.hang();

    server.service.stage(new).unwrap();
    let old = server.service.promote().unwrap();
    assert_eq!(of_one(&server.chat(json!({})).await), 1);
    let waits = timeout(Duration::from_millis(50), old.ended()).await;
    assert!(waits.is_err(), "the stream is still under way");
    first.control.release();
    head += &read_until(&mut stream, "[DONE]").await;
    assert!(head.contains("fp_0") && !head.contains("fp_1"), "{head}");
    assert!(head.contains(&format!("{GENERATION}: {}", first.digest)), "{head}");
    drop(stream);
    end(old, first).await;
    drop(second);
}

#[tokio::test]
async fn a_share_is_sticky_and_grows() {
    let (server, _first) = start().await;
    let (_second, new) = Other::saying(1, &says(1));
    server.service.stage(new).unwrap();
    let ids: Vec<String> = (0..60).map(|i| format!("id-{i}")).collect();
    let to_candidate = async || {
        let mut hit = BTreeSet::new();
        for id in &ids {
            if of_one(&chat_as(&server, id, json!({"max_tokens": 50})).await) == 1 {
                hit.insert(id.clone());
            }
        }
        hit
    };
    assert!(to_candidate().await.is_empty(), "no traffic until it is given");
    let mut last = BTreeSet::new();
    for share in [0.0, 0.4, 0.7, 1.0] {
        server.service.set_traffic(Traffic::Share(share)).unwrap();
        let hit = to_candidate().await;
        assert_eq!(to_candidate().await, hit, "a retry goes the same way");
        assert!(hit.is_superset(&last), "a larger share only adds");
        assert!(hit.len() > last.len() || share == 0.0, "{share}");
        last = hit;
    }
    assert_eq!(last.len(), ids.len());
    server.service.set_traffic(Traffic::Share(0.0)).unwrap();
    assert!(to_candidate().await.is_empty());
}

#[tokio::test]
async fn adapters_belong_to_the_generation_that_serves() {
    let server = Setup::default().start_loading().await.0;
    let (first, new) = Other::saying(0, &says(0));
    let adapters = Adapters::new(1, |_| unreachable!("nothing is loaded here"));
    adapters.add(&new.card, "adapter", "folder".into(), Adapter::new([7; 32], 4, 0, Arc::new(())), false).unwrap();
    server.service.install(NewGeneration { adapters, ..new });
    let (second, new) = Other::saying(1, &says(1));
    server.service.stage(new).unwrap();
    for traffic in [Traffic::Share(1.0), Traffic::Shadow(1.0)] {
        server.service.set_traffic(traffic).unwrap();
        let reply = server.chat(json!({"model": "adapter"})).await;
        assert_eq!(reply.header(GENERATION), Some(first.digest.as_str()), "{reply:?}");
        assert_eq!(first.control.adapters(), [[7; 32]].into());
        assert_eq!(second.control.steps(), 0, "nor are they answered unseen");
    }
    server.service.promote().unwrap();
    assert_eq!(server.chat(json!({"model": "adapter"})).await.error_code(), "model_not_found");
    assert_eq!(of_one(&server.chat(json!({"model": "org/tiny"})).await), 1);
}

#[tokio::test]
async fn every_reply_behind_the_pick_names_its_generation() {
    let server = Setup::default().start().await;
    let long = json!({"prompt": vec![5; 600]});
    let replies = [
        server.chat(json!({})).await,
        server.chat(json!({"stream": true})).await,
        server.completion(json!({})).await,
        server.post(COMPLETIONS, &long).await,
        server.completion(json!({"logit_bias": {"5000": 1}})).await,
    ];
    for reply in &replies {
        assert_eq!(reply.header(GENERATION), Some(DIGEST), "{reply:?}");
    }
    assert_eq!(replies.map(|reply| reply.status), [200, 200, 200, 400, 400]);
    for reply in [server.chat(json!({"temperature": 9})).await, server.get("/v1/models").await] {
        assert_eq!(reply.header(GENERATION), None, "{reply:?}");
    }
}

#[tokio::test]
async fn a_candidate_that_is_down_gets_nothing() {
    let (server, _first) = start().await;
    let (second, new) = Other::saying(1, &says(1));
    server.service.stage(new).unwrap();
    server.service.set_traffic(Traffic::Share(1.0)).unwrap();
    assert_eq!(of_one(&server.chat(json!({})).await), 1);
    second.engine.shutdown();
    eventually("down", || !second.engine.stats().alive).await;
    assert_eq!(of_one(&server.chat(json!({})).await), 0);
    assert_eq!(server.get("/ready").await.status, 200);
}

#[tokio::test]
async fn transitions_that_make_no_sense_are_refused_and_change_nothing() {
    let server = Setup::default().start_loading().await.0;
    let service = &server.service;
    let refused = |result: Result<Retired, TransitionError>| result.err();
    let new = |number| Other::saying(number, &says(number)).1;
    assert_eq!(service.stage(new(0)), Err(TransitionError::NothingServed));
    assert_eq!(service.observed(), None);
    assert!(service.install(new(0)).is_none());
    assert_eq!(refused(service.promote()), Some(TransitionError::NoCandidate));
    assert_eq!(refused(service.withdraw()), Some(TransitionError::NoCandidate));
    assert_eq!(service.set_traffic(Traffic::None), Err(TransitionError::NoCandidate));
    assert_eq!(service.stage(new(0)), Err(TransitionError::SameGeneration));
    assert_eq!(service.traffic(), None);

    service.stage(new(1)).unwrap();
    assert_eq!(service.stage(new(2)), Err(TransitionError::CandidateExists));
    for share in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        assert_eq!(service.set_traffic(Traffic::Share(share)), Err(TransitionError::ShareOutOfRange));
        assert_eq!(service.set_traffic(Traffic::Shadow(share)), Err(TransitionError::ShareOutOfRange));
    }
    assert_eq!(service.traffic(), Some(Traffic::None));
    assert_eq!(of_one(&server.chat(json!({})).await), 0);
    service.withdraw().unwrap();
    service.stage(new(1)).unwrap();
}

#[tokio::test]
async fn both_generations_are_counted_since_the_staging() {
    let (server, first) = start().await;
    assert_eq!(server.chat(json!({})).await.status, 200);
    let (second, new) = Other::saying(1, &says(1));
    server.service.stage(new).unwrap();
    server.service.set_traffic(Traffic::Share(1.0)).unwrap();
    server.chat(json!({"n": 2})).await;
    second.control.fail_steps(1);
    assert_eq!(server.chat(json!({})).await.status, 500);
    second.control.not_finite_on_token(700);
    assert_eq!(server.completion(json!({"prompt": [5, 700]})).await.status, 500);
    assert_eq!(server.completion(json!({"prompt": vec![5; 600]})).await.status, 400, "the client's own fault");
    server.service.set_traffic(Traffic::None).unwrap();
    server.chat(json!({})).await;
    // What refuses is the load, not the generation.
    first.engine.drain();
    assert_eq!(server.chat(json!({})).await.status, 503);

    let observed = server.service.observed().unwrap();
    let (serving, candidate) = (observed.serving, observed.candidate.unwrap());
    assert_eq!((serving.requests, serving.errors, serving.non_finite), (1, 0, 0));
    assert_eq!((candidate.requests, candidate.errors, candidate.non_finite), (3, 2, 1));
    assert_eq!((serving.time_to_first_token.count(), candidate.time_to_first_token.count()), (1, 2));
    assert_eq!(candidate.time_per_output_token.count(), 2);
    assert!(candidate.time_to_first_token.median() > Some(Duration::ZERO));
    assert_eq!(observed.shadow, Default::default());

    server.service.withdraw().unwrap();
    let (_third, new) = Other::saying(2, &says(2));
    server.service.stage(new).unwrap();
    let observed = server.service.observed().unwrap();
    assert_eq!((observed.serving.requests, observed.candidate.unwrap().requests), (0, 0));
}

/// Series of an exposition, which is checked: every family once, its series together, and none twice.
fn series(metrics: &str) -> BTreeSet<String> {
    let (mut families, mut series, mut family) = (BTreeSet::new(), BTreeSet::new(), "");
    for line in metrics.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap();
            assert!(families.insert(family), "{family} twice");
        } else if !line.starts_with('#') {
            let name = line.rsplit_once(' ').unwrap().0;
            let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{name} within {family}"));
            let suffix = suffix.split('{').next().unwrap();
            assert!(["", "_bucket", "_sum", "_count"].contains(&suffix), "{name} within {family}");
            assert!(series.insert(name.to_owned()), "{name} twice");
        }
    }
    series
}

#[tokio::test]
async fn metrics_of_both_generations_are_in_the_same_families_and_a_retired_one_has_none() {
    let (server, _first) = start().await;
    let metrics = async || series(&server.get("/metrics").await.body);
    let of = |all: &BTreeSet<String>, number: u32| {
        let label = format!("generation=\"{number:012x}\"");
        all.iter().filter(|name| name.contains(&label)).count()
    };
    server.chat(json!({})).await;
    metrics().await;
    let alone = metrics().await;
    assert!(of(&alone, 0) > 100 && alone.iter().any(|name| name.contains("role=\"serving\"")));
    for number in 1..=10 {
        let (_other, new) = Other::saying(number, &says(number));
        server.service.stage(new).unwrap();
        server.service.set_traffic(Traffic::Share(1.0)).unwrap();
        server.chat(json!({})).await;
        let both = metrics().await;
        assert!(of(&both, number) > of(&both, 0), "as many, and those of shadows");
        assert!(both.iter().any(|name| name.starts_with("baton_shadow_requests_total{")));
        server.service.withdraw().unwrap();
        assert_eq!(metrics().await, alone);
    }
}

#[tokio::test]
async fn a_request_is_answered_by_the_model_that_serves_when_its_body_is_there() {
    let (server, first) = start().await;
    let (_second, new) = Other::saying(1, &says(1));
    server.service.stage(new).unwrap();
    let bytes = request("POST", CHAT, "", chat_body().to_string().as_bytes());
    let mut stream = server.connect().await;
    stream.write_all(&bytes[..bytes.len() - 1]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    end(server.service.promote().unwrap(), first).await;
    stream.write_all(&bytes[bytes.len() - 1..]).await.unwrap();
    assert_eq!(of_one(&crate::harness::read_all(stream).await), 1);
}
