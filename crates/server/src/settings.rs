//! Settings of `baton serve`: one entry each, with name, help and default together.
//!
//! One precedence: default < config file < environment < flag. The file is TOML with the flags' long
//! names as keys; an unknown key is an error. `--print-config` shows each value and where it is from.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_otlp::Endpoint;
use clap::{ArgMatches, Args, FromArgMatches, parser::ValueSource};
use serde::{Deserialize, Serialize};

use crate::{backend::Device, speculative::SpeculativeConfig};

#[cfg(test)]
mod tests;
mod values;

pub use values::*;

fn seconds_if_any<S: serde::Serializer>(value: &Option<Duration>, s: S) -> std::result::Result<S::Ok, S::Error> {
    value.map(|value| value.as_secs()).serialize(s)
}

fn seconds<S: serde::Serializer>(value: &Duration, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.serialize_u64(value.as_secs())
}

/// What the command line, the environment and the file can say; `None` where they say nothing.
#[derive(Debug, Default, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ServeArgs {
    /// Checkpoint folder in Hugging Face layout or .gguf file, else an id as for `baton pull` [default: the bundled model]
    #[arg(value_name = "MODEL", env = "BATON_MODEL")]
    pub model: Option<String>,

    /// Read settings from this TOML file; its keys are the long names of these flags
    #[arg(long, value_name = "FILE", env = "BATON_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Print the resulting settings and where each is from, and exit
    #[arg(long)]
    #[serde(skip)]
    pub print_config: bool,

    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, env = "BATON_HOST", help_heading = "Service")]
    pub host: Option<String>,

    /// Port to listen on; 0 takes a free one [default: 8000]
    #[arg(long, env = "BATON_PORT", help_heading = "Service")]
    pub port: Option<u16>,

    /// Name(s) under which the model is served; replies carry the first [default: the folder's name]
    #[arg(long, value_name = "NAME", num_args = 1.., env = "BATON_SERVED_MODEL_NAME", value_delimiter = ',', help_heading = "Service")]
    pub served_model_name: Option<Vec<String>>,

    /// Key(s) that clients must send as bearer token; without any, every client is served
    #[arg(long, value_name = "KEY", num_args = 1.., env = "BATON_API_KEY", hide_env_values = true, value_delimiter = ',', help_heading = "Service")]
    pub api_key: Option<Vec<Secret>>,

    /// Key(s) for the admin routes: adapters, load reports, generations and their rollout; without any, these are closed
    #[arg(long, value_name = "KEY", num_args = 1.., env = "BATON_ADMIN_API_KEY", hide_env_values = true, value_delimiter = ',', help_heading = "Service")]
    pub admin_api_key: Option<Vec<Secret>>,

    /// File of keys by their SHA-256 digests, each with a name, scopes (inference, admin, metrics) and perhaps a moment of expiry; read again when it changes and at SIGHUP [default: none]
    #[arg(long, value_name = "FILE", env = "BATON_API_KEYS_FILE", help_heading = "Service")]
    pub api_keys_file: Option<PathBuf>,

    /// Listen where other machines can connect though no client needs a key or a certificate
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, env = "BATON_ALLOW_UNAUTHENTICATED", help_heading = "Service")]
    pub allow_unauthenticated: Option<bool>,

    /// Connections at once; more are closed [default: 16384, or what the limit of descriptors leaves]
    #[arg(long, value_name = "N", env = "BATON_MAX_CONNECTIONS", help_heading = "Service")]
    pub max_connections: Option<usize>,

    /// Address of a listener for the admin routes alone; needs --admin-port [default: 127.0.0.1]
    #[arg(long, env = "BATON_ADMIN_HOST", help_heading = "Service")]
    pub admin_host: Option<String>,

    /// Port of a listener for the admin routes, which the other one then does not have; 0 takes a free one [default: they are on the same]
    #[arg(long, value_name = "PORT", env = "BATON_ADMIN_PORT", help_heading = "Service")]
    pub admin_port: Option<u16>,

    /// Folder for what must survive a restart, made if there is none: rollouts need it, and what one has promoted serves again; files, batches and stored responses lie there [default: nothing survives]
    #[arg(long, value_name = "DIR", env = "BATON_STATE_DIR", help_heading = "Service")]
    pub state_dir: Option<PathBuf>,

    /// Largest file that a client may upload for batches, in bytes [default: 209715200]
    #[arg(long, value_name = "BYTES", env = "BATON_FILE_LIMIT_BYTES", help_heading = "Service")]
    pub file_limit_bytes: Option<u64>,

    /// Bytes of all files that are kept, results of batches included; what does not fit is refused [default: 4294967296]
    #[arg(long, value_name = "BYTES", env = "BATON_FILES_TOTAL_BYTES", help_heading = "Service")]
    pub files_total_bytes: Option<u64>,

    /// Origin(s) whose web pages may use the service: * or https://example.org, a JSON list of them as in vLLM, or several [default: none]
    #[arg(long, value_name = "ORIGIN", num_args = 1.., env = "BATON_ALLOWED_ORIGINS", help_heading = "Service")]
    pub allowed_origins: Option<Vec<String>>,

    /// Speak HTTP/2 too: by TLS, or without it to clients that begin with it
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, env = "BATON_HTTP2", help_heading = "Service")]
    pub http2: Option<bool>,

    /// Certificate chain (PEM) to serve under TLS, on every listener; needs --ssl-keyfile [default: no TLS]
    #[arg(long, value_name = "FILE", env = "BATON_SSL_CERTFILE", help_heading = "Service")]
    pub ssl_certfile: Option<PathBuf>,

    /// Private key (PEM) of the certificate
    #[arg(long, value_name = "FILE", env = "BATON_SSL_KEYFILE", help_heading = "Service")]
    pub ssl_keyfile: Option<PathBuf>,

    /// Authorities (PEM), one of which must have signed the certificate that every client then has to show [default: clients show none]
    #[arg(long, value_name = "FILE", env = "BATON_SSL_CA_CERTS", help_heading = "Service")]
    pub ssl_ca_certs: Option<PathBuf>,

    /// Answer unknown request fields with a warning header instead of 400
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, env = "BATON_LENIENT", help_heading = "Service")]
    pub lenient: Option<bool>,

    /// Largest request body in bytes [default: 8388608]
    #[arg(long, value_name = "BYTES", env = "BATON_BODY_LIMIT_BYTES", help_heading = "Service")]
    pub body_limit_bytes: Option<usize>,

    /// Largest `n` of one request [default: 8]
    #[arg(long, value_name = "N", env = "BATON_MAX_N", help_heading = "Service")]
    pub max_n: Option<u32>,

    /// Seconds that running requests have to finish after SIGTERM [default: 30]
    #[arg(long, value_name = "SECONDS", env = "BATON_DRAIN_TIMEOUT", help_heading = "Service")]
    pub drain_timeout: Option<u64>,

    /// Device: auto (the CPU, today), cpu, or reference (naive and slow, the judge of the others) [default: auto]
    #[arg(long, env = "BATON_DEVICE", help_heading = "Model")]
    pub device: Option<String>,

    /// Ranks that share out the model, a device each (tensor and expert parallelism); on cpu and reference they share the processors, which gains nothing and is there to be tried [default: 1]
    #[arg(long, value_name = "N", env = "BATON_TENSOR_PARALLEL_SIZE", help_heading = "Model")]
    pub tensor_parallel_size: Option<usize>,

    /// Seconds that a step may wait for the device; then its requests end with an error, the server is neither ready nor live, and only a restart helps; 0 waits for ever [default: 60 for cuda and ascend; 0 for cpu and reference, whose steps may rightly take long]
    #[arg(long, value_name = "SECONDS", env = "BATON_DEVICE_TIMEOUT", help_heading = "Model")]
    pub device_timeout: Option<u64>,

    /// Compose every operation of simple operators where an Ascend device has fused ones, too: slower, for comparisons and where a fused one misbehaves
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, env = "BATON_COMPOSED_OPERATORS", help_heading = "Model")]
    pub composed_operators: Option<bool>,

    /// Precision in which weights are kept [default: auto]
    #[arg(long, value_enum, env = "BATON_DTYPE", help_heading = "Model")]
    pub dtype: Option<Dtype>,

    /// Quantise linear weights at load
    #[arg(long, value_enum, value_name = "FORMAT", env = "BATON_QUANTIZE", help_heading = "Model")]
    pub quantize: Option<Quantize>,

    /// Tokens of prompt and output together [default: the checkpoint's max_position_embeddings]
    #[arg(long, value_name = "TOKENS", env = "BATON_MAX_MODEL_LEN", help_heading = "Model")]
    pub max_model_len: Option<usize>,

    /// How embeddings are made of the tokens' vectors [default: an encoder's own way, else mean; last of a model that generates]
    #[arg(long, value_enum, env = "BATON_POOLING_TYPE", help_heading = "Model")]
    pub pooling_type: Option<PoolingType>,

    /// Where sampling defaults come from: auto reads the checkpoint's generation_config.json [default: auto]
    #[arg(long, value_enum, env = "BATON_GENERATION_CONFIG", help_heading = "Model")]
    pub generation_config: Option<GenerationConfigUse>,

    /// Chat template file (Jinja) instead of the checkpoint's
    #[arg(long, value_name = "FILE", env = "BATON_CHAT_TEMPLATE", help_heading = "Model")]
    pub chat_template: Option<PathBuf>,

    /// How the model writes calls of tools: auto reads it off the chat template, none calls none, the others are vLLM's names [default: auto]
    #[arg(long, value_enum, env = "BATON_TOOL_CALL_PARSER", help_heading = "Model")]
    pub tool_call_parser: Option<ToolCallParser>,

    /// Write what was loaded, and what each conversion of precision cost, to this file as JSON
    #[arg(long, value_name = "FILE", env = "BATON_LOAD_REPORT", help_heading = "Model")]
    pub load_report: Option<PathBuf>,

    /// What becomes of a model whose bundle (handoff.json beside it) is missing or not borne out by this device: require does not serve it, warn says so, off does not look [default: warn]
    #[arg(long, value_enum, env = "BATON_HANDOFF", help_heading = "Hand-off")]
    pub handoff: Option<HandoffPolicy>,

    /// Public key file(s) of minisign, one of which must have signed the bundle
    #[arg(long, value_name = "FILE", num_args = 1.., env = "BATON_TRUSTED_KEYS", value_delimiter = ',', help_heading = "Hand-off")]
    pub trusted_keys: Option<Vec<PathBuf>>,

    /// Seconds between golden cases replayed on idle steps while serving; 0 replays none [default: 60]
    #[arg(long, value_name = "SECONDS", env = "BATON_CANARY_INTERVAL", help_heading = "Hand-off")]
    pub canary_interval: Option<u64>,

    /// Take LoRA adapters, at start and while serving
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, env = "BATON_ENABLE_LORA", help_heading = "Adapters")]
    pub enable_lora: Option<bool>,

    /// Adapter(s) to serve, each a folder as peft saves it: NAME=PATH or {"name": NAME, "path": PATH}; one a line in the environment
    #[arg(long, value_name = "NAME=PATH", num_args = 1.., env = "BATON_LORA_MODULES", value_delimiter = '\n', help_heading = "Adapters")]
    pub lora_modules: Option<Vec<LoraModule>>,

    /// Adapters loaded at once, all of which may share a batch [default: 8]
    #[arg(long, value_name = "N", env = "BATON_MAX_LORAS", help_heading = "Adapters")]
    pub max_loras: Option<usize>,

    /// Largest rank of an adapter [default: 16]
    #[arg(long, value_name = "N", env = "BATON_MAX_LORA_RANK", help_heading = "Adapters")]
    pub max_lora_rank: Option<usize>,

    /// Sequences computed together [default: 64]
    #[arg(long, value_name = "N", env = "BATON_MAX_NUM_SEQS", help_heading = "Engine")]
    pub max_num_seqs: Option<usize>,

    /// Tokens computed in one step, prompts and outputs together: few, so that running replies wait little for new prompts [default: 128, on cuda 4096, at least --max-num-seqs]
    #[arg(long, value_name = "TOKENS", env = "BATON_MAX_NUM_BATCHED_TOKENS", help_heading = "Engine")]
    pub max_num_batched_tokens: Option<usize>,

    /// Requests that may wait; more are refused with 503 [default: 1024]
    #[arg(long, value_name = "N", env = "BATON_MAX_QUEUED_REQUESTS", help_heading = "Engine")]
    pub max_queued_requests: Option<usize>,

    /// Seconds a request may wait for its first step; then 503 [default: 600]
    #[arg(long, value_name = "SECONDS", env = "BATON_QUEUE_TIMEOUT", help_heading = "Engine")]
    pub queue_timeout: Option<u64>,

    /// Share of a device's memory for weights, cache and what else serving takes [default: 0.9]
    #[arg(long, value_name = "SHARE", env = "BATON_GPU_MEMORY_UTILIZATION", help_heading = "Engine")]
    pub gpu_memory_utilization: Option<f64>,

    /// Memory for the KV cache of each rank [default: enough for max-num-seqs contexts, at most a quarter of free memory, or on a device with memory of its own what gpu-memory-utilization leaves]
    #[arg(long, value_name = "BYTES", env = "BATON_KV_CACHE_MEMORY_BYTES", help_heading = "Engine")]
    pub kv_cache_memory_bytes: Option<u64>,

    /// Precision in which the KV cache is kept; less than float32 takes less memory and changes results [default: auto]
    #[arg(long, value_enum, env = "BATON_KV_CACHE_DTYPE", help_heading = "Engine")]
    pub kv_cache_dtype: Option<KvCacheDtype>,

    /// Draft tokens ahead, which changes no output: {"method": "ngram" or "mtp", "num_speculative_tokens": N, …} [default: off]
    #[arg(long, value_name = "JSON", env = "BATON_SPECULATIVE_CONFIG", help_heading = "Engine")]
    pub speculative_config: Option<SpeculativeConfig>,

    /// Reuse the cache of equal prompt beginnings [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, env = "BATON_ENABLE_PREFIX_CACHING", help_heading = "Engine")]
    pub enable_prefix_caching: Option<bool>,

    /// Who finds a cached prompt beginning: the key that it was computed for, or all, who then can learn from cached_tokens and times what others have sent [default: key]
    #[arg(long, value_enum, env = "BATON_PREFIX_CACHE_SCOPE", help_heading = "Engine")]
    pub prefix_cache_scope: Option<PrefixCacheScope>,

    /// Compute threads; changes no result [default: all cores]
    #[arg(long, value_name = "N", env = "BATON_THREADS", help_heading = "Engine")]
    pub threads: Option<usize>,

    /// Log filter: error, warn, info, debug, trace, or per module [default: info]
    #[arg(long, value_name = "FILTER", env = "BATON_LOG_LEVEL", help_heading = "Log")]
    pub log_level: Option<String>,

    /// Form of log lines [default: text]
    #[arg(long, value_enum, env = "BATON_LOG_FORMAT", help_heading = "Log")]
    pub log_format: Option<LogFormat>,

    /// Seconds from which on a request is logged as a slow one, with a warning; 0 warns of none [default: 60]
    #[arg(long, value_name = "SECONDS", env = "BATON_SLOW_REQUEST_SECONDS", help_heading = "Log")]
    pub slow_request_seconds: Option<u64>,

    /// OpenTelemetry collector that is sent a trace of every request, by OTLP over HTTP; without a path, /v1/traces is taken [default: nothing is sent]
    #[arg(long, value_name = "URL", env = "BATON_OTLP_TRACES_ENDPOINT", help_heading = "Log")]
    pub otlp_traces_endpoint: Option<String>,
}

