//! Steps that cases of attention and of rotation take.

use crate::{AttentionBatch, Backend, KvDtype, KvSpec, LayerKv, Result, SequenceSpan};

/// Positions of a context without a history, at most.
pub(super) const MAX_POSITIONS: usize = 512;
/// Blocks of a cache.
const NUM_BLOCKS: usize = 256;
/// A history with which a context is longer than devices take it in one go.
pub(super) const LONG: usize = 520;

/// Sequences of uneven lengths that advance by uneven steps, in blocks handed out out of order.
pub(super) struct Ragged {
    tables: Vec<Vec<u32>>,
    /// Positions that the last sequence has more than the others' plan says.
    history: usize,
}

/// Which tokens a step computes.
pub(super) struct Step<'a> {
    spans: Vec<SequenceSpan<'a>>,
}

impl Ragged {
    pub(super) fn new(block_size: usize, history: usize) -> Self {
        let per_sequence = (MAX_POSITIONS / 4 + history) / block_size.min(32) + 1;
        let block = |s: usize, i: usize| ((s + i * 3) * 5 % NUM_BLOCKS) as u32;
        Self { tables: (0..3).map(|s| (0..per_sequence).map(|i| block(s, i)).collect()).collect(), history }
    }

    /// Prefill of different lengths, then a mix of decode and chunks, then decode.
    pub(super) fn steps(&self) -> Vec<Step<'_>> {
        let more = self.history;
        let plans: [[(usize, usize); 3]; 4] = [
            [(0, 1), (0, 17), (0, more + 70)],
            [(1, 5), (17, 1), (more + 70, 1)],
            [(6, 1), (18, 33), (more + 71, 1)],
            [(7, 1), (51, 1), (more + 72, 9)],
        ];
        plans
            .into_iter()
            .map(|step| Step {
                spans: step
                    .into_iter()
                    .zip(&self.tables)
                    .map(|((start, len), table)| SequenceSpan { start, len, block_table: table })
                    .collect(),
            })
            .collect()
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
    let mut cache = b.kv_cache(&spec, NUM_BLOCKS)?;
    let mut result = Vec::new();
    for (i, step) in Ragged::new(spec.block_size, history).steps().iter().enumerate() {
        result.extend(attend(&mut cache, &step.plan(b)?, step.num_tokens(), 10 * i as u64 + 10)?);
    }
    Ok(result)
}
