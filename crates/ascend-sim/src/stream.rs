//! Queues of tasks, and when they run.
//!
//! Invariant: a task runs only when somebody waits for it: at a synchronise, at a query (one task each), or when a stream that
//! somebody waits for waits for it. So what is read without a synchronise was not computed yet. Tasks of a stream run in order.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    array::{Fault, Refusal},
    constants::*,
    machine::{Guard, Machine, notify, refusal, wait},
    memory::Range,
    runtime::Runtime,
};

/// What a kernel or a copy does when it runs.
pub type Work = Arc<dyn Fn(&mut Runtime) -> Result<(), Fault> + Send + Sync>;

#[derive(Clone)]
pub struct Task {
    pub name: &'static str,
    /// Memory that the task will read or write, host memory included.
    pub ranges: Vec<Range>,
    /// How long the device takes.
    pub delay: Duration,
    pub action: Action,
}

#[derive(Clone)]
pub enum Action {
    Work(Work),
    Record(u64),
    /// Until the stream has completed its task at the position.
    Wait {
        stream: u64,
        position: u64,
    },
}

pub struct Stream {
    pub context: u64,
    pub queue: VecDeque<Task>,
    /// Tasks that were ever submitted, and of these how many are complete.
    pub submitted: u64,
    pub done: u64,
    /// When the task at the head is complete, once the device has begun it.
    pub ready_at: Option<Instant>,
    /// Set while the stream's tasks run, to notice streams that wait for each other.
    pub running: bool,
}

pub struct Event {
    pub context: u64,
    pub flags: i64,
    /// Where it was recorded last: stream and position.
    pub recorded: Option<(u64, u64)>,
    pub completed_at: Option<Instant>,
}

/// How far a stream came.
pub enum Progress {
    Done,
    /// It waits for something that was not submitted yet, or for a time.
    Blocked(Option<Instant>),
}

impl Stream {
    pub fn new(context: u64) -> Self {
        Self { context, queue: VecDeque::new(), submitted: 0, done: 0, ready_at: None, running: false }
    }
}

impl Machine {
    /// Puts a task at the end of a stream; its position.
    pub fn submit(&mut self, stream: u64, task: Task) -> Result<u64, Refusal> {
        self.check_fault(self.streams.get(stream)?.context)?;
        let stream = self.streams.get_mut(stream)?;
        stream.queue.push_back(task);
        stream.submitted += 1;
        notify();
        Ok(stream.submitted)
    }

    /// Runs tasks of a stream until the one at `position` is complete.
    pub fn advance(&mut self, stream: u64, position: u64) -> Result<Progress, Refusal> {
        if self.streams.get(stream)?.done >= position {
            return Ok(Progress::Done);
        }
        if std::mem::replace(&mut self.streams.get_mut(stream)?.running, true) {
            return Ok(Progress::Blocked(None));
        }
        let progress = self.run_tasks(stream, position);
        if let Ok(stream) = self.streams.get_mut(stream) {
            stream.running = false;
        }
        progress
    }

    fn run_tasks(&mut self, handle: u64, position: u64) -> Result<Progress, Refusal> {
        while self.streams.get(handle)?.done < position {
            if let Some(blocked) = self.held_up(handle)? {
                return Ok(blocked);
            }
            let stream = self.streams.get_mut(handle)?;
            let context = stream.context;
            let task = stream.queue.front().expect("a task that is not done is in the queue").clone();
            let outcome = match &task.action {
                Action::Work(work) => self.run(context, |runtime| work(runtime))?,
                Action::Record(event) => {
                    if let Ok(event) = self.events.get_mut(*event) {
                        event.completed_at = Some(Instant::now());
                    }
                    Ok(())
                }
                Action::Wait { stream, position } => match self.wait_for(*stream, *position)? {
                    Progress::Done => Ok(()),
                    blocked => return Ok(blocked),
                },
            };
            if let Err(fault) = outcome {
                self.poison(context, task.name, fault);
                return Ok(Progress::Done);
            }
            let stream = self.streams.get_mut(handle)?;
            stream.queue.pop_front();
            stream.ready_at = None;
            stream.done += 1;
        }
        Ok(Progress::Done)
    }

