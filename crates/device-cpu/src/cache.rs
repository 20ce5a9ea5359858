//! Block memory and the plan of a step.
//!
//! Keys and values have a plane each, block by block and head by head. A block of keys lies feature by feature, 16
//! positions side by side, so that scores need no sums across a vector; a block of values lies position by position, a row
//! padded with zeros to whole vectors. A latent layer has one plane that lies as values do: a row is the latent and behind
//! it the rotated key, each padded; its indexer's keys have one that lies as keys do. Elements of a plane in bytes have their
//! scales apart, 16 positions side by side.
//!
//! A layer with a window has a plane of its vectors that lies as values do. So do the entries that are pooled of them, of
//! which a block has as many as its tokens can complete; their running sums are floats of their own. Vectors and sums lie in
//! passing blocks, all else in those that are kept.

use std::ops::Range;

use baton_device::{AttentionBatch, KvBlocks, KvDtype, KvSpec, LayerKv, PoolKv, Result, saturate_f16};
use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::kernels::context::GROUP_LEN;
use crate::memory::Floats;
use crate::simd::{ALMOST_HALF, LANES, Simd};

/// Positions of a block: a lane for each.
pub(crate) const BLOCK: usize = LANES;
/// Elements that are rounded together on their way into a plane.
const PUT: usize = 64;

/// Block memory of all layers.
pub struct KvCache {
    pub(crate) layers: Vec<Layer>,
}

/// What one layer keeps.
pub(crate) enum Layer {
    Full {
        keys: Plane,
        values: Plane,
    },
    /// Latents and rotated keys, and the keys of an indexer where there is one.
    Latent {
        rows: Plane,
        index: Option<Plane>,
    },
    /// Vectors, and what is pooled of them.
    Windowed {
        rows: Plane,
        pooled: Option<Box<Pooled>>,
    },
}

/// What a layer pools.
pub(crate) struct Pooled {
    pub(crate) kind: PoolKv,
    pub(crate) attended: EntryKv,
    pub(crate) index: Option<EntryKv>,
}

/// Running sums of a feature: the largest gate, the sum of exponentials, that of values times these.
pub(crate) const PARTS: usize = 3;

/// Entries of one kind.
pub(crate) struct EntryKv {
    pub(crate) rows: Plane,
    /// Of an entry, before it is padded.
    pub(crate) width: usize,
    /// `[passing blocks, series, PARTS, padded width]`: those of the next entry to be completed first.
    pub(crate) sums: Floats,
    /// Floats of a block.
    sums_len: usize,
}

impl EntryKv {
    fn new(dtype: KvDtype, blocks: KvBlocks, pool: PoolKv, width: usize) -> Result<Self> {
        let padded = width.next_multiple_of(LANES);
        let sums_len = pool.sums(padded);
        Ok(Self {
            rows: Plane::new(dtype, [blocks.kept, 1, padded], pool.slots(BLOCK), 1, Order::Positions)?,
            width,
            sums: Floats::zeroed(blocks.passing.saturating_mul(sums_len), "running sums")?,
            sums_len,
        })
    }

    fn clear_sums(&mut self, block: usize) {
        self.sums[block * self.sums_len..][..self.sums_len].fill(0.0);
    }
}

impl Pooled {
    fn entries(&mut self) -> impl Iterator<Item = &mut EntryKv> {
        self.index.iter_mut().chain([&mut self.attended])
    }
}

impl KvCache {
    pub(crate) fn new(spec: &KvSpec, blocks: KvBlocks) -> Result<Self> {
        assert_eq!(spec.block_size, BLOCK, "the block size is the device's choice");
        let plane =
            |heads, width, parts, order| Plane::new(spec.dtype, [blocks.kept, heads, width], BLOCK, parts, order);
        let entries = |pool, width| EntryKv::new(spec.dtype, blocks, pool, width);
        let layer = |layer: &LayerKv| {
            Ok(match *layer {
                LayerKv::Full { kv_heads, head_dim } => Layer::Full {
                    keys: plane(kv_heads, head_dim, 1, Order::Features)?,
                    values: plane(kv_heads, head_dim.next_multiple_of(LANES), 1, Order::Positions)?,
                },
                LayerKv::Latent { rank, rope, index } => Layer::Latent {
                    rows: plane(1, latent_width(rank, rope), 2, Order::Positions)?,
                    index: index.map(|width| plane(1, width, 1, Order::Features)).transpose()?,
                },
                LayerKv::Windowed { width, pool, .. } => {
                    let pooled = |kind: PoolKv| {
                        let index = kind.index.map(|width| entries(kind, width)).transpose()?;
                        Ok(Box::new(Pooled { kind, attended: entries(kind, width)?, index }))
                    };
                    let shape = [blocks.passing, 1, width.next_multiple_of(LANES)];
                    let rows = Plane::new(spec.dtype, shape, BLOCK, 1, Order::Positions)?;
                    Layer::Windowed { rows, pooled: pool.map(pooled).transpose()? }
                }
            })
        };
        Ok(Self { layers: spec.layers.iter().map(layer).collect::<Result<_>>()? })
    }

