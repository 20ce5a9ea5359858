//! Looks from outside at how long the step under way takes, from its begin or, if that was ahead, from the end of the step
//! before it: a device that hangs keeps the engine thread, which then can tell nobody anything.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use crate::EngineFailure;
use crate::handle::{Command, Shared, Submission};

/// Tells the watchdog that the engine thread has ended, by being dropped.
pub(crate) enum Never {}

/// Waits until the engine thread ends, or a step takes longer than `timeout`: then it ends all requests in the thread's
/// place and gives true.
pub(crate) fn watch(
    shared: &Arc<Shared>,
    commands: &Receiver<Command>,
    ended: &Receiver<Never>,
    timeout: Duration,
) -> bool {
    loop {
        let started = *shared.step_started.lock();
        // A step that begins meanwhile has until after the next look.
        let left = started.map_or(timeout, |start| timeout.saturating_sub(start.elapsed()));
        match ended.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(_) | Err(RecvTimeoutError::Disconnected) => return false,
        }
        let started = *shared.step_started.lock();
        if started.is_some_and(|start| start.elapsed() >= timeout) {
            give_up(shared, commands, timeout);
            return true;
        }
    }
}

fn give_up(shared: &Shared, commands: &Receiver<Command>, timeout: Duration) {
    let failure = EngineFailure::Hung(timeout);
    tracing::error!(%failure, "the engine is given up");
    // Nothing enters the channel from now on.
    shared.gate.lock().down = true;
    // What the thread has not read. Should it read some before this does, it finds the streams sealed.
    let unread = commands.try_iter().filter_map(|command| match command {
        Command::Submit(submissions) => Some(submissions),
        _ => None,
    });
    let unread: Vec<Submission> = unread.flatten().collect();
    // Statistics first, as the thread does it, and in its order of locks.
    let mut stats = shared.stats.lock();
    let mut streams = shared.streams.lock();
    stats.alive = false;
    stats.device_failures.count(&failure);
    stats.failure = Some(failure.clone());
    stats.finished.error += (streams.len() + unread.len()) as u64;
    (stats.running, stats.waiting, stats.background) = (0, 0, 0);
    drop(stats);
    streams.seal(&failure);
    unread.into_iter().for_each(|submission| streams.insert(submission.id, submission.events));
    drop(streams);
    shared.drained.send_replace(true);
}
