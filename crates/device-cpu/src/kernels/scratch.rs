//! Memory of a thread for the length of a task: kept, so that no step asks the system for it.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable};

use crate::kernels::linear::Buffers;
use crate::simd::LANES;

/// Memory of this thread for the length of a task, from a cache line's start on; its contents are arbitrary.
pub(crate) fn with_scratch(len: usize, f: impl FnOnce(&mut [f32], &mut Buffers)) {
    thread_local! {
        static SCRATCH: RefCell<(Vec<Line>, Buffers)> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(|(lines, buffers)| {
        let needed = len.div_ceil(LANES);
        if lines.len() < needed {
            lines.resize(needed, Line::zeroed());
        }
        f(&mut bytemuck::cast_slice_mut(&mut lines[..needed])[..len], buffers);
    });
}

/// A cache line of floats.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

// SAFETY: an array of floats of exactly its alignment's size, so without padding; zeros are floats.
unsafe impl Zeroable for Line {}
// SAFETY: as above.
unsafe impl Pod for Line {}
