//! A sequence gets the same tokens whether its steps wait for each other or each begins before the one before it has ended;
//! also beside sequences that have ended meanwhile, and behind what failed. Through the runner, on every kind of device.

use crate::common::ahead::{next, run_ahead};
use crate::common::checkpoint::poisoned_by_token_7;
use crate::common::{Pool, Sequence, adapted, alone, exact_cpu, generate, options, prompts, step};
use baton_device::{Backend, CompressedOps, DType, LatentOps, Reference};
use baton_device_cuda::CudaBackend;
use baton_model::{Adapter, Files, Runner, SamplingParams, SequenceFailure, StepPlan, load};

/// Draws of every kind.
fn params(i: usize) -> SamplingParams {
    let base = SamplingParams { seed: 5 * i as u64, choice: i as u32, ..SamplingParams::default() };
    match i % 3 {
        0 => SamplingParams::greedy(),
        1 => base,
        _ => SamplingParams { temperature: 0.8, top_k: 40, top_p: 0.9, min_p: 0.02, ..base },
    }
}

/// The shorter golden prompts, each with one of the adapters in turn, or none.
fn sequences(case: &str, adapters: &[Adapter]) -> Vec<Sequence> {
    let adapters: Vec<Option<&Adapter>> = std::iter::once(None).chain(adapters.iter().map(Some)).collect();
    let prompts = prompts(case).into_iter().filter(|prompt| prompt.ids.len() < 80).take(4).enumerate();
    let sequence = |(i, prompt): (usize, crate::common::Prompt)| {
        Sequence::new(i as u64, &prompt.ids, params(i)).adapted(adapters[i % adapters.len()])
    };
    prompts.map(sequence).collect()
}

fn ahead_is_not<B: Backend + LatentOps + CompressedOps>(
    make: impl Fn() -> B,
    case: &str,
    adapters: &[&str],
    chunk: usize,
    tokens: usize,
) {
    let (mut runner, adapters) = adapted(make(), case, adapters);
    let (mut waiting, mut ahead) = (sequences(case, &adapters), sequences(case, &adapters));
    assert!(waiting.len() > 2, "{case}");
    let mut pool = Pool::new(&runner);
    for _ in 0..tokens {
        let counts: Vec<usize> = waiting.iter().map(Sequence::remaining).collect();
        step(&mut runner, &mut pool, &mut waiting, &counts);
    }
    run_ahead(&mut runner, &mut ahead, chunk, tokens);
    for (waiting, ahead) in waiting.iter().zip(&ahead) {
        let got = if ahead.id == 1 { tokens.min(4) } else { tokens };
        assert_eq!(ahead.output, waiting.output[..got], "{case}, sequence {}", ahead.id);
    }
}

fn a_failed_sequence_spares_its_batch_ahead<B: Backend + LatentOps + CompressedOps>(make: impl Fn() -> B) {
    let copy = poisoned_by_token_7();
    let mut runner = load(make(), &Files::folder(copy.path()).unwrap(), &options()).unwrap().0;
    let healthy = [1, 2, 3, 4];
    let solo: Vec<_> = generate(&mut runner, &healthy, params(1), 2).into_iter().map(Ok).collect();
    let mut pool = Pool::new(&runner);
    let mut both = [Sequence::new(1, &[5, 6, 7], params(0)), Sequence::new(2, &healthy, params(1))];
    both.iter_mut().for_each(|s| {
        let end = s.tokens.len() + 1;
        pool.cover(s, end);
    });
    runner.begin(&StepPlan::new(both.iter().map(|s| s.step(s.tokens.len())).collect())).unwrap();
    let ahead = both.iter().map(|s| next(s, s.prompt_len, 1)).collect();
    runner.begin(&StepPlan { sequences: ahead, ahead: true }).unwrap();
    // Asked for while two steps are under way, it happens behind them.
    runner.clear_blocks(&both[0].table, &both[0].passing).unwrap();
    let first = runner.finish().unwrap().sequences;
    assert_eq!(first[0].sampled, [Err(SequenceFailure::NonFiniteLogits)]);
    assert_eq!(first[1].sampled, solo[..1]);
    assert_eq!(runner.finish().unwrap().sequences[1].sampled, solo[1..]);

    let mut next = Sequence::new(3, &healthy, params(1));
    (next.table, next.passing) = (both[0].table.clone(), both[0].passing.clone());
    let mut next = [next];
    step(&mut runner, &mut pool, &mut next, &[healthy.len()]);
    assert_eq!(Ok(&next[0].output[0]), solo[0].as_ref());
}

#[test]
fn who_fails_is_part_of_the_step_ahead_in_vain_and_spares_its_batch() {
    a_failed_sequence_spares_its_batch_ahead(Reference::new);
    a_failed_sequence_spares_its_batch_ahead(exact_cpu);
    if cuda_sim::can_compile() {
        a_failed_sequence_spares_its_batch_ahead(gpu);
    }
}

#[test]
fn what_is_left_of_steps_under_way_is_forgotten_by_the_next_of_known_tokens() {
    let (mut runner, _) = adapted(Reference::new(), "llama-rope3", &[]);
    let mut left = sequences("llama-rope3", &[]);
    let expected = alone(&mut runner, left[0].clone(), 1).output;
    let mut pool = Pool::new(&runner);
    left.iter_mut().for_each(|s| {
        let end = s.tokens.len() + 1;
        pool.cover(s, end);
    });
    runner.begin(&StepPlan::new(left.iter().map(|s| s.step(s.remaining())).collect())).unwrap();
    let ahead = left.iter().map(|s| next(s, s.prompt_len, 1)).collect();
    runner.begin(&StepPlan { sequences: ahead, ahead: true }).unwrap();
    let mut first = [left[0].clone()];
    let remaining = first[0].remaining();
    step(&mut runner, &mut pool, &mut first, &[remaining]);
    assert_eq!(first[0].output, expected);
}

/// One checkpoint of each family: dense, windows and caps, experts, latents.
const FAMILIES: [&str; 4] = ["llama-rope3", "gemma2", "qwen3-moe", "deepseek-v2-lite"];

/// Prompts in one step, or in several of which most are shorter than the longest prompt.
const CHUNKS: [usize; 2] = [usize::MAX, 7];

#[test]
fn ahead_is_not_on_the_reference() {
    for chunk in CHUNKS {
        FAMILIES.into_iter().for_each(|case| ahead_is_not(Reference::new, case, &[], chunk, 12));
        ahead_is_not(Reference::new, "llama-rope3", &["llama-all", "llama-rslora"], chunk, 12);
    }
}

#[test]
fn ahead_is_not_on_the_cpu() {
    for chunk in CHUNKS {
        FAMILIES.into_iter().for_each(|case| ahead_is_not(exact_cpu, case, &[], chunk, 12));
    }
}

#[test]
fn ahead_is_not_on_a_simulated_gpu() {
    if cuda_sim::can_compile() {
        for (case, chunk) in FAMILIES.into_iter().zip([usize::MAX, 7, 20, usize::MAX]) {
            ahead_is_not(gpu, case, &[], chunk, 6);
        }
    }
}

fn gpu() -> CudaBackend {
    CudaBackend::new(&crate::cuda::options(DType::F32)).unwrap()
}
