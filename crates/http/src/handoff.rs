//! What is known of a generation's hand-off: whether it may serve, how it was judged, what the canary says.
//!
//! The judging is done elsewhere; it may end, or change its mind, at any time. Nothing here blocks unless the policy
//! requires a hand-off: then only a generation that has passed serves.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::error::ApiError;

/// Whether a generation has been found to compute what was trained.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Admission {
    /// Nobody asks.
    #[default]
    Off,
    /// The checkpoint came without a bundle.
    Absent,
    /// It is being judged.
    Pending,
    /// It does.
    Passed,
    /// It does not, or not any more.
    Failed {
        /// Why, for operators and clients.
        reason: String,
    },
}

impl Admission {
    /// All states, as metrics and admin routes name them.
    pub(crate) const STATES: [&str; 5] = ["off", "absent", "pending", "passed", "failed"];

    /// One of [`Self::STATES`].
    pub(crate) fn state(&self) -> &'static str {
        let index = match self {
            Self::Off => 0,
            Self::Absent => 1,
            Self::Pending => 2,
            Self::Passed => 3,
            Self::Failed { .. } => 4,
        };
        Self::STATES[index]
    }

    /// Why it has failed.
    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            Self::Failed { reason } => Some(reason),
            _ => None,
        }
    }
}

/// How near a generation is to what its trainer computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parity {
    /// Largest difference of a log-probability, in nats.
    pub max_abs_logprob_diff: f64,
    /// Mean KL divergence of this device from the trainer, in nats.
    pub kl: f64,
    /// Part of the positions where both have the same best token, 0 to 1.
    pub top1_agreement: f64,
}

/// What the replayed golden cases say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Canary {
    pub runs: u64,
    /// The last run was out of tolerance.
    pub drifted: bool,
}

/// The hand-off of one generation; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct HandoffState(Arc<RwLock<Handoff>>);

/// A snapshot of the state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Handoff {
    pub admission: Admission,
    /// Only a generation that has passed serves.
    pub required: bool,
    /// JSON.
    pub report: Option<Arc<[u8]>>,
    pub parity: Option<Parity>,
    pub canary: Canary,
}

impl HandoffState {
    /// A generation that nothing has been measured of. `required`: it serves only once it has passed.
    pub fn new(admission: Admission, required: bool) -> Self {
        Self(Arc::new(RwLock::new(Handoff { admission, required, ..Handoff::default() })))
    }

    /// Where the judging stands.
    pub fn admission(&self) -> Admission {
        self.0.read().admission.clone()
    }

    /// The judging has come so far; where a hand-off is required, this takes the generation into service or out of it.
    pub fn set_admission(&self, admission: Admission) {
        self.0.write().admission = admission;
    }

    /// Whether the generation serves only if it has passed.
    pub fn set_required(&self, required: bool) {
        self.0.write().required = required;
    }

    /// The report, as JSON.
    pub fn set_report(&self, json: Vec<u8>) {
        self.0.write().report = Some(json.into());
    }

    /// What was measured.
    pub fn set_parity(&self, parity: Parity) {
        self.0.write().parity = Some(parity);
    }

    /// The golden cases have been replayed once more.
    pub fn canary_run(&self, drifted: bool) {
        let canary = &mut self.0.write().canary;
        canary.runs += 1;
        canary.drifted = drifted;
    }

    /// All of it.
    pub(crate) fn get(&self) -> Handoff {
        self.0.read().clone()
    }

    /// Whether the generation may serve.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        let handoff = self.0.read();
        match &handoff.admission {
            _ if !handoff.required => Ok(()),
            Admission::Off | Admission::Passed => Ok(()),
            Admission::Absent => Err(ApiError::handoff_absent()),
            Admission::Pending => Err(ApiError::handoff_pending()),
            Admission::Failed { reason } => Err(ApiError::handoff_failed(reason)),
        }
    }
}
