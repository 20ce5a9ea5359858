//! From settings to a model in service: files, device, weights, tokenizer, fingerprint.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use baton_handoff::Digest;
use baton_hub::Target;
use baton_model::{Adapter, Conversion, Files, GgufTokenizer, KvCacheSize, LoadOptions};
use baton_text::{GgufVocab, TextFiles, TextModel, TokenizerFile};
use sha2::{Digest as _, Sha256};
use tracing::info;

use crate::{
    backend::{Device, DeviceOptions, Loaded},
    bundled, encoder,
    handoff::{Handed, precision},
    pull,
    reload::Source,
    settings::{LoraModule, Settings},
    speculative::SpeculativeConfig,
};

/// Bytes of a tokenizer file or template that are read.
const MAX_TEXT_FILE: u64 = 64 << 20;

/// All of a model.
pub struct Model {
    pub name: String,
    pub text: TextModel,
    pub loaded: Loaded,
    /// What `loaded` can be loaded from again.
    pub source: Source,
    /// By the names that the settings give them, with their folders.
    pub adapters: Vec<(String, PathBuf, Adapter)>,
    /// The report of `loaded` as JSON.
    pub report: Vec<u8>,
    /// Its bundle, as far as that can be judged without computing.
    pub handed: Handed,
    /// What is served: the bundle's generation, else a digest of weights, config, tokenizer and template.
    pub generation: Digest,
    pub fingerprint: String,
}

/// What a checkpoint turns out to be.
pub enum Kind {
    Model(Box<Model>),
    Encoder(Box<encoder::Model>),
}

/// Loads what the settings name, be it a language model or an encoder.
pub fn any(settings: &Settings, free: Option<u64>) -> Result<Kind> {
    let (name, files) = files(settings.model.as_deref())?;
    if encoder::is_encoder(&files)? {
        let context = format!("model {name}");
        return Ok(Kind::Encoder(Box::new(encoder::load(name, &files, settings).context(context)?)));
    }
    Ok(Kind::Model(Box::new(load_files(name, &files, settings, free, &|_| Ok(()))?)))
}

/// Loads the language model that the settings name, if its digest is accepted. Of the `free` bytes of memory a cache whose
/// size is not set takes a quarter.
pub fn load(settings: &Settings, free: Option<u64>, accept: &dyn Fn(&Digest) -> Result<()>) -> Result<Model> {
    let (name, files) = files(settings.model.as_deref())?;
    load_files(name, &files, settings, free, accept)
}

fn load_files(
    name: String,
    files: &Files,
    settings: &Settings,
    free: Option<u64>,
    accept: &dyn Fn(&Digest) -> Result<()>,
) -> Result<Model> {
    let context = || format!("model {name}");
    let handed = Handed::open(files, settings).with_context(context)?;
    // A bundle says what it is before its weights are loaded.
    handed.generation().iter().try_for_each(accept)?;
    let Parts { text, text_files, loaded, source } = parts(files, settings, free).with_context(context)?;
    handed.loaded(&loaded.caps, settings.handoff).with_context(context)?;
    let generation = handed.generation().unwrap_or_else(|| generation(&loaded, &text_files));
    accept(&generation)?;
    let fingerprint = fingerprint(&loaded, &text_files, &generation);
    announce(&name, settings, &loaded);
    let report = serde_json::to_vec_pretty(&loaded.report)?;
    if let Some(file) = &settings.load_report {
        fs::write(file, &report).with_context(|| format!("--load-report {}", file.display()))?;
    }
    let adapters = adapters(settings, &loaded)?;
    Ok(Model { name, text, loaded, source, adapters, report, handed, generation, fingerprint })
}

/// What a checkpoint consists of once it is loaded.
pub struct Parts {
    pub text: TextModel,
    /// What the text model was made of.
    pub text_files: Vec<Vec<u8>>,
    pub loaded: Loaded,
    /// What `loaded` can be loaded from again.
    pub source: Source,
}

/// Loads tokenizer, template and weights.
pub fn parts(files: &Files, settings: &Settings, free: Option<u64>) -> Result<Parts> {
    let (text, text_files) = text(files, settings)?;
    let text = settings.tool_call_parser.applied(text)?;
    let device = Device::parse(&settings.device)?;
    let device_options = DeviceOptions {
        ranks: settings.tensor_parallel_size,
        threads: settings.threads,
        timeout: device.timeout(settings.device_timeout),
        composed: settings.composed_operators,
        kernels: settings.state_dir.as_deref().map(kernels),
    };
    ensure!(
        !device_options.composed || matches!(device, Device::Ascend(_)),
        "--composed-operators is of ascend; other devices have one form of each operation"
    );
    let kv_cache = device.cache_size(settings, free)?;
    let options = options(settings, kv_cache);
    let loaded = device.load(device_options.clone(), files, &options)?;
    let vocab = loaded.runner.spec().vocab_size;
    ensure!(
        text.vocab_size() <= vocab,
        "the tokenizer has ids up to {}, the model's vocabulary ends at {vocab}",
        text.vocab_size() - 1
    );
    let source = Source::new(device, device_options, files, options, &loaded.report);
    Ok(Parts { text, text_files, loaded, source })
}

