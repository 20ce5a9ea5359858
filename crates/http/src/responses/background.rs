//! Responses that nobody waits for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::Value;

use crate::generate::Choices;
use crate::keys::Owner;
use crate::responses::reply::ResponseFormat;
use crate::responses::store::{Record, Responses};

/// Lets a response run to its end, whoever leaves, and gives the object as it begins. `guard` lives until the last
/// record is on disk.
pub(crate) fn run(
    store: &Arc<Responses>,
    owner: Owner,
    record: Record,
    mut format: ResponseFormat,
    mut choices: Choices,
    guard: impl Send + 'static,
) -> Value {
    let (id, queued) = (format.id().to_owned(), format.in_state("queued"));
    // In this order: what is not final and does not run has failed.
    let running = store.begin(&id);
    store.put(owner, Record { response: queued.clone(), ..record.clone() }, ());
    let store = store.clone();
    tokio::spawn(async move {
        let response = loop {
            let event = tokio::select! {
                event = choices.next() => event,
                () = running.cancel.cancelled() => break format.cancelled(),
            };
            running.started.store(true, Ordering::Relaxed);
            match event {
                Some(Ok(event)) => format.piece(&event.piece()),
                Some(Err(error)) => break format.failed(&error),
                None => break format.done(&choices.usage()),
            }
        };
        drop(choices);
        let written = store.put(owner, Record { response, ..record }, guard);
        store.ended(&id);
        let _ = written.await;
    });
    queued
}