/// Settings after precedence, defaults and checks.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    pub model: Option<String>,
    pub host: String,
    pub port: u16,
    pub served_model_name: Vec<String>,
    pub api_key: Vec<Secret>,
    pub admin_api_key: Vec<Secret>,
    pub api_keys_file: Option<PathBuf>,
    pub allow_unauthenticated: bool,
    /// `None`: as many as descriptors allow.
    pub max_connections: Option<usize>,
    pub admin_host: String,
    /// `None`: the admin routes are on the one listener.
    pub admin_port: Option<u16>,
    pub state_dir: Option<PathBuf>,
    pub file_limit_bytes: u64,
    pub files_total_bytes: u64,
    pub allowed_origins: Vec<String>,
    pub http2: bool,
    pub ssl_certfile: Option<PathBuf>,
    pub ssl_keyfile: Option<PathBuf>,
    pub ssl_ca_certs: Option<PathBuf>,
    pub lenient: bool,
    pub body_limit_bytes: usize,
    pub max_n: u32,
    #[serde(serialize_with = "seconds")]
    pub drain_timeout: Duration,
    pub device: String,
    pub tensor_parallel_size: usize,
    /// `None`: as the device needs.
    #[serde(serialize_with = "seconds_if_any")]
    pub device_timeout: Option<Duration>,
    pub composed_operators: bool,
    pub dtype: Dtype,
    pub quantize: Option<Quantize>,
    pub max_model_len: Option<usize>,
    pub pooling_type: Option<PoolingType>,
    pub generation_config: GenerationConfigUse,
    pub chat_template: Option<PathBuf>,
    pub tool_call_parser: ToolCallParser,
    pub load_report: Option<PathBuf>,
    pub handoff: HandoffPolicy,
    pub trusted_keys: Vec<PathBuf>,
    #[serde(serialize_with = "seconds")]
    pub canary_interval: Duration,
    pub enable_lora: bool,
    pub lora_modules: Vec<LoraModule>,
    pub max_loras: usize,
    pub max_lora_rank: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_queued_requests: usize,
    #[serde(serialize_with = "seconds")]
    pub queue_timeout: Duration,
    /// Of devices with memory of their own.
    pub gpu_memory_utilization: Option<f64>,
    pub kv_cache_memory_bytes: Option<u64>,
    pub kv_cache_dtype: KvCacheDtype,
    pub speculative_config: Option<SpeculativeConfig>,
    pub enable_prefix_caching: bool,
    pub prefix_cache_scope: PrefixCacheScope,
    /// 0: all cores.
    pub threads: usize,
    pub log_level: String,
    pub log_format: LogFormat,
    #[serde(serialize_with = "seconds")]
    pub slow_request_seconds: Duration,
    pub otlp_traces_endpoint: Option<String>,
}

