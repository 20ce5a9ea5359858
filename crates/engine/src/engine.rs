//! The engine thread.

use baton_model::Runner;

use crate::{EngineConfig, EngineHandle};

/// The engine thread, to be joined.
pub struct Engine {
    thread: std::thread::JoinHandle<()>,
}

impl Engine {
    /// Waits for the thread to end: after [`EngineHandle::shutdown`], when the engine gave up on its
    /// runner, or when the last handle and stream are gone.
    pub fn join(self) {
        let _ = self.thread.join();
    }
}

/// Starts the engine on its own thread.
pub fn spawn(runner: Box<dyn Runner>, config: EngineConfig) -> (EngineHandle, Engine) {
    let _ = (runner, config);
    unimplemented!("in the next commit")
}
