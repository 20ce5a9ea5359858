//! The admin's side of rollouts: commands and questions become messages to the thread of `driver`.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use baton_http::{RolloutControl, RolloutRefusal, Service};
use parking_lot::Mutex;
use serde_json::{Map, Value};
use tracing::error;

use super::candidate::Serving;
use super::driver::{Driver, Message, stopping};
use super::journal::Journal;
use super::policy::Rollouts;
use crate::settings::Settings;

/// What the control of rollouts begins with.
pub struct Start {
    pub service: Service,
    pub settings: Arc<Settings>,
    /// See [`super::base`].
    pub base: String,
    pub journal: Journal,
    pub serving: Serving,
}

/// The admin's side of the thread.
pub struct Control {
    messages: Sender<Message>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Control {
    /// Begins. Retired generations are waited for on this runtime.
    pub fn start(start: Start, runtime: tokio::runtime::Handle) -> Arc<Self> {
        let (messages, inbox) = channel();
        let rollouts = Rollouts { last_id: start.journal.ledger().rollout, current: None };
        let mut driver = Driver {
            service: start.service,
            settings: start.settings,
            base: start.base,
            journal: start.journal,
            serving: Some(start.serving),
            runtime,
            messages: messages.clone(),
            rollouts,
            candidate: None,
            epoch: Instant::now(),
            draining: false,
        };
        let thread = thread::Builder::new().name("rollout".into()).spawn(move || driver.run(&inbox));
        let thread = Mutex::new(Some(thread.expect("the system gives a thread")));
        Arc::new(Self { messages, thread })
    }

    /// Withdraws a candidate and takes none from now on.
    pub fn drain(&self) {
        // A thread that has ended has nothing to withdraw.
        let _ = self.messages.send(Message::Drain);
    }

    /// Ends all engines, once the service has ended.
    pub fn stop(&self) {
        let _ = self.messages.send(Message::Stop);
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            error!("the thread of rollouts panicked");
        }
    }
}

impl RolloutControl for Control {
    fn status(&self) -> Value {
        let (reply, answer) = channel();
        let _ = self.messages.send(Message::Status(reply));
        answer.recv().unwrap_or_else(|_| serde_json::json!({"phase": "stopped"}))
    }

    fn command(&self, command: &str, body: Map<String, Value>) -> Result<Value, RolloutRefusal> {
        let (reply, answer) = channel();
        let _ = self.messages.send(Message::Command { command: command.to_owned(), body, reply });
        answer.recv().unwrap_or_else(|_| Err(stopping()))
    }
}
