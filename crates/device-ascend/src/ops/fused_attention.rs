//! Attention by one operator over the paged cache: prefill, chunks of it and decode alike.
//!
//! Invariants: queries lie one sequence behind the other; their lengths are given as running sums, those of the context per
//! sequence. Keys and values of the step's own tokens are in the cache before. Elements are f16 or bf16.

use std::ops::Range;

use baton_device::AttentionParams;

use crate::backend::BLOCK;
use crate::device::Device;
use crate::error::AscendError;
use crate::object::View;

type Result<T> = std::result::Result<T, AscendError>;

/// Side of the constant mask: ones above the diagonal.
pub(crate) const MASK: usize = 2048;
/// Sequences of one call.
const SEQUENCES: usize = 4096;
/// Tokens of a sequence that the latent form takes at once.
pub(crate) const LATENT_TOKENS: usize = 16;
/// No bound on what is seen.
const UNBOUNDED: i64 = i32::MAX as i64;

/// Which tokens of which sequences a step computes. A sequence may be given in pieces, each as one whose context ends
/// earlier.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sequences {
    /// For each how many queries are in it and those before.
    pub(crate) query_ends: Vec<i64>,
    /// Positions of each, the step's own included.
    pub(crate) lengths: Vec<i64>,
}

impl Sequences {
    /// In as few calls as a cache of so many blocks allows: together the sequences of a call have no more, though they may
    /// share some.
    pub(crate) fn calls(&self, blocks: usize) -> Vec<Range<usize>> {
        let mut calls: Vec<Range<usize>> = Vec::new();
        let mut left = 0;
        for (i, &length) in self.lengths.iter().enumerate() {
            let needed = (length as usize).div_ceil(BLOCK);
            match calls.last_mut() {
                Some(call) if call.len() < SEQUENCES && needed <= left => call.end += 1,
                _ => {
                    calls.push(i..i + 1);
                    left = blocks;
                }
            }
            left -= needed;
        }
        calls
    }

    /// Some of them, and which queries are theirs.
    pub(crate) fn some(&self, range: Range<usize>) -> (Self, Range<usize>) {
        let before = if range.start == 0 { 0 } else { self.query_ends[range.start - 1] };
        let query_ends: Vec<i64> = self.query_ends[range.clone()].iter().map(|end| end - before).collect();
        let rows = before as usize..self.query_ends[range.end - 1] as usize;
        (Self { query_ends, lengths: self.lengths[range].to_vec() }, rows)
    }

    /// Whether each has one query.
    fn decode(&self) -> bool {
        self.query_ends.last() == Some(&(self.lengths.len() as i64))
    }
}

/// Sequences with their blocks, for work that is queued.
pub(crate) struct StepView {
    pub(crate) sequences: Sequences,
    /// `[sequences, most blocks]` i32; what is behind a sequence's blocks is the number of any block.
    pub(crate) tables: View,
}

/// The bytes of the mask, `[MASK, MASK]` int8, 1 where a key is hidden.
pub(crate) fn mask() -> Vec<u8> {
    (0..MASK * MASK).map(|i| u8::from(i % MASK > i / MASK)).collect()
}

/// `out = softmax(scale * q·Kᵀ)·V`: q and out `[rows, heads * head_dim]`, the planes of the cache `[slots, kv_heads * head_dim]`,
/// all of one type.
pub(crate) fn attend(
    device: &mut Device,
    q: &View,
    [keys, values]: [&View; 2],
    step: &StepView,
    mask: &View,
    params: &AttentionParams,
    out: &View,
) -> Result<()> {
    let AttentionParams { heads, kv_heads, head_dim, scale, window, softcap } = *params;
    assert_eq!(softcap, None, "scores are not bounded here");
    let paged = |plane: &View| plane.reshape(&[plane.dims[0] as usize / BLOCK, BLOCK, kv_heads * head_dim]);
    // Mode 4 sees so many positions before a query's own, of which the last is the last of its context. That the window's
    // own position does not count, and that mode 3 takes as many queries as keys: UNCONFIRMED; the trial tells.
    let (mode, before, behind) = match window {
        None => (3, UNBOUNDED, UNBOUNDED),
        Some(window) => (4, window as i64 - 1, 0),
    };
    let inputs = Inputs {
        query: &q.split(1, heads),
        key: &paged(keys),
        value: &paged(values),
        ropes: None,
        mask: Some(mask),
        query_lengths: Some(&step.sequences.query_ends),
        step,
        heads,
        kv_heads,
        scale,
        layout: c"TND",
        sparse: [mode, before, behind],
    };
    run(device, &inputs, &out.split(1, heads))
}

