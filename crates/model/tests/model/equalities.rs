//! A sequence gets bit-identical tokens, logprobs and scores of its prompt however it is computed: alone or in a batch, in
//! one step or many, over a cached prefix or from nothing, preempted or not, with drafts right or wrong,
//! whatever adapters its batch mates have. Through the runner, with a real paged cache, sampled and greedy.

use std::fmt;

use crate::common::checkpoint::poisoned_by_token_7;
use crate::common::{
    Pool, Rng, Sequence, adapted, all_logits_with, alone, generate, options, prompts, step, step_with_drafts,
};
use baton_device::{Backend, CompressedOps, LatentOps, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{Adapter, Files, ModelRunner, Runner, SamplingParams, SequenceFailure, StepPlan, load};

const OUTPUT: usize = 12;

/// A golden checkpoint, and adapters that some of its sequences have.
#[derive(Clone, Copy)]
struct Case {
    base: &'static str,
    adapters: &'static [&'static str],
}

impl Case {
    /// The runner, and what sequences take turns with: no adapter, then each.
    fn load<B: Backend + LatentOps + CompressedOps>(self, backend: B) -> (ModelRunner<B>, Vec<Option<Adapter>>) {
        let (runner, adapters) = adapted(backend, self.base, self.adapters);
        (runner, std::iter::once(None).chain(adapters.into_iter().map(Some)).collect())
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.base, self.adapters)
    }
}

/// Every kind of request: greedy, sampled, cut, penalised, biased.
fn params(i: usize) -> SamplingParams {
    let base = SamplingParams { seed: 7 * i as u64, logprobs: Some(3), ..SamplingParams::default() };
    match i % 6 {
        0 => SamplingParams { temperature: 0.0, ..base },
        1 => base,
        2 => SamplingParams { temperature: 0.8, top_k: 40, top_p: 0.9, ..base },
        3 => SamplingParams { repetition_penalty: 1.2, frequency_penalty: 0.3, choice: 3, ..base },
        4 => SamplingParams { logit_bias: vec![(5, 4.0), (9, -9.0)], min_p: 0.05, ..base },
        _ => SamplingParams { suppressed_until_min: (0..300).collect(), min_tokens: 5, presence_penalty: 0.5, ..base },
    }
}

/// The golden prompts as sequences, each adapter in turn and every second one scored, with what each gives alone.
fn sequences<B: Backend + LatentOps + CompressedOps>(
    runner: &mut ModelRunner<B>,
    adapters: &[Option<Adapter>],
    case: Case,
) -> Vec<(Sequence, Sequence)> {
    let solo = |(i, prompt): (usize, crate::common::Prompt)| {
        let adapter = adapters[i % adapters.len()].as_ref();
        let sequence = Sequence::new(i as u64, &prompt.ids, params(i)).adapted(adapter);
        let sequence = if i % 2 == 0 { sequence.scored() } else { sequence };
        (sequence.clone(), alone(runner, sequence, OUTPUT))
    };
    prompts(case.base).into_iter().enumerate().map(solo).collect()
}

fn assert_as_alone(sequences: &[Sequence], solo: &[Sequence], what: &str) {
    for (sequence, solo) in sequences.iter().zip(solo) {
        assert_eq!(sequence.output[..OUTPUT], solo.output[..OUTPUT], "{what}: sequence {}", sequence.id);
        let expected = if sequence.score.is_some() { sequence.prompt_len } else { 0 };
        assert_eq!(sequence.scores.len(), expected, "{what}: sequence {}", sequence.id);
        assert!(sequence.scores == solo.scores, "{what}: scores of sequence {}", sequence.id);
    }
}

fn chunked_is_whole<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: Case) {
    let (mut runner, adapters) = case.load(make());
    for (seed, prompt) in prompts(case.base).iter().enumerate() {
        let adapter = adapters[seed % adapters.len()].as_ref();
        let whole = all_logits_with(&mut runner, adapter, &prompt.ids);
        let mut rng = Rng(seed as u64);
        for _ in 0..3 {
            let mut chunked = Vec::new();
            let mut sequence = Sequence::new(1, &prompt.ids, SamplingParams::greedy()).adapted(adapter);
            let mut pool = Pool::new(&runner);
            while sequence.remaining() > 0 {
                let limit = if rng.below(2) == 0 { 3 } else { 90 };
                let count = (1 + rng.below(limit)).min(sequence.remaining());
                let end = sequence.num_computed + count;
                pool.cover(&mut sequence, end);
                chunked.extend(runner.logits(&StepPlan::new(vec![sequence.step(count)])).unwrap());
                sequence.num_computed += count;
            }
            assert!(whole == chunked, "{case}, {}: chunks changed the logits", prompt.name);
        }
    }
}