    /// Whether the device is still busy with the task at the head.
    fn held_up(&mut self, stream: u64) -> Result<Option<Progress>, Refusal> {
        let stream = self.streams.get_mut(stream)?;
        let delay = stream.queue.front().map_or(Duration::ZERO, |task| task.delay);
        if delay.is_zero() {
            return Ok(None);
        }
        let ready = *stream.ready_at.get_or_insert_with(|| Instant::now() + delay);
        Ok((Instant::now() < ready).then_some(Progress::Blocked(Some(ready))))
    }

    /// A stream that was destroyed completed its tasks first, so nobody waits for it.
    fn wait_for(&mut self, stream: u64, position: u64) -> Result<Progress, Refusal> {
        if self.streams.contains(stream) { self.advance(stream, position) } else { Ok(Progress::Done) }
    }

    fn run(
        &mut self,
        context: u64,
        work: impl FnOnce(&mut Runtime) -> Result<(), Fault>,
    ) -> Result<Result<(), Fault>, Refusal> {
        let device = self.contexts.get(context)?.device;
        let mut runtime = Runtime {
            device,
            chip: self.settings.chip(),
            perturb: self.settings.perturb,
            peers: &self.devices[device as usize].peers,
            memory: &mut self.memory,
            violations: &mut self.counters.violations,
            addresses: &[],
        };
        Ok(work(&mut runtime))
    }

    /// Runs what belongs to no stream. A fault refuses the call and harms no context.
    pub fn at_once(
        &mut self,
        context: u64,
        work: impl FnOnce(&mut Runtime) -> Result<(), Fault>,
    ) -> Result<(), Refusal> {
        self.run(context, work)?.map_err(|fault| match fault {
            Fault::OutOfRange(text) | Fault::Violation(text) => {
                self.violation(text.clone());
                refusal!(ACL_ERROR_RT_PARAM_INVALID, "{text}")
            }
            Fault::Code(code, text) => refusal!(code, "{text}"),
        })
    }

    /// Ends everything of a context: what was queued never runs, and every later call returns the code.
    pub fn poison(&mut self, context: u64, name: &str, fault: Fault) {
        let (code, text) = match fault {
            Fault::OutOfRange(text) => (ACL_ERROR_RT_AICORE_EXCEPTION as i32, text),
            Fault::Violation(text) => {
                self.violation(format!("{name}: {text}"));
                (ACL_ERROR_RT_AICORE_EXCEPTION as i32, text)
            }
            Fault::Code(code, text) => (code, text),
        };
        if let Ok(context) = self.contexts.get_mut(context) {
            context.fault.get_or_insert((code, format!("{name}: {text}")));
        }
        for (_, stream) in self.streams.iter_mut().filter(|(_, stream)| stream.context == context) {
            stream.queue.clear();
            stream.done = stream.submitted;
            stream.ready_at = None;
        }
        notify();
    }

    /// The task that will use any of the range, if one is queued.
    pub fn queued_user(&self, range: Range) -> Option<&'static str> {
        let tasks = self.streams.iter().flat_map(|(_, stream)| &stream.queue);
        tasks.filter(|task| task.ranges.iter().any(|r| r.overlaps(range))).map(|task| task.name).next()
    }
}

/// Waits until each stream has completed its task at the position. After `timeout` the call fails with `code`.
pub fn synchronize(
    mut guard: Guard,
    targets: &[(u64, u64)],
    timeout: Option<Duration>,
    code: i64,
) -> Result<(), Refusal> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    for &(stream, position) in targets {
        loop {
            let Progress::Blocked(wake) = guard.advance(stream, position)? else { break };
            if deadline.is_some_and(|d| Instant::now() >= d) {
                return Err(refusal!(
                    code,
                    "the device did not finish within {} ms",
                    timeout.unwrap_or_default().as_millis()
                ));
            }
            let until = [wake, deadline].into_iter().flatten().min();
            guard = wait(guard, until);
        }
        let context = guard.streams.get(stream)?.context;
        guard.check_fault(context)?;
    }
    Ok(())
}
