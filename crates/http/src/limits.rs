//! What the requests of one key may take: how many at once, how many in a minute, how many tokens in a minute.
//!
//! They hold for a key over all generations, and go on when the list of keys is read again. A request is charged when it is
//! taken up: its prompts, and as much output as it allows itself; what it did not use is given back when it has ended. If
//! it does not say how much, its output is charged when it is there. What has been charged fades with time, a minute's
//! worth in a minute, so a key that was silent may take a minute's worth at once. What is more than a limit by itself is
//! taken up where nothing else is charged, and what it takes beyond the limit is owed.
//!
//! Time is an argument: since the service began.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;

use crate::keys::Owner;

/// The limits of a key, and its weight between keys that want more than there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyLimits {
    /// What it is given of the engine while others wait as well, relative to theirs; at least 1.
    pub weight: u32,
    /// Choices that are computed or wait, at most, each prompt's for itself; a request for embeddings or scores is one. Lines
    /// of batches take what is left of it, and leave none less to requests for which somebody waits.
    pub max_concurrent_requests: Option<u32>,
    /// Requests in a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and outputs in a minute.
    pub tokens_per_minute: Option<u32>,
}

impl Default for KeyLimits {
    /// None, and the weight 1.
    fn default() -> Self {
        Self { weight: 1, max_concurrent_requests: None, requests_per_minute: None, tokens_per_minute: None }
    }
}

/// What a request would take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask {
    /// Choices of all prompts.
    pub choices: usize,
    /// Tokens of all prompts, and the most that it may generate if it says so.
    pub tokens: usize,
}

/// Which limit a request would exceed, and when it would no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exceeded {
    /// So many at once; nobody knows until when.
    Concurrency(u32),
    /// So many requests a minute.
    Requests(u32, Duration),
    /// So many tokens a minute.
    Tokens(u32, Duration),
}

/// What all keys with limits have taken.
#[derive(Debug, Default)]
pub(crate) struct Quotas(Mutex<BTreeMap<Owner, Used>>);

#[derive(Debug, Default)]
struct Used {
    /// Choices for which somebody waits, and those of batches.
    at_once: [usize; 2],
    requests: Charged,
    tokens: Charged,
}

/// What was charged and has not faded yet.
#[derive(Debug, Default, Clone, Copy)]
struct Charged {
    amount: f64,
    at: Duration,
}

const MINUTE: f64 = 60.0;

impl Charged {
    /// What is left of it by now.
    fn now(&mut self, limit: u32, now: Duration) -> f64 {
        let faded = now.saturating_sub(self.at).as_secs_f64() * f64::from(limit) / MINUTE;
        (self.amount, self.at) = ((self.amount - faded).max(0.0), self.at.max(now));
        self.amount
    }

    /// How long until so much more may be charged; zero if it may.
    fn wait(&mut self, limit: u32, more: f64, now: Duration) -> Duration {
        let limit_f = f64::from(limit);
        let excess = self.now(limit, now) + more.min(limit_f) - limit_f;
        // Below this it is nothing but rounding.
        if excess < 1e-6 { Duration::ZERO } else { Duration::from_secs_f64(excess * MINUTE / limit_f) }
    }
}

impl Quotas {
    /// Charges a request of this key, until it is dropped as far as it is for what is there at once. `of_batch`: nobody waits
    /// for it.
    pub fn take(
        self: &Arc<Self>,
        (owner, limits): (Owner, KeyLimits),
        of_batch: bool,
        ask: Ask,
        now: Duration,
    ) -> Result<Taken, Exceeded> {
        let KeyLimits { max_concurrent_requests, requests_per_minute, tokens_per_minute, .. } = limits;
        let mut all = self.0.lock();
        let used = all.entry(owner).or_default();
        let [awaited, of_batches] = used.at_once;
        let before = if of_batch { awaited + of_batches } else { awaited };
        if let Some(limit) = max_concurrent_requests
            && before > 0
            && before + ask.choices > limit as usize
        {
            return Err(Exceeded::Concurrency(limit));
        }
        if let Some(limit) = requests_per_minute {
            let wait = used.requests.wait(limit, 1.0, now);
            if !wait.is_zero() {
                return Err(Exceeded::Requests(limit, wait));
            }
        }
        if let Some(limit) = tokens_per_minute {
            let wait = used.tokens.wait(limit, ask.tokens as f64, now);
            if !wait.is_zero() {
                return Err(Exceeded::Tokens(limit, wait));
            }
        }
        used.at_once[usize::from(of_batch)] += ask.choices;
        // Without a limit nothing would fade.
        if requests_per_minute.is_some() {
            used.requests.amount += 1.0;
        }
        if tokens_per_minute.is_some() {
            used.tokens.amount += ask.tokens as f64;
        }
        Ok(Taken { quotas: self.clone(), owner, limits, of_batch, ask, used: None })
    }

