//! What the records of the journal say together: which rollout was the last and how far it came, and what has been promoted.
//!
//! Invariant: a record that cannot follow those before it is refused, and changes nothing.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::policy::{Phase, Started, Transition};

/// Records that are shown.
const SHOWN: usize = 20;

/// What serves instead of a base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Promoted {
    pub rollout: u64,
    pub model: PathBuf,
    /// What it was when it was promoted: digest of its files.
    pub generation: String,
    /// The names that clients use.
    pub names: Vec<String>,
}

/// By base model.
pub type Promotions = BTreeMap<String, Promoted>;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub seq: u64,
    pub unix_ms: u64,
    pub rollout: u64,
    #[serde(flatten)]
    pub transition: Transition,
}

/// What all records together say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ledger {
    /// Of the last record.
    pub seq: u64,
    /// Number and phase of the last rollout.
    pub rollout: u64,
    pub phase: Option<Phase>,
    started: Option<Started>,
    generation: Option<String>,
    pub promotions: Promotions,
    /// The last records.
    pub recent: VecDeque<Record>,
}

impl Ledger {
    /// Takes in the next record; an error says why it cannot be the next.
    pub fn apply(&mut self, record: &Record) -> Result<(), String> {
        if self.seq != 0 && record.seq != self.seq + 1 {
            return Err(format!("its number is {} after {}", record.seq, self.seq));
        }
        let open = self.phase.is_some_and(|phase| !phase.is_terminal());
        let phase = match &record.transition {
            Transition::Compacted { promotions } => {
                self.promotions = promotions.clone();
                self.phase
            }
            Transition::Reset => {
                self.promotions.clear();
                self.phase
            }
            Transition::Started(started) => {
                if open || record.rollout <= self.rollout {
                    return Err(format!("rollout {} begins beside rollout {}", record.rollout, self.rollout));
                }
                (self.started, self.generation) = (Some((**started).clone()), None);
                Some(Phase::Loading)
            }
            transition => {
                let (Some(phase), true) = (self.phase, record.rollout == self.rollout) else {
                    return Err(format!("rollout {} has not begun", record.rollout));
                };
                let next = after(phase, transition).ok_or_else(|| format!("it cannot follow {}", phase.name()))?;
                if let Transition::Loaded { generation } = transition {
                    self.generation = Some(generation.clone());
                }
                if let (Transition::Promoted, Some(started), Some(generation)) =
                    (transition, &self.started, &self.generation)
                {
                    let (model, names) = (started.plan.model.clone(), started.names.clone());
                    let promoted = Promoted { rollout: record.rollout, model, generation: generation.clone(), names };
                    self.promotions.insert(started.base.clone(), promoted);
                }
                Some(next)
            }
        };
        (self.seq, self.rollout, self.phase) = (record.seq, record.rollout, phase);
        self.recent.push_back(record.clone());
        if self.recent.len() > SHOWN {
            self.recent.pop_front();
        }
        Ok(())
    }
}

/// The phase that a transition leads to.
fn after(phase: Phase, transition: &Transition) -> Option<Phase> {
    use Phase::*;
    Some(match (phase, transition) {
        (Loading, Transition::Loaded { .. }) => Gating,
        (Loading, Transition::Failed { .. }) => Failed,
        // What it gets is in the next record.
        (Gating, Transition::Admitted { .. }) => Standing,
        (phase, Transition::Standing) if phase.is_admitted() => Standing,
        (phase, Transition::Shadow(_)) if phase.is_admitted() => Shadow,
        (phase, Transition::Share(_)) if phase.is_admitted() => Share,
        (phase, Transition::Promoted) if phase.is_admitted() => Promoting,
        (Loading | Gating | Standing | Shadow | Share, Transition::RolledBack { .. }) => RollingBack,
        (Promoting, Transition::Retired) => Promoted,
        (RollingBack, Transition::Retired) => RolledBack,
        _ => return None,
    })
}
