//! The outputs of all choices of one request, merged in the order in which they come.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use baton_engine::{EngineFailure, FinishReason, OutputEvent, OutputStream, Timings};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::error::{ApiError, Refusal};
use crate::generate::choice::{ChoiceText, Delta, Tokens};
use crate::generate::prompt::Told;
use crate::metrics::{Ending, Meter};
use crate::openai::shared::{Finish, Piece, Usage};
use crate::shadow::Witness;

/// What happens to the choices. Each choice yields any number of `Text` and then one `Finish`.
#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    /// A choice has more text.
    Text { index: usize, delta: Delta },
    /// A choice is complete; `matched`: which stop string ended it. `tokens`: those that showed no text.
    Finish { index: usize, reason: Finish, matched: Option<usize>, tokens: Tokens },
}

impl Event {
    /// What is written of it.
    pub fn piece(&self) -> Piece<'_> {
        match self {
            Self::Text { index, delta } => {
                Piece::Text { index: *index, segment: &delta.segment, tokens: &delta.tokens }
            }
            Self::Finish { index, reason, matched, tokens } => {
                Piece::Finish { index: *index, reason: *reason, matched: *matched, tokens }
            }
        }
    }
}

/// All choices of one request. Ends after every choice has finished, or with the first error, which ends all.
pub(crate) struct Choices {
    choices: Vec<Choice>,
    unfinished: usize,
    /// The choice that is asked first, so that a fast one cannot starve the others.
    turn: usize,
    events: VecDeque<Event>,
    /// Of the prompts, and of the choices that have finished.
    usage: Usage,
    prompts: Vec<Told>,
    /// Choices per prompt: those of one prompt stand together.
    n: usize,
    /// How many of them the client is told.
    told: usize,
    /// Nothing is to be generated, the engine only computes the prompts.
    prompts_only: bool,
    /// The drain is over.
    killed: Pin<Box<WaitForCancellationFutureOwned>>,
    meter: Meter,
    /// Tells the request's shadow of the first choice.
    witness: Option<Witness>,
}

struct Choice {
    stream: OutputStream,
    text: ChoiceText,
    /// Whether the prompt, if it is wanted before the output, is out.
    echoed: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// It ends for a reason that the engine does not know, such as a stop string or the only call that is wanted: the
    /// engine has been told, its last event is awaited.
    Ending(Finish),
    Finished,
}

impl Choices {
    /// The choices are equally many per prompt, in order.
    pub fn new(
        choices: Vec<(OutputStream, ChoiceText)>,
        prompts: Vec<Told>,
        kill_switch: CancellationToken,
        meter: Meter,
        witness: Option<Witness>,
    ) -> Self {
        let choice = |(stream, text)| Choice { stream, text, echoed: false, state: State::Running };
        let choices: Vec<_> = choices.into_iter().map(choice).collect();
        let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
        let n = choices.len() / prompts.len();
        Self {
            unfinished: choices.len(),
            n,
            told: n,
            choices,
            turn: 0,
            events: VecDeque::new(),
            usage: Usage { prompt_tokens, ..Usage::default() },
            prompts,
            prompts_only: false,
            killed: Box::pin(kill_switch.cancelled_owned()),
            meter,
            witness,
        }
    }

    /// Tells no more than so many choices of each prompt.
    pub fn told(self, told: usize) -> Self {
        Self { told, ..self }
    }

    /// Generates nothing.
    pub fn prompts_only(self, prompts_only: bool) -> Self {
        Self { prompts_only, ..self }
    }

    /// Number of choices.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// The prompt of a choice.
    pub fn prompt(&self, index: usize) -> &Told {
        &self.prompts[index / self.n]
    }

    /// The prompts, once all choices have finished.
    pub fn take_prompts(&mut self) -> Vec<Arc<Told>> {
        std::mem::take(&mut self.prompts).into_iter().map(Arc::new).collect()
    }

