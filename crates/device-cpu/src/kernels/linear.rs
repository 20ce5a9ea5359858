//! `y = x·Wᵀ + b` on packed weights.
//!
//! Order: an output is one lane of one accumulator that starts at 0, takes its products by ascending
//! k (block formats: see [`super::blocks`]; bf16 where there is an instruction for it: [`super::pairs`]), then the bias. Tiles
//! of `R` rows × `P` panels share loads; they change what is computed together, never the order.

use std::ops::Range;

use baton_device::Rows;

use crate::isa::Dispatch;
use crate::kernels::blocks::BlockPart;
use crate::kernels::pairs::{PairPart, Rounded};
use crate::kernels::quantize::Quantized;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};
use crate::tensor::{Target, Tensor, View};
use crate::weight::{Element, Linear, Matrix, Packed, Panels};

/// Panels whose weights stay in cache while all rows of a task pass over them.
const GROUP: usize = 4;
/// Rows of a tile at most.
const TILE_ROWS: usize = 8;
/// Rows of one task at most: their activations stay in cache while the panels pass.
const TASK_ROWS: usize = 64;
/// Steps in which places within a matrix are compared.
const FRACTION: usize = 1 << 16;

/// Memory for [`Prepared`].
#[derive(Default)]
pub(crate) struct Buffers {
    bytes: Quantized,
    pairs: Rounded,
}

/// Rows in the forms that weights of some formats meet.
#[derive(Clone, Copy)]
pub(crate) struct Prepared<'a> {
    floats: View<'a>,
    bytes: Option<&'a Quantized>,
    pairs: Option<&'a Rounded>,
}

impl<'a> Prepared<'a> {
    /// `x` for `weights`: quantised if one of them is of blocks, rounded, each distinct row once, if one is
    /// multiplied in bf16.
    pub(crate) fn new<'w>(
        (pool, isa): (&Pool, Dispatch),
        x: View<'a>,
        weights: impl IntoIterator<Item = &'w Matrix>,
        buffers: &'a mut Buffers,
    ) -> Self {
        let (mut quantise, mut round) = (false, false);
        for weight in weights {
            assert_eq!(x.width, weight.in_features, "columns of the activation");
            quantise |= matches!(weight.data, Packed::Blocks(_));
            round |= isa.has_pairs() && matches!(weight.data, Packed::BF16(_));
        }
        if quantise {
            buffers.bytes.fill(pool, isa, x);
        }
        if round {
            buffers.pairs.fill(pool, isa, x.distinct());
        }
        Self { floats: x, bytes: quantise.then_some(&buffers.bytes), pairs: round.then_some(&buffers.pairs) }
    }
}

/// Where rows of a part lie among the distinct ones.
#[derive(Clone, Copy)]
pub(crate) struct RowNumbers<'a> {
    first: usize,
    index: Option<&'a [u32]>,
}

impl RowNumbers<'_> {
    #[inline(always)]
    pub(crate) fn get(self, r: usize) -> usize {
        self.index.map_or(self.first + r, |index| index[self.first + r] as usize)
    }
}

/// A part of a product: some rows times some panels.
#[derive(Clone)]
pub(crate) struct Part<'a> {
    pub(crate) input: Prepared<'a>,
    /// Row of the input that is row 0 here.
    pub(crate) first: usize,
    pub(crate) weight: &'a Matrix,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
}

impl Part<'_> {
    /// Computes the part into its rows and columns of `out`.
    ///
    /// # Safety
    /// Nobody else reads or writes that part of `out` meanwhile.
    pub(crate) unsafe fn run(self, isa: Dispatch, out: &Target<'_>) {
        let Part { input, first, weight, bias, rows, panels } = self;
        let out = PartOut { out, bias, out_features: weight.out_features };
        let x = input.floats.from(first);
        let at = RowNumbers { first, index: input.floats.index };
        match (&weight.data, input.pairs) {
            (Packed::F32(w), _) => isa.run(FloatPart { x, w, rows, panels, out }),
            (Packed::F16(w), _) => isa.run(FloatPart { x, w, rows, panels, out }),
            (Packed::BF16(w), None) => isa.run(FloatPart { x, w, rows, panels, out }),
            (Packed::BF16(w), Some(x)) => isa.run_pairs(PairPart { x, at, w, rows, panels, out }),
            (Packed::Blocks(w), _) => {
                let x = input.bytes.expect("the input was prepared for this weight");
                isa.run(BlockPart { x, first, w, rows, panels, out });
            }
        }
    }
}

