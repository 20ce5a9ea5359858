//! What a run of calls amounts to. Figures, names and JSON fields are those of `vllm bench serve`; what it lacks has
//! a name of its own.

use std::{collections::BTreeMap, time::Duration};

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::{Call, Reply, Run};

/// Mean, deviation and percentiles of a sample, in milliseconds; zeros if it is empty.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Quantiles {
    /// Arithmetic mean.
    pub mean_ms: f64,
    /// Median.
    pub median_ms: f64,
    /// Standard deviation of the sample as a whole population.
    pub std_ms: f64,
    /// 90th percentile.
    pub p90_ms: f64,
    /// 95th percentile.
    pub p95_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
}

impl Quantiles {
    /// Of `sample`.
    pub fn of(sample: impl IntoIterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = sample.into_iter().map(|d| d.as_secs_f64() * 1e3).collect();
        if ms.is_empty() {
            return Self::default();
        }
        ms.sort_by(f64::total_cmp);
        let n = ms.len() as f64;
        let mean_ms = ms.iter().sum::<f64>() / n;
        Self {
            mean_ms,
            median_ms: percentile(&ms, 50.0),
            std_ms: (ms.iter().map(|x| (x - mean_ms).powi(2)).sum::<f64>() / n).sqrt(),
            p90_ms: percentile(&ms, 90.0),
            p95_ms: percentile(&ms, 95.0),
            p99_ms: percentile(&ms, 99.0),
        }
    }

    /// Each figure and its name in `vllm bench serve`, as `mean` of `mean_ttft_ms`.
    pub fn named(&self) -> [(&'static str, f64); 6] {
        [
            ("mean", self.mean_ms),
            ("median", self.median_ms),
            ("std", self.std_ms),
            ("p90", self.p90_ms),
            ("p95", self.p95_ms),
            ("p99", self.p99_ms),
        ]
    }
}

/// The middle one of some values, or the mean of both.
///
/// # Panics
/// If there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    percentile(&sorted, 50.0)
}

/// As `numpy.percentile`: linear between the two nearest ranks.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let rank = p / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    // Rounding must not carry it past the higher one.
    (below + (above - below) * rank.fract()).min(above)
}

/// Limits that a call must keep to be good; none that is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Objectives {
    /// On time to first token.
    pub ttft: Option<Duration>,
    /// On time per output token.
    pub tpot: Option<Duration>,
    /// On the whole call.
    pub e2el: Option<Duration>,
}

impl Objectives {
    fn any(&self) -> bool {
        self.ttft.or(self.tpot).or(self.e2el).is_some()
    }

    fn kept_by(&self, reply: &Reply) -> bool {
        let keeps = |value: Duration, limit: Option<Duration>| limit.is_none_or(|limit| value <= limit);
        keeps(reply.first_token, self.ttft)
            && keeps(reply.per_output_token().unwrap_or_default(), self.tpot)
            && keeps(reply.total, self.e2el)
    }
}

/// Figures of one run, with its replies.
#[derive(Debug)]
pub struct Report {
    /// Calls in flight at most.
    pub max_concurrency: Option<usize>,
    /// Wall time of the whole run.
    pub duration: Duration,
    /// Calls that ended well.
    pub completed: usize,
    /// Calls that did not, by message.
    pub errors: Vec<String>,
    /// How many of each kind of [`crate::CallError`].
    pub error_kinds: BTreeMap<String, usize>,
    /// Calls that had not ended when the run was stopped.
    pub unfinished: usize,
    /// Prompt tokens of the calls that ended well.
    pub total_input_tokens: u64,
    /// Generated tokens of the calls that ended well.
    pub total_output_tokens: u64,
    /// Where the server gave its usage: tokens are its count. Elsewhere those of the prompt are what was asked for, and
    /// those generated the number of chunks.
    pub replies_with_usage: usize,
    /// Calls per second of wall time.
    pub request_throughput: f64,
    /// Calls that kept the objectives, per second; absent without objectives.
    pub request_goodput: Option<f64>,
    /// Generated tokens per second of wall time.
    pub output_throughput: f64,
    /// Prompt and generated tokens per second of wall time.
    pub total_token_throughput: f64,
    /// Most chunks that came within one second.
    pub max_output_tokens_per_s: u64,
    /// Most calls in flight at once, of those that ended well.
    pub max_concurrent_requests: usize,
    /// Time to first token.
    pub ttft: Quantiles,
    /// Time per output token after the first, one figure per call.
    pub tpot: Quantiles,
    /// Inter-token latency: gaps between chunks.
    pub itl: Quantiles,
    /// Whole calls.
    pub e2el: Quantiles,
    /// From arrival to sending, which the latencies leave out; absent in a closed loop,
    /// where it says nothing, and without a limit.
    pub client_queue_time: Option<Quantiles>,
    /// One per call that ended well, in order of the calls.
    pub replies: Vec<Reply>,
}

