//! How much memory is free, for sizing the cache; and that what a generation had is given back when it goes.

use std::fs;

/// Bytes that can be taken without swapping: the kernel's estimate, or what is left of the control
/// group's limit if that is less. `None` where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let free = meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    Some(free.min(cgroup_room().unwrap_or(u64::MAX)))
}

/// Bytes of memory in all: the machine's, or the control group's limit if that is less.
pub fn total_bytes() -> Option<u64> {
    let total = meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")?;
    Some(total.min(cgroup("memory.max").unwrap_or(u64::MAX)))
}

fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn cgroup_room() -> Option<u64> {
    Some(cgroup("memory.max")?.saturating_sub(cgroup("memory.current")?))
}

/// A number of the control group; `None` where there is none, or no limit.
fn cgroup(file: &str) -> Option<u64> {
    fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse().ok()
}

/// Bytes of this process resident in memory.
pub fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Bytes from which on an allocation is a mapping of its own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED: libc::c_int = 1 << 20;

/// Heaps that threads share. Threads of a generation come and go with it; in heaps of their own they would leave holes.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAPS: libc::c_int = 2;

/// Keeps large allocations mappings of their own, so that freed ones go back to the system, and small ones in few heaps.
/// glibc would take the large for the sizes of everyday allocations once the first has been freed, and keep what follows: a
/// process that loads one generation after another would grow to several times their size.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_mappings() {
    // SAFETY: both set a number of the allocator's, under the allocator's own lock, before there are other threads.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_mappings() {}

/// Gives free pages between what is still in use back to the system.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn trim() {
    // SAFETY: it moves nothing that is in use, and takes the allocator's own locks.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn trim() {}

#[cfg(test)]
mod tests {
    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal: 9 kB\nMemAvailable:   24000 kB\n";
        assert_eq!(super::meminfo(text, "MemAvailable:"), Some(24_576_000));
        assert_eq!(super::meminfo(text, "MemTotal:"), Some(9216));
        assert_eq!(super::meminfo("MemTotal: 9 kB\n", "MemAvailable:"), None);
    }
}