    /// Zeroes a kept block.
    pub(crate) fn clear_kept(&mut self, block: usize) {
        for layer in &mut self.layers {
            match layer {
                Layer::Full { keys, values } => {
                    keys.clear(block);
                    values.clear(block);
                }
                Layer::Latent { rows, index } => {
                    rows.clear(block);
                    index.iter_mut().for_each(|keys| keys.clear(block));
                }
                Layer::Windowed { pooled, .. } => {
                    let entries = pooled.iter_mut().flat_map(|pooled| pooled.entries());
                    entries.for_each(|entries| entries.rows.clear(block));
                }
            }
        }
    }

    /// Zeroes a passing block.
    pub(crate) fn clear_passing(&mut self, block: usize) {
        for layer in &mut self.layers {
            if let Layer::Windowed { rows, pooled } = layer {
                rows.clear(block);
                pooled.iter_mut().flat_map(|pooled| pooled.entries()).for_each(|entries| entries.clear_sums(block));
            }
        }
    }
}

/// Where the rotated key starts in a row that holds a latent before it.
pub(crate) fn rope_start(rank: usize) -> usize {
    rank.next_multiple_of(LANES)
}

/// Width of a row that holds a latent and a rotated key, each padded.
pub(crate) fn latent_width(rank: usize, rope: usize) -> usize {
    rope_start(rank) + rope.next_multiple_of(LANES)
}

/// What a cache keeps of a number.
pub(crate) trait Element: Pod {
    /// The scale that `x` will share, 1 where there are no scales.
    fn scale(_: &[f32]) -> f32 {
        1.0
    }
    /// Rounds `x`, at most [`PUT`] numbers of those that have this scale.
    fn round(x: &[f32], scale: f32, kept: &mut [Self]);
    /// 16 elements, without their scales.
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32;
}

impl Element for f32 {
    fn round(x: &[f32], _: f32, kept: &mut [Self]) {
        kept.copy_from_slice(x);
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32 {
        s.load(x)
    }
}

impl Element for f16 {
    fn round(x: &[f32], _: f32, kept: &mut [Self]) {
        let mut saturated = [0.0; PUT];
        let saturated = &mut saturated[..x.len()];
        saturated.iter_mut().zip(x).for_each(|(saturated, x)| *saturated = saturate_f16(*x));
        kept.convert_from_f32_slice(saturated);
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32 {
        s.load_f16(x)
    }
}

impl Element for bf16 {
    fn round(x: &[f32], _: f32, kept: &mut [Self]) {
        kept.iter_mut().zip(x).for_each(|(kept, x)| *kept = bf16::from_f32(*x));
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32 {
        s.load_bf16(x)
    }
}

impl Element for i8 {
    /// [`baton_device::int8::scale`], whose magnitudes are ordered as the integers that have their bits, in several maxima at once.
    fn scale(x: &[f32]) -> f32 {
        let (chunks, rest) = x.as_chunks::<LANES>();
        let mut max = [0; LANES];
        for chunk in chunks.iter().map(<[f32; LANES]>::as_slice).chain([rest]) {
            for (max, x) in max.iter_mut().zip(chunk) {
                *max = (x.to_bits() as i32 & i32::MAX).max(*max);
            }
        }
        let max = f32::from_bits(max.into_iter().max().unwrap_or(0) as u32);
        if max.is_finite() { max / 127.0 } else { f32::NAN }
    }

