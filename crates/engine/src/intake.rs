//! What is let in: how much waits, what may, and how fast it moves.
//!
//! Decided under the lock of the gate from what was accepted and what the engine says has left the queue since. The latter
//! may be late, so that too much seems to wait, never too little.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::{Request, SubmitError};

/// Requests and tokens of their prompts, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub requests: u64,
    pub tokens: u64,
}

impl Amount {
    /// Of these requests; each choice has a prompt of its own.
    pub fn of<'a>(requests: impl Iterator<Item = &'a Request>) -> Self {
        requests.fold(Self::default(), |mut sum, request| {
            sum.add(request.prompt.len());
            sum
        })
    }

    /// One more, with a prompt of so many tokens.
    pub fn add(&mut self, prompt: usize) {
        self.requests += 1;
        self.tokens += prompt as u64;
    }

    fn minus(self, other: Self) -> Self {
        Self { requests: self.requests - other.requests, tokens: self.tokens - other.tokens }
    }

    fn plus(self, other: Self) -> Self {
        Self { requests: self.requests + other.requests, tokens: self.tokens + other.tokens }
    }
}

/// As the engine's thread tells others.
#[derive(Default)]
pub(crate) struct SharedAmount {
    requests: AtomicU64,
    tokens: AtomicU64,
}

impl SharedAmount {
    pub fn store(&self, amount: Amount) {
        self.requests.store(amount.requests, Ordering::Release);
        self.tokens.store(amount.tokens, Ordering::Release);
    }

    pub fn load(&self) -> Amount {
        Amount { requests: self.requests.load(Ordering::Acquire), tokens: self.tokens.load(Ordering::Acquire) }
    }
}

/// What may wait of a class.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub requests: usize,
    pub tokens: Option<usize>,
}

impl Limits {
    /// Whether `wanted` may be added to what is `queued`.
    pub fn check(self, queued: Amount, wanted: Amount) -> Result<(), SubmitError> {
        let small = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
        if wanted.requests > 0 && queued.requests + wanted.requests > self.requests as u64 {
            let (queued, wanted) = (small(queued.requests), small(wanted.requests));
            return Err(SubmitError::QueueFull { queued, wanted, max_queued: self.requests });
        }
        let fits = |limit: usize| queued.tokens + wanted.tokens <= limit as u64;
        match self.tokens {
            // Behind nothing anything may wait, or it never could.
            Some(limit) if wanted.tokens > 0 && queued.tokens > 0 && !fits(limit) => {
                let (queued, wanted) = (small(queued.tokens), small(wanted.tokens));
                Err(SubmitError::QueuedTokens { queued, wanted, max_queued_tokens: limit })
            }
            _ => Ok(()),
        }
    }
}

/// How fast a queue moves: over the last time of one to two [`WINDOW`]s in which somebody looked.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    earlier: Mark,
    later: Mark,
}

#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    at: Duration,
    left: Amount,
}

/// See [`Pace`].
const WINDOW: Duration = Duration::from_secs(10);

impl Pace {
    /// So much has left the queue by now.
    pub fn note(&mut self, now: Duration, left: Amount) {
        // Nobody looked for long, so nobody wanted in: no pace of a queue.
        if now.saturating_sub(self.later.at) >= 2 * WINDOW {
            (self.earlier, self.later) = (Mark { at: now, left }, Mark { at: now, left });
        }
        if now.saturating_sub(self.later.at) >= WINDOW {
            (self.earlier, self.later) = (self.later, Mark { at: now, left });
        }
    }

