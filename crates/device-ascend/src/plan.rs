//! What attention needs of a step: which rows are computed together, and the numbers by which the device finds their
//! context. It is made on the host; the device gets all of it in one copy, at its first use. What a form of attention needs
//! beyond that, because it was not foreseen that it is taken, follows in a copy of its own.
//!
//! For composed attention a step falls into pieces: neighbouring sequences with equally many rows each, padded to the longest context among them, so
//! that steady decode is one piece whatever the batch. Pieces are cut where their scratch memory would pass
//! [`MAX_CONTEXT`] or [`MAX_SCORES`].
//!
//! Invariants: memory taken on the device's thread is given back behind the step. Blocks that pad a context are the
//! sequence's own, so that what a failing sequence writes in this step reaches no other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_device::{AttentionBatch, SequenceSpan};

use crate::backend::BLOCK;
use crate::device::Device;
use crate::error::AscendError;
use crate::object::{Address, DataType, View};
use crate::ops::fused_attention::{LATENT_TOKENS, Sequences, StepView};
use crate::ops::index::{indices_bytes, select};
use crate::owner::Owner;

type Result<T> = std::result::Result<T, AscendError>;

/// Positions whose keys and values are gathered at a time, unless one sequence has more: twice 256 MiB in f32 for 8 heads
/// of 128.
const MAX_CONTEXT: usize = 1 << 16;
/// Scores of a head at a time, unless one row has more: twice 128 MiB in f32 for 32 heads.
const MAX_SCORES: usize = 1 << 20;
/// Masks of a step that are kept from layer to layer: 64 MiB of f32. Larger ones are made anew in each layer.
const MAX_KEPT: usize = 1 << 24;
/// Added to the score of what a row must not see. Not infinite: a chip may saturate infinities, and a row of only such scores
/// shall give a number.
const MASKED: f32 = -1e30;

/// Numbers of which not every form of attention makes use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Pieces, for composed attention.
    Composed,
    /// Whole sequences, for fused attention.
    Whole,
    /// Sequences in runs of at most [`LATENT_TOKENS`] rows, for fused latent attention.
    Short,
}

/// What attention needs to know of a step.
pub struct AttentionPlan {
    owner: Arc<Owner>,
    spans: Vec<Span>,
    windows: Vec<usize>,
    /// What was foreseen, then what was not.
    steps: Mutex<Vec<Arc<Step>>>,
}

/// New tokens of a sequence, and its blocks.
struct Span {
    start: usize,
    len: usize,
    table: Vec<u32>,
}

/// Shared with the work that is queued.
pub(crate) struct Step {
    pub(crate) pieces: Vec<Piece>,
    /// Rows of the step.
    pub(crate) rows: usize,
    indices: Vec<i32>,
    /// Windows for which `indices` has counts, and where these begin.
    windows: Vec<(usize, usize)>,
    parts: Vec<Part>,
    fused: Vec<Fused>,
    /// Used on the device's thread alone.
    memory: Mutex<Memory>,
}

/// Sequences as fused attention takes them.
struct Fused {
    part: Part,
    sequences: Arc<Sequences>,
    /// Where their block numbers `[sequences, blocks]` begin in the indices.
    table: usize,
    blocks: usize,
}

/// Rows that are computed together: `sequences` times `rows` from `first_row` on, each over `blocks` blocks of context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) first_row: usize,
    pub(crate) sequences: usize,
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
    /// Position of the first row of each sequence.
    starts: Vec<usize>,
    /// Where its block numbers `[sequences, blocks]` begin in the indices,
    table: usize,
    /// and its counts `[sequences, rows, blocks]` of visible positions in each block.
    visible: usize,
}

impl Piece {
    /// Positions of context of each sequence, padding included.
    pub(crate) fn context(&self) -> usize {
        self.blocks * BLOCK
    }

    fn scores(&self) -> usize {
        self.sequences * self.rows * self.context()
    }

    /// For each row and block, how many of the positions `0..limit(position of the row)` lie in it.
    fn counts(&self, limit: impl Fn(usize) -> usize) -> impl Iterator<Item = i32> {
        let positions = self.starts.iter().flat_map(|&start| start..start + self.rows);
        positions.flat_map(move |position| {
            let limit = limit(position);
            (0..self.blocks).map(move |block| limit.saturating_sub(block * BLOCK).min(BLOCK) as i32)
        })
    }
}

