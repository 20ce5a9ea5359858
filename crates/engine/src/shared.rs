//! One loaded model for several engines, one after another, each with limits of its own: so that a check can compute the
//! same requests in whole steps and in small ones, in a large cache and in one in which they displace each other.
//!
//! A [`view`](SharedRunner::view) finds the cache as if nothing had been computed in it. An engine never reads what it did
//! not write, so finite values that another one left would not matter; but a masked product gives NaN where they are not
//! finite, and an engine that ends does not clear what failed in its last step. So all blocks that a view was given
//! are cleared before the next, behind what an earlier one has begun.
//!
//! Invariant: only the latest view computes. Steps of an earlier one fail, and so touch nobody's blocks.

use std::sync::Arc;

use baton_model::{PASSED, RunError, RunSpec, Runner, StepOutput, StepPlan};
use parking_lot::Mutex;

/// See the head of the file. Clones share the same runner.
#[derive(Clone)]
pub struct SharedRunner {
    state: Arc<Mutex<State>>,
    spec: RunSpec,
}

struct State {
    runner: Box<dyn Runner>,
    /// Views made so far; the number of the latest.
    views: u64,
    /// Which blocks may hold something, kept and passing ones.
    used: [Vec<bool>; 2],
}

impl SharedRunner {
    /// Takes a runner as it was loaded, with nothing in its cache.
    pub fn new(runner: Box<dyn Runner>) -> Self {
        let spec = runner.spec().clone();
        let passing = spec.passing.map_or(0, |passing| passing.num_blocks);
        let state = State { runner, views: 0, used: [spec.num_blocks, passing].map(|blocks| vec![false; blocks]) };
        Self { state: Arc::new(Mutex::new(state)), spec }
    }

    /// The limits of the runner itself.
    pub fn spec(&self) -> &RunSpec {
        &self.spec
    }

    /// The runner with steps of at most `max_step_tokens` and a cache of at most `num_blocks`, both at least one. From
    /// then on earlier views are of no use.
    pub fn view(&self, max_step_tokens: usize, num_blocks: usize) -> Result<Box<dyn Runner>, RunError> {
        let mut state = self.state.lock();
        state.views += 1;
        let of = |used: &Vec<bool>| (0..).zip(used).filter_map(|(block, &used)| used.then_some(block)).collect();
        let [kept, passing]: [Vec<u32>; 2] = state.used.each_ref().map(of);
        state.runner.clear_blocks(&kept, &passing)?;
        state.used.iter_mut().for_each(|used| used.fill(false));
        let spec = RunSpec {
            max_step_tokens: self.spec.max_step_tokens.min(max_step_tokens).max(1),
            num_blocks: self.spec.num_blocks.min(num_blocks).max(1),
            ..self.spec.clone()
        };
        Ok(Box::new(View { state: self.state.clone(), number: state.views, spec }))
    }
}

struct View {
    state: Arc<Mutex<State>>,
    number: u64,
    spec: RunSpec,
}

impl View {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> Result<T, RunError>) -> Result<T, RunError> {
        let mut state = self.state.lock();
        if state.views != self.number {
            return Err(RunError::Failed("another engine has taken the model over".into()));
        }
        work(&mut state)
    }
}

impl Runner for View {
    fn spec(&self) -> &RunSpec {
        &self.spec
    }

    fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        self.with(|state| {
            let [kept, passing] = &mut state.used;
            for sequence in &plan.sequences {
                sequence.block_table.iter().for_each(|&block| kept[block as usize] = true);
                let held = sequence.passing_table.iter().filter(|&&block| block != PASSED);
                held.for_each(|&block| passing[block as usize] = true);
            }
            state.runner.begin(plan)
        })
    }

    fn finish(&mut self) -> Result<StepOutput, RunError> {
        self.with(|state| state.runner.finish())
    }

    fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError> {
        self.with(|state| state.runner.clear_blocks(kept, passing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{MockControl, MockModel, MockRunner};
    use crate::{EngineConfig, EngineFailure, FinishReason, OutputEvent, OutputStream, Request, SamplingParams, spawn};

    const MODEL: MockModel = MockModel::Hash { seed: 5, vocab_size: 100, end: None };

    fn shared() -> (SharedRunner, MockControl) {
        let spec = RunSpec {
            vocab_size: 100,
            max_model_len: 100,
            block_size: 4,
            num_blocks: 50,
            passing: None,
            max_step_tokens: 32,
            max_step_sequences: 4,
            max_draft_tokens: 0,
            steps_ahead: false,
        };
        let runner = MockRunner::new(spec, MODEL);
        let control = runner.control();
        (SharedRunner::new(Box::new(runner)), control)
    }

    fn request(max_tokens: u32) -> Request {
        Request::new((1..20).collect(), SamplingParams::greedy(), max_tokens)
    }

    fn collect(mut stream: OutputStream) -> (Vec<u32>, FinishReason) {
        let mut tokens = Vec::new();
        loop {
            match stream.blocking_next().expect("a stream ends with `Finished`") {
                OutputEvent::Token { token, .. } => tokens.push(token),
                OutputEvent::Finished { reason, .. } => return (tokens, reason),
                OutputEvent::PromptScores(_) => panic!("no scores were asked for"),
            }
        }
    }

    #[test]
    fn limits_of_a_view_are_lowered_and_never_raised() {
        let (shared, _) = shared();
        let limits = |max_step_tokens, num_blocks| {
            let view = shared.view(max_step_tokens, num_blocks).unwrap();
            (view.spec().max_step_tokens, view.spec().num_blocks)
        };
        assert_eq!(limits(5, 7), (5, 7));
        assert_eq!(limits(usize::MAX, usize::MAX), (32, 50));
        assert_eq!(limits(0, 0), (1, 1));
        assert_eq!(shared.view(5, 7).unwrap().spec().max_model_len, shared.spec().max_model_len);
    }

    #[test]
    fn what_an_engine_left_that_is_not_finite_does_not_reach_the_next() {
        let (shared, control) = shared();
        // The last of the prompt: the engine ends with the step in which it fails.
        control.not_finite_on_token(19);
        let (handle, engine) = spawn(shared.view(32, 50).unwrap(), EngineConfig::default());
        let failure = FinishReason::Error(EngineFailure::NonFiniteLogits);
        assert_eq!(collect(handle.submit(request(3)).unwrap()), (vec![], failure));
        handle.shutdown();
        engine.join();
        assert!(control.cleared_blocks().is_empty());

        let healthy = Request { prompt: (1..19).collect(), ..request(3) };
        let (handle, _engine) = spawn(shared.view(32, 50).unwrap(), EngineConfig::default());
        assert_eq!(collect(handle.submit(healthy.clone()).unwrap()), (MODEL.solo(&healthy), FinishReason::Length));
        assert_eq!(control.cleared_blocks().len(), 5, "those that were used");
    }

    #[test]
    fn an_engine_whose_runner_another_has_taken_over_fails_and_touches_nothing() {
        let (shared, _) = shared();
        let (first, first_engine) = spawn(shared.view(32, 50).unwrap(), EngineConfig::default());
        let (second, _second_engine) = spawn(shared.view(32, 50).unwrap(), EngineConfig::default());
        let failed = collect(first.submit(request(3)).unwrap()).1;
        assert!(
            matches!(failed, FinishReason::Error(EngineFailure::Device(RunError::Failed(why))) if why.contains("taken"))
        );
        let request = request(30);
        assert_eq!(collect(second.submit(request.clone()).unwrap()), (MODEL.solo(&request), FinishReason::Length));
        first.shutdown();
        first_engine.join();
    }
}
