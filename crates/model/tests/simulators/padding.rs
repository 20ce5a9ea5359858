//! Rows that pad steps of single tokens, where a device replays steps: they change nothing of the others, take no block that a
//! sequence can have, and leave few different steps.

use crate::common::{Pool, Sequence, folder, options};
use crate::cuda::Simulator;
use baton_device::{Backend, CompressedOps, DType, LatentOps, Reference};
use baton_device_cuda::{CudaBackend, CudaOptions};
use baton_model::{
    Adapter, Files, KvCacheSize, LoadOptions, ModelRunner, Runner, SamplingParams, SequenceStep, StepOutput, StepPlan,
    Tokens, load, load_ranks,
};

/// Tokens of a sequence at most: two blocks of the reference.
const LENGTH: usize = 16;
const SEQUENCES: usize = 30;

fn padding() -> Reference {
    Reference::new().saying(|caps| caps.replays_steps = true)
}

fn limits() -> LoadOptions {
    LoadOptions { max_model_len: Some(LENGTH), max_step_sequences: SEQUENCES, max_draft_tokens: 0, ..options() }
}

fn loaded<B: Backend + LatentOps + CompressedOps>(backend: B, case: &str, options: &LoadOptions) -> ModelRunner<B> {
    load(backend, &Files::folder(folder(case)).unwrap(), options).unwrap_or_else(|e| panic!("{case}: {e}")).0
}

/// Prompts of different lengths, of which some are sampled greedily, some at random, some with much told of each token.
fn sequences(count: usize) -> Vec<Sequence> {
    (0..count)
        .map(|i| {
            let prompt: Vec<u32> = (0..3 + i % 5).map(|j| (7 * i + 31 * j + 1) as u32 % 200).collect();
            let params = match i % 3 {
                0 => SamplingParams::greedy(),
                1 => SamplingParams { temperature: 1.0, seed: i as u64, ..SamplingParams::default() },
                _ => SamplingParams { logprobs: Some(5), ..SamplingParams::greedy() },
            };
            Sequence::new(i as u64, &prompt, params)
        })
        .collect()
}

fn greedy(count: usize) -> Vec<Sequence> {
    let greedy = |sequence| Sequence { params: SamplingParams::greedy().into(), ..sequence };
    sequences(count).into_iter().map(greedy).collect()
}

/// The next step of all sequences that are not as long as they may be: their whole prompts, then token by token.
fn plan(pool: &mut Pool, sequences: &mut [Sequence]) -> StepPlan {
    let mut plan = StepPlan::default();
    for sequence in sequences.iter_mut().filter(|sequence| sequence.tokens.len() < LENGTH) {
        pool.cover_all(sequence);
        plan.sequences.push(SequenceStep { propose: 1, ..sequence.step(sequence.remaining()) });
    }
    plan
}

fn commit(sequences: &mut [Sequence], output: &StepOutput) {
    for out in &output.sequences {
        let sequence = &mut sequences[out.id as usize];
        sequence.num_computed = sequence.tokens.len();
        sequence.tokens.push(out.sampled[0].as_ref().unwrap().token);
    }
}

/// Runs the same plans on both, until no sequence is left; some of them end early, one after the other.
fn are_the_same(plain: &mut dyn Runner, padded: &mut dyn Runner, mut sequences: Vec<Sequence>, what: &str) {
    assert_eq!(plain.spec(), padded.spec(), "{what}");
    let mut pool = Pool::new(plain);
    let (mut numbers, mut step) = (Vec::new(), 0);
    loop {
        let plan = plan(&mut pool, &mut sequences);
        if plan.sequences.is_empty() {
            break;
        }
        numbers.push(plan.sequences.len());
        let expected = plain.step(&plan).unwrap();
        assert_eq!(padded.step(&plan).unwrap(), expected, "{what}, {} sequences", plan.sequences.len());
        commit(&mut sequences, &expected);
        if step < 7 {
            sequences[5 * step % 23].tokens.resize(LENGTH, 0);
        }
        step += 1;
    }
    assert!([17, 19, 21].iter().all(|number| numbers.contains(number)), "{what}: {numbers:?}");
}

#[test]
fn rows_that_pad_change_no_bit_of_the_others_with_every_block_in_use() {
    for (case, mtp) in [("llama-rope3", false), ("qwen3-moe", false), ("../abacus", true)] {
        let options = LoadOptions { mtp, ..limits() };
        let report = load(Reference::new(), &Files::folder(folder(case)).unwrap(), &options).unwrap().1;
        let all = SEQUENCES * LENGTH.div_ceil(8);
        // As many blocks as 23 sequences take in the end.
        let bytes = report.kv_bytes / all as u64 * (23 * LENGTH.div_ceil(8)) as u64;
        let options = LoadOptions { kv_cache: KvCacheSize::Bytes(bytes), ..options };
        let (mut plain, mut padded) = (loaded(Reference::new(), case, &options), loaded(padding(), case, &options));
        let sequences = if mtp { greedy(23) } else { sequences(23) };
        are_the_same(&mut plain, &mut padded, sequences, case);
    }
}

