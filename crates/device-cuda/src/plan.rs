//! What attention needs to know of a step, on the device: brought there in one copy, read by every layer.
//!
//! Two things make a decode step the same launches as the one before it. Lengths, positions and block numbers are read from
//! the device's memory, at places that depend only on how many rows and tiles there are; and what shapes a grid is the
//! longest context rounded up to a power of two. Invariant: a place on the device is one plan's for as long as that lives.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use baton_device::{AttentionBatch, Result, SequenceSpan};

use crate::cache::BLOCK;
use crate::gpu::{Arg, Gpu};
use crate::staging::Slot;

/// Tokens of a wide tile, as kernels have it.
const TOKENS: usize = 64;
/// Tokens of a sequence from which on they are in wide tiles. Below that (decoding, drafts, ends of prompts) they are in
/// tiles of a few.
const WIDE: usize = 8;
/// Tokens of a tile of a few: which of these is for attention to choose, by how many rows each token has there.
pub(crate) const FEW: [usize; 3] = [1, 2, 4];
/// Block numbers of a sequence are padded to as many, so that kernels read those of a tile at once.
const TOGETHER: usize = 4;
/// Bytes of a plan at first.
const USUAL: usize = 64 << 10;

/// Makes plans: owns the places on the device into which they are copied.
pub(crate) struct Planner {
    gpu: Arc<Gpu>,
    places: Mutex<Vec<Arc<Slot>>>,
}

impl Planner {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let place = Arc::new(gpu.slot(USUAL, "plan")?);
        Ok(Self { gpu: gpu.clone(), places: Mutex::new(vec![place]) })
    }

    pub(crate) fn plan(&self, batch: &AttentionBatch<'_>) -> Result<AttentionPlan> {
        let place = self.place()?;
        let numbers = Numbers::new(batch);
        let (bytes, sections) = numbers.encode();
        let address = self.gpu.upload(&place, &bytes)?;
        let [positions, slots, one, two, four, wide, blocks] = sections.map(|offset| address + offset as u64);
        let [ones, twos, fours] = numbers.few;
        Ok(AttentionPlan {
            rows: numbers.positions.len(),
            highest_block: numbers.blocks.iter().copied().max().unwrap_or(0) as usize,
            positions,
            slots,
            blocks,
            tiles: [
                Tiles { address: one, tokens: FEW[0], list: ones },
                Tiles { address: two, tokens: FEW[1], list: twos },
                Tiles { address: four, tokens: FEW[2], list: fours },
                Tiles { address: wide, tokens: TOKENS, list: numbers.wide },
            ],
            _place: place,
        })
    }

    /// The first place that no plan has.
    fn place(&self) -> Result<Arc<Slot>> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = places.iter().find(|place| Arc::strong_count(place) == 1) {
            return Ok(free.clone());
        }
        let place = Arc::new(self.gpu.slot(USUAL, "plan")?);
        places.push(place.clone());
        Ok(place)
    }
}

/// A step's plan.
pub struct AttentionPlan {
    rows: usize,
    highest_block: usize,
    positions: u64,
    slots: u64,
    blocks: u64,
    /// As [`FEW`], then wide ones.
    tiles: [Tiles; FEW.len() + 1],
    /// Keeps other plans away.
    _place: Arc<Slot>,
}

/// Tiles that are computed in the same way, on the device `[tiles, 4]`: `Tile` of kernels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tiles {
    pub(crate) address: u64,
    /// The most that one has.
    pub(crate) tokens: usize,
    list: Vec<Tile>,
}

impl Tiles {
    /// Whether they have many tokens.
    pub(crate) fn is_wide(&self) -> bool {
        self.tokens == TOKENS
    }

    /// How many.
    pub(crate) fn count(&self) -> usize {
        self.list.len()
    }

    /// At least as many positions as the longest context of them has; a power of two.
    pub(crate) fn longest(&self) -> usize {
        self.list.iter().map(|tile| tile.context()).max().unwrap_or(0).next_power_of_two()
    }

    /// Rows from the first to the last of them.
    pub(crate) fn rows(&self) -> Range<usize> {
        let start = self.list.iter().map(|tile| tile.row).min().unwrap_or(0);
        let end = self.list.iter().map(|tile| tile.row + tile.tokens).max().unwrap_or(0);
        start as usize..end as usize
    }

