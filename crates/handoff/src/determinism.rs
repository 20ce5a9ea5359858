//! The promise that a sequence gets the same bits however it is run: cases in every [`Way`], compared with the same
//! cases alone.
//!
//! Invariant: equal means equal bits, of tokens and of log-probabilities. There is no tolerance here.

use std::fmt;

use serde::Serialize;

use crate::words::plain;
use crate::{Case, Replay, ReplayError, Replayed, Score, Task, Verdict, Way, parity};

/// Tokens to generate for a case that has no greedy answer.
const GENERATE: u32 = 16;

/// All ways but [`Way::Alone`], which they are compared with.
const WAYS: [Way; 4] = [Way::Batched, Way::Chunked, Way::Cached, Way::Preempted];

/// What a device does in every way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Determinism {
    /// Cases run.
    pub cases: usize,
    /// In the order of [`Way`].
    pub ways: Vec<WayFinding>,
}

/// What a device does in one way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WayFinding {
    /// How the cases were run.
    pub way: Way,
    /// Compared with the same cases alone.
    pub found: Found,
}

/// Whether results are those of the same cases alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// To the bit.
    Equal,
    /// They are not, and the device promises that they are.
    Different(Unequal),
    /// They are equal, but what the way is about did not happen.
    NotExercised(&'static str),
    /// They are not, and the device promises nothing else.
    NotPromised(Unequal),
}

/// The first difference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Unequal {
    /// Name of the case.
    pub case: String,
    /// Of the value in prompt and answer, from 0.
    pub position: usize,
    /// What differs.
    pub what: &'static str,
    /// Alone.
    pub alone: String,
    /// In this way.
    pub got: String,
}

impl fmt::Display for Unequal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, position, what, alone, got } = self;
        write!(f, "case {}, position {position}: {what} is {alone} alone, here {got}", plain(case))
    }
}

impl fmt::Display for WayFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.way)?;
        match &self.found {
            Found::Equal => f.write_str("equal to the bit"),
            Found::Different(unequal) => write!(f, "{unequal}"),
            Found::NotExercised(why) => write!(f, "not exercised: {why}"),
            Found::NotPromised(unequal) => write!(f, "not promised by the device: {unequal}"),
        }
    }
}

impl Determinism {
    /// Fails with any difference that the device promises not to have; passes if it kept its promise in some way.
    pub fn verdict(&self) -> Verdict {
        let any = |matches: fn(&Found) -> bool| self.ways.iter().any(|way| matches(&way.found));
        if any(|found| matches!(found, Found::Different(_))) {
            Verdict::Fail
        } else if any(|found| matches!(found, Found::Equal)) {
            Verdict::Pass
        } else {
            Verdict::Skipped
        }
    }
}

/// Runs the cases that fit `context` in every way: scored whole, and their prompts answered greedily. `promised`: the
/// device says that a row's result does not depend on the other rows.
///
/// # Errors
/// The device failed, or computed what is not finite.
pub fn determinism(
    cases: &[Case],
    context: usize,
    promised: bool,
    device: &mut dyn Replay,
) -> Result<Determinism, ReplayError> {
    let cases: Vec<&Case> = cases.iter().filter(|case| case.ids().count() <= context).collect();
    let tasks: Vec<Task> = cases.iter().flat_map(|case| [parity::task(case), answered(case, context)]).collect();
    let names: Vec<&str> = cases.iter().flat_map(|case| [case.name.as_str(); 2]).collect();
    let replay = |device: &mut dyn Replay, way| match device.replay(&tasks, way) {
        Ok(replayed) if replayed.len() == tasks.len() => Ok(replayed),
        Ok(replayed) => Err(ReplayError::Failed(format!("{} results of {} sequences", replayed.len(), tasks.len()))),
        Err(error) => Err(error),
    };
    let alone = replay(device, Way::Alone)?;
    let mut ways = Vec::new();
    for way in WAYS {
        let got = replay(device, way)?;
        let not_exercised = device.not_exercised();
        let mut pairs = names.iter().zip(&tasks).zip(alone.iter().zip(&got));
        let unequal = pairs.find_map(|((case, task), (alone, got))| first_unequal(case, task.ids.len(), alone, got));
        let found = match unequal {
            Some(unequal) if promised => Found::Different(unequal),
            Some(unequal) => Found::NotPromised(unequal),
            None if tasks.is_empty() => Found::NotExercised("no case fits the served context"),
            None if way == Way::Cached && got.iter().all(|replayed| replayed.cached_ids == 0) => {
                Found::NotExercised("no id came from the prefix cache")
            }
            None => not_exercised.map_or(Found::Equal, Found::NotExercised),
        };
        ways.push(WayFinding { way, found });
    }
    Ok(Determinism { cases: cases.len(), ways })
}