/// Latent attention, absorbed: q `[rows, heads, rank]` and its rotated part `[rows, heads, rope]`, the planes of the cache
/// `[slots, rank]` and `[slots, rope]`, out `[heads, rows, rank]`, all of one type. Heads are a power of two.
pub(crate) fn attend_latent(
    device: &mut Device,
    [q, q_rope]: [&View; 2],
    [latents, rope_keys]: [&View; 2],
    step: &StepView,
    mask: &View,
    scale: f32,
    out: &View,
) -> Result<()> {
    let paged = |plane: &View| {
        let [slots, width] = [plane.dims[0] as usize, plane.dims[1] as usize];
        plane.reshape(&[slots / BLOCK, 1, BLOCK, width])
    };
    let (latents, rope_keys) = (paged(latents), paged(rope_keys));
    let [rows, heads, rank] = [0, 1, 2].map(|d| q.dims[d] as usize);
    let rope = q_rope.dims[2] as usize;
    let inputs = Inputs {
        query: q,
        key: &latents,
        value: &latents,
        ropes: Some([q_rope, &rope_keys]),
        mask: Some(mask),
        query_lengths: Some(&step.sequences.query_ends),
        step,
        heads,
        kv_heads: 1,
        scale,
        layout: c"TND_NTD",
        sparse: [3, UNBOUNDED, UNBOUNDED],
    };
    if !step.sequences.decode() {
        return run(device, &inputs, out);
    }
    let (q, q_rope) = (q.reshape(&[rows, heads, 1, rank]), q_rope.reshape(&[rows, heads, 1, rope]));
    let inputs = Inputs {
        query: &q,
        ropes: Some([&q_rope, &rope_keys]),
        mask: None,
        query_lengths: None,
        layout: c"BNSD_NBSD",
        sparse: [0, UNBOUNDED, UNBOUNDED],
        ..inputs
    };
    run(device, &inputs, &out.reshape(&[heads, rows, 1, rank]))
}

/// What the forms above give to the operator.
struct Inputs<'a> {
    query: &'a View,
    key: &'a View,
    value: &'a View,
    /// Rotated parts of query and key.
    ropes: Option<[&'a View; 2]>,
    mask: Option<&'a View>,
    query_lengths: Option<&'a [i64]>,
    step: &'a StepView,
    heads: usize,
    kv_heads: usize,
    scale: f32,
    layout: &'static std::ffi::CStr,
    /// Mode, and positions seen before and behind a query's own.
    sparse: [i64; 3],
}

fn run(device: &mut Device, inputs: &Inputs<'_>, out: &View) -> Result<()> {
    let query = device.tensor(inputs.query);
    let (key, value) = (device.list(&[inputs.key]), device.list(&[inputs.value]));
    let mask = inputs.mask.map(|mask| device.tensor(mask));
    let query_lengths = inputs.query_lengths.map(|lengths| device.ints(lengths));
    let lengths = device.ints(&inputs.step.sequences.lengths);
    let tables = device.tensor(&inputs.step.tables);
    let (query_rope, key_rope) = match inputs.ropes {
        Some([query, key]) => (Some(device.tensor(query)), Some(device.tensor(key))),
        None => (None, None),
    };
    let out = device.tensor(out);
    let [mode, before, behind] = inputs.sparse;
    let none = || None;
    // Its lengths are of this step alone.
    #[rustfmt::skip] // the arguments that are left out would take a line each
    let result = device.at_once(|device| device.fused_infer_attention(
        &query, &key, &value, none(), mask.as_ref(), query_lengths.as_ref(), Some(&lengths),
        none(), none(), none(), none(), none(), none(), none(), Some(&tables), none(), none(),
        none(), none(), none(), none(), none(), none(), None, query_rope.as_ref(), key_rope.as_ref(),
        none(), inputs.heads as i64, f64::from(inputs.scale), before, behind, Some(inputs.layout),
        inputs.kv_heads as i64, mode, 0, BLOCK as i64, 0, false, 0, 0, &out, None,
    ));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_as_many_sequences_as_the_cache_has_blocks_for() {
        let sequences = |lengths: Vec<i64>| Sequences { query_ends: (1..=lengths.len() as i64).collect(), lengths };
        // Two blocks, one, and two: they share some if the cache has only three.
        let three = sequences(vec![129, 128, 200]);
        for (blocks, ends) in [(5, vec![3]), (4, vec![2, 3]), (3, vec![2, 3]), (2, vec![1, 2, 3])] {
            assert_eq!(three.calls(blocks).iter().map(|call| call.end).collect::<Vec<_>>(), ends, "{blocks} blocks");
        }
        assert_eq!(sequences(vec![1; 5000]).calls(9000), [0..4096, 4096..5000]);
    }

    #[test]
    fn some_sequences_are_counted_from_their_own_first_query() {
        let all = Sequences { query_ends: vec![3, 4, 9], lengths: vec![3, 40, 5] };
        assert!(!all.decode());
        let (some, rows) = all.some(1..3);
        assert_eq!((some, rows), (Sequences { query_ends: vec![1, 6], lengths: vec![40, 5] }, 3..9));
        assert!(all.some(1..2).0.decode());
    }

    #[test]
    fn the_mask_hides_what_is_above_the_diagonal() {
        let mask = mask();
        assert_eq!([mask[0], mask[1], mask[MASK], mask[MASK + 1], mask[MASK + 2]], [0, 1, 0, 0, 1]);
    }
}
