//! Steps like the largest to come, before any has come, so that what they take of a device's memory is known when the cache is
//! sized.
//!
//! What a step takes depends on how many rows it has, how sequences share them, and the longest context up to its next power
//! of two. All steps of single tokens that serving can have are here by that measure, those in which all have all their drafts,
//! prompts by powers of two, and the largest step that the limits allow. Steps between these, and what adapters add, are not.

use std::collections::BTreeSet;

use baton_device::{
    AttentionBatch, Backend, CompressedOps, Draw, KvBlocks, KvSpec, LatentOps, Result as DeviceResult, SequenceSpan,
    StepMemory, TokenIds,
};

use crate::arch::{AdapterScratch, Model, StepAdapters};
use crate::buckets::padded;
use crate::step::RunSpec;

/// New tokens of a sequence: those at positions `start..start + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    start: usize,
    len: usize,
}

/// Has a device try the steps that a runner of these limits can be asked for. `spec` needs to say nothing of the cache.
pub(crate) fn rehearse<B: Backend + LatentOps + CompressedOps>(
    backend: &B,
    model: &mut dyn Model<B>,
    scratch: &mut AdapterScratch<B>,
    kv: &KvSpec,
    spec: &RunSpec,
) -> DeviceResult<StepMemory> {
    // All contexts lie in one block: whatever is computed is nothing's.
    let mut cache = backend.kv_cache(kv, KvBlocks { kept: 1, passing: 1 })?;
    let table = vec![0; spec.max_model_len.div_ceil(kv.block_size)];
    let mut step = |spans: &[Span]| {
        let sequence =
            |span: &Span| SequenceSpan { start: span.start, len: span.len, block_table: &table, passing_table: &table };
        let sequences: Vec<SequenceSpan<'_>> = spans.iter().map(sequence).collect();
        let batch = AttentionBatch { sequences: &sequences };
        let plan = backend.plan_attention(&batch)?;
        let ids = vec![0; batch.num_tokens()];
        let (mut end, mut last, mut sampled) = (0, Vec::new(), Vec::new());
        for span in spans {
            end += span.len as u32;
            last.push(end - 1);
            // Behind drafts tokens are chosen as well.
            let rows = if span.len <= 1 + spec.max_draft_tokens { span.len as u32 } else { 1 };
            sampled.extend(end - rows..end);
        }
        sampled.truncate(spec.logit_rows());
        let mut adapters = StepAdapters { groups: &[], scratch };
        model.forward(backend, TokenIds::Known(&ids), &plan, &mut cache, &mut adapters)?;
        let logits = model.logits(backend, &sampled)?;
        backend.choose(logits, &vec![Draw::LARGEST; sampled.len()])?;
        if model.looks_ahead() {
            model.look_ahead(backend, &ids, &plan, &mut cache, &mut adapters)?;
            model.logits(backend, &last)?;
        }
        backend.submit().map(drop)
    };
    let pads = backend.caps().replays_steps;
    backend.rehearse(|| steps(spec, pads).iter().try_for_each(|spans| step(spans)))
}

/// The steps, each by what its sequences have in it; `pads`: those of single tokens get as many rows as [`padded`] says.
fn steps(spec: &RunSpec, pads: bool) -> Vec<Vec<Span>> {
    let &RunSpec { max_model_len, max_step_tokens, max_step_sequences, max_draft_tokens, .. } = spec;
    let at_end = |context: usize, len: usize| Span { start: context - len, len };
    let powers = |from: usize, most: usize| {
        std::iter::successors(Some(from.min(most)), move |n| (*n < most).then(|| (2 * n).min(most)))
    };
    let mut steps = Vec::new();
    // Of all contexts the longest one counts, so the others may be short.
    for len in BTreeSet::from([1, (1 + max_draft_tokens).min(max_model_len)]) {
        let met = |n: &usize| n * len <= max_step_tokens && (!pads || len > 1 || padded(*n, max_step_sequences) == *n);
        for sequences in (1..=max_step_sequences).filter(met) {
            steps.extend(powers(len, max_model_len).map(|longest| {
                let mut spans = vec![at_end(len, len); sequences];
                spans[0] = at_end(longest, len);
                spans
            }));
        }
    }
    let prompts = powers(2, max_step_tokens.min(max_model_len));
    steps.extend(prompts.map(|len| vec![at_end(max_model_len, len)]));
    // As many tokens as there may be, of as many sequences, all at the end of contexts as long as they may be.
    let mut rest = max_step_tokens - max_step_sequences;
    let largest = (0..max_step_sequences).map(|_| {
        let len = 1 + rest.min(max_model_len - 1);
        rest -= len - 1;
        at_end(max_model_len, len)
    });
    steps.push(largest.collect());
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(
        max_model_len: usize,
        max_step_tokens: usize,
        max_step_sequences: usize,
        max_draft_tokens: usize,
    ) -> RunSpec {
        RunSpec {
            vocab_size: 1,
            max_model_len,
            block_size: 0,
            num_blocks: 0,
            passing: None,
            max_step_tokens,
            max_step_sequences,
            max_draft_tokens,
            steps_ahead: false,
        }
    }

    #[test]
    fn steps_reach_every_limit_and_go_beyond_none() {
        let specs = [
            spec(400, 400, 8, 4),
            spec(1, 1, 1, 0),
            spec(1024, 4096, 64, 0),
            spec(100_000, 64, 64, 9),
            spec(3, 90, 5, 7),
        ];
        for (spec, pads) in specs.iter().flat_map(|spec| [(spec, false), (spec, true)]) {
            let steps = steps(spec, pads);
            let tokens = |spans: &[Span]| spans.iter().map(|span| span.len).sum::<usize>();
            for spans in &steps {
                assert!((1..=spec.max_step_sequences).contains(&spans.len()), "{spec:?}");
                assert!(tokens(spans) <= spec.max_step_tokens, "{spec:?}");
                let within = |span: &Span| span.len > 0 && span.start + span.len <= spec.max_model_len;
                assert!(spans.iter().all(within), "{spec:?}");
            }
            let most = spec.max_step_tokens.min(spec.max_step_sequences * spec.max_model_len);
            assert_eq!(steps.last().map(|spans| tokens(spans)), Some(most), "{spec:?}");
            for sequences in 1..=spec.max_step_sequences {
                let rows = if pads { padded(sequences, spec.max_step_sequences) } else { sequences };
                let single = |spans: &&Vec<Span>| spans.len() == rows && tokens(spans) == rows;
                let longest = steps.iter().filter(single).map(|spans| spans[0].start + 1).max();
                assert_eq!(longest, Some(spec.max_model_len), "{spec:?}");
            }
        }
    }
}
