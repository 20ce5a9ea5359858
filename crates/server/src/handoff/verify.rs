//! `baton verify`: is a bundle what was handed over, and do devices compute what the trainer computed?

use std::{path::PathBuf, str::FromStr};

use anyhow::{Context, Result, bail, ensure};
use baton_engine::SharedRunner;
use baton_handoff::{
    Bundle, BundleError, Case, CheckName, Comparison, DeviceFacts, FileProblem, Manifest, ManifestError, Outcome,
    Parity, PrecisionClass, Report, TrustedKeys, Verdict, check_vocabulary, determinism, html, replay_cases,
    text_parity,
};
use baton_model::{Files, LoadError};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;

use super::{Checked, check_compatibility, column, ends, facts, listed, replay::DeviceReplay, trusted_keys};
use crate::{
    backend::Device,
    load::{self, Parts},
    memory, pull,
    settings::{Dtype, KvCacheDtype, Quantize, ServeArgs, Settings},
};

/// A precision's difference from itself, looked at everywhere.
const EVERYWHERE: f64 = -1.0;

/// What `baton verify` takes.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Checkpoint with handoff.json beside it, else an id as for `baton pull` [default: the bundled model]
    #[arg(value_name = "BUNDLE")]
    bundle: Option<String>,

    /// Device: auto (the CPU, today), cpu, cuda:N, ascend:N, or reference (naive and slow, the judge of the others)
    #[arg(long, default_value = "auto", conflicts_with = "devices")]
    device: String,

    /// Several devices, side by side
    #[arg(long, value_name = "DEVICE,…", value_delimiter = ',')]
    devices: Vec<String>,

    /// Precision in which weights are kept, as for `baton serve`
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Dtype,

    /// Quantise linear weights at load, as for `baton serve`
    #[arg(long, value_enum, value_name = "FORMAT")]
    quantize: Option<Quantize>,

    /// Precision in which the KV cache is kept, as for `baton serve`
    #[arg(long, value_enum, default_value = "auto")]
    kv_cache_dtype: KvCacheDtype,

    /// Compute threads; changes no result [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Ranks that share out the model, as for `baton serve`
    #[arg(long, value_name = "N")]
    tensor_parallel_size: Option<usize>,

    /// Public key file(s) of minisign, one of which must have signed the bundle
    #[arg(long, value_name = "FILE", num_args = 1..)]
    trusted_keys: Vec<PathBuf>,

    /// Replay the cases alone, batched, chunked, cached and preempted, and demand the same bits
    #[arg(long)]
    determinism: bool,

    /// Compare with another checkpoint, or with this one in another precision: float32, bfloat16, float16, q8_0, q4_0, q4_k, int8
    #[arg(long, value_name = "OTHER")]
    against: Option<String>,

    /// Print the report as JSON instead of a table
    #[arg(long)]
    json: bool,

    /// Write the report with plots to this file, as one HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// What a bundle is compared with.
enum Other {
    /// The same weights, otherwise.
    Precision(Dtype, Option<Quantize>),
    Checkpoint(String),
}

impl FromStr for Other {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(match (Quantize::from_str(text, false), Dtype::from_str(text, false)) {
            (Ok(format), _) => Self::Precision(Dtype::Auto, Some(format)),
            (_, Ok(dtype)) => Self::Precision(dtype, None),
            _ => Self::Checkpoint(text.to_owned()),
        })
    }
}

/// Runs the command.
pub fn main(args: &VerifyArgs) -> Result<Verdict> {
    let report = verify(args)?;
    show(args, &report)?;
    Ok(report.verdict())
}

