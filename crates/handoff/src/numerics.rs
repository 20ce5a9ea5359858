//! Figures over all cases, and the replay that they are made from.
//!
//! Invariant: figures depend on the set of cases alone, to the bit: not on their order, nor on how they came together.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::parity::{self, CaseFault, CaseParity, Expected, compare_case};
use crate::words::plain;
use crate::{Case, Replay, ReplayError, Replayed, Task, Way};

/// Cases that run at once, at most: enough to fill steps, and few that wait where only idle steps are taken.
const TOGETHER: usize = 8;
/// Least probability of a [likely](Likely) token.
const LIKELY: f64 = 0.01;

/// What became of one case on a device.
pub type Outcome = Result<Replayed, CaseFault>;

/// Runs the cases in their order, several at once: what they give is what [`replay_case`] gives, sooner. `progress` is called before each with its index and name,
/// and may end the replay by returning `false`; the outcomes are then fewer than the cases.
///
/// # Errors
/// The device failed. A case that it refuses, or computes without a finite result, is an outcome.
pub fn replay_cases(
    cases: &[Case],
    context: usize,
    device: &mut dyn Replay,
    progress: &mut dyn FnMut(usize, &str) -> bool,
) -> Result<Vec<Outcome>, ReplayError> {
    let mut outcomes = Vec::with_capacity(cases.len());
    for group in cases.chunks(TOGETHER) {
        let done = outcomes.len();
        let wanted = group.iter().enumerate().take_while(|(index, case)| progress(done + index, &case.name)).count();
        let group = &group[..wanted];
        let tasks: Vec<Task> = group.iter().map(parity::task).collect();
        let replayed = match tasks.iter().all(|task| task.ids.len() <= context) {
            true => device.replay(&tasks, Way::Batched),
            false => Err(ReplayError::Unfit("a case is too long".into())),
        };
        match replayed {
            Ok(replayed) if replayed.len() == wanted => outcomes.extend(replayed.into_iter().map(Ok)),
            Err(failed @ ReplayError::Failed(_)) => return Err(failed),
            // One by one it shows which of them it was.
            _ => {
                for case in group {
                    outcomes.push(replay_case(case, context, device)?);
                }
            }
        }
        if wanted < TOGETHER {
            break;
        }
    }
    Ok(outcomes)
}

/// Runs one case, alone. `context`: ids of the longest sequence that is served; a longer case is skipped.
///
/// # Errors
/// As [`replay_cases`].
pub fn replay_case(case: &Case, context: usize, device: &mut dyn Replay) -> Result<Outcome, ReplayError> {
    let task = parity::task(case);
    let ids = task.ids.len();
    if ids > context {
        return Ok(Err(CaseFault::TooLong { ids, context }));
    }
    match device.replay(&[task], Way::Alone) {
        Ok(replayed) => Ok(replayed.into_iter().next().ok_or(CaseFault::Incomplete { position: 0, what: "the score" })),
        Err(ReplayError::NonFinite) => Ok(Err(CaseFault::NonFinite { position: None })),
        Err(ReplayError::Unfit(reason)) => Ok(Err(CaseFault::Refused(reason))),
        Err(failed @ ReplayError::Failed(_)) => Err(failed),
    }
}

/// Refuses goldens of another vocabulary: cases with ids that the model does not have must not be run.
///
/// # Errors
/// Every such case.
pub fn check_vocabulary(cases: &[Case], vocab: usize) -> Result<(), Vec<String>> {
    let foreign = |case: &Case| {
        let ids = case.ids().chain(case.top.values().flatten().map(|(id, _)| *id));
        let highest = ids.max().filter(|&id| id as usize >= vocab)?;
        let name = plain(&case.name);
        Some(format!("goldens of another vocabulary: case {name} has id {highest}, the model's vocabulary has {vocab}"))
    };
    let reasons: Vec<String> = cases.iter().filter_map(foreign).collect();
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}

/// Comparisons by the names of their cases.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Parity {
    cases: BTreeMap<String, Result<CaseParity, CaseFault>>,
}

impl Parity {
    /// Of the outcomes, one per case and in their order.
    pub fn of(cases: &[Case], outcomes: &[Outcome]) -> Self {
        let mut parity = Self::default();
        for (case, outcome) in cases.iter().zip(outcomes) {
            let compared = outcome.as_ref().map_err(Clone::clone).and_then(|replayed| compare_case(case, replayed));
            parity.add(&case.name, compared);
        }
        parity
    }

    /// Of device B with A in the trainer's place: what it costs to go from A to B.
    pub fn between(cases: &[Case], a: &[Outcome], b: &[Outcome]) -> Self {
        let mut parity = Self::default();
        for (case, (a, b)) in cases.iter().zip(a.iter().zip(b)) {
            let both = || {
                Expected::of_device(case, a.as_ref().map_err(Clone::clone)?)?.compare(b.as_ref().map_err(Clone::clone)?)
            };
            parity.add(&case.name, both());
        }
        parity
    }

