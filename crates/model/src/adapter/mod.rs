//! LoRA adapters (arXiv 2106.09685) as peft saves them: a folder with `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! Invariant: an [`Adapter`] that exists fits the model it was loaded for and is finite. Everything of such a folder
//! that would not be applied exactly is refused here, by name.

mod config;
mod tensors;

use std::any::Any;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use baton_device::{Backend, Caps, DeviceError, HostLinear, HostTensor, Purpose, WeightFormat};
use sha2::{Digest, Sha256};

use self::config::LoraConfig;
use self::tensors::{Matrices, WEIGHTS, pair_up};
use crate::arch::{AdapterWeights, Delta};
use crate::checkpoint::{Checkpoint, CheckpointError, Entry, FileError, Files, Part};
use crate::config::ConfigError;
use crate::loader::Slot;
use crate::precision;
use crate::split::Columns;

/// Bytes of `adapter_config.json` that are read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// An adapter on the device of the runner it was loaded for. Clones are the same adapter; its memory is freed with the
/// last of them.
#[derive(Clone)]
pub struct Adapter(Arc<Loaded>);

struct Loaded {
    digest: [u8; 32],
    rank: usize,
    bytes: u64,
    /// The runner's own form: one without a device has its own.
    weights: Box<dyn Any + Send + Sync>,
    /// See [`Adapter::supersede`].
    successor: OnceLock<Option<Adapter>>,
}

impl Adapter {
    /// An adapter of a runner that knows what `weights` are. `digest` tells it from every other; `rank` is its
    /// largest, `bytes` what it takes on the device.
    pub fn new(digest: [u8; 32], rank: usize, bytes: u64, weights: impl Any + Send + Sync) -> Self {
        Self(Arc::new(Loaded { digest, rank, bytes, weights: Box::new(weights), successor: OnceLock::new() }))
    }

    /// The runner it was loaded for has been replaced: from now on every clone stands for `successor`, the same adapter
    /// loaded for the other runner, or for none if it could not be loaded again. Only the first call counts.
    ///
    /// # Panics
    /// If the successor is another adapter.
    pub fn supersede(&self, successor: Option<Adapter>) {
        assert!(successor.as_ref().is_none_or(|successor| successor == self), "another adapter");
        let _ = self.0.successor.set(successor);
    }

    /// The adapter as the present runner has it; `None` if it could not be loaded again.
    pub fn current(&self) -> Option<Adapter> {
        let mut current = self;
        while let Some(successor) = current.0.successor.get() {
            current = successor.as_ref()?;
        }
        Some(current.clone())
    }

    /// SHA-256 over all that decides what it computes.
    pub fn digest(&self) -> &[u8; 32] {
        &self.0.digest
    }

    /// The largest rank of its matrices.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Bytes of its matrices as kept.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// The runner's form of it.
    ///
    /// # Panics
    /// If it was loaded for a runner of another kind.
    pub fn weights<T: Any>(&self) -> &T {
        self.0.weights.downcast_ref().expect("an adapter stays with the runner it was loaded for")
    }
}

/// Equal if they compute the same.
impl PartialEq for Adapter {
    fn eq(&self, other: &Self) -> bool {
        self.0.digest == other.0.digest
    }
}

