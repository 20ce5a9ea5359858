//! Steps that are begun before the one before them has ended: when there are such, and what becomes of them. `World`
//! checks all invariants after each step, among them that every request gets the tokens of its solo run.

use std::sync::Arc;
use std::time::Duration;

use baton_model::{Passing, RunError, RunSpec, SamplingParams};

use super::MockModel;
use super::cases::{request, scored, spec, submit};
use super::toy::ToyGrammar;
use super::world::World;
use crate::{
    DraftMethod, EngineConfig, EngineFailure, FinishReason, Request, RequestId, Share, SpeculationConfig, Tenant,
};

const MODEL: MockModel = MockModel::Hash { seed: 3, vocab_size: 100, end: None };

fn world_with(num_blocks: usize, config: &EngineConfig) -> World {
    World::new(RunSpec { steps_ahead: true, ..spec(num_blocks) }, config, MODEL)
}

fn world(num_blocks: usize) -> World {
    world_with(num_blocks, &EngineConfig::default())
}

/// Steps until the request has so many tokens and a step is under way that was begun ahead, with it.
fn step_to(world: &mut World, id: RequestId, tokens: usize) {
    while world.record(id).tokens.len() < tokens {
        world.step();
    }
    assert!(world.core.is_under_way() && world.core.scheduler().running()[&id].is_under_way());
}

fn steps_ahead(world: &World) -> u64 {
    world.core.stats().steps_ahead
}

#[test]
fn all_steps_of_decoding_but_the_first_are_begun_ahead_and_none_is_in_vain_where_lengths_end_them() {
    let mut world = world(50);
    // Of three lengths.
    let ids: Vec<_> = (0..3).map(|family| submit(&mut world, request(family, 5, 20 + 3 * family))).collect();
    world.run();
    ids.iter().for_each(|&id| assert_eq!(world.end(id), &FinishReason::Length));
    let stats = world.core.stats();
    assert_eq!((stats.step_tokens.count, stats.steps_ahead, world.in_vain), (26, 25, 0));
    assert_eq!(world.control.computed_tokens(), 3 * 5 + 19 + 22 + 25);
}

/// Steps of 16 tokens.
#[test]
fn a_long_prompt_is_gone_on_with_ahead_alone_and_beside_who_decodes() {
    let mut alone = world(50);
    let id = submit(&mut alone, request(0, 100, 5));
    alone.run();
    assert_eq!(alone.end(id), &FinishReason::Length);
    let stats = alone.core.stats();
    assert_eq!((stats.step_tokens.count, stats.steps_ahead, alone.in_vain), (7 + 4, 6 + 4, 0));
    assert_eq!(alone.control.computed_tokens(), 100 + 4);

    let mut beside = world(50);
    let decoding = submit(&mut beside, request(0, 10, 30));
    step_to(&mut beside, decoding, 3);
    let late = submit(&mut beside, request(1, 60, 5));
    beside.run();
    for id in [decoding, late] {
        assert_eq!(beside.end(id), &FinishReason::Length);
    }
    // The late one waited for the end of a step; the next has its first tokens.
    let stats = beside.core.stats();
    assert_eq!((stats.step_tokens.count, stats.step_tokens.count - stats.steps_ahead, beside.in_vain), (30, 2, 0));
    assert_eq!(beside.control.computed_tokens(), 10 + 29 + 60 + 4);
}

#[test]
fn a_prompt_goes_ahead_as_far_as_nothing_is_told_of_it_but_a_plain_draw() {
    let told = SamplingParams { logprobs: Some(2), ..SamplingParams::default() };
    let mut world = world(50);
    submit(&mut world, Request { params: told, ..request(0, 100, 1) });
    world.run();
    // All between the first step and the one that samples.
    assert_eq!((world.core.stats().step_tokens.count, steps_ahead(&world)), (7, 5));

    let mut scores = world_with(50, &EngineConfig::default());
    submit(&mut scores, scored(request(0, 100, 1), 2, &[]));
    scores.run();
    assert_eq!(steps_ahead(&scores), 0);
}