/// A whole product and where it goes.
pub(crate) struct Product<'a> {
    pub(crate) weight: &'a Matrix,
    bias: Option<&'a [f32]>,
    out: Target<'a>,
}

impl<'a> Product<'a> {
    /// Of `rows` rows with a weight.
    pub(crate) fn new(linear: &'a Linear, rows: usize, out: &'a mut Tensor) -> Self {
        let Linear { weight, bias } = linear;
        assert_eq!(out.cols(), weight.out_features, "columns of an activation");
        out.set_rows(rows);
        Self { weight, bias: bias.as_deref(), out: Target::new(out.data_mut(), weight.out_features) }
    }

    /// With a weight, into memory with room for the rows.
    pub(crate) fn into(linear: &'a Linear, out: Target<'a>) -> Self {
        Self { weight: &linear.weight, bias: linear.bias.as_deref(), out }
    }
}

/// Products of one input, shared among the threads together.
pub(crate) fn multiply(pool: &Pool, isa: Dispatch, (input, rows): (Prepared<'_>, usize), products: &[Product<'_>]) {
    let work = products.iter().map(|p| rows * p.weight.out_features * p.weight.in_features).sum();
    // Shared by panels; by rows too where panels are few.
    let chunk = pool.share(products.iter().map(|p| p.weight.panels()).sum(), work).next_multiple_of(2);
    // By panels first, and those of all products side by side, as they were packed: then a memory node has its share of each.
    let mut chunks: Vec<(&Product<'_>, Range<usize>)> = Vec::new();
    for product in products {
        let panels = product.weight.panels();
        chunks.extend((0..panels).step_by(chunk).map(|first| (product, first..panels.min(first + chunk))));
    }
    if products.len() > 1 {
        chunks.sort_by_key(|(product, panels)| panels.start * FRACTION / product.weight.panels());
    }
    let task_rows = (pool.share(rows, work) * chunks.len()).next_multiple_of(TILE_ROWS).clamp(TILE_ROWS, TASK_ROWS);
    let tiles = rows.div_ceil(task_rows);
    pool.run(chunks.len() * tiles, work, |task| {
        let (row, (product, panels)) = (task % tiles * task_rows, &chunks[task / tiles]);
        let Product { weight, bias, out } = product;
        let (rows, panels) = (row..rows.min(row + task_rows), panels.clone());
        let part = Part { input, first: 0, weight, bias: *bias, rows, panels };
        // SAFETY: tasks differ in the product, in rows or in panels, so their parts do not overlap.
        unsafe { part.run(isa, out) }
    });
}

/// Where a part puts its results.
pub(crate) struct PartOut<'a> {
    out: &'a Target<'a>,
    bias: Option<&'a [f32]>,
    out_features: usize,
}

impl PartOut<'_> {
    #[inline(always)]
    pub(crate) fn put<S: Simd, const R: usize, const P: usize>(
        &self,
        s: S,
        row: usize,
        panel: usize,
        acc: [[S::F32; P]; R],
    ) {
        for (r, acc) in acc.into_iter().enumerate() {
            for (p, mut v) in acc.into_iter().enumerate() {
                let col = (panel + p) * LANES;
                if let Some(bias) = self.bias {
                    v = s.add(v, s.load_first(&bias[col..]));
                }
                // SAFETY: within the part that the caller of `Part::run` vouches for.
                let out = unsafe { self.out.part(row + r, col..self.out_features.min(col + LANES)) };
                s.store_first(v, out);
            }
        }
    }
}

/// A kernel that computes tiles; the walk over a part is shared.
pub(super) trait Tiles<S: Simd> {
    /// Accumulators per row and panel.
    const COST: usize;
    fn tile<const R: usize, const P: usize>(&self, s: S, row: usize, panel: usize);
}