impl Report {
    /// Of a run that was sent with `max_concurrency`.
    pub fn new(run: Run, max_concurrency: Option<usize>, objectives: Objectives) -> Self {
        let (max_output_tokens_per_s, max_concurrent_requests) = peaks(&run.calls);
        let open_loop = run.calls.iter().any(|c| c.at > Duration::ZERO);
        let client_queue_time = (open_loop && max_concurrency.is_some()).then(|| {
            let good = run.calls.iter().filter(|c| c.result.is_ok());
            Quantiles::of(good.map(|c| c.sent.saturating_sub(c.at)))
        });
        let mut errors = Vec::new();
        let mut error_kinds = BTreeMap::new();
        let mut replies = Vec::new();
        let mut input = 0;
        for Call { prompt_len, result, .. } in run.calls {
            match result {
                Ok(reply) => {
                    input += if reply.usage { reply.prompt_tokens } else { prompt_len };
                    replies.push(reply);
                }
                Err(error) => {
                    *error_kinds.entry(error.kind()).or_insert(0) += 1;
                    errors.push(error.to_string());
                }
            }
        }
        let output: u64 = replies.iter().map(|r| r.output_tokens).sum();
        let per_second = |n: u64| n as f64 / run.duration.as_secs_f64();
        let good = replies.iter().filter(|r| objectives.kept_by(r)).count() as u64;
        Self {
            max_concurrency,
            duration: run.duration,
            completed: replies.len(),
            errors,
            error_kinds,
            unfinished: run.unfinished,
            total_input_tokens: input,
            total_output_tokens: output,
            replies_with_usage: replies.iter().filter(|r| r.usage).count(),
            request_throughput: per_second(replies.len() as u64),
            request_goodput: objectives.any().then(|| per_second(good)),
            output_throughput: per_second(output),
            total_token_throughput: per_second(input + output),
            max_output_tokens_per_s,
            max_concurrent_requests,
            ttft: Quantiles::of(replies.iter().map(|r| r.first_token)),
            tpot: Quantiles::of(replies.iter().filter_map(Reply::per_output_token)),
            itl: Quantiles::of(replies.iter().flat_map(|r| r.gaps.iter().copied())),
            e2el: Quantiles::of(replies.iter().map(|r| r.total)),
            client_queue_time,
            replies,
        }
    }

    /// Calls that the run was to make.
    pub fn planned(&self) -> usize {
        self.completed + self.errors.len() + self.unfinished
    }

    /// What the generated tokens were counted by.
    pub fn tokens_from(&self) -> &'static str {
        match self.replies_with_usage {
            n if n == self.completed => "usage",
            0 => "chunks",
            _ => "usage, or chunks where there is none",
        }
    }

    /// The latencies: name in fields, name in print, title, figures.
    pub fn latencies(&self) -> Vec<(&'static str, &'static str, &'static str, &Quantiles)> {
        let mut latencies = vec![
            ("ttft", "TTFT", "Time to First Token", &self.ttft),
            ("tpot", "TPOT", "Time per Output Token (excl. 1st token)", &self.tpot),
            ("itl", "ITL", "Inter-token Latency", &self.itl),
            ("e2el", "E2EL", "End-to-end Latency", &self.e2el),
        ];
        let queue = self.client_queue_time.as_ref();
        latencies.extend(queue.map(|q| ("client_queue_time", "Client Queue Time", "Client-side Queueing", q)));
        latencies
    }

    /// The figures by their names in `vllm bench serve`.
    pub fn json(&self) -> Map<String, Value> {
        let figures = json!({
            "max_concurrency": self.max_concurrency,
            "duration": self.duration.as_secs_f64(),
            "completed": self.completed,
            "failed": self.errors.len(),
            "unfinished": self.unfinished,
            "error_kinds": self.error_kinds,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "tokens_from": self.tokens_from(),
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "max_output_tokens_per_s": self.max_output_tokens_per_s as f64,
            "max_concurrent_requests": self.max_concurrent_requests,
        });
        let Value::Object(mut figures) = figures else { unreachable!("written above as an object") };
        for (latency, _, _, quantiles) in self.latencies() {
            for (figure, ms) in quantiles.named() {
                figures.insert(format!("{figure}_{latency}_ms"), json!(ms));
            }
        }
        figures
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.json().serialize(serializer)
    }
}