#[test]
fn who_waits_for_a_row_keeps_no_prompt_from_going_ahead_and_starts_beside_its_end() {
    let mut world = world(80);
    let first = submit(&mut world, request(0, 60, 10));
    let second = submit(&mut world, request(1, 40, 10));
    for _ in 0..3 {
        assert!(world.record(second).started.is_none());
        world.step();
    }
    assert_eq!(steps_ahead(&world), 3 - 1);
    world.step();
    let plan = world.last_step.plan.as_ref().unwrap();
    let rows = plan.sequences.iter().map(|step| (RequestId(step.id), step.tokens.count()));
    assert_eq!(rows.collect::<Vec<_>>(), [(first, 12), (second, 4)]);
    world.run();
    assert_eq!([first, second].map(|id| world.end(id).clone()), [FinishReason::Length, FinishReason::Length]);
}

#[test]
fn choices_wait_for_the_prompt_that_the_first_of_them_computes_ahead() {
    let mut world = world(80);
    let ids = world.submit((0..3).map(|_| request(0, 50, 10)).collect()).unwrap();
    world.run();
    ids[1..].iter().for_each(|&id| assert_eq!(world.cached_tokens(id), 48));
    assert_eq!(world.core.stats().prompt_tokens_computed, 50 + 2 + 2);
}

/// What it computed is not finite, which nothing told.
#[test]
fn whoever_leaves_in_the_midst_of_a_prompt_has_all_its_blocks_cleared_those_of_the_step_under_way_behind_it() {
    let mut world = world(30);
    let leaver = submit(&mut world, request(0, 100, 5));
    world.poison(leaver, 0);
    world.step();
    world.step();
    let held = world.core.scheduler().running()[&leaver].table.blocks().to_vec();
    assert!(world.core.is_under_way() && world.core.scheduler().running()[&leaver].num_computed == 32);
    world.abort(leaver);
    let in_doubt: Vec<u32> = world.core.scheduler().in_doubt().values().flat_map(|b| b.kept.clone()).collect();
    assert_eq!(in_doubt, held[8..12], "the step writes four blocks");
    assert_eq!(world.core.stats().blocks.used, 4);
    let next = submit(&mut world, request(1, 100, 5));
    world.run();
    assert_eq!((world.core.stats().blocks.used, world.in_vain, world.spoilt_in_vain), (0, 16, 16));
    let cleared = world.control.cleared_blocks();
    assert_eq!(cleared, held[..12], "and nothing else");
    assert_eq!(world.end(next), &FinishReason::Length);
}

/// Of what passes there are blocks for a token ahead.
#[test]
fn no_prompt_goes_ahead_where_something_passes() {
    let passing = Passing { reach: 7, num_blocks: Passing::fewest(7, 4, 8, 16) };
    let spec = RunSpec { steps_ahead: true, passing: Some(passing), ..spec(50) };
    let mut world = World::new(spec, &EngineConfig::default(), MODEL);
    submit(&mut world, request(0, 100, 5));
    world.run();
    assert_eq!((world.core.stats().step_tokens.count, steps_ahead(&world)), (7 + 4, 4));
}

