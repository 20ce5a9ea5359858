//! Where threads run: what the system says of it, and what it is asked for.
//!
//! Every request is a wish, and what is not known is left out: that one is refused costs speed alone.

use std::time::Duration;

/// A thread as the system numbers it; never 0.
pub(crate) type Thread = i32;

#[cfg(target_os = "linux")]
mod linux {
    use std::mem::{MaybeUninit, size_of};

    use super::{Duration, Thread};

    /// CPUs that this process may use.
    pub(crate) fn allowed() -> Vec<usize> {
        let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
        // SAFETY: the kernel writes at most the size given; all zeros is a valid set.
        let set = unsafe {
            libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr());
            set.assume_init()
        };
        // SAFETY: numbers are below the size of the set.
        (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
    }

    /// Lets a thread of this process run on these CPUs only.
    pub(crate) fn confine(thread: Thread, cpus: impl Iterator<Item = usize>) {
        // SAFETY: all zeros is a valid set.
        let mut set: libc::cpu_set_t = unsafe { MaybeUninit::zeroed().assume_init() };
        for cpu in cpus.take_while(|&cpu| cpu < libc::CPU_SETSIZE as usize) {
            // SAFETY: `cpu` is below the size of the set.
            unsafe { libc::CPU_SET(cpu, &mut set) };
        }
        // SAFETY: the kernel only reads the set. It refuses an empty one.
        unsafe { libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &set) };
    }

    /// The CPU that this thread is on.
    pub(crate) fn current() -> usize {
        // SAFETY: no arguments; -1 on failure, which is no CPU's number.
        (unsafe { libc::sched_getcpu() }) as usize
    }

    pub(crate) fn this_thread() -> Thread {
        // SAFETY: no arguments. The call itself, for which glibc has a function only since 2.30: releases run with older ones.
        (unsafe { libc::syscall(libc::SYS_gettid) }) as Thread
    }

    /// Time that a thread of this process has spent on a CPU, zero if it is gone.
    pub(crate) fn processor_time(thread: Thread) -> Duration {
        // The clock's number as `pthread_getcpuclockid` makes it: of a thread (4), by the scheduler (2).
        let clock = (!thread << 3) | 6;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes one `timespec`.
        unsafe { libc::clock_gettime(clock, &mut time) };
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use super::{Duration, Thread};

    pub(crate) fn allowed() -> Vec<usize> {
        Vec::new()
    }

    pub(crate) fn confine(_: Thread, _: impl Iterator<Item = usize>) {}

    pub(crate) fn current() -> usize {
        usize::MAX
    }

    pub(crate) fn this_thread() -> Thread {
        Thread::MAX
    }

    pub(crate) fn processor_time(_: Thread) -> Duration {
        Duration::ZERO
    }
}

#[cfg(target_os = "linux")]
pub(crate) use linux::{allowed, confine, current, processor_time, this_thread};
#[cfg(not(target_os = "linux"))]
pub(crate) use other::{allowed, confine, current, processor_time, this_thread};