    /// Parts whose rows are at most `span` apart, which is no less than the tokens of a tile.
    pub(crate) fn parts(&self, span: usize) -> impl Iterator<Item = Self> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let first = self.list.get(start)?;
            let (mut low, mut high) = (first.row, first.row);
            let together = self.list[start..].iter().take_while(|tile| {
                (low, high) = (low.min(tile.row), high.max(tile.row + tile.tokens));
                (high - low) as usize <= span
            });
            let end = start + together.count();
            let address = self.address + (start * size_of::<[i32; 4]>()) as u64;
            let part = Self { address, tokens: self.tokens, list: self.list[start..end].to_vec() };
            start = end;
            Some(part)
        })
    }
}

impl AttentionPlan {
    /// Where the position of each row is, `int`.
    pub(crate) fn positions(&self) -> u64 {
        self.positions
    }

    /// Where the slot of each row is, `int`: its block times [`BLOCK`] and its place in it.
    pub(crate) fn slots(&self) -> u64 {
        self.slots
    }

    /// Rows of the step.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The highest block number in use.
    pub(crate) fn highest_block(&self) -> usize {
        self.highest_block
    }

    /// Where the block numbers of all sequences are, `int`, to which tiles point.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Every row once: in tiles of a few tokens, at most `few`, which is one of [`FEW`], or in wide ones.
    pub(crate) fn tiles(&self, few: usize) -> impl Iterator<Item = &Tiles> {
        self.tiles.iter().filter(move |tiles| tiles.count() > 0 && (tiles.tokens == few || tiles.is_wide()))
    }
}

/// A struct that a kernel takes by value. Fields must be in an order that needs no padding between them.
#[derive(Default)]
pub(crate) struct Pod(Vec<u8>);

impl Pod {
    pub(crate) fn ptr(mut self, address: u64) -> Self {
        self.0.extend(address.to_ne_bytes());
        self
    }

    pub(crate) fn int(mut self, value: usize) -> Self {
        self.0.extend(i32::try_from(value).expect("within an int").to_ne_bytes());
        self
    }

    pub(crate) fn float(mut self, value: f32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// The fields of another struct behind those of this one.
    pub(crate) fn join(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    pub(crate) fn arg(self) -> Arg {
        Arg::Bytes(self.0.into())
    }
}

/// Tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    row: i32,
    tokens: i32,
    /// Of the first of them.
    position: i32,
    /// Where the sequence's block numbers begin.
    table: i32,
}

impl Tile {
    /// Positions up to the last of its tokens.
    fn context(self) -> usize {
        (self.position + self.tokens) as usize
    }
}

/// What goes to the device.
#[derive(Default)]
struct Numbers {
    positions: Vec<i32>,
    slots: Vec<i32>,
    few: [Vec<Tile>; FEW.len()],
    wide: Vec<Tile>,
    blocks: Vec<i32>,
}

/// A number as kernels take it.
fn int(number: usize) -> i32 {
    i32::try_from(number).expect("fewer than 2^31 rows, positions and slots")
}

impl Numbers {
    fn new(batch: &AttentionBatch<'_>) -> Self {
        let mut numbers = Self::default();
        batch.sequences.iter().for_each(|span| numbers.append(span));
        // The last tokens of a sequence, which see the longest context, begin first.
        numbers.wide.reverse();
        numbers
    }

    fn append(&mut self, span: &SequenceSpan<'_>) {
        let SequenceSpan { start, len, block_table, .. } = *span;
        assert!(len > 0, "a sequence without rows");
        let used = (start + len).div_ceil(BLOCK);
        assert!(used <= block_table.len(), "{used} blocks needed, {} given", block_table.len());
        let (row, table) = (self.positions.len(), int(self.blocks.len()));
        for position in start..start + len {
            self.positions.push(int(position));
            self.slots.push(int(block_table[position / BLOCK] as usize * BLOCK + position % BLOCK));
        }
        self.blocks.extend(block_table[..used].iter().map(|&block| int(block as usize)));
        // Those that pad are the sequence's own, and nothing is read of them.
        let last = self.blocks[self.blocks.len() - 1];
        self.blocks.resize(self.blocks.len().next_multiple_of(TOGETHER), last);
        let cut = |list: &mut Vec<Tile>, tokens: usize| {
            list.extend((0..len).step_by(tokens).map(|first| {
                let tokens = tokens.min(len - first);
                Tile { row: int(row + first), tokens: int(tokens), position: int(start + first), table }
            }));
        };
        if len < WIDE {
            self.few.iter_mut().zip(FEW).for_each(|(list, tokens)| cut(list, tokens));
        } else {
            cut(&mut self.wide, TOKENS);
        }
    }

