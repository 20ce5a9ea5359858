//! Memory that can be refused: every large allocation of the backend is made here.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use baton_device::{DeviceError, Result};

/// Name of the device in messages and caps.
pub(crate) const DEVICE: &str = "cpu";

/// Bytes of a cache line.
const LINE: usize = 64;

/// Zeroed floats that start on a cache line. Pages are taken from the system when first touched, by
/// whoever touches them; an allocation with that alignment of its own would be zeroed by hand, hence the detour.
pub(crate) struct Floats {
    memory: Box<[f32]>,
    start: usize,
    len: usize,
}

impl Floats {
    pub(crate) fn zeroed(len: usize, what: &'static str) -> Result<Self> {
        const PER_LINE: usize = LINE / size_of::<f32>();
        let mut memory: Box<[f32]> = bytemuck::allocation::try_zeroed_slice_box(len.saturating_add(PER_LINE - 1))
            .map_err(|()| out_of_memory(len.saturating_mul(size_of::<f32>()), what))?;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
        let border = bytes.as_ptr().addr().wrapping_neg() % HUGE;
        if let Some(pages) = bytes.get_mut(border..).filter(|pages| pages.len() >= HUGE) {
            advise_huge_pages(pages);
        }
        let start = memory.as_ptr().addr().wrapping_neg() % LINE / size_of::<f32>();
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

/// Bytes of a large page.
const HUGE: usize = 2 << 20;
/// Bytes of a piece that several weights share.
const PIECE: usize = 16 * HUGE;

/// Zeroed bytes for a weight, from its first line on its own. Weights lie one behind the other in large pieces of
/// memory, so that those smaller than a large page are in one too.
pub(crate) struct Weights {
    piece: Arc<Piece>,
    start: usize,
    len: usize,
}

/// Memory whose parts belong to the [`Weights`] that were cut from it.
struct Piece {
    memory: *mut [u8],
    /// Where a large page starts within it.
    start: usize,
}

// SAFETY: a piece is accessed only through `Weights`, whose ranges do not overlap; each is an ordinary owner of
// its bytes.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: it came from a box, and no `Weights` is left that points into it.
        drop(unsafe { Box::from_raw(self.memory) });
    }
}

/// The piece that the next small weight is cut from, and how much of it is taken. It lives by its weights alone: with
/// the last of a model's, its memory is gone too.
static CURRENT: Mutex<(Weak<Piece>, usize)> = Mutex::new((Weak::new(), 0));

/// Memory for a weight.
pub(crate) fn weights(bytes: usize) -> Result<Weights> {
    let taken = bytes.checked_next_multiple_of(LINE).ok_or_else(|| out_of_memory(bytes, "weights"))?;
    if taken > PIECE / 2 {
        return Ok(Weights { piece: Piece::new(bytes)?, start: 0, len: bytes });
    }
    // Both halves are replaced at once, so poison means nothing.
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    let (piece, start) = match current.0.upgrade() {
        Some(piece) if current.1 + taken <= PIECE => (piece, current.1),
        _ => (Piece::new(PIECE)?, 0),
    };
    *current = (Arc::downgrade(&piece), start + taken);
    Ok(Weights { piece, start, len: bytes })
}

impl Piece {
    /// At least `bytes`, zeroed, from a large page's border on.
    fn new(bytes: usize) -> Result<Arc<Self>> {
        let mut memory: Box<[u8]> = bytemuck::allocation::try_zeroed_slice_box(bytes.saturating_add(HUGE - 1))
            .map_err(|()| out_of_memory(bytes, "weights"))?;
        let start = memory.as_ptr().addr().wrapping_neg() % HUGE;
        advise_huge_pages(&mut memory[start..]);
        Ok(Arc::new(Self { memory: Box::into_raw(memory), start }))
    }
}

impl Weights {
    fn first(&self) -> *mut u8 {
        // SAFETY: within the piece: both offsets were chosen so.
        unsafe { self.piece.memory.cast::<u8>().add(self.piece.start + self.start) }
    }
}

impl Deref for Weights {
    type Target = [u8];

    #[inline(always)]
    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies within the piece, which lives as long as `self`, and is of `self` alone.
        unsafe { std::slice::from_raw_parts(self.first(), self.len) }
    }
}

impl DerefMut for Weights {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.first(), self.len) }
    }
}

fn out_of_memory(bytes: usize, what: &'static str) -> DeviceError {
    DeviceError::OutOfMemory { device: DEVICE.to_owned(), bytes, what }
}

/// Asks for 2 MiB pages under memory not yet touched, which starts on the border of one: streaming weights through
/// 4 KiB pages is bound by address translation, most of all in virtual machines.
#[cfg(target_os = "linux")]
fn advise_huge_pages(memory: &mut [u8]) {
    // SAFETY: the range is our allocation, and the advice changes no contents.
    // It is a wish: that it is refused matters to nobody.
    unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), libc::MADV_HUGEPAGE) };
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
    fn weights_start_on_a_cache_line_are_zero_and_do_not_overlap() {
        let sizes = [0, 1, 64, 100, 1 << 20, 3 << 20, PIECE / 2, PIECE / 2 + 1, PIECE, 5, PIECE / 2];
        let mut all: Vec<Weights> = sizes.iter().map(|&bytes| weights(bytes).unwrap()).collect();
        for (i, (memory, &bytes)) in all.iter_mut().zip(&sizes).enumerate() {
            assert_eq!((memory.len(), memory.as_ptr().addr() % 64), (bytes, 0));
            assert!(memory.iter().all(|&v| v == 0));
            memory.fill(i as u8 + 1);
        }
        drop(all.remove(3));
        for (i, memory) in all.iter().enumerate() {
            let value = if i < 3 { i + 1 } else { i + 2 };
            assert!(memory.iter().all(|&v| usize::from(v) == value), "{i}");
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
