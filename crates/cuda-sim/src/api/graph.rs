//! Captured graphs: made executable, launched, destroyed.

use crate::{
    codes::cuda,
    machine::{Graph, fail, in_context, outside_capture, put},
    stream::Task,
};

/// Bytes of the device that an executable graph takes for each of its tasks. A driver says nothing of how many these are.
const TASK: u64 = 1 << 10;

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphInstantiateWithFlags(exec: *mut u64, graph: u64, _flags: u64) -> i32 {
    outside_capture("cuGraphInstantiateWithFlags", |m, context| {
        let tasks = m.graphs.get(graph)?.tasks.clone();
        let bytes = TASK * tasks.len() as u64;
        m.take(m.contexts.get(context)?.device, bytes)?;
        put(exec, m.execs.insert(Graph { context, tasks, bytes }))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphGetNodes(graph: u64, nodes: *mut u64, count: *mut usize) -> i32 {
    in_context("cuGraphGetNodes", |m, _| {
        let tasks = m.graphs.get(graph)?.tasks.len();
        if !nodes.is_null() {
            // SAFETY: the caller says at `count` how many handles have room.
            let room = unsafe { count.read_unaligned() };
            (0..room.min(tasks)).try_for_each(|node| put(nodes.wrapping_add(node), node as u64 + 1))?;
        }
        put(count, tasks)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphUpload(exec: u64, stream: u64) -> i32 {
    in_context("cuGraphUpload", |m, context| {
        m.target(context, stream)?;
        m.execs.get(exec).map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(exec: u64, stream: u64) -> i32 {
    in_context("cuGraphLaunch", |m, context| {
        let stream = m.target(context, stream)?;
        let tasks = m.execs.get(exec)?.tasks.clone();
        if let Some(capture) = &mut m.streams.get_mut(stream)?.capture {
            capture.broken = true;
            return Err(fail!(cuda::STREAM_CAPTURE_UNSUPPORTED, "graphs within graphs are not simulated"));
        }
        m.submit(stream, Task::Graph(tasks)).map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(exec: u64) -> i32 {
    in_context("cuGraphExecDestroy", |m, _| {
        let Graph { context, bytes, .. } = m.execs.remove(exec)?;
        let device = m.contexts.get(context)?.device;
        m.devices[device as usize].used -= bytes;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: u64) -> i32 {
    in_context("cuGraphDestroy", |m, _| m.graphs.remove(graph).map(drop))
}