    /// What OpenAI's API says of limits in headers, of those that there are.
    pub fn headers(&self, owner: Owner, limits: KeyLimits, now: Duration) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if limits.requests_per_minute.is_none() && limits.tokens_per_minute.is_none() {
            return headers;
        }
        let mut all = self.0.lock();
        let Used { requests, tokens, .. } = &mut all.entry(owner).or_default();
        let kinds = [("requests", limits.requests_per_minute, requests), ("tokens", limits.tokens_per_minute, tokens)];
        for (kind, limit, charged) in kinds {
            let Some(limit) = limit else { continue };
            let taken = charged.now(limit, now);
            let remaining = (f64::from(limit) - taken).max(0.0) as u64;
            let reset = Duration::from_secs_f64(taken * MINUTE / f64::from(limit));
            for (what, value) in
                [("limit", limit.to_string()), ("remaining", remaining.to_string()), ("reset", go_duration(reset))]
            {
                let name = HeaderName::try_from(format!("x-ratelimit-{what}-{kind}"));
                let value = HeaderValue::try_from(value);
                headers.insert(name.expect("letters and hyphens"), value.expect("letters and digits"));
            }
        }
        headers
    }

    /// Forgets keys that are not among these, unless they have requests.
    pub fn keep(&self, known: impl Fn(Owner) -> bool) {
        self.0.lock().retain(|owner, used| used.at_once != [0; 2] || known(*owner));
    }

    fn give_back(&self, taken: &Taken) {
        let Taken { limits, of_batch, ask, .. } = taken;
        let mut all = self.0.lock();
        let Some(used) = all.get_mut(&taken.owner) else { return };
        used.at_once[usize::from(*of_batch)] -= ask.choices;
        // It may have faded in between; what is below nothing was nobody's.
        if limits.tokens_per_minute.is_some() {
            let tokens = taken.used.unwrap_or_default() as f64;
            used.tokens.amount = (used.tokens.amount - ask.tokens as f64 + tokens).max(0.0);
        }
        if taken.used.is_none() && limits.requests_per_minute.is_some() {
            used.requests.amount = (used.requests.amount - 1.0).max(0.0);
        }
    }
}

/// What a request has been charged. Dropped, it gives back what was not used: all of it, if no engine took it.
#[derive(Debug)]
pub(crate) struct Taken {
    quotas: Arc<Quotas>,
    owner: Owner,
    /// Those it was charged under.
    limits: KeyLimits,
    of_batch: bool,
    ask: Ask,
    /// Tokens; `None` until an engine has taken it.
    used: Option<usize>,
}

impl Taken {
    /// An engine has taken it, and so many tokens were used in all.
    pub fn used(&mut self, tokens: usize) {
        self.used = Some(tokens);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.quotas.give_back(self);
    }
}

