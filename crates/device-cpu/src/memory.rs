//! Memory that can be refused: every large allocation of the backend is made here.

use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

use baton_device::{DeviceError, Result};

/// Name of the device in messages and caps.
pub(crate) const DEVICE: &str = "cpu";

/// One cache line; a vector of them starts on one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

/// Zeroed floats that start on a cache line. Pages are taken from the system when first touched;
/// an allocation with that alignment of its own would be zeroed by hand, hence the detour.
pub(crate) struct Floats {
    memory: Box<[f32]>,
    start: usize,
    len: usize,
}

impl Floats {
    pub(crate) fn zeroed(len: usize, what: &'static str) -> Result<Self> {
        const PER_LINE: usize = size_of::<Line>() / size_of::<f32>();
        let memory: Box<[f32]> = bytemuck::allocation::try_zeroed_slice_box(len.saturating_add(PER_LINE - 1))
            .map_err(|()| out_of_memory(len.saturating_mul(size_of::<f32>()), what))?;
        let start = memory.as_ptr().addr().wrapping_neg() % size_of::<Line>() / size_of::<f32>();
        Ok(Self { memory, start, len })
    }
}

impl Deref for Floats {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        &self.memory[self.start..][..self.len]
    }
}

impl DerefMut for Floats {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..][..self.len]
    }
}

/// `bytes` zeroed bytes, rounded up to whole lines.
pub(crate) fn lines(bytes: usize, what: &'static str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    lines.try_reserve_exact(bytes.div_ceil(64)).map_err(|_| out_of_memory(bytes, what))?;
    advise_huge_pages(&mut lines);
    lines.resize(bytes.div_ceil(64), Line([0; 64]));
    Ok(lines)
}

fn out_of_memory(bytes: usize, what: &'static str) -> DeviceError {
    DeviceError::OutOfMemory { device: DEVICE.to_owned(), bytes, what }
}

/// Asks for 2 MiB pages under memory not yet touched: streaming weights through 4 KiB pages is bound
/// by address translation, most of all in virtual machines.
#[cfg(target_os = "linux")]
fn advise_huge_pages(lines: &mut Vec<Line>) {
    const HUGE: usize = 2 << 20;
    let spare = lines.spare_capacity_mut();
    let start = (spare.as_mut_ptr() as usize).next_multiple_of(HUGE);
    let end = spare.as_mut_ptr() as usize + size_of_val(spare);
    if start < end {
        // SAFETY: the range lies within our allocation, and the advice changes no contents.
        // It is a wish: that it is refused matters to nobody.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: &mut Vec<Line>) {}

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
            assert!(matches!(lines(bytes, "test"), Err(DeviceError::OutOfMemory { what: "test", .. })));
        }
    }
}
