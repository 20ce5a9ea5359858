//! What grammars do to outputs, and what goes wrong with them. That the rest changes nothing about a constrained output
//! is shown in [`super::simulation`].

use std::sync::Arc;

use super::cases::{drafting_world, request, submit, world};
use super::toy::ToyGrammar;
use crate::{EngineFailure, FinishReason, Request};

fn constrained(request: Request, fails_after: Option<usize>) -> Request {
    let grammar = ToyGrammar { seed: 9, vocab_size: 100, fails_after };
    Request { grammar: Some(Arc::new(grammar)), ..request }
}

fn failed(why: &str) -> FinishReason {
    FinishReason::Error(EngineFailure::GrammarFailed(why.into()))
}

#[test]
fn a_grammar_changes_what_it_refuses_and_costs_no_step() {
    let run = |constrain: bool| {
        let mut world = world(50);
        let plain = request(0, 10, 60);
        let id = submit(&mut world, if constrain { constrained(plain, None) } else { plain });
        world.run();
        (world.record(id).tokens.clone(), world.control.steps())
    };
    let ((plain, plain_steps), (constrained, steps)) = (run(false), run(true));
    assert_eq!((plain.len(), constrained.len(), plain_steps), (60, 60, steps));
    assert_ne!(plain, constrained);
}

#[test]
fn drafts_are_accepted_under_a_grammar_and_change_nothing() {
    let run = |mut world: super::world::World| {
        let id = submit(&mut world, constrained(request(0, 10, 100), None));
        world.run();
        (world.record(id).tokens.clone(), world.control.steps())
    };
    let ((plain, plain_steps), (drafted, drafted_steps)) = (run(world(50)), run(drafting_world(50)));
    assert_eq!(plain, drafted);
    assert!(drafted_steps * 5 < plain_steps * 4, "{drafted_steps} steps instead of {plain_steps}");
}

#[test]
fn a_grammar_that_fails_ends_its_own_request_where_it_fails_with_drafts_or_without() {
    for fails_after in [0, 1, 7, 19] {
        for mut world in [world(50), drafting_world(50)] {
            let faulty = submit(&mut world, constrained(request(0, 12, 20), Some(fails_after)));
            let mates: Vec<_> =
                (0..3).map(|family| submit(&mut world, constrained(request(family, 12, 20), Some(20)))).collect();
            world.run();
            assert_eq!(world.end(faulty), &failed("the toy is broken"));
            assert_eq!(world.record(faulty).tokens.len(), fails_after);
            mates.iter().for_each(|&id| assert_eq!(world.end(id), &FinishReason::Length));
            // Its values are sound.
            assert!(world.control.cleared_blocks().is_empty());
        }
    }
}

#[test]
fn a_failed_step_and_an_abort_leave_no_work_behind() {
    let mut world = world(50);
    let ids: Vec<_> = (0..3).map(|family| submit(&mut world, constrained(request(family, 12, 20), None))).collect();
    world.step();
    world.abort(ids[0]);
    world.control.fail_steps(1);
    world.step();
    let again = submit(&mut world, constrained(request(0, 12, 20), None));
    world.run();
    assert_eq!(world.end(again), &FinishReason::Length);
    for id in &ids[1..] {
        assert!(matches!(world.end(*id), FinishReason::Error(EngineFailure::Device(_))));
    }
}
