//! One case against what was computed of it, position by position.
//!
//! Everything is teacher-forced: the device sees the ids of the case whatever it would have answered, so a difference
//! at one position is no difference of context. Invariant: a comparison is a pure function of its two sides; figures
//! over many cases are made of comparisons in [`Parity`](crate::Parity).

use std::collections::BTreeMap;

use crate::{Case, Replayed, Task};

/// Least probability of all tokens beside the k that are compared, as one. Golden values have six decimals and a
/// device's are float32, so a mass below this is rounding, and its logarithm noise.
const REST_FLOOR: f64 = 1e-5;

/// What a device should compute of a case: what the trainer did, or another device.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    /// Number of ids.
    len: usize,
    /// Log-probability of each id but the first, in nats; may be empty.
    logprobs: Vec<f64>,
    /// By position.
    top: BTreeMap<u32, Top>,
    /// Position of the last id before the greedy answer, and the answer.
    greedy: (usize, Vec<u32>),
}

#[derive(Debug, Clone, PartialEq)]
struct Top {
    best: u32,
    /// By how much the best log-probability exceeds the second-best known.
    margin: f64,
    logprobs: Vec<(u32, f64)>,
}

impl Top {
    fn new(best: u32, best_logprob: f64, logprobs: Vec<(u32, f64)>) -> Self {
        let others = logprobs.iter().filter(|(id, _)| *id != best).map(|(_, logprob)| *logprob);
        Self { best, margin: best_logprob - others.fold(f64::NEG_INFINITY, f64::max), logprobs }
    }
}

impl From<&Case> for Expected {
    fn from(case: &Case) -> Self {
        let top = case.top.iter().filter_map(|(&position, top)| {
            let &(best, logprob) = top.first()?;
            Some((position, Top::new(best, logprob, top.clone())))
        });
        Self {
            len: case.ids().count(),
            logprobs: case.logprobs.clone(),
            top: top.collect(),
            greedy: (case.prompt_ids.len().saturating_sub(1), case.greedy_ids.clone()),
        }
    }
}

impl Expected {
    /// What another device computed of a case: its values take the trainer's place.
    ///
    /// # Errors
    /// As [`compare_case`].
    pub fn of_device(case: &Case, replayed: &Replayed) -> Result<Self, CaseFault> {
        let trainer = Self::from(case);
        trainer.check(replayed)?;
        let score = |position: usize| &replayed.scores[position];
        let top = trainer.top.iter().map(|(&position, top)| {
            let score = score(position as usize);
            let values = score.targets.iter().map(|&value| f64::from(value));
            let logprobs = top.logprobs.iter().map(|(id, _)| *id).zip(values).collect();
            (position, Top::new(score.best, score.best_logprob.into(), logprobs))
        });
        let (start, answer) = &trainer.greedy;
        Ok(Self {
            top: top.collect(),
            logprobs: replayed.scores.iter().filter_map(|score| score.next).map(f64::from).collect(),
            greedy: (*start, (*start..start + answer.len()).map(|position| score(position).best).collect()),
            ..trainer
        })
    }

    /// Compares what a device computed.
    ///
    /// # Errors
    /// What was computed is not finite, or lacks something.
    pub fn compare(&self, replayed: &Replayed) -> Result<CaseParity, CaseFault> {
        self.check(replayed)?;
        let scores = &replayed.scores;
        let positions = self.top.iter().map(|(&position, top)| {
            let score = &scores[position as usize];
            let got = score.targets.iter().map(|&value| f64::from(value));
            let values = top.logprobs.iter().zip(got).map(|(&(token, expected), got)| Value { token, expected, got });
            let values: Vec<Value> = values.collect();
            let kl = divergence(&values);
            PositionParity { position, best: (top.best, score.best), margin: top.margin, kl, values }
        });
        let (start, answer) = &self.greedy;
        let agreed = answer.iter().zip(&scores[*start..]).take_while(|(id, score)| **id == score.best).count();
        let next = scores.iter().filter_map(|score| score.next).map(f64::from);
        let pairs = self.logprobs.iter().zip(next);
        let (trainer, device) = pairs.fold((0.0, 0.0), |(a, b), (expected, got)| (a - expected, b - got));
        Ok(CaseParity {
            positions: positions.collect(),
            greedy: (agreed, answer.len()),
            tokens: self.logprobs.len(),
            surprise: (trainer, device),
        })
    }

