//! Requests that the candidate answers unseen, to be compared with what the client got.
//!
//! A shadow never delays or fails its client's request: it runs on a task of its own, takes a seat or is skipped, and
//! all that the two share is a channel into which the client's side drops its result. The prompt is rendered and
//! encoded by the candidate's own text model; sampling parameters, seed included, are those that were resolved for the
//! client, and the end tokens the candidate's own. It runs to its end even if the client leaves, and ends at once when
//! the candidate is withdrawn. Tokens are compared and forgotten; no text is made of them.

use std::sync::Arc;
use std::time::Duration;

use baton_engine::{EngineFailure, FinishReason, OutputEvent, Request, SubmitError, Timings};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::generation::{Generation, InUse};
use crate::observed::{Latencies, ShadowStats};

/// Shadows at once, at most.
const SEATS: usize = 8;

/// The shadows of one candidate.
pub(crate) struct Shadows {
    seats: Arc<Semaphore>,
    stats: Mutex<ShadowStats>,
    withdrawn: CancellationToken,
}

impl Default for Shadows {
    fn default() -> Self {
        Self { seats: Arc::new(Semaphore::new(SEATS)), stats: Mutex::default(), withdrawn: CancellationToken::new() }
    }
}

impl Shadows {
    /// A place for one more, if there is one.
    pub fn seat(self: &Arc<Self>, candidate: &Arc<Generation>) -> Option<Shadow> {
        match self.seats.clone().try_acquire_owned() {
            Ok(seat) => Some(Shadow { candidate: InUse::new(candidate), shadows: self.clone(), _seat: seat }),
            Err(_) => {
                self.stats.lock().skipped += 1;
                None
            }
        }
    }

    /// Ends all of them.
    pub fn end(&self) {
        self.withdrawn.cancel();
    }

    /// What they have shown.
    pub fn stats(&self) -> ShadowStats {
        self.stats.lock().clone()
    }
}

/// A request that the candidate is to answer.
pub(crate) struct Shadow {
    candidate: InUse,
    shadows: Arc<Shadows>,
    _seat: OwnedSemaphorePermit,
}

/// Makes the candidate's prompt, perhaps slowly.
pub(crate) type Encode = Box<dyn FnOnce(&Generation) -> Result<Vec<u32>, ApiError> + Send>;

/// The first choice of a client's request, seen from its shadow.
pub(crate) struct Witness {
    tokens: Vec<u32>,
    shadow: oneshot::Sender<Output>,
}

/// What became of one side.
struct Output {
    tokens: Vec<u32>,
    /// A stop string ended it, which the engine knows nothing of.
    cut: bool,
    /// `None` if the engine has not ended it.
    timings: Option<Timings>,
}

/// Why the candidate gave no output.
enum Failure {
    /// It had no room for it.
    Skipped,
    NonFinite,
    Other,
}

impl Witness {
    /// The client's next token.
    pub fn token(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// The client's choice is complete. `cut`: by a stop string.
    pub fn finished(self, cut: bool, timings: Timings) {
        // If the shadow has failed, there is nothing to compare.
        let _ = self.shadow.send(Output { tokens: self.tokens, cut, timings: Some(timings) });
    }
}

impl Shadow {
    /// Who answers.
    pub fn candidate(&self) -> &Generation {
        &self.candidate
    }

    /// Begins. `request` is complete but for its prompt. If the witness is dropped, there is nothing to compare.
    pub fn start(self, encode: Encode, request: Request) -> Witness {
        let (shadow, client) = oneshot::channel();
        tokio::spawn(async move {
            let withdrawn = self.shadows.withdrawn.clone();
            tokio::select! {
                () = self.run(encode, request, client) => {}
                () = withdrawn.cancelled() => {}
            }
        });
        Witness { tokens: Vec::new(), shadow }
    }

    async fn run(&self, encode: Encode, request: Request, mut client: oneshot::Receiver<Output>) {
        let mut seen = None;
        let output = self.output(encode, request, &mut client, &mut seen).await;
        {
            let stats = &mut self.shadows.stats.lock();
            stats.started += u64::from(!matches!(output, Err(Failure::Skipped)));
            match output {
                Err(Failure::Skipped) => stats.skipped += 1,
                Err(Failure::NonFinite) => stats.non_finite += 1,
                _ => {}
            }
            stats.failed += u64::from(matches!(output, Err(Failure::NonFinite | Failure::Other)));
        }
        let Ok(output) = output else { return };
        let client = match seen {
            Some(seen) => seen,
            None => client.await,
        };
        let stats = &mut self.shadows.stats.lock();
        match client {
            Ok(client) => compare(stats, &client, &output),
            Err(_) => stats.uncompared += 1,
        }
    }

