//! An encoder instead of a language model: which checkpoints are one, how they are loaded, and the engine as the service
//! asks it.

use std::{
    borrow::Cow,
    cell::RefCell,
    path::Path,
    sync::Arc,
    time::{Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use baton_encoder::{
    Architecture, Encoder, EncoderHandle, Input, Limits, LoadOptions, Reply, RunError, Share, Source, SubmitError,
    Task, TensorInfo, Worker,
};
use baton_handoff::Digest;
use baton_http::{
    Defaults, EncoderEngine, EncoderFailure, EncoderRefusal, EncoderReply, EncoderSpec, EncoderStats, EncoderTask,
    ModelCard, NewEncoder,
};
use baton_model::{Files, Tensors};
use baton_text::EncoderInput;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tracing::{info, warn};

use crate::{
    load,
    settings::{Dtype, HandoffPolicy, KvCacheDtype, Settings, ToolCallParser},
};

/// Bytes of a config file that are read.
const MAX_CONFIG: u64 = 1 << 20;
/// Tokens that may wait in all requests together: about 32 MiB.
const WAITING_TOKENS: usize = 4 << 20;

/// An encoder whose thread runs until it is dropped.
pub struct Model {
    pub new: NewEncoder,
    pub worker: Worker,
}

/// Whether a checkpoint is an encoder's, by its `config.json`.
pub fn is_encoder(files: &Files) -> Result<bool> {
    Ok(files.read("config.json", MAX_CONFIG)?.is_some_and(|config| Architecture::of(&config).is_some()))
}

/// Loads the encoder of a checkpoint and starts its thread.
pub fn load(name: String, files: &Files, settings: &Settings) -> Result<Model> {
    let start = Instant::now();
    refuse(settings)?;
    let (text, text_files) = load::text(files, settings)?;
    let source = Checkpoint { files, tensors: Tensors::open(files)?, read: RefCell::default() };
    let options = LoadOptions { max_model_len: settings.max_model_len, pooling: settings.pooling_type.map(Into::into) };
    let encoder = Encoder::load(&source, &options)?;
    let spec = encoder.spec().clone();
    ensure!(
        text.vocab_size() <= spec.vocab_size,
        "the tokenizer has ids up to {}, the model's vocabulary ends at {}",
        text.vocab_size() - 1,
        spec.vocab_size
    );
    let mut hash = source.read.into_inner();
    text_files.iter().for_each(|file| part(&mut hash, file));
    let digest = Digest(hash.finalize().into()).to_string();
    let embeds = spec.architecture.task == Task::Embed;
    let seconds = start.elapsed().as_secs_f64();
    info!(
        model = name,
        architecture = spec.architecture.name,
        device = "cpu",
        computes = if embeds { "embeddings" } else { "scores of pairs" },
        pooling = embeds.then(|| spec.pooling.name()),
        normalized = embeds.then_some(spec.normalized),
        context = spec.max_model_len,
        weight_mib = spec.weight_bytes >> 20,
        seconds = format!("{seconds:.2}"),
        "model loaded"
    );
    if embeds && !spec.pooling_stated {
        warn!("the checkpoint states no pooling (modules.json): its mean is taken; --pooling-type takes another");
    }
    let report = json!({
        "architecture": spec.architecture.name, "max_model_len": spec.max_model_len, "width": spec.width,
        "pooling": spec.pooling.name(), "normalized": spec.normalized, "weight_bytes": spec.weight_bytes,
        "digest": digest, "seconds": seconds,
    });
    let report = serde_json::to_vec_pretty(&report)?;
    if let Some(file) = &settings.load_report {
        std::fs::write(file, &report).with_context(|| format!("--load-report {}", file.display()))?;
    }
    let card = ModelCard {
        names: match settings.served_model_name.as_slice() {
            [] => vec![name],
            names => names.to_vec(),
        },
        created: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        owned_by: "baton".into(),
        system_fingerprint: format!("fp_{}", &digest[..12]),
        generation: digest,
        defaults: Defaults::default(),
        load_report: report,
        embeddings: None,
    };
    let limits = Limits { requests: settings.max_queued_requests, tokens: WAITING_TOKENS };
    let (handle, worker) = Worker::start(encoder, limits);
    let spec = EncoderSpec {
        task: if embeds { EncoderTask::Embed } else { EncoderTask::Score },
        width: spec.width,
        normalized: spec.normalized,
        vocab_size: spec.vocab_size,
        max_model_len: spec.max_model_len,
    };
    Ok(Model { new: NewEncoder { engine: Arc::new(Engine(handle)), text: Arc::new(text), card, spec }, worker })
}

/// Settings that an encoder cannot honour are refused, not dropped.
fn refuse(settings: &Settings) -> Result<()> {
    if !["auto", "cpu"].contains(&settings.device.as_str()) {
        bail!("--device {}: encoders run on cpu alone", settings.device);
    }
    let refusals = [
        ("dtype", !matches!(settings.dtype, Dtype::Auto | Dtype::Float32), "they compute in float32"),
        ("quantize", settings.quantize.is_some(), "they compute in float32"),
        ("kv-cache-dtype", settings.kv_cache_dtype != KvCacheDtype::Auto, "they have no KV cache"),
        ("gpu-memory-utilization", settings.gpu_memory_utilization.is_some(), "they run on the CPU"),
        ("kv-cache-memory-bytes", settings.kv_cache_memory_bytes.is_some(), "they have no KV cache"),
        ("speculative-config", settings.speculative_config.is_some(), "they generate nothing"),
        ("enable-lora", settings.enable_lora, "they take no adapters"),
        ("chat-template", settings.chat_template.is_some(), "they read no chats"),
        ("tool-call-parser", settings.tool_call_parser != ToolCallParser::Auto, "they call no tools"),
        ("handoff require", settings.handoff == HandoffPolicy::Require, "there are no bundles of them"),
        ("trusted-keys", !settings.trusted_keys.is_empty(), "there are no bundles of them"),
        ("tensor-parallel-size", settings.tensor_parallel_size != 1, "they compute as one"),
        ("device-timeout", settings.device_timeout.is_some(), "they run on the CPU"),
        ("composed-operators", settings.composed_operators, "they run on the CPU"),
        ("threads", settings.threads != 0, "they compute on all cores, or as many as RAYON_NUM_THREADS says"),
    ];
    let refused = refusals.iter().find(|(_, set, _)| *set);
    refused.map_or(Ok(()), |(flag, _, reason)| bail!("--{flag} is not for encoders: {reason}"))
}

/// A checkpoint's files, and the digest of what was read of them.
struct Checkpoint<'a> {
    files: &'a Files,
    tensors: Tensors,
    read: RefCell<Sha256>,
}

/// Parts are told apart by their lengths.
fn part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

impl Source for Checkpoint<'_> {
    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, String> {
        let content = match (name.split_once('/'), self.files) {
            (None, files) => files.read(name, MAX_CONFIG),
            (Some((folder, name)), Files::Folder(path)) if path.join(folder).is_dir() && plain(folder) => {
                Files::folder(path.join(folder)).and_then(|files| files.read(name, MAX_CONFIG))
            }
            _ => Ok(None),
        };
        let content = content.map_err(|error| error.to_string())?;
        let mut hash = self.read.borrow_mut();
        part(&mut hash, name.as_bytes());
        part(&mut hash, content.as_deref().unwrap_or_default());
        Ok(content)
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        let info = |t: baton_model::StoredAs| TensorInfo {
            name: t.name.to_owned(),
            dtype: t.dtype.to_owned(),
            shape: t.shape.to_vec(),
        };
        self.tensors.iter().map(info).collect()
    }

    fn tensor(&self, name: &str, visit: &mut dyn FnMut(&[u8])) -> Result<(), String> {
        let bytes = self.tensors.read(name).map_err(|error| error.to_string())?.ok_or("there is no such tensor")?;
        let mut hash = self.read.borrow_mut();
        part(&mut hash, name.as_bytes());
        part(&mut hash, &bytes);
        visit(&bytes);
        Ok(())
    }
}

