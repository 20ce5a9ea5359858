//! What the engine counts. A snapshot is consistent in itself: it is taken between two steps.

use std::collections::BTreeSet;
use std::time::Duration;

use baton_model::RunError;

use crate::{EngineFailure, SpeculationStats};

/// A snapshot of the engine. Counters start at zero with the engine and never fall; unless they say otherwise they
/// count foreground and background alike.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EngineStats {
    /// Whether the engine takes steps, or will again. False once it was shut down or gave up on its device.
    pub alive: bool,
    /// Whether another runner is being loaded in the place of one that failed; meanwhile requests wait.
    pub rebuilding: bool,
    /// Why the engine gave up, if it did.
    pub failure: Option<EngineFailure>,
    /// Gauge: foreground sequences that hold cache blocks and advance with every step.
    pub running: usize,
    /// Gauge: foreground sequences that wait for their first step or, preempted, for their next.
    pub waiting: usize,
    /// Gauge: background sequences, whether they hold blocks or wait.
    pub background: usize,
    /// Digests of the adapters of foreground sequences that run.
    pub running_adapters: BTreeSet<[u8; 32]>,
    /// Digests of the adapters of foreground sequences that wait.
    pub waiting_adapters: BTreeSet<[u8; 32]>,
    /// Gauges of the cache.
    pub blocks: BlockStats,
    /// Gauges of the blocks for the last tokens of sequences, of a model that reads such.
    pub passing_blocks: Option<BlockStats>,
    /// Counter: times a foreground sequence lost its blocks to one that goes before it.
    pub preemptions: u64,
    /// Counter: prompt tokens computed by steps, recomputation after a preemption included.
    pub prompt_tokens_computed: u64,
    /// Counter: prompt tokens looked up in the prefix cache, once per request.
    pub prefix_query_tokens: u64,
    /// Counter: prompt tokens found there, once per request.
    pub prefix_hit_tokens: u64,
    /// Counter: tokens generated, stop tokens included.
    pub generated_tokens: u64,
    /// Counters of drafts; `None` if there are none.
    pub speculation: Option<SpeculationStats>,
    /// Counters: requests that ended, by reason.
    pub finished: FinishedCounts,
    /// Counter: events that nobody received because the client had left.
    pub dropped_events: u64,
    /// Counter: steps that the runner failed as a whole.
    pub failed_steps: u64,
    /// Counters: failures of the device.
    pub device_failures: DeviceFailures,
    /// Counter: runners loaded in the place of one that failed.
    pub rebuilds: u64,
    /// Counter: steps done that were begun before the one before them had ended.
    pub steps_ahead: u64,
    /// Tokens computed per step; its count is the number of steps done.
    pub step_tokens: StepTokens,
    /// How long the last step took.
    pub last_step: Duration,
    /// How long the step under way has been running; `None` between steps. A hung device shows here.
    pub step_under_way: Option<Duration>,
}

/// Where the cache blocks are: `free + cached + used = total`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// All blocks.
    pub total: usize,
    /// Held by sequences, also by those of the background that pause; and those that a step under way writes for a sequence
    /// which has ended meanwhile.
    pub used: usize,
    /// Held by nobody, kept for a later request with the same prefix, given up when needed.
    pub cached: usize,
    /// Empty.
    pub free: usize,
}

impl BlockStats {
    /// The part of the cache that running sequences hold, 0 to 1.
    pub fn usage(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.used as f64 / self.total as f64 }
    }
}

/// Requests that ended, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FinishedCounts {
    /// With a stop token.
    pub stop: u64,
    /// At `max_tokens`.
    pub length: u64,
    /// By the client.
    pub aborted: u64,
    /// With an [`crate::EngineFailure`].
    pub error: u64,
    /// How many of `error` with [`crate::EngineFailure::NonFiniteLogits`].
    pub non_finite_logits: u64,
}

impl FinishedCounts {
    /// All requests that ended.
    pub fn total(&self) -> u64 {
        self.stop + self.length + self.aborted + self.error
    }
}

/// Failures of the device, by class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceFailures {
    /// [`RunError::Failed`].
    pub failed: u64,
    /// [`RunError::OutOfMemory`].
    pub out_of_memory: u64,
    /// [`RunError::Poisoned`].
    pub poisoned: u64,
    /// [`RunError::Lost`].
    pub lost: u64,
    /// [`EngineFailure::Hung`].
    pub hung: u64,
}

impl DeviceFailures {
    /// Counts a failure, if it is the device's.
    pub(crate) fn count(&mut self, failure: &EngineFailure) {
        let counter = match failure {
            EngineFailure::Device(RunError::Failed(_)) => &mut self.failed,
            EngineFailure::Device(RunError::OutOfMemory(_)) => &mut self.out_of_memory,
            EngineFailure::Device(RunError::Poisoned(_)) => &mut self.poisoned,
            EngineFailure::Device(RunError::Lost(_)) => &mut self.lost,
            EngineFailure::Hung(_) => &mut self.hung,
            _ => return,
        };
        *counter += 1;
    }
}

/// Histogram of the tokens computed per step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepTokens {
    /// `buckets[i]` counts steps of at most `2^i` tokens that no earlier bucket counts; the last
    /// counts those above [`StepTokens::MAX_BOUND`].
    pub buckets: [u64; 16],
    /// Tokens of all steps.
    pub sum: u64,
    /// Steps.
    pub count: u64,
}

impl StepTokens {
    /// The largest finite bucket bound.
    pub const MAX_BOUND: usize = 1 << 14;

    pub(crate) fn observe(&mut self, tokens: usize) {
        let bucket = tokens.max(1).next_power_of_two().trailing_zeros() as usize;
        self.buckets[bucket.min(self.buckets.len() - 1)] += 1;
        self.sum += tokens as u64;
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_falls_into_the_smallest_bucket_that_holds_it() {
        let mut histogram = StepTokens::default();
        for tokens in [1, 2, 3, 4, StepTokens::MAX_BOUND, StepTokens::MAX_BOUND + 1, 1 << 20] {
            histogram.observe(tokens);
        }
        assert_eq!(histogram.buckets[..3], [1, 1, 2]);
        assert_eq!(histogram.buckets[14..], [1, 2]);
        assert_eq!(histogram.count, 7);
    }
}
