//! What happened so far, as JSON.
//!
//! Invariant: what is live here and should not be is a leak; default contexts and streams belong to their device and do not count.

use std::ffi::c_char;

use crate::machine::{Counters, Machine, lock};

/// Writes the report and a final zero to `buffer`, as far as `len` bytes hold it; returns the bytes of the whole without the zero.
/// `buffer` may be null to ask for the length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ascend_sim_report(buffer: *mut c_char, len: usize) -> usize {
    let report = report(&lock());
    if !buffer.is_null() && len > 0 {
        let written = report.len().min(len - 1);
        // SAFETY: callers give room for `len` bytes, of which one is left for the zero.
        unsafe {
            std::ptr::copy_nonoverlapping(report.as_ptr(), buffer.cast(), written);
            buffer.add(written).write(0);
        }
    }
    report.len()
}

/// Forgets counters, peaks and violations. What is live stays.
#[unsafe(no_mangle)]
pub extern "C" fn ascend_sim_reset() {
    let mut m = lock();
    m.counters = Counters::default();
    m.devices.iter_mut().for_each(|device| device.peak = device.used);
}

/// Writes the report to the file that was set, if one was: all of it or nothing.
pub fn write_report(m: &Machine) {
    let Some(path) = &m.settings.report else { return };
    let part = path.with_extension("part");
    let written = std::fs::write(&part, report(m)).and_then(|()| std::fs::rename(&part, path));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn report(m: &Machine) -> String {
    let defaults = m.devices.iter().filter(|d| m.contexts.contains(d.default_context)).count();
    let (blocks, bytes) = m.memory.live();
    let live = [
        ("contexts", m.contexts.len() - defaults),
        ("streams", m.streams.len() - m.contexts.len()),
        ("events", m.events.len()),
        ("tensors", m.objects.tensors.len()),
        ("scalars", m.objects.scalars.len()),
        ("arrays", m.objects.arrays.len()),
        ("lists", m.objects.lists.len()),
        ("executors", m.objects.executors.len()),
        ("graphs", m.graphs.len()),
        ("communicators", m.communicators.len()),
        ("device_blocks", blocks),
        ("host_blocks", m.memory.live_pinned()),
    ];
    let counts = |counts: &std::collections::BTreeMap<String, u64>| {
        object(counts.iter().map(|(k, v)| (k.as_str(), v.to_string())))
    };
    let copies = m.counters.copies.iter().map(|(&direction, (count, bytes))| {
        (direction, object([("count", count.to_string()), ("bytes", bytes.to_string())]))
    });
    let mallocs = m.counters.calls.get("aclrtMalloc").copied().unwrap_or(0);
    object([
        ("live", object(live.map(|(kind, count)| (kind, count.to_string())))),
        ("device_bytes", bytes.to_string()),
        ("peak_bytes", list(m.devices.iter().map(|d| d.peak.to_string()))),
        ("mallocs", mallocs.to_string()),
        ("calls", counts(&m.counters.calls)),
        ("launches", counts(&m.counters.launches)),
        ("copies", object(copies)),
        ("violations", list(m.counters.violations.iter().map(|text| quoted(text)))),
    ])
}

fn object<'a>(fields: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let fields: Vec<_> = fields.into_iter().map(|(key, value)| format!("{}:{value}", quoted(key))).collect();
    format!("{{{}}}", fields.join(","))
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(","))
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
