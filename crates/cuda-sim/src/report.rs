//! What happened so far: counts by name, and what was refused in words.
//!
//! Invariant: what is live here and should not be is a leak; a context's null stream belongs to its context and does not count.

use std::{
    ffi::{CStr, c_char},
    sync::Once,
};

use crate::{
    api,
    machine::{Counters, Machine, Ran, lock},
};

/// Every count there is, by name: `live.KIND`, `bytes.device`, `bytes.peak.N`, `calls.SYMBOL`, `copies.DIRECTION`,
/// `copied.DIRECTION` in bytes, `messages`; of kernels that ran `kernels.NAME`, and of their blocks `threads.NAME` and bytes of dynamic
/// shared memory `shared.NAME`, at most.
fn counts(m: &Machine) -> Vec<(String, u64)> {
    let (blocks, bytes, pinned) = m.memory.live();
    let live = [
        ("contexts", m.contexts.len()),
        ("streams", m.streams.len() - m.contexts.len()),
        ("events", m.events.len()),
        ("modules", m.modules.len()),
        ("graphs", m.graphs.len()),
        ("graph_execs", m.execs.len()),
        ("programs", api::live_programs()),
        ("blas_handles", m.blas.handles.len()),
        ("blas_descs", m.blas.descs.len()),
        ("blas_layouts", m.blas.layouts.len()),
        ("blas_preferences", m.blas.preferences.len()),
        ("communicators", m.communicators.len()),
        ("device_blocks", blocks),
        ("host_blocks", pinned),
    ];
    let mut counts: Vec<_> = live.iter().map(|(kind, count)| (format!("live.{kind}"), *count as u64)).collect();
    counts.push(("bytes.device".to_owned(), bytes));
    counts.extend(m.devices.iter().enumerate().map(|(i, device)| (format!("bytes.peak.{i}"), device.peak)));
    counts.extend(m.counters.calls.iter().map(|(symbol, &count)| (format!("calls.{symbol}"), count)));
    for (name, Ran { times, threads, shared }) in &m.counters.kernels {
        let of = [("kernels", times), ("threads", threads), ("shared", shared)];
        counts.extend(of.map(|(what, &count)| (format!("{what}.{name}"), count)));
    }
    for (direction, &(count, bytes)) in &m.counters.copies {
        counts.extend([(format!("copies.{direction}"), count), (format!("copied.{direction}"), bytes)]);
    }
    counts.push(("messages".to_owned(), m.counters.messages.len() as u64));
    counts
}

/// All counts as one JSON object, the messages behind them.
fn json(m: &Machine) -> String {
    let counts = counts(m).into_iter().map(|(name, count)| format!("{}:{count}", quoted(&name)));
    let messages: Vec<String> = m.counters.messages.iter().map(|text| quoted(text)).collect();
    let messages = format!("\"texts\":[{}]", messages.join(","));
    format!("{{{}}}", counts.chain([messages]).collect::<Vec<_>>().join(","))
}

fn quoted(text: &str) -> String {
    let escaped: String = text
        .chars()
        .flat_map(|c| match c {
            '"' | '\\' => vec!['\\', c],
            c if c < ' ' => vec![' '],
            c => vec![c],
        })
        .collect();
    format!("\"{escaped}\"")
}

/// Writes the report to the file that was set, if one was: all of it or nothing.
pub fn write(m: &Machine) {
    let Some(path) = &m.settings.report else { return };
    let part = path.with_extension("part");
    let written = std::fs::write(&part, json(m)).and_then(|()| std::fs::rename(&part, path));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Writes the report when the process ends.
pub fn at_exit() {
    static ONCE: Once = Once::new();
    extern "C" fn end() {
        write(&lock());
    }
    // SAFETY: the library is never unloaded before the process ends: it keeps threads' stacks.
    ONCE.call_once(|| unsafe {
        libc::atexit(end);
    });
}

/// The count of a name; 0 if nothing was counted.
///
/// # Safety
/// `name` ends in zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_sim_count(name: *const c_char) -> u64 {
    // SAFETY: as the caller promises.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    counts(&lock()).into_iter().find(|(known, _)| *known == name).map_or(0, |(_, count)| count)
}

/// Writes the report and a final zero to `buffer`, as far as `len` bytes hold it; returns the bytes of the whole without the zero.
/// `buffer` may be null to ask for the length.
///
/// # Safety
/// The buffer has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_sim_report(buffer: *mut c_char, len: usize) -> usize {
    let report = json(&lock());
    if !buffer.is_null() && len > 0 {
        let written = report.len().min(len - 1);
        // SAFETY: as the caller promises; one byte is left for the zero.
        unsafe {
            std::ptr::copy_nonoverlapping(report.as_ptr(), buffer.cast(), written);
            buffer.add(written).write(0);
        }
    }
    report.len()
}

/// Forgets counters, peaks and messages. What is live stays.
#[unsafe(no_mangle)]
pub extern "C" fn cuda_sim_reset() {
    let mut m = lock();
    m.counters = Counters::default();
    m.devices.iter_mut().for_each(|device| device.peak = device.used);
}