/// Whether it is the name of a folder inside another.
fn plain(folder: &str) -> bool {
    Path::new(folder).file_name().is_some_and(|name| name == folder)
}

/// The encoder as the service asks it.
struct Engine(EncoderHandle);

impl EncoderEngine for Engine {
    fn submit(
        &self,
        inputs: Vec<EncoderInput>,
        share: Share,
        deadline: Option<Instant>,
        reply: EncoderReply,
    ) -> Result<(), EncoderRefusal> {
        let inputs = inputs.into_iter().map(|EncoderInput { ids, type_ids }| Input { ids, type_ids }).collect();
        self.0.submit(inputs, share, deadline, Box::new(Client(reply))).map_err(|error| match error {
            SubmitError::QueueFull => EncoderRefusal::QueueFull,
            SubmitError::Stopped => EncoderRefusal::Stopped,
            SubmitError::Empty { index } => EncoderRefusal::Empty { index },
            SubmitError::TooLong { index, tokens, .. } => EncoderRefusal::TooLong { index, tokens },
            SubmitError::TokenOutOfRange { index, .. } => EncoderRefusal::TokenOutOfRange { index },
        })
    }

    fn stats(&self) -> EncoderStats {
        let baton_encoder::EncoderStats { requests, waiting_tokens, inputs, tokens, batches, failed, alive } =
            self.0.stats();
        EncoderStats { requests, waiting_tokens, inputs, tokens, batches, failed, alive }
    }
}

struct Client(EncoderReply);

impl Reply for Client {
    fn wanted(&self) -> bool {
        self.0.wanted()
    }

    fn send(self: Box<Self>, result: Result<Vec<Vec<f32>>, RunError>) {
        self.0.send(result.map_err(|error| match error {
            RunError::Expired => EncoderFailure::Expired,
            RunError::NonFinite => EncoderFailure::NonFinite,
            RunError::Failed => EncoderFailure::Failed,
            RunError::Stopped => EncoderFailure::Stopped,
        }));
    }
}
