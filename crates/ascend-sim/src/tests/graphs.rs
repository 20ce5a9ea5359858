//! Graph capture.

use super::harness::*;

fn begin(s: &Session) {
    assert_eq!(aclmdlRICaptureBegin(s.stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL as i32), 0, "{:?}", message());
}

fn end(s: &Session) -> Ptr {
    made(|out| unsafe { aclmdlRICaptureEnd(s.stream, out) })
}

fn replay(s: &Session, graph: Ptr) {
    assert_eq!((aclmdlRIExecuteAsync(graph, s.stream), s.synchronize()), (0, 0), "{:?}", message());
}

/// address += by * address
fn grow(s: &Session, address: Ptr, by: f32) -> i32 {
    let a = tensor(address, &[2], ACL_FLOAT);
    s.add(a, a, by, a)
}

#[test]
fn what_is_captured_runs_at_each_replay_and_not_before() {
    let s = Session::new();
    let address = s.upload_floats(&[1.0, 2.0]);
    begin(&s);
    assert_eq!((grow(&s, address, 1.0), grow(&s, address, 2.0)), (0, 0));
    let graph = end(&s);
    assert_eq!((s.synchronize(), s.floats(address, 2)), (0, vec![1.0, 2.0]));
    replay(&s, graph);
    assert_eq!(s.floats(address, 2), [6.0, 12.0]);
    replay(&s, graph);
    assert_eq!(s.floats(address, 2), [36.0, 72.0]);
    assert_eq!((aclmdlRIExecute(graph, -1), s.floats(address, 2)), (0, vec![216.0, 432.0]));
    assert_eq!(aclmdlRIDestroy(graph), 0);
    assert_eq!(i64::from(aclmdlRIExecuteAsync(graph, s.stream)), ACL_ERROR_RT_INVALID_HANDLE);
}

