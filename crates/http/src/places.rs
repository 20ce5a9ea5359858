//! Places for connections, of which there are only so many.
//!
//! Invariant: a connection on which nothing is under way gives way to one that comes. So clients that are silent or dawdle, however
//! many, keep nobody out, least of all a probe. Under way is a request that has arrived whole and whose reply is not yet
//! handed to the connection; what has not arrived can be sent again. The first to go is the one on which the longest nothing
//! has happened: it was accepted, a head came, a reply was handed over.

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// All places.
pub(crate) struct Places {
    limit: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    seats: HashMap<u64, Seat>,
    /// Those on which nothing is under way, the first to give way in front.
    idle: BTreeSet<Rank>,
    /// Grows with every change, and numbers the seats too.
    clock: u64,
}

/// Since when nothing has happened, and whose seat it is.
type Rank = (u64, u64);

struct Seat {
    under_way: usize,
    since: u64,
    evicted: CancellationToken,
}

impl Seat {
    fn rank(&self, id: u64) -> Option<Rank> {
        (self.under_way == 0).then_some((self.since, id))
    }
}

impl Places {
    /// So many.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, taken: Mutex::default() })
    }

    /// A place for one more connection, and whether all were taken: then another has given way, or requests are under way on
    /// all and there is none.
    pub fn take(self: &Arc<Self>) -> (Option<Place>, bool) {
        let mut taken = self.taken.lock();
        let full = taken.seats.len() >= self.limit;
        if full {
            let Some((_, id)) = taken.idle.pop_first() else { return (None, true) };
            taken.seats.remove(&id).expect("who is idle has a seat").evicted.cancel();
        }
        taken.clock += 1;
        let (id, evicted) = (taken.clock, CancellationToken::new());
        taken.seats.insert(id, Seat { under_way: 0, since: id, evicted: evicted.clone() });
        taken.idle.insert((id, id));
        (Some(Place { places: self.clone(), id, evicted }), full)
    }

    /// Changes a seat, unless it was taken away.
    fn change(&self, id: u64, change: impl FnOnce(&mut Seat)) {
        let Taken { seats, idle, clock } = &mut *self.taken.lock();
        let Some(seat) = seats.get_mut(&id) else { return };
        if let Some(rank) = seat.rank(id) {
            idle.remove(&rank);
        }
        *clock += 1;
        change(seat);
        seat.since = *clock;
        idle.extend(seat.rank(id));
    }
}

/// A connection's place, until it is dropped.
pub(crate) struct Place {
    places: Arc<Places>,
    id: u64,
    evicted: CancellationToken,
}

impl Place {
    /// Waits until the connection has to give way.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// A request's head has come.
    pub fn request(&self) -> Arc<Progress> {
        self.places.change(self.id, |_| ());
        Arc::new(Progress { places: self.places.clone(), id: self.id, arrived: AtomicBool::new(false) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        if let Some(rank) = taken.seats.remove(&self.id).and_then(|seat| seat.rank(self.id)) {
            taken.idle.remove(&rank);
        }
    }
}

/// A request on a connection, until it is dropped: with its body, and with its reply.
pub(crate) struct Progress {
    places: Arc<Places>,
    id: u64,
    arrived: AtomicBool,
}

impl Progress {
    fn arrived(&self) {
        if !self.arrived.swap(true, Ordering::Relaxed) {
            self.places.change(self.id, |seat| seat.under_way += 1);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let arrived = *self.arrived.get_mut();
        self.places.change(self.id, |seat| seat.under_way -= usize::from(arrived));
    }
}

/// A request's body, which tells when it has arrived whole.
pub(crate) struct Arriving {
    body: Body,
    progress: Arc<Progress>,
}

impl Arriving {
    /// `body`, of this request.
    pub fn new(body: Body, progress: Arc<Progress>) -> Self {
        if body.is_end_stream() {
            progress.arrived();
        }
        Self { body, progress }
    }
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if matches!(frame, Poll::Ready(None)) || self.body.is_end_stream() {
            self.progress.arrived();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(places: &Arc<Places>) -> Option<Place> {
        places.take().0
    }

    fn is_evicted(place: &Place) -> bool {
        place.evicted.is_cancelled()
    }

    #[test]
    fn the_one_on_which_the_longest_nothing_happened_gives_way_and_none_whose_request_is_under_way() {
        let places = Places::new(3);
        let [a, b, c] = [(); 3].map(|()| take(&places).unwrap());
        let asking = a.request();
        let d = take(&places).unwrap();
        assert_eq!([&a, &b, &c].map(is_evicted), [false, true, false], "the oldest of those that are silent");
        let e = take(&places).unwrap();
        assert_eq!([&a, &c, &d].map(is_evicted), [false, true, false]);
        let under_way = [&d, &e].map(|place| {
            let request = place.request();
            request.arrived();
            request
        });
        let f = take(&places).unwrap();
        assert_eq!([&a, &d, &e].map(is_evicted), [true, false, false], "only what is still arriving is left");
        f.request().arrived();
        let g = take(&places).unwrap();
        assert_eq!([&d, &e, &f].map(is_evicted), [false, false, true], "its reply was handed over");
        let last = g.request();
        last.arrived();
        assert!(take(&places).is_none(), "requests are under way on all");
        drop((asking, under_way));
        assert!(take(&places).is_some());
        assert!(is_evicted(&d));
    }

    #[test]
    fn places_that_are_left_are_free_whoever_was_evicted_before() {
        let places = Places::new(2);
        for _ in 0..3 {
            let seated = [(); 5].map(|()| take(&places).unwrap());
            let requests: Vec<_> = seated.iter().map(Place::request).collect();
            assert_eq!(places.taken.lock().seats.len(), 2);
            drop(seated);
            drop(requests);
            let taken = places.taken.lock();
            assert!(taken.seats.is_empty() && taken.idle.is_empty());
        }
    }
}
