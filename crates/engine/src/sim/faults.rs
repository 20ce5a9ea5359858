//! What the device may do to an engine, and what becomes of the requests. `World` checks all invariants after each step,
//! among them that only those fail that were part of what failed.

use baton_model::RunError;

use super::cases::{request, spec, submit, world};
use super::simulation::adapter;
use super::world::World;
use super::{MockModel, MockRunner};
use crate::stats::DeviceFailures;
use crate::{EngineConfig, EngineFailure, FinishReason, Request};

const MODEL: MockModel = MockModel::Hash { seed: 3, vocab_size: 100, end: None };

fn words() -> String {
    "mock fault".into()
}

fn failed(error: RunError) -> FinishReason {
    FinishReason::Error(EngineFailure::Device(error))
}

/// Does something to a world.
type Blow = fn(&World);

/// Everything that leaves a runner of no use, but not the device.
fn breaks() -> Vec<(&'static str, Blow)> {
    vec![
        ("poisoned", |world| world.control.fail_steps_with(1, RunError::Poisoned(words()))),
        ("failures in a row", |world| world.control.fail_steps(3)),
        ("panics in a row", |world| world.control.panic_steps(3)),
        ("blocks that cannot be cleared", |world| {
            world.control.fail_steps(1);
            world.control.fail_clears(1);
        }),
    ]
}

#[test]
fn r14_without_another_runner_a_broken_one_ends_the_engine_and_everything_in_it() {
    for (what, happens) in breaks() {
        let mut world = World::new(spec(50), &EngineConfig { max_rebuilds: 0, ..EngineConfig::default() }, MODEL);
        let ids: Vec<_> = (0..5).map(|family| submit(&mut world, request(family, 60, 20))).collect();
        happens(&world);
        world.run();
        let stats = world.core.stats();
        assert!(world.core.down().is_some() && stats.failure.is_some() && !stats.rebuilding, "{what}");
        ids.iter().for_each(|&id| assert!(matches!(world.end(id), FinishReason::Error(_)), "{what}"));
    }
}

#[test]
fn r14_what_waits_runs_on_the_runner_that_takes_the_place_of_a_broken_one() {
    for (what, happens) in breaks() {
        let mut world = world(50);
        let warm = submit(&mut world, request(20, 12, 2));
        world.run();
        let ids: Vec<_> = (0..8).map(|family| submit(&mut world, request(family, 60, 20))).collect();
        happens(&world);
        while !world.core.is_broken() {
            world.step();
        }
        let stats = world.core.stats();
        assert!(stats.rebuilding && stats.running == 0 && stats.waiting > 0, "{what}: {stats:?}");
        assert_eq!((stats.blocks.used, stats.blocks.cached), (0, 0), "{what}");
        let again = submit(&mut world, request(20, 12, 2));
        world.run();
        assert_eq!((world.core.down(), world.core.stats().rebuilds), (None, 1), "{what}");
        let done = ids.iter().filter(|&&id| *world.end(id) == FinishReason::Length).count();
        assert!(done > 0 && done < ids.len(), "{what}: {done} of {} outlive it", ids.len());
        assert_eq!([world.cached_tokens(warm), world.cached_tokens(again)], [0; 2], "{what}: nothing is cached");
    }
}

#[test]
fn r14_a_lost_device_ends_everything_at_once_and_nothing_is_loaded_onto_it() {
    let mut world = world(50);
    let ids: Vec<_> = (0..8).map(|family| submit(&mut world, request(family, 60, 20))).collect();
    world.step();
    world.control.fail_steps_with(1, RunError::Lost(words()));
    world.step();
    assert!(world.core.is_idle());
    for id in ids {
        assert_eq!(world.end(id), &failed(RunError::Lost(words())));
    }
    assert_eq!(world.core.down(), Some(&EngineFailure::Device(RunError::Lost(words()))));
    assert_eq!((world.core.stats().rebuilds, world.control.steps()), (0, 2));
}

