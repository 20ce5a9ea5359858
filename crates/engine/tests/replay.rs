//! Requests of real checkpoints give the same bits alone, in a batch, in chunks, over cached prefixes, preempted, and in
//! the background: tokens, log-probabilities and scores of the prompt. Each time another engine on the same loaded model.

use std::path::Path;

use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_engine::{
    EngineConfig, EngineHandle, EngineStats, FinishReason, OutputEvent, OutputStream, PositionScore, PromptScores,
    Request, SamplingParams, SharedRunner, spawn,
};
use baton_model::{Files, KvCacheSize, LoadOptions, load};

/// Tokens of each reply.
const OUTPUT: u32 = 40;

/// What a client got.
#[derive(Debug, PartialEq)]
struct Reply {
    tokens: Vec<(u32, f32)>,
    scores: Vec<PositionScore>,
}

fn model(name: &str) -> SharedRunner {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(name);
    let backend = CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap();
    let options = LoadOptions {
        max_model_len: Some(256),
        max_step_tokens: 256,
        max_step_sequences: 8,
        kv_cache: KvCacheSize::AtMost(1 << 26),
        ..LoadOptions::default()
    };
    SharedRunner::new(Box::new(load(backend, &Files::folder(folder).unwrap(), &options).unwrap().0))
}

/// Greedy and sampled, scored and not, some with a common beginning.
fn requests() -> Vec<Request> {
    let request = |i: u32| {
        let prompt = (0..30 + 17 * i).map(|position| (position * 7 + if position < 40 { 3 } else { i }) % 190);
        let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.9 };
        let params = SamplingParams { temperature, seed: i.into(), logprobs: Some(0), ..SamplingParams::default() };
        let scores = PromptScores { top: 4, targets: [(0, vec![5]), (29, vec![1, 180])].into() };
        let prompt_scores = (i % 3 < 2).then_some(scores);
        Request { prompt_scores, ..Request::new(prompt.collect(), params, OUTPUT) }
    };
    (0..6).map(request).collect()
}

fn reply(mut stream: OutputStream) -> Reply {
    let mut reply = Reply { tokens: Vec::new(), scores: Vec::new() };
    loop {
        match stream.blocking_next().expect("a stream ends with `Finished`") {
            OutputEvent::PromptScores(scores) => reply.scores.extend(scores),
            OutputEvent::Token { token, logprob, .. } => reply.tokens.push((token, logprob)),
            OutputEvent::Finished { reason, .. } => {
                assert_eq!(reason, FinishReason::Length);
                return reply;
            }
        }
    }
}

/// What `work` makes of an engine with these limits, and what the engine counted.
fn with_engine<T>(
    model: &SharedRunner,
    (max_step_tokens, num_blocks): (usize, usize),
    work: impl FnOnce(&EngineHandle) -> T,
) -> (T, EngineStats) {
    let runner = model.view(max_step_tokens, num_blocks).unwrap();
    let (handle, engine) = spawn(runner, EngineConfig::default());
    let result = work(&handle);
    let stats = handle.stats();
    handle.shutdown();
    engine.join();
    (result, stats)
}

fn one_by_one(engine: &EngineHandle, requests: &[Request]) -> Vec<Reply> {
    requests.iter().map(|request| reply(engine.submit(request.clone()).unwrap())).collect()
}

/// All in one group, so that they are in the same step if they fit.
fn together(engine: &EngineHandle, requests: &[Request]) -> Vec<Reply> {
    engine.submit_group(requests.to_vec()).unwrap().into_iter().map(reply).collect()
}

fn replays_are_equal(name: &str) {
    let (model, requests) = (model(name), requests());
    let all = usize::MAX;
    let alone: Vec<Reply> = requests
        .iter()
        .flat_map(|request| {
            with_engine(&model, (all, all), |engine| one_by_one(engine, std::slice::from_ref(request))).0
        })
        .collect();
    for (request, reply) in requests.iter().zip(&alone) {
        let scored = if request.prompt_scores.is_some() { request.prompt.len() } else { 0 };
        assert_eq!((reply.tokens.len(), reply.scores.len()), (OUTPUT as usize, scored));
    }

    let equal = |replies: Vec<Reply>, how: &str| assert!(replies == alone, "{name}, {how}");
    let (replies, stats) = with_engine(&model, (all, all), |engine| together(engine, &requests));
    equal(replies, "batched");
    assert!(stats.step_tokens.count < u64::from(OUTPUT) * 6);

    let (replies, stats) = with_engine(&model, (7, all), |engine| together(engine, &requests));
    equal(replies, "in chunks");
    assert!(stats.step_tokens.sum / 7 <= stats.step_tokens.count);

    let ((cold, warm), stats) =
        with_engine(&model, (all, all), |engine| (one_by_one(engine, &requests), one_by_one(engine, &requests)));
    equal(cold, "cold");
    equal(warm, "warm");
    assert!(stats.prefix_hit_tokens > 0);

    // Room for the longest alone.
    let longest = requests.iter().map(|request| request.prompt.len() + OUTPUT as usize).max().unwrap();
    let num_blocks = longest.div_ceil(model.spec().block_size) + 1;
    let (replies, stats) = with_engine(&model, (16, num_blocks), |engine| together(engine, &requests));
    equal(replies, "in a tight cache");
    assert!(stats.preemptions > 0, "{name}: nobody was preempted");

    let background: Vec<Request> =
        requests.iter().map(|request| Request { background: true, ..request.clone() }).collect();
    let ((front, back), _) = with_engine(&model, (16, num_blocks), |engine| {
        let back = engine.submit_group(background).unwrap();
        (together(engine, &requests), back.into_iter().map(reply).collect())
    });
    equal(front, "beside a background");
    equal(back, "in the background");
}

#[test]
fn replays_of_full_attention_are_equal() {
    replays_are_equal("golden/llama-rope3");
}

#[test]
fn replays_of_latent_attention_and_experts_are_equal() {
    replays_are_equal("golden/deepseek-v3");
}
