//! Ranks: the backends that compute one model together, each on a thread of its own, and sums over them for ranks that
//! have memory of the host in common.
//!
//! Invariants of a [`Communicator`]: every rank gets the same bits, since each adds the parts in the order of the ranks;
//! nobody waits longer than the timeout; and once a rank has left, nobody waits at all until all of them begin anew.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use crate::{DeviceError, Result};

/// Which of how many ranks a backend is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct World {
    /// This one's number, below `size`.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
}

impl World {
    /// A backend that computes a model by itself.
    pub const ALONE: World = World { rank: 0, size: 1 };

    /// This rank's share of things numbered `0..count`, as even as can be. Where there are fewer things than ranks, each is the
    /// share of several.
    pub fn share(self, count: usize) -> Range<usize> {
        let start = count * self.rank / self.size;
        start..(count * (self.rank + 1) / self.size).max((start + 1).min(count))
    }
}

/// One rank's end of what ranks on one host sum with.
#[derive(Debug)]
pub struct Communicator {
    world: World,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    timeout: Duration,
    /// What each rank adds, by the parity of the sum's number: one may write its next part while others still read this.
    parts: [Vec<RwLock<Vec<f32>>>; 2],
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Sums that all ranks have come to.
    sums: usize,
    /// Who has come to the one at hand.
    here: Vec<bool>,
    /// Why there are to be no more.
    failed: Option<String>,
}

impl Communicator {
    /// The ends of `size` ranks, none of which waits longer than `timeout` for the others.
    ///
    /// # Panics
    /// If `size` is 0.
    pub fn new(size: usize, timeout: Duration) -> Vec<Self> {
        assert!(size > 0, "no ranks");
        let parts = || (0..size).map(|_| RwLock::default()).collect();
        let state = State { sums: 0, here: vec![false; size], failed: None };
        let shared = Shared { timeout, parts: [parts(), parts()], state: Mutex::new(state), changed: Condvar::new() };
        let shared = Arc::new(shared);
        (0..size).map(|rank| Self { world: World { rank, size }, shared: shared.clone() }).collect()
    }

    /// Whose end this is.
    pub fn world(&self) -> World {
        self.world
    }

    /// Replaces `x` by its sum over all ranks, which bring equally much.
    ///
    /// # Errors
    /// [`DeviceError::Execution`] of `device` if a rank has left, or does not come within the timeout.
    pub fn all_reduce(&self, device: &str, x: &mut [f32]) -> Result<()> {
        let World { rank, size } = self.world;
        if size == 1 {
            return Ok(());
        }
        let failed = |reason| DeviceError::Execution { device: device.to_owned(), op: "all_reduce", reason };
        let parts = &self.shared.parts[self.state().sums % 2];
        {
            let mut part = parts[rank].write().unwrap_or_else(PoisonError::into_inner);
            part.clear();
            part.extend_from_slice(x);
        }
        self.meet().map_err(failed)?;
        x.fill(0.0);
        for part in parts {
            let part = part.read().unwrap_or_else(PoisonError::into_inner);
            assert_eq!(part.len(), x.len(), "elements that the ranks sum");
            x.iter_mut().zip(&*part).for_each(|(x, part)| *x += part);
        }
        Ok(())
    }

    /// Says that this rank takes part in no further sum: the others' fail instead of waiting.
    pub fn leave(&self) {
        self.fail(&mut self.state(), format!("rank {} has left", self.world.rank));
    }

    /// Makes sums possible again after a rank left. Not before all ranks have ended what they were in; any of them may call
    /// it, or each.
    pub fn rejoin(&self) {
        let mut state = self.state();
        state.failed = None;
        state.here.fill(false);
    }

    /// Waits until all ranks have called it.
    fn meet(&self) -> std::result::Result<(), String> {
        let Shared { timeout, changed, .. } = &*self.shared;
        let mut state = self.state();
        if let Some(reason) = &state.failed {
            return Err(reason.clone());
        }
        let sum = state.sums;
        state.here[self.world.rank] = true;
        if state.here.iter().all(|here| *here) {
            state.sums += 1;
            state.here.fill(false);
            changed.notify_all();
            return Ok(());
        }
        let waiting = |state: &mut State| state.sums == sum && state.failed.is_none();
        let (mut state, _) =
            changed.wait_timeout_while(state, *timeout, waiting).unwrap_or_else(PoisonError::into_inner);
        if state.sums > sum {
            return Ok(());
        }
        let missing = || {
            let missing = state.here.iter().enumerate().filter(|(_, here)| !**here).map(|(rank, _)| rank.to_string());
            format!("rank {} did not come within {timeout:?}", missing.collect::<Vec<_>>().join(", "))
        };
        let reason = state.failed.clone().unwrap_or_else(missing);
        self.fail(&mut state, reason.clone());
        Err(reason)
    }

