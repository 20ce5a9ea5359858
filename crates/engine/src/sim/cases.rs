//! The reliability cases that can be told on one thread and a virtual clock. `World` checks all
//! invariants after each step, among them that every request gets the tokens of its solo run.

use std::time::Duration;

use baton_model::{RunError, RunSpec, SamplingParams};

use super::MockModel;
use super::world::World;
use crate::{
    CacheScope, DraftMethod, EngineConfig, EngineFailure, FinishReason, PromptScores, Request, RequestId,
    SpeculationConfig, SubmitError, Tenant,
};

const BLOCK_SIZE: usize = 4;

pub(super) fn spec(num_blocks: usize) -> RunSpec {
    RunSpec {
        vocab_size: 100,
        max_model_len: 200,
        block_size: BLOCK_SIZE,
        num_blocks,
        passing: None,
        max_step_tokens: 16,
        max_step_sequences: 8,
        max_draft_tokens: 5,
        steps_ahead: false,
    }
}

pub(super) fn world(num_blocks: usize) -> World {
    let model = MockModel::Hash { seed: 3, vocab_size: 100, end: None };
    World::new(spec(num_blocks), &EngineConfig::default(), model)
}

/// A prompt of its own for each `family`.
pub(super) fn request(family: u32, prompt_len: u32, max_tokens: u32) -> Request {
    let prompt = (0..prompt_len).map(|i| (family * 31 + i * 7) % 100).collect();
    Request::new(prompt, SamplingParams::greedy(), max_tokens)
}

/// The request with scores of its prompt.
pub(super) fn scored(request: Request, top: u32, targets: &[(usize, &[u32])]) -> Request {
    let targets = targets.iter().map(|(position, ids)| (*position, ids.to_vec())).collect();
    Request { prompt_scores: Some(PromptScores { top, targets, hidden: None }), ..request }
}

pub(super) fn submit(world: &mut World, request: Request) -> RequestId {
    world.submit(vec![request]).expect("the request can be finished")[0]
}

#[test]
fn r1_a_client_that_leaves_mid_stream_frees_its_blocks_before_the_next_step() {
    let mut world = world(50);
    let id = submit(&mut world, request(0, 10, 50));
    (0..5).for_each(|_| world.step());
    assert!(world.record(id).tokens.len() > 2);
    assert!(world.core.stats().blocks.used > 0);
    world.abort(id);
    assert_eq!(world.end(id), &FinishReason::Aborted);
    assert_eq!(world.core.stats().blocks.used, 0);
}

#[test]
fn r2_a_client_that_leaves_in_prefill_or_queue_is_gone_before_any_token() {
    let mut world = world(50);
    let prefill = submit(&mut world, request(0, 100, 50));
    let queue = submit(&mut world, request(1, 100, 50));
    world.step();
    assert_eq!((world.core.stats().running, world.core.stats().waiting), (1, 1));
    world.abort(queue);
    world.abort(prefill);
    assert!(world.record(prefill).tokens.is_empty() && world.record(queue).tokens.is_empty());
    assert!(world.core.is_idle());
    assert_eq!(world.core.stats().blocks.used, 0);
}

#[test]
fn r6_when_the_cache_is_exhausted_the_latest_recompute_and_the_largest_request_finishes() {
    let mut world = world(20);
    // Together 4 × 15 blocks; the first alone takes the whole cache in the end.
    let largest = submit(&mut world, request(0, 20, 61));
    let others: Vec<_> = (1..4).map(|family| submit(&mut world, request(family, 20, 40))).collect();
    world.run();
    assert!(world.core.stats().preemptions > 0);
    for id in others.into_iter().chain([largest]) {
        assert_eq!(world.end(id), &FinishReason::Length);
        assert_eq!(world.record(id).tokens, world.record(id).solo);
    }
}

