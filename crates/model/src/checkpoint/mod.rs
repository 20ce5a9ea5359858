//! A checkpoint's weights: which tensors there are, in which file, and whether they are exactly the
//! ones that a config asks for.
//!
//! Invariant: every [`Entry`] of an open [`Checkpoint`] lies within its file, and names are distinct
//! over all files. Bytes are mapped one tensor at a time, so reading a checkpoint keeps no more of it
//! resident than the tensors in hand.

mod arranged;
mod files;
pub(crate) mod gguf;
mod header;
mod index;
mod plain;

use std::collections::{BTreeMap, BTreeSet};

pub(crate) use arranged::LatentHalves;
use arranged::{Arrangement, deinterleaved};
use baton_device::{DType, WeightFormat};
pub use files::{FileError, Files};
pub(crate) use files::{OpenFile, Part};
pub(crate) use header::Entry;
use header::{INTEGERS, WEIGHTS};
pub use plain::{StoredAs, Tensors};

use crate::quant::{Encoding, Parts, StoredTensor};
use crate::split::Split;

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Reasons listed in one message, at most.
const MAX_REASONS: usize = 20;

/// Why weights are refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be had.
    #[error(transparent)]
    File(#[from] FileError),
    /// No weights that can be read.
    #[error("no weights: {reason}; {SINGLE} or {INDEX} with its shards is read")]
    NoWeights {
        /// What is there instead.
        reason: String,
    },
    /// A file is damaged.
    #[error("{file} is damaged: {reason}")]
    Damaged {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The index and the shards disagree.
    #[error("{INDEX} does not agree with its shards: {reason}")]
    Index {
        /// Where they disagree.
        reason: String,
    },
    /// The tensors are not those of the config.
    #[error("the weights do not fit config.json: {}", reasons.join("; "))]
    Tensors {
        /// Every tensor that is missing, unexpected, or of the wrong shape or dtype.
        reasons: Vec<String>,
    },
    /// A weight is NaN or infinite.
    #[error("tensor {tensor} holds {value} at element {element}; weights must be finite")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Index in row-major order.
        element: usize,
        /// What is there.
        value: f32,
    },
    /// A quantised weight means nothing.
    #[error("tensor {tensor} cannot be read: {reason}")]
    Quantized {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A table does not name the experts of each token.
    #[error("tensor {tensor} names no experts: {reason}")]
    Table {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A weight is too large for the format asked for.
    #[error("tensor {tensor} holds {value}, which {format} cannot hold; load it as stored, or as bf16")]
    OutOfRange {
        /// The tensor.
        tensor: String,
        /// The value.
        value: f32,
        /// The format asked for.
        format: WeightFormat,
    },
}

/// A tensor that a config asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorSpec {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) role: Role,
    /// How it is stored, if not as floats of that shape.
    pub(crate) encoding: Option<Encoding>,
    /// How ranks share it out.
    pub(crate) split: Split,
}

impl TensorSpec {
    /// Name of the module that has it.
    pub(crate) fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }

    /// The tensors in the file that stand for it.
    fn stored(&self) -> Result<Vec<(String, StoredTensor)>, String> {
        let Some(encoding) = &self.encoding else {
            let types = if self.role == Role::Table { INTEGERS } else { WEIGHTS };
            let shapes = vec![self.shape.clone()];
            return Ok(vec![(self.name.clone(), StoredTensor { suffix: "", shapes, types, optional: false })]);
        };
        let tensors = encoding.tensors(self.matrix()).map_err(|e| format!("{} ({encoding}): {e}", self.name))?;
        Ok(tensors.into_iter().map(|t| (format!("{}.{}", self.module(), t.suffix), t)).collect())
    }

    /// Its shape `[out, in]`.
    ///
    /// # Panics
    /// If it is no matrix.
    pub(crate) fn matrix(&self) -> [usize; 2] {
        self.shape.as_slice().try_into().unwrap_or_else(|_| panic!("{} is no matrix", self.name))
    }
}

/// What a tensor is for, which decides how it may be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A weight that may be quantised.
    Linear,
    /// A weight that may change its float type only: embeddings, and what attention absorbs.
    Float,
    /// A router: as stored, since a changed weight changes which experts are chosen.
    Router,
    /// A norm, bias or correction: f32, which holds every stored type exactly.
    Vector,
    /// Experts by token, which are integers and no weights.
    Table,
}

