//! Sums over ranks.

use std::{sync::Barrier, thread};

use half::bf16;

use super::harness::*;

fn enter(device: i32) {
    well(cuCtxSetCurrent(made(|out| cuDevicePrimaryCtxRetain(out, device))));
}

/// A rank's device, with a stream and values.
fn prepare<T: Copy>(device: i32, values: &[T]) -> (u64, u64) {
    enter(device);
    let block = made(|out| cuMemAlloc_v2(out, size_of_val(values)));
    well(cuMemcpyHtoD_v2(block, values.as_ptr() as u64, size_of_val(values)));
    (block, made(|out| cuStreamCreate(out, flag::STREAM_NON_BLOCKING)))
}

fn read<T: Copy + Default>(block: u64, stream: u64, count: usize) -> Vec<T> {
    let mut values = vec![T::default(); count];
    well(cuMemcpyDtoHAsync_v2(values.as_mut_ptr() as u64, block, count * size_of::<T>(), stream));
    values
}

fn new_id() -> UniqueId {
    // SAFETY: all zeros are an identity that nobody has.
    let mut id = unsafe { std::mem::zeroed() };
    well(ncclGetUniqueId(&mut id));
    id
}

#[test]
fn ranks_on_threads_of_their_own_get_the_same_sum() {
    let _session = Session::new();
    let id = new_id();
    let sums: Vec<Vec<f32>> = thread::scope(|scope| {
        let rank = |rank: i32| {
            let (block, stream) = prepare(rank, &[1.0 + rank as f32, 10.0]);
            let communicator = made(|out| ncclCommInitRank(out, 2, id, rank));
            for _ in 0..2 {
                well(ncclAllReduce(block, block, 2, 7, SUM, communicator, stream));
            }
            let sum = read(block, stream, 2);
            well(ncclCommDestroy(communicator));
            sum
        };
        let ranks: Vec<_> = (0..2).map(|number| scope.spawn(move || rank(number))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert_eq!(sums, [[6.0, 40.0], [6.0, 40.0]]);
    assert_eq!(count("live.communicators"), 0);
}

#[test]
fn one_thread_drives_several_ranks_and_graphs_of_them() {
    let _session = Session::new();
    let mut communicators = [0u64; 2];
    // SAFETY: room for two, and two devices.
    well(unsafe { ncclCommInitAll(communicators.as_mut_ptr(), 2, [0, 1].as_ptr()) });
    let ones = [bf16::ONE.to_bits(); 3];
    let ranks = [0, 1].map(|device| prepare(device, &ones));
    let execs = [0usize, 1].map(|rank| {
        let (block, stream) = ranks[rank];
        enter(rank as i32);
        well(cuStreamBeginCapture_v2(stream, flag::CAPTURE_THREAD_LOCAL));
        well(ncclAllReduce(block, block, 3, 9, SUM, communicators[rank], stream));
        let graph = made(|out| cuStreamEndCapture(stream, out));
        made(|out| cuGraphInstantiateWithFlags(out, graph, 0))
    });
    for _ in 0..3 {
        for rank in 0..2 {
            enter(rank as i32);
            well(cuGraphLaunch(execs[rank], ranks[rank].1));
        }
    }
    for (rank, (block, stream)) in ranks.into_iter().enumerate() {
        enter(rank as i32);
        assert_eq!(read::<u16>(block, stream, 3), [bf16::from_f32(8.0).to_bits(); 3]);
    }
    communicators.into_iter().for_each(|communicator| well(ncclCommDestroy(communicator)));
}

#[test]
fn a_rank_that_gives_up_lets_the_others_go() {
    let _session = Session::new();
    let (id, queued) = (new_id(), Barrier::new(2));
    thread::scope(|scope| {
        let queued = &queued;
        scope.spawn(move || {
            let (block, stream) = prepare(0, &[1f32]);
            let communicator = made(|out| ncclCommInitRank(out, 2, id, 0));
            well(ncclAllReduce(block, block, 1, 7, SUM, communicator, stream));
            queued.wait();
            well(cuStreamSynchronize(stream));
            assert_eq!(made(|out| ncclCommGetAsyncError(communicator, out)), REMOTE_ERROR);
            well(ncclCommAbort(communicator));
        });
        prepare(1, &[1f32]);
        let communicator = made(|out| ncclCommInitRank(out, 2, id, 1));
        queued.wait();
        well(ncclCommAbort(communicator));
    });
    assert_eq!(count("live.communicators"), 0);
}

#[test]
fn all_ranks_get_what_the_named_one_has() {
    let _session = Session::new();
    let mut communicators = [0u64; 2];
    // SAFETY: room for two; without a list devices are counted.
    well(unsafe { ncclCommInitAll(communicators.as_mut_ptr(), 2, std::ptr::null()) });
    for root in 0..2 {
        let ranks = [prepare(0, &[1i32, -1]), prepare(1, &[7i32, 8])];
        for ((block, stream), communicator) in ranks.into_iter().zip(communicators) {
            well(ncclBroadcast(block, block, 2, 2, root, communicator, stream));
        }
        for (device, (block, stream)) in (0..).zip(ranks) {
            enter(device);
            assert_eq!(read::<i32>(block, stream, 2), [[1, -1], [7, 8]][root as usize]);
        }
    }
    let (block, stream) = prepare(0, &[1i32]);
    for (kind, root) in [(2, 2), (2, -1), (7, 0)] {
        let code = ncclBroadcast(block, block, 1, kind, root, communicators[0], stream);
        assert_eq!(code, INVALID_ARGUMENT, "type {kind} of rank {root}");
    }
    communicators.into_iter().for_each(|communicator| well(ncclCommDestroy(communicator)));
}

#[test]
fn ranks_that_sum_different_counts_fail() {
    let _session = Session::new();
    let mut communicators = [0u64; 2];
    // SAFETY: room for two; without a list devices are counted.
    well(unsafe { ncclCommInitAll(communicators.as_mut_ptr(), 2, std::ptr::null()) });
    let [(a, first), (b, second)] = [0, 1].map(|device| prepare(device, &[1f32, 2.0]));
    well(ncclAllReduce(a, a, 1, 7, SUM, communicators[0], first));
    well(ncclAllReduce(b, b, 2, 7, SUM, communicators[1], second));
    assert_eq!(cuStreamSynchronize(second), cuda::LAUNCH_FAILED);
    assert_said("different counts");
    assert_eq!(ncclAllReduce(a, b, 1, 7, SUM, communicators[0], first), INVALID_ARGUMENT, "another device's memory");
    communicators.into_iter().for_each(|communicator| well(ncclCommAbort(communicator)));
}
