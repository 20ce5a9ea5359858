//! The slowest requests of the last minutes.
//!
//! So few that they cost nothing, so that the question where the time went can be answered after it was asked.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::summary::RequestSummary;

/// How many there are at most.
const KEPT: usize = 32;
/// How long each is kept.
const WINDOW: Duration = Duration::from_secs(15 * 60);

/// See the head of the file.
#[derive(Default)]
pub(crate) struct SlowRequests(Mutex<Vec<(Instant, RequestSummary)>>);

impl SlowRequests {
    /// Keeps a request that has ended now, if it is one of the slowest.
    pub fn add(&self, summary: &RequestSummary, now: Instant) {
        let mut kept = self.0.lock();
        kept.retain(|(ended, _)| now.saturating_duration_since(*ended) < WINDOW);
        if kept.len() == KEPT {
            let fastest = (0..KEPT).min_by_key(|&i| kept[i].1.total).expect("there are some");
            if kept[fastest].1.total >= summary.total {
                return;
            }
            kept.swap_remove(fastest);
        }
        kept.push((now, summary.clone()));
    }

    /// Those that are kept, the slowest first.
    pub fn list(&self, now: Instant) -> Value {
        let kept = self.0.lock();
        let mut fresh: Vec<&RequestSummary> = kept
            .iter()
            .filter(|(ended, _)| now.saturating_duration_since(*ended) < WINDOW)
            .map(|(_, summary)| summary)
            .collect();
        fresh.sort_by_key(|summary| std::cmp::Reverse(summary.total));
        let data: Vec<Value> = fresh.into_iter().map(RequestSummary::json).collect();
        json!({"object": "list", "window_seconds": WINDOW.as_secs(), "data": data})
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::summary::Known;

    fn request(millis: u64) -> RequestSummary {
        RequestSummary {
            request_id: millis.to_string(),
            trace: None,
            method: "POST",
            route: "/v1/completions".into(),
            status: 200,
            arrived: SystemTime::UNIX_EPOCH,
            total: Duration::from_millis(millis),
            known: Known::default(),
        }
    }

    fn totals(slow: &SlowRequests, now: Instant) -> Vec<u64> {
        slow.list(now)["data"].as_array().unwrap().iter().map(|one| one["total_ms"].as_u64().unwrap()).collect()
    }

    #[test]
    fn the_slowest_are_kept_in_order_and_no_others() {
        let (slow, now) = (SlowRequests::default(), Instant::now());
        (1..=100).chain([40, 0]).for_each(|millis| slow.add(&request(millis), now));
        let slowest: Vec<u64> = (100 - KEPT as u64 + 1..=100).rev().collect();
        assert_eq!(totals(&slow, now), slowest);
    }

    #[test]
    fn a_request_is_forgotten_after_the_window_however_slow_it_was() {
        let (slow, now) = (SlowRequests::default(), Instant::now());
        slow.add(&request(1_000_000), now);
        slow.add(&request(5), now + WINDOW / 2);
        assert_eq!(totals(&slow, now + WINDOW / 2), [1_000_000, 5]);
        assert_eq!(totals(&slow, now + WINDOW), [5]);
        slow.add(&request(1), now + WINDOW);
        assert_eq!(slow.0.lock().len(), 2, "no memory is kept either");
    }
}
