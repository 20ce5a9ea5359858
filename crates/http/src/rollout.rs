//! What admin routes may do to a rollout. Who does it is not known here.

use serde_json::{Map, Value};

/// Commands and shows the rollout of a new generation. Called on threads that may block, several at once.
pub trait RolloutControl: Send + Sync {
    /// Where it stands.
    fn status(&self) -> Value;

    /// Obeys one of [`COMMANDS`], or `start`, and returns what to answer.
    ///
    /// # Errors
    /// With the kind of refusal, and the reason.
    fn command(&self, command: &str, body: Map<String, Value>) -> Result<Value, RolloutRefusal>;
}

/// Commands to a rollout that has started.
pub const COMMANDS: [&str; 4] = ["shadow", "share", "promote", "rollback"];

/// Why a command is not obeyed. What served before serves on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RolloutRefusal {
    /// A field of the body cannot be used.
    Invalid {
        /// Its name.
        param: String,
        /// Why, and what could be.
        reason: String,
    },
    /// It does not go together with what is under way.
    Conflict(String),
    /// The server was started without what it takes.
    Unavailable(String),
    /// It was tried, and failed.
    Failed(String),
}
