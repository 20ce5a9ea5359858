//! What one request adds to the metrics of its generation, and to what is known of it.
//!
//! Invariant: every choice that the engine has accepted is counted once as ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_engine::{EngineFailure, Timings};

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::generation::InUse;
use crate::limits::Taken;
use crate::summary::Asked;

/// How a choice ended, as the label `finished_reason` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Stop,
    Length,
    Abort,
    Error,
}

/// Measures one request, and holds its generation. A choice that has not ended when the meter is dropped was aborted.
pub(crate) struct Meter {
    generation: InUse,
    arrival: Instant,
    record: Arc<AccessRecord>,
    choices: Vec<MeteredChoice>,
    /// Of all prompts, each once.
    prompt_tokens: usize,
    /// Its key was charged for it.
    taken: Taken,
}

#[derive(Clone)]
struct MeteredChoice {
    prompt_tokens: usize,
    tokens: usize,
    last_token: Option<Instant>,
    ended: bool,
}

impl Meter {
    /// The engine was `given` all choices, `n` per prompt, so long after the arrival, and has accepted them.
    pub fn new(
        generation: InUse,
        (arrival, given): (Instant, Duration),
        (record, taken): (Arc<AccessRecord>, Taken),
        prompt_tokens: &[usize],
        n: usize,
        asked: Asked,
    ) -> Self {
        let all_tokens = prompt_tokens.iter().sum();
        record.prompt_tokens(all_tokens);
        record.submitted(given, Some(asked));
        generation.metrics.params_n.observe(f64::from(asked.n));
        if let Some(max_tokens) = asked.max_tokens {
            generation.metrics.params_max_tokens.observe(f64::from(max_tokens));
        }
        generation.stats.lock().requests += 1;
        let choices = |&prompt_tokens: &usize| {
            vec![MeteredChoice { prompt_tokens, tokens: 0, last_token: None, ended: false }; n]
        };
        let choices = prompt_tokens.iter().flat_map(choices).collect();
        Self { generation, arrival, record, choices, prompt_tokens: all_tokens, taken }
    }

    /// A choice has a token.
    pub fn token(&mut self, index: usize) {
        let (now, choice) = (Instant::now(), &mut self.choices[index]);
        match choice.last_token.replace(now) {
            Some(last) => self.generation.metrics.inter_token.observe((now - last).as_secs_f64()),
            None => {
                let ttft = now - self.arrival;
                self.generation.metrics.time_to_first_token.observe(ttft.as_secs_f64());
                self.generation.stats.lock().time_to_first_token.record(ttft);
                self.record.first_token(ttft);
            }
        }
        choice.tokens += 1;
    }

    /// A prompt had so many tokens in the prefix cache.
    pub fn cached(&self, tokens: usize) {
        self.record.cached_tokens(tokens);
    }

    /// How long all that waits will take to begin.
    pub fn queue_time(&self) -> Duration {
        self.generation.engine.room_in(None)
    }

    /// A choice is complete. `completion_tokens`: what the client is told.
    pub fn finished(&mut self, index: usize, ending: Ending, completion_tokens: usize, timings: &Timings) {
        let metrics = &self.generation.metrics;
        self.choices[index].tokens = completion_tokens;
        self.record.timings(timings);
        metrics.queue.observe(timings.queue.as_secs_f64());
        metrics.prefill.observe(timings.prefill.as_secs_f64());
        metrics.decode.observe(timings.decode.as_secs_f64());
        metrics.inference.observe((timings.prefill + timings.decode).as_secs_f64());
        if completion_tokens > 1 {
            let intervals = u32::try_from(completion_tokens - 1).unwrap_or(u32::MAX);
            let per_token = timings.decode / intervals;
            metrics.per_output_token.observe(per_token.as_secs_f64());
            self.generation.stats.lock().time_per_output_token.record(per_token);
        }
        self.end(index, ending);
    }

    /// A choice has failed.
    pub fn failed(&mut self, index: usize, failure: &EngineFailure, timings: &Timings) {
        self.record.timings(timings);
        if *failure == EngineFailure::NonFiniteLogits {
            self.generation.metrics.corrupted.inc();
            self.generation.stats.lock().non_finite += 1;
        }
        self.end(index, Ending::Error);
    }

    /// The request as a whole ends with this error.
    pub fn error(&self, error: &ApiError) {
        self.record.error(error.code());
        self.record.refused(error);
        self.generation.stats.lock().errors += u64::from(error.is_breakdown());
    }

    fn end(&mut self, index: usize, ending: Ending) {
        let choice = &mut self.choices[index];
        choice.ended = true;
        let reason = match ending {
            Ending::Stop => "stop",
            Ending::Length => "length",
            Ending::Abort => "abort",
            Ending::Error => "error",
        };
        self.record.ended(reason, choice.tokens);
        let metrics = &self.generation.metrics;
        metrics.success.with_label_values(&[reason]).inc();
        metrics.e2e.observe(self.arrival.elapsed().as_secs_f64());
        metrics.prompt_tokens.observe(choice.prompt_tokens as f64);
        metrics.generation_tokens.observe(choice.tokens as f64);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        for index in 0..self.choices.len() {
            if !self.choices[index].ended {
                self.end(index, Ending::Abort);
            }
        }
        self.taken.used(self.prompt_tokens + self.choices.iter().map(|choice| choice.tokens).sum::<usize>());
        let longest = self.choices.iter().map(|choice| choice.tokens).max().unwrap_or_default();
        self.generation.metrics.longest.observe(longest as f64);
    }
}
