//! From a checkpoint's files to a runner: read, refuse with every reason, size the cache, load.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use baton_device::{
    Backend, BlockFormat, Caps, CompressedOps, DType, DeviceError, KvBlocks, KvDtype, KvSpec, LatentOps, Requirements,
    WeightFormat,
};
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::arch::{self, AdapterScratch, Model, Sizes};
use crate::checkpoint::{Checkpoint, CheckpointError, FileError, Files, Role, TensorSpec};
use crate::config::{Architecture, ConfigError, GenerationConfig, ModelConfig, QuantizationConfig};
use crate::cost::StepCost;
use crate::gguf::{self, Opened};
use crate::loader::{self, Formats, Loader, Slot};
use crate::precision::{Conversion, Quantization, as_text};
use crate::rehearsal::rehearse;
use crate::room::{self, Room};
use crate::runner::{AdapterSupport, ModelRunner};
use crate::split;
use crate::step::RunSpec;

/// Bytes of `config.json` or `generation_config.json` that are read.
pub(crate) const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// How a model shall be loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// Float type of the weights; `None` for as stored.
    pub dtype: Option<DType>,
    /// Form of the linear layers; `None` for no quantisation. Those whose rows are not whole blocks of it have what
    /// [`BlockFormat::made_for`] says. Embeddings (and a head tied to them), norms, routers and latent up-projections stay
    /// floats.
    pub quantization: Option<Quantization>,
    /// Longest context in tokens; `None` for the model's own.
    pub max_model_len: Option<usize>,
    /// Tokens of one step, at most.
    pub max_step_tokens: usize,
    /// Sequences of one step, at most.
    pub max_step_sequences: usize,
    /// Drafts of one sequence in a step, at most; 0 if there are to be none.
    pub max_draft_tokens: usize,
    /// Load the layer that predicts a further token, for drafts; refused where there is none.
    pub mtp: bool,
    /// Memory for the cache, of each rank.
    pub kv_cache: KvCacheSize,
    /// How the cache keeps its elements; `None` for the widest that the device has.
    pub kv_dtype: Option<KvDtype>,
    /// Largest rank of adapters; 0 if there are to be none.
    pub max_lora_rank: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            quantization: None,
            max_model_len: None,
            max_step_tokens: 2048,
            max_step_sequences: 64,
            max_draft_tokens: 0,
            mtp: false,
            kv_cache: KvCacheSize::AtMost(u64::MAX),
            kv_dtype: None,
            max_lora_rank: 0,
        }
    }
}

/// How much memory the cache takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvCacheSize {
    /// Enough for `max_step_sequences` contexts of `max_model_len`, but no more bytes than this.
    AtMost(u64),
    /// As many whole blocks as these bytes hold.
    Bytes(u64),
    /// As `AtMost`, of what is left of this share of the device's own memory beside all that is in use of it when the weights
    /// are there and steps were rehearsed. The device must have its own ([`Backend::memory`]).
    Share(f64),
}

/// What was loaded, and how.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoadReport {
    /// Which model.
    #[serde(serialize_with = "architecture_name")]
    pub architecture: Architecture,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Stored element type of the embedding, which stands for the checkpoint's.
    #[serde(serialize_with = "as_text")]
    pub stored_dtype: DType,
    /// How the checkpoint is quantised, if it is.
    pub quantization: Option<QuantizationConfig>,
    /// Formats in which matrices are kept.
    #[serde(serialize_with = "as_texts")]
    pub weight_formats: BTreeSet<WeightFormat>,
    /// The checkpoint's defaults for sampling.
    pub generation_config: GenerationConfig,
    /// SHA-256, in hex, over `config.json` and each tensor's name, type, shape and bytes in the order
    /// of the model, however they are split into files. Of checkpoints of 256 MiB and more only the
    /// first 4 KiB of each tensor are covered: it tells models apart, it does not prove integrity.
    pub digest: String,
    /// Every tensor that was stored quantised, and every other that is kept in another format than the stored
    /// one, unless that is f32.
    pub conversions: Vec<Conversion>,
    /// Bytes of weights as kept, counted once if several ranks have the same.
    pub weight_bytes: u64,
    /// How the cache keeps its elements.
    #[serde(serialize_with = "as_text")]
    pub kv_dtype: KvDtype,
    /// Bytes of the cache, of kept and passing blocks, on all ranks together.
    pub kv_bytes: u64,
    /// Those of passing blocks.
    #[serde(skip)]
    pub passing_bytes: u64,
    /// What its steps cost.
    #[serde(skip)]
    pub step_cost: StepCost,
    /// Time that loading took.
    pub seconds: f64,
}

