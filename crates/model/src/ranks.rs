//! A model on several ranks: each has its share of it, on a thread of its own, and all take every step together.
//!
//! Invariants: all ranks get the same orders one by one, and none before every rank has answered the last, so they come to the
//! same sums in the same order. The first rank samples; what it says is the step's output. A rank that fails or panics fails
//! the step by its own error and lets the others go; the next step finds all of them ready, or the device lost. A rank that does
//! not answer is waited for no longer than the timeout once the first has answered or one has failed, and then never asked again.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use baton_device::{Backend, CompressedOps, DeviceError, LatentOps, World};

use crate::adapter::AdapterLoader;
use crate::checkpoint::Files;
use crate::load::{LoadError, LoadOptions, LoadReport, prepare};
use crate::runner::ModelRunner;
use crate::step::{RunError, RunSpec, Runner, SequenceOutput, StepOutput, StepPlan};

/// The ranks of one model as a runner.
pub struct Ranks<B: Backend> {
    spec: RunSpec,
    looks_ahead: bool,
    ranks: Vec<Rank<B>>,
    adapters: Option<AdapterLoader<B>>,
    answers: Receiver<(usize, Answer)>,
    first_failure: FirstFailure,
    timeout: Duration,
    /// A step has failed since ranks were last ready.
    failed: bool,
    /// Why nothing more can be asked.
    lost: Option<String>,
}

struct Rank<B: Backend> {
    backend: Arc<B>,
    /// Ends the thread when dropped.
    orders: Option<Sender<Order>>,
    /// `None` once it was given up.
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone)]
enum Order {
    Begin(Arc<StepPlan>),
    /// The rest of the same step, with what the first rank sampled. Only of models that look ahead.
    LookAhead(Arc<StepPlan>, Vec<SequenceOutput>),
    Finish,
    /// Kept and passing blocks.
    Clear(Arc<[u32]>, Arc<[u32]>),
}

/// What the first rank samples in a step, once it is known; nothing of the others. The outer error is a panic.
type Answer = Result<Result<Vec<SequenceOutput>, DeviceError>, Box<dyn Any + Send>>;

/// The rank that failed first: the others' failures may follow from its own.
type FirstFailure = Arc<Mutex<Option<usize>>>;

/// A rank whose thread loads it.
struct Loading<B: Backend> {
    /// Blocks for which it has room.
    rooms: Receiver<Result<usize, LoadError>>,
    /// What all of them have.
    blocks: Sender<usize>,
    outcome: Receiver<Result<Loaded<B>, LoadError>>,
    orders: Sender<Order>,
    thread: JoinHandle<()>,
}

/// What a rank tells when it is loaded.
struct Loaded<B: Backend> {
    backend: Arc<B>,
    adapter_loader: Option<AdapterLoader<B>>,
    spec: RunSpec,
    looks_ahead: bool,
    report: LoadReport,
}

