//! What waits to be computed, and which of it goes together. A value: no threads, no clock.
//!
//! Tenants take turns by what was computed for them, and the requests of a tenant one after the other: each batch begins with the
//! longest input of the request whose turn it is, and is filled with inputs of nearly that length, of the same request first, then
//! of others. So neither a request of thousands of texts nor a thousand requests of one tenant hold another up for longer than
//! a batch, and little of a batch is padding.
//!
//! Invariant: the ledger has those tenants waiting of whom an input waits here.

use std::collections::{BTreeSet, VecDeque};

use baton_fairness::{Ledger, Share, Tenant};

use crate::encoder::Input;
use crate::error::RunError;

/// How large a batch may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchLimits {
    /// Tokens, padding included.
    pub tokens: usize,
    /// Elements of the attention weights of a layer.
    pub attention: usize,
    /// Attention heads.
    pub heads: usize,
}

impl BatchLimits {
    /// Whether a batch may have so many inputs of this length. One alone always may.
    fn allows(&self, inputs: usize, tokens: usize) -> bool {
        inputs * tokens <= self.tokens && inputs * tokens * tokens * self.heads <= self.attention
    }
}

/// Which input of which request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    request: u64,
    index: usize,
}

/// What a request has come to: an output for each input.
pub(crate) type Outputs = Result<Vec<Vec<f32>>, RunError>;

/// Requests with a `T` each, to whom the result goes.
pub(crate) struct Backlog<T> {
    requests: VecDeque<Request<T>>,
    next_id: u64,
    /// Of all inputs that are not computed yet.
    tokens: usize,
    ledger: Ledger,
}

struct Request<T> {
    id: u64,
    share: Share,
    /// Those that are neither computed nor being computed, the longest last.
    waiting: Vec<(usize, Input)>,
    outputs: Vec<Option<Vec<f32>>>,
    left: usize,
    owner: T,
}

impl<T> Default for Backlog<T> {
    fn default() -> Self {
        Self { requests: VecDeque::new(), next_id: 0, tokens: 0, ledger: Ledger::default() }
    }
}

impl<T> Backlog<T> {
    /// Requests that have no result yet.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Tokens of inputs that wait.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// One more request, of at least one input.
    pub fn push(&mut self, inputs: Vec<Input>, share: Share, owner: T) {
        let left = inputs.len();
        self.tokens += inputs.iter().map(|input| input.ids.len()).sum::<usize>();
        let mut waiting: Vec<_> = inputs.into_iter().enumerate().collect();
        waiting.sort_by_key(|(_, input)| input.ids.len());
        let id = self.next_id;
        self.next_id += 1;
        self.requests.push_back(Request { id, share, waiting, outputs: vec![None; left], left, owner });
        self.ledger.waits(share.tenant);
    }

    /// Takes out the requests for whose owners this holds; what of them is being computed is forgotten when it comes. The
    /// second argument tells whether nothing of it has been begun.
    pub fn remove(&mut self, mut gone: impl FnMut(&T, bool) -> bool) -> Vec<T> {
        let mut removed = Vec::new();
        for request in std::mem::take(&mut self.requests) {
            let untouched = request.waiting.len() == request.outputs.len();
            if gone(&request.owner, untouched) {
                removed.push(request);
            } else {
                self.requests.push_back(request);
            }
        }
        removed.into_iter().map(|request| self.leave(request)).collect()
    }

    /// The next batch; empty if nothing waits.
    pub fn batch(&mut self, limits: &BatchLimits) -> Vec<(Place, Input)> {
        let mut batch: Vec<(Place, Input)> = Vec::new();
        let Some(tenant) = self.ledger.first().map(|turn| turn.tenant) else { return batch };
        let next = |request: &Request<T>| request.share.tenant == tenant && !request.waiting.is_empty();
        let turn = self.requests.iter().position(next).expect("something of the tenant waits");
        self.ledger.starts(tenant);
        let (mut longest, mut served) = (0, BTreeSet::new());
        for at in std::iter::once(turn).chain((0..self.requests.len()).filter(|&at| at != turn)) {
            let request = &mut self.requests[at];
            loop {
                let fits = |len: usize| longest == 0 || (len <= longest && 2 * len > longest);
                let Some(fitting) = request.waiting.iter().rposition(|(_, input)| fits(input.ids.len())) else { break };
                let len = request.waiting[fitting].1.ids.len();
                longest = longest.max(len);
                if !batch.is_empty() && !limits.allows(batch.len() + 1, longest) {
                    break;
                }
                let (index, input) = request.waiting.remove(fitting);
                self.tokens -= len;
                self.ledger.charge(request.share, len as u64);
                served.insert(request.share.tenant);
                batch.push((Place { request: request.id, index }, input));
            }
        }
        served.into_iter().for_each(|tenant| self.look_after(tenant));
        // The request that had the turn waits for its tenant's others now.
        let request = self.requests.remove(turn).expect("found above");
        self.requests.push_back(request);
        batch
    }