/// As Go writes durations, in whole seconds, and so OpenAI's headers: `6m0s`.
fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().ceil() as u64;
    match seconds / 60 {
        0 => format!("{seconds}s"),
        minutes => format!("{minutes}m{}s", seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Owner = Owner::of_digest([1; 32]);
    const B: Owner = Owner::of_digest([2; 32]);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn ask(choices: usize, tokens: usize) -> Ask {
        Ask { choices, tokens }
    }

    #[test]
    fn a_minutes_tokens_are_there_at_once_and_come_back_evenly_for_that_key_alone() {
        let quotas = Arc::<Quotas>::default();
        let limits = KeyLimits { tokens_per_minute: Some(600), ..KeyLimits::default() };
        let take = |owner, tokens, at| {
            let mut taken = quotas.take((owner, limits), false, ask(1, tokens), seconds(at))?;
            taken.used(tokens);
            Ok(())
        };
        assert_eq!(take(A, 400, 0), Ok(()));
        assert_eq!(take(A, 200, 0), Ok(()));
        assert_eq!(take(A, 100, 0), Err(Exceeded::Tokens(600, seconds(10))));
        assert_eq!(take(B, 600, 0), Ok(()));
        assert_eq!(take(A, 100, 9), Err(Exceeded::Tokens(600, seconds(1))));
        assert_eq!(take(A, 100, 10), Ok(()));
        // A minute's worth is the most that a key saves up.
        assert_eq!(take(A, 600, 1000), Ok(()));
        assert_eq!(take(A, 1, 1000), Err(Exceeded::Tokens(600, Duration::from_millis(100))));
    }

    #[test]
    fn what_was_not_used_is_given_back_and_what_was_used_beyond_is_owed() {
        let quotas = Arc::<Quotas>::default();
        let limits = KeyLimits { tokens_per_minute: Some(60), ..KeyLimits::default() };
        let take = |tokens, at| quotas.take((A, limits), false, ask(1, tokens), seconds(at));
        let mut taken = take(50, 0).unwrap();
        assert_eq!(take(20, 0).unwrap_err(), Exceeded::Tokens(60, seconds(10)));
        taken.used(40);
        drop(taken);
        drop(take(20, 0).unwrap());
        // Refused by somebody else: nothing was used, and nothing is charged.
        drop(take(20, 0).unwrap());
        // More than a minute's, alone: taken up when nothing is charged any more.
        assert_eq!(take(500, 0).unwrap_err(), Exceeded::Tokens(60, seconds(40)));
        let mut large = take(500, 40).unwrap();
        large.used(180);
        drop(large);
        assert_eq!(take(60, 40).unwrap_err(), Exceeded::Tokens(60, seconds(180)));
        assert!(take(60, 220).is_ok());
    }

    #[test]
    fn requests_at_once_count_their_choices_and_alone_one_may_have_more() {
        let quotas = Arc::<Quotas>::default();
        let limits = KeyLimits { max_concurrent_requests: Some(4), ..KeyLimits::default() };
        let take = |choices| quotas.take((A, limits), false, ask(choices, 10), seconds(0));
        let many = take(9).unwrap();
        assert_eq!(take(1).unwrap_err(), Exceeded::Concurrency(4));
        drop(many);
        let three = take(3).unwrap();
        assert_eq!(take(2).unwrap_err(), Exceeded::Concurrency(4));
        let one = take(1).unwrap();
        drop(three);
        assert!(take(3).is_ok());
        drop(one);
    }

    #[test]
    fn lines_of_batches_take_what_is_left_of_what_there_may_be_at_once_and_leave_none_less_to_others() {
        let quotas = Arc::<Quotas>::default();
        let limits = KeyLimits { max_concurrent_requests: Some(4), ..KeyLimits::default() };
        let take = |of_batch, choices| quotas.take((A, limits), of_batch, ask(choices, 10), seconds(0));
        let awaited = take(false, 1).unwrap();
        let lines = take(true, 3).unwrap();
        assert_eq!(take(true, 1).unwrap_err(), Exceeded::Concurrency(4));
        let more = take(false, 3).unwrap();
        assert_eq!(take(false, 1).unwrap_err(), Exceeded::Concurrency(4));
        drop(lines);
        assert_eq!(take(true, 1).unwrap_err(), Exceeded::Concurrency(4));
        drop((awaited, more));
        assert!(take(true, 4).is_ok());
    }

    #[test]
    fn limits_change_under_what_was_charged_and_headers_say_what_is_left() {
        let quotas = Arc::<Quotas>::default();
        let limits = |limit| KeyLimits { requests_per_minute: Some(limit), ..KeyLimits::default() };
        for _ in 0..3 {
            quotas.take((A, limits(3)), false, ask(1, 10), seconds(0)).unwrap().used(10);
        }
        // One that no engine takes counts neither.
        assert!(quotas.take((A, limits(4)), false, ask(1, 10), seconds(0)).is_ok());
        let refused = quotas.take((A, limits(3)), false, ask(1, 10), seconds(0));
        assert_eq!(refused.unwrap_err(), Exceeded::Requests(3, seconds(20)));
        let headers = quotas.headers(A, limits(6), seconds(0));
        let header = |name: &str| headers[name].to_str().unwrap();
        assert_eq!(header("x-ratelimit-limit-requests"), "6");
        assert_eq!(header("x-ratelimit-remaining-requests"), "3");
        assert_eq!(header("x-ratelimit-reset-requests"), "30s");
        assert_eq!(headers.len(), 3);
        quotas.keep(|_| false);
        assert!(quotas.0.lock().is_empty());
        assert_eq!(go_duration(Duration::from_millis(359_001)), "6m0s");
    }
}