type Map = serde_json::Map<String, serde_json::Value>;

/// Where a value is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Default,
    File,
    Environment,
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Default => "default",
            Origin::File => "file",
            Origin::Environment => "environment",
            Origin::Flag => "flag",
        })
    }
}

/// Origin of every setting that is not a default, by its long name.
pub type Origins = BTreeMap<String, Origin>;

impl ServeArgs {
    /// Flags and environment as parsed, with their origins.
    pub fn from_matches(matches: &ArgMatches) -> Result<(Self, Origins)> {
        let args = Self::from_arg_matches(matches)?;
        let origin = |id: &str| match matches.value_source(id)? {
            ValueSource::CommandLine => Some(Origin::Flag),
            ValueSource::EnvVariable => Some(Origin::Environment),
            _ => None,
        };
        let origins =
            matches.ids().filter_map(|id| Some((id.as_str().replace('_', "-"), origin(id.as_str())?))).collect();
        Ok((args, origins))
    }

    /// Puts flags and environment (already in `self`) over the config file, if one is named.
    pub fn with_file(self, origins: &mut Origins) -> Result<Self> {
        let Some(path) = self.config.clone() else { return Ok(self) };
        let read = || self.over(&std::fs::read_to_string(&path)?, origins);
        read().with_context(|| format!("config file {}", path.display()))
    }

