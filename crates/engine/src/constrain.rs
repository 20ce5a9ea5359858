//! Grammars beside the forward pass: threads of their own compute masks while the runner computes the step that samples
//! with them.
//!
//! The state of a grammar travels: for each step in which its sequence samples, a job takes the tokens sampled since the
//! last such step and makes the masks of this one. Nobody waits for it but the runner, in its sampler.
//!
//! Invariant: every job hands in masks or an error, whatever the grammar does; the runner waits without limit.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use baton_model::{Constraint, ConstraintError, Grammar, StepMasks, TokenMask};
use crossbeam_channel::{SendError, Sender, unbounded};
use parking_lot::Mutex;

/// The grammar of one sequence and how far the output has followed it.
pub(crate) struct Constrained {
    state: Arc<Mutex<State>>,
    /// Tokens of the output that jobs have taken.
    num_taken: usize,
}

enum State {
    /// To be begun by the first job, since that takes time as well.
    New {
        grammar: Arc<dyn Grammar>,
        ends: Vec<u32>,
    },
    Begun(Box<dyn Constraint>),
}

impl Constrained {
    /// `ends`: the tokens that end the output.
    pub fn new(grammar: Arc<dyn Grammar>, ends: Vec<u32>) -> Self {
        Self { state: Arc::new(Mutex::new(State::New { grammar, ends })), num_taken: 0 }
    }

    /// The work of making `masks` behind the output so far and behind each of `draft`. Each job must run.
    pub fn job(&mut self, output: &[u32], draft: &[u32], masks: StepMasks) -> MaskJob {
        let tokens = output[self.num_taken..].to_vec();
        self.num_taken = output.len();
        MaskJob { state: self.state.clone(), tokens, draft: draft.to_vec(), masks }
    }
}

impl State {
    fn masks(&mut self, tokens: &[u32], draft: &[u32]) -> Result<Vec<Option<TokenMask>>, ConstraintError> {
        if let Self::New { grammar, ends } = self {
            *self = Self::Begun(grammar.begin(ends));
        }
        let Self::Begun(constraint) = self else { unreachable!("it has just begun") };
        tokens.iter().try_for_each(|&token| constraint.accept(token))?;
        constraint.masks(draft)
    }
}

/// See [`Constrained::job`].
pub(crate) struct MaskJob {
    state: Arc<Mutex<State>>,
    /// Sampled since the last job.
    tokens: Vec<u32>,
    draft: Vec<u32>,
    masks: StepMasks,
}

impl MaskJob {
    fn run(self) {
        let work = || self.state.lock().masks(&self.tokens, &self.draft);
        let panicked = |_| Err(ConstraintError("its parser panicked".into()));
        self.masks.set(catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked));
    }
}

/// The threads that compute masks, started with the first job and ended with the pool.
pub(crate) struct MaskPool {
    threads: usize,
    jobs: Option<Sender<MaskJob>>,
}

impl MaskPool {
    /// With no thread jobs run at once, on that of the caller.
    pub fn new(threads: usize) -> Self {
        Self { threads, jobs: None }
    }

    /// Takes on a job. Those of one sequence come one after another.
    pub fn start(&mut self, job: MaskJob) {
        let jobs = self.jobs.get_or_insert_with(|| start_threads(self.threads));
        // Nobody receives if there is no thread.
        if let Err(SendError(job)) = jobs.send(job) {
            job.run();
        }
    }
}

fn start_threads(count: usize) -> Sender<MaskJob> {
    let (sender, jobs) = unbounded::<MaskJob>();
    for number in 0..count {
        let jobs = jobs.clone();
        let thread = thread::Builder::new().name(format!("masks-{number}"));
        if let Err(error) = thread.spawn(move || jobs.iter().for_each(MaskJob::run)) {
            tracing::warn!(%error, "no thread for masks");
        }
    }
    sender
}
