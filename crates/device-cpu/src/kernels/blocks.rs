//! Products with weights of block formats, in bytes.
//!
//! Order: an output is one lane of one accumulator that starts at 0. By ascending group of columns it
//! takes the exact sum of the group's products, times the product of both scales, and then the minimum times
//! the scaled sum of the activations. A few rows take the codes straight from memory; for more, a panel's
//! codes are spread into bytes once for all of them. Both run the same code on the same integers.

use std::cell::RefCell;
use std::ops::Range;

use bytemuck::Zeroable;

use baton_device::BlockFormat;

use crate::blocks::{Blocks, ForFormat, Format, Panel, QUADS, Quad, with_format};
use crate::isa::Dispatch;
use crate::kernels::linear::PartOut;
use crate::kernels::quantize::Quantized;
use crate::memory::Line;
use crate::simd::{Kernel, Simd};

/// Rows for which codes are taken straight from memory.
const DIRECT_ROWS: usize = 4;

/// A part of a product: some rows times some panels.
pub(crate) struct BlockPart<'a> {
    pub(crate) x: &'a Quantized,
    /// Row of `x` that is row 0 here.
    pub(crate) first: usize,
    pub(crate) w: &'a Blocks,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
    pub(crate) out: PartOut<'a>,
}

impl BlockPart<'_> {
    pub(crate) fn run(&self, isa: Dispatch) {
        if self.rows.len() <= DIRECT_ROWS {
            return isa.run(Direct(self));
        }
        let Shape { groups, has_min, signed, offset_shift } = Shape::of(self.w.format);
        with_scratch(self.w.chunks() * spread_lines(groups), |lines| {
            for panel in self.panels.clone() {
                isa.run(SpreadPanel { w: self.w, panel, lines });
                match (groups, has_min, signed) {
                    (1, false, false) => self.strip::<1, false, false>(isa, panel, lines, offset_shift),
                    (1, false, true) => self.strip::<1, false, true>(isa, panel, lines, offset_shift),
                    (1, true, _) => self.strip::<1, true, false>(isa, panel, lines, offset_shift),
                    (_, false, _) => self.strip::<2, false, false>(isa, panel, lines, offset_shift),
                    (_, true, _) => self.strip::<2, true, false>(isa, panel, lines, offset_shift),
                }
            }
        });
    }

    fn strip<const GROUPS: usize, const HAS_MIN: bool, const SIGNED: bool>(
        &self,
        isa: Dispatch,
        panel: usize,
        lines: &[Quad],
        offset_shift: u32,
    ) {
        isa.run(Strip { part: self, panel, w: Spread::<GROUPS, HAS_MIN, SIGNED> { lines, offset_shift } });
    }

    /// Rows `row..row + R` of one panel.
    #[inline(always)]
    fn tile<S: Simd, W: Weights<S>, const R: usize>(&self, s: S, w: &W, row: usize, panel: usize) {
        let mut acc = [s.splat(0.0); R];
        for chunk in 0..self.w.chunks() {
            let (bytes, factors) = self.x.block::<R>(chunk, self.first + row);
            let quads = w.quads(s, chunk);
            for group in 0..W::GROUPS {
                let (scale, min) = w.group(s, chunk, group);
                // Which sum of the activations: of a half, or of all.
                let sum = if W::GROUPS == 2 { group } else { 2 };
                for r in 0..R {
                    let x = bytes[r].as_chunks::<4>().0;
                    let mut dot = s.shifted(&factors[r].negated_sums[sum], w.start());
                    for j in group * QUADS / W::GROUPS..(group + 1) * QUADS / W::GROUPS {
                        dot = if W::SIGNED { s.dot_signed(dot, quads[j], &x[j]) } else { s.dot(dot, quads[j], &x[j]) };
                    }
                    let scale = s.mul(scale, s.splat(factors[r].scale));
                    acc[r] = s.mul_add(s.to_f32(dot), scale, acc[r]);
                    if W::HAS_MIN {
                        acc[r] = s.mul_add(min, s.splat(factors[r].scaled_sums[sum]), acc[r]);
                    }
                }
            }
        }
        self.out.put(s, row, panel, acc.map(|acc| [acc]));
    }
}

/// Where the codes of a panel come from.
trait Weights<S: Simd> {
    /// Groups of a chunk.
    const GROUPS: usize;
    const HAS_MIN: bool;
    const SIGNED: bool;
    /// Power of two that takes the negated sum of the activations to where a dot product starts.
    fn start(&self) -> u32;
    fn quads(&self, s: S, chunk: usize) -> [S::Bytes; QUADS];
    fn group(&self, s: S, chunk: usize, group: usize) -> (S::F32, S::F32);
}

impl<S: Simd, F: Format> Weights<S> for Panel<'_, F> {
    const GROUPS: usize = F::GROUPS;
    const HAS_MIN: bool = F::BLOCK.has_min();
    const SIGNED: bool = F::SIGNED;

    #[inline(always)]
    fn start(&self) -> u32 {
        if F::SIGNED { S::SIGNED_SHIFT } else { F::OFFSET_SHIFT }
    }

    #[inline(always)]
    fn quads(&self, s: S, chunk: usize) -> [S::Bytes; QUADS] {
        Panel::quads(self, s, chunk)
    }

    #[inline(always)]
    fn group(&self, s: S, chunk: usize, group: usize) -> (S::F32, S::F32) {
        Panel::group(self, s, chunk, group)
    }
}

/// A few rows.
struct Direct<'a>(&'a BlockPart<'a>);

