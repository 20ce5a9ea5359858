//! Who goes first, and when it is too late. All invariants about order are checked after each step.

use std::time::Duration;

use super::cases::{request, submit, world};
use super::world::World;
use crate::{EngineFailure, FinishReason, Request, RequestId};

fn with_priority(world: &mut World, priority: i32, request: Request) -> RequestId {
    submit(world, Request { priority, ..request })
}

/// In which order they started.
fn starts(world: &World, ids: &[RequestId]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&i| world.record(ids[i]).started);
    order
}

#[test]
fn of_those_that_wait_the_lower_priority_starts_first_and_of_equals_the_earlier() {
    // One at a time: each takes most of the cache.
    let mut world = world(20);
    let ids: Vec<_> = [0, 5, -3, 5, -3, i32::MIN, i32::MAX]
        .into_iter()
        .zip(0..)
        .map(|(priority, family)| with_priority(&mut world, priority, request(family, 60, 5)))
        .collect();
    while !world.core.is_idle() {
        world.now += Duration::from_millis(1);
        world.step();
    }
    assert_eq!(starts(&world, &ids), [5, 2, 4, 0, 1, 3, 6]);
}

#[test]
fn whoever_runs_is_not_preempted_for_one_who_waits() {
    let mut world = world(20);
    let running = with_priority(&mut world, 9, request(0, 60, 10));
    world.step();
    let urgent = with_priority(&mut world, -9, request(1, 60, 10));
    world.run();
    assert_eq!(world.core.stats().preemptions, 0);
    assert!([running, urgent].iter().all(|&id| world.end(id) == &FinishReason::Length));
}

#[test]
fn the_highest_priority_number_is_preempted_first_even_if_it_came_first() {
    let mut world = world(20);
    let patient = with_priority(&mut world, 1, request(0, 20, 40));
    world.step();
    world.step();
    let urgent: Vec<_> = (1..3).map(|family| with_priority(&mut world, 0, request(family, 16, 40))).collect();
    while urgent.iter().any(|&id| world.record(id).end.is_none()) {
        world.step();
    }
    assert!(world.core.stats().preemptions > 0 && world.record(patient).end.is_none());
    world.run();
    assert_eq!(world.end(patient), &FinishReason::Length);
}

#[test]
fn a_long_prompt_that_goes_first_leaves_a_token_for_each_that_runs() {
    let mut world = world(50);
    let decoding: Vec<_> = (0..3).map(|family| with_priority(&mut world, 0, request(family, 9, 40))).collect();
    (0..4).for_each(|_| world.step());
    let tokens = |world: &World| decoding.iter().map(|&id| world.record(id).tokens.len()).collect::<Vec<_>>();
    with_priority(&mut world, -1, request(4, 100, 5));
    for _ in 0..5 {
        let before = tokens(&world);
        world.step();
        assert!(tokens(&world).iter().zip(before).all(|(now, before)| *now == before + 1));
    }
}

#[test]
fn a_time_limit_ends_what_waits_and_what_runs_and_gives_its_blocks_back() {
    let mut world = world(20);
    let time_limit = Some(Duration::from_millis(100));
    let running = submit(&mut world, Request { time_limit, ..request(0, 8, 60) });
    let mate = submit(&mut world, request(1, 8, 4));
    let waiting = submit(&mut world, Request { time_limit, ..request(2, 70, 5) });
    world.step();
    world.step();
    world.now = Duration::from_millis(99);
    world.step();
    assert!(world.record(running).end.is_none() && world.record(running).tokens.len() > 1);
    world.now = Duration::from_millis(100);
    world.step();
    for id in [running, waiting] {
        assert_eq!(world.end(id), &FinishReason::Error(EngineFailure::DeadlineExceeded));
    }
    world.run();
    assert_eq!(world.end(mate), &FinishReason::Length);
    assert_eq!(world.core.stats().blocks.used, 0);
}
