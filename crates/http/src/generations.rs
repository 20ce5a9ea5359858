//! Which generation a request gets.
//!
//! One generation serves; at most one candidate stands beside it. A request picks here, once, after its body was read
//! and before any work on its text, under one lock: so every transition is atomic for requests. Which of the two it
//! gets, or whether the candidate answers it unseen, depends on its id and a key that is drawn when the candidate is
//! staged: a retry under the same id goes the same way, and a larger share only adds ids to a smaller one.
//!
//! Names of adapters belong to the generation that serves, and so do requests that ask for them.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Weak};

use parking_lot::RwLock;

use crate::error::ApiError;
use crate::generation::{Generation, InUse, NewGeneration, Retired, Target};
use crate::observed::{GenerationStats, Observed, ShadowStats};
use crate::shadow::{Shadow, Shadows};

/// What a candidate gets of the requests. Shares are 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Traffic {
    /// Nothing.
    None,
    /// It answers this share of the requests as well, and nobody sees its answers.
    Shadow(f64),
    /// It answers this share of the requests.
    Share(f64),
}

/// Why a transition does not happen. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransitionError {
    /// There is nothing that a candidate could stand beside.
    #[error("no model is served yet, so there is nothing to replace")]
    NothingServed,
    /// There is room for one.
    #[error("there is a candidate already; promote or withdraw it first")]
    CandidateExists,
    /// There is none.
    #[error("there is no candidate; stage one first")]
    NoCandidate,
    /// Labels could not tell the two apart.
    #[error("this generation is served already")]
    SameGeneration,
    /// Not from 0 to 1.
    #[error("a share of traffic must be a number from 0 to 1")]
    ShareOutOfRange,
}

/// See the head of the file.
#[derive(Default)]
pub(crate) struct Generations(RwLock<State>);

#[derive(Default)]
struct State {
    serving: Option<Arc<Generation>>,
    candidate: Option<Candidate>,
    /// Those that requests may still hold.
    retired: Vec<Weak<Generation>>,
}

struct Candidate {
    generation: Arc<Generation>,
    traffic: Traffic,
    key: RandomState,
    shadows: Arc<Shadows>,
}

/// What a request gets.
pub(crate) struct Pick {
    pub generation: InUse,
    pub target: Target,
    /// The candidate is to answer as well.
    pub shadow: Option<Shadow>,
}

/// All generations that are alive.
pub(crate) struct All {
    pub generations: Vec<(Role, Arc<Generation>)>,
    /// What the candidate gets, if there is one.
    pub traffic: Option<Traffic>,
    /// What the candidate has shown unseen.
    pub shadow: Option<ShadowStats>,
}

/// A generation's part, as admin routes name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Serving,
    Candidate,
    Retired,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Candidate => "candidate",
            Self::Retired => "retired",
        }
    }
}

impl Candidate {
    /// Whether the request of this id is in the share.
    fn hit(&self, request_id: &[u8], share: f64) -> bool {
        // 53 bits, which a double holds, so that the quotient is below 1.
        let fraction = (self.key.hash_one(request_id) >> 11) as f64 / (1_u64 << 53) as f64;
        fraction < share
    }
}

impl Generations {
    /// The generation for the request of this id, which asks for this model.
    pub fn pick(&self, request_id: &[u8], asked: Option<&str>) -> Result<Pick, ApiError> {
        let state = self.0.read();
        let serving = state.serving.as_ref().ok_or_else(ApiError::model_loading)?;
        let of = |generation: &Arc<Generation>, shadow| {
            Ok(Pick { generation: InUse::new(generation), target: generation.target(asked)?, shadow })
        };
        let Some(candidate) = &state.candidate else { return of(serving, None) };
        let both = [serving, &candidate.generation].iter().all(|generation| generation.has_name(asked));
        let able = |share| both && candidate.hit(request_id, share) && candidate.generation.ready().is_ok();
        match candidate.traffic {
            Traffic::Share(share) if able(share) => of(&candidate.generation, None),
            Traffic::Shadow(share) if able(share) => of(serving, candidate.shadows.seat(&candidate.generation)),
            _ => of(serving, None),
        }
    }

    /// The one that serves.
    pub fn serving(&self) -> Option<Arc<Generation>> {
        self.0.read().serving.clone()
    }

