//! What goes wrong because it was asked for, and the report.

use std::{ptr::null, ptr::null_mut, time::Instant};

use super::harness::*;

fn double(s: &Session, address: Ptr) -> i32 {
    let a = tensor(address, &[2], ACL_FLOAT);
    s.add(a, a, 1.0, a)
}

#[test]
pub fn a_fault_comes_at_the_call_that_was_named() {
    let s = Session::new();
    let address = s.upload_floats(&[1.0, 2.0]);
    control("fault=aclnnAdd:2:561003,aclrtSynchronizeStream:1:507899");
    let executors = lock().objects.executors.len();
    assert_eq!([double(&s, address), double(&s, address), double(&s, address)], [0, 561003, 0]);
    assert_eq!(lock().objects.executors.len(), executors, "phase 2 takes the executor also when it fails");
    assert_eq!([s.synchronize(), s.synchronize()], [507899, 0]);
    assert_eq!(s.floats(address, 2), [4.0, 8.0]);

    control("fault=aclnnAddGetWorkspaceSize:1:561112");
    assert_eq!([double(&s, address), double(&s, address)], [561112, 0]);
    control("fault=aclnnAdd:1:run");
    assert_eq!((double(&s, address), i64::from(s.synchronize())), (0, ACL_ERROR_RT_AICORE_EXCEPTION));
}

#[test]
fn a_hang_that_begins_at_a_call_is_told_by_the_timeout_and_can_be_released() {
    let s = Session::new();
    let address = s.upload_floats(&[1.0, 2.0]);
    control("fault=aclnnAdd:1:hang");
    assert_eq!(double(&s, address), 0);
    assert_eq!(i64::from(aclrtSynchronizeStreamWithTimeout(s.stream, 10)), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
    std::thread::scope(|scope| {
        scope.spawn(|| control("hang=off"));
        assert_eq!(s.synchronize(), 0, "one without a timeout waits until the device goes on");
    });
    assert_eq!(s.floats(address, 2), [2.0, 4.0]);
}

#[test]
fn a_lost_device_refuses_everything_also_to_whoever_waits() {
    let s = Session::new();
    let address = s.upload_floats(&[1.0, 2.0]);
    control("hang=on");
    assert_eq!(double(&s, address), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| control("lost=507010"));
        assert_eq!(s.synchronize(), 507010);
    });
    let mut out = null_mut();
    assert_eq!([unsafe { aclrtMalloc(&mut out, 8, 0) }, double(&s, address), aclrtSetDevice(0)], [507010; 3]);
    control("lost=0");
    assert_eq!(aclrtSetDevice(0), 0);
}