impl LoadReport {
    /// Adds what another rank measured and took.
    pub(crate) fn add_rank(&mut self, other: &Self) {
        self.kv_bytes += other.kv_bytes;
        self.passing_bytes += other.passing_bytes;
        self.seconds = self.seconds.max(other.seconds);
        // In the same order, for the first rank sees every tensor.
        let mut own = self.conversions.iter_mut();
        for found in &other.conversions {
            own.find(|own| own.tensor == found.tensor).expect("the first rank sees every tensor").merge(found);
        }
    }
}

fn architecture_name<S: Serializer>(architecture: &Architecture, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(architecture.name())
}

fn as_texts<S: Serializer>(formats: &BTreeSet<WeightFormat>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(formats.iter().map(ToString::to_string))
}

/// Why a model was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A config file is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights are refused, or a file cannot be had.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device or the options do not suit the model.
    #[error("this model cannot run as asked: {}", reasons.join("; "))]
    Unsupported {
        /// Every reason.
        reasons: Vec<String>,
    },
    /// The cache would not hold a single sequence.
    #[error(
        "one sequence of {max_model_len} tokens takes {needed_blocks} cache blocks of {block_size} tokens, \
         {block_bytes} bytes each ({} bytes){}; the cache has {bytes} bytes, which is {blocks} blocks: \
         allow more memory or {}", needed_blocks * block_bytes, beside(*passing_bytes, *max_step_sequences),
        if *passing_bytes > 0 { "a shorter context, or fewer sequences in a step" } else { "a shorter context" }
    )]
    CacheTooSmall {
        /// Tokens of a sequence.
        max_model_len: usize,
        /// Blocks that takes.
        needed_blocks: u64,
        /// Tokens of a block.
        block_size: usize,
        /// Bytes of a block over all layers.
        block_bytes: u64,
        /// Bytes of what is kept of the last tokens of sequences only.
        passing_bytes: u64,
        /// For so many sequences in a step.
        max_step_sequences: usize,
        /// Bytes allowed.
        bytes: u64,
        /// Blocks that gives.
        blocks: u64,
    },
    /// The model does not fit into its share of the device's memory.
    #[error(
        "a share of {share} of the device's {total} bytes is {} bytes; {used} are in use {when}: {reason}",
        (*total as f64 * share) as u64
    )]
    NoRoom {
        /// What was allowed, of 1.
        share: f64,
        /// Bytes of the device.
        total: u64,
        /// Bytes that are in use.
        used: u64,
        /// At which point of loading.
        when: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(DeviceError),
}

impl From<DeviceError> for LoadError {
    /// What a device could not read is the checkpoint's fault.
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Source(source) => match source.downcast() {
                Ok(error) => LoadError::Checkpoint(*error),
                Err(source) => LoadError::Device(DeviceError::Source(source)),
            },
            error => LoadError::Device(error),
        }
    }
}

impl From<FileError> for LoadError {
    fn from(error: FileError) -> Self {
        LoadError::Checkpoint(error.into())
    }
}

/// What a cache holds beside the blocks of whole contexts.
fn beside(passing_bytes: u64, sequences: usize) -> String {
    match passing_bytes {
        0 => String::new(),
        _ => format!(", beside {passing_bytes} bytes for the last tokens of up to {sequences} sequences in a step"),
    }
}