    /// What an input has come to. A request that is complete, or has failed, is given back with its outputs in order.
    pub fn done(&mut self, place: Place, output: Result<Vec<f32>, RunError>) -> Option<(T, Outputs)> {
        let at = self.requests.iter().position(|request| request.id == place.request)?;
        let request = &mut self.requests[at];
        let failure = match output {
            Err(error) => Some(error),
            Ok(output) => {
                request.outputs[place.index] = Some(output);
                request.left -= 1;
                if request.left > 0 {
                    return None;
                }
                None
            }
        };
        let mut request = self.requests.remove(at).expect("found above");
        let outputs = std::mem::take(&mut request.outputs);
        let outputs = || outputs.into_iter().map(|output| output.expect("none is left")).collect();
        Some((self.leave(request), failure.map_or_else(|| Ok(outputs()), Err)))
    }

    /// A request was taken out, with what of it still waited.
    fn leave(&mut self, request: Request<T>) -> T {
        self.tokens -= request.waiting.iter().map(|(_, input)| input.ids.len()).sum::<usize>();
        if !request.waiting.is_empty() {
            self.look_after(request.share.tenant);
        }
        if self.requests.is_empty() {
            self.ledger.forget();
        }
        request.owner
    }

    /// Something of the tenant waits no more.
    fn look_after(&mut self, tenant: Tenant) {
        let waits = |request: &Request<T>| request.share.tenant == tenant && !request.waiting.is_empty();
        if !self.requests.iter().any(waits) {
            self.ledger.rests(tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BatchLimits = BatchLimits { tokens: 64, attention: 1 << 20, heads: 2 };

    fn input(tokens: usize) -> Input {
        Input { ids: vec![1; tokens], type_ids: vec![0; tokens] }
    }

    fn of(number: u8, weight: u32) -> Share {
        Share { tenant: Tenant([number; 32]), weight }
    }

    /// A request, and its outputs.
    type Done = (&'static str, Vec<Vec<f32>>);

    /// The lengths in the next batch, whose inputs are all done with their own length as result.
    fn step(backlog: &mut Backlog<&'static str>) -> (Vec<usize>, Vec<Done>) {
        let batch = backlog.batch(&LIMITS);
        let lengths = batch.iter().map(|(_, input)| input.ids.len()).collect();
        let done = batch.into_iter().filter_map(|(place, input)| {
            let (owner, result) = backlog.done(place, Ok(vec![input.ids.len() as f32]))?;
            Some((owner, result.unwrap()))
        });
        (lengths, done.collect())
    }

    #[test]
    fn outputs_come_in_the_order_of_the_inputs_and_batches_hold_what_is_alike_in_length() {
        let mut backlog = Backlog::default();
        backlog.push([3, 30, 20, 4, 31].map(input).into(), of(0, 1), "a");
        assert_eq!(step(&mut backlog), (vec![31, 30], vec![]));
        assert_eq!(step(&mut backlog), (vec![20], vec![]));
        let outputs = [3.0, 30.0, 20.0, 4.0, 31.0].map(|x| vec![x]).to_vec();
        assert_eq!(step(&mut backlog), (vec![4, 3], vec![("a", outputs)]));
        assert_eq!((backlog.len(), backlog.tokens()), (0, 0));
        assert_eq!(step(&mut backlog), (vec![], vec![]));
    }

    #[test]
    fn a_request_of_many_inputs_does_not_hold_up_another_and_shares_its_batches() {
        let mut backlog = Backlog::default();
        backlog.push(vec![input(30); 100], of(0, 1), "large");
        backlog.push(vec![input(10)], of(0, 1), "small");
        backlog.push(vec![input(25)], of(0, 1), "middle");
        assert_eq!(step(&mut backlog).0, [30, 30]);
        assert_eq!(step(&mut backlog), (vec![10], vec![("small", vec![vec![10.0]])]));
        assert_eq!(step(&mut backlog), (vec![25], vec![("middle", vec![vec![25.0]])]));
        // A single input left: others fill its batch.
        backlog.push(vec![input(31)], of(0, 1), "late");
        assert_eq!(step(&mut backlog).0, [30, 30]);
        assert_eq!(step(&mut backlog), (vec![31, 30], vec![("late", vec![vec![31.0]])]));
    }

    #[test]
    fn one_input_above_every_limit_is_a_batch_of_its_own() {
        let mut backlog = Backlog::default();
        backlog.push(vec![input(1000), input(1000)], of(0, 1), "a");
        assert_eq!(step(&mut backlog).0, [1000]);
        assert_eq!(step(&mut backlog).0, [1000]);
    }

    #[test]
    fn a_failed_input_fails_its_request_alone_and_what_is_left_of_that_is_not_computed() {
        let mut backlog = Backlog::default();
        backlog.push(vec![input(30); 5], of(0, 1), "a");
        backlog.push(vec![input(5)], of(0, 1), "b");
        let batch = backlog.batch(&LIMITS);
        let failed = backlog.done(batch[0].0, Err(RunError::NonFinite));
        assert_eq!(failed, Some(("a", Err(RunError::NonFinite))));
        assert_eq!(backlog.done(batch[1].0, Ok(vec![1.0])), None);
        assert_eq!((backlog.len(), backlog.tokens()), (1, 5));
        assert_eq!(step(&mut backlog).0, [5]);
    }

    #[test]
    fn what_nobody_waits_for_is_taken_out() {
        let mut backlog = Backlog::default();
        backlog.push(vec![input(30); 3], of(0, 1), "a");
        backlog.push(vec![input(5)], of(0, 1), "b");
        let begun = backlog.batch(&LIMITS);
        assert_eq!(backlog.remove(|owner, untouched| *owner == "a" && untouched), Vec::<&str>::new());
        assert_eq!(backlog.remove(|owner, _| *owner == "a"), ["a"]);
        assert_eq!(backlog.done(begun[0].0, Ok(vec![])), None);
        assert_eq!((backlog.len(), backlog.tokens()), (1, 5));
    }

    #[test]
    fn a_thousand_requests_of_one_tenant_do_not_hold_up_another() {
        let mut backlog = Backlog::default();
        (0..1000).for_each(|_| backlog.push(vec![input(30)], of(1, 1), "flood"));
        assert_eq!(step(&mut backlog).0, [30, 30]);
        for _ in 0..3 {
            backlog.push(vec![input(10)], of(2, 1), "other");
            assert_eq!(step(&mut backlog), (vec![10], vec![("other", vec![vec![10.0]])]));
            assert_eq!(step(&mut backlog).0, [30, 30]);
        }
    }

    #[test]
    fn tenants_that_wait_are_computed_for_by_their_weights_whatever_they_ask_for() {
        let mut backlog = Backlog::default();
        (0..400).for_each(|_| backlog.push(vec![input(60)], of(1, 1), "long"));
        (0..1200).for_each(|_| backlog.push(vec![input(20)], of(2, 3), "short"));
        let mut tokens = [0; 2];
        for _ in 0..100 {
            step(&mut backlog).0.into_iter().for_each(|len| tokens[usize::from(len == 20)] += len);
            // A batch of the one, and three of the other's.
            assert!(tokens[1].abs_diff(3 * tokens[0]) <= 3 * 60, "{tokens:?}");
        }
        assert!(tokens.iter().all(|&tokens| tokens > 1000), "{tokens:?}");
    }

    #[test]
    fn whoever_leaves_is_owed_nothing_and_nobody_waits_for_it() {
        let mut backlog = Backlog::default();
        backlog.push(vec![input(60); 3], of(1, 1), "a");
        backlog.push(vec![input(60); 3], of(2, 1), "b");
        assert_eq!(step(&mut backlog).0, [60]);
        assert_eq!(backlog.remove(|owner, _| *owner == "b"), ["b"]);
        assert_eq!([(); 3].map(|()| step(&mut backlog).0), [vec![60], vec![60], vec![]]);
        assert_eq!((backlog.len(), backlog.tokens()), (0, 0));
        // Nor after a failure, which takes what waits of its request along.
        backlog.push(vec![input(60); 3], of(1, 1), "a");
        let batch = backlog.batch(&LIMITS);
        assert!(backlog.done(batch[0].0, Err(RunError::Failed)).is_some());
        assert_eq!(step(&mut backlog).0, Vec::<usize>::new());
    }
}
