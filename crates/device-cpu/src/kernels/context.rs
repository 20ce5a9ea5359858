//! Queries over a cached context, with softmax taken online (arXiv 2205.14135).
//!
//! Order, for each query on its own: groups of 512 positions from position 0 on, a group in pieces of 64. A score is one
//! chain over the features. The scores of a piece give their maximum, then their weights, which rescale what the group has
//! summed before; values are added position by position. Groups are merged one after the other, whoever summed them. A
//! window leaves positions out but moves no border; a position that a query does not see takes no part in its sums, not
//! even as a zero. So nothing depends on the queries that share a piece, or on which step wrote a position.

use std::ops::Range;

use crate::cache::{BLOCK, Element};
use crate::isa::Dispatch;
use crate::simd::{Kernel, LANES, Simd};

/// Blocks of a piece.
pub(crate) const PIECE: usize = 4;
/// Positions of a piece.
const PIECE_LEN: usize = PIECE * BLOCK;
/// Pieces of a group.
const GROUP: usize = 8;
/// Positions of a group: what one thread takes of a context that is split.
pub(crate) const GROUP_LEN: usize = GROUP * PIECE_LEN;

/// Queries at consecutive positions of one sequence.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// `[rows, heads, width]`, scaled.
    pub(crate) data: &'a [f32],
    pub(crate) heads: usize,
    /// As wide as the keys.
    pub(crate) width: usize,
    /// That of the first row.
    pub(crate) position: usize,
    /// Positions that a row sees, its own and those before it.
    pub(crate) window: usize,
    /// Bounds the scores.
    pub(crate) softcap: Option<f32>,
}

impl Queries<'_> {
    fn len(&self) -> usize {
        self.data.len() / self.width
    }

    /// Positions that a query sees; not empty.
    #[inline(always)]
    fn visible(&self, query: usize) -> Range<usize> {
        let end = self.position + query / self.heads + 1;
        end.saturating_sub(self.window)..end
    }

    /// Positions that any of them sees.
    pub(crate) fn context(&self) -> Range<usize> {
        self.visible(0).start..self.visible(self.len() - 1).end
    }
}

/// What queries have summed: `[queries, width]` weighted values, and the maximum score and sum of weights of each.
pub(crate) struct Sums<'a> {
    mixed: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    width: usize,
}

impl<'a> Sums<'a> {
    /// Floats that the sums of some queries take, for values of `width`, which are whole vectors.
    pub(crate) const fn floats(queries: usize, width: usize) -> usize {
        (queries * (width + 2)).next_multiple_of(LANES)
    }

    /// Sums in `memory`, which holds them already or is yet to be cleared.
    pub(crate) fn new(memory: &'a mut [f32], queries: usize, width: usize) -> Self {
        let (mixed, rest) = memory.split_at_mut(queries * width);
        let (max, rest) = rest.split_at_mut(queries);
        Self { mixed, max, sum: &mut rest[..queries], width }
    }

    /// Those of some queries.
    pub(crate) fn part(&mut self, queries: Range<usize>) -> Sums<'_> {
        let width = self.width;
        Sums {
            mixed: &mut self.mixed[queries.start * width..queries.end * width],
            max: &mut self.max[queries.clone()],
            sum: &mut self.sum[queries],
            width,
        }
    }

    fn clear(&mut self) {
        self.mixed.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
    }

    /// Whether a query has seen no position yet: the first one adds `e^0`.
    #[inline(always)]
    fn is_empty(&self, query: usize) -> bool {
        self.sum[query] == 0.0
    }

    #[inline(always)]
    fn mixed(&mut self, query: usize) -> &mut [[f32; LANES]] {
        self.mixed[query * self.width..][..self.width].as_chunks_mut().0
    }

    /// For the length of a borrow.
    fn reborrow(&mut self) -> Sums<'_> {
        let queries = 0..self.max.len();
        self.part(queries)
    }

    /// The sums of groups that lie one behind the other in `memory`, merged into the first.
    pub(crate) fn of_groups(isa: Dispatch, memory: &'a mut [f32], queries: usize, width: usize) -> Self {
        let mut groups =
            memory.chunks_exact_mut(Self::floats(queries, width)).map(|group| Sums::new(group, queries, width));
        let mut sums = groups.next().expect("a context has a group");
        sums.merge(isa, groups);
        sums
    }

    /// Adds the sums of the groups that follow, in order.
    fn merge<'s>(&mut self, isa: Dispatch, following: impl Iterator<Item = Sums<'s>>) {
        following.for_each(|next| isa.run(Merge { sums: self.reborrow(), next }));
    }

    /// Adds to each query's sum of weights that of a score of nothing, which there is for each.
    pub(crate) fn sink(&mut self, isa: Dispatch, scores: &[f32]) {
        isa.run(Sink { sums: self.reborrow(), scores });
    }

    /// Writes `mixed / sum` of the queries from `first` on side by side, the first `width` columns of each.
    pub(crate) fn finish(&mut self, isa: Dispatch, first: usize, out: &mut [f32], width: usize) {
        isa.run(Finish { sums: self.reborrow(), first, out, width });
    }
}