    fn over(self, file: &str, origins: &mut Origins) -> Result<Self> {
        let file: ServeArgs = toml::from_str(file).map_err(|error| refusal(file, &error))?;
        let mut merged = file.to_map()?;
        for key in merged.keys() {
            origins.entry(key.clone()).or_insert(Origin::File);
        }
        merged.extend(self.to_map()?);
        let merged: ServeArgs = serde_json::from_value(merged.into())?;
        // Secrets do not survive a map, on purpose; the rest is not for files.
        Ok(Self {
            api_key: self.api_key.or(file.api_key),
            admin_api_key: self.admin_api_key.or(file.admin_api_key),
            config: self.config,
            print_config: self.print_config,
            ..merged
        })
    }

    /// The settings that are given.
    fn to_map(&self) -> Result<Map> {
        let serde_json::Value::Object(map) = serde_json::to_value(self)? else { unreachable!("a struct is an object") };
        Ok(map.into_iter().filter(|(_, v)| !v.is_null()).collect())
    }

    /// Fills in defaults and checks ranges.
    pub fn resolve(self) -> Result<Settings> {
        let positive = |name: &str, value: usize| {
            ensure!(value > 0, "--{name} must be at least 1");
            Ok(value)
        };
        let max_num_seqs = positive("max-num-seqs", self.max_num_seqs.unwrap_or(64))?;
        let device = self.device.unwrap_or_else(|| "auto".into());
        let step_tokens = Device::parse(&device)?.step_tokens().max(max_num_seqs);
        let max_num_batched_tokens =
            positive("max-num-batched-tokens", self.max_num_batched_tokens.unwrap_or(step_tokens))?;
        ensure!(
            max_num_batched_tokens >= max_num_seqs,
            "--max-num-batched-tokens ({max_num_batched_tokens}) must be at least --max-num-seqs ({max_num_seqs}): \
             a step computes a token of every running sequence"
        );
        if let Some(0) = self.max_model_len {
            bail!("--max-model-len must be at least 1");
        }
        let keys = |name: &str, keys: Option<Vec<Secret>>| {
            let keys = keys.unwrap_or_default();
            ensure!(keys.iter().all(|k| !k.0.is_empty()), "--{name} must not be empty");
            Ok(keys)
        };
        let (enable_lora, lora_modules) = (self.enable_lora.unwrap_or(false), self.lora_modules.unwrap_or_default());
        ensure!(enable_lora || lora_modules.is_empty(), "--lora-modules needs --enable-lora");
        let max_lora_rank = positive("max-lora-rank", self.max_lora_rank.unwrap_or(16))?;
        ensure!(max_lora_rank <= 512, "--max-lora-rank must be from 1 to 512");
        let max_n = self.max_n.unwrap_or(8);
        ensure!((1..=128).contains(&max_n), "--max-n must be from 1 to 128");
        let (certificate, key) = (self.ssl_certfile.is_some(), self.ssl_keyfile.is_some());
        ensure!(certificate == key, "--ssl-certfile and --ssl-keyfile need each other");
        ensure!(certificate || self.ssl_ca_certs.is_none(), "--ssl-ca-certs needs --ssl-certfile");
        ensure!(self.admin_host.is_none() || self.admin_port.is_some(), "--admin-host needs --admin-port");
        Ok(Settings {
            model: self.model,
            host: self.host.unwrap_or_else(|| "127.0.0.1".into()),
            port: self.port.unwrap_or(8000),
            served_model_name: self.served_model_name.unwrap_or_default(),
            api_key: keys("api-key", self.api_key)?,
            admin_api_key: keys("admin-api-key", self.admin_api_key)?,
            api_keys_file: self.api_keys_file,
            allow_unauthenticated: self.allow_unauthenticated.unwrap_or(false),
            max_connections: self.max_connections.map(|n| positive("max-connections", n)).transpose()?,
            admin_host: self.admin_host.unwrap_or_else(|| "127.0.0.1".into()),
            admin_port: self.admin_port,
            state_dir: self.state_dir,
            file_limit_bytes: self.file_limit_bytes.unwrap_or(200 << 20),
            files_total_bytes: self.files_total_bytes.unwrap_or(4 << 30),
            allowed_origins: origins(&self.allowed_origins.unwrap_or_default())?,
            http2: self.http2.unwrap_or(false),
            ssl_certfile: self.ssl_certfile,
            ssl_keyfile: self.ssl_keyfile,
            ssl_ca_certs: self.ssl_ca_certs,
            lenient: self.lenient.unwrap_or(false),
            body_limit_bytes: positive("body-limit-bytes", self.body_limit_bytes.unwrap_or(8 << 20))?,
            max_n,
            drain_timeout: Duration::from_secs(self.drain_timeout.unwrap_or(30)),
            device,
            tensor_parallel_size: positive("tensor-parallel-size", self.tensor_parallel_size.unwrap_or(1))?,
            device_timeout: self.device_timeout.map(Duration::from_secs),
            composed_operators: self.composed_operators.unwrap_or(false),
            dtype: self.dtype.unwrap_or(Dtype::Auto),
            quantize: self.quantize,
            max_model_len: self.max_model_len,
            pooling_type: self.pooling_type,
            generation_config: self.generation_config.unwrap_or(GenerationConfigUse::Auto),
            chat_template: self.chat_template,
            tool_call_parser: self.tool_call_parser.unwrap_or(ToolCallParser::Auto),
            load_report: self.load_report,
            handoff: self.handoff.unwrap_or(HandoffPolicy::Warn),
            trusted_keys: self.trusted_keys.unwrap_or_default(),
            canary_interval: Duration::from_secs(self.canary_interval.unwrap_or(60)),
            enable_lora,
            lora_modules,
            max_loras: positive("max-loras", self.max_loras.unwrap_or(8))?,
            max_lora_rank,
            max_num_seqs,
            max_num_batched_tokens,
            max_queued_requests: positive("max-queued-requests", self.max_queued_requests.unwrap_or(1024))?,
            queue_timeout: Duration::from_secs(self.queue_timeout.unwrap_or(600)),
            gpu_memory_utilization: self.gpu_memory_utilization,
            kv_cache_memory_bytes: self.kv_cache_memory_bytes,
            kv_cache_dtype: self.kv_cache_dtype.unwrap_or(KvCacheDtype::Auto),
            speculative_config: self.speculative_config,
            enable_prefix_caching: self.enable_prefix_caching.unwrap_or(true),
            prefix_cache_scope: self.prefix_cache_scope.unwrap_or(PrefixCacheScope::Key),
            threads: self.threads.unwrap_or(0),
            log_level: self.log_level.unwrap_or_else(|| "info".into()),
            log_format: self.log_format.unwrap_or(LogFormat::Text),
            slow_request_seconds: Duration::from_secs(self.slow_request_seconds.unwrap_or(60)),
            otlp_traces_endpoint: self.otlp_traces_endpoint.map(endpoint).transpose()?,
        })
    }
}

