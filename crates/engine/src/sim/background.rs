//! What background requests do to others, which is next to nothing, and what others do to them. That no step of the
//! foreground is delayed is shown in [`super::simulation`].

use super::cases::{request, scored, submit, world};
use crate::{EngineFailure, FinishReason, Request};

fn background(request: Request) -> Request {
    Request { background: true, ..request }
}

#[test]
fn the_background_pauses_at_once_keeps_its_blocks_and_goes_on_where_it_was() {
    let mut world = world(50);
    let canary = submit(&mut world, background(scored(request(0, 40, 5), 2, &[])));
    world.step();
    assert_eq!((world.core.stats().running, world.core.stats().background), (0, 1));
    let client = submit(&mut world, request(1, 10, 3));
    (0..3).for_each(|_| world.step());
    assert_eq!(world.end(client), &FinishReason::Length);
    assert_eq!(world.record(canary).scores.len(), 16);
    world.run();
    assert_eq!(world.end(canary), &FinishReason::Length);
    assert_eq!(world.control.computed_tokens(), 40 + 4 + 10 + 2, "nothing was computed twice");
}

#[test]
fn the_foreground_takes_blocks_of_the_background_and_never_the_other_way_round() {
    let mut world = world(20);
    let canaries: Vec<_> = (0..2).map(|family| submit(&mut world, background(request(family, 20, 15)))).collect();
    (0..4).for_each(|_| world.step());
    assert!(world.core.stats().blocks.used >= 10);
    // As many blocks as there are.
    let client = submit(&mut world, request(2, 60, 21));
    world.step();
    assert!(world.last_step.planned().contains(&client));
    while world.record(client).end.is_none() {
        world.step();
    }
    assert_eq!(world.control.steps(), 4 + 4 + 20);
    assert_eq!((world.core.stats().preemptions, world.displaced), (0, 2));
    world.run();
    canaries.iter().for_each(|&id| assert_eq!(world.end(id), &FinishReason::Length));
}

#[test]
fn a_failed_step_of_the_foreground_ends_the_background_that_held_blocks() {
    let mut world = world(50);
    let paused = submit(&mut world, background(request(0, 40, 5)));
    world.step();
    let waiting = submit(&mut world, background(request(3, 40, 5)));
    let client = submit(&mut world, request(1, 10, 3));
    world.control.fail_steps(1);
    world.run();
    for id in [client, paused] {
        assert!(matches!(world.end(id), FinishReason::Error(EngineFailure::Device(_))));
    }
    assert_eq!(world.end(waiting), &FinishReason::Length);
}

#[test]
fn of_the_cache_the_background_displaces_what_was_released_longest_ago_and_no_more_than_it_holds() {
    let mut world = world(20);
    let prompts = [(0, 32), (1, 32)].map(|(family, len)| request(family, len, 1));
    for prompt in prompts.clone() {
        submit(&mut world, prompt);
        world.run();
    }
    // Eight blocks each time, of which four were free at first.
    for family in 2..7 {
        submit(&mut world, background(request(family, 32, 1)));
        world.run();
    }
    let [oldest, newest] = prompts;
    let cached = [newest, oldest].map(|prompt| {
        let id = submit(&mut world, prompt);
        world.run();
        world.cached_tokens(id)
    });
    assert_eq!(cached, [28, 16]);
}
