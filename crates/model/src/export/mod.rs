//! Checkpoints that are written: quantised ones, to be served again without the original.
//!
//! A saved folder holds the blocks that loading with the same format would make, so it gives the same logits to the
//! last bit. Matrices go through the loader row by row; no more of the original than a tensor is in memory.

mod folder;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use baton_device::{Backend, BlockFormat, DType, HostTensor, Reference, WeightFormat};
use half::{bf16, f16};
use serde_json::Value;

pub use folder::{NewCheckpoint, NewTensor};

use crate::arch;
use crate::checkpoint::{INDEX, Role, TensorSpec};
use crate::config::{ModelConfig, json_object, of_blocks};
use crate::gguf::Opened;
use crate::load::{self, MAX_CONFIG_BYTES};
use crate::loader::{Formats, Loader};
use crate::{CheckpointError, Conversion, FileError, Files, LoadError, Quantization};

/// Endings of what stands beside the weights and is copied: configs, tokenizers, templates, licences.
const COPIED: [&str; 7] = [".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", "LICENSE"];
/// Those of them that are not true of the new folder: its own are written. No ending is that of a hand-off's signature.
const NOT_COPIED: [&str; 3] = [INDEX, "config.json", "handoff.json"];
/// Bytes of such a file, at most.
const MAX_COPIED: u64 = 256 << 20;
/// Elements that are widened at once.
const CHUNK: usize = 8 << 20;

/// Why a checkpoint was not written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The original cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The original has no `config.json` to go on from.
    #[error("a GGUF file is quantised already; a folder with config.json and safetensors is taken")]
    Gguf,
    /// The model has experts by token.
    #[error("{architecture} has tables of integers, which are not written; its released files are quantised already")]
    Table {
        /// As in the config.
        architecture: &'static str,
    },
    /// Something has the name asked for.
    #[error("{} exists already", path.display())]
    Exists {
        /// The name.
        path: PathBuf,
    },
    /// The disk is too small.
    #[error("{} has {free} bytes free; {needed} are needed", path.display())]
    Space {
        /// A folder on the disk.
        path: PathBuf,
        /// Bytes that the tensors take.
        needed: u64,
        /// Bytes that are left.
        free: u64,
    },
    /// The system refused to write.
    #[error("{} cannot be written: {source}", path.display())]
    Write {
        /// What was written.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The caller's part was not added to the folder.
    #[error(transparent)]
    Completing(Box<dyn std::error::Error + Send + Sync>),
}

impl From<CheckpointError> for ExportError {
    fn from(error: CheckpointError) -> Self {
        ExportError::Load(error.into())
    }
}

impl From<FileError> for ExportError {
    fn from(error: FileError) -> Self {
        ExportError::Load(error.into())
    }
}

/// Names and shapes of the tensors that a checkpoint of this config has, where it is not quantised.
pub fn tensor_shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    arch::specs(config, |_| None).0.into_values().map(|spec| (spec.name, spec.shape)).collect()
}

/// Writes the checkpoint of `files` to a new folder `out`, its linear layers quantised (see
/// [`LoadOptions::quantization`](crate::LoadOptions)), everything else as stored. What was stored in another quantised
/// form and is no linear layer becomes bf16. `progress` is told the bytes written and those to be written; `complete` adds
/// what only the finished files tell, before they are seen under their name. Gives what the conversions cost.
///
/// # Panics
/// If the format cannot be made.
pub fn quantize(
    files: &Files,
    quantization: Quantization,
    out: &Path,
    progress: &dyn Fn(u64, u64),
    complete: impl FnOnce(&NewCheckpoint) -> Result<(), Box<dyn std::error::Error + Send + Sync>>,
) -> Result<Vec<Conversion>, ExportError> {
    let format = quantization.format();
    assert!(format.can_be_made(), "{format} is read, never made");
    if matches!(files, Files::Gguf(_)) {
        return Err(ExportError::Gguf);
    }
    let Opened { config, checkpoint, digest, .. } = load::open(files)?;
    let specs = arch::specs(&config, |name| checkpoint.stored_type(name)).0;
    if specs.values().any(|spec| spec.role == Role::Table) {
        return Err(ExportError::Table { architecture: config.architecture.name() });
    }
    checkpoint.verify(&specs, |name| arch::is_ignorable(&config, name))?;
    // Its capabilities only: what no device keeps as stored becomes what this one keeps it as.
    let backend = Reference::new();
    let formats = Formats { dtype: None, quantized: Some(quantization) };
    let formats = formats.resolve(&specs, &checkpoint, backend.caps());
    load::log_fallbacks(format, specs.values());
    load::check_device(&backend, &config, specs.values(), &formats, BTreeSet::new())?;

    let kept = |spec: &TensorSpec| match spec.role {
        Role::Vector => checkpoint.dtype(&spec.name),
        _ => as_stored(formats[&spec.name]),
    };
    let tensors = specs.values().map(|spec| NewTensor::new(spec.name.clone(), &spec.shape, kept(spec))).collect();
    let mut folder = NewCheckpoint::create(out, tensors)?;
    let floats: BTreeSet<&str> =
        specs.values().filter(|s| s.role == Role::Float).filter_map(|s| s.module().rsplit('.').next()).collect();
    folder.write_file("config.json", &quantized_config(files, format, &Vec::from_iter(floats))?)?;
    copy_files(files, &folder)?;

    let mut loader = Loader::new(&backend, &checkpoint, (&specs, &formats), Some(quantization), digest);
    folder.write_weights(progress, |tensor, write| {
        let spec = &specs[tensor.name()];
        if spec.role == Role::Vector {
            return write(loader.map(&spec.name)?.host().stored().expect("vectors are never quantised"));
        }
        let (matrix, format) = loader.matrix(spec.module())?;
        match matrix.host() {
            host if host.stored().is_some() && WeightFormat::from(host.dtype()) == format => {
                write(host.stored().expect("checked above"))?;
            }
            host => each_chunk(&host, format, write)?,
        }
        Ok(loader.record(matrix)?)
    })?;
    complete(&folder).map_err(ExportError::Completing)?;
    folder.finish()?;
    Ok(loader.conversions)
}

