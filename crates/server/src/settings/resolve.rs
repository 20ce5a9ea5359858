//! Defaults of settings, and what is wrong with those that are given.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Settings, args::ServeArgs, values::*};
use crate::{backend::Device, traces::Endpoint};

impl ServeArgs {
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
            allowed_hosts: hosts(self.allowed_hosts.unwrap_or_default())?,
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
            max_queued_tokens: self
                .max_queued_tokens
                .map(|tokens| positive("max-queued-tokens", tokens))
                .transpose()?,
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
            otlp_traces_endpoint: self
                .otlp_traces_endpoint
                .map(|url| url.parse::<Endpoint>().context("--otlp-traces-endpoint"))
                .transpose()?,
        })
    }
}

fn hosts(given: Vec<String>) -> Result<Vec<String>> {
    for host in &given {
        host.parse::<baton_http::HostName>().with_context(|| format!("--allowed-hosts {host}"))?;
    }
    Ok(given)
}

/// Origins, each given alone, in a list with commas, or in a list as JSON writes it.
fn origins(given: &[String]) -> Result<Vec<AllowedOrigin>> {
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
    let parse =
        |origin: &String| origin.parse::<AllowedOrigin>().with_context(|| format!("--allowed-origins {origin}"));
    origins.iter().map(parse).collect()
}
