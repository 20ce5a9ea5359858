//! The hand-off of what is served: how its bundle is opened before the weights are loaded, proven on the device, and
//! watched while it is served.

mod gate;
pub mod precision;
mod replay;
pub mod verify;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use baton_device::{Caps, Op};
use baton_handoff::{
    Bundle, CheckName, Column, DeviceFacts, Digest, Feature, Manifest, Parity, Report, SignatureStatus, Snapshot,
    TrustedKeys, judge, tolerances_for,
};
use baton_model::{Files, LoadReport};
use baton_text::TextModel;
use tracing::warn;

use crate::settings::{HandoffPolicy, Settings};

pub use gate::Gate;

/// Problems of one kind that a message lists, at most.
const LISTED: usize = 8;

/// What came with a checkpoint.
pub enum Handed {
    /// Nobody looked.
    Off,
    /// There is no manifest.
    Absent,
    /// A bundle.
    Bundle(Box<Checked>),
}

/// A bundle as far as it can be judged without computing. Problems are reported; what becomes of them is the policy's
/// affair.
pub struct Checked {
    manifest: Manifest,
    signature: SignatureStatus,
    signature_wanted: bool,
    /// What is not as the manifest has it.
    problems: Vec<String>,
    snapshot: Snapshot,
}

impl Handed {
    /// Opens the bundle of a checkpoint, if the policy looks, and hashes its files.
    ///
    /// # Errors
    /// No bundle, or one that is not what was handed over, where the policy requires it; a signature that is not good where
    /// keys are trusted.
    pub fn open(files: &Files, settings: &Settings) -> Result<Self> {
        let (keys, require) = (trusted_keys(&settings.trusted_keys)?, settings.handoff == HandoffPolicy::Require);
        if settings.handoff == HandoffPolicy::Off {
            ensure!(keys.is_empty(), "--trusted-keys has no effect with --handoff off");
            return Ok(Self::Off);
        }
        let bundle = match Bundle::open(files) {
            Ok(Some(bundle)) => bundle,
            Ok(None) if require => bail!("there is no handoff.json, and --handoff require wants one"),
            Ok(None) if !keys.is_empty() => bail!("there is no handoff.json, and --trusted-keys wants a signed one"),
            Ok(None) => return Ok(Self::Absent),
            Err(error) if require || !keys.is_empty() => return Err(error.into()),
            Err(error) => {
                warn!(%error, "the bundle cannot be read: nothing proves that this device computes what was trained");
                return Ok(Self::Absent);
            }
        };
        let checked = Checked::new(&bundle, &keys, &|_| {});
        ensure!(checked.signature.accepted(&keys), "handoff.json is {}", checked.signature);
        if !checked.problems.is_empty() {
            let problems = listed(&checked.problems);
            ensure!(!require, "the files are not what was handed over: {problems}");
            warn!(problems, "the files are not what was handed over");
        }
        Ok(Self::Bundle(Box::new(checked)))
    }

    /// Checks, once the weights are loaded, that they are those that were hashed, and that the device has what they need.
    ///
    /// # Errors
    /// Files that were changed meanwhile, whatever the policy: what was loaded may be half of either.
    pub fn loaded(&self, caps: &Caps, policy: HandoffPolicy) -> Result<()> {
        let Self::Bundle(checked) = self else { return Ok(()) };
        checked.unchanged()?;
        let lacking = lacking(&checked.manifest.requires, caps);
        ensure!(
            lacking.is_empty() || policy != HandoffPolicy::Require,
            "the device lacks what the bundle requires: {}",
            listed(&lacking)
        );
        Ok(())
    }

    /// The generation that the bundle names, if its files bear it out.
    pub fn generation(&self) -> Option<Digest> {
        match self {
            Self::Bundle(checked) if checked.problems.is_empty() => Some(checked.manifest.generation),
            _ => None,
        }
    }
}