/// Covers a part with tiles as large as the registers allow.
#[inline(always)]
pub(super) fn walk<S: Simd, T: Tiles<S>>(s: S, tiles: &T, rows: Range<usize>, panels: Range<usize>) {
    for first in panels.clone().step_by(GROUP) {
        let group = first..panels.end.min(first + GROUP);
        let mut row = rows.start;
        while row < rows.end {
            let count = (rows.end - row).min(S::ACCUMULATORS / T::COST).clamp(1, TILE_ROWS);
            match count {
                1 => strip::<S, T, 1>(s, tiles, row, group.clone()),
                2 => strip::<S, T, 2>(s, tiles, row, group.clone()),
                3 => strip::<S, T, 3>(s, tiles, row, group.clone()),
                4 => strip::<S, T, 4>(s, tiles, row, group.clone()),
                5 => strip::<S, T, 5>(s, tiles, row, group.clone()),
                6 => strip::<S, T, 6>(s, tiles, row, group.clone()),
                7 => strip::<S, T, 7>(s, tiles, row, group.clone()),
                _ => strip::<S, T, 8>(s, tiles, row, group.clone()),
            }
            row += count;
        }
    }
}

#[inline(always)]
fn strip<S: Simd, T: Tiles<S>, const R: usize>(s: S, tiles: &T, row: usize, panels: Range<usize>) {
    let mut panel = panels.start;
    while panel < panels.end {
        let left = panels.end - panel;
        let fits = |p: usize| left >= p && p * R * T::COST <= S::ACCUMULATORS;
        if fits(4) {
            tiles.tile::<R, 4>(s, row, panel);
            panel += 4;
        } else if fits(2) {
            tiles.tile::<R, 2>(s, row, panel);
            panel += 2;
        } else {
            tiles.tile::<R, 1>(s, row, panel);
            panel += 1;
        }
    }
}

struct FloatPart<'a, T> {
    x: View<'a>,
    w: &'a Panels<T>,
    rows: Range<usize>,
    panels: Range<usize>,
    out: PartOut<'a>,
}

impl<T: Element> Kernel for FloatPart<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        walk(s, &self, self.rows.clone(), self.panels.clone());
    }
}

impl<S: Simd, T: Element> Tiles<S> for FloatPart<'_, T> {
    const COST: usize = 1;

    #[inline(always)]
    fn tile<const R: usize, const P: usize>(&self, s: S, row: usize, panel: usize) {
        let depth = self.x.width;
        let mut x: [&[f32]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.x.row(row + r)[..depth];
        }
        let mut w: [&[[T; LANES]]; P] = [&[]; P];
        for (p, w) in w.iter_mut().enumerate() {
            *w = &self.w.panel(panel + p)[..depth.div_ceil(T::COLUMNS)];
        }
        let mut acc = [[s.splat(0.0); P]; R];
        for k in 0..depth / T::COLUMNS {
            for i in 0..T::COLUMNS {
                // SAFETY: every slice was cut to `depth` columns, of which this is one.
                unsafe { add_column(s, (&x, &w), (k, i), &mut acc) };
            }
        }
        for i in 0..depth % T::COLUMNS {
            // SAFETY: as above.
            unsafe { add_column(s, (&x, &w), (depth / T::COLUMNS, i), &mut acc) };
        }
        self.out.put(s, row, panel, acc);
    }
}

/// Adds the products of column `i` of element `k`.
///
/// # Safety
/// `w` has the element and `x` the column.
#[inline(always)]
unsafe fn add_column<S: Simd, T: Element, const R: usize, const P: usize>(
    s: S,
    (x, w): (&[&[f32]; R], &[&[[T; LANES]]; P]),
    (k, i): (usize, usize),
    acc: &mut [[S::F32; P]; R],
) {
    let mut column = [s.splat(0.0); P];
    for p in 0..P {
        // SAFETY: the caller's obligation.
        column[p] = T::load(s, unsafe { w[p].get_unchecked(k) }, i);
    }
    for r in 0..R {
        // SAFETY: the caller's obligation.
        let x = s.splat(unsafe { *x[r].get_unchecked(k * T::COLUMNS + i) });
        for p in 0..P {
            acc[r][p] = s.mul_add(x, column[p], acc[r][p]);
        }
    }
}