#[test]
fn whoever_ends_while_a_step_is_under_way_gets_nothing_of_it_and_nobody_notices() {
    type End = fn(&mut World, RequestId) -> FinishReason;
    let stop: End = |world, id| FinishReason::Stop { token: world.record(id).solo[5] };
    let abort: End = |world, id| {
        world.abort(id);
        FinishReason::Aborted
    };
    let limit: End = |world, _| {
        world.now = Duration::from_secs(1);
        FinishReason::Error(EngineFailure::DeadlineExceeded)
    };
    let not_finite: End = |world, id| {
        world.poison(id, 14);
        FinishReason::Error(EngineFailure::NonFiniteLogits)
    };
    for (what, end) in [("stop", stop), ("abort", abort), ("limit", limit), ("not finite", not_finite)] {
        let mut world = world(50);
        let mut leaver = request(0, 10, 30);
        if what == "stop" {
            leaver.stop_token_ids = vec![MODEL.solo(&leaver)[5]];
        }
        let leaver = submit(&mut world, Request { time_limit: Some(Duration::from_secs(1)), ..leaver });
        let mates: Vec<_> = (1..4).map(|family| submit(&mut world, request(family, 10, 30))).collect();
        step_to(&mut world, leaver, 3);
        let reason = end(&mut world, leaver);
        while world.record(leaver).end.is_none() {
            world.step();
        }
        assert_eq!(world.end(leaver), &reason, "{what}");
        let tokens = world.record(leaver).tokens.len();
        world.run();
        assert_eq!((world.in_vain, world.record(leaver).tokens.len()), (1, tokens), "{what}");
        mates.iter().for_each(|&id| assert_eq!(world.end(id), &FinishReason::Length, "{what}"));
        assert_eq!(world.core.stats().blocks.used, 0, "{what}");
        let spoilt = !world.control.cleared_blocks().is_empty();
        assert_eq!(spoilt, what == "not finite", "{what}");
    }
}

#[test]
fn what_a_step_spoils_in_vain_is_cleared_before_anybody_has_it() {
    // The mates need another block at different times, also before it is known that this one is spoilt.
    for lead in 0..8 {
        let mut world = world(50);
        let leaver = submit(&mut world, request(0, 9, 30));
        let mates: Vec<_> = (1..3).map(|family| submit(&mut world, request(family, 6 + lead % 4, 40))).collect();
        step_to(&mut world, leaver, 2 + lead as usize / 4);
        let spoilt = world.core.scheduler().running()[&leaver].num_computed;
        let last = *world.core.scheduler().running()[&leaver].table.blocks().last().unwrap();
        world.poison(leaver, spoilt);
        world.abort(leaver);
        let in_doubt: Vec<u32> = world.core.scheduler().in_doubt().values().flat_map(|b| b.kept.clone()).collect();
        assert_eq!(in_doubt, [last]);
        world.run();
        assert_eq!(world.spoilt_in_vain, 1);
        assert_eq!(world.control.cleared_blocks(), [last]);
        mates.iter().for_each(|&id| assert_eq!(world.end(id), &FinishReason::Length));
    }
}

#[test]
fn r1_a_client_that_leaves_during_a_step_frees_its_blocks_at_once_but_the_one_that_the_step_writes() {
    let mut world = world(50);
    let id = submit(&mut world, request(0, 10, 50));
    step_to(&mut world, id, 5);
    world.abort(id);
    assert_eq!(world.core.stats().blocks.used, 1);
    assert!(!world.core.is_idle(), "the step must end");
    world.step();
    assert!(world.core.is_idle());
    assert_eq!((world.core.stats().blocks.used, world.in_vain), (0, 1));
    let steps = world.control.steps();
    let later = submit(&mut world, request(1, 10, 1));
    world.step();
    assert_eq!((world.end(later), world.control.steps()), (&FinishReason::Length, steps + 1));
}

#[test]
fn nothing_is_cached_of_what_a_step_computed_in_vain() {
    let mut world = world(50);
    let first = request(0, 10, 30);
    let known = [&first.prompt[..], &MODEL.solo(&first)].concat();
    let id = submit(&mut world, first);
    // Two tokens: the step under way fills the third block.
    step_to(&mut world, id, 2);
    world.abort(id);
    world.run();
    let again = submit(&mut world, Request::new(known[..20].to_vec(), SamplingParams::greedy(), 1));
    world.run();
    assert_eq!((world.in_vain, world.cached_tokens(again)), (1, 8));
}

