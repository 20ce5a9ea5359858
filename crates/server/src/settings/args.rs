//! What `baton serve` can be told: one entry for each setting, with its name, help and default together.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::values::*;
use crate::speculative::SpeculativeConfig;

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

    /// File of keys by their SHA-256 digests, each with a name, scopes (inference, admin, metrics) and perhaps a moment of expiry, a weight beside other keys, and limits on requests and tokens; read again when it changes and at SIGHUP [default: none]
    #[arg(long, value_name = "FILE", env = "BATON_API_KEYS_FILE", help_heading = "Service")]
    pub api_keys_file: Option<PathBuf>,

    /// Listen where other machines can connect though no client needs a key or a certificate
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, env = "BATON_ALLOW_UNAUTHENTICATED", help_heading = "Service")]
    pub allow_unauthenticated: Option<bool>,

    /// Connections at once; for one more, the one is closed on which the longest nothing has happened, be it that a request has not arrived whole, or the new one where requests are under way on all [default: 16384, or what the limit of descriptors leaves]
    #[arg(long, value_name = "N", env = "BATON_MAX_CONNECTIONS", help_heading = "Service")]
    pub max_connections: Option<usize>,

    /// Address of a listener for the admin routes alone; needs --admin-port [default: 127.0.0.1]
    #[arg(long, env = "BATON_ADMIN_HOST", help_heading = "Service")]
    pub admin_host: Option<String>,

    /// Port of a listener for the admin routes, which the other one then does not have; 0 takes a free one [default: they are on the same]
    #[arg(long, value_name = "PORT", env = "BATON_ADMIN_PORT", help_heading = "Service")]
    pub admin_port: Option<u16>,

    /// Folder for what must survive a restart, made if there is none: rollouts need it, and what one has promoted serves again; files, batches, stored responses and what keys have used lie there [default: nothing survives]
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

    /// Name(s) by which clients without a key may call, besides localhost and addresses: a page could have any other made lead here; * for all [default: what --host and --admin-host name, and any where the address is not loopback]
    #[arg(long, value_name = "NAME", num_args = 1.., env = "BATON_ALLOWED_HOSTS", value_delimiter = ',', help_heading = "Service")]
    pub allowed_hosts: Option<Vec<String>>,

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

    /// Tokens of prompts that may wait; more are refused with 503 [default: any number]
    #[arg(long, value_name = "N", env = "BATON_MAX_QUEUED_TOKENS", help_heading = "Engine")]
    pub max_queued_tokens: Option<usize>,

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

    /// OpenTelemetry collector that is sent a trace of every request, by OTLP over HTTP; without a path, /v1/traces is taken. OTEL_* variables say how: headers, certificates, timeout, compression, batches, resource [default: nothing is sent]
    #[arg(long, value_name = "URL", env = "BATON_OTLP_TRACES_ENDPOINT", help_heading = "Log")]
    pub otlp_traces_endpoint: Option<String>,
}