    /// [`baton_device::int8::round`]: just below a half, added before the fraction is cut off, rounds halves away from zero.
    fn round(x: &[f32], scale: f32, kept: &mut [Self]) {
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (kept, x) in kept.iter_mut().zip(x) {
            let x = x * inverse;
            *kept = ((x + ALMOST_HALF.copysign(x)) as i8).max(-127);
        }
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F32 {
        s.load_i8(x)
    }
}

/// How a block of one head lies.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// `[width, 16]`.
    Features,
    /// `[slots, width]`.
    Positions,
}

/// Blocks of the same heads.
pub(crate) struct Plane {
    pub(crate) dtype: KvDtype,
    order: Order,
    heads: usize,
    /// Rows of a block of a head: 16, unless they are entries.
    slots: usize,
    pub(crate) width: usize,
    /// Elements of `dtype`: blocks of `[heads]` in `order`, each a whole number of floats.
    data: Floats,
    /// `[blocks, heads, parts, slots]` where elements are bytes, else empty.
    scales: Floats,
    /// Runs of a row that have a scale each, 0 if elements have none.
    parts: usize,
}

impl Plane {
    fn new(
        dtype: KvDtype,
        [blocks, heads, width]: [usize; 3],
        slots: usize,
        parts: usize,
        order: Order,
    ) -> Result<Self> {
        let memory = |floats: usize| Floats::zeroed(blocks.saturating_mul(heads * floats), "key/value blocks");
        let (per_float, parts) = match dtype {
            KvDtype::F32 => (1, 0),
            KvDtype::F16 | KvDtype::BF16 => (2, 0),
            KvDtype::Int8 => (4, parts),
        };
        let (data, scales) = (memory(slots * width / per_float)?, memory(slots * parts)?);
        Ok(Self { dtype, order, heads, slots, width, data, scales, parts })
    }

    fn clear(&mut self, block: usize) {
        match self.dtype {
            KvDtype::F32 => self.clear_as::<f32>(block),
            KvDtype::F16 => self.clear_as::<f16>(block),
            KvDtype::BF16 => self.clear_as::<bf16>(block),
            KvDtype::Int8 => self.clear_as::<i8>(block),
        }
    }

    fn clear_as<E: Element>(&mut self, block: usize) {
        let (elements, scales) = (self.heads * self.slots * self.width, self.heads * self.slots * self.parts);
        bytemuck::cast_slice_mut::<f32, E>(&mut self.data)[block * elements..][..elements].fill(E::zeroed());
        self.scales[block * scales..][..scales].fill(0.0);
    }

    /// One block of one head, with all its positions.
    #[inline(always)]
    pub(crate) fn block<E: Element>(&self, block: u32, head: usize) -> &[[E; LANES]] {
        let len = BLOCK * self.width;
        debug_assert_eq!(self.slots, BLOCK);
        let elements = &bytemuck::cast_slice::<f32, E>(&self.data)[(block as usize * self.heads + head) * len..][..len];
        elements.as_chunks().0
    }

    /// Scales of one part of the rows of one block of one head, `None` if elements have none.
    #[inline(always)]
    pub(crate) fn scales(&self, block: u32, head: usize, part: usize) -> Option<&[f32; BLOCK]> {
        let at = (block as usize * self.heads + head) * self.parts + part;
        (self.parts > 0).then(|| &self.scales.as_chunks().0[at])
    }

    /// A row of a plane of one head that lies position by position.
    #[inline(always)]
    pub(crate) fn row<E: Element>(&self, block: u32, slot: usize) -> &[[E; LANES]] {
        let first = (block as usize * self.slots + slot) * self.width;
        bytemuck::cast_slice::<f32, E>(&self.data)[first..][..self.width].as_chunks().0
    }

    /// Scale of a part of such a row, `None` if elements have none.
    #[inline(always)]
    pub(crate) fn scale(&self, block: u32, slot: usize, part: usize) -> Option<f32> {
        (self.parts > 0).then(|| self.scales[(block as usize * self.parts + part) * self.slots + slot])
    }

    /// Writes the heads of one position, side by side in `x`, as a part of their rows that starts at feature `start`.
    pub(crate) fn put(&mut self, slot: (u32, usize), part: usize, start: usize, x: &[f32]) {
        match self.dtype {
            KvDtype::F32 => self.put_as::<f32>(slot, part, start, x),
            KvDtype::F16 => self.put_as::<f16>(slot, part, start, x),
            KvDtype::BF16 => self.put_as::<bf16>(slot, part, start, x),
            KvDtype::Int8 => self.put_as::<i8>(slot, part, start, x),
        }
    }

