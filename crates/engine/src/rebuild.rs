//! Another runner in the place of a broken one, loaded on a thread of its own: meanwhile the engine thread takes
//! requests, ends those that their clients or deadlines end, drains and stops as ever.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use baton_model::Runner;
use crossbeam_channel::{Receiver, bounded};

/// Loads a runner like the one that the engine began with, with an empty cache, onto a device on which nothing else of
/// that engine is left; or says why it cannot. What it was asked for after the engine has stopped is dropped.
pub type Rebuild = Arc<dyn Fn() -> Result<Box<dyn Runner>, String> + Send + Sync>;

/// What comes of a rebuild.
pub(crate) type Rebuilt = Result<Box<dyn Runner>, String>;

/// Pause before the second attempt in a row; each later one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// Begins: drops the broken runner, if it is still there, and loads another, after a pause if others were loaded since
/// the last step. The receiver gets one answer, or is disconnected.
pub(crate) fn begin(broken: Option<Box<dyn Runner>>, rebuild: Rebuild, others: u32) -> Receiver<Rebuilt> {
    let (sender, receiver) = bounded(1);
    let work = move || {
        let rebuilt = catch_unwind(AssertUnwindSafe(|| {
            drop(broken);
            if let Some(doublings) = others.checked_sub(1) {
                thread::sleep(FIRST_PAUSE * 2_u32.saturating_pow(doublings));
            }
            rebuild()
        }));
        // Nobody waits any more once the engine has stopped.
        let _ = sender.send(rebuilt.unwrap_or_else(|_| Err("loading it panicked".into())));
    };
    // Without a thread the sender is dropped, which is an answer too.
    if let Err(error) = thread::Builder::new().name("engine-rebuild".into()).spawn(work) {
        tracing::error!(%error, "no thread to load another runner on");
    }
    receiver
}