#[test]
fn who_comes_during_a_step_is_admitted_when_it_has_ended() {
    let mut world = world(50);
    let decoding = submit(&mut world, request(0, 10, 30));
    step_to(&mut world, decoding, 3);
    let late = submit(&mut world, request(1, 10, 5));
    world.step();
    assert!(world.last_step.plan.is_none() && world.last_step.ahead.is_none(), "it only ended");
    assert_eq!(world.core.stats().waiting, 1);
    world.step();
    assert!(world.last_step.plan.as_ref().unwrap().sequences.iter().any(|step| step.id == late.0));
    world.run();
}

#[test]
fn whoever_lacks_a_place_or_blocks_keeps_nobody_from_going_ahead_and_starts_when_there_is_room() {
    let places = EngineConfig { max_num_seqs: 2, ..EngineConfig::default() };
    for (num_blocks, config) in [(100, places), (30, EngineConfig::default())] {
        let mut world = world_with(num_blocks, &config);
        let ids: Vec<_> = (0..3).map(|family| submit(&mut world, request(family, 40, 15 + family))).collect();
        while world.record(ids[0]).end.is_none() {
            assert_eq!(world.record(ids[2]).started, None);
            world.step();
        }
        assert!(steps_ahead(&world) > 8, "{} steps ahead with {num_blocks} blocks", steps_ahead(&world));
        world.step();
        assert!(world.record(ids[2]).started.is_some());
        world.run();
    }
}

#[test]
fn steps_ahead_take_no_block_of_the_foreground() {
    // Together 3 × 15 blocks.
    let mut world = world(20);
    let ids: Vec<_> = (0..3).map(|family| submit(&mut world, request(family, 20, 40))).collect();
    world.run();
    ids.iter().for_each(|&id| assert_eq!(world.end(id), &FinishReason::Length));
    let stats = world.core.stats();
    assert!(stats.preemptions > 0 && stats.steps_ahead > 30, "{stats:?}");
}

#[test]
fn r14_a_failure_ends_both_steps_under_way_and_what_waits_outlives_it() {
    type Blow = fn(&World);
    let fails: Blow = |world| world.control.fail_steps(1);
    let panics: Blow = |world| world.control.panic_steps(1);
    let breaks: Blow = |world| world.control.fail_steps_with(1, RunError::Poisoned("mock fault".into()));
    for early in [false, true] {
        for happens in [fails, panics, breaks] {
            let mut world = world_with(50, &EngineConfig { max_num_seqs: 2, ..EngineConfig::default() });
            if early {
                world.control.fail_early();
            }
            let running: Vec<_> = (0..2).map(|family| submit(&mut world, request(family, 10, 30))).collect();
            let waiting = submit(&mut world, request(2, 10, 30));
            step_to(&mut world, running[0], 3);
            happens(&world);
            world.step();
            assert!(!world.core.is_under_way());
            running.iter().for_each(|&id| assert!(matches!(world.end(id), FinishReason::Error(_))));
            world.run();
            assert_eq!(world.end(waiting), &FinishReason::Length);
            assert_eq!((world.core.stats().failed_steps, world.core.down()), (1, None));
        }
    }
}

#[test]
fn r14_a_block_in_doubt_is_cleared_after_a_failure() {
    let mut world = world(50);
    let leaver = submit(&mut world, request(0, 10, 30));
    let mate = submit(&mut world, request(1, 10, 30));
    step_to(&mut world, leaver, 3);
    let last = *world.core.scheduler().running()[&leaver].table.blocks().last().unwrap();
    world.abort(leaver);
    world.control.fail_steps(1);
    world.step();
    assert!(matches!(world.end(mate), FinishReason::Error(_)));
    assert_eq!(world.core.stats().blocks.used, 0);
    let later = submit(&mut world, request(2, 10, 3));
    world.run();
    assert!(world.control.cleared_blocks().contains(&last));
    assert_eq!(world.end(later), &FinishReason::Length);
}