    /// The candidate's output, as far as it can be compared. `seen` is the client's, once it is there.
    async fn output(
        &self,
        encode: Encode,
        request: Request,
        client: &mut oneshot::Receiver<Output>,
        seen: &mut Option<Result<Output, oneshot::error::RecvError>>,
    ) -> Result<Output, Failure> {
        let candidate = Arc::clone(&self.candidate);
        // Not among the work on clients' text: that has its own bound, which this must not fill.
        let prompt = tokio::task::spawn_blocking(move || encode(&candidate)).await;
        let prompt = prompt.map_err(|_| Failure::Other)?.map_err(|_| Failure::Other)?;
        let mut stream = self.candidate.engine.submit(Request { prompt, ..request }).map_err(|error| match error {
            SubmitError::QueueFull { .. } | SubmitError::QueuedTokens { .. } => Failure::Skipped,
            _ => Failure::Other,
        })?;
        let mut tokens = Vec::new();
        loop {
            if matches!(seen, Some(Ok(client)) if client.cut && client.tokens.len() <= tokens.len()) {
                return Ok(Output { tokens, cut: false, timings: None });
            }
            let event = tokio::select! {
                event = stream.next() => event,
                output = &mut *client, if seen.is_none() => {
                    *seen = Some(output);
                    continue;
                }
            };
            let Some(event) = event else { return Err(Failure::Other) };
            if let OutputEvent::Token { token, .. } = event {
                tokens.push(token);
            }
            if let OutputEvent::Finished { reason, timings, .. } = event {
                return match reason {
                    FinishReason::Error(EngineFailure::NonFiniteLogits) => Err(Failure::NonFinite),
                    FinishReason::Error(EngineFailure::QueueTimeout | EngineFailure::DeadlineExceeded) => {
                        Err(Failure::Skipped)
                    }
                    FinishReason::Error(_) => Err(Failure::Other),
                    _ => Ok(Output { tokens, cut: false, timings: Some(timings) }),
                };
            }
        }
    }
}

/// Counts the tokens that agree, and times where both sides have them.
fn compare(stats: &mut ShadowStats, client: &Output, shadow: &Output) {
    // Behind a stop string the client has nothing to compare with.
    let end = if client.cut { shadow.tokens.len().min(client.tokens.len()) } else { shadow.tokens.len() };
    let (ours, theirs) = (&client.tokens, &shadow.tokens[..end]);
    let agreed = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    let longer = ours.len().max(theirs.len());
    stats.compared += 1;
    stats.equal += u64::from(agreed == longer);
    stats.compared_tokens += longer as u64;
    stats.agreed_tokens += agreed as u64;
    if let (Some(ours), Some(theirs)) = (&client.timings, &shadow.timings) {
        stats.serving_time_to_first_token.record(ours.queue + ours.prefill);
        stats.candidate_time_to_first_token.record(theirs.queue + theirs.prefill);
        let per_token = |latencies: &mut Latencies, decode: Duration, tokens: usize| {
            if tokens > 1 {
                latencies.record(decode.div_f64((tokens - 1) as f64));
            }
        };
        per_token(&mut stats.serving_time_per_output_token, ours.decode, client.tokens.len());
        per_token(&mut stats.candidate_time_per_output_token, theirs.decode, shadow.tokens.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(client: &[u32], cut: bool, shadow: &[u32]) -> (u64, u64, u64) {
        let mut stats = ShadowStats::default();
        let output = |tokens: &[u32], cut| Output { tokens: tokens.to_vec(), cut, timings: None };
        compare(&mut stats, &output(client, cut), &output(shadow, false));
        (stats.equal, stats.agreed_tokens, stats.compared_tokens)
    }

    #[test]
    fn outputs_agree_up_to_the_first_difference_or_the_stop_string() {
        assert_eq!(compared(&[1, 2, 3], false, &[1, 2, 3]), (1, 3, 3));
        assert_eq!(compared(&[1, 2, 3], false, &[1, 9, 3]), (0, 1, 3));
        assert_eq!(compared(&[1, 2], false, &[1, 2, 3]), (0, 2, 3), "it should have ended");
        assert_eq!(compared(&[1, 2], true, &[1, 2, 3]), (1, 2, 2));
        assert_eq!(compared(&[1, 2], true, &[1]), (0, 1, 2));
        assert_eq!(compared(&[], false, &[]), (1, 0, 0));
    }
}
