//! Golden cases replayed through an engine: the one that serves, on its idle steps, or one made for the purpose.

use std::sync::atomic::{AtomicU64, Ordering};

use baton_engine::{
    CacheScope, EngineConfig, EngineFailure, EngineHandle, FinishReason, OutputEvent, OutputStream, PositionScore,
    PromptScores, Request, SamplingParams, SharedRunner, SubmitError,
};
use baton_handoff::{Replay, ReplayError, Replayed, Score, Task, Way};

/// Tasks submitted together, at most.
const WINDOW: usize = 64;

/// Tokens of a step when sequences are computed in pieces: odd, so that pieces end inside blocks.
const PIECE: usize = 7;

/// Replays on an engine that serves: only on steps that nobody else needs.
pub struct IdleReplay {
    handle: EngineHandle,
    ends: Vec<u32>,
}

impl IdleReplay {
    /// `ends`: the tokens that end the model's replies.
    pub fn new(handle: EngineHandle, ends: Vec<u32>) -> Self {
        Self { handle, ends }
    }
}

impl Replay for IdleReplay {
    fn replay(&mut self, tasks: &[Task], way: Way) -> Result<Vec<Replayed>, ReplayError> {
        run(&self.handle, &self.ends, tasks, way, true)
    }
}

/// Replays on a model of its own, in engines whose limits force each way.
pub struct DeviceReplay {
    runner: SharedRunner,
    ends: Vec<u32>,
    not_exercised: Option<&'static str>,
}

impl DeviceReplay {
    /// `ends`: the tokens that end the model's replies.
    pub fn new(runner: SharedRunner, ends: Vec<u32>) -> Self {
        Self { runner, ends, not_exercised: None }
    }
}

impl Replay for DeviceReplay {
    fn replay(&mut self, tasks: &[Task], way: Way) -> Result<Vec<Replayed>, ReplayError> {
        let spec = self.runner.spec();
        let (mut step_tokens, mut num_blocks) = (spec.max_step_tokens, spec.num_blocks);
        match way {
            Way::Alone | Way::Batched | Way::Cached => {}
            Way::Chunked => step_tokens = step_tokens.min(PIECE),
            // The longest fits alone; beside it nothing else of its length does.
            Way::Preempted => {
                let longest = tasks.iter().map(|task| task.ids.len() + task.generate as usize).max().unwrap_or(1);
                num_blocks = num_blocks.min(longest.div_ceil(spec.block_size) + 2);
            }
        }
        let config = EngineConfig { max_num_batched_tokens: step_tokens, ..EngineConfig::default() };
        let view = self.runner.view(step_tokens, num_blocks).map_err(|error| ReplayError::Failed(error.to_string()))?;
        let (handle, engine) = baton_engine::spawn(view, config);
        let replayed = run(&handle, &self.ends, tasks, way, false);
        let unmoved = way == Way::Preempted && handle.stats().preemptions == 0;
        self.not_exercised =
            unmoved.then_some("the cases are too few or too short to push each other out of the cache");
        handle.shutdown();
        engine.join();
        replayed
    }

    fn not_exercised(&self) -> Option<&'static str> {
        self.not_exercised
    }
}

fn run(
    handle: &EngineHandle,
    ends: &[u32],
    tasks: &[Task],
    way: Way,
    background: bool,
) -> Result<Vec<Replayed>, ReplayError> {
    let submit = |task: &Task, scope: &CacheScope| {
        let targets = || task.targets.iter().map(|(&position, ids)| (position as usize, ids.clone())).collect();
        let scores = task.score.then(|| PromptScores { top: 1, targets: targets(), hidden: None });
        let params = SamplingParams { logprobs: Some(0), ..SamplingParams::greedy() };
        let request = Request {
            stop_token_ids: ends.to_vec(),
            cache_scope: scope.clone(),
            prompt_scores: scores,
            background,
            ..Request::new(task.ids.clone(), params, task.generate.max(1))
        };
        handle.submit(request).map_err(refusal)
    };
    let mut replayed = Vec::with_capacity(tasks.len());
    let window = match way {
        Way::Alone | Way::Chunked | Way::Cached => 1,
        Way::Batched | Way::Preempted => WINDOW,
    };
    for tasks in tasks.chunks(window) {
        let scopes: Vec<CacheScope> = tasks.iter().map(|_| scope()).collect();
        if way == Way::Cached {
            for (task, scope) in tasks.iter().zip(&scopes) {
                // Scores are computed, not looked up: what the cache can change is what is generated behind.
                collect(submit(&Task { score: false, ..task.clone() }, scope)?, task)?;
            }
        }
        let streams: Vec<OutputStream> =
            tasks.iter().zip(&scopes).map(|(task, scope)| submit(task, scope)).collect::<Result<_, _>>()?;
        for (stream, task) in streams.into_iter().zip(tasks) {
            replayed.push(collect(stream, task)?);
        }
    }
    Ok(replayed)
}

/// One that no other replay of this process shares.
fn scope() -> CacheScope {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut salt = b"replay\0".to_vec();
    salt.extend(NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    CacheScope { salt, ..CacheScope::default() }
}

fn collect(mut stream: OutputStream, task: &Task) -> Result<Replayed, ReplayError> {
    let mut replayed = Replayed::default();
    while let Some(event) = stream.blocking_next() {
        match event {
            OutputEvent::PromptScores(scores) => replayed.scores.extend(scores.into_iter().map(score)),
            OutputEvent::Token { token, logprob, .. } => {
                replayed.tokens.push(token);
                replayed.logprobs.push(logprob);
            }
            OutputEvent::Finished { reason, usage, .. } => {
                match reason {
                    FinishReason::Stop { token } => replayed.tokens.push(token),
                    FinishReason::Length => {}
                    FinishReason::Error(EngineFailure::NonFiniteLogits) => return Err(ReplayError::NonFinite),
                    FinishReason::Error(failure) => return Err(ReplayError::Failed(failure.to_string())),
                    FinishReason::Aborted => return Err(ReplayError::Failed("the request was aborted".into())),
                }
                replayed.cached_ids = usage.cached_tokens;
            }
        }
    }
    // One token is always generated.
    replayed.tokens.truncate(task.generate as usize);
    replayed.logprobs.truncate(task.generate as usize);
    Ok(replayed)
}

fn score(score: PositionScore) -> Score {
    let (best, best_logprob) = score.top[0];
    Score { best, best_logprob, next: score.next, targets: score.targets }
}

fn refusal(error: SubmitError) -> ReplayError {
    match error {
        SubmitError::EngineDown
        | SubmitError::Draining
        | SubmitError::QueueFull { .. }
        | SubmitError::QueuedTokens { .. } => ReplayError::Failed(error.to_string()),
        unfit => ReplayError::Unfit(unfit.to_string()),
    }
}
