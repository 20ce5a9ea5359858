//! Faults that were asked for, sticky errors and what ends them.

use super::harness::*;

#[test]
fn a_call_fails_when_it_is_told_to_and_only_then() {
    let session = Session::with("fault=cuMemAlloc_v2:2:2");
    session.alloc(4);
    assert_eq!(cuMemAlloc_v2(&mut 0, 4), cuda::OUT_OF_MEMORY);
    session.alloc(4);
}

#[test]
fn a_task_that_fails_poisons_its_context_until_the_device_is_reset() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let kernel = session.kernel("__global__ void nothing() {}", "nothing");
    control("fault=cuLaunchKernel:1:run:700");
    well(session.launch(kernel, 1, 1, 0, &[]));
    assert_eq!(session.synchronize(), cuda::ILLEGAL_ADDRESS);
    assert_eq!(session.launch(kernel, 1, 1, 0, &[]), cuda::ILLEGAL_ADDRESS);
    well(cuDevicePrimaryCtxReset_v2(0));
    assert_eq!(cuMemAlloc_v2(&mut 0, 1), cuda::CONTEXT_IS_DESTROYED);
    assert_eq!(count("live.streams") + count("live.modules") + count("live.device_blocks"), 0);
    well(cuCtxSetCurrent(made(|out| cuDevicePrimaryCtxRetain(out, 0))));
    well(cuMemAlloc_v2(&mut 0, 1));
}

#[test]
fn a_driver_that_does_not_recover_keeps_the_error() {
    let session = Session::with("reset=off");
    let mut m = crate::machine::lock();
    m.poison(session.context, crate::machine::fail!(cuda::LAUNCH_FAILED, "a failure"));
    drop(m);
    well(cuDevicePrimaryCtxReset_v2(0));
    well(cuCtxSetCurrent(made(|out| cuDevicePrimaryCtxRetain(out, 0))));
    assert_eq!(cuMemAlloc_v2(&mut 0, 1), cuda::LAUNCH_FAILED);
    crate::machine::lock().devices[0].fault = None;
}

#[test]
fn a_lost_device_answers_every_call_with_its_code() {
    let session = Session::new();
    control("lost=46");
    assert_eq!(cuMemAlloc_v2(&mut 0, 1), cuda::DEVICE_UNAVAILABLE);
    assert_eq!(session.synchronize(), cuda::DEVICE_UNAVAILABLE);
    control("lost=0");
    well(session.synchronize());
}

#[test]
fn a_hang_lasts_until_it_is_ended() {
    let session = Session::with("hang=on");
    let block = session.alloc(1);
    well(cuMemsetD8Async(block, 1, 1, session.stream));
    assert_eq!(cuStreamQuery(session.stream), cuda::NOT_READY);
    assert_eq!(cuStreamQuery(session.stream), cuda::NOT_READY);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            well(cuCtxSetCurrent(session.context));
            well(cuStreamSynchronize(session.stream));
        });
        control("hang=off");
    });
    assert_eq!(session.download::<u8>(block, 1), [1]);
}

#[test]
fn who_waits_for_a_context_that_is_reset_is_told() {
    let session = Session::with("hang=on");
    let block = session.alloc(1);
    well(cuMemsetD8Async(block, 1, 1, session.stream));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| {
            well(cuCtxSetCurrent(session.context));
            cuStreamSynchronize(session.stream)
        });
        while count("calls.cuStreamSynchronize") == 0 {
            std::thread::yield_now();
        }
        well(cuDevicePrimaryCtxReset_v2(0));
        assert_eq!(waits.join().expect("no panic"), cuda::CONTEXT_IS_DESTROYED);
    });
    control("hang=off");
}

#[test]
fn a_machine_without_devices_says_so() {
    let _session = Session::new();
    control("devices=0");
    assert_eq!(cuInit(0), cuda::NO_DEVICE);
    control("devices=1");
    well(cuInit(0));
    assert_eq!(cuDeviceGet(&mut 0, 1), cuda::INVALID_DEVICE);
}
