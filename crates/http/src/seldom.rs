//! What is worth a line of the log, but not one each time.
//!
//! The first of many is told at once; those that follow together, with the first that comes when a pause is over. So a flood
//! leaves a few lines, and its end none: counters have all.

use std::time::{Duration, Instant};

/// Between two lines, at least.
const PAUSE: Duration = Duration::from_secs(30);

/// Events of one kind, of which each may come at any time.
#[derive(Debug, Default)]
pub(crate) struct Seldom {
    told: Option<Instant>,
    untold: u64,
}

impl Seldom {
    /// One more; how many there were since the last line, if it is time for another.
    pub fn one_more(&mut self, now: Instant) -> Option<u64> {
        self.untold += 1;
        if self.told.is_some_and(|told| now.duration_since(told) < PAUSE) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_others_together_later() {
        let (mut refused, start) = (Seldom::default(), Instant::now());
        let told: Vec<_> =
            (0..100).filter_map(|second| refused.one_more(start + Duration::from_secs(second))).collect();
        assert_eq!(told, [1, 30, 30, 30]);
    }
}
