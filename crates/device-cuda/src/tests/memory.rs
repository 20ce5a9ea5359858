//! Memory when there is little of it.

use std::sync::Arc;

use baton_device::{DeviceError, Result, StepMemory};

use super::gpu;
use crate::gpu::Gpu;
use crate::memory::{Buffer, Kind};
use crate::simulator::Simulator;

#[test]
fn what_scratch_holds_for_later_steps_is_not_free_but_goes_to_whoever_finds_no_room() {
    const MEGABYTE: usize = 1 << 20;
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    simulator.control(&format!("memory={}", 256 * MEGABYTE));
    let kept = gpu.load(&[7; 4096], "a test").unwrap();
    let scratch = gpu.scratch(128 * MEGABYTE).unwrap();
    // Queued work uses it until it has run.
    gpu.copy(kept.address(), scratch.address(), 4096).unwrap();
    gpu.copy(scratch.address(), kept.address(), 4096).unwrap();
    let in_use = gpu.memory().unwrap().free;
    assert!(matches!(gpu.alloc(160 * MEGABYTE, "a test"), Err(DeviceError::OutOfMemory { what: "a test", .. })));
    drop(scratch);
    assert_eq!(gpu.memory().unwrap().free, in_use);
    let large = gpu.alloc(160 * MEGABYTE, "a test").unwrap();
    assert!(matches!(gpu.scratch(128 * MEGABYTE), Err(DeviceError::OutOfMemory { what: "scratch", .. })));
    drop(large);
    assert!(gpu.scratch(128 * MEGABYTE).is_ok());
    let mut bytes = [0; 4096];
    gpu.read(kept.address(), &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
    drop((kept, gpu));
    assert_eq!(simulator.left(), []);
}

#[test]
fn a_size_beyond_every_address_is_no_room() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    for bytes in [usize::MAX, usize::MAX - 300, 1 << 62] {
        assert!(matches!(gpu.alloc(bytes, "a test"), Err(DeviceError::OutOfMemory { .. })), "{bytes}");
    }
}

/// Fills `out` by way of blocks of scratch that are in use at once.
fn step(gpu: &Arc<Gpu>, out: &Buffer, sizes: [usize; 2]) -> Result<()> {
    let [one, two] = sizes.map(|bytes| gpu.scratch(bytes));
    let (one, two) = (one?, two?);
    gpu.fill(one.address(), 4096, 5)?;
    gpu.copy(one.address(), two.address(), 4096)?;
    gpu.fill(one.address(), 4096, 6)?;
    gpu.copy(two.address(), out.address(), 4096)?;
    gpu.flush()
}

#[test]
fn rehearsed_steps_do_nothing_and_those_that_take_no_more_find_what_they_need() {
    const MEGABYTE: usize = 1 << 20;
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let out = gpu.load(&[7; 4096], "a test").unwrap();
    let steps = [[60, 30], [40, 40], [1, 50]].map(|sizes| sizes.map(|megabytes| megabytes * MEGABYTE));
    let free = gpu.memory().unwrap().free;
    let kept = gpu.rehearse(|| steps.iter().chain(&steps).try_for_each(|sizes| step(&gpu, &out, *sizes))).unwrap();
    // The simulator's graphs take 1 KiB for each of their tasks.
    assert_eq!(kept, StepMemory { scratch: 90 * MEGABYTE as u64, graphs: 3 * 4 * 1024 });
    assert_eq!((gpu.memory().unwrap().free, simulator.live_of("graph_execs")), (free - kept.scratch, 0));
    let mut bytes = [0; 4096];
    gpu.read(out.address(), &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);

    let before = gpu.statistics();
    for sizes in [[45, 45], [89, 1]].map(|sizes| sizes.map(|megabytes| megabytes * MEGABYTE)).iter().chain(&steps) {
        step(&gpu, &out, *sizes).unwrap();
        gpu.read(out.address(), &mut bytes).unwrap();
        assert_eq!(bytes, [5; 4096]);
    }
    assert_eq!(gpu.statistics().allocations, before.allocations);
    step(&gpu, &out, [60 * MEGABYTE, 31 * MEGABYTE]).unwrap();
    assert_eq!(gpu.statistics().allocations, before.allocations + 1);
    drop((out, gpu));
    simulator.expect_clean();
}

#[test]
fn a_rehearsal_that_fails_leaves_a_device_that_runs_what_it_is_asked() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    simulator.control(&format!("memory={}", 256 << 20));
    let out = gpu.load(&[7; 4096], "a test").unwrap();
    let refused = gpu.rehearse(|| step(&gpu, &out, [200 << 20; 2]));
    assert!(matches!(refused, Err(DeviceError::OutOfMemory { what: "scratch", .. })), "{refused:?}");
    step(&gpu, &out, [4096; 2]).unwrap();
    let mut bytes = [0; 4096];
    gpu.read(out.address(), &mut bytes).unwrap();
    assert_eq!(bytes, [5; 4096]);
}

#[test]
fn blocks_that_are_reserved_together_take_one_piece_of_the_driver_and_little_more_than_their_sum() {
    let Some(simulator) = Simulator::new() else { return };
    let gpu = gpu(&simulator);
    let (sizes, before) = ([3 << 20, 33 << 20, 257, 5 << 20], gpu.statistics());
    gpu.reserve_together(Kind::Lasting, sizes).unwrap();
    let _blocks = sizes.map(|bytes| gpu.alloc(bytes, "a test").unwrap());
    let now = gpu.statistics();
    assert_eq!(now.allocations - before.allocations, 1);
    assert_eq!(now.allocated - before.allocated, 42 << 20);
    [1 << 40, usize::MAX].into_iter().for_each(|bytes| gpu.reserve_together(Kind::Lasting, [bytes]).unwrap());
    assert!(matches!(gpu.alloc(1 << 40, "a test"), Err(DeviceError::OutOfMemory { .. })));
}