struct Merge<'a, 's> {
    sums: Sums<'a>,
    next: Sums<'s>,
}

impl Kernel for Merge<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { mut sums, mut next } = self;
        for query in 0..sums.max.len() {
            if next.is_empty(query) {
                continue;
            }
            if sums.is_empty(query) {
                sums.mixed(query).copy_from_slice(next.mixed(query));
                (sums.max[query], sums.sum[query]) = (next.max[query], next.sum[query]);
                continue;
            }
            let max = if next.max[query] > sums.max[query] { next.max[query] } else { sums.max[query] };
            let (a, b) = (exp(s, sums.max[query] - max), exp(s, next.max[query] - max));
            sums.max[query] = max;
            sums.sum[query] = sums.sum[query] * a + next.sum[query] * b;
            let (a, b) = (s.splat(a), s.splat(b));
            for (mixed, next) in sums.mixed(query).iter_mut().zip(next.mixed(query)) {
                s.store(s.mul_add(s.load(next), b, s.mul(s.load(mixed), a)), mixed);
            }
        }
    }
}

struct Sink<'a> {
    sums: Sums<'a>,
    scores: &'a [f32],
}

impl Kernel for Sink<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for ((sum, max), score) in self.sums.sum.iter_mut().zip(&*self.sums.max).zip(self.scores) {
            *sum += exp(s, score - max);
        }
    }
}

struct Finish<'a> {
    sums: Sums<'a>,
    first: usize,
    out: &'a mut [f32],
    width: usize,
}

impl Kernel for Finish<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (query, out) in (self.first..).zip(self.out.chunks_exact_mut(self.width)) {
            let inverse = s.splat(1.0 / self.sums.sum[query]);
            for (mixed, out) in self.sums.mixed(query).iter().zip(out.chunks_mut(LANES)) {
                s.store_first(s.mul(s.load(mixed), inverse), out);
            }
        }
    }
}

/// Where cached rows come from.
pub(crate) trait Source {
    type Key: Element;
    type Value: Element;
    /// Lays out the rows of these blocks, at most [`PIECE`] of them; `next` are those that will follow.
    fn piece(&mut self, isa: Dispatch, blocks: &[u32], next: &[u32]) -> Piece<'_, Self::Key, Self::Value>;
}

/// Queries over some groups of a context, into `sums`.
pub(crate) struct Walk<'a> {
    pub(crate) queries: Queries<'a>,
    /// Those of the sequence from position 0 on.
    pub(crate) blocks: &'a [u32],
    pub(crate) groups: Range<usize>,
    pub(crate) sums: Sums<'a>,
    /// Of a group before it is merged.
    pub(crate) next: Sums<'a>,
}

