//! What all routes share: configuration, generations, the state of the drain.
//!
//! A service exists before its model: until [`Service::install`] it answers probes, and inference with 503.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use baton_engine::{Share, Tenant};
use http::HeaderMap;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::access::AccessRecord;
use crate::admission::Counter;
use crate::browsers::HostName;
use crate::cors::Origin;
use crate::encoder::{Encoder, NewEncoder};
use crate::error::ApiError;
use crate::generation::{Generation, NewGeneration, Retired};
use crate::generations::{Generations, Pick, Traffic, TransitionError};
use crate::keys::{ApiKey, Keys, ListedKey};
use crate::limits::{Ask, Quotas, Taken};
use crate::metrics::{HttpMetrics, OutsideCounter};
use crate::observed::Observed;
use crate::places::Places;
use crate::rollout::RolloutControl;
use crate::slow::SlowRequests;
use crate::store::Store;
use crate::summary::{RequestObserver, RequestSummary};
use crate::tls::Tls;
use crate::usage::Usage;

/// Accesses to the disk at once, at most.
const DISK_WORK: usize = 8;

/// What connections may take of the server.
#[derive(Debug, Clone)]
pub struct ConnectionLimits {
    /// How many there are at once, over all listeners. For one beyond, another on which nothing is under way is closed; if there is
    /// none, the new one is.
    pub connections: usize,
    /// How long a request's head may take to arrive, idle time of the connection before it included; how long a handshake
    /// may take; and how long a connection of HTTP/2 may be without a request.
    pub head_timeout: Duration,
    /// How long a client may take nothing of what waits to be sent to it.
    pub stall_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        let (head_timeout, stall_timeout) = (Duration::from_secs(10), Duration::from_secs(60));
        Self { connections: 16 << 10, head_timeout, stall_timeout }
    }
}

/// Settings of the service.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// Keys that may use the model; none: no key is asked for.
    pub api_keys: Vec<ApiKey>,
    /// Keys that may change what is served; none: nobody may.
    pub admin_api_keys: Vec<ApiKey>,
    /// Keys besides, of any scope; `None`: there is no list. Where there is one, nobody enters without a key.
    pub listed_keys: Option<Vec<ListedKey>>,
    /// Longest request body, in bytes.
    pub body_limit_bytes: usize,
    /// How long a request body may take to arrive.
    pub body_timeout: Duration,
    /// Ignore unknown and unsupported parameters, with a warning header, instead of refusing them.
    pub lenient: bool,
    /// Most choices per prompt.
    pub max_n: u32,
    /// All clients use each other's cached prefixes, and so can learn what others have sent; else each key its own.
    pub shared_prefix_cache: bool,
    /// How long a request may wait for its first step; `None` for ever.
    pub queue_timeout: Option<Duration>,
    /// A stream that has nothing to send sends a comment this often.
    pub keep_alive: Duration,
    /// What `/version` says.
    pub version: String,
    /// Whose pages may use the service from a browser; none: nobody's.
    pub allowed_origins: Vec<Origin>,
    /// Names by which clients without a key may call the service on a loopback address, besides `localhost` and addresses.
    pub allowed_hosts: Vec<HostName>,
    /// They may call it by no other on any address.
    pub check_hosts_everywhere: bool,
    /// Where requests may keep what must outlive the process; `None`: nowhere.
    pub store: Option<Store>,
    /// What connections may take.
    pub connection_limits: ConnectionLimits,
    /// Encrypts every connection.
    pub tls: Option<Tls>,
    /// Speak HTTP/2 too.
    pub http2: bool,
    /// A request that is given a model and takes at least so long is worth a warning; `None`: none is.
    pub slow_request: Option<Duration>,
    /// Is told of every request that has ended. With one, every request is part of a trace.
    pub observer: Option<RequestObserver>,
    /// What is counted elsewhere and shown among the metrics.
    pub counters: Vec<OutsideCounter>,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            admin_api_keys: Vec::new(),
            listed_keys: None,
            body_limit_bytes: 8 << 20,
            body_timeout: Duration::from_secs(30),
            lenient: false,
            max_n: 8,
            shared_prefix_cache: false,
            queue_timeout: Some(Duration::from_secs(600)),
            keep_alive: Duration::from_secs(15),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            allowed_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            check_hosts_everywhere: false,
            store: None,
            connection_limits: ConnectionLimits::default(),
            tls: None,
            http2: false,
            slow_request: Some(Duration::from_secs(60)),
            observer: None,
            counters: Vec::new(),
        }
    }
}

