//! Collected calls and graphs below the seam.

use baton_device::DeviceError;

use super::{floats, open, values};
use crate::device::Device;
use crate::error::AscendError;
use crate::graphs::{LEAST_CALLS, MOST_GRAPHS};
use crate::object::{Address, DataType, View};
use crate::ops::rows::scale;
use crate::owner::Owner;
use crate::simulator::Simulator;

/// Queues `x *= 2`, `times` times in one operation.
fn double(owner: &Owner, op: &'static str, x: &View, times: usize) {
    let x = x.clone();
    let work = move |device: &mut Device| (0..times).try_for_each(|_| scale(device, &x, 2.0));
    owner.submit(op, move |device| device.collect(op, work)).unwrap();
}

fn numbers(owner: &Owner) -> View {
    owner.call("test", |device| floats(device, &[1.0, 3.0], DataType::F32)).unwrap()
}

fn read(owner: &Owner, x: &View) -> baton_device::Result<Vec<f32>> {
    let x = x.clone();
    owner.call("read", move |device| values(device, &x))
}

/// Calls of a function so far.
fn calls(simulator: &Simulator, symbol: &str) -> u64 {
    simulator.report()["calls"][symbol].as_u64().unwrap_or(0)
}

const RUN: &str = "aclmdlRIExecuteAsync";

#[test]
fn a_piece_of_several_operations_is_issued_captured_and_then_run() {
    let simulator = Simulator::new();
    let owner = open();
    let x = numbers(&owner);
    let mut expected = 1.0;
    for (graphs, prepared) in [(0, 6), (1, 12), (2, 12), (3, 12)] {
        (0..3).for_each(|_| double(&owner, "double", &x, 2));
        expected *= 64.0;
        assert_eq!(read(&owner, &x).unwrap(), [expected, 3.0 * expected]);
        assert_eq!(calls(&simulator, RUN), graphs);
        assert_eq!(calls(&simulator, "aclnnInplaceMulsGetWorkspaceSize"), prepared);
    }
    drop(owner);
    assert_eq!(calls(&simulator, "aclmdlRIDestroy"), 1);
    simulator.expect_clean();
}

#[test]
fn few_calls_are_no_graph() {
    let simulator = Simulator::new();
    let owner = open();
    let x = numbers(&owner);
    for _ in 0..4 {
        double(&owner, "double", &x, LEAST_CALLS - 1);
        read(&owner, &x).unwrap();
    }
    assert_eq!(calls(&simulator, "aclmdlRICaptureBegin"), 0);
}

#[test]
fn the_same_calls_on_another_block_are_another_piece() {
    let simulator = Simulator::new();
    let owner = open();
    let blocks = [(); 2].map(|()| numbers(&owner));
    for (time, graphs) in [(1, 0), (2, 2), (3, 4)] {
        for x in &blocks {
            double(&owner, "double", x, 5);
            let expected = 32f32.powi(time);
            assert_eq!(read(&owner, x).unwrap(), [expected, 3.0 * expected]);
        }
        assert_eq!(calls(&simulator, RUN), graphs);
    }
}

#[test]
fn the_same_operators_with_another_number_are_another_piece() {
    let simulator = Simulator::new();
    let owner = open();
    let x = numbers(&owner);
    for factor in [2.0, 0.5, 2.0, 0.5, 4.0, 0.25, 2.0] {
        let before = read(&owner, &x).unwrap()[0];
        let at = x.clone();
        let work = move |device: &mut Device| (0..4).try_for_each(|_| scale(device, &at, factor));
        owner.submit("scale", move |device| device.collect("scale", work)).unwrap();
        assert_eq!(read(&owner, &x).unwrap()[0], before * factor.powi(4), "{factor}");
    }
    assert_eq!(calls(&simulator, RUN), 3);
}