/// Where a state folder has the kernels that were compiled for a device.
pub fn kernels(state_dir: &Path) -> PathBuf {
    state_dir.join("kernels")
}

/// The adapters that the settings name.
fn adapters(settings: &Settings, loaded: &Loaded) -> Result<Vec<(String, PathBuf, Adapter)>> {
    let Some(load) = &loaded.load_adapter else { return Ok(Vec::new()) };
    let adapter = |LoraModule { name, path, .. }: &LoraModule| {
        let context = || format!("--lora-modules {name}={}", path.display());
        let adapter = load(path).with_context(context)?;
        info!(name, rank = adapter.rank(), mib = adapter.bytes() >> 20, "adapter loaded");
        Ok((name.clone(), path.clone(), adapter))
    };
    settings.lora_modules.iter().map(adapter).collect()
}

/// The checkpoint's files, and the name it goes by: a folder or GGUF file that exists, else a hub's id or a URL.
pub fn files(model: Option<&str>) -> Result<(String, Files)> {
    let path = match model {
        None => match bundled::folder() {
            None => return Ok((bundled::NAME.to_owned(), Files::Embedded(bundled::FILES))),
            Some(folder) => folder,
        },
        Some(model) if Path::new(model).exists() => PathBuf::from(model),
        Some(model) => return fetched(model),
    };
    let full = fs::canonicalize(&path).with_context(|| format!("model {}", path.display()))?;
    let files = Files::at(path)?;
    let name = match &files {
        Files::Gguf(file) => file.file_stem(), // not that of a blob in a cache that the path links to
        _ => full.file_name(),
    };
    let name = name.map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    Ok((name, files))
}

/// The text model, and the bytes that it depends on, for the fingerprint.
pub fn text(files: &Files, settings: &Settings) -> Result<(TextModel, Vec<Vec<u8>>)> {
    let Some(facts) = GgufTokenizer::read(files)? else {
        let files = OwnedTextFiles::read(files, settings)?;
        return Ok((files.parse()?, files.all().map(<[u8]>::to_vec).collect()));
    };
    let mut vocab = GgufVocab {
        model: facts.model,
        pre: facts.pre,
        tokens: facts.tokens,
        scores: facts.scores,
        token_types: facts.token_types,
        merges: facts.merges,
        bos: facts.bos,
        eos: facts.eos,
        add_bos: facts.add_bos,
        add_eos: facts.add_eos,
        add_space_prefix: facts.add_space_prefix,
        chat_template: facts.chat_template,
    };
    if let Some(template) = chat_template_file(settings)? {
        vocab.chat_template = Some(String::from_utf8(template).context("--chat-template is not UTF-8")?);
    }
    let bytes = format!("{vocab:?}").into_bytes();
    Ok((TextModel::from_gguf(&vocab)?, vec![bytes]))
}

/// The template that the operator gives.
fn chat_template_file(settings: &Settings) -> Result<Option<Vec<u8>>> {
    let read = |file: &PathBuf| fs::read(file).with_context(|| format!("--chat-template {}", file.display()));
    settings.chat_template.as_ref().map(read).transpose()
}

fn fetched(model: &str) -> Result<(String, Files)> {
    let context = || format!("model {model}: there is no such folder; taken as an id or URL");
    let target: Target = model.parse().with_context(context)?;
    let folder = pull::options().and_then(|options| pull::fetch(&target, &options)).with_context(context)?.folder;
    let name = match target {
        Target::Model { id, .. } => id,
        Target::Directory { url } => url.trim_end_matches('/').rsplit('/').next().unwrap_or("model").to_owned(),
    };
    Ok((name, Files::folder(folder)?))
}

fn options(settings: &Settings, kv_cache: KvCacheSize) -> LoadOptions {
    LoadOptions {
        dtype: settings.dtype.stored(),
        quantization: settings.quantize.map(Into::into),
        max_model_len: settings.max_model_len,
        max_step_tokens: settings.max_num_batched_tokens,
        max_step_sequences: settings.max_num_seqs,
        max_draft_tokens: settings.speculative_config.as_ref().map_or(0, SpeculativeConfig::max_draft_tokens),
        mtp: settings.speculative_config.as_ref().is_some_and(SpeculativeConfig::uses_mtp),
        max_lora_rank: if settings.enable_lora { settings.max_lora_rank } else { 0 },
        kv_cache,
        kv_dtype: settings.kv_cache_dtype.dtype(),
    }
}