/// The prompt of a case, answered with as many tokens as the trainer's answer has.
fn answered(case: &Case, context: usize) -> Task {
    let tokens = if case.greedy_ids.is_empty() { GENERATE } else { case.greedy_ids.len() as u32 };
    let room = context - case.prompt_ids.len();
    Task { ids: case.prompt_ids.clone(), generate: tokens.min(room as u32), ..Task::default() }
}

/// The first difference of two results for `ids` ids. Ids from the prefix cache have no scores.
fn first_unequal(case: &str, ids: usize, alone: &Replayed, got: &Replayed) -> Option<Unequal> {
    let unequal = |position, what, alone: String, got: String| {
        (alone != got).then(|| Unequal { case: case.to_owned(), position, what, alone, got })
    };
    let saved = got.cached_ids.min(alone.scores.len());
    let missing = || unequal(0, "the number of scores", alone.scores.len().to_string(), got.scores.len().to_string());
    let scores = match alone.scores.len() - got.scores.len().min(alone.scores.len()) {
        0 => &alone.scores[..],
        lacking if lacking == saved => &alone.scores[saved..],
        _ => return missing(),
    };
    let start = alone.scores.len() - scores.len();
    let score = |(index, (alone, got)): (usize, (&Score, &Score))| {
        let position = start + index;
        let at = |what, alone: Option<f32>, got: Option<f32>| unequal(position, what, bits(alone), bits(got));
        unequal(position, "the best token", alone.best.to_string(), got.best.to_string())
            .or_else(|| at("its log-probability", Some(alone.best_logprob), Some(got.best_logprob)))
            .or_else(|| at("the log-probability of the next id", alone.next, got.next))
            .or_else(|| {
                let mut pairs =
                    (0..alone.targets.len().max(got.targets.len())).map(|i| (alone.targets.get(i), got.targets.get(i)));
                pairs.find_map(|(a, b)| at("a log-probability asked for", a.copied(), b.copied()))
            })
    };
    let text = |token: Option<&u32>| token.map_or_else(|| "none".to_owned(), u32::to_string);
    let generated = |i: usize| {
        let position = ids + i;
        unequal(position, "the token", text(alone.tokens.get(i)), text(got.tokens.get(i))).or_else(|| {
            let (alone, got) = (alone.logprobs.get(i).copied(), got.logprobs.get(i).copied());
            unequal(position, "the token's log-probability", bits(alone), bits(got))
        })
    };
    let lengths =
        [&alone.tokens, &got.tokens].map(Vec::len).into_iter().chain([&alone.logprobs, &got.logprobs].map(Vec::len));
    let tokens = lengths.max().unwrap_or_default();
    scores.iter().zip(&got.scores).enumerate().find_map(score).or_else(|| (0..tokens).find_map(generated))
}

/// A value with its bits: two that differ in the last one look the same otherwise.
fn bits(value: Option<f32>) -> String {
    value.map_or_else(|| "none".to_owned(), |value| format!("{value} ({:08x})", value.to_bits()))
}