    /// Whether there is a finite value for everything that is expected.
    fn check(&self, replayed: &Replayed) -> Result<(), CaseFault> {
        let scores = &replayed.scores;
        for (position, score) in scores.iter().enumerate() {
            let mut values = score.targets.iter().chain(&score.next).chain([&score.best_logprob]);
            if !values.all(|value| value.is_finite()) {
                return Err(CaseFault::NonFinite { position: Some(position) });
            }
        }
        let lacking = |position, what| Err(CaseFault::Incomplete { position, what });
        if scores.len() < self.len {
            return lacking(scores.len(), "the score");
        }
        if let Some(position) = scores.iter().take(self.logprobs.len()).position(|score| score.next.is_none()) {
            return lacking(position, "the log-probability of the id that follows");
        }
        for (&position, top) in &self.top {
            let asked = scores.get(position as usize).map(|score| score.targets.len());
            if asked != Some(top.logprobs.len()) {
                return lacking(position as usize, "a log-probability asked for");
            }
        }
        Ok(())
    }
}

/// The task whose result a case is compared with.
pub fn task(case: &Case) -> Task {
    let ids = |top: &Vec<(u32, f64)>| top.iter().map(|(id, _)| *id).collect();
    let targets = case.top.iter().map(|(&position, top)| (position, ids(top))).collect();
    Task { ids: case.ids().collect(), score: true, targets, generate: 0 }
}

/// Compares what a device computed of a case's [`task`] with the trainer's values.
///
/// # Errors
/// What was computed is not finite, or lacks something.
pub fn compare_case(case: &Case, replayed: &Replayed) -> Result<CaseParity, CaseFault> {
    Expected::from(case).compare(replayed)
}

/// Why a case has no figures.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaseFault {
    /// It was not run: the served context is too short for it.
    #[error("its {ids} ids are more than the served context of {context}")]
    TooLong {
        /// Of prompt and continuation.
        ids: usize,
        /// The longest sequence that is served.
        context: usize,
    },
    /// NaN or infinity.
    #[error("the device computed a value that is not finite{}", at(*position))]
    NonFinite {
        /// The first such position, if the device can tell.
        position: Option<usize>,
    },
    /// The device gave less than it was asked for.
    #[error("the device gave no result for position {position}: {what} is missing")]
    Incomplete {
        /// Where.
        position: usize,
        /// What is missing there.
        what: &'static str,
    },
    /// The device refused the case.
    #[error("the device refused it: {0}")]
    Refused(String),
}

fn at(position: Option<usize>) -> String {
    position.map(|position| format!(" at position {position}")).unwrap_or_default()
}

/// A log-probability on both sides, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Value {
    /// The id that it is of.
    pub token: u32,
    /// The trainer's.
    pub expected: f64,
    /// The device's.
    pub got: f64,
}

impl Value {
    /// |Δ logprob|.
    pub fn difference(self) -> f64 {
        (self.expected - self.got).abs()
    }
}

/// One position of a case.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionParity {
    /// That of the last id seen.
    pub position: u32,
    /// The most likely next id, expected and got.
    pub best: (u32, u32),
    /// By how much the expected one was ahead of the next, in nats.
    pub margin: f64,
    /// KL(expected ‖ got) over the compared tokens and one bucket for all others, in nats.
    pub kl: f64,
    /// The compared tokens.
    pub values: Vec<Value>,
}

/// One case.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseParity {
    /// In ascending order.
    pub positions: Vec<PositionParity>,
    /// Greedy tokens before the first that differs, of how many.
    pub greedy: (usize, usize),
    /// Ids whose log-probabilities are in `surprise`.
    pub tokens: usize,
    /// Sum of −logprob over the ids of the case, expected and got.
    pub surprise: (f64, f64),
}

/// KL(expected ‖ got) over the values and the rest, each side normalised: with `P = Σ p` over tokens and rest,
/// `Σ p/P · ln((p/P) / (q/Q)) = Σ p/P · ln(p/q) + ln(Q/P)`.
fn divergence(values: &[Value]) -> f64 {
    let mass = |side: fn(&Value) -> f64| values.iter().map(|value| side(value).exp().min(1.0)).sum::<f64>();
    let (p, q) = (mass(|value| value.expected), mass(|value| value.got));
    let (p_rest, q_rest) = ((1.0 - p).max(REST_FLOOR), (1.0 - q).max(REST_FLOOR));
    let (p_all, q_all) = (p + p_rest, q + q_rest);
    let tokens: f64 = values.iter().map(|v| v.expected.exp().min(1.0) * (v.expected - v.got)).sum();
    let kl = (tokens + p_rest * (p_rest / q_rest).ln()) / p_all + (q_all / p_all).ln();
    kl.max(0.0) // below it only by rounding
}