#[test]
fn r7_what_could_never_finish_is_refused_with_the_reason() {
    let mut world = world(20);
    let needed = SubmitError::DoesNotFit { needed_blocks: 21, total_blocks: 20 };
    assert_eq!(world.submit(vec![request(0, 20, 62)]), Err(needed));
    assert!(world.submit(vec![request(0, 20, 61)]).is_ok(), "the last token needs no place in the cache");
    let too_long = SubmitError::TooLong { prompt: 150, max_tokens: 51, max_model_len: 200 };
    assert_eq!(world.submit(vec![request(0, 150, 51)]), Err(too_long));
    let huge = SubmitError::TooLong { prompt: 1, max_tokens: u32::MAX, max_model_len: 200 };
    assert_eq!(world.submit(vec![request(0, 1, u32::MAX)]), Err(huge));
    assert_eq!(world.submit(vec![request(0, 0, 1)]), Err(SubmitError::PromptEmpty));
    assert_eq!(world.submit(vec![request(0, 1, 0)]), Err(SubmitError::MaxTokensZero));
    let foreign = Request { prompt: vec![99, 100], ..request(0, 1, 1) };
    assert_eq!(world.submit(vec![foreign]), Err(SubmitError::TokenOutOfRange { id: 100, vocab: 100 }));
    let foreign = scored(request(0, 5, 1), 0, &[(2, &[99, 100])]);
    assert_eq!(world.submit(vec![foreign]), Err(SubmitError::TokenOutOfRange { id: 100, vocab: 100 }));
    let beyond = scored(request(0, 5, 1), 0, &[(4, &[1]), (5, &[1])]);
    assert_eq!(world.submit(vec![beyond]), Err(SubmitError::ScoreBeyondPrompt { position: 5, prompt: 5 }));
}

#[test]
fn r10_nothing_starts_after_its_deadline_and_nothing_started_is_stopped_by_it() {
    let mut world = world(10);
    let deadline = Some(Duration::from_millis(100));
    let running = submit(&mut world, Request { deadline, ..request(0, 8, 32) });
    let waiting = submit(&mut world, Request { deadline, ..request(1, 30, 5) });
    world.step();
    world.now = Duration::from_millis(99);
    world.step();
    assert!(world.record(waiting).end.is_none());
    world.now = Duration::from_millis(100);
    world.step();
    assert_eq!(world.end(waiting), &FinishReason::Error(EngineFailure::QueueTimeout));
    world.run();
    assert_eq!(world.end(running), &FinishReason::Length);
}

#[test]
fn r13_one_sequence_that_is_not_finite_fails_alone_and_leaves_nothing_in_the_cache() {
    for position in [0, 9, 14] {
        let mut world = world(50);
        let faulty = submit(&mut world, request(0, 12, 20));
        let mates: Vec<_> = (1..4).map(|family| submit(&mut world, request(family, 12, 20))).collect();
        world.poison(faulty, position);
        let mut held = Vec::new();
        while world.record(faulty).end.is_none() {
            let running = world.core.scheduler().running();
            held = running.get(&faulty).map_or(held, |sequence| sequence.table.blocks().to_vec());
            world.step();
        }
        assert_eq!(world.end(faulty), &FinishReason::Error(EngineFailure::NonFiniteLogits));
        world.run();
        held.iter().for_each(|block| assert!(world.control.cleared_blocks().contains(block)));
        assert!(world.control.cleared_blocks().len() >= 3);
        mates.iter().for_each(|&id| assert_eq!(world.end(id), &FinishReason::Length));
        // The very same prompt again: all of it is computed.
        let again = submit(&mut world, request(0, 12, 20));
        world.run();
        assert_eq!(world.end(again), &FinishReason::Length);
        assert_eq!(world.cached_tokens(again), 0);
    }
}

#[test]
fn r13_blocks_that_no_sample_vouched_for_are_cleared_as_well() {
    // In the midst of a prompt, and where all of it but its last token was computed.
    for prompt in [40, 17] {
        let mut world = world(50);
        let faulty = submit(&mut world, request(0, prompt, 20));
        world.poison(faulty, 3);
        world.step();
        world.abort(faulty);
        let heir = submit(&mut world, request(1, 6, 20));
        world.run();
        assert_eq!(world.end(heir), &FinishReason::Length);
        assert_eq!(world.control.cleared_blocks().len(), 16 / BLOCK_SIZE);
    }
}