/// The collector as it is written in full.
fn endpoint(url: String) -> Result<String> {
    let endpoint: Endpoint = url.parse().context("--otlp-traces-endpoint")?;
    Ok(endpoint.to_string())
}

/// What is wrong with a file, without the value of what may be a key: the parser's own words quote the line.
fn refusal(file: &str, error: &toml::de::Error) -> anyhow::Error {
    let place = error.span().map_or(0, |span| span.start);
    let before = file.get(..place).unwrap_or_default();
    let (number, start) = (before.matches('\n').count() + 1, before.rfind('\n').map_or(0, |end| end + 1));
    let line = file[start..].lines().next().unwrap_or_default();
    let message = error.message();
    let command = ServeArgs::augment_args(clap::Command::new("serve"));
    let is_setting = |name: &&str| command.get_arguments().any(|argument| argument.get_long() == Some(name));
    // What stands before a = need not be a name: a line of a list may be a key, and keys may end in =.
    match line.split_once('=').map(|(name, _)| name.trim()).filter(is_setting) {
        Some(name) if !name.contains("key") => anyhow!("line {number}, {name}: {message}"),
        Some(name) => anyhow!("line {number}, {name}: not a value that is taken there"),
        None if message.starts_with("unknown field") => anyhow!("line {number}: {message}"),
        None => anyhow!("line {number}: not TOML, or not a value that is taken there"),
    }
}