/// Loads a checkpoint onto a device.
///
/// # Panics
/// If `backend` is one of several ranks: [`load_ranks`](crate::load_ranks) takes them all.
pub fn load<B: Backend + LatentOps + CompressedOps>(
    backend: B,
    files: &Files,
    options: &LoadOptions,
) -> Result<(ModelRunner<B>, LoadReport), LoadError> {
    assert_eq!(backend.world().size, 1, "a model on several ranks is loaded onto all of them");
    let prepared = prepare(backend, files, options)?;
    let num_blocks = prepared.num_blocks;
    prepared.finish(num_blocks)
}

/// A model on a device, all but its cache.
pub(crate) struct Prepared<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    adapters: AdapterSupport<B>,
    kv: KvSpec,
    spec: RunSpec,
    /// Blocks for which there is room.
    pub(crate) num_blocks: usize,
    report: LoadReport,
    start: Instant,
}

impl<B: Backend> Prepared<B> {
    /// Makes the cache, of no more than [`Prepared::num_blocks`] blocks.
    pub(crate) fn finish(self, num_blocks: usize) -> Result<(ModelRunner<B>, LoadReport), LoadError> {
        let Self { backend, model, adapters, kv, spec, report, start, .. } = self;
        let nobodys = nobodys_blocks(backend.caps());
        let passing = spec.passing.map(|passing| passing.num_blocks);
        let blocks = KvBlocks { kept: num_blocks + nobodys, passing: passing.map_or(0, |blocks| blocks + nobodys) };
        let cache = backend.kv_cache(&kv, blocks)?;
        // Whoever loads it again with so many bytes gets as many blocks: nobody's is beside them each time.
        let bytes = |blocks: usize, each: usize| blocks as u64 * each as u64;
        let passing_bytes = bytes(passing.unwrap_or(0), kv.passing_bytes());
        let kv_bytes = bytes(num_blocks, kv.kept_bytes()) + passing_bytes;
        let report = LoadReport { kv_bytes, passing_bytes, seconds: start.elapsed().as_secs_f64(), ..report };
        let spec = RunSpec { block_size: kv.block_size, num_blocks, ..spec };
        Ok((ModelRunner::new(backend, model, cache, spec, adapters), report))
    }
}

/// Blocks of a cache that belong to no sequence: rows that pad a step write there.
pub(crate) fn nobodys_blocks(caps: &Caps) -> usize {
    usize::from(caps.replays_steps)
}

