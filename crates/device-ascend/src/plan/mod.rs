//! What attention needs of a step: which rows are computed together, and the numbers by which the device finds their
//! context. It is made on the host; the device gets all of it in one copy, at its first use. What a form of attention needs
//! beyond that, because it was not foreseen that it is taken, follows in a copy of its own.
//!
//! Invariants: memory taken on the device's thread is given back behind the step. Blocks that pad a context are the
//! sequence's own, so that what a failing sequence writes in this step reaches no other.

mod masks;
mod pieces;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_device::{AttentionBatch, SequenceSpan};

use crate::backend::BLOCK;
use crate::device::Device;
use crate::error::AscendError;
use crate::object::{Address, DataType, View};
use crate::ops::fused_attention::{LATENT_TOKENS, Sequences, StepView};
use crate::ops::index::indices_bytes;
use crate::owner::Owner;
use pieces::{append_hidden, append_pieces};

pub(crate) use masks::mask_rows;
pub(crate) use pieces::Piece;

type Result<T> = std::result::Result<T, AscendError>;

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
    sequences: Sequences,
    /// Where their block numbers `[sequences, blocks]` begin in the indices.
    table: usize,
    blocks: usize,
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
    Fused { part, sequences: Sequences { query_ends, lengths }, table, blocks }
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

    /// The step as fused operators take it on a cache of so many blocks: the rows of each call, and their sequences.
    pub(crate) fn calls(
        &self,
        device: &mut Device,
        part: Part,
        blocks: usize,
    ) -> Result<Vec<(Range<usize>, StepView)>> {
        let Fused { sequences, table, blocks: width, .. } = self.fused(part);
        let count = sequences.lengths.len();
        let tables = self.indices(device, *table, count * width)?.reshape(&[count, *width]);
        let call = |range: Range<usize>| {
            let tables = tables.narrow(0, range.start, range.len());
            let (sequences, rows) = sequences.some(range);
            (rows, StepView { sequences, tables })
        };
        Ok(sequences.calls(blocks).into_iter().map(call).collect())
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
                // Rounded up, so that what is taken behind it lies where it lay though contexts grow: graphs ask for that.
                let room = self.keep(device, DataType::I32, &[self.indices.len().next_power_of_two()])?;
                let all = room.narrow(0, 0, self.indices.len());
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
}