    /// All that are alive.
    pub fn all(&self) -> All {
        let state = self.0.read();
        let serving = state.serving.iter().map(|generation| (Role::Serving, generation.clone()));
        let candidate = state.candidate.iter().map(|candidate| (Role::Candidate, candidate.generation.clone()));
        let retired = state.retired.iter().filter_map(Weak::upgrade).map(|generation| (Role::Retired, generation));
        All {
            generations: serving.chain(candidate).chain(retired).collect(),
            traffic: state.candidate.as_ref().map(|candidate| candidate.traffic),
            shadow: state.candidate.as_ref().map(|candidate| candidate.shadows.stats()),
        }
    }

    /// Serves this one from now on.
    pub fn install(&self, new: NewGeneration) -> Option<Retired> {
        let generation = Generation::new(new);
        let old = self.0.write().serve(generation)?;
        Some(Retired::new(&old))
    }

    /// Lets this one stand beside the one that serves, without traffic.
    pub fn stage(&self, new: NewGeneration) -> Result<(), TransitionError> {
        let generation = Generation::new(new);
        let mut state = self.0.write();
        let serving = state.serving.as_ref().ok_or(TransitionError::NothingServed)?;
        if state.candidate.is_some() {
            return Err(TransitionError::CandidateExists);
        }
        if generation.label() == serving.label() {
            return Err(TransitionError::SameGeneration);
        }
        *serving.stats.lock() = GenerationStats::default();
        let (key, shadows) = (RandomState::new(), Arc::default());
        state.candidate = Some(Candidate { generation, traffic: Traffic::None, key, shadows });
        Ok(())
    }

    /// Gives the candidate this much from now on.
    pub fn set_traffic(&self, traffic: Traffic) -> Result<(), TransitionError> {
        match traffic {
            Traffic::Shadow(share) | Traffic::Share(share) if !(0.0..=1.0).contains(&share) => {
                return Err(TransitionError::ShareOutOfRange);
            }
            _ => {}
        }
        self.0.write().candidate.as_mut().ok_or(TransitionError::NoCandidate)?.traffic = traffic;
        Ok(())
    }

    /// What the candidate gets, if there is one.
    pub fn traffic(&self) -> Option<Traffic> {
        self.0.read().candidate.as_ref().map(|candidate| candidate.traffic)
    }

    /// The candidate serves from now on.
    pub fn promote(&self) -> Result<Retired, TransitionError> {
        let old = {
            let mut state = self.0.write();
            let candidate = state.candidate.take().ok_or(TransitionError::NoCandidate)?;
            candidate.generation.changes_role();
            state.serve(candidate.generation).expect("a candidate stands beside one that serves")
        };
        Ok(Retired::new(&old))
    }

    /// The candidate is gone from now on, and with it what it was answering unseen.
    pub fn withdraw(&self) -> Result<Retired, TransitionError> {
        let candidate = {
            let mut state = self.0.write();
            let candidate = state.candidate.take().ok_or(TransitionError::NoCandidate)?;
            state.retire(&candidate.generation);
            candidate
        };
        candidate.shadows.end();
        Ok(Retired::new(&candidate.generation))
    }

    /// What has happened since the last staging; `None` if nothing is served.
    pub fn observed(&self) -> Option<Observed> {
        let state = self.0.read();
        let stats = |generation: &Arc<Generation>| generation.stats.lock().clone();
        Some(Observed {
            serving: stats(state.serving.as_ref()?),
            candidate: state.candidate.as_ref().map(|candidate| stats(&candidate.generation)),
            shadow: state.candidate.as_ref().map(|candidate| candidate.shadows.stats()).unwrap_or_default(),
        })
    }
}

impl State {
    /// Puts this one in the place of the one that serves, which is returned: what may be the end of it is not for those
    /// to wait for who need the lock.
    fn serve(&mut self, generation: Arc<Generation>) -> Option<Arc<Generation>> {
        let old = self.serving.replace(generation)?;
        self.retire(&old);
        Some(old)
    }

    fn retire(&mut self, generation: &Arc<Generation>) {
        generation.changes_role();
        self.retired.retain(|retired| retired.strong_count() > 0);
        self.retired.push(Arc::downgrade(generation));
    }
}
