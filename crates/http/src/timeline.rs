//! What the engines do in the next seconds, as a Chrome trace: a file for Perfetto or `chrome://tracing`.
//!
//! Each generation is a process, each step a slice in it, with curves of the queue and of the cache beneath. Nothing of
//! any request is in it.

use std::sync::Arc;
use std::time::Duration;

use baton_engine::{RecordedSteps, StepRecord, StepRecording};
use serde::Serialize;

use crate::error::ApiError;
use crate::generation::Generation;
use crate::generations::{Generations, Role};

/// Steps that are kept of each engine, the newest.
const MAX_STEPS: usize = 1 << 16;

/// Engines that are recorded until this is finished or dropped.
pub(crate) struct Timeline(Vec<(String, StepRecording)>);

impl Timeline {
    /// Begins to record the generations that requests can get.
    pub fn begin(generations: &Generations) -> Result<Self, ApiError> {
        let all = generations.all().generations;
        let live = all.iter().filter(|(role, _)| *role != Role::Retired);
        let taken = || ApiError::conflict("another timeline is being recorded; ask again when it has ended");
        let begin = |(role, generation): &(Role, Arc<Generation>)| {
            let recording = generation.engine.record_steps(MAX_STEPS).ok_or_else(taken)?;
            Ok((format!("{} {}", role.name(), generation.label()), recording))
        };
        live.map(begin).collect::<Result<_, _>>().map(Self)
    }

    /// Ends the recording; writing it down takes a moment for every ten thousand steps.
    pub fn finish(self) -> impl FnOnce() -> Vec<u8> {
        let recorded: Vec<_> = self.0.into_iter().map(|(name, recording)| (name, recording.finish())).collect();
        move || serde_json::to_vec(&Trace::new(&recorded)).expect("names and numbers")
    }
}

/// The file.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace<'a> {
    display_time_unit: &'static str,
    other_data: Other,
    trace_events: Vec<Event<'a>>,
}

#[derive(Serialize)]
struct Other {
    /// Earlier steps, for which there was no room.
    lost_steps: u64,
}

/// One entry. Times are in microseconds.
#[derive(Serialize)]
struct Event<'a> {
    name: &'static str,
    /// X: a slice; C: values of a curve from now on; M: a name.
    ph: &'static str,
    pid: usize,
    tid: usize,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    args: Args<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Args<'a> {
    Name { name: &'a str },
    Step { tokens: u64, generated: u64, preemptions: u64, failed: bool },
    Requests { running: usize, waiting: usize },
    Blocks { used: usize },
}

impl<'a> Trace<'a> {
    fn new(recorded: &'a [(String, RecordedSteps)]) -> Self {
        // Engines count from their own beginnings; the file has one axis.
        let origin = recorded.iter().map(|(_, recorded)| recorded.epoch).min();
        let events = |(pid, (name, recorded)): (usize, &'a (String, RecordedSteps))| {
            let later = origin.map_or(Duration::ZERO, |origin| recorded.epoch - origin);
            let entry = move |name, ph, ts, args| Event { name, ph, pid, tid: 1, ts, dur: None, args };
            let names = [
                entry("process_name", "M", 0.0, Args::Name { name }),
                entry("thread_name", "M", 0.0, Args::Name { name: "engine" }),
            ];
            let steps = recorded.steps.iter().flat_map(move |step| {
                let end = micros(later + step.end);
                [
                    Event {
                        dur: Some(micros(step.end - step.begin)),
                        ..entry("step", "X", micros(later + step.begin), Args::of(step))
                    },
                    entry("requests", "C", end, Args::Requests { running: step.running, waiting: step.waiting }),
                    entry("cache blocks", "C", end, Args::Blocks { used: step.used_blocks }),
                ]
            });
            names.into_iter().chain(steps)
        };
        Self {
            display_time_unit: "ms",
            other_data: Other { lost_steps: recorded.iter().map(|(_, recorded)| recorded.lost).sum() },
            trace_events: (1..).zip(recorded).flat_map(events).collect(),
        }
    }
}

impl Args<'_> {
    fn of(step: &StepRecord) -> Self {
        let StepRecord { tokens, generated, preemptions, failed, .. } = *step;
        Self::Step { tokens, generated, preemptions, failed }
    }
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}
