//! Where the events of requests go. The engine thread sends; when it is stuck in its runner, the watchdog ends all
//! streams in its place.
//!
//! Invariant: once sealed, every stream has got its `Finished`, and nothing more reaches any of them, whoever sends it.

use std::collections::BTreeMap;

use tokio::sync::mpsc::UnboundedSender;

use crate::scheduler::RequestOutput;
use crate::{EngineFailure, FinishReason, OutputEvent, RequestId, Timings, Usage};

/// The streams of the requests that have not ended.
#[derive(Default)]
pub(crate) struct Streams {
    open: BTreeMap<RequestId, UnboundedSender<OutputEvent>>,
    sealed: Option<EngineFailure>,
}

impl Streams {
    /// Adds the stream of an accepted request.
    pub fn insert(&mut self, id: RequestId, events: UnboundedSender<OutputEvent>) {
        match &self.sealed {
            Some(failure) => end(&events, failure),
            None => _ = self.open.insert(id, events),
        }
    }

    /// Sends an event; false if its client has left.
    pub fn send(&mut self, RequestOutput { id, event }: RequestOutput) -> bool {
        if self.sealed.is_some() {
            return true;
        }
        let finished = matches!(event, OutputEvent::Finished { .. });
        let stream = self.open.get(&id).expect("only requests that have not ended have output");
        let received = stream.send(event).is_ok();
        if finished {
            self.open.remove(&id);
        }
        received
    }

    /// How many have not ended.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Ends all streams, those to come as well.
    pub fn seal(&mut self, failure: &EngineFailure) {
        std::mem::take(&mut self.open).values().for_each(|events| end(events, failure));
        self.sealed.get_or_insert_with(|| failure.clone());
    }

    /// Why they are sealed, if they are.
    pub fn sealed(&self) -> Option<&EngineFailure> {
        self.sealed.as_ref()
    }
}

/// Of what it took, nobody knows who is not the engine thread.
fn end(events: &UnboundedSender<OutputEvent>, failure: &EngineFailure) {
    let reason = FinishReason::Error(failure.clone());
    // A client that has left needs no news.
    let _ = events.send(OutputEvent::Finished { reason, usage: Usage::default(), timings: Timings::default() });
}