    /// Bytes, and where in them each section begins. Block numbers are last: only theirs is a number that grows from step to
    /// step.
    fn encode(&self) -> (Vec<u8>, [usize; 7]) {
        let fields = |tile: &Tile| [tile.row, tile.tokens, tile.position, tile.table];
        let numbers = |tiles: &[Tile]| tiles.iter().flat_map(fields).collect::<Vec<i32>>();
        let [one, two, four] = self.few.each_ref().map(|tiles| numbers(tiles));
        let wide = numbers(&self.wide);
        let sections = [&self.positions, &self.slots, &one, &two, &four, &wide, &self.blocks];
        let mut bytes = Vec::new();
        let offsets = sections.map(|section| {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let offset = bytes.len();
            bytes.extend(section.iter().flat_map(|number| number.to_ne_bytes()));
            offset
        });
        (bytes, offsets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(spans: &[(usize, usize)]) -> Numbers {
        let table: Vec<u32> = (0..64).map(|block| (block * 7 + 3) % 64).collect();
        let sequences: Vec<_> = spans
            .iter()
            .map(|&(start, len)| SequenceSpan { start, len, block_table: &table, passing_table: &[] })
            .collect();
        Numbers::new(&AttentionBatch { sequences: &sequences })
    }

    #[test]
    fn every_row_is_in_one_tile_with_its_position_slot_and_blocks() {
        let spans = [(0, 1), (17, 3), (5, 130), (0, 64), (99, 8), (15, 2)];
        let numbers = numbers(&spans);
        for (few, tokens) in numbers.few.iter().zip(FEW) {
            let mut seen = vec![0; numbers.positions.len()];
            for tile in few.iter().chain(&numbers.wide) {
                assert_eq!(tile.table as usize % TOGETHER, 0);
                for i in 0..tile.tokens {
                    let (row, position) = ((tile.row + i) as usize, tile.position + i);
                    let block = numbers.blocks[tile.table as usize + position as usize / BLOCK];
                    assert_eq!((numbers.positions[row], numbers.slots[row]), (position, block * 16 + position % 16));
                    seen[row] += 1;
                }
            }
            assert!(seen.iter().all(|seen| *seen == 1));
            assert!(few.iter().all(|tile| tile.tokens as usize <= tokens));
        }
        assert_eq!(numbers.few.each_ref().map(Vec::len), [1 + 3 + 2, 1 + 2 + 1, 1 + 1 + 1]);
        assert!(numbers.wide.is_sorted_by_key(|tile| std::cmp::Reverse(tile.row)));
    }

    #[test]
    fn parts_are_all_tiles_in_order_none_spanning_more_rows_than_asked() {
        let list = numbers(&[(0, 300), (9, 1), (0, 100), (0, 70)]).wide;
        let tiles = Tiles { address: 4096, tokens: TOKENS, list };
        for span in [64, 128, 200, 1000] {
            let parts: Vec<Tiles> = tiles.parts(span).collect();
            assert!(parts.iter().all(|part| part.rows().len() <= span));
            assert_eq!(parts.iter().flat_map(|part| part.list.clone()).collect::<Vec<_>>(), tiles.list);
            let before = |i: usize| parts[..i].iter().map(Tiles::count).sum::<usize>() as u64;
            assert!(parts.iter().enumerate().all(|(i, part)| part.address == 4096 + 16 * before(i)));
        }
    }

    #[test]
    fn sections_of_a_step_with_longer_contexts_begin_where_they_did() {
        let (_, first) = numbers(&[(3, 1), (200, 1), (64, 9)]).encode();
        let (_, later) = numbers(&[(4, 1), (201, 1), (73, 9)]).encode();
        assert_eq!(first, later);
        assert!(first.iter().all(|offset| offset.is_multiple_of(16)));
    }
}