#[test]
fn r14_runners_that_break_in_a_row_are_bounded_and_those_between_which_steps_are_done_are_not() {
    let poisoned = || RunError::Poisoned(words());
    // Each breaks in its first step.
    let mut busy = world(50);
    let ids: Vec<_> = (0..9).map(|family| submit(&mut busy, request(family, 60, 20))).collect();
    busy.control.fail_steps_with(u32::MAX, poisoned());
    busy.run();
    ids.iter().for_each(|&id| assert_eq!(busy.end(id), &failed(poisoned())));
    assert!(busy.core.down().is_some());
    assert_eq!((busy.core.stats().rebuilds, busy.control.steps()), (3, 4));

    // None can be loaded at first.
    for (failures, down) in [(2, false), (3, true)] {
        let mut world = world(50);
        let broken = submit(&mut world, request(0, 60, 20));
        let waiting = submit(&mut world, request(1, 60, 20));
        world.control.fail_steps_with(1, poisoned());
        world.control.fail_rebuilds(failures);
        world.run();
        assert_eq!(world.end(broken), &failed(poisoned()));
        assert_eq!(world.end(waiting), &if down { failed(poisoned()) } else { FinishReason::Length });
        assert_eq!(world.core.down().is_some(), down);
    }

    let mut world = world(50);
    for family in 0..6 {
        world.control.fail_steps_with(1, poisoned());
        let failing = submit(&mut world, request(family, 60, 2));
        let fine = submit(&mut world, request(family + 10, 60, 2));
        world.run();
        assert_eq!([world.end(failing), world.end(fine)], [&failed(poisoned()), &FinishReason::Length]);
    }
    assert_eq!(world.core.stats().rebuilds, 6);
}

#[test]
fn a_runner_of_other_limits_takes_no_place() {
    let mut world = world(50);
    let waiting = [0, 1].map(|family| submit(&mut world, request(family, 60, 20)))[1];
    world.control.fail_steps_with(1, RunError::Poisoned(words()));
    world.step();
    drop(world.core.take_runner());
    let outputs = world.core.install(Ok(Box::new(MockRunner::new(spec(49), MODEL))), world.now);
    world.note(outputs);
    assert!(world.core.is_broken());
    world.run();
    assert_eq!(world.end(waiting), &FinishReason::Length);
    assert_eq!(world.core.stats().rebuilds, 1);
}

#[test]
fn an_adapter_is_the_one_that_was_loaded_again_or_its_requests_fail() {
    let (kept, lost) = (adapter(1), adapter(2));
    let with = |adapter: &crate::Adapter, family| Request { adapter: Some(adapter.clone()), ..request(family, 60, 9) };
    let mut world = world(50);
    submit(&mut world, request(0, 60, 20));
    let waiting = [submit(&mut world, with(&kept, 1)), submit(&mut world, with(&lost, 2))];
    world.control.fail_steps_with(1, RunError::Poisoned(words()));
    world.step();
    let successor = adapter(1);
    kept.supersede(Some(successor.clone()));
    lost.supersede(None);
    // Taken before, submitted after.
    let late = [submit(&mut world, with(&kept, 3)), submit(&mut world, with(&lost, 4))];
    world.run();
    for [fine, fails] in [waiting, late] {
        assert_eq!(world.end(fine), &FinishReason::Length);
        assert_eq!(world.end(fails), &FinishReason::Error(EngineFailure::AdapterLost));
    }
    let newest = adapter(1);
    successor.supersede(Some(newest));
    assert!(kept.current().is_some() && lost.current().is_none());
}

#[test]
fn every_failure_of_the_device_is_counted_by_its_class() {
    let mut world = world(50);
    for error in [RunError::Failed, RunError::OutOfMemory, RunError::OutOfMemory, RunError::Poisoned, RunError::Lost] {
        world.control.fail_steps_with(1, error(words()));
        submit(&mut world, request(0, 12, 2));
        world.run();
    }
    let expected = DeviceFailures { failed: 1, out_of_memory: 2, poisoned: 1, lost: 1, hung: 0 };
    let stats = world.core.stats();
    assert_eq!((stats.device_failures, stats.failed_steps, stats.finished.error), (expected, 5, 5));
}