/// Origins, each given alone, in a list with commas, or in a list as JSON writes it.
fn origins(given: &[String]) -> Result<Vec<String>> {
    let mut origins: Vec<String> = Vec::new();
    for text in given {
        match text.starts_with('[') {
            true => {
                let list: Vec<String> =
                    serde_json::from_str(text).context("--allowed-origins: a list of strings is taken")?;
                origins.extend(list);
            }
            false => origins.extend(text.split(',').map(|origin| origin.trim().to_owned())),
        }
    }
    for origin in &origins {
        origin.parse::<baton_http::Origin>().with_context(|| format!("--allowed-origins {origin}"))?;
    }
    Ok(origins)
}

impl Settings {
    /// Whether everybody who uses the model must show a key or a certificate, or need not on purpose.
    pub fn guards_inference(&self) -> bool {
        let shown = !self.api_key.is_empty() || self.api_keys_file.is_some() || self.ssl_ca_certs.is_some();
        shown || self.allow_unauthenticated
    }

    /// The same of those who come to a listener for the admin routes alone, which are closed without a key: metrics are there too.
    pub fn guards_admin(&self) -> bool {
        self.guards_inference() || !self.admin_api_key.is_empty()
    }

    /// One line per setting: name, value, origin.
    pub fn table(&self, origins: &Origins) -> Result<String> {
        let line = |(key, value, origin): (String, serde_json::Value, Origin)| {
            let value = if value.is_null() { "-".to_owned() } else { value.to_string() };
            format!("{key:24} {value:32} {origin}\n")
        };
        Ok(self.entries(origins)?.into_iter().map(line).collect())
    }

    /// The same as an object.
    pub fn described(&self, origins: &Origins) -> Result<serde_json::Value> {
        let entry = |(key, value, origin): (String, serde_json::Value, Origin)| {
            (key, serde_json::json!({"value": value, "from": origin.to_string()}))
        };
        Ok(self.entries(origins)?.into_iter().map(entry).collect())
    }

    /// Name, value and origin of each, without secrets.
    fn entries(&self, origins: &Origins) -> Result<Vec<(String, serde_json::Value, Origin)>> {
        let serde_json::Value::Object(map) = serde_json::to_value(self)? else { unreachable!("a struct is an object") };
        let entry = |(key, value): (String, serde_json::Value)| {
            let origin = origins.get(&key).copied().unwrap_or(Origin::Default);
            (key, value, origin)
        };
        Ok(map.into_iter().map(entry).collect())
    }
}
