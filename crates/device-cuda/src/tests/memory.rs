//! Memory when there is little of it.

use baton_device::DeviceError;

use super::gpu;
use crate::simulator::Simulator;

#[test]
fn what_scratch_holds_for_later_steps_is_free_and_goes_to_whoever_finds_no_room() {
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
    assert_eq!(gpu.memory().unwrap().free, in_use + 128 * MEGABYTE as u64);
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
