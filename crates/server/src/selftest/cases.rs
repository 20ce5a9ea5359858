//! One conformance case on a device, against the judge that runs beside it and against golden vectors.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use baton_device::conformance::{Case, Outcome, Vectors, name};
use baton_device::{Caps, DeviceError};
use baton_handoff::Verdict;

use super::Found;
use crate::backend::CaseRunner;

/// A device under judgement.
pub struct Judge<'a> {
    runner: CaseRunner,
    vectors: &'a Vectors,
}

impl<'a> Judge<'a> {
    /// Judges what `runner` computes.
    pub fn new(runner: CaseRunner, vectors: &'a Vectors) -> Self {
        Self { runner, vectors }
    }

    /// What the device offers.
    pub fn caps(&self) -> &Caps {
        &self.runner.caps
    }

    /// Why a case is not run, if it needs what the device does not offer.
    pub fn skipped(&self, case: &Case) -> Option<Found> {
        let refusals = self.runner.caps.refusals(&case.needs());
        (!refusals.is_empty()).then(|| Found::new(Verdict::Skipped, refusals))
    }

    /// What became of a case, and whether the device is lost.
    pub fn judge(&self, case: &Case) -> (Found, bool) {
        // A bug of ours fails its case, not the report of a machine that we may never see again.
        match catch_unwind(AssertUnwindSafe(|| (self.runner.run)(case))) {
            Ok(Ok(outcome)) => (self.compared(case, &outcome), false),
            Ok(Err(error)) => {
                let lost = matches!(error, DeviceError::Lost { .. });
                (Found::new(Verdict::Fail, vec![error.to_string()]), lost)
            }
            Err(panic) => (Found::new(Verdict::Fail, vec![format!("panicked: {}", words(&*panic))]), false),
        }
    }

    fn compared(&self, case: &Case, outcome: &Outcome) -> Found {
        let mut reasons = Vec::new();
        let mut wrong = |outcome: &Outcome, what: &str| {
            if !outcome.passed() {
                reasons.push(format!("{what}: {}", worst(outcome)));
            }
        };
        wrong(outcome, "differs from what the judge computes here");
        let vector = self.vectors.get(&name(case, self.runner.caps.activations));
        let against = |outputs: &[f32]| vector.and_then(|vector| vector.outcome(outputs, outcome.tolerance));
        let kept = against(&outcome.actual);
        match (&kept, against(&outcome.expected)) {
            (Some(device), Some(judge)) => {
                wrong(device, "differs from the golden vector");
                wrong(&judge, "the judge on this machine, not the device, differs from the golden vector");
            }
            _ => reasons.push("there is no golden vector of this case in its present form".to_owned()),
        }
        let finite = |error: f32| error.is_finite().then_some(error);
        Found {
            verdict: if reasons.is_empty() { Verdict::Pass } else { Verdict::Fail },
            max_error: finite(outcome.max_error()),
            vector_error: kept.and_then(|kept| finite(kept.max_error())),
            tolerance: Some(outcome.tolerance),
            reasons,
            figures: None,
        }
    }
}

/// Where an outcome is farthest off, in words.
fn worst(outcome: &Outcome) -> String {
    let far = |i: &usize| {
        let error = (outcome.expected[*i] - outcome.actual[*i]).abs();
        if error.is_nan() { f32::INFINITY } else { error }
    };
    let wrong = (0..outcome.expected.len()).filter(|i| far(i) > outcome.tolerance);
    match (0..outcome.expected.len()).max_by(|a, b| far(a).total_cmp(&far(b))) {
        None => "there are no outputs".to_owned(),
        Some(i) => format!(
            "{} of {} outputs are off by more than {:e}; output {i} is {:e}, expected is {:e}",
            wrong.count(),
            outcome.expected.len(),
            outcome.tolerance,
            outcome.actual[i],
            outcome.expected[i],
        ),
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a word".to_owned())
}

#[cfg(test)]
mod tests {
    use baton_device::conformance::{cases, run};
    use baton_device::{Backend, Reference};

    use super::*;

    /// The judge, but for what `change` makes of each outcome.
    fn judged(case: &Case, change: impl Fn(Outcome) -> baton_device::Result<Outcome> + 'static) -> (Found, bool) {
        let reference = Reference::new();
        let caps = reference.caps().clone();
        let runner = CaseRunner { caps, run: Box::new(move |case| change(run(case, &reference)?)) };
        let vectors = Vectors::compute(std::slice::from_ref(case)).unwrap();
        Judge::new(runner, &vectors).judge(case)
    }

    #[test]
    fn a_case_passes_only_if_device_judge_and_vector_agree() {
        let case = &cases()[3];
        let (found, _) = judged(case, Ok);
        assert_eq!((found.verdict, found.max_error, found.vector_error), (Verdict::Pass, Some(0.0), Some(0.0)));

        let (found, _) = judged(case, |mut outcome| {
            outcome.actual[0] += 1e-3;
            Ok(outcome)
        });
        assert_eq!((found.verdict, found.reasons.len()), (Verdict::Fail, 2), "{:?}", found.reasons);

        // A machine that computes wrongly whatever runs on it agrees with itself.
        let (found, _) = judged(case, |mut outcome| {
            outcome.actual[0] += 1e-3;
            outcome.expected[0] += 1e-3;
            Ok(outcome)
        });
        assert_eq!((found.verdict, found.max_error), (Verdict::Fail, Some(0.0)));
        assert!(found.reasons[1].contains("not the device"), "{:?}", found.reasons);

        let (found, _) = judged(case, |mut outcome| {
            outcome.actual[0] = f32::NAN;
            Ok(outcome)
        });
        assert_eq!((found.verdict, found.max_error), (Verdict::Fail, None));
    }

    #[test]
    fn errors_and_panics_fail_their_case_with_their_words_and_a_lost_device_ends_the_run() {
        let case = &cases()[0];
        let error = |reason: &str| DeviceError::Execution { device: "toy".into(), op: "mm", reason: reason.into() };
        let (found, lost) = judged(case, move |_| Err(error("161002")));
        assert!(!lost && found.verdict == Verdict::Fail && found.reasons[0].contains("161002"), "{found:?}");
        let (found, lost) = judged(case, |_| Err(DeviceError::Lost { device: "toy".into(), reason: "gone".into() }));
        assert!(lost && found.verdict == Verdict::Fail && found.reasons[0].contains("gone"), "{found:?}");
        let (found, lost) = judged(case, |outcome| panic!("{} rows", outcome.expected.len()));
        assert!(!lost && found.verdict == Verdict::Fail && found.reasons[0].contains("rows"), "{found:?}");
    }

    #[test]
    fn what_a_device_does_not_offer_is_skipped_with_the_reason() {
        let reference = Reference::new();
        let caps = Caps { weight_formats: [].into(), ..reference.caps().clone() };
        let runner = CaseRunner { caps, run: Box::new(move |case| run(case, &reference)) };
        let vectors = Vectors::default();
        let found = Judge::new(runner, &vectors).skipped(&cases()[0]).expect("it has no f32");
        assert_eq!(found.verdict, Verdict::Skipped);
        assert!(found.reasons[0].contains("f32"), "{found:?}");
    }
}
