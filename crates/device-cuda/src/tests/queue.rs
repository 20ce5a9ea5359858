//! The queue: what runs, when, and from which graph.

use std::sync::Arc;

use baton_device::DeviceError;

use super::gpu;
use crate::gpu::Gpu;
use crate::memory::Buffer;
use crate::queue::Fetch;
use crate::simulator::Simulator;
use crate::staging::Slot;
use crate::statistics::Statistics;

/// Bytes of the buffers of these tests.
const BYTES: usize = 1000;

fn read(gpu: &Gpu, buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0xee; BYTES];
    gpu.read(buffer.address(), &mut bytes).unwrap();
    bytes
}

/// A step: brings a number to the slot, and from there through scratch to `out`, beside `noise` that it leaves in no place.
fn step(gpu: &Arc<Gpu>, slot: &Slot, out: &Buffer, number: u8, noise: u8) {
    let from = gpu.upload(slot, &[number; BYTES]).unwrap();
    let (one, two) = (gpu.scratch(BYTES).unwrap(), gpu.scratch(BYTES).unwrap());
    gpu.copy(from, one.address(), BYTES).unwrap();
    gpu.fill(out.address(), BYTES, noise).unwrap();
    gpu.copy(one.address(), two.address(), BYTES).unwrap();
    drop(one);
    gpu.copy(two.address(), out.address(), BYTES).unwrap();
}

fn since(gpu: &Gpu, before: &Statistics) -> (u64, u64, u64, u64) {
    let now = gpu.statistics();
    (
        now.lists - before.lists,
        now.captures - before.captures,
        now.replays - before.replays,
        now.allocations - before.allocations,
    )
}

#[test]
fn a_list_runs_as_it_is_once_and_as_a_graph_ever_after_with_the_contents_of_then() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (slot, out) = (gpu.slot(BYTES, "a slot").unwrap(), gpu.alloc(BYTES, "an output").unwrap());
    step(&gpu, &slot, &out, 1, 0);
    assert_eq!(read(&gpu, &out), [1; BYTES]);
    let before = gpu.statistics();
    for number in 2..20 {
        step(&gpu, &slot, &out, number, 0);
        assert_eq!(read(&gpu, &out), [number; BYTES]);
    }
    assert_eq!(since(&gpu, &before), (0, 1, 18, 0), "lists, captures, replays, allocations");
    drop((slot, out, gpu));
    simulator.expect_clean();
}

#[test]
fn lists_in_rotation_are_graphs_however_many_a_step_has() {
    const LISTS: u8 = 200;
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (slot, out) = (gpu.slot(BYTES, "a slot").unwrap(), gpu.alloc(BYTES, "an output").unwrap());
    let turn = |number| {
        let before = gpu.statistics();
        for list in 0..LISTS {
            step(&gpu, &slot, &out, number, list);
            gpu.flush().unwrap();
        }
        assert_eq!(read(&gpu, &out), [number; BYTES]);
        let (lists, captures, replays, _) = since(&gpu, &before);
        (lists, captures, replays)
    };
    let all = u64::from(LISTS);
    assert_eq!([turn(1), turn(2), turn(3)], [(all, 0, 0), (0, all, all), (0, 0, all)]);
    drop((slot, out, gpu));
    simulator.expect_clean();
}

#[test]
fn a_list_that_differs_in_one_argument_is_another() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (slot, out) = (gpu.slot(BYTES, "a slot").unwrap(), gpu.alloc(BYTES, "an output").unwrap());
    let other = gpu.alloc(BYTES, "another output").unwrap();
    gpu.fill(other.address(), BYTES, 7).unwrap();
    for _ in 0..3 {
        step(&gpu, &slot, &out, 1, 0);
        assert_eq!(read(&gpu, &out), [1; BYTES]);
    }
    let before = gpu.statistics();
    step(&gpu, &slot, &other, 2, 0);
    assert_eq!((read(&gpu, &other), read(&gpu, &out)), (vec![2; BYTES], vec![1; BYTES]));
    step(&gpu, &slot, &out, 3, 9);
    assert_eq!(read(&gpu, &out), [3; BYTES]);
    assert_eq!(since(&gpu, &before), (2, 0, 0, 0), "lists, captures, replays, allocations");
}

#[test]
fn what_is_uploaded_does_not_overtake_queued_work_that_reads_the_place() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let slot = gpu.slot(BYTES, "a slot").unwrap();
    let outs: Vec<Buffer> = (0..4).map(|_| gpu.alloc(BYTES, "an output").unwrap()).collect();
    for (number, out) in (1..).zip(&outs) {
        let from = gpu.upload(&slot, &[number; BYTES]).unwrap();
        gpu.copy(from, out.address(), BYTES).unwrap();
    }
    for (number, out) in (1..).zip(&outs) {
        assert_eq!(read(&gpu, out), [number; BYTES]);
    }
}

