//! Activations, and the views of them that kernels read and write.

use std::ops::Range;

use baton_device::{Result, Rows};

use crate::memory::Floats;
use crate::pool::Disjoint;

/// `[rows, cols]`, row-major, in memory that never moves.
pub struct Tensor {
    data: Floats,
    rows: usize,
    cols: usize,
}

impl Tensor {
    pub(crate) fn new(capacity: usize, cols: usize) -> Result<Self> {
        assert!(cols > 0, "a tensor without columns");
        Ok(Self { data: Floats::zeroed(capacity.saturating_mul(cols), "activations")?, rows: 0, cols })
    }

    pub(crate) fn set_rows(&mut self, rows: usize) {
        let capacity = self.data.len() / self.cols;
        assert!(rows <= capacity, "{rows} rows in a tensor of {capacity}");
        self.rows = rows;
    }

    /// The rows in use.
    pub(crate) fn data(&self) -> &[f32] {
        &self.data[..self.rows * self.cols]
    }

    /// The rows in use.
    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.cols]
    }

    pub(crate) fn row(&self, r: usize) -> &[f32] {
        &self.data()[r * self.cols..][..self.cols]
    }

    pub(crate) fn view(&self) -> View<'_> {
        View { data: self.data(), rows: self.rows, stride: self.cols, start: 0, width: self.cols, index: None }
    }
}

impl Rows for Tensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }
}

/// `width` columns of some rows: row r is `data[at(r) * stride + start..][..width]`, where `at` is
/// the identity or `index`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) stride: usize,
    pub(crate) start: usize,
    pub(crate) width: usize,
    pub(crate) index: Option<&'a [u32]>,
}

impl<'a> View<'a> {
    /// The rows from `first` on.
    pub(crate) fn from(self, first: usize) -> Self {
        let rows = self.rows - first;
        match self.index {
            Some(index) => Self { rows, index: Some(&index[first..]), ..self },
            None => Self { rows, start: self.start + first * self.stride, ..self },
        }
    }

    /// The rows that an index chooses from.
    pub(crate) fn distinct(self) -> Self {
        match self.index {
            Some(_) => Self { rows: self.data.len() / self.stride, index: None, ..self },
            None => self,
        }
    }

    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> &'a [f32] {
        let r = self.index.map_or(r, |index| index[r] as usize);
        &self.data[r * self.stride + self.start..][..self.width]
    }
}

/// Where the tasks of a region write: row r is `[r * stride + start..]` of the slice.
pub(crate) struct Target<'a> {
    pub(crate) data: Disjoint<'a>,
    pub(crate) stride: usize,
    pub(crate) start: usize,
}

impl<'a> Target<'a> {
    /// All columns of contiguous rows.
    pub(crate) fn new(data: &'a mut [f32], stride: usize) -> Self {
        Self { data: Disjoint::new(data), stride, start: 0 }
    }

    /// The same memory from another row and column on.
    pub(crate) fn shifted(&self, row: usize, col: usize) -> Target<'_> {
        Target { data: self.data.again(), stride: self.stride, start: self.start + row * self.stride + col }
    }

    /// Some columns of one row.
    ///
    /// # Safety
    /// No other part that overlaps it is alive.
    #[allow(clippy::mut_from_ref)] // as in `Disjoint::part`
    #[inline(always)]
    pub(crate) unsafe fn part(&self, row: usize, cols: Range<usize>) -> &mut [f32] {
        let start = row * self.stride + self.start;
        // SAFETY: the caller's obligation.
        unsafe { self.data.part(start + cols.start..start + cols.end) }
    }
}
