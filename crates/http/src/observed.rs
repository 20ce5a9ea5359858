//! What a rollout is judged by: counts and times of the two generations since the candidate was staged.
//!
//! Counters only grow, and hold nothing of any request.

use std::time::Duration;

/// Upper bound of the first bucket; each further bound is higher by the fourth root of two.
const FIRST_SECONDS: f64 = 1e-4;
const PER_OCTAVE: f64 = 4.0;
/// So the last one begins at 1.5 minutes.
const BUCKETS: usize = 80;

/// Times, as a histogram whose buckets grow by 19 %: a median from it is off by at most 10 %.
#[derive(Debug, Clone, PartialEq)]
pub struct Latencies {
    buckets: [u64; BUCKETS],
    count: u64,
    sum: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], count: 0, sum: Duration::ZERO }
    }
}

impl Latencies {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean; `None` if there are none.
    pub fn mean(&self) -> Option<Duration> {
        (self.count > 0).then(|| self.sum.div_f64(self.count as f64))
    }

    /// Their median, from the middle of its bucket; `None` if there are none.
    pub fn median(&self) -> Option<Duration> {
        let mut left = self.count.checked_sub(1)? / 2;
        let bucket = self.buckets.iter().position(|&count| {
            let here = left < count;
            left = left.saturating_sub(count);
            here
        })?;
        Some(Duration::from_secs_f64(FIRST_SECONDS * ((bucket as f64 - 0.5) / PER_OCTAVE).exp2()))
    }

    pub(crate) fn record(&mut self, time: Duration) {
        let octaves = (time.as_secs_f64() / FIRST_SECONDS).log2().max(0.0);
        self.buckets[((octaves * PER_OCTAVE).ceil() as usize).min(BUCKETS - 1)] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(time);
    }
}

/// One generation, from its clients' side.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationStats {
    /// Inference requests that its engine took, or could not take because it is down.
    pub requests: u64,
    /// Those that failed by its own fault: statuses 500 and `engine_down`, but neither overload nor drain.
    pub errors: u64,
    /// Choices that failed on values that are not finite.
    pub non_finite: u64,
    /// From the arrival of a request to the first token of a choice.
    pub time_to_first_token: Latencies,
    /// Mean time per token after the first, per choice.
    pub time_per_output_token: Latencies,
}

/// Requests of the serving generation that the candidate answered as well, unseen. Of each only the first choice of
/// the first prompt is compared.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ShadowStats {
    /// Requests that the candidate was given.
    pub started: u64,
    /// Requests that it was spared: too many at once, or its queue was full.
    pub skipped: u64,
    /// Those that it failed: the template, a limit or the engine.
    pub failed: u64,
    /// Those of them that failed on values that are not finite.
    pub non_finite: u64,
    /// Those that could not be compared, because the client left or its own request failed.
    pub uncompared: u64,
    /// Those that were compared.
    pub compared: u64,
    /// Those whose tokens were all equal.
    pub equal: u64,
    /// Tokens of what was compared; of each pair the longer.
    pub compared_tokens: u64,
    /// Tokens before the first difference.
    pub agreed_tokens: u64,
    /// Of what was compared, by the clock of the serving engine.
    pub serving_time_to_first_token: Latencies,
    /// Of the same requests, by the clock of the candidate's engine.
    pub candidate_time_to_first_token: Latencies,
    /// As above, per token after the first.
    pub serving_time_per_output_token: Latencies,
    /// As above, per token after the first.
    pub candidate_time_per_output_token: Latencies,
}

/// Everything since a candidate was last staged.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// The generation that serves.
    pub serving: GenerationStats,
    /// The one that may take over.
    pub candidate: Option<GenerationStats>,
    /// What it answered unseen.
    pub shadow: ShadowStats,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_off_by_at_most_a_tenth() {
        for micros in [90, 150, 1_000, 12_345, 777_777, 50_000_000] {
            let mut latencies = Latencies::default();
            let time = Duration::from_micros(micros);
            for other in [time / 50, time, time, time * 50, time] {
                latencies.record(other);
            }
            let ratio = latencies.median().unwrap().as_secs_f64() / time.as_secs_f64();
            assert!((0.9..=1.1).contains(&ratio), "{micros}: {ratio}");
        }
    }

    #[test]
    fn nothing_has_no_median_and_extremes_have_a_bucket() {
        let mut latencies = Latencies::default();
        assert_eq!((latencies.mean(), latencies.median()), (None, None));
        for time in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX / 4] {
            latencies.record(time);
        }
        assert_eq!(latencies.count(), 3);
        assert!(latencies.median().unwrap() <= Duration::from_micros(100));
    }
}
