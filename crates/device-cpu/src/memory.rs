//! Memory that can be refused: every large allocation of the backend is made here.

use std::ops::{Deref, DerefMut};

use bytemuck::Pod;

use baton_device::{DeviceError, Result};

/// Name of the device in messages and caps.
pub(crate) const DEVICE: &str = "cpu";

/// Bytes of a cache line.
const LINE: usize = 64;

/// Zeroed elements that start on a cache line. Pages are taken from the system when first touched, by
/// whoever touches them; an allocation with that alignment of its own would be zeroed by hand, hence the detour.
pub(crate) struct Aligned<T> {
    memory: Box<[T]>,
    start: usize,
    len: usize,
}

/// Zeroed floats.
pub(crate) type Floats = Aligned<f32>;

impl<T: Pod> Aligned<T> {
    pub(crate) fn zeroed(len: usize, what: &'static str) -> Result<Self> {
        let per_line = const { LINE / size_of::<T>() };
        let memory: Box<[T]> = bytemuck::allocation::try_zeroed_slice_box(len.saturating_add(per_line - 1))
            .map_err(|()| out_of_memory(len.saturating_mul(size_of::<T>()), what))?;
        let start = memory.as_ptr().addr().wrapping_neg() % LINE / size_of::<T>();
        Ok(Self { memory, start, len })
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.memory[self.start..][..self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..][..self.len]
    }
}

/// Zeroed bytes for weights, in large pages where the system has them.
pub(crate) fn weights(bytes: usize) -> Result<Aligned<u8>> {
    let mut memory = Aligned::zeroed(bytes, "weights")?;
    advise_huge_pages(&mut memory);
    Ok(memory)
}

fn out_of_memory(bytes: usize, what: &'static str) -> DeviceError {
    DeviceError::OutOfMemory { device: DEVICE.to_owned(), bytes, what }
}

/// Asks for 2 MiB pages under memory not yet touched: streaming weights through 4 KiB pages is bound
/// by address translation, most of all in virtual machines.
#[cfg(target_os = "linux")]
fn advise_huge_pages(memory: &mut [u8]) {
    const HUGE: usize = 2 << 20;
    let start = (memory.as_mut_ptr() as usize).next_multiple_of(HUGE);
    let end = memory.as_mut_ptr() as usize + memory.len();
    if start < end {
        // SAFETY: the range lies within our allocation, and the advice changes no contents.
        // It is a wish: that it is refused matters to nobody.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: &mut [u8]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_start_on_a_cache_line_and_are_zero() {
        for len in [0, 1, 100, 1 << 20] {
            let floats = Floats::zeroed(len, "test").unwrap();
            assert_eq!((floats.len(), floats.as_ptr().addr() % 64), (len, 0));
            assert!(floats.iter().all(|&v| v == 0.0));
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        for bytes in [usize::MAX / 8, isize::MAX as usize / 2] {
            assert!(matches!(Floats::zeroed(bytes / 4, "test"), Err(DeviceError::OutOfMemory { .. })));
            assert!(matches!(weights(bytes), Err(DeviceError::OutOfMemory { what: "weights", .. })));
        }
    }
}
