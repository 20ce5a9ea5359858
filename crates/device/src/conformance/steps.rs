//! Steps that cases of attention and of rotation take.

use crate::{AttentionBatch, Backend, KvBlocks, KvDtype, KvSpec, LayerKv, PASSED, Result, SequenceSpan};

/// Positions of a context without a history, at most.
pub(super) const MAX_POSITIONS: usize = 512;
/// Blocks of a cache.
const NUM_BLOCKS: usize = 256;
/// A history with which a context is longer than devices take it in one go.
pub(super) const LONG: usize = 520;

/// Sequences of uneven lengths that advance by uneven steps, in blocks handed out out of order. Passing blocks are few: those
/// behind the reach of a step serve it anew.
pub(super) struct Ragged {
    tables: Vec<Vec<u32>>,
    steps: Vec<Vec<Part>>,
}

/// New tokens of a sequence.
struct Part {
    start: usize,
    len: usize,
    passing: Vec<u32>,
}

/// Which tokens a step computes.
pub(super) struct Step<'a> {
    spans: Vec<SequenceSpan<'a>>,
}

/// The passing table of a sequence that has some slots, taken in turn, for a step from `start` to `end`.
pub fn passing_table(slots: &[u32], (start, end): (usize, usize), reach: usize, block_size: usize) -> Vec<u32> {
    let first = start.saturating_sub(reach) / block_size;
    let blocks = end.div_ceil(block_size);
    assert!(blocks - first <= slots.len(), "{} slots for {} blocks", slots.len(), blocks - first);
    (0..blocks).map(|i| if i < first { PASSED } else { slots[i % slots.len()] }).collect()
}

impl Ragged {
    /// Of a layer with such a reach, `None` if nothing of it passes. Prefill of different lengths, then a mix of decode and
    /// chunks, then decode; the last sequence has `history` positions more.
    pub(super) fn new(block_size: usize, history: usize, reach: Option<usize>) -> Self {
        let per_sequence = (MAX_POSITIONS / 4 + history) / block_size.min(32) + 1;
        let block = |s: usize, i: usize| ((s + i * 3) * 5 % NUM_BLOCKS) as u32;
        let table = |s: usize, len: usize| (0..len).map(|i| block(s, i)).collect::<Vec<u32>>();
        let spans: [[(usize, usize); 3]; 4] = [
            [(0, 1), (0, 17), (0, history + 70)],
            [(1, 5), (17, 1), (history + 70, 1)],
            [(6, 1), (18, 33), (history + 71, 1)],
            [(7, 1), (51, 1), (history + 72, 9)],
        ];
        let most = |reach: usize| {
            let held = |(start, len): (usize, usize)| {
                (start + len).div_ceil(block_size) - start.saturating_sub(reach) / block_size
            };
            spans.into_iter().flatten().map(held).max().unwrap_or(0)
        };
        let part = |(s, (start, len)): (usize, (usize, usize))| {
            let passing =
                reach.map(|reach| passing_table(&table(s, most(reach)), (start, start + len), reach, block_size));
            Part { start, len, passing: passing.unwrap_or_default() }
        };
        let steps = spans.into_iter().map(|step| step.into_iter().enumerate().map(part).collect()).collect();
        Self { tables: (0..3).map(|s| table(s, per_sequence)).collect(), steps }
    }

    pub(super) fn steps(&self) -> Vec<Step<'_>> {
        fn span<'a>((part, block_table): (&'a Part, &'a Vec<u32>)) -> SequenceSpan<'a> {
            SequenceSpan { start: part.start, len: part.len, block_table, passing_table: &part.passing }
        }
        self.steps.iter().map(|step| Step { spans: step.iter().zip(&self.tables).map(span).collect() }).collect()
    }
}

impl Step<'_> {
    pub(super) fn num_tokens(&self) -> usize {
        AttentionBatch { sequences: &self.spans }.num_tokens()
    }

    pub(super) fn plan<B: Backend>(&self, b: &B) -> Result<B::AttentionPlan> {
        b.plan_attention(&AttentionBatch { sequences: &self.spans })
    }
}

/// Runs `attend(cache, plan, rows, seed)` for every step on one cache, in its second layer.
pub(super) fn over_steps<B: Backend>(
    b: &B,
    (layer, dtype): (LayerKv, KvDtype),
    history: usize,
    mut attend: impl FnMut(&mut B::KvCache, &B::AttentionPlan, usize, u64) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    let spec = KvSpec { layers: vec![layer; 2], dtype, block_size: b.caps().kv_block_size };
    let mut cache = b.kv_cache(&spec, KvBlocks { kept: NUM_BLOCKS, passing: NUM_BLOCKS })?;
    let mut result = Vec::new();
    for (i, step) in Ragged::new(spec.block_size, history, spec.reach()).steps().iter().enumerate() {
        result.extend(attend(&mut cache, &step.plan(b)?, step.num_tokens(), 10 * i as u64 + 10)?);
    }
    Ok(result)
}
