//! A rollout as a state machine over values: events in, transitions and actions out; time is an argument.
//!
//! ```text
//! loading → gating → standing ⇄ shadow ⇄ share → promoting → promoted
//!     ↓         ↓        ↓         ↓       ↓
//!   failed      └────────┴── rolling back ─┴──→ rolled back
//! ```
//!
//! Invariants: a candidate gets traffic, and is promoted, only after the gate has admitted it; every rollout that is
//! rolled back ends; there is never a second candidate, since [`Rollouts`] begins nothing before the last one has ended,
//! its generation freed. Transitions say all that [`Ledger`](super::ledger::Ledger) needs to arrive at the same phase.

use std::time::Duration;

use baton_http::{Parity, Traffic};
use serde::{Deserialize, Serialize};

use super::plan::Plan;
use super::rules::{self, Observation};

/// Where a rollout stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The candidate is being loaded.
    Loading,
    /// It is being judged.
    Gating,
    /// It is admitted and gets no traffic.
    Standing,
    /// It answers part of the requests unseen.
    Shadow,
    /// It answers part of the requests.
    Share,
    /// It serves; the generation before it finishes what it began.
    Promoting,
    /// It serves.
    Promoted,
    /// It is withdrawn, and finishes what it began.
    RollingBack,
    /// It is gone.
    RolledBack,
    /// It never was loaded.
    Failed,
}

impl Phase {
    /// Nothing more happens.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Promoted | Self::RolledBack | Self::Failed)
    }

    /// The candidate is admitted and may get traffic.
    pub fn is_admitted(self) -> bool {
        matches!(self, Self::Standing | Self::Shadow | Self::Share)
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Gating => "gating",
            Self::Standing => "standing",
            Self::Shadow => "shadow",
            Self::Share => "share",
            Self::Promoting => "promoting",
            Self::Promoted => "promoted",
            Self::RollingBack => "rolling_back",
            Self::RolledBack => "rolled_back",
            Self::Failed => "failed",
        }
    }
}

/// What the gate found.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Whether the policy of hand-offs lets it serve.
    pub admitted: bool,
    /// Why, in words.
    pub summary: String,
    /// What was measured, if anything was.
    pub parity: Option<Parity>,
}

/// What comes from outside.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The candidate is loaded.
    Loaded { generation: String },
    /// There is no candidate, and will be none.
    LoadFailed { reason: String },
    /// The gate has judged.
    Gated(Verdict),
    /// A look at both generations.
    Observed(Box<Observation>),
    /// An operator's wish.
    Command(Command),
    /// An action could not be carried out.
    Broken { reason: String },
    /// The generation that was replaced or withdrawn is freed.
    Gone,
}

/// What an operator may ask of a rollout.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Part of the requests, 0 to 1, answered unseen. It takes the place of the plan's stages.
    Shadow(f64),
    /// Part of the requests, 0 to 1. It takes the place of the plan's stages.
    Share(f64),
    Promote,
    Rollback {
        reason: String,
    },
}

/// What is to be done, in this order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Action {
    /// Let the candidate stand beside the generation that serves.
    Stage,
    SetTraffic(Traffic),
    Promote,
    /// Take the candidate away, or what is loading of it, and tell when it is gone.
    Withdraw,
}

/// What happened, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "transition", content = "details", rename_all = "snake_case")]
pub enum Transition {
    Started(Box<Started>),
    Loaded {
        generation: String,
    },
    /// The gate lets it serve.
    Admitted {
        summary: String,
    },
    /// Without traffic from now on.
    Standing,
    Shadow(Part),
    Share(Part),
    Promoted,
    RolledBack {
        reason: String,
    },
    Failed {
        reason: String,
    },
    /// The generation that was replaced or withdrawn is freed.
    Retired,
    /// The journal was shortened; these promotions hold.
    Compacted {
        promotions: super::ledger::Promotions,
    },
    /// An operator forgot all promotions.
    Reset,
}

/// What a rollout begins with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// The model that the server was started with.
    pub base: String,
    /// The names that clients use.
    pub names: Vec<String>,
    pub plan: Plan,
}

/// Traffic of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Of the requests, 0 to 1.
    pub part: f64,
    /// The plan's stage that asks for it, from 0; a command if none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<usize>,
}