    /// Adds a case, or puts it in the place of an earlier run of it.
    pub fn add(&mut self, case: &str, compared: Result<CaseParity, CaseFault>) {
        self.cases.insert(case.into(), compared);
    }

    /// Adds all cases of another; where both have one, the other's.
    pub fn merge(&mut self, other: Self) {
        self.cases.extend(other.cases);
    }

    /// The figures. `top1_margin`: the best token is looked at where the expected one is ahead by more, see
    /// [`Tolerances::top1_margin`](crate::Tolerances::top1_margin); negative to look everywhere.
    pub fn numerics(&self, top1_margin: f64) -> Numerics {
        let mut figures = Numerics { top1: Top1 { margin: top1_margin, ..Top1::default() }, ..Numerics::default() };
        let (mut sum, mut kl, mut surprise) = (0.0, 0.0, (0.0, 0.0));
        let mut likely = Vec::new();
        let mut by_position: BTreeMap<u32, (f64, f64, usize)> = BTreeMap::new();
        for (name, compared) in &self.cases {
            let compared = match compared {
                Ok(compared) => compared,
                Err(fault) => {
                    let note = CaseNote { case: name.clone(), reason: fault.to_string() };
                    let skipped = matches!(fault, CaseFault::TooLong { .. });
                    if skipped { &mut figures.skipped } else { &mut figures.broken }.push(note);
                    continue;
                }
            };
            figures.cases += 1;
            figures.greedy.push(Greedy { case: name.clone(), agreed: compared.greedy.0, of: compared.greedy.1 });
            figures.perplexity.tokens += compared.tokens;
            surprise = (surprise.0 + compared.surprise.0, surprise.1 + compared.surprise.1);
            for at in &compared.positions {
                figures.positions += 1;
                kl += at.kl;
                figures.top1.count(name, at);
                let here = by_position.entry(at.position).or_default();
                for value in &at.values {
                    let difference = value.difference();
                    figures.values += 1;
                    sum += difference;
                    likely.extend((value.expected >= LIKELY.ln()).then_some(difference));
                    *here = (here.0 + difference, here.1.max(difference), here.2 + 1);
                    figures.histogram[bucket(difference)].count += 1;
                    if figures.largest.is_none() || difference > figures.max_abs_logprob_diff {
                        figures.max_abs_logprob_diff = difference;
                        let (case, position) = (name.clone(), at.position);
                        figures.largest = Some(Largest {
                            case,
                            position,
                            token: value.token,
                            expected: value.expected,
                            got: value.got,
                        });
                    }
                }
            }
        }
        let mean = |sum: f64, of: usize| if of == 0 { 0.0 } else { sum / of as f64 };
        figures.mean_abs_logprob_diff = mean(sum, figures.values);
        figures.kl = mean(kl, figures.positions);
        likely.sort_by(f64::total_cmp);
        let p99 = likely.get((likely.len() * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default();
        figures.likely = Likely { values: likely.len(), p99, max: likely.last().copied().unwrap_or_default() };
        figures.by_position = by_position
            .into_iter()
            .map(|(position, (sum, max, values))| ByPosition { position, mean: mean(sum, values), max, values })
            .collect();
        let Perplexity { tokens, trainer, device, ratio } = &mut figures.perplexity;
        *trainer = mean(surprise.0, *tokens).exp();
        *device = mean(surprise.1, *tokens).exp();
        *ratio = mean(surprise.1 - surprise.0, *tokens).exp();
        figures
    }
}

/// How near a device is to the golden values. Log-probabilities and differences are in nats.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Numerics {
    /// Cases compared.
    pub cases: usize,
    /// Cases not run, and why.
    pub skipped: Vec<CaseNote>,
    /// Cases without a result, and why.
    pub broken: Vec<CaseNote>,
    /// Positions compared.
    pub positions: usize,
    /// Log-probabilities compared.
    pub values: usize,
    /// Largest difference of a log-probability.
    pub max_abs_logprob_diff: f64,
    /// Mean difference.
    pub mean_abs_logprob_diff: f64,
    /// Where the largest is.
    pub largest: Option<Largest>,
    /// Differences of likely tokens alone: rounding hardly moves these, and faults do.
    pub likely: Likely,
    /// Mean over the positions of KL(trainer ‖ device), over the golden tokens and one bucket for all others.
    pub kl: f64,
    /// Agreement of the best token.
    pub top1: Top1,
    /// Tokens of each greedy answer that the device chooses too, before the first that differs.
    pub greedy: Vec<Greedy>,
    /// Of the golden text.
    pub perplexity: Perplexity,
    /// Differences by position in the sequence, ascending.
    pub by_position: Vec<ByPosition>,
    /// Differences by their magnitude.
    pub histogram: Vec<Bucket>,
}

impl Default for Numerics {
    fn default() -> Self {
        Self {
            cases: 0,
            skipped: Vec::new(),
            broken: Vec::new(),
            positions: 0,
            values: 0,
            max_abs_logprob_diff: 0.0,
            mean_abs_logprob_diff: 0.0,
            largest: None,
            likely: Likely::default(),
            kl: 0.0,
            top1: Top1::default(),
            greedy: Vec::new(),
            perplexity: Perplexity { tokens: 0, trainer: 1.0, device: 1.0, ratio: 1.0 },
            by_position: Vec::new(),
            histogram: EXPONENTS.map(|exponent| Bucket { exponent, count: 0 }).collect(),
        }
    }
}

impl Numerics {
    /// Whether nothing was compared.
    pub fn is_empty(&self) -> bool {
        self.values == 0 && self.perplexity.tokens == 0
    }

