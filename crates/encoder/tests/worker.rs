//! The worker: every request gets its own results, in turn, or a reason.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use baton_encoder::{EncoderHandle, Input, Limits, LoadOptions, Reply, RunError, Share, SubmitError, Worker};
use common::{Checkpoint, difference, golden, input};

type Outcome = Result<Vec<Vec<f32>>, RunError>;

struct Sent(Sender<Outcome>, Arc<AtomicBool>);

impl Reply for Sent {
    fn wanted(&self) -> bool {
        self.1.load(Ordering::SeqCst)
    }

    fn send(self: Box<Self>, result: Outcome) {
        let _ = self.0.send(result);
    }
}

const ROOM: Limits = Limits { requests: 64, tokens: 1 << 16 };

fn start(limits: Limits) -> (EncoderHandle, Worker) {
    Worker::start(Checkpoint::case("bert").load(&LoadOptions::default()).unwrap(), limits)
}

fn ask(handle: &EncoderHandle, inputs: Vec<Input>) -> Result<(Receiver<Outcome>, Arc<AtomicBool>), SubmitError> {
    let ((sender, receiver), wanted) = (channel(), Arc::new(AtomicBool::new(true)));
    handle.submit(inputs, Share::default(), None, Box::new(Sent(sender, wanted.clone())))?;
    Ok((receiver, wanted))
}

fn inputs() -> Vec<Input> {
    golden("bert").iter().map(input).filter(|input| input.ids.len() <= 24).collect()
}

const LARGE: usize = 500;

/// Texts enough for many batches.
fn large() -> Vec<Input> {
    std::iter::repeat_n(Input { ids: vec![9; 24], type_ids: vec![0; 24] }, LARGE).collect()
}

#[test]
fn requests_of_many_clients_get_their_own_results_in_the_order_of_their_inputs() {
    let (handle, _worker) = start(ROOM);
    let alone: Vec<Vec<f32>> = inputs()
        .into_iter()
        .map(|input| ask(&handle, vec![input]).unwrap().0.recv().unwrap().unwrap().remove(0))
        .collect();
    std::thread::scope(|scope| {
        for client in 0..8 {
            let (handle, alone) = (&handle, &alone);
            scope.spawn(move || {
                for round in 0..10 {
                    let first = (client + round) % alone.len();
                    let mut inputs = inputs();
                    inputs.rotate_left(first);
                    let results = ask(handle, inputs).unwrap().0.recv().unwrap().unwrap();
                    for (i, result) in results.iter().enumerate() {
                        let off = difference(result, &alone[(first + i) % alone.len()]);
                        assert!(off < 1e-6, "{off}");
                    }
                }
            });
        }
    });
    let stats = handle.stats();
    assert_eq!((stats.requests, stats.waiting_tokens, stats.failed), (0, 0, 0));
    assert_eq!(stats.inputs, 4 + 80 * 4);
    assert!(stats.batches <= stats.inputs);
}

#[test]
fn a_small_request_does_not_wait_for_the_end_of_a_large_one() {
    let (handle, _worker) = start(ROOM);
    let (large, _) = ask(&handle, large()).unwrap();
    let (small, _) = ask(&handle, inputs()[..1].to_vec()).unwrap();
    small.recv().unwrap().unwrap();
    assert!(large.try_recv().is_err());
    assert_eq!(large.recv().unwrap().unwrap().len(), LARGE);
}

#[test]
fn the_rest_of_a_request_whose_client_has_left_is_not_computed() {
    let (handle, _worker) = start(ROOM);
    let (large, wanted) = ask(&handle, large()).unwrap();
    wanted.store(false, Ordering::SeqCst);
    let (small, _) = ask(&handle, inputs()[..1].to_vec()).unwrap();
    small.recv().unwrap().unwrap();
    assert!(large.recv().is_err(), "its reply is dropped");
    assert!(handle.stats().inputs < LARGE as u64);
    assert_eq!(handle.stats().requests, 0);
}

#[test]
fn more_than_may_wait_is_refused_and_what_is_wrong_is_said_at_once() {
    let (handle, _worker) = start(Limits { requests: 2, tokens: 100_000 });
    let _first = ask(&handle, large()).unwrap();
    let _second = ask(&handle, inputs()).unwrap();
    assert_eq!(ask(&handle, inputs()).err(), Some(SubmitError::QueueFull));
    let (handle, _worker) = start(Limits { requests: 64, tokens: 100 });
    let _first = ask(&handle, large()).unwrap();
    assert_eq!(ask(&handle, large()).err(), Some(SubmitError::QueueFull));

    let (handle, _worker) = start(ROOM);
    let of = |ids: Vec<u32>, type_ids: Vec<u32>| vec![inputs().remove(0), Input { ids, type_ids }];
    assert_eq!(ask(&handle, of(vec![], vec![])).err(), Some(SubmitError::Empty { index: 1 }));
    let long = SubmitError::TooLong { index: 1, tokens: 25, context: 24 };
    assert_eq!(ask(&handle, of(vec![2; 25], vec![0; 25])).err(), Some(long));
    let vocab = SubmitError::TokenOutOfRange { index: 1, vocab: 76 };
    assert_eq!(ask(&handle, of(vec![76], vec![0])).err(), Some(vocab));
    assert_eq!(ask(&handle, of(vec![2], vec![2])).err(), Some(vocab));
}

#[test]
fn who_waits_too_long_for_a_beginning_and_who_is_left_at_the_end_are_told_so() {
    let (handle, worker) = start(ROOM);
    let (large, _) = ask(&handle, large()).unwrap();
    let ((sender, late), wanted) = (channel(), Arc::new(AtomicBool::new(true)));
    let past = Instant::now() - Duration::from_millis(1);
    handle.submit(inputs(), Share::default(), Some(past), Box::new(Sent(sender, wanted))).unwrap();
    assert_eq!(late.recv().unwrap(), Err(RunError::Expired));
    drop(worker);
    assert_eq!(large.recv().unwrap(), Err(RunError::Stopped));
    assert_eq!(ask(&handle, inputs()).err(), Some(SubmitError::Stopped));
    assert!(!handle.stats().alive);
}
