//! Settings of `baton serve`: what they are in the end.
//!
//! One entry each in `args`, with name, variable and help together; where values come from is in `sources`,
//! defaults and checks are in `resolve`, kinds of values in `values`.

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use serde::Serialize;

use crate::{speculative::SpeculativeConfig, traces::Endpoint};

mod args;
mod resolve;
mod sources;
#[cfg(test)]
mod tests;
mod values;

pub use args::ServeArgs;
pub use sources::{Origin, Origins};
pub use values::*;

fn seconds_if_any<S: serde::Serializer>(value: &Option<Duration>, s: S) -> std::result::Result<S::Ok, S::Error> {
    value.map(|value| value.as_secs()).serialize(s)
}

fn seconds<S: serde::Serializer>(value: &Duration, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.serialize_u64(value.as_secs())
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
    pub allowed_origins: Vec<AllowedOrigin>,
    pub allowed_hosts: Vec<String>,
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
    pub max_queued_tokens: Option<usize>,
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
    pub otlp_traces_endpoint: Option<Endpoint>,
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
