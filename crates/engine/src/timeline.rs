//! What each step did, recorded while somebody asks for it.
//!
//! Off, it costs a step one load of a flag. On, a step is one value in a ring of a size that is given; of a recording that
//! lasts longer the newest steps stay, and what was lost is counted.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::EngineStats;
use crate::handle::Shared;

/// One step, and how the engine stood behind it. Times are since the engine began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRecord {
    /// When it began, after it was planned; or the end of the step before, if it was begun ahead of that.
    pub begin: Duration,
    /// When its results were taken.
    pub end: Duration,
    /// Tokens that it computed, drafts included; none if it failed.
    pub tokens: u64,
    /// Tokens that it generated.
    pub generated: u64,
    /// Sequences that lost their blocks since the step before.
    pub preemptions: u64,
    /// Whether it failed as a whole.
    pub failed: bool,
    /// Foreground sequences that hold blocks.
    pub running: usize,
    /// Foreground sequences that wait.
    pub waiting: usize,
    /// Cache blocks that sequences hold.
    pub used_blocks: usize,
}

/// The steps of a recording, oldest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedSteps {
    /// When the engine began, from which its times count.
    pub epoch: Instant,
    /// At most as many as were asked for.
    pub steps: Vec<StepRecord>,
    /// Earlier ones, for which there was no room.
    pub lost: u64,
}

/// Where the engine thread records, for all handles.
#[derive(Default)]
pub(crate) struct Timeline {
    /// Whether it is worth looking at the ring.
    on: AtomicBool,
    ring: Mutex<Option<Ring>>,
}

struct Ring {
    capacity: usize,
    steps: VecDeque<StepRecord>,
    lost: u64,
    /// As of the step before.
    before: EngineStats,
}

impl Timeline {
    /// Takes a step that took this time; `stats`, how the engine stands behind it, are asked for only if somebody records.
    pub fn record(&self, time: Range<Duration>, stats: impl FnOnce() -> EngineStats) {
        if self.on.load(Ordering::Relaxed)
            && let Some(ring) = &mut *self.ring.lock()
        {
            ring.push(time, stats());
        }
    }
}

impl Ring {
    fn push(&mut self, time: Range<Duration>, stats: EngineStats) {
        if self.steps.len() == self.capacity {
            self.steps.pop_front();
            self.lost += 1;
        }
        self.steps.push_back(StepRecord {
            begin: time.start,
            end: time.end,
            tokens: stats.step_tokens.sum - self.before.step_tokens.sum,
            generated: stats.generated_tokens - self.before.generated_tokens,
            preemptions: stats.preemptions - self.before.preemptions,
            failed: stats.failed_steps > self.before.failed_steps,
            running: stats.running,
            waiting: stats.waiting,
            used_blocks: stats.blocks.used,
        });
        self.before = stats;
    }
}

/// Steps are recorded until this is finished or dropped.
pub struct StepRecording {
    shared: Arc<Shared>,
    /// The ring is not this one's any more.
    finished: bool,
}

impl StepRecording {
    /// Begins to record at most the `capacity` newest steps, at least one; `None` if somebody else does.
    pub(crate) fn begin(shared: &Arc<Shared>, capacity: usize) -> Option<Self> {
        let timeline = &shared.timeline;
        // They are told behind every step that is recorded.
        let before = shared.stats.lock().clone();
        let mut ring = timeline.ring.lock();
        if ring.is_some() {
            return None;
        }
        *ring = Some(Ring { capacity: capacity.max(1), steps: VecDeque::new(), lost: 0, before });
        timeline.on.store(true, Ordering::Relaxed);
        Some(Self { shared: shared.clone(), finished: false })
    }

    /// Ends the recording.
    pub fn finish(mut self) -> RecordedSteps {
        let Ring { steps, lost, .. } = self.end().expect("its own until it is finished");
        RecordedSteps { epoch: self.shared.epoch, steps: steps.into(), lost }
    }

    /// Takes the ring, once: from then on it may be another recording's.
    fn end(&mut self) -> Option<Ring> {
        if std::mem::replace(&mut self.finished, true) {
            return None;
        }
        let timeline = &self.shared.timeline;
        let mut ring = timeline.ring.lock();
        timeline.on.store(false, Ordering::Relaxed);
        ring.take()
    }
}

impl Drop for StepRecording {
    fn drop(&mut self) {
        self.end();
    }
}