#[test]
fn r13_a_score_that_is_not_finite_fails_its_request_in_the_midst_of_the_prompt() {
    let mut world = world(50);
    let faulty = submit(&mut world, scored(request(0, 40, 20), 2, &[]));
    let mate = submit(&mut world, scored(request(1, 40, 20), 2, &[]));
    world.poison(faulty, 20);
    (0..2).for_each(|_| world.step());
    assert_eq!(world.end(faulty), &FinishReason::Error(EngineFailure::NonFiniteLogits));
    assert_eq!(world.record(faulty).scores.len(), 16, "those of the step before");
    world.run();
    assert_eq!(world.end(mate), &FinishReason::Length);
    assert_eq!(world.control.cleared_blocks().len(), 40 / BLOCK_SIZE);
}

#[test]
fn r14_a_failed_step_ends_what_ran_and_the_engine_goes_on_with_a_clean_cache() {
    let mut world = world(50);
    let warm = submit(&mut world, request(1, 12, 2));
    world.run();
    let running = submit(&mut world, request(0, 12, 20));
    world.step();
    let waiting = submit(&mut world, request(0, 12, 20));
    world.control.fail_steps(1);
    // Planned with the failing step, so it fails too; the next does not.
    world.step();
    let later = submit(&mut world, request(1, 12, 20));
    world.run();
    assert_eq!(world.end(warm), &FinishReason::Length);
    for id in [running, waiting] {
        let failure = EngineFailure::Device(RunError::Failed("mock fault".into()));
        assert_eq!(world.end(id), &FinishReason::Error(failure));
    }
    assert_eq!(world.end(later), &FinishReason::Length);
    assert_eq!(world.cached_tokens(later), 0, "the cache is not trusted after a fault");
    assert_eq!(world.core.down(), None);
}

#[test]
fn r14_what_waits_outlives_a_failed_step() {
    let mut world = world(50);
    let running = submit(&mut world, request(0, 60, 20));
    let waiting = submit(&mut world, request(1, 12, 20));
    world.control.fail_steps(1);
    world.run();
    assert!(matches!(world.end(running), FinishReason::Error(EngineFailure::Device(_))));
    assert_eq!(world.end(waiting), &FinishReason::Length);
}

#[test]
fn r14_failures_that_are_not_in_a_row_do_not_end_the_engine() {
    let mut world = world(50);
    for family in 0..6 {
        world.control.fail_steps(1);
        let failing = submit(&mut world, request(family, 12, 2));
        world.run();
        let fine = submit(&mut world, request(family, 12, 2));
        world.run();
        assert!(matches!(world.end(failing), FinishReason::Error(_)));
        assert_eq!(world.end(fine), &FinishReason::Length);
    }
}

#[test]
fn r16_a_panic_of_the_runner_is_a_failed_step() {
    let mut world = world(50);
    let running = submit(&mut world, request(0, 12, 20));
    world.step();
    world.control.panic_steps(1);
    world.step();
    assert_eq!(world.end(running), &FinishReason::Error(EngineFailure::Panicked));
    let later = submit(&mut world, request(0, 12, 20));
    world.run();
    assert_eq!(world.end(later), &FinishReason::Length);
}

#[test]
fn r38_an_abort_touches_no_request_but_its_own() {
    let mut world = world(100);
    let ids: Vec<_> = (0..12).map(|_| submit(&mut world, request(0, 9, 12))).collect();
    world.step();
    // The digits of the others' ids start with, or contain, those of this one.
    world.abort(ids[1]);
    world.run();
    for &id in &ids {
        let expected = if id == ids[1] { FinishReason::Aborted } else { FinishReason::Length };
        assert_eq!(world.end(id), &expected);
    }
}

#[test]
fn r39_aborts_that_come_twice_or_late_change_nothing() {
    let mut world = world(50);
    let (twice, late) = (submit(&mut world, request(0, 9, 12)), submit(&mut world, request(1, 9, 12)));
    world.step();
    world.abort(twice);
    world.abort(twice);
    world.run();
    world.abort(late);
    assert_eq!(world.end(twice), &FinishReason::Aborted);
    assert_eq!(world.end(late), &FinishReason::Length);
    assert_eq!(world.core.stats().finished.total(), 2);
}