#[test]
pub fn an_unsafe_call_ends_a_capture() {
    let s = Session::new();
    let address = s.upload(&[0; 8]);
    let bytes = [0_u8; 8];
    let up = ACL_MEMCPY_HOST_TO_DEVICE as i32;
    type Call<'a> = &'a dyn Fn() -> i32;
    let calls: [(Call, i64); 6] = [
        (&|| aclrtMemcpy(address, 8, bytes.as_ptr().cast(), 8, up), ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT),
        (&|| aclrtMemset(address, 8, 0, 8), ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT),
        (
            &|| aclrtMemcpyAsync(address, 8, bytes.as_ptr().cast(), 8, up, s.stream),
            ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
        ),
        (&|| s.synchronize(), ACL_ERROR_RT_STREAM_CAPTURED),
        (&|| aclrtSynchronizeDevice(), ACL_ERROR_RT_STREAM_CAPTURED),
        (&|| aclrtMemsetAsync(address, 8, 0, 8, std::ptr::null_mut()), ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT),
    ];
    for (call, expected) in calls {
        begin(&s);
        assert_eq!(i64::from(call()), expected);
        let (mut status, mut graph) = (-1, std::ptr::null_mut());
        assert_eq!(unsafe { aclmdlRICaptureGetInfo(s.stream, &mut status, &mut graph) }, 0);
        assert_eq!(i64::from(status), ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED);
        let code = aclrtMemsetAsync(address, 8, 0, 8, s.stream);
        assert_eq!(i64::from(code), ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
        let code = unsafe { aclmdlRICaptureEnd(s.stream, &mut graph) };
        assert_eq!(i64::from(code), ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
        assert_eq!(s.synchronize(), 0, "the stream is free again");
    }
}

#[test]
fn the_mode_says_whom_a_capture_forbids() {
    let s = Session::new();
    let address = s.upload(&[0; 8]) as usize;
    let memset = move || i64::from(aclrtMemset(address as Ptr, 8, 0, 8));
    let elsewhere = || {
        let other = move || (aclrtSetDevice(0), memset()).1;
        std::thread::spawn(other).join().unwrap()
    };
    let refused = ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT;
    for (mode, here, there) in [
        (ACL_MODEL_RI_CAPTURE_MODE_RELAXED, 0, 0),
        (ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL, refused, 0),
        (ACL_MODEL_RI_CAPTURE_MODE_GLOBAL, refused, refused),
    ] {
        for (call, expected) in [(&memset as &dyn Fn() -> i64, here), (&elsewhere, there)] {
            assert_eq!(aclmdlRICaptureBegin(s.stream, mode as i32), 0);
            assert_eq!(call(), expected, "mode {mode}");
            let mut graph = std::ptr::null_mut();
            unsafe { aclmdlRICaptureEnd(s.stream, &mut graph) };
        }
    }
}

#[test]
pub fn a_replay_has_the_scalars_of_its_capture() {
    let s = Session::new();
    let address = s.upload_floats(&[1.0, 2.0]);
    let value = 1.0_f32;
    let alpha = scalar(value);
    begin(&s);
    let a = tensor(address, &[2], ACL_FLOAT);
    let code = s.run(|size, e| unsafe { aclnnAddGetWorkspaceSize(a, a, alpha, a, size, e) }, aclnnAdd);
    assert_eq!(code, 0);
    let graph = end(&s);
    assert_eq!((aclDestroyScalar(alpha), aclDestroyTensor(a)), (0, 0));
    replay(&s, graph);
    replay(&s, graph);
    assert_eq!(s.floats(address, 2), [4.0, 8.0]);
}

#[test]
fn a_second_stream_is_drawn_in_by_an_event_and_must_be_joined_back() {
    let s = Session::new();
    let address = s.upload_floats(&[1.0, 2.0]);
    let second = made(|out| unsafe { aclrtCreateStream(out) });
    let [fork, join] = [0; 2].map(|_| made(|out| unsafe { aclrtCreateEventWithFlag(out, ACL_EVENT_SYNC as u32) }));
    for joined in [true, false] {
        begin(&s);
        assert_eq!((aclrtRecordEvent(fork, s.stream), aclrtStreamWaitEvent(second, fork)), (0, 0));
        assert_eq!(aclrtMemsetAsync(address, 8, 0, 8, second), 0);
        assert_eq!(aclrtRecordEvent(join, second), 0);
        if joined {
            assert_eq!(aclrtStreamWaitEvent(s.stream, join), 0);
        }
        let mut graph = std::ptr::null_mut();
        let code = unsafe { aclmdlRICaptureEnd(s.stream, &mut graph) };
        assert_eq!(i64::from(code), if joined { 0 } else { ACL_ERROR_RT_STREAM_UNJOINED });
        assert_eq!(aclrtSynchronizeStream(second), 0);
        if joined {
            replay(&s, graph);
            assert_eq!(s.floats(address, 2), [0.0; 2]);
        }
    }
}

#[test]
fn a_task_group_takes_new_tasks_and_the_replay_waits_for_them() {
    let mut s = Session::new();
    let address = s.upload_floats(&[1.0, 2.0]);
    let updates = made(|out| unsafe { aclrtCreateStream(out) });
    let ready = made(|out| unsafe { aclrtCreateEventWithFlag(out, ACL_EVENT_EXTERNAL as u32) });
    begin(&s);
    assert_eq!((aclrtStreamWaitEvent(s.stream, ready), aclrtResetEvent(ready, s.stream)), (0, 0));
    assert_eq!(aclmdlRICaptureTaskGrpBegin(s.stream), 0);
    assert_eq!(grow(&s, address, 1.0), 0);
    let group = made(|out| unsafe { aclmdlRICaptureTaskGrpEnd(s.stream, out) });
    let graph = end(&s);

    for by in [2.0_f32, 3.0] {
        assert_eq!(aclmdlRIExecuteAsync(graph, s.stream), 0);
        assert_eq!(i64::from(aclrtSynchronizeStreamWithTimeout(s.stream, 1)), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
        assert_eq!(aclmdlRICaptureTaskUpdateBegin(updates, group), 0);
        let main = std::mem::replace(&mut s.stream, updates);
        assert_eq!(grow(&s, address, by), 0);
        s.stream = main;
        assert_eq!((aclmdlRICaptureTaskUpdateEnd(updates), aclrtRecordEvent(ready, updates)), (0, 0));
        assert_eq!(s.synchronize(), 0, "{:?}", message());
    }
    assert_eq!(s.floats(address, 2), [12.0, 24.0]);
}