#[test]
fn a_step_is_waited_for_where_more_than_draws_decides_what_follows() {
    let params = |params| Request { params, ..request(0, 10, 20) };
    let waits = [
        ("background", Request { background: true, ..request(0, 10, 20) }),
        ("logprobs", params(SamplingParams { logprobs: Some(2), ..SamplingParams::default() })),
        ("bias", params(SamplingParams { logit_bias: vec![(1, 2.0)], ..SamplingParams::default() })),
        ("penalty", params(SamplingParams { repetition_penalty: 1.1, ..SamplingParams::default() })),
        (
            "grammar",
            Request {
                grammar: Some(Arc::new(ToyGrammar { seed: 1, vocab_size: 100, fails_after: None })),
                ..request(0, 10, 20)
            },
        ),
    ];
    for (what, request) in waits {
        let mut world = world(50);
        submit(&mut world, request);
        world.run();
        assert_eq!(steps_ahead(&world), 0, "{what}");
    }
    // Once the prompt is told.
    let mut told = world(50);
    submit(&mut told, scored(request(0, 10, 20), 2, &[]));
    told.run();
    assert_eq!(steps_ahead(&told), 18);
}

#[test]
fn there_are_drafts_or_steps_ahead_and_never_both() {
    let ngram = DraftMethod::Ngram { min: 1, max: 3 };
    for (method, disable_by_batch_size, goes_ahead) in
        [(ngram, 16, false), (ngram, 2, true), (DraftMethod::Model, 16, false), (DraftMethod::Model, 2, false)]
    {
        let speculation = SpeculationConfig { method, num_speculative_tokens: 2, disable_by_batch_size };
        let config = EngineConfig { speculation: Some(speculation), ..EngineConfig::default() };
        let mut world = world_with(50, &config);
        (0..3).for_each(|family| _ = submit(&mut world, request(family, 5, 20)));
        world.run();
        assert_eq!(steps_ahead(&world) > 0, goes_ahead, "{method:?} up to {disable_by_batch_size} rows");
    }
}

/// Who cannot be let in, for it is not enough that others give way, keeps no step from being begun.
#[test]
fn steps_are_begun_ahead_while_one_waits_for_whom_it_is_not_enough_that_others_give_way() {
    let mut world = world(20);
    let of = |number: u8, request: Request| {
        let share = Share { tenant: Tenant([number; 32]), ..Share::default() };
        Request { share, ..request }
    };
    let ids: Vec<_> = (0..4).map(|family| submit(&mut world, of(1, request(family, 4, 12)))).collect();
    step_to(&mut world, ids[3], 2);
    let large = submit(&mut world, of(2, request(9, 72, 2)));
    let before = steps_ahead(&world);
    (0..4).for_each(|_| world.step());
    assert!(world.record(large).started.is_none() && steps_ahead(&world) >= before + 3);
    world.run();
    assert_eq!(world.core.stats().preemptions, 0);
}

/// Whoever lacks a place alone takes no blocks of the background, which it would have to compute anew.
#[test]
fn the_background_keeps_its_blocks_while_one_waits_for_a_place() {
    let mut world = world_with(50, &EngineConfig { max_num_seqs: 2, ..EngineConfig::default() });
    let canary = submit(&mut world, Request { background: true, ..request(0, 40, 5) });
    world.step();
    let ids: Vec<_> = (1..4).map(|family| submit(&mut world, request(family, 4, 12))).collect();
    step_to(&mut world, ids[1], 4);
    assert!(world.record(ids[2]).started.is_none());
    assert!(steps_ahead(&world) > 0);
    world.run();
    for id in ids.into_iter().chain([canary]) {
        assert_eq!(world.end(id), &FinishReason::Length);
    }
    assert_eq!(world.displaced, 0);
}
