//! Requests of real checkpoints give the same bits alone, in a batch, in chunks, over cached prefixes, preempted, with
//! drafts, with steps begun ahead, and in the background: tokens, log-probabilities and scores of the prompt, grammars or
//! not. Each time another engine on the same loaded model.

use std::path::Path;
use std::sync::Arc;

use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_engine::{
    DraftMethod, EngineConfig, EngineHandle, EngineStats, FinishReason, OutputEvent, OutputStream, PositionScore,
    PromptScores, Request, RunError, RunSpec, Runner, SamplingParams, SharedRunner, SpeculationConfig, spawn,
};
use baton_model::{
    Constraint, ConstraintError, Files, Grammar, KvCacheSize, LoadOptions, StepOutput, StepPlan, TokenMask, load,
};

/// Tokens of each reply.
const OUTPUT: u32 = 40;

/// Ids above all that it may choose.
const VOCAB_SIZE: u32 = 190;

/// No token is followed by one of its own residue class modulo 3, and every fifth is free.
#[derive(Debug, Clone, Default)]
struct Restless {
    last: u32,
    taken: u32,
}

impl Grammar for Restless {
    fn begin(&self, _: &[u32]) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

impl Restless {
    fn allows(&self, id: u32) -> bool {
        self.taken.is_multiple_of(5) || (id < VOCAB_SIZE && id % 3 != self.last % 3)
    }

    fn after(&self, token: u32) -> Self {
        Self { last: token, taken: self.taken + 1 }
    }
}

impl Constraint for Restless {
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        assert!(self.allows(token), "{token} after {}", self.last);
        *self = self.after(token);
        Ok(())
    }

    fn masks(&mut self, draft: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError> {
        let states = std::iter::once(self.clone()).chain(draft.iter().scan(self.clone(), |state, &token| {
            let allowed = state.allows(token);
            *state = state.after(token);
            allowed.then(|| state.clone())
        }));
        let mask = |state: Restless| {
            let ids = (0..VOCAB_SIZE).filter(|id| state.allows(*id));
            (!state.taken.is_multiple_of(5)).then(|| TokenMask::only(VOCAB_SIZE as usize, ids))
        };
        Ok(states.map(mask).collect())
    }
}

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
        max_draft_tokens: 3,
        kv_cache: KvCacheSize::AtMost(1 << 26),
        ..LoadOptions::default()
    };
    SharedRunner::new(Box::new(load(backend, &Files::folder(folder).unwrap(), &options).unwrap().0))
}

/// Greedy and sampled, scored and not, free and restrained, some with a common beginning. The last has so little choice that
/// what it writes repeats itself, whatever a machine's last bits are.
fn requests() -> Vec<Request> {
    let request = |i: u32| {
        let prompt = (0..30 + 17 * i).map(|position| (position * 7 + if position < 40 { 3 } else { i }) % 190);
        let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.9 };
        let bad_words = if i > 3 { vec![vec![7], vec![3, 5], vec![90, 91, 92]] } else { Vec::new() };
        let allowed_token_ids = match i {
            5 => Some((20..VOCAB_SIZE).collect()),
            6 => Some(vec![40, 41]),
            _ => None,
        };
        let params = SamplingParams {
            temperature,
            seed: i.into(),
            logprobs: Some(0),
            bad_words,
            allowed_token_ids,
            ..SamplingParams::default()
        };
        let scores = PromptScores { top: 4, targets: [(0, vec![5]), (29, vec![1, 180])].into(), hidden: None };
        let prompt_scores = (i % 3 < 2).then_some(scores);
        let grammar = (i.is_multiple_of(2) || i == 5).then(|| Arc::new(Restless::default()) as Arc<dyn Grammar>);
        Request { prompt_scores, grammar, ..Request::new(prompt.collect(), params, OUTPUT) }
    };
    (0..7).map(request).collect()
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
    speculation: Option<SpeculationConfig>,
    work: impl FnOnce(&EngineHandle) -> T,
) -> (T, EngineStats) {
    let config = EngineConfig { speculation, ..EngineConfig::default() };
    run(model.view(max_step_tokens, num_blocks).unwrap(), config, work)
}

