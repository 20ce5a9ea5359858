//! Graph capture: tasks that are recorded instead of queued, and run again as a whole.
//!
//! Invariant: a graph holds its tasks in the order in which they were submitted, which is an order that keeps every dependency
//! between its streams. What phase 1 took from the host (lengths, scalars, addresses) is in the tasks, so a replay has it as it was.

use std::{cell::Cell, collections::BTreeSet, sync::Arc};

use crate::{
    array::{Fault, Refusal},
    constants::*,
    machine::{Machine, refusal, thread_number},
    memory::Range,
    stream::{Action, Outcome, Task},
};

thread_local! {
    static MODE: Cell<i64> = const { Cell::new(ACL_MODEL_RI_CAPTURE_MODE_GLOBAL) };
}

/// Exchanges the thread's own capture mode, which says which captures forbid it unsafe calls.
pub fn exchange_mode(mode: i64) -> i64 {
    MODE.replace(mode)
}

pub struct Graph {
    pub context: u64,
    pub status: i64,
    mode: i64,
    thread: u64,
    origin: u64,
    /// Streams that took part; those whose last task nobody has waited for.
    streams: BTreeSet<u64>,
    open: BTreeSet<u64>,
    tasks: Vec<Task>,
    /// The first task of the group that is being captured.
    group: Option<usize>,
    /// Bytes of memory that the tasks use.
    ranges: Vec<Range>,
}

impl Graph {
    /// Streams of the device that the graph takes.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }
}

/// Tasks of a graph that can be replaced.
#[derive(Clone, Copy)]
pub struct Group {
    graph: u64,
    first: usize,
    len: usize,
}

/// What replaces a group's tasks.
#[derive(Clone)]
pub struct Update {
    group: Group,
    pub tasks: Vec<Task>,
}

