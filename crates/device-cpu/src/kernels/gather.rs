//! Cached rows that lie here and there, laid out one behind the other: as keys, transposed, and as values; in f32 and scaled.

use std::marker::PhantomData;

use baton_device::KvDtype;
use half::{bf16, f16};

use crate::cache::{BLOCK, Element, Plane};
use crate::isa::Dispatch;
use crate::kernels::context::{self, PIECE, Piece, Source};
use crate::simd::{Kernel, LANES, Simd};

/// Where a row lies.
#[derive(Clone, Copy, Default)]
pub(crate) struct Place {
    /// Which of two planes.
    pub(crate) plane: usize,
    pub(crate) block: u32,
    pub(crate) slot: usize,
}

/// A context whose rows are here and there: its blocks are runs of 16 of them, numbered from 0 on.
pub(crate) struct Gathered<'a, P> {
    /// Of one kind and width.
    pub(crate) planes: [&'a Plane; 2],
    /// Vectors of a row before those that have a scale of their own.
    pub(crate) split: usize,
    pub(crate) len: usize,
    /// Where row i lies.
    pub(crate) place: P,
    /// `[PIECE, width, 16]`.
    pub(crate) keys: &'a mut [[f32; LANES]],
    /// `[PIECE, 16, width]`.
    pub(crate) values: &'a mut [[f32; LANES]],
}

impl<P: Fn(usize) -> Place> Source for Gathered<'_, P> {
    type Key = f32;
    type Value = f32;

    fn piece(&mut self, isa: Dispatch, blocks: &[u32], _: &[u32]) -> Piece<'_, f32, f32> {
        let width = self.planes[0].width;
        let parts = self.values.chunks_exact_mut(width).zip(self.keys.chunks_exact_mut(width));
        for (&block, (values, keys)) in blocks.iter().zip(parts) {
            let rows = block as usize * BLOCK..self.len.min((block as usize + 1) * BLOCK);
            let mut places = [Place::default(); BLOCK];
            places.iter_mut().zip(rows.clone()).for_each(|(place, row)| *place = (self.place)(row));
            widen(isa, self.planes, self.split, &places[..rows.len()], values);
            isa.run(Transpose { rows: values, columns: keys });
        }
        let keys = std::array::from_fn(|b| &self.keys[b * width..][..width]);
        let values = std::array::from_fn(|b| &self.values[b * width..][..width]);
        let (rows, scales) = (context::Rows { keys, values }, [None; PIECE]);
        Piece { rows, key_scales: scales, value_scales: scales, stride: width / LANES, next: None }
    }
}

/// Writes rows one behind the other, each element times its scale; the first `split` vectors of a row have another than those
/// behind them. What is behind the last row is left as it was.
pub(crate) fn widen(isa: Dispatch, planes: [&Plane; 2], split: usize, places: &[Place], to: &mut [[f32; LANES]]) {
    match planes[0].dtype {
        KvDtype::F32 => isa.run(Widen::<f32> { planes, split, places, to, element: PhantomData }),
        KvDtype::F16 => isa.run(Widen::<f16> { planes, split, places, to, element: PhantomData }),
        KvDtype::BF16 => isa.run(Widen::<bf16> { planes, split, places, to, element: PhantomData }),
        KvDtype::Int8 => isa.run(Widen::<i8> { planes, split, places, to, element: PhantomData }),
    }
}

/// See [`widen`].
struct Widen<'a, E> {
    planes: [&'a Plane; 2],
    split: usize,
    places: &'a [Place],
    to: &'a mut [[f32; LANES]],
    element: PhantomData<E>,
}

impl<E: Element> Kernel for Widen<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let vectors = self.planes[0].width / LANES;
        for (&Place { plane, block, slot }, to) in self.places.iter().zip(self.to.chunks_exact_mut(vectors)) {
            let plane = self.planes[plane];
            let (first, second) = plane.row::<E>(block, slot).split_at(self.split.min(vectors));
            let (to_first, to_second) = to.split_at_mut(first.len());
            for (part, (from, to)) in [(first, to_first), (second, to_second)].into_iter().enumerate() {
                if from.is_empty() {
                    continue;
                }
                match plane.scale(block, slot, part) {
                    Some(scale) => {
                        for (from, to) in from.iter().zip(to) {
                            s.store(s.mul(E::load(s, from), s.splat(scale)), to);
                        }
                    }
                    None => {
                        for (from, to) in from.iter().zip(to) {
                            s.store(E::load(s, from), to);
                        }
                    }
                }
            }
        }
    }
}

/// `[16, width]` to `[width, 16]`.
pub(crate) struct Transpose<'a> {
    pub(crate) rows: &'a [[f32; LANES]],
    pub(crate) columns: &'a mut [[f32; LANES]],
}

impl Kernel for Transpose<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let vectors = self.rows.len() / LANES;
        for (vector, columns) in self.columns.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let mut square = [s.splat(0.0); LANES];
            for (row, square) in self.rows.chunks_exact(vectors).zip(&mut square) {
                *square = s.load(&row[vector]);
            }
            for (column, square) in columns.iter_mut().zip(s.transpose(square)) {
                s.store(square, column);
            }
        }
    }
}