fn run<T>(runner: Box<dyn Runner>, config: EngineConfig, work: impl FnOnce(&EngineHandle) -> T) -> (T, EngineStats) {
    let (handle, engine) = spawn(runner, config);
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
            with_engine(&model, (all, all), None, |engine| one_by_one(engine, std::slice::from_ref(request))).0
        })
        .collect();
    for (request, reply) in requests.iter().zip(&alone) {
        let scored = if request.prompt_scores.is_some() { request.prompt.len() } else { 0 };
        assert_eq!((reply.tokens.len(), reply.scores.len()), (OUTPUT as usize, scored));
    }

    let equal = |replies: Vec<Reply>, how: &str| assert!(replies == alone, "{name}, {how}");
    let (replies, stats) = with_engine(&model, (all, all), None, |engine| together(engine, &requests));
    equal(replies, "batched");
    assert!(stats.step_tokens.count < u64::from(OUTPUT) * 6);

    let (replies, stats) = with_engine(&model, (7, all), None, |engine| together(engine, &requests));
    equal(replies, "in chunks");
    assert!(stats.step_tokens.sum / 7 <= stats.step_tokens.count);

    let ((cold, warm), stats) =
        with_engine(&model, (all, all), None, |engine| (one_by_one(engine, &requests), one_by_one(engine, &requests)));
    equal(cold, "cold");
    equal(warm, "warm");
    assert!(stats.prefix_hit_tokens > 0);

    // Room for the longest alone.
    let longest = requests.iter().map(|request| request.prompt.len() + OUTPUT as usize).max().unwrap();
    let num_blocks = longest.div_ceil(model.spec().block_size) + 1;
    let (replies, stats) = with_engine(&model, (16, num_blocks), None, |engine| together(engine, &requests));
    equal(replies, "in a tight cache");
    assert!(stats.preemptions > 0, "{name}: nobody was preempted");

    let method = DraftMethod::Ngram { min: 1, max: 3 };
    let speculation = SpeculationConfig { method, num_speculative_tokens: 3, disable_by_batch_size: 32 };
    let (replies, stats) = with_engine(&model, (all, all), Some(speculation), |engine| together(engine, &requests));
    equal(replies, "with drafts");
    let drafts = stats.speculation.unwrap();
    assert!(drafts.accepted_tokens > 0 && drafts.draft_tokens > drafts.accepted_tokens, "{name}: {drafts:?}");

    let background: Vec<Request> =
        requests.iter().map(|request| Request { background: true, ..request.clone() }).collect();
    let ((front, back), _) = with_engine(&model, (16, num_blocks), None, |engine| {
        let back = engine.submit_group(background).unwrap();
        (together(engine, &requests), back.into_iter().map(reply).collect())
    });
    equal(front, "beside a background");
    equal(back, "in the background");
}

/// A runner of a device on which there is nothing to overlap, and whose steps may begin ahead all the same.
struct Ahead {
    runner: Box<dyn Runner>,
    spec: RunSpec,
}

impl Ahead {
    fn view(model: &SharedRunner, (max_step_tokens, num_blocks): (usize, usize)) -> Box<dyn Runner> {
        let runner = model.view(max_step_tokens, num_blocks).unwrap();
        assert!(!runner.spec().steps_ahead);
        let spec = RunSpec { steps_ahead: true, ..runner.spec().clone() };
        Box::new(Self { runner, spec })
    }
}

impl Runner for Ahead {
    fn spec(&self) -> &RunSpec {
        &self.spec
    }

    fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        self.runner.begin(plan)
    }

    fn finish(&mut self) -> Result<StepOutput, RunError> {
        self.runner.finish()
    }

    fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError> {
        self.runner.clear_blocks(kept, passing)
    }
}

fn replays_ahead_are_equal(name: &str) {
    let plain = |request: Request| {
        let SamplingParams { temperature, seed, .. } = request.params;
        Request::new(request.prompt, SamplingParams { temperature, seed, ..SamplingParams::default() }, OUTPUT)
    };
    let (model, requests) = (model(name), requests().into_iter().map(plain).collect::<Vec<_>>());
    let all = usize::MAX;
    let alone = with_engine(&model, (all, all), None, |engine| one_by_one(engine, &requests)).0;
    let equal = |replies: Vec<Reply>, how: &str| assert!(replies == alone, "{name} ahead, {how}");
    let ahead = |limits, work: fn(&EngineHandle, &[Request]) -> Vec<Reply>| {
        run(Ahead::view(&model, limits), EngineConfig::default(), |engine| work(engine, &requests))
    };

    let (replies, stats) = ahead((all, all), one_by_one);
    equal(replies, "alone");
    assert_eq!(stats.steps_ahead, requests.len() as u64 * u64::from(OUTPUT - 1), "all steps but that of each prompt");

    let (replies, stats) = ahead((all, all), together);
    equal(replies, "batched");
    assert!(stats.steps_ahead > u64::from(OUTPUT) / 2);

    let longest = requests.iter().map(|request| request.prompt.len() + OUTPUT as usize).max().unwrap();
    let num_blocks = longest.div_ceil(model.spec().block_size) + 1;
    let (replies, stats) = ahead((16, num_blocks), together);
    equal(replies, "in a tight cache");
    assert!(stats.preemptions > 0 && stats.steps_ahead > 0, "{name}: {stats:?}");

    // Of each a twin that leaves in the midst.
    let (replies, _) = ahead((all, all), |engine, requests| {
        let mut twins = engine.submit_group(requests.to_vec()).unwrap();
        let stayers = engine.submit_group(requests.to_vec()).unwrap();
        twins.iter_mut().for_each(|twin| drop(twin.blocking_next()));
        drop(twins);
        stayers.into_iter().map(reply).collect()
    });
    equal(replies, "beside others that leave");
}

#[test]
fn replays_with_steps_ahead_are_equal() {
    replays_ahead_are_equal("golden/llama-rope3");
}

#[test]
fn replays_of_full_attention_are_equal() {
    replays_are_equal("golden/llama-rope3");
}

#[test]
fn replays_of_latent_attention_and_experts_are_equal() {
    replays_are_equal("golden/deepseek-v3");
}
