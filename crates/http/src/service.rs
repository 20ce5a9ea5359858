//! What all routes share: configuration, the served model, the state of the drain.
//!
//! A service exists before its model: until [`Service::install`] it answers probes, and inference with 503.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_engine::{Adapter, EngineHandle};
use baton_text::TextModel;
use parking_lot::RwLock;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::adapters::Adapters;
use crate::admission::Counter;
use crate::auth::{ApiKey, Keys};
use crate::error::ApiError;
use crate::metrics::{HttpMetrics, ModelMetrics};

/// Settings of the service.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// Keys that may use the model; none: no key is asked for.
    pub api_keys: Vec<ApiKey>,
    /// Keys that may change what is served; none: nobody may.
    pub admin_api_keys: Vec<ApiKey>,
    /// Longest request body, in bytes.
    pub body_limit_bytes: usize,
    /// How long a request body may take to arrive.
    pub body_timeout: Duration,
    /// Ignore unknown and unsupported parameters, with a warning header, instead of refusing them.
    pub lenient: bool,
    /// Most choices per prompt.
    pub max_n: u32,
    /// How long a request may wait for its first step; `None` for ever.
    pub queue_timeout: Option<Duration>,
    /// A stream that has nothing to send sends a comment this often.
    pub keep_alive: Duration,
    /// What `/version` says.
    pub version: String,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            admin_api_keys: Vec::new(),
            body_limit_bytes: 8 << 20,
            body_timeout: Duration::from_secs(30),
            lenient: false,
            max_n: 8,
            queue_timeout: Some(Duration::from_secs(600)),
            keep_alive: Duration::from_secs(15),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// How a model presents itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelCard {
    /// Names under which it is served, at least one; the first is canonical.
    pub names: Vec<String>,
    /// Seconds since 1970.
    pub created: u64,
    /// Who owns it.
    pub owned_by: String,
    /// Changes if and only if the tokens may.
    pub system_fingerprint: String,
    /// The checkpoint's own parameters.
    pub defaults: Defaults,
    /// How the weights were loaded, as JSON.
    pub load_report: Vec<u8>,
}

/// Parameters of `generation_config.json`: they hold where a request says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Defaults {
    /// False means temperature 0.
    pub do_sample: Option<bool>,
    /// As in the request.
    pub temperature: Option<f32>,
    /// As in the request.
    pub top_p: Option<f32>,
    /// As in the request; 0 for all.
    pub top_k: Option<u32>,
    /// As in the request.
    pub min_p: Option<f32>,
    /// As in the request.
    pub repetition_penalty: Option<f32>,
    /// Tokens of a chat reply, if the request does not say.
    pub max_new_tokens: Option<u32>,
    /// Tokens that end an output, besides the tokenizer's own.
    pub eos_token_ids: Vec<u32>,
}

/// A model that is ready.
pub(crate) struct Served {
    pub engine: EngineHandle,
    pub text: Arc<TextModel>,
    pub card: ModelCard,
    pub adapters: Adapters,
    pub metrics: Arc<ModelMetrics>,
}

/// What a request's `model` means.
pub(crate) struct Target {
    /// The name to answer under.
    pub name: String,
    pub system_fingerprint: String,
    pub adapter: Option<Adapter>,
}

impl Served {
    /// The model or adapter asked for, which must be served, or the model by its canonical name.
    pub fn target(&self, asked: Option<&str>) -> Result<Target, ApiError> {
        let name = asked.unwrap_or(&self.card.names[0]);
        if self.card.names.iter().any(|served| served == name) {
            let system_fingerprint = self.card.system_fingerprint.clone();
            return Ok(Target { name: name.to_owned(), system_fingerprint, adapter: None });
        }
        let found = self.adapters.get(name).ok_or_else(ApiError::model_not_found)?;
        let system_fingerprint = found.fingerprint(&self.card);
        Ok(Target { name: name.to_owned(), system_fingerprint, adapter: Some(found.adapter) })
    }
}

/// The service. Clones are the same service.
#[derive(Clone)]
pub struct Service(Arc<Shared>);

struct Shared {
    config: ServiceConfig,
    keys: Keys,
    served: RwLock<Option<Arc<Served>>>,
    metrics: HttpMetrics,
    in_flight: Counter,
    draining: CancellationToken,
    kill_switch: CancellationToken,
    text_work: Semaphore,
    started: Instant,
}

impl Service {
    /// A service without a model.
    pub fn new(config: ServiceConfig) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self(Arc::new(Shared {
            keys: Keys::new(&config),
            config,
            served: RwLock::new(None),
            metrics: HttpMetrics::new(),
            in_flight: Counter::default(),
            draining: CancellationToken::new(),
            kill_switch: CancellationToken::new(),
            text_work: Semaphore::new(cores),
            started: Instant::now(),
        }))
    }

    /// Serves this model from now on; requests under way stay with the one they began with.
    ///
    /// # Panics
    /// If the card has no name.
    pub fn install(&self, engine: EngineHandle, text: Arc<TextModel>, card: ModelCard, adapters: Adapters) {
        assert!(!card.names.is_empty(), "a model without a name");
        let metrics = Arc::new(ModelMetrics::new(&card.names[0], engine.spec().max_model_len));
        *self.0.served.write() = Some(Arc::new(Served { engine, text, card, adapters, metrics }));
        tracing::info!(after_ms = self.0.started.elapsed().as_millis() as u64, "the service has a model");
    }

    /// Takes no new inference requests from now on, and is not ready.
    pub fn drain(&self) {
        self.0.draining.cancel();
    }

    /// The model, loaded or not, draining or not.
    pub(crate) fn loaded(&self) -> Option<Arc<Served>> {
        self.0.served.read().clone()
    }

    /// The model, if it takes requests.
    pub(crate) fn served(&self) -> Result<Arc<Served>, ApiError> {
        if self.0.draining.is_cancelled() {
            return Err(ApiError::draining());
        }
        self.loaded().ok_or_else(ApiError::model_loading)
    }

    /// Whether inference would be taken: what `/ready` says.
    pub(crate) fn ready(&self) -> Result<(), ApiError> {
        let served = self.served()?;
        if served.engine.stats().alive { Ok(()) } else { Err(ApiError::engine_down()) }
    }

    pub(crate) fn config(&self) -> &ServiceConfig {
        &self.0.config
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.0.keys
    }

    pub(crate) fn metrics(&self) -> &HttpMetrics {
        &self.0.metrics
    }

    pub(crate) fn in_flight(&self) -> &Counter {
        &self.0.in_flight
    }

    /// Ends all generations with an error when it is cancelled: the drain has lasted too long.
    pub(crate) fn kill_switch(&self) -> CancellationToken {
        self.0.kill_switch.clone()
    }

    /// Runs work on text, which may take long, off the threads that serve; no more of it at once than there are cores.
    pub(crate) async fn text_work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let _permit = self.0.text_work.acquire().await.map_err(|_| ApiError::internal())?;
        tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?
    }
}