impl Walk<'_> {
    pub(crate) fn run(mut self, isa: Dispatch, source: &mut impl Source) {
        let context = self.queries.context();
        self.sums.clear();
        let first = self.groups.start.max(context.start / GROUP_LEN);
        let last = self.groups.end.min(context.end.div_ceil(GROUP_LEN));
        for group in first..last {
            let sums = if group > first { &mut self.next } else { &mut self.sums };
            sums.clear();
            let pieces = group * GROUP..(group + 1) * GROUP;
            let pieces = pieces.start.max(context.start / PIECE_LEN)..pieces.end.min(context.end.div_ceil(PIECE_LEN));
            for piece in pieces {
                let (blocks, next) = blocks_of(self.blocks, piece);
                let rows = source.piece(isa, blocks, next);
                isa.run(Pass { queries: &self.queries, start: piece * PIECE_LEN, piece: &rows, sums });
            }
            if group > first {
                self.sums.merge(isa, std::iter::once(self.next.reborrow()));
            }
        }
    }
}

/// Blocks of a piece, and of the one behind it.
fn blocks_of(blocks: &[u32], piece: usize) -> (&[u32], &[u32]) {
    let blocks = &blocks[piece * PIECE..];
    let (blocks, next) = blocks.split_at(blocks.len().min(PIECE));
    (blocks, &next[..next.len().min(PIECE)])
}

/// The rows of a piece's blocks.
pub(crate) struct Piece<'a, K, V> {
    pub(crate) rows: Rows<'a, K, V>,
    pub(crate) key_scales: [Option<&'a [f32; BLOCK]>; PIECE],
    pub(crate) value_scales: [Option<&'a [f32; BLOCK]>; PIECE],
    /// Vectors of a row of values.
    pub(crate) stride: usize,
    /// Those that follow, if they have to come from memory.
    pub(crate) next: Option<Rows<'a, K, V>>,
}

/// Rows of the blocks of a piece; where there are fewer blocks one is repeated.
pub(crate) struct Rows<'a, K, V> {
    /// `[width, 16]` each.
    pub(crate) keys: [&'a [[K; LANES]]; PIECE],
    /// `[16, stride * 16]` each, whose first columns are the values.
    pub(crate) values: [&'a [[V; LANES]]; PIECE],
}

/// Scores, then weights, of some queries for the positions of a piece.
type Weights<const Q: usize> = [[[f32; BLOCK]; PIECE]; Q];

/// All queries over one piece.
struct Pass<'a, 's, K, V> {
    queries: &'a Queries<'a>,
    /// First position of the piece.
    start: usize,
    piece: &'a Piece<'a, K, V>,
    sums: &'a mut Sums<'s>,
}

impl<K: Element, V: Element> Kernel for Pass<'_, '_, K, V> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let queries = self.queries.len();
        let mut first = 0;
        while first < queries {
            let left = queries - first;
            first += if S::ACCUMULATORS >= 16 {
                match left {
                    6 | 7 | 9.. => self.tile::<S, 6, 4>(s, first),
                    4.. => self.tile::<S, 4, 4>(s, first),
                    _ => self.tile::<S, 1, 4>(s, first),
                }
            } else if left >= 3 {
                self.tile::<S, 3, 2>(s, first)
            } else {
                self.tile::<S, 1, 2>(s, first)
            };
        }
    }
}

