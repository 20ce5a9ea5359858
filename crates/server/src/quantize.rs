//! `baton quantize`: saves a checkpoint with its linear layers quantised, and prints the new folder. Served, it gives
//! what `baton serve --quantize` gives with the original.
//!
//! Of a bundle it makes a bundle: the trainer's golden values stay, so the new weights are judged by what was trained. Nothing
//! is made of a bundle that is not what was handed over.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use baton_device::{BlockFormat, WeightFormat};
use baton_handoff::{Bundle, Digest, Feature, FileEntry, FileProblem, Integrity, MANIFEST, Manifest, Snapshot};
use baton_model::{Files, NewCheckpoint, Quantization};
use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, ProgressBar};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::{handoff::listed, load, pull, settings::Quantize};

/// Bytes that are hashed at once.
const PIECE: usize = 1 << 20;
/// Features that are formats of quantised weights.
const QUANTIZED: [Feature; 4] = [Feature::Fp8, Feature::Mxfp4, Feature::Int8, Feature::Int4];

/// What `baton quantize` takes.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// Checkpoint folder in Hugging Face layout, else an id as for `baton pull`
    #[arg(value_name = "MODEL")]
    model: String,

    /// Format of the linear layers
    #[arg(long, value_enum, value_name = "FORMAT")]
    quantize: Quantize,

    /// Folder to write, which must not exist
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

/// Runs the command.
pub fn main(args: &QuantizeArgs) -> Result<()> {
    let (name, files) = load::files(Some(&args.model))?;
    let context = || format!("model {name}");
    let original = Original::open(&files).with_context(context)?;
    let bar = ProgressBar::no_length().with_style(pull::bar_style());
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let quantization = Quantization::from(args.quantize);
    let complete = |folder: &NewCheckpoint| match &original {
        Some(original) => Ok(original.hand_on(folder, args.quantize)?),
        None => Ok(()),
    };
    let converted = baton_model::quantize(&files, quantization, &args.out, &progress, complete);
    bar.finish_and_clear();
    let converted = converted.with_context(context)?;
    if let Some(worst) = converted.iter().max_by(|a, b| a.max_abs_error.total_cmp(&b.max_abs_error)) {
        let (before, after) = converted.iter().fold((0, 0), |(b, a), c| (b + c.bytes_before, a + c.bytes_after));
        eprintln!(
            "{} tensors converted, {} to {}; largest error {} in {}, {} to {}",
            converted.len(),
            HumanBytes(before),
            HumanBytes(after),
            worst.max_abs_error,
            worst.tensor,
            worst.from,
            worst.to
        );
        let others = converted.iter().filter(|c| c.to != WeightFormat::Ggml(quantization.format())).count();
        if others > 0 {
            eprintln!("{others} of them are kept in a wider format, since their rows are not whole blocks");
        }
    }
    #[allow(clippy::print_stdout)] // what was asked for
    {
        println!("{}", args.out.display());
    }
    Ok(())
}

/// A bundle that is what was handed over.
struct Original {
    manifest: Manifest,
    snapshot: Snapshot,
}

impl Original {
    /// Checks the files of a bundle; `None` for a checkpoint that is none.
    fn open(files: &Files) -> Result<Option<Self>> {
        let Some(bundle) = Bundle::open(files)? else { return Ok(None) };
        let manifest = bundle.manifest().clone();
        let bar = ProgressBar::new(manifest.total_bytes()).with_style(pull::bar_style());
        let Integrity { problems, snapshot } = bundle.verify_files(&|bytes| bar.inc(bytes));
        bar.finish_and_clear();
        refuse(&problems)?;
        Ok(Some(Self { manifest, snapshot }))
    }

    /// Writes the new folder's manifest, once all else is in it.
    fn hand_on(&self, folder: &NewCheckpoint, quantize: Quantize) -> Result<()> {
        refuse(&self.snapshot.unchanged().err().unwrap_or_default())?;
        let mut manifest = self.manifest.clone();
        manifest.files = digests(folder.path()).context("the new files cannot be hashed")?;
        manifest.generation = Manifest::generation_of(&manifest.files);
        manifest.tensors.clear();
        manifest.requires = requires(&manifest.requires, Quantization::from(quantize).format());
        manifest.model.lineage = lineage(manifest.model.lineage, &self.manifest.generation, quantize);
        let json = serde_json::to_vec(&manifest)?;
        Manifest::parse(&json).context("the new manifest")?;
        Ok(folder.write_file(MANIFEST, &json)?)
    }
}

fn refuse(problems: &[FileProblem]) -> Result<()> {
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    ensure!(problems.is_empty(), "the files are not what was handed over: {}", listed(&problems));
    Ok(())
}

/// What a device needs: as before, but for the format of the linear layers.
fn requires(before: &[Feature], format: BlockFormat) -> Vec<Feature> {
    let blocks = if format.bytes() >= format.elements() { Feature::Int8 } else { Feature::Int4 };
    before.iter().copied().filter(|feature| !QUANTIZED.contains(feature)).chain([blocks]).collect()
}

/// Where the new weights are from. What has one of these names already, as after quantising twice, goes under `original`.
fn lineage(before: Map<String, Value>, generation: &Digest, quantize: Quantize) -> Map<String, Value> {
    let format = quantize.to_possible_value().expect("no value is hidden");
    let step = [
        ("quantized_from", generation.to_string()),
        ("format", format.get_name().to_owned()),
        ("by", concat!("baton ", env!("CARGO_PKG_VERSION")).to_owned()),
    ];
    let taken = step.iter().any(|(name, _)| before.contains_key(*name));
    let mut lineage = if taken { Map::from_iter([("original".to_owned(), json!(before))]) } else { before };
    lineage.extend(step.map(|(name, value)| (name.to_owned(), value.into())));
    lineage
}

/// Length and digest of each file of a folder that has no others in it.
fn digests(folder: &Path) -> io::Result<BTreeMap<String, FileEntry>> {
    let mut buffer = vec![0; PIECE];
    let mut entry = |entry: io::Result<fs::DirEntry>| {
        let entry = entry?;
        let (mut file, mut hasher, mut bytes) = (File::open(entry.path())?, Sha256::new(), 0);
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            bytes += read as u64;
        }
        let name = entry.file_name().into_string().map_err(|_| io::Error::other("a file name is not UTF-8"))?;
        Ok((name, FileEntry { bytes, sha256: Digest(hasher.finalize().into()) }))
    };
    fs::read_dir(folder)?.map(&mut entry).collect()
}
