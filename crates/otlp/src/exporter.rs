//! The queue of spans, and the thread that sends them.
//!
//! Invariant: every span that was given is counted once in the end, as exported or as dropped. A collector that is away is
//! asked again with longer and longer pauses, for the same batch; meanwhile the queue fills up, and what does not fit is
//! dropped. One that refuses a batch is not asked to take it again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, after, bounded, never, select};
use ureq::Agent;

use crate::endpoint::Endpoint;
use crate::span::{Attribute, Span};
use crate::wire;

/// Groups of spans that wait, at most.
const QUEUED: usize = 1024;
/// Spans that are enough for a request, and how long it waits for so many.
const BATCH: usize = 512;
const LINGER: Duration = Duration::from_millis(500);
/// How long a request may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Pauses before a batch is sent again: twice as long each time, up to the second.
const PAUSES: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(30)];
/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
/// Failures are not logged more often.
const COMPLAINTS: Duration = Duration::from_secs(60);

/// What became of the spans that were given. Both only grow.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Taken by the collector.
    pub exported: Arc<AtomicU64>,
    /// Lost: the queue was full, the collector refused them, or it was away when the exporter stopped.
    pub dropped: Arc<AtomicU64>,
}

/// Takes spans and never waits. Clones are the same queue.
#[derive(Clone)]
pub struct Spans {
    queue: Sender<Vec<Span>>,
    counts: Counts,
}

impl Spans {
    /// Queues spans that belong together; all or none of them are dropped.
    pub fn send(&self, group: Vec<Span>) {
        if let Err(refused) = self.queue.try_send(group) {
            add(&self.counts.dropped, refused.into_inner().len());
        }
    }
}

/// The thread that sends spans, to be stopped.
pub struct Exporter {
    spans: Spans,
    /// Dropped in order to stop.
    run: Sender<()>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl Exporter {
    /// Sends to this collector, as this resource and scope (name and version).
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(
        endpoint: Endpoint,
        resource: Vec<Attribute>,
        scope: (&'static str, &'static str),
    ) -> io::Result<Self> {
        let (queue, groups) = bounded(QUEUED);
        let (run, stopped) = bounded(0);
        let (alive, ended) = bounded(0);
        let counts = Counts::default();
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // What the environment says about other traffic does not lead this astray.
            .proxy(None)
            .timeout_global(Some(TIMEOUT))
            .user_agent(format!("{}/{}", scope.0, scope.1))
            .build()
            .new_agent();
        let mut sender = Worker {
            agent,
            endpoint,
            resource,
            scope,
            groups,
            stopped,
            counts: counts.clone(),
            last_complaint: None,
            _alive: alive,
        };
        std::thread::Builder::new().name("otlp".into()).spawn(move || sender.run())?;
        Ok(Self { spans: Spans { queue, counts }, run, ended })
    }

    /// Where spans are given.
    pub fn spans(&self) -> Spans {
        self.spans.clone()
    }

    /// What became of them.
    pub fn counts(&self) -> Counts {
        self.spans.counts.clone()
    }

    /// Sends what is queued, trying once, and ends; what the collector has not taken after `patience` is lost.
    pub fn stop(self, patience: Duration) {
        drop(self.run);
        // Nothing is ever sent: this waits for the end of the thread.
        let _ = self.ended.recv_timeout(patience);
    }
}

struct Worker {
    agent: Agent,
    endpoint: Endpoint,
    resource: Vec<Attribute>,
    scope: (&'static str, &'static str),
    groups: Receiver<Vec<Span>>,
    stopped: Receiver<()>,
    counts: Counts,
    last_complaint: Option<Instant>,
    /// Tells whoever stops the exporter when the thread ends.
    _alive: Sender<()>,
}

/// Why a batch was not taken.
struct Failure {
    reason: String,
    /// Whether it may be taken later.
    passing: bool,
}

impl Worker {
    fn run(&mut self) {
        while let Some(batch) = self.batch() {
            self.deliver(&batch);
        }
    }

    /// The next spans to be sent together; `None` once there are no more and the exporter is to stop.
    fn batch(&self) -> Option<Vec<Span>> {
        let mut batch = Vec::new();
        let mut full = never();
        while batch.len() < BATCH {
            select! {
                recv(self.groups) -> group => {
                    if batch.is_empty() {
                        full = after(LINGER);
                    }
                    batch.extend(group.unwrap_or_default());
                }
                recv(full) -> _ => break,
                recv(self.stopped) -> _ => {
                    batch.extend(self.groups.try_iter().flatten());
                    return (!batch.is_empty()).then_some(batch);
                }
            }
        }
        Some(batch)
    }

    /// Sends a batch until it is taken or given up.
    fn deliver(&mut self, batch: &[Span]) {
        let body = wire::encode(&self.resource, self.scope, batch);
        let mut pause = PAUSES[0];
        loop {
            let failure = match self.post(&body) {
                Err(failure) => failure,
                Ok(rejected) => {
                    let rejected = batch.len().min(rejected);
                    add(&self.counts.exported, batch.len() - rejected);
                    add(&self.counts.dropped, rejected);
                    return;
                }
            };
            self.complain(&failure);
            if !failure.passing || self.stops_within(pause) {
                add(&self.counts.dropped, batch.len());
                return;
            }
            pause = (2 * pause).min(PAUSES[1]);
        }
    }

    /// Waits so long; true if the exporter is to stop.
    fn stops_within(&self, pause: Duration) -> bool {
        self.stopped.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected)
    }

    /// Sends a batch, of which the collector says how many spans it did not take.
    fn post(&self, body: &[u8]) -> Result<usize, Failure> {
        let request = self.agent.post(self.endpoint.uri()).content_type("application/x-protobuf");
        let mut response = request.send(body).map_err(|error| Failure { reason: error.to_string(), passing: true })?;
        match response.status().as_u16() {
            // What cannot be read is no reason to send them twice.
            200..=299 => {
                let answer = response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
                Ok(wire::rejected(&answer.unwrap_or_default()))
            }
            // Those that the protocol says to try again.
            status @ (429 | 502 | 503 | 504) => Err(Failure { reason: format!("status {status}"), passing: true }),
            status => Err(Failure { reason: format!("status {status}"), passing: false }),
        }
    }

    fn complain(&mut self, failure: &Failure) {
        if self.last_complaint.is_none_or(|last| last.elapsed() >= COMPLAINTS) {
            self.last_complaint = Some(Instant::now());
            let (exported, dropped) = (&self.counts.exported, &self.counts.dropped);
            tracing::warn!(
                endpoint = %self.endpoint,
                reason = failure.reason,
                exported = exported.load(Ordering::Relaxed),
                dropped = dropped.load(Ordering::Relaxed),
                "traces are not taken by the collector"
            );
        }
    }
}

fn add(count: &AtomicU64, spans: usize) {
    count.fetch_add(spans as u64, Ordering::Relaxed);
}
