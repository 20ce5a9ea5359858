//! What a self-test found: a list of cases with their verdicts, as a table and as a file to send.
//!
//! Invariants: every chosen case is in the list from the start, as not run; so a file that was written while a driver took the
//! process with it says how far it came, and in which case. What others wrote is cleaned when it is entered.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
};

use anyhow::{Context, Result};
use baton_device::{Caps, DeviceError, DeviceFacts};
use baton_handoff::Verdict;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::privacy::Redactor;
use crate::facts;

/// The form of the file.
const FORMAT: u32 = 1;
/// Failed cases whose reasons the table shows.
const SHOWN: usize = 20;

/// All that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    format: u32,
    verdict: Verdict,
    /// The case that runs.
    running: Option<String>,
    baton: BTreeMap<&'static str, String>,
    system: BTreeMap<&'static str, String>,
    device: Value,
    /// What it offers, each time that it is opened.
    caps: Vec<Value>,
    /// Why it could not be opened.
    unavailable: Option<String>,
    seconds: f64,
    cases: Vec<CaseReport>,
    #[serde(skip)]
    redactor: Redactor,
}

/// One case.
#[derive(Debug, Serialize)]
pub struct CaseReport {
    name: String,
    #[serde(skip)]
    operation: &'static str,
    #[serde(flatten)]
    found: Found,
    seconds: f64,
}

/// What became of a case.
#[derive(Debug, Serialize)]
pub struct Found {
    pub verdict: Verdict,
    /// Largest difference from the judge on this machine; `None` if nothing was computed, or nothing finite.
    #[serde(serialize_with = "shortest")]
    pub max_error: Option<f32>,
    /// Largest difference from the vectors.
    #[serde(serialize_with = "shortest")]
    pub vector_error: Option<f32>,
    /// Largest difference allowed, of either.
    #[serde(serialize_with = "shortest")]
    pub tolerance: Option<f32>,
    /// Why it failed or was skipped.
    pub reasons: Vec<String>,
    /// Figures of a model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub figures: Option<Value>,
}

/// In the fewest digits that mean the same f32.
fn shortest<S: Serializer>(value: &Option<f32>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(|value| value.to_string().parse::<f64>().expect("a number")).serialize(serializer)
}

impl Found {
    /// A case without figures.
    pub fn new(verdict: Verdict, reasons: Vec<String>) -> Self {
        Self { verdict, max_error: None, vector_error: None, tolerance: None, reasons, figures: None }
    }
}