#[allow(clippy::print_stdout)] // what was asked for
fn show(args: &VerifyArgs, report: &Report) -> Result<()> {
    if let Some(file) = &args.html {
        std::fs::write(file, html(report)).with_context(|| format!("--html {}", file.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

/// Verifies a bundle on one device, as it serves.
///
/// # Errors
/// What cannot be judged: no bundle, or a device that cannot be asked.
pub fn on_device(name: &str, files: &Files, device: &str) -> Result<Report> {
    let args = VerifyArgs {
        bundle: None,
        device: device.to_owned(),
        devices: Vec::new(),
        tensor_parallel_size: None,
        dtype: Dtype::Auto,
        quantize: None,
        kv_cache_dtype: KvCacheDtype::Auto,
        threads: None,
        trusted_keys: Vec::new(),
        determinism: false,
        against: None,
        json: false,
        html: None,
    };
    verify_files(&args, name, files)
}

fn verify(args: &VerifyArgs) -> Result<Report> {
    let (name, files) = load::files(args.bundle.as_deref())?;
    verify_files(args, &name, &files)
}

fn verify_files(args: &VerifyArgs, name: &str, files: &Files) -> Result<Report> {
    let keys = trusted_keys(&args.trusted_keys)?;
    let bundle = match Bundle::open(files) {
        Ok(Some(bundle)) => bundle,
        Ok(None) => bail!("{name}: there is no handoff.json to verify; models/export/baton_export.py makes one"),
        Err(error) if unreadable(&error) => return Err(error).with_context(|| name.to_owned()),
        Err(error) => {
            let mut report = Report::default();
            report.check(CheckName::Integrity, Err(vec![error.to_string()]));
            return Ok(report);
        }
    };
    let devices = if args.devices.is_empty() { vec![args.device.clone()] } else { args.devices.clone() };
    devices.iter().try_for_each(|device| Device::parse(device).map(drop))?;
    let (checked, mut report) = files_checked(&bundle, &keys);
    let manifest = bundle.manifest();
    let mut texts_checked = false;
    for device in &devices {
        let settings = settings(args, device, (args.dtype, args.quantize), args.kv_cache_dtype)?;
        let Some(mut subject) = Subject::load(files, &settings, manifest, &mut report)? else { continue };
        if !texts_checked {
            text_parity(&manifest.cases, &subject.text, chrono::Local::now().naive_local()).enter(&mut report);
            texts_checked = true;
        }
        let Some(outcomes) = subject.replay(manifest, &mut report)? else { continue };
        report.add_device(column(manifest, &subject.facts, &Parity::of(&manifest.cases, &outcomes)));
        if *device == devices[0] {
            if args.determinism {
                let (context, promised) = (subject.context, subject.row_invariant);
                report.set_determinism(determinism(&manifest.cases, context, promised, &mut subject.replay)?);
            }
            if let Some(other) = &args.against {
                report.set_comparison(compare(args, files, &subject, &outcomes, other, manifest)?);
            }
        }
        let rounded = subject.facts.precision > PrecisionClass::Float32;
        drop(subject);
        if rounded && fits_exactly(manifest) {
            add_exact(args, device, files, manifest, &mut report)?;
        }
    }
    checked.unchanged()?;
    Ok(report)
}

/// Adds what the device computes when nothing is rounded: where it serves in less, a fault could hide in the rounding.
fn add_exact(args: &VerifyArgs, device: &str, files: &Files, manifest: &Manifest, report: &mut Report) -> Result<()> {
    let settings = settings(args, device, (Dtype::Float32, None), KvCacheDtype::Auto)?;
    let Some(mut exact) = Subject::load(files, &settings, manifest, report)? else { return Ok(()) };
    // Weights that are stored quantised, or golden values that were rounded, leave nothing exact.
    if exact.facts.precision > PrecisionClass::Float32 {
        return Ok(());
    }
    if let Some(outcomes) = exact.replay(manifest, report)? {
        report.add_device(column(manifest, &exact.facts, &Parity::of(&manifest.cases, &outcomes)));
    }
    Ok(())
}

/// Whether all weights fit in memory in float32.
fn fits_exactly(manifest: &Manifest) -> bool {
    let elements = |shape: &[u64]| shape.iter().fold(1_u64, |product, side| product.saturating_mul(*side));
    let listed = manifest.tensors.values().map(|tensor| elements(&tensor.shape));
    let elements = listed.fold(0, u64::saturating_add);
    // Where no tensors are listed, the checkpoint is taken to be in 16 bits.
    let elements = if elements > 0 { elements } else { manifest.total_bytes() / 2 };
    memory::available_bytes().is_none_or(|free| elements.saturating_mul(4) < free / 4 * 3)
}

/// Files and signature as the gate checks them, and tensors besides.
fn files_checked(bundle: &Bundle, keys: &TrustedKeys) -> (Checked, Report) {
    let bar = ProgressBar::new(2 * bundle.manifest().total_bytes()).with_style(pull::bar_style());
    let progress = |bytes| bar.inc(bytes);
    let mut checked = Checked::new(bundle, keys, &progress);
    checked.problems.extend(bundle.verify_tensors(&progress).iter().map(ToString::to_string));
    bar.finish_and_clear();
    let report = checked.report();
    (checked, report)
}

/// Whether a bundle cannot be judged, rather than being wrong.
fn unreadable(error: &BundleError) -> bool {
    matches!(
        error,
        BundleError::Folder(_)
            | BundleError::File(FileProblem::Io { .. })
            | BundleError::Manifest(ManifestError::Version { .. })
    )
}

/// A model on a device, about to be judged.
struct Subject {
    text: baton_text::TextModel,
    replay: DeviceReplay,
    facts: DeviceFacts,
    vocab: usize,
    context: usize,
    row_invariant: bool,
}

impl Subject {
    /// `None` if it cannot be loaded, which is reported with every reason.
    fn load(files: &Files, settings: &Settings, manifest: &Manifest, report: &mut Report) -> Result<Option<Self>> {
        let mut parts = load::parts(files, settings, memory::available_bytes());
        if let Err(error) = &parts
            && let Some(LoadError::CacheTooSmall { .. } | LoadError::NoRoom { .. }) = error.downcast_ref()
        {
            // Where memory does not hold the model's whole context, that of the cases will do.
            let longest = manifest.cases.iter().map(|case| case.ids().count()).max();
            let settings = Settings { max_model_len: longest.map(|ids| ids + 1), ..settings.clone() };
            parts = load::parts(files, &settings, memory::available_bytes());
        }
        let Parts { text, loaded, .. } = match parts {
            Ok(parts) => parts,
            Err(error) => {
                let reasons = match error.downcast_ref::<LoadError>() {
                    Some(LoadError::Unsupported { reasons }) => reasons.clone(),
                    // The device cannot be asked, which says nothing of the bundle.
                    Some(LoadError::Device(_)) => return Err(error),
                    _ => vec![format!("{error:#}")],
                };
                report.check(CheckName::Compatibility, Err(reasons));
                return Ok(None);
            }
        };
        check_compatibility(report, manifest, &loaded.caps);
        let spec = loaded.runner.spec().clone();
        Ok(Some(Self {
            facts: facts(&loaded.report, &loaded.caps, manifest),
            row_invariant: loaded.caps.row_invariant,
            replay: DeviceReplay::new(SharedRunner::new(loaded.runner), ends(&loaded.report, &text)),
            text,
            vocab: spec.vocab_size,
            // One token is always generated behind a case.
            context: spec.max_model_len - 1,
        }))
    }

    /// `None` if the cases are not for this model, which is reported.
    fn replay(&mut self, manifest: &Manifest, report: &mut Report) -> Result<Option<Vec<Outcome>>> {
        if let Err(reasons) = check_vocabulary(&manifest.cases, self.vocab) {
            report.check(CheckName::Numerics, Err(reasons));
            return Ok(None);
        }
        Ok(Some(replayed(&manifest.cases, self.context, &mut self.replay)?))
    }
}

/// Settings of `baton serve` that matter to what is computed.
fn settings(
    args: &VerifyArgs,
    device: &str,
    (dtype, quantize): (Dtype, Option<Quantize>),
    kv_cache_dtype: KvCacheDtype,
) -> Result<Settings> {
    ServeArgs {
        device: Some(device.to_owned()),
        dtype: Some(dtype),
        quantize,
        kv_cache_dtype: Some(kv_cache_dtype),
        threads: args.threads,
        tensor_parallel_size: args.tensor_parallel_size,
        ..ServeArgs::default()
    }
    .resolve()
}

fn replayed(cases: &[Case], context: usize, replay: &mut DeviceReplay) -> Result<Vec<Outcome>> {
    let bar = ProgressBar::new(cases.len() as u64);
    let outcomes = replay_cases(cases, context, replay, &mut |index, _| {
        bar.set_position(index as u64);
        true
    });
    bar.finish_and_clear();
    Ok(outcomes?)
}

/// The cost of going from this checkpoint and precision to another.
fn compare(
    args: &VerifyArgs,
    files: &Files,
    subject: &Subject,
    outcomes: &[Outcome],
    other: &str,
    manifest: &Manifest,
) -> Result<Comparison> {
    let Ok(parsed) = other.parse();
    let (files, precision) = match parsed {
        Other::Precision(dtype, quantize) => (files.clone(), (dtype, quantize)),
        Other::Checkpoint(model) => (load::files(Some(&model))?.1, (args.dtype, args.quantize)),
    };
    let device = args.devices.first().unwrap_or(&args.device);
    let context = || format!("--against {other}");
    let mut report = Report::new(manifest);
    let settings = settings(args, device, precision, args.kv_cache_dtype)?;
    let Some(mut against) = Subject::load(&files, &settings, manifest, &mut report).with_context(context)? else {
        bail!("--against {other}: {}", listed(&report.reasons()));
    };
    ensure!(against.vocab == subject.vocab, "--against {other}: it has another vocabulary, of {} ids", against.vocab);
    let theirs = replayed(&manifest.cases, against.context, &mut against.replay).with_context(context)?;
    let numerics = |outcomes: &[Outcome]| Parity::of(&manifest.cases, outcomes).numerics(EVERYWHERE);
    Ok(Comparison {
        from: format!("{} as given", subject.facts.precision),
        to: other.to_owned(),
        a: numerics(outcomes),
        b: numerics(&theirs),
        between: Parity::between(&manifest.cases, outcomes, &theirs).numerics(EVERYWHERE),
    })
}
