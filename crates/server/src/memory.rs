//! How much memory is free, for sizing the cache.

use std::fs;

/// Bytes that can be taken without swapping: the kernel's estimate, or what is left of the control
/// group's limit if that is less. `None` where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let free = meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
    Some(free.min(cgroup_room().unwrap_or(u64::MAX)))
}

fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn cgroup_room() -> Option<u64> {
    let read = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    Some(read("memory.max")?.saturating_sub(read("memory.current")?))
}

/// Bytes of this process resident in memory.
pub fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    #[test]
    fn meminfo_is_read_in_bytes() {
        assert_eq!(super::meminfo("MemTotal: 9 kB\nMemAvailable:   24000 kB\n"), Some(24_576_000));
        assert_eq!(super::meminfo("MemTotal: 9 kB\n"), None);
    }
}