#[test]
fn a_slot_that_is_too_small_moves_and_what_is_queued_reads_the_old_place() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (slot, out) = (gpu.slot(16, "a slot").unwrap(), gpu.alloc(BYTES, "an output").unwrap());
    let small = gpu.upload(&slot, &[1; 16]).unwrap();
    gpu.fill(out.address(), BYTES, 3).unwrap();
    gpu.copy(small, out.address(), 16).unwrap();
    let large = gpu.upload(&slot, &[2; BYTES]).unwrap();
    assert_ne!(small, large);
    assert_eq!(read(&gpu, &out), [vec![1; 16], vec![3; BYTES - 16]].concat());
    assert_eq!(gpu.upload(&slot, &[4; BYTES]).unwrap(), large);
}

#[test]
fn long_uploads_and_reads_come_through_in_parts() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let bytes: Vec<u8> = (0..9 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (loaded, slot) = (gpu.load(&bytes, "a weight").unwrap(), gpu.slot(bytes.len(), "a slot").unwrap());
    let mut back = vec![0; bytes.len()];
    gpu.read(loaded.address(), &mut back).unwrap();
    assert!(back == bytes);
    let uploaded = gpu.upload(&slot, &bytes).unwrap();
    gpu.read(uploaded, &mut back).unwrap();
    assert!(back == bytes);
}

#[test]
fn memory_that_is_given_back_is_not_loaded_into_while_queued_work_uses_it() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (first, out) = (gpu.alloc(BYTES, "a weight").unwrap(), gpu.alloc(BYTES, "an output").unwrap());
    let place = first.address();
    gpu.fill(place, BYTES, 5).unwrap();
    gpu.copy(place, out.address(), BYTES).unwrap();
    drop(first);
    let second = gpu.load(&[6; BYTES], "a weight").unwrap();
    assert_eq!((read(&gpu, &out), read(&gpu, &second)), (vec![5; BYTES], vec![6; BYTES]));
    drop(second);
    gpu.synchronize().unwrap();
    assert_eq!(gpu.alloc(BYTES, "a weight").unwrap().address(), place);
}

#[test]
fn what_cannot_be_captured_runs_all_the_same() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (slot, out) = (gpu.slot(BYTES, "a slot").unwrap(), gpu.alloc(BYTES, "an output").unwrap());
    let faults = ["cuMemsetD8Async:1:900", "cuGraphInstantiateWithFlags:1:2", "cuGraphUpload:1:2"];
    for (noise, fault) in (1..).zip(faults) {
        step(&gpu, &slot, &out, 7, noise);
        assert_eq!(read(&gpu, &out), [7; BYTES]);
        let before = gpu.statistics();
        simulator.control(&format!("fault={fault}"));
        for number in 0..5 {
            step(&gpu, &slot, &out, number, noise);
            assert_eq!(read(&gpu, &out), [number; BYTES]);
        }
        assert_eq!(since(&gpu, &before), (5, 0, 0, 0), "lists, captures, replays, allocations");
    }
}

#[test]
fn graphs_that_are_kept_have_a_bound() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (slot, out) = (gpu.slot(BYTES, "a slot").unwrap(), gpu.alloc(BYTES, "an output").unwrap());
    let before = gpu.statistics();
    // As many words as a step of a large model.
    let key = vec![7; 8192];
    for noise in 0..200 {
        for number in 0..3 {
            gpu.call("nothing", &key, |_, _| Ok(())).unwrap();
            step(&gpu, &slot, &out, number, noise);
            assert_eq!(read(&gpu, &out), [number; BYTES]);
        }
    }
    assert_eq!(since(&gpu, &before), (200, 200, 400, 1), "lists, captures, replays, allocations");
    assert_eq!(simulator.live_of("graph_execs"), 127);
    drop((slot, out, gpu));
    simulator.expect_clean();
}