/// Loads what one rank has of a checkpoint, and finds out how large its cache may be. The first rank's report is that of the
/// whole model, but for what is measured and taken on the others.
pub(crate) fn prepare<B: Backend + LatentOps + CompressedOps>(
    backend: B,
    files: &Files,
    options: &LoadOptions,
) -> Result<Prepared<B>, LoadError> {
    let start = Instant::now();
    let Opened { config, generation_config, digest, checkpoint } = match files {
        Files::Gguf(path) => gguf::open(files, path)?,
        _ => open(files)?,
    };
    let config = if options.mtp { config } else { config.without_mtp() };
    let spec = run_spec(&config, options)?;
    let specs = arch::specs(&config, |name| checkpoint.stored_type(name)).0;
    checkpoint.verify(&specs, |name| arch::is_ignorable(&config, name))?;
    let formats = Formats { dtype: options.dtype, quantized: options.quantization };
    let formats = formats.resolve(&specs, &checkpoint, backend.caps());
    if let Some(format) = options.quantization {
        log_fallbacks(format.format(), specs.values());
    }
    let kv_dtype = options.kv_dtype.unwrap_or_else(|| backend.caps().widest_kv_dtype());
    let kv_dtypes = [kv_dtype].into();
    let weight_formats = check_device(&backend, &config, specs.values(), &formats, kv_dtypes)?;

    let stored_dtype = checkpoint.dtype(arch::embedding_weight(&config));
    if let Some(stated) = config.dtype.filter(|stated| *stated != stored_dtype) {
        tracing::warn!(%stated, stored = %stored_dtype, "config.json states another dtype than the weights have; theirs counts");
    }
    let kv = arch::kv_spec(&config, backend.world(), kv_dtype, backend.caps().kv_block_size);
    let spec = RunSpec { passing: room::passing(&kv, &spec), ..spec };
    // What cannot fit is refused before weights are read; how much of a share is left is known when they are there.
    let kept = |s: &TensorSpec| {
        let elements = s.shape.iter().product();
        // Tables are kept as u32.
        formats.get(&s.name).map_or(4 * elements as u64, |f| loader::kept(*f, elements, checkpoint.bytes(s)))
    };
    // Sharing out makes no rank's part smaller than this.
    let weights = specs.values().map(kept).sum::<u64>() / backend.world().size as u64;
    let room = Room::new(&backend, options.kv_cache, &kv, &spec, weights)?;

    let sizes = Sizes { rows: spec.max_step_tokens, logit_rows: spec.logit_rows(), positions: spec.max_model_len };
    let mut loader = Loader::new(&backend, &checkpoint, (&specs, &formats), options.quantization, digest);
    let mut model = arch::build(&config, sizes, &mut loader)?;
    let slots: Arc<[Slot]> = std::mem::take(&mut loader.slots).into();
    let max_rank = options.max_lora_rank;
    let mut scratch = AdapterScratch::new(&backend, if max_rank > 0 { &slots } else { &[] })?;
    // Ranks take a step after the other, and a layer that looks ahead awaits what was sampled.
    let steps_ahead = backend.caps().runs_ahead && !model.looks_ahead();
    let spec = RunSpec { steps_ahead, ..spec };
    let report = LoadReport {
        architecture: config.architecture,
        hidden_size: config.hidden_size,
        stored_dtype,
        quantization: config.quantization.clone(),
        weight_formats,
        generation_config,
        conversions: std::mem::take(&mut loader.conversions),
        weight_bytes: loader.weight_bytes,
        kv_dtype: kv.dtype,
        kv_bytes: 0,
        passing_bytes: 0,
        digest: loader.digest(),
        step_cost: StepCost::new(&config, specs.values(), kept),
        seconds: 0.0,
    };
    let steps = rehearse(&backend, &mut *model, &mut scratch, &kv, &spec)?;
    let num_blocks = room.blocks(&backend, &kv, &spec, steps)?;
    let adapters = AdapterSupport { slots, max_rank, scratch };
    Ok(Prepared { backend, model, adapters, kv, spec, num_blocks, report, start })
}

/// The float type in which a checkpoint's matrices are, or in which those that are quantised would be kept: its
/// embedding's, else bf16. Reads no weights.
///
/// # Errors
/// As [`load`], of configs and headers.
pub fn stored_dtype(files: &Files) -> Result<DType, LoadError> {
    let opened = match files {
        Files::Gguf(path) => gguf::open(files, path)?,
        _ => open(files)?,
    };
    let name = arch::embedding_weight(&opened.config);
    let embedding = opened.checkpoint.entries().find(|entry| entry.name == name);
    Ok(match embedding.and_then(|entry| entry.dtype()) {
        None | Some(DType::Ggml(_)) => DType::BF16,
        Some(float) => float,
    })
}

/// Opens a checkpoint of safetensors.
pub(crate) fn open(files: &Files) -> Result<Opened, LoadError> {
    let json = files
        .read("config.json", MAX_CONFIG_BYTES)?
        .ok_or_else(|| FileError::Missing { name: "config.json".into() })?;
    let config = ModelConfig::parse(&json)?;
    let generation = files.read("generation_config.json", MAX_CONFIG_BYTES)?;
    let generation_config = GenerationConfig::parse(generation.as_deref(), &config)?;
    let checkpoint = Checkpoint::open(files)?;
    // Copies of a model often come without the layer that its config still names.
    let has_mtp = arch::has_mtp(&config, checkpoint.entries().map(|entry| entry.name.as_str()));
    let config = if has_mtp { config } else { config.without_mtp() };
    Ok(Opened { config, generation_config, digest: Sha256::new_with_prefix(&json), checkpoint })
}