#[test]
fn a_slow_copy_takes_its_time_and_no_longer_than_the_timeout_to_tell() {
    let s = Session::new();
    let address = s.upload(&[0; 8]);
    let source = made(|out| unsafe { aclrtMallocHost(out, 8) });
    control("slow=50");
    let begun = Instant::now();
    assert_eq!(aclrtMemcpyAsync(address, 8, source, 8, ACL_MEMCPY_HOST_TO_DEVICE as i32, s.stream), 0);
    assert_eq!(i64::from(aclrtSynchronizeStreamWithTimeout(s.stream, 1)), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
    assert_eq!(s.synchronize(), 0);
    assert!(begun.elapsed().as_millis() >= 50);
}

#[test]
fn an_operator_can_be_refused_or_spoiled() {
    let s = Session::new();
    let address = s.upload_floats(&[1.0, 2.0]);
    control("refuse=aclnnAdd:561002");
    assert_eq!(i64::from(double(&s, address)), ACLNN_ERR_INNER_TILING_ERROR);
    control("refuse=aclnnAdd:0");
    control("nan=aclnnAdd:2");
    assert_eq!((double(&s, address), s.synchronize()), (0, 0));
    assert_eq!(s.floats(address, 2), [2.0, 4.0]);
    assert_eq!((double(&s, address), s.synchronize()), (0, 0));
    let values = s.floats(address, 2);
    assert!(values[0].is_nan() && values[1] == 8.0, "{values:?}");
}

#[test]
fn a_stub_and_a_machine_without_a_driver_say_so() {
    let _s = Session::new();
    control("stub=on");
    assert_eq!(i64::from(aclInit(null())), ACL_ERROR_COMPILING_STUB_MODE);
    control("devices=0");
    let mut count = 9;
    assert_eq!((unsafe { aclrtGetDeviceCount(&mut count) }, count), (0, 0));
    assert!(aclrtGetSocName().is_null());
}

#[test]
fn what_cannot_be_set_is_refused_with_what_can() {
    let _s = Session::new();
    for text in [c"nonsense", c"nonsense=1", c"hang=perhaps", c"memory=much", c"fault=aclnnAdd:1", c"refuse=aclnnAdd"] {
        assert_eq!(i64::from(unsafe { ascend_sim_control(text.as_ptr()) }), ACL_ERROR_INVALID_PARAM, "{text:?}");
        assert!(message().unwrap().contains("accepted is"));
    }
}

#[test]
pub fn what_is_left_over_is_in_the_report() {
    let s = Session::new();
    let live = |kind: &str| {
        let report = report();
        let count = report.split(&format!("\"{kind}\":")).nth(1).unwrap_or_else(|| panic!("{kind} in {report}"));
        count[..count.find([',', '}']).unwrap()].parse::<usize>().unwrap()
    };
    let kinds = ["streams", "events", "tensors", "scalars", "arrays", "lists", "device_blocks", "host_blocks"];
    let before = kinds.map(live);
    let stream = made(|out| unsafe { aclrtCreateStream(out) });
    let event = made(|out| unsafe { aclrtCreateEvent(out) });
    let block = s.upload(&[0; 8]);
    let host = made(|out| unsafe { aclrtMallocHost(out, 8) });
    let (alone, array) = (scalar(1.0), unsafe { aclCreateIntArray([1_i64, 2].as_ptr(), 2) });
    let element = tensor(block, &[2], ACL_FLOAT);
    let list = unsafe { aclCreateTensorList([element].as_ptr().cast(), 1) };
    assert_eq!(kinds.map(live), before.map(|count| count + 1));
    let destroyed = [
        aclDestroyTensorList(list),
        aclDestroyIntArray(array),
        aclDestroyScalar(alone),
        aclrtFreeHost(host),
        aclrtFree(block),
        aclrtDestroyEvent(event),
        aclrtDestroyStream(stream),
    ];
    assert_eq!(destroyed, [0; 7]);
    assert_eq!(kinds.map(live), before);
}

#[test]
fn the_report_counts_launches_copies_and_allocations_since_the_last_reset() {
    let s = Session::new();
    ascend_sim_reset();
    let address = s.upload_floats(&[1.0, 2.0]);
    assert_eq!(double(&s, address), 0);
    let report = report();
    for part in [
        "\"mallocs\":2",
        "\"launches\":{\"aclnnAdd\":1}",
        "\"copies\":{\"host_to_device\":{\"count\":1,\"bytes\":8}}",
        "\"violations\":[]",
    ] {
        assert!(report.contains(part), "{part} in {report}");
    }
}

#[test]
fn a_file_controls_whoever_waits_and_another_has_the_report_when_a_device_is_closed() {
    let s = Session::new();
    let folder = std::env::temp_dir().join(format!("ascend-sim-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (settings, reported) = (folder.join("settings"), folder.join("report"));
    control(&format!("control={}", settings.display()));
    control(&format!("report={}", reported.display()));
    control("hang=on");
    let address = s.upload_floats(&[1.0, 2.0]);
    assert_eq!(double(&s, address), 0);
    std::fs::write(&settings, "hang=off\nnonsense\n").unwrap();
    assert_eq!(s.synchronize(), 0);
    s.assert_violation("nonsense");
    assert_eq!(aclrtResetDevice(0), 0);
    assert!(std::fs::read_to_string(&reported).unwrap().contains("\"launches\":{\"aclnnAdd\":1}"));
    std::fs::remove_dir_all(&folder).unwrap();
}