/// A command that does not go together with where the rollout stands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// What an event leads to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Step {
    pub transitions: Vec<Transition>,
    pub actions: Vec<Action>,
}

impl Step {
    fn new(transition: Transition, action: Option<Action>) -> Self {
        Self { transitions: vec![transition], actions: action.into_iter().collect() }
    }

    fn then(mut self, other: Step) -> Self {
        self.transitions.extend(other.transitions);
        self.actions.extend(other.actions);
        self
    }
}

/// One rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    pub id: u64,
    pub started: Started,
    pub phase: Phase,
    pub traffic: Traffic,
    /// The plan's stage under way; `None` before, after, and under commands.
    pub stage: Option<usize>,
    /// Digest of the candidate, once it is known.
    pub generation: Option<String>,
    /// What the gate said, once it did.
    pub verdict: Option<Verdict>,
    /// Why it was rolled back or failed.
    pub reason: Option<String>,
    /// When this traffic began, and what had been seen by then.
    entered: Duration,
    baseline: Observation,
    /// What was seen last.
    pub last: Observation,
}

impl Rollout {
    pub fn plan(&self) -> &Plan {
        &self.started.plan
    }

    /// How far the stage has come: requests that count, and seconds.
    pub fn progress(&self, now: Duration) -> (u64, Duration) {
        let count = |seen: &Observation| match self.traffic {
            Traffic::Shadow(_) => seen.compared,
            _ => seen.candidate.requests,
        };
        (count(&self.last).saturating_sub(count(&self.baseline)), now.saturating_sub(self.entered))
    }

    /// Whether it goes on only by command.
    pub fn waits(&self) -> bool {
        self.phase.is_admitted() && self.stage.is_none()
    }

    /// What an event leads to. An event that comes too late changes nothing.
    pub fn on(&mut self, event: Event, now: Duration) -> Result<Step, Refused> {
        match event {
            Event::Command(command) => return self.obey(command, now),
            Event::Loaded { generation } if self.phase == Phase::Loading => {
                self.phase = Phase::Gating;
                self.generation = Some(generation.clone());
                return Ok(Step::new(Transition::Loaded { generation }, None));
            }
            Event::LoadFailed { reason } if self.phase == Phase::Loading => {
                self.phase = Phase::Failed;
                self.reason = Some(reason.clone());
                return Ok(Step::new(Transition::Failed { reason }, None));
            }
            // It was to be taken away, and there is nothing.
            Event::LoadFailed { .. } if self.phase == Phase::RollingBack => return Ok(self.gone()),
            Event::Gated(verdict) if self.phase == Phase::Gating => return Ok(self.gated(verdict, now)),
            Event::Observed(seen) if self.phase.is_admitted() => return Ok(self.observed(*seen, now)),
            Event::Broken { reason }
                if matches!(self.phase, Phase::Loading | Phase::Gating) || self.phase.is_admitted() =>
            {
                return Ok(self.roll_back(reason));
            }
            Event::Gone if matches!(self.phase, Phase::Promoting | Phase::RollingBack) => return Ok(self.gone()),
            _ => {}
        }
        Ok(Step::default())
    }

    fn obey(&mut self, command: Command, now: Duration) -> Result<Step, Refused> {
        let refused = |reason: String| Err(Refused(reason));
        if let Command::Rollback { reason } = command {
            return match self.phase {
                Phase::Promoting | Phase::Promoted => refused(format!(
                    "rollout {} is promoted; to go back, start a rollout of the earlier checkpoint",
                    self.id
                )),
                phase if phase.is_terminal() || phase == Phase::RollingBack => {
                    refused(format!("there is nothing to roll back: rollout {} is {}", self.id, phase.name()))
                }
                _ => Ok(self.roll_back(reason)),
            };
        }
        match self.phase {
            Phase::Loading | Phase::Gating => {
                return refused(format!("the gate has not admitted the candidate yet; it is {}", self.phase.name()));
            }
            phase if !phase.is_admitted() => {
                return refused(format!("there is no candidate: rollout {} is {}", self.id, phase.name()));
            }
            _ => {}
        }
        Ok(match command {
            Command::Promote => self.promote(),
            // A part of nothing, of whichever kind.
            Command::Shadow(0.0) | Command::Share(0.0) => self.enter(Traffic::None, None, now),
            Command::Shadow(part) => self.enter(Traffic::Shadow(part), None, now),
            Command::Share(part) => self.enter(Traffic::Share(part), None, now),
            Command::Rollback { .. } => unreachable!("handled above"),
        })
    }