/// The files that concern text, in memory.
struct OwnedTextFiles {
    tokenizer_name: String,
    tokenizer: Vec<u8>,
    tokenizer_config: Option<Vec<u8>>,
    special_tokens_map: Option<Vec<u8>>,
    chat_template: Option<Vec<u8>>,
}

impl OwnedTextFiles {
    fn read(files: &Files, settings: &Settings) -> Result<Self> {
        let read = |name: &str| anyhow::Ok(files.read(name, MAX_TEXT_FILE)?.map(|bytes| bytes.into_owned()));
        let names = files.names()?;
        let name = TokenizerFile::choose(&names)
            .with_context(|| format!("there is no tokenizer: {} is read", TokenizerFile::NAMES))?;
        let chat_template = match chat_template_file(settings)? {
            Some(template) => Some(template),
            None => read("chat_template.jinja")?,
        };
        Ok(Self {
            tokenizer_name: name.to_owned(),
            tokenizer: read(name)?.with_context(|| format!("{name} is missing"))?,
            tokenizer_config: read("tokenizer_config.json")?,
            special_tokens_map: read("special_tokens_map.json")?,
            chat_template,
        })
    }

    fn parse(&self) -> Result<TextModel> {
        Ok(TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::new(&self.tokenizer_name, &self.tokenizer),
            tokenizer_config: self.tokenizer_config.as_deref(),
            special_tokens_map: self.special_tokens_map.as_deref(),
            chat_template_jinja: self.chat_template.as_deref(),
        })?)
    }

    fn all(&self) -> impl Iterator<Item = &[u8]> {
        let optional = [&self.tokenizer_config, &self.special_tokens_map, &self.chat_template];
        std::iter::once(self.tokenizer.as_slice()).chain(optional.map(|f| f.as_deref().unwrap_or_default()))
    }
}

/// The generation of a model without a bundle.
fn generation(loaded: &Loaded, text: &[Vec<u8>]) -> Digest {
    digest(std::iter::once(loaded.report.digest.as_bytes()).chain(text.iter().map(Vec::as_slice)))
}

/// Changes when something does that can change a token: weights and config (as far as the load report's
/// digest covers them), tokenizer and template, device, ranks and instruction set, formats, the build.
fn fingerprint(loaded: &Loaded, text: &[Vec<u8>], generation: &Digest) -> String {
    let (report, caps) = (&loaded.report, &loaded.caps);
    let formats: Vec<String> = report.weight_formats.iter().map(ToString::to_string).collect();
    let (kv, ranks) = (report.kv_dtype.to_string(), loaded.ranks.to_string());
    let words = [&report.digest, &caps.device, &caps.isa, &ranks, &kv, env!("CARGO_PKG_VERSION")].map(str::as_bytes);
    let parts = std::iter::once(generation.0.as_slice()).chain(words).chain(text.iter().map(Vec::as_slice));
    let digest = digest(parts.chain(formats.iter().map(String::as_bytes)));
    digest.0[..6].iter().fold("fp_".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// Of parts, told apart by their lengths.
fn digest<'a>(parts: impl Iterator<Item = &'a [u8]>) -> Digest {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    Digest(hash.finalize().into())
}

fn announce(name: &str, settings: &Settings, loaded: &Loaded) {
    let (caps, report, spec) = (&loaded.caps, &loaded.report, loaded.runner.spec());
    let device = match settings.device.as_str() {
        "auto" => format!("{} (auto)", caps.device),
        _ => caps.device.clone(),
    };
    let formats: Vec<String> = report.weight_formats.iter().map(ToString::to_string).collect();
    info!(
        model = name,
        architecture = ?report.architecture,
        device,
        isa = caps.isa,
        ranks = loaded.ranks,
        threads = caps.threads,
        stored = %report.stored_dtype,
        weights = formats.join("+"),
        activations = precision::activations(report, caps),
        kv = %report.kv_dtype,
        weight_mib = report.weight_bytes >> 20,
        kv_mib = report.kv_bytes >> 20,
        kv_blocks = spec.num_blocks,
        block_tokens = spec.block_size,
        context = spec.max_model_len,
        seconds = format!("{:.2}", report.seconds),
        "model loaded"
    );
    loaded.forms.iter().for_each(|form| info!("{form}"));
    if let Some(worst) = report.conversions.iter().max_by(|a, b| a.max_abs_error.total_cmp(&b.max_abs_error)) {
        let bytes = |of: fn(&Conversion) -> u64| report.conversions.iter().map(of).sum::<u64>() >> 20;
        info!(
            tensors = report.conversions.len(),
            mib_before = bytes(|c| c.bytes_before),
            mib_after = bytes(|c| c.bytes_after),
            largest_error = worst.max_abs_error,
            tensor = worst.tensor,
            from = worst.from,
            to = %worst.to,
            "weights converted at load"
        );
    }
}
