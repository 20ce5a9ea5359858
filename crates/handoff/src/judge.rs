//! Figures against tolerances.

use std::fmt;

use serde::Serialize;

use crate::words::figure;
use crate::{Numerics, Tolerances};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// What was checked holds.
    Pass,
    /// It does not.
    Fail,
    /// There was nothing to check, or no room to tell.
    Skipped,
    /// Nobody has checked.
    NotRun,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::Skipped => "skipped",
            Self::NotRun => "not run",
        })
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Cases that the device could not compute, or computed without a finite result.
    BrokenCases,
    /// Largest |Δ logprob|, nats.
    MaxAbsLogprobDiff,
    /// Mean |Δ logprob|, nats.
    MeanAbsLogprobDiff,
    /// 99th percentile of |Δ logprob| of likely tokens, nats.
    P99AbsLogprobDiff,
    /// Mean KL(trainer ‖ device), nats.
    Kl,
    /// Part of the positions with room for it at which the best token is the trainer's.
    Top1Agreement,
    /// The device's perplexity on the golden text, by the trainer's. Too low is as wrong as too high.
    PerplexityRatio,
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::BrokenCases => "cases without a result",
            Self::MaxAbsLogprobDiff => "max |Δ logprob|",
            Self::MeanAbsLogprobDiff => "mean |Δ logprob|",
            Self::P99AbsLogprobDiff => "p99 |Δ logprob| of likely",
            Self::Kl => "KL(trainer ‖ device)",
            Self::Top1Agreement => "top-1 agreement",
            Self::PerplexityRatio => "perplexity ratio",
        })
    }
}

/// A figure and what it may be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// What was measured.
    pub measure: Measure,
    /// `None`: no case has what it is measured on.
    pub measured: Option<f64>,
    /// The most it may be; for agreement the least.
    pub allowed: f64,
    /// Skipped if nothing was measured.
    pub verdict: Verdict,
    /// Where it is worst, or which cases.
    pub details: Vec<String>,
}

impl fmt::Display for Finding {
    /// `max |Δ logprob| is 0.3, allowed is 0.002: case add, position 3, …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.measured {
            Some(measured) => {
                write!(f, "{} is {}, allowed is {}", self.measure, figure(measured), figure(self.allowed))?
            }
            None => write!(f, "{}: nothing to measure", self.measure)?,
        }
        let details = self.details.join("; ");
        if details.is_empty() { Ok(()) } else { write!(f, ": {details}") }
    }
}

/// Every tolerance with what was measured.
pub fn judge(numerics: &Numerics, tolerances: &Tolerances) -> Vec<Finding> {
    let finding = |measure, measured: Option<f64>, allowed, holds: fn(f64, f64) -> bool, details: Vec<String>| {
        // Written so that NaN fails.
        let verdict = match measured {
            None => Verdict::Skipped,
            Some(measured) if holds(measured, allowed) => Verdict::Pass,
            Some(_) => Verdict::Fail,
        };
        Finding { measure, measured, allowed, verdict, details }
    };
    let at_most = |measured: f64, allowed: f64| measured <= allowed;
    let at_least = |measured: f64, allowed: f64| measured >= allowed;
    let within_factor = |measured: f64, allowed: f64| measured.max(1.0 / measured) <= allowed && !measured.is_nan();
    let Numerics { likely, top1, perplexity, .. } = numerics;
    let compared = |value: f64| (numerics.values > 0).then_some(value);

    let mut broken: Vec<String> = numerics.broken.iter().map(ToString::to_string).collect();
    let mut count = broken.len();
    if numerics.is_empty() && broken.is_empty() {
        broken.push("no case has a result: nothing was compared".into());
        count = 1;
    }
    let largest = numerics.largest.iter().map(ToString::to_string).collect();
    let worst = top1.worst.iter().map(ToString::to_string).collect();
    vec![
        finding(Measure::BrokenCases, Some(count as f64), 0.0, at_most, broken),
        finding(
            Measure::MaxAbsLogprobDiff,
            compared(numerics.max_abs_logprob_diff),
            tolerances.max_abs_logprob_diff,
            at_most,
            largest,
        ),
        finding(
            Measure::MeanAbsLogprobDiff,
            compared(numerics.mean_abs_logprob_diff),
            tolerances.mean_abs_logprob_diff,
            at_most,
            Vec::new(),
        ),
        finding(
            Measure::P99AbsLogprobDiff,
            (likely.values > 0).then_some(likely.p99),
            tolerances.p99_abs_logprob_diff,
            at_most,
            Vec::new(),
        ),
        finding(Measure::Kl, compared(numerics.kl), tolerances.kl, at_most, Vec::new()),
        finding(Measure::Top1Agreement, top1.agreement(), tolerances.top1_agreement, at_least, worst),
        finding(
            Measure::PerplexityRatio,
            (perplexity.tokens > 0).then_some(perplexity.ratio),
            tolerances.perplexity_ratio,
            within_factor,
            Vec::new(),
        ),
    ]
}
