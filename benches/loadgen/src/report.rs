//! What a run of calls amounts to. Names follow `vllm bench serve` where it has the figure.

use std::time::Duration;

use serde::Serialize;

use crate::Reply;

/// Mean and quantiles of a sample, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantiles {
    /// Arithmetic mean.
    pub mean_ms: f64,
    /// Median.
    pub p50_ms: f64,
    /// 95th percentile (nearest rank).
    pub p95_ms: f64,
    /// 99th percentile (nearest rank).
    pub p99_ms: f64,
}

impl Quantiles {
    /// Of `sample`; zeros if it is empty.
    pub fn of(sample: impl IntoIterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = sample.into_iter().map(|d| d.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let rank = |p: f64| {
            let index = (p * ms.len() as f64).ceil() as usize;
            ms.get(index.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        let mean_ms = if ms.is_empty() { 0.0 } else { ms.iter().sum::<f64>() / ms.len() as f64 };
        Self { mean_ms, p50_ms: rank(0.5), p95_ms: rank(0.95), p99_ms: rank(0.99) }
    }
}

/// Figures of one run, with its replies.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Calls in flight at most.
    pub concurrency: usize,
    /// Calls that ended well.
    pub completed: usize,
    /// Calls that did not, by message.
    pub errors: Vec<String>,
    /// Wall time of the whole run.
    pub duration_s: f64,
    /// Prompt tokens of the calls that ended well.
    pub total_input_tokens: u64,
    /// Generated tokens of the calls that ended well.
    pub total_output_tokens: u64,
    /// Generated tokens over wall time.
    pub output_throughput: f64,
    /// Calls over wall time.
    pub request_throughput: f64,
    /// Time to first token.
    pub ttft: Quantiles,
    /// Inter-token latency: gaps between chunks.
    pub itl: Quantiles,
    /// Whole calls.
    pub e2el: Quantiles,
    /// One per call that ended well, in order of the calls.
    #[serde(skip)]
    pub replies: Vec<Reply>,
}

impl Report {
    pub(crate) fn new(concurrency: usize, wall: Duration, results: Vec<anyhow::Result<Reply>>) -> Self {
        let mut errors = Vec::new();
        let mut replies = Vec::new();
        for result in results {
            match result {
                Ok(reply) => replies.push(reply),
                Err(error) => errors.push(format!("{error:#}")),
            }
        }
        let output: u64 = replies.iter().map(|r| r.output_tokens).sum();
        let seconds = wall.as_secs_f64();
        Self {
            concurrency,
            completed: replies.len(),
            errors,
            duration_s: seconds,
            total_input_tokens: replies.iter().map(|r| r.prompt_tokens).sum(),
            total_output_tokens: output,
            output_throughput: output as f64 / seconds,
            request_throughput: replies.len() as f64 / seconds,
            ttft: Quantiles::of(replies.iter().map(|r| r.first_token)),
            itl: Quantiles::of(replies.iter().flat_map(|r| r.gaps.iter().copied())),
            e2el: Quantiles::of(replies.iter().map(|r| r.total)),
            replies,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let q = Quantiles::of((1..=100).rev().map(Duration::from_millis));
        assert_eq!((q.p50_ms, q.p95_ms, q.p99_ms), (50.0, 95.0, 99.0));
        assert!((q.mean_ms - 50.5).abs() < 1e-9);
        assert_eq!(Quantiles::of([]).p99_ms, 0.0);
    }
}