/// What a step has on the device.
#[derive(Default)]
struct Memory {
    taken: Vec<Address>,
    indices: Option<View>,
    /// By window and piece.
    masks: Vec<(Option<usize>, usize, View)>,
    /// By table, pairing and type.
    angles: Vec<(AnglesKey, [View; 2])>,
}

/// Which cosines and sines: the address of the table, whether pairs are neighbours, the type.
pub(crate) type AnglesKey = (Address, bool, DataType);

/// Constants from which masks are made: row c of `[2, BLOCK + 1, BLOCK]` masks all but the first c positions of a block, or
/// the first c.
pub(crate) fn mask_rows() -> Vec<f32> {
    let row = |visible: fn(usize, usize) -> bool, count: usize| {
        (0..BLOCK).map(move |i| if visible(i, count) { 0.0 } else { MASKED })
    };
    let table = |visible| (0..=BLOCK).flat_map(move |count| row(visible, count));
    table(|i, count| i < count).chain(table(|i, count| i >= count)).collect()
}

impl AttentionPlan {
    /// A step; `windows` and `parts` are those that attention will probably ask for.
    pub(crate) fn new(owner: &Arc<Owner>, batch: &AttentionBatch<'_>, windows: Vec<usize>, parts: &[Part]) -> Self {
        let span = |s: &SequenceSpan<'_>| {
            assert!(s.len > 0, "a sequence without rows");
            Span { start: s.start, len: s.len, table: s.block_table[..(s.start + s.len).div_ceil(BLOCK)].to_vec() }
        };
        let spans: Vec<Span> = batch.sequences.iter().map(span).collect();
        let steps = Mutex::new(vec![Arc::new(Step::new(&spans, &windows, parts))]);
        Self { owner: owner.clone(), spans, windows, steps }
    }

    fn steps(&self) -> MutexGuard<'_, Vec<Arc<Step>>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn step(&self) -> Arc<Step> {
        self.steps()[0].clone()
    }

    /// The step with the numbers of a part.
    pub(crate) fn step_with(&self, part: Part) -> Arc<Step> {
        let mut steps = self.steps();
        match steps.iter().find(|step| step.parts.contains(&part)) {
            Some(step) => step.clone(),
            None => {
                let step = Arc::new(Step::new(&self.spans, &self.windows, &[part]));
                steps.push(step.clone());
                step
            }
        }
    }
}

impl Drop for AttentionPlan {
    fn drop(&mut self) {
        let steps = std::mem::take(&mut *self.steps());
        self.owner.tidy(move |device| {
            let taken = steps.iter().flat_map(|step| std::mem::take(&mut step.memory().taken));
            taken.for_each(|address| device.free(address));
        });
    }
}

impl Piece {
    /// Whether a piece of one sequence can join this one.
    fn takes(&self, other: &Piece) -> bool {
        let joined = Piece { sequences: self.sequences + 1, blocks: self.blocks.max(other.blocks), ..self.clone() };
        self.rows == other.rows && joined.sequences * joined.context() <= MAX_CONTEXT && joined.scores() <= MAX_SCORES
    }
}

/// Appends what composed attention needs, and says what is computed together.
fn append_pieces(indices: &mut Vec<i32>, spans: &[Span]) -> Vec<Piece> {
    let mut pieces: Vec<(Piece, Vec<&[u32]>)> = Vec::new();
    let mut first_row = 0;
    for s in spans {
        let most = (MAX_SCORES / (s.start + s.len).next_multiple_of(BLOCK)).max(1);
        for start in (s.start..s.start + s.len).step_by(most) {
            let rows = most.min(s.start + s.len - start);
            let blocks = (start + rows).div_ceil(BLOCK);
            let piece = Piece { first_row, sequences: 1, rows, blocks, starts: vec![start], table: 0, visible: 0 };
            first_row += rows;
            match pieces.last_mut() {
                Some((last, tables)) if last.takes(&piece) => {
                    last.sequences += 1;
                    last.blocks = last.blocks.max(blocks);
                    last.starts.push(start);
                    tables.push(&s.table);
                }
                _ => pieces.push((piece, vec![&s.table])),
            }
        }
    }
    for (piece, tables) in &mut pieces {
        piece.table = indices.len();
        for (table, start) in tables.iter().zip(&piece.starts) {
            let own = (start + piece.rows).div_ceil(BLOCK);
            indices.extend((0..piece.blocks).map(|i| table[if i < own { i } else { 0 }] as i32));
        }
        piece.visible = indices.len();
        indices.extend(piece.counts(|position| position + 1));
    }
    pieces.into_iter().map(|(piece, _)| piece).collect()
}

