//! What was found about a bundle: as JSON, as a table, and (in `html.rs`) as a page.
//!
//! Whoever runs the checks fills a [`Report`]. Invariant: what nobody has run is "not run", and a bundle passes only if
//! all that is required has been run.

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    Computed, Determinism, Digest, Finding, Manifest, Numerics, PrecisionClass, Tolerances, Trained, Verdict, table,
};

/// A check of a bundle, in the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckName {
    /// All files are there and have their digests.
    Integrity,
    /// The manifest is signed by a trusted key.
    Signature,
    /// The device has what the model needs.
    Compatibility,
    /// Golden texts have the trainer's ids.
    Tokenizer,
    /// Golden chats have the trainer's text.
    Template,
    /// Golden cases have the trainer's log-probabilities.
    Numerics,
    /// Cases have the same bits however they are run.
    Determinism,
    /// Two columns beside each other; it has figures and no demand.
    Comparison,
}

impl CheckName {
    const ALL: [Self; 8] = [
        Self::Integrity,
        Self::Signature,
        Self::Compatibility,
        Self::Tokenizer,
        Self::Template,
        Self::Numerics,
        Self::Determinism,
        Self::Comparison,
    ];

    /// Whether it must have been run for a bundle to pass. Whoever demands a signature fails the check without one.
    const fn required(self) -> bool {
        !matches!(self, Self::Signature | Self::Determinism | Self::Comparison)
    }
}

impl fmt::Display for CheckName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Integrity => "integrity",
            Self::Signature => "signature",
            Self::Compatibility => "compatibility",
            Self::Tokenizer => "tokenizer",
            Self::Template => "template",
            Self::Numerics => "numerics",
            Self::Determinism => "determinism",
            Self::Comparison => "comparison",
        })
    }
}

/// A check and what it found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: CheckName,
    /// How it ended.
    pub verdict: Verdict,
    /// Every reason, or what there is to know of a check that passed.
    pub details: Vec<String>,
}

/// What the bundle says of itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BundleFacts {
    /// Name of the model.
    pub name: String,
    /// Digest of all files.
    pub generation: Digest,
    /// Passed through.
    pub license: Option<String>,
    /// Passed through.
    pub lineage: Map<String, Value>,
    /// How the weights were made.
    pub trained: Trained,
    /// How the golden values were computed.
    pub computed: Computed,
    /// Number of golden cases.
    pub cases: usize,
}

impl From<&Manifest> for BundleFacts {
    fn from(manifest: &Manifest) -> Self {
        let model = manifest.model.clone();
        Self {
            name: model.name,
            generation: manifest.generation,
            license: model.license,
            lineage: model.lineage,
            trained: manifest.trained.clone(),
            computed: manifest.computed.clone(),
            cases: manifest.cases.len(),
        }
    }
}

/// A device that serves the bundle, in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceFacts {
    /// Such as `cpu`.
    pub device: String,
    /// Its instruction set or architecture.
    pub isa: String,
    /// Formats that are computed in, such as `weights bf16, activations f32, cache f32`.
    pub formats: String,
    /// The class of the coarsest of them.
    pub precision: PrecisionClass,
}

impl fmt::Display for DeviceFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}), {}", self.device, self.isa, self.precision)
    }
}

/// What a device computes, against the golden values.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Column {
    /// The device and its formats.
    #[serde(flatten)]
    pub device: DeviceFacts,
    /// What is allowed to this class.
    pub tolerances: Tolerances,
    /// What was measured.
    pub numerics: Numerics,
    /// Each tolerance with its verdict.
    pub findings: Vec<Finding>,
}

impl Column {
    /// Whether it is within the tolerances.
    pub fn verdict(&self) -> Verdict {
        let failed = self.findings.iter().any(|finding| finding.verdict == Verdict::Fail);
        if failed { Verdict::Fail } else { Verdict::Pass }
    }
}

/// What it costs to go from one column to another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Such as `cpu bf16`.
    pub from: String,
    /// Such as `cpu q4_0`.
    pub to: String,
    /// `from` against its own golden values.
    pub a: Numerics,
    /// `to` against its own.
    pub b: Numerics,
    /// `to` with `from` in the trainer's place: what the step costs, without what both are off by.
    pub between: Numerics,
}

/// All that was found about a bundle.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    verdict: Verdict,
    bundle: Option<BundleFacts>,
    signature: Option<String>,
    checks: Vec<Check>,
    devices: Vec<Column>,
    determinism: Option<Determinism>,
    comparison: Option<Comparison>,
}