impl Role {
    /// Whether it is a matrix that has a format, and not numbers beside those.
    pub(crate) const fn has_format(self) -> bool {
        match self {
            Role::Linear | Role::Float | Role::Router => true,
            Role::Vector | Role::Table => false,
        }
    }
}

/// The open weight files of a checkpoint.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    files: Vec<OpenFile>,
    /// Which file, and where in it.
    tensors: BTreeMap<String, (usize, Entry)>,
    /// Those that do not lie in the file as they are asked for.
    arranged: BTreeMap<String, Arrangement>,
}

impl Checkpoint {
    pub(crate) fn new(files: Vec<OpenFile>, tensors: BTreeMap<String, (usize, Entry)>) -> Self {
        Self { files, tensors, arranged: BTreeMap::new() }
    }

    /// States that the rows of a tensor, if it is there, alternate between the halves of each of `heads` heads.
    pub(crate) fn interleave(&mut self, name: String, heads: usize) {
        self.arranged.insert(name, Arrangement::Interleaved(heads));
    }

    /// Adds the up-projection of latent attention, which lies in two tensors.
    ///
    /// # Panics
    /// As for [`LatentHalves::joined`].
    pub(crate) fn join(&mut self, name: String, halves: LatentHalves) {
        self.tensors.insert(name.clone(), (halves.key.0, halves.joined(name.clone())));
        self.arranged.insert(name, Arrangement::Latent(halves));
    }

    /// Opens the files and reads their headers.
    pub(crate) fn open(files: &Files) -> Result<Self, CheckpointError> {
        let single = files.open(SINGLE)?;
        let index = files.read(INDEX, index::MAX_BYTES)?;
        match (single, index) {
            (Some(_), Some(_)) => Err(CheckpointError::NoWeights {
                reason: format!("both {SINGLE} and {INDEX} are there, and either could be meant"),
            }),
            (Some(single), None) => Self::single(single),
            (None, Some(index)) => index::open_shards(files, &index),
            (None, None) => Err(no_weights(&files.names()?)),
        }
    }

    /// The tensors of one file.
    pub(crate) fn single(file: OpenFile) -> Result<Self, CheckpointError> {
        let tensors = read_header(&file)?.into_iter().map(|e| (e.name.clone(), (0, e))).collect();
        Ok(Self::new(vec![file], tensors))
    }