/// Most chunks within one second, counted from the first sending, and most calls in flight; of the calls that ended well.
fn peaks(calls: &[Call]) -> (u64, usize) {
    let good = || calls.iter().filter_map(|c| Some((c.sent, c.result.as_ref().ok()?)));
    let start = good().map(|(sent, _)| sent).min().unwrap_or_default();
    let mut chunks: BTreeMap<u64, u64> = BTreeMap::new();
    let mut events = Vec::new();
    for (sent, reply) in good() {
        let mut at = sent - start + reply.first_token;
        *chunks.entry(at.as_secs()).or_default() += 1;
        for gap in &reply.gaps {
            at += *gap;
            *chunks.entry(at.as_secs()).or_default() += 1;
        }
        events.extend([(sent, 1), (sent + reply.total, -1)]);
    }
    // An end sorts before a start at the same time.
    events.sort_unstable();
    let in_flight = events.iter().scan(0i64, |n, (_, change)| {
        *n += change;
        Some(*n)
    });
    (chunks.into_values().max().unwrap_or(0), in_flight.max().unwrap_or(0) as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::CallError;

    #[test]
    fn percentiles_are_those_of_numpy() {
        let q = Quantiles::of((1..=5).rev().map(Duration::from_millis));
        // numpy.percentile([1, 2, 3, 4, 5], [50, 90, 95, 99]), numpy.std.
        for (got, expected) in q.named().map(|f| f.1).into_iter().zip([3.0, 3.0, 2f64.sqrt(), 4.6, 4.8, 4.96]) {
            assert!((got - expected).abs() < 1e-9, "{q:?}");
        }
        assert_eq!(Quantiles::of([]), Quantiles::default());
    }

    proptest! {
        #[test]
        fn percentiles_rise_and_stay_within_the_sample(sample in prop::collection::vec(0u64..1_000_000, 1..100)) {
            let q = Quantiles::of(sample.iter().map(|&us| Duration::from_micros(us)));
            let ms = |us: Option<&u64>| *us.unwrap() as f64 / 1e3;
            let order = [ms(sample.iter().min()), q.median_ms, q.p90_ms, q.p95_ms, q.p99_ms, ms(sample.iter().max())];
            prop_assert!(order.windows(2).all(|w| w[0] <= w[1] + 1e-9), "{:?}", order);
            prop_assert!(order[0] <= q.mean_ms + 1e-9 && q.mean_ms <= order[5] + 1e-9);
        }
    }

    fn call(sent: u64, ttft: u64, gaps: &[u64], output_tokens: u64) -> Call {
        let gaps: Vec<_> = gaps.iter().map(|&ms| Duration::from_millis(ms)).collect();
        let first_token = Duration::from_millis(ttft);
        let total = first_token + gaps.iter().sum::<Duration>();
        let reply =
            Reply { usage: true, prompt_tokens: 7, output_tokens, first_token, gaps, total, ..Reply::default() };
        let sent = Duration::from_millis(sent);
        Call { at: sent / 2, sent, prompt_len: 9, result: Ok(reply) }
    }

    #[test]
    fn a_run_gives_the_figures_that_its_calls_add_up_to() {
        let failed = Call {
            at: Duration::ZERO,
            sent: Duration::ZERO,
            prompt_len: 9,
            result: Err(CallError::Cut(String::new())),
        };
        let mut uncounted = call(2000, 300, &[], 1);
        uncounted.result.as_mut().unwrap().usage = false;
        let calls = vec![call(0, 100, &[50, 50], 5), failed, call(150, 40, &[10], 2), uncounted];
        let run = Run { calls, unfinished: 3, duration: Duration::from_secs(4) };
        let objectives =
            Objectives { ttft: Some(Duration::from_millis(200)), tpot: Some(Duration::from_millis(20)), e2el: None };
        let report = Report::new(run, Some(2), objectives);
        assert_eq!((report.completed, report.errors.len(), report.unfinished), (3, 1, 3));
        assert_eq!(report.error_kinds, BTreeMap::from([("stream cut".into(), 1)]));
        assert_eq!((report.total_input_tokens, report.total_output_tokens), (7 + 7 + 9, 5 + 2 + 1));
        assert_eq!((report.output_throughput, report.total_token_throughput), (2.0, 31.0 / 4.0));
        // The first keeps only the limit on TTFT (25 ms per token), the second both, the last only that on TPOT.
        assert_eq!(report.request_goodput, Some(0.25));
        assert_eq!((report.max_output_tokens_per_s, report.max_concurrent_requests), (5, 2));
        assert_eq!(report.tpot.median_ms, 17.5);
        // Half of 0, 150 and 2000 ms.
        assert_eq!(report.client_queue_time.unwrap().median_ms, 75.0);
        assert_eq!(report.tokens_from(), "usage, or chunks where there is none");
    }
}