fn batched_is_alone<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: Case) {
    let (mut runner, adapters) = case.load(make());
    let (all, solo): (Vec<_>, Vec<_>) = sequences(&mut runner, &adapters, case).into_iter().unzip();
    for seed in 0..3 {
        let mut rng = Rng(seed);
        let mut all = all.clone();
        let mut pool = Pool::new(&runner);
        while all.iter().any(|s| s.output.len() < OUTPUT) {
            // Some sequences sit a step out, the others take chunks of any size within the budget.
            let mut budget = runner.spec().max_step_tokens;
            let mut counts = vec![0; all.len()];
            for (count, sequence) in counts.iter_mut().zip(&all) {
                if sequence.output.len() < OUTPUT && rng.below(4) > 0 && budget > 0 {
                    *count = sequence.remaining().min(1 + rng.below(150)).min(budget);
                    budget -= *count;
                }
            }
            if counts.iter().any(|c| *c > 0) {
                step(&mut runner, &mut pool, &mut all, &counts);
            }
        }
        assert_as_alone(&all, &solo, &format!("{case}, batched with seed {seed}"));
    }
}

fn preempted_is_not<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: Case) {
    let (mut runner, adapters) = case.load(make());
    let (mut all, solo): (Vec<_>, Vec<_>) = sequences(&mut runner, &adapters, case).into_iter().unzip();
    let mut rng = Rng(11);
    let mut pool = Pool::new(&runner);
    let mut preemptions = 0;
    while all.iter().any(|s| s.output.len() < OUTPUT) {
        let victim = rng.below(all.len());
        if rng.below(3) > 0 && all[victim].num_computed > 0 && preemptions < 20 {
            // Its blocks go to others; what it had is computed again, output included.
            pool.release(&mut all[victim]);
            all[victim].num_computed = 0;
            preemptions += 1;
        }
        let mut budget = runner.spec().max_step_tokens;
        let mut counts = Vec::new();
        for s in &all {
            let count = if s.output.len() < OUTPUT { s.remaining().min(budget) } else { 0 };
            budget -= count;
            counts.push(count);
        }
        step(&mut runner, &mut pool, &mut all, &counts);
    }
    assert!(preemptions > 3, "only {preemptions}");
    assert_as_alone(&all, &solo, &format!("{case}, preempted"));
}

fn drafted_is_plain<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: Case) {
    let (mut runner, adapters) = case.load(make());
    let (all, solo): (Vec<_>, Vec<_>) = sequences(&mut runner, &adapters, case).into_iter().unzip();
    for seed in 0..3 {
        let mut rng = Rng(seed);
        let mut all = all.clone();
        let mut pool = Pool::new(&runner);
        let (mut steps, mut preemptions) = (0, 0);
        while all.iter().any(|s| s.output.len() < OUTPUT) {
            let victim = rng.below(all.len());
            if rng.below(6) == 0 && preemptions < 5 {
                pool.release(&mut all[victim]);
                all[victim].num_computed = 0;
                preemptions += 1;
            }
            let mut budget = runner.spec().max_step_tokens;
            let (mut counts, mut drafts) = (Vec::new(), Vec::new());
            for (s, solo) in all.iter().zip(&solo) {
                let (done, sits_out) = (s.output.len(), rng.below(5) == 0);
                let count =
                    if done < OUTPUT && !sits_out { s.remaining().min(1 + rng.below(150)).min(budget) } else { 0 };
                budget -= count;
                let samples = count > 0 && count == s.remaining();
                let most = if samples { rng.below(runner.spec().max_draft_tokens + 1).min(budget) } else { 0 };
                // What comes next, but for about every fourth place.
                let next = solo.output.iter().skip(done).take(most);
                let draft: Vec<u32> = next.map(|next| if rng.below(4) == 0 { 7 } else { next.token }).collect();
                budget -= draft.len();
                counts.push(count);
                drafts.push(draft);
            }
            if counts.iter().any(|c| *c > 0) {
                step_with_drafts(&mut runner, &mut pool, &mut all, &counts, &drafts);
                steps += 1;
            }
        }
        assert!(steps > 3, "drafts were rejected too");
        assert_as_alone(&all, &solo, &format!("{case}, drafted with seed {seed}"));
    }
}