#[test]
fn r40_mixed_sampling_parameters_stay_with_their_sequence_as_the_batch_changes() {
    let mut world = world(40);
    for choice in 0..8 {
        let params = SamplingParams {
            temperature: choice as f32 * 0.3,
            top_k: choice,
            repetition_penalty: 1.0 + (choice % 2) as f32,
            frequency_penalty: (choice % 3) as f32,
            logit_bias: vec![(choice, 1.0)],
            seed: u64::from(choice / 2),
            choice,
            logprobs: (choice == 5).then_some(2),
            ..SamplingParams::default()
        };
        // Different lengths, so that places in the batch change hands; the same prompt.
        submit(&mut world, Request { params, ..request(0, 10, 5 + 7 * (choice % 4)) });
        world.step();
    }
    world.run();
    assert!(world.journal.values().all(|record| record.tokens == record.solo));
    let distinct: std::collections::BTreeSet<_> = world.journal.values().map(|record| &record.tokens[..5]).collect();
    assert_eq!(distinct.len(), 8, "the parameters tell the requests apart");
}

#[test]
fn r41_another_scope_finds_nothing_and_computes_everything() {
    let mut world = world(50);
    let mut computed = |tenant, salt: &str| {
        let before = world.control.computed_tokens();
        let scope = CacheScope { tenant: Tenant([tenant; 32]), salt: salt.into() };
        let id = submit(&mut world, Request { cache_scope: scope, ..request(0, 14, 1) });
        world.run();
        (world.cached_tokens(id), world.control.computed_tokens() - before)
    };
    assert_eq!(computed(1, "a"), (0, 14));
    assert_eq!(computed(1, "b"), (0, 14));
    assert_eq!(computed(1, ""), (0, 14));
    assert_eq!(computed(2, "a"), (0, 14));
    assert_eq!(computed(1, "a"), (12, 2));
}

#[test]
fn r41_a_flood_leaves_others_their_share_of_what_is_cached() {
    let mut world = world(20);
    let of = |tenant, family| Request {
        cache_scope: CacheScope { tenant: Tenant([tenant; 32]), ..CacheScope::default() },
        ..request(family, 14, 1)
    };
    let hot = submit(&mut world, of(1, 0));
    world.run();
    assert_eq!(world.cached_tokens(hot), 0);
    // Of twenty blocks many times over.
    for family in 1..60 {
        submit(&mut world, of(2, family));
        world.run();
    }
    let again = submit(&mut world, of(1, 0));
    world.run();
    assert_eq!(world.cached_tokens(again), 12);
    // Of its own, the flood has lost the oldest.
    let [first, last] = [1, 59].map(|family| {
        let id = submit(&mut world, of(2, family));
        world.run();
        world.cached_tokens(id)
    });
    assert_eq!((first, last), (0, 12));
}

#[test]
fn another_adapter_finds_nothing_and_the_same_content_loaded_again_finds_all() {
    let mut world = world(50);
    let mut run = |adapter: Option<u8>| {
        let adapter = adapter.map(super::simulation::adapter);
        let id = submit(&mut world, Request { adapter, ..request(0, 14, 3) });
        world.run();
        (world.cached_tokens(id), world.record(id).tokens.clone())
    };
    let [(none, base), (one, first), (two, second)] = [None, Some(1), Some(2)].map(&mut run);
    assert_eq!([none, one, two], [0; 3]);
    assert!(base != first && first != second && base != second);
    assert_eq!(run(Some(1)), (12, first));
    assert_eq!(run(None), (12, base));
}

#[test]
fn the_last_token_of_a_prompt_is_always_computed() {
    let mut world = world(50);
    for expected in [0, 8] {
        let id = submit(&mut world, request(0, 12, 1));
        world.run();
        assert_eq!(world.cached_tokens(id), expected);
    }
}

#[test]
fn a_scored_prompt_is_computed_whole_and_serves_others_from_the_cache() {
    let mut world = world(50);
    for _ in 0..2 {
        let id = submit(&mut world, scored(request(0, 33, 1), 2, &[(3, &[7]), (32, &[8, 9])]));
        world.run();
        let scores = &world.record(id).scores;
        assert_eq!((world.cached_tokens(id), scores.len()), (0, 33));
        assert_eq!((scores[3].targets.len(), scores[32].targets.len(), scores[32].next), (1, 2, None));
    }
    assert_eq!(world.core.stats().prefix_query_tokens, 0);
    let plain = submit(&mut world, request(0, 33, 1));
    world.run();
    assert_eq!(world.cached_tokens(plain), 32);
}