/// Appends the block numbers of sequences, or of runs of at most `most` of their rows.
fn append_sequences(indices: &mut Vec<i32>, spans: &[Span], part: Part, most: usize) -> Fused {
    let (mut query_ends, mut lengths, mut tables) = (Vec::new(), Vec::new(), Vec::new());
    for s in spans {
        let end = s.start + s.len;
        for start in (s.start..end).step_by(most) {
            let length = end.min(start.saturating_add(most));
            query_ends.push(query_ends.last().unwrap_or(&0) + (length - start) as i64);
            lengths.push(length as i64);
            tables.push(&s.table[..length.div_ceil(BLOCK)]);
        }
    }
    let blocks = tables.iter().map(|table| table.len()).max().unwrap_or(0);
    let table = indices.len();
    for own in tables {
        indices.extend((0..blocks).map(|i| own[if i < own.len() { i } else { 0 }] as i32));
    }
    Fused { part, sequences: Arc::new(Sequences { query_ends, lengths }), table, blocks }
}

/// Appends for each row and block how many positions lie before the row's window, and says where.
fn append_hidden(indices: &mut Vec<i32>, pieces: &[Piece], window: usize) -> usize {
    let start = indices.len();
    for piece in pieces {
        indices.extend(piece.counts(|position| (position + 1).saturating_sub(window)));
    }
    start
}

impl Step {
    fn new(spans: &[Span], windows: &[usize], parts: &[Part]) -> Self {
        let mut indices: Vec<i32> =
            spans.iter().flat_map(|s| s.start..s.start + s.len).map(|position| position as i32).collect();
        let rows = indices.len();
        for s in spans {
            let slot = |p: usize| (s.table[p / BLOCK] as usize * BLOCK + p % BLOCK) as i32;
            indices.extend((s.start..s.start + s.len).map(slot));
        }
        let (mut pieces, mut counts, mut fused) = (Vec::new(), Vec::new(), Vec::new());
        for &part in parts {
            let most = match part {
                Part::Composed => {
                    pieces = append_pieces(&mut indices, spans);
                    let count = |&window: &usize| (window, append_hidden(&mut indices, &pieces, window));
                    counts = windows.iter().map(count).collect();
                    continue;
                }
                Part::Whole => usize::MAX,
                Part::Short => LATENT_TOKENS,
            };
            fused.push(append_sequences(&mut indices, spans, part, most));
        }
        let memory = Mutex::default();
        Self { pieces, rows, indices, windows: counts, parts: parts.to_vec(), fused, memory }
    }

    fn fused(&self, part: Part) -> &Fused {
        self.fused.iter().find(|fused| fused.part == part).expect("a step with this part")
    }

    /// Whether one fused operator takes the step on a cache of so many blocks.
    pub(crate) fn fits(&self, part: Part, blocks: usize) -> bool {
        self.fused(part).sequences.fit(blocks)
    }

