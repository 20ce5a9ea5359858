//! Commands to a rollout that is under way, as an admin sends them.

use baton_http::RolloutRefusal;
use serde_json::{Map, Value};

use super::plan::PlanError;
use super::policy::Command;

/// Reads a command.
pub(super) fn read(command: &str, body: Map<String, Value>) -> Result<Command, RolloutRefusal> {
    Ok(match command {
        "shadow" => Command::Shadow(only(body, "share", share)?),
        "share" => Command::Share(only(body, "share", share)?),
        "promote" => {
            nothing(&body)?;
            Command::Promote
        }
        "rollback" if body.is_empty() => Command::Rollback { reason: "by command".into() },
        "rollback" => {
            let reason = only(body, "reason", |value| value.as_str().map(str::to_owned).ok_or("a text is taken"))?;
            Command::Rollback { reason: format!("by command: {}", reason.chars().take(1000).collect::<String>()) }
        }
        other => return Err(RolloutRefusal::Conflict(format!("there is no command {other}"))),
    })
}

impl From<PlanError> for RolloutRefusal {
    fn from(PlanError { param, reason }: PlanError) -> Self {
        Self::Invalid { param, reason }
    }
}

/// A share from 0 to 1.
fn share(value: &Value) -> Result<f64, &'static str> {
    value.as_f64().filter(|share| (0.0..=1.0).contains(share)).ok_or("a number from 0 to 1 is taken")
}

/// The one field of a body.
fn only<T>(
    mut body: Map<String, Value>,
    name: &str,
    read: impl Fn(&Value) -> Result<T, &'static str>,
) -> Result<T, RolloutRefusal> {
    let value = body.remove(name).ok_or_else(|| PlanError::new(name, "it is missing"))?;
    nothing(&body)?;
    Ok(read(&value).map_err(|reason| PlanError::new(name, reason))?)
}

fn nothing(body: &Map<String, Value>) -> Result<(), PlanError> {
    body.keys().next().map_or(Ok(()), |name| Err(PlanError::new(name, "unknown field")))
}