    /// Greedy tokens agreed, of how many, over all cases.
    pub fn greedy_total(&self) -> (usize, usize) {
        self.greedy.iter().fold((0, 0), |(agreed, of), case| (agreed + case.agreed, of + case.of))
    }
}

/// A case and what there is to say of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaseNote {
    /// Its name.
    pub case: String,
    /// Why it has no figures.
    pub reason: String,
}

impl fmt::Display for CaseNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "case {}: {}", plain(&self.case), self.reason)
    }
}

/// The largest difference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Largest {
    /// Of the case.
    pub case: String,
    /// Of the last id seen.
    pub position: u32,
    /// Whose log-probability it is.
    pub token: u32,
    /// The trainer's.
    pub expected: f64,
    /// The device's.
    pub got: f64,
}

impl fmt::Display for Largest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, position, token, expected, got } = self;
        let case = plain(case);
        write!(f, "case {case}, position {position}, token {token}: {expected:.6} expected, {got:.6} computed")
    }
}

/// Differences of the tokens to which the trainer gives a probability of 1 % or more.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Likely {
    /// Log-probabilities compared.
    pub values: usize,
    /// 99 % of the differences are not above this.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

/// Agreement of the best token, where the trainer's margin allows a demand.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Top1 {
    /// Positions count if the trainer's best token is ahead by more, in nats.
    pub margin: f64,
    /// Positions that count.
    pub considered: usize,
    /// Those of them with the same best token.
    pub agreed: usize,
    /// The disagreement where the trainer was most certain.
    pub worst: Option<Disagreement>,
}

impl Top1 {
    /// The part that agrees, 0 to 1; `None` if no position counts.
    pub fn agreement(&self) -> Option<f64> {
        (self.considered > 0).then(|| self.agreed as f64 / self.considered as f64)
    }

    fn count(&mut self, case: &str, at: &parity::PositionParity) {
        if at.margin <= self.margin {
            return;
        }
        self.considered += 1;
        let (expected, got) = at.best;
        if expected == got {
            self.agreed += 1;
        } else if self.worst.as_ref().is_none_or(|worst| at.margin > worst.margin) {
            let (case, position, margin) = (case.to_owned(), at.position, at.margin);
            self.worst = Some(Disagreement { case, position, expected, got, margin });
        }
    }
}

/// Another best token than the trainer's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Disagreement {
    /// Name of the case.
    pub case: String,
    /// Of the last id seen.
    pub position: u32,
    /// The trainer's.
    pub expected: u32,
    /// The device's.
    pub got: u32,
    /// By how much the trainer's was ahead, in nats.
    pub margin: f64,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, position, expected, got, margin } = self;
        let case = plain(case);
        write!(
            f,
            "case {case}, position {position}: token {expected} expected with a margin of {margin:.3}, {got} chosen"
        )
    }
}

/// Greedy agreement of a case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Greedy {
    /// Its name.
    pub case: String,
    /// Tokens before the first that differs.
    pub agreed: usize,
    /// Tokens of the trainer's answer.
    pub of: usize,
}

/// Perplexity on the golden text: exp of the mean −logprob per token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Perplexity {
    /// Tokens it is the mean of.
    pub tokens: usize,
    /// The trainer's.
    pub trainer: f64,
    /// The device's.
    pub device: f64,
    /// The device's by the trainer's.
    pub ratio: f64,
}

/// Differences at one position of all sequences.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ByPosition {
    /// Of the last id seen.
    pub position: u32,
    /// Mean difference.
    pub mean: f64,
    /// Largest difference.
    pub max: f64,
    /// Log-probabilities compared.
    pub values: usize,
}

/// Differences from 10^exponent to ten times that. The first bucket has all smaller ones too, the last all larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// Of its lower end.
    pub exponent: i32,
    /// Differences in it.
    pub count: usize,
}

const EXPONENTS: std::ops::RangeInclusive<i32> = -8..=1;

fn bucket(difference: f64) -> usize {
    let exponent = difference.log10().floor() as i32; // of zero: the least there is
    (exponent.clamp(*EXPONENTS.start(), *EXPONENTS.end()) - EXPONENTS.start()) as usize
}