impl Report {
    /// A report of which nothing has run; cases by name and operation.
    pub fn new(
        facts: &DeviceFacts,
        cases: impl IntoIterator<Item = (String, &'static str)>,
        redactor: Redactor,
    ) -> Self {
        let found = || Found::new(Verdict::NotRun, Vec::new());
        let mut device = facts::device(facts);
        redactor.clean(&mut device);
        let case = |(name, operation)| CaseReport { name, operation, found: found(), seconds: 0.0 };
        Self {
            format: FORMAT,
            verdict: Verdict::NotRun,
            running: None,
            baton: facts::build(),
            system: facts::system().into_iter().map(|(name, value)| (name, redactor.text(&value))).collect(),
            device,
            caps: Vec::new(),
            unavailable: None,
            seconds: 0.0,
            cases: cases.into_iter().map(case).collect(),
            redactor,
        }
    }

    /// Enters what the opened device offers.
    pub fn opened(&mut self, caps: &Caps) {
        let mut caps = facts::caps(caps);
        self.redactor.clean(&mut caps);
        self.caps.push(caps);
    }

    /// Enters that it could not be opened.
    pub fn unavailable(&mut self, error: &DeviceError) {
        self.unavailable = Some(self.redactor.text(&error.to_string()));
    }

    /// Enters that a case begins.
    pub fn begin(&mut self, index: usize) {
        self.running = Some(self.cases[index].name.clone());
    }

    /// Enters what became of the case that ran.
    pub fn end(&mut self, index: usize, mut found: Found, seconds: f64) {
        self.running = None;
        found.reasons.iter_mut().for_each(|reason| *reason = self.redactor.text(reason));
        self.seconds += seconds;
        let case = &mut self.cases[index];
        (case.found, case.seconds) = (found, seconds);
        self.verdict = self.judged();
    }

    /// Fails with any case; passes if some were run, and none is left.
    fn judged(&self) -> Verdict {
        let any = |verdict| self.cases.iter().any(|case| case.found.verdict == verdict);
        match () {
            () if any(Verdict::Fail) => Verdict::Fail,
            () if any(Verdict::NotRun) || !any(Verdict::Pass) => Verdict::NotRun,
            () => Verdict::Pass,
        }
    }

    /// The whole.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// What there is to say of a device in few lines: how many cases ended how, and why some failed.
    pub fn summary(&self, device: &str) -> Value {
        let count = |verdict| self.cases.iter().filter(|case| case.found.verdict == verdict).count();
        let failed = self.cases.iter().filter(|case| case.found.verdict == Verdict::Fail).take(SHOWN);
        json!({
            "device": device,
            "verdict": self.verdict,
            "passed": count(Verdict::Pass),
            "failed": count(Verdict::Fail),
            "skipped": count(Verdict::Skipped),
            "not_run": count(Verdict::NotRun),
            "seconds": self.seconds,
            "failures": failed.map(|case| json!({"case": case.name, "reasons": case.found.reasons})).collect::<Vec<_>>(),
        })
    }

    /// Writes the file, in one step.
    pub fn write(&self, file: &Path) -> Result<()> {
        let new = file.with_extension("new");
        let written = fs::write(&new, serde_json::to_vec_pretty(self)?).and_then(|()| fs::rename(&new, file));
        written.with_context(|| format!("--report {}", file.display()))
    }
}

/// Plain text, for people: a line for each operation, then every reason.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.cases.iter().map(|case| case.operation.len()).max().unwrap_or_default().max("operation".len());
        writeln!(f, "{:<width$}  passed  failed  skipped  not run  largest error  allowed  seconds", "operation")?;
        let mut operations: Vec<&str> = Vec::new();
        for case in &self.cases {
            if !operations.contains(&case.operation) {
                operations.push(case.operation);
            }
        }
        for operation in operations {
            let cases: Vec<&CaseReport> = self.cases.iter().filter(|case| case.operation == operation).collect();
            let [passed, failed, skipped, not_run] = [Verdict::Pass, Verdict::Fail, Verdict::Skipped, Verdict::NotRun]
                .map(|verdict| cases.iter().filter(|case| case.found.verdict == verdict).count());
            let seconds: f64 = cases.iter().map(|case| case.seconds).sum();
            write!(f, "{operation:<width$}  {passed:>6}  {failed:>6}  {skipped:>7}  {not_run:>7}")?;
            let (error, allowed) = largest(&cases)
                .map_or_else(Default::default, |(error, allowed)| (format!("{error:.1e}"), format!("{allowed:.0e}")));
            writeln!(f, "  {error:>13}  {allowed:>7}  {seconds:>7.2}")?;
        }
        let failed = self.cases.iter().filter(|case| case.found.verdict == Verdict::Fail);
        for case in failed.clone().take(SHOWN) {
            writeln!(f, "\n{} failed:", case.name)?;
            case.found.reasons.iter().try_for_each(|reason| writeln!(f, "    {reason}"))?;
        }
        if let Some(more) = failed.count().checked_sub(SHOWN).filter(|more| *more > 0) {
            writeln!(f, "\n{more} more failed")?;
        }
        let skipped = self.cases.iter().filter(|case| case.found.verdict == Verdict::Skipped);
        let reasons: BTreeSet<&String> = skipped.flat_map(|case| &case.found.reasons).collect();
        if !reasons.is_empty() {
            writeln!(f, "\nskipped, since:")?;
            reasons.iter().try_for_each(|reason| writeln!(f, "    {reason}"))?;
        }
        writeln!(f, "\n{}", self.verdict)
    }
}

/// The error that takes the largest part of what is allowed, and what is.
fn largest(cases: &[&CaseReport]) -> Option<(f32, f32)> {
    let errors = cases.iter().filter_map(|case| {
        let found = &case.found;
        Some((found.max_error?.max(found.vector_error?), found.tolerance?))
    });
    errors.max_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdicts: &[Verdict]) -> Report {
        let names = (0..verdicts.len()).map(|i| (format!("case-{i}"), "case"));
        let mut report = Report::new(&DeviceFacts::default(), names, Redactor::here());
        for (i, verdict) in verdicts.iter().enumerate().filter(|(_, verdict)| **verdict != Verdict::NotRun) {
            report.begin(i);
            report.end(i, Found::new(*verdict, vec![format!("reason {i}")]), 0.5);
        }
        report
    }

    #[test]
    fn what_failed_fails_the_whole_and_what_nobody_ran_is_no_success() {
        use Verdict::{Fail, NotRun, Pass, Skipped};
        for (verdicts, whole) in [
            (&[Pass, Pass][..], Pass),
            (&[Pass, Skipped], Pass),
            (&[Skipped, Skipped], NotRun),
            (&[Pass, NotRun], NotRun),
            (&[NotRun, Fail], Fail),
            (&[], NotRun),
        ] {
            assert_eq!(report(verdicts).verdict(), whole, "{verdicts:?}");
        }
    }

    #[test]
    fn a_file_left_by_a_process_that_died_names_the_case_that_ran() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = folder.path().join("report.json");
        let mut report = report(&[Verdict::Pass, Verdict::NotRun, Verdict::NotRun]);
        report.begin(1);
        report.write(&file).unwrap();
        let written: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!((&written["running"], &written["verdict"]), (&"case-1".into(), &"not_run".into()));
        let verdicts: Vec<&Value> = written["cases"].as_array().unwrap().iter().map(|case| &case["verdict"]).collect();
        assert_eq!(verdicts, ["pass", "not_run", "not_run"]);
    }

    #[test]
    fn the_table_gives_every_reason() {
        let text = report(&[Verdict::Pass, Verdict::Fail, Verdict::Skipped]).to_string();
        assert!(text.contains("case-1 failed:\n    reason 1"), "{text}");
        assert!(text.contains("skipped, since:\n    reason 2"), "{text}");
        assert!(!text.contains("reason 0"), "{text}");
    }
}
