//! Streams and events.

use std::ptr::null_mut;

use super::harness::*;

fn stream() -> Ptr {
    made(|out| unsafe { aclrtCreateStream(out) })
}

fn event(flags: i64) -> Ptr {
    made(|out| unsafe { aclrtCreateEventWithFlag(out, flags as u32) })
}

#[test]
pub fn an_event_without_sync_cannot_be_waited_for() {
    let s = Session::new();
    let timing = event(ACL_EVENT_TIME_LINE);
    assert_eq!(i64::from(aclrtStreamWaitEvent(s.stream, timing)), ACL_ERROR_RT_PARAM_INVALID);
    assert_eq!(i64::from(aclrtResetEvent(timing, s.stream)), ACL_ERROR_RT_PARAM_INVALID);
    assert_eq!(aclrtStreamWaitEvent(s.stream, event(ACL_EVENT_SYNC)), 0);
}

#[test]
fn an_event_orders_two_streams() {
    let s = Session::new();
    let (address, second, mark) = (s.upload(&[0; 8]), stream(), event(ACL_EVENT_SYNC));
    assert_eq!(aclrtMemsetAsync(address, 8, 1, 8, s.stream), 0);
    assert_eq!((aclrtRecordEvent(mark, s.stream), aclrtMemsetAsync(address, 8, 9, 8, s.stream)), (0, 0));
    assert_eq!((aclrtStreamWaitEvent(second, mark), aclrtMemsetAsync(address, 4, 2, 4, second)), (0, 0));
    assert_eq!(aclrtSynchronizeStream(second), 0);
    assert_eq!(s.download(address, 8), [2, 2, 2, 2, 1, 1, 1, 1], "what comes after the mark has not run");
}

#[test]
fn streams_that_wait_for_each_other_time_out() {
    let s = Session::new();
    let (second, a, b) = (stream(), event(ACL_EVENT_SYNC), event(ACL_EVENT_SYNC));
    // Record both once, so that each wait has something to wait for, behind the other's wait.
    assert_eq!((aclrtRecordEvent(a, s.stream), aclrtStreamWaitEvent(second, a)), (0, 0));
    assert_eq!((aclrtRecordEvent(b, second), aclrtStreamWaitEvent(s.stream, b)), (0, 0));
    assert_eq!(aclrtSynchronizeDevice(), 0, "a chain is no circle");
    control("hang=on");
    aclrtRecordEvent(a, s.stream);
    assert_eq!(i64::from(aclrtSynchronizeStreamWithTimeout(s.stream, 10)), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
    assert_eq!(i64::from(aclrtSynchronizeEventWithTimeout(a, 10)), ACL_ERROR_RT_WAIT_TIMEOUT);
    assert_eq!(i64::from(aclrtSynchronizeDeviceWithTimeout(10)), ACL_ERROR_RT_WAIT_TIMEOUT);
    control("hang=off");
    assert_eq!(s.synchronize(), 0);
}

#[test]
fn whoever_polls_comes_to_an_end() {
    let s = Session::new();
    let (address, mark) = (s.upload(&[0; 8]), event(ACL_EVENT_SYNC));
    (0..3).for_each(|value| assert_eq!(aclrtMemsetAsync(address, 8, value, 8, s.stream), 0));
    assert_eq!(aclrtRecordEvent(mark, s.stream), 0);
    let (mut status, mut polls) = (-1, 0);
    while i64::from(status) != ACL_EVENT_RECORDED_STATUS_COMPLETE {
        assert_eq!(unsafe { aclrtQueryEventStatus(mark, &mut status) }, 0);
        polls += 1;
    }
    assert_eq!((polls, s.download(address, 8)), (5, vec![2; 8]));
    let mut status = -1;
    assert_eq!(unsafe { aclrtStreamQuery(s.stream, &mut status) }, 0);
    assert_eq!(i64::from(status), ACL_STREAM_STATUS_COMPLETE);
}

#[test]
fn a_device_has_so_many_streams_and_events() {
    let _s = Session::new();
    control("soc=Ascend310P3");
    let mut out = null_mut();
    let streams = (0..2000).take_while(|_| unsafe { aclrtCreateStream(&mut out) } == 0).count();
    assert_eq!(streams + 2, 1024, "the default stream and the session's count");
    assert!(message().unwrap().contains("1024"));
    let mut create = |flags: i64| i64::from(unsafe { aclrtCreateEventWithFlag(&mut out, flags as u32) });
    assert_eq!((0..2000).take_while(|_| create(ACL_EVENT_SYNC) == 0).count(), 1023);
    assert_eq!(create(ACL_EVENT_TIME_LINE), 0, "only those with SYNC are few");
}

#[test]
fn a_stream_is_destroyed_after_its_tasks_and_the_default_one_with_its_context() {
    let s = Session::new();
    let address = s.upload(&[0; 8]);
    assert_eq!(aclrtMemsetAsync(address, 8, 1, 8, s.stream), 0);
    assert_eq!(aclrtDestroyStream(s.stream), 0);
    assert_eq!(s.download(address, 8), [1; 8]);
    assert_eq!(i64::from(aclrtDestroyStream(null_mut())), ACL_ERROR_RT_PARAM_INVALID);
}