#[test]
fn a_prompt_preempted_in_its_midst_goes_on_with_the_scores_that_were_not_told() {
    let mut interrupted = 0;
    for head_start in 0..16 {
        // The first grows while the second is in the midst of its prompt, and takes its blocks.
        let mut world = world(33);
        submit(&mut world, request(0, 20, 80));
        (0..head_start).for_each(|_| world.step());
        let second = submit(&mut world, scored(request(1, 100, 5), 1, &[]));
        while !world.core.is_idle() {
            world.step();
            let preempted = world.core.stats().preemptions > 0 && world.core.stats().waiting > 0;
            interrupted += usize::from(preempted && (1..100).contains(&world.record(second).scores.len()));
        }
        assert_eq!(world.end(second), &FinishReason::Length);
        assert_eq!(world.record(second).scores, world.record(second).solo_scores);
    }
    assert!(interrupted > 0);
}

#[test]
fn of_a_cached_prefix_the_end_is_evicted_first() {
    let mut world = world(12);
    submit(&mut world, request(0, 32, 1));
    world.run();
    submit(&mut world, request(1, 28, 5));
    world.run();
    let again = submit(&mut world, request(0, 32, 1));
    world.run();
    // The filler took 8 of 12 blocks, 4 of them from the cache.
    assert_eq!(world.cached_tokens(again), 16);
}

#[test]
fn choices_of_one_request_share_its_prompt() {
    for (prompt_len, shared) in [(14, 12), (60, 56), (3, 0)] {
        let mut world = world(100);
        let choice = |choice| {
            let params = SamplingParams { choice, ..SamplingParams::default() };
            Request { params, ..request(0, prompt_len, 1) }
        };
        world.submit((0..4).map(choice).collect()).unwrap();
        world.run();
        let computed = u64::from(prompt_len) + 3 * u64::from(prompt_len - shared);
        assert_eq!(world.control.computed_tokens(), computed);
    }
}

#[test]
fn choices_go_on_when_the_first_is_gone() {
    let mut world = world(100);
    let ids = world.submit(vec![request(0, 60, 5); 3]).unwrap();
    world.step();
    assert_eq!(world.core.stats().waiting, 2);
    world.abort(ids[0]);
    world.run();
    assert_eq!([world.cached_tokens(ids[1]), world.cached_tokens(ids[2])], [0, 56]);
}

#[test]
fn a_short_request_does_not_wait_for_a_long_one() {
    let mut world = world(50);
    let long = submit(&mut world, request(0, 30, 100));
    (0..5).for_each(|_| world.step());
    let short = submit(&mut world, request(1, 5, 3));
    (0..3).for_each(|_| world.step());
    assert_eq!(world.end(short), &FinishReason::Length);
    assert!(world.record(long).end.is_none());
}

#[test]
fn a_preempted_request_reports_what_was_cached_when_it_started() {
    let mut world = world(12);
    let first = submit(&mut world, request(0, 9, 36));
    world.step();
    let second = submit(&mut world, Request { prompt: vec![1; 12], ..request(0, 1, 20) });
    world.run();
    assert!(world.core.stats().preemptions > 0);
    assert_eq!(world.cached_tokens(first), 0);
    assert_eq!(world.cached_tokens(second), 0);
}

/// A world in which the runner proposes up to five drafts, about two thirds of which are right.
pub(super) fn drafting_world(num_blocks: usize) -> World {
    let model = MockModel::Hash { seed: 3, vocab_size: 100, end: None };
    let speculation =
        SpeculationConfig { method: DraftMethod::Model, num_speculative_tokens: 5, disable_by_batch_size: 16 };
    World::new(spec(num_blocks), &EngineConfig { speculation: Some(speculation), ..EngineConfig::default() }, model)
}