    /// All tensors, by name.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.tensors.values().map(|(_, entry)| entry)
    }

    /// `Ok` if the tensors are exactly those of `specs`, with their shapes, of types that can be
    /// weights; tensors for which `ignored` holds may be there besides.
    pub(crate) fn verify(
        &self,
        specs: &BTreeMap<String, TensorSpec>,
        ignored: impl Fn(&str) -> bool,
    ) -> Result<(), CheckpointError> {
        let mut reasons = Vec::new();
        let mut known = BTreeSet::new();
        for spec in specs.values() {
            match spec.stored() {
                Ok(tensors) => {
                    reasons.extend(tensors.iter().filter_map(|(name, stored)| self.mismatch(name, stored)));
                    known.extend(tensors.into_iter().map(|(name, _)| name));
                }
                Err(reason) => reasons.push(reason),
            }
        }
        let unexpected = self.tensors.keys().filter(|name| !known.contains(*name) && !ignored(name));
        reasons.extend(unexpected.map(|name| format!("tensor {name} is not part of this model")));
        if reasons.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Tensors { reasons: at_most(reasons) })
    }

    /// Why a tensor is not the one asked for.
    fn mismatch(&self, name: &str, asked: &StoredTensor) -> Option<String> {
        let Some((_, entry)) = self.tensors.get(name) else {
            return (!asked.optional).then(|| format!("tensor {name} is missing"));
        };
        if !asked.shapes.contains(&entry.shape) {
            let shapes: Vec<_> = asked.shapes.iter().map(|s| format!("{s:?}")).collect();
            let shapes = shapes.join(" or ");
            return Some(format!("tensor {name} has shape {:?}, the config asks for {shapes}", entry.shape));
        }
        if !asked.types.contains(&entry.stored_type) {
            let wanted = match asked.types {
                WEIGHTS => "weights are F32, F16, BF16 or blocks of GGUF".into(),
                types => types.join(" or "),
            };
            return Some(format!("tensor {name} has dtype {}; {wanted}", entry.stored_type));
        }
        None
    }

    /// The stored type of a tensor, if it is there.
    pub(crate) fn stored_type(&self, name: &str) -> Option<&'static str> {
        self.tensors.get(name).map(|(_, entry)| entry.stored_type)
    }

    /// The stored type of a verified tensor of floats.
    pub(crate) fn dtype(&self, name: &str) -> DType {
        self.tensors[name].1.dtype().expect("verified")
    }

    /// Bytes that verified tensors take in the files.
    pub(crate) fn bytes(&self, spec: &TensorSpec) -> u64 {
        let stored = spec.stored().expect("verified");
        stored.iter().filter_map(|(name, _)| self.tensors.get(name)).map(|(_, entry)| entry.bytes as u64).sum()
    }

    /// The tensors that stand for a verified quantised one; `visit` sees the header and bytes of each.
    pub(crate) fn parts(
        &self,
        spec: &TensorSpec,
        mut visit: impl FnMut(&Entry, &[u8]),
    ) -> Result<Parts, CheckpointError> {
        let mut parts = BTreeMap::new();
        for (name, stored) in spec.stored().expect("verified") {
            if self.tensors.contains_key(&name) {
                let (entry, part) = self.tensor(&name)?;
                visit(entry, &part);
                parts.insert(stored.suffix, (entry.stored_type, part));
            }
        }
        Ok(Parts { module: spec.module().to_owned(), parts })
    }

    /// A tensor's entry and bytes, copied out of the file instead of mapped.
    ///
    /// # Panics
    /// If there is no tensor of that name.
    pub(crate) fn read(&self, name: &str) -> Result<(&Entry, Part), CheckpointError> {
        let (file, entry) = &self.tensors[name];
        Ok((entry, self.files[*file].read(entry.offset, entry.bytes)?))
    }

    /// A tensor's entry and bytes, in the order asked for.
    ///
    /// # Panics
    /// If there is no tensor of that name: [`Checkpoint::verify`] comes first.
    pub(crate) fn tensor(&self, name: &str) -> Result<(&Entry, Part), CheckpointError> {
        let (file, entry) = self.tensors.get(name).unwrap_or_else(|| panic!("{name} was verified"));
        let part = || self.files[*file].part(entry.offset, entry.bytes);
        let part = match self.arranged.get(name) {
            None => part()?,
            Some(Arrangement::Interleaved(heads)) => Part::Owned(deinterleaved(&part()?, entry.shape[0], *heads)),
            Some(Arrangement::Latent(halves)) => Part::Owned(halves.join(&self.files, self.dtype(name))?),
        };
        Ok((entry, part))
    }
}

/// The first of the reasons, and how many more there are.
pub(crate) fn at_most(mut reasons: Vec<String>) -> Vec<String> {
    let more = reasons.len().saturating_sub(MAX_REASONS);
    reasons.truncate(MAX_REASONS);
    if more > 0 {
        reasons.push(format!("and {more} more"));
    }
    reasons
}

fn read_header(file: &OpenFile) -> Result<Vec<Entry>, CheckpointError> {
    let damaged = |reason| CheckpointError::Damaged { file: file.name.clone(), reason };
    if file.len() == 0 {
        return Err(FileError::Empty { name: file.name.clone() }.into());
    }
    if file.len() < 8 {
        return Err(damaged(format!("it has {} bytes: it is truncated", file.len())));
    }
    let prefix = file.read(0, 8)?;
    let len = header::header_len(prefix[..8].try_into().expect("8 bytes"), file.len()).map_err(damaged)?;
    if len == 0 {
        return Err(damaged("its header is empty".into()));
    }
    header::parse(&file.read(8, len)?, file.len()).map_err(damaged)
}

/// Names what lies in a folder instead of weights: formats that run code when read are never opened.
fn no_weights(names: &[String]) -> CheckpointError {
    let with = |endings: &[&str]| names.iter().filter(|n| endings.iter().any(|e| n.ends_with(e))).min();
    let reason = if let Some(name) = with(&[".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"]) {
        format!("{name} is a pickle, which runs code when read; convert it to safetensors")
    } else if let Some(name) = with(&[".gguf"]) {
        format!("{name} is GGUF; name the file itself instead of its folder")
    } else if let Some(name) = with(&[".safetensors"]) {
        format!("{name} is there without {INDEX}")
    } else {
        "no weight file is there".into()
    };
    CheckpointError::NoWeights { reason }
}
