//! What is queued, what fails, and what is left.

use std::time::Duration;

use baton_device::DeviceError;

use super::{floats, open, open_device, values};
use crate::abi::codes::Class;
use crate::device::Device;
use crate::error::AscendError;
use crate::memory::Pinned;
use crate::object::{DataType, View};
use crate::owner::Owner;
use crate::simulator::Simulator;

const SECOND: Duration = Duration::from_secs(1);

/// Queues an operator.
fn add_one(device: &mut Device) -> Result<(), AscendError> {
    let x = floats(device, &[1.0, 2.0], DataType::F32)?;
    let (a, one) = (device.tensor(&x), device.scalar(1.0, DataType::F32));
    let result = device.add_in_place(&a, &a, &one);
    device.free(x.base);
    result
}

/// A step of one operator, and then its end.
fn step(owner: &Owner) -> Result<(), DeviceError> {
    owner.submit("step", add_one)?;
    owner.call("read", Device::synchronize)
}

#[test]
fn what_is_uploaded_comes_back_whatever_its_size() {
    let simulator = Simulator::new();
    let owner = open();
    for len in [1, 31, 4096, Pinned::BYTES / 2 + 1, Pinned::BYTES + 17] {
        let data: Vec<u8> = (0..251).cycle().take(len).collect();
        let sent = data.clone();
        let back = owner.call("test", move |device| {
            let block = device.alloc(sent.len())?;
            device.upload(&sent, block)?;
            let back = device.download(block, sent.len())?;
            device.free(block);
            Ok(back)
        });
        assert!(back.unwrap() == data, "{len} bytes");
    }
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn work_runs_in_order_and_each_start_after_a_stop_leaves_nothing() {
    let simulator = Simulator::new();
    for _ in 0..3 {
        let owner = open();
        let x = owner.call("test", |device| floats(device, &[1.0, 2.0, 3.0], DataType::F32)).unwrap();
        for _ in 0..10 {
            let x = x.clone();
            owner
                .submit("double", move |device| {
                    let (a, one) = (device.tensor(&x), device.scalar(1.0, DataType::F32));
                    device.add_in_place(&a, &a, &one)
                })
                .unwrap();
        }
        assert_eq!(owner.call("read", move |device| values(device, &x)).unwrap(), [1024.0, 2048.0, 3072.0]);
        drop(owner);
        simulator.expect_clean();
    }
}

#[test]
fn steps_of_one_shape_ask_the_device_for_no_memory() {
    let simulator = Simulator::new();
    let owner = open();
    let many = |count: usize| {
        for _ in 0..count {
            step(&owner).unwrap();
        }
        simulator.report()["mallocs"].as_u64().expect("a number")
    };
    assert_eq!(many(1), many(50));
    let usage = owner.call("test", |device| Ok(device.usage())).unwrap();
    assert!(usage.used <= usage.peak && usage.peak <= usage.reserved, "{usage:?}");
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn a_device_that_does_not_open_says_which_call_failed_and_leaves_nothing() {
    let simulator = Simulator::new();
    for call in [
        "aclrtSetDevice",
        "aclrtCreateContext",
        "aclrtSetCurrentContext",
        "aclrtCreateStreamWithConfig",
        "aclrtMallocHost",
    ] {
        simulator.control(&format!("fault={call}:1:507899"));
        match open_device(0, SECOND) {
            Err(DeviceError::Unavailable { reason, .. }) => assert!(reason.contains(call), "{reason}"),
            other => panic!("{call}: {:?}", other.err()),
        }
        simulator.calm();
        simulator.expect_clean();
    }
    step(&open()).unwrap();
}

#[test]
fn a_device_that_hangs_is_lost_within_the_timeout_and_leaves_nothing() {
    let simulator = Simulator::new();
    let owner = open_device(0, SECOND / 5).unwrap();
    step(&owner).unwrap();
    simulator.control("hang=on");
    assert!(matches!(step(&owner), Err(DeviceError::Lost { .. })));
    assert!(matches!(step(&owner), Err(DeviceError::Lost { .. })), "and stays lost");
    drop(owner);
    simulator.calm();
    simulator.expect_clean();
    step(&open()).unwrap();
}

#[test]
fn a_thread_that_hangs_in_a_call_is_given_up() {
    let _simulator = Simulator::new();
    let owner = open_device(0, SECOND / 10).unwrap();
    let (release, held) = crossbeam_channel::bounded::<()>(0);
    owner
        .submit("hang", move |_| {
            let _ = held.recv();
            Ok(())
        })
        .unwrap();
    match owner.call("read", |_| Ok(())) {
        Err(DeviceError::Lost { reason, .. }) => assert!(reason.contains("read"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(step(&owner), Err(DeviceError::Lost { .. })), "nobody waits again");
    drop(release);
    // The thread ends by itself; what it holds goes with it.
    let thread_ended = owner.ended();
    drop(owner);
    let _ = thread_ended.recv();
}

#[test]
fn a_fault_of_a_kernel_is_final_and_a_new_start_is_sound() {
    let simulator = Simulator::new();
    let owner = open();
    step(&owner).unwrap();
    simulator.control("fault=aclnnInplaceAdd:1:run");
    let error = step(&owner).expect_err("the kernel faulted");
    assert!(matches!(error, DeviceError::Poisoned { .. }), "{error}");
    assert!(error.to_string().contains("507015") && error.to_string().contains("earlier"), "{error}");
    let again = step(&owner).expect_err("for ever");
    assert!(again.to_string().contains("507015"), "{again}");
    drop(owner);
    simulator.expect_clean();
    step(&open()).unwrap();
}

#[test]
fn a_lost_device_is_lost_for_everybody_and_closing_does_not_wait_for_it() {
    let simulator = Simulator::new();
    let owner = open();
    step(&owner).unwrap();
    simulator.control("lost=507010");
    assert!(matches!(step(&owner), Err(DeviceError::Lost { .. })));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| step(&owner)).join().expect("no panic");
        assert!(matches!(other, Err(DeviceError::Lost { .. })));
    });
    drop(owner);
}

#[test]
fn an_operator_that_is_refused_fails_its_step_alone() {
    let simulator = Simulator::new();
    let owner = open();
    for code in [561002, 161002] {
        simulator.control(&format!("fault=aclnnInplaceAddGetWorkspaceSize:1:{code}"));
        match step(&owner) {
            Err(DeviceError::Execution { op, reason, .. }) => {
                assert_eq!(op, "step");
                assert!(reason.contains(&code.to_string()) && reason.contains("aclnnInplaceAdd"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        step(&owner).unwrap();
    }
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn a_failure_goes_to_the_thread_whose_work_failed() {
    let simulator = Simulator::new();
    let owner = open();
    simulator.control("fault=aclnnInplaceAddGetWorkspaceSize:1:561002");
    owner.submit("step", add_one).unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| step(&owner)).join().expect("no panic");
        other.expect("the work of this thread is sound");
    });
    assert!(matches!(owner.call("read", Device::synchronize), Err(DeviceError::Execution { op: "step", .. })));
    step(&owner).unwrap();
}

#[test]
fn a_panic_in_a_piece_of_work_reaches_its_caller_as_an_error() {
    let _simulator = Simulator::new();
    let owner = open();
    owner.submit("step", |_| panic!("a bug")).unwrap();
    match owner.call("read", |_| Ok(())) {
        Err(DeviceError::Lost { reason, .. }) => assert!(reason.contains("a bug"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_allocation_that_is_refused_once_is_made_up_for() {
    let simulator = Simulator::new();
    let owner = open();
    for n in 1..=2 {
        simulator.control(&format!("fault=aclrtMalloc:{n}:207001"));
        let blocks = owner.call("test", |device| (0..3).map(|_| device.alloc(9 << 20)).collect::<Result<Vec<_>, _>>());
        blocks.unwrap().into_iter().for_each(|block| owner.free(block));
        owner.call("test", Device::release_free).unwrap();
    }
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn a_device_without_room_says_for_how_much_and_goes_on() {
    let simulator = Simulator::new();
    simulator.control("memory=100663296");
    let owner = open();
    // Twice: what failed took nothing.
    for _ in 0..2 {
        match owner.call("weights", |device| device.alloc(100 << 20)) {
            Err(DeviceError::OutOfMemory { bytes, what: "weights", .. }) => assert!(bytes >= 100 << 20),
            other => panic!("{other:?}"),
        }
        step(&owner).unwrap();
        // Also a block for which a segment that is free must go first.
        for room in [40 << 20, 50 << 20] {
            let block = owner.call("weights", move |device| device.alloc(room)).unwrap();
            owner.free(block);
        }
    }
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn no_room_for_a_workspace_leaves_no_executor() {
    let simulator = Simulator::new();
    simulator.control("memory=67108864");
    let owner = open();
    owner
        .submit("step", |device| {
            let x = floats(device, &[1.0; 64], DataType::F32)?;
            // All memory that there is.
            while let Ok(_block) = device.alloc(1 << 20) {}
            while let Ok(_block) = device.alloc(1) {}
            let x = View::new(x.base, DataType::F32, &[64]);
            let (a, one) = (device.tensor(&x), device.scalar(1.0, DataType::F32));
            device.add_in_place(&a, &a, &one)
        })
        .unwrap();
    assert!(matches!(owner.call("read", |_| Ok(())), Err(DeviceError::OutOfMemory { what: "step", .. })));
    assert_eq!(simulator.live().get("executors"), None);
    drop(owner);
    simulator.expect_clean();
}

#[test]
fn every_failing_call_of_a_step_is_typed_and_leaves_nothing() {
    let simulator = Simulator::new();
    let calls = ["aclrtMalloc", "aclrtMemcpyAsync", "aclnnInplaceAddGetWorkspaceSize", "aclnnInplaceAdd"];
    for call in calls.into_iter().chain(["aclrtSynchronizeStreamWithTimeout"]) {
        for code in [107000, 207001, 500000, 507015, 507010, 561003] {
            let owner = open();
            simulator.control(&format!("fault={call}:1:{code}"));
            let class = AscendError::Call { call, code, message: String::new(), late: false }.class();
            match (step(&owner), class) {
                (Ok(()), Class::Memory) if call == "aclrtMalloc" => {}
                (Err(DeviceError::Lost { .. }), Class::Lost) => {}
                (Err(DeviceError::Poisoned { .. }), Class::Poisoned) => {}
                (Err(DeviceError::Execution { reason, .. }), class) if !class.is_final() => {
                    assert!(reason.contains(call) && reason.contains(&code.to_string()), "{call} {code}: {reason}");
                }
                (other, class) => panic!("{call} {code}: {other:?}, {class:?}"),
            }
            simulator.calm();
            drop(owner);
            simulator.expect_clean();
        }
    }
}