impl Eq for Adapter {}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Adapter(")?;
        self.0.digest[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

/// Why an adapter is refused.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// No adapter where one was looked for.
    #[error("there is no adapter: {reason}; a folder with {} and {WEIGHTS} is read", config::FILE)]
    Missing {
        /// What is there instead.
        reason: String,
    },
    /// `adapter_config.json` is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file cannot be had, or is damaged.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No matrices that can be read.
    #[error("no adapter weights: {reason}; {WEIGHTS} is read")]
    NoWeights {
        /// What is there instead.
        reason: String,
    },
    /// The matrices are not those of the config, or not for this model.
    #[error("the adapter does not fit: {}", reasons.join("; "))]
    Tensors {
        /// Every tensor or module at fault.
        reasons: Vec<String>,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<FileError> for AdapterError {
    fn from(error: FileError) -> Self {
        match error {
            // Whoever asked knows the path.
            FileError::Folder { reason, .. } => Self::Missing { reason },
            error => Self::Checkpoint(error.into()),
        }
    }
}

/// Loads adapters for one model, on any thread, while the model runs.
pub struct AdapterLoader<B: Backend> {
    /// Each rank of the model, with its projections by number.
    ranks: Vec<(Arc<B>, Arc<[Slot]>)>,
    max_rank: usize,
}

impl<B: Backend> Clone for AdapterLoader<B> {
    fn clone(&self) -> Self {
        Self { ranks: self.ranks.clone(), max_rank: self.max_rank }
    }
}

impl<B: Backend> AdapterLoader<B> {
    pub(crate) fn new(backend: Arc<B>, slots: Arc<[Slot]>, max_rank: usize) -> Self {
        Self { ranks: vec![(backend, slots)], max_rank }
    }

    /// For the model of several ranks, in their order; each of `loaders` is for one of them.
    pub(crate) fn of_ranks(loaders: Vec<Self>) -> Option<Self> {
        let max_rank = loaders.first()?.max_rank;
        Some(Self { ranks: loaders.into_iter().flat_map(|loader| loader.ranks).collect(), max_rank })
    }

    /// Loads the adapter of a folder.
    pub fn load(&self, folder: &Path) -> Result<Adapter, AdapterError> {
        let files = Files::folder(folder)?;
        let json = files.read(config::FILE, MAX_CONFIG_BYTES)?;
        let missing = || AdapterError::Missing { reason: format!("{} is missing", config::FILE) };
        let json = json.ok_or_else(missing)?;
        let config = LoraConfig::parse(&json)?;
        let checkpoint = open(&files)?;
        let (first, slots) = &self.ranks[0];
        let pairs = pair_up(&config, &checkpoint, slots, self.max_rank)?;

        let mut digest = Sha256::new_with_prefix(&json);
        let (mut bytes, mut rank) = (0, 0);
        let deltas = || slots.iter().map(|_| None).collect();
        let mut of_ranks: Vec<Vec<Option<Delta<B>>>> = self.ranks.iter().map(|_| deltas()).collect();
        for (module, Matrices { a, b, slots }) in pairs {
            let (a, b) = (read(&checkpoint, a, &mut digest)?, read(&checkpoint, b, &mut digest)?);
            let (a, b) = (a.host(), b.host());
            bytes += [&a, &b].map(|t| format(first.caps(), t).bytes(t.len()) as u64).iter().sum::<u64>();
            rank = rank.max(a.shape()[0]);
            for ((backend, all), deltas) in self.ranks.iter().zip(&mut of_ranks) {
                let weight = |weight: HostTensor<'_>| {
                    let format = format(backend.caps(), &weight);
                    backend.linear_weight(&HostLinear { weight, bias: None, format, purpose: Purpose::Adapter })
                };
                // What a rank takes of a module's inputs is the same for all of its parts.
                let inputs = Columns::new(a.clone(), all[slots[0]].columns.clone());
                let shared = Arc::new(weight(inputs.host())?);
                for &slot in &slots {
                    let rows = &all[slot].rows;
                    deltas[slot] = Some(Delta {
                        a: shared.clone(),
                        b: weight(b.rows(rows.start, rows.len()))?,
                        rank: a.shape()[0],
                        scale: config.scale(module),
                    });
                }
            }
        }
        let weights =
            self.ranks.iter().zip(of_ranks).map(|((backend, _), deltas)| AdapterWeights::new(&**backend, deltas));
        let weights = weights.collect::<Result<Vec<_>, _>>()?;
        Ok(Adapter::new(digest.finalize().into(), rank, bytes, weights))
    }
}

/// As stored, or f32 where the device lacks that or would make activations narrow for it.
fn format(caps: &Caps, tensor: &HostTensor<'_>) -> WeightFormat {
    let stored = WeightFormat::from(tensor.dtype());
    let exact = caps.weight_formats.contains(&stored) && !caps.narrow_activations.contains(&stored);
    if exact { stored } else { WeightFormat::F32 }
}

/// Opens the matrices. What is saved as a pickle runs code when read, so it never is.
fn open(files: &Files) -> Result<Checkpoint, AdapterError> {
    if let Some(file) = files.open(WEIGHTS)? {
        return Ok(Checkpoint::single(file)?);
    }
    let pickle = files.names()?.into_iter().find(|name| name == "adapter_model.bin");
    let reason = match pickle {
        Some(name) => format!("{name} is a pickle, which runs code when read; save it as safetensors"),
        None => "no such file is there".into(),
    };
    Err(AdapterError::NoWeights { reason })
}

/// A tensor in memory: unlike a checkpoint, an adapter is small, and is read while others are served, whom a file that
/// is being rewritten must not bring down.
struct Tensor<'a> {
    entry: &'a Entry,
    part: Part,
}

impl Tensor<'_> {
    fn host(&self) -> HostTensor<'_> {
        let dtype = self.entry.dtype().expect("verified");
        HostTensor::new(&self.entry.name, dtype, self.entry.shape.clone(), &self.part)
    }
}

/// Reads a tensor, hashes it and checks that it is finite.
fn read<'a>(checkpoint: &'a Checkpoint, name: &str, digest: &mut Sha256) -> Result<Tensor<'a>, CheckpointError> {
    let (entry, part) = checkpoint.read(name)?;
    digest.update(format!("{name}\n{} {:?}\n", entry.stored_type, entry.shape));
    digest.update(&*part);
    let tensor = Tensor { entry, part };
    match precision::first_non_finite(&tensor.host()) {
        None => Ok(tensor),
        Some((element, value)) => Err(CheckpointError::NotFinite { tensor: name.to_owned(), element, value }),
    }
}