#[test]
fn a_model_that_is_loaded_again_with_as_many_bytes_of_cache_has_the_same_limits() {
    let files = Files::folder(folder("llama-rope3")).unwrap();
    let (runner, report) = load(padding(), &files, &limits()).unwrap();
    let again = LoadOptions { kv_cache: KvCacheSize::Bytes(report.kv_bytes), ..limits() };
    assert_eq!(load(padding(), &files, &again).unwrap().0.spec(), runner.spec());
}

#[test]
fn rows_that_pad_have_no_adapter() {
    let options = LoadOptions { max_lora_rank: 16, ..limits() };
    let adapted = |backend: Reference| {
        let runner = loaded(backend, "llama-rope3", &options);
        let adapter = runner.adapter_loader().unwrap().load(&folder("lora").join("llama-all")).unwrap();
        (runner, adapter)
    };
    let ((mut plain, adapter), (mut padded, of_padded)) = (adapted(Reference::new()), adapted(padding()));
    let with = |adapter: &Adapter, mut plan: StepPlan| {
        plan.sequences.iter_mut().filter(|s| s.id % 2 == 0).for_each(|s| s.adapter = Some(adapter.clone()));
        plan
    };
    let (mut pool, mut sequences) = (Pool::new(&plain), sequences(23));
    for _ in 0..3 {
        let plan = plan(&mut pool, &mut sequences);
        let expected = plain.step(&with(&adapter, plan.clone())).unwrap();
        assert_eq!(padded.step(&with(&of_padded, plan)).unwrap(), expected);
        commit(&mut sequences, &expected);
    }
}

#[test]
fn a_step_ahead_finds_its_tokens_among_those_of_rows_that_pad() {
    let (mut plain, mut padded) =
        (loaded(Reference::new(), "llama-rope3", &limits()), loaded(padding(), "llama-rope3", &limits()));
    let (mut pool, mut sequences) = (Pool::new(&plain), greedy(19));
    for _ in 0..2 {
        let first = plan(&mut pool, &mut sequences);
        for sequence in &mut sequences {
            let end = sequence.tokens.len() + 1;
            pool.cover(sequence, end);
        }
        let expected = plain.step(&first).unwrap();
        commit(&mut sequences, &expected);
        let second = plan(&mut pool, &mut sequences);
        let ahead = second.sequences.iter().map(|step| SequenceStep { tokens: Tokens::Awaited, ..step.clone() });
        padded.begin(&first).unwrap();
        padded.begin(&StepPlan { sequences: ahead.collect(), ahead: true }).unwrap();
        assert_eq!(padded.finish().unwrap(), expected);
        let expected = plain.step(&second).unwrap();
        assert_eq!(padded.finish().unwrap(), expected);
        commit(&mut sequences, &expected);
    }
}

#[test]
fn every_rank_pads_alike() {
    let timeout = std::time::Duration::from_secs(300);
    let files = Files::folder(folder("qwen3-moe")).unwrap();
    let ranks = |pads: bool| {
        let ranks = Reference::ranks(2, timeout).into_iter();
        let ranks = ranks.map(|rank| rank.saying(|caps| caps.replays_steps = pads)).collect();
        load_ranks(ranks, &files, &limits(), timeout).unwrap().0
    };
    are_the_same(&mut ranks(false), &mut ranks(true), sequences(23), "ranks");
}

#[test]
fn many_numbers_of_sequences_are_few_graphs_and_say_what_they_say_without() {
    let Some(simulator) = Simulator::new() else { return };
    let mut told = Vec::new();
    for graphs in [false, true] {
        let gpu = CudaBackend::new(&CudaOptions { graphs, ..crate::cuda::options(DType::F32) }).unwrap();
        let mut runner = loaded(gpu, "llama-256", &limits());
        let mut pool = Pool::new(&runner);
        let mut sequences = greedy(20);
        let first = plan(&mut pool, &mut sequences);
        let output = runner.step(&first).unwrap();
        commit(&mut sequences, &output);
        let before = runner.backend().statistics();
        let mut tokens = Vec::new();
        for number in [17, 18, 19, 20, 17, 19] {
            let plan = plan(&mut pool, &mut sequences[..number]);
            let output = runner.step(&plan).unwrap();
            commit(&mut sequences, &output);
            tokens.extend(output.sequences.into_iter().map(|out| out.sampled[0].as_ref().unwrap().token));
        }
        let after = runner.backend().statistics();
        // One for each two numbers of sequences, the second time it comes.
        let expected = if graphs { (2, 2, 4) } else { (6, 0, 0) };
        let since = (after.lists - before.lists, after.captures - before.captures, after.replays - before.replays);
        assert_eq!(since, expected, "lists, captures, replays");
        told.push(tokens);
    }
    assert_eq!(told[0], told[1]);
    simulator.expect_clean();
}
