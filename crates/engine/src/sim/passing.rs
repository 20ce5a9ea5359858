//! Cases of what passes: blocks of the last tokens only, which prefixes need to be gone on from.

use baton_model::{PASSED, Passing, RunSpec};

use super::MockModel;
use super::cases::{request, spec, submit};
use super::world::World;
use crate::{EngineConfig, EngineFailure, FinishReason, Request, RequestId};

/// Of blocks of 4 tokens two lie in the reach of whoever goes on behind a block.
const REACH: usize = 7;
const MODEL: MockModel = MockModel::Hash { seed: 3, vocab_size: 100, end: None };

fn world_with(more: usize, spec: RunSpec) -> World {
    let fewest = Passing::fewest(REACH, spec.block_size, spec.max_step_sequences, spec.max_step_tokens);
    let passing = Some(Passing { reach: REACH, num_blocks: fewest + more });
    World::new(RunSpec { passing, ..spec }, &EngineConfig::default(), MODEL)
}

/// Passing blocks that a running sequence holds.
fn held(world: &World, id: RequestId) -> Vec<u32> {
    let table = &world.core.scheduler().running()[&id].table;
    table.passing().iter().copied().filter(|&block| block != PASSED).collect()
}

/// As `request`, of which only the first tokens are of the family.
fn branch(family: u32, common: usize, prompt_len: u32, max_tokens: u32) -> Request {
    let mut request = request(family, prompt_len, max_tokens);
    request.prompt[common..].iter_mut().for_each(|token| *token = (*token + 50) % 100);
    request
}

#[test]
fn a_long_context_holds_few_passing_blocks_and_gives_the_tokens_of_its_solo_run() {
    let mut world = world_with(0, spec(50));
    let id = submit(&mut world, request(0, 90, 60));
    let mut most = 0;
    while world.record(id).end.is_none() {
        world.step();
        let running = world.core.scheduler().running().contains_key(&id);
        let held = if running { held(&world, id).len() } else { 0 };
        assert_eq!(world.core.stats().passing_blocks.expect("the model has some").used, held);
        most = most.max(held);
    }
    assert_eq!(world.end(id), &FinishReason::Length);
    assert_eq!(most, 3, "two behind the last, which is not full");
}

#[test]
fn a_conversation_is_gone_on_with_where_it_ended() {
    let mut world = world_with(0, spec(50));
    let first = submit(&mut world, request(0, 40, 21));
    world.run();
    let prompt = [world.record(first).request.prompt.clone(), world.record(first).tokens.clone()].concat();
    let next = submit(&mut world, Request { prompt, ..request(0, 1, 5) });
    world.run();
    // All but the last token, whose keys nobody computed.
    assert_eq!(world.cached_tokens(next), 60);
}

#[test]
fn what_others_generate_displaces_no_end_of_a_conversation() {
    let mut world = world_with(0, spec(400));
    let first = submit(&mut world, request(0, 30, 9));
    world.run();
    // More than all passing blocks, one after the other.
    for family in 1..11 {
        submit(&mut world, request(family, 5, 100));
        world.run();
    }
    let prompt = [world.record(first).request.prompt.clone(), world.record(first).tokens.clone()].concat();
    let next = submit(&mut world, Request { prompt, ..request(0, 1, 5) });
    world.run();
    assert_eq!(world.cached_tokens(next), 36);
}

#[test]
fn a_prefix_is_of_use_as_far_as_its_end_is_cached() {
    // Whole in one step, and in steps on whose way what passes is given back before anything vouches for it.
    for (step, inner) in [(64, 24), (16, 0)] {
        let mut world = world_with(100, RunSpec { max_step_tokens: step, ..spec(50) });
        submit(&mut world, request(0, 50, 1));
        world.run();
        let [whole, inside] = [branch(0, 49, 50, 2), branch(0, 27, 50, 2)].map(|request| submit(&mut world, request));
        world.run();
        assert_eq!(world.cached_tokens(whole), 48, "steps of {step}");
        assert_eq!(world.cached_tokens(inside), inner, "steps of {step}");
    }
}

#[test]
fn a_prefix_whose_passing_blocks_were_evicted_is_computed_again() {
    let mut world = world_with(0, spec(400));
    let tokens = |world: &World, id| world.record(id).tokens.clone();
    let first = submit(&mut world, request(0, 50, 5));
    world.run();
    // Nobody needs the kept blocks, but all that passes is taken in turn.
    for family in 1..20 {
        submit(&mut world, request(family, 60, 5));
        world.run();
    }
    let again = submit(&mut world, request(0, 50, 5));
    world.run();
    assert_eq!((world.cached_tokens(again), tokens(&world, again)), (0, tokens(&world, first)));
    // Its blocks are published still: with what passes beside them they serve the next.
    let once_more = submit(&mut world, request(0, 50, 5));
    world.run();
    assert_eq!((world.cached_tokens(once_more), tokens(&world, once_more)), (48, tokens(&world, first)));
}

#[test]
fn what_passes_of_a_prompt_that_was_not_finite_is_cleared_before_anybody_has_it() {
    let mut world = world_with(0, spec(100));
    let faulty = submit(&mut world, request(0, 70, 20));
    world.poison(faulty, 3);
    let mut all = std::collections::BTreeSet::new();
    while world.record(faulty).end.is_none() {
        world.step();
        if world.core.scheduler().running().contains_key(&faulty) {
            all.extend(held(&world, faulty));
        }
        // It takes what the other gave back.
        submit(&mut world, request(1, 3, 1));
    }
    assert_eq!(world.end(faulty), &FinishReason::Error(EngineFailure::NonFiniteLogits));
    world.run();
    let cleared = world.control.cleared_passing_blocks();
    assert!(all.len() > 3 && all.iter().all(|block| cleared.contains(block)), "{all:?}, cleared {cleared:?}");
}

#[test]
fn choices_share_the_prompt_that_the_first_computes_in_steps() {
    for prompt in [34, 36, 40, 47] {
        let mut world = world_with(0, spec(60));
        let choices = world.submit(vec![request(0, prompt, 6); 3]).unwrap();
        world.run();
        let whole = (prompt as usize - 1) / 4 * 4;
        choices[1..].iter().for_each(|&id| assert_eq!(world.cached_tokens(id), whole, "of {prompt}"));
    }
}