    /// How long it takes until so much more has left as `wanted`, at the pace of late. Where nothing has left, as if one
    /// request or token had just now.
    pub fn time_for(&self, now: Duration, left: Amount, wanted: Amount) -> Duration {
        let (elapsed, moved) = (now.saturating_sub(self.earlier.at), left.minus(self.earlier.left));
        let times = |wanted: u64, moved: u64| elapsed.as_secs_f64() * wanted as f64 / moved.max(1) as f64;
        let seconds = times(wanted.requests, moved.requests).max(times(wanted.tokens, moved.tokens));
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

/// What is known of the queue of one class.
#[derive(Debug, Default)]
pub(crate) struct Intake {
    pub accepted: Amount,
    pace: Pace,
}

impl Intake {
    /// Whether `wanted` may be let in.
    pub fn check(&mut self, limits: Limits, left: Amount, wanted: Amount, now: Duration) -> Result<(), SubmitError> {
        self.pace.note(now, left);
        limits.check(self.accepted.minus(left), wanted)
    }

    /// Lets it in.
    pub fn accept(&mut self, wanted: Amount) {
        self.accepted = self.accepted.plus(wanted);
    }

    /// How long until there is room for what was refused; for any other refusal until all that waits has left.
    pub fn room_in(&self, refusal: Option<&SubmitError>, left: Amount, now: Duration) -> Duration {
        let none = Amount::default();
        let excess = |queued: usize, wanted: usize, max: usize| (queued + wanted).saturating_sub(max).max(1) as u64;
        let leaves = match refusal {
            Some(&SubmitError::QueueFull { queued, wanted, max_queued }) => {
                Amount { requests: excess(queued, wanted, max_queued), ..none }
            }
            Some(&SubmitError::QueuedTokens { queued, wanted, max_queued_tokens }) => {
                Amount { tokens: excess(queued, wanted, max_queued_tokens).min(queued as u64), ..none }
            }
            _ => self.accepted.minus(left),
        };
        self.pace.time_for(now, left, leaves)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(requests: u64, tokens: u64) -> Amount {
        Amount { requests, tokens }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_waits_is_bounded_in_requests_and_tokens_and_behind_nothing_anything_may_wait() {
        let limits = Limits { requests: 3, tokens: Some(100) };
        let mut intake = Intake::default();
        let mut accept = |left, wanted| intake.check(limits, left, wanted, seconds(0)).map(|()| intake.accept(wanted));
        assert_eq!(accept(amount(0, 0), amount(1, 500)), Ok(()));
        let refused = SubmitError::QueuedTokens { queued: 500, wanted: 1, max_queued_tokens: 100 };
        assert_eq!(accept(amount(0, 0), amount(1, 1)), Err(refused));
        assert_eq!(accept(amount(1, 500), amount(2, 60)), Ok(()));
        let refused = SubmitError::QueueFull { queued: 2, wanted: 2, max_queued: 3 };
        assert_eq!(accept(amount(1, 500), amount(2, 10)), Err(refused));
        let refused = SubmitError::QueuedTokens { queued: 60, wanted: 41, max_queued_tokens: 100 };
        assert_eq!(accept(amount(1, 500), amount(1, 41)), Err(refused));
        assert_eq!(accept(amount(1, 500), amount(1, 40)), Ok(()));
    }

    #[test]
    fn time_in_which_nobody_wanted_in_is_no_pace_of_the_queue() {
        let limits = Limits { requests: 100, tokens: None };
        let mut intake = Intake::default();
        intake.check(limits, amount(0, 0), amount(1, 10), seconds(0)).unwrap();
        intake.accept(amount(110, 1100));
        let full = SubmitError::QueueFull { queued: 100, wanted: 1, max_queued: 100 };
        // An hour later a hundred wait, and within a second ten begin.
        intake.check(limits, amount(10, 100), amount(0, 0), seconds(3600)).unwrap();
        assert_eq!(intake.room_in(Some(&full), amount(20, 200), seconds(3601)), Duration::from_millis(100));
    }

    #[test]
    fn room_is_there_as_soon_as_the_queue_has_moved_so_far_at_its_pace_of_late() {
        let limits = Limits { requests: 100, tokens: None };
        let mut intake = Intake::default();
        intake.accept(amount(100, 1000));
        let full = |queued, wanted| SubmitError::QueueFull { queued, wanted, max_queued: 100 };
        assert_eq!(intake.room_in(Some(&full(100, 2)), amount(0, 0), seconds(4)), seconds(8), "nothing has left yet");
        // 5 in 10 s, then 20 in 10 s.
        for (at, left) in [(10, 5), (20, 25)] {
            intake.check(limits, amount(left, 10 * left), amount(0, 0), seconds(at)).unwrap();
        }
        let room = |refusal: &SubmitError| intake.room_in(Some(refusal), amount(25, 250), seconds(20));
        assert_eq!(room(&full(100, 4)), seconds(2));
        let full = SubmitError::QueuedTokens { queued: 1000, wanted: 100, max_queued_tokens: 1000 };
        assert_eq!(room(&full), seconds(5));
        assert_eq!(intake.room_in(None, amount(25, 250), seconds(20)), Duration::from_millis(37500));
    }
}