impl<K: Element, V: Element> Pass<'_, '_, K, V> {
    /// `Q` queries from `first` on, `N` vectors of positions or columns at a time; returns `Q`.
    #[inline(always)]
    fn tile<S: Simd, const Q: usize, const N: usize>(&mut self, s: S, first: usize) -> usize {
        // Of the piece's positions those that each sees, those that any sees, and those that all see.
        let mut visible: [Range<usize>; Q] = std::array::from_fn(|_| 0..0);
        let (mut first_seen, mut end_seen) = (PIECE_LEN, 0);
        let mut all = 0..PIECE_LEN;
        for (query, visible) in (first..).zip(&mut visible) {
            let Range { start, end } = self.queries.visible(query);
            let (start, end) = (start.saturating_sub(self.start), end.saturating_sub(self.start).min(PIECE_LEN));
            if start < end {
                (first_seen, end_seen) = (first_seen.min(start), end_seen.max(end));
            }
            all = all.start.max(start)..all.end.min(end);
            *visible = start..end;
        }
        if first_seen >= end_seen {
            return Q;
        }

        let mut weights = [[[0.0; BLOCK]; PIECE]; Q];
        let (mut block, end) = (first_seen / BLOCK, end_seen.div_ceil(BLOCK));
        while block < end {
            if end - block >= N {
                self.scores::<S, Q, N>(s, first, block, &mut weights);
                block += N;
            } else {
                self.scores::<S, Q, 1>(s, first, block, &mut weights);
                block += 1;
            }
        }
        for q in 0..Q {
            if !visible[q].is_empty() {
                self.weigh(s, first + q, &visible[q], &mut weights[q]);
            }
        }

        // Position by position for each query, and together where all see them.
        if all.is_empty() {
            all = PIECE_LEN..PIECE_LEN;
        }
        for part in 0..3 {
            if part == 1 {
                self.mix::<S, Q, N>(s, first, weights.each_ref(), all.clone());
                continue;
            }
            for q in 0..Q {
                let Range { start, end } = visible[q];
                let positions = if part == 0 { start..end.min(all.start) } else { start.max(all.end)..end };
                self.mix::<S, 1, 1>(s, first + q, [&weights[q]], positions);
            }
        }
        Q
    }