#[test]
fn a_fetch_is_waited_for_and_nothing_behind_it() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (slot, out) = (gpu.slot(BYTES, "a slot").unwrap(), gpu.alloc(BYTES, "an output").unwrap());
    let fetched = |fetch: &Fetch| {
        let mut bytes = vec![0xee; BYTES];
        gpu.finish(fetch, &mut bytes).unwrap();
        bytes
    };
    let begin = |number: u8| {
        step(&gpu, &slot, &out, number, 0);
        gpu.fetch(out.address(), BYTES).unwrap()
    };
    let before = gpu.statistics();
    let mut ahead = begin(0);
    // Uploads of many times the page-locked memory, each while the step before is under way.
    for number in 1..=100 {
        let more = gpu.upload(&slot, &[7; 1 << 17]).unwrap();
        gpu.fill(more, 1, 1).unwrap();
        let (next, copies) = (begin(number), simulator.count("copies.device_to_device"));
        assert_eq!(fetched(&ahead), [number - 1; BYTES]);
        assert_eq!(simulator.count("copies.device_to_device") - copies, 3, "its own");
        ahead = next;
    }
    assert_eq!(gpu.statistics().waits - before.waits, 100);
    // Also behind one that nobody waits for.
    drop(begin(1));
    let last = begin(2);
    assert_eq!((fetched(&last), fetched(&ahead)), (vec![2; BYTES], vec![100; BYTES]));
    drop((slot, out, last, ahead, gpu));
    simulator.expect_clean();
}

#[test]
fn an_upload_behind_a_fetch_keeps_its_place_when_the_fetch_has_ended() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    // More than half of the page-locked memory.
    const LARGE: usize = 3 << 20;
    let slots = [1, 2].map(|_| gpu.slot(LARGE, "a slot").unwrap());
    let out = gpu.alloc(1, "an output").unwrap();
    let upload = |slot: &Slot, number: u8| {
        let address = gpu.upload(slot, &vec![number; LARGE]).unwrap();
        gpu.fetch(address + LARGE as u64 - 1, 1).unwrap()
    };
    let (first, second) = (gpu.fetch(out.address(), 1).unwrap(), upload(&slots[0], 2));
    let mut byte = [0];
    gpu.finish(&first, &mut byte).unwrap();
    let before = gpu.statistics();
    let third = upload(&slots[1], 3);
    assert_eq!(gpu.statistics().waits, before.waits + 1, "there is no room beside what is under way");
    gpu.finish(&second, &mut byte).unwrap();
    assert_eq!(byte, [2]);
    gpu.finish(&third, &mut byte).unwrap();
    assert_eq!(byte, [3]);
}

#[test]
fn no_room_says_for_what_and_leaves_the_device_as_it_was() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let out = gpu.alloc(BYTES, "an output").unwrap();
    match gpu.alloc(1 << 40, "a cache").map(|_| ()) {
        Err(DeviceError::OutOfMemory { device, bytes, what }) => {
            assert_eq!((device.as_str(), bytes, what), ("cuda:0", 1 << 40, "a cache"));
        }
        other => panic!("{other:?}"),
    }
    gpu.fill(out.address(), BYTES, 8).unwrap();
    assert_eq!(read(&gpu, &out), [8; BYTES]);
}

#[test]
fn an_error_that_sticks_poisons_every_call_and_a_new_backend_begins_anew() {
    let Some(simulator) = Simulator::new() else { return };
    let broken = gpu(&simulator);
    let out = broken.alloc(BYTES, "an output").unwrap();
    simulator.control("fault=cuStreamSynchronize:1:700");
    broken.fill(out.address(), BYTES, 8).unwrap();
    let mut bytes = [0; BYTES];
    for _ in 0..2 {
        match broken.read(out.address(), &mut bytes) {
            Err(DeviceError::Poisoned { device, reason }) => {
                assert!(device == "cuda:0" && reason.contains("ILLEGAL_ADDRESS"), "{device}: {reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(broken.alloc(1, "more").map(|_| ()), Err(DeviceError::Poisoned { .. })));
    let fresh = gpu(&simulator);
    let other = fresh.alloc(BYTES, "an output").unwrap();
    // What the old one gives back now must not be the new one's.
    drop((out, broken));
    fresh.fill(other.address(), BYTES, 9).unwrap();
    assert_eq!(read(&fresh, &other), [9; BYTES]);
    drop((other, fresh));
    // What libraries and host hold for a context that is gone is not asked back: the driver takes it at the reset.
    assert_eq!(simulator.left(), [("blas_handles", 1), ("host_blocks", 6)]);
}

#[test]
fn a_device_that_is_gone_is_lost() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let out = gpu.alloc(BYTES, "an output").unwrap();
    simulator.control("lost=214");
    gpu.fill(out.address(), BYTES, 8).unwrap();
    assert!(matches!(gpu.read(out.address(), &mut [0; BYTES]), Err(DeviceError::Lost { .. })));
    simulator.control("lost=0");
    assert!(matches!(gpu.synchronize(), Err(DeviceError::Lost { .. })));
}