#[test]
fn accepted_drafts_save_steps_and_change_no_token() {
    let run = |mut world: World| {
        let id = submit(&mut world, request(0, 10, 60));
        world.run();
        (world.record(id).tokens.clone(), world.control.steps())
    };
    let ((plain, plain_steps), (drafted, drafted_steps)) = (run(world(50)), run(drafting_world(50)));
    assert_eq!(plain, drafted);
    assert!(drafted_steps * 3 < plain_steps * 2, "{drafted_steps} steps instead of {plain_steps}");
}

#[test]
fn a_stop_token_among_accepted_drafts_is_the_end() {
    for stop in 0..40 {
        let mut world = drafting_world(50);
        let request = request(0, 10, 60);
        let solo = MockModel::Hash { seed: 3, vocab_size: 100, end: None }.solo(&request);
        let token = solo[stop];
        let id = submit(&mut world, Request { stop_token_ids: vec![token], ..request });
        world.run();
        assert_eq!(world.end(id), &FinishReason::Stop { token });
        let first = solo.iter().position(|t| *t == token).unwrap();
        assert_eq!(world.record(id).tokens, solo[..first]);
    }
}

#[test]
fn what_is_not_finite_behind_a_rejected_draft_fails_nobody_and_an_accepted_one_fails_its_sequence() {
    let model = MockModel::Hash { seed: 3, vocab_size: 100, end: None };
    let solo = model.solo(&request(0, 10, 30));
    // The mock's wrong drafts are one more than what is right.
    let known = [&request(0, 10, 1).prompt[..], &solo].concat();
    let wrong: Vec<u32> = solo.iter().map(|token| (token + 1) % 100).filter(|token| !known.contains(token)).collect();
    let mut world = drafting_world(50);
    wrong.iter().for_each(|&token| world.control.not_finite_on_token(token));
    let id = submit(&mut world, request(0, 10, 30));
    world.run();
    assert_eq!(world.end(id), &FinishReason::Length);
    let stats = world.core.stats().speculation.unwrap();
    assert!(stats.draft_tokens > stats.accepted_tokens && !wrong.is_empty());

    for position in 12..30 {
        let mut world = drafting_world(50);
        let id = submit(&mut world, request(0, 10, 30));
        world.poison(id, position);
        world.run();
        assert_eq!(world.end(id), &FinishReason::Error(EngineFailure::NonFiniteLogits));
        assert_eq!(world.record(id).tokens, solo[..position - 9], "all that was sampled before it");
    }
}

#[test]
fn drafts_take_no_block_that_a_token_needs() {
    let run = |mut world: World| {
        for family in 0..3 {
            submit(&mut world, request(family, 9, 19));
        }
        world.run();
        world.core.stats()
    };
    // All three fit to the last block.
    assert_eq!(run(world(21)).preemptions, 0);
    let stats = run(drafting_world(21));
    assert_eq!(stats.preemptions, 0);
    assert!(stats.speculation.unwrap().accepted_tokens > 5);
}

#[test]
fn drafts_leave_full_steps_alone() {
    let mut world = drafting_world(50);
    let decoding = submit(&mut world, request(0, 9, 30));
    world.step();
    submit(&mut world, request(1, 120, 1));
    for _ in 0..7 {
        world.step();
        let plan = world.last_step.plan.as_ref().unwrap();
        assert_eq!((plan.num_tokens(), plan.sequences[0].draft.len()), (16, 0));
    }
    assert!(world.record(decoding).end.is_none());
}

#[test]
fn a_reply_that_repeats_its_prompt_is_found_there() {
    let reply: Vec<u32> = (0..60).map(|i| i * i % 97 + 1).collect();
    let steps = |speculation| {
        let model = MockModel::Script { reply: reply.clone(), end: 0 };
        let mut world = World::new(spec(50), &EngineConfig { speculation, ..EngineConfig::default() }, model);
        let id = submit(&mut world, Request::new(reply.clone(), SamplingParams::greedy(), 60));
        world.run();
        assert_eq!(world.record(id).tokens, reply);
        world.control.steps()
    };
    let method = DraftMethod::Ngram { min: 2, max: 4 };
    let lookup = SpeculationConfig { method, num_speculative_tokens: 4, disable_by_batch_size: 16 };
    let (plain, drafted) = (steps(None), steps(Some(lookup)));
    assert!(drafted * 5 < plain * 2, "{drafted} steps instead of {plain}");
}