    /// The step as fused operators take it.
    pub(crate) fn view(&self, device: &mut Device, part: Part) -> Result<StepView> {
        let Fused { sequences, table, blocks, .. } = self.fused(part);
        let count = sequences.lengths.len();
        let tables = self.indices(device, *table, count * blocks)?.reshape(&[count, *blocks]);
        Ok(StepView { sequences: sequences.clone(), tables })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory that is given back behind the step.
    fn keep(&self, device: &mut Device, dtype: DataType, dims: &[usize]) -> Result<View> {
        let address = device.alloc(dims.iter().product::<usize>() * dtype.bytes())?;
        self.memory().taken.push(address);
        Ok(View::new(address, dtype, dims))
    }

    /// Indices on the device.
    fn indices(&self, device: &mut Device, start: usize, len: usize) -> Result<View> {
        let known = self.memory().indices.clone();
        let all = match known {
            Some(all) => all,
            None => {
                let all = self.keep(device, DataType::I32, &[self.indices.len()])?;
                device.upload(&indices_bytes(&self.indices), all.base)?;
                self.memory().indices = Some(all.clone());
                all
            }
        };
        Ok(all.narrow(0, start, len))
    }

    /// Position of each row.
    pub(crate) fn positions(&self, device: &mut Device) -> Result<View> {
        self.indices(device, 0, self.rows)
    }

    /// Cache slot of each row.
    pub(crate) fn slots(&self, device: &mut Device) -> Result<View> {
        self.indices(device, self.rows, self.rows)
    }

    /// Block numbers of a piece, `[sequences * blocks]`.
    pub(crate) fn table(&self, device: &mut Device, piece: &Piece) -> Result<View> {
        self.indices(device, piece.table, piece.sequences * piece.blocks)
    }

    /// Cosines and sines, made at first use by `make`, `[rows, dim]` each.
    pub(crate) fn angles(
        &self,
        device: &mut Device,
        key: AnglesKey,
        dim: usize,
        make: impl FnOnce(&mut Device, &[View; 2]) -> Result<()>,
    ) -> Result<[View; 2]> {
        let known = self.memory().angles.iter().find(|(known, _)| *known == key).map(|(_, views)| views.clone());
        if let Some(views) = known {
            return Ok(views);
        }
        let dims = [self.rows, dim];
        let views = [self.keep(device, key.2, &dims)?, self.keep(device, key.2, &dims)?];
        make(device, &views)?;
        self.memory().angles.push((key, views.clone()));
        Ok(views)
    }

    /// Runs `work` with what is added to the scores of a piece, `[sequences, rows, context]` in f32. `constants` are
    /// [`mask_rows`].
    pub(crate) fn with_mask<T>(
        &self,
        device: &mut Device,
        number: usize,
        window: Option<usize>,
        constants: &View,
        work: impl FnOnce(&mut Device, &View) -> Result<T>,
    ) -> Result<T> {
        let piece = &self.pieces[number];
        let dims = [piece.sequences, piece.rows, piece.context()];
        let known = self.memory().masks.iter().find(|(w, n, _)| (*w, *n) == (window, number)).map(|m| m.2.clone());
        if let Some(mask) = known {
            return work(device, &mask);
        }
        if self.pieces.iter().map(Piece::scores).sum::<usize>() > MAX_KEPT {
            return device.with_views([(DataType::F32, &dims)], |device, [mask]| {
                self.mask(device, number, window, constants, &mask)?;
                work(device, &mask)
            });
        }
        let mask = self.keep(device, DataType::F32, &dims)?;
        self.mask(device, number, window, constants, &mask)?;
        self.memory().masks.push((window, number, mask.clone()));
        work(device, &mask)
    }

    /// Writes a mask.
    fn mask(
        &self,
        device: &mut Device,
        number: usize,
        window: Option<usize>,
        constants: &View,
        out: &View,
    ) -> Result<()> {
        let piece = &self.pieces[number];
        let (rows, half) = (piece.scores() / BLOCK, BLOCK + 1);
        let out = out.reshape(&[rows, BLOCK]);
        let visible = self.indices(device, piece.visible, rows)?;
        select(device, &constants.narrow(0, 0, half), &visible, &out)?;
        let Some(window) = window else { return Ok(()) };
        device.with_views([(DataType::F32, &[rows, BLOCK])], |device, [before]| {
            let constants = constants.narrow(0, half, half);
            match self.windows.iter().find(|(known, _)| *known == window) {
                Some((_, start)) => {
                    let earlier: usize = self.pieces[..number].iter().map(|piece| piece.scores() / BLOCK).sum();
                    let hidden = self.indices(device, start + earlier, rows)?;
                    select(device, &constants, &hidden, &before)?;
                }
                // A window that was not foreseen: in the first step that has it.
                None => {
                    let mut hidden = Vec::new();
                    append_hidden(&mut hidden, std::slice::from_ref(piece), window);
                    device.with_views([(DataType::I32, &[rows])], |device, [view]| {
                        device.upload(&indices_bytes(&hidden), view.base)?;
                        select(device, &constants, &view, &before)
                    })?;
                }
            }
            crate::ops::rows::add(device, &out, &before)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step for composed attention; each sequence has a thousand blocks of its own.
    fn step(spans: &[(usize, usize)]) -> Step {
        let table = |s: usize| (s as u32 * 1000..s as u32 * 1000 + 1000).collect();
        let span = |(s, &(start, len)): (usize, &(usize, usize))| Span { start, len, table: table(s) };
        Step::new(&spans.iter().enumerate().map(span).collect::<Vec<_>>(), &[], &[Part::Composed])
    }

    fn spans() -> [Span; 2] {
        [Span { start: 0, len: 35, table: vec![7] }, Span { start: 250, len: 1, table: vec![4, 9] }]
    }

    #[test]
    fn fused_attention_is_given_whole_sequences_or_short_runs_whose_context_ends_with_them() {
        let step = Step::new(&spans(), &[], &[Part::Whole, Part::Short]);
        let numbers = |part| {
            let Fused { sequences, table, blocks, .. } = step.fused(part);
            let count = sequences.lengths.len() * blocks;
            (sequences.query_ends.clone(), sequences.lengths.clone(), step.indices[*table..][..count].to_vec())
        };
        assert_eq!(numbers(Part::Whole), (vec![35, 36], vec![35, 251], vec![7, 7, 4, 9]));
        let tables = vec![7, 7, 7, 7, 7, 7, 4, 9];
        assert_eq!(numbers(Part::Short), (vec![16, 32, 35, 36], vec![16, 32, 35, 251], tables));
        assert!(step.pieces.is_empty() && step.indices.len() == 2 * 36 + 4 + 8, "nothing of what is not asked for");
    }

    #[test]
    fn steady_decode_is_one_piece_whatever_the_batch() {
        for batch in [1, 2, 33, 64] {
            let spans: Vec<_> = (0..batch).map(|s| (s * 13, 1)).collect();
            let step = step(&spans);
            assert_eq!(step.pieces.len(), 1);
            assert_eq!((step.pieces[0].sequences, step.pieces[0].rows), (batch, 1));
        }
    }

    #[test]
    fn pieces_cover_all_rows_in_order_and_stay_within_their_scratch_memory() {
        let shapes: [&[(usize, usize)]; 5] = [
            &[(0, 1), (0, 17), (0, 70)],
            &[(100_000, 1), (5, 1), (6, 1), (0, 300), (7, 1)],
            &[(0, 8192), (60_000, 4096)],
            &[(40_000, 1), (40_000, 1), (3, 1)],
            &[(0, 5), (8, 5), (900, 5)],
        ];
        for spans in shapes {
            let step = step(spans);
            let mut positions = Vec::new();
            for piece in &step.pieces {
                assert_eq!((piece.first_row, piece.starts.len()), (positions.len(), piece.sequences));
                positions.extend(piece.starts.iter().flat_map(|&start| start..start + piece.rows));
                assert!(piece.sequences == 1 || piece.sequences * piece.context() <= MAX_CONTEXT, "{piece:?}");
                assert!(piece.sequences * piece.rows == 1 || piece.scores() <= MAX_SCORES, "{piece:?}");
                assert!(piece.starts.iter().all(|start| start + piece.rows <= piece.context()), "{piece:?}");
            }
            let expected: Vec<_> = spans.iter().flat_map(|&(start, len)| start..start + len).collect();
            assert_eq!(positions, expected);
        }
    }

    #[test]
    fn a_short_context_is_padded_with_blocks_of_its_own() {
        let step = step(&[(300, 1), (5, 1)]);
        let [piece] = step.pieces.as_slice() else { panic!("{:?}", step.pieces) };
        assert_eq!(step.indices[piece.table..][..6], [0, 1, 2, 1000, 1000, 1000]);
        assert_eq!(step.indices[piece.visible..][..6], [128, 128, 45, 6, 0, 0]);
    }

    #[test]
    fn constants_mask_what_is_not_among_the_first_or_what_is() {
        let rows = mask_rows();
        let row = |i: usize| &rows[i * BLOCK..][..BLOCK];
        for count in 0..=BLOCK {
            assert_eq!(row(count).iter().position(|x| *x != 0.0).unwrap_or(BLOCK), count);
            assert_eq!(row(BLOCK + 1 + count).iter().filter(|x| **x != 0.0).count(), count);
        }
    }
}