#[test]
fn what_is_collected_keeps_its_order_with_copies_and_with_the_work_of_others() {
    let simulator = Simulator::new();
    let owner = open();
    let x = numbers(&owner);
    for _ in 0..4 {
        double(&owner, "double", &x, 4);
        let at = x.base;
        // A copy inside of an operation that collects, between calls of it.
        let both = x.clone();
        let work = move |device: &mut Device| {
            scale(device, &both, 3.0)?;
            device.upload(&crate::device::encode(&[5.0], DataType::F32), at)?;
            scale(device, &both, 2.0)
        };
        owner.submit("write", move |device| device.collect("write", work)).unwrap();
        let before = x.clone();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let x = before;
                owner.submit("other", move |device| scale(device, &x, 10.0)).unwrap();
            });
            other.join().expect("no panic");
        });
        double(&owner, "double", &x, 1);
        let values = read(&owner, &x).unwrap();
        assert_eq!(values[0], 5.0 * 2.0 * 10.0 * 2.0);
        let known = crate::device::encode(&[1.0, 3.0], DataType::F32);
        owner.call("write", move |device| device.upload(&known, at)).unwrap();
        assert_eq!(values[1], 3.0 * 16.0 * 3.0 * 2.0 * 10.0 * 2.0);
    }
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn a_failure_is_that_of_the_operation_and_thread_that_made_the_call() {
    let simulator = Simulator::new();
    let owner = open();
    for other_first in [false, true] {
        let [x, y] = [(); 2].map(|()| numbers(&owner));
        simulator.control("fault=aclnnInplaceMulsGetWorkspaceSize:6:561002");
        double(&owner, "first", &x, 4);
        double(&owner, "second", &x, 4);
        double(&owner, "third", &x, 4);
        if other_first {
            std::thread::scope(|scope| {
                let other = scope.spawn(|| {
                    double(&owner, "theirs", &y, 1);
                    read(&owner, &y)
                });
                assert_eq!(other.join().expect("no panic").expect("their work is sound"), [2.0, 6.0]);
            });
        }
        match read(&owner, &x) {
            Err(DeviceError::Execution { op: "second", reason, .. }) => {
                assert!(reason.contains("aclnnInplaceMuls gave 561002"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        // What was left of the piece is gone, and the device goes on.
        double(&owner, "first", &x, 1);
        assert_eq!(read(&owner, &x).unwrap(), [64.0, 192.0]);
        simulator.calm();
    }
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn what_an_operation_collected_before_it_failed_is_dropped() {
    let simulator = Simulator::new();
    let owner = open();
    let x = numbers(&owner);
    let at = x.clone();
    let work = move |device: &mut Device| {
        scale(device, &at, 2.0)?;
        device.alloc(1 << 40).map(drop)
    };
    double(&owner, "before", &x, 1);
    owner.submit("step", move |device| device.collect("step", work)).unwrap();
    assert!(matches!(read(&owner, &x), Err(DeviceError::OutOfMemory { what: "step", .. })));
    // What could be given back had to be waited for, so it was all issued.
    assert_eq!(read(&owner, &x).unwrap(), [4.0, 12.0]);
    let at = x.clone();
    let work = move |device: &mut Device| scale(device, &at, 2.0).and(Err(AscendError::Null { call: "test" }));
    owner.submit("step", move |device| device.collect("step", work)).unwrap();
    assert!(matches!(read(&owner, &x), Err(DeviceError::Execution { op: "step", .. })));
    assert_eq!(read(&owner, &x).unwrap(), [4.0, 12.0]);
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn graphs_go_with_the_segments_that_they_may_use() {
    let simulator = Simulator::new();
    let owner = open();
    // A segment of its own.
    let block = owner.call("test", |device| device.alloc(9 << 20)).unwrap();
    let x = View::new(block, DataType::F32, &[2]);
    for _ in 0..3 {
        double(&owner, "double", &x, 4);
        read(&owner, &x).unwrap();
    }
    owner.call("test", Device::release_free).unwrap();
    assert_eq!(simulator.live()["graphs"], 1, "the segment is in use");
    owner.free(block);
    owner.call("test", Device::release_free).unwrap();
    assert_eq!(simulator.live().get("graphs"), None);
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn a_segment_that_is_free_stays_while_calls_that_use_it_are_issued() {
    /// More than the first segment has: one as a whole.
    const SEGMENT: usize = (34 << 20) - 512;
    let simulator = Simulator::new();
    simulator.control("memory=100663296");
    let owner = open();
    let x = numbers(&owner);
    let all_but_one = |device: &mut Device| {
        let segment = device.alloc(SEGMENT)?;
        while let Ok(_block) = device.alloc(1 << 20) {}
        while let Ok(_block) = device.alloc(1) {}
        device.free(segment);
        Ok(())
    };
    owner.call("test", all_but_one).unwrap();
    let at = x.clone();
    let work = move |device: &mut Device| {
        device.with_scratch(SEGMENT, |device, scratch| {
            scale(device, &at, 2.0)?;
            device.clear(scratch, SEGMENT)
        })
    };
    owner.submit("step", move |device| device.collect("step", work)).unwrap();
    let result = read(&owner, &x);
    assert!(matches!(result, Err(DeviceError::OutOfMemory { what: "step", .. })), "{result:?}");
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn a_workspace_that_grows_while_a_piece_is_issued_takes_none_of_its_scratch() {
    let simulator = Simulator::new();
    let owner = open();
    // Of a size that the workspace of the second call fits into best.
    let large = 300_000;
    let big = owner.call("test", move |device| floats(device, &vec![1.0; large], DataType::F32)).unwrap();
    let x = numbers(&owner);
    for _ in 0..4 {
        let (x, big) = (x.clone(), big.clone());
        let work = move |device: &mut Device| {
            for bytes in [16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20] {
                device.with_scratch(bytes, |device, scratch| {
                    let kept = View::new(scratch, DataType::F32, &[bytes / 4]);
                    device.clear(scratch, bytes)?;
                    scale(device, &big, 1.0)?;
                    // Adds up to nothing, unless somebody wrote to the scratch meanwhile.
                    let (x, part) = (device.tensor(&x), device.tensor(&kept.narrow(0, bytes / 8, 2)));
                    let one = device.scalar(1.0, DataType::F32);
                    device.add_in_place(&x, &part, &one)?;
                    let first = device.tensor(&kept.narrow(0, 0, 2));
                    device.add_in_place(&x, &first, &one)
                })?;
            }
            Ok(())
        };
        owner.submit("step", move |device| device.collect("step", work)).unwrap();
    }
    assert_eq!(read(&owner, &x).unwrap(), [1.0, 3.0]);
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn no_room_for_a_workspace_beside_a_piece_is_told_and_steps_go_on_without_pieces() {
    let simulator = Simulator::new();
    simulator.control("memory=67108864");
    let owner = open();
    let x = numbers(&owner);
    let all = |device: &mut Device| {
        let spare = device.alloc(1 << 20)?;
        while let Ok(_block) = device.alloc(1 << 20) {}
        while let Ok(_block) = device.alloc(1) {}
        device.free(spare);
        Ok(())
    };
    owner.call("test", all).unwrap();
    double(&owner, "step", &x, 4);
    match read(&owner, &x) {
        Err(DeviceError::OutOfMemory { what: "step", .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(owner.objection().is_some_and(|why| why.contains("no room")), "{:?}", owner.objection());
    double(&owner, "step", &x, 4);
    assert_eq!(read(&owner, &x).unwrap(), [16.0, 48.0]);
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn graphs_are_bounded_and_the_oldest_go_when_nothing_runs() {
    let simulator = Simulator::new();
    let owner = open();
    let block = owner.call("test", |device| device.alloc(4 * (MOST_GRAPHS + 100))).unwrap();
    let piece = |n: usize| {
        let clear = move |device: &mut Device| {
            (0..LEAST_CALLS).try_for_each(|i| device.clear(Address(block.0 + 4 * n + i * 4), 4))
        };
        owner.submit("clear", move |device| device.collect("clear", clear)).unwrap();
        // The other piece ends this one.
        owner.submit("clear", Device::end_piece).unwrap();
    };
    let done = || owner.call("test", |_| Ok(())).unwrap();
    for _ in 0..2 {
        (0..MOST_GRAPHS + 50).for_each(piece);
        done();
    }
    assert_eq!(calls(&simulator, "aclmdlRIDestroy"), 0, "they may run yet");
    assert_eq!(simulator.live()["graphs"], MOST_GRAPHS as u64 + 50);
    owner.call("read", Device::synchronize).unwrap();
    assert_eq!(simulator.live()["graphs"], MOST_GRAPHS as u64);
    let before = calls(&simulator, "aclmdlRICaptureBegin");
    (MOST_GRAPHS..MOST_GRAPHS + 50).for_each(piece);
    done();
    assert_eq!(calls(&simulator, "aclmdlRICaptureBegin"), before, "the latest are kept");
    drop(owner);
    simulator.expect_clean();
}