fn warm_prefix_is_cold<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: Case) {
    let (mut runner, adapters) = case.load(make());
    let block_size = runner.spec().block_size;
    let prompt = prompts(case.base).into_iter().find(|p| p.name == "mid").unwrap();
    for (i, shared_blocks) in [1, 3, prompt.ids.len() / block_size].into_iter().enumerate() {
        let (shared, adapter) = (shared_blocks * block_size, adapters[i % adapters.len()].as_ref());
        let mut pool = Pool::new(&runner);
        let mut owner = [Sequence::new(1, &prompt.ids, SamplingParams::greedy()).adapted(adapter)];
        step(&mut runner, &mut pool, &mut owner, &[prompt.ids.len()]);

        // Same beginning, another end.
        let mut ids = prompt.ids[..shared].to_vec();
        ids.extend([3, 1, 4, 1, 5, 9, 2, 6]);
        let mut warm = [Sequence::new(2, &ids, params(i)).adapted(adapter)];
        warm[0].table = owner[0].table[..shared_blocks].to_vec();
        warm[0].passing = owner[0].passing.iter().take(shared_blocks).copied().collect();
        warm[0].num_computed = shared;
        while warm[0].output.len() < OUTPUT {
            let remaining = warm[0].remaining();
            step(&mut runner, &mut pool, &mut warm, &[remaining]);
        }
        let cold = alone(&mut runner, Sequence::new(3, &ids, params(i)).adapted(adapter), OUTPUT);
        assert_as_alone(&warm, &[cold], &format!("{case}, {shared} tokens warm"));
    }
}

fn cleared_blocks_leave_nothing<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, case: Case) {
    let (mut runner, _) = case.load(make());
    let prompt = prompts(case.base).into_iter().find(|p| p.name == "short").unwrap();
    // Attend over the prompt's blocks, then over the same blocks cleared, as if they were a prefix.
    let mut pool = Pool::new(&runner);
    let mut owner = [Sequence::new(1, &prompt.ids, SamplingParams::greedy())];
    step(&mut runner, &mut pool, &mut owner, &[prompt.ids.len()]);
    let used = &owner[0];
    let mut never_used = Sequence::new(3, &prompt.ids, SamplingParams::greedy());
    pool.cover(&mut never_used, prompt.ids.len());

    let (full, empty) = (last_token_over(&mut runner, used), last_token_over(&mut runner, &never_used));
    assert!(full != empty);
    runner.clear_blocks(&used.table, &used.passing).unwrap();
    let cleared = last_token_over(&mut runner, used);
    assert!(cleared == empty, "{case}: something of the sequence remained");
}

fn a_failed_sequence_spares_its_batch<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B, _: Case) {
    // Whose largest logits are found where the logits are, and whose rows are brought to the sampler.
    for params in [|_| SamplingParams { logprobs: None, ..params(0) }, params] {
        spares_its_batch(&make, params);
    }
}

fn spares_its_batch<B: Backend + LatentOps + CompressedOps>(
    make: &impl Fn() -> B,
    params: impl Fn(usize) -> SamplingParams,
) {
    let copy = poisoned_by_token_7();
    let mut runner = load(make(), &Files::folder(copy.path()).unwrap(), &options()).unwrap().0;
    let healthy = [1, 2, 3, 4];
    let solo = generate(&mut runner, &healthy, params(1), 2);
    let mut pool = Pool::new(&runner);
    let mut both = [Sequence::new(1, &[5, 6, 7], params(0)), Sequence::new(2, &healthy, params(1))];
    both.iter_mut().for_each(|s| pool.cover_all(s));
    let plan = StepPlan::new(both.iter().map(|s| s.step(s.tokens.len())).collect());
    let output = runner.step(&plan).unwrap().sequences;
    assert_eq!(output[0].sampled, [Err(SequenceFailure::NonFiniteLogits)]);
    assert_eq!(output[1].sampled, [Ok(solo[0].clone())]);

    // The failed one's blocks, cleared, serve another.
    runner.clear_blocks(&both[0].table, &both[0].passing).unwrap();
    let mut next = Sequence::new(3, &healthy, params(1));
    (next.table, next.passing) = (both[0].table.clone(), both[0].passing.clone());
    let mut next = [next];
    step(&mut runner, &mut pool, &mut next, &[healthy.len()]);
    step(&mut runner, &mut pool, &mut next, &[1]);
    assert_eq!(next[0].output, solo);
}

