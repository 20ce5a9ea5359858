//! Captures and graphs.

use super::harness::*;

fn capture(session: &Session, body: impl FnOnce()) -> (i32, u64) {
    well(cuStreamBeginCapture_v2(session.stream, flag::CAPTURE_THREAD_LOCAL));
    body();
    let mut graph = 0;
    let code = cuStreamEndCapture(session.stream, &mut graph);
    (code, graph)
}

#[test]
fn a_graph_runs_what_was_captured_each_time_it_is_launched() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let kernel = session.kernel("__global__ void add(int* at, int n) { *at += n; }", "add");
    let at = session.upload(&[0i32]);
    let (code, graph) = capture(&session, || {
        well(session.launch(kernel, 1, 1, 0, &[&at, &2i32]));
        well(session.launch(kernel, 1, 1, 0, &[&at, &3i32]));
        let status = made(|out| cuStreamIsCapturing(session.stream, out));
        assert_eq!(status, flag::CAPTURE_ACTIVE);
    });
    assert_eq!(code, 0);
    assert_eq!(session.download::<i32>(at, 1), [0], "captured, not run");
    assert_eq!(made(|out| cuGraphGetNodes(graph, std::ptr::null_mut(), out)), 2);
    let exec = made(|out| cuGraphInstantiateWithFlags(out, graph, 0));
    well(cuGraphDestroy(graph));
    (0..3).for_each(|_| well(cuGraphLaunch(exec, session.stream)));
    assert_eq!(session.download::<i32>(at, 1), [15]);
    assert_eq!((count("kernels.add"), count("calls.cuGraphLaunch")), (6, 3));
    well(cuGraphExecDestroy(exec));
    assert_eq!(cuGraphLaunch(exec, session.stream), cuda::INVALID_HANDLE);
}

#[test]
fn an_executable_graph_takes_memory_of_the_device_until_it_is_destroyed() {
    let session = Session::with("memory=4096");
    let block = session.alloc(1000);
    let free = || {
        let (mut free, mut total) = (0, 0);
        well(cuMemGetInfo_v2(&mut free, &mut total));
        free
    };
    let (_, graph) = capture(&session, || (0..2).for_each(|_| well(cuMemsetD8Async(block, 1, 4, session.stream))));
    assert_eq!(free(), 3096);
    let exec = made(|out| cuGraphInstantiateWithFlags(out, graph, 0));
    assert_eq!(free(), 1048);
    assert_eq!(cuGraphInstantiateWithFlags(&mut 0, graph, 0), cuda::OUT_OF_MEMORY);
    well(cuGraphExecDestroy(exec));
    assert_eq!(free(), 3096);
}

#[test]
fn what_waits_during_a_capture_is_refused_and_ends_it() {
    let session = Session::new();
    let block = session.alloc(4);
    let refused = |call: &dyn Fn() -> i32| {
        let (code, graph) = capture(&session, || assert_eq!(call(), cuda::STREAM_CAPTURE_UNSUPPORTED));
        assert_eq!((code, graph), (cuda::STREAM_CAPTURE_INVALIDATED, 0));
    };
    refused(&|| cuStreamSynchronize(session.stream));
    refused(&|| cuStreamQuery(session.stream));
    refused(&|| cuCtxSynchronize());
    refused(&|| cuMemAlloc_v2(&mut 0, 4));
    let (code, graph) = capture(&session, || well(cuMemsetD8Async(block, 1, 4, session.stream)));
    assert_eq!(code, 0);
    let exec = made(|out| cuGraphInstantiateWithFlags(out, graph, 0));
    refused(&|| cuGraphLaunch(exec, session.stream));
    refused(&|| cuMemFree_v2(block));
    refused(&|| cuMemcpyHtoD_v2(block, &raw const block as u64, 4));
    let (code, _) = capture(&session, || {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                well(cuCtxSetCurrent(session.context));
                well(cuMemFree_v2(made(|out| cuMemAlloc_v2(out, 4))));
            });
        });
    });
    assert_eq!(code, 0, "another thread may allocate");
    assert_eq!(cuStreamEndCapture(session.stream, &mut 0), cuda::STREAM_CAPTURE_UNMATCHED);
}

#[test]
fn a_relaxed_capture_lets_memory_be_allocated() {
    let session = Session::new();
    well(cuStreamBeginCapture_v2(session.stream, flag::CAPTURE_RELAXED));
    session.alloc(4);
    well(cuStreamEndCapture(session.stream, &mut 0));
}

#[test]
fn a_capture_ends_on_the_thread_that_began_it() {
    let session = Session::new();
    well(cuStreamBeginCapture_v2(session.stream, flag::CAPTURE_THREAD_LOCAL));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            well(cuCtxSetCurrent(session.context));
            assert_eq!(cuStreamEndCapture(session.stream, &mut 0), cuda::STREAM_CAPTURE_WRONG_THREAD);
        });
    });
    well(cuStreamEndCapture(session.stream, &mut 0));
}

#[test]
fn a_captured_copy_reads_page_locked_memory_at_each_launch() {
    let session = Session::new();
    let to = session.alloc(1);
    let pinned = made(|out| cuMemHostAlloc(out, 1, 0));
    let (_, graph) = capture(&session, || well(cuMemcpyHtoDAsync_v2(to, pinned, 1, session.stream)));
    let exec = made(|out| cuGraphInstantiateWithFlags(out, graph, 0));
    for value in [3u8, 4] {
        // SAFETY: a byte of live page-locked memory.
        unsafe { (pinned as *mut u8).write(value) };
        well(cuGraphLaunch(exec, session.stream));
        assert_eq!(session.download::<u8>(to, 1), [value]);
    }
    well(cuMemFreeHost(pinned));
}