    /// The numbers of the choices that are told, in order: of each prompt so many as are wanted, the likeliest by their
    /// mean log-probability.
    pub fn best(&self) -> Vec<usize> {
        let mut best = Vec::with_capacity(self.choices.len());
        for first in (0..self.choices.len()).step_by(self.n) {
            let mut indices: Vec<usize> = (first..first + self.n).collect();
            if self.told < self.n {
                let mean = |index: usize| self.choices[index].text.mean_logprob();
                // Stable: of equals the earlier.
                indices.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)));
            }
            best.extend(indices.into_iter().take(self.told));
        }
        best
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        let mut usage = self.usage;
        for choice in self.choices.iter().filter(|choice| choice.state != State::Finished) {
            let (tokens, reasoning_tokens) = choice.text.tokens();
            usage.completion_tokens += tokens;
            usage.reasoning_tokens += reasoning_tokens;
        }
        usage
    }

    /// The next event; `None` once all choices have finished.
    pub async fn next(&mut self) -> Option<Result<Event, ApiError>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`next`](Self::next).
    pub fn poll_next(&mut self, cx: &mut Context) -> Poll<Option<Result<Event, ApiError>>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if self.unfinished == 0 {
                return Poll::Ready(None);
            }
            if self.killed.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Some(Err(self.fail(ApiError::draining()))));
            }
            let (index, event) = ready!(self.poll_choices(cx));
            if let Err(error) = self.take(index, event) {
                return Poll::Ready(Some(Err(self.fail(error))));
            }
        }
    }

    fn poll_choices(&mut self, cx: &mut Context) -> Poll<(usize, Option<OutputEvent>)> {
        let count = self.choices.len();
        for index in (self.turn..count).chain(0..self.turn) {
            // What is told of a prompt comes with its first choice; the others wait for it.
            let waits = !index.is_multiple_of(self.n) && !self.prompt(index).complete();
            let choice = &mut self.choices[index];
            if choice.state == State::Finished || waits {
                continue;
            }
            // `next` is cancel-safe, so it can be begun anew at every poll.
            if let Poll::Ready(event) = pin!(choice.stream.next()).poll(cx) {
                self.turn = (index + 1) % count;
                return Poll::Ready((index, event));
            }
        }
        Poll::Pending
    }

    fn take(&mut self, index: usize, event: Option<OutputEvent>) -> Result<(), ApiError> {
        if let Some(OutputEvent::PromptScores(positions)) = event {
            self.prompts[index / self.n].extend(positions);
            return Ok(());
        }
        if matches!(event, Some(OutputEvent::Token { .. })) {
            self.echo(index);
        }
        let choice = &mut self.choices[index];
        match event {
            Some(OutputEvent::Token { .. }) if self.prompts_only && choice.state == State::Running => {
                choice.state = State::Ending(Finish::Length);
                choice.stream.abort();
            }
            Some(OutputEvent::Token { token, logprob, top }) if choice.state == State::Running => {
                self.meter.token(index);
                if let (0, Some(witness)) = (index, &mut self.witness) {
                    witness.token(token);
                }
                let (deltas, stopped) = choice.text.push(token, logprob, top);
                self.events.extend(deltas.into_iter().map(|delta| Event::Text { index, delta }));
                if stopped {
                    choice.state = State::Ending(Finish::Stop);
                    choice.stream.abort();
                }
            }
            // What the engine generated before it heard of the end.
            Some(OutputEvent::Token { .. } | OutputEvent::PromptScores(_)) => {}
            Some(OutputEvent::Finished { reason, usage, timings }) => {
                let told = match (choice.state, reason) {
                    (State::Ending(reason), _) => (choice.text.reason(reason), choice.text.tokens().0),
                    (_, FinishReason::Error(failure)) => return Err(self.failed(index, failure, &timings)),
                    (_, FinishReason::Aborted) => {
                        return Err(self.failed(index, EngineFailure::ShuttingDown, &timings));
                    }
                    _ if self.prompts_only => (Finish::Length, 0),
                    (_, FinishReason::Stop { token }) => {
                        (self.finish(index, Some(token), Finish::Stop), usage.completion_tokens)
                    }
                    (_, FinishReason::Length) => (self.finish(index, None, Finish::Length), usage.completion_tokens),
                };
                let (reason, completion_tokens) = told;
                self.echo(index);
                let choice = &mut self.choices[index];
                if index == 0
                    && let Some(witness) = self.witness.take()
                {
                    witness.finished(matches!(choice.state, State::Ending(_)), timings);
                }
                choice.state = State::Finished;
                self.unfinished -= 1;
                self.usage.completion_tokens += completion_tokens;
                self.usage.reasoning_tokens += choice.text.tokens().1;
                if index.is_multiple_of(self.n) {
                    self.usage.cached_tokens += usage.cached_tokens;
                    self.meter.cached(usage.cached_tokens);
                }
                self.meter.finished(index, reason.into(), completion_tokens, &timings);
                let (matched, tokens) = (choice.text.matched(), choice.text.remaining_tokens());
                self.events.push_back(Event::Finish { index, reason, matched, tokens });
            }
            None => return Err(ApiError::engine_down()),
        }
        Ok(())
    }

    /// The prompt's text, before the first of a choice.
    fn echo(&mut self, index: usize) {
        let (choice, prompt) = (&mut self.choices[index], &self.prompts[index / self.n]);
        if !std::mem::replace(&mut choice.echoed, true)
            && let Some((text, scores)) = prompt.echo()
        {
            let delta = choice.text.echo(text, scores);
            self.events.push_back(Event::Text { index, delta });
        }
    }

    /// The engine has ended a choice: what its text still holds.
    fn finish(&mut self, index: usize, stop_token: Option<u32>, reason: Finish) -> Finish {
        self.echo(index);
        let (choice, prompt) = (&mut self.choices[index], &self.prompts[index / self.n]);
        let none_before = choice.text.tokens().0 == 0;
        let stop_token = stop_token.map(|token| (token, prompt.first_stop(token).filter(|_| none_before)));
        let (deltas, stopped) = choice.text.finish(stop_token);
        self.events.extend(deltas.into_iter().map(|delta| Event::Text { index, delta }));
        self.choices[index].text.reason(if stopped { Finish::Stop } else { reason })
    }

    fn failed(&mut self, index: usize, failure: EngineFailure, timings: &Timings) -> ApiError {
        self.choices[index].state = State::Finished;
        self.meter.failed(index, &failure, timings);
        engine_failure(&failure, || self.meter.queue_time())
    }

    /// Ends all choices; the streams, dropped, abort what still runs.
    fn fail(&mut self, error: ApiError) -> ApiError {
        self.meter.error(&error);
        self.choices.clear();
        self.witness = None;
        self.events.clear();
        self.unfinished = 0;
        error
    }
}

impl From<Finish> for Ending {
    fn from(reason: Finish) -> Self {
        match reason {
            Finish::Stop | Finish::ToolCalls => Self::Stop,
            Finish::Length => Self::Length,
        }
    }
}

/// The engine's failure on the wire. `queue_time`: how long all that waits will take to begin.
pub(crate) fn engine_failure(failure: &EngineFailure, queue_time: impl FnOnce() -> Duration) -> ApiError {
    match failure {
        EngineFailure::NonFiniteLogits => ApiError::engine_always("the model computed values that are not finite"),
        EngineFailure::Device(error) => ApiError::device(error),
        EngineFailure::Hung(_) => ApiError::device_hung(),
        EngineFailure::AdapterLost => ApiError::engine("the adapter could not be loaded again after the device failed"),
        EngineFailure::Panicked => ApiError::internal(),
        EngineFailure::ShuttingDown => ApiError::draining(),
        EngineFailure::QueueTimeout => ApiError::overloaded(Refusal::Deadline, queue_time()),
        EngineFailure::DeadlineExceeded => ApiError::deadline_exceeded(),
        EngineFailure::GrammarFailed(_) => {
            ApiError::engine_always("the grammar of the output reached a limit of its parser")
        }
    }
}
