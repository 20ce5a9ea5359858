//! Keeps workers off the caller's CPU.
//!
//! Where all CPUs are busy, a scheduler that wakes a worker beside the thread that woke it leaves both
//! there for good: each waits for the other, and a region takes longer than without workers. So a
//! worker that finds itself on the caller's CPU leaves it.

#[cfg(target_os = "linux")]
mod linux {
    use std::mem::{MaybeUninit, size_of};

    /// CPUs that this process may use.
    pub(crate) struct Allowed(libc::cpu_set_t);

    impl Allowed {
        /// `None` if there is no choice, or none is known.
        pub(crate) fn detect() -> Option<Self> {
            let mut set = MaybeUninit::zeroed();
            // SAFETY: the kernel writes at most the size given; all zeros is a valid set.
            let set = unsafe {
                let failed = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) != 0;
                (!failed).then(|| set.assume_init())?
            };
            // SAFETY: the set is initialised.
            (unsafe { libc::CPU_COUNT(&set) } > 1).then_some(Self(set))
        }

        /// Lets this thread run on any CPU allowed but one.
        pub(crate) fn leave(&self, cpu: usize) {
            let mut set = self.0;
            if cpu >= libc::CPU_SETSIZE as usize {
                return;
            }
            // SAFETY: `cpu` is below the size of the set, and the kernel only reads it. That the wish is
            // refused costs speed alone.
            unsafe {
                libc::CPU_CLR(cpu, &mut set);
                libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
            }
        }
    }

    /// The CPU that this thread is on.
    pub(crate) fn current() -> usize {
        // SAFETY: no arguments; -1 on failure, which is no CPU's number.
        (unsafe { libc::sched_getcpu() }) as usize
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    pub(crate) struct Allowed;

    impl Allowed {
        pub(crate) fn detect() -> Option<Self> {
            None
        }

        pub(crate) fn leave(&self, _: usize) {}
    }

    pub(crate) fn current() -> usize {
        usize::MAX
    }
}

#[cfg(target_os = "linux")]
pub(crate) use linux::{Allowed, current};
#[cfg(not(target_os = "linux"))]
pub(crate) use other::{Allowed, current};
