//! The outputs of all choices of one request, merged in the order in which they come.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use baton_engine::{EngineFailure, FinishReason, OutputEvent, OutputStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::error::ApiError;
use crate::generate::choice::{ChoiceText, Delta, Score};
use crate::metrics::{Ending, Meter};
use crate::openai::shared::{Finish, Piece, Usage};
use crate::shadow::Witness;

/// What happens to the choices. Each choice yields any number of `Text` and then one `Finish`.
#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    /// A choice has more text.
    Text { index: usize, delta: Delta },
    /// A choice is complete; `matched`: which stop string ended it.
    Finish { index: usize, reason: Finish, matched: Option<usize>, scores: Vec<Score> },
}

impl Event {
    /// What is written of it.
    pub fn piece(&self) -> Piece<'_> {
        match self {
            Self::Text { index, delta } => {
                Piece::Text { index: *index, segment: &delta.segment, scores: &delta.scores }
            }
            Self::Finish { index, reason, matched, scores } => {
                Piece::Finish { index: *index, reason: *reason, matched: *matched, scores }
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
    usage: Usage,
    /// Choices per prompt: those of one prompt stand together.
    n: usize,
    /// The drain is over.
    killed: Pin<Box<WaitForCancellationFutureOwned>>,
    meter: Meter,
    /// Tells the request's shadow of the first choice.
    witness: Option<Witness>,
}

struct Choice {
    stream: OutputStream,
    text: ChoiceText,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// A stop string was found, or the only call that is wanted: the engine has been told, its last event is awaited.
    Stopped,
    Finished,
}

impl Choices {
    /// `prompt_tokens`: of all prompts. The choices are `n` per prompt, in order.
    pub fn new(
        choices: Vec<(OutputStream, ChoiceText)>,
        prompt_tokens: usize,
        n: usize,
        kill_switch: CancellationToken,
        meter: Meter,
        witness: Option<Witness>,
    ) -> Self {
        let choices: Vec<_> =
            choices.into_iter().map(|(stream, text)| Choice { stream, text, state: State::Running }).collect();
        let usage = Usage { prompt_tokens, ..Usage::default() };
        Self {
            unfinished: choices.len(),
            choices,
            turn: 0,
            events: VecDeque::new(),
            usage,
            n,
            killed: Box::pin(kill_switch.cancelled_owned()),
            meter,
            witness,
        }
    }

    /// Number of choices.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// Tokens of the choices that have finished.
    pub fn usage(&self) -> Usage {
        self.usage
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
            let choice = &mut self.choices[index];
            if choice.state == State::Finished {
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
        let choice = &mut self.choices[index];
        match event {
            Some(OutputEvent::Token { token, logprob, top }) if choice.state == State::Running => {
                self.meter.token(index);
                if let (0, Some(witness)) = (index, &mut self.witness) {
                    witness.token(token);
                }
                let (deltas, stopped) = choice.text.push(token, logprob, top);
                self.events.extend(deltas.into_iter().map(|delta| Event::Text { index, delta }));
                if stopped {
                    choice.state = State::Stopped;
                    choice.stream.abort();
                }
            }
            // What the engine generated before it heard of the stop. Scores of the prompt are never asked for here.
            Some(OutputEvent::Token { .. } | OutputEvent::PromptScores(_)) => {}
            Some(OutputEvent::Finished { reason, usage, timings }) => {
                let (reason, completion_tokens) = match (choice.state, reason) {
                    (State::Stopped, _) => (choice.text.reason(Finish::Stop), choice.text.tokens().0),
                    (_, FinishReason::Stop { token }) => {
                        (self.finish(index, Some(token), Finish::Stop), usage.completion_tokens)
                    }
                    (_, FinishReason::Length) => (self.finish(index, None, Finish::Length), usage.completion_tokens),
                    (_, FinishReason::Error(failure)) => return Err(self.failed(index, failure)),
                    (_, FinishReason::Aborted) => return Err(self.failed(index, EngineFailure::ShuttingDown)),
                };
                let choice = &mut self.choices[index];
                if index == 0
                    && let Some(witness) = self.witness.take()
                {
                    witness.finished(choice.state == State::Stopped, timings);
                }
                choice.state = State::Finished;
                self.unfinished -= 1;
                self.usage.completion_tokens += completion_tokens;
                self.usage.reasoning_tokens += choice.text.tokens().1;
                if index.is_multiple_of(self.n) {
                    self.usage.cached_tokens += usage.cached_tokens;
                }
                self.meter.finished(index, reason.into(), completion_tokens, &timings);
                let (matched, scores) = (choice.text.matched(), choice.text.remaining_scores());
                self.events.push_back(Event::Finish { index, reason, matched, scores });
            }
            None => return Err(ApiError::engine_down()),
        }
        Ok(())
    }

    /// The engine has ended a choice: what its text still holds.
    fn finish(&mut self, index: usize, stop_token: Option<u32>, reason: Finish) -> Finish {
        let (deltas, stopped) = self.choices[index].text.finish(stop_token);
        self.events.extend(deltas.into_iter().map(|delta| Event::Text { index, delta }));
        self.choices[index].text.reason(if stopped { Finish::Stop } else { reason })
    }

    fn failed(&mut self, index: usize, failure: EngineFailure) -> ApiError {
        self.choices[index].state = State::Finished;
        self.meter.failed(index, &failure);
        engine_failure(&failure)
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

/// The engine's failure on the wire.
pub(crate) fn engine_failure(failure: &EngineFailure) -> ApiError {
    match failure {
        EngineFailure::NonFiniteLogits => ApiError::engine_always("the model computed values that are not finite"),
        EngineFailure::DeviceFailed(_) => ApiError::engine("the device failed"),
        EngineFailure::Panicked => ApiError::internal(),
        EngineFailure::ShuttingDown => ApiError::draining(),
        EngineFailure::QueueTimeout => ApiError::overloaded(),
        EngineFailure::DeadlineExceeded => ApiError::deadline_exceeded(),
        EngineFailure::GrammarFailed(_) => {
            ApiError::engine_always("the grammar of the output reached a limit of its parser")
        }
    }
}