impl Kernel for Direct<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        struct Run<'a, S>(S, &'a BlockPart<'a>);
        impl<S: Simd> ForFormat for Run<'_, S> {
            type Output = ();
            #[inline(always)]
            fn run<F: Format>(self, _: F) {
                let Run(s, part) = self;
                for panel in part.panels.clone() {
                    let (w, row) = (part.w.panel::<F>(panel), part.rows.start);
                    match part.rows.len() {
                        1 => part.tile::<S, _, 1>(s, &w, row, panel),
                        2 => part.tile::<S, _, 2>(s, &w, row, panel),
                        3 => part.tile::<S, _, 3>(s, &w, row, panel),
                        _ => part.tile::<S, _, DIRECT_ROWS>(s, &w, row, panel),
                    }
                }
            }
        }
        with_format(self.0.w.format, Run(s, self.0));
    }
}

/// A panel with its codes in bytes and its scales in f32: per chunk the quads, then per group the scale
/// and the minimum of each row.
struct Spread<'a, const GROUPS: usize, const HAS_MIN: bool, const SIGNED: bool> {
    lines: &'a [Quad],
    offset_shift: u32,
}

/// What a spread panel keeps of its format.
struct Shape {
    groups: usize,
    has_min: bool,
    signed: bool,
    offset_shift: u32,
}

impl Shape {
    fn of(format: BlockFormat) -> Self {
        struct Ask;
        impl ForFormat for Ask {
            type Output = Shape;
            fn run<F: Format>(self, _: F) -> Shape {
                let (has_min, signed) = (F::BLOCK.has_min(), F::SIGNED);
                Shape { groups: F::GROUPS, has_min, signed, offset_shift: F::OFFSET_SHIFT }
            }
        }
        with_format(format, Ask)
    }
}

/// Lines of a chunk.
const fn spread_lines(groups: usize) -> usize {
    QUADS + 2 * groups
}

impl<S: Simd, const GROUPS: usize, const HAS_MIN: bool, const SIGNED: bool> Weights<S>
    for Spread<'_, GROUPS, HAS_MIN, SIGNED>
{
    const GROUPS: usize = GROUPS;
    const HAS_MIN: bool = HAS_MIN;
    const SIGNED: bool = SIGNED;

    #[inline(always)]
    fn start(&self) -> u32 {
        if SIGNED { S::SIGNED_SHIFT } else { self.offset_shift }
    }

    #[inline(always)]
    fn quads(&self, s: S, chunk: usize) -> [S::Bytes; QUADS] {
        let lines: &[Quad; QUADS] = self.lines[chunk * spread_lines(GROUPS)..].first_chunk().expect("a chunk");
        lines.each_ref().map(|line| s.load_bytes(line))
    }

    #[inline(always)]
    fn group(&self, s: S, chunk: usize, group: usize) -> (S::F32, S::F32) {
        let lines = &self.lines[chunk * spread_lines(GROUPS) + QUADS + 2 * group..][..2];
        (s.load(bytemuck::cast_ref(&lines[0])), s.load(bytemuck::cast_ref(&lines[1])))
    }
}

/// Spreads a panel.
struct SpreadPanel<'a> {
    w: &'a Blocks,
    panel: usize,
    lines: &'a mut [Quad],
}

impl Kernel for SpreadPanel<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        struct Run<'a, S>(S, SpreadPanel<'a>);
        impl<S: Simd> ForFormat for Run<'_, S> {
            type Output = ();
            #[inline(always)]
            fn run<F: Format>(self, _: F) {
                let Run(s, SpreadPanel { w, panel, lines }) = self;
                let panel = w.panel::<F>(panel);
                for (chunk, lines) in lines.chunks_exact_mut(spread_lines(F::GROUPS)).enumerate() {
                    let (quads, groups) = lines.split_at_mut(QUADS);
                    for (quad, line) in panel.quads(s, chunk).into_iter().zip(quads) {
                        s.store_bytes(quad, line);
                    }
                    for (group, lines) in groups.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                        let (scale, min) = panel.group(s, chunk, group);
                        s.store(scale, bytemuck::cast_mut(&mut lines[0]));
                        s.store(min, bytemuck::cast_mut(&mut lines[1]));
                    }
                }
            }
        }
        with_format(self.w.format, Run(s, self));
    }
}

/// All rows of a part with one panel.
struct Strip<'a, const GROUPS: usize, const HAS_MIN: bool, const SIGNED: bool> {
    part: &'a BlockPart<'a>,
    panel: usize,
    w: Spread<'a, GROUPS, HAS_MIN, SIGNED>,
}

impl<const GROUPS: usize, const HAS_MIN: bool, const SIGNED: bool> Kernel for Strip<'_, GROUPS, HAS_MIN, SIGNED> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { part, panel, w } = self;
        let mut row = part.rows.start;
        while row < part.rows.end {
            let left = part.rows.end - row;
            let count = [16, 8, 4, 2, 1].into_iter().find(|&n| n <= left && n <= S::ACCUMULATORS).expect("1");
            match count {
                16 => part.tile::<S, _, 16>(s, &w, row, panel),
                8 => part.tile::<S, _, 8>(s, &w, row, panel),
                4 => part.tile::<S, _, 4>(s, &w, row, panel),
                2 => part.tile::<S, _, 2>(s, &w, row, panel),
                _ => part.tile::<S, _, 1>(s, &w, row, panel),
            }
            row += count;
        }
    }
}

/// Lends lines that keep their place in cache from one panel to the next.
fn with_scratch(len: usize, f: impl FnOnce(&mut [Quad])) {
    thread_local! {
        static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < len {
            scratch.resize(len, Line::zeroed());
        }
        f(&mut bytemuck::cast_slice_mut(scratch)[..len]);
    });
}
