//! Events: marks in streams that other streams, other threads, and captured graphs wait for.
//!
//! Invariant: whoever waits for an event waits for what was recorded when it began to wait, not for later records.

use std::time::Instant;

use crate::{
    array::Refusal,
    constants::*,
    machine::{Machine, refusal},
    stream::{Action, Outcome, Progress, Task},
};

pub struct Event {
    pub context: u64,
    pub flags: i64,
    /// Made by the call whose events are not reset.
    pub extended: bool,
    pub recorded: Option<Recorded>,
    /// Recorded since its last reset, as the device sees it.
    signalled: bool,
    pub completed_at: Option<Instant>,
}

/// Where an event was recorded last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    Queued { stream: u64, position: u64 },
    Captured { graph: u64, stream: u64 },
}

impl Event {
    pub fn new(context: u64, flags: i64, extended: bool) -> Self {
        Self { context, flags, extended, recorded: None, signalled: false, completed_at: None }
    }

    fn external(&self) -> bool {
        self.flags & ACL_EVENT_EXTERNAL != 0
    }

    /// Whether streams may wait for it.
    fn orders(&self) -> bool {
        self.flags & ACL_EVENT_SYNC != 0 || self.external()
    }
}

impl Machine {
    pub fn record(&mut self, event: u64, stream: u64) -> Result<(), Refusal> {
        let external = self.events.get(event)?.external();
        let recorded = match self.streams.get(stream)?.capture {
            Some(graph) if !external => Recorded::Captured { graph, stream },
            _ => {
                let position = self.submit(stream, Task::plain("aclrtRecordEvent", Action::Record(event)))?;
                Recorded::Queued { stream, position }
            }
        };
        let event = self.events.get_mut(event)?;
        (event.recorded, event.completed_at) = (Some(recorded), None);
        Ok(())
    }

    /// Makes a stream wait for what was recorded up to now; for an event that never was, for nothing.
    pub fn stream_wait(&mut self, stream: u64, event: u64) -> Result<(), Refusal> {
        let name = "aclrtStreamWaitEvent";
        let state = self.events.get(event)?;
        if !state.orders() {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "an event without ACL_EVENT_SYNC cannot be waited for"));
        }
        let (external, recorded, capture) = (state.external(), state.recorded, self.streams.get(stream)?.capture);
        match (recorded, capture) {
            (_, Some(_)) if external => self.submit(stream, Task::plain(name, Action::WaitExternal(event))).map(drop),
            (Some(Recorded::Captured { graph, stream: recorder }), _) => self.join(graph, recorder, stream),
            (Some(Recorded::Queued { .. }), Some(graph)) => {
                let text = "a captured stream cannot wait for what was recorded outside of the capture";
                Err(self.invalidate(graph, ACL_ERROR_RT_CAPTURE_DEPENDENCY, text))
            }
            (Some(Recorded::Queued { stream: recorder, position }), None) => {
                self.submit(stream, Task::plain(name, Action::Wait { stream: recorder, position })).map(drop)
            }
            (None, _) => Ok(()),
        }
    }

    pub fn reset_event(&mut self, event: u64, stream: u64) -> Result<(), Refusal> {
        let state = self.events.get(event)?;
        if !state.orders() || state.extended {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "an event of this kind is not reset"));
        }
        self.submit(stream, Task::plain("aclrtResetEvent", Action::ResetEvent(event))).map(drop)
    }

    /// What a device does to an event when it comes to it. One that was destroyed meanwhile is nobody's.
    pub fn signal(&mut self, event: u64, signalled: bool) -> Outcome {
        if let Ok(event) = self.events.get_mut(event) {
            event.signalled = signalled;
            event.completed_at = signalled.then(Instant::now);
        }
        Outcome::Done
    }

    pub fn wait_external(&mut self, event: u64) -> Result<Outcome, Refusal> {
        if self.events.get(event)?.signalled {
            return Ok(Outcome::Done);
        }
        let Some(Recorded::Queued { stream, position }) = self.events.get(event)?.recorded else {
            return Ok(Outcome::Blocked(None));
        };
        match self.wait_for(stream, position)? {
            Progress::Done if self.events.get(event)?.signalled => Ok(Outcome::Done),
            Progress::Done => Ok(Outcome::Blocked(None)),
            Progress::Blocked(until) => Ok(Outcome::Blocked(until)),
        }
    }

    /// Stream and position that complete an event; none if it was not recorded.
    pub fn target(&self, event: u64) -> Result<Option<(u64, u64)>, Refusal> {
        match self.events.get(event)?.recorded {
            None => Ok(None),
            Some(Recorded::Queued { stream, position }) => Ok(Some((stream, position))),
            Some(Recorded::Captured { .. }) => {
                Err(refusal!(ACL_ERROR_RT_EVENT_CAPTURED, "the event was recorded in a capture"))
            }
        }
    }
}