impl Checked {
    /// Checks signature and files. `progress` gets the bytes hashed since it was last called.
    fn new(bundle: &Bundle, keys: &TrustedKeys, progress: &(dyn Fn(u64) + Sync)) -> Self {
        let integrity = bundle.verify_files(progress);
        Self {
            manifest: bundle.manifest().clone(),
            signature: bundle.signature(keys),
            signature_wanted: !keys.is_empty(),
            problems: integrity.problems.iter().map(ToString::to_string).collect(),
            snapshot: integrity.snapshot,
        }
    }

    /// Whether the files are still those that were checked.
    fn unchanged(&self) -> Result<()> {
        let changed = self.snapshot.unchanged().err().unwrap_or_default();
        let changed: Vec<String> = changed.iter().map(ToString::to_string).collect();
        ensure!(changed.is_empty(), "{}", listed(&changed));
        Ok(())
    }

    /// A report with what is known so far.
    fn report(&self) -> Report {
        let mut report = Report::new(&self.manifest);
        let files = vec![format!("{} files", self.manifest.files.len())];
        report
            .check(CheckName::Integrity, if self.problems.is_empty() { Ok(files) } else { Err(self.problems.clone()) });
        let signature = self.signature.to_string();
        report.set_signature(&signature);
        match (&self.signature, self.signature_wanted) {
            (_, false) => report.skip(CheckName::Signature, "no keys are trusted"),
            (SignatureStatus::Good { .. }, true) => report.check(CheckName::Signature, Ok(vec![signature])),
            (_, true) => report.check(CheckName::Signature, Err(vec![signature])),
        }
        report
    }
}

/// Enters whether the device has what a bundle requires.
fn check_compatibility(report: &mut Report, manifest: &Manifest, caps: &Caps) {
    let lacking = lacking(&manifest.requires, caps);
    let requires = manifest.requires.iter().map(ToString::to_string).collect();
    report.check(CheckName::Compatibility, if lacking.is_empty() { Ok(requires) } else { Err(lacking) });
}

/// A device with a loaded model in words.
fn facts(report: &LoadReport, caps: &Caps, manifest: &Manifest) -> DeviceFacts {
    let (precision, formats) = precision::served(report, caps, manifest);
    DeviceFacts { device: caps.device.clone(), isa: caps.isa.clone(), formats, precision }
}

/// What a device computed, judged by the tolerances of its precision.
fn column(manifest: &Manifest, device: &DeviceFacts, parity: &Parity) -> Column {
    let tolerances = tolerances_for(manifest, device.precision);
    let numerics = parity.numerics(tolerances.top1_margin());
    let findings = judge(&numerics, &tolerances);
    Column { device: device.clone(), tolerances, numerics, findings }
}

/// Tokens that end the replies of a model.
fn ends(report: &LoadReport, text: &TextModel) -> Vec<u32> {
    report.generation_config.eos_token_ids.iter().copied().chain(text.eos_token_id()).collect()
}

/// Features that the device does not have.
fn lacking(requires: &[Feature], caps: &Caps) -> Vec<String> {
    let lacks = |feature: &Feature| match feature {
        Feature::LatentAttention => !caps.ops.contains(&Op::LatentAttention),
        Feature::MixtureOfExperts => !caps.ops.contains(&Op::FusedMoe),
        // Every device attends to windows, and stored formats that it does not have are widened at load.
        _ => false,
    };
    let lacking = requires.iter().filter(|feature| lacks(feature));
    lacking.map(|feature| format!("{feature}: {} does not have it", caps.device)).collect()
}

/// The keys of all files.
pub fn trusted_keys(files: &[PathBuf]) -> Result<TrustedKeys> {
    let mut keys = TrustedKeys::default();
    for file in files {
        let context = || format!("--trusted-keys {}", file.display());
        keys.extend(TrustedKeys::parse(&std::fs::read_to_string(file).with_context(context)?).with_context(context)?);
    }
    Ok(keys)
}

/// The first of the problems, and how many more there are.
pub fn listed(problems: &[String]) -> String {
    let more = problems.len().saturating_sub(LISTED);
    let list = problems.iter().take(LISTED).map(String::as_str).collect::<Vec<_>>().join("; ");
    if more > 0 { format!("{list}; and {more} more") } else { list }
}