/// The stored type of what a device keeps in `format`.
fn as_stored(format: WeightFormat) -> DType {
    match format {
        WeightFormat::F32 => DType::F32,
        WeightFormat::F16 => DType::F16,
        WeightFormat::BF16 => DType::BF16,
        WeightFormat::Ggml(format) => DType::Ggml(format),
        WeightFormat::Coded(code) => unreachable!("codes of {code} are made into something else"),
    }
}

/// The original's config with our quantisation instead of its own.
fn quantized_config(files: &Files, format: BlockFormat, floats: &[&str]) -> Result<Vec<u8>, ExportError> {
    let name = "config.json";
    let json = files.read(name, MAX_CONFIG_BYTES)?.ok_or_else(|| FileError::Missing { name: name.into() })?;
    let mut config = json_object(name, &json).map_err(LoadError::from)?;
    config.insert("quantization_config".into(), of_blocks(format, floats));
    Ok(serde_json::to_vec_pretty(&Value::from(config)).expect("JSON serialises"))
}

fn copy_files(files: &Files, folder: &NewCheckpoint) -> Result<(), ExportError> {
    let copied = |name: &String| COPIED.iter().any(|e| name.ends_with(e)) && !NOT_COPIED.contains(&name.as_str());
    for name in files.names()?.into_iter().filter(copied) {
        let file = files.open(&name)?.ok_or_else(|| FileError::Missing { name: name.clone() })?;
        if file.len() > MAX_COPIED {
            return Err(FileError::TooLarge { name, bytes: file.len(), limit: MAX_COPIED }.into());
        }
        folder.write_file(&name, &file.read(0, file.len() as usize)?)?;
    }
    Ok(())
}

/// Writes the rows of a matrix in `format`, converted on all cores.
fn each_chunk(
    host: &HostTensor<'_>,
    format: WeightFormat,
    write: &mut dyn FnMut(&[u8]) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let &[rows, cols] = host.shape() else { unreachable!("{} is a matrix", host.name()) };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = (CHUNK / cols / cores).max(1);
    let encoded = |range: Range<usize>| encode(&host.rows(range.start, range.len()), format);
    for start in (0..rows).step_by(share * cores) {
        let end = rows.min(start + share * cores);
        let parts: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let ranges = (start..end).step_by(share).map(|from| from..end.min(from + share));
            let workers: Vec<_> = ranges.map(|range| scope.spawn(|| encoded(range))).collect();
            workers.into_iter().map(|worker| worker.join().expect("a conversion does not panic")).collect()
        });
        parts.iter().try_for_each(|part| write(part))?;
    }
    Ok(())
}

fn encode(rows: &HostTensor<'_>, format: WeightFormat) -> Vec<u8> {
    match format {
        WeightFormat::F32 => rows.to_f32().iter().flat_map(|v| v.to_le_bytes()).collect(),
        WeightFormat::F16 => rows.to_f32().iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        WeightFormat::BF16 => rows.to_f32().iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        WeightFormat::Ggml(format) => rows.to_blocks(&|values| format.quantize(values)),
        WeightFormat::Coded(code) => unreachable!("codes of {code} are made into something else"),
    }
}