/// The limits of the runner, without the cache's.
fn run_spec(config: &ModelConfig, options: &LoadOptions) -> Result<RunSpec, LoadError> {
    let mut reasons = Vec::new();
    let limit = config.max_position_embeddings;
    let max_model_len = options.max_model_len.unwrap_or(limit);
    if max_model_len == 0 || max_model_len > limit {
        reasons.push(format!("a context of {max_model_len} tokens; this model takes 1 to {limit}"));
    }
    if options.max_step_tokens == 0 || options.max_step_sequences == 0 {
        reasons.push("a step must have room for at least one token of one sequence".into());
    }
    if options.max_step_tokens < options.max_step_sequences {
        reasons.push(format!(
            "{} tokens per step for {} sequences: each needs at least one",
            options.max_step_tokens, options.max_step_sequences
        ));
    }
    if options.mtp && config.mtp_layers == 0 {
        reasons.push("the checkpoint has no layer for multi-token prediction, from which drafts were to come".into());
    }
    if options.max_draft_tokens > 0 && !arch::takes_drafts(config) {
        let name = config.architecture.name();
        reasons.push(format!("{name} takes no drafts: what its layers pool of a token cannot be taken back"));
    }
    if !reasons.is_empty() {
        return Err(LoadError::Unsupported { reasons });
    }
    Ok(RunSpec {
        vocab_size: config.vocab_size,
        max_model_len,
        block_size: 0,
        num_blocks: 0,
        // Known with the device's blocks.
        passing: None,
        max_step_tokens: options.max_step_tokens,
        max_step_sequences: options.max_step_sequences,
        max_draft_tokens: options.max_draft_tokens,
        // Known with the model.
        steps_ahead: false,
    })
}

/// Says which tensors get another format than the one asked for.
pub(crate) fn log_fallbacks<'a>(asked: BlockFormat, specs: impl Iterator<Item = &'a TensorSpec>) {
    let made = |s: &TensorSpec| asked.made_for(s.matrix()[1]);
    let others: Vec<_> = specs.filter(|s| s.role == Role::Linear && made(s) != asked).collect();
    if let Some(first) = others.first() {
        let (columns, tensor) = (first.matrix()[1], &first.name);
        tracing::warn!(%asked, made = %made(first), tensors = others.len(), tensor, columns,
            "rows that are not whole blocks of the format asked for are kept in a wider one");
    }
}

/// Those of `formats` in which matrices are kept, if the device has all that the model needs in them.
pub(crate) fn check_device<'a, B: Backend>(
    backend: &B,
    config: &ModelConfig,
    specs: impl Iterator<Item = &'a TensorSpec>,
    formats: &BTreeMap<String, WeightFormat>,
    kv_dtypes: BTreeSet<KvDtype>,
) -> Result<BTreeSet<WeightFormat>, LoadError> {
    let caps = backend.caps();
    let mut weight_formats = BTreeSet::new();
    let (mut blocks, mut odd) = (Vec::new(), Vec::new());
    for spec in specs.filter(|s| s.role.has_format()) {
        let format = formats[&spec.name];
        if let WeightFormat::Ggml(block) = format {
            blocks.push((spec, block.elements()));
            if !spec.shape[1].is_multiple_of(block.elements()) {
                odd.push((spec, block));
            }
        }
        weight_formats.insert(format);
    }
    let needs = Requirements { ops: arch::ops(config).into_iter().collect(), weight_formats, kv_dtypes };
    let mut reasons = caps.refusals(&needs);
    if let Some((first, block)) = odd.first() {
        reasons.push(format!(
            "{} tensors cannot be kept as {block}, whose blocks are {} columns: {} has {}",
            odd.len(),
            block.elements(),
            first.name,
            first.shape[1]
        ));
    }
    reasons.extend(split::refusals(config, &blocks, backend.world().size));
    if reasons.is_empty() { Ok(needs.weight_formats) } else { Err(LoadError::Unsupported { reasons }) }
}