/// Loads a checkpoint onto the ranks that `backends` are, in their order, each on a thread of its own. The report is that of
/// the whole model. `timeout` is how long a rank may lag behind the first, or behind one that failed, before it is given up.
///
/// # Panics
/// If `backends` are not all ranks in their order, or loading one panics.
pub fn load_ranks<B: Backend + LatentOps + CompressedOps>(
    backends: Vec<B>,
    files: &Files,
    options: &LoadOptions,
    timeout: Duration,
) -> Result<(Ranks<B>, LoadReport), LoadError> {
    let size = backends.len();
    let (answer, answers) = channel();
    let first_failure = FirstFailure::default();
    let loading: Vec<Loading<B>> = (0..)
        .zip(backends)
        .map(|(rank, backend)| {
            assert_eq!(backend.world(), World { rank, size }, "the ranks in their order");
            let (files, options) = (files.clone(), options.clone());
            let (answer, first_failure) = (answer.clone(), first_failure.clone());
            let (room, rooms) = channel();
            let (blocks, agreed) = channel();
            let (loaded, outcome) = channel();
            let (orders, taken) = channel();
            let work = move || {
                // Whoever loads has given up if nobody listens or says anything, here and below.
                let prepared = match prepare(backend, &files, &options) {
                    Ok(prepared) => prepared,
                    Err(error) => return drop(room.send(Err(error))),
                };
                let _ = room.send(Ok(prepared.num_blocks));
                let Ok(num_blocks) = agreed.recv() else { return };
                let runner = prepared.finish(num_blocks).map(|(runner, report)| {
                    let (adapter_loader, looks_ahead) = (runner.adapter_loader(), runner.looks_ahead());
                    let (backend, spec) = (runner.shared_backend(), runner.spec().clone());
                    (runner, Loaded { backend, adapter_loader, spec, looks_ahead, report })
                });
                match runner {
                    Ok((runner, told)) => {
                        let _ = loaded.send(Ok(told));
                        obey(runner, taken, &first_failure, |result| drop(answer.send((rank, result))));
                    }
                    Err(error) => drop(loaded.send(Err(error))),
                }
            };
            let thread = thread::Builder::new().name(format!("rank {rank}")).spawn(work).map_err(|e| {
                LoadError::Device(DeviceError::Unavailable { device: format!("rank {rank}"), reason: e.to_string() })
            })?;
            Ok(Loading { rooms, blocks, outcome, orders, thread })
        })
        .collect::<Result<_, LoadError>>()?;

    // All ranks have the blocks for which each has room: what is free need not be the same on their devices.
    let (mut num_blocks, mut failure) = (usize::MAX, None);
    for Loading { rooms, .. } in &loading {
        match rooms.recv() {
            Ok(Ok(room)) => num_blocks = num_blocks.min(room),
            Ok(Err(error)) => failure = failure.or(Some(error)),
            // Its thread has panicked.
            Err(_) => {}
        }
    }
    for Loading { blocks, .. } in loading.iter().filter(|_| failure.is_none()) {
        let _ = blocks.send(num_blocks);
    }
    let (mut ranks, mut told, mut adapters) = (Vec::new(), Vec::new(), Vec::new());
    for Loading { blocks, outcome, orders, thread, .. } in loading {
        drop(blocks);
        match outcome.recv() {
            Ok(Ok(Loaded { backend, adapter_loader, spec, looks_ahead, report })) => {
                ranks.push(Rank { backend, orders: Some(orders), thread: Some(thread) });
                adapters.extend(adapter_loader);
                told.push((spec, looks_ahead, report));
            }
            Ok(Err(error)) => failure = failure.or(Some(error)),
            Err(_) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
        }
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let mut told = told.into_iter();
    let (spec, looks_ahead, mut report) = told.next().expect("there are ranks");
    for (others, _, of_other) in told {
        assert_eq!(spec, others, "ranks have the same limits");
        report.add_rank(&of_other);
    }
    let adapters = AdapterLoader::of_ranks(adapters);
    let ranks =
        Ranks { spec, looks_ahead, ranks, adapters, answers, first_failure, timeout, failed: false, lost: None };
    Ok((ranks, report))
}

/// A rank's thread: orders until there are no more.
fn obey<B: Backend>(
    mut runner: ModelRunner<B>,
    orders: Receiver<Order>,
    first_failure: &Mutex<Option<usize>>,
    answer: impl Fn(Answer),
) {
    let backend = runner.shared_backend();
    let mut attention = None;
    for order in orders {
        // After a panic a runner can go on: it keeps no state but the cache, which is cleared.
        let result = catch_unwind(AssertUnwindSafe(|| match order {
            Order::Begin(plan) if runner.looks_ahead() => {
                let (outputs, of_step) = runner.compute(&plan)?;
                attention = Some(of_step);
                // The first waits for the others' parts before any of them can look ahead.
                backend.submit()?;
                Ok(outputs)
            }
            Order::Begin(plan) => runner.begin_step(&plan).map(|()| Vec::new()),
            Order::LookAhead(plan, mut outputs) => {
                let attention = attention.as_ref().expect("a step came before");
                runner.look_ahead(&plan, attention, &mut outputs)?;
                runner.told(outputs).map(|()| Vec::new())
            }
            Order::Finish => runner.finish_step(),
            Order::Clear(kept, passing) => runner.clear(&kept, &passing).map(|()| Vec::new()),
        }));
        if !matches!(result, Ok(Ok(_))) {
            first_failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(backend.world().rank);
            backend.leave();
        }
        answer(result);
    }
}

impl<B: Backend> Ranks<B> {
    /// The first rank's device.
    pub fn backend(&self) -> &B {
        &self.ranks[0].backend
    }

    /// Loads adapters onto all ranks; `None` if they were not loaded for any (see
    /// [`LoadOptions::max_lora_rank`](crate::LoadOptions::max_lora_rank)).
    pub fn adapter_loader(&self) -> Option<AdapterLoader<B>> {
        self.adapters.clone()
    }

    /// Has all ranks do something; what the first of them answers.
    fn all(&mut self, order: &Order) -> Result<Vec<SequenceOutput>, DeviceError> {
        if let Some(reason) = &self.lost {
            return Err(self.lost_to(reason.clone()));
        }
        if self.failed {
            self.ranks.iter().try_for_each(|rank| rank.backend.rejoin())?;
            self.failed = false;
        }
        for Rank { orders, .. } in &self.ranks {
            let orders = orders.as_ref().expect("until it is dropped");
            orders.send(order.clone()).expect("a rank takes orders until there are no more");
        }
        let mut answers: Vec<Option<Answer>> = self.ranks.iter().map(|_| None).collect();
        while answers.iter().any(Option::is_none) {
            let Some((rank, answer)) = self.next_answer(&answers) else {
                return Err(self.give_up(&answers));
            };
            answers[rank] = Some(answer);
        }
        let first_failure = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.failed = first_failure.is_some();
        match answers.swap_remove(first_failure.unwrap_or(0)).expect("all have answered") {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Waits as long as a step takes, but once the first rank, which has the most to do, is through, or one has failed, for no
    /// answer longer than the timeout.
    fn next_answer(&self, so_far: &[Option<Answer>]) -> Option<(usize, Answer)> {
        let failed = |answer: &Option<Answer>| matches!(answer, Some(Ok(Err(_)) | Err(_)));
        if so_far[0].is_some() || so_far.iter().any(failed) {
            return self.answers.recv_timeout(self.timeout).ok();
        }
        self.answers.recv().ok()
    }

    /// Leaves those behind that have not answered.
    fn give_up(&mut self, answers: &[Option<Answer>]) -> DeviceError {
        let silent = (0..answers.len()).filter(|&rank| answers[rank].is_none());
        let silent = silent.inspect(|&rank| self.ranks[rank].thread = None).map(|rank| rank.to_string());
        let reason = format!("rank {} does not answer for {:?}", silent.collect::<Vec<_>>().join(", "), self.timeout);
        self.lost = Some(reason.clone());
        self.lost_to(reason)
    }

    fn lost_to(&self, reason: String) -> DeviceError {
        DeviceError::Lost { device: self.ranks[0].backend.caps().device.clone(), reason }
    }
}

impl<B: Backend> Runner for Ranks<B> {
    fn spec(&self) -> &RunSpec {
        &self.spec
    }

    fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        let plan = Arc::new(plan.clone());
        let sampled = self.all(&Order::Begin(plan.clone()))?;
        if self.looks_ahead {
            self.all(&Order::LookAhead(plan, sampled))?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, RunError> {
        Ok(StepOutput { sequences: self.all(&Order::Finish)? })
    }

    fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError> {
        self.all(&Order::Clear(kept.into(), passing.into()))?;
        Ok(())
    }
}

impl<B: Backend> Drop for Rank<B> {
    /// Ends the thread and waits for it, unless it was given up.
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // How it ends does not matter any more: each of its orders was answered.
            let _ = thread.join();
        }
    }
}