/// The poison comes behind the first token that is scored, and before the last; what is sampled sees none of it.
fn a_score_that_is_not_finite_fails_its_sequence_alone<B: Backend + LatentOps + CompressedOps>(
    make: impl Fn() -> B,
    _: Case,
) {
    let copy = poisoned_by_token_7();
    let mut runner = load(make(), &Files::folder(copy.path()).unwrap(), &options()).unwrap().0;
    let healthy = alone(&mut runner, Sequence::new(2, &[1, 2, 3, 4], params(1)).scored(), 1);
    let mut pool = Pool::new(&runner);
    let mut both =
        [Sequence::new(1, &[5, 7, 6], params(0)).scored(), Sequence::new(2, &[1, 2, 3, 4], params(1)).scored()];
    both.iter_mut().for_each(|s| pool.cover_all(s));
    // The faulty one is in the midst of its prompt, so that nothing is sampled that would tell.
    let plan = StepPlan::new(vec![both[0].step(2), both[1].step(4)]);
    let output = runner.step(&plan).unwrap().sequences;
    assert_eq!((&output[0].sampled, &output[0].scores), (&vec![], &Err(SequenceFailure::NonFiniteLogits)));
    assert_eq!(output[1].scores.as_ref(), Ok(&healthy.scores));
}

fn a_draft_that_is_not_finite_is_rejected_like_any_other<B: Backend + LatentOps + CompressedOps>(
    make: impl Fn() -> B,
    _: Case,
) {
    let copy = poisoned_by_token_7();
    let mut runner = load(make(), &Files::folder(copy.path()).unwrap(), &options()).unwrap().0;
    let prompt = [1, 2, 3, 4];
    let solo = alone(&mut runner, Sequence::new(1, &prompt, params(1)), OUTPUT);
    assert!(solo.output.iter().all(|sampled| sampled.token != 7));
    let mut pool = Pool::new(&runner);
    let mut sequence = [Sequence::new(1, &prompt, params(1))];
    while sequence[0].output.len() < OUTPUT {
        let remaining = sequence[0].remaining();
        // Three that are wrong, so that two lie behind all that the next step writes.
        step_with_drafts(&mut runner, &mut pool, &mut sequence, &[remaining], &[vec![7, 7, 7]]);
    }
    assert_as_alone(&sequence, &[solo], "drafts that are not finite");
    // Whoever gets the blocks next is not touched by what lies behind its tokens.
    let solo = generate(&mut runner, &[9, 8], params(2), 2);
    let mut heir = [Sequence::new(2, &[9, 8], params(2))];
    (heir[0].table, heir[0].passing) = (sequence[0].table.clone(), sequence[0].passing.clone());
    step(&mut runner, &mut pool, &mut heir, &[2]);
    step(&mut runner, &mut pool, &mut heir, &[1]);
    assert_eq!(heir[0].output, solo);
}

/// Logits of the last token of its prompt, if all before it are what the sequence's blocks happen to hold.
fn last_token_over<B: Backend + LatentOps + CompressedOps>(
    runner: &mut ModelRunner<B>,
    sequence: &Sequence,
) -> Vec<f32> {
    let prompt = &sequence.tokens[..sequence.prompt_len];
    let mut reader = Sequence::new(2, prompt, SamplingParams::greedy());
    (reader.table, reader.passing) = (sequence.table.clone(), sequence.passing.clone());
    reader.num_computed = prompt.len() - 1;
    runner.logits(&StepPlan::new(vec![reader.step(1)])).unwrap()
}

/// One checkpoint per kind of attention and feed-forward network: full, in windows (with head norms and two rotary
/// bases; with soft caps), latent, latent with an indexer, in windows with pooled entries; dense, with experts; and one of each kind of adapted layer: plain, fused, latent.
const CASES: [(&str, &[&str]); 11] = [
    ("llama-rope3", &[]),
    ("qwen3-moe", &[]),
    ("gemma2", &[]),
    ("gemma3", &[]),
    ("deepseek-v3", &[]),
    ("deepseek-v32", &[]),
    ("deepseek-v4", &[]),
    ("deepseek-v4-b", &[]),
    ("llama-rope3", &["llama-all", "llama-rslora"]),
    ("phi3", &["phi3-fused"]),
    ("deepseek-v3", &["deepseek-v3"]),
];

/// All equalities on one backend.
macro_rules! equalities {
    ($backend:ident, $make:expr, $($test:ident),* $(,)?) => {
        mod $backend {
            use super::*;
            $(
                #[test]
                fn $test() {
                    for (base, adapters) in CASES {
                        super::$test($make, Case { base, adapters });
                    }
                }
            )*
        }
    };
    ($backend:ident, $make:expr) => {
        equalities!(
            $backend, $make,
            chunked_is_whole,
            batched_is_alone,
            preempted_is_not,
            drafted_is_plain,
            warm_prefix_is_cold,
            cleared_blocks_leave_nothing,
            a_failed_sequence_spares_its_batch,
            a_score_that_is_not_finite_fails_its_sequence_alone,
            a_draft_that_is_not_finite_is_rejected_like_any_other,
        );
    };
}

equalities!(reference, Reference::new);
equalities!(cpu, cpu);

fn cpu() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: 2, isa: None }).unwrap()
}