/// The service. Clones are the same service.
#[derive(Clone)]
pub struct Service(Arc<Shared>);

struct Shared {
    config: ServiceConfig,
    keys: Keys,
    generations: Generations,
    /// What is served instead of a generation, if it is an encoder.
    encoder: OnceLock<Arc<Encoder>>,
    rollout: OnceLock<Arc<dyn RolloutControl>>,
    metrics: HttpMetrics,
    slow: SlowRequests,
    usage: Arc<Usage>,
    quotas: Arc<Quotas>,
    in_flight: Counter,
    draining: CancellationToken,
    kill_switch: CancellationToken,
    text_work: Arc<Semaphore>,
    disk_work: Arc<Semaphore>,
    grammar_work: Arc<Semaphore>,
    places: Arc<Places>,
    started: Instant,
}

impl Service {
    /// A service without a model.
    pub fn new(config: ServiceConfig) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let places = Places::new(config.connection_limits.connections);
        Self(Arc::new(Shared {
            keys: Keys::new(&config.api_keys, &config.admin_api_keys, config.listed_keys.as_deref()),
            usage: config.store.as_ref().map(|store| store.usage().clone()).unwrap_or_default(),
            config,
            generations: Generations::default(),
            encoder: OnceLock::new(),
            rollout: OnceLock::new(),
            metrics: HttpMetrics::new(),
            slow: SlowRequests::default(),
            quotas: Arc::default(),
            in_flight: Counter::default(),
            draining: CancellationToken::new(),
            kill_switch: CancellationToken::new(),
            text_work: Arc::new(Semaphore::new(cores)),
            disk_work: Arc::new(Semaphore::new(DISK_WORK)),
            grammar_work: Arc::new(Semaphore::new(cores.div_ceil(2))),
            places,
            started: Instant::now(),
        }))
    }

    /// Serves this generation from now on. Requests under way finish with the one they began with: the caller, who gets
    /// it back, waits for them.
    ///
    /// # Panics
    /// If the card has no name, or its digest is none.
    pub fn install(&self, new: NewGeneration) -> Option<Retired> {
        let generation = new.card.generation.clone();
        let old = self.0.generations.install(new);
        tracing::info!(generation, after_ms = self.0.started.elapsed().as_millis() as u64, "the service has a model");
        old
    }

    /// Serves this encoder from now on, and no generation. The first stays.
    ///
    /// # Panics
    /// If the card has no name, or its digest is none.
    pub fn install_encoder(&self, new: NewEncoder) {
        let generation = new.card.generation.clone();
        if self.0.encoder.set(Arc::new(Encoder::new(new))).is_ok() {
            tracing::info!(
                generation,
                after_ms = self.0.started.elapsed().as_millis() as u64,
                "the service has an encoder"
            );
        }
    }

    /// Lets a candidate stand beside the generation that serves, without traffic, and begins to count anew.
    ///
    /// # Errors
    /// If nothing is served, if there is a candidate, or if it is what is served.
    ///
    /// # Panics
    /// As [`install`](Self::install).
    pub fn stage(&self, new: NewGeneration) -> Result<(), TransitionError> {
        let generation = new.card.generation.clone();
        self.0.generations.stage(new)?;
        tracing::info!(generation, "candidate staged");
        Ok(())
    }

    /// Gives the candidate this much of the traffic from now on.
    ///
    /// # Errors
    /// If there is no candidate, or the share is not from 0 to 1.
    pub fn set_traffic(&self, traffic: Traffic) -> Result<(), TransitionError> {
        self.0.generations.set_traffic(traffic)?;
        tracing::info!(?traffic, "the candidate's traffic is set");
        Ok(())
    }

    /// What the candidate gets; `None` if there is none.
    pub fn traffic(&self) -> Option<Traffic> {
        self.0.generations.traffic()
    }

    /// Serves the candidate from now on, and gives back what served.
    ///
    /// # Errors
    /// If there is no candidate.
    pub fn promote(&self) -> Result<Retired, TransitionError> {
        let old = self.0.generations.promote()?;
        tracing::info!(retired = old.generation(), "candidate promoted");
        Ok(old)
    }

    /// Takes the candidate away. Its requests finish; what it answers unseen is dropped.
    ///
    /// # Errors
    /// If there is no candidate.
    pub fn withdraw(&self) -> Result<Retired, TransitionError> {
        let candidate = self.0.generations.withdraw()?;
        tracing::info!(retired = candidate.generation(), "candidate withdrawn");
        Ok(candidate)
    }

    /// What a rollout is judged by; `None` if nothing is served.
    pub fn observed(&self) -> Option<Observed> {
        self.0.generations.observed()
    }

    /// Knows these keys from now on, instead of those of the list before. Work that is under way goes on.
    pub fn replace_listed_keys(&self, listed: &[ListedKey]) {
        self.0.keys.replace_list(listed);
        self.0.quotas.keep(|owner| self.0.keys.knows(owner));
    }

    /// Lets admin routes command rollouts. The first control stays.
    pub fn set_rollout(&self, control: Arc<dyn RolloutControl>) {
        let _ = self.0.rollout.set(control);
    }

    /// Takes no new inference requests from now on, and is not ready.
    pub fn drain(&self) {
        self.0.draining.cancel();
    }

    /// Cancelled when it drains.
    pub(crate) fn draining(&self) -> &CancellationToken {
        &self.0.draining
    }

    /// Which generations there are.
    pub(crate) fn generations(&self) -> &Generations {
        &self.0.generations
    }

    pub(crate) fn rollout(&self) -> Option<&Arc<dyn RolloutControl>> {
        self.0.rollout.get()
    }

    /// The generation that serves, draining or not.
    pub(crate) fn serving(&self) -> Result<Arc<Generation>, ApiError> {
        match self.encoder() {
            Some(encoder) => Err(encoder.does_not_generate()),
            None => self.0.generations.serving().ok_or_else(ApiError::model_loading),
        }
    }

    /// The encoder that is served, if it is one.
    pub(crate) fn encoder(&self) -> Option<&Arc<Encoder>> {
        self.0.encoder.get()
    }

    /// Whether anything new is taken up.
    pub(crate) fn open(&self) -> Result<(), ApiError> {
        if self.0.draining.is_cancelled() { Err(ApiError::draining()) } else { Ok(()) }
    }

    /// Whether there is a model for new inference requests.
    pub(crate) fn takes_requests(&self) -> Result<(), ApiError> {
        self.open()?;
        match self.encoder() {
            Some(_) => Ok(()),
            None => self.serving()?.handoff.check(),
        }
    }

    /// The generation for a request that asks for this model, from now to its end.
    pub(crate) fn pick(&self, record: &AccessRecord, asked: Option<&str>) -> Result<Pick, ApiError> {
        if let Some(encoder) = self.encoder() {
            return Err(encoder.does_not_generate());
        }
        let pick = self.0.generations.pick(record.request_id(), asked)?;
        record.generation(&pick.generation.card.generation, &pick.target.name);
        Ok(pick)
    }

    /// Whether inference would be taken: what `/ready` says.
    pub(crate) fn ready(&self) -> Result<(), ApiError> {
        self.open()?;
        match self.encoder() {
            Some(encoder) => encoder.ready(),
            None => self.serving()?.ready(),
        }
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

    /// The slowest requests of the last minutes.
    pub(crate) fn slow_requests(&self) -> &SlowRequests {
        &self.0.slow
    }

    /// What each key has used.
    pub(crate) fn usage(&self) -> &Arc<Usage> {
        &self.0.usage
    }

    /// A request has ended: it is counted, logged, and told to whoever wants to know.
    pub(crate) fn ended(&self, summary: &RequestSummary) {
        self.0.metrics.answered(summary);
        self.0.usage.add(&summary.known);
        summary.log();
        if summary.known.generation.is_some() {
            self.0.slow.add(summary, Instant::now());
            if self.config().slow_request.is_some_and(|limit| limit <= summary.total) {
                let seconds = summary.total.as_secs_f64();
                tracing::warn!(request_id = summary.request_id, seconds, "a slow request");
            }
        }
        if let Some(observer) = &self.config().observer {
            observer.observe(summary);
        }
    }

    pub(crate) fn in_flight(&self) -> &Counter {
        &self.0.in_flight
    }

    /// Whose cached prefixes a request may use, and adds to.
    pub(crate) fn tenant(&self, record: &AccessRecord) -> Tenant {
        match self.0.config.shared_prefix_cache {
            true => Tenant::default(),
            false => Tenant(record.owner().digest()),
        }
    }

    /// The places for connections, of all listeners.
    pub(crate) fn places(&self) -> &Arc<Places> {
        &self.0.places
    }

    /// Whose turn a request takes in the engine.
    pub(crate) fn share(&self, record: &AccessRecord) -> Share {
        Share { tenant: Tenant(record.owner().digest()), weight: record.limits().weight }
    }

    /// Charges the request's key for it.
    pub(crate) fn charge(&self, record: &AccessRecord, ask: Ask) -> Result<Taken, ApiError> {
        let (key, now) = ((record.owner(), record.limits()), self.0.started.elapsed());
        let taken = self.0.quotas.take(key, record.of_batch(), ask, now);
        taken.map_err(ApiError::rate_limited)
    }

    /// What a reply says of its key's limits.
    pub(crate) fn limit_headers(&self, record: &AccessRecord) -> HeaderMap {
        self.0.quotas.headers(record.owner(), record.limits(), self.0.started.elapsed())
    }

    /// Ends all replies with an error when it is cancelled: the drain has lasted too long.
    pub(crate) fn kill_switch(&self) -> CancellationToken {
        self.0.kill_switch.clone()
    }

    /// Runs work on text, which may take long, off the threads that serve; no more of it at once than there are cores.
    pub(crate) async fn text_work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        off_thread(&self.0.text_work, work).await
    }

    /// Where requests keep what must outlive the process.
    pub(crate) fn store(&self) -> Result<&Store, ApiError> {
        let none = || ApiError::not_configured("this server keeps nothing for later; start it with --state-dir");
        self.0.config.store.as_ref().ok_or_else(none)
    }

    /// Runs work on the disk off the threads that serve; no more than a few at once. What the system refuses is logged,
    /// and the client is told that it is our fault. It is carried out even if the client leaves.
    pub(crate) async fn disk_work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, ApiError> {
        let done = off_thread(&self.0.disk_work, move || Ok(work())).await?;
        done.map_err(|error| {
            tracing::error!(%error, "the state folder cannot be used");
            ApiError::internal()
        })
    }

    /// As [`text_work`](Self::text_work), for grammars: however many are asked for, texts do not wait for them.
    pub(crate) async fn grammar_work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        off_thread(&self.0.grammar_work, work).await
    }
}

/// Runs work on a thread that may block. Its permit is given back when it has ended, which is not before its client has
/// left: nobody can have more of it running by leaving and coming back.
async fn off_thread<T: Send + 'static>(
    permits: &Arc<Semaphore>,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let permit = permits.clone().acquire_owned().await.map_err(|_| ApiError::internal())?;
    let work = move || {
        let _permit = permit;
        work()
    };
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn work_whose_client_has_left_still_counts_until_it_ends() {
        let permits = Arc::new(Semaphore::new(1));
        let (end, ended) = mpsc::channel::<()>();
        let (begin, begun) = tokio::sync::oneshot::channel();
        let client = tokio::spawn({
            let permits = permits.clone();
            async move {
                off_thread(&permits, move || {
                    let _ = begin.send(());
                    ended.recv().map_err(|_| ApiError::internal())
                })
                .await
            }
        });
        begun.await.unwrap();
        client.abort();
        assert!(client.await.unwrap_err().is_cancelled());
        assert_eq!(permits.available_permits(), 0);
        end.send(()).unwrap();
        off_thread(&permits, || Ok(())).await.unwrap();
    }
}