    fn put_as<E: Element>(&mut self, (block, offset): (u32, usize), part: usize, start: usize, x: &[f32]) {
        let (width, len) = (self.width, self.slots * self.width);
        let mut kept = [E::zeroed(); PUT];
        for (head, x) in x.chunks_exact(x.len() / self.heads).enumerate() {
            let block = block as usize * self.heads + head;
            let elements = &mut bytemuck::cast_slice_mut::<f32, E>(&mut self.data)[block * len..][..len];
            let scale = E::scale(x);
            if self.parts > 0 {
                self.scales[(block * self.parts + part) * self.slots + offset] = scale;
            }
            for (first, x) in (start..).step_by(PUT).zip(x.chunks(PUT)) {
                let kept = &mut kept[..x.len()];
                E::round(x, scale, kept);
                match self.order {
                    Order::Positions => elements[offset * width + first..][..x.len()].copy_from_slice(kept),
                    Order::Features => {
                        let column = elements[first * BLOCK + offset..].iter_mut().step_by(BLOCK);
                        column.zip(kept).for_each(|(element, kept)| *element = *kept);
                    }
                }
            }
        }
    }
}

/// For every row of a step: its position and the blocks of its sequence.
pub struct AttentionPlan {
    rows: Vec<PlanRow>,
    blocks: Vec<u32>,
    passing: Vec<u32>,
}

struct PlanRow {
    position: usize,
    blocks: Range<usize>,
    /// Of all the sequence's positions, or empty.
    passing: Range<usize>,
}

impl AttentionPlan {
    pub(crate) fn new(batch: &AttentionBatch<'_>) -> Self {
        let mut rows = Vec::with_capacity(batch.num_tokens());
        let (mut blocks, mut all_passing, mut written) = (Vec::new(), Vec::new(), Vec::new());
        for s in batch.sequences {
            let used = (s.start + s.len).div_ceil(BLOCK);
            assert!(used <= s.block_table.len(), "{used} blocks needed, {} given", s.block_table.len());
            let range = blocks.len()..blocks.len() + used;
            blocks.extend_from_slice(&s.block_table[..used]);
            let passing = all_passing.len()..all_passing.len() + s.passing_table.len();
            all_passing.extend_from_slice(s.passing_table);
            written.extend_from_slice(s.passing_table.get(s.start / BLOCK..used).unwrap_or_default());
            let row = |position| PlanRow { position, blocks: range.clone(), passing: passing.clone() };
            rows.extend((s.start..s.start + s.len).map(row));
        }
        // What pools rely on, whose sequences are computed side by side.
        written.sort_unstable();
        assert!(written.windows(2).all(|pair| pair[0] != pair[1]), "two sequences of a step write one passing block");
        Self { rows, blocks, passing: all_passing }
    }

    /// Some rows, in runs of at most `len` of one sequence.
    pub(crate) fn runs(&self, rows: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
        let mut start = rows.start;
        std::iter::from_fn(move || {
            let blocks = &self.rows[start..rows.end].first()?.blocks;
            let same = self.rows[start..rows.end].iter().take(len).take_while(|row| row.blocks == *blocks).count();
            start += same;
            Some(start - same..start)
        })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn position(&self, row: usize) -> usize {
        self.rows[row].position
    }

    /// Blocks of positions `0..=position` of a row.
    pub(crate) fn blocks(&self, row: usize) -> &[u32] {
        let row = &self.rows[row];
        &self.blocks[row.blocks.clone()][..row.position / BLOCK + 1]
    }

    /// Passing blocks of its sequence.
    pub(crate) fn passing(&self, row: usize) -> &[u32] {
        &self.passing[self.rows[row].passing.clone()]
    }

    /// Passing block and offset of a row's own position.
    pub(crate) fn passing_slot(&self, row: usize) -> (u32, usize) {
        let position = self.position(row);
        (self.passing(row)[position / BLOCK], position % BLOCK)
    }

    /// Kept block and offset of a row's own position.
    pub(crate) fn slot(&self, row: usize) -> (u32, usize) {
        let position = self.position(row);
        (self.blocks(row)[position / BLOCK], position % BLOCK)
    }

    /// Groups of the longest context, of which at most so many positions are read.
    pub(crate) fn groups(&self, most: usize) -> usize {
        self.rows.iter().map(|row| row.position.min(most - 1) / GROUP_LEN + 1).max().unwrap_or(0)
    }

    /// Positions that all rows attend to, together, where each sees at most `window`.
    pub(crate) fn context(&self, window: Option<usize>) -> usize {
        self.rows.iter().map(|r| (r.position + 1).min(window.unwrap_or(usize::MAX))).sum()
    }
}

#[cfg(test)]
mod tests {
    use baton_device::conformance::uniform;
    use baton_device::int8;

    use super::*;

    #[test]
    fn bytes_and_scales_are_those_of_the_device_crate() {
        let halves: Vec<f32> = (0..255).map(|i| 0.5 * (i - 127) as f32).chain([127.0]).collect();
        let odd = [vec![1.0, f32::NAN], vec![f32::NEG_INFINITY; 40], vec![0.0; 17], vec![1e-42, -1e-44]];
        for x in (1..70).map(|len| uniform(len as u64, len, 3.0)).chain(odd).chain([halves]) {
            let scale = i8::scale(&x);
            assert_eq!(scale.to_bits(), int8::scale(&x).to_bits(), "{x:?}");
            let (mut ours, mut theirs) = (vec![1; x.len()], vec![2; x.len()]);
            i8::round(&x, scale, &mut ours);
            int8::round(&x, scale, &mut theirs);
            assert_eq!(ours, theirs, "{x:?}");
        }
    }
}
