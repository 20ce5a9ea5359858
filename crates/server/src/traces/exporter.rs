//! The queue of spans, and what became of them. Batches, attempts and the protocol are the library's.
//!
//! Invariant: until the exporter stops, every span that was given is counted once in the end, as exported or as dropped. So
//! the library's queue, which does not say what it drops, is never given more than it holds: what waits or is being sent
//! has a place, and what finds none is dropped here.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, bail};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, OTEL_BSP_MAX_EXPORT_BATCH_SIZE, OTEL_BSP_MAX_EXPORT_BATCH_SIZE_DEFAULT,
        OTEL_BSP_MAX_QUEUE_SIZE, OTEL_BSP_MAX_QUEUE_SIZE_DEFAULT, OTEL_BSP_SCHEDULE_DELAY,
        OTEL_BSP_SCHEDULE_DELAY_DEFAULT, SpanData, SpanExporter, SpanProcessor,
    },
};

use super::collector::{Endpoint, Means};

/// The most spans that belong together, of one request: a smaller queue would never take them.
const GROUP: usize = 4;

/// What became of the spans that were given. Both only grow.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Taken by the collector.
    pub exported: Arc<AtomicU64>,
    /// Lost: the queue was full, the collector refused them, or it was away for too long.
    pub dropped: Arc<AtomicU64>,
}

/// Takes spans and never waits. Clones are the same queue.
#[derive(Clone)]
pub struct Spans {
    processor: Arc<BatchSpanProcessor>,
    places: usize,
    taken: Arc<AtomicUsize>,
    counts: Counts,
}

impl Spans {
    /// Queues spans that belong together; all or none of them are dropped.
    pub fn send(&self, group: Vec<SpanData>) {
        let more = |taken: usize| Some(taken + group.len()).filter(|taken| *taken <= self.places);
        match self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more) {
            Ok(_) => group.into_iter().for_each(|span| self.processor.on_end(span)),
            Err(_) => add(&self.counts.dropped, group.len()),
        }
    }
}

/// The thread that sends spans, to be stopped.
pub struct Exporter {
    spans: Spans,
}

impl Exporter {
    /// Sends to this collector, as this resource. How many spans wait, and for how long, OpenTelemetry's variables say
    /// (`OTEL_BSP_…`).
    ///
    /// # Errors
    /// If a variable asks for what cannot be had.
    pub fn start(
        endpoint: &Endpoint,
        means: Means,
        resource: &Resource,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let number = |name: &str, default: usize, least: usize| match variable(name).map(|value| value.parse::<usize>())
        {
            None => Ok(default),
            Some(Ok(number)) if number >= least => Ok(number),
            Some(_) => bail!("{name}: it must be a number, at least {least}"),
        };
        let places = number(OTEL_BSP_MAX_QUEUE_SIZE, OTEL_BSP_MAX_QUEUE_SIZE_DEFAULT, GROUP)?;
        let batch = number(OTEL_BSP_MAX_EXPORT_BATCH_SIZE, OTEL_BSP_MAX_EXPORT_BATCH_SIZE_DEFAULT, 1)?;
        let delay = number(OTEL_BSP_SCHEDULE_DELAY, OTEL_BSP_SCHEDULE_DELAY_DEFAULT.as_millis() as usize, 1)?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(places)
            .with_max_export_batch_size(batch)
            .with_scheduled_delay(Duration::from_millis(delay as u64))
            .build();
        let (mut exporter, rejected) = means.exporter(endpoint)?;
        exporter.set_resource(resource);
        let (taken, counts) = (Arc::new(AtomicUsize::new(0)), Counts::default());
        let counted = Counted { exporter, rejected, taken: taken.clone(), counts: counts.clone() };
        let processor = Arc::new(BatchSpanProcessor::new(counted, batches));
        Ok(Self { spans: Spans { processor, places, taken, counts } })
    }

    /// Where spans are given.
    pub fn spans(&self) -> Spans {
        self.spans.clone()
    }

    /// What became of them.
    pub fn counts(&self) -> Counts {
        self.spans.counts.clone()
    }

    /// Sends what is queued and ends; what the collector has not taken after `patience` is lost.
    pub fn stop(self, patience: Duration) {
        // That time is up is no error: the process ends.
        let _ = self.spans.processor.shutdown_with_timeout(patience);
    }
}

/// The library's exporter, and what becomes of each batch.
#[derive(Debug)]
struct Counted {
    exporter: opentelemetry_otlp::SpanExporter,
    /// Of the batch under way, what the collector did not take though it answered well.
    rejected: Arc<AtomicU64>,
    taken: Arc<AtomicUsize>,
    counts: Counts,
}

impl SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.exporter.export(batch).await;
        let lost = match result {
            Ok(()) => usize::try_from(self.rejected.swap(0, Ordering::Relaxed)).map_or(spans, |lost| lost.min(spans)),
            Err(_) => spans,
        };
        add(&self.counts.exported, spans - lost);
        add(&self.counts.dropped, lost);
        self.taken.fetch_sub(spans, Ordering::AcqRel);
        result
    }
}

fn add(count: &AtomicU64, spans: usize) {
    count.fetch_add(spans as u64, Ordering::Relaxed);
}