    /// The rows that the first tile brings nearer, each while it uses the one that lies there now.
    #[inline(always)]
    fn ahead(&self, first: usize) -> Option<&Rows<'_, K, V>> {
        self.piece.next.as_ref().filter(|_| first == 0)
    }

    /// Products of `Q` queries with the keys of `N` blocks, each a chain over the features.
    #[allow(clippy::needless_range_loop)] // iterators over sums would keep these in memory, not in registers
    #[inline(always)]
    fn scores<S: Simd, const Q: usize, const N: usize>(
        &self,
        s: S,
        first: usize,
        block: usize,
        scores: &mut Weights<Q>,
    ) {
        let width = self.queries.width;
        let mut queries: [&[f32]; Q] = [&[]; Q];
        for q in 0..Q {
            queries[q] = &self.queries.data[(first + q) * width..][..width];
        }
        let mut columns: [&[[K; LANES]]; N] = [&[]; N];
        for n in 0..N {
            columns[n] = &self.piece.rows.keys[block + n][..width];
        }
        let next = self.ahead(first);
        let mut acc = [[s.splat(0.0); N]; Q];
        for feature in 0..width {
            let mut column = [s.splat(0.0); N];
            for n in 0..N {
                if let Some(next) = next {
                    s.prefetch(&raw const next.keys[block + n][feature]);
                }
                // SAFETY: every slice was cut to `width`.
                column[n] = K::load(s, unsafe { columns[n].get_unchecked(feature) });
            }
            for q in 0..Q {
                // SAFETY: as above.
                let query = s.splat(unsafe { *queries[q].get_unchecked(feature) });
                for n in 0..N {
                    acc[q][n] = s.mul_add(query, column[n], acc[q][n]);
                }
            }
        }
        for q in 0..Q {
            for n in 0..N {
                s.store(acc[q][n], &mut scores[q][block + n]);
            }
        }
    }

    /// Turns a query's products for the visible positions into weights, and rescales what it has summed.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, s: S, query: usize, visible: &Range<usize>, scores: &mut [[f32; BLOCK]; PIECE]) {
        let blocks = visible.start / BLOCK..visible.end.div_ceil(BLOCK);
        let inside = visible.start - blocks.start * BLOCK..visible.end - blocks.start * BLOCK;
        let scores = &mut scores[blocks.clone()];
        for (scores, scales) in scores.iter_mut().zip(&self.piece.key_scales[blocks.clone()]) {
            if let Some(scales) = scales {
                s.store(s.mul(s.load(scores), s.load(scales)), scores);
            }
            if let Some(cap) = self.queries.softcap {
                s.store(s.softcap(s.load(scores), cap), scores);
            }
        }
        fill_outside(scores, &inside, f32::NEG_INFINITY);
        let old = self.sums.max[query];
        let mut max = s.splat(old);
        for scores in scores.iter() {
            max = s.at_least(s.load(scores), max);
        }
        let max = s.max(max);
        for scores in scores.iter_mut() {
            s.store(s.exp(s.sub(s.load(scores), s.splat(max))), scores);
        }
        fill_outside(scores, &inside, 0.0);
        let mut total = s.splat(0.0);
        for (weights, scales) in scores.iter_mut().zip(&self.piece.value_scales[blocks]) {
            total = s.add(total, s.load(weights));
            if let Some(scales) = scales {
                s.store(s.mul(s.load(weights), s.load(scales)), weights);
            }
        }
        let total = s.sum(total);
        self.sums.max[query] = max;
        if self.sums.is_empty(query) {
            self.sums.sum[query] = total;
        } else if max == old {
            self.sums.sum[query] += total;
        } else {
            let decay = exp(s, old - max);
            self.sums.sum[query] = self.sums.sum[query] * decay + total;
            for mixed in self.sums.mixed(query) {
                s.store(s.mul(s.load(mixed), s.splat(decay)), mixed);
            }
        }
    }

    /// `mixed += Σ_j weights[j] · values[j]` over `positions`, for `Q` queries from `first` on.
    #[inline(always)]
    fn mix<S: Simd, const Q: usize, const N: usize>(
        &mut self,
        s: S,
        first: usize,
        weights: [&[[f32; BLOCK]; PIECE]; Q],
        positions: Range<usize>,
    ) {
        if positions.is_empty() {
            return;
        }
        let vectors = self.sums.width / LANES;
        let mut column = 0;
        while column < vectors {
            column += if vectors - column >= N {
                self.stripe::<S, Q, N>(s, (first, column), weights, positions.clone())
            } else {
                self.stripe::<S, Q, 1>(s, (first, column), weights, positions.clone())
            };
        }
    }

    /// The same for `N` vectors of columns from `column` on; returns `N`.
    #[allow(clippy::needless_range_loop)] // as above
    #[inline(always)]
    fn stripe<S: Simd, const Q: usize, const N: usize>(
        &mut self,
        s: S,
        (first, column): (usize, usize),
        weights: [&[[f32; BLOCK]; PIECE]; Q],
        positions: Range<usize>,
    ) -> usize {
        let mut acc = [[s.splat(0.0); N]; Q];
        for q in 0..Q {
            let mixed = &self.sums.mixed(first + q)[column..][..N];
            for n in 0..N {
                acc[q][n] = s.load(&mixed[n]);
            }
        }
        let (next, stride) = (self.ahead(first), self.piece.stride);
        for block in positions.start / BLOCK..positions.end.div_ceil(BLOCK) {
            let start = block * BLOCK;
            let within = positions.start.max(start) - start..positions.end.min(start + BLOCK) - start;
            let rows = self.piece.rows.values[block][within.start * stride..].chunks_exact(stride);
            for (row, j) in rows.zip(within) {
                let row = &row[column..][..N];
                let mut values = [s.splat(0.0); N];
                for n in 0..N {
                    if let Some(next) = next {
                        s.prefetch(&raw const next.values[block][j * stride + column + n]);
                    }
                    values[n] = V::load(s, &row[n]);
                }
                for q in 0..Q {
                    let weight = s.splat(weights[q][block][j]);
                    for n in 0..N {
                        acc[q][n] = s.mul_add(weight, values[n], acc[q][n]);
                    }
                }
            }
        }
        for q in 0..Q {
            let mixed = &mut self.sums.mixed(first + q)[column..][..N];
            for n in 0..N {
                s.store(acc[q][n], &mut mixed[n]);
            }
        }
        N
    }
}

#[inline(always)]
fn fill_outside(weights: &mut [[f32; BLOCK]], inside: &Range<usize>, value: f32) {
    let weights = weights.as_flattened_mut();
    weights[..inside.start].fill(value);
    weights[inside.end..].fill(value);
}

/// `e^x` for x ≤ 88.
#[inline(always)]
fn exp<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(s.exp(s.splat(x)), &mut lanes);
    lanes[0]
}
