//! What waits to be computed, and which of it goes together. A value: no threads, no clock.
//!
//! Requests take turns: each batch begins with the longest input of the request whose turn it is, and is filled with inputs
//! of nearly that length, of the same request first, then of others. So a request of thousands of texts holds nobody
//! up for longer than a batch, and little of a batch is padding.

use std::collections::VecDeque;

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
}

struct Request<T> {
    id: u64,
    /// Those that are neither computed nor being computed, the longest last.
    waiting: Vec<(usize, Input)>,
    outputs: Vec<Option<Vec<f32>>>,
    left: usize,
    owner: T,
}

impl<T> Default for Backlog<T> {
    fn default() -> Self {
        Self { requests: VecDeque::new(), next_id: 0, tokens: 0 }
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
    pub fn push(&mut self, inputs: Vec<Input>, owner: T) {
        let left = inputs.len();
        self.tokens += inputs.iter().map(|input| input.ids.len()).sum::<usize>();
        let mut waiting: Vec<_> = inputs.into_iter().enumerate().collect();
        waiting.sort_by_key(|(_, input)| input.ids.len());
        let id = self.next_id;
        self.next_id += 1;
        self.requests.push_back(Request { id, waiting, outputs: vec![None; left], left, owner });
    }

    /// Takes out the requests for whose owners this holds; what of them is being computed is forgotten when it comes. The
    /// second argument tells whether nothing of it has been begun.
    pub fn remove(&mut self, mut gone: impl FnMut(&T, bool) -> bool) -> Vec<T> {
        let mut removed = Vec::new();
        for request in std::mem::take(&mut self.requests) {
            let untouched = request.waiting.len() == request.outputs.len();
            if gone(&request.owner, untouched) {
                self.tokens -= request.waiting.iter().map(|(_, input)| input.ids.len()).sum::<usize>();
                removed.push(request.owner);
            } else {
                self.requests.push_back(request);
            }
        }
        removed
    }

    /// The next batch; empty if nothing waits.
    pub fn batch(&mut self, limits: &BatchLimits) -> Vec<(Place, Input)> {
        let mut batch: Vec<(Place, Input)> = Vec::new();
        let Some(turn) = self.requests.iter().position(|request| !request.waiting.is_empty()) else { return batch };
        let mut longest = 0;
        for request in self.requests.iter_mut().skip(turn) {
            loop {
                let fits = |len: usize| longest == 0 || (len <= longest && 2 * len > longest);
                let Some(at) = request.waiting.iter().rposition(|(_, input)| fits(input.ids.len())) else { break };
                let len = request.waiting[at].1.ids.len();
                longest = longest.max(len);
                if !batch.is_empty() && !limits.allows(batch.len() + 1, longest) {
                    break;
                }
                let (index, input) = request.waiting.remove(at);
                self.tokens -= len;
                batch.push((Place { request: request.id, index }, input));
            }
        }
        // Who had the turn waits for the others now.
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
        let request = self.requests.remove(at).expect("found above");
        self.tokens -= request.waiting.iter().map(|(_, input)| input.ids.len()).sum::<usize>();
        let outputs = || request.outputs.into_iter().map(|output| output.expect("none is left")).collect();
        Some((request.owner, failure.map_or_else(|| Ok(outputs()), Err)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BatchLimits = BatchLimits { tokens: 64, attention: 1 << 20, heads: 2 };

    fn input(tokens: usize) -> Input {
        Input { ids: vec![1; tokens], type_ids: vec![0; tokens] }
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
        backlog.push([3, 30, 20, 4, 31].map(input).into(), "a");
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
        backlog.push(vec![input(30); 100], "large");
        backlog.push(vec![input(10)], "small");
        backlog.push(vec![input(25)], "middle");
        assert_eq!(step(&mut backlog).0, [30, 30]);
        assert_eq!(step(&mut backlog), (vec![10], vec![("small", vec![vec![10.0]])]));
        assert_eq!(step(&mut backlog), (vec![25], vec![("middle", vec![vec![25.0]])]));
        // A single input left: others fill its batch.
        backlog.push(vec![input(31)], "late");
        assert_eq!(step(&mut backlog).0, [30, 30]);
        assert_eq!(step(&mut backlog), (vec![31, 30], vec![("late", vec![vec![31.0]])]));
    }

    #[test]
    fn one_input_above_every_limit_is_a_batch_of_its_own() {
        let mut backlog = Backlog::default();
        backlog.push(vec![input(1000), input(1000)], "a");
        assert_eq!(step(&mut backlog).0, [1000]);
        assert_eq!(step(&mut backlog).0, [1000]);
    }

    #[test]
    fn a_failed_input_fails_its_request_alone_and_what_is_left_of_that_is_not_computed() {
        let mut backlog = Backlog::default();
        backlog.push(vec![input(30); 5], "a");
        backlog.push(vec![input(5)], "b");
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
        backlog.push(vec![input(30); 3], "a");
        backlog.push(vec![input(5)], "b");
        let begun = backlog.batch(&LIMITS);
        assert_eq!(backlog.remove(|owner, untouched| *owner == "a" && untouched), Vec::<&str>::new());
        assert_eq!(backlog.remove(|owner, _| *owner == "a"), ["a"]);
        assert_eq!(backlog.done(begun[0].0, Ok(vec![])), None);
        assert_eq!((backlog.len(), backlog.tokens()), (1, 5));
    }
}