impl Machine {
    pub fn capture_begin(&mut self, stream: u64, mode: i64) -> Result<(), Refusal> {
        self.refuse_default(stream)?;
        if self.streams.get(stream)?.capture.is_some() {
            return Err(refusal!(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured already"));
        }
        let graph = Graph {
            context: self.streams.get(stream)?.context,
            status: ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE,
            mode,
            thread: thread_number(),
            origin: stream,
            streams: [stream].into(),
            open: BTreeSet::new(),
            tasks: Vec::new(),
            group: None,
            ranges: Vec::new(),
        };
        self.streams.get_mut(stream)?.capture = Some(self.graphs.insert(graph));
        Ok(())
    }

    /// Ends a capture; the graph, if it can be run.
    pub fn capture_end(&mut self, stream: u64) -> Result<u64, Refusal> {
        let handle = self.captured(stream)?;
        let graph = self.graphs.get(handle)?;
        if graph.origin != stream {
            return Err(refusal!(ACL_ERROR_RT_CAPTURE_UNMATCHED, "the capture was begun on another stream"));
        }
        if graph.mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && graph.thread != thread_number() {
            return Err(refusal!(ACL_ERROR_RT_CAPTURE_WRONG_THREAD, "the capture was begun on another thread"));
        }
        let ended = match graph {
            _ if graph.status == ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED => Err(invalid()),
            _ if !graph.open.is_empty() => {
                Err(refusal!(ACL_ERROR_RT_STREAM_UNJOINED, "a stream was not joined back to the one that is captured"))
            }
            _ => Ok(handle),
        };
        let members = graph.streams.clone();
        for (_, stream) in self.streams.iter_mut().filter(|(handle, _)| members.contains(handle)) {
            stream.capture = None;
        }
        match ended {
            Ok(handle) => self.graphs.get_mut(handle)?.status = ACL_MODEL_RI_CAPTURE_STATUS_NONE,
            Err(_) => drop(self.graphs.remove(handle)?),
        }
        ended
    }

    /// The graph that is captured from a stream.
    pub fn captured(&self, stream: u64) -> Result<u64, Refusal> {
        let capture = self.streams.get(stream)?.capture;
        capture.ok_or_else(|| refusal!(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured"))
    }

    /// Takes a task into the graph of its stream; whether there is one.
    pub fn capture(&mut self, stream: u64, task: &Task) -> Result<bool, Refusal> {
        let Some(handle) = self.streams.get(stream)?.capture else {
            self.refuse_default_while_capturing(stream)?;
            return Ok(false);
        };
        let graph = self.graphs.get_mut(handle)?;
        if graph.status == ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED {
            return Err(invalid());
        }
        if stream != graph.origin {
            graph.open.insert(stream);
        }
        graph.ranges.extend(&task.ranges);
        graph.tasks.push(task.clone());
        Ok(true)
    }

    /// `waiter` waits for what `recorder` has captured: it becomes part of the capture, and `recorder` is joined to it.
    pub fn join(&mut self, graph: u64, recorder: u64, waiter: u64) -> Result<(), Refusal> {
        let unmatched = || refusal!(ACL_ERROR_RT_EVENT_CAPTURED, "the event was recorded in a capture that has ended");
        let state = self.graphs.get_mut(graph).map_err(|_| unmatched())?;
        if state.status != ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE {
            return Err(unmatched());
        }
        if recorder != waiter {
            state.open.remove(&recorder);
            if waiter != state.origin {
                state.open.insert(waiter);
            }
        }
        state.streams.insert(waiter);
        self.streams.get_mut(waiter)?.capture = Some(graph);
        Ok(())
    }

    /// Makes a capture good for nothing; the refusal of the call that did it.
    pub fn invalidate(&mut self, graph: u64, code: i64, text: &str) -> Refusal {
        if let Ok(graph) = self.graphs.get_mut(graph) {
            graph.status = ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
        }
        refusal!(code, "{text}; the capture is invalid now")
    }

    /// Refuses a call that must not be made while the thread, or any thread, captures.
    pub fn refuse_while_capturing(&mut self) -> Result<(), Refusal> {
        let (me, own) = (thread_number(), MODE.get());
        let forbids = |graph: &Graph| {
            let active = graph.status == ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
            let global = graph.mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL && own == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
            let relaxed = [graph.mode, own].contains(&ACL_MODEL_RI_CAPTURE_MODE_RELAXED);
            active && (global || graph.thread == me && !relaxed)
        };
        let forbidding = self.graphs.iter().find(|(_, graph)| forbids(graph)).map(|(handle, _)| handle);
        forbidding.map_or(Ok(()), |graph| {
            Err(self.invalidate(graph, ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, "a call that a capture does not allow"))
        })
    }

    /// Refuses to wait for a stream that is being captured: nothing of it runs.
    pub fn refuse_captured(&mut self, stream: u64) -> Result<(), Refusal> {
        match self.streams.get(stream)?.capture {
            Some(graph) => Err(self.invalidate(graph, ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured")),
            None => Ok(()),
        }
    }

    fn refuse_default(&self, stream: u64) -> Result<(), Refusal> {
        let context = self.contexts.get(self.streams.get(stream)?.context)?;
        if context.default_stream == stream {
            return Err(refusal!(
                ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
                "the default stream cannot take part in a capture"
            ));
        }
        Ok(())
    }

    fn refuse_default_while_capturing(&mut self, stream: u64) -> Result<(), Refusal> {
        let me = thread_number();
        let active = |g: &Graph| g.status == ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE && g.thread == me;
        let Some((graph, _)) = self.graphs.iter().find(|(_, graph)| active(graph)) else { return Ok(()) };
        self.refuse_default(stream).map_err(|refusal| self.invalidate(graph, refusal.code.into(), &refusal.message))
    }

    /// Queues a graph's tasks as one.
    pub fn submit_graph(&mut self, graph: u64, stream: u64) -> Result<u64, Refusal> {
        let state = self.graphs.get(graph)?;
        if state.status != ACL_MODEL_RI_CAPTURE_STATUS_NONE {
            return Err(refusal!(ACL_ERROR_RT_MODEL_CAPTURED, "the graph is still being captured"));
        }
        if self.streams.get(stream)?.capture.is_some() {
            return Err(refusal!(ACL_ERROR_RT_MODEL_CAPTURED, "a graph inside of a graph is not simulated"));
        }
        let ranges = state.ranges.clone();
        self.submit(stream, Task { ranges, ..Task::plain("aclmdlRIExecuteAsync", Action::Graph(graph)) })
    }

    /// Runs a graph's tasks in order, from where it was held up before.
    pub fn replay(&mut self, stream: u64, graph: u64) -> Result<Outcome, Refusal> {
        loop {
            let cursor = self.streams.get(stream)?.cursor;
            let Ok(state) = self.graphs.get(graph) else {
                return Ok(Outcome::Failed(Fault::Violation("the graph was destroyed before it ran".to_owned())));
            };
            let Some(task) = state.tasks.get(cursor) else { return Ok(Outcome::Done) };
            let action = task.action.clone();
            match self.perform(stream, &action)? {
                Outcome::Done => self.streams.get_mut(stream)?.cursor += 1,
                held_up => return Ok(held_up),
            }
        }
    }

    pub fn group_begin(&mut self, stream: u64) -> Result<(), Refusal> {
        let graph = self.captured(stream)?;
        let graph = self.graphs.get_mut(graph)?;
        if graph.group.is_some() {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "a task group is open already"));
        }
        graph.group = Some(graph.tasks.len());
        Ok(())
    }

    pub fn group_end(&mut self, stream: u64) -> Result<u64, Refusal> {
        let handle = self.captured(stream)?;
        let graph = self.graphs.get_mut(handle)?;
        let first = graph.group.take();
        let first = first.ok_or_else(|| refusal!(ACL_ERROR_RT_PARAM_INVALID, "no task group is open"))?;
        let len = graph.tasks.len() - first;
        Ok(self.groups.insert(Group { graph: handle, first, len }))
    }

    pub fn update_begin(&mut self, stream: u64, group: u64) -> Result<(), Refusal> {
        let group = *self.groups.get(group)?;
        self.graphs.get(group.graph)?;
        let stream = self.streams.get_mut(stream)?;
        if stream.update.is_some() || stream.capture.is_some() {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "the stream updates or captures already"));
        }
        stream.update = Some(Update { group, tasks: Vec::new() });
        Ok(())
    }

    pub fn update_end(&mut self, stream: u64) -> Result<(), Refusal> {
        let update = self.streams.get_mut(stream)?.update.take();
        let update = update.ok_or_else(|| refusal!(ACL_ERROR_RT_PARAM_INVALID, "no task group is being updated"))?;
        let old = &self.graphs.get(update.group.graph)?.tasks[update.group.first..][..update.group.len];
        let names = |tasks: &[Task]| tasks.iter().map(|task| task.name).collect::<Vec<_>>();
        if names(old) != names(&update.tasks) {
            let (old, new) = (names(old), names(&update.tasks));
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "the group has {old:?}, the update {new:?}"));
        }
        let ranges = update.tasks.iter().flat_map(|task| task.ranges.clone()).collect();
        let action = Action::Update(Arc::new(update));
        self.submit(stream, Task { ranges, ..Task::plain("aclmdlRICaptureTaskUpdateEnd", action) }).map(drop)
    }

    /// Puts a group's new tasks in place.
    pub fn apply(&mut self, update: &Update) -> Result<(), Fault> {
        let Ok(graph) = self.graphs.get_mut(update.group.graph) else {
            return Err(Fault::Violation("the graph was destroyed before its group was updated".to_owned()));
        };
        graph.tasks[update.group.first..][..update.group.len].clone_from_slice(&update.tasks);
        Ok(())
    }
}

fn invalid() -> Refusal {
    refusal!(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "the capture is invalid since an earlier call")
}
