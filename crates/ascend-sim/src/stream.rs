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
    collective::Meeting,
    constants::*,
    graph::Update,
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

impl Task {
    /// A task that takes no time and touches no memory.
    pub fn plain(name: &'static str, action: Action) -> Self {
        Self { name, ranges: Vec::new(), delay: Duration::ZERO, action }
    }
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
    /// Until the external event was recorded since its last reset.
    WaitExternal(u64),
    ResetEvent(u64),
    /// One rank's part of a collective.
    Meet(Meeting),
    /// Every task of a captured graph.
    Graph(u64),
    /// New tasks for a group of a captured graph.
    Update(Arc<Update>),
}

pub struct Stream {
    pub context: u64,
    pub queue: VecDeque<Task>,
    /// Tasks that were ever submitted, and of these how many are complete.
    pub submitted: u64,
    pub done: u64,
    /// The graph into which tasks are captured instead of queued.
    pub capture: Option<u64>,
    /// The group that is being given new tasks, and these.
    pub update: Option<Update>,
    /// When the device began the task at the head, if that takes time or waits.
    pub begun: Option<Instant>,
    /// Tasks of the graph at the head that are complete.
    pub cursor: usize,
    /// Set while the stream's tasks run, to notice streams that wait for each other.
    running: bool,
}

/// How far a stream came.
pub enum Progress {
    Done,
    /// It waits for something that was not submitted yet, or for a time.
    Blocked(Option<Instant>),
}

/// How a task came out.
pub enum Outcome {
    Done,
    Blocked(Option<Instant>),
    Failed(Fault),
}

impl From<Result<(), Fault>> for Outcome {
    fn from(result: Result<(), Fault>) -> Self {
        result.map_or_else(Self::Failed, |()| Self::Done)
    }
}

impl Stream {
    pub fn new(context: u64) -> Self {
        Self {
            context,
            queue: VecDeque::new(),
            submitted: 0,
            done: 0,
            capture: None,
            update: None,
            begun: None,
            cursor: 0,
            running: false,
        }
    }

    /// Drops what is queued, as if it were complete.
    pub fn abandon(&mut self) {
        self.queue.clear();
        self.done = self.submitted;
        (self.begun, self.cursor) = (None, 0);
    }
}

impl Machine {
    /// Puts a task at the end of a stream, or into the graph that is captured from it; its position in the stream.
    pub fn submit(&mut self, handle: u64, task: Task) -> Result<u64, Refusal> {
        let stream = self.streams.get(handle)?;
        let (context, position) = (stream.context, stream.submitted);
        self.check_fault(context)?;
        if let Some(update) = &mut self.streams.get_mut(handle)?.update {
            update.tasks.push(task);
            return Ok(position);
        }
        if self.capture(handle, &task)? {
            return Ok(position);
        }
        let stream = self.streams.get_mut(handle)?;
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
            if self.settings.hang {
                return Ok(Progress::Blocked(None));
            }
            let stream = self.streams.get_mut(handle)?;
            let task = stream.queue.front().expect("a task that is not done is in the queue");
            let (name, action, delay, context) = (task.name, task.action.clone(), task.delay, stream.context);
            let before = stream.done;
            if !delay.is_zero() {
                let ready = *stream.begun.get_or_insert_with(Instant::now) + delay;
                if Instant::now() < ready {
                    return Ok(Progress::Blocked(Some(ready)));
                }
            }
            match self.perform(handle, &action)? {
                Outcome::Done => {}
                Outcome::Blocked(until) => return Ok(Progress::Blocked(until)),
                Outcome::Failed(fault) => {
                    self.poison(context, name, fault);
                    return Ok(Progress::Done);
                }
            }
            let stream = self.streams.get_mut(handle)?;
            if stream.done != before {
                // What it waited for failed, and took the whole context with it.
                return Ok(Progress::Done);
            }
            stream.queue.pop_front();
            (stream.begun, stream.cursor) = (None, 0);
            stream.done += 1;
        }
        Ok(Progress::Done)
    }

    /// Does what the task at the head of a stream does, as far as it can be done now.
    pub fn perform(&mut self, stream: u64, action: &Action) -> Result<Outcome, Refusal> {
        let context = self.streams.get(stream)?.context;
        match action {
            Action::Work(work) => Ok(self.run(context, |runtime| work(runtime))?.into()),
            Action::Record(event) => Ok(self.signal(*event, true)),
            Action::ResetEvent(event) => Ok(self.signal(*event, false)),
            Action::WaitExternal(event) => self.wait_external(*event),
            Action::Wait { stream, position } => Ok(match self.wait_for(*stream, *position)? {
                Progress::Done => Outcome::Done,
                Progress::Blocked(until) => Outcome::Blocked(until),
            }),
            Action::Meet(meeting) => self.meet(stream, meeting),
            Action::Graph(graph) => self.replay(stream, *graph),
            Action::Update(update) => Ok(self.apply(update).into()),
        }
    }

    /// Lets a stream complete one more task, unless it has completed that at `position`; whether it had.
    pub fn poll(&mut self, stream: u64, position: u64) -> Result<bool, Refusal> {
        let state = self.streams.get(stream)?;
        let (next, context) = (state.done + 1, state.context);
        if next > position {
            return Ok(true);
        }
        self.settings.reachable()?;
        self.advance(stream, next)?;
        self.check_fault(context)?;
        Ok(false)
    }

    /// A stream that was destroyed completed its tasks first, so nobody waits for it.
    pub fn wait_for(&mut self, stream: u64, position: u64) -> Result<Progress, Refusal> {
        if self.streams.contains(stream) { self.advance(stream, position) } else { Ok(Progress::Done) }
    }

    /// Computes on the device of a context.
    pub fn run<T>(&mut self, context: u64, work: impl FnOnce(&mut Runtime) -> T) -> Result<T, Refusal> {
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
        let streams = self.streams.iter_mut().filter(|(_, stream)| stream.context == context);
        streams.for_each(|(_, stream)| stream.abandon());
        notify();
    }

    /// The task that will use any of the range, if one is queued.
    pub fn queued_user(&self, range: Range) -> Option<&'static str> {
        let mut tasks = self.streams.iter().flat_map(|(_, stream)| &stream.queue);
        tasks.find(|task| task.ranges.iter().any(|r| r.overlaps(range))).map(|task| task.name)
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
            guard.look_at_control();
            guard.settings.reachable()?;
            let Progress::Blocked(wake) = guard.advance(stream, position)? else { break };
            if deadline.is_some_and(|d| Instant::now() >= d) {
                let waited = timeout.unwrap_or_default().as_millis();
                return Err(refusal!(code, "the device did not finish within {waited} ms"));
            }
            let look = guard.settings.control_interval().map(|interval| Instant::now() + interval);
            guard = wait(guard, [wake, deadline, look].into_iter().flatten().min());
        }
        let context = guard.streams.get(stream)?.context;
        guard.check_fault(context)?;
    }
    Ok(())
}