    fn gated(&mut self, verdict: Verdict, now: Duration) -> Step {
        let refusal = match verdict.admitted {
            false => Some(verdict.summary.clone()),
            true => rules::broken_parity(&self.plan().rules, verdict.parity),
        };
        let summary = verdict.summary.clone();
        self.verdict = Some(verdict);
        if let Some(reason) = refusal {
            return self.roll_back(format!("the gate does not admit it: {reason}"));
        }
        let admitted = Step::new(Transition::Admitted { summary }, Some(Action::Stage));
        admitted.then(match self.plan().stages.first() {
            None => self.enter(Traffic::None, None, now),
            Some(stage) => self.enter(stage.traffic, Some(0), now),
        })
    }

    fn observed(&mut self, seen: Observation, now: Duration) -> Step {
        self.last = seen;
        if let Some(reason) = rules::broken(&self.plan().rules, &self.last, &self.baseline) {
            return self.roll_back(reason);
        }
        let Some(number) = self.stage else { return Step::default() };
        let (stage, (requests, time)) = (&self.plan().stages[number], self.progress(now));
        if requests < stage.requests || time < Duration::from_secs(stage.seconds) {
            return Step::default();
        }
        match self.plan().stages.get(number + 1) {
            Some(next) => self.enter(next.traffic, Some(number + 1), now),
            None if self.plan().promotes() => self.promote(),
            // What the last stage gave it, it keeps.
            None => self.enter(self.traffic, None, now),
        }
    }

    fn enter(&mut self, traffic: Traffic, stage: Option<usize>, now: Duration) -> Step {
        (self.traffic, self.stage, self.entered) = (traffic, stage, now);
        self.baseline = self.last.clone();
        let (phase, transition) = match traffic {
            Traffic::None => (Phase::Standing, Transition::Standing),
            Traffic::Shadow(part) => (Phase::Shadow, Transition::Shadow(Part { part, stage })),
            Traffic::Share(part) => (Phase::Share, Transition::Share(Part { part, stage })),
        };
        self.phase = phase;
        Step::new(transition, Some(Action::SetTraffic(traffic)))
    }

    fn promote(&mut self) -> Step {
        (self.phase, self.traffic, self.stage) = (Phase::Promoting, Traffic::None, None);
        Step::new(Transition::Promoted, Some(Action::Promote))
    }

    fn roll_back(&mut self, reason: String) -> Step {
        (self.phase, self.traffic, self.stage) = (Phase::RollingBack, Traffic::None, None);
        self.reason = Some(reason.clone());
        Step::new(Transition::RolledBack { reason }, Some(Action::Withdraw))
    }

    fn gone(&mut self) -> Step {
        self.phase = match self.phase {
            Phase::Promoting => Phase::Promoted,
            _ => Phase::RolledBack,
        };
        Step::new(Transition::Retired, None)
    }
}

/// All rollouts of a server, one at a time.
#[derive(Debug, Clone, Default)]
pub struct Rollouts {
    /// The last one's number.
    pub last_id: u64,
    /// The last one that this process has begun.
    pub current: Option<Rollout>,
}

impl Rollouts {
    /// Begins one.
    pub fn start(&mut self, started: Started, now: Duration) -> Result<Step, Refused> {
        if let Some(current) = self.current.as_ref().filter(|current| !current.phase.is_terminal()) {
            let (id, phase) = (current.id, current.phase.name());
            return Err(Refused(match current.phase {
                Phase::Promoting => {
                    format!("rollout {id} is promoted, but the generation before it still finishes what it began")
                }
                Phase::RollingBack => format!("rollout {id} is rolled back, but still finishes what it began"),
                _ => format!("rollout {id} is under way ({phase}); promote it or roll it back first"),
            }));
        }
        self.last_id += 1;
        self.current = Some(Rollout {
            id: self.last_id,
            started: started.clone(),
            phase: Phase::Loading,
            traffic: Traffic::None,
            stage: None,
            generation: None,
            verdict: None,
            reason: None,
            entered: now,
            baseline: Observation::default(),
            last: Observation::default(),
        });
        Ok(Step::new(Transition::Started(started.into()), None))
    }
}

#[cfg(test)]
mod tests;