impl Default for Report {
    fn default() -> Self {
        let checks = CheckName::ALL.map(|name| Check { name, verdict: Verdict::NotRun, details: Vec::new() });
        Self {
            verdict: Verdict::NotRun,
            bundle: None,
            signature: None,
            checks: checks.into(),
            devices: Vec::new(),
            determinism: None,
            comparison: None,
        }
    }
}

impl Report {
    /// A report on a bundle of which nothing is checked; [`Report::default`] if its manifest cannot be read.
    pub fn new(manifest: &Manifest) -> Self {
        Self { bundle: Some(manifest.into()), ..Self::default() }
    }

    /// The whole: fails with any check, passes if all that is required was run.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// The checks in their order, run or not.
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// What the bundle says of itself, if its manifest could be read.
    pub fn bundle(&self) -> Option<&BundleFacts> {
        self.bundle.as_ref()
    }

    /// By whom it is signed, in words.
    pub fn signature(&self) -> Option<&str> {
        self.signature.as_deref()
    }

    /// One per device.
    pub fn devices(&self) -> &[Column] {
        &self.devices
    }

    /// If it was run.
    pub fn determinism(&self) -> Option<&Determinism> {
        self.determinism.as_ref()
    }

    /// If it was run.
    pub fn comparison(&self) -> Option<&Comparison> {
        self.comparison.as_ref()
    }

    /// Why it fails: every detail of the checks that do.
    pub fn reasons(&self) -> Vec<String> {
        let failed = self.checks.iter().filter(|check| check.verdict == Verdict::Fail);
        failed.flat_map(|check| check.details.iter().map(|detail| format!("{}: {detail}", check.name))).collect()
    }

    /// Enters how a check ended. `Ok`: what there is to know; `Err`: every reason.
    pub fn check(&mut self, name: CheckName, result: Result<Vec<String>, Vec<String>>) {
        match result {
            Ok(details) => self.enter(name, Verdict::Pass, details),
            Err(reasons) => self.enter(name, Verdict::Fail, reasons),
        }
    }

    /// Enters that there is nothing to check.
    pub fn skip(&mut self, name: CheckName, why: impl Into<String>) {
        self.enter(name, Verdict::Skipped, vec![why.into()]);
    }

    /// Enters by whom the bundle is signed, in words; the check is entered on its own.
    pub fn set_signature(&mut self, words: impl Into<String>) {
        self.signature = Some(words.into());
    }

    /// Enters a device, and whether it is within the tolerances.
    pub fn add_device(&mut self, column: Column) {
        let failed = column.findings.iter().filter(|finding| finding.verdict == Verdict::Fail);
        let mut details: Vec<String> = failed.map(|finding| format!("{}: {finding}", column.device)).collect();
        details.extend(column.numerics.skipped.iter().map(|note| format!("{}: {note}", column.device)));
        self.devices.push(column);
        let worst = self.devices.iter().any(|column| column.verdict() == Verdict::Fail);
        let known = self.checks.iter().filter(|check| check.name == CheckName::Numerics);
        let details = known.flat_map(|check| check.details.clone()).chain(details).collect();
        self.enter(CheckName::Numerics, if worst { Verdict::Fail } else { Verdict::Pass }, details);
    }

    /// Enters whether results depend on how cases are run.
    pub fn set_determinism(&mut self, determinism: Determinism) {
        let details = determinism.ways.iter().map(ToString::to_string).collect();
        self.enter(CheckName::Determinism, determinism.verdict(), details);
        self.determinism = Some(determinism);
    }

    /// Enters a comparison of two columns.
    pub fn set_comparison(&mut self, comparison: Comparison) {
        let from_to = format!("{} to {}", comparison.from, comparison.to);
        if comparison.between.is_empty() {
            self.enter(CheckName::Comparison, Verdict::Fail, vec![format!("{from_to}: no case has results of both")]);
        } else {
            self.enter(CheckName::Comparison, Verdict::Pass, vec![from_to]);
        }
        self.comparison = Some(comparison);
    }

    fn enter(&mut self, name: CheckName, verdict: Verdict, details: Vec<String>) {
        let checks = self.checks.iter_mut();
        checks
            .filter(|check| check.name == name)
            .for_each(|check| *check = Check { name, verdict, details: details.clone() });
        let any = |verdict| self.checks.iter().any(|check| check.verdict == verdict);
        let open = self.checks.iter().any(|check| check.name.required() && check.verdict == Verdict::NotRun);
        self.verdict = match () {
            () if any(Verdict::Fail) => Verdict::Fail,
            () if open => Verdict::NotRun,
            () => Verdict::Pass,
        };
    }
}

impl fmt::Display for Report {
    /// Plain text, for people: aligned columns, no colour.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        table::write(self, f)
    }
}