    /// The first reason counts.
    fn fail(&self, state: &mut State, reason: String) {
        state.failed.get_or_insert(reason);
        self.shared.changed.notify_all();
    }

    /// Whole after every change, so poison means nothing.
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A rank that ends, by a panic too, keeps nobody waiting.
impl Drop for Communicator {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// What each rank gets of `work`, each on a thread of its own.
    fn on_threads<T: Send>(
        ranks: Vec<Communicator>,
        work: impl Fn(&Communicator) -> T + Sync,
    ) -> Vec<thread::Result<T>> {
        let work = &work;
        thread::scope(|scope| {
            let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || work(&rank))).collect();
            threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
        })
    }

    #[test]
    fn shares_are_even_and_cover_everything_once_or_equally_often() {
        for (size, count) in [(1, 5), (4, 4), (4, 8), (4, 10), (3, 256), (4, 2), (6, 3), (2, 1), (3, 0)] {
            let mut times = vec![0; count];
            let shares: Vec<_> = (0..size).map(|rank| World { rank, size }.share(count)).collect();
            shares.iter().cloned().flatten().for_each(|i| times[i] += 1);
            let each = if count < size && count > 0 { size / count } else { 1 };
            assert!(times.iter().all(|n| *n == each), "{count} among {size}: {shares:?}");
            let lens = shares.iter().map(|share| share.len());
            assert!(lens.clone().max().unwrap() - lens.min().unwrap() <= 1, "{count} among {size}: {shares:?}");
        }
    }

    #[test]
    fn every_rank_gets_the_sum_in_the_order_of_the_ranks_however_they_come() {
        // Numbers whose sum depends on the order.
        let part = |rank: usize, round: usize| [1e8, 1.0, -1e8, 0.1 * round as f32][(rank + round) % 4];
        for size in [1, 2, 3, 4] {
            let sums = on_threads(Communicator::new(size, Duration::from_secs(60)), |rank| {
                let sum = |round: usize| {
                    if (rank.world().rank + round).is_multiple_of(3) {
                        thread::yield_now();
                    }
                    let mut x = vec![part(rank.world().rank, round); 1 + round % 5];
                    rank.all_reduce("toy", &mut x).unwrap();
                    x
                };
                (0..200).map(sum).collect::<Vec<_>>()
            });
            let expected = |round: usize| {
                let sum = (0..size).fold(0.0, |sum, rank| sum + part(rank, round));
                vec![sum; 1 + round % 5]
            };
            for sums in sums {
                assert!(sums.unwrap().into_iter().eq((0..200).map(expected)), "{size} ranks");
            }
        }
    }

    #[test]
    fn a_rank_that_leaves_or_panics_releases_the_others_and_all_can_begin_anew() {
        for panics in [false, true] {
            let ranks = Communicator::new(3, Duration::from_secs(600));
            let [first, second, third] = ranks.try_into().unwrap();
            let spare = Communicator { world: third.world, shared: third.shared.clone() };
            let results = on_threads(vec![first, second, third], |rank| {
                rank.all_reduce("toy", &mut [1.0]).unwrap();
                if rank.world().rank == 2 {
                    assert!(!panics, "as the test wants it");
                    rank.leave();
                }
                rank.all_reduce("toy", &mut [1.0]).map_err(|e| e.to_string())
            });
            for (rank, result) in results.into_iter().enumerate() {
                match result {
                    Ok(result) => assert_eq!(result.unwrap_err(), "device toy failed in all_reduce: rank 2 has left"),
                    Err(_) => assert!(panics && rank == 2),
                }
            }
            let anew: Vec<_> = (0..3)
                .map(|rank| Communicator { world: World { rank, size: 3 }, shared: spare.shared.clone() })
                .collect();
            anew.iter().for_each(Communicator::rejoin);
            let sums = on_threads(anew, |rank| {
                let mut x = [1.0];
                rank.all_reduce("toy", &mut x).map(|()| x[0])
            });
            assert!(sums.into_iter().all(|sum| sum.unwrap().unwrap() == 3.0));
        }
    }

    #[test]
    fn nobody_waits_longer_than_the_timeout_and_the_missing_are_named() {
        let mut ranks = Communicator::new(4, Duration::from_millis(20));
        let late = [ranks.remove(3), ranks.remove(1)];
        for result in on_threads(ranks, |rank| rank.all_reduce("toy", &mut [1.0])) {
            let error = result.unwrap().unwrap_err().to_string();
            assert!(error.ends_with("did not come within 20ms"), "{error}");
        }
        let error = late[0].all_reduce("toy", &mut [1.0]).unwrap_err().to_string();
        assert!(error.contains("rank") && error.contains("did not come"), "who comes late is told at once: {error}");
    }
}
